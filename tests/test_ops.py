"""Values and gradients of the fused ops against the float64 twin, and their contract (docs/ops.md)."""

import math
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from ops_samples import DTYPES, TOLERANCE, loss_samples, posterior_samples
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from bvae import _extension, ops, reference


def close(actual, expected, dtype, what, scale=None):
    """Within dtype's tolerance of the largest expected value."""
    assert actual.shape == expected.shape, what
    if not expected.numel():
        return
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    scale = expected.abs().max().item() if scale is None else scale
    error = (actual - expected).abs().max().item()
    assert error <= TOLERANCE[dtype] * max(scale, 1e-3), f"{what}: off by {error} at scale {scale}"


def leaf(x, dtype=None):
    x = x.detach()
    return (x if dtype is None else x.to(dtype)).requires_grad_()


def scalars(device, gamma2=0.3):
    return torch.tensor(gamma2, device=device), torch.tensor(0, device=device)


# ---- the loss -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("logits", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_and_gradients_match_the_float64_twin(device, dtype, logits):
    for name, recon, target in loss_samples(dtype, device):
        r, r64 = leaf(recon), leaf(recon, torch.float64)
        kl = leaf(torch.tensor(7.5, dtype=reference.sum_dtype(dtype), device=device))
        kl64 = leaf(kl, torch.float64)
        t64 = target if target.dtype == torch.uint8 else target.double()
        gamma2, skipped = scalars(device)
        gamma2_64, skipped_64 = scalars(device)
        kw = {"kl_weight": 2.5, "logits": logits, "update": True}
        out = ops.balanced_loss(r, target, kl, gamma2, skipped, **kw)
        ref = reference.balanced_loss(r64, t64, kl64, gamma2_64, skipped_64, **kw)
        assert out.loss.dtype == out.sse.dtype == reference.sum_dtype(dtype)
        assert out.stats.dtype == torch.float32
        assert not out.stats.requires_grad
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        for field in ("loss", "sse", "stats"):
            close(getattr(out, field), getattr(ref, field), wide, f"{name} {field}")
        close(gamma2, gamma2_64, torch.float32, f"{name} gamma2")
        assert skipped.item() == skipped_64.item() == 0

        (3 * out.loss + 0.01 * out.sse).backward()
        (3 * ref.loss + 0.01 * ref.sse).backward()
        assert r.grad.dtype == dtype
        close(r.grad, r64.grad, dtype, f"{name} gradient of recon")
        close(kl.grad, kl64.grad, wide, f"{name} gradient of kl")


@pytest.mark.parametrize("which", ["loss", "sse"])
def test_each_output_alone_carries_its_gradient(device, which):
    recon, target = torch.randn(4, 10, device=device), torch.rand(4, 10, device=device)
    kl = leaf(torch.tensor(2.0, device=device))
    grads = []
    for module in (ops, reference):
        r, k = leaf(recon), leaf(kl)
        out = module.balanced_loss(r, target, k, *scalars(device), logits=True, update=False)
        getattr(out, which).backward()
        grads.append((r.grad, k.grad))
    close(grads[0][0], grads[1][0], torch.float32, which)
    assert (grads[0][1] is None or grads[0][1] == 0) == (which == "sse")


def test_gradient_keeps_the_memory_layout(device):
    recon = torch.randn(2, 3, 8, 8, device=device).contiguous(memory_format=torch.channels_last)
    r = leaf(recon)
    seen = []
    r.register_hook(lambda g: seen.append(g.stride()))
    target = torch.zeros(2, 3, 8, 8, dtype=torch.uint8, device=device)
    zero = torch.zeros((), device=device)
    ops.balanced_loss(r, target, zero, *scalars(device), logits=True, update=False).loss.backward()
    assert seen == [recon.stride()]


def test_gamma2_is_used_before_it_moves(device):
    recon, target = torch.full((2, 8), 0.25, device=device), torch.zeros(2, 8, device=device)
    gamma2, skipped = scalars(device, 1.0)
    zero = torch.zeros((), device=device)
    r = leaf(recon)
    out = ops.balanced_loss(r, target, zero, gamma2, skipped, logits=False, update=True)
    mse = 0.0625
    assert out.stats.tolist() == pytest.approx([mse, 0.0, 1.0, 4 * mse + 4 * math.log(2 * math.pi)], rel=1e-6)
    assert gamma2.item() == pytest.approx(0.99 + 0.01 * mse)
    out.loss.backward()  # with gamma2 as it was: recon / (gamma2 B)
    assert torch.allclose(r.grad, recon / 2)
    used = gamma2.item()
    again = ops.balanced_loss(recon, target, zero, gamma2, skipped, logits=False, update=False)
    assert again.stats[2].item() == used == gamma2.item()


def test_gamma2_never_grows_and_stops_at_the_floor(device):
    zero = torch.zeros((), device=device)
    gamma2, skipped = scalars(device, 0.01)
    before = gamma2.clone()
    far, near = torch.full((2, 4), 5.0, device=device), torch.zeros(2, 4, device=device)
    ops.balanced_loss(far, near, zero, gamma2, skipped, logits=False, update=True)
    assert torch.equal(gamma2, before)
    for _ in range(5):
        ops.balanced_loss(near, near, zero, gamma2, skipped, logits=False, update=True, decay=0.1, floor=1e-4)
    assert gamma2.item() == pytest.approx(1e-4)
    assert skipped.item() == 0


@pytest.mark.parametrize("module", [ops, reference])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_weight_on_the_device_multiplies_that_of_the_kl(device, module, dtype):
    recon, target = torch.randn(3, 50, device=device, dtype=dtype), torch.rand(3, 50, device=device, dtype=dtype)
    weight = torch.tensor(-0.375, device=device)
    kl = leaf(torch.tensor(6.0, device=device, dtype=dtype))
    kw = {"kl_weight": 2.0, "logits": True, "update": False}
    out = module.balanced_loss(recon, target, kl, *scalars(device), weight=weight, **kw)
    weight.fill_(100.0)  # moved before the backward: the gradient is that of the weight in use
    out.loss.backward()
    plain = module.balanced_loss(recon, target, 0 * kl, *scalars(device), **kw)
    assert out.loss.item() == pytest.approx(plain.loss.item() - 0.75 * 6 / 3, rel=1e-5)
    assert kl.grad.item() == pytest.approx(-0.25)


@pytest.mark.parametrize("module", [ops, reference])
def test_gamma2_grows_where_it_may(device, module):
    gamma2, skipped = scalars(device, 0.01)
    zero = torch.zeros((), device=device)
    far = torch.full((2, 4), 5.0, device=device)
    module.balanced_loss(far, 0 * far, zero, gamma2, skipped, logits=False, update=True, monotone=False)
    assert gamma2.item() == pytest.approx(0.99 * 0.01 + 0.01 * 25)
    module.update_gamma2(gamma2, skipped, zero + 800, torch.tensor(8, device=device), monotone=False)
    assert gamma2.item() == pytest.approx(0.99 * 0.2599 + 1.0)
    gamma2.fill_(math.nan)  # stays what it is: the floor would be a huge weight of the reconstruction
    module.update_gamma2(gamma2, skipped, zero, torch.tensor(8, device=device), monotone=False)
    assert math.isnan(gamma2.item()) and skipped.item() == 0


@pytest.mark.parametrize("module", [ops, reference])
@pytest.mark.parametrize("monotone", [True, False])
def test_a_gamma2_of_zero_starts_from_the_batch(device, module, monotone):
    recon = leaf(torch.full((2, 4), 5.0, device=device))
    gamma2, skipped = scalars(device, 0.0)
    zero, target = torch.zeros((), device=device), torch.zeros(2, 4, device=device)
    kw = {"logits": False, "monotone": monotone}
    out = module.balanced_loss(recon, target, zero, gamma2, skipped, update=True, **kw)
    assert gamma2.item() == out.stats[2].item() == 25
    out.loss.backward()
    assert torch.allclose(recon.grad, recon / 50)
    gamma2.zero_()
    exact = module.balanced_loss(target, target, zero, gamma2, skipped, update=False, **kw)
    assert exact.stats[2].item() == pytest.approx(1e-8)
    assert gamma2.item() == 0
    module.update_gamma2(gamma2, skipped, zero + 56, torch.tensor(8, device=device), monotone=monotone)
    assert gamma2.item() == 7


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("module", [ops, reference])
def test_non_finite_input_never_poisons_gamma2(device, module, bad):
    recon = torch.randn(3, 50, device=device)
    recon[1, 7] = bad
    gamma2, skipped = scalars(device)
    before = gamma2.clone()
    zero = torch.zeros((), device=device)
    out = module.balanced_loss(
        recon, torch.zeros(3, 50, device=device), zero, gamma2, skipped, logits=False, update=True
    )
    assert not math.isfinite(out.loss.item())
    assert torch.equal(gamma2, before) and skipped.item() == 1
    module.update_gamma2(gamma2, skipped, out.sse, torch.tensor(150, device=device))
    assert torch.equal(gamma2, before) and skipped.item() == 2


@pytest.mark.parametrize("module", [ops, reference])
def test_empty_batch_moves_nothing(device, module):
    gamma2, skipped = scalars(device)
    before = gamma2.clone()
    r = leaf(torch.zeros(0, 3, 4, 4, device=device))
    kl = leaf(torch.zeros((), device=device))
    out = module.balanced_loss(r, r.detach(), kl, gamma2, skipped, logits=True, update=True)
    out.loss.backward()
    assert out.sse.item() == 0
    assert out.loss.item() == pytest.approx(24 * math.log(0.3) + 24 * math.log(2 * math.pi), rel=1e-6)
    assert r.grad.shape == r.shape and kl.grad.item() == 0
    assert torch.equal(gamma2, before) and skipped.item() == 0


@pytest.mark.parametrize("count_dtype", [torch.int64, torch.float64])
@pytest.mark.parametrize("sse_dtype", [torch.float32, torch.float64])
def test_update_gamma2_pools_like_one_batch(device, count_dtype, sse_dtype):
    recon, target = torch.rand(8, 30, device=device), torch.rand(8, 30, device=device)
    zero = torch.zeros((), device=device)
    whole, skipped = scalars(device)
    ops.balanced_loss(recon, target, zero, whole, skipped, logits=False, update=True)
    pooled, skipped = scalars(device)
    parts = [
        ops.balanced_loss(r, t, zero, pooled, skipped, logits=False, update=False).sse
        for r, t in zip(recon.split(3), target.split(3), strict=True)
    ]
    count = torch.tensor(recon.numel(), dtype=count_dtype, device=device)
    ops.update_gamma2(pooled, skipped, torch.stack(parts).sum().to(sse_dtype), count)
    assert pooled.item() == pytest.approx(whole.item(), rel=1e-6)
    before = pooled.clone()
    ops.update_gamma2(pooled, skipped, parts[0], torch.zeros_like(count))
    assert torch.equal(pooled, before) and skipped.item() == 0


@pytest.mark.usefixtures("needs_extension")  # autograd of the float32 twin cancels here
def test_sigmoid_is_accurate_everywhere(device):
    """d sse / d logit with target 0 is 2 s^2 (1 - s): both tails must keep their relative precision."""
    x = torch.linspace(-40, 80, 20001, device=device)
    r, r64 = leaf(x), leaf(x, torch.float64)
    for v in (r, r64):
        one, none = scalars(device, 1.0)
        kl = torch.zeros((), dtype=v.dtype, device=device)
        ops.balanced_loss(v, torch.zeros_like(v), kl, one, none, logits=True, update=False).sse.backward()
    relative = ((r.grad.double() - r64.grad) / r64.grad).abs()
    assert relative[x.abs() < 40].max().item() < (2e-6 if device == "cpu" else 2e-5)


def every_byte(dtype):
    """The bytes [1,256], and their exact fractions of 255 rounded to `dtype`: on the CPU, whose division is exact."""
    target = torch.arange(256, dtype=torch.uint8).view(1, -1)
    return target, target.to(dtype) / 255


@pytest.mark.parametrize("module", [ops, reference])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_byte_is_its_exact_fraction(device, dtype, module):
    target, exact = (t.to(device) for t in every_byte(dtype))
    zero = torch.zeros((), device=device)
    out = module.balanced_loss(exact, target, zero, *scalars(device), logits=False, update=False)
    assert out.sse.item() == 0.0


class DivisionOfCUDA(TorchDispatchMode):
    """CUDA divides by a number on the host as a product with its reciprocal, which is not always the same."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.div.Tensor and not isinstance(args[1], torch.Tensor):
            return torch.ops.aten.mul.Tensor(args[0], torch.tensor(1 / args[1], dtype=args[0].dtype))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_twin_of_every_byte_would_be_exact_on_cuda(dtype):
    target, exact = every_byte(dtype)
    with DivisionOfCUDA():
        assert not torch.equal(target.to(dtype) / 255, exact), "else this shows nothing"
        assert (
            reference.balanced_loss(exact, target, torch.zeros(()), *scalars("cpu"), logits=False, update=False).sse
            == 0
        )
        x, _ = reference.gather(target.view(1, 16, 16, 1), torch.tensor([0]), dtype=dtype)
    assert torch.equal(x.flatten(), exact.flatten())


# ---- sampling and KL ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_sampling_and_gradients_match_the_float64_twin(device, dtype):
    for name, mu, log_sigma in posterior_samples(dtype, device):
        m, ls = leaf(mu), leaf(log_sigma)
        m64, ls64 = leaf(mu, torch.float64), leaf(log_sigma, torch.float64)
        rng, rng64 = ops.make_rng(5, device), ops.make_rng(5, device)
        out = ops.sample_kl(m, ls, rng, first_sample=3)
        ref = reference.sample_kl(m64, ls64, rng64, first_sample=3)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert out.z.shape == mu.shape and out.z.dtype == dtype
        assert out.kl.dtype == out.moments.dtype == reference.sum_dtype(dtype)
        assert not out.moments.requires_grad
        assert torch.equal(rng, rng64) and rng[1].item() == 1
        close(out.z, ref.z, dtype, f"{name} z")
        close(out.kl, ref.kl, wide, f"{name} kl")
        close(out.moments, ref.moments, wide, f"{name} moments")
        weight = torch.linspace(-1, 1, mu.numel(), device=device).view(mu.shape)
        ((out.z * weight.to(dtype)).sum() + 0.3 * out.kl).backward()
        ((ref.z * weight.to(dtype).double()).sum() + 0.3 * ref.kl).backward()
        close(m.grad, m64.grad, dtype, f"{name} gradient of mu")
        close(ls.grad, ls64.grad, dtype, f"{name} gradient of log_sigma")


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kl_of_each_latent_has_a_gradient(device, dtype):
    for name, mu, log_sigma in posterior_samples(dtype, device):
        k = math.prod(mu.shape[1:])
        weight = torch.linspace(-1, 2, k, device=device, dtype=torch.float64)
        found = []
        for module, type in ((ops, dtype), (reference, torch.float64)):
            m, ls = leaf(mu, type), leaf(log_sigma, type)
            out = module.sample_kl(m, ls, ops.make_rng(5, device), first_sample=3, per_latent=True)
            assert out.kl.shape == (k,) and out.kl.dtype == reference.sum_dtype(type)
            ((out.kl.double() * weight).sum() + out.z.double().square().sum()).backward()
            found.append((out.z, out.kl, out.moments, m.grad, ls.grad))
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        kinds = {"z": dtype, "kl": wide, "moments": wide, "mu": dtype, "log_sigma": dtype}
        for (what, kind), a, b in zip(kinds.items(), *found, strict=True):
            close(a, b, kind, f"{name} {what}")


def test_the_kl_of_a_single_latent_alone(device):
    mu, ls = leaf(torch.randn(3, 5, device=device)), leaf(torch.randn(3, 5, device=device))
    ops.sample_kl(mu, ls, ops.make_rng(0, device), per_latent=True).kl[1].backward()
    expected = torch.zeros_like(mu)
    expected[:, 1] = mu.detach()[:, 1]
    assert torch.equal(mu.grad, expected)
    assert not ls.grad[:, [0, 2, 3, 4]].any() and ls.grad[:, 1].all()


@pytest.mark.parametrize("which", ["z", "kl"])
def test_each_sampling_output_alone_carries_its_gradient(device, which):
    mu, log_sigma = torch.randn(6, 10, device=device), 0.3 * torch.randn(6, 10, device=device)
    grads = []
    for module in (ops, reference):
        m, ls = leaf(mu), leaf(log_sigma)
        getattr(module.sample_kl(m, ls, ops.make_rng(2, device)), which).sum().backward()
        grads.append((m.grad, ls.grad))
    for a, b in zip(*grads, strict=True):
        close(a, b, torch.float32, which)


@pytest.mark.usefixtures("needs_extension")  # autograd of the float32 twin cancels here
def test_kl_keeps_its_digits_near_collapse(device):
    """At log_sigma = x the gradient of KL is e^(2x) - 1, about 2x: exp followed by - 1 would leave noise."""
    x = torch.logspace(-7, -2, 101, device=device).repeat(2).view(2, -1)
    x[1] *= -1
    ls = leaf(x)
    ops.sample_kl(torch.zeros_like(x), ls, ops.make_rng(0, device)).kl.backward()
    assert torch.allclose(ls.grad.double(), torch.expm1(2 * x.double()), rtol=4e-7, atol=0)


def test_sigma_is_accurate_and_saturates(device):
    x = torch.linspace(-85, 43, 4001, device=device).view(1, -1)
    sigma2 = ops.sample_kl(torch.zeros_like(x), x, ops.make_rng(0, device)).moments[2]
    exact = (2 * x.double()).exp()[0]
    normal = exact > 1e-37
    assert ((sigma2.double() - exact) / exact)[normal].abs().max().item() < 4e-7
    ends = torch.tensor([[-math.inf, -200.0, 89.0, 200.0, math.inf, math.nan]], device=device)
    sigma2 = ops.sample_kl(torch.zeros_like(ends), ends, ops.make_rng(0, device)).moments[2].tolist()
    assert sigma2[:5] == [0.0, 0.0, math.inf, math.inf, math.inf] and math.isnan(sigma2[5])


def test_sigma_reaches_the_largest_floats(device):
    """Up to e^88.7, of which 2^n, the power of two nearest to it, is no longer a float."""
    x = torch.linspace(88, 88.7, 64, device=device).repeat(50, 1)
    eps = ops.philox_normal(ops.make_rng(0, device), 50, 64)
    z = ops.sample_kl(torch.zeros_like(x), x, ops.make_rng(0, device)).z
    exact = x.double().exp() * eps.double()
    fits = exact.abs() < 3e38
    assert fits.sum() > 1000 and torch.allclose(z[fits].double(), exact[fits], rtol=4e-7, atol=0)
    assert not z.isnan().any()


def test_without_advance_the_noise_repeats(device):
    mu = torch.zeros(3, 5, device=device)
    rng = ops.make_rng(1, device)
    a = ops.sample_kl(mu, mu, rng, advance=False).z
    b = ops.sample_kl(mu, mu, rng).z
    c = ops.sample_kl(mu, mu, rng).z
    assert torch.equal(a, b) and not torch.equal(b, c) and rng.tolist() == [1, 2]


def test_backward_uses_the_noise_of_its_own_forward(device):
    mu, ls = torch.zeros(4, 8, device=device), leaf(torch.zeros(4, 8, device=device))
    rng = ops.make_rng(3, device)
    first = ops.sample_kl(mu, ls, rng)
    ops.sample_kl(mu, ls, rng)
    first.z.sum().backward()
    assert torch.allclose(ls.grad, first.z)  # sigma eps, with sigma = 1 and mu = 0


# ---- gather ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 4, 4, 3), (4, 3, 5, 1), (3, 1, 1, 1), (2, 8, 8, 3), (6, 2, 3, 2)])
@pytest.mark.parametrize("flipped", [False, True])
def test_gather_matches_indexing(device, dtype, shape, flipped):
    g = torch.Generator().manual_seed(0)
    data = torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)
    index = torch.randint(0, shape[0], (7,), generator=g)
    flip = torch.rand(7, generator=g) < 0.5 if flipped else None
    rows = torch.stack([data[i].flip(1) if flipped and flip[n] else data[i] for n, i in enumerate(index)])
    expected = rows.permute(0, 3, 1, 2)
    for module in (ops, reference):
        x, got = module.gather(
            data.to(device), index.to(device), None if flip is None else flip.to(device), dtype=dtype
        )
        assert torch.equal(got.cpu(), expected)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert torch.equal(x.cpu(), (expected.to(wide) / 255).to(dtype))
        assert x.dtype == dtype and got.permute(0, 2, 3, 1).is_contiguous() and x.permute(0, 2, 3, 1).is_contiguous()


def test_gathered_rows_are_the_target_of_the_gathered_batch(device):
    data = torch.randint(0, 256, (9, 8, 8, 3), dtype=torch.uint8, device=device)
    flip = torch.arange(9, device=device) % 2 == 0
    x, rows = ops.gather(data, torch.arange(9, device=device), flip)
    zero = torch.zeros((), device=device)
    assert ops.balanced_loss(x, rows, zero, *scalars(device), logits=False, update=False).sse.item() == 0


@pytest.mark.parametrize("module", [ops, reference])
@pytest.mark.parametrize("bad", [-1, 4])
def test_gather_refuses_an_index_out_of_range(module, bad):
    with pytest.raises(IndexError, match=f"{bad} is out of range for 4 images"):
        module.gather(torch.zeros(4, 2, 2, 1, dtype=torch.uint8), torch.tensor([0, bad]))


# ---- determinism ----------------------------------------------------------------------------------------------------


def everything(device, dtype=torch.float32):
    """One step through all the ops; every tensor it made."""
    g = torch.Generator().manual_seed(4)
    wide = reference.sum_dtype(dtype)
    mu = leaf(torch.randn(100, 64, generator=g).to(device, wide))
    ls = leaf((0.3 * torch.randn(100, 64, generator=g)).to(device, wide))
    recon = leaf(torch.randn(100, 3, 32, 32, generator=g).to(device, dtype))
    target = torch.randint(0, 256, recon.shape, generator=g, dtype=torch.uint8).to(device)
    gamma2, skipped = scalars(device)
    rng = ops.make_rng(9, device)
    z, kl, moments = ops.sample_kl(mu, ls, rng)
    loss, sse, stats = ops.balanced_loss(recon, target, kl, gamma2, skipped, logits=True, update=True)
    (loss + (z * z).sum()).backward()
    return [z, kl, moments, loss, sse, stats, gamma2, skipped, rng, mu.grad, ls.grad, recon.grad]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])  # float64 shows all of the sums' bits
def test_same_bits_on_repeat(device, dtype):
    for a, b in zip(everything(device, dtype), everything(device, dtype), strict=True):
        assert torch.equal(a, b)


def test_same_bits_on_one_and_two_threads():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = everything("cpu")
        torch.set_num_threads(2)
        two = everything("cpu")
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)


SAME_BITS = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from test_ops import everything
import bvae._C
print(bvae._C.cpu_capability())
torch.save([t.detach() for t in everything("cpu", torch.bfloat16)], sys.argv[1])
"""


@pytest.mark.usefixtures("needs_extension")
def test_instruction_sets_agree(tmp_path):
    """The fused sets to the bit, the baseline without fused multiply-add to rounding, and not to the bit."""
    results = {}
    for wish in ("avx512", "avx2", "baseline"):
        path = tmp_path / wish
        env = {**os.environ, "BVAE_CPU_CAPABILITY": wish, "OMP_NUM_THREADS": "1"}
        run = subprocess.run(
            [sys.executable, "-c", SAME_BITS, path, Path(__file__).parent],
            env=env,
            capture_output=True,
            text=True,
            check=True,
        )
        results.setdefault(run.stdout.strip(), torch.load(path))
    baseline = results.pop("baseline")
    fused = list(results.values())
    for tensors in fused:
        for a, b, c in zip(tensors, fused[0], baseline, strict=True):
            assert torch.equal(a, b)
            assert torch.allclose(a.double(), c.double(), rtol=1e-2 if a.dtype == torch.bfloat16 else 1e-5, atol=1e-6)
        # The same bits would mean that the compiler was not told of the instruction: it then multiplies and adds apart.
        assert any(not torch.equal(a, c) for a, c in zip(tensors, baseline, strict=True))


# ---- the contract with torch ----------------------------------------------------------------------------------------


def test_gradcheck(device):
    mu = leaf(torch.randn(3, 5, dtype=torch.float64, device=device))
    ls = leaf(0.3 * torch.randn(3, 5, dtype=torch.float64, device=device))
    recon = leaf(torch.randn(3, 7, dtype=torch.float64, device=device))
    target = torch.rand(3, 7, dtype=torch.float64, device=device)

    for per_latent in (False, True):

        def sample(mu, ls, per_latent=per_latent):
            return ops.sample_kl(mu, ls, ops.make_rng(4, device), per_latent=per_latent)[:2]

        assert torch.autograd.gradcheck(sample, (mu, ls))
    for logits in (True, False):

        def loss(recon, kl, logits=logits):
            out = ops.balanced_loss(recon, target, kl, *scalars(device), logits=logits, update=True, kl_weight=0.7)
            return out[:2]

        kl = leaf(torch.tensor(2.0, dtype=torch.float64, device=device))
        assert torch.autograd.gradcheck(loss, (recon, kl))


@pytest.mark.usefixtures("needs_extension")  # the twin is plain autograd and can be differentiated again
def test_double_backward_is_refused(device):
    mu, ls = leaf(torch.zeros(2, 4, device=device)), leaf(torch.zeros(2, 4, device=device))
    z, kl, _ = ops.sample_kl(mu, ls, ops.make_rng(0, device))
    (g,) = torch.autograd.grad(z.square().sum() + kl, ls, create_graph=True)  # a first derivative is fine
    with pytest.raises(RuntimeError, match="sample_kl has no second derivative"):
        g.sum().backward()
    recon = leaf(torch.zeros(2, 4, device=device))
    out = ops.balanced_loss(
        recon, torch.ones(2, 4, device=device), kl.detach(), *scalars(device), logits=True, update=False
    )
    (g,) = torch.autograd.grad(out.loss, recon, create_graph=True)
    with pytest.raises(RuntimeError, match="balanced_loss has no second derivative"):
        g.sum().backward()


@pytest.mark.usefixtures("needs_extension")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(device, dtype):
    raw = torch.ops.bvae
    wide = torch.float32
    mu, ls = torch.randn(5, 6, device=device, dtype=dtype), torch.randn(5, 6, device=device, dtype=dtype)
    state = ops.make_rng(1, device)
    recon = torch.randn(2, 3, 4, 5, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    target = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8, device=device)
    kl = torch.tensor(1.0, device=device, dtype=wide)
    gamma2, skipped = scalars(device)
    data = torch.randint(0, 256, (4, 6, 5, 3), dtype=torch.uint8, device=device)
    index = torch.tensor([3, 0], device=device)
    flip = torch.tensor([True, False], device=device)
    opcheck(raw.sample_kl, (mu, ls, state, 2, True))
    opcheck(raw.sample_kl, (mu.t(), ls.t(), state, 0, False))
    opcheck(raw.sample_kl_backward, (mu, kl, mu, ls, state, 2))
    opcheck(raw.sample_kl_backward, (None, kl, mu, ls, state, 2))
    opcheck(raw.sample_kl_backward, (mu, kl.expand(6), mu, ls, state, 2))
    opcheck(raw.philox_words, (state, 3, 5, 0))
    opcheck(raw.philox_normal, (state, 3, 5, 0))
    opcheck(raw.balanced_loss, (recon, target, kl, gamma2, skipped, None, 1.0, True, True, 0.99, 1e-8, True))
    opcheck(raw.balanced_loss, (recon, target, kl, gamma2, skipped, kl.float(), 1.0, True, True, 0.99, 1e-8, False))
    used = torch.tensor([0.3, 2.0], device=device)
    opcheck(raw.balanced_loss_backward, (kl, None, recon, target, used, 1.0, True))
    opcheck(raw.balanced_loss_backward, (kl, kl, recon[..., ::2], target[..., ::2], used, 1.0, False))
    opcheck(raw.update_gamma2, (gamma2, skipped, kl, torch.tensor(3, device=device), 0.99, 1e-8, False))
    opcheck(raw.gather, (data, index, flip, dtype))
    opcheck(raw.gather, (data, index, None, dtype))


@pytest.mark.usefixtures("needs_extension")
def test_compiles_in_one_graph(device):
    """torch.compile(fullgraph=True): same values, gradients, gamma2 and noise as eager, twice over."""

    def step(mu, ls, recon, data, index, rng, gamma2, skipped):
        _, rows = ops.gather(data, index)
        z, kl, moments = ops.sample_kl(mu, ls, rng)
        loss, sse, stats = ops.balanced_loss(recon, rows, kl, gamma2, skipped, logits=True, update=True)
        return loss + (z * z).sum(), sse, stats, moments

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for f in (step, compiled):
        g = torch.Generator().manual_seed(0)
        mu, ls = leaf(torch.randn(4, 6, generator=g).to(device)), leaf(torch.randn(4, 6, generator=g).to(device))
        recon = leaf(torch.randn(4, 3, 8, 8, generator=g).to(device))
        data = torch.randint(0, 256, (5, 8, 8, 3), generator=g, dtype=torch.uint8).to(device)
        index = torch.tensor([4, 0, 1, 1], device=device)
        rng, (gamma2, skipped) = ops.make_rng(1, device), scalars(device)
        record = []
        for _ in range(2):
            out = f(mu, ls, recon, data, index, rng, gamma2, skipped)
            grads = torch.autograd.grad(out[0], (mu, ls, recon))
            record += [t.detach().clone() for t in (*out, *grads, rng, gamma2, skipped)]
        results.append(record)
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-6)
    assert results[1][-3].tolist() == [1, 2]


@pytest.mark.usefixtures("needs_extension")
def test_compiled_double_backward_is_refused():
    torch._dynamo.reset()
    mu, ls = leaf(torch.zeros(2, 4)), leaf(torch.zeros(2, 4))
    f = torch.compile(lambda m, s, rng: ops.sample_kl(m, s, rng).kl, fullgraph=True, backend="aot_eager")
    (g,) = torch.autograd.grad(f(mu, ls, ops.make_rng(0)), ls, create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward|second derivative"):
        g.sum().backward()


@pytest.mark.parametrize("module", [ops, reference])
def test_autocast_samples_in_float32(device, module):
    mu, ls = torch.randn(3, 4, device=device).bfloat16(), torch.randn(3, 4, device=device).bfloat16()
    with torch.autocast(device, dtype=torch.bfloat16):
        z, kl, _ = module.sample_kl(leaf(mu), leaf(ls), ops.make_rng(0, device))
        assert z.dtype == torch.float32
        recon = torch.randn(3, 4, device=device).bfloat16()
        out = module.balanced_loss(recon, recon, kl, *scalars(device), logits=True, update=False)
        assert out.loss.dtype == torch.float32
    expected = module.sample_kl(mu.float(), ls.float(), ops.make_rng(0, device))
    assert torch.equal(z, expected.z) and torch.equal(kl, expected.kl)
    assert module.sample_kl(mu, ls, ops.make_rng(0, device)).z.dtype == torch.bfloat16


@pytest.mark.parametrize("module", [ops, reference])
def test_misfits_are_refused(module):
    mu, rng = torch.zeros(2, 3), ops.make_rng(0)
    with pytest.raises(RuntimeError, match=r"one shape"):
        module.sample_kl(mu, torch.zeros(2, 4), rng)
    with pytest.raises(RuntimeError, match=r"one dtype"):
        module.sample_kl(mu, mu.bfloat16(), rng)
    with pytest.raises(RuntimeError, match=r"one shape"):
        module.balanced_loss(mu, torch.zeros(3, 2), torch.zeros(()), *scalars("cpu"), logits=True, update=False)
    with pytest.raises(RuntimeError, match=r"\[N, H, W, C\]"):
        module.gather(mu, torch.tensor([0]))


@pytest.mark.usefixtures("needs_extension")
def test_every_op_answers_for_cuda_even_in_a_cpu_only_build():
    """Where a CUDA tensor gets 'rebuild with nvcc' rather than the dispatcher's own error."""
    for name in ("sample_kl", "sample_kl_backward", "philox_words", "philox_normal", "balanced_loss",
                 "balanced_loss_backward", "update_gamma2", "gather"):  # fmt: skip
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"bvae::{name}", "CUDA"), name


FALLBACK = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from bvae import _extension, ops, reference
    import torch
    mu = torch.zeros(2, 3, requires_grad=True)
    z, kl, m = ops.sample_kl(mu, mu, ops.make_rng(0))
    out = ops.balanced_loss(z, torch.zeros(2, 3), kl, torch.tensor(1.0), torch.tensor(0), logits=True, update=True)
    out.loss.backward()
    ops.update_gamma2(torch.tensor(1.0), torch.tensor(0), out.sse, torch.tensor(6))
    x, rows = ops.gather(torch.zeros(2, 4, 4, 3, dtype=torch.uint8), torch.tensor([1]))
    assert torch.equal(ops.philox_normal(ops.make_rng(0), 2, 3), z.detach())
    assert torch.isfinite(mu.grad).all() and x.shape == (1, 3, 4, 4)
said = [str(w.message) for w in caught if "bvae" in str(w.message)]
print(ops.EXTENSION_ERROR, len(said), said[0])
"""


def test_twin_takes_over_without_the_extension():
    env = {**os.environ, "BVAE_DISABLE_EXTENSION": "1"}
    run = subprocess.run([sys.executable, "-c", FALLBACK], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("BVAE_DISABLE_EXTENSION=1 1 bvae runs its ops as plain PyTorch")


@pytest.mark.usefixtures("needs_extension")
def test_an_extension_of_older_sources_is_not_used(monkeypatch):
    assert _extension.load() is None
    monkeypatch.setattr(torch.ops, "bvae", types.SimpleNamespace(sample_kl=None))
    assert "older sources" in _extension.load()


# ---- GPU only -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_replayed_graph_draws_new_noise():
    mu = torch.zeros(32, 64, device="cuda")
    rng = ops.make_rng(0, "cuda")
    gamma2, skipped = scalars("cuda", 1.0)
    target = torch.zeros(32, 64, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        z, kl, _ = ops.sample_kl(mu, mu, rng)
        ops.balanced_loss(z, target, kl, gamma2, skipped, logits=True, update=False)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z, kl, _ = ops.sample_kl(mu, mu, rng)
        ops.balanced_loss(z, target, kl, gamma2, skipped, logits=True, update=True)
    start = rng[1].item()
    noises, gammas = [], [gamma2.item()]
    for _ in range(3):
        graph.replay()
        noises.append(z.clone())
        gammas.append(gamma2.item())
    assert rng[1].item() == start + 3
    assert gammas == sorted(gammas, reverse=True) and len(set(gammas)) == 4
    for i, noise in enumerate(noises):
        expected = ops.philox_normal(torch.tensor([0, start + i], device="cuda"), 32, 64)
        assert torch.equal(noise, expected)


@pytest.mark.gpu
def test_streams_do_not_disturb_each_other():
    recon = [torch.randn(64, 3, 64, 64, device="cuda") for _ in range(4)]
    target = torch.randint(0, 256, (64, 3, 64, 64), dtype=torch.uint8, device="cuda")
    zero = torch.zeros((), device="cuda")

    def run(i):
        return ops.balanced_loss(recon[i], target, zero, *scalars("cuda"), logits=True, update=True)

    expected = [run(i).loss.item() for i in range(4)]
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    outs = []
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                outs.append((i, run(i).loss))
    torch.cuda.synchronize()
    for i, loss in outs:
        assert loss.item() == expected[i]


@pytest.mark.gpu
def test_ops_do_not_synchronise():
    mu = leaf(torch.zeros(8, 6, device="cuda"))
    target = torch.zeros(8, 6, dtype=torch.uint8, device="cuda")
    gamma2, skipped = scalars("cuda")
    rng, count = ops.make_rng(0, "cuda"), torch.tensor(48, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        z, kl, _ = ops.sample_kl(mu, mu, rng)
        out = ops.balanced_loss(z, target, kl, gamma2, skipped, logits=True, update=True)
        out.loss.backward()
        ops.update_gamma2(gamma2, skipped, out.sse, count)
    finally:
        torch.cuda.set_sync_debug_mode("default")
