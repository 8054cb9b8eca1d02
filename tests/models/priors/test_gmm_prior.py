"""The mixture against scikit-learn's, and its sampler against the moments of the mixture."""

import numpy as np
import pytest
import torch

from bvae import ops
from bvae.errors import UserError
from bvae.models.posterior import Posterior
from bvae.models.priors.gmm import MixturePrior, MixtureSettings

mixture = pytest.importorskip("sklearn.mixture", reason="scikit-learn is not installed: bvae[gmm]")


def clusters(n=900):
    g = torch.Generator().manual_seed(1)
    centres = torch.tensor([[5.0, 0, 0, 0], [-5, 1, 0, 1], [0, -4, 8, 2]])
    which = torch.multinomial(torch.tensor([0.2, 0.3, 0.5]), n, replacement=True, generator=g)
    return centres[which] + torch.randn(n, 4, generator=g) * torch.tensor([1, 0.5, 0.1, 2])


@pytest.fixture(scope="module")
def prior():
    fitted = MixturePrior(4, MixtureSettings(gmm_components=3))
    figures = fitted.fit(Posterior(clusters(), None), seed=0)
    assert figures["converged"] and figures["iterations"] >= 1
    return fitted


def test_log_prob_is_scikit_learns(prior):
    theirs = mixture.GaussianMixture(3)
    theirs.weights_, theirs.means_ = prior.weights.numpy(), prior.means.numpy()
    theirs.covariances_ = (prior.factors @ prior.factors.mT).numpy()
    theirs.precisions_cholesky_ = np.linalg.inv(prior.factors.numpy()).transpose(0, 2, 1)
    z = torch.cat([clusters(50), 10 * torch.randn(50, 4, generator=torch.Generator().manual_seed(2))])
    expected = theirs.score_samples(prior.whitening(z).double().numpy()) + prior.whitening.log_det().item()
    assert prior.log_prob(z).numpy() == pytest.approx(expected, rel=1e-9)


def test_it_finds_the_clusters(prior):
    assert sorted(prior.weights.tolist()) == pytest.approx([0.2, 0.3, 0.5], abs=0.06)
    found = prior.whitening.inverse(prior.means.float())
    assert sorted(found[:, 0].tolist()) == pytest.approx([-5, 0, 5], abs=0.4)


def test_samples_have_the_moments_of_the_mixture(prior):
    n = 40_000
    w = prior._sample(n, ops.make_rng(0)).double()
    mean = prior.weights @ prior.means
    second = torch.einsum("c,cij->ij", prior.weights, prior.factors @ prior.factors.mT + torch.einsum(
        "ci,cj->cij", prior.means, prior.means
    ))  # fmt: skip
    assert (w.mean(0) - mean).abs().max() < 4 / n**0.5
    assert (torch.cov(w.T) - (second - torch.outer(mean, mean))).abs().max() < 0.05
    # Components are chosen by their weights, and each has its own covariance.
    nearest = torch.cdist(w, prior.means).argmin(1)
    for c in range(3):
        chosen = w[nearest == c]
        weight = prior.weights[c].item()
        assert len(chosen) / n == pytest.approx(weight, abs=4 * (weight * (1 - weight) / n) ** 0.5 + 1e-3)
        assert torch.allclose(torch.cov(chosen.T), prior.factors[c] @ prior.factors[c].T, atol=0.02)


def test_too_few_images_for_its_components_and_no_scikit_learn(monkeypatch):
    with pytest.raises(UserError, match="at least 112 images"):
        MixturePrior(4, MixtureSettings(gmm_components=100)).fit(Posterior(clusters(111), None), seed=0)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"bvae\[gmm\]"):
        MixturePrior.check_fit()
    MixturePrior(4)  # sampling needs none


def test_stopping_early_is_reported():
    figures = MixturePrior(4, MixtureSettings(gmm_iterations=1, gmm_tolerance=0)).fit(
        Posterior(clusters(), None), seed=0
    )
    assert figures["converged"] is False
