"""Which images are for train, val and test: by an official list, by sub-folders, or by fractions and a seed."""

import hashlib
import os
import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from bvae.data.archive import PARTITION_LISTS, SPLIT_FOLDERS, SUFFIXES, Source, UnusableItem
from bvae.data.recipe import Rejected
from bvae.data.refusal import refusal
from bvae.errors import UserError

Fractions = tuple[Fraction, Fraction, Fraction]  # of train, val and test

SPLITS = ("train", "val", "test")
TRAIN, VAL, TEST = range(3)
UNLISTED = -1  # a partition list is in use, and the image is not in it
OUTSIDE = -2  # train/ and test/ are in use, and the image lies beside them

HELD_OUT = 10  # one image in so many becomes test where a source does not say
MAX_LIST = 2**28  # bytes of a partition list; CelebA's has 3 million


@dataclass(frozen=True)
class Plan:
    """What becomes of each item of a source.

    part: int8 [items], TRAIN, VAL, TEST, UNLISTED or OUTSIDE.
    how: in a few words, for people.
    description: for meta.json.
    """

    part: np.ndarray
    how: str
    description: dict[str, Any]


def make_plan(
    source: Source,
    *,
    partition: Path | None = None,
    fractions: Fractions | None = None,
    seed: int = 0,
) -> Plan:
    """Assigns every item of a source to a split.

    The first of these that there is decides: `partition`, a list as CelebA's; `fractions`; such a list in the source,
    or beside it, that names one of its images; sub-folders, of which one is `train`; nine tenths for training and one
    for test. Where sub-folders leave out the test, it is a tenth of `train`.

    Args:
        source: the images.
        partition: a file of lines `name number`, or CSV, with 0 (train), 1 (val) or 2 (test).
        fractions: of train, val and test; their sum is 1.
        seed: of the choice by fractions.

    Raises:
        UserError: for a list that cannot be read or fits no image, and if train or test would be empty.
    """
    if partition is not None and fractions is not None:
        raise UserError("--partition and --split contradict each other: both say which image is for what")
    if partition is not None:
        plan = _by_list(source, str(partition), partition.name, _read_file(partition))
        if plan is None:
            raise refusal(partition, f"names none of the {len(source.items)} images of {source.path}")
    elif fractions is not None:
        plan = _by_fractions(source, fractions, seed)
    else:
        plan = _by_found_list(source) or _by_folders(source, seed) or _by_default(source, seed)
    for split in (TRAIN, TEST):
        if not (plan.part == split).any():
            raise refusal(source.path, f"no image is for {SPLITS[split]} (split by {plan.how})")
    return plan


def parse_fractions(text: str) -> Fractions:
    """`0.8,0.1,0.1` -> fractions of train, val and test. Raises ValueError."""
    # Without exponents: one of eight digits takes hours.
    if not re.fullmatch(r"[\d\s.,/+-]{1,100}", text):
        raise ValueError("numbers are expected")
    train, val, test = (Fraction(part) for part in text.split(","))
    if min(train, val, test) < 0 or train + val + test != 1:
        raise ValueError("three fractions that add up to 1 are expected")
    return train, val, test


def parse_list(data: bytes, where: str) -> dict[str, int]:
    """A partition list's lines -> {name: TRAIN, VAL or TEST}.

    Args:
        data: `000001.jpg 0` a line, as CelebA's list_eval_partition.txt, or CSV, with or without a heading.
        where: the list's name, for messages.

    Raises:
        UserError: naming the line that is not of this form, or that contradicts another.
    """
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise refusal(where, "not a partition list", error) from error
    numbers = {"0": TRAIN, "1": VAL, "2": TEST}
    fields = " ".join(lines).split(" ")
    if len(fields) == 2 * len(lines) == 2 * len(set(fields[::2])) and set(fields[1::2]) <= set(numbers):
        return dict(zip(fields[::2], map(numbers.__getitem__, fields[1::2]), strict=True))  # CelebA's own, at once
    parts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        fields = line.rsplit("," if "," in line else None, 1)
        name, value = (text.strip().strip('"') for text in (fields if len(fields) == 2 else ("", line)))
        if number == 1 and len(lines) > 1 and name and not name.lower().endswith(SUFFIXES) and not value.isdigit():
            continue  # the heading of a CSV
        if not name or value not in numbers:
            raise refusal(where, f"line {number} is no `name 0`, 1 (val) or 2 (test): {line[:80]!r}")
        if parts.setdefault(name, numbers[value]) != numbers[value]:
            raise refusal(where, f"line {number} puts {name} into another part than a line before")
    if not parts:
        raise refusal(where, "holds no lines")
    return parts


def _by_found_list(source: Source) -> Plan | None:
    """The list inside the source that lies highest, or the one beside it, if it has to do with these images."""
    for item in sorted(source.lists, key=lambda item: (item.name.count("/"), item.name)):
        try:
            data = item.read()
        except Rejected as error:
            raise refusal(source.where(item), str(error)) from error
        if plan := _by_list(source, source.where(item), os.path.basename(item.name), data):
            return plan
    folders = {os.path.dirname(os.path.abspath(path)) for path in (Path(source.path), *source.files)}
    for folder in sorted(folders):
        for name in PARTITION_LISTS:
            path = Path(folder, name)
            if path.is_file() and (plan := _by_list(source, str(path), name, _read_file(path))):
                return plan
    return None


def _by_list(source: Source, where: str, name: str, data: bytes) -> Plan | None:
    """A list, called `where` in messages.

    It names images by their path in the source or, as CelebA's, by the last part of it; if none of these is there, by
    that without its suffix, so that it also serves for images stored in another format.
    """
    parts = parse_list(data, where)
    part, met = _look_up(source, parts)
    if not met:
        parts = {os.path.splitext(name)[0]: number for name, number in parts.items()}
        part, met = _look_up(source, parts, suffix=False)
    if not met:
        return None
    without = len(parts) - len(met)
    description = {
        "by": "list",
        "list": name,
        "digest": f"sha256:{hashlib.sha256(data).hexdigest()}",
        "lines": len(parts),
        "lines_without_image": without,
        "images_not_in_list": int((part == UNLISTED).sum()),
    }
    how = f"{name}" + (f", of which {without} of {len(parts)} lines have no image here" if without else "")
    return Plan(part, how, description)


def _look_up(source: Source, parts: dict[str, int], suffix: bool = True) -> tuple[np.ndarray, set[str]]:
    """(the part of each item, the names that were found)."""
    part = np.full(len(source.items), UNLISTED, np.int8)
    met = set()
    for number, item in enumerate(source.items):
        path = item.name if suffix else os.path.splitext(item.name)[0]
        name = path if path in parts else path.rpartition("/")[2]
        if name in parts:
            part[number] = parts[name]
            met.add(name)
    return part, met


def _by_folders(source: Source, seed: int) -> Plan | None:
    depth = _split_depth(source)
    if depth is None:
        return None
    part = np.full(len(source.items), OUTSIDE, np.int8)
    for number, item in enumerate(source.items):
        pieces = item.name.split("/", depth + 1)
        if len(pieces) > depth + 1:
            part[number] = SPLIT_FOLDERS.get(pieces[depth].lower(), OUTSIDE)
    for folder in sorted(source.split_folders):
        split = SPLIT_FOLDERS[folder.rpartition("/")[2].lower()]
        if folder.count("/") == depth and split != VAL and not (part == split).any():
            raise refusal(os.path.join(source.path, folder), "holds no images")
    description: dict[str, Any] = {"by": "folders", "images_outside": int((part == OUTSIDE).sum())}
    how = "sub-folders"
    if not (part == TEST).any():
        part[hold_out(source.path, _usable(source, part == TRAIN), seed)] = TEST
        description |= {"test": f"1/{HELD_OUT} of train", "seed": seed}
        how += f", a tenth of train for test (seed {seed})"
    return Plan(part, how, description)


def _split_depth(source: Source) -> int | None:
    """The depth at which there is a folder `train`, below folders that all images have in common."""
    # The names are sorted: what the first and the last have in common, all have.
    prefix = os.path.commonprefix([source.items[0].name, source.items[-1].name])  # noqa: RUF071 (cut below)
    common = prefix.split("/")[:-1]
    for depth, folder in enumerate(common):
        if folder.lower() == "train":
            return depth
    start = sum(len(folder) + 1 for folder in common)
    below = (item.name[start:].partition("/") for item in source.items)
    return len(common) if any(slash and folder.lower() == "train" for folder, slash, _ in below) else None


def hold_out(where: Path | str, among: np.ndarray, seed: int) -> np.ndarray:
    """A tenth, at least one, of so many numbers, at random in the seed.

    Args:
        where: for messages.
        among: int [N].

    Raises:
        UserError: if there is a single one.
    """
    if len(among) < 2:
        raise refusal(where, "holds a single image; at least two are needed, one to train on and one to test on")
    return among[np.random.default_rng(seed).permutation(len(among))[: max(1, len(among) // HELD_OUT)]]


def _usable(source: Source, among: np.ndarray) -> np.ndarray:
    """The numbers of the items among which a split is drawn: not those that the listing shows to be of no use.

    All, if less than two are left: then it is the first of them that tells the user what is wrong.
    """
    numbers = np.flatnonzero(among)
    usable = [number for number in numbers.tolist() if not isinstance(source.items[number], UnusableItem)]
    return np.array(usable) if len(usable) > 1 else numbers


def _by_default(source: Source, seed: int) -> Plan:
    part = np.full(len(source.items), TRAIN, np.int8)
    part[hold_out(source.path, _usable(source, part == TRAIN), seed)] = TEST
    return Plan(
        part, f"a tenth for test (seed {seed})", {"by": "fractions", "fractions": ["9/10", "0", "1/10"], "seed": seed}
    )


def _by_fractions(source: Source, fractions: Fractions, seed: int) -> Plan:
    part = np.full(len(source.items), TRAIN, np.int8)
    order = np.random.default_rng(seed).permutation(_usable(source, part == TRAIN))
    count = len(order)
    tests = max(1, int(count * fractions[TEST])) if fractions[TEST] else 0
    part[order[:tests]] = TEST
    part[order[tests : tests + int(count * fractions[VAL])]] = VAL
    words = ", ".join(str(float(fraction)) for fraction in fractions)
    return Plan(
        part,
        f"fractions {words} (seed {seed})",
        {"by": "fractions", "fractions": [str(fraction) for fraction in fractions], "seed": seed},
    )


def _read_file(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_LIST + 1)
    except OSError as error:
        raise refusal(path, "cannot be read", error) from error
    if len(data) > MAX_LIST:
        raise refusal(path, f"has more than {MAX_LIST} bytes: not a partition list")
    return data
