#!/usr/bin/env python3
"""Trains the same recipe over several seeds in fp32 and in the faster ways, and compares what comes out.

    python benchmarks/check_precision.py [--seeds 5] [--compile] [--json PATH] [-- further arguments of bvae.train]

fp32 without TF32, run step by step, is the reference. A way of training passes where its mean over the seeds lies
within the reference's own range from seed to seed, for the final mse, KL and number of inactive latents of both stages.
Exit code 1 where one does not. --compile adds bf16 with `bvae.train --compile`, which takes minutes more a run. The
default recipe is `shapes`.
"""

import argparse
import contextlib
import io
import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch

from bvae.machine import describe_device, has_bf16, pick_device, versions
from bvae.train import main as train

REFERENCE = "fp32"
FIGURES = ("mse_sampled", "kl", "inactive")


def ways(device: str, compiled: bool) -> dict[str, list[str]]:
    """Arguments of bvae.train for each way that differs on the device."""
    found = {REFERENCE: ["--no-amp", "--no-graph"], "bf16": ["--amp", "--no-graph"]}
    if device == "cuda":
        found |= {"tf32, graph": ["--no-amp", "--graph"], "bf16, graph": ["--amp", "--graph"]}
    if compiled:
        found["bf16, compiled"] = ["--amp", "--compile"]
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--seeds", type=int, default=5, help="at least 2")
    parser.add_argument("--compile", action="store_true", help="also what torch.compile makes")
    parser.add_argument("--json", type=Path)
    parser.add_argument("arguments", nargs="*", metavar="-- ARGUMENT", help="for bvae.train")
    args = parser.parse_args(argv)
    if args.seeds < 2:
        parser.error("--seeds must be at least 2")
    device = pick_device(args.device)
    if not has_bf16(device):
        parser.error(f"{describe_device(device)} has no bf16 units: bvae.train --amp trains in fp32 there")
    compared = ways(device.type, args.compile)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in compared}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.seeds):  # in turn, so that a run broken off has something of each
            for name, how in compared.items():
                out = Path(folder) / f"{name}-{seed}"
                with contextlib.redirect_stdout(io.StringIO()), tf32(name != REFERENCE):
                    train([*args.arguments, *how, "--seed", str(seed), "--device", device.type, "--out", str(out)])
                results[name].append(final(out))
                print(f"{name}, seed {seed}: {results[name][-1]}", flush=True)
    report = {
        "seeds": args.seeds,
        "arguments": args.arguments,
        "device": describe_device(device),
        "versions": versions(),
        "results": results,
        "compared": compare(results),
    }
    passed = all(c["within"] for c in report["compared"])
    print(f"\n{'':16}{'figure':22}{'mean':>12}{'of fp32':>12}   fp32 from seed to seed")
    for c in report["compared"]:
        print(
            f"{c['way']:16}{c['figure']:22}{c['mean']:12.5g}{c['reference']:12.5g}   "
            f"{c['lowest']:.5g} - {c['highest']:.5g}{'' if c['within'] else '   OUTSIDE'}"
        )
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0 if passed else 1


def tf32(allowed: bool) -> contextlib.AbstractContextManager:
    """A context in which torch may, or may not, let CUDA's convolutions and bvae.train's fp32 products use TF32."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=allowed)


def final(out: Path) -> dict[str, float]:
    results = json.loads((out / "results.json").read_text())
    stages = [stage for stage in ("stage1", "stage2") if stage in results]
    return {f"{stage} {name}": results[stage][name] for stage in stages for name in FIGURES}


def compare(results: dict[str, list[dict[str, float]]]) -> list[dict]:
    """Every figure of every way beside the reference's range."""
    compared = []
    for way in results:
        for figure in results[REFERENCE][0]:
            reference = [r[figure] for r in results[REFERENCE]]
            mean = statistics.mean(r[figure] for r in results[way])
            low, high = min(reference), max(reference)
            compared.append(
                {
                    "way": way,
                    "figure": figure,
                    "mean": mean,
                    "reference": statistics.mean(reference),
                    "lowest": low,
                    "highest": high,
                    "within": low <= mean <= high,
                }
            )
    return compared


if __name__ == "__main__":
    sys.exit(main())
