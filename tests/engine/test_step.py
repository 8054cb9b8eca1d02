import copy
import math

import pytest
import torch

from bvae import ops
from bvae.balance import make_loss
from bvae.config import Config
from bvae.engine.step import Step
from bvae.models.vae import first_stage, penalised_modules, second_stage
from bvae.stages.objective import Noise, VAEObjective

CONFIG = Config(preset="shapes", side=8, scales=2, base=4, fc=8, latents=3, hidden=16)
BALANCES = ["computed", "learned", "fixed"]


def batch(seed=0, size=6):
    target = torch.randint(0, 256, (size, 3, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    x = (target.float() / 255).contiguous(memory_format=torch.channels_last)
    return x, target


def make(balance="computed", l2=0.0, groups=(), amp=False, lr=1e-2):
    torch.manual_seed(0)
    model = first_stage(CONFIG).to(memory_format=torch.channels_last)
    loss = make_loss(balance, gamma=0.3 if balance == "fixed" else None)
    objective = VAEObjective(loss, amp, l2, penalised_modules(model, groups))
    step = Step(model, objective, Noise(ops.make_rng(7)), 3, amp)
    step.set_lr(lr)
    return step


def state(step):
    """Everything a step may change, copied."""
    tensors = {f"model.{name}": t for name, t in step.model.state_dict().items()} | step.tensors()
    return {name: t.detach().clone() for name, t in tensors.items()}


def same(a, b, but=()):
    assert a.keys() == b.keys()
    for name, t in a.items():
        if name not in but:
            assert torch.equal(t, b[name]), name


# ---- a good step ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("balance", BALANCES)
def test_the_loss_falls(balance):
    step = make(balance)
    losses = []
    for _ in range(30):
        step.sums.reset()
        step(*batch())
        losses.append(step.sums.parts[0].item())
    assert losses[-1] < losses[0] - 1
    # 30 steps of the rule with an error near 0.09
    expected = {"computed": 0.99**30 + 0.09 * (1 - 0.99**30), "learned": 1.0, "fixed": 0.09}[balance]
    assert step.objective.loss.gamma2.item() == pytest.approx(expected, rel=0.05 if balance == "computed" else 1e-6)
    if balance == "learned":
        assert step.objective.loss.log_gamma < -0.1
    assert step.tensors()[f"adam.{step.names[0]}.step"] == 30


def test_one_step_is_the_plain_one():
    """The same step written out with torch's own pieces."""
    step = make()
    model, loss = copy.deepcopy(step.model), make_loss("computed")
    x, target = batch()
    step(x, target)
    mu, log_sigma = model.encoder(x)
    z = mu + log_sigma.exp() * ops.philox_normal(ops.make_rng(7), 6, 3)
    loss(model.decoder(z), target, mu, log_sigma).loss.backward()
    torch.optim.Adam(model.parameters(), lr=1e-2).step()
    largest = max(p.grad.abs().max().item() for p in model.parameters() if p.grad is not None)
    for (name, a), b in zip(step.model.named_parameters(), model.parameters(), strict=True):
        if name.endswith("conv1.bias"):  # batch norm cancels it
            assert a.grad is None
            assert not a.any()
            continue
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5 * largest, msg=name)
        # Adam's first step is lr * sign(gradient): entries whose gradient is all rounding may go either way.
        sure = b.grad.abs() > 1e-3 * largest
        torch.testing.assert_close(a[sure], b[sure], rtol=0, atol=1e-4, msg=name)
    torch.testing.assert_close(step.objective.loss.gamma2, loss.gamma2)


def test_noise_differs_from_step_to_step():
    step = make(lr=0.0)
    kl, mse = [], []
    for _ in range(2):
        step.sums.reset()
        step(*batch())
        kl.append(step.sums.parts[2].item())
        mse.append(step.sums.parts[3].item())
    assert kl[0] == pytest.approx(kl[1], rel=1e-6)
    assert mse[0] != mse[1]


def test_sums_are_means_times_steps():
    step = make(lr=0.0)
    model = copy.deepcopy(step.model).train()
    batches = [batch(seed) for seed in range(3)]
    for x, target in batches:
        step(x, target)
    outputs = [[t.detach().double() for t in model.encoder(x)] for x, _ in batches]
    mu, log_sigma = (torch.cat(parts) for parts in zip(*outputs, strict=True))
    kl = 0.5 * (mu**2 + (2 * log_sigma).exp() - 2 * log_sigma - 1)
    moments = torch.stack([mu.sum(0), (mu**2).sum(0), (2 * log_sigma).exp().sum(0), kl.sum(0)])
    torch.testing.assert_close(step.sums.moments, moments, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(step.sums.parts[2], kl.sum() / 6, rtol=1e-4, atol=0)
    assert step.sums.counts.tolist() == [3, 0]
    step.sums.reset()
    assert not any(t.any() for t in (step.sums.parts, step.sums.moments, step.sums.counts))


def test_balance_is_a_half_where_gamma2_is_the_error():
    step = make("fixed", lr=0.0)
    step(*batch())
    mse, balance = step.sums.parts[3:].tolist()
    assert balance == pytest.approx(mse / (2 * 0.3**2), rel=1e-5)


@pytest.mark.parametrize("groups", [("encoder.downsample",), ("decoder.upsample", "decoder.scales")])
def test_l2_adds_its_gradient_to_its_kernels_alone(groups):
    plain, penalised = make(lr=0.0), make(lr=0.0, l2=0.25, groups=groups)
    for step in (plain, penalised):
        step(*batch())
    chosen = {id(m.weight) for m in penalised.objective.penalised}
    assert chosen
    for (name, a), b in zip(penalised.model.named_parameters(), plain.model.parameters(), strict=True):
        if a.grad is None and b.grad is None:  # a bias that batch norm cancels
            continue
        extra = 0.5 * a.detach() if id(a) in chosen else torch.zeros_like(a)
        torch.testing.assert_close(a.grad - b.grad, extra, rtol=1e-4, atol=1e-4, msg=name)
    # the reported loss is the VAE's own
    assert torch.equal(penalised.sums.parts, plain.sums.parts)


def test_amp_trains_float32_weights():
    step = make(amp=True)
    full = make()
    x, target = batch()
    before = state(step)
    step(x.bfloat16(), target)
    full(x, target)
    after = state(step)
    assert step.sums.counts.tolist() == [1, 0]
    assert all(t.dtype in (torch.float32, torch.float64, torch.int64) for t in after.values())
    changed = [n for n in before if n.startswith("model.") and not torch.equal(before[n], after[n])]
    assert len(changed) > 0.9 * sum(n.startswith("model.") for n in before)
    torch.testing.assert_close(step.sums.parts, full.sums.parts, rtol=0.03, atol=0.03)
    assert not torch.equal(step.sums.parts, full.sums.parts)  # or autocast was never on


@pytest.mark.parametrize("stage", [1, 2])
def test_bf16_copies_change_no_more_than_roundings(stage, monkeypatch):
    """The same steps with weights and gradients cast by autocast."""
    steps = []
    for copied in (True, False):
        if not copied:
            monkeypatch.setattr("bvae.engine.step.halved_weights", lambda model: [])
        torch.manual_seed(0)
        model = (first_stage if stage == 1 else second_stage)(CONFIG)
        objective = VAEObjective(make_loss("computed", logits=stage == 1), amp=True)
        step = Step(model, objective, Noise(ops.make_rng(7)), 3, True)
        step.set_lr(1e-3)
        assert bool(step.copies.of) == copied
        for seed in range(5):
            x, target = batch(seed) if stage == 1 else (torch.randn(6, 3, generator=step_noise(seed)),) * 2
            step(x.bfloat16() if stage == 1 else x, target)
        steps.append(step)
    for (name, a), b in zip(steps[0].model.named_parameters(), steps[1].model.parameters(), strict=True):
        assert (a - b).abs().max() <= 5.5 * 1e-3, name  # five steps of at most lr
        if (half := steps[0].copies.of.get(a)) is not None:
            assert torch.equal(half, a.bfloat16()), name
    torch.testing.assert_close(steps[0].sums.parts, steps[1].sums.parts, rtol=0.02, atol=0.02)
    assert all(p.grad is None for p in steps[0].copies.of), "the copies take the gradients"


def test_bf16_copies_are_the_steps_own():
    """Who goes on with the model without the step has the gradients on the weights."""
    step = make(amp=True)
    x, target = batch()
    step(x.bfloat16(), target)
    with torch.autocast("cpu", torch.bfloat16):
        step.model.encoder(x)[0].sum().backward()
    assert step.model.encoder.conv0.weight.grad is not None


def step_noise(seed):
    return torch.Generator().manual_seed(seed)


def test_the_second_stage_trains_by_the_same_step():
    torch.manual_seed(0)
    model = second_stage(CONFIG)
    step = Step(model, VAEObjective(make_loss("computed", logits=False)), Noise(ops.make_rng(0)), 3, False)
    step.set_lr(1e-2)
    z = torch.randn(64, 3)
    losses = []
    for _ in range(60):
        step.sums.reset()
        step(z, z)
        losses.append(step.sums.parts[0].item())
    assert losses[-1] < losses[0] - 0.1
    assert step.sums.counts.tolist() == [1, 0]


# ---- a step that is not finite --------------------------------------------------------------------------------------


def poisoned(value):
    x, target = batch(1)
    x[2, 1, 3, 3] = value
    return x, target


def infinite_gradient(step):
    """Runs a step whose loss is finite and one of whose gradients is not."""
    parameter = next(step.model.decoder.parameters())
    handle = parameter.register_hook(lambda g: torch.where(torch.arange(g.numel()).view_as(g) == 3, math.inf, g))
    step(*batch(1))
    handle.remove()


BAD = {
    "nan input": lambda step: step(*poisoned(math.nan)),
    "infinite input": lambda step: step(*poisoned(math.inf)),
    "infinite gradient": infinite_gradient,
}
# What tells that a step was bad, and the noise, which goes on.
TOLD = ("rng", "sums.counts", "sums.trouble")


@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize("how", list(BAD))
@pytest.mark.parametrize("steps_before", [0, 3])
def test_a_bad_step_changes_nothing_and_is_counted(balance, how, steps_before):
    step = make(balance, l2=0.1, groups=("decoder.upsample",))
    for seed in range(steps_before):
        step(*batch(seed))
    before = state(step)
    for count in (1, 2):
        BAD[how](step)
        assert step.sums.counts.tolist() == [steps_before, count]
    same(state(step), before, TOLD)


@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize("how", list(BAD))
def test_the_next_good_step_is_the_one_there_would_have_been(balance, how):
    hurt, spared = make(balance), make(balance)
    BAD[how](hurt)
    spared.noise.rng[1] += 1  # the bad step used up its noise
    for seed in range(2):
        for step in (hurt, spared):
            step(*batch(seed))
    same(state(hurt), state(spared), TOLD[1:])
    assert hurt.sums.counts.tolist() == [2, 1]
    assert hurt.tensors()[f"adam.{hurt.names[0]}.step"] == 2


def test_a_bad_step_under_amp():
    step = make(amp=True)
    step(*batch())
    before = state(step)
    x, target = poisoned(math.nan)
    step(x.bfloat16(), target)
    same(state(step), before, TOLD)


# ---- going on from a saved state ------------------------------------------------------------------------------------


@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize("steps_before", [0, 1, 3])
@pytest.mark.parametrize("amp", [False, True])
def test_a_restored_state_goes_on_bit_by_bit(balance, steps_before, amp):
    straight = make(balance, amp=amp)
    for seed in range(steps_before):
        straight(*batch(seed))
    if steps_before == 3:
        straight(*poisoned(math.nan))
    model = copy.deepcopy(straight.model.state_dict())
    # As it comes out of a file: contiguous, in tensors of its own.
    saved = {name: t.detach().clone(memory_format=torch.contiguous_format) for name, t in straight.tensors().items()}
    torch.manual_seed(99)
    resumed = make(balance, amp=amp, lr=123.0)
    resumed.model.load_state_dict(model)
    resumed.load_tensors(saved)
    resumed.set_lr(1e-2)
    same(state(resumed), state(straight))
    for seed in range(10, 13):
        for step in (straight, resumed):
            step(*batch(seed))
    same(state(resumed), state(straight))


def test_restoring_into_a_used_step_forgets_what_it_had():
    fresh = make()
    saved = {name: t.detach().clone() for name, t in fresh.tensors().items()}
    model = copy.deepcopy(fresh.model.state_dict())
    used = make()
    for seed in range(3):
        used(*batch(seed))
    used.model.load_state_dict(model)
    used.load_tensors(saved)
    for step in (fresh, used):
        step(*batch(5))
    same(state(used), state(fresh))


def test_a_state_saved_before_adam_had_any_is_a_fresh_one():
    saved = {name: t.detach().clone() for name, t in make().tensors().items() if not name.startswith("adam.")}
    used, fresh = make(), make()
    used(*batch())
    used.model.load_state_dict(fresh.model.state_dict())
    used.load_tensors(saved)
    same(state(used), state(fresh))


def test_a_state_of_another_model_is_not_taken_silently():
    step = make()
    step(*batch())
    saved = {name: t.clone() for name, t in step.tensors().items()}
    saved[f"adam.{step.names[0]}.exp_avg"] = torch.zeros(1)
    with pytest.raises((RuntimeError, KeyError)):
        make().load_tensors(saved)


def test_the_saved_state_is_apart_from_the_step_that_takes_it():
    step = make()
    step(*batch())
    saved = {name: t.detach().clone() for name, t in step.tensors().items()}
    kept = {name: t.clone() for name, t in saved.items()}
    other = make()
    other.load_tensors(saved)
    other(*batch(1))
    same(saved, kept)
