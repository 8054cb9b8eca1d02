"""The fused ops in plain PyTorch: their definition, and what runs where the extension could not be built.

Same signatures and semantics as bvae.ops (see docs/ops.md), on any device, differentiable by autograd. Equations:
A. Asperti, M. Trentin, "Balancing Reconstruction Error and Kullback-Leibler Divergence in Variational Autoencoders",
IEEE Access 8, 2020 (arXiv 2002.07514). Noise: Philox4x32-10 of Salmon et al., SC 2011, and the Box-Muller transform.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

WORD = 0xFFFFFFFF


class SampleKL(NamedTuple):
    """What `sample_kl` returns: z as mu; kl, a scalar or [k]; moments [4, k]."""

    z: Tensor
    kl: Tensor
    moments: Tensor


class BalancedLossOut(NamedTuple):
    """What `balanced_loss` returns: loss and sse, scalars; stats [4] = mse_batch, kl/B, gamma2 used, nll."""

    loss: Tensor
    sse: Tensor
    stats: Tensor


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type sums are kept and returned in: float32, for float64 inputs float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_inputs(mu: Tensor, log_sigma: Tensor) -> tuple[Tensor, Tensor]:
    """mu and log_sigma in float32 where autocast is on: sigma and KL need the digits, and they cost next to nothing."""
    if torch.is_autocast_enabled(mu.device.type):
        if mu.dtype in (torch.bfloat16, torch.float16):
            mu = mu.float()
        if log_sigma.dtype in (torch.bfloat16, torch.float16):
            log_sigma = log_sigma.float()
    return mu, log_sigma


# ---- noise ----------------------------------------------------------------------------------------------------------


def make_rng(seed: int, device: torch.device | str | None = None) -> Tensor:
    """The state of the noise generator: int64 [2] = {seed, offset 0}, the seed taken modulo 2^64."""
    wrapped = (seed + 2**63) % 2**64 - 2**63
    return torch.tensor([wrapped, 0], dtype=torch.int64, device=device)


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four uint32 words, as int64, from a counter of four and a key of two (broadcast together)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # Products wrap modulo 2^64; masking after the shift gives the high word whatever the sign.
        p0 = c0 * 0xD2511F53
        p1 = c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & WORD) ^ c1 ^ k0, p1 & WORD, ((p0 >> 32) & WORD) ^ c3 ^ k1, p0 & WORD
        k0 = (k0 + 0x9E3779B9) & WORD
        k1 = (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def _quads(rng: Tensor, rows: int, k: int, first_sample: int) -> tuple[Tensor, ...]:
    seed, offset = rng[0], rng[1]
    sample = (torch.arange(rows, device=rng.device) + first_sample).view(-1, 1) & WORD
    quad = torch.arange((k + 3) // 4, device=rng.device).view(1, -1)
    counter = (quad, sample, offset & WORD, (offset >> 32) & WORD)
    return philox4x32(counter, (seed & WORD, (seed >> 32) & WORD))


def philox_words(rng: Tensor, rows: int, k: int, first_sample: int = 0) -> Tensor:
    """The uint32 words behind `philox_normal`, as int64 [rows, k]."""
    words = torch.stack(_quads(rng, rows, k, first_sample), dim=-1)
    return words.flatten(1)[:, :k].contiguous()


def philox_normal(rng: Tensor, rows: int, k: int, *, first_sample: int = 0) -> Tensor:
    """Standard normal noise, float32 [rows, k], that `sample_kl` would use now. Does not advance rng."""
    w = _quads(rng, rows, k, first_sample)
    normals = []
    for radius_word, angle_word in ((w[0], w[1]), (w[2], w[3])):
        u = radius_word.float() * 2**-32 + 2**-33  # in (0, 1]: rounded to float32 by definition, the rest is not
        radius = (-2 * u.double().log()).sqrt()
        angle = angle_word.double() * (2 * math.pi / 2**32)
        normals += [radius * angle.cos(), radius * angle.sin()]
    return torch.stack(normals, dim=-1).flatten(1)[:, :k].float().contiguous()


# ---- sampling and KL ------------------------------------------------------------------------------------------------


@torch.library.custom_op("bvae_reference::before", mutates_args=())
def _before(state: Tensor) -> Tensor:
    """A copy of `state` from before it moves.

    An op of its own because torch.compile would otherwise remake a plain clone in the backward, from the moved state.
    """
    return state.clone()


@_before.register_fake
def _(state: Tensor) -> Tensor:
    return torch.empty_like(state)


def kl(mu: Tensor, log_sigma: Tensor) -> Tensor:
    """KL(N(mu, sigma^2) || N(0, 1)) of every latent: 1/2 (mu^2 + sigma^2 - 2 log sigma - 1), in mu's shape."""
    return 0.5 * (mu.square() + (torch.expm1(2 * log_sigma) - 2 * log_sigma))


def sample_kl(
    mu: Tensor,
    log_sigma: Tensor,
    rng: Tensor,
    *,
    first_sample: int = 0,
    advance: bool = True,
    per_latent: bool = False,
) -> SampleKL:
    """z = mu + sigma eps and kl = sum of 1/2 (mu^2 + sigma^2 - 2 log sigma - 1). See `bvae.ops.sample_kl`."""
    if mu.shape != log_sigma.shape or mu.dim() < 1:
        raise RuntimeError("bvae: mu and log_sigma must have one shape [B, ...]")
    mu, log_sigma = autocast_inputs(mu, log_sigma)
    if mu.dtype != log_sigma.dtype:
        raise RuntimeError(f"bvae: mu and log_sigma must have one dtype, got {mu.dtype} and {log_sigma.dtype}")
    shape, dtype, sums = mu.shape, mu.dtype, sum_dtype(mu.dtype)
    batch, k = shape[0], math.prod(shape[1:])
    m, ls = mu.reshape(batch, k).to(sums), log_sigma.reshape(batch, k).to(sums)
    eps = philox_normal(_before(rng), batch, k, first_sample=first_sample).to(sums)
    if advance:
        rng[1] += 1
    sigma = ls.exp()
    z = (m + sigma * eps).to(dtype).view(shape)
    terms = kl(m, ls)
    with torch.no_grad():
        moments = torch.stack([m.sum(0), m.square().sum(0), sigma.square().sum(0), terms.sum(0)])
    return SampleKL(z, terms.sum(0) if per_latent else terms.sum(), moments)


# ---- the loss -------------------------------------------------------------------------------------------------------


def _over_255(x: Tensor) -> Tensor:
    """x / 255, correctly rounded. CUDA multiplies by the reciprocal of a number, but divides by a tensor of its own."""
    return x / torch.full((), 255.0, dtype=x.dtype, device=x.device)


def auto_kl_weight(side: int, latents: int) -> float:
    """(2*side/k)^2: 1 for 32x32 with 64 latents, 4 for 64x64 with 64."""
    return (2 * side / latents) ** 2


def gaussian_nll(sse: Tensor, gamma2: Tensor, batch: int, per_sample: int) -> Tensor:
    """Negative log-likelihood per sample, in nats: sse / (2 B gamma2) + D/2 log(2 pi gamma2)."""
    constant = 0.5 * per_sample * (gamma2.log() + math.log(2 * math.pi))
    return sse / (2 * batch * gamma2) + constant if batch else sse + constant


class _Times(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.factor = factor
        return x * factor

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def _times(x: Tensor, factor: Tensor) -> Tensor:
    """x * factor, where factor is a constant in the gradient that comes from a state.

    The plain product would save the factor for its backward, and activation checkpointing would make it again from the
    state after the step.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return x * factor
    return _Times.apply(x, factor)


def unit_target(target: Tensor, dtype: torch.dtype) -> Tensor:
    """A loss's target in `dtype`, without gradient: uint8 as value / 255."""
    x = target.detach().to(dtype)
    return _over_255(x) if target.dtype == torch.uint8 else x


def gamma2_in_use(gamma2: Tensor, mse: Tensor, floor: float) -> Tensor:
    """The gamma2 that a loss uses: 0 stands for one that has not started, and then it is the batch's own mse."""
    return torch.where(gamma2 == 0, mse.detach().clamp(min=floor).to(gamma2.dtype), gamma2)


def update_gamma2(
    gamma2: Tensor,
    skipped: Tensor,
    sse: Tensor,
    count: Tensor,
    *,
    decay: float = 0.99,
    floor: float = 1e-8,
    monotone: bool = True,
) -> None:
    """gamma2 <- max(floor, min(gamma2, decay gamma2 + (1 - decay) sse / count)). See `bvae.ops.update_gamma2`."""
    with torch.no_grad():
        some = count != 0
        mse = sse.double() / count.double()
        finite = mse.isfinite()
        now = gamma2.double()
        mixed = decay * now + (1 - decay) * mse
        moved = torch.where(now == 0, mse, torch.minimum(now, mixed) if monotone else mixed)
        moved = moved.clamp(min=floor).to(gamma2.dtype)
        gamma2.copy_(torch.where(some & finite, moved, gamma2))
        skipped.add_((some & ~finite).to(skipped.dtype))


def balanced_loss(
    recon: Tensor,
    target: Tensor,
    kl: Tensor,
    gamma2: Tensor,
    skipped: Tensor,
    *,
    kl_weight: float = 1.0,
    weight: Tensor | None = None,
    logits: bool,
    update: bool,
    decay: float = 0.99,
    floor: float = 1e-8,
    monotone: bool = True,
) -> BalancedLossOut:
    """loss = sse / (2 B gamma2) + kl_weight weight kl / B + D/2 log(2 pi gamma2). See `bvae.ops.balanced_loss`."""
    if recon.shape != target.shape or recon.dim() < 1:
        raise RuntimeError("bvae: the reconstruction and its target must have one shape [B, ...]")
    sums = sum_dtype(recon.dtype)
    batch, numel, per_sample = recon.shape[0], recon.numel(), math.prod(recon.shape[1:])
    x = unit_target(target, sums)
    x_hat = recon.to(sums).sigmoid() if logits else recon.to(sums)
    sse = (x_hat - x).square().sum()
    mse = (sse / max(numel, 1)).detach()
    used = gamma2_in_use(_before(gamma2.detach()).reshape(()), mse, floor)
    g2, kl = used.to(sums), kl.to(sums).reshape(())
    nll = gaussian_nll(_times(sse, 1 / g2), torch.ones_like(g2), batch, per_sample) + 0.5 * per_sample * g2.log()
    kl_mean = kl / batch if batch else 0 * kl
    moved = torch.ones_like(used) if weight is None else _before(weight.detach()).reshape(())
    loss = nll + _times(kl_mean, kl_weight * moved.to(sums))
    with torch.no_grad():
        stats = torch.stack([mse.float(), kl_mean.float(), used, nll.float()])
    if update:
        count = torch.tensor(numel, dtype=torch.int64, device=recon.device)
        update_gamma2(gamma2, skipped, sse.detach(), count, decay=decay, floor=floor, monotone=monotone)
    return BalancedLossOut(loss, sse, stats)


# ---- gather ---------------------------------------------------------------------------------------------------------


def gather(
    data: Tensor, index: Tensor, flip: Tensor | None = None, *, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Rows of uint8 [N, H, W, C] as a batch in [0, 1] and as uint8, both [B, C, H, W]. See `bvae.ops.gather`."""
    if data.dim() != 4 or data.dtype != torch.uint8 or not data.is_contiguous():
        raise RuntimeError("bvae: data must be a contiguous uint8 array [N, H, W, C]")
    if index.dim() != 1 or index.dtype != torch.int64:
        raise RuntimeError("bvae: index must be int64 [B]")
    if index.device.type == "cpu" and not torch.compiler.is_compiling():
        bad = index[(index < 0) | (index >= data.shape[0])]
        if bad.numel():
            raise IndexError(f"bvae: index {int(bad[0])} is out of range for {data.shape[0]} images")
    rows = data.index_select(0, index)
    if flip is not None:
        rows = torch.where(flip.view(-1, 1, 1, 1), rows.flip(2), rows)
    rows = rows.permute(0, 3, 1, 2)
    # Division in float32 and one rounding to dtype, as the extension does.
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return _over_255(rows.to(wide)).to(dtype), rows


# ---- batch norm with ReLU, residual blocks --------------------------------------------------------------------------


def batch_norm_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running: Sequence[Tensor],
    counters: Tensor,
    momentum: float,
    eps: float,
    *,
    offset: Tensor | None = None,
    through: bool = False,
) -> Any:
    """relu(norm(x + offset)), with `through` x + offset too; `counters` stay. See layer_ops.batch_norm_relu."""
    mean, var, gathered = running
    gathered.lerp_(torch.ones_like(gathered), momentum)
    if offset is not None:
        x = (x + offset.view(-1, 1, 1)).to(x.dtype)
    y = F.relu(F.batch_norm(x, mean, var, weight, bias, True, momentum, eps))
    return (y, x) if through else y


def add_biased(a: Tensor, b: Tensor, bias_a: Tensor, bias_b: Tensor, counters: Tensor) -> Tensor:
    """a + b + bias_a + bias_b; `counters` stay as they are. See `bvae.models.layer_ops.add_biased`."""
    return (a + b + (bias_a + bias_b).view(-1, 1, 1)).to(a.dtype)


# ---- dense layers ---------------------------------------------------------------------------------------------------


def linear_relu(x: Tensor, weight: Tensor, bias: Tensor, counters: Tensor) -> Tensor:
    """relu(x weight^T + bias); `counters` stay as they are. See `bvae.models.layer_ops.linear_relu`."""
    return F.relu(F.linear(x, weight, bias))


# ---- Adam -----------------------------------------------------------------------------------------------------------


def all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Whether |x| < 2^64 for every element. See `bvae.ops.all_finite`."""
    return torch.stack([(t.float().abs() < 2.0**64).all() for t in tensors]).all()


@torch.no_grad()
def adam(
    parameters: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    halves: Sequence[Tensor | None],
    steps: Tensor,
    good: Tensor,
    lr: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """One step of Adam on all parameters. See `bvae.ops.adam`."""
    beta1, beta2 = betas
    steps += torch.stack([good if grad is not None else torch.zeros_like(good) for grad in grads])
    t = steps.double()
    step_sizes = (lr.double() / (1 - beta1**t)).to(lr.dtype)
    inverses = (1 - beta2**t).rsqrt().to(lr.dtype)
    for i, (p, grad, m, v, half) in enumerate(zip(parameters, grads, exp_avgs, exp_avg_sqs, halves, strict=True)):
        if grad is None:
            continue
        g = grad.to(p.dtype)
        next_m = beta1 * m + (1 - beta1) * g
        next_v = beta2 * v + (1 - beta2) * g * g
        next_p = p - step_sizes[i] * next_m / (next_v.sqrt() * inverses[i] + eps)
        for old, new in ((m, next_m), (v, next_v), (p, next_p)):
            old.copy_(torch.where(good, new, old))
        if half is not None:
            half.copy_(torch.where(good, p, half))


# ---- the beginning and the end of a step ----------------------------------------------------------------------------


@torch.no_grad()
def copy_all(to: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    """Copies each tensor of `source` into its fellow in `to`. See `bvae.ops.copy_all`."""
    for copy, tensor in zip(to, source, strict=True):
        copy.copy_(tensor)


@torch.no_grad()
def end_step(
    good: Tensor,
    parts: Tensor,
    moments: Tensor | None,
    sum_parts: Tensor,
    sum_moments: Tensor,
    counts: Tensor,
    trouble: Tensor,
    state: Sequence[Tensor],
    kept: Sequence[Tensor],
) -> None:
    """Adds a good step's figures to their sums; of a bad one puts the state back. See `bvae.ops.end_step`."""
    bad = ~good
    # masked_fill, not where: a number given to where becomes a tensor on the host, which CUDA would wait for.
    sum_parts += parts.masked_fill(bad, 0.0)
    if moments is not None:
        sum_moments += moments.masked_fill(bad, 0.0)
    counts += torch.stack([good, bad])
    trouble.add_(bad, alpha=1.25).sub_(0.25).clamp_(min=0)
    for tensor, value in zip(state, kept, strict=True):
        tensor.copy_(torch.where(good, tensor, value))
