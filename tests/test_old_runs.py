"""Runs made by earlier versions are read, resumed, evaluated and reported.

tests/old_runs holds small ones, made at commit 6733621: finished runs of each balance, and two that were stopped.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

import bvae
from bvae.config import Config
from bvae.evaluate import main as evaluate
from bvae.report import write_report
from bvae.run.checkpoint import LAST, load_checkpoint
from bvae.sample import main as sample
from bvae.train import main as train

OLD = Path(__file__).parent / "old_runs"
FINISHED = ("finished", "learned", "fixed")


@pytest.fixture
def copied(tmp_path, request):
    return Path(shutil.copytree(OLD / request.param, tmp_path / request.param))


@pytest.mark.parametrize("copied", FINISHED, indirect=True)
def test_finished_runs_are_read_sampled_evaluated_and_reported(copied, tmp_path, capsys):
    before = json.loads((copied / "results.json").read_text())
    run = bvae.Run(copied)
    assert run.finished and run.results == before and run.records[-1]["epoch"] == 2
    assert run.sample(2).shape == (2, 3, 16, 16)
    sample([str(copied), "--num", "4", "--out", str(tmp_path / "grid.png"), "--stage", "1"])
    evaluate([str(copied), "--no-fid", "--json", str(tmp_path / "figures.json")])
    figures = json.loads((tmp_path / "figures.json").read_text())
    for name in ("mse_sampled", "mse_mean", "kl"):
        assert figures["stage1"][name] == pytest.approx(before["stage1"][name], rel=1e-4)
    page = write_report([copied])
    assert "Finished." in page.read_text()


@pytest.mark.parametrize(("copied", "stage"), [("stage1", 1), ("stage2", 2)], indirect=["copied"])
def test_stopped_runs_go_on(copied, stage):
    _, description = load_checkpoint(copied / LAST)
    assert description["stage"] == stage
    done = description["step"] // 3
    more = ["--epochs", str(done + 2)] if stage == 1 else ["--epochs2", str(done + 2)]
    assert train(["--resume", str(copied), *more]) == 0
    after, description = load_checkpoint(copied / LAST)
    assert description["stage"] == 2
    if stage == 2:  # Adam's state was kept by number: it goes on, and does not begin anew
        steps = {float(t) for name, t in after.items() if name.startswith("step.adam.") and name.endswith(".step")}
        assert steps == {3.0 * (done + 2)}
        assert any(name.startswith("step.adam.encoder.") for name in after)
    results = json.loads((copied / "results.json").read_text())
    assert results["stage1"]["mse_sampled"] > 0 and results["stage2"]["steps"] > 0
    assert all(t.isfinite().all() for t in after.values() if t.is_floating_point())


@pytest.mark.parametrize("copied", ["finished"], indirect=True)
def test_a_finished_run_trains_on(copied):
    before = bvae.load(copied)
    assert train(["--resume", str(copied), "--epochs2", "3"]) == 0
    after = bvae.load(copied)
    assert all(
        torch.equal(a, b)
        for a, b in zip(before.stage1.state_dict().values(), after.stage1.state_dict().values(), strict=True)
    )
    assert bvae.Run(copied).records[-1]["epoch"] == 3


def test_their_configurations_have_the_settings_of_then():
    for folder in OLD.iterdir():
        config = bvae.Run(folder).config
        assert isinstance(config, Config) and config.network == "resnet" and config.val == 0 and not config.options
