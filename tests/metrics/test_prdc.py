"""Precision, recall, density and coverage: against their definition, and the authors' package."""

import numpy as np
import pytest
import torch

from bvae.metrics.prdc import neighbour_distances, prdc


def samples(n: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(shift, 1, (n, 6))).float()


def direct(real: np.ndarray, fake: np.ndarray, k: int) -> dict[str, float]:
    def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.sqrt(((a[:, None] - b[None]) ** 2).sum(2))

    def reach(a: np.ndarray) -> np.ndarray:
        return np.sort(distances(a, a), 1)[:, k]  # the 0th is the point itself

    between, radius_real, radius_fake = distances(real, fake), reach(real), reach(fake)
    inside = between < radius_real[:, None]
    return {
        "precision": inside.any(0).mean(),
        "recall": (between < radius_fake[None]).any(1).mean(),
        "density": inside.sum(0).mean() / k,
        "coverage": (between.min(1) < radius_real).mean(),
    }


@pytest.mark.parametrize("block", [7, 64, 1000])
@pytest.mark.parametrize("shift", [0.0, 1.5])
def test_equals_the_definition_in_blocks_of_any_size(block: int, shift: float, device: str) -> None:
    real, fake = samples(120, 0), samples(90, 1, shift)
    expected = direct(real.double().numpy(), fake.double().numpy(), 3)
    assert prdc(real.to(device), fake.to(device), 3, block) == pytest.approx(expected, rel=1e-12)
    assert all(value > 0 for value in expected.values())


def test_agrees_with_the_authors_package() -> None:
    package = pytest.importorskip("prdc", reason="prdc is not installed")
    real, fake = samples(300, 2), samples(250, 3, 0.7)
    expected = package.compute_prdc(real.double().numpy(), fake.double().numpy(), nearest_k=5)
    assert prdc(real, fake) == pytest.approx(expected, rel=1e-12)


def test_the_neighbour_of_a_duplicate_is_its_twin() -> None:
    x = samples(20, 4)
    assert neighbour_distances(torch.cat([x, x]), 1, 16).max() < 1e-12


def test_far_sets_share_nothing_and_equal_sets_everything() -> None:
    x = samples(50, 5)
    assert set(prdc(x, x + 100).values()) == {0.0}
    same = prdc(x, x.flip(0))
    assert same["precision"] == same["recall"] == same["coverage"] == 1


def test_refuses_fewer_samples_than_neighbours() -> None:
    with pytest.raises(ValueError, match="more than 5"):
        prdc(samples(5, 0), samples(50, 1))
