"""Adam over lists of tensors, and the check that decides whether it moves them."""

import math
import os
import subprocess
import sys

import pytest
import torch
from ops_samples import layouts
from torch.library import opcheck

from bvae import ops, reference

MODULES = [ops, reference]
KW = {"betas": (0.9, 0.999), "eps": 1e-8}
SHAPES = [(), (1,), (7,), (0, 3), (1000, 70), (6, 5, 3, 3), (4097,), (130, 33)]
GRADS = [torch.float32, torch.bfloat16, torch.float16]


class State:
    """Parameters of all shapes and what Adam keeps of them; every second has a bf16 copy, every fifth no gradient."""

    def __init__(self, device="cpu", shapes=SHAPES, dtype=torch.float32):
        g = torch.Generator().manual_seed(0)
        self.parameters = [torch.randn(shape, generator=g).to(device, dtype) for shape in shapes]
        self.parameters = [
            p.contiguous(memory_format=torch.channels_last) if p.dim() == 4 else p for p in self.parameters
        ]
        self.exp_avgs, self.exp_avg_sqs = ([torch.zeros_like(p) for p in self.parameters] for _ in range(2))
        self.halves = [p.bfloat16() if i % 2 else None for i, p in enumerate(self.parameters)]
        self.steps = torch.zeros(len(shapes), device=device)
        self.lr = torch.tensor(1e-3, device=device)

    def grads(self, seed, kinds=GRADS):
        """As they come from a backward: of several types, one in another layout than its parameter's."""
        g = torch.Generator().manual_seed(seed)
        drawn = [torch.randn(p.shape, generator=g).to(p.device) for p in self.parameters]
        return [None if i % 5 == 4 else t.to(kinds[i % len(kinds)]) for i, t in enumerate(drawn)]

    def step(self, grads, module=ops, good=None):
        good = torch.tensor(True, device=self.lr.device) if good is None else good
        module.adam(
            self.parameters, grads, self.exp_avgs, self.exp_avg_sqs, self.halves, self.steps, good, self.lr, **KW
        )

    def tensors(self):
        halves = [half for half in self.halves if half is not None]
        return [*self.parameters, *self.exp_avgs, *self.exp_avg_sqs, *halves, self.steps]

    def copies(self):
        return [t.clone() for t in self.tensors()]


def same(a, b):
    assert [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if not torch.equal(x.cpu(), y.cpu())] == []


# ---- Adam -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("kinds", [[torch.float32], [torch.bfloat16], GRADS])
def test_it_is_torchs(device, module, kinds):
    state = State(device)
    theirs = [p.clone().requires_grad_() for p in state.parameters]
    optimizer = torch.optim.Adam(theirs, lr=1e-3, **KW)
    for step in range(100):
        grads = state.grads(step, kinds)
        for p, grad in zip(theirs, grads, strict=True):
            p.grad = None if grad is None else grad.float()
        state.lr.fill_(1e-3 / (1 + step // 40))
        optimizer.param_groups[0]["lr"] = state.lr.item()
        optimizer.step()
        state.step(grads, module)
    for i, (p, q) in enumerate(zip(state.parameters, theirs, strict=True)):
        torch.testing.assert_close(p, q.detach(), rtol=1e-5, atol=2e-6)
        if i % 5 == 4:
            assert q not in optimizer.state
            assert not state.exp_avgs[i].any() and not state.exp_avg_sqs[i].any() and state.steps[i] == 0
            continue
        torch.testing.assert_close(state.exp_avgs[i], optimizer.state[q]["exp_avg"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(state.exp_avg_sqs[i], optimizer.state[q]["exp_avg_sq"], rtol=1e-5, atol=1e-9)
        assert state.steps[i] == 100
        if state.halves[i] is not None:
            assert torch.equal(state.halves[i], p.bfloat16())


@pytest.mark.parametrize("steps", [1, 10, 1000, 10_000, 1_000_000])
@pytest.mark.parametrize("module", MODULES)
def test_the_correction_of_any_step_count(device, module, steps):
    """With m = sqrt(v) = g the parameter moves by lr sqrt(1 - beta2^t) / (1 - beta1^t) times what m has become."""
    one = torch.ones(3, device=device)
    p, m, v = torch.zeros_like(one), one.clone(), one.clone()
    count = torch.full((1,), steps - 1.0, device=device)
    module.adam(
        [p], [one], [m], [v], [None], count, torch.tensor(True, device=device), torch.tensor(0.5, device=device), **KW
    )
    assert count.item() == steps
    expected = -0.5 * math.sqrt(1 - 0.999**steps) / (1 - 0.9**steps)
    assert p.tolist() == pytest.approx([expected] * 3, rel=1e-6)


@pytest.mark.parametrize("module", MODULES)
def test_a_closed_gate_changes_nothing(device, module):
    state = State(device)
    state.step(state.grads(0), module)
    before = state.copies()
    grads = [None if g is None else torch.full_like(g, math.nan) for g in state.grads(1)]
    state.step(grads, module, torch.tensor(False, device=device))
    same(state.tensors(), before)
    state.step(state.grads(1), module)
    assert not torch.equal(state.parameters[2], before[2])
    assert state.steps.tolist() == [0 if i % 5 == 4 else 2 for i in range(len(SHAPES))]


@pytest.mark.parametrize("kind", GRADS)
def test_memory_of_any_alignment_and_layout_gives_the_same_bits(device, kind):
    g = torch.Generator().manual_seed(0)
    p, grad = (torch.randn((3, 5, 6, 7), generator=g).to(device) for _ in range(2))
    zero, half = torch.zeros_like(p), p.bfloat16()
    steps, good, lr = torch.zeros(1, device=device), torch.tensor(True, device=device), torch.tensor(0.1, device=device)
    results = []
    for where in ("contiguous", "channels_last", "unaligned"):
        for given in layouts(grad.to(kind)).values():
            state = [layouts(t.clone())[where] for t in (p, zero, zero, half)]
            ops.adam(*([t] for t in (state[0], given, *state[1:])), steps.zero_(), good, lr, **KW)
            results.append(state)
    for result in results[1:]:
        same(result, results[0])


def test_more_tensors_than_a_launch_takes(device):
    """Also more than the list of step counts in one launch takes."""
    shapes = [(i % 37,) for i in range(1100)]
    many, alone = State(device, shapes), State(device, shapes)
    for seed in range(2):
        grads = many.grads(seed)
        many.step(grads)
        for i, p in enumerate(alone.parameters):
            ops.adam(
                [p], [grads[i]], [alone.exp_avgs[i]], [alone.exp_avg_sqs[i]], [alone.halves[i]],
                alone.steps[i : i + 1], torch.tensor(True, device=device), alone.lr, **KW,
            )  # fmt: skip
    same(many.tensors(), alone.tensors())
    bad = many.grads(0)[-2]
    bad[-1] = math.inf
    assert not ops.all_finite([*many.parameters, bad])
    assert ops.all_finite([*many.parameters])


def test_it_needs_no_gradient_mode_and_leaves_no_graph(device):
    state = State(device)
    state.parameters = [p.requires_grad_() for p in state.parameters]
    before = state.copies()
    state.step(state.grads(0))
    assert all(p.grad_fn is None for p in state.parameters)
    assert not torch.equal(state.parameters[2], before[2])


THREADS = """
import hashlib, sys, torch
sys.path.insert(0, sys.argv[2])
from test_ops_adam import SHAPES, State
torch.set_num_threads(int(sys.argv[1]))
state = State(shapes=[*SHAPES, (300, 401)])
for seed in range(3):
    state.step(state.grads(seed))
digest = hashlib.sha256()
for t in state.tensors():
    digest.update(t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


@pytest.mark.usefixtures("needs_extension")
def test_bits_depend_on_neither_threads_nor_instruction_set():
    """Nothing is fused: the baseline too gives them."""
    seen = set()
    for threads, capability in ((1, "avx512"), (2, "avx512"), (2, "avx2"), (2, "baseline")):
        environment = {**os.environ, "BVAE_CPU_CAPABILITY": capability}
        command = [sys.executable, "-c", THREADS, str(threads), os.path.dirname(__file__)]
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        seen.add(run.stdout)
    assert len(seen) == 1


# ---- the check ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("kind", GRADS)
def test_anything_that_is_not_finite_is_found(device, module, kind):
    tensors = [torch.randn(shape, device=device).to(kind) for shape in SHAPES]
    assert module.all_finite(tensors).item() is True
    for value in (math.nan, math.inf, -math.inf):
        for i, t in enumerate(tensors):
            for place in {0, t.numel() // 2, t.numel() - 1} if t.numel() else ():
                spoiled = t.flatten().clone()
                spoiled[place] = value
                given = [*tensors[:i], spoiled.view(t.shape), *tensors[i + 1 :]]
                assert not module.all_finite(given), (SHAPES[i], place, value)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_a_square_that_overflows_is_found(device, module, kind):
    largest = torch.nextafter(torch.tensor(2.0**64, dtype=kind), torch.tensor(0.0, dtype=kind))
    assert largest.float().square().isfinite()
    for sign in (1, -1):
        inside, outside = (torch.full((300,), sign * x, dtype=kind, device=device) for x in (largest.item(), 2.0**64))
        assert module.all_finite([inside])  # though the sum of the squares would overflow
        assert not module.all_finite([inside, outside[:1]])
    state = State(device, [(300,)])
    state.step([inside], module)
    assert all(t.isfinite().all() for t in state.tensors())


@pytest.mark.parametrize("module", MODULES)
def test_the_check_reads_memory_of_any_layout(device, module):
    values = torch.randn(3, 5, 6, 7)
    for name, t in layouts(values.to(device)).items():
        assert module.all_finite([t]), name
        t[2, 4, 5, 6] = math.nan
        assert not module.all_finite([t]), name
    t = torch.full((4, 4), math.nan, device=device)
    t[:, ::2] = 1
    assert module.all_finite([t[:, ::2]]), "what lies in the gaps does not count"


# ---- the contract ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("needs_extension")
def test_opcheck(device):
    raw = torch.ops.bvae
    state = State(device, [(3,), (4, 5), (2, 3, 3, 3)])
    good, grads = torch.tensor(True, device=device), state.grads(0)
    opcheck(raw.all_finite, (grads,))
    lists, rest = (state.exp_avgs, state.exp_avg_sqs), (state.steps, good, state.lr, 0.9, 0.999, 1e-8)
    opcheck(raw.adam, (state.parameters, grads, *lists, [state.halves[1]], [1], *rest))
    opcheck(raw.adam, (state.parameters, [None, None, grads[2]], *lists, [], [], *rest))


def test_they_compile_in_one_graph(device):
    def step(state, grads):
        good = ops.all_finite([g for g in grads if g is not None])
        state.step(grads, good=good)
        return good

    torch._dynamo.reset()
    plain, compiled = State(device, SHAPES[2:4]), State(device, SHAPES[2:4])
    run = torch.compile(step, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        assert step(plain, plain.grads(seed))
        assert run(compiled, plain.grads(seed))
    same(plain.tensors(), compiled.tensors())


@pytest.mark.usefixtures("needs_extension")
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: s.parameters.__setitem__(1, s.parameters[1].double()), "float32"),
        (lambda s: s.exp_avgs.__setitem__(1, s.exp_avgs[1].t()), "alike"),
        (lambda s: s.exp_avg_sqs.pop(), "one length"),
        (lambda s: s.halves.__setitem__(1, s.parameters[1].half()), "bfloat16"),
        (lambda s: s.halves.__setitem__(1, s.halves[1].t()), "laid out"),
        (lambda s: setattr(s, "steps", s.steps[1:]), "steps"),
        (lambda s: setattr(s, "steps", s.steps.double()), "steps"),
        (lambda s: setattr(s, "lr", s.lr.double()), "lr"),
    ],
)
def test_what_does_not_fit_is_refused(device, change, match):
    state = State(device, [(3,), (4, 4)])
    grads = state.grads(0)
    before = state.copies()
    held = state.tensors()
    change(state)
    with pytest.raises(RuntimeError, match=match):
        state.step(grads)
    same(held, before)


@pytest.mark.usefixtures("needs_extension")
def test_other_gradients_and_gates_are_refused(device):
    state = State(device, [(3,)])
    for grad, match in ((torch.zeros(4, device=device), "shape"), (torch.zeros(3, device=device).double(), "float64")):
        with pytest.raises(RuntimeError, match=match):
            state.step([grad])
    with pytest.raises(RuntimeError, match="good"):
        state.step(state.grads(0), good=torch.ones((), device=device))
    for given, match in (
        ([], "no tensor arguments"),
        ([state.steps.double()], "float64"),
        ([state.steps.int()], "float32"),
    ):
        with pytest.raises(RuntimeError, match=match):
            ops.all_finite(given)


# ---- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_gpu_gives_the_cpus_bits():
    cpu, gpu = State("cpu"), State("cuda")
    for seed in range(50):
        for state in (cpu, gpu):
            state.step([None if g is None else g.to(state.lr.device) for g in cpu.grads(seed)])
    same(cpu.tensors(), gpu.tensors())


@pytest.mark.gpu
def test_replays_take_the_steps():
    """The count, the rate and the gate are read where they are: every replay is a step of its own."""
    shapes = [(i % 300 + 1,) for i in range(150)]
    eager, replayed = State("cuda", shapes), State("cuda", shapes)
    grads = [eager.grads(seed) for seed in range(6)]
    grads[3][0][0] = math.nan
    held = [None if g is None else g.clone() for g in grads[0]]

    def step():
        replayed.step(held, good=ops.all_finite([g for g in held if g is not None]))

    before = replayed.copies()
    step()
    for t, old in zip(replayed.tensors(), before, strict=True):
        t.copy_(old)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i, given in enumerate(grads):
            for state in (eager, replayed):
                state.lr.fill_(1e-3 / (1 + i))
            eager.step(given, good=ops.all_finite([g for g in given if g is not None]))
            for t, g in zip(held, given, strict=True):
                if t is not None:
                    t.copy_(g)
            graph.replay()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    same(eager.tensors(), replayed.tensors())
    assert eager.steps[0] == 5
