#!/usr/bin/env python3
"""Times the decoders of images side by side with the reference way, and compares their pixels.

    python benchmarks/bench_prep.py SOURCE [--images 3000] [--rounds 5] [--workers N] [--python NAME=PATH ...]
        [--json PATH]
    python benchmarks/bench_prep.py SOURCE --agreement [--images 500] [--python NAME=PATH ...] [--json PATH]

SOURCE is a zip or a folder of JPEGs at least 128 pixels in height and width, such as CelebA's; its first images are
copied to a temporary folder, from which everybody reads. pillow-simd replaces Pillow and DALI is optional, so each
lives in an environment of its own: `--python NAME=PATH` names the interpreter of one, which needs nothing else but
NumPy. The interpreter that runs this file must have Pillow, not pillow-simd.

Throughput: crop 128, 64x64, RGB, bilinear with antialias. The contestants take turns, round after round, so that a
machine whose speed drifts slows all alike; figures are medians over rounds, ratios are medians of each round's ratio.

    reference   one process, as the published code does it: np.array(Image.open(file)), the crop as a slice, Pillow's
                bilinear resize, append to a list; at the end np.concatenate
    lean        the same with Pillow's own crop before the array is made
    others      bvae's decoders in each environment, started before the clock, writing into an array. They have bvae's
                own code where this checkout was built for their Python (`python setup.py build_ext --inplace`)

Agreement: how far the pixels of each decoder, filter and antialias are from Pillow's here (opened, cropped and resized
by it alone; without antialias, which Pillow has not, from those of bvae's `pillow`), in 1/255, as the maximum inside,
the maximum on the outermost row or column, and the mean over all.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bvae.data.archive import CHUNK_IMAGES, FileItem
from bvae.data.decoders import Decoder, open_decoder
from bvae.data.decoders.dali import dali_installed
from bvae.data.decoders.resize import RESAMPLING
from bvae.data.recipe import FILTERS, Recipe

CROP, SIZE = 128, 64
CELEBA, CORES = 202_599, 16  # the whole set, and the machine it should take a minute on
RECIPE = Recipe(size=SIZE, channels=3, crop=CROP)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--images", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, help="default: the number of cores")
    parser.add_argument("--python", metavar="NAME=PATH", action="append", default=[])
    parser.add_argument("--agreement", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.source, args.workers)
        return
    with tempfile.TemporaryDirectory() as scratch:
        count = copy_images(args.source, Path(scratch), args.images or (500 if args.agreement else 3000))
        environments = {"here": sys.executable} | dict(pair.split("=", 1) for pair in args.python)
        servers = {name: Server(path, Path(scratch), args.workers) for name, path in environments.items()}
        report: dict[str, Any] = {
            "command": " ".join(["python", *sys.argv]),
            "machine": machine(),
            "images": count,
            "python": ".".join(map(str, sys.version_info[:3])),
            "versions": {name: server.ask("versions") for name, server in servers.items()},
        }
        print(f"{report['machine']}, Python {report['python']}, {count} images")
        for name, versions in report["versions"].items():
            print(f"  {name}: " + ", ".join(f"{library} {version}" for library, version in versions.items()))
        measure = agreement if args.agreement else throughput
        report |= measure(servers, args, count)
        for server in servers.values():
            server.close()
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


def copy_images(source: Path, folder: Path, count: int) -> int:
    """The first images of a zip or folder, by name, as files of a folder."""
    if source.is_dir():
        files = sorted(file for file in source.rglob("*") if file.suffix.lower() in (".jpg", ".jpeg"))[:count]
        for i, file in enumerate(files):
            (folder / f"{i:06}.jpg").write_bytes(file.read_bytes())
        return len(files)
    with zipfile.ZipFile(source) as archive:
        names = sorted(name for name in archive.namelist() if name.lower().endswith((".jpg", ".jpeg")))[:count]
        for i, name in enumerate(names):
            (folder / f"{i:06}.jpg").write_bytes(archive.read(name))
        return len(names)


def machine() -> str:
    from bvae.machine import describe_device, pick_device

    return describe_device(pick_device("cpu"))


# ---- throughput and agreement, asked of the environments ------------------------------------------------------------


def throughput(servers: "dict[str, Server]", args: argparse.Namespace, count: int) -> dict[str, Any]:
    contestants = [("reference", servers["here"], "reference"), ("lean", servers["here"], "lean")]
    for environment, server in servers.items():
        for name in server.ask("decoders"):
            label = name if environment == "here" else f"{name} ({environment})"
            contestants.append((label, server, name))
    seconds: dict[str, list[float]] = {label: [] for label, _, _ in contestants}
    cpu: dict[str, list[float]] = {label: [] for label, _, _ in contestants}
    workers = args.workers or len(os.sched_getaffinity(0))
    for i in range(args.rounds + 1):
        for label, server, name in contestants:
            answer = server.ask("time", name)
            if i:  # the first round warms up
                seconds[label].append(answer["seconds"])
                cpu[label].append(answer["cpu"])
    print("\nimages/s, median (lowest - highest); times the reference; CPU microseconds an image; seconds for CelebA's")
    print(f"{CELEBA:,} here, with {workers} workers, and on {CORES} cores if the rate grows with them")
    result = {}
    for label, times in seconds.items():
        rates = [count / t for t in times]
        ratio = statistics.median(r / t for r, t in zip(seconds["reference"], times, strict=True))
        rate = statistics.median(rates)
        work = statistics.median(cpu[label]) / count * 1e6
        result[label] = {"images_per_s": rate, "over_reference": ratio, "cpu_us_per_image": work}
        line = f"  {label:24}{rate:8.0f}   ({min(rates):.0f} - {max(rates):.0f})  {ratio:5.2f}x  {work:4.0f} us"
        line += f"  {CELEBA / rate:6.0f} s"
        if label not in ("reference", "lean"):
            result[label]["seconds_for_celeba_on_16_cores"] = whole = CELEBA / rate * workers / CORES
            line += f"  {whole:5.0f} s"
        print(line)
    return {"workers": workers, "rounds": args.rounds, "throughput": result}


def agreement(servers: "dict[str, Server]", args: argparse.Namespace, count: int) -> dict[str, Any]:
    print(
        "\n| decoder | filter | antialias | largest, inside | largest, at the edge | mean |\n|---|---|---|---|---|---|"
    )
    rows = []
    for filter in FILTERS:
        for antialias in (True, False):
            pixels = {
                (environment, name): np.load(server.ask("decode", name, filter, antialias))
                for environment, server in servers.items()
                for name in server.ask("decoders")
            }
            here = ("here", "pillow")
            by_pillow = antialias or filter == "nearest"
            expected = np.load(servers["here"].ask("lean", filter)) if by_pillow else pixels[here]
            for (environment, name), ours in pixels.items():
                if name == "pillow" and (environment != "here" or not by_pillow):  # the same once more
                    continue
                off = np.abs(ours.astype(int) - expected)
                row = {"decoder": name, "filter": filter, "antialias": antialias}
                row["inside"] = int(off[:, 1:-1, 1:-1].max())
                off_edge = off.copy()
                off_edge[:, 1:-1, 1:-1] = 0
                row |= {"edge": int(off_edge.max()), "mean": float(off.mean())}
                rows.append(row)
                words = ("on" if antialias else "off", row["inside"], row["edge"], f"{row['mean']:.4f}")
                print(f"| {name} | {filter} | " + " | ".join(map(str, words)) + " |")
    return {"agreement": rows}


class Server:
    """This file in another interpreter: one line of JSON asks, one line answers."""

    def __init__(self, python: str, folder: Path, workers: int | None) -> None:
        command = [python, __file__, str(folder), "--serve", *(["--workers", str(workers)] if workers else [])]
        root = str(Path(__file__).resolve().parent.parent)  # bvae itself need not be installed there
        self.process = subprocess.Popen(
            command, env=os.environ | {"PYTHONPATH": root}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, *question: Any) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"error: {self.process.args[0]} ended: exit code {self.process.wait()}")  # type: ignore[index]
        return json.loads(answer)

    def close(self) -> None:
        self.process.communicate()


# ---- in each environment --------------------------------------------------------------------------------------------


def serve(folder: Path, workers: int | None) -> None:
    files = sorted(map(str, folder.glob("*.jpg")))
    decoders: dict[str, Decoder] = {}
    for backend in ["pillow", "dali"] if dali_installed() else ["pillow"]:
        decoder = open_decoder(backend, RECIPE, workers, "cpu")  # type: ignore[arg-type]
        decoders[decoder.name] = decoder
    for line in sys.stdin:
        what, *arguments = json.loads(line)
        answer: Any
        if what == "versions":
            answer = {name: version for decoder in decoders.values() for name, version in decoder.versions.items()}
            answer |= {"numpy": np.__version__}
        elif what == "decoders":
            answer = list(decoders)
        elif what == "time":
            (name,) = arguments
            ways = {"reference": reference, "lean": lean}
            cpu, started = cpu_seconds(), time.perf_counter()
            images = ways[name](files) if name in ways else decode(decoders[name], files)
            answer = {"seconds": time.perf_counter() - started, "cpu": cpu_seconds() - cpu}
            assert images.shape == (len(files), SIZE, SIZE, 3)
        elif what == "lean":
            answer = str(folder / "lean.npy")
            np.save(answer, lean(files, RESAMPLING[arguments[0]]))
        else:
            name, filter, antialias = arguments
            recipe = Recipe(size=SIZE, channels=3, crop=CROP, filter=filter, antialias=antialias)
            backend = "dali" if name.startswith("dali") else "pillow"
            answer = str(folder / f"{name}.npy")
            with open_decoder(backend, recipe, workers, "cpu") as decoder:  # type: ignore[arg-type]
                np.save(answer, decode(decoder, files))
        print(json.dumps(answer), flush=True)
    for decoder in decoders.values():
        decoder.close()


def cpu_seconds() -> float:
    """CPU seconds of this process and its children, which live on."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if os.getpid() in (int(stat.parent.name), int(fields[1])):
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def decode(decoder: Decoder, files: list[str]) -> np.ndarray:
    items = [FileItem(Path(file).name, str(Path(file).parent)) for file in files]
    images = np.empty((len(files), SIZE, SIZE, 3), np.uint8)
    row = 0
    for decoded in decoder.run(items[i : i + CHUNK_IMAGES] for i in range(0, len(items), CHUNK_IMAGES)):
        images[row : row + len(decoded.pixels)] = decoded.pixels
        row += len(decoded.pixels)
    return images[:row]


def reference(files: list[str]) -> np.ndarray:
    left, top, right, bottom = RECIPE.box(*Image.open(files[0]).size)
    images = []
    for file in files:
        image = np.array(Image.open(file))[top:bottom, left:right]
        image = np.array(Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BILINEAR))
        images.append(image.reshape(1, SIZE, SIZE, 3))
    return np.concatenate(images, 0)


def lean(files: list[str], filter: Image.Resampling = Image.Resampling.BILINEAR) -> np.ndarray:
    box = RECIPE.box(*Image.open(files[0]).size)
    resized = [Image.open(file).crop(box).resize((SIZE, SIZE), filter) for file in files]
    return np.stack([np.asarray(image) for image in resized])


if __name__ == "__main__":
    main()
