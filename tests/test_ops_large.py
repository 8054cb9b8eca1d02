"""Sizes at which the CUDA kernels loop, add up in stages and fill the device; the float64 twin says what is right."""

import pytest
import torch

from bvae import ops, reference
from bvae.models import layer_ops

pytestmark = pytest.mark.usefixtures("needs_extension")


@pytest.mark.parametrize(("batch", "k"), [(513, 64), (6007, 130), (40_001, 5), (3, 70_001), (60_000, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sampling(device, batch, k, dtype):
    g = torch.Generator().manual_seed(0)
    inputs = [(torch.randn(batch, k, generator=g) - shift).to(dtype) for shift in (0, 1)]
    found = []
    for module, type, on in ((ops, dtype, device), (reference, torch.float64, "cpu")):
        mu, log_sigma = (t.to(on, type).detach().requires_grad_() for t in inputs)
        rng = ops.make_rng(3, on)
        z, kl, moments = module.sample_kl(mu, log_sigma, rng)
        (kl * 0.5 + z.to(torch.promote_types(type, torch.float32)).sum()).backward()
        assert rng.tolist() == [3, 1]
        found.append([t.detach().cpu().double() for t in (z, kl, moments, mu.grad, log_sigma.grad)])
    again = ops.sample_kl(*(t.to(device) for t in inputs), ops.make_rng(3, device))
    for now, before in zip(again, found[0], strict=False):
        assert torch.equal(now.cpu().double(), before)
    for name, ours, theirs in zip(("z", "kl", "moments", "mu", "log_sigma"), *found, strict=True):
        tolerance = 1e-2 if dtype == torch.bfloat16 and name not in ("kl", "moments") else 2e-5
        assert (ours - theirs).abs().max() <= tolerance * max(1, theirs.abs().max()), name


@pytest.mark.parametrize("numel", [8_388_608, 5_000_011])
@pytest.mark.parametrize("start", [0, 1])  # 1: no pointer is aligned
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss(device, numel, start, dtype):
    g = torch.Generator().manual_seed(0)
    recon = (3 * torch.randn(numel + start, generator=g)).to(dtype)
    target = torch.randint(256, (numel + start,), generator=g, dtype=torch.uint8)
    found = []
    for module, type, on in ((ops, dtype, device), (reference, torch.float64, "cpu")):
        r = recon.to(on, type)[start:].detach().requires_grad_()
        gamma2, skipped = torch.ones((), device=on), torch.zeros((), dtype=torch.int64, device=on)
        kl = torch.ones((), dtype=reference.sum_dtype(type), device=on)
        out = module.balanced_loss(r, target.to(on)[start:], kl, gamma2, skipped, logits=True, update=True)
        out.loss.backward()
        found.append([t.detach().cpu().double() for t in (out.loss, out.sse, out.stats, gamma2, numel * r.grad)])
    *ours, gradient = found[0]
    *theirs, exact = found[1]
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=2e-6)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 2e-5
    assert (gradient - exact).abs().max() <= tolerance * exact.abs().max()


@pytest.mark.parametrize("shape", [(16, 16, 3), (15, 15, 3), (7, 5, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gather(device, shape, dtype):
    g = torch.Generator().manual_seed(0)
    data = torch.randint(256, (3000, *shape), generator=g, dtype=torch.uint8)
    index = torch.randint(3000, (20_000,), generator=g)
    flip = torch.randint(2, (20_000,), generator=g).bool()
    ours = ops.gather(data.to(device), index.to(device), flip.to(device), dtype=dtype)
    for a, b in zip(ours, reference.gather(data, index, flip, dtype=dtype), strict=True):
        assert torch.equal(a.cpu(), b)


@pytest.mark.parametrize(("batch", "channels", "side"), [(20, 32, 64), (3, 8, 200), (2, 1, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_norm(device, batch, channels, side, dtype):
    g = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(batch, channels, side, side, generator=g).to(dtype) for _ in range(2))
    found = []
    for module, type, on in ((layer_ops, dtype, device), (reference, torch.float64, "cpu")):
        images, back = (t.to(on, type).contiguous(memory_format=torch.channels_last) for t in (x, grad))
        images.requires_grad_()
        wide = torch.promote_types(type, torch.float32)
        weight, bias, offset = (
            torch.full((channels,), v, dtype=wide, device=on, requires_grad=True) for v in (1, 0.1, 2)
        )
        running = [torch.zeros(shape, dtype=wide, device=on) for shape in ((channels,), (channels,), ())]
        counters = torch.zeros(channels, dtype=torch.int32, device=on)
        y, through = module.batch_norm_relu(
            images, weight, bias, running, counters, 0.5, 1e-5, offset=offset, through=True
        )
        grads = torch.autograd.grad((y, through), (images, weight, bias, offset), (back, back))
        found.append([t.detach().cpu().double() for t in (y, through, *running, *grads)])
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() <= (2e-2 if dtype == torch.bfloat16 else 2e-5) * theirs.norm()
