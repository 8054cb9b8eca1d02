"""NVIDIA DALI as the JPEG decoder. The resize stays Pillow's, so that the backends differ in nothing else.

DALI's own resize treats the edge in another way: it repeats the outermost pixel where Pillow lets the filter end. Its
decoding on the CPU gives Pillow's pixels, bit for bit, and decodes little more than the crop.
"""

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from PIL import Image

from bvae.data.decoders import jpeg
from bvae.data.decoders.interface import Decoder
from bvae.data.decoders.libraries import pillow_name_and_versions
from bvae.data.decoders.pillow import decode_image, quiet
from bvae.data.decoders.resize import resize
from bvae.data.recipe import Decoded, Item, Recipe, Rejected, collect
from bvae.errors import UserError

EXTRA = "pip install 'bvae[dali]'"
DEVICE = 0
# What is held at a time, twice: one batch is decoded while the one before it is resized.
BATCH_BYTES = 2**25  # encoded
BATCH_PIXELS = 2**24  # decoded by DALI: 48 MiB if nothing is cropped
LARGE = 2**22  # pixels of an image that Pillow decodes


def dali_installed() -> bool:
    """Whether DALI is there, by the look of it: importing it takes a while."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # no package `nvidia` at all
        return False


class DaliDecoder(Decoder):
    """DALI's JPEG decoder on the CPU or, as `mixed`, on the GPU, and Pillow's resize in threads.

    DALI is given what it and Pillow read alike: plain JPEGs (`bvae.data.decoders.jpeg.Header.plain`). The rest goes
    through `decode_image`, and so does a whole batch in which DALI fails, so that a damaged image takes no other down.
    While DALI decodes one batch, the one before it is resized.

    Raises:
        UserError: if DALI is not installed or cannot be loaded, or, for the GPU, finds none.
    """

    def __init__(self, recipe: Recipe, workers: int, device: Literal["cpu", "mixed"], why: str) -> None:
        if not dali_installed():
            raise UserError(f"DALI is not installed ({EXTRA}); --backend pillow works without it")
        try:
            self._dali = importlib.import_module("nvidia.dali")
            self._fn = importlib.import_module("nvidia.dali.fn")
            self._types = importlib.import_module("nvidia.dali.types")
        except Exception as error:  # a library it needs is missing or of another version
            raise UserError(f"DALI cannot be loaded ({' '.join(str(error).split())})") from error
        self.recipe = recipe
        self.workers = workers
        self.device = device
        self.why = why
        self.name = f"dali-{device}"
        self.versions = {"dali": self._dali.__version__} | pillow_name_and_versions()[1]
        self._pipeline: Any = None
        self._room = 0  # images a batch of the pipeline holds
        self._threads = ThreadPoolExecutor(workers)
        if device == "mixed":
            self._build(1)  # without a GPU, the user learns it now

    def run(self, chunks: Iterable[Sequence[Item]]) -> Iterator[Decoded]:
        before: _Batch | None = None
        with quiet():
            for chunk in chunks:
                for batch in cut_chunk(chunk, self.recipe):
                    crops = self._crops(before)
                    self._schedule(batch)
                    if before is not None:
                        yield from self._finish(before, crops)
                    before = batch
            if before is not None:
                yield from self._finish(before, self._crops(before))

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._pipeline = None

    def _schedule(self, batch: "_Batch") -> None:
        """Lets DALI begin with a batch."""
        if not batch.plain:
            return
        if self._pipeline is None or len(batch.plain) > self._room:
            self._build(max(len(batch.plain), self._room))
        try:
            self._pipeline.feed_input("encoded", [np.frombuffer(data, np.uint8) for _, data in batch.plain])
            self._pipeline.feed_input("start", batch.starts)
            self._pipeline.feed_input("shape", batch.shapes)
            self._pipeline.schedule_run()
            batch.scheduled = True
        except Exception:  # of whatever kind DALI raises
            self._pipeline = None

    def _crops(self, batch: "_Batch | None") -> Sequence[np.ndarray] | None:
        """What DALI made of a batch's plain images: uint8 [h, w, 3] each, or None if it failed."""
        if batch is None or not batch.scheduled or self._pipeline is None:
            return None
        try:
            (crops,) = self._pipeline.share_outputs()
            if self.device == "mixed":
                crops = crops.as_cpu()
            result = crops.as_array() if crops.is_dense_tensor() else [np.array(crop) for crop in crops]
            self._pipeline.release_outputs()
        except Exception:  # mostly a damaged image; DALI's pipeline cannot be used after that
            self._pipeline = None
            return None
        return result

    def _finish(self, batch: "_Batch", crops: Sequence[np.ndarray] | None) -> Iterator[Decoded]:
        """Resizes the crops, and decodes what DALI was not given or failed on; gives the chunk if this was its last."""
        others = batch.others if crops is not None else sorted(batch.others + batch.plain)
        parts = []
        for share in range(self.workers):
            if crops is not None:
                places = [i for i, _ in batch.plain][share :: self.workers]
                parts.append(self._threads.submit(self._resize, places, crops[share :: self.workers]))
            parts.append(self._threads.submit(self._decode, others[share :: self.workers]))
        for part in parts:
            for i, result in part.result():
                batch.results[i] = result
        if batch.last:
            yield collect([result for result in batch.results if result is not None], self.recipe)

    def _resize(self, places: list[int], crops: Sequence[np.ndarray]) -> list[tuple[int, np.ndarray | Rejected]]:
        recipe = self.recipe
        done: list[tuple[int, np.ndarray | Rejected]] = []
        for i, crop in zip(places, crops, strict=True):
            image = crop if recipe.channels == 3 else Image.fromarray(crop).convert("L")
            pixels = resize(image, recipe.shape[:2], recipe.filter, recipe.antialias)
            done.append((i, pixels.reshape(recipe.shape)))
        return done

    def _decode(self, others: list[tuple[int, bytes]]) -> list[tuple[int, np.ndarray | Rejected]]:
        done: list[tuple[int, np.ndarray | Rejected]] = []
        for i, data in others:
            try:
                done.append((i, decode_image(data, self.recipe)))
            except Rejected as error:
                done.append((i, error))
        return done

    def _build(self, room: int) -> None:
        """A pipeline for batches of up to `room` images, fed chunk by chunk."""
        pipeline = self._dali.Pipeline(
            batch_size=room,
            num_threads=self.workers,
            device_id=DEVICE if self.device == "mixed" else None,
            prefetch_queue_depth=1,
        )
        decode = self._fn.decoders.image_slice
        # What makes the GPU's decoder fill in chroma as libjpeg does; older ones have no such argument.
        fancy = "jpeg_fancy_upsampling"
        options = {fancy: True} if self.device == "mixed" and fancy in (decode.__doc__ or "") else {}
        with pipeline:
            encoded = self._fn.external_source(name="encoded", device="cpu", ndim=1, dtype=self._types.UINT8)
            start = self._fn.external_source(name="start", device="cpu", ndim=1, dtype=self._types.INT32)
            shape = self._fn.external_source(name="shape", device="cpu", ndim=1, dtype=self._types.INT32)
            crops = decode(
                encoded,
                start=start,
                shape=shape,
                axis_names="HW",
                device=self.device,
                output_type=self._types.RGB,
                adjust_orientation=False,  # none that is plain has one
                **options,
            )
            pipeline.set_outputs(crops)
        try:
            pipeline.build()
        except Exception as error:
            raise UserError(f"DALI does not work here ({' '.join(str(error).split())[:300]})") from error
        self._pipeline, self._room = pipeline, room


@dataclass
class _Batch:
    """A chunk, or some of it, on its way.

    results: of the chunk, by place, as they come.
    plain, others: (place, bytes) for DALI and for Pillow.
    starts, shapes: (top, left) and (height, width) of the crops of `plain`, int32 [2] each.
    size, pixels: of `plain` and `others`: their bytes; of `plain`: the images' pixels.
    last: whether the chunk ends here.
    """

    results: list[np.ndarray | Rejected | None]
    plain: list[tuple[int, bytes]] = field(default_factory=list)
    others: list[tuple[int, bytes]] = field(default_factory=list)
    starts: list[np.ndarray] = field(default_factory=list)
    shapes: list[np.ndarray] = field(default_factory=list)
    size: int = 0
    pixels: int = 0
    last: bool = False
    scheduled: bool = False


def cut_chunk(chunk: Sequence[Item], recipe: Recipe) -> Iterator[_Batch]:
    """Reads a chunk and sorts out who decodes what, in as many batches as BATCH_BYTES and BATCH_PIXELS ask for.

    An image of more than LARGE pixels is left to Pillow, which holds one a thread; DALI would hold all of a batch.
    """
    batch = _Batch([None] * len(chunk))
    for i, item in enumerate(chunk):
        try:
            data = item.read()
            header = jpeg.read_header(data)
            pixels = header.width * header.height if header is not None and header.plain else LARGE + 1
            if pixels <= LARGE:
                assert header is not None
                left, top, right, bottom = recipe.box(header.width, header.height)
        except Rejected as error:
            batch.results[i] = error
            continue
        decoded = pixels if pixels <= LARGE else 0
        if batch.size and (batch.size + len(data) > BATCH_BYTES or batch.pixels + decoded > BATCH_PIXELS):
            yield batch
            batch = _Batch(batch.results)
        batch.size += len(data)
        batch.pixels += decoded
        if decoded:
            batch.plain.append((i, data))
            batch.starts.append(np.array((top, left), np.int32))
            batch.shapes.append(np.array((bottom - top, right - left), np.int32))
        else:
            batch.others.append((i, data))
    batch.last = True
    yield batch
