"""The Frechet Inception distance between two sets of images, under a named protocol.

    python -m bvae.fid A B [--protocol tf1|pytorch-fid|clean] [--kid] [--prdc] [--json PATH]
    python -m bvae.fid A --save-stats A.npz

A is the reference (real images), B what is judged. Each is a folder or an archive of images, a prepared store, CIFAR's,
STL-10's, SVHN's or MNIST's files, .npy or .npz of uint8 pixels or floats in [0,1], or statistics (of --save-stats or of
another tool). Where there are splits, `PATH:train` or `PATH:test` names one. docs/fid.md explains the protocols.
"""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bvae.errors import UserError, run_command
from bvae.files import check_output, encode_json, given_path, given_text, write_atomically
from bvae.metrics.cache import VARIABLE, Cache, default_folder
from bvae.metrics.extract import Extractor
from bvae.metrics.inception import FEATURES
from bvae.metrics.kid import SUBSET_SIZE, SUBSETS, kid
from bvae.metrics.measure import look_up, measure
from bvae.metrics.prdc import NEIGHBOURS, prdc
from bvae.metrics.protocols import DEFAULT, PROTOCOLS
from bvae.metrics.sources import Images, open_images
from bvae.metrics.statistics import Statistics, check_dimension, check_enough, fid, save_statistics
from bvae.metrics.weights import DOWNLOAD, find_weights, load_inception
from bvae.world import World

LESS_MEMORY = "lower --batch-size, or give smaller images"


@dataclass
class Side:
    """A or B. name, path: as the user knows it. found: its statistics, once they are there."""

    name: str
    path: str
    content: Images | Statistics
    found: Statistics | None = None

    @property
    def images(self) -> Images | None:
        return self.content if isinstance(self.content, Images) else None


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bvae.fid", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("a", metavar="A", help="the reference")
    add("b", metavar="B", nargs="?", help="what is judged")
    add("--protocol", "--fid-protocol", choices=PROTOCOLS, help=f"default {DEFAULT}, or that of given statistics")
    add("--inception", type=given_text, help=f"weights of the network, or `{DOWNLOAD}` (where none are found)")
    add("--precision", choices=("fp32", "bf16"), help="of the network (fp32)")
    add("--kid", action="store_true", help=f"kernel distance too, {SUBSETS} subsets of {SUBSET_SIZE}")
    add("--prdc", action="store_true", help="precision, recall, density and coverage too")
    add("--num", "--fid-num", type=positive, help="use the first so many images of each side")
    add("--drop-last", type=positive, metavar="BATCH", help="drop what does not fill a batch of so many")
    add("--jpeg-roundtrip", action="store_true", help="pass A through JPEG (quality 75, 4:2:0) first")
    add("--stretch", action="store_true", help="stretch each image of B to its own range (Dai & Wipf)")
    add("--grey", action="store_true", help="take grey images too, their channel repeated")
    add("--allow-few", action="store_true", help="measure fewer than 2048 images too, and label it")
    add("--save-stats", type=given_path, metavar="PATH.npz", help="write the statistics of A, without B")
    add("--batch-size", type=positive, help="images through the network at a time")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--seed", type=not_negative, help="of KID's subsets (0)")
    cache = parser.add_mutually_exclusive_group()
    cache.add_argument("--cache", type=given_path, help=f"folder for statistics, ${VARIABLE} or ~/.cache/bvae")
    cache.add_argument("--no-cache", action="store_true", help="measure anew, and keep nothing")
    add("--json", type=given_path, help="also write the result to this file")
    args = parser.parse_args(argv)
    if (args.b is None) == (args.save_stats is None):
        parser.error("give A and B, or A and --save-stats")
    if args.save_stats is not None:
        _refuse_useless(args, "--save-stats, which compares nothing", "json", "kid", "prdc", "stretch", "seed")
        if args.save_stats.suffix.lower() != ".npz":
            raise UserError(f"--save-stats {args.save_stats}: the name must end in .npz")
    if args.seed is not None and not args.kid:
        _refuse_useless(args, "figures other than --kid", "seed")
    return args


def _refuse_useless(args: argparse.Namespace, beside: str, *options: str) -> None:
    """Refuses options that are given and would have no effect."""
    for option in options:
        if getattr(args, option) not in (None, False):
            raise UserError(f"--{option.replace('_', '-')} has no effect on {beside}: leave it out")


def positive(text: str) -> int:
    return _at_least(1, text)


def not_negative(text: str) -> int:
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, not {text}")
    return int(text)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    with World.join() as world:
        run(args, world.connect(args.device))


def run(args: argparse.Namespace, world: World) -> None:
    """Everything that can be refused is refused before the network sees the first image."""
    if world.first:
        check_outputs(args)
    sides = [open_side(args, name, path) for name, path in (("A", args.a), ("B", args.b)) if path is not None]
    protocol = choose_protocol(args, sides)
    label = check_sides(args, sides)
    if world.first:
        for side in sides:
            for note in side.content.notes:
                print(f"note: {side.name} ({side.path}): {note}", file=sys.stderr)
    extractor = None
    if any(side.images for side in sides):
        # One rank downloads, where it must; the others then find what it has fetched.
        path = find_weights(args.inception) or (find_weights(DOWNLOAD) if world.first else None)
        world.wait()
        path = path or find_weights(DOWNLOAD)
        assert path is not None
        network, weights = load_inception(path, world.device, args.precision or "fp32")
        extractor = Extractor(network, weights, PROTOCOLS[protocol or DEFAULT], args.batch_size)
    read_sides(sides, say=world.first)
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
        **origins(sides, protocol, a, b),
        "n": b.n,
        "n_reference": a.n,
        "features": len(a.mean),
        "label": label,
        "a": args.a,
        "b": args.b,
    }
    if args.kid and a.features is not None and b.features is not None:
        mean, deviation = kid(a.features, b.features, seed=args.seed or 0)
        size = min(SUBSET_SIZE, len(a.features), len(b.features))
        result["kid"] = {"mean": mean, "std": deviation, "subsets": SUBSETS, "subset_size": size}
    if args.prdc and a.features is not None and b.features is not None:
        result["prdc"] = {**prdc(a.features, b.features), "neighbours": NEIGHBOURS}
    report(result, PROTOCOLS[protocol].habit if protocol else None)
    if args.json:
        write_atomically(args.json, encode_json(result, indent=2).encode() + b"\n")


# ---- what is refused first ------------------------------------------------------------------------------------------


def check_outputs(args: argparse.Namespace) -> None:
    for option, path in (("--json", args.json), ("--save-stats", args.save_stats)):
        if path is None:
            continue
        for given in (args.a, args.b):
            if given is not None and path.exists() and Path(given).exists() and path.samefile(given):
                raise UserError(f"{option} {path}: would replace what is measured")
        check_output(path)


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Says in a UserError of the block which side it is about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def open_side(args: argparse.Namespace, name: str, path: str) -> Side:
    with naming(name):
        content = open_images(path, args.grey)
        if isinstance(content, Images):
            if args.num and content.n < args.num:
                content.notes += (f"has {content.n} images, fewer than --num {args.num}",)
            content = content.first(min(content.n, args.num or content.n))
            content = content.first(content.n // args.drop_last * args.drop_last if args.drop_last else content.n)
        return Side(name, path, content)


def check_sides(args: argparse.Namespace, sides: list[Side]) -> str | None:
    """The label of the result. Raises UserError for sides that cannot be measured or compared as is asked."""
    label = None
    measured = any(side.images for side in sides)
    if not measured:
        options = ("kid", "prdc", "inception", "precision", "num", "drop_last", "jpeg_roundtrip", "stretch", "grey")
        if args.kid or args.prdc:
            raise UserError(f"{sides[0].path}: --kid and --prdc need images, not their statistics")
        _refuse_useless(args, "statistics on both sides", *options, "batch_size", "cache", "no_cache")
    least = max(2, NEIGHBOURS + 1 if args.prdc else 0)
    for side in sides:
        with naming(side.name):
            label = check_enough(side.content.n, side.path, args.allow_few) or label
            if side.images:
                if side.images.n < least:
                    what = "precision and recall need" if least > 2 else "a covariance needs"
                    raise UserError(f"{side.path}: {side.images.n} image(s): {what} at least {least}")
                continue
            if args.kid or args.prdc:
                raise UserError(f"{side.path}: --kid and --prdc need images, not their statistics")
            if (args.jpeg_roundtrip and side.name == "A") or (args.stretch and side.name == "B"):
                raise UserError(f"{side.path}: statistics cannot be changed: give the images")
            if measured and isinstance(side.content, Statistics):
                check_dimension(side.content, side.path)
    return label


def read_sides(sides: list[Side], say: bool) -> None:
    """Reads all images once: refuses what their headers or values show to be unusable, and notes different sizes."""
    for side in sides:
        if side.images:
            with naming(side.name):
                side.images.digest()
    sizes = [side.images.size for side in sides if side.images]
    if say and len(set(sizes)) > 1:
        (a_height, a_width), (b_height, b_width) = (size or (0, 0) for size in sizes)
        text = (
            f"A is of {a_width}x{a_height}, B of {b_width}x{b_height}: each is resized to the network's size by itself"
        )
        print(f"note: {text}", file=sys.stderr)


def choose_protocol(args: argparse.Namespace, sides: list[Side]) -> str | None:
    """--protocol, or what the given statistics were made under; None where neither says. Raises UserError where they
    contradict."""
    protocol = args.protocol
    measured = any(side.images for side in sides)
    for side in sides:
        if isinstance(side.content, Statistics) and side.content.origin.base is not None:
            origin = side.content.origin
            if origin.base not in PROTOCOLS:
                raise UserError(f"{side.path}: statistics under a protocol {origin.base!r}, which is not known here")
            if protocol not in (None, origin.base):
                source = "--protocol" if args.protocol else "the other side"
                raise UserError(f"{side.path}: statistics under the protocol {origin.base}; {source} says {protocol}")
            if origin.precision not in (None, args.precision or "fp32") and measured:
                raise UserError(f"{side.path}: made with --precision {origin.precision}: give the same")
            protocol = origin.base
    return protocol or (DEFAULT if measured else None)


# ---- measuring ------------------------------------------------------------------------------------------------------


def statistics_of(
    args: argparse.Namespace, sides: list[Side], extractor: Extractor | None, world: World
) -> list[Statistics]:
    folder = None if args.no_cache else args.cache or default_folder()
    if folder is None and not args.no_cache and extractor is not None and world.first:
        print(f"note: statistics are not kept: this user has no home folder; set ${VARIABLE}", file=sys.stderr)
    cache = Cache(folder)
    options = {
        side.name: {
            "jpeg": args.jpeg_roundtrip and side.name == "A",
            "stretched": args.stretch and side.name == "B",
            "keep": args.kid or args.prdc,
            "rank": world.rank,
            "ranks": world.size,
        }
        for side in sides
    }
    for side in sides:  # all are decoded before the first goes through the network
        if isinstance(side.content, Statistics):
            side.found = side.content
        elif extractor is not None:
            with naming(side.name):
                side.found = look_up(side.content, extractor, cache, **options[side.name])
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not world.first) as progress:
        for side in sides:
            if side.found is not None or side.images is None:
                continue
            assert extractor is not None
            total = side.images.n if world.size == 1 else None  # the other ranks' images are not counted here
            task = progress.add_task(f"{side.name} {side.images.name}", total=total)
            with naming(side.name):
                side.found = measure(
                    side.images,
                    extractor,
                    cache,
                    progress=lambda n, task=task: progress.advance(task, n),  # type: ignore[misc]
                    **options[side.name],
                )
    return [side.found.to(world.device) for side in sides if side.found is not None]


# ---- the result -----------------------------------------------------------------------------------------------------


def origins(sides: list[Side], protocol: str | None, a: Statistics, b: Statistics) -> dict[str, Any]:
    """The protocol, with what was done to either side; precision and weights; of which sides nobody knows these."""
    done = [
        f"{name}{s.origin.protocol.removeprefix(s.origin.base)}"
        for name, s in (("A", a), ("B", b))
        if s.origin.protocol and s.origin.base
    ]
    return {
        "protocol": " ".join([protocol or "unknown", *(d for d in done if len(d) > 1)]),
        "unknown_origin": [name for name, s in (("A", a), ("B", b)) if s.origin.protocol is None],
        "precision": a.origin.precision or b.origin.precision,
        "weights": a.origin.weights or b.origin.weights,
    }


def report(result: dict[str, Any], habit: int | None) -> None:
    about = [
        f"protocol {result['protocol']}",
        f"n = {result['n'] or 'unknown'} against {result['n_reference'] or 'unknown'}",
        result["precision"],
        f"{result['features']} features" if result["features"] != FEATURES else None,
        result["label"],
        f"{' and '.join(result['unknown_origin'])}: origin unknown" if result["unknown_origin"] else None,
    ]
    print(f"FID {result['fid']:.4f}   {', '.join(part for part in about if part)}")
    if "kid" in result:
        k = result["kid"]
        print(f"KID {k['mean']:.6f} +- {k['std']:.6f}   {k['subsets']} subsets of {k['subset_size']}")
    if "prdc" in result:
        print("   ".join(f"{name} {value:.4f}" for name, value in result["prdc"].items() if name != "neighbours"))
    if result["unknown_origin"]:
        which = " and ".join(result["unknown_origin"])
        print(
            f"note: the file of {which} does not say how it was made; the figure means something only if that was the "
            "protocol named here, with the same network",
            file=sys.stderr,
        )
    if habit is not None and result["n"] is not None and result["n"] != habit:
        print(f"note: published figures under this protocol mostly use {habit} images", file=sys.stderr)


if __name__ == "__main__":
    run_command(main, LESS_MEMORY)
