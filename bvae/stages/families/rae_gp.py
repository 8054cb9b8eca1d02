"""The regularised autoencoder whose decoder is kept smooth by a penalty on its gradient (Ghosh et al. 2020)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from bvae.config.registry import Family
from bvae.models.plain import plain_layers
from bvae.models.vae import VAE
from bvae.stages.families.ae import AEObjective
from bvae.stages.families.rae import CodeSettings, check_weight
from bvae.stages.objective import Ingredients, Noise

if TYPE_CHECKING:
    from bvae.config import Config


@dataclass(frozen=True, kw_only=True)
class GradientSettings:
    """Settings of family `rae-gp`."""

    gradient_penalty: float = 1e-2
    """gradient_penalty times the squared norm of the decoder's gradient is added to the squared error of an image."""
    gradient_of: Literal["image", "energy"] = "image"
    """`image`: |J|^2 of the Jacobian J of the image, the paper's; `energy`: |grad |image|^2|^2, the authors' code."""


class GradientPenaltyObjective(AEObjective):
    """The squared error, latent_l2 times the mean of |z|^2, and gradient_penalty times that of a gradient's square.

    `image`: |J|_F^2 with J = d image / d z, estimated without bias by |J^T v|^2 with one v ~ N(0, I) an image.
    `energy`: |d |image|^2 / d z|^2, the authors' code.

    Args:
        latent_l2, gradient_penalty: weights, in units of sse.
        gradient_of: "image" or "energy".
        amp, l2, penalised: see AEObjective.
    """

    parts = ("objective", "mse", "latent_norm2", "gradient_norm2")

    def __init__(
        self,
        latent_l2: float,
        gradient_penalty: float,
        gradient_of: Literal["image", "energy"] = "image",
        amp: bool = False,
        l2: float = 0.0,
        penalised: tuple[torch.nn.Module, ...] = (),
    ) -> None:
        super().__init__(amp, l2, penalised)
        self.latent_l2 = latent_l2
        self.gradient_penalty = gradient_penalty
        self.gradient_of = gradient_of

    def decode(self, model: VAE, z: Tensor) -> tuple[Tensor, Tensor]:
        # A penalty on a gradient is differentiated twice.
        with plain_layers():
            return z, model.decoder(z)

    def regularised(
        self, total: Tensor, model: VAE, z: Tensor, recon: Tensor, noise: Noise
    ) -> tuple[Tensor, list[Tensor]]:
        norm2 = z.square().sum(1).mean()
        image = torch.sigmoid(recon.float())
        if self.gradient_of == "image":
            v = noise.normal(len(image), image[0].numel()).view_as(image)
            scalar = (v * image).sum()
        else:
            scalar = image.square().sum()
        (gradient,) = torch.autograd.grad(scalar, z, create_graph=True)
        gradient2 = gradient.float().square().sum(1).mean()
        return total + self.latent_l2 * norm2 + self.gradient_penalty * gradient2, [norm2, gradient2]


def build(given: Ingredients) -> GradientPenaltyObjective:
    c, own = given.config, given.config.part(GradientSettings)
    return GradientPenaltyObjective(
        c.part(CodeSettings).latent_l2,
        own.gradient_penalty,
        own.gradient_of,
        given.amp,
        c.l2,
        tuple(given.penalised),
    )


def check(config: "Config") -> None:
    check_weight(config, CodeSettings, "latent_l2")
    check_weight(config, GradientSettings, "gradient_penalty")


RAE_GP = Family(
    "rae-gp", build, check, (CodeSettings, GradientSettings), deterministic=True, title="gradient-penalised autoencoder"
)
