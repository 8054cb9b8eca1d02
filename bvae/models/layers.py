"""Layers of the published networks beside the ResNet: dense ones, spectral norm, posterior heads."""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bvae.errors import UserError
from bvae.models import conv
from bvae.models.conv import padding
from bvae.models.half import Halved, Linear, half_of


def need_sides(network: str, height: int, width: int, factor: int) -> None:
    """Raises UserError where `factor` does not divide the sides of an image."""
    if min(height, width) < 1 or height % factor or width % factor:
        raise UserError(f"--network {network} needs sides that {factor} divides, not {height}x{width}")


def need_batch(batch: int, pixels: int) -> None:
    """Raises UserError where batch norm would see one value a channel: one image with one pixel in the smallest map."""
    if batch == 1 and pixels == 1:
        raise UserError("--batch 1 is too small: batch norm cannot normalise one value a channel")


def to_rows(x: Tensor) -> Tensor:
    """[B,C,H,W] -> [B,H*W*C], TensorFlow's order: a view of channels_last memory."""
    return x.permute(0, 2, 3, 1).flatten(1)


def to_maps(rows: Tensor, channels: int, height: int, width: int) -> Tensor:
    """[B,H*W*C] -> [B,C,H,W] in channels_last memory; the inverse of to_rows."""
    return rows.unflatten(1, (height, width, channels)).permute(0, 3, 1, 2)


def normalized_rows(norm: nn.Module, rows: Tensor) -> Tensor:
    """Batch norm of [B,F] over the batch, by a norm over [B,F,1,1]."""
    return norm(rows[:, :, None, None])[:, :, 0, 0]


@torch.no_grad()
def gaussian_(module: nn.Module, std: float) -> None:
    """Weights as Dai & Wipf (std .02) and Tolstikhin et al. (.01) draw them; zero biases.

    Dense and transposed layers: N(0, std^2). Convolutions: the same, but redrawn beyond two standard deviations.
    """
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.trunc_normal_(m.weight, std=std, a=-2 * std, b=2 * std)
        elif isinstance(m, nn.ConvTranspose2d | nn.Linear):
            nn.init.normal_(m.weight, std=std)
        else:
            continue
        if m.bias is not None:
            nn.init.zeros_(m.bias)


class Dense(Linear):
    """[B,inputs] -> [B,outputs]. `cancelled`: see conv.Conv3x3."""

    def __init__(self, inputs: int, outputs: int, cancelled: bool = False) -> None:
        super().__init__(inputs, outputs)
        self.cancelled = cancelled

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, half_of(self.weight), self._bias())

    def _bias(self) -> Tensor:
        bias = half_of(self.bias)
        return bias.detach() if self.cancelled else bias


# ---- convolutions ---------------------------------------------------------------------------------------------------
# Shapes follow TensorFlow's "SAME": a stride s makes ceil(n/s) pixels of n, a transposed layer s*n. Kernels of 4 pixels
# a side pad as TensorFlow does; those of 3 and 5 pad alike on all sides, which is TensorFlow's layer up to a
# reflection of the image.


def _of_an_image(weight: Tensor) -> bool:
    """True for a kernel with an image's few channels on either side: oneDNN is fast at its gradient, a thin matrix."""
    return min(weight.shape[:2]) <= 3


class Conv(Halved, nn.Conv2d):
    """[B,C,H,W] -> [B,D,ceil(H/stride),ceil(W/stride)].

    Args:
        kernel: 3 or 5 pixels a side; with stride 2 also 4.
        cancelled: batch norm follows directly and cancels the bias. Its gradient is zero but for rounding, which Adam
            would turn into steps of the size of lr: it gets none.
    """

    bias: Tensor

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, cancelled: bool = False) -> None:
        super().__init__(inputs, outputs, kernel, stride, padding(kernel, stride, False)[0])
        self.cancelled = cancelled

    def kernel(self) -> Tensor:
        """The weight to compute with."""
        return half_of(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        stride, height, width = self.stride[0], *x.shape[2:]
        if self.kernel_size[0] == 4 and (height % 2 or width % 2):
            x = F.pad(x, (0, width % 2, 0, height % 2))
        weight, bias = self.kernel(), half_of(self.bias)
        if self.cancelled:
            bias = bias.detach()
        if not _of_an_image(weight) and conv._ours(x, -(-width // stride), stride):
            return conv._call(x, weight, bias, stride, False)
        return self._conv_forward(x, weight, bias)


class ConvTranspose(Halved, nn.ConvTranspose2d):
    """[B,C,H,W] -> [B,D,stride*H,stride*W].

    Args:
        kernel: 3, 4 or 5 pixels a side.
        cancelled: as for Conv.
    """

    bias: Tensor

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 2, cancelled: bool = False) -> None:
        super().__init__(inputs, outputs, kernel, stride, *padding(kernel, stride, True))
        self.cancelled = cancelled

    def kernel(self) -> Tensor:
        """The weight to compute with."""
        return half_of(self.weight)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        stride = self.stride[0]
        weight, bias = self.kernel(), half_of(self.bias)
        if self.cancelled:
            bias = bias.detach()
        if stride == 2 and not _of_an_image(weight) and conv._ours(x, x.shape[3], stride):
            return conv._call(x, weight, bias, stride, True)
        y = F.conv_transpose2d(x, weight, bias, stride, *padding(self.kernel_size[0], stride, True))
        return y[:, :, :-1, :-1] if self.kernel_size[0] == 4 and stride == 1 else y


# ---- spectral norm --------------------------------------------------------------------------------------------------


class _Spectral(nn.Module):
    """A layer that divides its weight by an estimate of the weight's largest singular value (Miyato et al. 2018).

    The weight is seen as a matrix [R,S], where R counts the first axis. Each forward pass makes one power iteration
    from the buffer `u`; a training step keeps its result there. No gradient flows through the singular vectors.
    In evaluation, and where no gradient is recorded, `u` stays: outputs do not depend on how often one looked.

    `u` is of S elements (`u_of="columns"`, Dai & Wipf) or of R (`"rows"`, Ghosh et al.), from N(0,1).
    """

    u: Tensor
    u_of: Literal["columns", "rows"]

    def _register(self, weight: Tensor, u_of: Literal["columns", "rows"]) -> None:
        self.u_of = u_of
        rows = weight.shape[0]
        self.register_buffer("u", torch.randn(rows if u_of == "rows" else weight.numel() // rows))

    def _singular(self, matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unit vectors (left [R], right [S]) and the singular value left @ matrix @ right of a matrix [R,S]."""
        learns = self.training and torch.is_grad_enabled()
        with torch.no_grad(), torch.autocast(matrix.device.type, enabled=False):
            m = matrix if self.u_of == "rows" else matrix.t()
            v = F.normalize((m.t() @ self.u.to(m.dtype)).to(self.u.dtype), dim=0)
            product = (m @ v.to(m.dtype)).to(self.u.dtype)
            sigma = product.norm()
            u = product / sigma
            if learns:
                self.u.copy_(u)
        return (u, v, sigma) if self.u_of == "rows" else (v, u, sigma)

    def _divided(self, weight: Tensor) -> Tensor:
        """A convolution's weight over its singular value, with the gradient through both."""
        with torch.autocast(weight.device.type, enabled=False):
            # In the order of channels_last memory, of which this is a view: `u` means the same in any memory format.
            matrix = weight.permute(0, 2, 3, 1).flatten(1)
            left, right, _ = self._singular(matrix)
            return weight / torch.dot(left, matrix @ right)


class _DividedDense(torch.autograd.Function):
    """x W^T / sigma, of float32 at least, with sigma = left W right; the quotient W / sigma itself is never made."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, left: Tensor, right: Tensor, sigma: Tensor) -> Tensor:
        y = F.linear(x, weight).to(sigma.dtype) / sigma
        ctx.save_for_backward(x, weight, left, right, sigma, y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, left, right, sigma, y = ctx.saved_tensors
        if torch.is_grad_enabled():  # under create_graph: the second derivative must see that the weight moves sigma
            sigma = torch.dot(left, weight.to(left.dtype) @ right)
        grad = grad / sigma
        rows = grad.to(x.dtype)
        # sigma's part of the gradient, a multiple of left right^T, is one more sample in the sum over the batch.
        extra = -(grad * y).sum() * left
        outputs = torch.cat([rows, extra.to(x.dtype)[None]])
        return rows @ weight, outputs.t() @ torch.cat([x, right.to(x.dtype)[None]]), None, None, None


class SpectralDense(_Spectral, Dense):
    """Dense, with spectral norm."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        cancelled: bool = False,
        u_of: Literal["columns", "rows"] = "columns",
    ) -> None:
        super().__init__(inputs, outputs, cancelled)
        self._register(self.weight, u_of)

    def forward(self, x: Tensor) -> Tensor:
        weight = half_of(self.weight)
        left, right, sigma = self._singular(weight)
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
        y = _DividedDense.apply(x, weight, left, right, sigma)
        return (y + self._bias()).to(x.dtype)


class SpectralHead(SpectralDense):
    """A SpectralDense that computes in float32, outside autocast: without a bf16 copy of its weight."""

    halved = ()


class SpectralConv(_Spectral, Conv):
    """Conv, with spectral norm."""

    halved = ()  # the quotient is made in float32

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        stride: int,
        cancelled: bool = False,
        u_of: Literal["columns", "rows"] = "columns",
    ) -> None:
        super().__init__(inputs, outputs, kernel, stride, cancelled)
        self._register(self.weight, u_of)

    def kernel(self) -> Tensor:
        return self._divided(self.weight)


class SpectralConvTranspose(_Spectral, ConvTranspose):
    """ConvTranspose, with spectral norm of its weight as [inputs, kernel*kernel*outputs] (Ghosh et al.)."""

    halved = ()

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, cancelled: bool = False) -> None:
        super().__init__(inputs, outputs, kernel, stride, cancelled)
        self._register(self.weight, "rows")

    def kernel(self) -> Tensor:
        return self._divided(self.weight)


# ---- the posterior --------------------------------------------------------------------------------------------------


def unchanged(x: Tensor) -> Tensor:
    return x


class Heads(nn.Module):
    """Features [B,n] -> (mu, log_sigma), each [B,k] float32 whatever the autocast; mu alone where `deterministic`.

    Args:
        log_sigma_of: makes log_sigma of the second dense layer's output.
        mu: the layer for mu, in place of a plain dense one.
    """

    def __init__(
        self,
        inputs: int,
        latents: int,
        deterministic: bool,
        log_sigma_of: Callable[[Tensor], Tensor] = unchanged,
        mu: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.mu = mu or nn.Linear(inputs, latents)
        self.log_sigma = None if deterministic else nn.Linear(inputs, latents)
        self.log_sigma_of = log_sigma_of

    def forward(self, h: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        # Rounding log_sigma to bf16 moves the KL of a sharp latent by percents.
        with torch.autocast(h.device.type, enabled=False):
            h = h.float()
            mu = self.mu(h)
            return mu if self.log_sigma is None else (mu, self.log_sigma_of(self.log_sigma(h)))
