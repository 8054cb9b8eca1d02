"""The count of launches, which is also the guard that no change of a step adds some unseen."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

TOOL = Path(__file__).parents[2] / "benchmarks" / "count_launches.py"


@pytest.fixture
def tool(needs_extension):
    spec = importlib.util.spec_from_file_location(TOOL.stem, TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_step_and_an_epochs_end_launch_no_more_than_they_should(tool, tmp_path, capsys):
    path = tmp_path / "launches.json"
    tool.main(["--json", str(path)])
    report = json.loads(path.read_text())
    assert list(report) == ["stage1", "stage2", "epoch_end"]
    for name, most in (("stage1", 215), ("stage2", 70), ("epoch_end", 1500)):
        assert most / 2 < report[name]["plain"] <= most
        assert sum(report[name]["parts"].values()) == report[name]["plain"]
    parts = report["stage1"]["parts"]
    # 29 convolutions, the first of which has no input whose gradient is wanted; 14 norms of two kernels each way.
    assert parts[tool.CONVOLUTIONS] == 29 + 28 + 29 and parts[tool.NORMS] == 4 * 14
    assert report["epoch_end"]["parts"]["replays"] == 50
    assert "stage1: " in capsys.readouterr().out


def test_views_are_nothing_and_operations_are_counted_where_they_are_made(tool):
    x = torch.randn(4, 6)
    with tool.Launches() as counted:
        y = x.t().reshape(3, 8)[1:].unsqueeze(0)  # a transposed matrix is copied to be reshaped
        z = torch.relu(y)
        z.add_(1)
    assert counted.parts.total() == 3
    layer = torch.nn.Conv2d(3, 4, 3)
    with tool.Launches() as counted:
        layer(torch.zeros(1, 3, 5, 5)).sum().backward()
    assert counted.parts[tool.CONVOLUTIONS] == 2 and counted.parts[tool.BIASES] == 1
