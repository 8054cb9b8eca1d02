"""python -m bvae.prior: fits a prior to a trained model's codes, to draw better images than from N(0,I).

The prior is written to RUN/priors/NAME.safetensors. It belongs to the weights of the run's first stage.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from bvae.errors import UserError, run_command
from bvae.files import encode_json, writing
from bvae.machine import pick_device, prepare_process
from bvae.models.priors import find_prior, names
from bvae.models.priors.saved import prior_path, weights_digest
from bvae.run.display import following
from bvae.run.folder import load
from bvae.run.priors import encode_training_set, fit_prior, fitted_names


@dataclasses.dataclass(frozen=True)
class Common:
    """Fit a prior to the codes of a run's training images."""

    run: tyro.conf.Positional[Path]
    """A run's folder, or one that save_pretrained wrote."""
    name: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="PRIOR")]]
    """The prior: gaussian, gmm, flow-matching or flow."""
    seed: int = 0
    """Fixes initial weights, noise, and which tenth of the codes is held out."""
    data: str | None = None
    """The training images, where they are not where the run found them."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to fit."""


def arguments_type() -> type[Common]:
    """Common, with the settings of every prior as flat options."""
    settings = {name: kind for name in fitted_names() if (kind := find_prior(name).Settings) is not None}
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
    if args.name not in fitted_names():
        why = "is not fitted" if args.name in names() else "is not one"
        raise UserError(f"prior {args.name!r} {why}: choose from {', '.join(fitted_names())}")
    if not 0 <= args.seed < 2**63:
        raise UserError(f"--seed must be between 0 and 2^63-1, not {args.seed}")
    for name in fitted_names():
        given = getattr(args, _attribute(name), None)
        for field in [] if given is None or name == args.name else dataclasses.fields(given):
            if getattr(given, field.name) != field.default:
                option = "--" + field.name.replace("_", "-")
                raise UserError(f"{option} is a setting of the prior {name}, not of {args.name}")
    return args, getattr(args, _attribute(args.name), None)


def _attribute(name: str) -> str:
    """The attribute in which the arguments keep the settings of a prior."""
    return f"settings_of_{name.replace('-', '_')}"


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
