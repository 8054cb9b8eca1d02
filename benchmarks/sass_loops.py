"""Counts the machine instructions in the loops of the CUDA kernels, by the pipe of a multiprocessor that runs them.

    python benchmarks/sass_loops.py csrc/sample_kl.cu [--kernel 'sample_kernel<float, true>'] [--arch 90]

For each loop that loads from global memory: its addresses, its instructions, and how many clocks one warp of it keeps
a whole multiprocessor busy: with issuing (4 instructions a clock) and in each pipe, at the throughputs of compute
capability 9.0. That is for reading, not a simulation: a loop's branches are counted as if all were taken, and an outer
loop contains its inner ones. It needs nvcc, and cuobjdump beside it or on PATH (packages nvidia-cuda-cuobjdump and
nvidia-cuda-nvdisasm).
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from compile_kernels import NVCC_FLAGS, demangle, find_nvcc  # the flags of the build itself

# The pipes, and the clocks a multiprocessor needs for one instruction of a warp: 32 lanes / lanes a clock. After the
# CUDA C++ Programming Guide's table of arithmetic throughput; integer multiplications run in half of the FMA pipe's
# lanes, so one takes the place of two other instructions there, one with a 64-bit result that of four.
PIPES = [
    ("fp64", 32 / 64, re.compile(r"D(ADD|MUL|FMA|SETP)")),
    ("fma", 4 * 32 / 128, re.compile(r"IMAD\.(WIDE|HI)")),
    ("fma", 2 * 32 / 128, re.compile(r"IMAD")),
    ("fma", 32 / 128, re.compile(r"FFMA|FMUL|FADD|HFMA2|HADD2|HMUL2")),
    ("special", 32 / 16, re.compile(r"MUFU|F2F\.|I2F\.|F2I\.")),
    ("other", 0.0, re.compile(r"U|B|LDC|R2UR|S2R|CALL|EXIT|NOP|WARPSYNC|LEPC|YIELD")),
    ("memory", 4.0, re.compile(r"(LD|ST)\S*\.128")),  # 128 bytes a clock
    ("memory", 2.0, re.compile(r"(LD|ST)\S*\.64")),
    ("memory", 1.0, re.compile(r"LD|ST|ATOM|RED|SHFL")),
    ("alu", 32 / 64, re.compile(r"")),
]
COLUMNS = ["fma", "alu", "special", "fp64", "memory"]


def disassemble(source: Path, arch: str) -> dict[str, list[tuple[int, str]]]:
    """Of each kernel, by its mangled name, the instructions with their addresses."""
    nvcc = find_nvcc()
    if nvcc is None:
        sys.exit("error: no nvcc (looked in CUDA_HOME, in /usr/local/cuda and on the PATH)")
    beside = nvcc.with_name("cuobjdump")
    tool = str(beside) if beside.is_file() else shutil.which("cuobjdump")
    if tool is None:
        sys.exit(f"error: no cuobjdump (looked beside {nvcc} and on PATH)")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "out.cubin")
        subprocess.run([nvcc, *NVCC_FLAGS, f"-arch=sm_{arch}", "-cubin", "-o", cubin, source], check=True)
        text = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    kernels: dict[str, list[tuple[int, str]]] = {}
    name = ""
    for line in text.splitlines():
        if found := re.search(r"Function : (\S+)", line):
            name = found[1]
            kernels[name] = []
        elif found := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ +)?(.*?) *;", line):
            kernels[name].append((int(found[1], 16), found[2]))
    return kernels


def loops(code: list[tuple[int, str]]) -> list[tuple[int, int]]:
    """Addresses of each backward branch's target and of the branch."""
    found = []
    for address, instruction in code:
        target = re.match(r"BRA.* 0x([0-9a-f]+)", instruction)
        if target and int(target[1], 16) < address:
            found.append((int(target[1], 16), address))
    return found


def clocks(instructions: list[str]) -> dict[str, float]:
    busy: Counter[str] = Counter()
    for instruction in instructions:
        pipe, each, _ = next(row for row in PIPES if row[2].match(instruction))
        busy[pipe] += each
    return busy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--arch", default="90", help="compute capability")
    args = parser.parse_args()
    kernels = disassemble(args.source, args.arch)
    print(f"{'loop':>13} {'instructions':>12}   clocks: {'issue':>7}" + "".join(f"{name:>8}" for name in COLUMNS))
    for mangled, name in sorted(zip(kernels, demangle(list(kernels)), strict=True), key=lambda pair: pair[1]):
        if args.kernel not in name:
            continue
        print(name)
        for first, last in loops(kernels[mangled]):
            body = [instruction for address, instruction in kernels[mangled] if first <= address <= last]
            if not any(instruction.startswith("LDG") for instruction in body):
                continue
            busy = clocks(body)
            row = "".join(f"{busy[pipe]:>8.1f}" for pipe in COLUMNS)
            print(f"{first:>6x}-{last:<6x} {len(body):>12}   {'':>7} {len(body) / 4:>7.1f}{row}")


if __name__ == "__main__":
    main()
