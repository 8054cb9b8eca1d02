"""Residual blocks as a GPU runs them, biases left to the next layer, against blocks as a CPU does; plain layers."""

import copy

import pytest
import torch

from bvae.models import conv, half
from bvae.models.half import Copies, halved_weights
from bvae.models.norm import batch_norms
from bvae.models.plain import layers_are_plain, plain_layers
from bvae.models.resnet import ResNetDecoder, ResNetEncoder


@pytest.fixture
def on_a_gpu(monkeypatch):
    arrange(monkeypatch, True)


def arrange(monkeypatch, for_a_gpu):
    for module in (conv, half):
        monkeypatch.setattr(module, "on_cuda", lambda device: for_a_gpu)


def encoder(blocks=1):
    torch.manual_seed(0)
    net = ResNetEncoder(channels=3, latents=4, scales=2, blocks=blocks, base=8, fc=8)
    return with_biases(net)


def decoder(blocks=1):
    torch.manual_seed(0)
    return with_biases(ResNetDecoder(channels=3, latents=4, side=8, blocks=blocks, base=8))


def with_biases(net):
    """Biases that are not zero, as they are only after some training; those of before a norm as of an old run."""
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.endswith("bias"):
                p.copy_(0.1 * torch.randn(p.shape))
    return net.to(memory_format=torch.channels_last)


def train_once(net, x):
    """(output, gradients by name, statistics) of a pass in training; then the output in eval mode."""
    y = net(x)
    y = torch.cat(y, 1) if isinstance(y, tuple) else y
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    gradients = {name: p.grad for name, p in net.named_parameters()}
    statistics = {name: b.clone() for name, b in net.named_buffers()}
    net.eval()
    with torch.no_grad():
        evaluated = net(x)
    return y.detach(), gradients, statistics, evaluated[0] if isinstance(evaluated, tuple) else evaluated


@pytest.mark.parametrize("make", [encoder, decoder])
@pytest.mark.parametrize("blocks", [1, 2])
def test_biases_left_to_the_next_layer_change_nothing(make, blocks, monkeypatch):
    x = torch.rand(5, 3, 8, 8) if make is encoder else torch.randn(5, 4)
    here, there = make(blocks), make(blocks)
    y, gradients, statistics, evaluated = train_once(here, x)
    arrange(monkeypatch, True)
    other_y, other_gradients, other_statistics, other_evaluated = train_once(there, x)
    torch.testing.assert_close(other_y, y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(other_evaluated, evaluated, rtol=1e-4, atol=1e-5)
    for name, gradient in gradients.items():
        if gradient is None:
            assert other_gradients[name] is None, "a bias that batch norm cancels has none"
        else:
            scale = gradient.abs().max().item()
            torch.testing.assert_close(other_gradients[name], gradient, rtol=1e-3, atol=1e-4 * scale, msg=name)
    for name, value in statistics.items():
        torch.testing.assert_close(other_statistics[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.usefixtures("on_a_gpu")
def test_every_copied_weight_takes_its_gradient_there():
    """A copy that no layer computes with would keep its weight from being trained."""
    for net, x in ((encoder(), torch.rand(5, 3, 8, 8)), (decoder(), torch.randn(5, 4))):
        copies = Copies(halved_weights(net))
        with copies, torch.autocast("cpu", torch.bfloat16):
            y = net(x)
        (torch.cat(y, 1) if isinstance(y, tuple) else y).float().sum().backward()
        cancelled = {name for name, _ in net.named_parameters() if name.endswith("conv1.bias")}
        for name, p in net.named_parameters():
            leaf = copies.of.get(p, p)
            assert (leaf.grad is None) == (name in cancelled), name
        assert all(half.grad is not None for half in copies.of.values())


def test_ranks_that_share_statistics_take_an_offset_too(monkeypatch):
    x = torch.randn(5, 4)
    results = []
    for leaves in (False, True):
        net = decoder()
        for norm in batch_norms(net):
            norm.gather = lambda t: t[None]
        arrange(monkeypatch, leaves)
        results.append(train_once(net, x))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-5)
    for name, value in results[0][2].items():
        torch.testing.assert_close(results[1][2][name], value, rtol=1e-4, atol=1e-6, msg=name)


# ---- plain layers ---------------------------------------------------------------------------------------------------


def penalty(net, z):
    z = z.detach().requires_grad_()
    (slope,) = torch.autograd.grad(net(z).square().sum(), z, create_graph=True)
    return slope.square().sum()


@pytest.mark.parametrize("leaves", [False, True])
@pytest.mark.parametrize("amp", [False, True])
def test_a_gradient_penalty_through_the_decoder(leaves, amp, monkeypatch):
    arrange(monkeypatch, leaves)
    monkeypatch.setattr(conv, "SLOW_STRIDES", (1, 2))
    net, z = decoder(), torch.randn(5, 4)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        with pytest.raises(RuntimeError, match=r"second derivative|once_differentiable|differentiat"):
            penalty(net, z).backward()
        net.zero_grad()
        with plain_layers():
            value = penalty(net, z)
    value.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for n, p in net.named_parameters() if "conv1.b" not in n)


def test_the_penalty_is_the_derivative_of_the_gradient():
    """By finite differences in float64, of a weight of every kind of layer."""
    net, z = decoder().double(), torch.randn(3, 4, dtype=torch.float64)
    with plain_layers():
        penalty(net, z).backward()
        for name in ("upsample.0.weight", "scales.0.0.bn1.weight", "scales.1.0.conv2.weight", "scales.1.0.bn2.bias"):
            p = net.get_parameter(name)
            first = (0,) * p.dim()
            at = p[first].item()
            values = []
            for step in (1e-5, -1e-5):
                with torch.no_grad():
                    p[first] = at + step
                values.append(penalty(net, z).item())
            with torch.no_grad():
                p[first] = at
            assert (values[0] - values[1]) / 2e-5 == pytest.approx(p.grad[first].item(), rel=1e-3, abs=1e-6)


def test_plain_layers_compute_the_same():
    x = torch.rand(5, 3, 8, 8)
    net = encoder()
    other = copy.deepcopy(net)
    y, gradients, statistics, _ = train_once(net, x)
    assert not layers_are_plain()
    with plain_layers():
        assert layers_are_plain()
        other_y, other_gradients, other_statistics, _ = train_once(other, x)
    assert not layers_are_plain()
    torch.testing.assert_close(other_y, y, rtol=1e-4, atol=1e-5)
    for name, value in statistics.items():
        torch.testing.assert_close(other_statistics[name], value, rtol=1e-4, atol=1e-6)
    for name, gradient in gradients.items():
        if gradient is not None:
            torch.testing.assert_close(other_gradients[name], gradient, rtol=1e-3, atol=1e-3)
