"""Training on images that stay in their file ends with the bits of training on the same images in memory."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bvae.api import make_trainer
from bvae.batches.mapped import is_mapped
from bvae.batches.streamed import stays_in_file
from bvae.config import Config
from bvae.data.shapes import make_shapes
from bvae.engine.trainer import Trainer
from bvae.errors import Interrupted, run_command
from bvae.run.data import load_data
from bvae.train import main, parse

pytest.importorskip("bvae._host", reason="the compiled extension is not there")

SETTINGS = "--side 16 --scales 2 --base 4 --latents 8 --fc 16 --hidden 16 --batch 50 --lr 1e-3 --bn-batches 4 --no-amp"
TINY = [*SETTINGS.split(), "--device", "cpu", "--hflip", "--eval-images", "30"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    np.save(folder / "train.npy", make_shapes(330, 16, 0, stream=0)[0])
    np.save(folder / "test.npy", make_shapes(70, 16, 0, stream=1)[0])
    return folder


def train(data: Path, out: Path, stream: str, *more: str) -> tuple[dict, dict]:
    argv = ["--data", str(data), "--out", str(out), "--stream", stream, "--epochs", "2", "--epochs2", "1"]
    assert main([*TINY, *argv, *more]) == 0
    return results(out)


def results(out: Path) -> tuple[dict, dict]:
    figures = json.loads((out / "results.json").read_text())
    for stage in ("stage1", "stage2"):
        for name in ("images_per_s", "latents_per_s"):
            figures[stage].pop(name, None)
    return figures, load_file(out / "model.safetensors")


def assert_same(a: tuple[dict, dict], b: tuple[dict, dict]) -> None:
    assert a[0] == b[0]
    assert a[1].keys() == b[1].keys()
    for name, tensor in a[1].items():
        assert tensor.equal(b[1][name]), name


@pytest.fixture(scope="module")
def in_memory(folder, tmp_path_factory):
    return train(folder, tmp_path_factory.mktemp("runs") / "in-memory", "never")


def test_streamed_and_in_memory_end_alike(folder, in_memory, tmp_path):
    assert_same(train(folder, tmp_path / "run", "always"), in_memory)


def test_a_set_too_large_for_the_memory_is_streamed_by_itself(folder, in_memory, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("bvae.batches.streamed.free_memory", lambda device: 100_000)  # images: 250 kB and 54 kB
    assert_same(train(folder, tmp_path / "run", "auto"), in_memory)


@pytest.mark.parametrize("then", ["never", "always"])
def test_a_run_stopped_in_mid_epoch_goes_on_streamed_or_not(folder, in_memory, tmp_path, then):
    out = tmp_path / "run"
    argv = ["--data", str(folder), "--out", str(out), "--stream", "always", "--epochs", "2", "--epochs2", "1"]
    config, _ = parse([*TINY, *argv])
    trainer = make_trainer(config, load_data(config), out, quiet=True)
    left = 9  # steps, of 6 an epoch

    def count_down(n: int = 1, values: object = None) -> None:
        nonlocal left
        left -= n
        if left == 0:
            trainer.stop = signal.SIGTERM

    trainer.log.step = count_down  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        trainer.run()
    assert main(["--resume", str(out), "--stream", then]) == 0
    assert_same(results(out), in_memory)


def test_a_single_file_keeps_its_held_out_images(folder, tmp_path):
    data = folder / "train.npy"
    few = ("--epochs", "1")
    assert_same(train(data, tmp_path / "a", "always", *few), train(data, tmp_path / "b", "never", *few))


def test_what_is_left_in_its_file(folder, tmp_path, monkeypatch):
    loaded = load_data(Config(data=str(folder), side=16, stream="always", device="cpu"))
    assert is_mapped(loaded.train) and is_mapped(loaded.test)
    kept = load_data(Config(data=str(folder), side=16, device="cpu"))
    assert not is_mapped(kept.train)
    assert kept.digest == loaded.digest
    cpu = torch.device("cpu")
    monkeypatch.setattr("bvae.batches.streamed.free_memory", lambda device: 100_000)
    assert stays_in_file(str(folder), "auto", cpu)
    assert not stays_in_file(str(folder), "never", cpu)
    assert not stays_in_file(str(tmp_path / "nothing"), "auto", cpu)
    monkeypatch.setattr("bvae.batches.streamed.free_memory", lambda device: 10**9)
    assert not stays_in_file(str(folder), "auto", cpu)


@pytest.mark.parametrize(("data", "text"), [("shapes", "in memory"), ("missing.npy", "missing.npy")])
def test_refuses_in_one_line(data, text, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_command(lambda: main([*TINY, "--data", data, "--out", str(tmp_path / "run"), "--stream", "always"]))
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.startswith("error: ") and text in error and len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_file_that_shrinks_while_training_ends_in_one_line(folder, tmp_path, capsys, monkeypatch):
    data = tmp_path / "images.npy"
    data.write_bytes((folder / "train.npy").read_bytes())
    whole = Trainer.run

    def shrunk(trainer: Trainer) -> dict:
        os.truncate(data, 1000)
        return whole(trainer)

    monkeypatch.setattr(Trainer, "run", shrunk)
    with pytest.raises(SystemExit) as stopped:
        run_command(lambda: main([*TINY, "--data", str(data), "--out", str(tmp_path / "run"), "--stream", "always"]))
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.startswith("error: ") and "images.npy" in error and len(error.splitlines()) == 1
