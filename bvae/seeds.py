"""Seeds for the separate streams of randomness in a run, all derived from its one seed."""

import hashlib


def derive(seed: int, *names: str | int) -> int:
    """A seed in [0, 2^63) for the stream called `names`: unrelated to that of any other name or seed."""
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
