"""The fused operations, on CPU and CUDA: sampling with KL, the balanced loss with gamma2, the batch gather, Adam.

Each function runs the compiled extension, or its plain twin in bvae.reference where the extension is not there
(`EXTENSION_ERROR` then says why). docs/ops.md is the contract. On CUDA none of them synchronises with the host, and
all are safe inside a CUDA graph.

Equations: A. Asperti, M. Trentin, "Balancing Reconstruction Error and Kullback-Leibler Divergence in Variational
Autoencoders", IEEE Access 8, 2020 (arXiv 2002.07514).
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bvae import _extension, reference
from bvae.reference import BalancedLossOut, SampleKL, autocast_inputs, make_rng, sum_dtype

__all__ = [
    "EXTENSION_ERROR",
    "BalancedLossOut",
    "SampleKL",
    "adam",
    "all_finite",
    "balanced_loss",
    "copy_all",
    "end_step",
    "gather",
    "make_rng",
    "philox_normal",
    "philox_words",
    "sample_kl",
    "update_gamma2",
]

EXTENSION_ERROR: str | None = _extension.load()
if EXTENSION_ERROR is not None:
    warnings.warn(
        f"bvae runs its ops as plain PyTorch, without the compiled extension: {EXTENSION_ERROR}", stacklevel=2
    )

_raw = torch.ops.bvae


# ---- double backward ------------------------------------------------------------------------------------------------


class _FirstDerivative(torch.autograd.Function):
    """The result of a backward op, tied to its inputs by a node that refuses to be differentiated."""

    @staticmethod
    def forward(ctx: Any, name: str, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.name = name
        return tensors[:count]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(f"bvae: {ctx.name} has no second derivative; its backward cannot be differentiated")


def first_derivative(name: str, grads: tuple[Tensor | None, ...], *inputs: Tensor | None) -> Any:
    # Gradients are recorded inside a backward only under create_graph=True.
    if not torch.is_grad_enabled():
        return grads
    return _FirstDerivative.apply(name, len(grads), *grads, *inputs)


def _transformed() -> bool:
    """Whether torch.func (grad, vmap, jacrev ...) runs the caller: it can transform the plain twins alone."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


# ---- sampling and KL ------------------------------------------------------------------------------------------------


class _SampleKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, mu: Tensor, log_sigma: Tensor, rng: Tensor, first_sample: int, advance: bool, per_latent: bool
    ) -> Any:
        z, kl, moments, state = _raw.sample_kl(mu, log_sigma, rng, first_sample, advance)
        if per_latent:
            kl = moments[3].clone()
        ctx.save_for_backward(mu, log_sigma, state)
        ctx.first_sample = first_sample
        ctx.mark_non_differentiable(moments)
        if not torch.compiler.is_compiling():  # the compiler fills absent gradients with zeros itself
            ctx.set_materialize_grads(False)
        return z, kl, moments

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor | None, grad_kl: Tensor | None, _: Any) -> Any:
        mu, log_sigma, state = ctx.saved_tensors
        grads = _raw.sample_kl_backward(grad_z, grad_kl, mu, log_sigma, state, ctx.first_sample)
        grads = first_derivative("sample_kl", grads, grad_z, grad_kl, mu, log_sigma)
        return grads[0], grads[1], None, None, None, None


def sample_kl(
    mu: Tensor,
    log_sigma: Tensor,
    rng: Tensor,
    *,
    first_sample: int = 0,
    advance: bool = True,
    per_latent: bool = False,
) -> SampleKL:
    """Samples the posterior and sums its KL divergence from N(0, I), in one launch.

        z = mu + sigma eps,   kl = sum_ij 1/2 (mu_ij^2 + sigma_ij^2 - 2 log sigma_ij - 1)

    Args:
        mu, log_sigma: [B, ...], one shape and dtype (float32, float64, bfloat16, float16), any strides; seen as
            [B, k]. Under autocast they are computed in float32.
        rng: int64 [2] from `make_rng`, on the same device. eps depends on the seed, the offset, the sample's place in
            the global batch and the latent; not on device, batch split or thread count.
        first_sample: the place of row 0 in the global batch (this rank's first row).
        advance: add 1 to the offset, in place on the device, so that the next call draws other noise.
        per_latent: return the kl of every latent by itself.

    Returns:
        z, mu's shape and dtype, contiguous; kl, a scalar, summed over batch and latents, or with `per_latent` [k],
        summed over the batch; moments [4, k], the sums over
        the batch of mu, mu^2, sigma^2 and kl, not differentiable. kl and moments are float32, for float64 inputs
        float64. z and kl have first derivatives only.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit; a CUDA tensor with a build without CUDA kernels.
    """
    if EXTENSION_ERROR is not None or _transformed():
        return reference.sample_kl(
            mu, log_sigma, rng, first_sample=first_sample, advance=advance, per_latent=per_latent
        )
    mu, log_sigma = autocast_inputs(mu, log_sigma)
    z, kl, moments = _SampleKL.apply(mu, log_sigma, rng, first_sample, advance, per_latent)
    return SampleKL(z, kl, moments)


def philox_normal(rng: Tensor, rows: int, k: int, *, first_sample: int = 0) -> Tensor:
    """The standard normal noise that `sample_kl` would use now: float32 [rows, k]. Does not advance rng."""
    if EXTENSION_ERROR is not None:
        return reference.philox_normal(rng, rows, k, first_sample=first_sample)
    return _raw.philox_normal(rng, rows, k, first_sample)


def philox_words(rng: Tensor, rows: int, k: int, first_sample: int = 0) -> Tensor:
    """The uint32 words behind `philox_normal`, as int64 [rows, k]; equal on every device. Does not advance rng."""
    if EXTENSION_ERROR is not None:
        return reference.philox_words(rng, rows, k, first_sample)
    return _raw.philox_words(rng, rows, k, first_sample)


# ---- the loss -------------------------------------------------------------------------------------------------------


class _BalancedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        recon: Tensor,
        target: Tensor,
        kl: Tensor,
        gamma2: Tensor,
        skipped: Tensor,
        weight: Tensor | None,
        kl_weight: float,
        logits: bool,
        update: bool,
        decay: float,
        floor: float,
        monotone: bool,
    ) -> Any:
        loss, sse, stats, used = _raw.balanced_loss(
            recon, target, kl, gamma2, skipped, weight, kl_weight, logits, update, decay, floor, monotone
        )
        if torch.compiler.is_compiling():
            ctx.save_for_backward(recon, target, used)
        else:
            # Not with the others: activation checkpointing would make it again, from the gamma2 after the step.
            ctx.save_for_backward(recon, target)
            ctx.used = used
            ctx.set_materialize_grads(False)
        ctx.kl_weight, ctx.logits, ctx.kl_shape = kl_weight, logits, kl.shape
        ctx.mark_non_differentiable(stats)
        return loss, sse, stats

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, grad_sse: Tensor | None, _: Any) -> Any:
        recon, target, *kept = ctx.saved_tensors
        used = kept[0] if kept else ctx.used
        grads = _raw.balanced_loss_backward(grad_loss, grad_sse, recon, target, used, ctx.kl_weight, ctx.logits)
        grads = first_derivative("balanced_loss", grads, grad_loss, grad_sse, recon)
        return grads[0], None, grads[1].view(ctx.kl_shape), *(None,) * 9


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
    """The balanced loss of a batch, and the step of gamma2, in one pass over the images.

        loss = sse / (2 B gamma2) + kl_weight weight kl / B + D/2 log gamma2 + D/2 log 2 pi

    with gamma2 from before the step, a constant in the gradient; D is the number of elements of one sample. Then, with
    `update`, gamma2 <- max(floor, min(gamma2, decay gamma2 + (1 - decay) sse / (B D))), in place; without `monotone`
    gamma2 may grow: max(floor, decay gamma2 + ...). A non-finite mse leaves gamma2 as it was and adds 1 to `skipped`.
    An empty batch has sse 0, moves nothing and is not counted. A gamma2 of 0 has not started: the loss uses the batch's
    own sse / (B D), of at least `floor`, and with `update` gamma2 becomes that.

    Args:
        recon: [B, ...] float32, float64, bfloat16 or float16: logits (the sigmoid is applied here) or values.
        target: recon's shape; uint8 (read as target / 255) or any float. Gets no gradient.
        kl: scalar, summed over the batch, as `sample_kl` returns it.
        gamma2: float32 scalar, an estimate of the mse per element. skipped: int64 scalar.
        kl_weight: weight of the KL term. weight: float32 scalar on the device, multiplies it; None stands for 1. A
            constant in the gradient.
        decay, floor, monotone: of gamma2's step, as above.

    Returns:
        loss and sse (the batch's sum of squares), scalars with first derivatives, float32 or for float64 recon float64;
        stats, float32 [4] = mse of the batch, kl / B, gamma2 as used, loss without the KL term, not differentiable.
        The gradient of recon has its dtype and layout.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit; a CUDA tensor with a build without CUDA kernels.
    """
    if EXTENSION_ERROR is not None or _transformed():
        return reference.balanced_loss(
            recon, target, kl, gamma2, skipped, kl_weight=kl_weight, weight=weight, logits=logits, update=update,
            decay=decay, floor=floor, monotone=monotone,
        )  # fmt: skip
    sums = sum_dtype(recon.dtype)
    if kl.dtype != sums:
        kl = kl.to(sums)
    loss, sse, stats = _BalancedLoss.apply(
        recon, target, kl, gamma2, skipped, weight, kl_weight, logits, update, decay, floor, monotone
    )
    return BalancedLossOut(loss, sse, stats)


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
    """One step of gamma2 from a sum of squares pooled over ranks or accumulated batches, in place on the device.

    Args:
        gamma2: float32 scalar. skipped: int64 scalar; counts the steps refused because sse / count was not finite.
        sse: float32 or float64 scalar. count: the number of elements it sums over, int64 or float64 scalar; where it
            is 0 nothing happens.
        decay, floor, monotone: as in `balanced_loss`.
    """
    if EXTENSION_ERROR is not None:
        return reference.update_gamma2(gamma2, skipped, sse, count, decay=decay, floor=floor, monotone=monotone)
    return _raw.update_gamma2(gamma2, skipped, sse.detach(), count, decay, floor, monotone)


# ---- gather ---------------------------------------------------------------------------------------------------------


def gather(
    data: Tensor, index: Tensor, flip: Tensor | None = None, *, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Draws a batch out of a resident uint8 array, in one launch.

    Args:
        data: uint8 [N, H, W, C], contiguous. index: int64 [B], each in [0, N). flip: bool [B], True mirrors that
            image left to right.
        dtype: of x: float32, float64, bfloat16 or float16.

    Returns:
        x: [B, C, H, W] in `dtype`, data / 255, in channels_last memory.
        rows: uint8 [B, C, H, W], a view of NHWC memory with the same flips: the target for `balanced_loss`.

    Raises:
        IndexError: an index out of range, on the CPU. On CUDA it fails a device-side assertion instead, which surfaces
            at the next synchronisation.
        RuntimeError: shapes, dtypes or devices that do not fit; a CUDA tensor with a build without CUDA kernels.
    """
    if EXTENSION_ERROR is not None:
        return reference.gather(data, index, flip, dtype=dtype)
    if torch.compiler.is_compiling():
        return _raw.gather(data, index, flip, dtype)
    try:
        return _raw.gather(data, index, flip, dtype)
    except RuntimeError as error:
        if "is out of range for" in str(error):
            raise IndexError(str(error).splitlines()[0]) from None
        raise


# ---- Adam -----------------------------------------------------------------------------------------------------------


def all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Whether every element is finite, and so is its square in float32: a bool scalar on the device.

    That is, whether |x| < 2^64. Adam keeps running means of squares, which one infinite square would spoil for good.

    Args:
        tensors: at least one, all on one device, float32, bfloat16 or float16, of any strides and sizes.

    Raises:
        RuntimeError: no tensor, other dtypes, several devices; CUDA tensors with a build without CUDA kernels.
    """
    if EXTENSION_ERROR is not None:
        return reference.all_finite(tensors)
    return _raw.all_finite(tensors)


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
    """One step of Adam on all parameters, in place, in one pass over memory. Where `good` is false it changes nothing.

        m <- beta1 m + (1 - beta1) g        v <- beta2 v + (1 - beta2) g^2        t <- t + 1
        p <- p - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)

    D. P. Kingma, J. Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015, as torch.optim.Adam computes it.

    Args:
        parameters, exp_avgs (m), exp_avg_sqs (v): n each, float32, dense; those of a parameter in its layout.
        grads: n, float32, bfloat16 or float16, each of its parameter's shape; one in another layout is copied first. A
            parameter whose gradient is None stays as it is, with its moments and step count.
        halves: n, bfloat16 in the parameters' layout, to become copies of them, or None.
        steps: float32 [n], steps taken (t). good: bool scalar. lr: float32 scalar.

    Raises:
        RuntimeError: lengths, shapes, layouts, dtypes or devices that do not fit; CUDA tensors with a build without
            CUDA kernels.
    """
    if EXTENSION_ERROR is not None:
        return reference.adam(parameters, grads, exp_avgs, exp_avg_sqs, halves, steps, good, lr, betas=betas, eps=eps)
    halved = [i for i, half in enumerate(halves) if half is not None]
    copies = [half for half in halves if half is not None]
    return _raw.adam(parameters, grads, exp_avgs, exp_avg_sqs, copies, halved, steps, good, lr, *betas, eps)


# ---- the beginning and the end of a step ----------------------------------------------------------------------------


@torch.no_grad()
def copy_all(to: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    """Copies each tensor of `source` into its fellow in `to`, which is like it and dense: on CUDA in one launch."""
    if EXTENSION_ERROR is not None:
        return reference.copy_all(to, source)
    if to or source:  # the dispatcher knows no device of no tensor
        _raw.copy_all(to, source)


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
    """Ends an optimiser step in one launch: its figures are added to their sums, or its state is put back.

        good:  sum_parts += parts,  sum_moments += moments,  counts[0] += 1,  trouble <- max(0, trouble - 1/4)
        bad:   state <- kept,  counts[1] += 1,  trouble += 1

    Args:
        good: bool scalar on the device. parts: float32 [n]. moments: float32 of any shape, or None.
        sum_parts: float64 [n]. sum_moments: float64, of moments' shape. counts: float64 [2]. trouble: float64 scalar,
            which grows without end only where more than one step in five is bad.
        state, kept: dense tensors of any types, in pairs alike; `copy_all` makes `kept` before the step.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit; CUDA tensors with a build without CUDA kernels.
    """
    arguments = good, parts, moments, sum_parts, sum_moments, counts, trouble, state, kept
    if EXTENSION_ERROR is not None:
        return reference.end_step(*arguments)
    return _raw.end_step(*arguments)


# ---- shapes without data, for torch.compile -------------------------------------------------------------------------


def _fake_sample_kl(mu: Tensor, log_sigma: Tensor, rng: Tensor, first_sample: int, advance: bool) -> Any:
    sums = sum_dtype(mu.dtype)
    k = 1
    for size in mu.shape[1:]:
        k = k * size
    return (
        mu.new_empty(mu.shape),
        mu.new_empty((), dtype=sums),
        mu.new_empty((4, k), dtype=sums),
        torch.empty_like(rng),
    )


def _fake_sample_kl_backward(
    grad_z: Tensor | None, grad_kl: Tensor | None, mu: Tensor, log_sigma: Tensor, state: Tensor, first_sample: int
) -> Any:
    return mu.new_empty(mu.shape), mu.new_empty(mu.shape)


def _fake_balanced_loss(
    recon: Tensor,
    target: Tensor,
    kl: Tensor,
    gamma2: Tensor,
    skipped: Tensor,
    weight: Tensor | None,
    kl_weight: float,
    logits: bool,
    update: bool,
    decay: float,
    floor: float,
    monotone: bool,
) -> Any:
    def new(*size: int, dtype: torch.dtype) -> Tensor:
        return recon.new_empty(size, dtype=dtype)

    sums = sum_dtype(recon.dtype)
    return new(dtype=sums), new(dtype=sums), new(4, dtype=torch.float32), new(2, dtype=torch.float32)


def _fake_balanced_loss_backward(
    grad_loss: Tensor | None,
    grad_sse: Tensor | None,
    recon: Tensor,
    target: Tensor,
    used: Tensor,
    kl_weight: float,
    logits: bool,
) -> Any:
    return torch.empty_like(recon), recon.new_empty((), dtype=sum_dtype(recon.dtype))


def _fake_gather(data: Tensor, index: Tensor, flip: Tensor | None, dtype: torch.dtype) -> Any:
    _, height, width, channels = data.shape
    shape = (index.shape[0], height, width, channels)
    x = data.new_empty(shape, dtype=dtype).permute(0, 3, 1, 2)
    return x, data.new_empty(shape).permute(0, 3, 1, 2)


if EXTENSION_ERROR is None:
    torch.library.register_fake("bvae::sample_kl", _fake_sample_kl)
    torch.library.register_fake("bvae::sample_kl_backward", _fake_sample_kl_backward)
    torch.library.register_fake(
        "bvae::philox_words", lambda rng, rows, k, first_sample: rng.new_empty((rows, k), dtype=torch.int64)
    )
    torch.library.register_fake(
        "bvae::philox_normal", lambda rng, rows, k, first_sample: rng.new_empty((rows, k), dtype=torch.float32)
    )
    torch.library.register_fake("bvae::balanced_loss", _fake_balanced_loss)
    torch.library.register_fake("bvae::balanced_loss_backward", _fake_balanced_loss_backward)
    torch.library.register_fake("bvae::update_gamma2", lambda *args: None)
    torch.library.register_fake("bvae::gather", _fake_gather)
    torch.library.register_fake("bvae::all_finite", lambda tensors: tensors[0].new_empty((), dtype=torch.bool))
    torch.library.register_fake("bvae::adam", lambda *args: None)
    torch.library.register_fake("bvae::copy_all", lambda to, source: None)
    torch.library.register_fake("bvae::end_step", lambda *args: None)
