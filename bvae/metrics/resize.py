"""The three ways in which FID tools bring images to the network's 299x299."""

import torch
import torch.nn.functional as F
from torch import Tensor


def tf1_bilinear(images: Tensor, side: int) -> Tensor:
    """TF 1's resize_bilinear: source = destination * in/out, no half-pixel shift, no antialiasing.

    Args:
        images: float32 [B,C,H,W].

    Returns:
        [B,C,side,side], channels_last; in float32 the arithmetic is TF's, operation by operation.
    """
    rows = images.permute(0, 2, 3, 1)
    for dim in (2, 1):  # along the width first, as TF does
        low, high, weight = _tf1_grid(rows.shape[dim], side, rows.device)
        weight = weight.view(-1, 1) if dim == 2 else weight.view(-1, 1, 1)
        below = rows.index_select(dim, low)
        rows = below + (rows.index_select(dim, high) - below) * weight
    return rows.permute(0, 3, 1, 2)


def _tf1_grid(size: int, side: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(lower source index, upper one, weight of the upper) of each of `side` destinations."""
    # TF computes in float32 throughout, and the product's rounding decides which pixel is the lower one.
    scale = torch.tensor(size, dtype=torch.float32) / side
    source = torch.arange(side, dtype=torch.float32) * scale
    low = source.long()
    return (
        low.to(device),
        (low + 1).clamp(max=size - 1).to(device),
        (source - low).to(device),
    )


def half_pixel_bilinear(images: Tensor, side: int) -> Tensor:
    """PyTorch's bilinear with align_corners=False, no antialiasing, as pytorch-fid resizes. [B,C,H,W] float32."""
    return F.interpolate(images, (side, side), mode="bilinear", align_corners=False)


def antialiased_bicubic(images: Tensor, side: int) -> Tensor:
    """Pillow's bicubic in float, as clean-fid resizes, without rounding to integers. [B,C,H,W] float32."""
    return F.interpolate(images, (side, side), mode="bicubic", align_corners=False, antialias=True)
