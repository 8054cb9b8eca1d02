"""Streaming moments: against their definition, whatever the batches, merged and reduced over processes."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from bvae.metrics.moments import BLOCK, Moments


def rows(n: int, dim: int = 7, seed: int = 0) -> torch.Tensor:
    """Features whose mean is large against their deviation, where sums of squares would lose digits."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, dim, generator=generator) * torch.arange(1, dim + 1) + 1000).float()


def moments_of(x: torch.Tensor, batch: int) -> Moments:
    moments = Moments(x.shape[1], x.device)
    for part in x.split(batch):
        moments.add(part)
    return moments


@pytest.mark.parametrize("n", [2, 3, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5])
def test_equal_numpys_in_float64(n: int, device: str) -> None:
    x = rows(n).to(device)
    moments = moments_of(x, 100)
    assert moments.n == n
    expected = x.cpu().double().numpy()
    np.testing.assert_allclose(moments.mean().cpu(), expected.mean(0), rtol=1e-14)
    np.testing.assert_allclose(moments.covariance().cpu(), np.cov(expected, rowvar=False), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("batch", [1, 3, BLOCK, BLOCK + 1, 5000])
def test_batches_do_not_change_a_bit(batch: int) -> None:
    x = rows(1000)
    one, other = moments_of(x, 64), moments_of(x, batch)
    assert torch.equal(one.mean(), other.mean())
    assert torch.equal(one.covariance(), other.covariance())


def test_reading_on_the_way_leaves_the_result() -> None:
    x = rows(700)
    moments = Moments(7)
    for part in x.split(90):
        moments.add(part)
        moments.mean()
    whole = moments_of(x, 90)
    torch.testing.assert_close(moments.covariance(), whole.covariance(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sizes", [(300, 500), (1, 799), (800, 0), (0, 800), (10, 10)])
def test_merging_parts_is_the_whole(sizes: tuple[int, int]) -> None:
    x = rows(sum(sizes))
    first, second = x.split(list(sizes))
    merged = moments_of(first, 50) if len(first) else Moments(7)
    merged.merge(moments_of(second, 50) if len(second) else Moments(7))
    assert merged.n == len(x)
    expected = x.double().numpy()
    np.testing.assert_allclose(merged.mean(), expected.mean(0), rtol=1e-14)
    np.testing.assert_allclose(merged.covariance(), np.cov(expected, rowvar=False), rtol=1e-11, atol=1e-11)


def reduce_on(rank: int, ranks: int, address: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=ranks)
    x = rows(500)
    moments = Moments(7)
    if rank:  # rank 0 has nothing to add
        moments = moments_of(x[:120] if rank == 1 else x[120:], 33)
    moments.all_reduce()
    torch.save((moments.n, moments.mean(), moments.covariance()), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_ranks_that_reduce_hold_the_whole(tmp_path) -> None:
    mp.spawn(reduce_on, (3, str(tmp_path / "meet"), str(tmp_path)), nprocs=3)
    expected = rows(500).double().numpy()
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(3)]
    for n, mean, covariance in results:
        assert n == 500
        np.testing.assert_allclose(mean, expected.mean(0), rtol=1e-14)
        np.testing.assert_allclose(covariance, np.cov(expected, rowvar=False), rtol=1e-11, atol=1e-11)
        assert torch.equal(covariance, results[0][2])


def test_refuses_other_dimensions_and_single_rows() -> None:
    moments = Moments(7)
    with pytest.raises(ValueError, match=r"\[B,7\]"):
        moments.add(torch.zeros(3, 8))
    moments.add(torch.zeros(1, 7))
    with pytest.raises(ValueError, match="at least 2 rows"):
        moments.covariance()
