"""Densities of the aggregate posterior, to draw latents from: the table of their names.

A prior's module is imported when its name is asked for. Those that need an extra import it only to be fitted or built.
"""

import importlib

from bvae.errors import UserError
from bvae.models.priors.base import Prior

_CLASSES = {
    "normal": "bvae.models.priors.normal:NormalPrior",
    "gaussian": "bvae.models.priors.gaussian:GaussianPrior",
    "gmm": "bvae.models.priors.gmm:MixturePrior",
    "flow-matching": "bvae.models.priors.flow_matching:FlowMatchingPrior",
    "flow": "bvae.models.priors.flow:FlowPrior",
}


_ADDED: dict[str, type[Prior]] = {}


def register_prior(prior: type[Prior]) -> None:
    """Makes a prior known by its class's name, in this process. Raises ValueError for a name that is taken."""
    if prior.name in _CLASSES:
        raise ValueError(f"there is a prior {prior.name!r} already")
    _ADDED[prior.name] = prior


def names() -> tuple[str, ...]:
    return (*_CLASSES, *_ADDED)


def find_prior(name: str) -> type[Prior]:
    """The class of the prior called `name`. Raises UserError where there is none."""
    if name in _ADDED:
        return _ADDED[name]
    if name not in _CLASSES:
        raise UserError(f"prior {name!r}: there is no such prior; choose from {', '.join(names())}")
    module, _, attribute = _CLASSES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
