"""The rules beside the computed, learned and fixed gamma: each against a definition of its own in float64."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bvae import ops
from bvae.balance import (
    BALANCES,
    AnnealedLoss,
    AnnealedSettings,
    CapacityLoss,
    CapacitySettings,
    ComputedSettings,
    ControlVAELoss,
    ControlVAESettings,
    FixedGammaLoss,
    FreeBitsLoss,
    FreeBitsSettings,
    GecoLoss,
    GecoSettings,
    MovingLoss,
    OptimalGammaLoss,
    make_loss,
)  # fmt: skip
from bvae.errors import UserError

ELEMENTS, LATENTS = 3 * 4 * 4, 5


def batch(size=6, seed=0, dtype=torch.float32):
    """A reconstruction (as logits), its target, and a posterior, all random; float64 with the same numbers."""
    g = torch.Generator().manual_seed(seed)
    recon, target = torch.randn(size, 3, 4, 4, generator=g), torch.rand(size, 3, 4, 4, generator=g)
    mu, log_sigma = torch.randn(size, LATENTS, generator=g), 0.5 * torch.randn(size, LATENTS, generator=g)
    mu *= torch.linspace(0.1, 2, LATENTS)
    log_sigma *= torch.linspace(0.2, 1, LATENTS)
    return [t.to(dtype).requires_grad_(i != 1) for i, t in enumerate((recon, target, mu, log_sigma))]


def parts(recon, target, mu, log_sigma):
    """Per image: sse [B], and KL [B,k]."""
    sse = (torch.sigmoid(recon) - target).square().flatten(1).sum(1)
    return sse, 0.5 * (mu.square() + torch.exp(2 * log_sigma) - 2 * log_sigma - 1)


def nll(sse, gamma2):
    return sse / (2 * gamma2) + ELEMENTS / 2 * torch.log(torch.as_tensor(2 * math.pi * gamma2, dtype=torch.float64))


def close(actual, expected, rtol=1e-5, atol=1e-7):
    torch.testing.assert_close(
        torch.as_tensor(actual).detach().double(), torch.as_tensor(expected).detach().double(), rtol=rtol, atol=atol
    )


def agrees(loss, definition, seed=0, size=6):
    """Compares value and gradients with `definition(sse, kl)` of float64 tensors; returns the Loss."""
    mine, theirs = batch(size, seed), batch(size, seed, torch.float64)
    out = loss(*mine)
    out.loss.backward()
    sse, kl = parts(*theirs)
    want = definition(sse, kl)
    want.backward()
    close(out.loss, want)
    for a, b in zip(mine, theirs, strict=True):
        if a.requires_grad:
            close(a.grad, b.grad, rtol=3e-5, atol=1e-6 * b.grad.abs().max().item() + 1e-12)
    close(out.kl, kl.sum() / size)
    close(out.mse, sse.sum() / (size * ELEMENTS))
    return out


def run(loss, steps, seed=0, scale=1.0):
    """Steps on random batches; yields the Loss of each."""
    for i in range(steps):
        recon, target, mu, log_sigma = batch(seed=seed + i)
        yield loss(recon * scale, target, mu * scale, log_sigma)


# ---- optimal --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kl_weight", [1.0, 2.5])
def test_optimal_sigma_is_half_d_log_mse(kl_weight):
    """The definition differentiates through the logarithm; the loss holds gamma2 constant: the same by the envelope."""

    def definition(sse, kl):
        mse = sse.sum() / (6 * ELEMENTS)
        return ELEMENTS / 2 * (1 + torch.log(2 * math.pi * mse)) + kl_weight * kl.sum() / 6

    out = agrees(OptimalGammaLoss(kl_weight), definition)
    close(out.gamma2, out.mse)


def test_optimal_sigma_of_each_image():
    def definition(sse, kl):
        return (ELEMENTS / 2 * (1 + torch.log(2 * math.pi * sse / ELEMENTS)) + 3 * kl.sum(1)).mean()

    out = agrees(OptimalGammaLoss(3.0, per_image=True), definition)
    close(out.gamma2, out.mse)


@pytest.mark.parametrize("per_image", [False, True])
def test_optimal_sigma_has_a_floor_and_a_running_mean_for_evaluation(per_image):
    loss = OptimalGammaLoss(logits=False, per_image=per_image)
    x = torch.rand(4, ELEMENTS)
    out = loss(x.clone().requires_grad_(), x, kl=torch.zeros(()))
    close(out.gamma2, 1e-8, rtol=1e-6)
    assert out.loss.isfinite()
    loss = OptimalGammaLoss(per_image=per_image)
    mean = None
    for out in run(loss, 5):
        mean = out.mse.item() if mean is None else 0.99 * mean + 0.01 * out.mse.item()
        close(loss.gamma2, mean, rtol=1e-6)
    loss.eval()
    agrees(loss, lambda sse, kl: nll(sse, loss.gamma2.item()).mean() + kl.sum() / 6)


def test_pooled_figures_come_from_the_hook():
    """The figures of a batch whose other half lies on another rank: the mean over both."""
    whole = batch(12, dtype=torch.float64)
    half = [t.detach()[:6].float().requires_grad_(t.requires_grad) for t in whole]
    sse, kl = parts(*(t.detach() for t in whole))
    for loss in (OptimalGammaLoss(manual=True), FreeBitsLoss(bits=0.5, manual=True, gamma=0.5)):
        seen = []

        def pool(figures, loss=loss, seen=seen):
            seen.append(figures)
            if isinstance(loss, OptimalGammaLoss):
                return torch.stack([sse.sum() / 2, torch.tensor(6.0 * ELEMENTS)]).float()
            return torch.cat([kl.sum(0) / 2, torch.tensor([6.0])]).float()

        loss.pool = pool
        out = loss(*half)
        if isinstance(loss, OptimalGammaLoss):
            close(seen[0], torch.stack([sse[:6].sum(), torch.tensor(6.0 * ELEMENTS)]))
            close(out.gamma2, sse.sum() / (12 * ELEMENTS))
        else:
            close(seen[0][:-1], kl[:6].sum(0))
            close(loss.clipped, (kl.mean(0) <= 0.5).double().mean())
        loss.eval()(*half)
        assert len(seen) == 1


# ---- a weight that moves --------------------------------------------------------------------------------------------


def bowman(shape, t, total, part, cycles):
    if t >= total:
        return 1.0
    if shape == "linear":
        return min(1.0, t / (part * total))
    if shape == "logistic":
        return 1 / (1 + math.exp(-(12 * t / (part * total) - 6)))
    period = math.ceil(total / cycles)
    return min(1.0, (t % period) / (part * period))


@pytest.mark.parametrize("shape", ["linear", "logistic", "cyclical"])
@pytest.mark.parametrize(("part", "cycles"), [(0.5, 4), (1.0, 3)])
def test_annealing_follows_its_schedule_to_1(shape, part, cycles):
    total = 20
    loss = AnnealedLoss(3.0, total_steps=total, shape=shape, part=part, cycles=cycles, gamma=0.5)
    for t in range(total + 3):
        w = bowman(shape, t, total, part, cycles)
        out = agrees(loss, lambda sse, kl, w=w: nll(sse, 0.25).mean() + 3 * w * kl.sum() / 6, seed=t)
        close(out.weight, 3 * w, rtol=1e-6)
    close(loss.extras()["annealed_weight"], 1.0)
    close(loss.gamma2, 0.25)


def test_annealing_on_a_computed_gamma_lets_it_grow():
    loss = AnnealedLoss(total_steps=10)
    loss.gamma2.fill_(1e-4)
    mse = next(run(loss, 1)).mse.item()
    close(loss.gamma2, 0.99e-4 + 0.01 * mse, rtol=1e-6)


def test_fixed_gamma_and_weight_differ_from_their_product_by_a_factor():
    """The loss of (gamma2, w) is w times that of (gamma2 w, 1), up to a constant: the same minimiser."""
    gamma2, w = 0.09, 2.5
    grads = []
    for loss in (FixedGammaLoss(gamma=math.sqrt(gamma2), kl_weight=w), FixedGammaLoss(beta=gamma2 * w)):
        inputs = batch()
        loss(*inputs).loss.backward()
        grads.append(inputs)
    for a, b in zip(*grads, strict=True):
        if a.requires_grad:
            close(a.grad, w * b.grad, rtol=2e-5)


@pytest.mark.parametrize("kl_weight", [1.0, 4.0])
def test_controlvae_is_a_scalar_pi_controller(kl_weight):
    set_point, kp, ki = 6.0, 0.05, 0.02
    loss = ControlVAELoss(kl_weight, set_point=set_point, kp=kp, ki=ki)
    integral = output = weight = 0.0
    seen = []
    for i in range(150):
        scale = 3.0 if i < 60 else 0.2 if i < 110 else 1.5  # far above the set-point, far below it, above it
        out = next(run(loss, 1, seed=i, scale=scale))
        close(out.weight, kl_weight * weight, rtol=1e-4, atol=1e-6)
        error = set_point - out.kl.item()
        if not ((output < 0 and error > 0) or (output > 1 and error < 0)):
            integral -= ki * error
        output = kp / (1 + math.exp(min(error, 700))) + integral
        weight = min(1.0, max(0.0, output))
        close(loss.integral, integral, rtol=1e-4, atol=1e-5)
        close(loss.weight, weight, rtol=1e-4, atol=1e-5)
        seen.append(weight)
    assert max(seen[:60]) == 1 and min(seen[60:110]) == 0 and seen[-1] > 0
    close(loss.extras()["controlvae_weight"], weight, rtol=1e-4)
    close(loss.gamma2, 0.5)


def test_controlvae_takes_an_error_of_any_size():
    loss = ControlVAELoss(set_point=1.0, manual=True)
    for kl in (1e6, 0.0, 1e30):
        loss.follow(torch.tensor(0.1), torch.tensor(kl))
        assert 0 <= loss.weight.item() <= 1


# ---- free bits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [0.0, 0.4, 1.0, 50.0])
def test_free_bits_clip_the_mean_of_each_latent(bits):
    def definition(sse, kl):
        return nll(sse, 0.25).mean() + 2 * kl.mean(0).clamp(min=bits).sum()

    loss = FreeBitsLoss(2.0, bits=bits, gamma=0.5)
    agrees(loss, definition)
    _, kl = parts(*batch(dtype=torch.float64))
    close(loss.extras()["clipped_kl"], kl.mean(0).clamp(min=bits).sum())
    close(loss.extras()["clipped_latents"], (kl.mean(0) <= bits).double().mean())
    assert (0 < loss.clipped.item() < 1) == (bits in (0.4, 1.0))


def test_clipped_latents_get_exactly_no_gradient():
    recon, target, mu, log_sigma = batch()
    _, kl = parts(*batch(dtype=torch.float64))
    clipped = kl.mean(0) <= 0.4
    for how in ("posterior", "sampled"):
        mu.grad = log_sigma.grad = None
        loss = FreeBitsLoss(bits=0.4)
        if how == "posterior":
            loss(recon, target, mu, log_sigma).loss.backward()
        else:
            z = ops.sample_kl(mu, log_sigma, ops.make_rng(0), per_latent=True)
            loss(recon, target, kl=z.kl).loss.backward()
        for grad, full in ((mu.grad, mu.detach() / 6), (log_sigma.grad, torch.expm1(2 * log_sigma.detach()) / 6)):
            assert not grad[:, clipped].any()
            close(grad[:, ~clipped], full[:, ~clipped], rtol=1e-5)


def test_free_bits_need_the_kl_of_each_latent():
    recon, target, *_ = batch()
    assert FreeBitsLoss.per_latent
    with pytest.raises(ValueError, match="summed over the batch alone"):
        FreeBitsLoss()(recon, target, kl=torch.zeros(()))


# ---- capacity -------------------------------------------------------------------------------------------------------


def test_capacity_is_the_distance_of_the_mean_kl():
    total, most, part = 10, 12.0, 0.5
    loss = CapacityLoss(2.0, total_steps=total, most=most, strength=7.0, part=part, gamma=0.5)
    signs = set()
    for t in range(12):
        target = most * min(1.0, t / (part * total))
        close(loss.extras()["capacity"], target, rtol=1e-6)

        def definition(sse, kl, target=target):
            return nll(sse, 0.25).mean() + 2 * 7 * (kl.sum() / 6 - target).abs()

        out = agrees(loss, definition, seed=t)
        signs.add(math.copysign(1, out.weight.item()))
        close(out.weight.abs(), 14.0)
    assert signs == {1.0, -1.0}


# ---- GECO -----------------------------------------------------------------------------------------------------------


def test_geco_is_a_scalar_simulation_of_its_lambda():
    target, rate = 0.1, 0.03
    loss = GecoLoss(target=target, rate=rate)
    lam, mean, capped = 1.0, None, 0
    for i in range(90):
        scale = 5.0 if i > 20 else 0.1
        recon, x, mu, log_sigma = batch(seed=i)
        gamma2 = loss.gamma2.item()
        close(gamma2, 1 / (2 * lam), rtol=1e-4)
        out = loss(recon * scale, x, mu, log_sigma)
        close(out.gamma2, gamma2, rtol=1e-6)
        sse, kl = parts(recon.double() * scale, x.double(), mu.double(), log_sigma.double())
        # the gradient is that of KL + lambda sse: with lambda = 1/(2 gamma2) the values differ by a constant
        constant = ELEMENTS / 2 * math.log(2 * math.pi * gamma2)
        close(out.loss, (kl.sum() + sse.sum() / (2 * gamma2)) / 6 + constant)
        mse = sse.sum().item() / (6 * ELEMENTS)
        mean = mse if mean is None else 0.99 * mean + 0.01 * mse
        # log lambda moves by eta (m - target) D, eta = rate / (target D), at most .01
        eta = rate / (target * ELEMENTS)
        change = eta * (mean - target) * ELEMENTS
        capped += abs(change) > 0.01
        lam *= math.exp(min(0.01, max(-0.01, change)))
    assert 0 < capped < 90
    close(loss.extras()["geco_lambda"], lam, rtol=1e-4)
    close(loss.extras()["geco_mse"], mean, rtol=1e-5)


@pytest.mark.parametrize(
    ("target", "mse", "end"), [(0.1, 1.0, 1e-3), (0.1, 0.0, 10.0), (1e-7, 1.0, 1e-8), (1e-4, 1.0, 1e-6)]
)
def test_geco_stops_at_the_ends_of_gamma2(target, mse, end):
    loss = GecoLoss(target=target, rate=0.1, manual=True)
    assert loss.gamma2.item() == pytest.approx(min(0.5, 100 * target))
    for _ in range(1200):
        loss.follow(torch.tensor(mse), torch.tensor(1.0))
    close(loss.gamma2, end, rtol=1e-5)


# ---- what holds for all ---------------------------------------------------------------------------------------------

MOVING = [name for name, entry in BALANCES.items() if issubclass(entry.loss, MovingLoss)]
WHOLE = ("optimal", "free-bits", "capacity")  # what they need of a batch, no part of it has


def make(name, **arguments):
    return make_loss(name, gamma=0.5 if name == "fixed" else None, total_steps=8, **arguments)


def state_of(loss):
    return {name: t.detach().clone() for name, t in loss.state_dict().items()}


@pytest.mark.parametrize("name", MOVING)
@pytest.mark.parametrize("how", ["eval", "no_grad"])
def test_nothing_moves_outside_training(name, how):
    loss = make(name)
    list(run(loss, 2))
    before = state_of(loss)
    loss.train(how != "eval")
    with torch.set_grad_enabled(how == "eval"):
        out = next(run(loss, 1, seed=5))
    assert all(torch.equal(t, before[key]) for key, t in loss.state_dict().items())
    assert out.loss.isfinite()
    loss.train()
    list(run(loss, 1, seed=5, scale=4.0))
    assert any(not torch.equal(t, before[key]) for key, t in loss.state_dict().items())


@pytest.mark.parametrize("name", MOVING)
def test_follow_and_accumulate_move_as_a_plain_step_does(name):
    plain, manual = make(name), make(name, manual=True)
    accumulating = None if name in WHOLE else make(name, accumulate=True)
    for i in range(5):
        recon, target, mu, log_sigma = batch(seed=i)
        out = plain(recon, target, mu, log_sigma)
        theirs = manual(recon, target, mu, log_sigma)
        close(theirs.loss, out.loss)
        manual.follow(theirs.mse, theirs.kl)
        if accumulating is not None:
            for a, b in ((0, 2), (2, 6)):
                accumulating(recon[a:b], target[a:b], mu[a:b], log_sigma[a:b])
            accumulating.step()
    for other in filter(None, (manual, accumulating)):
        for key, t in other.state_dict().items():
            if key not in ("clipped", "clipped_kl"):
                close(t, plain.state_dict()[key], rtol=2e-5)


@pytest.mark.parametrize("name", [name for name in WHOLE if name in BALANCES])
def test_a_rule_of_the_whole_batch_refuses_to_accumulate(name):
    with pytest.raises(ValueError, match="whole batch"):
        make(name, accumulate=True)


@pytest.mark.parametrize("name", MOVING)
@pytest.mark.parametrize("where", ["recon", "mu"])
def test_a_batch_that_is_not_finite_moves_nothing_and_counts(name, where):
    loss = make(name)
    list(run(loss, 2))
    before = state_of(loss)
    recon, target, mu, log_sigma = batch(seed=9)
    if where == "recon":
        recon = recon * math.nan
    else:
        mu = mu * math.nan
    loss(recon, target, mu, log_sigma)
    after = state_of(loss)
    follows_mse_alone = name in ("computed", "optimal", "free-bits")
    if where == "recon" or not follows_mse_alone:
        for key in before:
            if key not in ("skipped", "clipped", "clipped_kl", "gamma2") or (key == "gamma2" and where == "recon"):
                assert torch.equal(after[key], before[key]), key
    if where == "recon":
        assert after["skipped"] == before["skipped"] + 1


@pytest.mark.parametrize("name", list(BALANCES))
def test_a_saved_state_goes_on_where_it_was(name):
    loss = make(name)
    list(run(loss, 3))
    other = make(name)
    other.load_state_dict(copy.deepcopy(loss.state_dict()))
    for a, b in zip(run(loss, 2, seed=7), run(other, 2, seed=7), strict=True):
        assert torch.equal(a.loss, b.loss)
    assert all(torch.equal(t, other.state_dict()[key]) for key, t in loss.state_dict().items())


@pytest.mark.parametrize("name", MOVING)
def test_the_state_is_all_of_it_and_resets(name):
    loss = make(name)
    start = state_of(loss)
    list(run(loss, 3))
    assert loss.state().keys() == start.keys() - {"skipped", "pending"}
    assert all(t.dtype in (torch.float32, torch.int64) for t in loss.state().values())
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(loss.state().values(), loss.state().values(), strict=True))
    loss.reset_parameters()
    assert all(torch.equal(t, start[key]) for key, t in loss.state_dict().items())
    loss.half()
    assert all(t.dtype in (torch.float32, torch.int64) for t in loss.state().values())
    with torch.device("meta"):
        meta = make(name)
    meta.to_empty(device="cpu").reset_parameters()
    assert all(torch.equal(t, start[key]) for key, t in meta.state_dict().items())


@pytest.mark.parametrize("name", list(BALANCES))
def test_activation_checkpointing_gives_the_same_step(name):
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        net, loss = nn.Linear(8, ELEMENTS + 2 * LATENTS), make(name)
        optimizer = torch.optim.SGD([*net.parameters(), *loss.parameters()], lr=1e-4)
        target = torch.rand(6, ELEMENTS)

        def whole(x, net=net, loss=loss, target=target):
            recon, mu, log_sigma = net(x).split([ELEMENTS, LATENTS, LATENTS], 1)
            return loss(recon, target, mu, log_sigma).loss

        for i in range(3):
            x = torch.randn(6, 8, generator=torch.Generator().manual_seed(i))
            optimizer.zero_grad()
            (checkpoint(whole, x, use_reentrant=False) if checkpointed else whole(x)).backward()
            optimizer.step()
        found.append([*net.parameters(), *(t.double() for t in loss.state_dict().values())])
    for a, b in zip(*found, strict=True):
        close(a, b, rtol=1e-6)


@pytest.mark.parametrize("name", list(BALANCES))
def test_compiles_in_one_graph(name):
    eager, compiled = make(name, kl_weight=2.0), make(name, kl_weight=2.0)
    torch._dynamo.reset()
    forward = torch.compile(lambda *inputs: compiled(*inputs), fullgraph=True, backend="aot_eager")
    for i in range(3):
        found = []
        for f in (eager, forward):
            inputs = batch(seed=i)
            out = f(*inputs)
            out.loss.backward()
            found.append([*out, *(t.grad for t in inputs if t.requires_grad)])
        for a, b in zip(*found, strict=True):
            close(a, b, rtol=1e-5)
    for key, t in eager.state_dict().items():
        close(compiled.state_dict()[key], t, rtol=1e-5)


# ---- by name --------------------------------------------------------------------------------------------------------


def test_settings_reach_the_loss():
    assert make_loss("geco", GecoSettings(geco_target=0.25, geco_rate=0.5)).target == 0.25
    annealed = make_loss("annealed", AnnealedSettings("cyclical", 0.25, 3), total_steps=10, gamma=0.1)
    assert (annealed.shape, annealed.part, annealed.cycles, annealed.total_steps) == ("cyclical", 0.25, 3, 10)
    assert annealed.gamma2.item() == pytest.approx(0.01)
    computed = make_loss("computed", ComputedSettings("first-batch", False))
    assert computed.gamma2.item() == 0 and not computed.monotone
    capacity = make_loss("capacity", CapacitySettings(5.0, 3.0, 0.1), total_steps=10)
    assert (capacity.most, capacity.strength, capacity.part) == (5.0, 3.0, 0.1)
    control = make_loss("controlvae", ControlVAESettings(7.0, 0.1, 0.2))
    assert (control.set_point, control.kp, control.ki) == (7.0, 0.1, 0.2)


@pytest.mark.parametrize(
    ("name", "settings", "gamma", "text"),
    [
        ("geco", GecoSettings(geco_target=-1.0), None, "--geco-target must be a positive number, not -1.0"),
        ("annealed", AnnealedSettings(anneal_part=0.0), None, "--anneal-part must be above 0"),
        ("annealed", AnnealedSettings(anneal_cycles=0), None, "--anneal-cycles must be at least 1"),
        ("capacity", CapacitySettings(capacity_strength=math.nan), None, "--capacity-strength must be"),
        ("controlvae", ControlVAESettings(controlvae_kl=math.inf), None, "--controlvae-kl must be"),
        ("free-bits", FreeBitsSettings(free_bits=-0.1), None, "--free-bits must be a number of at least 0"),
        ("computed", ComputedSettings(gamma_start=0.0), None, "--gamma-start must be"),
        ("annealed", None, -0.5, "--gamma must be a positive number"),
        ("geco", None, 0.5, "--gamma is not one of the settings of geco"),
    ],
)
def test_a_check_names_the_option(name, settings, gamma, text):
    with pytest.raises(UserError) as caught:
        BALANCES[name].check(settings, gamma)
    assert str(caught.value).startswith(text)


@pytest.mark.parametrize("name", [name for name in BALANCES if name != "fixed"])
def test_the_defaults_pass_their_own_check(name):
    BALANCES[name].check()
