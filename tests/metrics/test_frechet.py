"""The Frechet distance: closed forms, the matrix square root, and covariances without full rank."""

import numpy as np
import pytest
import torch

from bvae.metrics.frechet import frechet_distance, frechet_distance_of_features


def features(n: int, dim: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    """Non-negative and of unequal scales, as Inception's are."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(dim, dim)) * np.geomspace(1, 1e-3, dim)
    return torch.from_numpy(np.abs(rng.normal(size=(n, dim)) @ mixing + shift)).float()


def gaussian(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.double().mean(0), torch.cov(x.double().T)


def distance(x: torch.Tensor, y: torch.Tensor) -> float:
    return frechet_distance(*gaussian(x), *gaussian(y))


def test_commuting_covariances_have_a_closed_form(device: str) -> None:
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.normal(size=(20, 20)))
    a, b = rng.uniform(0.1, 3, 20), rng.uniform(0.1, 3, 20)
    a[:5] = 0  # directions in which one does not vary
    b[3:9] = 0
    mu = rng.normal(size=20)
    expected = (mu**2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    tensors = [torch.from_numpy(t).to(device) for t in (np.zeros(20), q * a @ q.T, mu, q * b @ q.T)]
    assert frechet_distance(*tensors) == pytest.approx(expected, rel=1e-7)


def test_agrees_with_scipys_matrix_square_root() -> None:
    linalg = pytest.importorskip("scipy.linalg", reason="scipy is not installed")
    x, y = features(400, 64, 1), features(300, 64, 2, shift=0.3)
    (mu1, s1), (mu2, s2) = gaussian(x), gaussian(y)
    root = linalg.sqrtm(s1.numpy() @ s2.numpy())
    expected = ((mu1 - mu2) ** 2).sum().item() + np.trace(s1.numpy() + s2.numpy() - 2 * np.real(root))
    assert distance(x, y) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize(("n", "m"), [(30, 25), (30, 500), (500, 30), (2, 2)])
def test_few_samples_agree_with_the_nuclear_norm(n: int, m: int) -> None:
    x, y = features(n, 64, 3), features(m, 64, 4)
    assert distance(x, y) == pytest.approx(frechet_distance_of_features(x, y), rel=1e-6)


def test_many_samples_agree_with_the_nuclear_norm() -> None:
    x, y = features(300, 40, 5), features(200, 40, 6)
    assert distance(x, y) == pytest.approx(frechet_distance_of_features(x, y), rel=1e-8)


@pytest.mark.parametrize("n", [10, 200])
def test_a_set_is_at_no_distance_from_itself(n: int) -> None:
    x = features(n, 50, 7)
    scale = torch.cov(x.double().T).trace().item()
    assert abs(distance(x, x)) < 1e-7 * scale
    assert abs(frechet_distance_of_features(x, x.flip(0))) < 1e-7 * scale


def test_is_symmetric() -> None:
    x, y = features(40, 50, 8), features(200, 50, 9)
    assert distance(x, y) == pytest.approx(distance(y, x), rel=1e-9)


def test_constant_features_leave_the_means() -> None:
    x, y = torch.ones(5, 6), 3 * torch.ones(9, 6)
    assert distance(x, y) == pytest.approx(24)
    assert frechet_distance_of_features(x, y) == pytest.approx(24)
