import importlib.util
import json
import sys
import types

import numpy as np
import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bvae.api import complete, make_trainer
from bvae.config import Config
from bvae.data import load
from bvae.errors import Interrupted, UserError
from bvae.run import trackers
from bvae.run.log import RunLog
from bvae.run.trackers import IDENTITY, open_tracker, require

CONFIG = {"preset": "shapes", "epochs": 3, "l2_on": ()}
RECORD = {"stage": 1, "epoch": 1, "step": 10, "loss": 1.5, "nan": float("nan"), "latent_kl": [0.5, 1.0], "text": "x"}
PICTURE = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)


class Recorder:
    """A tracker that remembers; it fails from the call on that `fails` names."""

    name, where, identity = "recorder", "here", "id"

    def __init__(self, fails=None):
        self.calls, self.fails = [], fails

    def _call(self, name, *values):
        self.calls.append((name, *values))
        if name == self.fails:
            raise ConnectionError("the server is gone\nand more lines")

    def values(self, values, step):
        self._call("values", values, step)

    def image(self, tag, array, step):
        self._call("image", tag, step)

    def final(self, values):
        self._call("final", values)

    def close(self, status):
        self._call("close", status)


# ---- through the run's log ---------------------------------------------------------------------------------------


def log_all(folder, tracker, console=None):
    with RunLog(folder, tracker=tracker, console=console or Console(quiet=True)) as log:
        log.start(1, 3, 10)
        log.epoch(RECORD)
        log.image("samples", PICTURE, 1)
        log.final({"stage1": {"mse": 0.5, "bn": "ema", "flag": True, "list": [1.0]}}, 1)


def test_a_tracker_gets_what_tensorboard_gets(tmp_path):
    tracker = Recorder()
    log_all(tmp_path, tracker)
    (_, values, step), image, final, close = tracker.calls
    assert step == 1 and values["stage1/loss"] == 1.5 and values["stage1/latent_kl"] == [0.5, 1.0]
    assert (image, final, close) == (
        ("image", "stage1/samples", 1), ("final", {"final/stage1/mse": 0.5}), ("close", "finished"),
    )  # fmt: skip
    events = EventAccumulator(str(tmp_path / "tensorboard" / "stage1"))
    events.Reload()
    assert {tag for tag in values if isinstance(values[tag], float | int)} <= set(events.Tags()["scalars"])
    assert "final/stage1/mse" in events.Tags()["scalars"]


@pytest.mark.parametrize("fails", ["values", "image", "final", "close"])
def test_a_tracker_that_fails_ends_with_one_line_and_the_run_goes_on(tmp_path, fails, capsys):
    tracker = Recorder(fails)
    log_all(tmp_path, tracker, Console(width=200))
    assert [name for name, *_ in tracker.calls][-1] == fails  # it is not asked again
    lines = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert lines == ["warning: recorder has failed, and the run goes on without it: the server is gone"]
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1


@pytest.mark.parametrize(
    ("error", "status"),
    [(Interrupted(15, "stopped"), "stopped"), (KeyboardInterrupt(), "stopped"), (UserError("diverged"), "failed")],
)
def test_a_tracker_is_told_how_the_run_ended(tmp_path, error, status):
    tracker = Recorder()
    with pytest.raises(type(error)), RunLog(tmp_path, tracker=tracker, quiet=True):
        raise error
    assert tracker.calls == [("close", status)]


# ---- before training begins ------------------------------------------------------------------------------------


def tiny(**changes):
    return Config(
        **{
            **Config(
                preset="shapes", data="shapes", side=16, scales=2, base=4, fc=8, latents=4, hidden=16, batch=10,
                shapes_train=40, shapes_test=20, epochs=1, epochs2=1, bn_batches=2,
            ).to_dict(),
            **changes,
        }
    )  # fmt: skip


def tiny_data():
    return load("shapes", side=16, channels=3, num_train=40, num_test=20)


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_named_before_anything_is_written(tmp_path, monkeypatch, name):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == name else find(n, *a))
    with pytest.raises(UserError, match=rf"--logger {name}: {name} is not installed; pip install 'bvae\[{name}\]'"):
        make_trainer(tiny(logger=name), tiny_data(), tmp_path / "run", quiet=True)
    assert list(tmp_path.iterdir()) == []
    require("none")
    assert open_tracker("none", tmp_path, CONFIG) is None


def test_a_tracker_that_cannot_begin_leaves_no_folder(tmp_path, monkeypatch):
    def init(**kwargs):
        raise RuntimeError("no API key configured\nuse wandb login")

    module = types.ModuleType("wandb")
    module.init, module.Settings = init, dict
    module.__spec__ = importlib.util.spec_from_loader("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(UserError, match=r"^--logger wandb: cannot begin: no API key configured$"):
        make_trainer(tiny(logger="wandb"), tiny_data(), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_the_trainer_logs_what_the_report_shows(tmp_path, monkeypatch):
    tracker = Recorder()
    monkeypatch.setitem(trackers.__dict__, "WandbTracker", lambda folder, config, identity: tracker)
    monkeypatch.setattr(trackers, "require", lambda name: None)
    monkeypatch.setattr("bvae.api.require", lambda name: None)
    trainer = make_trainer(tiny(logger="wandb"), tiny_data(), tmp_path / "run", quiet=True)
    views = complete(trainer)
    images = {call[1] for call in tracker.calls if call[0] == "image"}
    assert images == {f"stage2/{name}" for name in views.pictures()}
    assert {"stage2/samples-stage2", "stage2/nearest", "stage2/interpolations", "stage2/reconstructions"} <= images
    final = next(call[1] for call in tracker.calls if call[0] == "final")
    assert final["final/stage1/mse_sampled"] == trainer.results["stage1"]["mse_sampled"]
    assert tracker.calls[-1] == ("close", "finished")
    assert json.loads((tmp_path / "run" / IDENTITY).read_text()) == {"wandb": "id"}
    for name in views.pictures():
        assert (tmp_path / "run" / f"{name}.png").exists()


@pytest.mark.parametrize("text", ["", "[1]", '{"wandb": 3}', "nonsense"])
def test_a_damaged_identity_is_a_new_run(tmp_path, monkeypatch, text):
    (tmp_path / IDENTITY).write_text(text)
    seen = []
    monkeypatch.setitem(trackers.__dict__, "WandbTracker", lambda *args: seen.append(args[2]) or Recorder())
    monkeypatch.setattr(trackers, "require", lambda name: None)
    open_tracker("wandb", tmp_path, CONFIG)
    open_tracker("wandb", tmp_path, CONFIG)
    assert seen == [None, "id"]


# ---- the real ones, offline ------------------------------------------------------------------------------------


def test_mlflow_in_a_file_of_the_run(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed (the extra bvae[mlflow])")
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    tracker = open_tracker("mlflow", tmp_path, CONFIG)
    log_all(tmp_path, tracker)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    run = client.get_run(tracker.identity)
    assert run.info.status == "FINISHED" and run.info.run_name == tmp_path.name
    assert run.data.params == {"preset": "shapes", "epochs": "3", "l2_on": "()"}
    assert run.data.metrics["stage1/loss"] == 1.5 and run.data.metrics["final/stage1/mse"] == 0.5
    assert [a.path for a in client.list_artifacts(tracker.identity, "stage1")] == ["stage1/samples-epoch1.png"]
    # Resumed: the same run goes on, and has every value of both.
    again = open_tracker("mlflow", tmp_path, {**CONFIG, "epochs": 9})
    assert again.identity == tracker.identity
    assert client.get_run(again.identity).info.status == "RUNNING"
    with RunLog(tmp_path, resume_after={1: 1}, tracker=again, quiet=True) as log:
        log.epoch({**RECORD, "epoch": 2, "loss": 0.5})
    history = client.get_metric_history(tracker.identity, "stage1/loss")
    assert sorted((m.step, m.value) for m in history) == [(1, 1.5), (2, 0.5)]
    # A run that the store does not know is logged as a new one.
    (tmp_path / IDENTITY).write_text(json.dumps({"mlflow": "0" * 32}))
    assert open_tracker("mlflow", tmp_path, CONFIG).identity not in (tracker.identity, "0" * 32)


def test_wandb_offline_in_the_runs_folder(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed (the extra bvae[wandb])")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    monkeypatch.delenv("WANDB_DIR", raising=False)
    tracker = open_tracker("wandb", tmp_path, CONFIG)
    log_all(tmp_path, tracker)
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    assert folder.name.endswith(tracker.identity)
    assert len(list(folder.glob("files/media/images/stage1/samples*.png"))) == 1
    content = b"".join(path.read_bytes() for path in folder.glob("*.wandb"))
    for expected in (b"stage1/loss", b"stage1/epoch", b"final/stage1/mse", b"shapes", tracker.identity.encode()):
        assert expected in content
    # Resumed: the same run goes on.
    again = open_tracker("wandb", tmp_path, CONFIG)
    again.close("finished")
    assert again.identity == tracker.identity
