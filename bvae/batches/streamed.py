"""Training data that does not fit on the device: the same batches as from resident images, read while training.

Threads of `bvae._host` read the rows of the batches to come into a ring of buffers. On CUDA the ring is pinned, copies
run on a stream of their own into a ring on the device, and the host waits only for the disk. Memory is bounded by the
rings, whatever the size of the set, but for the order of an epoch: 8 bytes an image.
"""

import os
from collections import deque
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from bvae import ops
from bvae.batches.mapped import Images, MappedImages, is_mapped
from bvae.batches.resident import ImageBatches, to_device
from bvae.errors import UserError
from bvae.machine import free_memory

Mode = Literal["auto", "always", "never"]

SHARE = 0.6  # share of the free memory that images may take; training needs the rest
RING = 8  # batches read ahead
RING_BYTES = 256 * 2**20  # fewer where they are large
DEVICE_RING = 3  # batches on the device: one being copied in, one waiting, one being read


def stays_in_file(source: str, stream: Mode, device: torch.device) -> bool:
    """True if loading leaves the images at a path, a .npy file or a folder of them, where they are."""
    if stream != "auto":
        return stream == "always"
    path = Path(source)
    try:
        files = [path] if path.suffix.lower() == ".npy" else list(path.glob("*.npy"))
        return max((file.stat().st_size for file in files), default=0) > SHARE * free_memory(device)
    except OSError:
        return False  # loading it will say what is wrong


def place(images: np.ndarray, device: torch.device, stream: Mode) -> Images:
    """uint8 [N,H,W,C] on `device`, or left in their file: `auto` leaves mapped images that would take too much memory.

    Raises UserError where they fit nowhere, cannot be read, or must be streamed but are not mapped.
    """
    too_large = is_mapped(images) and images.nbytes > SHARE * free_memory(device)
    if stream == "always" or (stream == "auto" and too_large):
        return MappedImages(images, device)
    return to_device(images, device)


class StreamedImageBatches(ImageBatches):
    """ImageBatches of images that stay in their file: the same batches, bit for bit.

    Args:
        images: see MappedImages; batches are made on its device.
        threads: that read, by default one on a CPU, whose cores are needed, and four for a GPU.
    """

    resident = False

    def __init__(
        self,
        images: MappedImages,
        batch: int,
        seed: int,
        dtype: torch.dtype,
        hflip: bool = False,
        part: slice | None = None,
        threads: int | None = None,
    ) -> None:
        cuda = images.device.type == "cuda"
        own = len(range(batch)[part]) if part else batch
        shape = (own, *images.shape[1:])
        staged = torch.empty(shape, dtype=torch.uint8, device=images.device)
        super().__init__(staged, batch, seed, dtype, hflip, part, count=len(images))
        self.source = images
        self.threads = threads or (min(4, os.cpu_count() or 1) if cuda else 1)
        depth = max(2, min(RING, RING_BYTES // max(1, staged.nbytes)))
        self.ring = torch.empty(depth, *shape, dtype=torch.uint8, pin_memory=cuda)
        self.places = torch.arange(own, device=images.device)
        self._stream: Any = None
        self._copies = _Copies(self.ring, images.device) if cuda else None
        self._given = False

    def begin(self, epoch: int, first: int = 0) -> None:
        self.close()
        super().begin(epoch, first)
        # Once an epoch the order goes to the host.
        order = self.source.numbers(self.order[first:].flatten().cpu().numpy())
        slots = [slot.data_ptr() for slot in self.ring]
        host = self.source.host
        try:
            self._stream = host.RowStream(self.source.file, order, len(self.places), slots, self.threads)
        except host.ReadError as error:
            raise UserError(str(error)) from None

    def fetch(self) -> None:
        """Waits for the next batch's images, which `draw` then reads."""
        try:
            if self._copies is not None:
                self._copies.next(self._stream, self.images)
                return
            if self._given:
                self._stream.release()
            self.images = self.ring[self._stream.next()]
            self._given = True
        except self.source.host.ReadError as error:
            raise UserError(str(error)) from None

    def draw(self) -> tuple[Tensor, Tensor]:
        numbers = self._next_rows()
        flips = None if self.flips is None else self.flips.index_select(0, numbers)
        return ops.gather(self.images, self.places, flips, dtype=self.dtype)

    def close(self) -> None:
        """Ends the threads; `begin` starts them again."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        self._given = False
        if self._copies is not None:
            self._copies.drain()

    def __del__(self) -> None:
        if hasattr(self, "_given"):  # else __init__ has failed
            self.close()


def image_batches(
    images: Images, batch: int, seed: int, dtype: torch.dtype, hflip: bool = False, part: slice | None = None
) -> ImageBatches:
    """Batches of resident images or of those in a file; the same ones either way."""
    if isinstance(images, MappedImages):
        return StreamedImageBatches(images, batch, seed, dtype, hflip, part)
    return ImageBatches(images, batch, seed, dtype, hflip, part)


class _Copies:
    """Copies of a pinned ring's batches to the device, ahead of the steps that read them."""

    def __init__(self, ring: Tensor, device: torch.device) -> None:
        self.pinned = ring
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.buffers = torch.empty(DEVICE_RING, *ring.shape[1:], dtype=torch.uint8, device=device)
        self.stream.wait_stream(torch.cuda.current_stream(device))  # whoever had this memory before
        self.read = [torch.cuda.Event() for _ in range(DEVICE_RING)]  # a buffer's last reader is through
        self.ahead: deque[tuple[int, torch.cuda.Event]] = deque()  # buffers with batches, oldest first
        self.in_flight: deque[torch.cuda.Event] = deque()  # copies that read the pinned ring, oldest first
        self.count = 0

    def next(self, stream: Any, to: Tensor) -> None:
        """The next batch to `to`, in the order of the current CUDA stream; starts the copies of those after it."""
        if not self.ahead:
            self._copy(stream, wait=True)
        buffer, copied = self.ahead.popleft()
        current = torch.cuda.current_stream(self.device)
        current.wait_event(copied)
        to.copy_(self.buffers[buffer])
        self.read[buffer].record(current)
        while len(self.ahead) < DEVICE_RING - 1 and self._copy(stream, wait=False):
            pass

    def _copy(self, stream: Any, wait: bool) -> bool:
        """Starts the copy of one batch. False where it is not read yet and `wait` is false, or where there is none."""
        while self.in_flight and (len(self.in_flight) == len(self.pinned) or self.in_flight[0].query()):
            self.in_flight.popleft().synchronize()
            stream.release()
        try:
            slot = stream.next(wait)
        except StopIteration:
            if wait:
                raise
            return False
        if slot is None:
            return False
        buffer = self.count % DEVICE_RING
        self.count += 1
        copied = torch.cuda.Event()
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(self.read[buffer])
            self.buffers[buffer].copy_(self.pinned[slot], non_blocking=True)
            copied.record(self.stream)
        self.ahead.append((buffer, copied))
        self.in_flight.append(copied)
        return True

    def drain(self) -> None:
        """Forgets what is under way, once nothing reads the pinned ring or writes the buffers any more."""
        for copied in self.in_flight:
            copied.synchronize()
        self.in_flight.clear()
        self.ahead.clear()
