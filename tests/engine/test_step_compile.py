"""Steps whose passes torch.compile has made, against those that Python runs."""

import contextlib
import dataclasses
import functools
import os
import shutil

import pytest
import test_graph
import torch
import torch._dynamo
import torch._inductor.config
from safetensors.torch import load_file
from test_graph import everything, make, run, same

from bvae import ops
from bvae.balance import BalancedLoss
from bvae.batches.resident import ImageBatches
from bvae.config import PRESETS
from bvae.engine import compiling, graph
from bvae.engine.compiling import MIN_STAGE_SECONDS, MIN_STAGE_STEPS, choose_way, compile_step
from bvae.engine.graph import Eager, Graph, make_runner
from bvae.engine.step import Step, _reason
from bvae.errors import UserError
from bvae.models.conv import Conv3x3
from bvae.models.half import Linear
from bvae.models.norm import BatchNormReLU, batch_norms
from bvae.models.vae import VAE, first_stage
from bvae.run.checkpoint import load_checkpoint
from bvae.stages.objective import Noise, VAEObjective
from bvae.train import main
from bvae.world import World

COMPILER = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler, which torch.compile needs")
TRACED = torch._dynamo.utils.counters["stats"]


@pytest.fixture
def traced(monkeypatch):
    """Lets torch.compile trace and differentiate as ever, and run what comes out as it is."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


def agree(plain, compiled, rtol=1e-3, atol=1e-4):
    a, b = everything(*plain), everything(*compiled)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")
    weights = [name for name in a if name.endswith("running_weight")]
    assert all(a[name] > 0 for name in weights)


def train(kinds, steps):
    for batches, step in kinds:
        step.set_lr(1e-3)
        run(Eager(batches, step, ""), steps)


@pytest.mark.parametrize("balance", ["computed", "learned", "fixed"])
@pytest.mark.parametrize("stage", [1, 2])
def test_compiled_steps_are_the_steps(traced, stage, balance):
    """Running statistics, gamma2, noise and the l2 penalty among what they move; evaluation between them."""
    plain, compiled = make(stage, balance), make(stage, balance)
    train((plain, compiled), 1)
    before, graphs = everything(*compiled), TRACED["unique_graphs"]
    assert compile_step(*compiled) is None
    same(everything(*compiled), before)
    assert all(p.grad is None for p in compiled[1].parameters)
    train((plain, compiled), 3)
    for _, step in (plain, compiled):
        step.model.eval()
        with torch.no_grad():
            step.model.decoder(torch.zeros(2, 3))
        step.model.train()
    train((plain, compiled), 3)
    agree(plain, compiled)
    assert TRACED["unique_graphs"] == graphs + 1, "one variant serves all steps"


@needs_compiler
def test_layers_as_wide_as_vectors_compile_under_amp():
    """Inductor makes other C++ for them than for the tiny ones of the other tests."""
    c = dataclasses.replace(PRESETS["cifar10"], side=8, base=4, fc=64, latents=32, scales=1, batch=20)
    model = first_stage(c).to(memory_format=torch.channels_last)
    images = torch.randint(256, (40, 8, 8, 3), dtype=torch.uint8)
    batches = ImageBatches(images, c.batch, 0, torch.bfloat16, False)
    step = Step(model, VAEObjective(BalancedLoss(), amp=True), Noise(ops.make_rng(0)), c.latents, True)
    batches.begin(0)
    assert compile_step(batches, step) is None


def test_compiled_steps_under_amp(traced):
    plain, compiled = make(amp=True), make(amp=True)
    assert compile_step(*compiled) is None
    train((plain, compiled), 5)
    a, b = (step.sums.parts for _, step in (plain, compiled))
    torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)
    assert compiled[1].copies.of
    for p, half in compiled[1].copies.of.items():
        assert torch.equal(half, p.bfloat16())


def spoil(step, steps):
    """Runs `steps` with a weight that is no number."""
    weight = step[1].model.decoder.conv.weight
    kept = weight.detach().clone()
    weight.data[0, 0, 0, 0] = float("nan")
    train([step], steps)
    weight.data.copy_(kept)


def test_a_bad_compiled_step_changes_nothing_and_is_counted(traced):
    plain, compiled = make(), make()
    assert compile_step(*compiled) is None
    for step in (plain, compiled):
        train([step], 2)
        before = everything(*step)
        spoil(step, 2)
        after = everything(*step)
        told = {"rng", "position", "sums.counts", "sums.trouble"}
        assert {name for name in before if not torch.equal(before[name], after[name])} == told
        assert step[1].sums.counts.tolist() == [2, 2]
    train((plain, compiled), 2)
    agree(plain, compiled)


class Encoder(torch.nn.Module):
    """The least that has everything: Inductor takes a while over every layer."""

    def __init__(self):
        super().__init__()
        self.conv = Conv3x3(3, 4, cancelled=True)
        self.norm = BatchNormReLU(4)
        self.mu = Linear(4, 3)

    def forward(self, x):
        mu = self.mu(self.norm(self.conv(x)).mean((2, 3)))
        return mu, mu - 1


class Decoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = Linear(3, 4 * 8 * 8)
        self.norm = BatchNormReLU(4)
        self.conv = Conv3x3(4, 3)

    def forward(self, z):
        return self.conv(self.norm(self.fc(z).view(-1, 8, 8, 4).permute(0, 3, 1, 2)))


@needs_compiler
def test_inductors_code_computes_the_steps(monkeypatch):
    monkeypatch.setattr(test_graph, "first_stage", lambda config: VAE(Encoder(), Decoder()))
    monkeypatch.setattr(test_graph, "penalised_modules", lambda model, groups: [])
    plain, compiled = make(), make()
    assert compile_step(*compiled) is None
    train((plain, compiled), 3)
    for step in (plain, compiled):
        spoil(step, 1)
        assert step[1].sums.counts.tolist() == [3, 1]
    train((plain, compiled), 2)
    agree(plain, compiled)


# ---- where it cannot be ---------------------------------------------------------------------------------------------


def test_without_a_compiler_the_step_stays_what_it_was():
    plain, other = make(2), make(2)
    with torch._inductor.config.patch({"cpp.cxx": (None, "/no/such/compiler"), "force_disable_caches": True}):
        why = compile_step(*other)
    assert "/no/such/compiler" in why
    assert "\n" not in why
    train((plain, other), 3)
    same(everything(*plain), everything(*other))


def test_statistics_exchanged_within_a_pass_are_not_compiled():
    batches, step = make()
    next(iter(batch_norms(step.model))).gather = lambda t: t[None]
    assert "--sync-bn" in compile_step(batches, step)


TINY = [
    "--preset", "shapes", "--side", "16", "--shapes-train", "60", "--shapes-test", "20", "--scales", "2", "--base", "4",
    "--latents", "4", "--fc", "8", "--hidden", "8", "--batch", "10", "--bn-batches", "2", "--device", "cpu", "--no-amp",
]  # fmt: skip


def test_a_run_is_compiled_and_goes_on_without(traced, tmp_path, capfd):
    stopped, plain = tmp_path / "stopped", tmp_path / "plain"
    assert main([*TINY, "--compile", "--out", str(stopped), "--max-steps", "3"]) == 0
    out = capfd.readouterr().out
    assert "compiling" in out
    assert "not compiled" not in out
    assert main(["--resume", str(stopped), "--no-compile", "--max-steps", "6"]) == 0
    assert main([*TINY, "--out", str(plain), "--max-steps", "6"]) == 0
    for file in ("model.safetensors", "checkpoints/last.safetensors"):
        assert load_file(stopped / file).keys() == load_file(plain / file).keys()


def test_a_run_that_cannot_be_compiled_says_why(monkeypatch, tmp_path, capfd):
    def fail(*_):
        raise OSError("no compiler\nand a long report")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=fail))
    arguments = [*TINY, "--compile", "--out", str(tmp_path / "run"), "--max-steps", "2", "--epochs2", "0"]
    assert main(arguments) == 0
    captured = capfd.readouterr()
    assert "stage 1: not compiled: OSError: no compiler\n" in captured.out
    assert "Traceback" not in captured.out + captured.err


def test_a_reason_is_not_where_it_came_from():
    where = "\n\nfrom user code:\n   File step.py, line 1"
    assert _reason(AssertionError(where)) == "AssertionError"
    assert _reason(RuntimeError(f"no such thing{where}")) == "no such thing"


# ---- which is faster ------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """Steps that take as long as it says, by whether they are compiled: they run, and are counted, all the same."""

    class Clock:
        def __init__(self):
            self.seconds, self.steps = {False: 1.0, True: 1.0}, {False: 0, True: 0}

        def __call__(self, runner, batches, step, steps):
            batches.begin(0)
            run(runner, min(steps, batches.steps))
            compiled = step.minimise is not step.objective
            self.steps[compiled] += steps
            return steps * self.seconds[compiled]

    clock = Clock()
    monkeypatch.setattr(compiling, "_seconds", clock)
    return clock


def choose(batches, step, total, wanted=None):
    """(the way, what it said)."""
    said = []
    way = choose_way(batches, step, True, wanted, total, said.append)
    batches.begin(0)
    return way, said


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("faster", [False, True])
@pytest.mark.parametrize("kind", [Eager, Graph])
def test_a_long_stage_takes_what_is_faster(traced, clock, monkeypatch, stage, faster, kind):
    if kind is Graph:  # as on CUDA, whose recordings are here the programs themselves
        monkeypatch.setattr(graph, "_recording", lambda: contextlib.nullcontext(lambda program: program))
        monkeypatch.setattr(compiling, "make_runner", lambda batches, step, wanted: Graph(batches, step))
    clock.seconds = {False: 2.0, True: 1.0 if faster else 3.0}
    chosen, other = make(stage), make(stage)
    before = everything(*chosen)
    way, said = choose(*chosen, MIN_STAGE_STEPS)
    assert way.compiled == faster and isinstance(way.runner, kind)
    assert min(clock.steps.values()) > 1
    same(everything(*chosen), before)
    assert len(said) == 2
    assert said[1].startswith(
        "compiled: a step takes 2000.00 ms" if faster else "not compiled: a step takes 2000.00 ms"
    )
    if faster:
        assert compile_step(*other) is None
        other[0].begin(0)
    run(way.runner, 5)
    run(Eager(*other, ""), 5)
    same(everything(*chosen), everything(*other))


def test_a_stage_that_compilation_would_not_pay_for_is_left_as_it_is(traced, clock):
    batches, step = make()
    clock.seconds = {False: 0.99 * MIN_STAGE_SECONDS / MIN_STAGE_STEPS, True: 0.0}
    way, said = choose(batches, step, MIN_STAGE_STEPS)
    assert not way.compiled and not said
    assert clock.steps[True] == 0
    clock.seconds[False] *= 1.02
    assert choose(batches, step, MIN_STAGE_STEPS)[0].compiled


def test_quick_steps_are_timed_for_as_long_as_slow_ones(traced, clock):
    """A turn is of seconds, not of so many steps: a GPU takes a hundred in a fraction of one."""
    clock.seconds = {False: 1e-4, True: 1e-4}
    asked = []
    timed = compiling._seconds

    def note(runner, batches, step, steps):
        asked.append(steps)
        return timed(runner, batches, step, steps)

    compiling._seconds = note  # which the fixture puts back
    choose(*make(), round(1.1 * MIN_STAGE_SECONDS / 1e-4))
    assert max(asked) * 1e-4 == pytest.approx(compiling.TURN, rel=0.01)


def test_a_stage_of_few_steps_is_not_even_timed(traced, clock):
    clock.seconds[False] = 1e9
    way, said = choose(*make(), MIN_STAGE_STEPS - 1)
    assert not way.compiled and not said
    assert clock.steps == {False: 0, True: 0}


@pytest.mark.parametrize("wanted", [False, True])
def test_what_is_asked_for_is_not_tried(traced, clock, wanted):
    clock.seconds = {False: 1e3, True: 1e6 if wanted else 0.0}
    assert choose(*make(), 10**6, wanted)[0].compiled == wanted
    assert clock.steps == {False: 0, True: 0}


def test_where_torch_compile_fails_the_trial_ends(monkeypatch, clock):
    def fail(*_):
        raise OSError("no compiler")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=fail))
    chosen, plain = make(), make()
    way, said = choose(*chosen, 10**6)
    assert not way.compiled
    assert said[1:] == ["not compiled: OSError: no compiler"]
    run(way.runner, 3)
    run(Eager(*plain, ""), 3)
    same(everything(*chosen), everything(*plain))


def test_where_another_rank_cannot_compile_none_does(traced, monkeypatch):
    batches, step = make()
    step.world = World(0, 2)
    monkeypatch.setattr(World, "largest", lambda world, *values: [1])
    assert compile_step(batches, step) == "another rank could not"
    assert step.minimise is step.objective


def test_compiled_steps_that_cannot_be_recorded_leave_the_recording_there_is(traced, clock, monkeypatch):
    """As on CUDA, where a replay does not look at the step's objective."""
    recorded = []

    def record(batches, step, wanted):
        recorded.append(step.minimise is not step.objective)
        runner = Eager(batches, step, "recording failed: no memory")
        if not recorded[-1]:
            runner.why_eager = None
        return runner

    monkeypatch.setattr(compiling, "make_runner", record)
    batches, step = make()
    way, said = choose(batches, step, 10**6)
    assert recorded == [False, True]
    assert not way.compiled and way.runner.why_eager is None
    assert said[1:] == ["not compiled: recording failed: no memory"]
    assert step.minimise is step.objective


def test_a_rank_whose_compiled_steps_cannot_be_recorded_says_what_to_do(traced, clock, monkeypatch):
    def record(batches, step, wanted):
        if step.minimise is not step.objective:
            raise UserError("rank 1: recording failed: no memory; start with --no-graph")
        return Eager(batches, step, "")

    monkeypatch.setattr(compiling, "make_runner", record)
    with pytest.raises(UserError, match="start with --no-graph, or with --no-compile: its steps were compiled"):
        choose(*make(), 10**6)


def test_steps_are_timed_over_as_many_epochs_as_it_takes():
    batches, step = make(count=9)
    assert batches.steps == 2
    batches.begin(0)
    with graph.undone(batches, step):
        assert compiling._seconds(Eager(batches, step, ""), batches, step, 5) > 0
        assert step.sums.counts.tolist() == [5, 0]
    assert step.sums.counts.tolist() == [0, 0]


def test_a_resumed_run_goes_on_with_what_its_trial_found(traced, clock, monkeypatch, tmp_path, capfd):
    """To the bit, whatever a second trial would find."""
    monkeypatch.setattr(compiling, "MIN_STAGE_STEPS", 1)
    clock.seconds = {False: 1e3, True: 1e2}
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    assert main([*TINY, "--epochs2", "0", "--out", str(whole), "--max-steps", "8"]) == 0
    assert main([*TINY, "--epochs2", "0", "--out", str(stopped), "--max-steps", "4"]) == 0
    assert load_checkpoint(stopped / "checkpoints/last.safetensors")[1]["compiled"] is True
    out = capfd.readouterr().out
    assert out.count("compiled: a step takes 1000000.00 ms without torch.compile, 100000.00 ms with it") == 2
    clock.seconds = {False: 1e3, True: 1e4}
    assert main(["--resume", str(stopped), "--max-steps", "8"]) == 0
    assert "stage 1: compiling" in capfd.readouterr().out
    a, b = (load_file(run / "model.safetensors") for run in (stopped, whole))
    same(a, b)
    assert main(["--resume", str(stopped), "--no-compile", "--max-steps", "9"]) == 0
    assert "compil" not in capfd.readouterr().out


# ---- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("stage", [1, 2])
def test_a_graph_records_compiled_steps(stage, amp):
    plain, compiled = (make(stage, device="cuda", amp=amp) for _ in range(2))
    assert compile_step(*compiled) is None
    runner = make_runner(*compiled, wanted=True)
    assert runner.why_eager is None
    for (_, step), by in ((plain, Eager(*plain, "")), (compiled, runner)):
        step.set_lr(1e-3)
        run(by, 5)
    torch.testing.assert_close(plain[1].sums.parts, compiled[1].sums.parts, rtol=0.02, atol=0.02)
    torch.testing.assert_close(plain[1].moved.statistics, compiled[1].moved.statistics, rtol=0.05, atol=1e-3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(runner, 5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert compiled[1].sums.counts.tolist() == [10, 0]


@pytest.mark.gpu
@pytest.mark.parametrize("stage", [1, 2])
def test_a_trial_on_a_gpu_ends_with_a_graph_and_changes_nothing(stage):
    batches, step = make(stage, device="cuda", amp=True)
    before = everything(batches, step)
    way, said = choose(batches, step, 10**9)
    assert way.runner.why_eager is None
    same(everything(batches, step), before)
    assert " a step takes " in said[-1]
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(way.runner, 9)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert step.sums.counts.tolist() == [9, 0]
