"""The other end of `bvae.data.decoders.pillow`: a process that decodes chunks until its parent hangs up."""

import queue
import sys
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection

from bvae.data.decoders.pillow import decode_items
from bvae.data.recipe import Decoded, Item, Recipe


def main(descriptor: int) -> None:
    """Answers each chunk received on the connection with its `Decoded`, or with the exception it raised.

    Chunks are drawn in by a thread of their own. Otherwise a parent that sends and a worker that answers could both
    wait for the other to read.
    """
    connection = Connection(descriptor)
    chunks: queue.SimpleQueue[Sequence[Item] | Exception | None] = queue.SimpleQueue()
    recipe: Recipe = connection.recv()
    threading.Thread(target=_draw, args=(connection, chunks), daemon=True).start()
    while (chunk := chunks.get()) is not None:
        answer: Decoded | Exception
        try:
            if isinstance(chunk, Exception):
                raise chunk
            answer = decode_items(chunk, recipe)
        except Exception as error:
            answer = error
        try:
            connection.send(answer)
        except ConnectionError:  # the parent is gone, or wants no more
            break
    sys.exit()


def _draw(connection: Connection, chunks: "queue.SimpleQueue[Sequence[Item] | Exception | None]") -> None:
    while True:
        try:
            chunks.put(connection.recv())
        except (EOFError, ConnectionError):
            chunks.put(None)
            return
        except Exception as error:  # an item that cannot be unpickled here
            chunks.put(error)
