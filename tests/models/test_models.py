import copy
import math

import pytest
import torch
from torch import nn

from bvae.config import PRESETS, Config
from bvae.models.norm import (
    BatchNorm2d,
    MeanStatistics,
    batch_norms,
    frozen_statistics,
    recompute_statistics,
)
from bvae.models.vae import count_parameters, first_stage, penalised_modules, second_stage


def config(**changes):
    small = {"preset": "shapes", "side": 8, "scales": 2, "base": 4, "fc": 8, "latents": 3, "hidden": 16}
    return Config(**{**small, **changes}).validate()


# ---- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "stage1", "stage2"),
    [
        ("cifar10", 5_190_467, 17_457_344),
        ("cifar10-code", 5_190_467, 17_457_344),
        ("celeba", 19_321_667, 68_456_640),
        ("celeba-1", 19_321_667, 68_456_640),
    ],
)
def test_the_published_parameter_counts(preset, stage1, stage2):
    with torch.device("meta"):
        assert count_parameters(first_stage(PRESETS[preset])) == stage1
        assert count_parameters(second_stage(PRESETS[preset])) == stage2


@pytest.mark.parametrize(
    ("side", "scales", "blocks", "base", "latents", "channels"),
    [
        (4, 1, 1, 2, 1, 1), (4, 3, 1, 2, 5, 3), (8, 2, 3, 4, 7, 3), (16, 5, 1, 2, 3, 1), (64, 4, 2, 2, 6, 3),
        (128, 2, 1, 1, 4, 1),
    ],
)  # fmt: skip
def test_shapes(side, scales, blocks, base, latents, channels):
    c = config(side=side, scales=scales, blocks=blocks, base=base, latents=latents, channels=channels)
    model = first_stage(c)
    mu, log_sigma = model.encoder(torch.rand(2, channels, side, side))
    assert mu.shape == log_sigma.shape == (2, latents)
    logits = model.decoder(mu)
    assert logits.shape == (2, channels, side, side)
    assert logits.min() < 0  # logits, not the image
    widths = [s[0].conv1.out_channels for s in model.encoder.scales]
    assert widths == [base * 2**i for i in range(scales)]
    assert all(len(s) == blocks for s in [*model.encoder.scales, *model.decoder.scales])
    if scales > 1:
        features = model.encoder.downsample[-1].out_channels
        assert features == widths[-1]


def test_decoder_channels_are_counted_from_the_output_side_and_capped():
    with torch.device("meta"):
        decoder = first_stage(config(side=128, base=64)).decoder
    assert [up.in_channels for up in decoder.upsample] == [1024, 1024, 1024, 512, 256, 128]
    assert [up.out_channels for up in decoder.upsample] == [1024, 1024, 512, 256, 128, 64]
    assert decoder.conv.in_channels == 64


def test_second_stage_reads_its_input_again_before_the_heads():
    model = second_stage(config())
    for trunk in (model.encoder.trunk, model.decoder.trunk):
        for layer in trunk.layers:
            nn.init.zeros_(layer.weight)
    z = torch.randn(5, 3)
    mu, log_sigma = model.encoder(z)
    assert mu.shape == log_sigma.shape == model.decoder(z).shape == (5, 3)
    # With a dead trunk the heads are linear in the input, and not constant.
    torch.testing.assert_close(model.encoder(2 * z)[0], 2 * mu)
    torch.testing.assert_close(model.decoder(2 * z), 2 * model.decoder(z))
    assert mu.abs().min() > 0


def test_empty_batches_pass():
    model = first_stage(config()).eval()
    mu, _ = model.encoder(torch.rand(0, 3, 8, 8))
    assert model.decoder(mu).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("training", [True, False])
def test_posterior_is_float32_under_bf16_autocast(training):
    torch.manual_seed(0)
    c = config()
    first, second = first_stage(c).train(training), second_stage(c).train(training)
    x = torch.rand(4, 3, 8, 8)
    full = first.encoder(x)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [*first.encoder(x.bfloat16()), *second.encoder(full[0].detach()), second.decoder(full[0].detach())]
        assert first.decoder(full[0].detach()).dtype == torch.bfloat16
    assert all(t.dtype == torch.float32 for t in outputs)
    torch.testing.assert_close(outputs[0], full[0], rtol=0.1, atol=0.1)
    # The heads' own product is not rounded to bf16.
    assert not torch.equal(outputs[0], outputs[0].bfloat16().float())


# ---- initial weights ------------------------------------------------------------------------------------------------


def test_glorot_uniform_weights_and_zero_biases():
    torch.manual_seed(0)
    c = config(base=16, fc=64, latents=32, hidden=64)
    seen = 0
    for m in [*first_stage(c).modules(), *second_stage(c).modules()]:
        if not isinstance(m, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            continue
        seen += 1
        assert not m.bias.any()
        area = math.prod(m.weight.shape[2:])
        bound = math.sqrt(6 / (area * (m.weight.shape[0] + m.weight.shape[1])))
        largest = m.weight.abs().max().item()
        assert 0.95 * bound < largest <= bound * (1 + 1e-6)
        assert m.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert seen > 20


# ---- l2 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("group", "count", "names"),
    [
        ("encoder.downsample", 1, ["encoder.downsample.0.weight"]),
        ("decoder.upsample", 2, ["decoder.upsample.0.weight", "decoder.upsample.1.weight"]),
        # two blocks a scale, three convolutions a block
        ("encoder.scales", 12, ["encoder.scales.0.0.conv1.weight", "encoder.scales.1.1.shortcut.weight"]),
        ("decoder.scales", 12, ["decoder.scales.0.0.conv2.weight", "decoder.scales.1.1.conv1.weight"]),
    ],
)
def test_l2_takes_the_kernels_of_its_group_and_no_others(group, count, names):
    model = first_stage(config(blocks=2))
    kernels = {id(m.weight) for m in penalised_modules(model, (group,))}
    found = [name for name, p in model.named_parameters() if id(p) in kernels]
    assert len(found) == len(kernels) == count
    assert all(name.startswith(group) and name.endswith("weight") and "bn" not in name for name in found)
    assert set(names) <= set(found)


def test_l2_groups_add_up():
    model = first_stage(config())
    assert penalised_modules(model, ()) == []
    both = penalised_modules(model, ("encoder.downsample", "decoder.upsample"))
    assert len(both) == len({id(m) for m in both}) == 3


# ---- batch normalisation --------------------------------------------------------------------------------------------


def drifting(steps, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [(1 + 0.1 * t) * torch.randn(8, 3, 4, 4, generator=g) + t for t in range(steps)]


def zero_debiased(batches, decay=0.999):
    """The formula: batch t is mixed in with weight (1-d)/(1-d^t), in float64."""
    mean = var = torch.zeros(3, dtype=torch.float64)
    for t, x in enumerate(batches, start=1):
        w = (1 - decay) / (1 - decay**t)
        x = x.double().transpose(0, 1).flatten(1)
        mean = mean + w * (x.mean(1) - mean)
        var = var + w * (x.var(1) - var)
    return mean, var


@pytest.mark.parametrize("steps", [1, 2, 40])
def test_statistics_are_zero_debiased(steps):
    norm = BatchNorm2d(3)
    batches = drifting(steps)
    for x in batches:
        norm(x)
    for actual, expected in zip(norm.statistics(), zero_debiased(batches), strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=2e-4, atol=1e-4)
    if steps == 1:
        torch.testing.assert_close(norm.statistics()[0], batches[0].mean((0, 2, 3)))


def test_eval_uses_the_debiased_statistics_and_changes_nothing():
    norm = BatchNorm2d(3)
    norm.weight.data = torch.tensor([1.0, 2.0, -1.0])
    norm.bias.data = torch.tensor([0.0, 1.0, 5.0])
    batches = drifting(5)
    for x in batches:
        norm(x)
    norm.eval()
    before = {name: t.clone() for name, t in norm.state_dict().items()}
    x = batches[2]
    mean, var = (s.view(3, 1, 1) for s in zero_debiased(batches))
    expected = (x.double() - mean) / (var + 1e-5).sqrt() * norm.weight.view(3, 1, 1) + norm.bias.view(3, 1, 1)
    torch.testing.assert_close(norm(x).double(), expected, rtol=1e-3, atol=1e-3)
    assert all(torch.equal(t, before[name]) for name, t in norm.state_dict().items())


def test_training_output_and_gradients_are_torchs():
    ours, theirs = BatchNorm2d(3), nn.BatchNorm2d(3, eps=1e-5)
    results = []
    for norm in (ours, theirs):
        x = drifting(2)[1].requires_grad_()
        y = norm(x)
        (y * torch.arange(y.numel()).view_as(y).sin()).sum().backward()
        results.append((y.detach(), x.grad, norm.weight.grad, norm.bias.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_before_any_step_eval_is_the_identity():
    norm = BatchNorm2d(3).eval()
    mean, var = norm.statistics()
    assert torch.equal(mean, torch.zeros(3))
    assert torch.equal(var, torch.ones(3))
    x = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(norm(x), x, rtol=2e-5, atol=0)


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), BatchNorm2d(5), BatchNorm2d(5)
    )


@pytest.mark.parametrize("mode", [True, False])
def test_recomputed_statistics_are_the_plain_mean_over_batches(mode):
    net = small_net()
    for x in drifting(7, seed=9):
        net(x * 100)  # what was there before must be forgotten
    net.train(mode)
    momentum = [n.momentum for n in batch_norms(net)]
    batches = drifting(6)
    seen = [[] for _ in range(3)]
    hooks = [n.register_forward_pre_hook(lambda _, a, s=s: s.append(a[0])) for n, s in zip(batch_norms(net), seen)]  # noqa: B905
    assert recompute_statistics(net, iter(batches), net) == 6
    for hook in hooks:
        hook.remove()
    assert all(m.training == mode for m in net.modules())
    assert [n.momentum for n in batch_norms(net)] == momentum
    for norm, inputs in zip(batch_norms(net), seen, strict=True):
        mean, var = norm.statistics()
        channels = [x.double().transpose(0, 1).flatten(1) for x in inputs]
        torch.testing.assert_close(
            mean.double(), torch.stack([c.mean(1) for c in channels]).mean(0), rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(
            var.double(), torch.stack([c.var(1) for c in channels]).mean(0), rtol=1e-4, atol=1e-5
        )


def test_recomputing_over_no_batch_or_no_batch_norm_changes_nothing():
    net = small_net()
    net(drifting(1)[0])
    before = copy.deepcopy(net.state_dict())
    assert recompute_statistics(net, [], net) == 0
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    dense = second_stage(config())
    assert recompute_statistics(dense, [torch.zeros(2, 3)], dense.encoder) == 0


def test_a_failing_batch_leaves_mode_and_momentum():
    net = small_net().eval()

    def fail(x):
        raise RuntimeError("out of memory")

    before = copy.deepcopy(net.state_dict())
    with pytest.raises(RuntimeError, match="out of memory"):
        recompute_statistics(net, drifting(2), fail)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert not any(m.training for m in net.modules())
    assert [n.momentum for n in batch_norms(net)] == pytest.approx([1e-3] * 3)


def test_one_mean_of_statistics_serves_again():
    """On tensors that stay where they are, as a recorded pass needs; torch's own batch norm is among them."""
    again, anew = small_net().append(nn.BatchNorm2d(5)), small_net().append(nn.BatchNorm2d(5))
    mean = MeanStatistics(again)
    places = [t.data_ptr() for t in (*mean.totals, *mean.buffers)]
    for seed in (0, 1):
        batches = drifting(4, seed=seed)
        recompute_statistics(anew, batches, anew)
        with torch.no_grad(), mean:
            for x in batches:
                again(x)
                mean.add()
        for name, t in anew.state_dict().items():
            torch.testing.assert_close(again.state_dict()[name], t, msg=name)
        assert all(n.running_weight == 1 for n in batch_norms(again))
    assert places == [t.data_ptr() for t in (*mean.totals, *mean.buffers)]
    before = copy.deepcopy(again.state_dict())
    with mean:
        pass
    assert all(torch.equal(t, before[name]) for name, t in again.state_dict().items())


def test_frozen_statistics_are_those_of_the_beginning():
    net = small_net()
    net(drifting(1)[0])
    net.eval()
    x = drifting(1, seed=3)[0]
    expected = net(x)
    with frozen_statistics(net):
        for n in batch_norms(net):
            n.running_mean += 1
        assert torch.equal(net(x), expected)
    assert not torch.equal(net(x), expected)


def test_recomputing_after_nan_statistics_forgets_them():
    net = small_net()
    net(torch.full((8, 3, 4, 4), math.nan))
    recompute_statistics(net, drifting(2), net)
    assert all(s.isfinite().all() for n in batch_norms(net) for s in n.statistics())
