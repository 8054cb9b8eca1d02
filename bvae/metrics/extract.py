"""Statistics from images: the protocol, the network and the moments, batch by batch on the network's device."""

import itertools
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from bvae.errors import UserError
from bvae.metrics.inception import FEATURES, Inception
from bvae.metrics.moments import Moments
from bvae.metrics.protocols import Protocol
from bvae.metrics.statistics import Origin, Statistics
from bvae.world import talking

PREPARED_BYTES = 2**28


class Extractor:
    """Features of images under one protocol.

    Args:
        network: on its device, in its precision.
        weights: digest of its weights.
        batch: images through the network at a time; by default what suits its device.
    """

    def __init__(self, network: Inception, weights: str, protocol: Protocol, batch: int | None = None) -> None:
        self.network = network
        self.protocol = protocol
        self.batch = batch or (256 if network.device.type == "cuda" else 50)
        self.weights = weights

    def origin(self, done: str = "") -> Origin:
        """Origin of its features; `done` names the changes made to the images before: "", "+jpeg", "+stretch"."""
        precision = {torch.float32: "fp32", torch.bfloat16: "bf16"}[self.network.dtype]
        return Origin(self.protocol.name + done, self.weights, precision)

    @torch.inference_mode()
    def features(self, images: Tensor) -> Tensor:
        """Images uint8 [B,H,W,C] or float [B,C,H,W] in [0,1], C 1 or 3 -> [B,2048] float32. Grey becomes colour."""
        try:
            parts = []
            few = max(1, PREPARED_BYTES // max(1, 4 * images[0].numel()))  # resized at a time, in float32
            for part in images.split(self.batch):
                prepared = [self._prepare(some) for some in part.split(few)]
                parts.append(self.network(prepared[0] if len(prepared) == 1 else torch.cat(prepared)))
            return torch.cat(parts)
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(error):
                raise
            raise UserError(
                f"not enough memory for {self.batch} images of 299x299 at a time on {self.network.device}: "
                "lower --batch-size, or use --precision bf16"
            ) from None

    def _prepare(self, images: Tensor) -> Tensor:
        images = images.to(self.network.device)
        grey_or_colour = (-1, -1, -1, 3) if images.dtype == torch.uint8 else (-1, 3, -1, -1)
        return self.protocol.prepare(images.expand(*grey_or_colour))

    @torch.inference_mode()
    def statistics(
        self,
        images: Iterable[Tensor],
        keep: bool = False,
        progress: Callable[[int], None] = lambda n: None,
        done: str = "",
    ) -> Statistics:
        """Statistics of batches of images (see `features`), of any sizes.

        Args:
            keep: keep the features too. They are kept anyway where there are fewer than dimensions.
            progress: called with the number of images after each batch.

        In a distributed job the ranks take turns: with N ranks, rank r passes batches r, r+N, r+2N, ... (see
        bvae.metrics.sources). All ranks get the statistics of the whole set.
        """
        moments = Moments(FEATURES, self.network.device)
        kept: list[Tensor] | None = []
        for batch in images:
            features = self.features(batch)
            moments.add(features)
            if kept is not None:
                kept.append(features)
                if not keep and moments.n >= FEATURES:
                    kept = None
            progress(len(batch))
        if dist.is_available() and dist.is_initialized():
            with talking():
                moments.all_reduce()
                kept = _gathered(kept)
        whole = torch.cat(kept).to(self.network.device) if kept else None
        if moments.n < 2:
            raise UserError(f"{moments.n} image(s): a covariance needs at least 2")
        return Statistics(moments.mean(), moments.covariance(), moments.n, self.origin(done), whole)


def _gathered(mine: list[Tensor] | None) -> list[Tensor] | None:
    """The batches of all ranks, which took turns, in the order that one rank would have had them in."""
    ranks: list[list[Tensor] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, None if mine is None else [batch.cpu() for batch in mine])
    there = [batches for batches in ranks if batches is not None]
    if len(there) < len(ranks):
        return None
    return [batch for turn in itertools.zip_longest(*there) for batch in turn if batch is not None]
