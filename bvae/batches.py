"""Training data that lives on the device whole, and the batches drawn from it without the host.

Both kinds give batches as (network input, target of the loss); the order of an epoch is a permutation made on the
device from the seed and the epoch's number, so that a run can go on from the middle of any epoch.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from bvae import ops
from bvae.errors import UserError
from bvae.seeds import derive

Prepare = Callable[[Tensor], tuple[Tensor, Tensor]]  # row numbers [B] int64 -> (input, target)


def to_device(images: np.ndarray, device: torch.device) -> Tensor:
    """uint8 [N,H,W,C] as one tensor on `device`. Raises UserError where it does not fit."""
    try:
        return torch.from_numpy(np.ascontiguousarray(images)).to(device)
    except torch.OutOfMemoryError:
        size = images.nbytes / 2**30
        raise UserError(f"the images ({size:.1f} GiB) do not fit in the memory of {device}: use fewer") from None


class Batches:
    """`count` samples in batches of `batch`, reshuffled every epoch; the last partial batch is dropped.

    `part` is what this process gives of every batch: all of it, or where several train together the rows that are its
    own. The order of an epoch is the same in all of them.
    """

    def __init__(self, count: int, batch: int, seed: int, device: torch.device, part: slice | None = None) -> None:
        self.count = count
        self.batch = batch
        self.seed = seed
        self.device = device
        self.steps = count // batch
        self.part = part or slice(0, batch)

    def _generator(self, *names: str | int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(derive(self.seed, *names))

    def epoch(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of `epoch` from the `first`-th on, as (input, target)."""
        order = torch.randperm(self.count, generator=self._generator("order", epoch), device=self.device)
        prepare = self._prepare(epoch)
        for i in range(first, self.steps):
            yield prepare(order[i * self.batch + self.part.start : i * self.batch + self.part.stop])

    def _prepare(self, epoch: int) -> Prepare:
        raise NotImplementedError

    def state(self) -> dict[str, Tensor]:
        """What must be kept to go on with the same batches, beside the epoch's number."""
        return {}


class ImageBatches(Batches):
    """Batches of a resident image set.

    Args:
        images: uint8 [N,H,W,C] on the device.
        dtype: of the network's input, which is [B,C,H,W] in [0,1], channels_last; the target is the same rows as
            uint8.
        hflip: mirror each image with probability 1/2, input and target alike.
    """

    def __init__(
        self,
        images: Tensor,
        batch: int,
        seed: int,
        dtype: torch.dtype,
        hflip: bool = False,
        part: slice | None = None,
    ) -> None:
        super().__init__(images.shape[0], batch, seed, images.device, part)
        self.images = images
        self.dtype = dtype
        self.hflip = hflip

    def _prepare(self, epoch: int) -> Prepare:
        flips = None
        if self.hflip:
            draw = torch.randint(2, (self.count,), generator=self._generator("flip", epoch), device=self.device)
            flips = draw.bool()

        def prepare(index: Tensor) -> tuple[Tensor, Tensor]:
            return ops.gather(self.images, index, None if flips is None else flips[index], dtype=self.dtype)

        return prepare


class LatentBatches(Batches):
    """Batches z = mu + sigma*eps of a frozen posterior, fresh noise every time; input and target are both z.

    Args:
        mu, log_sigma: the posterior [N,k] float32 on the device.
    """

    def __init__(self, mu: Tensor, log_sigma: Tensor, batch: int, seed: int, part: slice | None = None) -> None:
        super().__init__(mu.shape[0], batch, seed, mu.device, part)
        self.mu = mu
        self.log_sigma = log_sigma
        self.rng = ops.make_rng(derive(seed, "posterior noise"), mu.device)

    def _prepare(self, epoch: int) -> Prepare:
        def prepare(index: Tensor) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                mu, log_sigma = self.mu[index], self.log_sigma[index]
                z = ops.sample_kl(mu, log_sigma, self.rng, first_sample=self.part.start).z
            return z, z

        return prepare

    def state(self) -> dict[str, Tensor]:
        return {"rng": self.rng}


def chunks(images: Tensor, size: int = 500) -> Iterator[tuple[Tensor, Tensor]]:
    """All of a resident set in order as (input float32 [B,C,H,W] in [0,1] channels_last, target uint8).

    An empty set is one empty batch.
    """
    for first in range(0, max(images.shape[0], 1), size):
        last = min(first + size, images.shape[0])
        yield ops.gather(images, torch.arange(first, last, device=images.device))
