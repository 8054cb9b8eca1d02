#!/usr/bin/env python3
"""The Frechet Inception distance between two sets of images, under a named protocol.

    python tools/fid.py A B [--protocol tf1|pytorch-fid|clean] [--kid] [--prdc] [--json PATH]
    python tools/fid.py A --save-stats A.npz

A is the reference (real images), B what is judged. Each is a folder or an archive of images, a prepared store,
CIFAR-10's folder, .npy or .npz of uint8 pixels or floats in [0,1], or statistics (of --save-stats or pytorch-fid).
Where there are splits, `PATH:train` or `PATH:test` names one; test is the default. docs/fid.md explains the protocols.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bvae.errors import UserError, run_command
from bvae.files import encode_json, write_atomically
from bvae.metrics.cache import Cache, default_folder
from bvae.metrics.extract import Extractor
from bvae.metrics.kid import SUBSET_SIZE, SUBSETS, kid
from bvae.metrics.measure import measure
from bvae.metrics.prdc import NEIGHBOURS, prdc
from bvae.metrics.protocols import DEFAULT, PROTOCOLS
from bvae.metrics.sources import Images, open_images
from bvae.metrics.statistics import Statistics, check_dimension, check_enough, fid, save_statistics
from bvae.metrics.weights import DOWNLOAD, find_weights, load_inception
from bvae.world import World


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", metavar="A", help="the reference")
    parser.add_argument("b", metavar="B", nargs="?", help="what is judged")
    parser.add_argument("--protocol", choices=PROTOCOLS, help=f"default {DEFAULT}, or that of given statistics")
    parser.add_argument(
        "--inception", help=f"weights of the network, or `{DOWNLOAD}` (the default where none are found)"
    )
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--kid", action="store_true", help=f"kernel distance too, {SUBSETS} subsets of {SUBSET_SIZE}")
    parser.add_argument("--prdc", action="store_true", help="precision, recall, density and coverage too")
    parser.add_argument("--num", type=positive, help="use the first so many images of each side")
    parser.add_argument(
        "--drop-last", type=positive, metavar="BATCH", help="drop what does not fill a batch of so many"
    )
    parser.add_argument("--jpeg-roundtrip", action="store_true", help="pass A through JPEG (quality 75, 4:2:0) first")
    parser.add_argument("--stretch", action="store_true", help="stretch each image of B to its own range (Dai & Wipf)")
    parser.add_argument("--grey", action="store_true", help="take grey images too, their channel repeated")
    parser.add_argument("--allow-few", action="store_true", help="measure fewer than 2048 images too, and label it")
    parser.add_argument("--save-stats", type=Path, metavar="PATH.npz", help="write the statistics of A, without B")
    parser.add_argument("--batch-size", type=positive, help="images through the network at a time")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--seed", type=int, default=0, help="of KID's subsets")
    parser.add_argument("--cache", type=Path, help="folder for statistics, $BVAE_CACHE or ~/.cache/bvae by default")
    parser.add_argument("--no-cache", action="store_true")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    args = parser.parse_args(argv)
    if (args.b is None) == (args.save_stats is None):
        parser.error("give A and B, or A and --save-stats")
    return args


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    with World.join() as world:
        run(args, world.connect(args.device))


def run(args: argparse.Namespace, world: World) -> None:
    sides = {name: open_images(path, args.grey) for name, path in (("A", args.a), ("B", args.b)) if path is not None}
    protocol = choose_protocol(args, sides)
    label = None
    for name, side in sides.items():
        if isinstance(side, Images):
            side = side.first(min(side.n, args.num or side.n))
            side = side.first(side.n // args.drop_last * args.drop_last if args.drop_last else side.n)
            sides[name] = side
            side.digest()  # checks every image
        elif args.kid or args.prdc:
            raise UserError(f"{getattr(args, name.lower())}: --kid and --prdc need images, not their statistics")
        elif (args.jpeg_roundtrip and name == "A") or (args.stretch and name == "B"):
            raise UserError(f"{getattr(args, name.lower())}: statistics cannot be changed: give the images")
        elif any(isinstance(other, Images) for other in sides.values()):
            check_dimension(side, getattr(args, name.lower()))
        label = check_enough(side.n, getattr(args, name.lower()), args.allow_few) or label

    extractor = None
    if any(isinstance(side, Images) for side in sides.values()):
        # One rank downloads, where it must; the others then find what it has fetched.
        path = find_weights(args.inception) or (find_weights(DOWNLOAD) if world.first else None)
        world.wait()
        path = path or find_weights(DOWNLOAD)
        assert path is not None
        network, weights = load_inception(path, world.device, args.precision)
        extractor = Extractor(network, weights, PROTOCOLS[protocol], args.batch_size)
    a, *rest = statistics_of(args, sides, extractor, world)
    if not world.first:
        return
    if args.save_stats:
        save_statistics(args.save_stats, a.without_features())
        print(f"statistics of {a.n} images under {a.origin.protocol}: {args.save_stats}")
        return
    b = rest[0]

    result: dict[str, Any] = {
        "fid": fid(a, b),
        "protocol": named(a, b),
        "n": b.n,
        "n_reference": a.n,
        "label": label,
        "precision": a.origin.precision,
        "weights": a.origin.weights or b.origin.weights,
        "a": args.a,
        "b": args.b,
    }
    if args.kid and a.features is not None and b.features is not None:
        mean, deviation = kid(a.features, b.features, seed=args.seed)
        size = min(SUBSET_SIZE, len(a.features), len(b.features))
        result["kid"] = {"mean": mean, "std": deviation, "subsets": SUBSETS, "subset_size": size}
    if args.prdc and a.features is not None and b.features is not None:
        result["prdc"] = {**prdc(a.features, b.features), "neighbours": NEIGHBOURS}
    report(result, PROTOCOLS[protocol].habit)
    if args.json:
        write_atomically(args.json, encode_json(result, indent=2).encode() + b"\n")


def choose_protocol(args: argparse.Namespace, sides: dict[str, Images | Statistics]) -> str:
    """--protocol, or what the given statistics were made under. Raises UserError where they contradict."""
    protocol = args.protocol
    for name, side in sides.items():
        if isinstance(side, Statistics):
            path, base = getattr(args, name.lower()), side.origin.base
            if base not in PROTOCOLS:
                raise UserError(f"{path}: statistics under a protocol {base!r}, which is not known here")
            if protocol not in (None, base):
                source = "--protocol" if args.protocol else "the other side"
                raise UserError(f"{path}: statistics under the protocol {base}; {source} says {protocol}")
            if side.origin.precision != args.precision and any(isinstance(s, Images) for s in sides.values()):
                raise UserError(f"{path}: made with --precision {side.origin.precision}: give the same")
            protocol = base
    return protocol or DEFAULT


def statistics_of(
    args: argparse.Namespace, sides: dict[str, Images | Statistics], extractor: Extractor | None, world: World
) -> list[Statistics]:
    cache = Cache(None if args.no_cache else args.cache or default_folder())
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    found = []
    with Progress(*columns, console=Console(stderr=True), disable=not world.first) as progress:
        for name, side in sides.items():
            if isinstance(side, Statistics):
                found.append(side)
                continue
            assert extractor is not None
            mine = side.n if world.size == 1 else None  # the other ranks' images are not counted here
            task = progress.add_task(f"{name} {side.name}", total=mine)
            found.append(
                measure(
                    side,
                    extractor,
                    cache,
                    jpeg=args.jpeg_roundtrip and name == "A",
                    stretched=args.stretch and name == "B",
                    keep=args.kid or args.prdc,
                    progress=lambda n, task=task: progress.advance(task, n),  # type: ignore[misc]
                    rank=world.rank,
                    ranks=world.size,
                )
            )
    device = torch.device("cpu") if extractor is None else extractor.network.device
    return [statistics.to(device) for statistics in found]


def named(a: Statistics, b: Statistics) -> str:
    """The protocol, with what was done to either side."""
    done = [f"{name}{s.origin.protocol.removeprefix(s.origin.base)}" for name, s in (("A", a), ("B", b))]
    return " ".join([a.origin.base, *(d for d in done if len(d) > 1)])


def report(result: dict[str, Any], habit: int) -> None:
    counts = f"n = {result['n'] or 'unknown'} against {result['n_reference'] or 'unknown'}"
    label = f", {result['label']}" if result["label"] else ""
    print(f"FID {result['fid']:.4f}   protocol {result['protocol']}, {counts}, {result['precision']}{label}")
    if "kid" in result:
        k = result["kid"]
        print(f"KID {k['mean']:.6f} +- {k['std']:.6f}   {k['subsets']} subsets of {k['subset_size']}")
    if "prdc" in result:
        print("   ".join(f"{name} {value:.4f}" for name, value in result["prdc"].items() if name != "neighbours"))
    if result["n"] is not None and result["n"] != habit:
        print(f"note: published figures under this protocol mostly use {habit} images", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
