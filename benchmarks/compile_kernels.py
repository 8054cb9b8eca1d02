"""Compiles every CUDA kernel for each architecture and prints registers, spills and shared memory.

Exit code 1 where a file does not compile or a kernel spills registers to memory. Where there is no nvcc
(CUDA_HOME, /usr/local/cuda, PATH) it says so and exits with 0: a machine without CUDA can still run the checks.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from setup import CSRC, NVCC_FLAGS, find_nvcc  # noqa: E402  the flags of the build itself

ENTRY = re.compile(r"Compiling entry function '(\S+)' for 'sm_(\w+)'")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")


def demangle(names: list[str]) -> list[str]:
    """Readable kernel names, without namespaces and argument lists; as they are where there is no c++filt."""
    tool = shutil.which("c++filt")
    if tool is None:
        return names
    out = subprocess.run([tool, *names], capture_output=True, text=True, check=True).stdout.splitlines()
    return [re.sub(r"^void |bvae::|\(anonymous namespace\)::", "", name).partition("(")[0] for name in out]


def parse(report: str) -> list[tuple[str, str, int, int, int, int]]:
    """ptxas -v output to (mangled name, arch, registers, spill stores, spill loads, shared bytes)."""
    rows = []
    name = arch = ""
    stores = loads = 0
    for line in report.splitlines():
        if found := ENTRY.search(line):
            name, arch = found.groups()
            stores = loads = 0
        elif found := SPILLS.search(line):
            stores, loads = int(found[2]), int(found[3])
        elif (found := USED.search(line)) and name:
            shared = SHARED.search(line)
            rows.append((name, arch, int(found[1]), stores, loads, int(shared[1]) if shared else 0))
            name = ""
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archs", nargs="+", default=["80", "90", "100"], help="compute capabilities")
    args = parser.parse_args()
    nvcc = find_nvcc()
    if nvcc is None:
        print("no nvcc (looked in CUDA_HOME, in /usr/local/cuda and on the PATH): no kernel was compiled")
        return 0
    rows: list[tuple[str, str, int, int, int, int]] = []
    for source in sorted(CSRC.glob("*.cu")):
        gencode = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in args.archs]
        with tempfile.TemporaryDirectory() as folder:
            command = [nvcc, *NVCC_FLAGS, "-Xptxas", "-v", *gencode, "-c", source, "-o", Path(folder, "out.o")]
            run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            print(run.stdout + run.stderr, file=sys.stderr)
            print(f"{source.name} does not compile", file=sys.stderr)
            return 1
        rows += parse(run.stdout + run.stderr)
    if not rows:
        print("nvcc's report names no kernel: its format has changed", file=sys.stderr)
        return 1
    names = demangle([row[0] for row in rows])
    table = sorted((name, int(re.sub(r"\D", "", row[1])), row) for name, row in zip(names, rows, strict=True))
    width = max(len(name) for name in names)
    head = f"{'arch':>7}  {'registers':>9}  {'spill stores':>12}  {'spill loads':>11}  {'shared B':>8}"
    print(f"{'kernel':<{width}}  {head}")
    for name, _, (_, arch, registers, stores, loads, shared) in table:
        print(f"{name:<{width}}  {'sm_' + arch:>7}  {registers:>9}  {stores:>12}  {loads:>11}  {shared:>8}")
    spilled = sorted({name for name, _, row in table if row[3] or row[4]})
    print(f"{len(set(names))} kernels, {len(args.archs)} architectures, {len(spilled)} with spills")
    for name in spilled:
        print(f"spills: {name}", file=sys.stderr)
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
