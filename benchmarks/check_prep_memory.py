"""Shows that preparing images takes bounded memory: makes a large zip of CelebA-like JPEGs, prepares it, and measures.

The figure is anonymous memory (`Anonymous` in /proc/PID/smaps_rollup), summed over the process and its
workers, sampled every 50 ms: all that they allocate, the interpreter's own included, but not the files of libraries.
Ends with 1 if the peak is above the limit. Linux only; needs about 20 KB of disk for each image.
"""

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

BASES = 200  # images that are drawn; the others are these with other bytes after their end


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=120_000)
    parser.add_argument("--limit", type=float, default=1024.0, help="MiB (1024)")
    parser.add_argument(
        "--folder", type=Path, help="where to work, on a disk with room (the system's temporary folder)"
    )
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("rest", nargs="*", help="after --: arguments for python -m bvae.data.prep, as --workers 4")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        source = Path(folder, "faces.zip")
        write_source(source, args.images)
        command = [sys.executable, "-m", "bvae.data.prep", str(source), "--out", f"{folder}/store"]
        begin = time.monotonic()
        process = subprocess.Popen([*command, "--size", "64", "--crop", "128", *args.rest])
        peak, processes = 0, 0
        while process.poll() is None:
            tree = descendants(process.pid)
            peak, processes = max(peak, sum(map(anonymous, tree))), max(processes, len(tree))
            time.sleep(0.05)
        seconds = time.monotonic() - begin
        if process.returncode:
            return process.returncode
        size = sum(file.stat().st_size for file in Path(folder, "store").glob("*.npy"))
        figures = {
            "images": args.images,
            "source_mib": round(source.stat().st_size / 2**20),
            "store_mib": round(size / 2**20),
            "processes": processes,
            "peak_mib": round(peak / 2**10, 1),
            "seconds": round(seconds, 1),
        }
        print(json.dumps(figures))
        if args.json:
            args.json.write_text(json.dumps(figures, indent=1) + "\n")
    return int(peak / 2**10 > args.limit)


def write_source(path: Path, images: int) -> None:
    rng = np.random.default_rng(0)
    bases = []
    for _ in range(BASES):
        coarse = Image.fromarray(rng.integers(0, 256, (14, 12, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        coarse.resize((178, 218), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        bases.append(buffer.getvalue())
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(1, images + 1):
            archive.writestr(f"faces/{number:07}.jpg", bases[number % BASES] + number.to_bytes(8, "big"))


def descendants(root: int) -> list[int]:
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                parents[int(entry)] = int(Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()[1])
    found = [root]
    for process in found:
        found += [child for child, parent in parents.items() if parent == process]
    return found


def anonymous(process: int) -> int:
    """KiB."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith("Anonymous:"):
                return int(line.split()[1])
    return 0


if __name__ == "__main__":
    sys.exit(main())
