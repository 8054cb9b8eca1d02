#!/usr/bin/env python3
"""Runs tests with the CUDA kernels emulated on the CPU: the same csrc/*.cu, compiled by the C++ compiler.

    python benchmarks/emulate_cuda.py [--multiprocessors N] [--order forward|reverse|SEED] [--build FOLDER] [PYTEST ...]

Arguments other than these options go to pytest; without any, the tests of the ops run. In the extension that it builds,
CPU tensors go to the kernels instead of the CPU loops. An access outside of a tensor or of a block's shared memory, a
misaligned vector, a barrier or shuffle that a thread of the block or warp does not reach end the process with a report
of where. docs/ops.md says what this shows and what only a GPU can.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from setup import CSRC, CXX_FLAGS, find_compiler  # noqa: E402  the flags of the build itself

EMULATION = ROOT / "tests" / "cuda_emulation"
TESTS = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("tests/test_ops*.py"))]
# Without those that start a Python of their own, and the one of an error that on CUDA ends the process.
CHOICE = "not instruction_sets and not without_the_extension and not refuses_an_index"

FLAGS = [*(flag for flag in CXX_FLAGS if flag[:2] not in ("-O", "-g")), "-std=c++20", "-fPIC", "-g1"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
KERNEL_FLAGS = [*FLAGS, "-O1", "-Wno-unknown-pragmas", *SANITIZERS]
PRELOAD = ("libasan.so", "libubsan.so", "libstdc++.so.6")  # the last because ASan looks for it when it starts

DYNAMIC = re.compile(r"extern\s+__shared__\s+(?P<type>[^;\[\]]+?)\s+(?P<name>\w+)\s*\[\s*\]\s*;")
SHARED = re.compile(r"__shared__\s+(?P<type>[^;\[\]]+?)\s+(?P<name>\w+)\s*(?P<size>(?:\[[^;]*\])?)\s*;")
LAUNCH = re.compile(r"(?P<kernel>\w+\s*(?:<[\w\s,:<>()]*>)?)\s*<<<(?P<config>[^;]*?)>>>\s*\(")
KERNEL = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\(.*?\)\s+)?(\w+)\(")


def rewrite(text: str, path: Path) -> str:
    """The CUDA source `text` of the file `path` as C++: its launches and shared memory by way of cuda_runtime.h."""
    text = DYNAMIC.sub(r"auto* \g<name> = static_cast<\g<type>*>(cuda_emulation::dynamic_shared_memory());", text)
    text = SHARED.sub(
        r"static char \g<name>_key; auto& \g<name> = cuda_emulation::shared<\g<type>\g<size>>(&\g<name>_key);", text
    )

    def launch(match: re.Match) -> str:
        name = re.match(r"\w+", match["kernel"])[0]
        return f'cuda_emulation::kernel("{name}", {match["kernel"]}, {{{match["config"]}}})('

    return f'#line 1 "{path.relative_to(ROOT)}"\n{LAUNCH.sub(launch, text)}'


def kernels() -> set[str]:
    """The names of all kernels in csrc."""
    return {name for path in CSRC.glob("*.cu") for name in KERNEL.findall(path.read_text())}


def compiler() -> list[str]:
    return shlex.split(find_compiler() or "c++")


def library(name: str) -> str:
    """The path of one of the compiler's libraries; the name itself where it has none."""
    command = [*compiler(), f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def missing() -> str | None:
    """The thing that this machine lacks for the emulation, or None."""
    if find_compiler() is None:
        return "a C++ compiler"
    absent = [name for name in PRELOAD if not Path(library(name)).is_file()]
    return f"GCC with its sanitizers ({', '.join(absent)})" if absent else None


def compile_all(commands: list[list[str]], folder: Path) -> list[str]:
    """Runs the compiler with each list of arguments, whose last is the source; returns the objects."""

    def compile_one(arguments: list[str]) -> str:
        target = str(folder / f"{Path(arguments[-1]).name}.o")
        subprocess.run([*compiler(), *arguments, "-o", target], check=True, cwd=ROOT)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, commands))


def kernel_commands(sources: list[Path], folder: Path) -> list[list[str]]:
    """Writes the CUDA sources as C++ into `folder`; returns what compiles them and the emulation itself."""
    folder.mkdir(parents=True, exist_ok=True)
    include = [f"-I{path}" for path in (folder, EMULATION, CSRC)]
    fma = ["-mfma"] if "fma" in Path("/proc/cpuinfo").read_text().split() else []
    commands = [[*FLAGS, "-O2", *include, "-c", str(EMULATION / "emulation.cpp")]]
    for path in [*CSRC.glob("*.cuh"), *sources]:
        target = folder / (path.name if path.suffix == ".cuh" else f"{path.name}.cpp")
        target.write_text(rewrite(path.read_text(), path))
        if path.suffix == ".cu":
            commands.append([*KERNEL_FLAGS, *fma, *include, "-c", str(target)])
    return commands


def build(folder: Path) -> Path:
    """Builds the extension with its kernels emulated in `folder`; returns its path."""
    from torch.utils import cpp_extension

    commands = kernel_commands(sorted(CSRC.glob("*.cu")), folder)
    headers = [*cpp_extension.include_paths(), sysconfig.get_paths()["include"]]
    flags = [*FLAGS, "-O1", "-DBVAE_WITH_CUDA", "-DBVAE_EMULATE_CUDA", *(f"-isystem{path}" for path in headers)]
    others = ("host", "image")  # bvae._host and bvae._image
    commands += [[*flags, "-c", str(path)] for path in CSRC.glob("*.cpp") if not path.name.startswith(others)]
    target = folder / "_C_emulated.so"
    link = [*(f"-L{path}" for path in cpp_extension.library_paths()), "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]
    objects = compile_all(commands, folder)
    subprocess.run([*compiler(), "-shared", *SANITIZERS, *objects, *link, "-lc10", "-o", str(target)], check=True)
    return target


def build_program(source: Path, folder: Path) -> Path:
    """Builds a CUDA program of one file in `folder`, emulated; returns its path."""
    objects = compile_all(kernel_commands([source], folder), folder)
    target = folder / source.stem
    subprocess.run([*compiler(), *SANITIZERS, *objects, "-o", str(target)], check=True)
    return target


def run(
    extension: Path, multiprocessors: int, order: str, arguments: list[str], **options
) -> subprocess.CompletedProcess:
    """pytest with the emulated extension, in a process of its own; options as subprocess.run's."""
    paths = [str(ROOT), str(EMULATION), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "BVAE_DISABLE_EXTENSION": "",
        "PYTHONPATH": os.pathsep.join(paths),
        "LD_PRELOAD": " ".join(library(name) for name in PRELOAD),
        # New memory is filled, so that what a kernel fails to write is not by chance what was there before.
        "ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0:max_malloc_fill_size=1000000000:malloc_fill_byte=190",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "CUDA_EMULATION_EXTENSION": str(extension),
        "CUDA_EMULATION_MULTIPROCESSORS": str(multiprocessors),
        "CUDA_EMULATION_ORDER": order,
    }
    # Only Python's part of stderr is captured: reports of errors that end the process are written to the file itself.
    command = [sys.executable, "-m", "pytest", "-p", "emulated", "--capture=sys", "-p", "no:cacheprovider"]
    return subprocess.run([*command, *arguments], env=environment, cwd=ROOT, **options)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--multiprocessors", type=int, default=132, help="number that the device states")
    parser.add_argument(
        "--order", default="forward", help="order of blocks, warps and threads: forward, reverse or a seed"
    )
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "cuda_emulation", help="the folder to build in")
    args, arguments = parser.parse_known_args()
    if missing() is not None:
        print(f"the emulation needs {missing()}", file=sys.stderr)
        return 2
    arguments = arguments or ["-q", *TESTS, "-k", CHOICE]
    return run(build(args.build.resolve()), args.multiprocessors, args.order, arguments).returncode


if __name__ == "__main__":
    sys.exit(main())
