"""Statistics of a set of images: from the cache, or measured and kept there."""

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist

from bvae.metrics.cache import Cache
from bvae.metrics.extract import Extractor
from bvae.metrics.sources import ArrayImages, ChangedImages, Images
from bvae.metrics.statistics import Statistics, check_enough, fid
from bvae.world import talking


def look_up(
    images: Images,
    extractor: Extractor,
    cache: Cache,
    *,
    jpeg: bool = False,
    stretched: bool = False,
    keep: bool = False,
    rank: int = 0,
    ranks: int = 1,
) -> Statistics | None:
    """Statistics of all `images` from the cache. Where there are none, every image is decoded, so that a damaged one is
    refused before any goes through the network. The arguments are those of `measure`.
    """
    digest = images.digest()
    device = extractor.network.device
    found = cache.get(digest, extractor.origin(_done(jpeg, stretched)), images.n, keep, device) if rank == 0 else None
    if ranks > 1:  # on another machine the cache may be another
        found = _from_first(found, device)
    if found is None:
        images.check(rank, ranks)
    return found


def measure(
    images: Images,
    extractor: Extractor,
    cache: Cache,
    *,
    jpeg: bool = False,
    stretched: bool = False,
    keep: bool = False,
    progress: Callable[[int], None] = lambda n: None,
    rank: int = 0,
    ranks: int = 1,
) -> Statistics:
    """Statistics of all `images`.

    Args:
        jpeg, stretched: what to do to each image before the protocol (see bvae.metrics.sources.ChangedImages).
        keep: keep the features, for KID, precision and recall.
        progress: called with a number of images as they are done.
        rank, ranks: this process's place in a distributed job, whose ranks share the work and get the same result.
    """
    found = look_up(images, extractor, cache, jpeg=jpeg, stretched=stretched, keep=keep, rank=rank, ranks=ranks)
    if found is not None:
        progress(images.n)
        return found
    done = _done(jpeg, stretched)
    changed = ChangedImages(images, jpeg, stretched) if done else images
    statistics = extractor.statistics(changed.batches(rank, ranks), keep, progress, done)
    if rank == 0:
        cache.put(images.digest(), statistics)
    return statistics


def real_floor(
    train: np.ndarray, test: np.ndarray, extractor: Extractor, num: int | None = None, allow_few: bool = False
) -> dict[str, float | int | str | None]:
    """FID of real training images against real test images: below it no model of them can be expected.

    Args:
        train, test: uint8 [N,H,W,C] or floats in [0,1]; test is the reference.
        num: use at most the first `num` images of each set; FIDs compare only where the counts are equal.
        allow_few: fewer than 2,048 images too, which the label then says.

    Returns:
        "fid", "n" (of train), "n_reference" (of test), "protocol", "precision", "weights" and "label".
    """
    sides = [ArrayImages(array[:num], name, grey=True) for array, name in ((test, "test"), (train, "train"))]
    labels = [check_enough(side.n, side.name, allow_few) for side in sides]
    reference, others = (measure(side, extractor, Cache(None)) for side in sides)
    origin = reference.origin
    return {
        "fid": fid(reference, others),
        "n": others.n,
        "n_reference": reference.n,
        "protocol": origin.protocol,
        "precision": origin.precision,
        "weights": origin.weights,
        "label": labels[0] or labels[1],
    }


def _done(jpeg: bool, stretched: bool) -> str:
    return "+jpeg" * jpeg + "+stretch" * stretched


def _from_first(found: Statistics | None, device: torch.device) -> Statistics | None:
    """The statistics that rank 0 has found, on every rank."""
    shared = [None if found is None else found.to(torch.device("cpu"))]
    with talking():
        dist.broadcast_object_list(shared, src=0)
    return None if shared[0] is None else shared[0].to(device)
