import numpy as np
import pytest
import torch

from bvae.metrics.latent import factor_correlation, inactive, latent_variances, variance_law

N = 4000


# ---- variances ------------------------------------------------------------------------------------------------------


def test_variances_are_those_of_numpy():
    rng = np.random.default_rng(0)
    mu, log_sigma = rng.normal(3, 2, (50, 4)), rng.normal(-1, 1, (50, 4))
    var_mu, sigma2 = latent_variances(
        torch.tensor(mu, dtype=torch.float32), torch.tensor(log_sigma, dtype=torch.float32)
    )
    assert var_mu.dtype == sigma2.dtype == torch.float64
    np.testing.assert_allclose(var_mu, mu.var(0), rtol=1e-6)
    np.testing.assert_allclose(sigma2, np.exp(log_sigma * 2).mean(0), rtol=1e-6)


def test_variance_law_holds_for_the_posterior_of_a_gaussian():
    """x = z + noise with z ~ N(0,1): the exact posterior has mu = x/(1+s), sigma^2 = s/(1+s), and the two add to 1."""
    g = torch.Generator().manual_seed(0)
    noise = torch.tensor([0.1, 1.0, 10.0])
    x = torch.randn(200_000, 3, generator=g) + noise.sqrt() * torch.randn(200_000, 3, generator=g)
    sigma2 = noise / (1 + noise)
    var_mu, mean_sigma2 = latent_variances(x / (1 + noise), (0.5 * sigma2.log()).expand_as(x))
    torch.testing.assert_close(mean_sigma2, sigma2.double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(var_mu + mean_sigma2, torch.ones(3, dtype=torch.float64), rtol=0.01, atol=0)
    assert variance_law(var_mu, mean_sigma2).item() == pytest.approx(1, abs=0.01)


def test_variance_law_is_the_mean_over_latents():
    law = variance_law(torch.tensor([0.5, 0.0, 3.0]), torch.tensor([0.25, 1.0, 0.25]))
    assert law.item() == pytest.approx((0.75 + 1.0 + 3.25) / 3)


def test_sigma_squared_is_averaged_not_sigma():
    log_sigma = torch.tensor([[-1.0], [1.0]])
    _, sigma2 = latent_variances(torch.zeros(2, 1), log_sigma)
    assert sigma2.item() == pytest.approx((np.exp(-2) + np.exp(2)) / 2)


def test_inactive_from_the_threshold_on():
    assert inactive(torch.tensor([0.0, 0.79999, 0.8, 1.0, 1.3], dtype=torch.float64)).tolist() == [
        False,
        False,
        True,
        True,
        True,
    ]


# ---- correlation with the factors -----------------------------------------------------------------------------------


def multiple_correlation(y, columns):
    """sqrt(R^2) of the least-squares fit with an intercept."""
    design = np.column_stack([np.ones(len(y)), *columns])
    fit = design @ np.linalg.lstsq(design, y, rcond=None)[0]
    return np.sqrt(max(0, 1 - ((y - fit) ** 2).sum() / ((y - y.mean()) ** 2).sum()))


def sample(seed=0):
    rng = np.random.default_rng(seed)
    linear = rng.uniform(-3, 9, N)
    kind = rng.integers(0, 4, N)
    angle = rng.uniform(0, 90, N)
    mu = np.column_stack(
        [
            linear + rng.normal(0, 2, N),
            -linear,
            np.array([5.0, -1.0, 0.3, 2.0])[kind] + rng.normal(0, 1, N),
            np.cos(2 * np.pi * (angle - 20) / 90) + 0.1 * rng.normal(0, 1, N),
            rng.normal(0, 1, N),
        ]
    )
    return mu, np.column_stack([linear, kind, angle])


def test_correlations_are_those_of_numpy():
    mu, factors = sample()
    got = factor_correlation(mu.astype(np.float32), factors, ["linear", "categorical", 90.0])
    assert got.shape == (5, 3)
    linear, kind, angle = factors.T
    turn = 2 * np.pi * angle / 90
    for j in range(5):
        assert got[j, 0] == pytest.approx(abs(np.corrcoef(mu[:, j], linear)[0, 1]), abs=1e-5)
        means = np.array([mu[kind == c, j].mean() for c in range(4)])[kind.astype(int)]
        assert got[j, 1] == pytest.approx(np.sqrt(means.var() / mu[:, j].var()), abs=1e-5)
        assert got[j, 2] == pytest.approx(multiple_correlation(mu[:, j], [np.cos(turn), np.sin(turn)]), abs=1e-5)
    assert got[1, 0] == pytest.approx(1)
    assert got[2, 1] > 0.85 > 0.2 > got[2, 0]
    assert got[3, 2] > 0.98
    assert got[4].max() < 0.1


def test_a_circle_may_be_cut_anywhere_and_categories_named_anyhow():
    mu, factors = sample()
    types = ["linear", "categorical", 90.0]
    moved = factors.copy()
    moved[:, 0] = -5 * moved[:, 0] + 3
    moved[:, 1] = np.array([7.0, -2.0, 100.0, 0.5])[moved[:, 1].astype(int)]
    moved[:, 2] = (moved[:, 2] + 33) % 90
    np.testing.assert_allclose(
        factor_correlation(mu * 1e-3 + 50, moved, types), factor_correlation(mu, factors, types), atol=1e-7
    )


def test_a_circle_is_not_a_line():
    angle = sample()[1][:, 2:]
    mu = np.cos(2 * np.pi * angle / 90)
    assert factor_correlation(mu, angle, [90.0]).item() == pytest.approx(1)
    assert factor_correlation(mu, angle, ["linear"]).item() < 0.1


@pytest.mark.parametrize("value", [0.0, 0.1, 626540.4784005447, -460426.5724722594, 1e-9])
@pytest.mark.parametrize("kind", ["linear", "categorical", 360.0])
def test_what_does_not_vary_correlates_with_nothing(value, kind):
    mu, factors = (a[:3000] for a in sample())
    constant = np.full((3000, 1), value)  # 3000 of the large ones do not sum to 3000 times the value
    assert np.abs(factor_correlation(mu, constant, [kind])).max() < 1e-6
    assert np.abs(factor_correlation(constant, factors, ["linear", "categorical", 90.0])).max() < 1e-6
    assert np.abs(factor_correlation(constant, constant, [kind])).max() < 1e-6


def test_faint_latents_are_not_constant_ones():
    mu, factors = sample()
    faint = factor_correlation(mu * 1e-6, factors, ["linear", "categorical", 90.0])
    np.testing.assert_allclose(faint, factor_correlation(mu, factors, ["linear", "categorical", 90.0]), atol=1e-6)


def test_integer_factors_and_results_in_range():
    _, factors = sample()
    got = factor_correlation(factors[:, :1], factors[:, :1].astype(np.int64), ["categorical"])
    assert 0 <= got.min() <= got.max() <= 1
    assert factor_correlation(factors[:, :1], factors[:, :1], ["linear"]) <= 1
