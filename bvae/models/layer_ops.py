"""The fused operations of layers: batch norm with ReLU, the end of a residual block, a dense layer with its ReLU.

As in bvae.ops, each runs the compiled extension, or its plain twin in bvae.reference; docs/ops.md is the contract. All
have first derivatives only; bvae.models.plain has the networks use PyTorch's layers in their place.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bvae import reference
from bvae.ops import EXTENSION_ERROR, first_derivative

_raw = torch.ops.bvae


# ---- batch norm with ReLU, residual blocks --------------------------------------------------------------------------


def _fuses(x: Tensor) -> bool:
    """Whether the extension takes these images: [B, C, H, W] in channels_last memory. torch.compile fuses by itself."""
    return (
        EXTENSION_ERROR is None
        and x.device.type in ("cpu", "cuda")
        and x.numel() > 0
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and x.is_contiguous(memory_format=torch.channels_last)
        and not torch.compiler.is_compiling()
    )


class _BatchNormReLU(torch.autograd.Function):
    """Gives relu(norm(x + offset)) and, with `through`, x + offset too, whose gradient joins that of x in one pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        offset: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        running: Sequence[Tensor],
        counters: Tensor,
        momentum: float,
        eps: float,
        through: bool,
    ) -> Any:
        y, passed, statistics = _raw.batch_norm_relu(
            x, offset, weight, bias, *running, counters, momentum, eps, through
        )
        ctx.save_for_backward(x, weight, bias, statistics)
        ctx.counters = counters
        ctx.set_materialize_grads(False)
        if not through:
            return y
        return y, x if offset is None else passed

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_through: Tensor | None = None) -> Any:
        x, weight, bias, statistics = ctx.saved_tensors
        grad = (torch.zeros_like(x) if grad is None else grad).contiguous(memory_format=torch.channels_last)
        if grad_through is not None:
            grad_through = grad_through.contiguous(memory_format=torch.channels_last)
        # Batch norm cancels the offset: all of its gradient has come through.
        offset_gradient = ctx.needs_input_grad[1] and grad_through is not None
        grads = _raw.batch_norm_relu_backward(
            grad, grad_through, x, weight, bias, statistics, ctx.counters, offset_gradient
        )
        grad_x, grad_weight, grad_bias, grad_offset = first_derivative(
            "batch_norm_relu", grads, grad, grad_through, x, weight, bias
        )
        return grad_x, grad_offset if offset_gradient else None, grad_weight, grad_bias, *[None] * 5


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
    """ReLU of x + offset normalised over the batch, in training; the running statistics move in place.

        y = max(0, (x + offset - mean) / sqrt(var + eps) * weight + bias)
        running <- (1 - momentum) running + momentum (mean, unbiased variance, 1)

    Two passes over the images each way, for float32, bfloat16 and float16 in channels_last memory with the extension;
    PyTorch's own operations everywhere else, under torch.compile too. The fused one has first derivatives only.

    Args:
        x: [B, C, H, W], more than one value a channel. weight, bias: float32 [C].
        running: mean and variance, float32 [C], and the weight they have gathered, float32 scalar.
        counters: int32 [C], 0 before and after: kernels count their blocks in it. Neither it nor `running` may be
            shared by two streams.
        offset: float32 [C], a bias that x lacks. Adding it costs nothing here, for it changes the running mean alone.
        through: give x + offset too, for a shortcut beside the norm: its gradient is added in the same pass.

    Returns:
        y, like x; with `through` (y, x + offset).

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit; a CUDA tensor with a build without CUDA kernels.
    """
    if _fuses(x):
        return _BatchNormReLU.apply(x, offset, weight, bias, tuple(running), counters, momentum, eps, through)
    return reference.batch_norm_relu(x, weight, bias, running, counters, momentum, eps, offset=offset, through=through)


class _AddBiased(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, bias_a: Tensor, bias_b: Tensor, counters: Tensor) -> Tensor:
        ctx.counters = counters
        return _raw.add_biased(a, b, bias_a, bias_b)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        grad = grad.contiguous(memory_format=torch.channels_last)
        grads = grad, grad, *_raw.channel_sums(grad, ctx.counters)
        return *first_derivative("add_biased", grads, grad), None


def add_biased(a: Tensor, b: Tensor, bias_a: Tensor, bias_b: Tensor, counters: Tensor) -> Tensor:
    """a + b + bias_a + bias_b in one pass: the end of a residual block, whose convolutions have left out their biases.

    Both biases have one gradient, which backward sums once. Fused as `batch_norm_relu` is; first derivatives only.

    Args:
        a, b: [B, C, H, W], alike. bias_a, bias_b: float32 [C]. counters: see `batch_norm_relu`.
    """
    single = bias_a.dtype == bias_b.dtype == torch.float32
    if single and _fuses(a) and b.dtype == a.dtype and b.is_contiguous(memory_format=torch.channels_last):
        return _AddBiased.apply(a, b, bias_a, bias_b, counters)
    return reference.add_biased(a, b, bias_a, bias_b, counters)


# ---- dense layers ---------------------------------------------------------------------------------------------------


class _LinearReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, counters: Tensor) -> Tensor:
        y = torch._addmm_activation(bias, x, weight.t())
        ctx.save_for_backward(x, weight, y)
        ctx.counters = counters
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, y = ctx.saved_tensors
        passed, grad_bias = _raw.relu_grad(grad.contiguous(), y, ctx.counters)
        grad_x = passed @ weight if ctx.needs_input_grad[0] else None
        grads = grad_x, passed.t() @ x, grad_bias
        return *first_derivative("linear_relu", grads, grad, x, weight), None


def linear_relu(x: Tensor, weight: Tensor, bias: Tensor, counters: Tensor) -> Tensor:
    """relu(x weight^T + bias): one product forward, and backward one pass over the gradient beside two products.

    PyTorch's own operations where the extension does not run; the fused one has first derivatives only.

    Args:
        x: [B, C]. weight: [D, C]. bias: [D]; all of one type. counters: int32 [D], see `batch_norm_relu`.
    """
    if (
        EXTENSION_ERROR is None
        and x.dim() == 2
        and len(x) > 0
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and x.dtype == weight.dtype == bias.dtype
        and not torch.compiler.is_compiling()
    ):
        with torch.autocast(x.device.type, enabled=False):
            return _LinearReLU.apply(x, weight, bias, counters)
    return reference.linear_relu(x, weight, bias, counters)


# ---- shapes without data --------------------------------------------------------------------------------------------


def _fake_batch_norm_relu(
    x: Tensor,
    offset: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    running_weight: Tensor,
    counters: Tensor,
    momentum: float,
    eps: float,
    through: bool,
) -> Any:
    passed = torch.empty_like(x) if through and offset is not None else weight.new_empty(0)
    return torch.empty_like(x), passed, weight.new_empty((2, x.shape[1]))


def _fake_batch_norm_relu_backward(
    grad: Tensor,
    grad_through: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    statistics: Tensor,
    counters: Tensor,
    offset_gradient: bool,
) -> Any:
    grad_offset = torch.empty_like(weight) if offset_gradient else weight.new_empty(0)
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight), grad_offset


def _fake_channel_sums(x: Tensor, counters: Tensor) -> Any:
    sums = x.new_empty(x.shape[1], dtype=torch.float32)
    return sums, torch.empty_like(sums)


if EXTENSION_ERROR is None:
    torch.library.register_fake("bvae::batch_norm_relu", _fake_batch_norm_relu)
    torch.library.register_fake("bvae::batch_norm_relu_backward", _fake_batch_norm_relu_backward)
    torch.library.register_fake("bvae::add_biased", lambda a, b, bias_a, bias_b: torch.empty_like(a))
    torch.library.register_fake("bvae::channel_sums", _fake_channel_sums)
    torch.library.register_fake(
        "bvae::relu_grad", lambda grad, y, counters: (torch.empty_like(y), y.new_empty(y.shape[1]))
    )
