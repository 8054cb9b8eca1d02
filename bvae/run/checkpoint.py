"""Checkpoints: one safetensors file, tensors beside their description as JSON, written whole or not at all.

The description and a SHA-256 over everything stand in the file's metadata, so that a file that was cut short, edited
or comes from elsewhere is told by name before anything in it is used. Nothing is ever unpickled.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from bvae.errors import UserError
from bvae.files import encode_json, exists, write_atomically

FORMAT = 1
LAST = "checkpoints/last.safetensors"  # in a run's folder
BEST = "checkpoints/best.safetensors"


def digest(tensors: Mapping[str, Tensor], description: str = "") -> str:
    """SHA-256 over the names, types, shapes and values of tensors on the CPU, and a description."""
    h = hashlib.sha256(description.encode())
    for name in sorted(tensors):
        t = tensors[name]
        h.update(f"{name} {t.dtype} {tuple(t.shape)}\n".encode())
        h.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return h.hexdigest()


def encode_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file of tensors on the CPU. Equal tensors and metadata give equal bytes.

    The library itself writes the header's metadata in an order that changes from call to call.
    """
    data = save(dict(tensors), dict(metadata))
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header = {"__metadata__": dict(sorted(header.pop("__metadata__", {}).items())), **header}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    return b"".join((len(text).to_bytes(8, "little"), text, memoryview(data)[end:]))


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Writes `tensors` and the JSON-able `description` to `path`.

    Raises UserError where the folder or the disk does not allow it; the file that was there is then still whole.
    """
    host = {name: t.detach().to("cpu", copy=False).contiguous() for name, t in tensors.items()}
    text = encode_json(description)
    metadata = {"bvae": text, "bvae_format": str(FORMAT), "bvae_sha256": digest(host, text)}
    write_atomically(path, encode_tensors(host, metadata))


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads what save_checkpoint wrote: (tensors on `device`, description).

    Raises UserError naming `path` where it is missing, truncated, not one of ours, of another format or altered.
    """
    tensors, metadata = read_tensors(path)
    if "bvae_format" not in metadata:
        raise UserError(f"{path}: a safetensors file, but not a checkpoint of bvae")
    if metadata["bvae_format"] != str(FORMAT):
        raise UserError(
            f"{path}: checkpoint format {metadata['bvae_format']}, this version of bvae reads format {FORMAT}"
        )
    text = metadata.get("bvae", "")
    if metadata.get("bvae_sha256") != digest(tensors, text):
        raise UserError(f"{path}: its content does not match its SHA-256: damaged or edited by hand")
    return {name: t.to(device) for name, t in tensors.items()}, json.loads(text)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A safetensors file's tensors, on the CPU, and its metadata. Raises UserError naming `path` if it is not one."""
    if not exists(path):
        raise UserError(f"{path}: there is no such file")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (no dict)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:  # RuntimeError: replaced while being read
        raise UserError(f"{path}: truncated or not a safetensors file ({error})") from error


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries whose name starts with `prefix` and a dot, without them."""
    return {name[len(prefix) + 1 :]: t for name, t in tensors.items() if name.startswith(prefix + ".")}


def prefixed(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The reverse of `under`."""
    return {f"{prefix}.{name}": t for name, t in tensors.items()}
