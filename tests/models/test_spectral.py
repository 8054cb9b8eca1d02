"""Spectral norm: against power iterations in float64, and in everything that copies, restores or repeats a step."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bvae.models.half import Copies, halved_weights
from bvae.models.layers import SpectralConv, SpectralConvTranspose, SpectralDense

# name -> (layer, shape of its input)
LAYERS = {
    "dense, u of the inputs": (lambda: SpectralDense(7, 5), (6, 7)),
    "dense, u of the outputs": (lambda: SpectralDense(7, 5, u_of="rows"), (6, 7)),
    "convolution, u of the inputs": (lambda: SpectralConv(3, 5, 4, 2), (2, 3, 6, 8)),
    "convolution, u of the outputs": (lambda: SpectralConv(3, 5, 5, 2, u_of="rows"), (2, 3, 7, 8)),
    "transposed": (lambda: SpectralConvTranspose(3, 5, 4, 2), (2, 3, 4, 5)),
}


def made(name, dtype=torch.float64):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer = make().to(dtype)
    nn.init.normal_(layer.bias)
    return layer, torch.randn(shape, dtype=dtype)


def tensorflow_matrix(weight):
    """The weight in TensorFlow's layout, [kh,kw,in,out] or for a transposed one [kh,kw,out,in], without its last axis
    flattened; of a dense layer [in,out]."""
    return (weight.permute(2, 3, 1, 0) if weight.ndim == 4 else weight.t()).reshape(-1, weight.shape[0])


def apply(layer, x, weight):
    """What a layer without spectral norm computes with `weight`."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, layer.bias)
    if isinstance(layer, nn.ConvTranspose2d):
        return F.conv_transpose2d(x, weight, layer.bias, layer.stride, layer.padding, layer.output_padding)
    return F.conv2d(x, weight, layer.bias, layer.stride, layer.padding)


def iteration(layer):
    """Dai & Wipf's (u of the rows of TensorFlow's matrix) or Ghosh et al.'s (u of its columns): (sigma, next u)."""
    w = tensorflow_matrix(layer.weight.detach().double())
    u = layer.u.double()
    if layer.u_of == "columns":
        v = w.t() @ u
        v = v / v.norm()
        u = w @ v
        u = u / u.norm()
        return u @ w @ v, u
    v = w @ u
    v = v / v.norm()
    u = w.t() @ v
    u = u / u.norm()
    return v @ w @ u, u


@pytest.mark.parametrize("name", list(LAYERS))
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_each_training_step_is_one_power_iteration(name, memory_format):
    layer, x = made(name)
    layer.to(memory_format=memory_format)
    assert layer.u.numel() == tensorflow_matrix(layer.weight).shape[0 if layer.u_of == "columns" else 1]
    for _ in range(4):
        sigma, u = iteration(layer)
        torch.testing.assert_close(layer(x), apply(layer, x, layer.weight / sigma), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(layer.u, u, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", list(LAYERS))
def test_it_converges_to_the_largest_singular_value(name):
    layer, x = made(name)
    for _ in range(300):
        y = layer(x)
    sigma = torch.linalg.matrix_norm(tensorflow_matrix(layer.weight), 2)
    torch.testing.assert_close(y, apply(layer, x, layer.weight / sigma), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", list(LAYERS))
def test_gradients_stop_at_the_singular_vectors(name):
    layer, x = made(name)
    x.requires_grad_()
    sigma, u = iteration(layer)
    w = tensorflow_matrix(layer.weight)
    v = F.normalize((w.t() if layer.u_of == "columns" else w).detach() @ layer.u, dim=0)
    quotient = u @ w @ v if layer.u_of == "columns" else v @ w @ u
    assert quotient.item() == pytest.approx(sigma.item())
    expected = apply(layer, x, layer.weight / quotient)
    factor = torch.randn_like(expected)
    inputs = (x, layer.weight, layer.bias)
    wanted = torch.autograd.grad((expected.sin() * factor).sum(), inputs, create_graph=True)
    got = torch.autograd.grad((layer(x).sin() * factor).sum(), inputs, create_graph=True)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    # Penalties on gradients need second ones.
    second = [torch.autograd.grad(sum(g.square().sum() for g in grads), inputs) for grads in (got, wanted)]
    for a, b in zip(*second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", list(LAYERS))
def test_looking_does_not_move_u(name):
    layer, x = made(name)
    kept = layer.u.clone()
    with torch.no_grad():
        first = layer(x)
        assert torch.equal(layer(x), first)
    layer.eval()
    assert torch.equal(layer(x), first)
    assert torch.equal(layer.u, kept)
    layer.train()
    layer(x)
    assert not torch.equal(layer.u, kept)


@pytest.mark.parametrize("name", list(LAYERS))
def test_copies_and_saved_states_go_on_alike(name):
    layer, x = made(name, torch.float32)
    layer(x)
    twin = copy.deepcopy(layer)
    loaded, _ = made(name, torch.float32)
    loaded.load_state_dict(layer.state_dict())
    expected = layer(x)
    assert torch.equal(twin(x), expected)
    assert torch.equal(loaded(x), expected)
    assert torch.equal(twin.u, layer.u)
    assert twin.u.data_ptr() != layer.u.data_ptr()


@pytest.mark.parametrize("name", list(LAYERS))
def test_two_passes_before_one_backward(name):
    layer, x = made(name)
    first, second = layer(x), layer(x)
    (first.sum() + second.square().sum()).backward()
    alone, _ = made(name)
    alone(x)  # moves u to where the second pass began
    alone(x).square().sum().backward()
    start, _ = made(name)
    start(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, alone.weight.grad + start.weight.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", list(LAYERS))
def test_under_bf16_autocast(name):
    layer, x = made(name, torch.float32)
    plain = copy.deepcopy(layer)
    expected = plain(x)
    factor = torch.randn_like(expected)
    (expected * factor).sum().backward()
    with Copies(halved_weights(layer)) as copies, torch.autocast("cpu", torch.bfloat16):
        y = layer(x.bfloat16())
    assert y.dtype == torch.bfloat16
    (y.float() * factor).sum().backward()
    grad = copies.of[layer.weight].grad if layer.weight in copies.of else layer.weight.grad
    assert (y.float() - expected).norm() < 0.02 * expected.norm()
    assert (grad.float() - plain.weight.grad).norm() < 0.03 * plain.weight.grad.norm()
    assert (layer.bias.grad - plain.bias.grad).norm() < 0.02 * plain.bias.grad.norm()
