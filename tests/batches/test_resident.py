import itertools

import numpy as np
import pytest
import torch

from bvae.batches.resident import ImageBatches, LatentBatches, chunks, to_device

CPU = torch.device("cpu")


def images(count=23, side=4, channels=3):
    """Every image has its number as its first pixel, and no symmetry."""
    g = torch.Generator().manual_seed(0)
    data = torch.randint(0, 256, (count, side, side, channels), generator=g, dtype=torch.uint8)
    data[:, :, 0] = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1)
    data[:, :, -1] = 255
    return data


def numbers(batches, epoch, first=0):
    return [target[:, 0, 0, 0].tolist() for _, target in batches.epoch(epoch, first)]


def make(seed=0, batch=5, hflip=False, dtype=torch.float32, data=None):
    return ImageBatches(images() if data is None else data, batch, seed, dtype, hflip)


# ---- images ---------------------------------------------------------------------------------------------------------


def test_an_epoch_has_every_image_once_less_the_dropped_tail():
    batches = make()
    assert batches.steps == 4
    missed = set()
    for epoch in range(30):
        drawn = numbers(batches, epoch)
        assert [len(batch) for batch in drawn] == [5] * 4
        flat = list(itertools.chain.from_iterable(drawn))
        assert len(set(flat)) == 20
        assert set(flat) <= set(range(23))
        missed |= set(range(23)) - set(flat)
    assert missed == set(range(23)), "the tail must not be the same images every epoch"


def test_input_and_target_are_the_named_image():
    data = images()
    for x, target in make(data=data).epoch(0):
        rows = data[target[:, 0, 0, 0].long()].permute(0, 3, 1, 2)
        assert target.dtype == torch.uint8
        assert torch.equal(target, rows)
        assert x.dtype == torch.float32
        assert torch.equal(x, rows.float() / 255)
        assert x.is_contiguous(memory_format=torch.channels_last)


def test_bf16_input_keeps_the_uint8_target():
    for x, target in make(dtype=torch.bfloat16).epoch(0):
        assert x.dtype == torch.bfloat16
        assert torch.equal(x, (target.float() / 255).bfloat16())


def test_epochs_and_seeds_differ_and_repeat():
    assert numbers(make(), 0) == numbers(make(), 0)
    assert numbers(make(), 0) != numbers(make(), 1)
    assert numbers(make(seed=0), 0) != numbers(make(seed=1), 0)
    assert numbers(make(), -1) != numbers(make(), 0)
    # The global generator has no part in it.
    torch.manual_seed(5)
    assert numbers(make(), 0) == numbers(make(), 0)


@pytest.mark.parametrize("first", [0, 1, 3, 4])
def test_an_epoch_goes_on_from_its_middle(first):
    whole = list(make(hflip=True).epoch(3))
    rest = list(make(hflip=True).epoch(3, first))
    assert len(rest) == 4 - first
    for (x, target), (x2, target2) in zip(whole[first:], rest, strict=True):
        assert torch.equal(x, x2)
        assert torch.equal(target, target2)


def test_flips_turn_input_and_target_alike_about_half_of_the_time():
    data = images(200)
    seen = torch.zeros(200, 2, dtype=torch.int64)
    flipped = 0
    patterns = set()
    for epoch in range(10):
        for x, target in make(batch=50, hflip=True, data=data).epoch(epoch):
            assert torch.equal(x, target.float() / 255)
            turned = target[:, 0, 0, 0] == 255
            number = torch.where(turned, target[:, 0, 0, -1], target[:, 0, 0, 0]).long()
            rows = data[number].permute(0, 3, 1, 2)
            assert torch.equal(target, torch.where(turned.view(-1, 1, 1, 1), rows.flip(3), rows))
            seen[number, turned.long()] += 1
            flipped += int(turned.sum())
            patterns.add(tuple(turned.tolist()))
    assert abs(flipped - 1000) < 5 * (2000 / 4) ** 0.5
    assert len(patterns) == 40, "a place in the batch must not decide the flip"
    assert (seen.sum(1) == 10).all()
    assert ((seen > 0).all(1)).sum() > 190, "an image's flip must be drawn anew every epoch"


def test_without_hflip_nothing_is_turned():
    assert all((target[:, 0, :, -1] == 255).all() for _, target in make().epoch(0))


def test_fewer_images_than_a_batch_give_no_step():
    batches = make(batch=24)
    assert batches.steps == 0
    assert list(batches.epoch(0)) == []
    assert make(batch=23).steps == 1


def test_to_device_takes_any_memory_layout():
    array = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 2), dtype=np.uint8)[::-1, ::2]
    tensor = to_device(array, CPU)
    assert tensor.is_contiguous()
    assert np.array_equal(tensor.numpy(), array)


def test_chunks_are_the_whole_set_in_order():
    data = images(11)
    parts = list(chunks(data, 4))
    assert [len(x) for x, _ in parts] == [4, 4, 3]
    target = torch.cat([t for _, t in parts])
    assert torch.equal(target, data.permute(0, 3, 1, 2))
    assert torch.equal(torch.cat([x for x, _ in parts]), target.float() / 255)


# ---- latents --------------------------------------------------------------------------------------------------------


def posterior(count=4000, k=3):
    g = torch.Generator().manual_seed(0)
    return torch.randn(count, k, generator=g) * 10, torch.randn(count, k, generator=g) * 0.3 - 2


def test_latents_are_drawn_from_their_posterior_once_an_epoch():
    # mu_0 is the sample's number, known to well within its sigma: which sample each z comes from can be told.
    mu, log_sigma = posterior()
    mu[:, 0] = torch.arange(4000)
    log_sigma[:, 0] = -5
    seen, errors = [], []
    for z, target in LatentBatches(mu, log_sigma, 100, 0).epoch(0):
        assert z is target or torch.equal(z, target)
        assert not z.requires_grad
        index = z[:, 0].round().long()
        seen += index.tolist()
        errors.append((z - mu[index]) / log_sigma[index].exp())
    assert sorted(seen) == list(range(4000))
    eps = torch.cat(errors)
    assert eps.mean(0).abs().max() < 5 / 4000**0.5
    assert (eps.var(0) - 1).abs().max() < 5 * (2 / 4000) ** 0.5
    assert torch.corrcoef(eps.T).fill_diagonal_(0).abs().max() < 5 / 4000**0.5


def test_noise_is_fresh_every_epoch():
    mu, log_sigma = torch.zeros(8, 2), torch.zeros(8, 2)
    batches = LatentBatches(mu, log_sigma, 4, 0)
    drawn = [z for epoch in range(2) for z, _ in batches.epoch(epoch)]
    for a, b in itertools.combinations(drawn, 2):
        assert not torch.isin(a, b).any()


def test_seeds_differ_and_repeat():
    first, again, other = (next(LatentBatches(*posterior(8), 8, seed).epoch(0))[0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_latents_go_on_from_the_middle_through_their_state():
    whole = LatentBatches(*posterior(40), 8, 0)
    expected = [z.clone() for epoch in range(2) for z, _ in whole.epoch(epoch)]
    begun = LatentBatches(*posterior(40), 8, 0)
    got = [z.clone() for z, _ in itertools.islice(begun.epoch(0), 3)]
    saved = {name: t.clone() for name, t in begun.state().items()}
    resumed = LatentBatches(*posterior(40), 8, 0)
    for name, t in resumed.state().items():
        t.copy_(saved[name])
    got += [z.clone() for z, _ in itertools.chain(resumed.epoch(0, 3), resumed.epoch(1))]
    assert len(got) == len(expected) == 10
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_images_need_no_state_of_their_own():
    assert make().state() == {}
