"""The priors of a run: fitted to its training images' codes, kept in its folder, and sampled from."""

import contextlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bvae import ops
from bvae.batches.resident import to_device
from bvae.data import Dataset
from bvae.errors import UserError
from bvae.files import exists, writing
from bvae.metrics.copying import Copying, copied_codes
from bvae.metrics.latent import inactive, latent_variances
from bvae.metrics.scores import encode_images
from bvae.models.posterior import Posterior
from bvae.models.priors import find_prior, names
from bvae.models.priors.base import Prior, Progress, split
from bvae.models.priors.saved import SavedPrior, load_prior, prior_path, save_prior, weights_digest
from bvae.run.data import load_data
from bvae.seeds import derive
from bvae.two_stage import TwoStageVAE, read_run

TRAINED = {"normal": 1, "second-stage": 2}  # priors of the stages; nothing is fitted
QUERIES = 4096  # samples searched for copies of codes


def fitted_names() -> tuple[str, ...]:
    """The priors that are fitted after training."""
    return tuple(name for name in names() if find_prior(name).fitted)


def encode_training_set(run: Path, model: TwoStageVAE, source: str | None) -> Posterior:
    """The posterior of the images that a run was trained on. Raises UserError where the data is other data."""
    data = load_data(model.config, source)
    if read_run(run).get("data", {}).get("digest") not in (None, data.digest):
        raise UserError(f"{data.name} is not the data that {run} was trained on")
    return encode_images(model.stage1, to_device(data.train, model.device))


def fit_prior(
    prior: Prior, posterior: Posterior, path: Path, *, stage1: str, seed: int, progress: Progress | None = None
) -> dict[str, Any]:
    """Fits `prior`, looks for copies of codes among its samples, and writes it to `path`; returns the figures."""
    figures = prior.fit(posterior, seed=seed, progress=progress)
    copying = copied_by(prior, posterior, seed)
    figures["copying"] = None if copying is None else copying._asdict()
    save_prior(path, prior, seed=seed, stage1=stage1, figures=figures)
    return figures


def copied_by(prior: Prior, posterior: Posterior, seed: int) -> Copying | None:
    """Checks if samples of a prior fitted with `seed` copy means of the codes it was fitted to, over active latents.

    None where no latent is active, so that codes carry nothing that could be copied.
    """
    mu, log_sigma = posterior
    active = torch.ones(mu.shape[1], dtype=torch.bool, device=mu.device)
    if log_sigma is not None:
        active = ~inactive(latent_variances(mu, log_sigma)[1])
    if not bool(active.any()):
        return None
    fitted, held_out = (mu[rows][:, active] for rows in split(len(mu), seed, mu.device))
    samples = prior.sample(QUERIES, ops.make_rng(derive(seed, "copying"), mu.device))
    return copied_codes(samples[:, active], fitted, held_out)


def check_fit(name: str) -> None:
    """Raises UserError where there is no prior of that name that can be fitted here."""
    if name not in fitted_names():
        raise UserError(f"--prior {name}: choose from {', '.join(fitted_names())}")
    find_prior(name).check_fit()


def fit_prior_of(folder: Path, model: TwoStageVAE, data: Dataset, name: str, seed: int) -> str:
    """Fits a prior to a model's codes of its training images, at the prior's default settings, into the run's folder.

    Returns a line about the fit. A prior that is there already, of the same weights, stays.
    """
    path, stage1 = prior_path(folder, name), weights_digest(model.stage1)
    with contextlib.suppress(UserError):
        load_prior(path, stage1)
        return f"is in {path}"
    with writing(path):
        path.parent.mkdir(exist_ok=True)
    posterior = encode_images(model.stage1, to_device(data.train, model.device))
    prior = find_prior(name)(model.config.latents).to(model.device)
    figures = fit_prior(prior, posterior, path, stage1=stage1, seed=seed)
    return f"log p(z) of held-out codes {figures['log_likelihood']:.2f} nats; {path}"


def load_prior_of(run: Path, model: TwoStageVAE, name: str) -> SavedPrior:
    """The prior `name` of a run, for the weights that `model` has. Raises UserError where there is none that fits."""
    path = prior_path(run, name)
    if not exists(path):
        raise UserError(f"{run} has no prior {name}: fit it with python -m bvae.prior {run} {name}")
    return load_prior(path, weights_digest(model.stage1), model.device)


def sample_latents(run: Path, model: TwoStageVAE, name: str, n: int, seed: int) -> Tensor:
    """n latents [n,k] of a prior of the run: one that was fitted, `normal` (GEN-1) or `second-stage` (GEN-2).

    The first m of n are those of m. Raises UserError where the run has no such prior.
    """
    if name in TRAINED:
        return model.sample_latents(n, TRAINED[name], seed)
    return load_prior_of(run, model, name).prior.sample(n, ops.make_rng(derive(seed, "sample"), model.device))


def check_name(name: str) -> None:
    """Raises UserError where there is no prior of that name to sample from."""
    if name not in TRAINED and name not in fitted_names():
        raise UserError(f"prior {name!r}: there is no such prior; choose from {', '.join((*TRAINED, *fitted_names()))}")
