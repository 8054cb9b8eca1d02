"""The protocols' resizes: TF 1's against a loop over its formula, clean-fid's against Pillow."""

import numpy as np
import pytest
import torch
from PIL import Image

from bvae.metrics.protocols import PROTOCOLS, quantise, stretch
from bvae.metrics.resize import antialiased_bicubic, half_pixel_bilinear, tf1_bilinear


def images(height: int, width: int, n: int = 2) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(height).random((n, 3, height, width), np.float32))


def tf1_loop(image: np.ndarray, side: int) -> np.ndarray:
    """TF 1.x resize_bilinear_op.cc with align_corners=false, [C,H,W] float32, as written there."""
    _, height, width = image.shape
    one = np.float32
    scale_y, scale_x = one(height) / one(side), one(width) / one(side)
    out = np.empty((len(image), side, side), np.float32)
    for y in range(side):
        in_y = one(y) * scale_y
        top = int(np.floor(in_y))
        bottom = min(top + 1, height - 1)
        lerp_y = in_y - one(top)
        for x in range(side):
            in_x = one(x) * scale_x
            left = int(np.floor(in_x))
            right = min(left + 1, width - 1)
            lerp_x = in_x - one(left)
            above = image[:, top, left] + (image[:, top, right] - image[:, top, left]) * lerp_x
            below = image[:, bottom, left] + (image[:, bottom, right] - image[:, bottom, left]) * lerp_x
            out[:, y, x] = above + (below - above) * lerp_y
    return out


@pytest.mark.parametrize(
    ("height", "width", "side"), [(32, 32, 299), (28, 40, 75), (64, 64, 299), (50, 64, 33), (1, 3, 5)]
)
def test_tf1_is_its_formula_to_the_bit(height: int, width: int, side: int, device: str) -> None:
    x = images(height, width, 1)
    resized = tf1_bilinear(x.to(device), side).cpu().numpy()[0]
    expected = tf1_loop(x[0].numpy(), side)
    if device == "cpu":
        np.testing.assert_array_equal(resized, expected)
    np.testing.assert_allclose(resized, expected, atol=1e-6)


def test_tf1_does_not_shift_half_a_pixel() -> None:
    ramp = torch.arange(4.0).expand(1, 1, 4, 4)
    assert tf1_bilinear(ramp, 8)[0, 0, 0].tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3]
    assert half_pixel_bilinear(ramp, 8)[0, 0, 0].tolist() == [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 48), (320, 400), (299, 299)])
def test_bicubic_is_pillows(height: int, width: int) -> None:
    x = images(height, width, 1) * 255
    channels = [Image.fromarray(c).resize((299, 299), Image.Resampling.BICUBIC) for c in x[0].numpy()]
    expected = np.stack([np.asarray(c) for c in channels])
    np.testing.assert_allclose(antialiased_bicubic(x, 299)[0].numpy(), expected, atol=0.02)  # of 255


def test_what_reaches_the_network() -> None:
    x = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (3, 32, 32, 3), np.uint8))
    unit = x.permute(0, 3, 1, 2).float() / 255
    expected = {
        "tf1": 2 * tf1_bilinear(unit, 299) - 1,
        "pytorch-fid": 2 * half_pixel_bilinear(unit, 299) - 1,
        "clean": (antialiased_bicubic(unit * 255, 299).clip(0, 255) - 128) / 128,
    }
    for name, protocol in PROTOCOLS.items():
        prepared = protocol.prepare(x)
        assert prepared.shape == (3, 3, 299, 299)
        torch.testing.assert_close(prepared, expected[name], rtol=0, atol=1e-5)
        torch.testing.assert_close(prepared, protocol.prepare(unit), rtol=0, atol=1e-5)
    assert PROTOCOLS["clean"].prepare(x).min() >= -1


def test_floats_are_quantised_where_the_tool_reads_files() -> None:
    x = images(32, 32)
    assert not torch.equal(PROTOCOLS["tf1"].prepare(x), PROTOCOLS["tf1"].prepare(quantise(x)))
    for name in ("pytorch-fid", "clean"):
        assert torch.equal(PROTOCOLS[name].prepare(x), PROTOCOLS[name].prepare(quantise(x)))


def test_stretch_is_scipys_bytescale() -> None:
    x = images(8, 8, 3) * 0.5 + 0.2
    x[2] = 0.3
    stretched = stretch(x)
    assert stretched.dtype == torch.uint8 and stretched.shape == (3, 8, 8, 3)
    for image, result in zip(x[:2].double().numpy(), stretched.numpy(), strict=False):
        scaled = (image - image.min()) * (255 / (image.max() - image.min()))
        np.testing.assert_array_equal(result, (scaled.clip(0, 255) + 0.5).astype(np.uint8).transpose(1, 2, 0))
        assert result.min() == 0 and result.max() == 255
    assert not stretched[2].any()
    again = stretch(stretched)
    assert torch.equal(again[:2], stretched[:2])
