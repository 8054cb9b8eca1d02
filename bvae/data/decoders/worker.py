"""The other end of `bvae.data.decoders.pillow`: a process that decodes chunks until its parent hangs up."""

import os
import queue
import sys
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection

from bvae.data.decoders.pillow import decode_items
from bvae.data.recipe import Item, Recipe
from bvae.files import hold_standard_descriptors


def main(descriptor: int) -> None:
    """Answers each chunk received on the connection with its `Decoded`, or with the exception it raised.

    A `Decoded` goes as (shape of the pixels, kept, rejected) and, unless there are none, the pixels' bytes after it:
    pickling them would copy them twice more.

    Chunks are drawn in by a thread of their own. Otherwise a parent that sends and a worker that answers could both
    wait for the other to read.
    """
    _silence_libraries()
    connection = Connection(descriptor)
    chunks: queue.SimpleQueue[Sequence[Item] | Exception | None] = queue.SimpleQueue()
    try:
        recipe: Recipe = connection.recv()
    except (EOFError, ConnectionError):
        return
    threading.Thread(target=_draw, args=(connection, chunks), daemon=True).start()
    while (chunk := chunks.get()) is not None:
        try:
            _answer(connection, chunk, recipe)
        except ConnectionError:  # the parent is gone, or wants no more
            return


def _silence_libraries() -> None:
    """Lets descriptor 2 go nowhere: libtiff writes there what it thinks of a damaged file. Python's stderr stays."""
    hold_standard_descriptors()
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)


def _answer(connection: Connection, chunk: Sequence[Item] | Exception, recipe: Recipe) -> None:
    try:
        if isinstance(chunk, Exception):
            raise chunk
        decoded = decode_items(chunk, recipe)
    except Exception as error:
        try:
            connection.send(error)
        except ConnectionError:
            raise
        except Exception:  # not everything raised can be pickled
            connection.send(RuntimeError(f"{type(error).__name__}: {error}"))
        return
    connection.send((decoded.pixels.shape, decoded.kept, decoded.rejected))
    if decoded.pixels.size:
        connection.send_bytes(decoded.pixels.data.cast("B"))


def _draw(connection: Connection, chunks: "queue.SimpleQueue[Sequence[Item] | Exception | None]") -> None:
    while True:
        try:
            chunks.put(connection.recv())
        except (EOFError, ConnectionError):
            chunks.put(None)
            return
        except Exception as error:  # an item that cannot be unpickled here
            chunks.put(error)
