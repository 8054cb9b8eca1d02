"""Do samples copy the data a model was fitted on? Nearest neighbours, and the share that lies nearer to that data."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

BLOCK_BYTES = 64 * 2**20  # bytes of float32 vectors at a time


class Share(NamedTuple):
    """Share of samples that are nearer to the fitted data than to held-out items, and its chance level."""

    closer: float
    """share of the samples; a tie counts half"""
    chance: float
    """the share to expect where nothing is copied: that of fitted items among all"""
    deviation: float
    """standard deviation of `closer` where fitted and held-out items are exchangeable: see `share_closer`"""


class Copying(NamedTuple):
    """Figures that show if samples are copies of fitted codes."""

    closer: float
    chance: float
    deviation: float
    """see Share"""
    distance: float
    """median distance of a sample to the nearest fitted code over that of a held-out code: far below 1 for copies"""


def nearest_rows(queries: Tensor, blocks: Iterable[Tensor], count: int = 1) -> tuple[Tensor, Tensor]:
    """The `count` rows nearest to each query, nearest first, by |a|^2 - 2ab + |b|^2 in float32.

    Args:
        queries: [Q,d] float32.
        blocks: [n,d] float32 each, consecutive rows of what is searched; in all at least `count`.

    Returns:
        (squared distances less the query's square [Q,count], indices of the rows int64 [Q,count]).
    """
    best = torch.full((len(queries), 0), math.inf, device=queries.device)
    index = torch.zeros((len(queries), 0), dtype=torch.int64, device=queries.device)
    first = 0
    for x in blocks:
        distance = torch.addmm(x.square().sum(1).expand(len(queries), -1), queries, x.T, alpha=-2)
        places = torch.arange(first, first + len(x), device=x.device).expand(len(queries), -1)
        merged, chosen = torch.cat([best, distance], 1).topk(min(count, best.shape[1] + len(x)), largest=False)
        best, index = merged, torch.cat([index, places], 1).gather(1, chosen)
        first += len(x)
    return best, index


def share_closer(
    fitted: np.ndarray, fitted_index: np.ndarray, held_out: np.ndarray, held_out_index: np.ndarray, n: int, m: int
) -> Share:
    """Share of samples nearer to one of n fitted items than to any of m held-out ones.

    For a model that copies nothing it is chance whether the item nearest to a sample is a fitted one: chance that is
    drawn for each item, not for each sample, since samples that are alike share their nearest. With s_i the share of
    samples whose nearest is the i-th of all N = n + m items, p = n / N, and every choice of the n equally likely,

        E[closer] = p,   Var(closer) = p (1 - p) N / (N - 1) (sum_i s_i^2 - 1 / N)

    Args:
        fitted, held_out: [Q], distances of each sample to the nearest item of either kind.
        fitted_index, held_out_index: [Q], which items those are.
    """
    difference = fitted - held_out
    closer = float((difference < 0).mean() + (difference == 0).mean() / 2)
    owners = np.where(difference < 0, fitted_index, -1 - held_out_index)
    shares = np.unique(owners, return_counts=True)[1] / len(difference)
    total, chance = n + m, n / (n + m)
    variance = chance * (1 - chance) * total / (total - 1) * ((shares**2).sum() - 1 / total)
    return Share(closer, chance, math.sqrt(max(variance, 0)))


@torch.no_grad()
def copied_codes(samples: Tensor, fitted: Tensor, held_out: Tensor) -> Copying:
    """Checks if latents that a prior draws are copies of the codes it was fitted to.

    Codes are best given as posterior means over the active latents alone: the others are noise, in which no two codes
    are near each other, and would hide a copy. All fitted codes are searched, not as many as are held out, since a
    copy is found only by its original.

    Args:
        samples: [Q,k]. fitted: [n,k]. held_out: [m,k], exchangeable with `fitted`, but not fitted to: the tenth that
            bvae.models.priors.base.split holds out, rather than codes of test images, which an encoder treats worse.
    """

    def nearest(queries: Tensor, codes: Tensor) -> tuple[np.ndarray, np.ndarray]:
        index = nearest_rows(queries, codes.split(max(1, BLOCK_BYTES // (4 * codes.shape[1]))))[1][:, 0]
        distance = (queries.double() - codes[index].double()).norm(dim=1)  # anew: the search's square cancels digits
        return distance.cpu().numpy(), index.cpu().numpy()

    samples, fitted, held_out = samples.float(), fitted.float(), held_out.float()
    near, index = nearest(samples, fitted)
    share = share_closer(near, index, *nearest(samples, held_out), len(fitted), len(held_out))
    usual = float(np.median(nearest(held_out, fitted)[0]))
    return Copying(*share, float(np.median(near)) / usual if usual > 0 else math.nan)
