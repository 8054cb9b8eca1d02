"""Improved precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020)."""

from collections.abc import Iterator

import torch
from torch import Tensor

NEIGHBOURS = 5
BLOCK = 2048  # rows and columns of distances in memory at a time


def prdc(real: Tensor, fake: Tensor, neighbours: int = NEIGHBOURS, block: int = BLOCK) -> dict[str, float]:
    """Precision, recall, density and coverage of features fake [m,d] against real [n,d].

    The manifold of a set is the union of balls around its points that reach to their `neighbours`-th nearest neighbour
    within the set. Precision is the share of fakes in the real manifold, recall that of reals in the fake one, density
    the number of real balls a fake lies in over `neighbours`, coverage the share of real balls that hold a fake. In
    float64, with a block of distances in memory at a time.
    """
    if min(len(real), len(fake)) <= neighbours:
        raise ValueError(f"precision and recall need more than {neighbours} samples on each side")
    reach_real = neighbour_distances(real, neighbours, block)
    reach_fake = neighbour_distances(fake, neighbours, block)
    in_real = torch.zeros(len(fake), dtype=torch.int64, device=real.device)  # real balls a fake lies in
    in_fake = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    covered = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for rows, columns, distances in _blocks(real, fake, block):
        inside = distances < reach_real[rows, None]
        in_real[columns] += inside.sum(0)
        covered[rows] |= inside.any(1)
        in_fake[rows] |= (distances < reach_fake[None, columns]).any(1)
    return {
        "precision": (in_real > 0).double().mean().item(),
        "recall": in_fake.double().mean().item(),
        "density": in_real.double().mean().item() / neighbours,
        "coverage": covered.double().mean().item(),
    }


def neighbour_distances(x: Tensor, neighbours: int, block: int = BLOCK) -> Tensor:
    """Squared distance of each row of x [n,d] to its `neighbours`-th nearest other row, [n] float64."""
    nearest = x.new_full((len(x), neighbours), torch.inf, dtype=torch.float64)
    for rows, columns, distances in _blocks(x, x, block):
        if rows.start == columns.start:
            distances.fill_diagonal_(torch.inf)  # itself
        both = torch.cat([nearest[rows], distances], 1)
        nearest[rows] = both.topk(neighbours, dim=1, largest=False).values
    return nearest.max(1).values


def _blocks(x: Tensor, y: Tensor, block: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """(rows of x, rows of y, squared distances between them), over all pairs."""
    for first in range(0, len(x), block):
        rows = slice(first, min(first + block, len(x)))
        a = x[rows].double()
        for other in range(0, len(y), block):
            columns = slice(other, min(other + block, len(y)))
            b = y[columns].double()
            squares = a.square().sum(1)[:, None] + b.square().sum(1)[None]
            yield rows, columns, squares.addmm_(a, b.T, alpha=-2).clamp_(min=0)
