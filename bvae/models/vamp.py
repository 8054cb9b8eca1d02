"""The VampPrior (Tomczak & Welling 2018): a mixture of the posteriors of pseudo-inputs that are trained."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from bvae import ops
from bvae.errors import UserError
from bvae.models.norm import BatchNorm2d

NOISE = 0.01  # standard deviation about the images that pseudo-inputs start from
CHUNK = 256  # latents compared with the components at a time, where no gradient is needed
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class VampPrior(nn.Module):
    """p(z) = 1/K sum over c of q(z | u_c), with pseudo-inputs u_c = w_c clipped to [0,1], w trained.

    The pseudo-inputs pass through the encoder as a batch of their own: batch norm takes the mean and variance of their
    K images alone, in training and afterwards, and its running statistics stay those of the data.

    Args:
        count: K.
        shape: (C, H, W) of an image.
    """

    def __init__(self, count: int, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.inputs = nn.Parameter(torch.zeros(count, *shape).contiguous(memory_format=torch.channels_last))

    @torch.no_grad()
    def begin(self, images: np.ndarray, seed: int) -> None:
        """Starts from K training images, chosen at random out of uint8 [N,H,W,C], with noise."""
        count = len(self.inputs)
        if len(images) < count:
            raise UserError(f"--pseudo-inputs {count} start from as many training images; there are {len(images)}")
        rng = np.random.default_rng(seed)
        rows = np.sort(rng.permutation(len(images))[:count])
        chosen = np.asarray(images[rows], np.float32).transpose(0, 3, 1, 2) / 255
        chosen += NOISE * rng.standard_normal(chosen.shape, np.float32)
        self.inputs.copy_(torch.from_numpy(chosen))

    def components(self, encoder: nn.Module) -> tuple[Tensor, Tensor]:
        """(mu, log_sigma), each [K,k] float32, of the mixture's components."""
        u = self.inputs.clamp(0, 1).contiguous(memory_format=torch.channels_last)
        # Copies take what the pass would change in the encoder.
        buffers = {name: buffer.clone() for name, buffer in encoder.named_buffers()}
        with _by_their_batch(encoder):
            mu, log_sigma = functional_call(encoder, buffers, (u,))
        return mu.float(), log_sigma.float()

    def log_prob(self, z: Tensor, components: tuple[Tensor, Tensor]) -> Tensor:
        """log p(z) in nats, [B,k] -> [B]."""
        mu, log_sigma = components
        scaled = (z[:, None] - mu) * torch.exp(-log_sigma)
        terms = -0.5 * scaled.square().sum(2) - log_sigma.sum(1) - z.shape[1] * HALF_LOG_2PI
        return torch.logsumexp(terms, 1) - math.log(len(mu))

    @torch.no_grad()
    def density(self, encoder: nn.Module) -> Callable[[Tensor], Tensor]:
        """log p(z) in nats as a function of z alone, [n,k] -> [n] float64, under the weights as they are."""
        components = self.components(encoder)

        def log_prob(z: Tensor) -> Tensor:
            return torch.cat([self.log_prob(part, components) for part in z.split(CHUNK)]).double()

        return log_prob

    def divergence(self, encoder: nn.Module, z: Tensor, mu: Tensor, log_sigma: Tensor) -> Tensor:
        """log q(z|x) - log p(z) of one z = mu + sigma eps an image, [B]: unbiased for the KL; may be negative."""
        # In units of sigma, z is the noise, whatever mu and sigma.
        eps = ((z - mu) * torch.exp(-log_sigma)).detach()
        log_q = -(0.5 * eps.square() + log_sigma + HALF_LOG_2PI).sum(1)
        if torch.is_grad_enabled():
            return log_q - self.log_prob(z, self.components(encoder))
        return log_q - self.density(encoder)(z)

    @torch.no_grad()
    def sample(self, encoder: nn.Module, n: int, rng: Tensor) -> Tensor:
        """n latents [n,k] float32: each of the posterior of a pseudo-input that is chosen at random.

        `rng` does not advance. The first m of n are those of m.
        """
        mu, log_sigma = self.components(encoder)
        noise = ops.philox_normal(rng, n, mu.shape[1] + 1)
        uniform = torch.special.ndtr(noise[:, -1].double())
        chosen = (uniform * len(mu)).long().clamp(max=len(mu) - 1)
        return mu[chosen] + log_sigma[chosen].exp() * noise[:, :-1]


@contextmanager
def _by_their_batch(encoder: nn.Module) -> Iterator[None]:
    """Inside, the encoder's batch norms normalise by the batch that they are given, in eval mode too."""
    norms = [m for m in encoder.modules() if isinstance(m, BatchNorm2d | nn.modules.batchnorm._BatchNorm)]
    modes = [m.training for m in norms]
    gathers = [getattr(m, "gather", None) for m in norms]
    try:
        for m in norms:
            m.training = True
            if isinstance(m, BatchNorm2d):
                m.gather = None  # all ranks have the same pseudo-inputs
        yield
    finally:
        for m, mode, made in zip(norms, modes, gathers, strict=True):
            m.training = mode
            if isinstance(m, BatchNorm2d):
                m.gather = made
