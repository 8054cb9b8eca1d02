"""The buffers that a step moves: one vector, put back as a whole."""

import copy
import math

import torch
from torch import nn

from bvae.balance import FixedGammaLoss
from bvae.config import Config
from bvae.engine.state import Moved
from bvae.engine.step import Step
from bvae.models.norm import BatchNorm2d, batch_norms
from bvae.models.vae import VAE, first_stage, second_stage
from bvae.ops import make_rng
from bvae.stages.objective import Noise, VAEObjective


def config(**changes):
    small = {"preset": "shapes", "side": 8, "scales": 2, "base": 4, "fc": 8, "latents": 3, "hidden": 16}
    return Config(**{**small, **changes}).validate()


def drifting(steps, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [(1 + 0.1 * t) * torch.randn(8, 3, 4, 4, generator=g) + t for t in range(steps)]


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), BatchNorm2d(5), BatchNorm2d(5)
    )


def test_flattening_keeps_the_values_and_shares_them_both_ways():
    net = small_net()
    for x in drifting(3):
        net(x)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    flat = Moved(net, {}).flat
    assert flat.shape == (3 * 3 * 32,)  # three layers of three buffers, each padded to 32 elements
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    kept = flat.clone()
    net(drifting(5)[4])
    assert not torch.equal(flat, kept)
    flat.copy_(kept)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    flat.zero_()
    assert not any(b.any() for b in net.buffers())


def test_flattened_statistics_begin_where_vectorised_kernels_may_read():
    net = first_stage(config(blocks=2))
    flat = Moved(net, {}).flat
    starts = [t.data_ptr() - flat.data_ptr() for n in batch_norms(net) for t in n.buffers() if t.dtype == torch.float32]
    assert len(starts) > 9 and starts == sorted(set(starts))
    assert [start for start in starts if start % 128] == []


def test_flattening_survives_load_state_dict_and_a_move_to_where_it_is():
    net = small_net()
    flat = Moved(net, {}).flat
    trained = small_net()
    for x in drifting(3):
        trained(x)
    net.load_state_dict(trained.state_dict())
    net.to("cpu", memory_format=torch.channels_last)
    kept = flat.clone()
    assert kept.any()
    net(drifting(1)[0])
    assert not torch.equal(flat, kept)
    assert torch.equal(trained[1].running_mean, trained.state_dict()["1.running_mean"])


def test_flattened_networks_train_as_others_do():
    plain = first_stage(config(blocks=2))
    flattened = copy.deepcopy(plain)
    Moved(flattened, {})
    x = torch.rand(4, 3, 8, 8)
    for model in (plain, flattened):
        mu, log_sigma = model.encoder(x)
        # twice through the decoder before backward: every update of a statistic is a chance to break autograd
        (model.decoder(mu).square().mean() + model.decoder(log_sigma).mean()).backward()
    for (name, a), b in zip(plain.named_parameters(), flattened.parameters(), strict=True):
        if name.endswith("conv1.bias"):  # batch norm cancels it
            assert a.grad is b.grad is None
        else:
            assert torch.equal(a.grad, b.grad), name
    for (name, a), b in zip(plain.named_buffers(), flattened.buffers(), strict=True):
        assert torch.equal(a, b), name


def test_flattening_a_model_without_batch_norm():
    assert Moved(second_stage(config()), {}).flat.numel() == 0


def test_flattened_networks_can_be_copied_apart():
    net = small_net()
    flat = Moved(net, {}).flat
    twin = copy.deepcopy(net)
    twin(drifting(1)[0])
    assert not flat.any()


# ---- networks and losses of others ----------------------------------------------------------------------------------


class Mean(FixedGammaLoss):
    """A loss with a statistic of its own, which it replaces instead of changing it in place."""

    def __init__(self):
        super().__init__(gamma=0.3)
        self.register_buffer("mean", torch.zeros(()))

    def _loss(self, recon, target, kl, kl_weight, weight):
        loss = super()._loss(recon, target, kl, kl_weight, weight)
        if self.training:
            self.mean.mul_(0.9).add_(0.1 * loss.mse.detach())
        return loss


class Replacing(nn.Module):
    """A layer whose buffer is another tensor after each call."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x):
        if self.training:
            self.seen = 0.5 * self.seen + 0.5 * x.detach().mean((0, 2, 3))
        return x


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        conv = nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3, 2, 1))
        self.body = nn.Sequential(Replacing(), conv, nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Flatten())
        self.heads = nn.Linear(4 * 4 * 4, 6)

    def forward(self, x):
        return self.heads(self.body(x)).chunk(2, 1)


def foreign_step():
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Linear(3, 192), nn.BatchNorm1d(192, momentum=None), nn.Unflatten(1, (3, 8, 8)))
    model = VAE(Encoder(), decoder)
    objective = VAEObjective(Mean(), l2=0.1, penalised=[model.encoder.body[1]])
    step = Step(model, objective, Noise(make_rng(0)), 3, False)
    step.set_lr(1e-3)
    return step


def moved(step):
    state = {**dict(step.model.named_buffers()), **step.objective.state(), **dict(step.model.named_parameters())}
    return {name: t.detach().clone() for name, t in state.items()}


def test_a_bad_step_leaves_no_trace_in_any_buffer_of_any_module():
    step = foreign_step()
    g = torch.Generator().manual_seed(0)
    good = [torch.rand(8, 3, 8, 8, generator=g) for _ in range(3)]
    for x in good:  # the penalised kernel is a parametrisation: it is made anew in every step
        step(x, x)
    before = moved(step)
    assert before["mean"] > 0 and before["encoder.body.0.seen"].all()
    assert before["encoder.body.2.num_batches_tracked"] == 3
    bad = good[0].clone()
    bad[2, 1] = math.nan
    step(bad, good[0])
    for name, t in moved(step).items():
        assert torch.equal(t, before[name]), name
    step(good[0], good[0])
    assert step.sums.counts.tolist() == [4, 1]
    after = moved(step)
    changed = {name for name, t in after.items() if not torch.equal(t, before[name])}
    assert {"mean", "encoder.body.0.seen", "encoder.body.2.running_mean", "decoder.1.running_var"} <= changed
    assert all(t.isfinite().all() for t in after.values())


def test_adams_state_goes_by_name():
    """Two layers of equal shapes that change places: their moments go with them."""
    step = foreign_step()
    x = torch.rand(8, 3, 8, 8)
    step(x, x)
    saved = {name: t.clone() for name, t in step.tensors().items()}
    assert "adam.encoder.heads.weight.exp_avg" in saved
    other = foreign_step()
    other.load_tensors(saved)
    for name, t in other.tensors().items():
        assert torch.equal(t, saved[name]), name
    renamed = {name.replace("encoder.heads", "encoder.tails"): t for name, t in saved.items()}
    zero = foreign_step()
    zero.load_tensors(renamed)
    assert not zero.tensors()["adam.encoder.heads.weight.exp_avg"].any()
