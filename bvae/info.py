"""python -m bvae.info: the build and the machine, and whether the extension is in use."""

import argparse
import importlib
import importlib.metadata
import platform

import torch

from bvae import _extension
from bvae.data.decoders.libraries import jpeg_version
from bvae.errors import run_command

PACKAGES = ("bvae", "torch", "numpy", "pillow", "matplotlib", "safetensors", "tensorboard", "tyro", "rich")


def build_info() -> dict[str, str]:
    """What the extension was built with: torch, cuda (empty: none), compiler, flags. Empty if not built."""
    try:
        host = importlib.import_module("bvae._host")
    except ImportError:
        return {}
    return {key: value for key, value in host.build_info().items() if isinstance(value, str)}


def cpu_features() -> list[str]:
    """The instruction sets that decide how fast bf16 training runs on this CPU."""
    probes = {
        "avx2": "_is_avx2_supported",
        "avx512": "_is_avx512_supported",
        "avx512_bf16": "_is_avx512_bf16_supported",
        "amx": "_is_amx_tile_supported",
    }
    found = []
    for name, probe in probes.items():
        check = getattr(torch.cpu, probe, None)  # private, and not in every torch
        if check is not None and check():
            found.append(name)
    return found


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def report() -> list[tuple[str, str]]:
    """The lines that `main` prints, as (name, value)."""
    error = _extension.load()
    lines = [("python", f"{platform.python_version()} on {platform.platform()}")]
    lines += [(package, _version(package)) for package in PACKAGES]
    built = build_info()
    lines.append(("extension", "loaded" if error is None else f"not in use: {error}"))
    if built:
        lines += [
            ("built with torch", built["torch"]),
            ("built with CUDA", built["cuda"] or "no (CPU only)"),
            ("architectures", built["architectures"].replace(";", ", ") or "none"),
            ("compiler", built["compiler"]),
            ("flags", built["flags"]),
        ]
    if error is None:
        lines.append(("CPU loops", importlib.import_module("bvae._C").cpu_capability()))
    lines.append(("JPEG files", f"libjpeg-turbo {jpeg}" if (jpeg := jpeg_version()) else "Pillow"))
    lines.append(
        ("CPU", f"{', '.join(cpu_features()) or 'no vector extensions known'}; {torch.get_num_threads()} threads")
    )
    lines.append(("torch's CUDA", torch.version.cuda or "none (CPU build)"))
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            lines.append((f"device cuda:{i}", f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB"))
    else:
        lines.append(("CUDA devices", "none"))
    return lines


def main(argv: list[str] | None = None) -> None:
    argparse.ArgumentParser(prog="python -m bvae.info", description=__doc__).parse_args(argv)
    lines = report()
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name:<{width}}  {value}")


if __name__ == "__main__":
    run_command(main)
