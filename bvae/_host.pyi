"""The streaming loader's threads, and the build information of bvae's extension (csrc/host.cpp)."""

from collections.abc import Sequence

import numpy as np

class ReadError(OSError):
    """The file cannot be read; the text is one line that names it."""

class RowFile:
    """Rows of `row_bytes` bytes that lie one behind the other in a file from byte `offset` on, which stays open.

    Raises ReadError where it cannot be opened or is shorter than `rows` rows.
    """

    def __init__(self, path: str, offset: int, row_bytes: int, rows: int) -> None: ...
    def read(self, index: np.ndarray, to: int) -> None:
        """Rows `index` (int64 [n]) to the address `to`, one behind the other. Raises ReadError, IndexError."""
    def check_unchanged(self) -> None:
        """Raises ReadError where the file's size or time of change is not what it was when it was opened."""

class RowStream:
    """Batches of rows in the order `order` (int64 [batches * batch]), read ahead into the buffers `slots` (addresses of
    batch * row_bytes bytes) by threads. Raises ReadError where the file was changed or the system gives no threads,
    IndexError for a row it lacks."""

    def __init__(self, file: RowFile, order: np.ndarray, batch: int, slots: Sequence[int], threads: int) -> None: ...
    def next(self, wait: bool = True) -> int | None:
        """The place in `slots` of the next batch; None where it is not there yet and `wait` is false.

        Raises StopIteration after the last one and ReadError where it cannot be read.
        """
    def release(self) -> None:
        """Lets the oldest place that next() gave and that was not released be filled anew."""
    def close(self) -> None:
        """Ends the threads; next() raises StopIteration then. Several threads may call it."""

def build_info() -> dict[str, str]: ...
