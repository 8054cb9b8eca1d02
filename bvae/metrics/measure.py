"""Statistics of a set of images: from the cache, or measured and kept there."""

from collections.abc import Callable

import torch
import torch.distributed as dist

from bvae.metrics.cache import Cache
from bvae.metrics.extract import Extractor
from bvae.metrics.sources import ChangedImages, Images
from bvae.metrics.statistics import Statistics
from bvae.world import talking


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
    digest = images.digest()  # checks all images before the first goes through the network
    done = "+jpeg" * jpeg + "+stretch" * stretched
    device = extractor.network.device
    found = cache.get(digest, extractor.origin(done), images.n, keep, device) if rank == 0 else None
    if ranks > 1:  # on another machine the cache may be another
        found = _from_first(found, device)
    if found is not None:
        progress(images.n)
        return found
    changed = ChangedImages(images, jpeg, stretched) if done else images
    statistics = extractor.statistics(changed.batches(rank, ranks), keep, progress, done)
    if rank == 0:
        cache.put(digest, statistics)
    return statistics


def _from_first(found: Statistics | None, device: torch.device) -> Statistics | None:
    """What rank 0 has found, on every rank."""
    shared = [None if found is None else found.to(torch.device("cpu"))]
    with talking():
        dist.broadcast_object_list(shared, src=0)
    return None if shared[0] is None else shared[0].to(device)
