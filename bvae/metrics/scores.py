"""What a stage does on data it was not trained on: reconstruction error, KL, variance law, inactive latents."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from bvae import ops
from bvae.batches.mapped import Images
from bvae.batches.resident import chunks
from bvae.metrics.latent import inactive, latent_variances, variance_law
from bvae.models.norm import frozen_statistics
from bvae.models.posterior import Posterior
from bvae.models.vae import VAE
from bvae.seeds import derive
from bvae.world import ALONE, World


class Scores(NamedTuple):
    """Of one stage on a data set; `figures` can be written as JSON."""

    figures: dict[str, float]
    posterior: Posterior
    latent_kl: Tensor | None
    """[k] float64: mean KL of each latent, in nats; None where the code is deterministic"""


@torch.no_grad()
def encode_images(model: VAE, images: Images, world: World = ALONE) -> Posterior:
    """The posterior of images uint8 [N,H,W,C], in eval mode and fp32."""
    model.eval()
    return _encode(model, (x for x, _ in chunks(images[world.share(len(images))])), len(images), world)


def score_images(model: VAE, images: Images, seed: int, world: World = ALONE) -> Scores:
    """Scores of the first stage on images uint8 [N,H,W,C]; mse is per element of images in [0,1]."""
    posterior = encode_images(model, images, world)
    targets = (target for _, target in chunks(images[world.share(len(images))]))
    return _score(model, posterior, targets, seed, True, world)


@torch.no_grad()
def score_latents(model: VAE, first: Posterior, seed: int, world: World = ALONE) -> Scores:
    """Scores of the second stage on z drawn once from the first stage's posterior."""
    model.eval()
    z = first.draw(ops.make_rng(derive(seed, "evaluate z"), first.mu.device))
    parts = z[world.share(len(z))].split(500)
    return _score(model, _encode(model, parts, len(z), world), parts, seed, False, world)


def _encode(model: VAE, parts: Iterable[Tensor], count: int, world: World) -> Posterior:
    """The posterior of all `count` samples, of which this rank encodes its share, given as `parts`."""
    with frozen_statistics(model):
        mine = [torch.stack([t for t in model.encode(x) if t is not None]) for x in parts]
    posterior = torch.zeros(len(mine[0]), count, *mine[0].shape[2:], device=mine[0].device)
    posterior[:, world.share(count)] = torch.cat(mine, 1)
    mu, *log_sigma = world.sum_(posterior).unbind()  # zeros of the others' rows: exact
    return Posterior(mu, log_sigma[0] if log_sigma else None)


@torch.no_grad()
def _score(
    model: VAE, posterior: Posterior, targets: Iterable[Tensor], seed: int, logits: bool, world: World
) -> Scores:
    """`targets` are what this rank's share of the posterior should be decoded to."""
    mu, log_sigma = posterior
    rng = ops.make_rng(derive(seed, "evaluate"), mu.device)
    z, _, moments = (mu, None, None) if log_sigma is None else ops.sample_kl(mu, log_sigma, rng)
    sse = torch.zeros(2, dtype=torch.float64, device=mu.device)  # decoding z, decoding mu
    count = 0
    first = world.share(len(mu)).start
    with frozen_statistics(model):
        for target in targets:
            last = first + len(target)
            errors = [squared_error(model.decoder(latents[first:last]), target, logits) for latents in (z, mu)]
            sse += torch.stack(errors)
            count = len(mu) * math.prod(target.shape[1:])
            first = last
    sampled, mean = world.sum_(sse).tolist()
    var_mu, sigma2 = latent_variances(mu, log_sigma)
    figures = {"mse_sampled": sampled / count, "mse_mean": mean / count}
    if log_sigma is None:
        return Scores(figures | {"code_variance": var_mu.mean().item()}, posterior, None)
    assert moments is not None
    idle = inactive(sigma2)
    latent_kl = moments[3].double() / len(mu)
    if model.prior is None:
        figures |= {"kl": latent_kl.sum().item(), "variance_law": variance_law(var_mu, sigma2).item()}
    else:  # which the aggregate posterior should follow, instead of N(0, I)
        figures["kl"] = model.prior.divergence(model.encoder, z, mu, log_sigma).double().mean().item()
    figures |= {"inactive": int(idle.sum()), "active": int((~idle).sum())}
    return Scores(figures, posterior, latent_kl)


def squared_error(recon: Tensor, target: Tensor, logits: bool) -> Tensor:
    """Sum of squared errors of a batch, a scalar on the device."""
    one = torch.ones((), device=recon.device)
    none = torch.zeros((), dtype=torch.int64, device=recon.device)
    return ops.balanced_loss(recon, target, torch.zeros_like(one), one, none, logits=logits, update=False).sse
