"""Training data that lives on the device whole, and the batches drawn from it without the host.

Both kinds give batches as (network input, target of the loss); the order of an epoch is a permutation made on the
device from the seed and the epoch's number, so that a run can go on from the middle of any epoch. The order, and the
place in it, are tensors that stay where they are: drawing a batch is the same device operations every time, which a
CUDA graph can hold.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from bvae import ops
from bvae.batches.mapped import Images, resident
from bvae.errors import UserError
from bvae.seeds import derive


def to_device(images: np.ndarray, device: torch.device) -> Tensor:
    """uint8 [N,H,W,C] as one tensor on `device`. Raises UserError where it does not fit."""
    try:
        if isinstance(images, np.ndarray) and images.flags.writeable:
            return torch.from_numpy(np.ascontiguousarray(images)).to(device)
        resident = torch.empty(images.shape, dtype=torch.uint8, device=device)
        for first in range(0, len(images), 4096):  # mapped: not all of it twice in memory
            resident[first : first + 4096] = torch.from_numpy(np.array(images[first : first + 4096]))
        return resident
    except torch.OutOfMemoryError:
        size = images.nbytes / 2**30
        raise UserError(f"the images ({size:.1f} GiB) do not fit in the memory of {device}: use fewer") from None


class Batches:
    """`count` samples in batches of `batch`, reshuffled every epoch; the last partial batch is dropped.

    Call `begin` at an epoch's start, then `fetch` and `draw` for every batch; `epoch` does all three.

    `part` is what this process gives of every batch: all of it, or where several train together the rows that are its
    own. The order of an epoch is the same in all of them.
    """

    resident = True
    """true if `fetch` does nothing: several batches can then be drawn within one CUDA graph"""

    def __init__(self, count: int, batch: int, seed: int, device: torch.device, part: slice | None = None) -> None:
        self.count = count
        self.batch = batch
        self.seed = seed
        self.device = device
        self.steps = count // batch
        self.part = part or slice(0, batch)
        own = len(range(batch)[self.part])
        self.order = torch.zeros(self.steps, own, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)

    def _generator(self, *names: str | int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(derive(self.seed, *names))

    def begin(self, epoch: int, first: int = 0) -> None:
        """Shuffles for `epoch` and stands before its `first`-th batch."""
        order = torch.randperm(self.count, generator=self._generator("order", epoch), device=self.device)
        self.order.copy_(order[: self.steps * self.batch].view(self.steps, self.batch)[:, self.part])
        self.position.fill_(first)

    def fetch(self) -> None:
        """Does the work of the host that the next batch needs before it can be drawn."""

    def draw(self) -> tuple[Tensor, Tensor]:
        """The next batch, as (input, target). Call it no more often than the epoch has batches left."""
        raise NotImplementedError

    def _next_rows(self) -> Tensor:
        """This process's part of the next batch: row numbers [B] int64."""
        rows = self.order.index_select(0, self.position).view(-1)
        self.position += 1
        return rows

    def epoch(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of `epoch` from the `first`-th on, as (input, target). One such iterator at a time."""
        self.begin(epoch, first)
        for _ in range(first, self.steps):
            self.fetch()
            yield self.draw()

    def state(self) -> dict[str, Tensor]:
        """State needed to go on with the same batches, beside the epoch's number and the place in it."""
        return {}


class ImageBatches(Batches):
    """Batches of a resident image set.

    Args:
        images: uint8 [N,H,W,C] on the device.
        dtype: of the network's input, which is [B,C,H,W] in [0,1], channels_last; the target is the same rows as
            uint8.
        hflip: mirror each image with probability 1/2, input and target alike.
        count: how many there are, where `images` does not hold them all.
    """

    def __init__(
        self,
        images: Tensor,
        batch: int,
        seed: int,
        dtype: torch.dtype,
        hflip: bool = False,
        part: slice | None = None,
        count: int | None = None,
    ) -> None:
        super().__init__(images.shape[0] if count is None else count, batch, seed, images.device, part)
        self.images = images
        self.dtype = dtype
        self.flips = torch.zeros(self.count, dtype=torch.bool, device=self.device) if hflip else None

    def begin(self, epoch: int, first: int = 0) -> None:
        super().begin(epoch, first)
        if self.flips is not None:
            draw = torch.randint(2, (self.count,), generator=self._generator("flip", epoch), device=self.device)
            self.flips.copy_(draw)

    def draw(self) -> tuple[Tensor, Tensor]:
        rows = self._next_rows()
        flips = None if self.flips is None else self.flips.index_select(0, rows)
        return ops.gather(self.images, rows, flips, dtype=self.dtype)


class LatentBatches(Batches):
    """Batches z = mu + sigma*eps of a frozen posterior, fresh noise every time; input and target are both z.

    Args:
        mu, log_sigma: the posterior [N,k] float32 on the device; log_sigma None stands for sigma = 0.
    """

    def __init__(self, mu: Tensor, log_sigma: Tensor | None, batch: int, seed: int, part: slice | None = None) -> None:
        super().__init__(mu.shape[0], batch, seed, mu.device, part)
        self.mu = mu
        self.log_sigma = log_sigma
        self.rng = ops.make_rng(derive(seed, "posterior noise"), mu.device)

    @torch.no_grad()
    def draw(self) -> tuple[Tensor, Tensor]:
        rows = self._next_rows()
        z = self.mu.index_select(0, rows)
        if self.log_sigma is not None:
            log_sigma = self.log_sigma.index_select(0, rows)
            z = ops.sample_kl(z, log_sigma, self.rng, first_sample=self.part.start).z
        return z, z

    def state(self) -> dict[str, Tensor]:
        return {"rng": self.rng}


def chunks(images: Images, size: int = 500) -> Iterator[tuple[Tensor, Tensor]]:
    """All images in order as (input float32 [B,C,H,W] in [0,1] channels_last, target uint8).

    An empty set is one empty batch.
    """
    for first in range(0, max(len(images), 1), size):
        rows = resident(images[first : first + size])
        yield ops.gather(rows, torch.arange(len(rows), device=rows.device))
