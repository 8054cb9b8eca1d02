import copy
import functools
import math
import os
import re
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from bvae import ops
from bvae.balance import BALANCES, BalancedLoss, FixedGammaLoss, LearnedGammaLoss, make_loss


def batch(shape=(6, 3, 8, 8), latents=(5,), dtype=torch.float32, uint8=False, seed=0):
    """A reconstruction (as logits), its target, and a posterior, all random."""
    g = torch.Generator().manual_seed(seed)
    recon = torch.randn(shape, generator=g).to(dtype).requires_grad_()
    target = torch.rand(shape, generator=g)
    target = (target * 255).round().byte() if uint8 else target.to(dtype)
    mu = torch.randn(shape[:1] + latents, generator=g).to(dtype).requires_grad_()
    log_sigma = (0.5 * torch.randn(shape[:1] + latents, generator=g)).to(dtype).requires_grad_()
    return recon, target, mu, log_sigma


def formula(recon, target, mu, log_sigma, gamma2, kl_weight=1.0, logits=True):
    """(loss, nll, kl, mse) per sample as docs/method.md defines them, in float64."""
    recon, mu, log_sigma = recon.double(), mu.double(), log_sigma.double()
    x = target.double() / 255 if target.dtype == torch.uint8 else target.double()
    x_hat = 1 / (1 + torch.exp(-recon)) if logits else recon
    b, d = len(recon), recon[0].numel()
    kl = 0.5 * (mu**2 + torch.exp(log_sigma) ** 2 - 2 * log_sigma - 1).flatten(1).sum(1)
    sse = ((x - x_hat) ** 2).flatten(1).sum(1)
    nll = sse / (2 * gamma2) + d * math.log(math.sqrt(gamma2)) + d / 2 * math.log(2 * math.pi)
    return (nll + kl_weight * kl).mean(), nll.mean(), kl.mean(), sse.sum() / (b * d)


def moved(gamma2, mse):
    return max(1e-8, min(gamma2, 0.99 * gamma2 + 0.01 * mse))


def close(actual, expected, rtol=1e-5, atol=1e-7):
    torch.testing.assert_close(
        actual.detach().double(), torch.as_tensor(expected).detach().double(), rtol=rtol, atol=atol
    )


def with_gamma2(loss, gamma2):
    loss.gamma2.fill_(gamma2)
    return loss


# ---- the formula ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("logits", [True, False])
@pytest.mark.parametrize("uint8", [True, False])
@pytest.mark.parametrize("gamma2", [1.0, 0.07, 3e-5])
def test_value_parts_and_gradients_are_those_of_the_formula(logits, uint8, gamma2):
    inputs = batch(uint8=uint8)
    ours = with_gamma2(BalancedLoss(kl_weight=2.5, logits=logits), gamma2)
    used = ours.gamma2.item()
    loss = ours(*inputs)
    loss.loss.backward()
    theirs = [t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in inputs]
    expected = formula(*theirs, used, 2.5, logits)
    expected[0].backward()
    for actual, want in zip((loss.loss, loss.nll, loss.kl, loss.mse), expected, strict=True):
        close(actual, want)
    assert loss.gamma2.item() == used, "the loss must report the gamma2 it used, not the one after the step"
    for mine, want in zip(inputs, theirs, strict=True):
        if mine.requires_grad:
            close(mine.grad, want.grad, rtol=2e-5, atol=1e-6 * want.grad.abs().max().item())


def test_only_the_loss_carries_a_gradient():
    loss = BalancedLoss()(*batch())
    assert loss.loss.requires_grad
    assert not any(part.requires_grad for part in (loss.nll, loss.kl, loss.mse, loss.gamma2))


@pytest.mark.parametrize(
    ("shape", "latents"),
    [((7, 11), (3,)), ((5,), (2,)), ((4, 2, 3, 5), (2, 3, 4)), ((3, 2, 2, 2, 2), (1,)), ((1, 1), (1,)), ((9, 4), ())],
)
def test_any_shape_of_data_and_posterior(shape, latents):
    inputs = batch(shape, latents, seed=3)
    loss = with_gamma2(BalancedLoss(logits=False), 0.3)(*inputs)
    recon, target, mu, log_sigma = inputs
    want = formula(
        recon.reshape(shape[0], -1), target.reshape(shape[0], -1), mu.reshape(shape[0], -1),
        log_sigma.reshape(shape[0], -1), torch.tensor(0.3).item(), logits=False,
    )  # fmt: skip
    close(loss.loss, want[0])
    close(loss.kl, want[2])
    close(loss.mse, want[3])


def test_uint8_target_is_the_float_target_over_255():
    recon, rows, mu, log_sigma = batch(uint8=True)
    grads = []
    for target in (rows, rows.float() / 255):
        r = recon.detach().requires_grad_()
        loss = BalancedLoss()(r, target, mu, log_sigma)
        loss.loss.backward()
        grads.append((loss.loss.detach(), r.grad))
    close(grads[0][0], grads[1][0], rtol=1e-6)
    close(grads[0][1], grads[1][1], rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_summed_in_float32(dtype):
    # 200k elements: summed in bf16, the sse would stop growing at a few hundred.
    recon, target, mu, log_sigma = batch((16, 3, 64, 64), (64,), dtype)
    loss = BalancedLoss()(recon, target, mu, log_sigma)
    want = formula(recon, target, mu, log_sigma, 1.0)
    assert loss.loss.dtype == torch.float32
    close(loss.mse, want[3], rtol=1e-5)
    close(loss.kl, want[2], rtol=1e-5)
    loss.loss.backward()
    assert recon.grad.dtype == mu.grad.dtype == dtype


def test_kl_of_a_sharp_latent_survives_bf16_posteriors():
    mu = torch.zeros(4, 8, dtype=torch.bfloat16)
    log_sigma = torch.full((4, 8), -9.0, dtype=torch.bfloat16)
    loss = BalancedLoss()(torch.zeros(4, 2), torch.zeros(4, 2), mu, log_sigma)
    close(loss.kl, 8 * 0.5 * (math.exp(-18) + 18 - 1), rtol=1e-6)


def test_logvar_is_twice_log_sigma():
    recon, target, mu, log_sigma = batch()
    logvar = (2 * log_sigma).detach().requires_grad_()
    one = BalancedLoss()(recon, target, mu, log_sigma).loss
    other = BalancedLoss()(recon, target, mu, logvar=logvar).loss
    close(other, one, rtol=1e-7)
    one.backward()
    other.backward()
    close(logvar.grad, log_sigma.grad / 2)


def test_kl_may_be_given_summed_over_the_batch():
    recon, target, mu, log_sigma = batch()
    whole = BalancedLoss(kl_weight=3.0)(recon, target, mu, log_sigma)
    kl = torch.tensor(whole.kl.item() * len(recon), requires_grad=True)
    loss = BalancedLoss(kl_weight=3.0)(recon, target, kl=kl)
    close(loss.loss, whole.loss)
    close(loss.kl, whole.kl)
    loss.loss.backward()
    close(kl.grad, 3.0 / len(recon))


def test_kl_from_sampling_carries_the_gradient_of_the_formula():
    recon, target, mu, log_sigma = batch()
    sampled = ops.sample_kl(mu, log_sigma, ops.make_rng(0))
    BalancedLoss()(recon, target, kl=sampled.kl).loss.backward()
    close(mu.grad, mu.detach() / len(mu))
    close(log_sigma.grad, ((2 * log_sigma.detach()).exp() - 1) / len(mu), rtol=1e-5)


# ---- kl_weight ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("side", "latents", "weight"), [(32, (64,), 1.0), (64, (64,), 4.0), (32, (16, 2, 2), 1.0), (8, (4,), 16.0)]
)
def test_auto_kl_weight(side, latents, weight):
    recon, target, mu, log_sigma = batch((2, 1, side, side), latents)
    auto = BalancedLoss(kl_weight="auto")(recon, target, mu, log_sigma)
    close(auto.loss, formula(recon, target, mu, log_sigma, 1.0, weight)[0])
    given = BalancedLoss(kl_weight="auto")(recon, target, kl=2 * auto.kl, latents=math.prod(latents))
    close(given.loss, auto.loss)


@pytest.mark.parametrize("shape", [(2, 3, 32, 16), (2, 3072), (2, 32, 32)])
def test_auto_needs_square_images(shape):
    recon, target, mu, log_sigma = batch(shape)
    with pytest.raises(ValueError, match="square images"):
        BalancedLoss(kl_weight="auto")(recon, target, mu, log_sigma)
    BalancedLoss(kl_weight=1.0)(recon, target, mu, log_sigma)


def test_auto_with_a_bare_kl_needs_the_number_of_latents():
    recon, target, *_ = batch()
    with pytest.raises(ValueError, match="latents"):
        BalancedLoss(kl_weight="auto")(recon, target, kl=torch.zeros(()))


# ---- gamma2 ---------------------------------------------------------------------------------------------------------


def test_gamma2_moves_by_the_rule_and_each_loss_uses_the_old_one():
    ours = BalancedLoss(logits=False)
    expected = 1.0
    for i in range(60):
        recon, target, mu, log_sigma = batch((4, 10), seed=i)
        loss = ours(recon * 0.3**i, target, mu, log_sigma)
        close(loss.gamma2, expected, rtol=1e-6)
        expected = moved(expected, formula(recon * 0.3**i, target, mu, log_sigma, 1.0, logits=False)[3].item())
        close(ours.gamma2, expected, rtol=1e-6)
    assert expected < 0.8


def test_gamma2_never_grows():
    ours = with_gamma2(BalancedLoss(logits=False), 0.01)
    before = ours.gamma2.item()
    recon, target, mu, log_sigma = batch((4, 10))
    ours(recon + 5, target, mu, log_sigma)
    assert ours.gamma2.item() == before
    assert ours.skipped.item() == 0


def test_gamma2_has_a_floor():
    ours = with_gamma2(BalancedLoss(logits=False), 1.0001e-8)
    x = torch.rand(4, 10)
    for _ in range(5):
        loss = ours(x, x, kl=torch.zeros(()))
    close(ours.gamma2, 1e-8, rtol=1e-6)
    assert loss.loss.isfinite()


def test_gamma2_may_grow_where_it_is_not_monotone():
    ours = with_gamma2(BalancedLoss(logits=False, monotone=False), 0.01)
    recon, target, mu, log_sigma = batch((4, 10))
    mse = ours(recon + 5, target, mu, log_sigma).mse.item()
    close(ours.gamma2, 0.99 * 0.01 + 0.01 * mse, rtol=1e-6)
    assert ours.gamma2.item() > 0.2


@pytest.mark.parametrize("accumulate", [False, True])
def test_gamma2_may_start_from_the_first_batch(accumulate):
    inputs = batch((4, 10))
    ours = BalancedLoss(logits=False, start="first-batch", accumulate=accumulate)
    assert ours.current_gamma2().item() == 0
    scaled = [100 * t.detach() for t in inputs[:2]]
    recon = scaled[0].requires_grad_()
    loss = ours(recon, scaled[1], *inputs[2:])
    mse = formula(recon, scaled[1], *inputs[2:], 1.0, logits=False)[3].item()
    assert mse > 5000
    close(loss.gamma2, mse)
    close(loss.loss, formula(recon, scaled[1], *inputs[2:], mse, logits=False)[0])
    loss.loss.backward()
    close(recon.grad, (recon - scaled[1]) / (4 * mse), rtol=1e-5)
    ours.step()
    close(ours.gamma2, mse)
    later = ours(recon * 0.5, scaled[1], *inputs[2:])
    close(later.gamma2, mse)
    ours.step()
    close(ours.gamma2, moved(mse, later.mse.item()))


def test_a_first_batch_that_is_not_finite_starts_nothing():
    ours = BalancedLoss(start="first-batch")
    recon, *rest = batch()
    ours(recon * math.nan, *rest)
    assert ours.gamma2.item() == 0 and ours.skipped.item() == 1
    loss = ours(recon, *rest)
    close(loss.gamma2, loss.mse)


@pytest.mark.parametrize("start", ["first", 0.0, -1.0, math.nan, math.inf])
def test_bad_starts_are_refused(start):
    with pytest.raises(ValueError, match="start must be 'first-batch' or a number"):
        BalancedLoss(start=start)


def test_small_batches_are_told_of_the_bias_once():
    def said(loss, size=4):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                loss(*batch((size, 10)))
            loss.eval()(*batch((size, 10)))
        return ["monotone=False" in str(w.message) for w in caught]

    assert said(BalancedLoss()) == [True]
    assert said(BalancedLoss(), 32) == []
    assert said(BalancedLoss(monotone=False)) == said(BalancedLoss(accumulate=True)) == []


def test_manual_moves_by_follow_alone():
    ours = BalancedLoss(manual=True)
    loss = ours(*batch())
    ours.step()
    assert ours.gamma2.item() == 1
    ours.follow(loss.mse, loss.kl)
    close(ours.gamma2, moved(1.0, loss.mse.item()), rtol=1e-6)


@pytest.mark.parametrize("how", ["eval", "no_grad", "inference_mode"])
def test_nothing_moves_outside_training(how):
    ours = with_gamma2(BalancedLoss(accumulate=False), 0.5)
    before = {name: t.clone() for name, t in ours.state_dict().items()}
    guard = {"eval": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}[how]
    if how == "eval":
        ours.eval()
    with guard():
        loss = ours(*batch())
    assert all(torch.equal(t, before[name]) for name, t in ours.state_dict().items())
    close(loss.loss, formula(*batch(), 0.5)[0])
    ours.train()(*batch())
    assert ours.gamma2.item() < 0.5


def test_eval_does_not_gather_while_accumulating():
    ours = BalancedLoss(accumulate=True)
    ours.eval()(*batch())
    ours.train()
    with torch.no_grad():
        ours(*batch())
    ours.step()
    assert ours.gamma2.item() == 1.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("accumulate", [False, True])
def test_a_batch_that_is_not_finite_leaves_gamma2_and_counts(bad, accumulate):
    ours = with_gamma2(BalancedLoss(logits=False, accumulate=accumulate), 0.5)
    recon, target, mu, log_sigma = batch((4, 10))
    poisoned = recon.detach().clone()
    poisoned[2, 3] = bad
    for i in range(3):
        ours(poisoned, target, mu, log_sigma)
        if accumulate:
            ours(recon, target, mu, log_sigma)
            ours.step()
        assert ours.gamma2.item() == 0.5
        assert ours.skipped.item() == i + 1
    loss = ours(recon, target, mu, log_sigma)
    ours.step()  # without accumulate there is nothing to do
    close(ours.gamma2, moved(0.5, loss.mse.item()), rtol=1e-6)
    assert ours.skipped.item() == 3


def test_accumulated_micro_batches_are_one_whole_batch():
    torch.manual_seed(0)
    net = nn.Linear(10, 10)
    recon, target, mu, log_sigma = (t.detach() for t in batch((12, 10)))
    whole, parts = BalancedLoss(), BalancedLoss(accumulate=True)
    grads = {}
    for name, loss, sizes in (("whole", whole, [12]), ("parts", parts, [5, 1, 6])):
        for _ in range(4):
            net.zero_grad()
            for r, t, m, s in zip(*(x.split(sizes) for x in (recon, target, mu, log_sigma)), strict=True):
                before = loss.gamma2.item()
                part = loss(net(r), t, m, s)
                (part.loss * len(r) / 12).backward()
                if loss.accumulate:
                    assert loss.gamma2.item() == before
            if loss.accumulate:
                loss.step()
        grads[name] = [p.grad.clone() for p in net.parameters()]
    close(parts.gamma2, whole.gamma2, rtol=1e-6)
    assert whole.gamma2.item() < 0.99
    for a, b in zip(grads["parts"], grads["whole"], strict=True):
        close(a, b, atol=1e-6)


def test_step_without_a_batch_since_does_nothing():
    ours = BalancedLoss(accumulate=True)
    ours(*batch())
    ours.step()
    after = ours.gamma2.item()
    assert after < 1
    ours.step()
    assert ours.gamma2.item() == after
    assert ours.skipped.item() == 0


def test_an_empty_batch_moves_nothing():
    ours = with_gamma2(BalancedLoss(), 0.5)
    ours(torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0, 2), torch.zeros(0, 2))
    assert ours.gamma2.item() == 0.5
    assert ours.skipped.item() == 0


# ---- as a module ----------------------------------------------------------------------------------------------------


def test_state_dict_round_trip_goes_on_where_it_was():
    ours = BalancedLoss(accumulate=True)
    ours(*batch())
    ours.step()
    ours(*batch(seed=1))  # pending when saved
    other = BalancedLoss(accumulate=True)
    other.load_state_dict(copy.deepcopy(ours.state_dict()))
    for loss in (ours, other):
        loss.step()
    assert torch.equal(ours.gamma2, other.gamma2)
    assert ours.gamma2.item() < 0.995


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.double])
@pytest.mark.parametrize("kind", ["computed", "learned", "fixed"])
def test_casting_the_model_keeps_the_state_exact(cast, kind):
    value = 0.123456789
    loss = make_loss(kind, gamma=math.sqrt(value) if kind == "fixed" else None)
    model = nn.Sequential(nn.Linear(2, 2), loss)
    if kind == "computed":
        with_gamma2(loss, value)
    if kind == "learned":
        loss.log_gamma.data.fill_(value)
    before = {name: t.clone() for name, t in [*loss.named_buffers(), *loss.named_parameters()]}
    cast(model)
    assert model[0].weight.dtype != torch.float32
    for name, t in [*loss.named_buffers(), *loss.named_parameters()]:
        assert t.dtype == before[name].dtype, name
        assert torch.equal(t, before[name]), name
    if kind == "computed":
        recon, target, mu, log_sigma = batch(dtype=model[0].weight.dtype)
        loss(recon, target, mu, log_sigma)
        assert loss.gamma2.item() < before["gamma2"].item()


@pytest.mark.parametrize("kind", ["computed", "learned", "fixed"])
@pytest.mark.parametrize("way", ["assign", "past the module"])
def test_the_state_is_float32_by_whatever_way_it_is_set(kind, way):
    loss = make_loss(kind, gamma=0.5 if kind == "fixed" else None)
    half = {name: t.half() if t.is_floating_point() else t for name, t in loss.state_dict().items()}
    if way == "assign":
        loss.load_state_dict(half, assign=True)
    else:  # as loaders that save memory do
        for name, t in half.items():
            if name in loss._buffers:
                loss._buffers[name] = t
            elif name in loss._parameters:
                loss._parameters[name] = nn.Parameter(t)
    assert loss.state_dict()["gamma2"].dtype == torch.float32
    want = make_loss(kind, gamma=0.5 if kind == "fixed" else None)
    close(loss(*batch()).loss, want(*batch()).loss)
    close(loss.current_gamma2(), want.current_gamma2())
    assert all(t.dtype == want.state_dict()[name].dtype for name, t in loss.state_dict().items())


def test_a_state_of_the_first_versions_is_taken():
    ours = BalancedLoss(accumulate=True)
    old = {"gamma2": torch.tensor(0.25), "skipped": torch.tensor(3), "pending": torch.tensor([12.0, 60.0]).double()}
    ours.load_state_dict(old)
    assert ours.skipped.item() == 3
    ours.step()
    close(ours.gamma2, moved(0.25, 0.2), rtol=1e-6)
    with pytest.raises(RuntimeError, match=r'Missing key.*"pending"'):
        ours.load_state_dict({"gamma2": old["gamma2"], "skipped": old["skipped"]})


@pytest.mark.parametrize(
    ("make", "gamma2"),
    [
        (BalancedLoss, 1.0), (lambda: BalancedLoss(start=7.0), 7.0), (LearnedGammaLoss, 1.0),
        (lambda: FixedGammaLoss(gamma=0.1), 0.01),
    ],
)  # fmt: skip
def test_reset_parameters_after_the_meta_device(make, gamma2):
    with torch.device("meta"):
        loss = make()
    loss.to_empty(device="cpu")
    for t in [*loss.parameters(), *loss.buffers(), *([loss.sums] if hasattr(loss, "sums") else [])]:
        t.data.fill_(77)
    loss.reset_parameters()
    assert loss.skipped.item() == 0
    close(loss.current_gamma2(), gamma2)
    fresh = make()
    close(loss(*batch()).loss, fresh(*batch()).loss)
    close(loss.current_gamma2(), fresh.current_gamma2())


@pytest.mark.parametrize("mse", [0.0, 0.25])
@pytest.mark.parametrize("kwargs", [{}, {"accumulate": True}, {"start": "first-batch", "monotone": False}])
def test_activation_checkpointing_moves_once_and_keeps_the_gradient(mse, kwargs):
    found = {}
    for how in ("plain", "reentrant", "non-reentrant", "nested"):
        ours = BalancedLoss(logits=False, **kwargs)
        recon = torch.full((4, 12), 1 - math.sqrt(mse) + 1e-3, requires_grad=True)
        mu = torch.zeros(4, 2, requires_grad=True)

        def run(recon, mu, ours=ours):
            return ours(recon, torch.ones(4, 12), mu, torch.zeros(4, 2)).loss

        for _ in range(2):
            if how == "plain":
                loss = run(recon, mu)
            elif how == "nested":
                inner = functools.partial(checkpoint, run, use_reentrant=False)
                loss = checkpoint(inner, recon, mu, use_reentrant=False)
            else:
                loss = checkpoint(run, recon, mu, use_reentrant=how == "reentrant")
            loss.backward()
        ours.step()
        found[how] = torch.stack([ours.gamma2, recon.grad[0, 0], mu.grad[0, 0], ours.sums.sum().float()])
    for how, tensors in found.items():
        close(tensors, found["plain"], rtol=1e-6), how


def test_torch_func_transforms_it_in_eval_mode_and_is_told_of_in_training():
    recon, target, mu, log_sigma = (t.detach() for t in batch((4, 10)))
    ours = with_gamma2(BalancedLoss(), 0.3)

    def loss(r, t=target, m=mu, s=log_sigma):
        return ours(r, t, m, s).loss

    with pytest.raises(RuntimeError, match=r"call eval\(\) on the loss"):
        torch.func.grad(loss)(recon)
    ours.eval()
    leaf = recon.clone().requires_grad_()
    loss(leaf).backward()
    close(torch.func.grad(loss)(recon), leaf.grad, rtol=1e-4)
    close(torch.func.jacrev(loss)(recon), leaf.grad, rtol=1e-4)
    each = torch.vmap(lambda r, t, m, s: loss(r[None], t[None], m[None], s[None]))(recon, target, mu, log_sigma)
    for i, value in enumerate(each):
        close(value, formula(recon[i : i + 1], target[i : i + 1], mu[i : i + 1], log_sigma[i : i + 1], 0.3)[0])
    per_sample = torch.vmap(torch.func.grad(lambda r, t, m, s: loss(r[None], t[None], m[None], s[None])))
    close(per_sample(recon, target, mu, log_sigma), 4 * leaf.grad, rtol=1e-4)


def test_errors_name_no_path_of_the_machine():
    with pytest.raises(RuntimeError) as caught:
        ops.balanced_loss(
            torch.zeros(2, 3), torch.zeros(3, 2), torch.zeros(()), torch.ones(()), torch.zeros((), dtype=torch.int64),
            logits=True, update=False,
        )  # fmt: skip
    assert "one shape" in str(caught.value)
    assert not re.search(r"(?<![\w.])/\w", str(caught.value)), caught.value


# ---- the other balances ---------------------------------------------------------------------------------------------


def test_fixed_gamma_is_the_formula_and_never_moves():
    inputs = batch()
    ours = FixedGammaLoss(gamma=0.2, kl_weight=2.0)
    for _ in range(3):
        loss = ours(*inputs)
    close(loss.loss, formula(*inputs, 0.2**2, 2.0)[0])
    close(ours.gamma2, 0.04, rtol=1e-7)


def test_beta_is_a_beta_vae_up_to_a_factor_of_the_loss():
    recon, target, mu, log_sigma = batch()
    beta = 0.3
    FixedGammaLoss(beta=beta)(recon, target, mu, log_sigma).loss.backward()
    ours = [t.grad.clone() for t in (recon, mu, log_sigma)]
    for t in (recon, mu, log_sigma):
        t.grad = None
    sse = (recon.sigmoid() - target).square().sum() / len(recon)
    kl = 0.5 * (mu**2 + (2 * log_sigma).exp() - 2 * log_sigma - 1).sum() / len(recon)
    (sse / 2 + beta * kl).backward()
    for grad, t in zip(ours, (recon, mu, log_sigma), strict=True):
        close(beta * grad, t.grad, rtol=2e-5, atol=1e-7)


def test_learned_gamma_is_the_formula_with_an_analytic_gradient():
    inputs = batch()
    ours = LearnedGammaLoss(kl_weight=2.0)
    ours.log_gamma.data.fill_(-0.7)
    gamma2 = math.exp(-1.4)
    loss = ours(*inputs)
    loss.loss.backward()
    theirs = [t.detach().double().requires_grad_() for t in inputs]
    want = formula(*theirs, gamma2, 2.0)
    want[0].backward()
    for actual, expected in zip((loss.loss, loss.nll, loss.kl, loss.mse), want, strict=True):
        close(actual, expected)
    close(loss.gamma2, gamma2)
    d = inputs[0][0].numel()
    # d/dlog(gamma) of sse/(2 gamma^2) + D log(gamma), per sample
    close(ours.log_gamma.grad, d - d * want[3].item() / gamma2, rtol=1e-5)
    for mine, expected in zip(inputs, theirs, strict=True):
        if mine.requires_grad:
            close(mine.grad, expected.grad, rtol=2e-5, atol=1e-7)


def test_learned_gamma_converges_to_the_mse():
    recon, target, mu, log_sigma = (t.detach() for t in batch((8, 50)))
    ours = LearnedGammaLoss()
    optimizer = torch.optim.Adam(ours.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        loss = ours(recon, target, mu, log_sigma)
        loss.loss.backward()
        optimizer.step()
    close(loss.gamma2, loss.mse, rtol=1e-3)


def test_learned_gamma_has_a_floor():
    ours = LearnedGammaLoss(logits=False)
    optimizer = torch.optim.Adam(ours.parameters(), lr=1.0)
    x = torch.rand(8, 10)
    for _ in range(30):
        optimizer.zero_grad()
        loss = ours(x, x, kl=torch.zeros(()))
        loss.loss.backward()
        optimizer.step()
    close(loss.gamma2, 1e-8, rtol=1e-4)
    close(ours.current_gamma2(), 1e-8, rtol=1e-4)


def test_learned_gamma_does_not_move_by_itself():
    ours = LearnedGammaLoss()
    ours(*batch())
    assert ours.log_gamma.item() == 0
    assert ours.gamma2.item() == 1


@pytest.mark.parametrize(("kind", "cls"), [("computed", BalancedLoss), ("learned", LearnedGammaLoss)])
def test_make_loss_passes_its_settings_on(kind, cls):
    loss = make_loss(kind, kl_weight=7.0, logits=False)
    assert type(loss) is cls
    close(loss(*batch()).loss, formula(*batch(), 1.0, 7.0, logits=False)[0])
    fixed = make_loss("fixed", kl_weight=7.0, logits=False, gamma=0.5)
    close(fixed(*batch()).loss, formula(*batch(), 0.25, 7.0, logits=False)[0])


# ---- misuse ---------------------------------------------------------------------------------------------------------


def call(**changes):
    recon, target, mu, log_sigma = batch((4, 3, 8, 8))
    arguments = {"recon": recon, "target": target, "mu": mu, "log_sigma": log_sigma, **changes}
    return BalancedLoss()(**{name: value for name, value in arguments.items() if value is not None})


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"target": torch.zeros(4, 3, 8, 7)}, "differ in shape"),
        ({"target": torch.zeros(4, 192)}, "differ in shape"),
        ({"mu": None}, "give mu"),
        ({"log_sigma": None}, "give mu and one of"),
        ({"logvar": torch.zeros(4, 5)}, "one of log_sigma and logvar"),
        ({"kl": torch.zeros(())}, "not both"),
        ({"log_sigma": torch.zeros(4, 6)}, "differ in shape"),
        ({"mu": torch.zeros(3, 5), "log_sigma": torch.zeros(3, 5)}, "3 samples"),
        ({"mu": torch.zeros(()), "log_sigma": torch.zeros(())}, "0 samples"),
        ({"recon": torch.zeros(()), "target": torch.zeros(())}, "batch dimension"),
        ({"mu": None, "log_sigma": None, "kl": torch.zeros(4)}, "kl must be one number"),
        ({"target": torch.zeros(4, 3, 8, 8, dtype=torch.int64)}, "target must be"),
        ({"target": torch.zeros(4, 3, 8, 8, dtype=torch.bool)}, "target must be"),
        ({"recon": torch.zeros(4, 3, 8, 8, dtype=torch.uint8)}, "recon must be"),
    ],
)
def test_misuse_is_told(changes, text):
    with pytest.raises(ValueError, match=text):
        call(**changes)


@pytest.mark.parametrize("kl_weight", [-1.0, math.nan, math.inf, "automatic"])
def test_bad_kl_weights_are_refused(kl_weight):
    with pytest.raises(ValueError, match="kl_weight must be 'auto' or a number"):
        BalancedLoss(kl_weight=kl_weight)
    ours = BalancedLoss(kl_weight=2.0)
    with pytest.raises(ValueError, match="kl_weight must be 'auto' or a number"):
        ours.kl_weight = kl_weight
    assert ours.kl_weight == 2.0


@pytest.mark.parametrize("kind", ["computed", "learned", "fixed"])
def test_kl_weight_may_change_and_recompiles_once(kind):
    loss = make_loss(kind, kl_weight=0.1, gamma=0.5 if kind == "fixed" else None)
    compiled = 0

    def count(graph, inputs):
        nonlocal compiled
        compiled += 1
        return graph

    torch._dynamo.reset()
    recon, target, mu, log_sigma = (t.detach() for t in batch((4, 10)))
    run = torch.compile(lambda m: loss(recon, target, m, log_sigma), backend=count, fullgraph=True)
    for i, weight in enumerate([0.1, *torch.linspace(0.2, 1, 12).tolist(), 0.0]):
        if i:
            loss.kl_weight = weight
        m = mu.clone().requires_grad_()
        gamma2 = loss.current_gamma2().item()
        out = run(m)
        out.loss.backward()
        close(out.loss, formula(recon, target, mu, log_sigma, gamma2, weight)[0])
        close(torch.as_tensor(out.weight), weight, rtol=1e-6)
        close(m.grad, weight * mu / 4)
    assert compiled <= 2
    loss.kl_weight = "auto"
    with pytest.raises(ValueError, match="square images"):
        loss(recon, target, mu, log_sigma)


@pytest.mark.parametrize(
    "arguments",
    [
        {}, {"gamma": 1.0, "beta": 1.0}, {"gamma": 0.0}, {"gamma": -1.0}, {"beta": -0.1}, {"beta": math.nan},
        {"gamma": math.inf}, {"gamma": 1e200}, {"gamma": 1e-30}, {"beta": 1e-60},
    ],
)  # fmt: skip
def test_bad_fixed_gammas_are_refused(arguments):
    with pytest.raises(ValueError, match="gamma and beta"):
        FixedGammaLoss(**arguments)


# ---- torch.compile --------------------------------------------------------------------------------------------------


class TinyVAE(nn.Module):
    """Deterministic: z is mu, so that two ways of running it can be compared."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(12, 6)
        self.decoder = nn.Linear(3, 12)

    def forward(self, x):
        mu, log_sigma = self.encoder(x).chunk(2, 1)
        return self.decoder(mu), mu, log_sigma


class VAEWithLoss(nn.Module):
    def __init__(self, loss):
        super().__init__()
        self.vae = TinyVAE()
        self.loss = loss

    def forward(self, x):
        recon, mu, log_sigma = self.vae(x)
        return self.loss(recon, x, mu, log_sigma).loss


@pytest.mark.parametrize("kind", ["computed", "learned"])
def test_compiles_in_one_graph(kind):
    if kind == "computed" and not (shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")):
        pytest.skip("torch.compile's CPU backend needs a C++ compiler")
    torch.manual_seed(0)
    eager = VAEWithLoss(make_loss(kind))
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, fullgraph=True, backend="inductor" if kind == "computed" else "aot_eager")
    x = torch.rand(8, 12)
    for _ in range(3):  # gamma2 moves in between, in place
        for m in (eager, compiled):
            m.zero_grad()
            m.loss_value = m(x)
            m.loss_value.backward()
        close(compiled.loss_value, eager.loss_value)
    close(model.loss.gamma2, eager.loss.gamma2, rtol=1e-6)
    if kind == "computed":
        assert model.loss.gamma2.item() < 0.98
    for a, b in zip(model.parameters(), eager.parameters(), strict=True):
        close(a.grad, b.grad, atol=1e-6)


# ---- several processes ----------------------------------------------------------------------------------------------

GLOBAL = 8  # samples in the global batch


def train_tiny(x, wrap=lambda m: m, reduce=lambda model: None, inside=False, accumulate=False, lr=0.05, poison=None):
    """Four SGD steps; returns what each left behind. `x` is this rank's part of the batch."""
    torch.manual_seed(0)
    balance = BalancedLoss(accumulate=accumulate)
    model = wrap(VAEWithLoss(balance) if inside else TinyVAE())
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    history = []
    for step in range(4):
        part = x.clone()
        if poison is not None and step == poison:
            part[0, 0] = math.nan
        optimizer.zero_grad()
        for micro in part.split(2) if accumulate else (part,):
            if inside:
                loss = model(micro)
            else:
                recon, mu, log_sigma = model(micro)
                loss = balance(recon, micro, mu, log_sigma).loss
            (loss * len(micro) / len(part)).backward()
        if accumulate:
            balance.step()
        reduce(model)
        grads = torch.cat([p.grad.flatten() for p in model.parameters()])
        history.append(torch.cat([balance.gamma2.reshape(1), balance.skipped.reshape(1).float(), grads]))
        if lr:
            optimizer.step()
    return torch.stack(history)


def average_gradients(model):
    for p in model.parameters():
        dist.all_reduce(p.grad)
        p.grad /= dist.get_world_size()


CASES = {
    "by hand": {"reduce": average_gradients},
    "ddp": {"wrap": DistributedDataParallel},
    "loss inside ddp": {"wrap": DistributedDataParallel, "inside": True},
    "accumulated": {"reduce": average_gradients, "accumulate": True},
}


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    part = global_batch()[rank * GLOBAL // 2 : (rank + 1) * GLOBAL // 2]
    results = {name: train_tiny(part, **case) for name, case in CASES.items()}
    results["poisoned"] = train_tiny(part, lr=0.0, poison=2 if rank == 1 else None)
    results["micro-batches inside ddp"] = accumulate_inside_ddp(rank)
    alone = [dist.new_group([r]) for r in range(2)][rank]
    results["a group of its own"] = own_group(part, alone)
    results["rules"] = {name: rules_on(part, name) for name in BALANCES}
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


class WithLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(12, 12)
        self.loss = BalancedLoss(logits=False, accumulate=True)

    def forward(self, x, scale):
        return self.loss(0 * self.net(x), torch.full_like(x, scale), kl=torch.zeros(())).loss


def accumulate_inside_ddp(rank):
    """Two micro-batches of mse .01 on rank 0, of .25 on rank 1, without no_sync: DDP broadcasts buffers in between."""
    model = WithLoss()
    wrapped = DistributedDataParallel(model)
    for _ in range(2):
        wrapped(torch.rand(4, 12), (0.1, 0.5)[rank]).backward()
    model.loss.step()
    return model.loss.gamma2.clone()


def own_group(x, group):
    loss = BalancedLoss(logits=False, process_group=group)
    loss(0 * x, x, kl=torch.zeros(()))
    return torch.stack([loss.gamma2, x.square().mean()])


def rules_on(x, name):
    """Three steps of a rule on this rank's part of the batch: its loss and gradients (their mean) and its state."""
    torch.manual_seed(0)
    model = TinyVAE()
    entry = BALANCES[name]
    loss = entry.build(gamma=0.5 if name == "fixed" else None, total_steps=6)
    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.01)
    history = []
    for _ in range(3):
        recon, mu, log_sigma = model(x)
        out = loss(recon, x, mu, log_sigma)
        optimizer.zero_grad()
        out.loss.backward()
        figures = [out.loss.detach(), out.kl, out.mse, *(p.grad for p in (*model.parameters(), *loss.parameters()))]
        figures = torch.cat([t.reshape(-1) for t in figures])
        if dist.is_initialized():
            for p in (*model.parameters(), *loss.parameters()):
                dist.all_reduce(p.grad)
                p.grad /= 2
            dist.all_reduce(figures)
            figures /= 2
        optimizer.step()
        history.append(torch.cat([figures, *(t.reshape(-1).float() for t in loss.state_dict().values())]))
    return torch.stack(history)


def global_batch():
    # Uneven on purpose: each half has a mse of its own.
    x = torch.rand(GLOBAL, 12, generator=torch.Generator().manual_seed(5))
    return torch.cat([x[: GLOBAL // 2] * 0.2, x[GLOBAL // 2 :]])


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, (str(folder),), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize("name", list(CASES))
def test_two_ranks_of_half_a_batch_are_one_rank_of_the_whole(two_ranks, name):
    case = CASES[name]
    alone = train_tiny(global_batch(), inside=case.get("inside", False), accumulate=case.get("accumulate", False))
    assert alone[-1, 0] < 0.98
    for rank in (0, 1):
        close(two_ranks[rank][name], alone, rtol=1e-5, atol=1e-6)
    assert torch.equal(two_ranks[0][name][:, 0], two_ranks[1][name][:, 0]), "gamma2 must not drift apart"


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
def test_one_poisoned_rank_leaves_gamma2_on_all(two_ranks):
    for results in two_ranks:
        gamma2, skipped = results["poisoned"][:, 0], results["poisoned"][:, 1]
        assert gamma2[2] == gamma2[1] > gamma2[3]
        assert skipped.tolist() == [0, 0, 1, 1]


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
def test_micro_batches_inside_ddp_keep_the_sums_of_each_rank(two_ranks):
    for results in two_ranks:
        close(results["micro-batches inside ddp"], moved(1.0, (0.01 + 0.25) / 2), rtol=1e-6)


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
def test_a_process_group_of_one_rank_follows_that_rank(two_ranks):
    for results in two_ranks:
        gamma2, mse = results["a group of its own"].tolist()
        assert gamma2 == pytest.approx(moved(1.0, mse), rel=1e-6)
    assert two_ranks[0]["a group of its own"][0] != two_ranks[1]["a group of its own"][0]


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize("name", list(BALANCES))
def test_every_rule_on_two_ranks_is_that_of_one(two_ranks, name):
    alone = rules_on(global_batch(), name)
    for rank in (0, 1):
        close(two_ranks[rank]["rules"][name], alone, rtol=2e-5, atol=1e-6)


# ---- without the extension ------------------------------------------------------------------------------------------

TWIN = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, bvae
    from bvae import ops
    loss = bvae.BalancedLoss(kl_weight=2.0)
    torch.manual_seed(0)
    recon, mu, log_sigma = torch.randn(4, 6).requires_grad_(), torch.randn(4, 2), torch.randn(4, 2)
    for _ in range(3):
        parts = loss(recon, torch.full((4, 6), 51, dtype=torch.uint8), mu, log_sigma)
    parts.loss.backward()
ours = [w for w in caught if "bvae" in str(w.message)]
assert ops.EXTENSION_ERROR is not None
print(len(ours), "BVAE_DISABLE_EXTENSION" in str(ours[0].message))
print(*(f"{v:.9e}" for v in (parts.loss.item(), loss.gamma2.item(), recon.grad.abs().sum().item())))
"""


def test_works_without_the_extension_and_says_so_once():
    environment = {**os.environ, "BVAE_DISABLE_EXTENSION": "1"}
    done = subprocess.run([sys.executable, "-c", TWIN], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said, values = done.stdout.splitlines()
    assert said == "1 True"
    torch.manual_seed(0)
    recon, mu, log_sigma = torch.randn(4, 6).requires_grad_(), torch.randn(4, 2), torch.randn(4, 2)
    loss = BalancedLoss(kl_weight=2.0)
    for _ in range(3):
        parts = loss(recon, torch.full((4, 6), 51, dtype=torch.uint8), mu, log_sigma)
    parts.loss.backward()
    here = [parts.loss.item(), loss.gamma2.item(), recon.grad.abs().sum().item()]
    assert [float(v) for v in values.split()] == pytest.approx(here, rel=1e-5)
