import pytest
import torch
from torch import nn

from bvae.models import conv
from bvae.models.conv import Conv3x3, ConvTranspose3x3

LAYERS = {
    "plain": (lambda: Conv3x3(6, 10), lambda: nn.Conv2d(6, 10, 3, padding=1)),
    "strided": (lambda: Conv3x3(6, 10, stride=2), lambda: nn.Conv2d(6, 10, 3, 2, 1)),
    "transposed": (lambda: ConvTranspose3x3(6, 10), lambda: nn.ConvTranspose2d(6, 10, 3, 2, 1, 1)),
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
    for stride, side in ((1, 5), (2, 6)):
        x = torch.randn(3, 4, side, side, dtype=torch.float64)
        w = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
        y = torch.nn.functional.conv2d(x, w, None, stride, 1)
        grad = torch.randn_like(y)
        torch.testing.assert_close(
            conv._kernel_gradient(grad, x, stride), torch.autograd.grad(y, w, grad)[0], rtol=1e-12, atol=1e-12
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
