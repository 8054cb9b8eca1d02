"""From encoded images to arrays: Pillow in worker processes, or DALI, behind one interface."""

import os
from typing import Literal

from bvae.data.decoders.interface import Decoder
from bvae.data.decoders.pillow import PillowDecoder
from bvae.data.recipe import Recipe
from bvae.errors import UserError

__all__ = ["Decoder", "open_decoder"]

Backend = Literal["auto", "dali", "pillow"]


def open_decoder(backend: Backend, recipe: Recipe, workers: int | None = None, device: str | None = None) -> Decoder:
    """The decoder to use, as a context manager.

    Args:
        backend: "auto" takes the fastest that works here.
        workers: processes or threads; None for as many as this process may use cores. One works in this process.
        device: "cuda" lets DALI decode on the GPU.

    Raises:
        UserError: if the backend is not installed or does not work here.
    """
    if workers is not None and workers < 1:
        raise UserError(f"the number of workers must be positive, got {workers}")
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if backend == "dali":
        raise UserError("DALI is not supported yet: use --backend pillow")
    return PillowDecoder(recipe, workers, "Pillow")
