#!/usr/bin/env python3
"""Runs tests with the CUDA kernels emulated on the CPU: the same csrc/*.cu, compiled by the C++ compiler.

    python tools/emulate_cuda.py [--multiprocessors N] [--order forward|reverse|SEED] [--build FOLDER] [PYTEST ...]

What is not one of the options goes to pytest; without any, the tests of the ops run. In the extension that it builds,
CPU tensors go to the kernels instead of the CPU loops. An access outside of a tensor or of a block's shared memory, a
misaligned vector, a barrier or shuffle that a thread of the block or warp does not reach, ends the process with a
report of where. docs/ops.md says what this shows and what only a GPU can.
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
from setup import CSRC, CXX_FLAGS, find_compiler  # noqa: E402

EMULATION = ROOT / "tests" / "cuda_emulation"
FLAGS = [*(flag for flag in CXX_FLAGS if not flag.startswith("-O")), "-std=c++20", "-fPIC", "-g1", "-Wno-unknown-pragmas"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
# The kernels' tests; without those that start a Python of their own, and the one of an error that ends the process.
TESTS = ["tests/test_ops.py", "tests/test_ops_noise.py", "tests/test_ops_large.py"]
NOT = "not instruction_sets and not without_the_extension and not refuses_an_index"

SHARED = re.compile(r"__shared__\s+(?P<type>[^;\[\]]+?)\s+(?P<name>\w+)\s*(?P<size>(?:\[[^;]*\])?)\s*;")
DYNAMIC = re.compile(r"extern\s+__shared__\s+(?P<type>[^;\[\]]+?)\s+(?P<name>\w+)\s*\[\s*\]\s*;")
LAUNCH = re.compile(r"(?P<name>\w+)\s*(?P<types><[\w\s,:<>()]*>)?\s*<<<(?P<config>[^;]*?)>>>\s*\(")
KERNEL = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\(.*?\)\s+)?(\w+)\(")


def rewrite(text: str, path: Path) -> str:
    """The C++ of a CUDA source: launches and shared memory as calls of cuda_runtime.h's, line by line."""
    text = DYNAMIC.sub(r"auto* \g<name> = static_cast<\g<type>*>(cuda_emulation::dynamic_shared_memory());", text)
    text = SHARED.sub(
        r"static char \g<name>_key; auto& \g<name> = cuda_emulation::shared<\g<type>\g<size>>(&\g<name>_key);", text
    )
    text = LAUNCH.sub(
        lambda m: f'cuda_emulation::kernel("{m["name"]}", {m["name"]}{m["types"] or ""}, {{{m["config"]}}})(', text
    )
    return f'#line 1 "{path.relative_to(ROOT)}"\n{text}'


def kernels() -> set[str]:
    """The names of all kernels in csrc."""
    return {name for path in CSRC.glob("*.cu") for name in KERNEL.findall(path.read_text())}


def compiler() -> list[str]:
    command = find_compiler()
    if command is None:
        raise SystemExit("no C++ compiler was found")
    return shlex.split(command)


def build(folder: Path) -> Path:
    """Builds the emulated extension in `folder`; returns its path."""
    from torch.utils import cpp_extension

    folder.mkdir(parents=True, exist_ok=True)
    include = [f"-I{path}" for path in (folder, EMULATION, CSRC)]
    torch = [f"-isystem{path}" for path in (*cpp_extension.include_paths(), sysconfig.get_paths()["include"])]
    defines = ["-DBVAE_WITH_CUDA", "-DBVAE_EMULATE_CUDA", "-DPy_LIMITED_API=0x030b0000"]
    native = ["-mfma"] if "fma" in Path("/proc/cpuinfo").read_text().split() else []
    for path in CSRC.glob("*.cuh"):
        (folder / path.name).write_text(rewrite(path.read_text(), path))
    commands = []
    for path in CSRC.glob("*.cu"):
        source = folder / f"{path.name}.cpp"
        source.write_text(rewrite(path.read_text(), path))
        commands.append([*FLAGS, "-O1", *native, *SANITIZERS, *include, "-c", str(source)])
    commands.append([*FLAGS, "-O2", *include, "-c", str(EMULATION / "emulation.cpp")])
    for path in CSRC.glob("*.cpp"):
        if not path.name.startswith("host"):
            commands.append([*FLAGS, "-O1", *defines, *include, *torch, "-c", str(path)])

    def compile_one(command: list[str]) -> str:
        target = str(folder / f"{Path(command[-1]).name}.o")
        subprocess.run([*compiler(), *command, "-o", target], check=True, cwd=ROOT)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, commands))
    out = folder / "_C_emulated.so"
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    link = ["-shared", *SANITIZERS, *objects, *libraries, "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run([*compiler(), *link, "-o", str(out)], check=True)
    return out


def run(extension: Path, multiprocessors: int, order: str, arguments: list[str], **kwargs) -> subprocess.CompletedProcess:
    """pytest with the emulated extension, in a process of its own; keywords as subprocess.run's."""
    libraries = [
        subprocess.run([*compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so.6")
    ]
    paths = [str(ROOT), str(EMULATION), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "LD_PRELOAD": " ".join(libraries),
        # New memory is filled, so that what a kernel forgets to write is not by chance what was there before.
        "ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0:max_malloc_fill_size=1000000000:malloc_fill_byte=190",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "CUDA_EMULATION_EXTENSION": str(extension),
        "CUDA_EMULATION_MULTIPROCESSORS": str(multiprocessors),
        "CUDA_EMULATION_ORDER": order,
    }
    # pytest must leave stderr alone: what ends the process is said there.
    command = [sys.executable, "-m", "pytest", "-p", "emulated", "--capture=sys", "-p", "no:cacheprovider"]
    return subprocess.run([*command, *arguments], env=environment, cwd=ROOT, **kwargs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--multiprocessors", type=int, default=132, help="what the device says it has")
    parser.add_argument("--order", default="forward", help="of blocks and threads: forward, reverse or a seed")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "cuda_emulation", help="the folder to build in")
    args, arguments = parser.parse_known_args()
    extension = build(args.build.resolve())
    return run(extension, args.multiprocessors, args.order, arguments or ["-q", *TESTS, "-k", NOT]).returncode


if __name__ == "__main__":
    sys.exit(main())
