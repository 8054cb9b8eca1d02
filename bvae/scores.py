"""What a stage does on data it was not trained on: reconstruction error, KL, variance law, inactive latents."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from bvae import ops
from bvae.batches import chunks
from bvae.metrics.latent import inactive, latent_variances, variance_law
from bvae.models.vae import VAE
from bvae.seeds import derive


class Posterior(NamedTuple):
    """The encoder's output over a data set, each [N,k] float32."""

    mu: Tensor
    log_sigma: Tensor


class Scores(NamedTuple):
    """Of one stage on a data set; `figures` can be written as JSON."""

    figures: dict[str, float]
    posterior: Posterior
    latent_kl: Tensor
    """[k] float64: mean KL of each latent, in nats"""


@torch.no_grad()
def encode_images(model: VAE, images: Tensor) -> Posterior:
    """The posterior of resident images uint8 [N,H,W,C], in eval mode and fp32."""
    model.eval()
    encoded = [model.encoder(x) for x, _ in chunks(images)]
    return Posterior(torch.cat([mu for mu, _ in encoded]), torch.cat([log_sigma for _, log_sigma in encoded]))


def score_images(model: VAE, images: Tensor, seed: int) -> Scores:
    """Scores of the first stage on resident images uint8 [N,H,W,C]; mse is per element of images in [0,1]."""
    posterior = encode_images(model, images)
    targets = (target for _, target in chunks(images))
    return _score(model, posterior, targets, seed, logits=True)


@torch.no_grad()
def score_latents(model: VAE, first: Posterior, seed: int) -> Scores:
    """Scores of the second stage on z drawn once from the first stage's posterior."""
    model.eval()
    z = ops.sample_kl(first.mu, first.log_sigma, ops.make_rng(derive(seed, "evaluate z"), first.mu.device)).z
    encoded = [model.encoder(part) for part in z.split(500)]
    posterior = Posterior(torch.cat([mu for mu, _ in encoded]), torch.cat([log_sigma for _, log_sigma in encoded]))
    return _score(model, posterior, z.split(500), seed, logits=False)


@torch.no_grad()
def _score(model: VAE, posterior: Posterior, targets: Iterable[Tensor], seed: int, logits: bool) -> Scores:
    mu, log_sigma = posterior
    z, _, moments = ops.sample_kl(mu, log_sigma, ops.make_rng(derive(seed, "evaluate"), mu.device))
    sse = {"sampled": 0.0, "mean": 0.0}
    count = first = 0
    for target in targets:
        last = first + len(target)
        for name, latents in (("sampled", z), ("mean", mu)):
            recon = model.decoder(latents[first:last])
            sse[name] += squared_error(recon, target, logits).item()
        count += target.numel()
        first = last
    var_mu, sigma2 = latent_variances(mu, log_sigma)
    idle = inactive(sigma2)
    latent_kl = moments[3].double() / len(mu)
    figures = {
        "mse_sampled": sse["sampled"] / count,
        "mse_mean": sse["mean"] / count,
        "kl": latent_kl.sum().item(),
        "variance_law": variance_law(var_mu, sigma2).item(),
        "inactive": int(idle.sum()),
        "active": int((~idle).sum()),
    }
    return Scores(figures, posterior, latent_kl)


def squared_error(recon: Tensor, target: Tensor, logits: bool) -> Tensor:
    """Sum of squared errors of a batch, a scalar on the device."""
    one = torch.ones((), device=recon.device)
    none = torch.zeros((), dtype=torch.int64, device=recon.device)
    return ops.balanced_loss(recon, target, torch.zeros_like(one), one, none, logits=logits, update=False).sse
