"""Recipes of the networks beside the ResNet: published ones, with sources in docs/networks.md, and two of ours.

They are settings by name, where they are not Config's defaults; `options` holds the settings of parts.
"""

from typing import Any

# ---- Dai & Wipf -----------------------------------------------------------------------------------------------------

# The defaults of their demo.py; gamma is learned in both stages.
_DAI_WIPF = {
    "network": "infogan",
    "balance": "learned",
    "latents": 64,
    "hidden": 1024,
    "batch": 64,
    "epochs": 400,
    "lr": 1e-4,
    "lr_halve": 150,
    "epochs2": 800,
    "lr2": 1e-4,
    "lr_halve2": 300,
}
_MNIST = {**_DAI_WIPF, "side": 28, "channels": 1}
# Ours: minutes instead of a day.
_MNIST_SHORT = {
    **_MNIST,
    "balance": "computed",
    "epochs": 10,
    "lr": 1e-3,
    "lr_halve": 4,
    "epochs2": 20,
    "lr2": 1e-3,
    "lr_halve2": 8,
    "amp": True,
}

# ---- Ghosh et al. ---------------------------------------------------------------------------------------------------

# RAE-L2. No schedule but the plateaus of the loss of held-out images; no second stage, but ten Gaussians.
_RAE = {
    "network": "rae",
    "family": "rae-l2",
    "batch": 100,
    "epochs": 100,
    "lr": 5e-4,
    "lr_halve": 100,
    "val": 10_000,
    "plateau": 5,
    "epochs2": 0,
    "prior": ("gmm",),
}


def _rae(elements: int, latents: int, latent: float, decoder: float, **options: str) -> dict[str, Any]:
    """RAE-L2's weights, of mean(error^2) + latent*mean(z^2) + decoder*sum(w^2), in units of the error's sum."""
    return {
        **_RAE,
        "latents": latents,
        "options": {"latent_l2": latent * elements / latents, "decoder_l2": decoder * elements, **options},
    }


RECIPES: dict[str, dict[str, Any]] = {
    "mnist": _MNIST,
    "fashion": _MNIST,
    "mnist-short": _MNIST_SHORT,
    "fashion-short": _MNIST_SHORT,
    "cifar10-infogan": {**_DAI_WIPF, "epochs": 1000, "lr_halve": 300, "epochs2": 2000, "lr_halve2": 600},
    "celeba-infogan": {**_DAI_WIPF, "side": 64, "crop": 128},
    "celeba-wae": {
        **_DAI_WIPF,
        "network": "wae",
        "side": 64,
        "crop": 140,
        "epochs": 70,
        "lr_halve": 30,
        "epochs2": 70,
        "lr_halve2": 30,
    },
    "mnist-rae": {**_rae(32 * 32, 16, 1e-4, 1e-7, decoder_l2_on="transposed"), "channels": 1},
    "cifar10-rae": _rae(3 * 32 * 32, 128, 1e-3, 1e-6, decoder_l2_on="transposed"),
    "celeba-rae": {
        **_rae(3 * 64 * 64, 64, 1e-4, 1e-7, rae_variant="celeba"),
        "side": 64,
        "crop": 140,
        "epochs": 70,
        "lr": 1e-3,
        "lr_halve": 70,
    },
}
