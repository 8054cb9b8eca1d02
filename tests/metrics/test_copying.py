"""A prior that copies codes is found out; one that does not is not accused."""

import numpy as np
import pytest
import torch

from bvae.metrics.copying import copied_codes, nearest_rows, share_closer
from bvae.models.posterior import Posterior
from bvae.models.priors.base import split
from bvae.models.priors.gaussian import GaussianPrior
from bvae.ops import make_rng


def codes(n=3000, k=4):
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, k, generator=g) * torch.tensor([3.0, 1, 1, 0.5])


def test_a_prior_that_copies_is_found_out_and_one_that_does_not_is_not(device):
    mu = codes().to(device)
    fitted, held_out = (mu[rows] for rows in split(len(mu), 0, device))
    prior = GaussianPrior(4).to(device)
    prior.fit(Posterior(mu, None), seed=0)
    honest = copied_codes(prior.sample(4096, make_rng(1, device)), fitted, held_out)
    assert honest.chance == pytest.approx(0.9)
    assert abs(honest.closer - 0.9) < 3 * honest.deviation
    assert honest.distance == pytest.approx(1, abs=0.15)
    g = torch.Generator().manual_seed(1)
    chosen = fitted[torch.randint(len(fitted), (4096,), generator=g).to(device)]
    copies = chosen + 0.01 * torch.randn(4096, 4, generator=g).to(device)
    copying = copied_codes(copies, fitted, held_out)
    assert copying.closer > 0.98
    assert copying.closer > copying.chance + 10 * copying.deviation
    assert copying.distance < 0.1
    # Half of the samples copies, half honest.
    mixed = copied_codes(torch.cat([copies[:2048], prior.sample(2048, make_rng(2, device))]), fitted, held_out)
    assert mixed.closer > mixed.chance + 5 * mixed.deviation


def test_chance_keeps_to_the_deviation_that_is_reported():
    # Fitted and held-out items are exchangeable, samples share neighbours: the share must scatter as it says.
    g = torch.Generator().manual_seed(0)
    samples = torch.randn(500, 2, generator=g)
    found = []
    for seed in range(150):
        items = torch.randn(60, 2, generator=torch.Generator().manual_seed(1000 + seed))
        found.append(copied_codes(samples, items[:40], items[40:]))
    shares = np.array([f.closer for f in found])
    expected = np.sqrt(np.mean([f.deviation**2 for f in found]))
    assert shares.mean() == pytest.approx(2 / 3, abs=4 * expected / np.sqrt(150))
    assert shares.std() == pytest.approx(expected, rel=0.2)


def test_nearest_rows_in_blocks_are_the_nearest():
    x, queries = codes(500), codes(700)[600:]
    expected = torch.cdist(queries.double(), x.double()).topk(3, largest=False)
    for block in (7, 499, 1000):
        squares, index = nearest_rows(queries, x.split(block), 3)
        assert torch.equal(index, expected.indices)
        distances = (squares + queries.square().sum(1, keepdim=True)).clamp(min=0).sqrt()
        assert distances.double().numpy() == pytest.approx(expected.values.numpy(), abs=1e-2)


def test_the_share_and_its_deviation_by_hand():
    near, far, index = np.ones(4), np.array([1.0, 1, 2, 0]), np.arange(4)
    share = share_closer(near, index, far, index, 30, 10)
    assert share.closer == 0.5  # two ties count half, one is nearer
    assert share.chance == 0.75
    # Four samples with four nearest items: s_i = 1/4.
    assert share.deviation**2 == pytest.approx(0.75 * 0.25 * 40 / 39 * (4 / 16 - 1 / 40))
    one = share_closer(near, np.zeros(4, int), far + 1.5, index, 30, 10)
    assert one.deviation**2 == pytest.approx(0.75 * 0.25 * 40 / 39 * (1 - 1 / 40))
