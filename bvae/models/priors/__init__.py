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


def register_prior(name: str, home: str) -> None:
    """Makes a prior known by its name; home: "module:class". Raises ValueError for a name that is taken."""
    if name in _CLASSES:
        raise ValueError(f"there is a prior {name!r} already")
    _CLASSES[name] = home


def names() -> tuple[str, ...]:
    return tuple(_CLASSES)


def find_prior(name: str) -> type[Prior]:
    """The class of the prior called `name`. Raises UserError where there is none."""
    if name not in _CLASSES:
        raise UserError(f"prior {name!r}: there is no such prior; choose from {', '.join(_CLASSES)}")
    module, _, attribute = _CLASSES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
