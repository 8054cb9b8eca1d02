"""Variational autoencoders whose reconstruction/KL balance nobody has to tune (Asperti & Trentin 2020)."""

import importlib
from typing import TYPE_CHECKING, Any

from bvae import _moved

if TYPE_CHECKING:
    from bvae.api import fit, register_network
    from bvae.balance import BalancedLoss, FixedGammaLoss, LearnedGammaLoss, Loss
    from bvae.config import PRESETS, Config
    from bvae.errors import UserError
    from bvae.run.folder import Run, load
    from bvae.two_stage import TwoStageVAE

__version__ = "0.1.0"  # the package's metadata take it from here

_moved.install()

__all__ = [
    "PRESETS",
    "BalancedLoss",
    "Config",
    "FixedGammaLoss",
    "LearnedGammaLoss",
    "Loss",
    "Run",
    "TwoStageVAE",
    "UserError",
    "__version__",
    "fit",
    "load",
    "register_network",
]

# Imported when first asked for: what prepares images needs no torch, which takes a second and 200 MB a process.
_HOMES = {
    "bvae.api": ("fit", "register_network"),
    "bvae.balance": ("BalancedLoss", "FixedGammaLoss", "LearnedGammaLoss", "Loss"),
    "bvae.config": ("PRESETS", "Config"),
    "bvae.errors": ("UserError",),
    "bvae.run.folder": ("Run", "load"),
    "bvae.two_stage": ("TwoStageVAE",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            globals()[name] = value = getattr(importlib.import_module(home), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
