"""The weights of the FID Inception: where they are looked for, and the check that they are the right ones."""

import functools
import hashlib
import os
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bvae.data.archive import content_of
from bvae.errors import UserError
from bvae.metrics.inception import Inception

URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
FILE_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
# Digest of the tensors that FID uses, in any file: with or without the 1008-way head and the batch counters.
CONTENT_SHA256 = "f52412653ee45bed604b0f4fa0d3942ce5f50784fece9766dfa6cbecddbe4555"
NAMES = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")  # pytorch-fid's, and
# torch-fidelity's, which is the same file
VARIABLE = "BVAE_INCEPTION"
DOWNLOAD = "download"
HELP = f"pytorch-fid's {NAMES[0]}: give its path (--inception, ${VARIABLE}), or --inception {DOWNLOAD}"

LAYER = ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
HEAD = ("fc.weight", "fc.bias")


class Checkpoint(NamedTuple):
    """Weights that were checked."""

    tensors: dict[str, Tensor]
    digest: str
    """sha256:... over the tensors in use; equal for every file that holds them"""


def find_weights(given: str | Path | None = None) -> Path | None:
    """The file of the weights: `given`, $BVAE_INCEPTION or torch's hub cache; None where there is none of these.

    `given` may be "download": then pytorch-fid's file is fetched into torch's hub cache, once, and its SHA-256 checked.
    Raises UserError where a file that was named is not there, and for a download that fails.
    """
    given = given or os.environ.get(VARIABLE) or None
    cache = Path(torch.hub.get_dir(), "checkpoints")
    if str(cache).startswith("~"):  # a user without a home
        cache = Path(os.devnull)
    if given is not None and str(given) != DOWNLOAD:
        path = Path(given)
        if not path.is_file():
            raise UserError(f"{path}: no such file; the Inception weights are {HELP}")
        return path
    for name in NAMES:
        if (cache / name).is_file():
            return cache / name
    return _download(cache / NAMES[0]) if given is not None else None


def _download(path: Path) -> Path:
    if path.is_relative_to(os.devnull):
        raise UserError(f"this user has no home folder to download to: set $TORCH_HOME; the weights are {HELP}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(URL, str(path), hash_prefix=FILE_SHA256)
    except (OSError, RuntimeError, ValueError) as error:  # no network, a full disk, another file than expected
        reason = getattr(error, "reason", None) or error
        raise UserError(
            f"cannot download {URL}: {reason}; fetch it elsewhere and give its path (--inception, ${VARIABLE})"
        ) from error
    return path


def load_weights(path: Path) -> Checkpoint:
    """Reads and checks the weights, without running anything a pickle may hold.

    Raises UserError for what is not a state dict, for one in which a layer is missing or of another shape, and for
    weights that are not those of 2015-12-05 (torchvision's have the same names).
    """
    if (is_here := content_of(path)) and "zip" not in is_here:  # torch's own format is a zip
        raise UserError(f"{path}: not the Inception weights: it is {is_here}; needed: {HELP}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of archives of other kinds; real problems raise an error
            stored = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = "its pickle holds more than tensors, and was not run"
        raise UserError(f"{path}: not the Inception weights ({reason}); needed: {HELP}") from error
    except Exception as error:  # torch.load raises nearly anything on damaged files
        reason = (str(error) or type(error).__name__).splitlines()[0][:100]
        raise UserError(f"{path}: not the Inception weights ({reason}); needed: {HELP}") from error
    if not isinstance(stored, dict) or not all(isinstance(key, str) for key in stored):
        raise UserError(f"{path}: not the Inception weights (no dictionary of tensors); needed: {HELP}")

    tensors = {}
    for name, shape in layer_shapes().items():
        tensor = stored.pop(name, None)
        if not isinstance(tensor, Tensor):
            raise UserError(f"{path}: not the Inception weights: {name} is missing; needed: {HELP}")
        if tuple(tensor.shape) != shape:
            raise UserError(
                f"{path}: not the Inception weights: {name} is {list(tensor.shape)}, not {list(shape)}; needed: {HELP}"
            )
        tensors[name] = tensor.float().contiguous()
    for name in stored:
        if name not in HEAD and not name.endswith(".num_batches_tracked"):
            raise UserError(f"{path}: not the FID Inception: it also holds {name}; needed: {HELP}")
    digest = content_digest(tensors)
    if digest != CONTENT_SHA256 and _file_digest(path) != FILE_SHA256:
        raise UserError(f"{path}: an Inception-v3, but with other weights than FID's of 2015-12-05; needed: {HELP}")
    return Checkpoint(tensors, f"sha256:{digest}")


def load_inception(path: Path, device: torch.device, precision: str = "fp32") -> tuple[Inception, str]:
    """(the network in eval mode on `device`, its weights' digest); precision fp32 or bf16."""
    checkpoint = load_weights(path)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    return Inception(checkpoint.tensors).to(device, dtype).eval(), checkpoint.digest


def content_digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, shapes and values of float32 tensors on the CPU, in the order of their names."""
    h = hashlib.sha256()
    for name in sorted(tensors):
        h.update(f"{name} {tuple(tensors[name].shape)}\n".encode())
        h.update(tensors[name].numpy().data)
    return h.hexdigest()


def _file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.cache
def layer_shapes() -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that the network uses, in the network's order."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, *kernel in _layers():
        shapes[f"{name}.conv.weight"] = tuple(kernel)
        shapes |= {f"{name}.{leaf}": (kernel[0],) for leaf in LAYER[1:]}
    return shapes


def _layers() -> Iterator[tuple[str, int, int, int, int]]:
    """(layer, channels out, channels in, kernel height, kernel width)."""
    yield "Conv2d_1a_3x3", 32, 3, 3, 3
    yield "Conv2d_2a_3x3", 32, 32, 3, 3
    yield "Conv2d_2b_3x3", 64, 32, 3, 3
    yield "Conv2d_3b_1x1", 80, 64, 1, 1
    yield "Conv2d_4a_3x3", 192, 80, 3, 3
    for block, width, pooled in (("Mixed_5b", 192, 32), ("Mixed_5c", 256, 64), ("Mixed_5d", 288, 64)):
        yield f"{block}.branch1x1", 64, width, 1, 1
        yield f"{block}.branch5x5_1", 48, width, 1, 1
        yield f"{block}.branch5x5_2", 64, 48, 5, 5
        yield f"{block}.branch3x3dbl_1", 64, width, 1, 1
        yield f"{block}.branch3x3dbl_2", 96, 64, 3, 3
        yield f"{block}.branch3x3dbl_3", 96, 96, 3, 3
        yield f"{block}.branch_pool", pooled, width, 1, 1
    yield "Mixed_6a.branch3x3", 384, 288, 3, 3
    yield "Mixed_6a.branch3x3dbl_1", 64, 288, 1, 1
    yield "Mixed_6a.branch3x3dbl_2", 96, 64, 3, 3
    yield "Mixed_6a.branch3x3dbl_3", 96, 96, 3, 3
    for block, inner in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
        yield f"{block}.branch1x1", 192, 768, 1, 1
        yield f"{block}.branch7x7_1", inner, 768, 1, 1
        yield f"{block}.branch7x7_2", inner, inner, 1, 7
        yield f"{block}.branch7x7_3", 192, inner, 7, 1
        yield f"{block}.branch7x7dbl_1", inner, 768, 1, 1
        yield f"{block}.branch7x7dbl_2", inner, inner, 7, 1
        yield f"{block}.branch7x7dbl_3", inner, inner, 1, 7
        yield f"{block}.branch7x7dbl_4", inner, inner, 7, 1
        yield f"{block}.branch7x7dbl_5", 192, inner, 1, 7
        yield f"{block}.branch_pool", 192, 768, 1, 1
    yield "Mixed_7a.branch3x3_1", 192, 768, 1, 1
    yield "Mixed_7a.branch3x3_2", 320, 192, 3, 3
    yield "Mixed_7a.branch7x7x3_1", 192, 768, 1, 1
    yield "Mixed_7a.branch7x7x3_2", 192, 192, 1, 7
    yield "Mixed_7a.branch7x7x3_3", 192, 192, 7, 1
    yield "Mixed_7a.branch7x7x3_4", 192, 192, 3, 3
    for block, width in (("Mixed_7b", 1280), ("Mixed_7c", 2048)):
        yield f"{block}.branch1x1", 320, width, 1, 1
        yield f"{block}.branch3x3_1", 384, width, 1, 1
        yield f"{block}.branch3x3_2a", 384, 384, 1, 3
        yield f"{block}.branch3x3_2b", 384, 384, 3, 1
        yield f"{block}.branch3x3dbl_1", 448, width, 1, 1
        yield f"{block}.branch3x3dbl_2", 384, 448, 3, 3
        yield f"{block}.branch3x3dbl_3a", 384, 384, 1, 3
        yield f"{block}.branch3x3dbl_3b", 384, 384, 3, 1
        yield f"{block}.branch_pool", 192, width, 1, 1
