"""The networks as parts that a configuration names."""

import dataclasses

import pytest
import torch

from bvae.config import Config
from bvae.config.registry import networks
from bvae.errors import UserError
from bvae.models.vae import count_parameters, first_stage

CIFAR10 = Config()


@pytest.mark.parametrize(
    ("changes", "encoder", "decoder"),
    [
        ({"network": "infogan"}, 8_657_472, 8_616_131),
        ({"network": "wae", "side": 64}, 25_607_296, 21_475_331),
        # Beside the published counts: a dense layer for log sigma.
        ({"network": "wae", "side": 64, "options": {"wae_variant": "celeba"}}, 18_267_200 + 1_048_640, 21_475_331),
        ({"network": "rae", "latents": 128}, 11_546_368 + 524_416, 18_954_499),
        ({"network": "rae", "side": 64, "options": {"rae_variant": "celeba"}}, 18_267_200 + 1_048_640, 21_475_331),
        ({"network": "mlp", "side": 28, "channels": 1}, 784 * 512 + 512 + 131_328 + 2 * 16_448, None),
    ],
)
def test_a_configuration_builds_them(changes, encoder, decoder):
    c = dataclasses.replace(CIFAR10, **changes).validate()
    with torch.device("meta"):
        model = first_stage(c)
        deterministic, _ = networks[c.network].build(c, deterministic=True)
    assert count_parameters(model.encoder) == encoder
    assert decoder in (None, count_parameters(model.decoder))
    assert deterministic.deterministic and not model.encoder.deterministic


def test_the_setting_of_spectral_norm_reaches_the_network():
    c = dataclasses.replace(CIFAR10, network="rae", options={"rae_spectral": "all"})
    with torch.device("meta"):
        assert sum(name.endswith(".u") for name, _ in first_stage(c).named_buffers()) == 9


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"network": "infogan", "side": 30}, "--network infogan needs sides that 4 divides, not 30x30"),
        ({"network": "wae", "side": 28}, "--network wae needs sides that 8 divides, not 28x28"),
        ({"network": "rae", "side": (32, 30)}, "--network rae needs sides that 4 divides, not 32x30"),
        ({"network": "rae", "side": 28, "options": {"rae_variant": "celeba"}}, "sides that 8 divides, not 28x28"),
        ({"network": "infogan", "batch": 1}, "--batch 1 is too small"),
        ({"network": "rae", "side": 16, "batch": 1}, "--batch 1 is too small"),
        ({"network": "wae", "side": 8, "batch": 1}, "--batch 1 is too small"),
    ],
)
def test_what_cannot_be_built_is_refused_before_anything_is_read(changes, text):
    with pytest.raises(UserError, match=text):
        dataclasses.replace(CIFAR10, **changes).validate()


@pytest.mark.parametrize(
    "changes",
    [
        {"network": "infogan", "side": (96, 64)}, {"network": "infogan", "side": 28}, {"network": "mlp", "batch": 1},
        {"network": "wae", "side": 28, "options": {"wae_variant": "mnist"}}, {"network": "rae", "side": 40},
        {"network": "rae", "batch": 1}, {"network": "mlp", "side": (7, 5)},
    ],
)  # fmt: skip
def test_sides_that_only_the_resnet_cannot_take(changes):
    dataclasses.replace(CIFAR10, **changes).validate()
