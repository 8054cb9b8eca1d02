"""Every example of docs/extending.md is run as it stands there, and trained with."""

import re
from pathlib import Path

import pytest
import torch

import bvae
from bvae.config.registry import balances, families, networks
from bvae.errors import UserError
from bvae.models import priors
from bvae.run.checkpoint import load_checkpoint

PAGE = (Path(__file__).parent.parent / "docs/extending.md").read_text()
SHORT = {"epochs": 2, "epochs2": 1, "batch": 40, "hidden": 8, "latents": 3, "lr": 1e-3, "bn_batches": 3}
SHORT |= {"device": "cpu", "quiet": True}


@pytest.fixture(scope="module")
def examples():
    found = dict(re.findall(r"```python (\w+)\n(.*?)```", PAGE, re.S))
    names = {name: {} for name in found}
    for name, code in found.items():
        exec(code, names[name])
    yield names
    networks.remove("pyramid")
    balances.remove("median")
    families.remove("sparse")
    del priors._ADDED["scaled"]


def test_the_network_trains_with_its_setting(examples, tmp_path):
    images = examples["dataset"]["load_stripes"]()
    run = bvae.fit(images, network="pyramid", pyramid_width=4, out=tmp_path / "run", **SHORT)
    assert run.config.options == {"pyramid_width": 4}
    assert bvae.load(run.folder).stage1.encoder.body[0].out_channels == 4
    assert torch.equal(bvae.load(run.folder).sample(2), run.sample(2))
    with pytest.raises(UserError, match="cannot resume with --pyramid-width 5: the run has 4"):
        bvae.fit(images, out=run.folder, resume=True, pyramid_width=5, quiet=True)
    with pytest.raises(UserError, match="multiple of 4"):
        bvae.fit(images.train[:, :, :15], network="pyramid", out=tmp_path / "other", **SHORT)


def test_the_balance_trains_and_is_undone_and_resumed(examples, tmp_path):
    images = examples["dataset"]["load_stripes"]()
    sizes = {"scales": 2, "base": 2, "fc": 4}
    run = bvae.fit(images, balance="median", out=tmp_path / "run", **SHORT, **sizes)
    gammas = [r["gamma2"] for r in run.records if r["stage"] == 1]
    assert gammas == pytest.approx([torch.exp(torch.tensor(-0.05 * 5 * n)).item() for n in (1, 2)], rel=1e-4)
    longer = bvae.fit(images, out=run.folder, resume=True, epochs2=3, quiet=True)
    whole = bvae.fit(images, balance="median", out=tmp_path / "whole", **SHORT | {"epochs2": 3}, **sizes)
    for name, t in whole.model.state_dict().items():
        assert torch.equal(longer.model.state_dict()[name], t), name


def test_the_family_trains_with_its_setting(examples, tmp_path):
    images = examples["dataset"]["load_stripes"]()
    sizes = {"scales": 2, "base": 2, "fc": 4, "epochs": 4, "lr": 1e-2}
    plain, sparse = (
        bvae.fit(images, family="sparse", code_l1=weight, out=tmp_path / f"{weight}", **SHORT | sizes | {"epochs2": 0})
        for weight in (0.0, 100.0)
    )
    assert sparse.records[-1]["code_norm1"] < 0.8 * plain.records[-1]["code_norm1"]
    assert sparse.config.options == {"code_l1": 100.0}
    assert "kl" not in sparse.results["stage1"]


def test_the_prior_is_fitted_saved_and_sampled(examples, tmp_path):
    images = examples["dataset"]["load_stripes"]()
    sizes = {"scales": 2, "base": 2, "fc": 4}
    run = bvae.fit(images, prior=("scaled",), out=tmp_path / "run", **SHORT, **sizes)
    again = bvae.Run(run.folder)
    assert torch.equal(again.sample_prior("scaled", 3), run.sample_prior("scaled", 5)[:3])
    _, description = load_checkpoint(run.folder / "priors/scaled.safetensors")
    assert description["figures"]["s"] == pytest.approx(1, abs=0.1), "whitened"


def test_the_data_set_has_its_own_digest(examples):
    load = examples["dataset"]["load_stripes"]
    assert load().digest == load().digest != load(side=20).digest
    assert load().train.shape == (216, 16, 16, 1)
