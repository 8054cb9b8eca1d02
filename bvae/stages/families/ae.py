"""The autoencoder with a deterministic encoder, and what its regularised kinds share."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from bvae import ops
from bvae.config.registry import Family
from bvae.models.vae import VAE
from bvae.stages.objective import Ingredients, Noise, kernel_norm2


class AEObjective:
    """The squared error of an autoencoder, with an l2 penalty on kernels; subclasses add terms to it.

        total = mean over the batch of |x - decoder(mu)|^2  +  terms  +  l2 * sum over the penalised kernels of w^2

    The unit is that of sse, the sum of squared errors of an image in [0,1]. Nothing here has a state.

    Args:
        amp: run the networks in bf16; codes and loss stay float32.
        l2: weight of the penalty.
        penalised: modules whose `weight` it is on.
    """

    parts: tuple[str, ...] = ("objective", "mse")

    def __init__(self, amp: bool = False, l2: float = 0.0, penalised: Sequence[nn.Module] = ()) -> None:
        self.amp = amp
        self.l2 = l2
        self.l2_on = tuple(penalised)
        self.penalised = self.l2_on
        """modules whose `weight` any term is on: beside the network's gradient it gets one in float32"""

    def __call__(
        self, model: nn.Module, x: Tensor, target: Tensor, noise: Noise
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        assert isinstance(model, VAE)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.amp):
            z = model.encode(x).mu
            z, recon = self.decode(model, z)
        sse = squared_error(recon, target)
        total, figures = self.regularised(sse / len(x), model, z, recon, noise)
        if self.l2_on:
            total = total + self.l2 * kernel_norm2(self.l2_on)
        mse = sse.detach() / recon.numel()
        return total, torch.stack([t.detach().float() for t in (total, mse, *figures)]), None

    def decode(self, model: VAE, z: Tensor) -> tuple[Tensor, Tensor]:
        """The codes as `regularised` gets them, and the logits of their images."""
        return z, model.decoder(z)

    def regularised(
        self, total: Tensor, model: VAE, z: Tensor, recon: Tensor, noise: Noise
    ) -> tuple[Tensor, list[Tensor]]:
        """The objective with further terms, in units of sse, and the figures that they add to `parts`."""
        return total, []

    def state(self) -> dict[str, Tensor]:
        return {}

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        return ()

    def pooled(self, parts: Tensor) -> None:
        """Nothing moves by the figures of a step."""

    def figures(self) -> dict[str, Tensor]:
        return {}

    def train(self, mode: bool = True) -> object:
        return self


def squared_error(recon: Tensor, target: Tensor) -> Tensor:
    """Sum over the batch of (sigmoid(recon) - target)^2, a float32 scalar with a gradient."""
    one = torch.ones((), device=recon.device)
    none = torch.zeros((), dtype=torch.int64, device=recon.device)
    return ops.balanced_loss(recon, target, torch.zeros_like(one), one, none, logits=True, update=False).sse


def build(given: Ingredients) -> AEObjective:
    return AEObjective(given.amp, given.config.l2, given.penalised)


AE = Family("ae", build, deterministic=True, title="autoencoder")
