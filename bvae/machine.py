"""The machine a run is on: its device, and what is written down of it."""

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

from bvae.errors import UserError


def pick_device(name: str) -> torch.device:
    """auto, cpu or cuda as a device. Raises UserError where there is no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this torch sees no CUDA device (python -m bvae.info tells more)")
    return torch.device(name)


def describe_device(device: torch.device) -> str:
    """Its model's name, and for a CPU the threads torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()}, {torch.get_num_threads()} threads of {os.cpu_count()}"


def _cpu_line(name: str) -> str | None:
    """What Linux says of the processor under `name`."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.split("\t")[0].strip() == name), None)


def _cpu_name() -> str:
    return _cpu_line("model name") or platform.machine()


def has_bf16(device: torch.device) -> bool:
    """Whether bf16 arithmetic runs on units of its own there: where it does not, --amp is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    flags = (_cpu_line("flags") or _cpu_line("Features") or "").split()
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags))


def versions() -> dict[str, str]:
    return {
        "bvae": importlib.metadata.version("bvae"),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
