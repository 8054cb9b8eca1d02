"""Adam on the CPU against torch's."""

import math

import pytest
import torch

from bvae import ops

pytestmark = pytest.mark.skipif(not ops.FUSED_CPU_TRAINING, reason="needs the extension")


@pytest.mark.parametrize("shape", [(), (7,), (1000, 70), (6, 5, 3, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_torchs(shape, dtype):
    torch.manual_seed(0)
    theirs = torch.randn(shape)
    if len(shape) == 4:
        theirs = theirs.contiguous(memory_format=torch.channels_last)
    theirs.requires_grad_()
    ours = theirs.detach().clone()
    moments = torch.zeros_like(ours), torch.zeros_like(ours)
    half = ours.bfloat16()
    optimizer = torch.optim.Adam([theirs], lr=1e-3, betas=(0.9, 0.999), eps=1e-8)
    for step in range(1, 6):
        grad = torch.randn(shape).to(dtype)  # for four dimensions in another layout than the parameter
        theirs.grad = grad.float()
        optimizer.step()
        ops.adam(ours, grad, *moments, half, step=step, lr=1e-3, betas=(0.9, 0.999), eps=1e-8)
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(moments[1], optimizer.state[theirs]["exp_avg_sq"], rtol=1e-5, atol=1e-9)
    assert torch.equal(half, ours.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_square_sum(dtype):
    torch.manual_seed(0)
    for shape in ((), (5,), (300, 700), (3, 4, 5, 6)):
        t = torch.randn(shape).to(dtype)
        torch.testing.assert_close(ops.square_sum(t), t.double().square().sum(), rtol=1e-6, atol=0)
    for value in (math.nan, math.inf):
        t[1, 2, 3, 4] = value
        assert not ops.square_sum(t).isfinite()


def test_what_does_not_fit_is_refused():
    p = torch.zeros(4)
    with pytest.raises(RuntimeError, match="float32"):
        ops.adam(p.double(), p, p, p, None, step=1, lr=1.0, betas=(0.9, 0.9), eps=1e-8)
    with pytest.raises(RuntimeError, match="bfloat16"):
        ops.adam(p, p, p, p, torch.zeros(4), step=1, lr=1.0, betas=(0.9, 0.9), eps=1e-8)
