"""Images that stay in their file: found through the mapped array, read with `pread` into memory of our own.

Reading through the mapping itself would count every page as this process's, and a failing disk would kill it
(SIGBUS); here it ends in a UserError that names the file.
"""

import importlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bvae.errors import UserError


def locate(array: np.ndarray) -> tuple[str, int] | None:
    """(path, byte offset) of an array that lies in a mapped file in one piece; None for any other."""
    root: Any = array
    while isinstance(root.base, np.ndarray):
        root = root.base
    if not isinstance(root, np.memmap) or root.filename is None or not array.flags.c_contiguous:
        return None
    return str(root.filename), root.offset + array.ctypes.data - root.ctypes.data


def _whole(array: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """(a whole array, the numbers of the rows meant) of an array or of some rows of one (bvae.data.arrays.Rows)."""
    rows = getattr(array, "index", None)
    return (array, None) if rows is None else (array.base, rows)  # type: ignore[return-value]


def is_mapped(array: np.ndarray) -> bool:
    """True if MappedImages can read it."""
    return locate(_whole(array)[0]) is not None


def host_module() -> Any:
    """The module `bvae._host`. Raises UserError where the extension was not built."""
    try:
        return importlib.import_module("bvae._host")
    except ImportError as error:
        raise UserError(
            f"images can be read from their file while training only with the compiled extension ({error}): build it, "
            "or pass --stream never where they fit in memory"
        ) from error


class MappedImages:
    """uint8 images [N,H,W,C] in a file, or a run of them, read when they are asked for.

    Args:
        array: mapped, C-contiguous; or some rows of one (bvae.data.arrays.Rows).
        device: where images are needed.

    Raises UserError for an array that is not mapped, and where the file cannot be read.
    """

    def __init__(self, array: np.ndarray, device: torch.device) -> None:
        whole, rows = _whole(array)
        place = locate(whole)
        if place is None:
            raise UserError(
                "only images in a .npy file or a prepared store can be read while training; these are in memory: "
                "leave --stream at auto"
            )
        self.host = host_module()
        self.device = device
        self.shape = array.shape
        self.rows: range | np.ndarray = range(len(array)) if rows is None else rows
        """for each image, its number in the file"""
        self.path, offset = place
        try:
            self.file = self.host.RowFile(self.path, offset, int(np.prod(array.shape[1:])), len(whole))
        except self.host.ReadError as error:
            raise UserError(str(error)) from None

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, part: slice) -> "MappedImages":
        """Neighbouring images, as images[first:last]."""
        rows = self.rows[part]
        some = object.__new__(MappedImages)
        some.__dict__.update(self.__dict__, shape=(len(rows), *self.shape[1:]), rows=rows)
        return some

    def numbers(self, index: np.ndarray) -> np.ndarray:
        """The numbers in the file, int64, of images [n] of these."""
        if isinstance(self.rows, range):
            return np.asarray(index, np.int64) + np.int64(self.rows.start)
        return np.ascontiguousarray(self.rows[index], np.int64)

    def read(self) -> Tensor:
        """All of them, uint8 [N,H,W,C] on the device."""
        cuda = self.device.type == "cuda"
        images = torch.empty(self.shape, dtype=torch.uint8, pin_memory=cuda)
        try:
            self.file.read(self.numbers(np.arange(len(self))), images.data_ptr())
        except self.host.ReadError as error:
            raise UserError(str(error)) from None
        return images.to(self.device, non_blocking=True)


Images = Tensor | MappedImages
"""uint8 [N,H,W,C]: resident, or in a file"""


def resident(images: Images) -> Tensor:
    """All of them as one tensor on their device."""
    return images if isinstance(images, Tensor) else images.read()
