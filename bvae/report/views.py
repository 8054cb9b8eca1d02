"""What a trained model shows of itself: samples, traversals, interpolations, its nearest training images. Arrays only.

All images here are uint8 [..., H, W, C]. Nothing needs the data but reconstructions, interpolations between real images
and the search for nearest ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bvae import ops
from bvae.data import Dataset
from bvae.metrics.copying import BLOCK_BYTES, nearest_rows, share_closer
from bvae.metrics.latent import INACTIVE
from bvae.report import figures
from bvae.seeds import derive
from bvae.two_stage import TwoStageVAE, to_uint8

SAMPLES = 64  # shown of each stage
PAIRS = 24  # reconstructions shown
INTERPOLATIONS = 6
STEPS = 9  # images from one end of an interpolation to the other
VALUES = (
    -2.5,
    -1.875,
    -1.25,
    -0.625,
    0.0,
    0.625,
    1.25,
    1.875,
    2.5,
)  # of a traversed latent; the prior's deviation is 1
MOST_TRAVERSALS = 64
NEIGHBOURS = 4
SHOWN_NEIGHBOURS = 12  # samples whose neighbours are shown
QUERIES = 256  # samples, and test images, of which distances are measured


@dataclass(frozen=True)
class Latents:
    """What each latent carries, from the last epoch of stage 1 that was logged: [k] each, most information first."""

    index: np.ndarray
    kl: np.ndarray
    """nats"""
    sigma2: np.ndarray
    """E[sigma_j^2]"""

    @property
    def active(self) -> np.ndarray:
        return self.sigma2 < INACTIVE


def information(records: Sequence[Mapping[str, Any]]) -> Latents | None:
    """The latents in the order of their KL by a run's records, or None where no record of stage 1 tells."""
    for record in reversed(records):
        if record["stage"] == 1 and "latent_kl" in record and "latent_sigma2" in record:
            kl, sigma2 = (np.asarray(record[key], np.float64) for key in ("latent_kl", "latent_sigma2"))
            if kl.ndim == 1 and kl.shape == sigma2.shape and kl.size:
                order = np.argsort(-kl, kind="stable")  # NaN last
                return Latents(order, kl[order], sigma2[order])
    return None


@dataclass(frozen=True)
class Neighbours:
    """Of Q images the nearest in a set: [Q, count] each, nearest first."""

    index: np.ndarray
    distance: np.ndarray
    """root mean squared difference of pixel values in [0,1]"""


@torch.no_grad()
def nearest(
    queries: np.ndarray,
    images: np.ndarray,
    count: int = 1,
    device: torch.device | str = "cpu",
    block: int | None = None,
) -> Neighbours:
    """The `count` images nearest to each query in pixel space.

    The set is read in blocks of `block` images (64 MiB as float32 by default), so it may be mapped from a file. The
    search uses |a|^2 - 2ab + |b|^2 in float32; the distances returned are computed anew from the found images' pixels.

    Args:
        queries: uint8 [Q,H,W,C], held in memory as float32.
        images: uint8 [N,H,W,C] with N >= count.
    """
    if queries.shape[1:] != images.shape[1:] or not 1 <= count <= len(images):
        raise ValueError(f"{count} nearest of images {list(images.shape)} to {list(queries.shape)}")

    def flat(part: np.ndarray) -> Tensor:
        # Centred, which keeps the digits that the expanded square would cancel.
        return torch.tensor(part, device=device).flatten(1).float() / 255 - 0.5

    q = flat(queries)
    block = block or max(1, BLOCK_BYTES // (4 * q.shape[1]))
    blocks = (flat(images[first : first + block]) for first in range(0, len(images), block))
    index = nearest_rows(q, blocks, count)[1]
    found = index.cpu().numpy()
    exact = np.empty(found.shape)
    for row, (query, places_of_row) in enumerate(zip(queries, found, strict=True)):
        difference = images[places_of_row].astype(np.int64) - query
        exact[row] = np.sqrt((difference**2).reshape(count, -1).mean(1)) / 255
    order = np.argsort(exact, axis=1, kind="stable")
    return Neighbours(np.take_along_axis(found, order, 1), np.take_along_axis(exact, order, 1))


@dataclass
class Memorising:
    """Whether samples copy training images, in pixel space.

    A blurry image is near to everything, so that the distance alone says little. The fair question is whether a sample
    is nearer to images that were trained on than to as many that were not: with equally many of both, chance says half.
    """

    samples: np.ndarray
    """uint8 [Q,H,W,C]"""
    neighbours: np.ndarray
    """uint8 [Q,NEIGHBOURS,H,W,C], from the whole training set"""
    found: Neighbours
    test_distance: np.ndarray
    """[T]: of test images to the nearest training image"""
    closer: float
    """share of samples nearer to `compared` training images than to `compared` test images; a tie counts half"""
    deviation: float
    """standard deviation of `closer` where train and test images are exchangeable: see share_closer"""
    compared: int


def memorising(samples: np.ndarray, data: Dataset, seed: int = 0, device: torch.device | str = "cpu") -> Memorising:
    """Nearest training images of `samples` [Q,H,W,C], and how near samples and test images come to the training set.

    Samples are compared with as many training as test images: see bvae.metrics.copying.share_closer.
    """
    count = min(NEIGHBOURS, len(data.train))
    found = nearest(samples, data.train, count, device)
    test_distance = nearest(data.test[:QUERIES], data.train, 1, device).distance[:, 0]
    compared = min(len(data.train), len(data.test))
    rng = np.random.default_rng(derive(seed, "memorising"))
    train, test = (
        nearest(samples, images[np.sort(rng.permutation(len(images))[:compared])], 1, device)
        for images in (data.train, data.test)
    )
    share = share_closer(
        train.distance[:, 0], train.index[:, 0], test.distance[:, 0], test.index[:, 0], compared, compared
    )
    return Memorising(samples, data.train[found.index], found, test_distance, share.closer, share.deviation, compared)


def traversals(
    model: TwoStageVAE, base: Tensor, latents: Sequence[int], values: Sequence[float] = VALUES
) -> np.ndarray:
    """`base` [k] decoded with one latent at a time set to each of `values`: uint8 [len(latents),len(values),H,W,C]."""
    z = base.repeat(len(latents), len(values), 1)
    for row, latent in enumerate(latents):
        z[row, :, latent] = torch.tensor(values, device=z.device)
    images = to_uint8(model.decode(z.flatten(0, 1)))
    return images.reshape(len(latents), len(values), *images.shape[1:])


def interpolate(first: Tensor, last: Tensor, steps: int = STEPS) -> Tensor:
    """Latents [n,k] to latents [n,k] in equal steps on straight lines, both ends included: [n,steps,k]."""
    t = torch.linspace(0, 1, steps, device=first.device)[None, :, None]
    return first[:, None] * (1 - t) + last[:, None] * t


def interpolate_on_sphere(first: Tensor, last: Tensor, steps: int = STEPS) -> Tensor:
    """As `interpolate`, along great circles with the length going evenly from one end's to the other's.

    For noise: a straight line between draws of N(0,I) passes through lengths that N(0,I) all but never has.
    """
    t = torch.linspace(0, 1, steps, device=first.device)[None, :, None]
    a, b = first[:, None], last[:, None]
    norm_a, norm_b = a.norm(dim=-1, keepdim=True), b.norm(dim=-1, keepdim=True)
    angle = torch.acos((a * b).sum(-1, keepdim=True).div(norm_a * norm_b).clamp(-1 + 1e-6, 1 - 1e-6))
    direction = (((1 - t) * angle).sin() * a / norm_a + (t * angle).sin() * b / norm_b) / angle.sin()
    return direction * ((1 - t) * norm_a + t * norm_b)


@dataclass
class Views:
    """Everything a model shows of itself. What could not be made is absent, with a sentence in `missing`."""

    samples: dict[int, np.ndarray]
    """by stage: uint8 [SAMPLES,H,W,C]; the same seed gives all runs with as many latents the same noise"""
    latents: Latents | None
    traversed: list[int]
    """latents that were traversed, most information first"""
    traversals: np.ndarray
    """uint8 [len(traversed),len(VALUES),H,W,C]"""
    interpolations: np.ndarray
    """uint8 [INTERPOLATIONS,STEPS,H,W,C]"""
    interpolated: str
    """what lies at their ends: "samples" or "test images" """
    reconstructions: tuple[np.ndarray, np.ndarray] | None = None
    """test images and their reconstructions from mu, uint8 [n,H,W,C] each"""
    memorising: Memorising | None = None
    missing: list[str] = field(default_factory=list)

    def pictures(self) -> dict[str, np.ndarray]:
        """Each view as one picture, uint8 [h,w,3], by name."""
        found = {f"samples-stage{stage}": figures.image_grid(images, 8) for stage, images in self.samples.items()}
        if self.traversed:
            found["traversals"] = figures.image_grid(_flat(self.traversals), len(VALUES))
        found["interpolations"] = figures.image_grid(_flat(self.interpolations), STEPS)
        if self.reconstructions is not None:
            found["reconstructions"] = figures.reconstruction_grid(*self.reconstructions)
        if self.memorising is not None:
            strips = self.strips()
            found["nearest"] = figures.image_grid(_flat(strips), strips.shape[1])
        return found

    def strips(self) -> np.ndarray:
        """Samples, each followed by its nearest training images: uint8 [n,1 + NEIGHBOURS,H,W,C]."""
        assert self.memorising is not None
        m = self.memorising
        return np.concatenate([m.samples[:SHOWN_NEIGHBOURS, None], m.neighbours[:SHOWN_NEIGHBOURS]], 1)


def _flat(images: np.ndarray) -> np.ndarray:
    return images.reshape(-1, *images.shape[2:])


def compute_views(
    model: TwoStageVAE,
    records: Sequence[Mapping[str, Any]],
    data: Dataset | None = None,
    stages: Sequence[int] | None = None,
    seed: int = 0,
) -> Views:
    """All views of a model.

    Args:
        records: of the run's metrics.jsonl; they say which latents are active and what each carries.
        data: what it was trained on, if at hand.
        stages: those that have been trained; by default all that the model has.
    """
    stages = stages or ((1, 2) if model.stage2 is not None else (1,))
    last = max(stages)
    drawn = {stage: to_uint8(model.sample(QUERIES if stage == last else SAMPLES, stage, seed)) for stage in stages}
    latents, missing = information(records), []
    traversed: list[int] = []
    if model.stage1.deterministic:
        missing.append("The codes are deterministic: there is no KL by which to choose latents for traversals.")
        latents = None
    elif latents is None or len(latents.index) != model.config.latents:
        missing.append("No record of the first stage says what each latent carries, so that none is traversed.")
        latents = None
    else:
        traversed = latents.index[latents.active][:MOST_TRAVERSALS].tolist()
        if not traversed:
            missing.append("No latent is active, so that none is traversed.")
    base = model.sample_latents(1, last, seed)[0]
    views = Views(
        samples={stage: images[:SAMPLES] for stage, images in drawn.items()},
        latents=latents,
        traversed=traversed,
        traversals=traversals(model, base, traversed) if traversed else np.empty(0, np.uint8),
        interpolations=np.empty(0, np.uint8),
        interpolated="samples",
        missing=missing,
    )
    k = model.config.latents
    if data is None and last == 1 and model.stage1.prior is not None:
        z = model.sample_latents(2 * INTERPOLATIONS, 1, seed)
        path = interpolate(z[::2], z[1::2]).flatten(0, 1)
    elif data is None:
        u = ops.philox_normal(ops.make_rng(derive(seed, "interpolate"), model.device), 2 * INTERPOLATIONS, k)
        path = model.latents_from(interpolate_on_sphere(u[::2], u[1::2]).flatten(0, 1), last)
    else:
        images = torch.tensor(data.test[: max(PAIRS, 2 * INTERPOLATIONS)]).permute(0, 3, 1, 2)
        mu = model.encode(images)[0]
        views.reconstructions = data.test[:PAIRS], to_uint8(model.decode(mu[:PAIRS]))
        ends = mu[: 2 * INTERPOLATIONS] if len(mu) > 1 else mu.repeat(2, 1)
        first, second = ends[: len(ends) // 2], ends[len(ends) // 2 : len(ends) // 2 * 2]
        path = interpolate(first, second).flatten(0, 1)
        views.interpolated = "test images"
        views.memorising = memorising(drawn[last], data, seed, model.device)
    decoded = to_uint8(model.decode(path))
    views.interpolations = decoded.reshape(-1, STEPS, *decoded.shape[1:])
    return views
