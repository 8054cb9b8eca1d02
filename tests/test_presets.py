"""The recipes of the networks beside the ResNet."""

import dataclasses

import pytest

from bvae.config import PRESETS, Config
from bvae.config.recipes import RECIPES

DAI_WIPF = {"batch": 64, "latents": 64, "hidden": 1024, "lr": 1e-4, "lr2": 1e-4, "balance": "learned"}
# preset -> (network, side, channels, crop, epochs, lr_halve, epochs2, lr_halve2)
THEIRS = {
    "mnist": ("infogan", 28, 1, "square", 400, 150, 800, 300),
    "fashion": ("infogan", 28, 1, "square", 400, 150, 800, 300),
    "cifar10-infogan": ("infogan", 32, 3, "square", 1000, 300, 2000, 600),
    "celeba-infogan": ("infogan", 64, 3, 128, 400, 150, 800, 300),
    "celeba-wae": ("wae", 64, 3, 140, 70, 30, 70, 30),
}
NAMES = ("network", "side", "channels", "crop", "epochs", "lr_halve", "epochs2", "lr_halve2")


def setting(preset, name):
    """The recipe's setting, or Config's default."""
    default = next((f.default for f in dataclasses.fields(Config) if f.name == name), None)
    return RECIPES[preset].get(name, default)


@pytest.mark.parametrize("preset", list(THEIRS))
def test_dai_and_wipfs_recipes(preset):
    assert tuple(setting(preset, name) for name in NAMES) == THEIRS[preset]
    assert {name: setting(preset, name) for name in DAI_WIPF} == DAI_WIPF
    assert not setting(preset, "l2")
    assert setting(preset, "kl_weight") == 1


@pytest.mark.parametrize("preset", ["mnist-short", "fashion-short"])
def test_short_recipes(preset):
    names = ("network", "side", "channels", "epochs", "epochs2", "lr", "lr2", "balance")
    assert tuple(setting(preset, n) for n in names) == ("infogan", 28, 1, 10, 20, 1e-3, 1e-3, "computed")


@pytest.mark.parametrize(
    ("preset", "side", "channels", "latents", "epochs", "lr", "latent", "decoder"),
    [
        # The last two: the weights of |z|^2 and of the kernels' squares beside the sum of squared errors.
        ("mnist-rae", 32, 1, 16, 100, 5e-4, 6.4e-3, 1.024e-4),
        ("cifar10-rae", 32, 3, 128, 100, 5e-4, 2.4e-2, 3.072e-3),
        ("celeba-rae", 64, 3, 64, 70, 1e-3, 1.92e-2, 1.2288e-3),
    ],
)
def test_ghosh_and_others_recipes(preset, side, channels, latents, epochs, lr, latent, decoder):
    names = ("side", "channels", "latents", "epochs", "lr", "batch", "network", "family", "plateau", "epochs2")
    wanted = (side, channels, latents, epochs, lr, 100, "rae", "rae-l2", 5, 0)
    assert tuple(setting(preset, n) for n in names) == wanted
    options = RECIPES[preset]["options"]
    assert options["latent_l2"] == pytest.approx(latent)
    assert options["decoder_l2"] == pytest.approx(decoder)
    assert options.get("rae_variant", "cifar10") == ("celeba" if preset == "celeba-rae" else "cifar10")


def test_every_recipe_is_a_preset():
    for name, recipe in RECIPES.items():
        config = PRESETS[name]
        assert config.preset == name
        assert {key: getattr(config, key) for key in recipe} == recipe
        config.validate()
