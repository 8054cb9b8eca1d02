import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from bvae import sample
from bvae.config import Config
from bvae.errors import run_command
from bvae.report.figures import image_grid
from bvae.run.folder import load
from bvae.two_stage import TwoStageVAE, to_uint8

CONFIG = Config(preset="shapes", side=8, scales=2, base=4, fc=8, latents=3, hidden=16)


def save_model(folder, **changes):
    torch.manual_seed(0)
    model = TwoStageVAE(Config(**{**CONFIG.to_dict(), **changes}))
    for p in model.parameters():  # or all samples look alike
        p.data += 0.2 * torch.randn_like(p)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("run"))


def arrays(path):
    with np.load(path, allow_pickle=False) as file:
        assert file.files == ["images"]
        return file["images"]


def test_npz_holds_the_models_samples(run, tmp_path):
    out = tmp_path / "x.npz"
    for arguments, stage, seed in ((["--seed", "3"], 2, 3), (["--stage", "1"], 1, 0)):
        sample.main([str(run), "--num", "7", "--out", str(out), "--device", "cpu", *arguments])
        images = arrays(out)
        assert images.shape == (7, 8, 8, 3)
        assert images.dtype == np.uint8
        assert np.array_equal(images, to_uint8(load(run).sample(7, stage, seed)))
        assert len(np.unique(images.reshape(7, -1), axis=0)) == 7


def test_png_is_the_grid_of_them(run, tmp_path, capsys):
    out = tmp_path / "grid.png"
    sample.main([str(run), "--num", "5", "--columns", "3", "--out", str(out), "--device", "cpu"])
    assert str(out) in capsys.readouterr().out
    grid = image_grid(to_uint8(load(run).sample(5)), 3)
    with Image.open(out) as png:
        assert png.format == "PNG"
        pixels = np.asarray(png)
    scale = pixels.shape[0] // grid.shape[0]
    assert np.array_equal(pixels, grid.repeat(scale, 0).repeat(scale, 1))


def test_grey_images(tmp_path):
    run = save_model(tmp_path / "grey", channels=1)
    for name in ("a.png", "a.npz"):
        sample.main([str(run), "--num", "2", "--out", str(tmp_path / name), "--device", "cpu"])
    assert arrays(tmp_path / "a.npz").shape == (2, 8, 8, 1)
    with Image.open(tmp_path / "a.png") as png:
        assert png.size[0] > png.size[1]


def fails(capsys, *arguments):
    """The one line that the command ends with."""
    with pytest.raises(SystemExit) as caught:
        run_command(lambda: sample.main([str(a) for a in arguments]))
    output = capsys.readouterr()
    assert caught.value.code == 2
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert output.err.startswith("error: ")
    return output.err


@pytest.mark.parametrize("name", ["x.jpg", "x", "x.PNG", "x.npy", ".png"])
def test_a_wrong_suffix(run, tmp_path, capsys, name):
    assert ".png or .npz" in fails(capsys, run, "--out", tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["x.png", "x.npz"])
def test_nowhere_to_write(run, tmp_path, capsys, name):
    out = tmp_path / "none" / name
    assert str(out) in fails(capsys, run, "--num", 1, "--out", out, "--device", "cpu")
    assert not out.parent.exists()
    (tmp_path / name).mkdir()
    assert str(tmp_path / name) in fails(capsys, run, "--num", 1, "--out", tmp_path / name, "--device", "cpu")
    assert [f.name for f in tmp_path.iterdir()] == [name]


def test_a_missing_run(tmp_path, capsys):
    assert str(tmp_path / "none") in fails(capsys, tmp_path / "none", "--out", tmp_path / "x.png")
    assert "best.safetensors" in fails(
        capsys, save_model(tmp_path / "run"), "--checkpoint", "best", "--out", tmp_path / "x.png"
    )


def test_damaged_weights(tmp_path, capsys):
    run = save_model(tmp_path / "run")
    weights = run / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3])
    assert str(weights) in fails(capsys, run, "--out", tmp_path / "x.png", "--device", "cpu")
    assert not (tmp_path / "x.png").exists()


def test_no_second_stage(tmp_path, capsys):
    run = save_model(tmp_path / "run", epochs2=0)
    assert "second stage" in fails(capsys, run, "--out", tmp_path / "x.png", "--device", "cpu")
    sample.main([str(run), "--stage", "1", "--num", "1", "--out", str(tmp_path / "x.png"), "--device", "cpu"])
    assert (tmp_path / "x.png").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_no_cuda(run, tmp_path, capsys):
    assert "CUDA" in fails(capsys, run, "--device", "cuda", "--out", tmp_path / "x.png")


@pytest.mark.parametrize("arguments", [["--num", "0"], ["--num", "many"], ["--stage", "3"], ["--columns", "-1"], []])
def test_the_parser_refuses(run, arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        sample.main([str(run), *arguments] if arguments else [])
    assert caught.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_as_a_command(run, tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", "bvae.sample"]  # where there is no extension, that is told too
    out = tmp_path / "x.npz"
    good = subprocess.run([*command, str(run), "--num", "3", "--out", str(out)], capture_output=True, text=True)
    assert good.returncode == 0, good.stderr
    assert str(out) in good.stdout
    assert len(arrays(out)) == 3
    bad = subprocess.run([*command, str(tmp_path), "--out", str(out)], capture_output=True, text=True)
    assert bad.returncode == 2
    assert bad.stdout == ""
    assert bad.stderr.count("\n") == 1
    assert str(tmp_path) in bad.stderr
