"""Weights for tests: random ones of the right shapes, and the real ones where BVAE_TEST_INCEPTION names them."""

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bvae.metrics.weights import layer_shapes

REAL = os.environ.get("BVAE_TEST_INCEPTION")
needs_weights = pytest.mark.skipif(REAL is None, reason="BVAE_TEST_INCEPTION does not name the Inception weights")


def real_path() -> Path:
    assert REAL is not None
    return Path(REAL)


def random_weights(seed: int = 0) -> dict[str, Tensor]:
    """Scaled so that features stay of order 1; batch norm far from the identity."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in layer_shapes().items():
        uniform = torch.rand(shape, generator=generator)
        if name.endswith("conv.weight"):
            fan_in = shape[1] * shape[2] * shape[3]
            weights[name] = (uniform - 0.5) * (24 / fan_in) ** 0.5
        elif name.endswith(("bn.weight", "running_var")):
            weights[name] = uniform + 0.5
        else:
            weights[name] = uniform * 0.2 - 0.1
    return weights


class QuickNetwork(torch.nn.Module):
    """Stands in for the network where only what is around it is tested: a fixed map of pooled pixels to features."""

    def __init__(self) -> None:
        super().__init__()
        weight = torch.randn(3 * 8 * 8, 2048, generator=torch.Generator().manual_seed(5)) / 14
        self.register_buffer("weight", weight)
        self.seen: list[int] = []  # sizes of its batches

    dtype = torch.float32
    device = torch.device("cpu")

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1:] == (3, 299, 299)
        self.seen.append(len(x))
        return torch.relu(torch.nn.functional.adaptive_avg_pool2d(x, 8).flatten(1) @ self.weight)
