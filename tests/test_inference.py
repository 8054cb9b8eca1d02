"""Arrays as images, narrow and wide types, and the module's own forward pass."""

import copy

import numpy as np
import pytest
import torch

from bvae import BalancedLoss
from bvae.config import Config
from bvae.two_stage import TwoStageVAE


def build(channels=3, **changes):
    settings = {"preset": "shapes", "side": 8, "scales": 2, "base": 4, "fc": 8, "latents": 3, "hidden": 16} | changes
    torch.manual_seed(0)
    model = TwoStageVAE(Config(channels=channels, **settings))
    for _ in range(3):  # batch norms that have seen something
        mu, _ = model.stage1.encoder(torch.rand(16, channels, 8, 8))
        model.stage1.decoder(mu)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return build()


def pixels(n=5, channels=3):
    return np.random.default_rng(0).integers(0, 256, (n, 8, 8, channels), np.uint8)


# ---- arrays ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("n", [0, 1, 300])
def test_arrays_and_tensors_in_either_layout_are_one(channels, n):
    model = build(channels)
    x = pixels(n, channels)
    expected = model.encode(torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255)
    first = np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    for images in (x, first, torch.from_numpy(x), torch.from_numpy(first), first / np.float32(255)):
        for got, want in zip(model.encode(images), expected, strict=True):
            assert got.dtype == torch.float32
            torch.testing.assert_close(got, want)


def test_any_array_of_numpy(model, tmp_path, recwarn):
    x = pixels()
    expected = model.encode(x)[0]
    read_only = x.copy()
    read_only.flags.writeable = False
    np.save(tmp_path / "x.npy", x)
    images = x.transpose(0, 3, 1, 2) / 255
    for other in (
        read_only,
        np.load(tmp_path / "x.npy", mmap_mode="r"),
        x[:, ::-1][:, ::-1],
        images,  # float64
        images.astype(">f4"),
        np.asfortranarray(images),
    ):
        torch.testing.assert_close(model.encode(other)[0], expected)
    torch.testing.assert_close(model.encode(images[::-1])[0], expected.flip(0))
    assert not recwarn.list


@pytest.mark.parametrize("shape", [(2, 8, 8, 1), (8, 8, 3), (2, 8, 3, 8), (2, 1, 8, 8), (2, 4, 4, 3)])
def test_wrong_arrays_are_told(model, shape):
    with pytest.raises(ValueError, match=r"images must be \[B,3,8,8\]"):
        model.encode(np.zeros(shape, np.uint8))


def test_floats_with_the_channels_last_are_not_guessed(model):
    with pytest.raises(ValueError, match=r"images must be \[B,3,8,8\]"):
        model.encode(np.zeros((2, 8, 8, 3), np.float32))


def test_lists_and_integers_are_told(model):
    with pytest.raises(TypeError, match="a tensor or a NumPy array, not list"):
        model.encode([[0.0]])
    with pytest.raises(ValueError, match=r"floats in \[0,1\] or uint8"):
        model.encode(np.zeros((2, 3, 8, 8), np.int64))


# ---- types ----------------------------------------------------------------------------------------------------------

TYPES = {torch.float16: 0.02, torch.bfloat16: 0.1, torch.float64: 1e-4}


@pytest.mark.parametrize("dtype", TYPES)
def test_inference_in_another_type(model, dtype):
    """Close to float32's, by the type's precision; what comes out is float32, or float64 of a float64 model."""
    other = copy.deepcopy(model).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    x = pixels()
    close = {"rtol": TYPES[dtype], "atol": TYPES[dtype], "check_dtype": False}
    results = {
        "mu": (model.encode(x)[0], other.encode(x)[0]),
        "log_sigma": (model.encode(x)[1], other.encode(x)[1]),
        "reconstruct": (model.reconstruct(x), other.reconstruct(x)),
        "drawn": (model.reconstruct(x, sample=True), other.reconstruct(x, sample=True)),
        "sample": (model.sample(4), other.sample(4)),
        "stage 1": (model.sample(4, stage=1), other.sample(4, stage=1)),
        "rescaled": (model.sample(4, rescale=True), other.sample(4, rescale=True)),
        "forward": (model(x).recon, other(x).recon),
    }
    for name, (expected, got) in results.items():
        assert got.dtype == wide, name
        torch.testing.assert_close(got, expected, **close, msg=lambda text, name=name: f"{name}: {text}")
    assert all(t.dtype == dtype for t in other.state_dict().values())


@pytest.mark.parametrize("dtype", TYPES)
def test_noise_is_float32s_in_every_type(model, dtype):
    other = copy.deepcopy(model).to(dtype)
    assert torch.equal(other.sample_latents(50, stage=1), model.sample_latents(50, stage=1))
    assert other.sample_latents(5, stage=1).dtype == torch.float32


@pytest.mark.parametrize("dtype", TYPES)
def test_latents_of_any_type_are_decoded(model, dtype):
    z = torch.randn(3, 3)
    torch.testing.assert_close(model.decode(z.to(dtype)), model.decode(z), rtol=0.02, atol=0.02)


def test_float64_computes_in_float64(model):
    """A head that fell back to float32 would agree with a float64 computation to 1e-7 only."""
    other = copy.deepcopy(model).double()
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    h = {}
    other.stage1.encoder.fc.register_forward_hook(lambda *call: h.update(out=call[2]))
    mu, _ = other.encode(x)
    head = other.stage1.encoder.mu
    expected = h["out"].numpy() @ head.weight.detach().numpy().T + head.bias.detach().numpy()
    np.testing.assert_allclose(mu.numpy(), expected, rtol=1e-13)


def test_the_rescale_is_measured_in_any_type(model):
    g = torch.Generator().manual_seed(0)
    mu, log_sigma = torch.randn(50, 3, generator=g), torch.full((50, 3), -1.0)
    expected = copy.deepcopy(model).measure_rescale(mu, log_sigma, samples=100)
    got = copy.deepcopy(model).half().measure_rescale(mu, log_sigma, samples=100)
    assert got == pytest.approx(expected, rel=0.02)


# ---- forward --------------------------------------------------------------------------------------------------------


def test_forward_in_eval_mode_is_the_reconstruction(model):
    x = pixels()
    recon, mu, log_sigma = out = model(x)
    assert not model.training
    assert out._fields == ("recon", "mu", "log_sigma")
    torch.testing.assert_close(recon, model.reconstruct(x))
    for got, want in zip((mu, log_sigma), model.encode(x), strict=True):
        torch.testing.assert_close(got, want)
    assert recon.requires_grad


def test_forward_in_training_mode_draws_from_the_posterior(model):
    model = copy.deepcopy(model).train()
    x = pixels(64)
    torch.manual_seed(3)
    recon, mu, log_sigma = model(x)
    assert model.training
    again = model(x)
    torch.testing.assert_close(again.mu, mu)  # batch statistics, both times
    assert not torch.allclose(again.recon, recon, atol=1e-3)
    torch.manual_seed(3)
    z = mu + log_sigma.exp() * torch.randn(64, 3)
    torch.testing.assert_close(torch.sigmoid(model.stage1.decoder(z)), recon)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_trains_through_forward(dtype):
    """As a user would: forward, BalancedLoss, backward. Every parameter of the first stage gets a gradient."""
    model, criterion = build().train().to(dtype), BalancedLoss(logits=False)
    optimizer = torch.optim.SGD(model.stage1.parameters(), lr=1e-3)
    x = torch.from_numpy(pixels(32).transpose(0, 3, 1, 2) / np.float32(255))
    losses = []
    for _ in range(20):
        recon, mu, log_sigma = model(x)
        loss = criterion(recon, x, mu, log_sigma)
        optimizer.zero_grad()
        loss.loss.backward()
        losses.append(float(loss.mse))
        optimizer.step()
    silent = [name for name, p in model.stage1.named_parameters() if p.grad is None]
    assert all(name.endswith("conv1.bias") for name in silent)  # the bias that batch norm cancels
    assert np.mean(losses[-5:]) < 0.99 * np.mean(losses[:5])
