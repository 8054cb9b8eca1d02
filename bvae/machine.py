"""The machine a run is on: its device, and what is written down of it."""

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import bvae
from bvae.errors import UserError


def pick_device(name: str) -> torch.device:
    """auto, cpu or cuda as a device. Raises UserError where there is no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this torch sees no CUDA device (python -m bvae.info tells more)")
    return torch.device(name)


@contextmanager
def training_kernels(device: torch.device, amp: bool) -> Iterator[None]:
    """The fastest kernels CUDA has for training, as long as it is open; all else computes with what was set before.

    cuDNN tries its algorithms on each shape, of which training has few. Where training is in fp32 (not `amp`), TF32
    takes its matrix products, as torch lets it take convolutions; nowhere if torch.backends.cudnn.allow_tf32 is off.
    Under `amp` only what has to be exact is in fp32. Nothing changes where deterministic algorithms are asked for.
    """
    if device.type != "cuda" or torch.are_deterministic_algorithms_enabled():
        yield
        return
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    benchmark, tf32 = cudnn.benchmark, products.allow_tf32
    try:
        cudnn.benchmark = True
        if not amp and cudnn.allow_tf32:
            products.allow_tf32 = True
        yield
    finally:
        cudnn.benchmark, products.allow_tf32 = benchmark, tf32


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


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def has_bf16(device: torch.device) -> bool:
    """Whether bf16 arithmetic runs on units of its own there. Where it does not it is far slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & _cpu_flags())


def has_amx() -> bool:
    """Whether the CPU multiplies bf16 by tiles."""
    return "amx_bf16" in _cpu_flags()


def _cpu_flags() -> set[str]:
    return set((_cpu_line("flags") or _cpu_line("Features") or "").split())


def free_memory(device: torch.device) -> int:
    """Bytes that could be allocated now: the GPU's, or what the system and this process's control group leave."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
        # A container's limit, where there is one. The cache it holds of files could be given up.
        group = Path("/sys/fs/cgroup", Path("/proc/self/cgroup").read_text().strip().rpartition("::/")[2])
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        cached = next(
            int(line.split()[1])
            for line in (group / "memory.stat").read_text().splitlines()
            if line.startswith("inactive_file ")
        )
        free = min(free, limit - used + cached)
    except (OSError, ValueError, StopIteration):
        pass  # no such files, or no limit ("max")
    return max(free, 0)


def prepare_process() -> None:
    """Settings of this whole process that training on a CPU gains from. Before the first parallel operation, so that
    torch's threads inherit them.
    """
    # Adam's moments of units that have died decay into denormal numbers, which halve the speed of a CPU.
    torch.set_flush_denormal(True)
    # glibc gives large tensors back to the system, which hands them out again page by page, zeroed: 12,000 faults a
    # step of CIFAR-10. It keeps them if told that blocks up to the most it accepts are no reason to.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**25)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def set_threads(n: int) -> None:
    """Lets torch's operations take n threads on the CPU. Raises UserError for fewer than 1 or more than processors."""
    processors = len(os.sched_getaffinity(0))
    if not 1 <= n <= processors:
        raise UserError(f"--threads {n}: must be from 1 to {processors}, the processors this process may use")
    torch.set_num_threads(n)


def versions() -> dict[str, str]:
    return {
        "bvae": bvae.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
