"""The Frechet distance between two Gaussians (Heusel et al. 2017), without a matrix square root.

    d = |mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)

S1 = A A^T gives (S1 S2)^(1/2) the trace of (A^T S2 A)^(1/2), a symmetric eigenproblem: real, and exact where a
covariance does not have full rank, which is where iterations for the matrix square root fail. A is S1's Cholesky
factor, or where it has none, not being of full rank, what its eigenvectors give.
"""

import torch
from torch import Tensor


def frechet_distance(mu1: Tensor, cov1: Tensor, mu2: Tensor, cov2: Tensor) -> float:
    """The distance between Gaussians of means [d] and covariances [d,d], in float64 on the tensors' device."""
    mu1, cov1, mu2, cov2 = (t.double() for t in (mu1, cov1, mu2, cov2))
    a, failed = torch.linalg.cholesky_ex(cov1)
    if failed:
        values, vectors = torch.linalg.eigh(cov1)
        kept = values > _noise(values)
        a = vectors[:, kept] * values[kept].sqrt()
    # Eigenvalues that are 0 come out as rounding errors, and the square root of a rounding error is far larger.
    product = torch.linalg.eigvalsh(a.T @ cov2 @ a)
    cross = product[product > _noise(product)].sqrt().sum()
    return _distance(mu1, mu2, cov1.trace(), cov2.trace(), cross)


def frechet_distance_of_features(x: Tensor, y: Tensor) -> float:
    """The same between features [n,d] and [m,d] themselves: the faster way with fewer samples than dimensions.

    With A, B the centred features, tr (S1 S2)^(1/2) is the nuclear norm of A B^T / sqrt((n-1)(m-1)).
    """
    x, y = x.double(), y.double()
    a, b = ((t - t.mean(0)) / (len(t) - 1) ** 0.5 for t in (x, y))
    cross = torch.linalg.svdvals(a @ b.T).sum()
    return _distance(x.mean(0), y.mean(0), a.square().sum(), b.square().sum(), cross)


def _noise(values: Tensor) -> Tensor:
    """The size up to which eigenvalues may be rounding of 0, by the rule of NumPy's matrix_rank."""
    if not len(values):
        return values.new_zeros(())
    return values.abs().max() * len(values) * torch.finfo(values.dtype).eps


def _distance(mu1: Tensor, mu2: Tensor, trace1: Tensor, trace2: Tensor, cross: Tensor) -> float:
    # Between equal sets rounding leaves a little, of either sign.
    return max(0.0, ((mu1 - mu2).square().sum() + trace1 + trace2 - 2 * cross).item())
