"""The kernel Inception distance (Binkowski et al. 2018): unbiased squared MMD under a polynomial kernel."""

import numpy as np
import torch
from torch import Tensor

SUBSETS, SUBSET_SIZE = 100, 1000  # torch-fidelity's and clean-fid's


def kid(
    x: Tensor, y: Tensor, subsets: int = SUBSETS, subset_size: int = SUBSET_SIZE, seed: int = 0
) -> tuple[float, float]:
    """(mean, standard deviation) over random subsets of features x [n,d] and y [m,d].

    Each subset draws `subset_size` rows of either side without replacement, or all where there are fewer.
    """
    size = min(subset_size, len(x), len(y))
    if size < 2:
        raise ValueError("KID needs at least 2 samples on each side")
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(subsets):
        rows_x, rows_y = (torch.from_numpy(rng.choice(len(t), size, replace=False)).to(t.device) for t in (x, y))
        values.append(squared_mmd(x[rows_x], y[rows_y]))
    return float(np.mean(values)), float(np.std(values))


def squared_mmd(x: Tensor, y: Tensor) -> float:
    """Unbiased estimate of the squared MMD of x [n,d] and y [m,d] under (x.y/d + 1)^3."""
    x, y = x.double(), y.double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a: Tensor) -> Tensor:  # the diagonal would bias it
        k = kernel(a, a)
        return (k.sum() - k.diagonal().sum()) / (len(a) * (len(a) - 1))

    return (within(x) + within(y) - 2 * kernel(x, y).mean()).item()
