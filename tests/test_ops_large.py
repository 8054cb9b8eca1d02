"""Sizes at which the CUDA kernels loop, add up in stages and fill the device; the CPU loops say what is right."""

import pytest
import torch

from bvae import ops

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("needs_extension")]


@pytest.mark.parametrize(("batch", "k"), [(513, 64), (6007, 130), (40_001, 5), (3, 70_001), (200_000, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sampling(batch, k, dtype):
    g = torch.Generator().manual_seed(0)
    inputs = [(torch.randn(batch, k, generator=g) - shift).to(dtype) for shift in (0, 1)]
    found = {}
    for device in ("cpu", "cuda"):
        mu, log_sigma = (t.to(device).requires_grad_() for t in inputs)
        rng = ops.make_rng(3, device)
        z, kl, moments = ops.sample_kl(mu, log_sigma, rng)
        again = ops.sample_kl(mu.detach(), log_sigma.detach(), ops.make_rng(3, device))
        assert torch.equal(again.z, z) and torch.equal(again.kl, kl) and torch.equal(again.moments, moments)
        (kl * 0.5 + z.float().sum()).backward()
        assert rng.tolist() == [3, 1]
        found[device] = [t.detach().cpu().double() for t in (z, kl, moments, mu.grad, log_sigma.grad)]
    for name, ours, theirs in zip(("z", "kl", "moments", "mu", "log_sigma"), found["cuda"], found["cpu"], strict=True):
        tolerance = 1e-2 if dtype == torch.bfloat16 and name not in ("kl", "moments") else 2e-5
        assert (ours - theirs).abs().max() <= tolerance * max(1, theirs.abs().max()), name


@pytest.mark.parametrize("numel", [8_388_608, 5_000_011])
@pytest.mark.parametrize("start", [0, 1])  # 1: no pointer is aligned
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss(numel, start, dtype):
    g = torch.Generator().manual_seed(0)
    recon = (3 * torch.randn(numel + start, generator=g)).to(dtype)
    target = torch.randint(256, (numel + start,), generator=g, dtype=torch.uint8)
    found = {}
    for device in ("cpu", "cuda"):
        r = recon.to(device)[start:].requires_grad_()
        gamma2, skipped = torch.ones((), device=device), torch.zeros((), dtype=torch.int64, device=device)
        kl = torch.ones((), device=device)
        out = ops.balanced_loss(r, target.to(device)[start:], kl, gamma2, skipped, logits=True, update=True)
        out.loss.backward()
        found[device] = [t.detach().cpu().double() for t in (out.loss, out.sse, out.stats, gamma2, numel * r.grad)]
    tolerance = 1e-2 if dtype == torch.bfloat16 else 2e-5
    for ours, theirs in zip(found["cuda"][:4], found["cpu"][:4], strict=True):
        assert torch.allclose(ours, theirs, rtol=2e-6)
    assert (found["cuda"][4] - found["cpu"][4]).abs().max() <= tolerance * found["cpu"][4].abs().max()


@pytest.mark.parametrize("shape", [(16, 16, 3), (15, 15, 3), (7, 5, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gather(shape, dtype):
    g = torch.Generator().manual_seed(0)
    data = torch.randint(256, (3000, *shape), generator=g, dtype=torch.uint8)
    index = torch.randint(3000, (20_000,), generator=g)
    flip = torch.randint(2, (20_000,), generator=g).bool()
    ours = ops.gather(data.cuda(), index.cuda(), flip.cuda(), dtype=dtype)
    for a, b in zip(ours, ops.gather(data, index, flip, dtype=dtype), strict=True):
        assert torch.equal(a.cpu(), b)
