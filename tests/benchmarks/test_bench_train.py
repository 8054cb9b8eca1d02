"""The benchmark's contestants do the same work; its table says what its JSON says."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from bvae import ops
from bvae.engine import compiling, trainer

ROOT = Path(__file__).parents[2]


def tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


bench = tool("bench_train")
table = tool("bench_table")
precision = tool("check_precision")


@pytest.mark.parametrize("stage", [1, 2])
def test_the_plain_network_is_ours(stage):
    c = bench.configure("celeba", quick=True)
    ours, plain = bench.network(c, stage), bench.plain_network(c, stage)
    assert not [type(m) for m in plain.modules() if type(m).__module__ in ("bvae.models.conv", "bvae.models.half")]
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in plain.parameters())
    x = torch.rand(5, c.channels, c.side, c.side) if stage == 1 else torch.randn(5, c.latents)
    for a, b in zip(ours.encoder(x), plain.encoder(x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    z = torch.randn(5, c.latents)
    torch.testing.assert_close(ours.decoder(z), plain.decoder(z), rtol=1e-4, atol=1e-5)


class Here:
    """A bench.Contestant without the process."""

    def __init__(self, name, recipe, stage, device, quick):
        bench.FACTS.clear()
        self.name = name
        self.run = bench.contestant(name, bench.configure(recipe, quick), stage, torch.device(device))
        self.facts = dict(bench.FACTS)

    def time(self, steps):
        return bench.timed(self.run, steps, torch.device("cpu"))

    def end(self):
        return {"peak_memory_mib": 100.0, **self.facts}


def test_a_quick_measurement_and_its_table(tmp_path, monkeypatch, needs_extension):
    monkeypatch.setattr(bench, "SAMPLES", 60)
    monkeypatch.setattr(bench, "Contestant", Here)
    monkeypatch.setattr(compiling, "compile_step", lambda batches, step: "no compiler")
    names = ["bvae", "bvae_no_compile", "plain", "eager_amp"] + ["pythae"] * bool(importlib.util.find_spec("pythae"))
    path = tmp_path / "bench.json"
    bench.main(["--quick", "--device", "cpu", "--recipes", "cifar10", "--contestants", *names, "--json", str(path)])
    report = json.loads(path.read_text())
    for stage in ("stage1", "stage2"):
        assert list(report["cpu"][stage]) == names
        assert all(rate > 0 for rate in report["cpu"][stage].values())
        compiled = {name: f.get("compiled") for name, f in report["cpu"]["cifar10"][stage].items()}
        assert compiled == dict.fromkeys(names) | {"bvae": False, "bvae_no_compile": False}
    assert {name: report["cpu"][name] for name in names} == report["cpu"]["stage1"]
    text = table.describe_train(report)
    assert text.count("| `cifar10`, stage ") == 2
    assert f"| {report['cpu']['bvae']:,.0f} |" in text
    for bf16 in (True, False):
        assert ("all train in fp32" in table.describe_train({**report, "bf16": bf16})) is not bf16


class Timed:
    """A bench.Contestant of a machine that becomes slower with every turn; the first steps take long."""

    turns = 0

    def __init__(self, name, step):
        self.name, self.step, self.asked, self.ended = name, step, [], False

    def time(self, steps):
        self.asked.append(steps)
        Timed.turns += 1
        warm = 0.05 * (len(self.asked) == 1)
        return warm + steps * self.step * (1 + 0.01 * Timed.turns)

    def end(self):
        self.ended = True
        return {"peak_memory_mib": 1.0}


def test_each_contestant_has_its_figures_once_it_is_through():
    """They are compared in turns beside each other, of the length that was asked for whatever a step takes."""
    ours, quick, slow = Timed("bvae", 1e-4), Timed("plain", 5e-4), Timed("compile", 2e-2)
    told = bench.measure(iter([ours, quick, slow]), batch=10, rounds=3, seconds=2.0)
    name, first = next(told)
    assert name == "bvae" and first["bvae_is_faster_by"] == 1 and "peak_memory_mib" not in first
    assert not quick.asked, "which is not yet begun"
    name, figures = next(told)
    assert name == "plain" and quick.ended and not slow.asked
    assert figures["bvae_is_faster_by"] == pytest.approx(5, rel=0.03)
    assert 1.5 < quick.asked[-1] * quick.step < 3 and sum(quick.asked[:-3]) * quick.step >= 1
    (name, figures), (last, whole) = told
    assert name == "compile" and figures["bvae_is_faster_by"] == pytest.approx(200, rel=0.03)
    assert last == "bvae" and ours.ended and whole["peak_memory_mib"] == 1 and len(ours.asked) > 9


def test_tables_stand_between_their_markers():
    both = {"cpu": "one\n", "cpu-amx": "other\n"}
    text = "before\n<!-- bench_train{} -->\nold\n<!-- /bench_train -->\nafter"
    for names, shown in (("", "one\n\nother\n"), (" cpu-amx", "other\n"), (" cpu-amx cpu", "other\n\none\n")):
        written = table.inserted(text.format(names), "bench_train", both)
        assert written == text.format(names).replace("old\n", shown)
        assert table.inserted(written, "bench_train", both) == written
        assert table.inserted(written, "bench_kernels", both) == written


def test_the_documents_show_what_the_json_says(capsys):
    assert table.main(["--check"]) == 0, capsys.readouterr().out


def test_a_contestant_is_a_process(needs_extension):
    one = bench.Contestant("bvae_no_compile", "cifar10", 2, "cpu", quick=True)
    assert one.time(1) > 0 and one.time(2) > 0
    facts = one.end()
    assert 50 < facts["peak_memory_mib"] < 20_000 and facts["compiled"] is False and one.process.returncode == 0
    other = bench.Contestant("nobody", "cifar10", 2, "cpu", quick=True)
    with pytest.raises(SystemExit, match="nobody ended with exit code 1"):
        other.time(1)


TINY = [
    "--preset", "shapes", "--side", "16", "--shapes-train", "300", "--shapes-test", "60", "--scales", "2",
    "--base", "4", "--latents", "4", "--fc", "16", "--hidden", "16", "--epochs", "4", "--epochs2", "2", "--lr", "3e-3",
    "--bn-batches", "6", "--eval-every", "0",
]  # fmt: skip


def test_bf16_ends_where_fp32_does(tmp_path, monkeypatch):
    """A short variant of benchmarks/check_precision.py: within 10 % of the reference, not within its range."""
    for module in (precision, trainer):
        monkeypatch.setattr(module, "has_bf16", lambda device: True)
    path = tmp_path / "p.json"
    precision.main(["--seeds", "2", "--device", "cpu", "--json", str(path), "--", *TINY])
    compared = [c for c in json.loads(path.read_text())["compared"] if c["way"] == "bf16"]
    assert len(compared) == 6
    for c in compared:
        assert abs(c["mean"] - c["reference"]) <= 0.1 * abs(c["reference"]) + 0.5 * c["figure"].endswith("inactive"), c


def test_the_reference_is_without_tf32(tmp_path, monkeypatch):
    allowed = {}

    def train(argv):
        allowed[argv[-1].rpartition("/")[2]] = torch.backends.cudnn.allow_tf32

    monkeypatch.setattr(precision, "has_bf16", lambda device: True)
    monkeypatch.setattr(precision, "train", train)
    monkeypatch.setattr(precision, "final", lambda out: {"mse": 1.0})
    assert precision.main(["--seeds", "2", "--device", "cpu"]) == 0
    assert allowed == {"fp32-0": False, "bf16-0": True, "fp32-1": False, "bf16-1": True}
    assert torch.backends.cudnn.allow_tf32


def test_where_amp_would_be_fp32_there_is_nothing_to_compare(monkeypatch, capsys):
    monkeypatch.setattr(precision, "has_bf16", lambda device: False)
    with pytest.raises(SystemExit) as stopped:
        precision.main(["--device", "cpu"])
    assert stopped.value.code == 2
    assert "has no bf16 units" in capsys.readouterr().err


def test_every_contestant_has_the_kernels_of_its_precision(monkeypatch):
    seen = []

    def steps(n):
        seen.append((torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32))

    def make(c, stage, device):
        steps(0)
        return steps

    monkeypatch.setattr(bench, "has_bf16", lambda device: True)
    monkeypatch.setattr(bench, "CONTESTANTS", {"plain": make, "bvae": make})
    for name in ("plain", "bvae"):
        bench.contestant(name, bench.configure("cifar10", quick=True), 1, torch.device("cuda"))(1)
    assert seen == [(True, True)] * 2 + [(True, False)] * 2
    assert not torch.backends.cudnn.benchmark


def test_what_lies_outside_the_reference_is_told():
    results = {"fp32": [{"mse": 1.0}, {"mse": 2.0}], "bf16": [{"mse": 2.0}, {"mse": 2.5}]}
    assert [c["within"] for c in precision.compare(results)] == [True, False]


def test_without_an_extension_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(ops, "EXTENSION_ERROR", "not built")
    with pytest.raises(SystemExit, match="nothing to measure"):
        bench.main(["--quick"])
