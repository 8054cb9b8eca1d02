import numpy as np
import pytest
import torch

from bvae.config import Config
from bvae.data.dataset import Dataset
from bvae.report import views as report_views
from bvae.report.views import (
    compute_views,
    information,
    interpolate,
    interpolate_on_sphere,
    memorising,
    nearest,
    traversals,
)
from bvae.two_stage import TwoStageVAE, to_uint8

CONFIG = Config(preset="shapes", side=8, scales=2, base=4, fc=8, latents=3, hidden=16)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = TwoStageVAE(CONFIG)
    for p in model.parameters():  # or all images look alike
        p.data += 0.2 * torch.randn_like(p)
    return model.eval()


def noise(count, seed=0, side=8):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def dataset(train, test):
    return Dataset("made up", train, test, "sha256:0", None)


def record(kl, sigma2, stage=1, epoch=1):
    return {"stage": stage, "epoch": epoch, "latent_kl": kl, "latent_sigma2": sigma2, "latent_var_mu": [0.0] * len(kl)}


# ---- nearest ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 7, 40, None])
def test_nearest_is_what_a_direct_search_finds(block):
    images, queries = noise(40), noise(9, seed=1)
    found = nearest(queries, images, 5, block=block)
    difference = queries[:, None].astype(np.float64) - images[None].astype(np.float64)
    distance = np.sqrt((difference**2).mean((2, 3, 4))) / 255
    order = distance.argsort(1)[:, :5]
    assert (found.index == order).all()
    np.testing.assert_allclose(found.distance, np.take_along_axis(distance, order, 1), rtol=1e-12)


def test_distances_of_copies_and_near_copies_are_exact():
    images = noise(30, side=64)  # of many elements, where float32 sums lose digits
    near = images[4].copy()
    near[0, 0, 0] ^= 1
    found = nearest(np.stack([images[17], near]), images, 1)
    assert found.index.tolist() == [[17], [4]]
    assert found.distance[0, 0] == 0
    assert found.distance[1, 0] == pytest.approx(np.sqrt(1 / near.size) / 255)


def test_nearest_reads_a_mapped_file_in_blocks(tmp_path):
    images = noise(50)
    np.save(tmp_path / "x.npy", images)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert (nearest(images[::7], mapped, block=8).index[:, 0] == np.arange(0, 50, 7)).all()


@pytest.mark.parametrize("count", [0, 5])
def test_nearest_refuses_what_cannot_be_found(count):
    with pytest.raises(ValueError, match="nearest of images"):
        nearest(noise(1), noise(4), count)


# ---- is it memorising? ------------------------------------------------------------------------------------------


def test_copies_of_training_images_are_told_from_new_images():
    images = noise(600)
    data = dataset(images[:300], images[300:])
    copied = memorising(images[:100], data)
    assert copied.closer == 1 and (copied.found.distance[:, 0] == 0).all()
    # a hundred different images of six hundred
    assert copied.deviation**2 == pytest.approx(0.25 * 600 / 599 * (1 / 100 - 1 / 600))
    fresh = memorising(noise(100, seed=5), data)
    assert abs(fresh.closer - 0.5) < 4 * fresh.deviation


def test_samples_that_are_alike_are_one_toss_of_the_coin():
    images = noise(600)
    m = memorising(np.repeat(noise(1, seed=5), 100, 0), dataset(images[:300], images[300:]))
    assert m.closer in (0, 1)
    assert m.deviation == 0.5


def test_blur_is_not_taken_for_memorising():
    """Grey images are nearer to all images than these are to each other, and that says nothing."""
    images = noise(600)
    grey = np.clip(128 + np.random.default_rng(1).normal(0, 3, (200, 8, 8, 3)), 0, 255).astype(np.uint8)
    m = memorising(grey, dataset(images[:300], images[300:]))
    assert m.found.distance[:, 0].max() < m.test_distance.min()
    assert abs(m.closer - 0.5) < 3 * m.deviation


def test_a_training_set_smaller_than_the_neighbours_asked_for():
    m = memorising(noise(3, seed=1), dataset(noise(2), noise(1, seed=2)))
    assert m.neighbours.shape == (3, 2, 8, 8, 3)
    assert m.compared == 1


# ---- traversals and interpolations ------------------------------------------------------------------------------


def test_a_traversal_moves_one_latent_and_nothing_else(model):
    base = torch.tensor([0.3, -0.2, 0.7])
    images = traversals(model, base, [2, 0], (-1.0, 0.7))
    assert images.shape == (2, 2, 8, 8, 3)
    z = torch.tensor([[0.3, -0.2, -1.0], [0.3, -0.2, 0.7], [-1.0, -0.2, 0.7], [0.7, -0.2, 0.7]])
    assert (images.reshape(4, 8, 8, 3) == to_uint8(model.decode(z))).all()
    assert base.tolist() == pytest.approx([0.3, -0.2, 0.7])


def test_interpolations_begin_and_end_where_they_should():
    a, b = torch.randn(4, 6), torch.randn(4, 6)
    for path in (interpolate(a, b, 5), interpolate_on_sphere(a, b, 5)):
        assert path.shape == (4, 5, 6)
        torch.testing.assert_close(path[:, 0], a)
        torch.testing.assert_close(path[:, -1], b)
    torch.testing.assert_close(interpolate(a, b, 3)[:, 1], (a + b) / 2)


def test_on_the_sphere_lengths_go_evenly_from_one_end_to_the_other():
    a = torch.tensor([[3.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    b = torch.tensor([[0.0, 5.0], [1.0, 0.0], [-2.0, 0.1]])  # at a right angle, the same, all but opposite
    path = interpolate_on_sphere(a, b, 3)
    assert path.isfinite().all()
    torch.testing.assert_close(path.norm(dim=-1)[0], torch.tensor([3.0, 4.0, 5.0]))
    torch.testing.assert_close(path[0, 1], torch.full((2,), 4 / 2**0.5))
    torch.testing.assert_close(path[1, 1], a[1])
    assert path[2, 1].norm() == pytest.approx(2, rel=0.02)


# ---- everything a model shows -----------------------------------------------------------------------------------


def test_latents_come_in_the_order_of_their_information():
    records = [
        record([9.0, 1.0, 1.0], [0.1, 0.1, 0.1]),
        record([0.5, 3.0, float("nan")], [0.3, 0.1, 0.9], epoch=2),
        record([7.0] * 3, [0.1] * 3, stage=2),
    ]
    latents = information(records)
    assert latents.index.tolist() == [1, 0, 2]
    assert latents.active.tolist() == [True, True, False]
    assert information(records[2:]) is None
    assert information([{"stage": 1, "epoch": 1}]) is None


def test_views_without_data_need_only_the_model(model):
    views = compute_views(model, [record([0.5, 3.0, 0.0], [0.3, 0.1, 0.9])], seed=7)
    assert views.traversed == [1, 0]
    assert (views.samples[1] == to_uint8(model.sample(report_views.SAMPLES, 1, 7))).all()
    assert (views.samples[2] == to_uint8(model.sample(report_views.SAMPLES, 2, 7))).all()
    assert views.interpolated == "samples"
    assert views.interpolations.shape == (report_views.INTERPOLATIONS, report_views.STEPS, 8, 8, 3)
    assert views.reconstructions is None and views.memorising is None and not views.missing
    assert set(views.pictures()) == {"samples-stage1", "samples-stage2", "traversals", "interpolations"}


def test_views_with_data_show_it(model):
    data = dataset(noise(20), noise(30, seed=1))
    views = compute_views(model, [record([0.5, 3.0, 0.0], [0.3, 0.1, 0.9])], data)
    x, x_hat = views.reconstructions
    assert (x == data.test[: report_views.PAIRS]).all()
    assert (x_hat == to_uint8(model.reconstruct(torch.tensor(x).permute(0, 3, 1, 2)))).all()
    assert views.interpolated == "test images"
    # The ends of the paths are reconstructions themselves.
    assert (views.interpolations[:, 0] == x_hat[: report_views.INTERPOLATIONS]).all()
    assert (views.memorising.samples[: report_views.SAMPLES] == views.samples[2]).all()
    assert views.strips().shape == (report_views.SHOWN_NEIGHBOURS, 1 + report_views.NEIGHBOURS, 8, 8, 3)
    assert set(views.pictures()) >= {"reconstructions", "nearest"}


def test_a_single_test_image_and_a_stage_that_was_not_trained(model):
    views = compute_views(model, [], dataset(noise(4), noise(1, seed=1)), stages=[1])
    assert list(views.samples) == [1]
    assert len(views.interpolations) == 1
    assert views.traversed == [] and "traversals" not in views.pictures()
    assert "No record" in views.missing[0]


def test_no_active_latent_is_said(model):
    views = compute_views(model, [record([0.0] * 3, [1.0] * 3)])
    assert views.missing == ["No latent is active, so that none is traversed."]
    assert information([record([0.0] * 3, [float("nan")] * 3)]).active.tolist() == [False] * 3
