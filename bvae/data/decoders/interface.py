"""The interface of every decoder."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Self

from bvae.data.recipe import Decoded, Item


class Decoder(ABC):
    """Turns encoded images into arrays by one recipe; a context manager, which ends what it has started.

    name: "pillow", "pillow-simd", "dali-cpu" or "dali-mixed": what defines the pixels, together with `versions`.
    versions: of the libraries that decode and resize, by name.
    why: one line for the user: why this one, and what would be faster.
    """

    name: str
    versions: dict[str, str]
    why: str

    @abstractmethod
    def run(self, chunks: Iterable[Sequence[Item]]) -> Iterator[Decoded]:
        """The result of each chunk, in the order of the chunks, for any number of workers.

        A bounded number of chunks is drawn ahead of what has been taken. Chunks of 32 to 256 items work well.

        Raises:
            UserError: if a worker process dies, naming the chunk it died on; and whatever an item's `read` raises
                other than Rejected.
        """

    @abstractmethod
    def close(self) -> None:
        """Ends worker processes and threads; running work is dropped."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
