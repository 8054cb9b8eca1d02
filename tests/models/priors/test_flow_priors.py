"""Flow matching and the normalising flow, on a density that is known and that no Gaussian fits."""

import math

import pytest
import torch

from bvae import ops
from bvae.errors import UserError
from bvae.models.posterior import Posterior
from bvae.models.priors.base import split
from bvae.models.priors.flow import FlowPrior, FlowSettings
from bvae.models.priors.flow_matching import FlowMatchingPrior, FlowMatchingSettings, Velocity
from bvae.models.priors.gaussian import GaussianPrior

TRANSFORM = torch.tensor([[3.0, 0.5], [0.0, 0.2]])  # makes the axes unequal and correlated
RADIUS, WIDTH = 1.0, 0.15


def ring(n, seed):
    g = torch.Generator().manual_seed(seed)
    radius, angle = RADIUS + WIDTH * torch.randn(n, generator=g), 2 * math.pi * torch.rand(n, generator=g)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1) @ TRANSFORM + 4


def radius_of(z):
    return torch.linalg.solve(TRANSFORM.T, (z - 4).T).norm(dim=0)


def ring_log_prob(z):
    r = radius_of(z).double()
    normal = -0.5 * ((r - RADIUS) / WIDTH) ** 2 - math.log(WIDTH * math.sqrt(2 * math.pi))
    return normal - (2 * math.pi * r).log() - math.log(torch.linalg.det(TRANSFORM).abs())


def fitted(name):
    if name == "flow":
        pytest.importorskip("zuko", reason="zuko is not installed: bvae[flow]")
        return FlowPrior(2, FlowSettings(flow_steps=150, flow_batch=256, flow_layers=4, flow_width=32, flow_lr=1e-2))
    return FlowMatchingPrior(
        2,
        FlowMatchingSettings(
            flow_matching_steps=300,
            flow_matching_batch=256,
            flow_matching_width=64,
            flow_matching_depth=2,
            flow_matching_lr=3e-3,
            flow_matching_heun=25,
        ),
    )


@pytest.mark.parametrize("name", ["flow-matching", "flow"])
def test_it_learns_a_ring(name):
    codes = Posterior(ring(5000, 0), None)
    prior = fitted(name)
    seen = []
    figures = prior.fit(codes, seed=0, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == len(seen)
    # The gap to the true log density on held-out codes is the divergence KL(true || prior).
    truth = ring_log_prob(codes.mu[split(5000, 0)[1]]).mean().item()
    gaussian = GaussianPrior(2).fit(codes, seed=0)["log_likelihood"]
    assert truth - gaussian > 0.6
    assert -0.03 < truth - figures["log_likelihood"] < 0.2
    z = prior.sample(2000, ops.make_rng(0))
    assert bool(z.isfinite().all())
    r = radius_of(z)
    assert r.mean().item() == pytest.approx(RADIUS, abs=0.04)
    assert r.std().item() == pytest.approx(WIDTH, abs=0.06)
    assert z.mean(0).tolist() == pytest.approx([4, 4], abs=0.15)


def test_the_untrained_flow_of_flow_matching_is_the_gaussian():
    settings = FlowMatchingSettings(flow_matching_width=8, flow_matching_depth=1, flow_matching_heun=25)
    prior, gaussian = FlowMatchingPrior(2, settings), GaussianPrior(2)
    for each in (prior, gaussian):
        each.whitening.measure(Posterior(ring(500, 0), None))
    z = ring(200, 1)
    assert torch.allclose(prior.log_prob(z), gaussian.log_prob(z), atol=5e-3)
    assert torch.allclose(prior.sample(200, ops.make_rng(0)), gaussian.sample(200, ops.make_rng(0)), atol=5e-3)


def test_the_velocity_starts_at_the_best_one_for_gaussian_codes():
    # E[z - u | w_t] by regression, for independent standard normal z and u.
    g = torch.Generator().manual_seed(0)
    z, u = torch.randn(2, 200_000, 1, generator=g).unbind()
    velocity = Velocity(1, 8, 1)
    for time in (0.0, 0.3, 0.5, 0.9, 1.0):
        w = (1 - time) * u + time * z
        slope = ((z - u) * w).mean() / w.square().mean()
        assert velocity(torch.ones(1, 1), torch.tensor([time])).item() == pytest.approx(slope.item(), abs=0.02)


def test_no_zuko(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"bvae\[flow\]"):
        FlowPrior(2)


def test_a_diverging_fit_is_an_error_not_a_prior():
    settings = FlowMatchingSettings(
        flow_matching_steps=10, flow_matching_width=8, flow_matching_lr=1e30, flow_matching_heun=2
    )
    with pytest.raises(UserError, match="not finite"):
        FlowMatchingPrior(2, settings).fit(Posterior(ring(200, 0), None), seed=0)
