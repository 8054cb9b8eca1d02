"""KID: against its definition written as loops, and torchmetrics'."""

import numpy as np
import pytest
import torch

from bvae.metrics.kid import kid, squared_mmd


def samples(n: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(shift, 1, (n, 12))).float()


def test_equals_the_sums_over_pairs(device: str) -> None:
    x, y = samples(9, 0), samples(7, 1, 0.5)
    a, b = x.double().numpy(), y.double().numpy()

    def k(u: np.ndarray, v: np.ndarray) -> float:
        return (u @ v / 12 + 1) ** 3

    expected = sum(k(a[i], a[j]) for i in range(9) for j in range(9) if i != j) / (9 * 8)
    expected += sum(k(b[i], b[j]) for i in range(7) for j in range(7) if i != j) / (7 * 6)
    expected -= 2 * sum(k(u, v) for u in a for v in b) / (9 * 7)
    assert squared_mmd(x.to(device), y.to(device)) == pytest.approx(expected, rel=1e-12)


def test_agrees_with_torchmetrics() -> None:
    image_kid = pytest.importorskip("torchmetrics.image.kid", reason="torchmetrics is not installed")
    x, y = samples(50, 2), samples(50, 3, 0.2)
    assert squared_mmd(x, y) == pytest.approx(image_kid.poly_mmd(x.double(), y.double()).item(), rel=1e-10)


def test_the_mean_over_subsets_is_unbiased_and_the_seed_fixes_it() -> None:
    x, y = samples(400, 4), samples(300, 5, 0.3)
    mean, deviation = kid(x, y, subsets=60, subset_size=50)
    assert abs(mean - squared_mmd(x, y)) < 4 * deviation / 60**0.5
    assert kid(x, y, subsets=60, subset_size=50) == (mean, deviation)
    assert kid(x, y, subsets=60, subset_size=50, seed=1) != (mean, deviation)


def test_subsets_of_everything_do_not_vary() -> None:
    x, y = samples(40, 6), samples(40, 7)
    mean, deviation = kid(x, y, subsets=3)
    assert mean == pytest.approx(squared_mmd(x, y), rel=1e-12) and deviation < 1e-12


def test_refuses_single_samples() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        kid(samples(1, 0), samples(9, 1))
