import pytest
import torch
from torch import nn

from bvae.models import conv
from bvae.models.conv import Conv3x3, ConvTranspose3x3
from bvae.models.layers import Conv, ConvTranspose

LAYERS = {
    "plain": (lambda: Conv3x3(6, 10), lambda: nn.Conv2d(6, 10, 3, padding=1)),
    "strided": (lambda: Conv3x3(6, 10, stride=2), lambda: nn.Conv2d(6, 10, 3, 2, 1)),
    "transposed": (lambda: ConvTranspose3x3(6, 10), lambda: nn.ConvTranspose2d(6, 10, 3, 2, 1, 1)),
    "4x4": (lambda: Conv(6, 10, 4, 2), lambda: nn.Conv2d(6, 10, 4, 2, 1)),
    "4x4 transposed": (lambda: ConvTranspose(6, 10, 4), lambda: nn.ConvTranspose2d(6, 10, 4, 2, 1)),
    "5x5": (lambda: Conv(6, 10, 5), lambda: nn.Conv2d(6, 10, 5, 1, 2)),
    "5x5 strided": (lambda: Conv(6, 10, 5, 2), lambda: nn.Conv2d(6, 10, 5, 2, 2)),
    "5x5 transposed": (lambda: ConvTranspose(6, 10, 5), lambda: nn.ConvTranspose2d(6, 10, 5, 2, 2, 1)),
}


@pytest.mark.parametrize("kind", list(LAYERS))
@pytest.mark.parametrize(("height", "width"), [(8, 8), (2, 2), (4, 14), (2, 32)])
@pytest.mark.parametrize("batch", [1, 5])
def test_under_bf16_autocast_it_is_torchs(kind, height, width, batch, monkeypatch):
    monkeypatch.setattr(conv, "SLOW_STRIDES", (1, 2))  # as with AMX
    torch.manual_seed(0)
    ours, theirs = (make() for make in LAYERS[kind])
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    theirs.load_state_dict(ours.state_dict())
    results = []
    for layer in (ours, theirs):
        layer.to(memory_format=torch.channels_last)
        torch.manual_seed(1)
        x = torch.randn(batch, 6, height, width).contiguous(memory_format=torch.channels_last).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        (y.float() * torch.randn_like(y.float())).sum().backward()
        results.append((y.float(), x.grad, layer.weight.grad, layer.bias.grad))
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert (a - b).norm() <= 0.01 * b.norm()


def test_the_gradient_of_the_kernel_is_exact_in_float64():
    torch.manual_seed(0)
    for kernel, stride, side in ((3, 1, 5), (3, 2, 6), (4, 2, 6), (5, 1, 5), (5, 2, 6), (5, 2, 7)):
        x = torch.randn(3, 4, side, side, dtype=torch.float64)
        w = torch.randn(2, 4, kernel, kernel, dtype=torch.float64, requires_grad=True)
        y = torch.nn.functional.conv2d(x, w, None, stride, (kernel - 1) // 2)
        grad = torch.randn_like(y)
        torch.testing.assert_close(
            conv._kernel_gradient(grad, x, stride, kernel), torch.autograd.grad(y, w, grad)[0], rtol=1e-12, atol=1e-12
        )


def test_what_oneDNN_does_well_is_left_to_it(monkeypatch):
    called = []
    monkeypatch.setattr(conv, "_call", lambda x, weight, bias, stride, _: called.append((x.shape[3], stride)) or x)
    for strides in ((1, 2), (2,)):  # with AMX and without
        monkeypatch.setattr(conv, "SLOW_STRIDES", strides)
        for layer in (Conv3x3(4, 4), Conv3x3(4, 4, stride=2)):
            for side in (2 * conv.SHORT_ROW, 8):
                x = torch.randn(2, 4, side, side)
                with torch.autocast("cpu", torch.bfloat16):
                    layer(x)
                    with torch.no_grad():
                        layer(x)
                layer(x)
    assert called == [(8, 1), (8, 2), (8, 2)]
    called.clear()
    with torch.autocast("cpu", torch.bfloat16):
        Conv(3, 64, 4, 2)(torch.randn(2, 3, 8, 8))
        ConvTranspose(64, 1, 4)(torch.randn(2, 64, 4, 4))
    assert called == []  # an image on one side of the kernel


def test_a_cancelled_bias_counts_but_is_not_trained():
    torch.manual_seed(0)
    for amp in (True, False):
        layer = Conv3x3(4, 4, cancelled=True)
        layer.bias.data.fill_(3.0)
        x = torch.randn(2, 4, 4, 4)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            y = layer(x)
            layer.bias.data.zero_()
            assert torch.allclose(y - 3, layer(x), atol=0.05)
        y.float().square().sum().backward()
        assert layer.bias.grad is None
        assert layer.weight.grad.any()


# ---- TensorFlow's "SAME" padding ------------------------------------------------------------------------------------


def same(x, weight, bias, stride):
    """A convolution as TensorFlow defines it: ceil(n/stride) places; of odd padding the larger half comes last."""
    pads = []
    for n, k in ((x.shape[3], weight.shape[3]), (x.shape[2], weight.shape[2])):
        total = max((-(-n // stride) - 1) * stride + k - n, 0)
        pads += [total // 2, total - total // 2]
    return nn.functional.conv2d(nn.functional.pad(x, pads), weight, bias, stride)


def reflected(x):
    return x.flip(2, 3)


def assert_is_same(got, expected, expected_of_reflection, kernel):
    """A kernel of 4 pixels is TensorFlow's; one of 3 or 5 may be its reflection."""
    if kernel != 4:
        expected = reflected(expected_of_reflection)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (4, 2), (5, 1), (5, 2)])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 7), (1, 5), (6, 9)])
def test_convolutions_pad_as_tensorflow_up_to_reflection(kernel, stride, height, width):
    torch.manual_seed(0)
    layer = Conv(3, 4, kernel, stride).double()
    x = torch.randn(2, 3, height, width, dtype=torch.float64)
    expected = same(x, layer.weight, layer.bias, stride)
    mirror = same(reflected(x), reflected(layer.weight), layer.bias, stride)
    assert_is_same(layer(x), expected, mirror, kernel)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (4, 1), (4, 2), (5, 1), (5, 2)])
@pytest.mark.parametrize(("height", "width"), [(4, 4), (7, 7), (1, 5)])
def test_transposed_convolutions_are_the_transpose_of_same_ones(kernel, stride, height, width):
    torch.manual_seed(0)
    layer = ConvTranspose(3, 4, kernel, stride).double()
    x = torch.randn(2, 3, height, width, dtype=torch.float64)

    def transpose(x, weight):
        image = torch.zeros(2, 4, stride * height, stride * width, dtype=torch.float64, requires_grad=True)
        return torch.autograd.grad(same(image, weight, None, stride), image, x)[0] + layer.bias.view(-1, 1, 1)

    mirror = transpose(reflected(x), reflected(layer.weight))
    assert_is_same(layer(x), transpose(x, layer.weight), mirror, kernel)
