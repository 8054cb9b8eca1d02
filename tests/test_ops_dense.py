"""A dense layer with its ReLU: the fused op against its twin in float64."""

import math

import pytest
import torch

from bvae import reference
from bvae.models import layer_ops

pytestmark = pytest.mark.usefixtures("needs_extension")

TYPES = [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)]


def layer(dtype, device, batch, inputs, outputs):
    g = torch.Generator().manual_seed(0)
    shapes = (batch, inputs), (outputs, inputs), (outputs,)
    x, weight, bias = (torch.randn(shape, generator=g).to(dtype).to(device).requires_grad_() for shape in shapes)
    grad = torch.randn(batch, outputs, generator=g).to(dtype).to(device)
    return x, weight, bias, grad


# A layer of whole vectors, of none, of more columns than a block has; one sample; more rows than a thread takes.
@pytest.mark.parametrize("shape", [(5, 3, 16), (7, 4, 13), (3, 5, 600), (1, 2, 8), (700, 2, 24)])
@pytest.mark.parametrize(("dtype", "tolerance"), TYPES)
def test_it_is_the_twin(device, dtype, tolerance, shape):
    x, weight, bias, grad = layer(dtype, device, *shape)
    counters = torch.zeros(shape[2], dtype=torch.int32, device=device)
    y = layer_ops.linear_relu(x, weight, bias, counters)
    ours = (y, *torch.autograd.grad(y, (x, weight, bias), grad))
    wide = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    exact = reference.linear_relu(*wide, counters)
    # The mask as the narrow type had it: a sum that rounds to zero lets no gradient through.
    passed = torch.where(y > 0, grad, 0).double()
    expected = (exact, passed @ wide[1], passed.t() @ wide[0], passed.sum(0))
    for name, a, b in zip(("y", "x", "weight", "bias"), ours, expected, strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).norm() <= tolerance * b.norm(), name
    assert not counters.any()


def test_a_gradient_with_gaps_is_taken(device):
    x, weight, bias, grad = layer(torch.float32, device, 4, 3, 8)
    counters = torch.zeros(8, dtype=torch.int32, device=device)
    gaps = torch.zeros(4, 16, device=device)[:, ::2]
    gaps.copy_(grad)
    y = layer_ops.linear_relu(x, weight, bias, counters)
    for a, b in zip(
        *(torch.autograd.grad(y, (x, weight, bias), g, retain_graph=True) for g in (grad, gaps)), strict=True
    ):
        assert torch.equal(a, b)


def test_what_is_not_finite_passes(device):
    x, weight, bias, grad = layer(torch.float32, device, 4, 3, 8)
    with torch.no_grad():
        bias[2] = math.nan
    y = layer_ops.linear_relu(x, weight, bias, torch.zeros(8, dtype=torch.int32, device=device))
    (gradient,) = torch.autograd.grad(y, bias, grad)
    assert y[:, 2].isnan().all() and torch.allclose(gradient[2], grad[:, 2].sum())


def test_it_has_no_second_derivative(device):
    x, weight, bias, _ = layer(torch.float32, device, 4, 3, 8)
    y = layer_ops.linear_relu(x, weight, bias, torch.zeros(8, dtype=torch.int32, device=device))
    (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_relu has no second derivative"):
        g.sum().backward()


def test_opcheck(device):
    y = torch.randn(4, 8, device=device)
    counters = torch.zeros(8, dtype=torch.int32, device=device)
    torch.library.opcheck(torch.ops.bvae.relu_grad, (y, y, counters))
    with pytest.raises(RuntimeError, match="must be alike"):
        torch.ops.bvae.relu_grad(y, y[:2], counters)
