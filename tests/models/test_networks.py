"""The published networks: sizes, initial weights, outputs, gradients, and what a training step moves."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bvae.balance import make_loss
from bvae.engine.step import Step
from bvae.errors import UserError
from bvae.models.half import Copies, halved_weights
from bvae.models.infogan import infogan
from bvae.models.layers import SpectralConv, SpectralConvTranspose, SpectralDense
from bvae.models.mlp import mlp
from bvae.models.norm import BatchNorm2d, batch_norms, recompute_statistics
from bvae.models.rae import rae
from bvae.models.vae import VAE, count_parameters
from bvae.models.wae import wae
from bvae.ops import make_rng
from bvae.stages.objective import Noise, VAEObjective

NETWORKS = {
    "infogan": infogan,
    "wae": wae,
    "wae celeba": lambda *size, **more: wae(*size, "celeba", **more),
    "wae mnist": lambda *size, **more: wae(*size, "mnist", **more),
    "rae": rae,
    "rae celeba": lambda *size, **more: rae(*size, "celeba", **more),
    "rae spectral": lambda *size, **more: rae(*size, spectral="all", **more),
    "mlp": mlp,
}


def narrow(monkeypatch):
    """Lets the networks have 64 channels at most, and InfoGAN's dense layers as many units."""
    monkeypatch.setattr("bvae.models.infogan.WIDTH", 64)
    monkeypatch.setattr("bvae.models.wae.WIDTHS", (8, 16, 32, 64))


def made(name, monkeypatch, size=(3, 16, 16, 5), **more):
    narrow(monkeypatch)
    torch.manual_seed(0)
    vae = VAE(*NETWORKS[name](*size, **more))
    return vae.to(memory_format=torch.channels_last)


# ---- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "size", "more", "encoder", "decoder"),
    [
        # Dai & Wipf count the learned gamma with the decoder: 17,273,604 in all.
        (infogan, (3, 32, 32, 64), {}, 8_657_472, 8_616_132 - 1),
        (rae, (1, 32, 32, 16), {"deterministic": True}, 11_083_408, 11_606_273),
        (rae, (3, 32, 32, 128), {"deterministic": True}, 11_546_368, 18_954_499),
        (rae, (3, 64, 64, 64), {"variant": "celeba", "deterministic": True}, 18_267_200, 21_475_331),
        (wae, (3, 64, 64, 64), {"variant": "celeba", "deterministic": True}, 18_267_200, 21_475_331),
        (wae, (1, 28, 28, 8), {"variant": "mnist", "deterministic": True}, 11_050_632, 10_943_745),
    ],
)
def test_the_published_parameter_counts(network, size, more, encoder, decoder):
    with torch.device("meta"):
        assert [count_parameters(part) for part in network(*size, **more)] == [encoder, decoder]


def dense(a, b):
    return a * b + b


def conv(k, a, b, norm=True):
    return k * k * a * b + b + 2 * b * norm


def counted(name, c, h, w, z):
    """Parameters of encoder and decoder, written out layer by layer."""
    if name == "infogan":
        n = 128 * h * w // 16
        encoder = conv(4, c, 64, False) + conv(4, 64, 128) + dense(n, 1024) + 2048 + dense(1024, 2 * z)
        decoder = dense(z, 1024) + 2048 + dense(1024, n) + 2 * n + conv(4, 128, 64) + conv(4, 64, c, False)
        return encoder, decoder
    if name == "mlp":
        d = c * h * w
        encoder = dense(d, 512) + dense(512, 256) + 2 * dense(256, z)
        return encoder, dense(z, 256) + dense(256, 512) + dense(512, d)
    k = 5 if name in ("wae", "wae celeba", "rae celeba") else 4
    down = 8 if name == "wae" else 16
    features = 1024 * math.ceil(h / down) * math.ceil(w / down)
    encoder = conv(k, c, 128) + conv(k, 128, 256) + conv(k, 256, 512) + conv(k, 512, 1024) + 2 * dense(features, z)
    up = 8 if k == 5 else 4
    decoder = dense(z, 1024 * h * w // up**2) + conv(k, 1024, 512) + conv(k, 512, 256)
    decoder += conv(k, 256, 128) + conv(k, 128, c, False) if k == 5 else conv(k, 256, c, False)
    return encoder, decoder


SIZES = [(1, 28, 28, 64), (3, 32, 32, 7), (3, 40, 40, 64), (1, 64, 64, 16), (3, 96, 64, 32), (3, 8, 16, 2)]


@pytest.mark.parametrize("name", list(NETWORKS))
@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts_at_other_sizes(name, size):
    if size[1] % 8 and name in ("wae", "wae celeba", "rae celeba"):
        with pytest.raises(UserError, match="sides that 8 divides, not 28x28"):
            NETWORKS[name](*size)
        return
    with torch.device("meta"):
        assert tuple(count_parameters(part) for part in NETWORKS[name](*size)) == counted(name, *size)


@pytest.mark.parametrize("name", list(NETWORKS))
@pytest.mark.parametrize("sides", [(30, 30), (32, 30), (2, 32), (0, 4)])
def test_sides_that_cannot_be_are_refused_in_one_line(name, sides):
    if name == "mlp":
        return
    with pytest.raises(UserError, match=rf"--network {name[:3]}.* needs sides .*not {sides[0]}x{sides[1]}"):
        NETWORKS[name](3, *sides, 4)


# ---- outputs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(NETWORKS))
@pytest.mark.parametrize("size", [(1, 28, 28, 3), (3, 16, 24, 5), (3, 8, 8, 2)])
@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
def test_shapes_and_types(name, size, amp, deterministic, monkeypatch):
    if size[1] == 28 and name in ("wae", "wae celeba", "rae celeba"):
        size = (1, 24, 40, 3)
    model = made(name, monkeypatch, size, deterministic=deterministic)
    x = torch.rand(4, *size[:3]).contiguous(memory_format=torch.channels_last)
    assert model.encoder.deterministic is deterministic
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        out = model.encoder(x.bfloat16() if amp else x)
        logits = model.decoder(torch.randn(4, size[3]))
    for part in (out,) if deterministic else out:
        assert part.shape == (4, size[3])
        assert part.dtype == torch.float32
        assert not torch.equal(part, part.bfloat16().float())  # the head's own product is not rounded to bf16
    assert logits.shape == x.shape
    assert logits.dtype == (torch.bfloat16 if amp else torch.float32)
    assert logits.min() < 0  # logits, not the image


@pytest.mark.parametrize("name", list(NETWORKS))
def test_empty_batches_and_memory_formats(name, monkeypatch):
    model = made(name, monkeypatch).eval()
    out = model.encoder(torch.rand(0, 3, 16, 16))
    assert model.decoder(out[0]).shape == (0, 3, 16, 16)
    x = torch.rand(3, 3, 16, 16)
    plain = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    z = torch.randn(3, 5)
    for a, b in zip((*model.encoder(x.contiguous(memory_format=torch.channels_last)), model.decoder(z)),
                    (*plain.encoder(x), plain.decoder(z)), strict=True):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", list(NETWORKS))
def test_under_bf16_autocast_they_compute_the_same(name, monkeypatch):
    model = made(name, monkeypatch)
    x = torch.rand(8, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    z = torch.randn(8, 5)
    twin = copy.deepcopy(model)
    expected = *twin.encoder(x), twin.decoder(z)
    with Copies(halved_weights(model)), torch.autocast("cpu", torch.bfloat16):
        got = *model.encoder(x.bfloat16()), model.decoder(z)
    for a, b in zip(got, expected, strict=True):
        assert (a.float() - b).norm() < 0.1 * b.norm()


# ---- initial weights ------------------------------------------------------------------------------------------------


def is_normal(w, std):
    assert w.std().item() == pytest.approx(std, rel=0.1)
    assert abs(w.mean().item()) < 6 * std / w.numel() ** 0.5
    assert 2 * std < w.abs().max().item() < 7 * std


def is_truncated(w, std):
    assert w.abs().max().item() <= 2 * std
    # The standard deviation of a normal distribution cut at two of them.
    assert w.std().item() == pytest.approx(0.8796 * std, rel=0.1)


def is_glorot(w, std):
    area = math.prod(w.shape[2:])
    bound = math.sqrt(6 / (area * (w.shape[0] + w.shape[1])))
    assert 0.9 * bound < w.abs().max().item() <= bound * (1 + 1e-6)
    assert w.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)


@pytest.mark.parametrize(
    ("name", "convolution", "other", "std"),
    [
        ("infogan", is_truncated, is_normal, 0.02),
        ("wae celeba", is_truncated, is_normal, 0.01),
        ("wae mnist", is_truncated, is_normal, 0.01),
        *((name, is_glorot, is_glorot, None) for name in ("wae", "rae", "rae celeba", "rae spectral", "mlp")),
    ],
)
def test_initial_weights_are_the_authors(name, convolution, other, std, monkeypatch):
    model = made(name, monkeypatch, size=(3, 32, 32, 40))
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)]
    assert len(layers) >= 7
    for m in layers:
        (convolution if isinstance(m, nn.Conv2d) else other)(m.weight.detach(), std)
        assert m.bias is not None
        assert not m.bias.any()
    for norm in batch_norms(model):
        assert (norm.weight == 1).all()
        assert not norm.bias.any()


@pytest.mark.parametrize(
    ("name", "eps", "decay", "count"),
    [
        ("infogan", 1e-5, 0.999, 5), ("wae", 1e-5, 0.999, 7), ("wae celeba", 1e-5, 0.9, 7), ("wae mnist", 1e-5, 0.9, 6),
        ("rae", 1e-3, 0.99, 6), ("rae celeba", 1e-3, 0.99, 7), ("mlp", 0, 0, 0),
    ],
)  # fmt: skip
def test_batch_norms_are_the_authors(name, eps, decay, count, monkeypatch):
    norms = list(batch_norms(made(name, monkeypatch)))
    assert len(norms) == count
    assert {n.eps for n in norms} <= {eps}
    assert all(n.momentum == pytest.approx(1 - decay) for n in norms)


def test_which_layers_have_spectral_norm(monkeypatch):
    kinds = (SpectralConv, SpectralConvTranspose, SpectralDense)

    def found(name, **more):
        model = made(name, monkeypatch, **more)
        return {n for n, m in model.named_modules() if isinstance(m, kinds)}

    assert found("infogan") == {f"encoder.{n}" for n in ("conv1", "conv2", "fc3", "posterior")}
    decoder = {"decoder.fc", "decoder.ups.0", "decoder.ups.1", "decoder.out", "encoder.heads.mu"}
    assert found("rae", spectral="decoder") == decoder
    assert found("rae", spectral="all") == decoder | {f"encoder.convs.{i}" for i in range(4)}
    assert found("rae") == found("wae") == found("mlp") == set()


# ---- the heads ------------------------------------------------------------------------------------------------------


def test_the_sigma_of_infogan_is_a_softplus():
    encoder, _ = infogan(1, 8, 8, 200)
    encoder.eval()
    nn.init.zeros_(encoder.posterior.weight)
    encoder.posterior.weight.data[0, 0] = 1.0  # the singular value is 1; that row is of mu
    a = torch.linspace(-80, 40, 200)
    encoder.posterior.bias.data[200:] = a
    x = torch.rand(2, 1, 8, 8)
    _, log_sigma = encoder(x)
    sigma = 1e-6 + torch.log1p(torch.exp(a.double()))
    torch.testing.assert_close(log_sigma[0].double(), sigma.log(), rtol=1e-6, atol=1e-6)
    log_sigma.sum().backward()
    expected = torch.autograd.grad(torch.log(1e-6 + F.softplus(b := a.double().requires_grad_())).sum(), b)[0]
    got = encoder.posterior.bias.grad[200:].double() / 2
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "of"),
    [
        ("wae", lambda a: a),
        ("wae celeba", lambda a: 0.5 * a.clamp(-50, 50)),
        ("wae mnist", lambda a: 0.5 * a.clamp(-50, 50)),
        ("rae", lambda a: 5 * a.tanh()),
        ("mlp", lambda a: a),
    ],
)
def test_log_sigma_is_the_authors(name, of, monkeypatch):
    model = made(name, monkeypatch, size=(3, 16, 16, 100)).eval()
    a = torch.linspace(-120, 120, 100)
    head = model.encoder.heads.log_sigma
    nn.init.zeros_(head.weight)
    head.bias.data.copy_(a)
    torch.testing.assert_close(model.encoder(torch.rand(1, 3, 16, 16))[1][0], of(a))


# ---- training -------------------------------------------------------------------------------------------------------


def loss_of(model, x, amp=False):
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        out = model.encoder(x)
        mu, log_sigma = (out, out.new_zeros(())) if model.encoder.deterministic else out
        # Squares of log sigma too: an exponential of the untrained one may overflow.
        logits = model.decoder(mu)
    return (torch.sigmoid(logits.float()) - x.float()).square().sum() + mu.square().sum() + log_sigma.square().sum()


def cancelled(model):
    """Names of the biases that batch norm cancels."""
    return {f"{name}.bias" for name, m in model.named_modules() if getattr(m, "cancelled", False)}


@pytest.mark.parametrize("name", list(NETWORKS))
@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
def test_the_gradient_reaches_every_parameter(name, amp, deterministic, monkeypatch):
    model = made(name, monkeypatch, deterministic=deterministic)
    x = torch.rand(6, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    copies = Copies(halved_weights(model) if amp else [])
    with copies:
        loss_of(model, x, amp).backward()
    biases = cancelled(model)
    for parameter, p in model.named_parameters():
        grad = copies.of.get(p, p).grad
        if parameter in biases:
            assert grad is None, parameter
        else:
            assert grad is not None and grad.isfinite().all() and grad.any(), parameter
    # Batch norm follows every layer whose bias gets no gradient, and no other.
    assert len(biases) == len(list(batch_norms(model)))


@pytest.mark.parametrize("name", list(NETWORKS))
def test_a_cancelled_bias_changes_nothing_in_training(name, monkeypatch):
    model = made(name, monkeypatch)
    x = torch.rand(6, 3, 16, 16)
    twin = copy.deepcopy(model)
    for parameter, p in twin.named_parameters():
        if parameter in cancelled(twin):
            nn.init.normal_(p, std=0.1)
    torch.testing.assert_close(loss_of(twin, x), loss_of(model, x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", list(NETWORKS))
def test_restored_buffers_undo_a_batch_with_nan(name, monkeypatch):
    model = made(name, monkeypatch)
    twin = copy.deepcopy(model)
    batches = torch.rand(3, 6, 3, 16, 16)

    def step(m, x):
        m.zero_grad()
        loss_of(m, x).backward()
        with torch.no_grad():
            for p in m.parameters():
                if p.grad is not None:
                    p -= 1e-4 * p.grad

    for m in (model, twin):
        step(m, batches[0])
    kept = {n: t.clone() for n, t in model.state_dict().items()}
    step(model, torch.full_like(batches[0], math.nan))
    with torch.no_grad():
        for n, t in model.state_dict().items():
            t.copy_(kept[n])
    for m in (model, twin):
        for x in batches[1:]:
            step(m, x)
    for (n, a), b in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(a, b), n
        assert a.isfinite().all(), n
        assert not torch.equal(a, kept[n]) or n in cancelled(model), n


@pytest.mark.parametrize("name", ["infogan", "rae spectral"])
@pytest.mark.parametrize("amp", [False, True])
def test_steps_with_penalised_spectral_kernels_and_a_batch_with_nan(name, amp, monkeypatch):
    model = made(name, monkeypatch)
    penalised = [m for m in model.modules() if isinstance(m, SpectralConv | SpectralDense)]
    objective = VAEObjective(make_loss("computed"), amp, 1e-3, penalised)
    step = Step(model, objective, Noise(make_rng(0)), 5, amp)
    step.set_lr(1e-4)
    target = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
    x = target.float() / 255
    first = {n: t.clone() for n, t in model.state_dict().items()}
    step(x, target)
    step(x, target)
    second = {n: t.clone() for n, t in model.state_dict().items()}
    for n in first.keys() - cancelled(model):
        assert not torch.equal(first[n], second[n]), n
    step(torch.full_like(x, math.nan), target)
    assert step.sums.counts.tolist() == [2, 1]
    assert all(torch.equal(t, second[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("name", ["infogan", "rae spectral"])
def test_measurements_between_steps_do_not_move_singular_vectors(name, monkeypatch):
    model = made(name, monkeypatch)
    x = torch.rand(6, 3, 16, 16)
    before = {n: t.clone() for n, t in model.named_buffers() if n.endswith(".u")}
    assert before
    recompute_statistics(model, [x, x], lambda x: model.decoder(model.encoder(x)[0]))
    assert all(torch.equal(t, before[n]) for n, t in model.named_buffers() if n in before)


def test_dense_batch_norm_is_over_the_batch(monkeypatch):
    model = made("infogan", monkeypatch, size=(1, 8, 8, 3))
    seen = []
    bn3 = model.encoder.bn3
    bn3.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    model.encoder(torch.rand(7, 1, 8, 8))
    ((x, y),) = seen
    assert x.shape == (7, 64, 1, 1)
    torch.testing.assert_close(y[:, :, 0, 0], F.batch_norm(x[:, :, 0, 0], None, None, training=True, eps=1e-5))
    assert isinstance(bn3, BatchNorm2d)
    torch.testing.assert_close(bn3.statistics()[0], x[:, :, 0, 0].mean(0), rtol=1e-4, atol=1e-6)
