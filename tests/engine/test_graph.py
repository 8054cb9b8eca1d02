"""Steps run one by one and replayed from a graph. On the CPU what is recorded is the program itself, run at replay."""

import contextlib
import gc
import json
import subprocess
import sys
import types
import warnings

import pytest
import torch

from bvae import ops
from bvae.balance import make_loss
from bvae.batches.resident import ImageBatches, LatentBatches
from bvae.config import Config
from bvae.engine import graph
from bvae.engine.graph import STEPS, Eager, Graph, make_runner
from bvae.engine.step import Step
from bvae.errors import UserError
from bvae.models.half import Copies
from bvae.models.vae import first_stage, penalised_modules, second_stage
from bvae.stages.objective import Noise, VAEObjective
from bvae.train import main
from bvae.world import World

CONFIG = Config(preset="shapes", side=8, scales=2, base=4, fc=8, latents=3, hidden=16)


@pytest.fixture
def recorder(monkeypatch):
    """Lets Graph work on the CPU."""
    monkeypatch.setattr(graph, "_recording", lambda: contextlib.nullcontext(lambda program: program))


def make(stage=1, balance="computed", device="cpu", hflip=True, amp=False, count=47):
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(1)
    model = (first_stage if stage == 1 else second_stage)(CONFIG).to(device)
    loss = make_loss(balance, logits=stage == 1, gamma=0.3 if balance == "fixed" else None).to(device)
    if stage == 1:
        model.to(memory_format=torch.channels_last)
        size = (count, CONFIG.side, CONFIG.side, 3)
        images = torch.randint(0, 256, size, dtype=torch.uint8, generator=g).to(device)
        batches = ImageBatches(images, 4, 0, torch.bfloat16 if amp else torch.float32, hflip)
        kernels = penalised_modules(model, ("decoder.upsample",))
    else:
        mu = torch.randn(count, 3, generator=g).to(device)
        batches, kernels = LatentBatches(mu, mu / 4 - 1, 4, 0), []
    objective = VAEObjective(loss, amp, 0.01 if kernels else 0.0, kernels)
    step = Step(model, objective, Noise(ops.make_rng(7, device)), 3, amp)
    step.set_lr(1e-2)
    batches.begin(0)
    return batches, step


def make_on_cuda():
    """As far as make_runner can see."""
    batches, step = make()
    batches.device = torch.device("cuda")
    return batches, step


def everything(batches, step):
    tensors = {f"model.{name}": t for name, t in step.model.state_dict().items()} | step.tensors()
    tensors |= {f"batches.{name}": t for name, t in batches.state().items()} | {"position": batches.position}
    return {name: t.detach().cpu().clone() for name, t in tensors.items()}


def same(a, b):
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def run(runner, steps):
    """How many steps each call ran."""
    ran = []
    while sum(ran) < steps:
        ran.append(runner.run(steps - sum(ran)))
    return ran


@pytest.mark.parametrize("balance", ["computed", "learned"])
@pytest.mark.parametrize("stage", [1, 2])
def test_making_a_graph_changes_nothing(recorder, stage, balance):
    batches, step = make(stage, balance)
    Eager(batches, step, "").run(1)
    before = everything(batches, step)
    addresses = [t.data_ptr() for t in step.state()]
    Graph(batches, step)
    same(everything(batches, step), before)
    assert [t.data_ptr() for t in step.state()] == addresses, "a graph goes on reading where it read"
    assert all(p.grad is None for p in step.parameters)


@pytest.mark.parametrize("stage", [1, 2])
def test_replays_are_the_steps_run_one_by_one(recorder, stage):
    eager, replayed = make(stage), make(stage)
    assert run(Eager(*eager, ""), 11) == [1] * 11
    assert run(Graph(*replayed), 11) == [STEPS] * (11 // STEPS) + [1] * (11 % STEPS)
    same(everything(*eager), everything(*replayed))
    # ... and into the next epoch, at another learning rate
    for batches, step in (eager, replayed):
        batches.begin(1, 2)
        step.set_lr(1e-3)
    runners = Eager(*eager, ""), Graph(*replayed)
    for runner in runners:
        run(runner, 5)
    same(everything(*eager), everything(*replayed))


def record_as_cuda_does(monkeypatch, step):
    """Lets Graph work on the CPU, where a replay looks after no copies: that is Python's, which only records run."""

    def record(program):
        versions = [p._version for p in step.copies.of]
        assert versions == step.copies._versions, "or every replay would copy all weights"

        def replay():
            with monkeypatch.context() as patch:
                patch.setattr(Copies, "refresh", lambda copies: None)
                program()

        return replay

    monkeypatch.setattr(graph, "_recording", lambda: contextlib.nullcontext(record))


@pytest.mark.parametrize("warm_up", [0, 3])
@pytest.mark.parametrize("stage", [1, 2])
def test_replays_compute_with_the_weights_there_are(monkeypatch, stage, warm_up):
    """The bf16 copies of the weights: after other weights were loaded, before the graph is made and between replays."""
    monkeypatch.setattr(graph, "WARM_UP", warm_up)
    eager, replayed = make(stage, amp=True), make(stage, amp=True)
    assert replayed[1].copies.of
    record_as_cuda_does(monkeypatch, replayed[1])
    runners = Eager(*eager, ""), None
    for seed in range(2):
        torch.manual_seed(seed)
        other = (first_stage if stage == 1 else second_stage)(CONFIG).state_dict()
        for _, step in (eager, replayed):
            step.model.load_state_dict(other)
        runners = runners[0], runners[1] or Graph(*replayed)
        for runner in runners:
            run(runner, 5)
        same(everything(*eager), everything(*replayed))
        for p, half in replayed[1].copies.of.items():
            assert torch.equal(half, p.bfloat16())


def test_at_an_epochs_last_batch_a_graph_can_still_be_made(recorder):
    eager, replayed = make(), make()
    for batches, _ in (eager, replayed):
        batches.begin(0, batches.steps - 1)
    Eager(*eager, "").run(1)
    assert Graph(*replayed).run(1) == 1
    same(everything(*eager), everything(*replayed))


def test_streamed_batches_are_fetched_before_every_replay(recorder):
    batches, step = make()
    batches.resident = False
    fetched = []
    batches.fetch = lambda: fetched.append(batches.position.item())
    assert run(Graph(batches, step), 5) == [1] * 5
    assert fetched == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("fails_at", [0, 2, 3, 4])
def test_a_failed_recording_falls_back_unchanged_and_says_why(monkeypatch, fails_at):
    """In warm-up, in the recording of one step and of several."""
    monkeypatch.setattr(graph, "WARM_UP", 3)
    monkeypatch.setattr(graph, "_recording", lambda: contextlib.nullcontext(lambda program: program()))
    batches, step = make_on_cuda()
    before, calls = everything(batches, step), 0
    forward = step.model.encoder.forward

    def fail(x):
        nonlocal calls
        calls += 1
        if calls > fails_at:
            raise RuntimeError("operation not permitted\nwhen the stream is capturing")
        return forward(x)

    step.model.encoder.forward = fail
    runner = make_runner(batches, step, wanted=True)
    assert isinstance(runner, Eager)
    assert runner.why_eager == "recording failed: operation not permitted"
    same(everything(batches, step), before)


def test_a_failed_recording_of_one_of_several_ranks_ends_the_run(monkeypatch):
    """Its steps would otherwise be exchanged with others' of the warm-up."""
    batches, step = make()
    batches.device, step.world = torch.device("cuda"), World(1, 2)
    monkeypatch.setattr(graph, "_recording", lambda: contextlib.nullcontext(lambda program: program()))
    monkeypatch.setattr(Step, "__call__", lambda *_: torch.zeros(2).view(3))
    with pytest.raises(UserError, match=r"rank 1: recording failed: .*; start with --no-graph"):
        make_runner(batches, step, wanted=True)


def test_why_a_runner_is_eager():
    batches, step = make()
    assert make_runner(batches, step, wanted=True).why_eager == "there are no CUDA graphs on a CPU"
    assert make_runner(batches, step, wanted=False).why_eager == "--no-graph"
    batches.device = torch.device("cuda")
    assert make_runner(batches, step, True, "gloo ranks").why_eager == "gloo ranks"


@pytest.fixture
def cuda(monkeypatch):
    """torch.cuda as far as a recording needs it: its end fails, as CUDA's does, where what is recorded has failed."""

    @contextlib.contextmanager
    def recorded(*_, **__):
        try:
            yield
        except RuntimeError:
            raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904

    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    fakes = {
        "graph": recorded,
        "CUDAGraph": lambda: types.SimpleNamespace(replay=lambda: None),
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "graph_pool_handle": lambda: None,
        "set_stream": lambda stream: None,
        "stream": lambda stream: contextlib.nullcontext(),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(graph, "_failed", [])


@pytest.mark.parametrize("collecting", [True, False])
def test_nothing_is_collected_while_recording(cuda, collecting):
    seen = []
    try:
        if not collecting:
            gc.disable()
        with graph._recording() as record:
            record(lambda: seen.append(gc.isenabled()))
            with pytest.raises(RuntimeError):
                record(lambda: torch.zeros(2).view(3))
        assert seen == [False]
        assert gc.isenabled() == collecting
    finally:
        gc.enable()


def test_after_a_failed_recording_its_cause_is_named_and_no_other_is_tried(cuda, monkeypatch):
    batches, step = make_on_cuda()
    before = everything(batches, step)
    monkeypatch.setattr(graph, "WARM_UP", 0)
    call = Step.__call__
    monkeypatch.setattr(Step, "__call__", lambda *_: torch.zeros(2).view(3))
    assert make_runner(batches, step, wanted=True).why_eager.startswith("recording failed: shape '[3]' is invalid")
    monkeypatch.setattr(Step, "__call__", call)
    same(everything(batches, step), before)
    assert len(graph._failed) == 1, "kept: torch's allocator still asks it"
    again = make_runner(*make_on_cuda(), wanted=True)
    assert isinstance(again, Eager)
    assert again.why_eager == "an earlier recording in this process failed"
    assert len(graph._failed) == 1


# ---- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.fixture
def deterministic():
    """fp32 to the bit: no TF32, one algorithm for each convolution."""
    precision = torch.get_float32_matmul_precision()
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        try:
            torch.set_float32_matmul_precision("highest")
            torch.use_deterministic_algorithms(True)
            yield
        finally:
            torch.use_deterministic_algorithms(False)
            torch.set_float32_matmul_precision(precision)


@pytest.mark.gpu
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("balance", ["computed", "learned", "fixed"])
@pytest.mark.parametrize("amp", [False, True])
def test_graph_and_eager_agree_to_the_bit(deterministic, stage, balance, amp):
    eager, replayed = (make(stage, balance, "cuda", amp=amp) for _ in range(2))
    run(Eager(*eager, ""), 11)
    runner = make_runner(*replayed, wanted=True)
    assert runner.why_eager is None
    run(runner, 11)
    same(everything(*eager), everything(*replayed))
    for batches, step in (eager, replayed):
        batches.begin(1, 3)
        step.set_lr(1e-3)
    run(Eager(*eager, ""), 6)
    run(runner, 6)  # the graphs made in the first epoch
    same(everything(*eager), everything(*replayed))


@pytest.mark.gpu
@pytest.mark.parametrize("poison", [0, 5])
def test_a_replayed_bad_step_changes_nothing_and_is_counted(deterministic, poison):
    eager, replayed = make(device="cuda"), make(device="cuda")
    runners = Eager(*eager, ""), make_runner(*replayed, wanted=True)
    for (_, step), runner in zip((eager, replayed), runners, strict=True):
        run(runner, poison)
        weight = step.model.decoder.conv.weight
        kept = weight.detach().clone()
        weight.data[0, 0, 0, 0] = float("nan")
        run(runner, 1)
        weight.data.copy_(kept)
        run(runner, 3)
        assert step.sums.counts.tolist() == [poison + 3, 1]
    same(everything(*eager), everything(*replayed))


@pytest.mark.gpu
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("wanted", [True, False])
def test_an_epoch_never_waits_for_the_device(stage, wanted):
    batches, step = make(stage, device="cuda", amp=True)
    runner = make_runner(batches, step, wanted)
    run(runner, 1)
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        torch.cuda.set_sync_debug_mode("error")
        try:
            batches.begin(1)
            step.set_lr(1e-3)
            run(runner, batches.steps)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert step.sums.counts.tolist() == [batches.steps + 1, 0]


@pytest.mark.gpu
@pytest.mark.parametrize("stage", [1, 2])
def test_a_trace_of_replays_has_no_wait_and_no_copy_to_the_host(stage, tmp_path):
    batches, step = make(stage, device="cuda", amp=True)
    runner = make_runner(batches, step, wanted=True)
    run(runner, 1)
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile, torch.profiler.record_function("epoch"):
        run(runner, batches.steps - 1)
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    events = [e for e in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if e.get("ph") == "X"]
    (epoch,) = [e for e in events if e["name"] == "epoch" and e.get("cat") == "user_annotation"]
    within = [e["name"] for e in events if epoch["ts"] <= e["ts"] <= epoch["ts"] + epoch["dur"]]
    assert any("cudaGraphLaunch" in name for name in within)
    assert not [name for name in within if "Synchronize" in name or "DtoH" in name]
    assert not [e["name"] for e in events if "DtoH" in e["name"]]


TINY = [
    "--preset", "shapes", "--side", "16", "--shapes-train", "300", "--shapes-test", "60", "--scales", "2",
    "--base", "4", "--latents", "8", "--fc", "16", "--hidden", "16", "--epochs", "2", "--epochs2", "2", "--lr", "1e-3",
    "--bn-batches", "6", "--no-amp", "--device", "cuda",
]  # fmt: skip


@pytest.mark.gpu
def test_a_run_does_not_depend_on_the_graph(deterministic, tmp_path, capfd):
    from safetensors.torch import load_file

    for name, more in (("graph", []), ("eager", ["--no-graph"])):
        assert main([*TINY, "--out", str(tmp_path / name), *more]) == 0
        assert ("one by one, not as a CUDA graph: --no-graph" in capfd.readouterr().out) == (name == "eager")
    for file in ("model.safetensors", "checkpoints/last.safetensors"):
        same(load_file(tmp_path / "graph" / file), load_file(tmp_path / "eager" / file))


LOOKING = """
import sys
import bvae.train
from bvae.stages.objective import VAEObjective

call = VAEObjective.__call__

def look(objective, model, x, *more):
    x.sum().item()
    return call(objective, model, x, *more)

VAEObjective.__call__ = look
sys.exit(bvae.train.main(sys.argv[1:]))
"""


@pytest.mark.gpu
def test_a_step_that_cannot_be_recorded_is_named_and_the_run_ends_without_a_graph(tmp_path):
    """In a process of its own, which can record nothing afterwards."""
    command = [sys.executable, "-c", LOOKING, *TINY, "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "recording failed: CUDA error: operation not permitted when stream is capturing" in done.stdout
    assert "stage 2: steps run one by one, not as a CUDA graph: an earlier recording" in done.stdout
    assert json.loads((tmp_path / "run" / "results.json").read_text())["stage2"]["steps"] == 12


@pytest.mark.gpu
def test_a_run_stopped_in_mid_epoch_ends_as_if_it_had_not(deterministic, tmp_path):
    from safetensors.torch import load_file

    assert main([*TINY, "--out", str(tmp_path / "whole")]) == 0
    stopped = ["--out", str(tmp_path / "stopped"), "--max-steps", "9", "--epochs2", "0"]
    assert main([*TINY, *stopped]) == 0
    batches = 300 // 50
    more = ["--max-steps", str(2 * batches)]
    assert main(["--resume", str(tmp_path / "stopped"), *more]) == 0
    whole, again = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    stage1 = [name for name in again if name.startswith("stage1.")]
    assert stage1
    assert [name for name in stage1 if not torch.equal(whole[name], again[name])] == []


# ---- a program that is repeated -------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [False, True])
def test_a_repeated_program_is_recorded_after_it_has_warmed_up(monkeypatch, wanted):
    done = []

    def record(program):
        done.append("recorded")
        return lambda: done.append("replayed")

    monkeypatch.setattr(graph, "on_cuda", lambda device: True)
    monkeypatch.setattr(graph, "_recording", lambda: contextlib.nullcontext(record))
    again = graph.Repeated(lambda: done.append("run"), torch.device("cpu"), wanted)
    for _ in range(graph.WARM_UP + 2):
        again()
    later = ["recorded", "replayed", "replayed"] if wanted else ["run", "run"]
    assert done == ["run"] * graph.WARM_UP + later


def test_a_repeated_program_that_cannot_be_recorded_is_run(monkeypatch):
    done, tries = [], []

    def fail(program):
        tries.append(program)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graph, "on_cuda", lambda device: True)
    monkeypatch.setattr(graph, "_recording", lambda: contextlib.nullcontext(fail))
    again = graph.Repeated(lambda: done.append("run"), torch.device("cpu"), True)
    for _ in range(graph.WARM_UP + 3):
        again()
    assert len(done) == graph.WARM_UP + 3 and len(tries) == 1


def test_on_a_cpu_nothing_is_recorded():
    done = []
    again = graph.Repeated(lambda: done.append("run"), torch.device("cpu"), True)
    for _ in range(graph.WARM_UP + 2):
        again()
    assert len(done) == graph.WARM_UP + 2
