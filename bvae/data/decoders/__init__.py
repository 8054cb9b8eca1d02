"""From encoded images to arrays: Pillow in worker processes, or DALI, behind one interface."""

import os
from typing import Literal

from bvae.data.decoders.dali import EXTRA, DaliDecoder, dali_installed
from bvae.data.decoders.interface import Decoder
from bvae.data.decoders.libraries import jpeg_version, pillow_name_and_versions
from bvae.data.decoders.pillow import PillowDecoder
from bvae.data.recipe import Recipe
from bvae.errors import UserError

__all__ = ["Backend", "Decoder", "open_decoder"]

Backend = Literal["auto", "dali", "pillow"]

BUILD = "bvae built again with a C++ compiler and libjpeg-turbo's header (Debian: libjpeg-dev)"


def open_decoder(
    backend: Backend, recipe: Recipe, workers: int | None = None, device: Literal["cpu", "cuda"] | None = None
) -> Decoder:
    """The decoder to use, as a context manager.

    Args:
        backend: "auto" takes the fastest on the CPU by the figures of docs/backends.md: Pillow, whose workers leave
            JPEGs to libjpeg-turbo, where bvae was built with that; then DALI where it is installed and loads; then
            Pillow alone. Their pixels are the same, as far as a file is not damaged.
        workers: processes or threads; None for as many as there are cores for this process. Pillow with one worker
            works in this process.
        device: where `dali` decodes; None for the GPU if there is one. The others decode on the CPU, and say so.

    Raises:
        UserError: if the backend is not installed or does not work here.
    """
    if backend not in ("auto", "dali", "pillow"):
        raise UserError(f"the backend is one of auto, dali, pillow, not {backend}")
    if workers is not None and workers < 1:
        raise UserError(f"the number of workers must be positive, got {workers}")
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if backend == "dali":
        on_gpu = device == "cuda" or (device is None and os.path.exists("/dev/nvidiactl"))
        return DaliDecoder(recipe, workers, "mixed" if on_gpu else "cpu", "DALI, as asked")

    pillow, versions = pillow_name_and_versions()
    notes = ["--device cuda is for --backend dali"] if device == "cuda" else []
    if jpeg_version() is None:
        notes.append(f"{BUILD} would be faster")
        if not dali_installed():
            notes.append(f"DALI would be faster: {EXTRA}")
        elif backend == "auto":
            try:
                return DaliDecoder(recipe, workers, "cpu", "; ".join(["DALI on the CPU, the fastest here", *notes]))
            except UserError as error:
                notes.append(str(error))
    what = f"{pillow} {versions[pillow]}" + (f" and libjpeg-turbo {jpeg_version()}" if jpeg_version() else "")
    why = f"{what}, " + ("as asked" if backend == "pillow" else "the fastest here")
    return PillowDecoder(recipe, workers, "; ".join([why, *notes]))
