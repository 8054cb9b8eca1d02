import dataclasses
import json
import math
from pathlib import Path

import pytest

from bvae import reference
from bvae.config import PRESETS, Config, find_preset
from bvae.config.recipes import RECIPES as NETWORK_RECIPES
from bvae.errors import UserError
from bvae.files import encode_json

SOURCE = Path("somewhere/config.json")
CELEBA = ("encoder.downsample", "decoder.upsample")


# ---- presets --------------------------------------------------------------------------------------------------------

NAMES = (
    "side", "scales", "base", "latents", "blocks", "epochs", "lr", "lr_halve", "hidden", "epochs2", "lr2", "lr_halve2",
    "kl_weight", "l2", "l2_on", "rescale",
)  # fmt: skip
RECIPES = {
    "cifar10": (32, 3, 32, 64, 1, 700, 1e-4, 200, 2048, 1400, 1e-4, 100, 1, 0, (), False),
    "cifar10-code": (32, 3, 32, 64, 1, 700, 1e-4, 250, 2048, 1400, 1e-4, 400, 1, 0, (), False),
    "celeba": (64, 4, 32, 64, 1, 70, 5e-5, 60, 4096, 140, 5e-5, 120, 4, 1e-3, CELEBA, True),
    "celeba-1": (64, 4, 32, 64, 1, 70, 1e-4, 48, 4096, 140, 1e-4, 120, 1, 0, (), False),
    "celeba-2": (
        64, 4, 32, 64, 1, 70, 1e-4, 48, 4096, 140, 1e-4, 120, 1, 1e-3, ("decoder.upsample", "decoder.scales"), False,
    ),
    "celeba-3": (64, 4, 32, 64, 2, 70, 1e-4, 48, 4096, 140, 1e-4, 120, 1, 1e-3, ("encoder.downsample",), False),
    "celeba-4": (64, 3, 32, 128, 1, 70, 1e-4, 48, 4096, 140, 1e-4, 120, 1, 0, (), False),
}  # fmt: skip


@pytest.mark.parametrize("preset", list(RECIPES))
def test_presets_carry_the_published_recipes(preset):
    c = PRESETS[preset]
    assert c.preset == preset
    assert {name: getattr(c, name) for name in NAMES} == dict(zip(NAMES, RECIPES[preset], strict=True))
    assert (c.batch, c.fc, c.balance, c.channels, c.bn) == (100, 512, "computed", 3, "recompute")


def test_every_preset_can_be_and_the_list_is_whole():
    assert set(PRESETS) - set(NETWORK_RECIPES) == {*RECIPES, "shapes"}
    for c in PRESETS.values():
        assert c.validate() is c


def test_unknown_presets_are_answered_with_the_known_ones():
    assert find_preset("celeba") is PRESETS["celeba"]
    with pytest.raises(UserError, match=r"cifar11.*cifar10, cifar10-code, celeba"):
        find_preset("cifar11")


# ---- validate -------------------------------------------------------------------------------------------------------

WRONG = [
    *((f"--{flag}", {flag.replace("-", "_"): 0}) for flag in (
        "scales", "blocks", "base", "latents", "fc", "hidden", "batch", "lr-halve", "lr-halve2", "shapes-train",
        "shapes-test", "bn-batches", "epochs", "log-every", "max-steps",
    )),
    *((f"--{flag}", {flag.replace("-", "_"): -1}) for flag in (
        "epochs2", "eval-every", "eval-images", "seed", "data-seed", "checkpoint-seconds", "l2", "kl-weight",
    )),
    ("--seed", {"seed": 2**63}),
    *(("--lr", {"lr": v}) for v in (0.0, -1e-4, math.nan, math.inf)),
    ("--lr2", {"lr2": 0.0}),
    ("--l2", {"l2": math.nan, "l2_on": CELEBA}),
    ("--l2", {"l2": math.inf, "l2_on": CELEBA}),
    ("--l2-on", {"l2": 1e-3}),
    ("--l2", {"l2_on": CELEBA}),
    ("--l2-on", {"l2": 1e-3, "l2_on": ("encoder.downsample", "encoder.downsample")}),
    *(("--side", {"side": v}) for v in (0, 1, 2, 3, 33, -32, 48)),
    *(("--channels", {"channels": v}) for v in (0, 2, 4)),
    ("--scales", {"side": 8, "scales": 5}),
    ("--batch", {"side": 8, "scales": 4, "batch": 1}),
    ("--kl-weight", {"kl_weight": math.nan}),
    ("--kl-weight", {"kl_weight": math.inf}),
    ("--checkpoint-seconds", {"checkpoint_seconds": math.nan}),
    ("--checkpoint-seconds", {"checkpoint_seconds": math.inf}),
    ("--balance fixed", {"balance": "fixed"}),
    ("--balance fixed", {"balance": "fixed", "gamma": 1.0, "beta": 1.0}),
    *(("--gamma", {"balance": "fixed", "gamma": v}) for v in (0.0, -1.0, math.nan, math.inf, 1e-30, 1e200)),
    *(("--beta", {"balance": "fixed", "beta": v}) for v in (0.0, -1.0, math.nan, 1e-60)),
    *(("--gamma", {"balance": balance, "gamma": 1.0}) for balance in ("computed", "learned")),
    ("--beta", {"balance": "learned", "beta": 1.0}),
]  # fmt: skip


@pytest.mark.parametrize(("flag", "changes"), WRONG)
def test_what_cannot_be_is_refused_in_one_line_naming_the_flag(flag, changes):
    with pytest.raises(UserError) as caught:
        dataclasses.replace(PRESETS["cifar10"], **changes).validate()
    text = str(caught.value)
    assert flag in text
    assert "\n" not in text


@pytest.mark.parametrize(
    "changes",
    [
        {"side": 4, "scales": 3}, {"side": 8, "scales": 4, "batch": 2}, {"batch": 1}, {"channels": 1},
        {"epochs2": 0}, {"eval_every": 0}, {"kl_weight": 0.0}, {"kl_weight": "auto"}, {"checkpoint_seconds": 0.0},
        {"balance": "fixed", "gamma": 0.1}, {"balance": "fixed", "beta": 4.0}, {"balance": "learned"},
        {"seed": 2**63 - 1}, {"max_steps": 1}, {"l2": 1e-3, "l2_on": CELEBA},
    ],
)  # fmt: skip
def test_what_can_be_is_taken(changes):
    dataclasses.replace(PRESETS["cifar10"], **changes).validate()


# ---- derived values -------------------------------------------------------------------------------------------------


def test_resolved_kl_weight():
    auto = dataclasses.replace(PRESETS["celeba"], kl_weight="auto")
    assert auto.resolved_kl_weight() == 4.0 == PRESETS["celeba"].resolved_kl_weight()
    assert dataclasses.replace(auto, latents=128).resolved_kl_weight() == 1.0
    assert dataclasses.replace(PRESETS["cifar10"], kl_weight=3).resolved_kl_weight() == 3.0
    assert reference.auto_kl_weight(32, 64) == 1.0


def test_resolved_gamma():
    fixed = dataclasses.replace(PRESETS["cifar10"], balance="fixed")
    assert dataclasses.replace(fixed, gamma=0.3).resolved_gamma() == 0.3
    assert dataclasses.replace(fixed, beta=0.09).resolved_gamma() == pytest.approx(0.3)
    assert PRESETS["cifar10"].resolved_gamma() is None


# ---- to and from a file ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", list(PRESETS))
def test_round_trip_through_json(preset):
    c = dataclasses.replace(PRESETS[preset], kl_weight="auto", max_steps=7, data="some/path", seed=2**62)
    assert Config.from_dict(json.loads(encode_json(c.to_dict())), SOURCE) == c


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("gamma3", 1.0), ("side", "32"), ("side", 32.5), ("latents", 64.0), ("latents", None), ("amp", "yes"),
        ("balance", "guessed"), ("balance", None), ("l2_on", "encoder.downsample"), ("l2_on", ["encoder"]),
        ("kl_weight", "car"), ("lr", None), ("lr", "fast"), ("device", "tpu"), ("bn", ""), ("data", 5),
        ("max_steps", [1]), ("side", 33), ("lr", math.nan), ("seed", {}),
    ],
)  # fmt: skip
def test_an_edited_file_is_refused_by_name(key, value):
    values = PRESETS["cifar10"].to_dict() | {key: value}
    with pytest.raises(UserError) as caught:
        Config.from_dict(values, SOURCE)
    text = str(caught.value)
    assert str(SOURCE) in text
    assert key in text
    assert "\n" not in text


# ---- what defines a run ---------------------------------------------------------------------------------------------

FREE = {
    "data", "partition", "split",
    "epochs", "epochs2", "max_steps", "device", "graph", "compile", "stream", "eval_every", "eval_images",
    "log_every", "checkpoint_seconds",
    "logger", "prior", "threads", "fid_every", "fid_num", "fid_protocol", "inception", "allow_few",
}  # fmt: skip


def other(value):
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case str():
            return value + "x"
        case None:
            return 1.0
        case tuple():
            return (*value, "decoder.scales")


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Config) if f.name != "options"])
def test_exactly_the_run_defining_fields_are_named(name):
    c = PRESETS["celeba"]
    changed = dataclasses.replace(c, **{name: other(getattr(c, name))})
    assert changed != c
    expected = [] if name in FREE else [name]
    assert changed.changed_definition(c) == c.changed_definition(changed) == expected


def test_whether_there_is_a_second_stage_defines_the_run():
    c = PRESETS["cifar10"]
    one = dataclasses.replace(c, epochs2=0)
    assert one.changed_definition(c) == c.changed_definition(one) == ["epochs2"]
    assert c.changed_definition(c) == one.changed_definition(one) == []


def test_a_run_of_the_first_version_can_still_be_read():
    later = {"crop", "sync_bn", *FREE} - {"data"}
    values = {name: v for name, v in PRESETS["cifar10"].to_dict().items() if name not in later}
    read = Config.from_dict(values, SOURCE)
    assert read.changed_definition(PRESETS["cifar10"]) == []
    values.pop("base")
    with pytest.raises(UserError, match="'base' is missing"):
        Config.from_dict(values, SOURCE)
