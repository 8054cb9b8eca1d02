"""What the README shows is run as it stands."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from bvae.data import load

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_loss_in_a_foreign_vae() -> None:
    (snippet,) = (code for code in re.findall(r"```python\n(.*?)```", README, re.S) if "BalancedLoss" in code)
    images = load("shapes", side=16, channels=3, num_train=2000, num_test=1).train[..., 0].reshape(-1, 256)
    loader = list(torch.from_numpy(np.tile(images, (15, 1))).split(50))
    names = {"loader": loader}
    exec(snippet.replace("784", "256"), names)
    assert 0 < names["criterion"].gamma2 < 0.1
    mean_image = images.mean(0) / 255
    assert names["loss"].mse < 0.6 * ((images / 255 - mean_image) ** 2).mean()


def test_a_network_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its own folder, for the example names none."""
    (snippet,) = (code for code in re.findall(r"```python\n(.*?)```", README, re.S) if "bvae.fit" in code)
    images = load("shapes", side=32, channels=3, num_train=600, num_test=1).train[:, 2:30, 2:30, :1].copy()
    monkeypatch.chdir(tmp_path)
    names = {"images": images}
    exec(snippet, names)
    run = names["run"]
    assert names["samples"].shape == (16, 1, 28, 28)
    of_mean = ((images / 255 - images.mean(0) / 255) ** 2).mean()
    assert run.results["stage1"]["mse_sampled"] < 0.75 * of_mean
    assert (run.folder / "report.html").exists() and run.folder.parent == Path("runs")


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)h][^)]*)\)", README))
def test_links_lead_somewhere(link: str) -> None:
    assert (ROOT / link).exists()


def test_every_file_named_in_the_layout_is_there() -> None:
    layout = README.split("## How it is laid out")[1]
    for name in re.findall(r"^    (\S+/\S*)", layout, re.M):
        assert (ROOT / name).exists(), name
