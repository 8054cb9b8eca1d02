"""The likelihood of test images by importance sampling, and active units."""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from bvae import ops
from bvae.models.posterior import Posterior
from bvae.models.priors.normal import standard_normal_log_prob
from bvae.seeds import derive

ACTIVE_UNIT = 0.01  # the threshold on Var_x(mu_j) of Burda et al. 2016, section 5.2
CHUNK = 512  # latents decoded at a time: bounds memory

Pixels = Literal["density", "uniform"]


class Likelihood(NamedTuple):
    """Importance-sampled likelihood of N images, in nats: [N] float64 each."""

    nll: Tensor
    """-log (1/K sum_k w_k): an upper bound of -log p(x) in expectation, that falls with K (Burda et al. 2016, eq. 8)"""
    elbo: Tensor
    """1/K sum_k log w_k: the bound of one sample, averaged"""
    effective_samples: Tensor
    """(sum w)^2 / sum w^2, from 1 to K. Near 1, one sample makes up the sum, and nll is still far from its limit"""
    dimensions: int
    """D, values of an image"""
    samples: int
    """K"""
    pixels: Pixels

    def figures(self) -> dict[str, Any]:
        """Means over the images, which can be written as JSON; `nll_error` is the mean's standard error."""
        nll = self.nll.mean().item()
        return {
            "nll": nll,
            "nll_error": (self.nll.std(correction=0) / len(self.nll) ** 0.5).item(),
            "bits_per_dimension": bits_per_dimension(nll, self.dimensions),
            "elbo": self.elbo.mean().item(),
            "effective_samples": self.effective_samples.mean().item(),
            "samples": self.samples,
            "images": len(self.nll),
            "pixels": self.pixels,
        }


def bits_per_dimension(nll: float, dimensions: int) -> float:
    """Nats of a density of values v/255 -> bits per value of a density of grey levels v: nll / (D ln 2) + log2 255."""
    return nll / (dimensions * math.log(2)) + math.log2(255)


@torch.no_grad()
def importance_likelihood(
    decode: Callable[[Tensor], Tensor],
    posterior: Posterior,
    targets: Iterable[Tensor],
    gamma2: float,
    *,
    samples: int,
    seed: int,
    log_prior: Callable[[Tensor], Tensor] = standard_normal_log_prob,
    pixels: Pixels = "density",
    chunk: int = CHUNK,
) -> Likelihood:
    """The bound -log p(x) <= -log 1/K sum_k p(x|z_k) p(z_k) / q(z_k|x), z_k ~ q(z|x), of every image.

        log p(x|z) = -sse / (2 gamma2) - D/2 log(2 pi gamma2)

    Both kinds of `pixels` give a density on R^D of values in [0,1], the one that training minimises:

    * "density": of the values as they are, a grey level v as the point v/255. It is no bound on a probability: for grey
      levels it grows without limit as gamma2 falls. Compare it only between models of this decoder.
    * "uniform": of (v - 1/2 + u) / 255 with one uniform u a value, that is uniform dequantisation about the value that
      the network sees. The bits per dimension then bound those of the discrete levels from above (Theis et al. 2016),
      and may be compared with other models'.

    The sums over samples run in float64 and in pieces of `chunk` latents, so that memory depends on neither K nor N.

    Args:
        decode: z [n,k] -> reconstruction [n,...] in [0,1], in eval mode.
        posterior: of the images, with log_sigma.
        targets: the images in order, in batches: uint8, or floats in [0,1] for "density".
        gamma2: the decoder's variance.
        samples: K.
        seed: of the noise, which belongs to an image's place in the whole: it depends on neither batches nor `chunk`.
        log_prior: log p(z), [n,k] -> [n]; by default N(0, I). Prior.log_prob gives that of a fitted prior.

    Raises:
        ValueError: a deterministic posterior, K < 1, gamma2 that is not positive, or floats with "uniform".
    """
    mu, log_sigma = posterior
    if log_sigma is None:
        raise ValueError(
            "a deterministic encoder has no posterior to sample: its likelihood cannot be bounded this way"
        )
    if samples < 1 or not gamma2 > 0:
        raise ValueError(f"samples must be at least 1 and gamma2 positive, not {samples} and {gamma2}")
    k, device = mu.shape[1], mu.device
    sums = torch.full((3, len(mu)), -math.inf, dtype=torch.float64, device=device)  # log of sums of w, of w^2
    sums[2] = 0  # sum of log w
    rng = ops.make_rng(derive(seed, "importance"), device)
    first, dimensions = 0, 1
    for batch in targets:
        x = _values(batch, pixels, seed, first, device)
        dimensions = x.shape[1]
        constant = -0.5 * dimensions * math.log(2 * math.pi * gamma2)
        for part in range(0, len(x), chunk):
            rows = slice(first + part, min(first + part + chunk, first + len(x)))
            target = x[part : part + chunk]
            for sample in range(samples):
                rng[1] = sample
                eps = ops.philox_normal(rng, len(target), k, first_sample=rows.start)
                z = mu[rows] + log_sigma[rows].exp() * eps
                log_q = standard_normal_log_prob(eps) - log_sigma[rows].double().sum(1)
                sse = (decode(z).flatten(1).float() - target).square().sum(1, dtype=torch.float64)
                log_w = constant - sse / (2 * gamma2) + log_prior(z) - log_q
                sums[0, rows] = torch.logaddexp(sums[0, rows], log_w)
                sums[1, rows] = torch.logaddexp(sums[1, rows], 2 * log_w)
                sums[2, rows] += log_w
        first += len(x)
    if first != len(mu):
        raise ValueError(f"{first} images, but the posterior of {len(mu)}")
    nll = math.log(samples) - sums[0]
    return Likelihood(nll, sums[2] / samples, (2 * sums[0] - sums[1]).exp(), dimensions, samples, pixels)


def _values(batch: Tensor, pixels: Pixels, seed: int, first: int, device: torch.device) -> Tensor:
    """The values [n,D] float32 whose density is wanted."""
    x = batch.to(device).flatten(1)
    if pixels == "uniform":
        if x.dtype != torch.uint8:
            raise ValueError("uniform dequantisation needs grey levels, uint8")
        noise = ops.philox_normal(ops.make_rng(derive(seed, "dequantise"), device), *x.shape, first_sample=first)
        return (x + torch.special.ndtr(noise.double()) - 0.5).float() / 255
    return x.float() / 255 if x.dtype == torch.uint8 else x.float()


def active_units(mu: Tensor) -> int:
    """Latents whose posterior mean varies over the data: Var_x(mu_j) > 0.01, of mu [N,k] (Burda et al. 2016)."""
    return int((mu.double().var(0, correction=0) > ACTIVE_UNIT).sum())
