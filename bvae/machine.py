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


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def versions() -> dict[str, str]:
    return {
        "bvae": importlib.metadata.version("bvae"),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
