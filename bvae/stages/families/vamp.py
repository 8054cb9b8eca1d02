"""A VAE with the VampPrior (Tomczak & Welling 2018): a mixture of posteriors of trained pseudo-inputs."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from bvae.balance import BALANCES
from bvae.config.registry import Family
from bvae.config.settings import need
from bvae.models.vae import VAE
from bvae.models.vamp import VampPrior
from bvae.stages.families.vae import BALANCED
from bvae.stages.objective import Ingredients, VAEObjective

if TYPE_CHECKING:
    from bvae.config import Config


@dataclass(frozen=True, kw_only=True)
class VampSettings:
    """Settings of family `vamp`."""

    pseudo_inputs: int = 500
    """K, the components of the prior. Each step encodes as many images more."""


class VampObjective(VAEObjective):
    """The negative ELBO with the model's own prior: the KL is estimated at the z that is decoded."""

    def divergence(self, model: VAE, z: Tensor, mu: Tensor, log_sigma: Tensor, kl: Tensor) -> Tensor:
        assert model.prior is not None
        return model.prior.divergence(model.encoder, z, mu, log_sigma).sum()


def prior(config: "Config") -> VampPrior:
    return VampPrior(config.part(VampSettings).pseudo_inputs, config.image_shape)


def build(given: Ingredients) -> VampObjective:
    return VampObjective(given.balance(), given.amp, given.config.l2, given.penalised)


def check(config: "Config") -> None:
    """Raises UserError for fewer than two pseudo-inputs, which batch norm could not normalise, and for some balances.

    Those that bound the KL of each latent have none here: the mixture's KL is no sum over latents.
    """
    count = config.part(VampSettings).pseudo_inputs
    need(2 <= count <= 65_536, f"--pseudo-inputs must be from 2 to 65536, not {count}")
    balance = BALANCES.get(config.balance)
    per_latent = balance is not None and balance.loss.per_latent
    need(not per_latent, f"--balance {config.balance} needs the KL of each latent, which --family vamp does not have")


VAMP = Family("vamp", build, check, VampSettings, uses=BALANCED, title="VampPrior VAE", prior=prior)
