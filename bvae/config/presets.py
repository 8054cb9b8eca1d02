"""The recipes that `--preset` names."""

import dataclasses

from bvae.config.recipes import RECIPES
from bvae.config.settings import Config
from bvae.errors import UserError

_CIFAR10 = Config()
_CELEBA = Config(
    preset="celeba",
    side=64,
    crop=128,
    scales=4,
    epochs=70,
    lr=5e-5,
    lr_halve=60,
    hidden=4096,
    epochs2=140,
    lr2=5e-5,
    lr_halve2=120,
    kl_weight=4.0,
    l2=1e-3,
    l2_on=("encoder.downsample", "decoder.upsample"),
    rescale=True,
)
_CELEBA_TABLE3 = dataclasses.replace(
    _CELEBA, lr=1e-4, lr_halve=48, lr2=1e-4, kl_weight=1.0, l2=0.0, l2_on=(), rescale=False
)

PRESETS: dict[str, Config] = {
    c.preset: c
    for c in (
        # Not from the paper: sized so that both stages train in minutes on two CPU cores.
        Config(
            preset="shapes",
            data="shapes",
            base=16,
            latents=32,
            fc=256,
            hidden=512,
            kl_weight="auto",
            batch=50,
            epochs=10,
            lr=1e-3,
            lr_halve=3,
            epochs2=12,
            lr2=1e-3,
            lr_halve2=6,
            amp=True,
            eval_every=2,
        ),
        _CIFAR10,  # the paper's text
        dataclasses.replace(_CIFAR10, preset="cifar10-code", lr_halve=250, lr_halve2=400),  # the authors' code
        _CELEBA,  # the paper's best
        # Table 3's models.
        dataclasses.replace(_CELEBA_TABLE3, preset="celeba-1"),
        dataclasses.replace(_CELEBA_TABLE3, preset="celeba-2", l2=1e-3, l2_on=("decoder.upsample", "decoder.scales")),
        dataclasses.replace(_CELEBA_TABLE3, preset="celeba-3", blocks=2, l2=1e-3, l2_on=("encoder.downsample",)),
        dataclasses.replace(_CELEBA_TABLE3, preset="celeba-4", latents=128, scales=3),
    )
}
PRESETS |= {name: Config(preset=name, **recipe) for name, recipe in RECIPES.items()}


def find_preset(name: str) -> Config:
    try:
        return PRESETS[name]
    except KeyError:
        raise UserError(f"--preset {name}: there is no such preset; choose from {', '.join(PRESETS)}") from None
