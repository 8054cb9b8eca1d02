"""A fitted prior as a file: its tensors beside their description as JSON (see bvae.run.checkpoint)."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn

from bvae.errors import UserError
from bvae.models.priors import find_prior, names
from bvae.models.priors.base import Prior
from bvae.run.checkpoint import digest, load_checkpoint, save_checkpoint

FOLDER = "priors"  # in a run's folder

_TYPES = {"prior": str, "latents": int, "settings": dict, "seed": int, "stage1": str, "figures": dict}


@dataclass(frozen=True)
class SavedPrior:
    """A prior as it was fitted."""

    prior: Prior
    seed: int
    figures: dict[str, Any]
    """figures of the fit: see FittedPrior.fit"""


def prior_path(run: Path, name: str) -> Path:
    return run / FOLDER / f"{name}.safetensors"


def weights_digest(stage1: nn.Module) -> str:
    """SHA-256 of the first stage's state, which a prior over its latents belongs to."""
    return digest({name: t.detach().cpu().contiguous() for name, t in stage1.state_dict().items()})


def save_prior(path: Path, prior: Prior, *, seed: int, stage1: str, figures: Mapping[str, Any]) -> None:
    """Writes `prior` to `path`, whole or not at all.

    Args:
        stage1: weights_digest of the model whose codes it was fitted to.

    Raises UserError where the folder or the disk does not allow it.
    """
    description = {
        "prior": prior.name,
        "latents": prior.latents,
        "settings": {} if prior.settings is None else asdict(prior.settings),
        "seed": seed,
        "stage1": stage1,
        "figures": dict(figures),
    }
    save_checkpoint(path, prior.state_dict(), description)


def load_prior(path: Path, stage1: str, device: torch.device | str = "cpu") -> SavedPrior:
    """The prior that save_prior wrote.

    Args:
        stage1: weights_digest of the model that is to decode its samples.

    Raises:
        UserError: naming `path`, where it is missing, damaged, not a prior, fitted to other weights, or needs an extra
            that is not installed.
    """
    tensors, description = load_checkpoint(path, device)
    for key, kind in _TYPES.items():
        if not isinstance(description.get(key), kind):
            raise UserError(f"{path}: not a prior of bvae (its {key} is {description.get(key)!r})")
    name, latents = description["prior"], description["latents"]
    if name not in names() or not find_prior(name).fitted:
        raise UserError(f"{path}: a prior {name!r}, which this version of bvae does not know")
    if description["stage1"] != stage1:
        raise UserError(
            f"{path}: the prior was fitted to other weights of the first stage than the model has: "
            f"fit it again (python -m bvae.prior RUN {name})"
        )
    try:
        prior = find_prior(name)(latents, _settings(find_prior(name).Settings, description["settings"]))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    _check_tensors(path, prior, tensors)
    prior.load_state_dict(tensors)
    return SavedPrior(prior.to(device).eval(), description["seed"], description["figures"])


def _settings(kind: type | None, values: Mapping[str, Any]) -> Any:
    """The settings that `values` describe. Raises UserError where they are not those of `kind`."""
    hints = {} if kind is None else get_type_hints(kind)
    if set(values) != set(hints):
        raise UserError(f"settings {sorted(values)} in place of {sorted(hints)}: written by another version of bvae?")
    for key, value in values.items():
        if type(value) is not hints[key]:
            raise UserError(f"setting {key} is {value!r}")
    return None if kind is None else kind(**{f.name: values[f.name] for f in fields(kind)})


def _check_tensors(path: Path, prior: Prior, tensors: Mapping[str, Tensor]) -> None:
    own = {name: (t.shape, t.dtype) for name, t in prior.state_dict().items()}
    there = {name: (t.shape, t.dtype) for name, t in tensors.items()}
    for name in sorted(own.keys() | there.keys()):
        if own.get(name) != there.get(name):
            raise UserError(f"{path}: tensor {name} is not that of a prior {prior.name} with these settings")
