"""A matter of 16 bytes that decides how fast Pillow decodes a JPEG.

Where the buffer for a row of pixels happens to be 32-byte aligned, libjpeg-turbo's AVX2 colour conversion writes it
past the cache (`vmovntdq` in jdcolext-avx2.asm): right for a picture that is looked at later, and wrong for Pillow,
which copies each row out at once and waits for memory. A decode then takes about 1.6 times as long. The buffer comes
from malloc, is aligned in one case of two, and in a loop over images it is mostly the same case every time.
"""

BLOCKS = 64  # of which half are given back; glibc's per-thread cache hides seven of them
MAX_WIDTHS = 16  # a set with more kinds of widths than this is left to chance
MAX_BYTES = 8192  # of a row: what is kept stays below 32 * 16 * 8 KiB = 4 MiB

_kept: dict[int, list[bytes]] = {}


def discourage_aligned_rows(width: int) -> None:
    """Makes malloc hand out row buffers of colour images of this width where they are not 32-byte aligned.

    It holds on to the aligned ones of a number of blocks of that size, and gives the others back: each then lies
    between blocks in use, is never merged with a neighbour, and is what fits best when Pillow asks. Elsewhere than
    under glibc this does no good and no harm.
    """
    row_bytes = 4 * width  # Pillow has libjpeg write RGBX
    if width in _kept or len(_kept) == MAX_WIDTHS or row_bytes > MAX_BYTES:
        return
    blocks = [bytes(max(row_bytes - b"".__sizeof__(), 0)) for _ in range(BLOCKS)]
    _kept[width] = [block for block in blocks if id(block) % 32 == 0]  # CPython: the address that malloc gave
