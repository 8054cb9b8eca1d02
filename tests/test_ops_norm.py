"""Batch norm with ReLU and the end of a residual block: the fused ops against their twins in float64."""

import math

import pytest
import torch
from torch.library import opcheck

from bvae import reference
from bvae.models import layer_ops

pytestmark = pytest.mark.usefixtures("needs_extension")

MOMENTUM, EPS = 0.01, 1e-5
TYPES = [(torch.float32, 2e-5), (torch.bfloat16, 1.5e-2), (torch.float16, 2e-3)]
NAMES = ("y", "through", "mean", "var", "weight of both", "grad x", "grad weight", "grad bias", "grad offset")


def images(shape, dtype, device="cpu", seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x.to(device).contiguous(memory_format=torch.channels_last)


def inputs(dtype, shape, device="cpu", mean=0.0, seed=0):
    """(x, weight, bias, running, offset) of a norm, the first three and the last as leaves."""
    g = torch.Generator().manual_seed(seed)
    c = shape[1]
    x = (torch.randn(shape, generator=g) * torch.rand(c, 1, 1, generator=g) + mean).to(dtype)
    x = x.to(device).contiguous(memory_format=torch.channels_last)
    weight, bias, offset = (torch.randn(c, generator=g).to(device) for _ in range(3))
    running = tuple(t.to(device) for t in (torch.rand(c, generator=g), torch.rand(c, generator=g), torch.tensor(0.3)))
    return *(t.requires_grad_() for t in (x, weight, bias)), running, offset.requires_grad_()


def counters(x):
    return torch.zeros(x.shape[1], dtype=torch.int32, device=x.device)


def run(module, x, weight, bias, running, offset=None, grad=None, grad_through=None):
    """Results of the norm by NAMES, those that there are. With `grad_through`, x + offset is used too."""
    running = tuple(t.clone() for t in running)
    counted = counters(x)
    through = grad_through is not None
    out = module.batch_norm_relu(x, weight, bias, running, counted, MOMENTUM, EPS, offset=offset, through=through)
    outs = out if through else (out,)
    wanted = [t for t in (x, weight, bias, offset if through else None) if t is not None]
    given = [g.to(x.dtype) for g in (grad, grad_through) if g is not None]
    grads = torch.autograd.grad(outs, wanted, given)
    assert not counted.any(), "the counters are left as they were"
    values = [outs[0], outs[1] if through else None, *running, *grads]
    return {name: t.detach() for name, t in zip(NAMES, values, strict=False) if t is not None}


def in_float64(x, weight, bias, running, offset):
    wide = [None if t is None else t.detach().double().requires_grad_() for t in (x, weight, bias, offset)]
    return *wide[:3], tuple(t.double() for t in running), wide[3]


def compare(ours, exact, tolerance):
    assert ours.keys() == exact.keys()
    for name, value in ours.items():
        error = (value.double() - exact[name]).norm() / exact[name].norm().clamp(min=1e-3)
        assert error < tolerance, (name, error)


# Channels that are one vector, several, no whole vector, more than a block's columns; rows that are few and many.
SHAPES = [(3, 5, 4, 7), (7, 1, 1, 1), (12, 300, 5, 4), (9, 32, 16, 16), (1, 257, 1, 2), (2, 8, 3, 3), (2, 528, 5, 3)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), TYPES)
@pytest.mark.parametrize("use", ["alone", "offset", "through", "offset and through"])
def test_it_is_the_twin(device, dtype, tolerance, shape, use):
    if use not in ("alone", "offset and through") and shape != SHAPES[0] and dtype != torch.bfloat16:
        return  # the rest is one of these
    x, weight, bias, running, offset = inputs(dtype, shape, device)
    if "offset" not in use:
        offset = None
    grad = images(shape, dtype, device, seed=1)
    grad_through = images(shape, dtype, device, seed=2) if "through" in use else None
    ours = run(layer_ops, x, weight, bias, running, offset, grad, grad_through)
    wide = in_float64(x, weight, bias, running, offset)
    exact = run(reference, *wide, grad, grad_through)
    compare(ours, exact, tolerance)
    assert ours["y"].dtype == ours["grad x"].dtype == dtype
    assert ours["y"].is_contiguous(memory_format=torch.channels_last)
    assert (ours["y"] >= 0).all()


def test_a_mean_far_from_zero_does_not_cancel(device):
    x, weight, bias, running, offset = inputs(torch.float32, (20, 8, 16, 16), device, mean=1000.0)
    grad = images(x.shape, torch.float32, device)
    ours = run(layer_ops, x, weight, bias, running, offset, grad)
    compare(ours, run(reference, *in_float64(x, weight, bias, running, offset), grad), 5e-3)


def test_the_number_of_threads_does_not_change_a_bit():
    x, weight, bias, running, offset = inputs(torch.bfloat16, (30, 24, 16, 16))
    grad, grad_through = images(x.shape, x.dtype), images(x.shape, x.dtype, seed=1)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            results.append(run(layer_ops, x, weight, bias, running, offset, grad, grad_through))
    finally:
        torch.set_num_threads(threads)
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


def test_it_gives_the_same_bits_every_time(device):
    x, weight, bias, running, offset = inputs(torch.bfloat16, (60, 32, 16, 16), device)
    grad, grad_through = images(x.shape, x.dtype, device), images(x.shape, x.dtype, device, seed=1)
    first, *others = (run(layer_ops, x, weight, bias, running, offset, grad, grad_through) for _ in range(3))
    for other in others:
        for name, value in first.items():
            assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_so(device, value):
    """A step that is not finite is undone by what it leaves behind: none of it may be lost."""
    x, weight, bias, running, _ = inputs(torch.bfloat16, (4, 3, 4, 4), device)
    with torch.no_grad():
        x[1, 1, 2, 2] = value
    ours = run(layer_ops, x, weight, bias, running, None, torch.ones_like(x))
    assert not ours["y"][:, 1].isfinite().all()
    assert ours["y"][:, [0, 2]].isfinite().all()
    assert not ours["mean"][1].isfinite()
    assert ours["mean"][[0, 2]].isfinite().all()
    assert not ours["grad x"][:, 1].isfinite().all()


def test_gradients_in_another_layout_are_taken(device):
    x, weight, bias, running, offset = inputs(torch.float32, (4, 3, 4, 4), device)
    grads = [torch.randn(x.shape, device=device) for _ in range(2)]
    a = run(layer_ops, x, weight, bias, running, offset, *grads)
    b = run(
        layer_ops, x, weight, bias, running, offset, *(g.contiguous(memory_format=torch.channels_last) for g in grads)
    )
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def test_one_of_both_results_may_be_left_unused(device):
    x, weight, bias, running, offset = inputs(torch.float32, (4, 3, 4, 4), device)
    for chosen in (0, 1):
        grads = []
        for module, args in ((layer_ops, (x, weight, bias, running, offset)),
                             (reference, in_float64(x, weight, bias, running, offset))):  # fmt: skip
            *parts, kept, shift = args
            kept = tuple(t.clone() for t in kept)
            out = module.batch_norm_relu(*parts, kept, counters(x), MOMENTUM, EPS, offset=shift, through=True)
            grads.append(torch.autograd.grad(out[chosen].square().sum(), (parts[0], shift), allow_unused=True))
        (ours, ours_shift), (exact, exact_shift) = grads
        assert torch.allclose(ours.double(), exact, atol=1e-5)
        if ours_shift is None:
            assert chosen == 0 and exact_shift.abs().max() < 1e-9, "which batch norm cancels"
        else:
            assert torch.allclose(ours_shift.double(), exact_shift, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), TYPES)
def test_the_end_of_a_block_is_its_twin(device, dtype, tolerance, shape):
    a, b = (images(shape, dtype, device, seed).requires_grad_() for seed in (0, 1))
    biases = [torch.randn(shape[1], device=device).requires_grad_() for _ in range(2)]
    grad = images(shape, dtype, device, 2)
    counted = counters(a)
    out = layer_ops.add_biased(a, b, *biases, counted)
    ours = dict(
        zip(("y", "a", "b", "first", "second"), (out, *torch.autograd.grad(out, (a, b, *biases), grad)), strict=True)
    )
    wide = [t.detach().double().requires_grad_() for t in (a, b, *biases)]
    out = reference.add_biased(*wide, counted)
    exact = dict(zip(ours, (out, *torch.autograd.grad(out, wide, grad.double())), strict=True))
    compare({name: t.detach() for name, t in ours.items()}, {name: t.detach() for name, t in exact.items()}, tolerance)
    assert ours["y"].dtype == dtype and not counted.any()
    assert ours["first"].data_ptr() != ours["second"].data_ptr(), "each parameter's gradient may be changed in place"


def test_they_have_no_second_derivative():
    x, weight, bias, running, offset = inputs(torch.float32, (4, 3, 4, 4))
    y = layer_ops.batch_norm_relu(x, weight, bias, running, counters(x), 0.1, EPS)
    (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="batch_norm_relu has no second derivative"):
        g.sum().backward()
    y = layer_ops.add_biased(x, x, weight, offset, counters(x))
    (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="add_biased has no second derivative"):
        g.sum().backward()


def test_what_does_not_fit_is_refused():
    x, weight, bias, (mean, var, gathered), _ = inputs(torch.float32, (4, 3, 4, 4))
    running = mean, var, gathered
    with pytest.raises(RuntimeError, match="running_mean must be float32"):
        layer_ops.batch_norm_relu(x, weight, bias, (mean[:2], var, gathered), counters(x), 0.1, EPS)
    with pytest.raises(RuntimeError, match="counters must be int32"):
        layer_ops.batch_norm_relu(x, weight, bias, running, counters(x)[:2], 0.1, EPS)
    with pytest.raises(RuntimeError, match="more than one value a channel"):
        one = x[:1, :, :1, :1].contiguous(memory_format=torch.channels_last)
        layer_ops.batch_norm_relu(one, weight, bias, running, counters(x), 0.1, EPS)
    with pytest.raises(RuntimeError, match="channels_last"):
        torch.ops.bvae.batch_norm_relu(
            x.detach().contiguous(), None, weight, bias, *running, counters(x), 0.1, EPS, False
        )
    with pytest.raises(RuntimeError, match="b must be like x"):
        torch.ops.bvae.add_biased(x.detach(), x.detach()[:2], weight, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(device, dtype):
    raw = torch.ops.bvae
    x, weight, bias, running, offset = inputs(dtype, (2, 3, 4, 5), device)
    x, weight, bias, offset = (t.detach() for t in (x, weight, bias, offset))
    statistics = torch.rand(2, 3, device=device)
    for shift, through in ((None, True), (offset, True), (offset, False)):
        opcheck(raw.batch_norm_relu, (x, shift, weight, bias, *running, counters(x), 0.1, EPS, through))
    for passed, wanted in ((None, False), (x, False), (x, True)):
        opcheck(raw.batch_norm_relu_backward, (x, passed, x, weight, bias, statistics, counters(x), wanted))
    opcheck(raw.add_biased, (x, x, bias, offset))
    opcheck(raw.channel_sums, (x, counters(x)))
