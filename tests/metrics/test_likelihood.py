"""The importance-sampled likelihood on a linear Gaussian model, whose likelihood is known in closed form."""

import math

import numpy as np
import pytest
import torch

from bvae.metrics.likelihood import active_units, bits_per_dimension, importance_likelihood
from bvae.models.posterior import Posterior

stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")

D, K, GAMMA2 = 12, 3, 0.02
SHAPE = (3, 2, 2)


class Linear:
    """x = W z + b + gamma e with orthogonal columns W, so that the true posterior has a diagonal covariance."""

    def __init__(self):
        g = torch.Generator().manual_seed(0)
        q = torch.linalg.qr(torch.randn(D, K, generator=g, dtype=torch.float64)).Q
        self.lengths = torch.tensor([0.3, 0.1, 0.02], dtype=torch.float64)
        self.w = q * self.lengths
        self.b = torch.rand(D, generator=g, dtype=torch.float64)
        self.x = self.b + torch.randn(400, K, generator=g, dtype=torch.float64) @ self.w.T
        self.x += math.sqrt(GAMMA2) * torch.randn(400, D, generator=g, dtype=torch.float64)

    def decode(self, z):
        return (z.double() @ self.w.T + self.b).float().view(-1, *SHAPE)

    def posterior(self, x, wider=1.0):
        variance = 1 / (1 + self.lengths**2 / GAMMA2)
        mu = variance * ((x - self.b) @ self.w) / GAMMA2
        return Posterior(mu.float(), (0.5 * variance.log()).expand(len(x), K).float() + math.log(wider))

    def log_prob(self, x):
        covariance = self.w @ self.w.T + GAMMA2 * torch.eye(D, dtype=torch.float64)
        return stats.multivariate_normal(self.b.numpy(), covariance.numpy()).logpdf(x.numpy())


@pytest.fixture(scope="module")
def model():
    return Linear()


def score(model, posterior, samples, **arguments):
    targets = arguments.pop("targets", model.x.float().view(-1, *SHAPE).split(150))
    return importance_likelihood(model.decode, posterior, targets, GAMMA2, samples=samples, seed=0, **arguments)


def test_the_true_posterior_gives_the_exact_likelihood_with_any_number_of_samples(model):
    for samples in (1, 4):
        found = score(model, model.posterior(model.x), samples)
        assert -found.nll.numpy() == pytest.approx(model.log_prob(model.x), abs=2e-4)
        assert -found.nll.numpy() == pytest.approx(found.elbo.numpy(), abs=2e-4)
        assert found.effective_samples.numpy() == pytest.approx(samples, rel=1e-3)


def test_another_posterior_bounds_it_and_more_samples_come_closer(model):
    true = -model.log_prob(model.x).mean()
    wide = model.posterior(model.x, wider=1.7)
    figures = {samples: score(model, wide, samples).figures() for samples in (1, 5, 300)}
    gaps = [figures[samples]["nll"] - true for samples in figures]
    assert gaps[0] > gaps[1] > gaps[2]
    assert abs(gaps[2]) < 0.03
    # One sample's bound misses by KL(q || p(z|x)), known for two Gaussians.
    kl = K * (1.7**2 / 2 - 0.5 - math.log(1.7))
    assert -figures[300]["elbo"] - true == pytest.approx(kl, rel=0.05)
    assert gaps[0] == pytest.approx(kl, abs=4 * figures[1]["nll_error"])
    # E[w]^2 / E[w^2] for a normal distribution and one of 1.7 times its width.
    assert figures[300]["effective_samples"] / 300 == pytest.approx((math.sqrt(2 * 1.7**2 - 1) / 1.7**2) ** K, rel=0.05)


def test_neither_batches_nor_chunks_change_it(model):
    wide = model.posterior(model.x, wider=1.3)
    whole = score(model, wide, 5, targets=[model.x.float().view(-1, *SHAPE)])
    parts = score(model, wide, 5, chunk=29)
    assert parts.nll.numpy() == pytest.approx(whole.nll.numpy(), abs=1e-5)
    with pytest.raises(ValueError, match="13 images, but the posterior of 400"):
        score(model, wide, 5, targets=[model.x.float().view(-1, *SHAPE)[:13]])


def test_a_fitted_prior_takes_the_place_of_the_standard_normal(model):
    # Under the prior N(z; 0, 4 I) the model is that of W twice as long.
    scaled = Linear()
    scaled.w, scaled.lengths = 2 * model.w, 2 * model.lengths
    posterior = scaled.posterior(model.x)
    doubled = Posterior(2 * posterior.mu, posterior.log_sigma + math.log(2))
    found = score(
        model, doubled, 2, log_prior=lambda z: -z.double().square().sum(1) / 8 - K / 2 * math.log(8 * math.pi)
    )
    assert -found.nll.numpy() == pytest.approx(scaled.log_prob(model.x), abs=2e-4)


def test_uniform_dequantisation_spreads_grey_levels_about_their_value(model):
    levels = (model.x.clamp(0, 1) * 255).round().byte().view(-1, *SHAPE)
    exact = levels.flatten(1).double() / 255
    density = score(model, model.posterior(exact), 1, targets=[levels])
    assert -density.nll.numpy() == pytest.approx(model.log_prob(exact), abs=3e-4)
    uniform = score(model, model.posterior(exact), 1, targets=[levels], pixels="uniform")
    # A sample of the posterior at v/255 is a good one at (v - 1/2 + u)/255, for the noise is small against gamma.
    assert (uniform.nll - density.nll).abs().max() < 0.2
    assert not torch.equal(uniform.nll, density.nll)
    assert uniform.figures()["pixels"] == "uniform"
    with pytest.raises(ValueError, match="uint8"):
        score(model, model.posterior(exact), 1, pixels="uniform")


def test_uniform_dequantisation_bounds_the_bits_of_discrete_levels():
    # A decoder that ignores z: the discrete probability of a level is the normal distribution's over its bin.
    gamma2, n = (20 / 255) ** 2, 4000
    levels = torch.from_numpy(np.random.default_rng(0).normal(128, 20, (n, 1)).round().clip(0, 255)).byte()
    posterior = Posterior(torch.zeros(n, 1), torch.zeros(n, 1))
    figures = importance_likelihood(
        lambda z: torch.full((len(z), 1), 128 / 255), posterior, [levels], gamma2, samples=1, seed=0, pixels="uniform"
    ).figures()
    v = levels.double().numpy()[:, 0]
    bins = stats.norm.cdf(v + 0.5, 128, 20) - stats.norm.cdf(v - 0.5, 128, 20)
    assert figures["bits_per_dimension"] == pytest.approx(-np.log2(bins).mean(), abs=0.002)
    assert bits_per_dimension(0.0, 5) == math.log2(255)


def test_what_cannot_be_scored(model):
    with pytest.raises(ValueError, match="deterministic"):
        score(model, Posterior(torch.zeros(400, K), None), 1)
    with pytest.raises(ValueError, match="at least 1"):
        score(model, model.posterior(model.x), 0)


def test_active_units():
    g = torch.Generator().manual_seed(0)
    mu = torch.randn(5000, 4, generator=g) * torch.tensor([1, 0.11, 0.09, 0]) + 5
    assert active_units(mu) == 2
