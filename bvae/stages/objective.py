"""Objectives: the function of a batch that a stage minimises, with the state that it moves."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from bvae import ops
from bvae.balance import GaussianVAELoss, Loss
from bvae.config import Config
from bvae.models.vae import VAE
from bvae.world import ALONE, World


class Noise(NamedTuple):
    """The source of a step's noise.

    rng: int64 [2] of ops.make_rng, on the device; each draw advances it there.
    first_sample: place of this process's first sample in the whole batch, so that all ranks draw what one would.
    """

    rng: Tensor
    first_sample: int = 0

    @torch.no_grad()
    def normal(self, rows: int, columns: int, whole: bool = False) -> Tensor:
        """Draws N(0, 1), float32 [rows, columns]: for this process's samples, or for those of the `whole` batch."""
        # By the posterior's kernel, whose step of rng torch.compile keeps in its place.
        zero = torch.zeros(rows, columns, device=self.rng.device)
        return ops.sample_kl(zero, zero, self.rng, first_sample=0 if whole else self.first_sample).z


class Objective(Protocol):
    """The function that a stage minimises. One object serves one stage of one run.

    A step calls it inside a CUDA graph and under torch.compile: no part of it may look at the device from the host.
    """

    parts: tuple[str, ...]
    """names of the figures that a call reports, each a mean over the batch"""

    def __call__(
        self, model: nn.Module, x: Tensor, target: Tensor, noise: Noise
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(total, parts, moments) of a batch.

        total: scalar with a gradient. parts: float32 [len(self.parts)] without one. moments: [4,k], sums over the batch
        of mu, mu^2, sigma^2 and KL of each latent (ops.sample_kl), or None where there is no posterior.
        """
        ...

    def state(self) -> dict[str, Tensor]:
        """Every tensor that a call or `pooled` moves, always the same objects, changed in place: it is put back after a
        step that was not finite, saved and resumed. Parameters are not part of it."""
        ...

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Parameters of its own, trained with the model's."""
        ...

    def pooled(self, parts: Tensor) -> None:
        """Ends a step of several ranks: `parts` are the means over them, by which the state moves on all alike."""
        ...

    def figures(self) -> dict[str, Tensor]:
        """Scalars on the device that its state stands for now, such as gamma2; read where the host looks at it."""
        ...

    def train(self, mode: bool = True) -> object:
        """Sets training mode, in which the state moves."""
        ...


class Ingredients(NamedTuple):
    """From what a family makes the first stage's objective.

    balance: makes the loss of the configuration's balance, on the device.
    amp: run the networks in bf16.
    penalised: modules on whose kernels --l2 is.
    """

    config: Config
    model: VAE
    balance: Callable[[], GaussianVAELoss]
    amp: bool = False
    penalised: Sequence[nn.Module] = ()
    world: World = ALONE


def kernel_norm2(modules: Iterable[nn.Module]) -> Tensor:
    """The sum of w^2 over the modules' `weight`, read anew each time, for a parametrisation makes it anew."""
    return torch.stack([m.weight.square().sum() for m in modules]).sum()  # type: ignore[operator]


class VAEObjective:
    """The negative ELBO of a VAE with a Gaussian decoder, under any balance, and an l2 penalty on kernels.

        total = loss(decoder(mu + sigma eps), target, KL) + l2 * sum over the penalised kernels of w^2

    Args:
        loss: the balance; parameters of its own are trained.
        amp: run the networks in bf16; posterior and loss stay float32.
        l2: weight of the penalty.
        penalised: modules whose `weight` it is on.
    """

    parts: tuple[str, ...] = ("loss", "nll", "kl", "mse", "balance")

    def __init__(
        self, loss: GaussianVAELoss, amp: bool = False, l2: float = 0.0, penalised: Sequence[nn.Module] = ()
    ) -> None:
        self.loss = loss
        self.amp = amp
        self.l2 = l2
        self.penalised = tuple(penalised)

    def __call__(
        self, model: nn.Module, x: Tensor, target: Tensor, noise: Noise
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        assert isinstance(model, VAE)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.amp):
            mu, log_sigma = model.encode(x)
            assert log_sigma is not None
            per_latent = self.loss.per_latent
            drawn = ops.sample_kl(mu, log_sigma, noise.rng, first_sample=noise.first_sample, per_latent=per_latent)
            z, kl, moments = drawn
            recon = model.decoder(z)
            kl = self.divergence(model, z, mu, log_sigma, kl)
        loss = self.loss(recon, target, kl=kl, latents=mu.shape[1])
        total, extra = self.regularised(loss, z, noise)
        if self.penalised:
            total = total + self.l2 * kernel_norm2(self.penalised)
        # sse/(2 gamma2 D) per image, which the computed gamma keeps near 1/2.
        balance = loss.mse / (2 * loss.gamma2)
        parts = [loss.loss.detach().float(), loss.nll, loss.kl, loss.mse, balance, *extra]
        return total, torch.stack(parts), moments

    def divergence(self, model: VAE, z: Tensor, mu: Tensor, log_sigma: Tensor, kl: Tensor) -> Tensor:
        """The KL of posterior and prior, summed over the batch, from that of the posterior and N(0, I)."""
        return kl

    def regularised(self, loss: Loss, z: Tensor, noise: Noise) -> tuple[Tensor, list[Tensor]]:
        """The loss with further terms, and the figures that they add to `parts`."""
        return loss.loss, []

    def state(self) -> dict[str, Tensor]:
        return self.loss.state()

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        return self.loss.named_parameters()

    def pooled(self, parts: Tensor) -> None:
        self.loss.follow(parts[self.parts.index("mse")], parts[self.parts.index("kl")])

    def figures(self) -> dict[str, Tensor]:
        return {"gamma2": self.loss.current_gamma2(), **self.loss.extras()}

    def train(self, mode: bool = True) -> object:
        return self.loss.train(mode)
