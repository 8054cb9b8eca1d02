"""The command for FID as it is called."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from inception_samples import QuickNetwork

from bvae import fid as fid_command

TOOL = Path(__file__).parents[2] / "tools" / "fid.py"
RNG = np.random.default_rng(0)


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The tool, in a folder with sets of images, with a quick network and a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BVAE_CACHE", str(tmp_path / "cache"))
    Path("weights.pth").touch()
    monkeypatch.setenv("BVAE_INCEPTION", "weights.pth")
    np.save("a.npy", RNG.integers(0, 256, (40, 8, 8, 3), np.uint8))
    np.save("b.npy", RNG.integers(0, 200, (35, 8, 8, 3), np.uint8))
    network = QuickNetwork()
    monkeypatch.setattr(fid_command, "load_inception", lambda path, device, precision: (network, "sha256:w"))
    monkeypatch.setattr(fid_command, "network", network, raising=False)
    return fid_command


def call(tool: ModuleType, *argv: str) -> dict:
    tool.main([*argv, "--json", "out.json"])
    return json.loads(Path("out.json").read_text())


def refused(tool: ModuleType, *argv: str) -> str:
    with pytest.raises(tool.UserError) as error:
        tool.main(list(argv))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_result_names_what_it_is_of(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    result = call(tool, "a.npy", "b.npy", "--allow-few")
    assert result["fid"] > 1 and result["protocol"] == "tf1" and (result["n"], result["n_reference"]) == (35, 40)
    assert result["label"] == "few images" and result["weights"] == "sha256:w" and result["precision"] == "fp32"
    assert f"FID {result['fid']:.4f}   protocol tf1, n = 35 against 40, fp32, few images" in capsys.readouterr().out
    for protocol in ("pytorch-fid", "clean"):
        other = call(tool, "a.npy", "b.npy", "--allow-few", "--protocol", protocol)
        assert other["protocol"] == protocol and other["fid"] != result["fid"]


def test_a_set_is_at_no_distance_from_itself(tool: ModuleType) -> None:
    assert abs(call(tool, "a.npy", "a.npy", "--allow-few")["fid"]) < 1e-4


def test_few_images_are_refused(tool: ModuleType) -> None:
    assert "a.npy: 40 images; fewer than 2048" in refused(tool, "a.npy", "b.npy")


def test_counts_can_be_cut(tool: ModuleType) -> None:
    assert call(tool, "a.npy", "b.npy", "--allow-few", "--drop-last", "16")["n"] == 32
    result = call(tool, "a.npy", "b.npy", "--allow-few", "--num", "20")
    assert result["n"] == result["n_reference"] == 20


def test_changes_to_a_side_stand_in_the_protocol(tool: ModuleType) -> None:
    result = call(tool, "a.npy", "b.npy", "--allow-few", "--jpeg-roundtrip", "--stretch")
    assert result["protocol"] == "tf1 A+jpeg B+stretch"
    assert result["fid"] != call(tool, "a.npy", "b.npy", "--allow-few")["fid"]


def test_statistics_are_cached_and_saved(tool: ModuleType) -> None:
    first = call(tool, "a.npy", "b.npy", "--allow-few")
    count = len(tool.network.seen)  # type: ignore[attr-defined]
    assert call(tool, "a.npy", "b.npy", "--allow-few") == first
    assert len(tool.network.seen) == count, "nothing went through the network again"  # type: ignore[attr-defined]
    call(tool, "a.npy", "b.npy", "--allow-few", "--no-cache")
    assert len(tool.network.seen) > count  # type: ignore[attr-defined]
    tool.main(["a.npy", "--save-stats", "a.npz", "--allow-few"])
    saved = call(tool, "a.npz", "b.npy", "--allow-few")
    assert saved["fid"] == pytest.approx(first["fid"], rel=1e-6) and saved["n_reference"] == 40


def test_statistics_of_another_making_are_refused(tool: ModuleType) -> None:
    tool.main(["a.npy", "--save-stats", "a.npz", "--allow-few", "--protocol", "clean"])
    assert "a.npz: statistics under the protocol clean; --protocol says tf1" in refused(
        tool, "a.npz", "b.npy", "--allow-few", "--protocol", "tf1"
    )
    np.savez("small.npz", mu=np.zeros(64), sigma=np.eye(64))
    assert "statistics of 64 features, images have 2048" in refused(tool, "small.npz", "b.npy", "--allow-few")
    assert "made with --precision fp32" in refused(tool, "a.npz", "b.npy", "--allow-few", "--precision", "bf16")
    assert "cannot be changed" in refused(tool, "a.npz", "b.npy", "--allow-few", "--jpeg-roundtrip")
    assert "need images" in refused(tool, "a.npz", "b.npy", "--allow-few", "--kid")


def test_kid_and_precision(tool: ModuleType) -> None:
    result = call(tool, "a.npy", "b.npy", "--allow-few", "--kid", "--prdc")
    assert result["kid"]["subset_size"] == 35 and np.isfinite(result["kid"]["mean"])
    assert set(result["prdc"]) == {"precision", "recall", "density", "coverage", "neighbours"}


def test_mistakes_end_in_one_line_and_code_2(tool: ModuleType) -> None:
    for argv, said in (
        (["missing", "b.npy"], "error: A: missing: no such file or folder"),
        (["a.npy", "b.npy", "--allow-few", "--inception", "a.npy"], "error: a.npy: not the Inception weights"),
    ):
        done = subprocess.run([sys.executable, TOOL, *argv], capture_output=True, text=True, timeout=120)
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1].startswith(said) and "Traceback" not in done.stderr
