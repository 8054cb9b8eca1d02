"""`decode_image`, which defines what every backend must give, and Pillow in worker processes."""

import contextlib
import importlib
import io
import json
import multiprocessing.connection
import os
import signal
import socket
import subprocess
import sys
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, cast

import numpy as np
from PIL import ExifTags, Image, ImageFile, TiffImagePlugin, UnidentifiedImageError

from bvae.data import kinds
from bvae.data.decoders import jpeg
from bvae.data.decoders.interface import Decoder
from bvae.data.decoders.libraries import pillow_name_and_versions
from bvae.data.decoders.resize import resize
from bvae.data.recipe import Decoded, Item, Recipe, Rejected, collect
from bvae.errors import UserError
from bvae.files import hold_standard_descriptors


def _formats(wanted: dict[str, str]) -> tuple[str, ...]:
    """Those of these formats that this Pillow knows; their plugins are loaded."""
    for plugin in wanted.values():
        with contextlib.suppress(ImportError):
            importlib.import_module(f"PIL.{plugin}ImagePlugin")
    return tuple(format for format in wanted if format in Image.OPEN)


# Whatever its suffix, a file of another format is refused: some of Pillow's decoders start other programs.
FORMATS = _formats(
    {
        **{"PNG": "Png", "JPEG": "Jpeg", "WEBP": "WebP", "BMP": "Bmp", "PPM": "Ppm", "TIFF": "Tiff", "GIF": "Gif"},
        **{"AVIF": "Avif", "JPEG2000": "Jpeg2K", "QOI": "Qoi", "DIB": "Bmp", "SGI": "Sgi", "PCX": "Pcx", "TGA": "Tga"},
    }
)
MAX_PIXELS = 2**26  # most pixels of one file, 8192 x 8192: a small file can claim far more and fill the memory
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # the turn that makes an image upright, by its EXIF orientation
CHUNKS_PER_WORKER = 3  # drawn and not yet taken: one at work, one waiting, one done
ANSWER_BYTES = 2**20  # on their way from a worker; the system's 208 KiB have the two wait for each other

WORKER_ENVIRONMENT = {
    # One thread each: the workers themselves fill the cores.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    # glibc keeps what an image took for the next one, instead of giving it back to the system in between.
    "MALLOC_TOP_PAD_": str(2**24),
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
    "MALLOC_TRIM_THRESHOLD_": str(2**26),
}


def decode_image(data: bytes, recipe: Recipe) -> np.ndarray:
    """One encoded image -> uint8 [height, width, channels].

    In this order: the first frame; EXIF orientation; the crop; RGB or, for one channel, L (transparency is dropped);
    the resize (`bvae.data.decoders.resize`). The rows of a plain JPEG below the crop are not decoded, so damage there
    goes unseen; none of the pixels change.

    Raises:
        Rejected: if it is not of one of FORMATS, cannot be decoded to its end, is deeper than 8 bits a channel, has
            more than MAX_PIXELS pixels or is smaller than the crop.
    """
    if not data:
        raise Rejected("is empty")
    with _rejecting(data):
        header = jpeg.read_header(data)
        if header is not None and header.plain:
            _check_size(header.width, header.height)
            if (decoded := jpeg.decode_plain(data, header, recipe)) is not None:
                return decoded
        image = _decode_crop(data, header, recipe)
        mode = "RGB" if recipe.channels == 3 else "L"
        if image.mode != mode:
            image = image.convert(mode)
        pixels = resize(image, recipe.shape[:2], recipe.filter, recipe.antialias)
    return pixels.reshape(recipe.shape)


def inspect_image(data: bytes) -> tuple[int, int, str]:
    """(height, width, mode) of an encoded image, upright, by what it says before its pixels.

    Raises:
        Rejected: as `decode_image` does, as far as that can be told without decoding.
    """
    if not data:
        raise Rejected("is empty")
    header = jpeg.read_header(data)
    if header is not None and header.plain:
        _check_size(header.width, header.height)
        return header.height, header.width, "L" if len(header.sampling) == 1 else "RGB"
    with _rejecting(data), Image.open(io.BytesIO(data), formats=FORMATS) as image:
        _check_size(*image.size)
        _check_depth(image, data)
        width, height = image.size
        if image.getexif().get(ExifTags.Base.Orientation, 1) >= 5:
            width, height = height, width
        return height, width, image.mode


@contextlib.contextmanager
def _rejecting(data: bytes) -> Iterator[None]:
    """Turns what Pillow raises on a damaged or foreign file into Rejected. Its plugins raise nearly anything."""
    try:
        yield
    except Rejected:
        raise
    except UnidentifiedImageError:
        found = kinds.image_format(data[: kinds.HEAD])
        is_here = found[0] if found else kinds.content(data[: kinds.HEAD])
        hint = f"; it is {is_here}" if is_here else ""
        raise Rejected(f"is not an image in a format accepted ({', '.join(FORMATS)}){hint}") from None
    except Image.DecompressionBombError:  # Pillow's own limit, which it looks at first, is wider
        raise Rejected(f"has more than the {MAX_PIXELS} pixels accepted") from None
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Rejected(f"cannot be decoded ({reason[:120]})") from error


def decode_items(items: Sequence[Item], recipe: Recipe) -> Decoded:
    """A chunk, one item after the other."""
    results: list[np.ndarray | Rejected] = []
    with quiet():
        for item in items:
            try:
                results.append(decode_image(item.read(), recipe))
            except Rejected as error:
                results.append(error)
    return collect(results, recipe)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences Pillow's warnings, on odd metadata and large images: what matters is raised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class PillowDecoder(Decoder):
    """`decode_image` in worker processes; with one worker, in this process.

    Workers are started when there is work for them. They are fresh interpreters that import Pillow and NumPy, not
    forks: the parent may hold torch's threads and a GPU; and not `multiprocessing`'s spawn, which imports the parent's
    main module, and torch with it, in every worker.
    """

    def __init__(self, recipe: Recipe, workers: int, why: str) -> None:
        self.recipe = recipe
        self.workers = workers
        self.why = why
        self.name, self.versions = pillow_name_and_versions()
        self._pool: list[_Worker] = []

    def run(self, chunks: Iterable[Sequence[Item]]) -> Iterator[Decoded]:
        if self.workers == 1:
            for chunk in chunks:
                yield decode_items(chunk, self.recipe)
            return
        try:
            yield from self._run(chunks)
        except BaseException:  # among them GeneratorExit: answers are on the way that nobody will wait for
            self.close()
            raise

    def _run(self, chunks: Iterable[Sequence[Item]]) -> Iterator[Decoded]:
        source = enumerate(chunks)
        done: dict[int, Decoded] = {}
        drawn = taken = 0
        exhausted = False
        while not exhausted or taken < drawn:
            while not exhausted and drawn - taken < CHUNKS_PER_WORKER * self.workers:
                if (pair := next(source, None)) is None:
                    exhausted = True
                    break
                self._least_busy().send(*pair)
                drawn += 1
            if taken in done:
                yield done.pop(taken)
                taken += 1
            elif taken < drawn:
                busy = {worker.connection: worker for worker in self._pool if worker.pending}
                for connection in multiprocessing.connection.wait(list(busy)):
                    index, decoded = busy[connection].receive()  # type: ignore[index]
                    done[index] = decoded

    def _least_busy(self) -> "_Worker":
        worker = min(self._pool, key=lambda worker: len(worker.pending), default=None)
        if worker is None or (worker.pending and len(self._pool) < self.workers):
            worker = _Worker.start(self.recipe)
            self._pool.append(worker)
        return worker

    def close(self) -> None:
        pool, self._pool = self._pool, []
        for worker in pool:
            worker.process.kill()
            worker.connection.close()
        for worker in pool:
            worker.process.wait()


@dataclass
class _Worker:
    """The parent's end of one worker process. pending: (number, items) of the chunks it was sent, oldest first."""

    process: subprocess.Popen
    connection: Connection
    pending: deque[tuple[int, Sequence[Item]]] = field(default_factory=deque)

    @classmethod
    def start(cls, recipe: Recipe) -> "_Worker":
        hold_standard_descriptors()  # the worker's connection must be none of them
        ours, theirs = multiprocessing.Pipe()
        code = (
            "import json, sys; sys.path[:] = json.loads(sys.argv[2]); "
            "from bvae.data.decoders.worker import main; main(int(sys.argv[1]))"
        )
        with socket.socket(fileno=os.dup(theirs.fileno())) as answers:
            answers.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, ANSWER_BYTES)
        with theirs:
            try:
                process = subprocess.Popen(
                    [sys.executable, "-c", code, str(theirs.fileno()), json.dumps(sys.path)],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    env=os.environ | WORKER_ENVIRONMENT,
                    process_group=0,  # Ctrl-C is the parent's; it ends its workers
                )
            except OSError as error:
                ours.close()
                raise UserError(f"cannot start a decoding worker: {error.strerror or error}") from error
        worker = cls(process, ours)
        with worker._alive():
            ours.send(recipe)
        return worker

    def send(self, index: int, items: Sequence[Item]) -> None:
        self.pending.append((index, items))
        with self._alive():
            self.connection.send(items)

    def receive(self) -> tuple[int, Decoded]:
        with self._alive():
            answer: Any = self.connection.recv()
            if isinstance(answer, Exception):
                raise answer
            shape, kept, rejected = answer
            pixels = np.empty(shape, np.uint8)
            if pixels.size:
                self.connection.recv_bytes_into(pixels.data.cast("B"))
        index, _ = self.pending.popleft()
        return index, Decoded(pixels, kept, rejected)

    @contextlib.contextmanager
    def _alive(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, ConnectionError) as error:
            code = self.process.wait()
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            hint = "; if memory ran out, use fewer workers" if code == -signal.SIGKILL else ""
            items = self.pending[0][1] if self.pending else ()
            where = f" on one of {len(items)} images from {items[0].name!r} to {items[-1].name!r}" if items else ""
            raise UserError(f"a decoding worker {how}{where}{hint}") from error


def _decode_crop(data: bytes, header: jpeg.Header | None, recipe: Recipe) -> Image.Image:
    """The crop, upright, in the file's own mode. No other pixels are alive after it, and only the crop is turned."""
    if header is not None and header.plain:
        box = recipe.box(header.width, header.height)
        with Image.open(io.BytesIO(jpeg.keep_rows(data, header, box[3])), formats=FORMATS) as image:
            return image.crop(box)
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        _check_size(*image.size)
        _check_depth(image, data)
        image.load()  # which turns a TIFF, and only then tells an image's EXIF data for certain
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        turn = TURNS.get(orientation)
        width, height = image.size
        swapped = turn is not None and orientation >= 5
        left, top, right, bottom = recipe.box(height, width) if swapped else recipe.box(width, height)
        if swapped:
            left, top, right, bottom = top, left, bottom, right
        if orientation in (2, 3, 7, 8):
            left, right = width - right, width - left
        if orientation in (3, 4, 6, 7):
            top, bottom = height - bottom, height - top
        box = left, top, right, bottom
        cropped: Image.Image = image if box == (0, 0, width, height) else image.crop(box)
    return cropped if turn is None else cropped.transpose(turn)


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise Rejected(f"is {width}x{height}, more than the {MAX_PIXELS} pixels accepted")


def _check_depth(image: Image.Image, data: bytes) -> None:
    """Rejects more than 8 bits a channel: Pillow clips some to 8 and cuts others down, both without a word."""
    deep = image.mode[0] in "IF"
    if image.format == "SGI":
        deep |= data[3] > 1  # bytes a channel
    if image.format == "JPEG2000":  # the sizes of its components follow the codestream's marker
        start = data.find(b"\xff\x4f\xff\x51")
        components = int.from_bytes(data[start + 40 : start + 42])
        deep |= start < 0 or any((size & 0x7F) + 1 > 8 for size in data[start + 42 : start + 42 + 3 * components : 3])
    if image.format == "AVIF":
        start = data.find(b"av1C", 0, 2**16)
        deep |= start < 0 or bool(data[start + 6] & 0x40)  # high_bitdepth
    if image.format in ("PNG", "PPM", "TIFF"):  # the mode that Pillow is about to read, before it makes 8 bits of it
        for tile in cast(ImageFile.ImageFile, image).tile:
            rawmode, *rest = (tile.args,) if isinstance(tile.args, str) else tile.args or ("",)
            deep |= ";16" in rawmode or (tile.codec_name.startswith("ppm") and bool(rest) and rest[0] > 255)
    if image.format == "TIFF":  # whose separate planes are read as if they were of 8 bits
        deep |= max(cast(TiffImagePlugin.TiffImageFile, image).tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (1,))) > 8
    if deep:
        raise Rejected("is deeper than 8 bits a channel; convert it to 8")
