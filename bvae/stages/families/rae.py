"""Regularised autoencoders (Ghosh et al. 2020): small codes, beside small kernels or spectral norm in the decoder.

Nothing draws the codes to N(0, I): a density is fitted to them after training (docs/priors.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn
from torch.nn.utils import parametrize

from bvae.config.registry import Family
from bvae.config.settings import flag, need
from bvae.models.layers import SpectralConv, SpectralConvTranspose, SpectralDense
from bvae.models.rae import RaeSettings
from bvae.models.vae import VAE
from bvae.stages.families.ae import AEObjective
from bvae.stages.objective import Ingredients, Noise, kernel_norm2

if TYPE_CHECKING:
    from bvae.config import Config

SPECTRAL = (SpectralConv, SpectralConvTranspose, SpectralDense)


@dataclass(frozen=True, kw_only=True)
class CodeSettings:
    """Settings of families `rae-l2`, `rae-gp` and `rae-sn`."""

    latent_l2: float = 2.4e-2
    """latent_l2 * |z|^2 is added to the squared error of an image."""


@dataclass(frozen=True, kw_only=True)
class KernelSettings:
    """Settings of family `rae-l2`."""

    decoder_l2: float = 3.1e-3
    """decoder_l2 * sum(w^2) over the decoder's kernels is added to the squared error of an image."""
    decoder_l2_on: Literal["all", "transposed"] = "all"
    """`all`: kernels of every dense and convolutional layer; `transposed`: of transposed convolutions alone."""


class RAEObjective(AEObjective):
    """The squared error, latent_l2 times the mean of |z|^2, and decoder_l2 times the sum of w^2 of kernels.

    Args:
        latent_l2, decoder_l2: weights, in units of sse.
        kernels: modules whose `weight` decoder_l2 is on.
        amp, l2, penalised: see AEObjective.
    """

    parts = ("objective", "mse", "latent_norm2", "decoder_norm2")

    def __init__(
        self,
        latent_l2: float,
        decoder_l2: float = 0.0,
        kernels: Sequence[nn.Module] = (),
        amp: bool = False,
        l2: float = 0.0,
        penalised: Sequence[nn.Module] = (),
    ) -> None:
        super().__init__(amp, l2, penalised)
        self.latent_l2 = latent_l2
        self.decoder_l2 = decoder_l2
        self.kernels = tuple(kernels)
        self.penalised = (*self.l2_on, *self.kernels)

    def regularised(
        self, total: Tensor, model: VAE, z: Tensor, recon: Tensor, noise: Noise
    ) -> tuple[Tensor, list[Tensor]]:
        norm2 = z.square().sum(1).mean()
        of_kernels = kernel_norm2(self.kernels) if self.kernels else z.new_zeros(())
        return total + self.latent_l2 * norm2 + self.decoder_l2 * of_kernels, [norm2, of_kernels]


def spectral(decoder: nn.Module) -> bool:
    """True for a layer with spectral norm, ours or one made by torch's parametrisation."""
    return any(isinstance(m, SPECTRAL) or parametrize.is_parametrized(m, "weight") for m in decoder.modules())


def kernels_of(decoder: nn.Module, on: str) -> list[nn.Module]:
    """The decoder's layers whose kernels --decoder-l2-on names."""
    kinds: tuple[type[nn.Module], ...] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    if on == "all":
        kinds += (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return [m for m in decoder.modules() if isinstance(m, kinds)]


def check_weight(config: "Config", settings: type, *names: str) -> None:
    """Raises UserError for a weight of a term that is negative or not finite."""
    for name in names:
        value = getattr(config.part(settings), name)
        need(0 <= value < float("inf"), f"--{flag(name)} must be a number of at least 0, not {value}")


def check_l2(config: "Config") -> None:
    check_weight(config, CodeSettings, "latent_l2")
    check_weight(config, KernelSettings, "decoder_l2")


def check_sn(config: "Config") -> None:
    """Raises UserError for a network that has no spectral norm in its decoder, where the configuration says so."""
    check_weight(config, CodeSettings, "latent_l2")
    name = config.network
    without = name in ("resnet", "infogan", "wae", "mlp")
    need(
        not without and (name != "rae" or config.part(RaeSettings).rae_spectral != "none"),
        "--family rae-sn needs a decoder with spectral norm: --network rae with --rae-spectral all (or decoder)",
    )


def build_l2(given: Ingredients) -> RAEObjective:
    c, own = given.config, given.config.part(KernelSettings)
    kernels = kernels_of(given.model.decoder, own.decoder_l2_on) if own.decoder_l2 else []
    if own.decoder_l2:
        need(bool(kernels), "--decoder-l2: the decoder has no kernels that --decoder-l2-on names")
    latent_l2 = c.part(CodeSettings).latent_l2
    return RAEObjective(latent_l2, own.decoder_l2, kernels, given.amp, c.l2, given.penalised)


def build_sn(given: Ingredients) -> RAEObjective:
    need(spectral(given.model.decoder), "--family rae-sn: the network's decoder has no layer with spectral norm")
    c = given.config
    return RAEObjective(c.part(CodeSettings).latent_l2, amp=given.amp, l2=c.l2, penalised=given.penalised)


RAE_L2 = Family(
    "rae-l2", build_l2, check_l2, (CodeSettings, KernelSettings), deterministic=True, title="L2-regularised autoencoder"
)
RAE_SN = Family(
    "rae-sn", build_sn, check_sn, CodeSettings, deterministic=True, title="spectrally normalised autoencoder"
)
