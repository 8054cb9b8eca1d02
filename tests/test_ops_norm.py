"""Batch norm with ReLU: the fused op against PyTorch's."""

import math

import pytest
import torch

from bvae import ops, reference

pytestmark = pytest.mark.usefixtures("needs_extension")


def inputs(dtype, shape, mean=0.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    c = shape[1]
    x = (torch.randn(shape, generator=g) * torch.rand(c, 1, 1, generator=g) + mean).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(c, generator=g).requires_grad_()
    bias = torch.randn(c, generator=g).requires_grad_()
    return x, weight, bias, torch.rand(c, generator=g), torch.rand(c, generator=g)


def run(op, x, weight, bias, mean, var, grad):
    mean, var = mean.clone(), var.clone()
    y = op(x, weight, bias, mean, var, 0.01, 1e-5)
    grads = torch.autograd.grad(y, (x, weight, bias), grad.to(y.dtype))
    return y.detach(), mean, var, *grads


@pytest.mark.parametrize("shape", [(3, 5, 4, 7), (7, 1, 1, 1), (40, 300, 8, 8), (9, 32, 16, 16), (1, 257, 1, 2)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 1.5e-2), (torch.float16, 2e-3)]
)
def test_it_is_the_twin(dtype, tolerance, shape):
    x, weight, bias, mean, var = inputs(dtype, shape)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    ours = run(ops.batch_norm_relu, x, weight, bias, mean, var, grad)
    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in (x, weight, bias)]
    exact = run(reference.batch_norm_relu, *wide, mean.double(), var.double(), grad)
    for name, a, b in zip(("y", "mean", "var", "grad x", "grad weight", "grad bias"), ours, exact, strict=True):
        error = (a.double() - b).norm() / b.norm().clamp(min=1e-3)
        assert error < tolerance, (name, error)
    assert ours[0].dtype == ours[3].dtype == dtype
    assert ours[0].is_contiguous(memory_format=torch.channels_last)
    assert (ours[0] >= 0).all()


def test_a_mean_far_from_zero_does_not_cancel():
    x, weight, bias, mean, var = inputs(torch.float32, (20, 8, 16, 16), mean=1000.0)
    grad = torch.randn(x.shape)
    ours = run(ops.batch_norm_relu, x, weight, bias, mean, var, grad)
    wide = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    exact = run(reference.batch_norm_relu, *wide, mean.double(), var.double(), grad)
    for a, b in zip(ours, exact, strict=True):
        assert (a.double() - b).norm() / b.norm() < 1e-3


def test_the_number_of_threads_does_not_change_a_bit():
    x, weight, bias, mean, var = inputs(torch.bfloat16, (30, 24, 16, 16))
    grad = torch.randn(x.shape)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            results.append(run(ops.batch_norm_relu, x, weight, bias, mean, var, grad))
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_so(value):
    """A step that is not finite is undone by what it leaves behind: none of it may be lost."""
    x, weight, bias, mean, var = inputs(torch.bfloat16, (4, 3, 4, 4))
    with torch.no_grad():
        x[1, 1, 2, 2] = value
    y, mean, var, *grads = run(ops.batch_norm_relu, x, weight, bias, mean, var, torch.ones(x.shape))
    assert not y[:, 1].isfinite().all()
    assert y[:, [0, 2]].isfinite().all()
    assert not mean[1].isfinite()
    assert mean[[0, 2]].isfinite().all()
    assert not grads[0][:, 1].isfinite().all()


def test_a_gradient_in_another_layout_is_taken():
    x, weight, bias, mean, var = inputs(torch.float32, (4, 3, 4, 4))
    grad = torch.randn(x.shape)
    a = run(ops.batch_norm_relu, x, weight, bias, mean, var, grad)
    b = run(ops.batch_norm_relu, x, weight, bias, mean, var, grad.contiguous(memory_format=torch.channels_last))
    for i, j in zip(a, b, strict=True):
        assert torch.equal(i, j)


def test_it_has_no_second_derivative():
    x, weight, bias, mean, var = inputs(torch.float32, (4, 3, 4, 4))
    y = ops.batch_norm_relu(x, weight, bias, mean, var, 0.1, 1e-5)
    (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="batch_norm_relu has no second derivative"):
        g.sum().backward()


def test_what_does_not_fit_is_refused():
    x, weight, bias, mean, var = inputs(torch.float32, (4, 3, 4, 4))
    with pytest.raises(RuntimeError, match="running_mean must be float32"):
        ops.batch_norm_relu(x, weight, bias, mean[:2], var, 0.1, 1e-5)
    with pytest.raises(RuntimeError, match="more than one value a channel"):
        ops.batch_norm_relu(
            x[:1, :, :1, :1].contiguous(memory_format=torch.channels_last), weight, bias, mean, var, 0.1, 1e-5
        )
    with pytest.raises(RuntimeError, match="channels_last"):
        torch.ops.bvae.batch_norm_relu(x.detach().contiguous(), weight, bias, mean, var, 0.1, 1e-5)
