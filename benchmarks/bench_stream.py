#!/usr/bin/env python3
"""Times training on images read from their file while training against training on the same images in memory.

    python benchmarks/bench_stream.py [--device cpu|cuda] [--images 50000] [--rounds 5] [--steps 20] [--json PATH]

1. Stage 1 of the CIFAR-10 preset with --amp, batch 100, on a file of CIFAR-10's size: images/s from memory and from the
   file, in turn, round after round. Their ratio is the median of the rounds' ratios.
2. The peak memory of a process that draws an epoch of batches, from files of 1/5 and of --gib GiB.

The files, of random pixels, are written to --folder (default: a temporary folder) and are in the page cache when they
are read, unless the machine has less memory than that.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bvae import ops
from bvae.balance import BalancedLoss
from bvae.batches.mapped import MappedImages
from bvae.batches.resident import ImageBatches, to_device
from bvae.batches.streamed import StreamedImageBatches
from bvae.config import find_preset
from bvae.engine.graph import make_runner
from bvae.engine.step import Step
from bvae.machine import describe_device, pick_device, training_kernels, versions
from bvae.models.vae import first_stage
from bvae.stages.objective import Noise, VAEObjective

CONFIG = find_preset("cifar10")
IMAGE = (CONFIG.side, CONFIG.side, CONFIG.channels)
BLOCK = 10_000  # images written at a time


class Training:
    """Stage 1 of the preset on some batches, for as many steps as are asked for."""

    def __init__(self, batches: ImageBatches) -> None:
        torch.manual_seed(0)
        model = first_stage(CONFIG).to(batches.device)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        loss = BalancedLoss().to(batches.device)
        step = Step(model, VAEObjective(loss, amp=True), Noise(ops.make_rng(0, batches.device)), CONFIG.latents, True)
        step.set_lr(CONFIG.lr)
        self.batches = batches
        self.epoch = self.done = 0
        batches.begin(0)
        self.runner = make_runner(batches, step, True)
        if batches.device.type == "cuda" and self.runner.why_eager is not None:
            sys.exit(f"error: {self.runner.why_eager}")  # the measured steps would differ from those of bvae.train

    def run(self, steps: int) -> float:
        """Images a second over `steps` steps."""
        self._wait()
        started = time.perf_counter()
        left = steps
        while left:
            if self.done == self.batches.steps:
                self.epoch, self.done = self.epoch + 1, 0
                self.batches.begin(self.epoch)
            n = self.runner.run(min(left, self.batches.steps - self.done))
            self.done += n
            left -= n
        self._wait()
        return steps * self.batches.batch / (time.perf_counter() - started)

    def _wait(self) -> None:
        if self.batches.device.type == "cuda":
            torch.cuda.synchronize()


def write_images(path: Path, count: int) -> None:
    """`count` images of random pixels as a .npy file."""
    rng = np.random.default_rng(0)
    array = np.lib.format.open_memmap(path, "w+", np.uint8, (count, *IMAGE))
    for first in range(0, count, BLOCK):
        part = array[first : first + BLOCK]
        part[:] = rng.integers(0, 256, part.shape, np.uint8)


def streamed(path: Path, device: torch.device) -> StreamedImageBatches:
    images = MappedImages(np.load(path, mmap_mode="r"), device)
    return StreamedImageBatches(images, CONFIG.batch, 0, torch.bfloat16)


def compare(path: Path, device: torch.device, rounds: int, steps: int) -> dict[str, Any]:
    images = to_device(np.load(path), device)
    contestants = {
        "resident": Training(ImageBatches(images, CONFIG.batch, 0, torch.bfloat16)),
        "streamed": Training(streamed(path, device)),
    }
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for i in range(rounds + 1):
        names = list(contestants) if i % 2 else list(contestants)[::-1]  # neither is always the first
        for name in names:
            rate = contestants[name].run(steps)
            if i:  # the first round warms up
                rates[name].append(rate)
    ratios = [s / r for s, r in zip(rates["streamed"], rates["resident"], strict=True)]
    return {
        **{name: statistics.median(values) for name, values in rates.items()},
        "streamed_over_resident": statistics.median(ratios),
        "ratios": ratios,
    }


def draw_an_epoch(path: Path, device: torch.device) -> int:
    """Bytes: the most memory this process has had, after an epoch of batches from a file."""
    for _ in streamed(path, device).epoch(0):
        pass
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="training steps a round and contestant")
    parser.add_argument("--gib", type=float, default=2.0, help="size of the larger file; 0 leaves memory out")
    parser.add_argument("--folder", type=Path, help="where to write the files, which are deleted at the end")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--draw", type=Path, help=argparse.SUPPRESS)  # the process whose memory is measured
    args = parser.parse_args()
    device = pick_device(args.device)
    if args.draw:
        print(draw_an_epoch(args.draw, device))
        return

    report: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "device": describe_device(device),
        "versions": versions(),
        "memory": [],
    }
    print(f"{report['device']}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder, "images.npy")
        if args.gib:
            for gib in (args.gib / 5, args.gib):
                write_images(path, int(gib * 2**30) // int(np.prod(IMAGE)))
                command = [sys.executable, __file__, "--draw", str(path), "--device", device.type]
                run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                report["memory"].append({"file_bytes": path.stat().st_size, "peak_bytes": int(run.stdout)})
                print(f"file of {gib:5.2f} GiB: a peak of {int(run.stdout) / 2**20:7.1f} MiB of memory", flush=True)
        write_images(path, args.images)
        with training_kernels(device, amp=True):
            report[device.type] = rates = compare(path, device, args.rounds, args.steps)
    print(f"stage 1 of {CONFIG.preset}, batch {CONFIG.batch}, {args.images} images: images/s, median")
    print(f"  from memory     {rates['resident']:9.1f}")
    print(f"  from the file   {rates['streamed']:9.1f}")
    lowest, highest = min(rates["ratios"]), max(rates["ratios"])
    print(f"  file / memory   {rates['streamed_over_resident']:9.3f}   ({lowest:.3f} - {highest:.3f})")
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
