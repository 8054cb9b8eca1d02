"""The convolutions of the networks, with the gradient of their weights computed the faster way on a CPU.

oneDNN computes it in bf16 row by row of the image and, with AMX, pads every row to the 32 pixels that a tile
multiplies: on the small images of the inner scales nearly all of that is padding. Where the stride is 2 it is slow
without AMX too. There it is one matrix product instead, of the output's gradient and the input's
neighbourhoods (docs/lab/throughput.md has the figures).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bvae.machine import has_amx
from bvae.models.half import Halved, half_of, on_cuda
from bvae.models.plain import layers_are_plain

SHORT_ROW = 16  # pixels; from here on oneDNN is faster
SLOW_STRIDES = (1, 2) if has_amx() else (2,)  # of shorter rows


def padding(kernel: int, stride: int, transposed: bool) -> tuple[int, int]:
    """PyTorch's padding and output_padding, for stride*n pixels of n in a transposed one."""
    near = (kernel - 1) // 2
    return near, max(stride + 2 * near - kernel, 0) if transposed else 0


def _neighbourhoods(x: Tensor, height: int, width: int, stride: int, kernel: int) -> Tensor:
    """[B,C,H,W] -> [B*height*width, kernel^2*C]: the pixels that a kernel sees at each of its places."""
    near = (kernel - 1) // 2
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, near, near, near, near)).contiguous()
    image, row, pixel, channel = padded.stride()
    size = (x.shape[0], height, width, kernel, kernel, x.shape[1])
    return padded.as_strided(size, (image, stride * row, stride * pixel, row, pixel, channel)).reshape(
        -1, kernel * kernel * x.shape[1]
    )


def _kernel_gradient(small: Tensor, large: Tensor, stride: int, kernel: int = 3) -> Tensor:
    """Gradient of a kernel [S,L,k,k] between images [B,S,h,w] and [B,L,h*stride,w*stride]: the sum over all places."""
    rows = small.permute(0, 2, 3, 1).reshape(-1, small.shape[1])
    product = rows.t() @ _neighbourhoods(large, small.shape[2], small.shape[3], stride, kernel)
    return product.view(small.shape[1], kernel, kernel, large.shape[1]).permute(0, 3, 1, 2)


class _Convolution(torch.autograd.Function):
    """Both kinds; a transposed one makes stride*n pixels of n."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, stride: int, transposed: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.transposed = stride, transposed
        near, far = padding(weight.shape[2], stride, transposed)
        if transposed:
            return F.conv_transpose2d(x, weight, bias, stride, near, far)
        return F.conv2d(x, weight, bias, stride, near)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        s, kernel, needs = ctx.stride, weight.shape[2], ctx.needs_input_grad
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_x = grad_weight = grad_bias = None
        if needs[0]:
            near, far = padding(kernel, s, ctx.transposed)
            grad_x = torch.ops.aten.convolution_backward(
                grad, x, weight, None, [s, s], [near, near], [1, 1], ctx.transposed, [far, far], 1,
                [True, False, False],
            )[0]  # fmt: skip
        if needs[1]:
            small, large = (x, grad) if ctx.transposed else (grad, x)
            grad_weight = _kernel_gradient(small, large, s, kernel)
        if needs[2]:
            # A shortcut's bias and its neighbour's have the same gradient: of two bf16 sums in one loop, Inductor makes
            # C++ that does not compile (torch 2.13). Outside of it, a sum in another type would copy what it sums.
            sums = torch.promote_types(grad.dtype, torch.float32) if torch.compiler.is_compiling() else grad.dtype
            grad_bias = grad.sum((0, 2, 3), dtype=sums).to(grad.dtype)
        return grad_x, grad_weight, grad_bias, None, None


def _ours(x: Tensor, row: int, stride: int) -> bool:
    """Whether oneDNN would be slow: rows of `row` pixels in bf16, in training, on a CPU."""
    return (
        not layers_are_plain()
        and row < SHORT_ROW
        and stride in SLOW_STRIDES
        and x.device.type == "cpu"
        and torch.is_grad_enabled()
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
    )


def _call(x: Tensor, weight: Tensor, bias: Tensor, stride: int, transposed: bool) -> Tensor:
    x, weight, bias = (t.bfloat16() for t in (x, weight, bias))
    return _Convolution.apply(x, weight, bias, stride, transposed)


class Conv3x3(Halved, nn.Conv2d):
    """[B,C,H,W] -> [B,D,H/stride,W/stride], padding 1; the stride divides H and W.

    Args:
        cancelled: batch norm follows directly and cancels the bias. Its gradient is zero but for rounding, which Adam
            would turn into steps of the size of lr: it gets none.
        apart: the layer is called by `apart`, whose bias has no bf16 copy where the next layer adds it.
    """

    bias: Tensor

    def __init__(
        self, inputs: int, outputs: int, stride: int = 1, cancelled: bool = False, apart: bool = False
    ) -> None:
        super().__init__(inputs, outputs, 3, stride, padding=1)
        self.cancelled = cancelled
        self.called_apart = apart

    @property
    def halved(self) -> tuple[str, ...]:
        return _halved(self)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = half_of(self.weight), half_of(self.bias)
        if self.cancelled:
            bias = bias.detach()
        if _ours(x, x.shape[3] // self.stride[0], self.stride[0]):
            return _call(x, weight, bias, self.stride[0], False)
        return self._conv_forward(x, weight, bias)

    def apart(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The convolution, and a bias [D] float32 that is still to be added, or None."""
        if not on_cuda(x.device):  # oneDNN adds it as it writes; on CUDA that would be a pass of its own
            return self(x), None
        bias = self.bias.detach() if self.cancelled else self.bias
        return self._conv_forward(x, half_of(self.weight), None), bias


class ConvTranspose3x3(Halved, nn.ConvTranspose2d):
    """[B,C,H,W] -> [B,D,2H,2W]. `apart`: see Conv3x3."""

    bias: Tensor

    def __init__(self, inputs: int, outputs: int, apart: bool = False) -> None:
        super().__init__(inputs, outputs, 3, stride=2, padding=1, output_padding=1)
        self.called_apart = apart

    @property
    def halved(self) -> tuple[str, ...]:
        return _halved(self)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        weight, bias = half_of(self.weight), half_of(self.bias)
        if _ours(x, x.shape[3], 2):
            return _call(x, weight, bias, 2, True)
        return F.conv_transpose2d(x, weight, bias, 2, 1, 1)

    def apart(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """See Conv3x3.apart."""
        if not on_cuda(x.device):
            return self(x), None
        return F.conv_transpose2d(x, half_of(self.weight), None, 2, 1, 1), self.bias


def _halved(layer: Conv3x3 | ConvTranspose3x3) -> tuple[str, ...]:
    return ("weight",) if layer.called_apart and on_cuda(layer.weight.device) else ("weight", "bias")
