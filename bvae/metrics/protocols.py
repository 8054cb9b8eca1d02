"""Protocols: everything between images and the network that moves an FID, under the name that goes with the number."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bvae.metrics.inception import SIDE
from bvae.metrics.resize import antialiased_bicubic, half_pixel_bilinear, tf1_bilinear


@dataclass(frozen=True)
class Protocol:
    """How images become the network's input.

    name: what stands beside the number.
    says: what it is, in a line.
    quantise: float images are rounded to 8 bits first, since the protocol's tool reads files.
    resize: [B,3,H,W] float32 -> [B,3,299,299].
    shift, scale: the network's input is (x - shift) / scale, x in [0,255].
    habit: the number of images on a side that published figures under it mostly have.
    """

    name: str
    says: str
    quantise: bool
    resize: Callable[[Tensor, int], Tensor]
    shift: float
    scale: float
    habit: int

    def prepare(self, images: Tensor) -> Tensor:
        """Images uint8 [B,H,W,3] or float [B,3,H,W] in [0,1] -> the network's input [B,3,299,299] float32."""
        if images.dtype == torch.uint8:
            x = images.permute(0, 3, 1, 2).float()
        else:
            x = images.float() * 255
            x = x.round() if self.quantise else x
        x = self.resize(x, SIDE)
        if self.resize is antialiased_bicubic:
            x = x.clamp(0, 255)  # bicubic overshoots
        return (x - self.shift) / self.scale


PROTOCOLS = {
    p.name: p
    for p in (
        Protocol("tf1", "the paper's: TF 1's bilinear grid, floats", False, tf1_bilinear, 127.5, 127.5, 10_000),
        Protocol(
            "pytorch-fid",
            "pytorch-fid's: bilinear, align_corners=False",
            True,
            half_pixel_bilinear,
            127.5,
            127.5,
            50_000,
        ),
        Protocol("clean", "clean-fid's: Pillow's antialiased bicubic", True, antialiased_bicubic, 128.0, 128.0, 50_000),
    )
}
DEFAULT = "tf1"


def stretch(images: Tensor) -> Tensor:
    """Each image stretched to its own minimum and maximum and rounded to 8 bits, as Dai & Wipf's code saves images.

    Images uint8 [B,H,W,C] or float [B,C,H,W] in [0,1] -> uint8 [B,H,W,C]; the range is over all channels of an image
    (SciPy's bytescale), and a constant image becomes 0.
    """
    x = images.permute(0, 3, 1, 2).double() if images.dtype == torch.uint8 else images.double()
    low = x.amin((1, 2, 3), keepdim=True)
    span = x.amax((1, 2, 3), keepdim=True) - low
    scaled = (x - low) * torch.where(span > 0, 255 / span, torch.zeros_like(span))
    return (scaled.clamp(0, 255) + 0.5).byte().permute(0, 2, 3, 1).contiguous()


def quantise(images: Tensor) -> Tensor:
    """Images uint8 [B,H,W,C], or float [B,C,H,W] in [0,1] rounded to uint8 [B,H,W,C]."""
    if images.dtype == torch.uint8:
        return images
    return (images.float() * 255).round().byte().permute(0, 2, 3, 1).contiguous()
