"""The benchmark of the ops runs and writes what it should; what it measures is not looked at."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

TOOL = Path(__file__).parents[2] / "benchmarks" / "bench_kernels.py"


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tool(needs_extension):
    return load(TOOL)


@pytest.mark.skipif(not TOOL.exists(), reason="the tools are not there")
def test_every_op_is_measured(tool, device, tmp_path, capsys):
    path = tmp_path / "kernels.json"
    tool.main(["--device", device, "--elements", "20000", "--rounds", "2", "--no-compile", "--json", str(path)])
    report = json.loads(path.read_text())
    assert {"command", "device", "versions", "commit", "copy_bytes_per_s", "results"} <= report.keys()
    measured = {(r["op"], r["type"]) for r in report["results"]}
    both = {"balanced_loss", "balanced_loss backward", "gather", "batch_norm_relu", "batch_norm_relu backward", "adam"}
    assert measured == {(op, t) for op in both for t in ("bf16", "fp32")} | {
        ("sample_kl", "fp32"),
        ("sample_kl backward", "fp32"),
    }
    for r in report["results"]:
        for rival in ("fused", "eager"):
            assert r[rival]["timed"] == ("graph" if device == "cuda" else "loop")
            assert 0 < r[rival]["p20"] <= r[rival]["median"] <= r[rival]["p80"]
        assert r["share"] == pytest.approx(r["bytes"] / r["fused"]["median"] * 1e6 / report["copy_bytes_per_s"])
        assert r["eager_over_fused"] > 0
    printed = capsys.readouterr().out
    assert all(r["op"] in printed for r in report["results"])
    table = load(TOOL.with_name("bench_table.py")).describe_kernels(report)
    assert table.count("| `") == len(report["results"])
    first = report["results"][0]
    assert f" | {first['fused']['median']:,.0f} | {first['eager_over_fused']:.2f}x |  |" in table  # nothing compiled


@pytest.mark.gpu
@pytest.mark.parametrize("elements", [2**14, 2**24])
def test_on_cuda_every_call_is_recorded_on_the_clocks_stream(tool, elements):
    device = torch.device("cuda")
    clock, before = tool.Clock(device), torch.cuda.current_stream()
    cases = tool.sample_cases(elements // 256, 64, "", device)
    cases += tool.loss_cases(elements // 3072, 32, "bf16", "", device)
    for case in cases:
        result = tool.measure(case, clock, 2, ("fused", "eager"))
        assert result["fused"]["timed"] == result["eager"]["timed"] == "graph", case.op
        assert torch.cuda.current_stream() == before


def test_bytes_are_those_that_must_move(tool):
    cpu = torch.device("cpu")
    assert [c.bytes for c in tool.sample_cases(10, 8, "", cpu)] == [80 * 12, 80 * 20]
    assert [c.bytes for c in tool.loss_cases(2, 4, "bf16", "", cpu)] == [96 * 3, 96 * 5]
    assert [c.bytes for c in tool.norm_cases(2, 4, 8, "bf16", "", cpu)] == [512 * 2 * 3, 512 * 2 * 5]
    assert tool.gather_case(2, 4, 5, "fp32", "", cpu).bytes == 96 * 6
    assert [tool.adam_case(4, 3, t, "", cpu).bytes for t in ("bf16", "fp32")] == [60 * 28] * 2
