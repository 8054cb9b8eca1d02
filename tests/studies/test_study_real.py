"""A real study of two cells, killed in the middle, and the FIDs that bvae.evaluate measures alone."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

TINY = ["base=4", "fc=8", "latents=8", "side=16", "scales=2", "shapes_train=200", "shapes_test=50", "batch=50"]
COMMAND = [
    *(sys.executable, "-m", "bvae.study", "fig6", "--data", "shapes", "--scale", "0.06", "--seeds", "2", "--jobs", "1"),
    *(text for name in TINY for text in ("--set", name)),
]


def wait_for(found: Path, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not found.exists():
        assert time.monotonic() < end, f"{found} did not appear"
        time.sleep(0.05)


def test_a_study_killed_in_the_middle_goes_on_and_draws_its_picture(tmp_path: Path) -> None:
    """Its figure is drawn, the cell that was done is not trained again, and the other one goes on."""
    out = tmp_path / "s"
    process = subprocess.Popen([*COMMAND, "--out", str(out)], stdout=subprocess.DEVNULL, start_new_session=True)
    wait_for(out / "runs" / "computed-s0" / "results.json")
    wait_for(out / "runs" / "computed-s1" / "config.json")
    os.kill(process.pid, signal.SIGKILL)  # its children are killed by the kernel
    process.wait()
    first = (out / "runs" / "computed-s0" / "results.json").stat().st_mtime_ns
    again = subprocess.run([*COMMAND, "--out", str(out)], capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "computed-s0" not in again.stdout and "computed-s1: done" in again.stdout
    assert (out / "runs" / "computed-s0" / "results.json").stat().st_mtime_ns == first

    (row,) = json.loads((out / "study.json").read_text())["rows"]
    assert (row["epochs"], row["metrics"]["mse_sampled"]["n"]) == (3, 2)
    data = json.loads((out / "fig6.json").read_text())
    assert data["epoch"] == [1, 2, 3] and np.array(data["sigma2"]).shape == (3, 8)
    with Image.open(out / "fig6.png") as image:
        assert image.size[0] > 500
    assert "scaled by 0.06" in (out / "table.md").read_text()
