"""The Wasserstein autoencoder with an MMD penalty (Tolstikhin et al. 2018), and a VAE with one (Zhao et al. 2019)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bvae.balance import GaussianVAELoss, Loss
from bvae.config.registry import Family
from bvae.config.settings import need
from bvae.models.vae import VAE
from bvae.stages.families.ae import AEObjective
from bvae.stages.families.rae import check_weight
from bvae.stages.families.vae import BALANCED
from bvae.stages.objective import Ingredients, Noise, VAEObjective
from bvae.world import ALONE, World, gather

if TYPE_CHECKING:
    from bvae.config import Config

SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)  # the authors' scales of the kernels


@dataclass(frozen=True, kw_only=True)
class MMDSettings:
    """Settings of families `wae-mmd` and `info-vae`."""

    mmd: float = 200.0
    """mmd times the MMD between codes and N(0, I) is added to the mean squared error of an image."""


def mmd(z: Tensor, n: Tensor) -> Tensor:
    """Unbiased estimate of the squared MMD between the laws of z and of n, both [B,k] with B > 1; may be negative.

        sum over i != j of (K(z_i, z_j) + K(n_i, n_j)) / (B (B - 1))  -  2 sum over i, j of K(z_i, n_j) / B^2

    K is the sum over s of C / (C + |a - b|^2), inverse multiquadratics with C = 2 k s, s in SCALES: those of the WAE
    for the prior N(0, I). A scalar with a gradient.
    """
    batch, k = z.shape
    points = torch.cat([z, n])
    norm2 = points.square().sum(1)
    distance2 = norm2[:, None] + norm2[None, :] - 2 * points @ points.t()
    kernel = torch.zeros_like(distance2)
    for scale in SCALES:
        kernel = kernel + 2 * k * scale / (2 * k * scale + distance2)
    own = kernel[:batch, :batch].sum() + kernel[batch:, batch:].sum() - kernel.diagonal().sum()
    return own / (batch * (batch - 1)) - 2 * kernel[:batch, batch:].mean()


class AggregateMMD:
    """The MMD between the codes of a whole batch and as many draws of N(0, I).

    An MMD is no mean over images: several ranks bring their codes together, each finds that of the whole batch, and the
    gradient goes back to all of them.
    """

    def __init__(self, world: World) -> None:
        self.world = world

    def __call__(self, z: Tensor, noise: Noise) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            if self.world.size > 1:
                z = gather(z).flatten(0, 1)
            return mmd(z, noise.normal(len(z), z.shape[1], whole=True))


class WAEObjective(AEObjective):
    """The squared error and `weight` times the MMD, in units of sse.

    Args:
        amp, l2, penalised: see AEObjective. world: whose ranks share a batch.
    """

    parts = ("objective", "mse", "mmd")

    def __init__(
        self,
        weight: float,
        amp: bool = False,
        l2: float = 0.0,
        penalised: Sequence[nn.Module] = (),
        world: World = ALONE,
    ) -> None:
        super().__init__(amp, l2, penalised)
        self.weight = weight
        self.mmd = AggregateMMD(world)
        self.gathers = world.size > 1  # which torch.compile cannot follow: see Step.compile

    def regularised(
        self, total: Tensor, model: VAE, z: Tensor, recon: Tensor, noise: Noise
    ) -> tuple[Tensor, list[Tensor]]:
        distance = self.mmd(z, noise)
        return total + self.weight * distance, [distance]


class InfoVAEObjective(VAEObjective):
    """The negative ELBO with, beside the squared error, `weight` times the MMD: both are over 2 gamma^2.

    Args:
        loss, amp, l2, penalised: see VAEObjective. world: whose ranks share a batch.
    """

    parts = (*VAEObjective.parts, "mmd")

    def __init__(
        self,
        weight: float,
        loss: GaussianVAELoss,
        amp: bool = False,
        l2: float = 0.0,
        penalised: Sequence[nn.Module] = (),
        world: World = ALONE,
    ) -> None:
        super().__init__(loss, amp, l2, penalised)
        self.weight = weight
        self.mmd = AggregateMMD(world)
        self.gathers = world.size > 1  # which torch.compile cannot follow: see Step.compile

    def regularised(self, loss: Loss, z: Tensor, noise: Noise) -> tuple[Tensor, list[Tensor]]:
        distance = self.mmd(z, noise)
        return loss.loss + self.weight * distance / (2 * loss.gamma2), [distance.detach()]


def check(config: "Config") -> None:
    """Raises UserError for a weight that cannot be and for a batch of one image."""
    check_weight(config, MMDSettings, "mmd")
    need(config.batch > 1, f"--family {config.family} compares the codes of a batch: --batch 1 has no pair of them")


def build_wae(given: Ingredients) -> WAEObjective:
    c = given.config
    return WAEObjective(c.part(MMDSettings).mmd, given.amp, c.l2, given.penalised, given.world)


def build_info(given: Ingredients) -> InfoVAEObjective:
    c = given.config
    weight = c.part(MMDSettings).mmd
    return InfoVAEObjective(weight, given.balance(), given.amp, c.l2, given.penalised, given.world)


WAE_MMD = Family("wae-mmd", build_wae, check, MMDSettings, deterministic=True, title="Wasserstein autoencoder")
INFO_VAE = Family("info-vae", build_info, check, MMDSettings, uses=BALANCED, title="InfoVAE")
