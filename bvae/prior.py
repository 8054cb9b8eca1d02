"""python -m bvae.prior: fits a prior to a trained model's codes, to draw better images than from N(0,I).

The prior is written to RUN/priors/NAME.safetensors. It belongs to the weights of the run's first stage.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from bvae import ops
from bvae.batches.resident import to_device
from bvae.errors import UserError, run_command
from bvae.evaluate import following
from bvae.files import encode_json, exists, writing
from bvae.machine import pick_device, prepare_process
from bvae.metrics.copying import Copying, copied_codes
from bvae.metrics.latent import inactive, latent_variances
from bvae.metrics.scores import encode_images
from bvae.models.posterior import Posterior
from bvae.models.priors import NAMES, find_prior
from bvae.models.priors.base import Prior, Progress, split
from bvae.models.priors.saved import SavedPrior, load_prior, prior_path, save_prior, weights_digest
from bvae.run.data import load_data
from bvae.seeds import derive
from bvae.two_stage import TwoStageVAE, load, read_run

FITTED = tuple(name for name in NAMES if find_prior(name).fitted)
QUERIES = 4096  # samples searched for copies of codes


@dataclasses.dataclass(frozen=True)
class Common:
    """Fit a prior to the codes of a run's training images."""

    run: tyro.conf.Positional[Path]
    """A run's folder, or one that save_pretrained wrote."""
    name: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="{" + ",".join(FITTED) + "}")]]
    """The prior."""
    seed: int = 0
    """Fixes initial weights, noise, and which tenth of the codes is held out."""
    data: str | None = None
    """The training images, where they are not where the run found them."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to fit."""


def arguments_type() -> type[Common]:
    """Common, with the settings of every prior as flat options."""
    settings = {name: kind for name in FITTED if (kind := find_prior(name).Settings) is not None}
    flat = [
        (_attribute(name), Annotated[kind, tyro.conf.arg(name="")], dataclasses.field(default=kind()))
        for name, kind in settings.items()
    ]
    return dataclasses.make_dataclass(
        "Arguments", flat, bases=(Common,), frozen=True, namespace={"__doc__": Common.__doc__}
    )


def parse(argv: list[str] | None) -> tuple[Common, Any]:
    """(the arguments, the settings of the prior that they name)."""
    args: Any = tyro.cli(arguments_type(), args=argv, prog="python -m bvae.prior", description=__doc__)
    if args.name not in FITTED:
        why = "is not fitted" if args.name in NAMES else "is not one"
        raise UserError(f"prior {args.name!r} {why}: choose from {', '.join(FITTED)}")
    if not 0 <= args.seed < 2**63:
        raise UserError(f"--seed must be between 0 and 2^63-1, not {args.seed}")
    for name in FITTED:
        given = getattr(args, _attribute(name), None)
        for field in [] if given is None or name == args.name else dataclasses.fields(given):
            if getattr(given, field.name) != field.default:
                option = "--" + field.name.replace("_", "-")
                raise UserError(f"{option} is a setting of the prior {name}, not of {args.name}")
    return args, getattr(args, _attribute(args.name), None)


def _attribute(name: str) -> str:
    """Where the arguments keep the settings of a prior."""
    return f"settings_of_{name.replace('-', '_')}"


def encode_training_set(run: Path, model: TwoStageVAE, source: str | None) -> Posterior:
    """The posterior of the images that a run was trained on. Raises UserError where the data is other data."""
    data = load_data(model.config, source)
    if read_run(run).get("data", {}).get("digest") not in (None, data.digest):
        raise UserError(f"{data.name} is not the data that {run} was trained on")
    return Posterior(*encode_images(model.stage1, to_device(data.train, model.device)))


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
    """Whether samples of a prior fitted with `seed` copy means of the codes it was fitted to, over active latents.

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


def load_prior_of(run: Path, model: TwoStageVAE, name: str) -> SavedPrior:
    """The prior `name` of a run, for the weights that `model` has. Raises UserError where there is none that fits."""
    path = prior_path(run, name)
    if not exists(path):
        raise UserError(f"{run} has no prior {name}: fit it with python -m bvae.prior {run} {name}")
    return load_prior(path, weights_digest(model.stage1), model.device)


def main(argv: list[str] | None = None) -> None:
    args, settings = parse(argv)
    kind = find_prior(args.name)
    kind.check(settings)
    kind.check_fit()
    prepare_process()
    model = load(args.run, device=pick_device(args.device))
    prior = kind(model.config.latents, settings).to(model.device)
    path = prior_path(args.run, args.name)
    with writing(path):
        path.parent.mkdir(exist_ok=True)
    posterior = encode_training_set(args.run, model, args.data)
    with following() as follow:
        figures = fit_prior(
            prior,
            posterior,
            path,
            stage1=weights_digest(model.stage1),
            seed=args.seed,
            progress=lambda done, total: follow(f"fitting {args.name}", done, total),
        )
    print(encode_json(figures, indent=2))
    print_summary(figures, path)


def print_summary(figures: Mapping[str, Any], path: Path) -> None:
    print(f"log p(z) of held-out codes: {figures['log_likelihood']:.2f} +- {figures['error']:.2f} nats")
    copying = figures["copying"]
    if copying is not None:
        excess = (copying["closer"] - copying["chance"]) / copying["deviation"]
        print(
            f"nearer to fitted codes than to held-out ones: {copying['closer']:.3f} of samples, "
            f"{copying['chance']:.3f} +- {copying['deviation']:.3f} by chance{': it copies codes' * (excess > 5)}"
        )
    print(f"{path}; to sample: python -m bvae.sample {path.parent.parent} --prior {path.stem}")


if __name__ == "__main__":
    run_command(main)
