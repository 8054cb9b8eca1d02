"""The Inception-v3 of FID (TensorFlow's of 2015-12-05), in plain PyTorch, up to its 2048 pooled features.

Its architecture is torchvision's but for what TensorFlow does differently, as pytorch-fid found: average pools do not
count their padding, and the last block's pool takes the maximum. Batch norm is folded into the convolutions, and
convolutions of one kernel that read the same input are one convolution; both change features by rounding only (about
2e-6 of their norm).
"""

import contextlib
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEATURES = 2048
SIDE = 299  # height and width of the images it takes
BN_EPS = 1e-3

Weights = Mapping[str, Tensor]


class Convolution(nn.Module):
    """Convolution, batch norm in inference and ReLU, of one layer of the checkpoint or of several with one input.

    Args:
        weights: `<name>.conv.weight`, `<name>.bn.weight|bias|running_mean|running_var` of each of `names`.
        names: the layers; their outputs follow each other along the channels.
    """

    def __init__(self, weights: Weights, *names: str, stride: int = 1, padding: int | tuple[int, int] = 0) -> None:
        super().__init__()
        folded = [_fold(weights, name) for name in names]
        self.widths = [len(bias) for _, bias in folded]
        self.stride = stride
        self.padding = padding
        self.register_buffer("weight", torch.cat([w for w, _ in folded]))
        self.register_buffer("bias", torch.cat([b for _, b in folded]))
        self.weight: Tensor
        self.bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(F.conv2d(x, self.weight, self.bias, self.stride, self.padding))


def _fold(weights: Weights, name: str) -> tuple[Tensor, Tensor]:
    """(weight, bias) of the convolution that equals convolution and batch norm."""
    kernel = weights[f"{name}.conv.weight"].double()
    scale = weights[f"{name}.bn.weight"].double() / (weights[f"{name}.bn.running_var"].double() + BN_EPS).sqrt()
    bias = weights[f"{name}.bn.bias"].double() - weights[f"{name}.bn.running_mean"].double() * scale
    return (kernel * scale[:, None, None, None]).float(), bias.float()


class Block(nn.Module):
    """A Mixed block: branches side by side, joined along the channels.

    Every branch but the pooled one begins with a 1x1 convolution of the block's input, all of which `first` holds.
    """

    def __init__(self, weights: Weights, name: str) -> None:
        super().__init__()
        self.weights = weights  # while the block is being built
        self.name = name
        self.build()
        del self.weights

    def build(self) -> None:
        raise NotImplementedError

    def layer(self, *branches: str, stride: int = 1, padding: int | tuple[int, int] = 0) -> Convolution:
        names = [f"{self.name}.{branch}" for branch in branches]
        return Convolution(self.weights, *names, stride=stride, padding=padding)

    def branches(self, x: Tensor) -> Sequence[Tensor]:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(list(self.branches(x)), 1)


class BlockA(Block):
    """Mixed_5b, 5c, 5d."""

    def build(self) -> None:
        self.first = self.layer("branch1x1", "branch5x5_1", "branch3x3dbl_1")
        self.five = self.layer("branch5x5_2", padding=2)
        self.deep = nn.Sequential(self.layer("branch3x3dbl_2", padding=1), self.layer("branch3x3dbl_3", padding=1))
        self.pooled = self.layer("branch_pool")

    def branches(self, x: Tensor) -> Sequence[Tensor]:
        one, five, deep = self.first(x).split(self.first.widths, 1)
        return one, self.five(five), self.deep(deep), self.pooled(_average(x))


class BlockB(Block):
    """Mixed_6a, which halves the side."""

    def build(self) -> None:
        self.three = self.layer("branch3x3", stride=2)
        self.deep = nn.Sequential(
            self.layer("branch3x3dbl_1"),
            self.layer("branch3x3dbl_2", padding=1),
            self.layer("branch3x3dbl_3", stride=2),
        )

    def branches(self, x: Tensor) -> Sequence[Tensor]:
        return self.three(x), self.deep(x), F.max_pool2d(x, 3, 2)


class BlockC(Block):
    """Mixed_6b to 6e, whose 7x7 convolutions are pairs of 1x7 and 7x1."""

    def build(self) -> None:
        wide, tall = (0, 3), (3, 0)
        self.first = self.layer("branch1x1", "branch7x7_1", "branch7x7dbl_1")
        self.seven = nn.Sequential(self.layer("branch7x7_2", padding=wide), self.layer("branch7x7_3", padding=tall))
        self.deep = nn.Sequential(
            *(self.layer(f"branch7x7dbl_{i}", padding=p) for i, p in enumerate((tall, wide, tall, wide), 2))
        )
        self.pooled = self.layer("branch_pool")

    def branches(self, x: Tensor) -> Sequence[Tensor]:
        one, seven, deep = self.first(x).split(self.first.widths, 1)
        return one, self.seven(seven), self.deep(deep), self.pooled(_average(x))


class BlockD(Block):
    """Mixed_7a, which halves the side."""

    def build(self) -> None:
        self.first = self.layer("branch3x3_1", "branch7x7x3_1")
        self.three = self.layer("branch3x3_2", stride=2)
        self.seven = nn.Sequential(
            self.layer("branch7x7x3_2", padding=(0, 3)),
            self.layer("branch7x7x3_3", padding=(3, 0)),
            self.layer("branch7x7x3_4", stride=2),
        )

    def branches(self, x: Tensor) -> Sequence[Tensor]:
        three, seven = self.first(x).split(self.first.widths, 1)
        return self.three(three), self.seven(seven), F.max_pool2d(x, 3, 2)


class BlockE(Block):
    """Mixed_7b."""

    def build(self) -> None:
        wide, tall = (0, 1), (1, 0)
        self.first = self.layer("branch1x1", "branch3x3_1", "branch3x3dbl_1")
        self.three_a = self.layer("branch3x3_2a", padding=wide)
        self.three_b = self.layer("branch3x3_2b", padding=tall)
        self.deep = self.layer("branch3x3dbl_2", padding=1)
        self.deep_a = self.layer("branch3x3dbl_3a", padding=wide)
        self.deep_b = self.layer("branch3x3dbl_3b", padding=tall)
        self.pooled = self.layer("branch_pool")

    def pool(self, x: Tensor) -> Tensor:
        return _average(x)

    def branches(self, x: Tensor) -> Sequence[Tensor]:
        one, three, deep = self.first(x).split(self.first.widths, 1)
        deep = self.deep(deep)
        return (
            one,
            self.three_a(three),
            self.three_b(three),
            self.deep_a(deep),
            self.deep_b(deep),
            self.pooled(self.pool(x)),
        )


class LastBlock(BlockE):
    """Mixed_7c."""

    def pool(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, 3, 1, 1)


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class Inception(nn.Module):
    """Images [B,3,299,299] in [-1,1] -> features [B,2048] float32 (pool_3).

    Channels last, on the device and in the type that `.to()` gives it: float32, where TF32 is kept off, or bfloat16.

    Args:
        weights: pytorch-fid's state dict, without its head if need be (see bvae.metrics.weights).
    """

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        w = weights
        self.layers = nn.Sequential(
            Convolution(w, "Conv2d_1a_3x3", stride=2),
            Convolution(w, "Conv2d_2a_3x3"),
            Convolution(w, "Conv2d_2b_3x3", padding=1),
            nn.MaxPool2d(3, 2),
            Convolution(w, "Conv2d_3b_1x1"),
            Convolution(w, "Conv2d_4a_3x3"),
            nn.MaxPool2d(3, 2),
            *(BlockA(w, f"Mixed_5{i}") for i in "bcd"),
            BlockB(w, "Mixed_6a"),
            *(BlockC(w, f"Mixed_6{i}") for i in "bcde"),
            BlockD(w, "Mixed_7a"),
            BlockE(w, "Mixed_7b"),
            LastBlock(w, "Mixed_7c"),
        )
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def dtype(self) -> torch.dtype:
        return next(self.buffers()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.buffers()).device

    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        exact: contextlib.AbstractContextManager = contextlib.nullcontext()
        if x.is_cuda:
            exact = torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False)
        with exact:
            maps = self.layers(x.to(self.dtype, memory_format=torch.channels_last))
        return maps.mean((2, 3), dtype=torch.float32)
