"""python -m bvae.data.prep: turns a folder or archive of images into a prepared store, for `--data` of the trainer.

Images that cannot be used are listed with their reasons in the store's rejects.csv. See docs/prepare.md.
"""

import argparse
import dataclasses
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bvae.data import idx, images, named
from bvae.data.archive import Source, count, open_source
from bvae.data.decoders import Backend, Decoder, open_decoder
from bvae.data.preview import write_preview
from bvae.data.recipe import FILTERS, Crop, Recipe, Size
from bvae.data.refusal import refusal
from bvae.data.splits import OUTSIDE, SPLITS, Fractions, Plan, make_plan, parse_fractions
from bvae.data.store import REJECTS, StoreWriter
from bvae.errors import UserError, run_command
from bvae.files import given_path, given_text

LESS_MEMORY = "use fewer --workers"
PREVIEWED = 64  # images of a source that --preview looks at, until it has enough that can be used


@dataclass(frozen=True)
class Preset:
    """The form that a data set's images mostly get. says: for --help."""

    size: Size
    crop: Crop
    says: str


PRESETS = {
    "celeba": Preset(
        64,
        128,
        """CelebA (img_align_celeba.zip, Kaggle's archive, a folder, ...) into a prepared store, as the paper has it.

The centred square of 128 pixels, rows 45:173 and columns 25:153, resized to 64 with an antialiasing bilinear filter;
split by list_eval_partition.txt, which is looked for in the archive and beside it. Papers also use --crop 140, 148,
178 and none: see docs/prepare.md.""",
    )
}


@dataclass(frozen=True)
class Result:
    """path: the store. meta: what its meta.json holds. rejects: (name, reason). seconds: decoding and writing took."""

    path: Path
    meta: dict[str, Any]
    rejects: list[tuple[str, str]]
    seconds: float


def prepare(
    source: Path | str,
    out: Path | str,
    recipe: Recipe,
    *,
    backend: Backend = "auto",
    workers: int | None = None,
    device: Literal["cpu", "cuda"] | None = None,
    partition: Path | str | None = None,
    fractions: Fractions | None = None,
    seed: int | None = None,
    strict: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] | None = None,
) -> Result:
    """Makes a prepared store of a source of images.

    Args:
        source: what `bvae.data.archive.open_source` takes, or a folder with MNIST's idx files.
        out: the store's folder.
        recipe: what becomes of an image.
        backend, workers, device: of the decoder, see `bvae.data.decoders.open_decoder`.
        partition, fractions, seed: which image is for what, see `bvae.data.splits.make_plan`; the seed is 0 by default.
        strict: end with the first image that cannot be used.
        overwrite: replace a store that is there, once the new one is complete.
        say: takes lines for the user; with it, progress is shown on stderr.

    Raises:
        UserError: in one line, whatever is wrong; then there is no store, or the one that was there.
    """
    begin, quiet = time.monotonic(), say is None
    rejects: list[tuple[str, str]] = []
    say = say or (lambda line: None)
    if not str(source):
        raise UserError("the source is empty: a folder or an archive is expected")
    with StoreWriter(out, overwrite) as writer:
        if files := idx.find(Path(source)):
            if partition is not None or fractions is not None:
                raise refusal(source, "idx files have their own split: leave out --partition and --split")
            meta = _write_idx(str(source), files, writer, recipe)
        else:
            if known := named.find(Path(source)):
                raise refusal(source, f"is {known.title}, which needs no preparing: give it to --data as it is")
            opened = open_source(source)
            if strict and opened.unread:
                raise refusal(opened.path, " ".join(opened.unread[0]))
            plan = make_plan(opened, partition=partition, fractions=fractions, seed=seed or 0)
            say(f"{opened.path}: {count(len(opened.items), 'image')}, split by {plan.how}")
            for line in (*opened.left_out(), *plan.notes):
                say(f"{opened.path}: {line}")
            if seed is not None and "seed" not in plan.description:
                say(f"note: --seed has no effect on a split by {plan.how}")
            with open_decoder(backend, recipe, workers, device) as decoder:
                say(f"decoding with {decoder.name}: {decoder.why}")
                meta, rejects = _write_images(opened, plan, decoder, writer, recipe, strict, quiet)
        meta = writer.finish({"bvae": _own_version(), "recipe": dataclasses.asdict(recipe), **meta}, rejects)
    return Result(Path(out), meta, rejects, time.monotonic() - begin)


def _own_version() -> str:
    try:
        return version("bvae")
    except PackageNotFoundError:  # run from a checkout
        return "not installed"


def _write_images(
    source: Source, plan: Plan, decoder: Decoder, writer: StoreWriter, recipe: Recipe, strict: bool, quiet: bool
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """(what meta.json says of it, rejects)."""
    places = {split: np.flatnonzero(plan.part == number) for number, split in enumerate(SPLITS)}
    writer.allocate({split: len(items) for split, items in places.items()}, recipe.shape)
    with images.SourceDigest(source) as digest:
        rejects = images.decode(
            source,
            plan,
            decoder,
            recipe,
            lambda split, rows, pixels: writer.place(SPLITS[split], rows, pixels),
            splits=range(len(SPLITS)),
            strict=strict,
            quiet=quiet,
        )
        source_digest = digest.result()
    rejects = sorted(rejects + source.unread)
    names = {split: [source.items[i].name for i in items[writer.here[split]]] for split, items in places.items()}
    for split in ("train", "test"):
        if not names[split]:
            name = source.items[places[split][0]].name
            raise refusal(source.path, f"no image for {split} can be used: {name} {dict(rejects)[name]}")
    kept = sum(map(len, names.values()))
    return {
        "source": {"path": source.path, "kind": source.kind, "digest": source_digest},
        "decoder": {"name": decoder.name, "versions": decoder.versions},
        "split": plan.description,
        "counts": {
            "read": kept + len(rejects),
            "kept": kept,
            "rejected": len(rejects),
            "ignored": source.ignored + int((plan.part == OUTSIDE).sum()),
            **{split: len(those) for split, those in names.items()},
        },
        "names": names,
    }, rejects


def _write_idx(source: str, files: tuple[Path, Path], writer: StoreWriter, recipe: Recipe) -> dict[str, Any]:
    """Writes the images; returns the entries of meta.json about them."""
    if recipe.size not in idx.SIDES or recipe.channels != 1:
        raise refusal(
            source, "idx files hold grey images of 28x28, padded on request: --size 28 or --size 32, --channels 1"
        )
    if recipe != Recipe(size=recipe.size, channels=1):
        raise refusal(
            source, "idx files are padded, not cropped and resized: leave out --crop, --filter, --no-antialias"
        )
    padding = idx.edge(recipe.size)
    train, test = (idx.read(file, padding) for file in files)
    arrays = {"train": train, "val": np.empty((0, *recipe.shape), np.uint8), "test": test}
    counts = {split: len(array) for split, array in arrays.items()}
    writer.allocate(counts, recipe.shape)
    for split, array in arrays.items():
        writer.place(split, np.arange(len(array)), array)
    names = {"train": files[0].name, "val": "", "test": files[1].name}
    kept = sum(counts.values())
    return {
        "source": {
            "path": source,
            "kind": "idx",
            "digest": images.digest_of_files((file.name, file, None) for file in files),
        },
        "recipe": {"size": recipe.size, "channels": 1, "padding": padding},
        "decoder": {"name": "idx", "versions": {"numpy": np.__version__}},
        "split": {"by": "files"},
        "counts": {"read": kept, "kept": kept, "rejected": 0, "ignored": 0, **counts},
        "names": {split: [f"{names[split]}[{i}]" for i in range(count)] for split, count in counts.items()},
    }


def main(argv: list[str] | None = None, *, prog: str = "python -m bvae.data.prep", preset: str | None = None) -> None:
    """The command line, with the defaults of a data set where `preset` is one of PRESETS."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=PRESETS[preset].says if preset else __doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source", type=given_text, help="a folder, .zip, .tar, compressed tar, pattern of shards, or MNIST's files"
    )
    parser.add_argument("--out", type=given_path, metavar="DIR", help="the store, a folder")
    parser.add_argument("--preview", type=given_path, metavar="PNG", help="draw the first images under each filter")
    parser.add_argument("--preset", choices=PRESETS, default=preset, help="a data set's size and crop")
    parser.add_argument(
        "--size", "--side", type=parse_size, metavar="S", help="side of the result, or HxW, its height and width"
    )
    parser.add_argument(
        "--crop",
        type=_parse_crop,
        metavar="C",
        help="shorter side of the centred box of the result's aspect that is kept; `square`, the largest such box (the "
        "default without a preset); `none`, the whole image",
    )
    parser.add_argument("--filter", choices=FILTERS, default="bilinear", help="filter of the resize (bilinear)")
    parser.add_argument("--no-antialias", action="store_true", help="let the filter skip pixels when it shrinks")
    parser.add_argument("--channels", type=int, choices=(1, 3), help="3 (RGB) or 1 (grey); 3, of idx files 1")
    of_store = parser.add_argument_group("of the store")
    of_store.add_argument("--backend", choices=("auto", "dali", "pillow"), default="auto", help="decoder (auto)")
    of_store.add_argument("--workers", type=int, metavar="N", help="processes or threads (one a core)")
    of_store.add_argument("--device", choices=("cpu", "cuda"), help="where DALI decodes (cuda if there is one)")
    of_store.add_argument(
        "--partition",
        type=given_text,
        metavar="FILE",
        help="list of `name 0`, 1 (val) or 2 (test); `folders`, those named as splits alone; `none`, all as one set",
    )
    of_store.add_argument("--split", type=_parse_split, metavar="T,V,E", help="fractions of train, val, test")
    of_store.add_argument("--seed", "--data-seed", type=_parse_seed, help="seed of a random split (0)")
    of_store.add_argument("--strict", action="store_true", help="end with the first image that cannot be used")
    of_store.add_argument("--overwrite", action="store_true", help="replace a store, once the new one is complete")
    args = parser.parse_args(argv)
    if args.out is None and args.preview is None:
        parser.error("--out or --preview is required")
    chosen = PRESETS.get(args.preset)
    if args.size is None and chosen is None:
        parser.error("--size is required, or a --preset")
    if args.out is None:
        for option in ("backend", "workers", "device", "partition", "split", "seed", "strict", "overwrite"):
            if getattr(args, option) != parser.get_default(option):
                parser.error(f"--{option} has no effect without --out")

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    is_idx = idx.find(Path(args.source)) is not None
    recipe = Recipe(
        size=args.size or chosen.size,  # type: ignore[union-attr]  # there is one of them
        channels=args.channels or (1 if is_idx else 3),
        crop=args.crop or (chosen.crop if chosen else "square"),
        filter=args.filter,
        antialias=not args.no_antialias,
    )
    if args.preview is not None:
        _preview(args.source, args.preview, recipe, is_idx)
    if args.out is None:
        return
    result = prepare(
        args.source,
        args.out,
        recipe,
        backend=args.backend,
        workers=args.workers,
        device=args.device,
        partition=args.partition,
        fractions=args.split,
        seed=args.seed,
        strict=args.strict,
        overwrite=args.overwrite,
        say=say,
    )
    print(summary(result))


def _preview(source: str, file: Path, recipe: Recipe, is_idx: bool) -> None:
    if is_idx:
        raise refusal(source, "idx files are not resized: there is nothing for --preview to show")
    if file.resolve().is_relative_to(Path(source).resolve()):
        raise refusal(file, "lies in the source, where --preview writes nothing")
    chunks = open_source(source).chunks(lambda number: number < PREVIEWED)
    shown = write_preview((item for _, items in chunks for item in items), recipe, file)
    print(f"{file}: {count(shown, 'image')} under each filter")


def summary(result: Result) -> str:
    """A summary of the work done, in a few lines."""
    counts = result.meta["counts"]
    lines = []
    if result.rejects:
        name, reason = result.rejects[0]
        lines.append(f"rejected, listed in {result.path / REJECTS}; the first: {name!r} {reason}")
    ignored = f"; {count(counts['ignored'], 'other file')} ignored" if counts["ignored"] else ""
    lines.append(f"read {counts['read']} = kept {counts['kept']} + rejected {counts['rejected']}{ignored}")
    parts = ", ".join(f"{split} {counts[split]}" for split in SPLITS)
    rate = counts["read"] / max(result.seconds, 1e-9)
    lines.append(f"{result.path}: {parts}; {result.seconds:.1f} s, {rate:.0f} images/s")
    return "\n".join(lines)


def parse_size(text: str) -> Size:
    """`64`, or `96x64` (height x width)."""
    if not re.fullmatch(r"\d{1,6}(x\d{1,6})?", text):
        raise argparse.ArgumentTypeError(f"a number of pixels, or HxW, is expected, not {text!r}")
    height, _, width = text.partition("x")
    return (int(height), int(width)) if width else int(height)


def _parse_crop(text: str) -> Crop:
    if text in ("square", "none"):
        return text  # type: ignore[return-value]
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a number of pixels, `square` or `none` is expected, not {text!r}")
    return int(text)


def _parse_split(text: str) -> Fractions:
    try:
        return parse_fractions(text)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"three fractions that add up to 1 are expected, not {text!r}") from None


def _parse_seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"a number of at least 0 is expected, not {text!r}")
    return int(text)


if __name__ == "__main__":
    run_command(main, LESS_MEMORY)
