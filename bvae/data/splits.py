"""Which images are for train, val and test: by an official list, by sub-folders, or by fractions and a seed."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from bvae.data.archive import Source, UnusableItem, count
from bvae.data.lists import (
    MAPPINGS,
    PARTITION_LISTS,
    TEST,
    TRAIN,
    VAL,
    is_mapping,
    parse_list,
    parse_mapping,
    spellings,
    split_word,
)
from bvae.data.recipe import Rejected
from bvae.data.refusal import refusal
from bvae.errors import UserError

Fractions = tuple[Fraction, Fraction, Fraction]  # of train, val and test

SPLITS = ("train", "val", "test")
UNLISTED = -1  # a partition list is in use, and the image is not in it
OUTSIDE = -2  # train/ and test/ are in use, and the image lies beside them

NONE, FOLDERS = "none", "folders"  # what `partition` may be beside a file
HELD_OUT = 10  # one image in so many becomes test where a source does not say
MAX_LIST = 2**28  # bytes of a partition list; CelebA's has 3 million
AMBIGUOUS = (
    "--partition folders takes the folders that are named as splits and leaves the others out, --partition none takes "
    "all images as one set"
)


@dataclass(frozen=True)
class Plan:
    """What becomes of each item of a source.

    part: int8 [items], TRAIN, VAL, TEST, UNLISTED or OUTSIDE.
    how: in a few words, for people.
    description: for meta.json.
    notes: lines for people: what was guessed, and what is left out.
    """

    part: np.ndarray
    how: str
    description: dict[str, Any]
    notes: tuple[str, ...] = ()


def make_plan(
    source: Source,
    *,
    partition: Path | str | None = None,
    fractions: Fractions | None = None,
    seed: int = 0,
) -> Plan:
    """Assigns every item of a source to a split.

    The first of these that there is decides: `partition`, a list as CelebA's; `fractions`; such a list in the source,
    or beside it, that names one of its images; sub-folders or archives with the names of splits; nine tenths for
    training and one for test. Where sub-folders leave out the test, it is a tenth of `train`. Images are left out only
    where the user has said so; where names leave it open what an image is for, this is refused.

    Args:
        source: the images.
        partition: a file of lines `name number`, or CSV, with 0 or `train`, 1 or `val`, 2 or `test`; "folders", to go
            by the names of folders alone and leave out images beside them; "none", to take all images as one set. Such
            a file is given as `./none`.
        fractions: of train, val and test; their sum is 1.
        seed: of the choice by fractions.

    Raises:
        UserError: for a list that cannot be read or fits no image, where names contradict each other, and if train or
            test would be empty.
    """
    if partition not in (None, NONE) and fractions is not None:
        raise UserError("--partition and --split contradict each other: both say which image is for what")
    plan: Plan | None
    if fractions is not None:
        plan = _by_fractions(source, fractions, seed)
    elif partition == NONE:
        plan = _by_default(source, seed)
    elif partition == FOLDERS:
        plan = _by_folders(source, seed, others_may_be_left_out=True)
        if plan is None:
            raise refusal(source.path, "--partition folders: there is no folder or archive `train`")
    elif partition is not None:
        if is_mapping(str(partition)):
            raise refusal(partition, f"is CelebA-HQ's mapping; give CelebA's {PARTITION_LISTS[0]}, with this beside it")
        plan = _by_list(source, str(partition), Path(partition).name, _read_file(Path(partition)))
        if plan is None:
            raise refusal(partition, f"names none of the {len(source.items)} images of {source.path}")
    else:
        plan = _by_found_list(source)
        if plan is None:
            plan = _by_folders(source, seed) or _by_default(source, seed, check=True)
            plan = replace(plan, notes=(*plan.notes, *_about_mapping(source)))
    for split in (TRAIN, TEST):
        if not (plan.part == split).any():
            way_out = "" if fractions else f"; --partition {NONE} takes all images as one set"
            raise refusal(source.path, f"no image is for {SPLITS[split]} (split by {plan.how}){way_out}")
    return plan


def named_splits(source: Source) -> Plan | None:
    """The plan by a list or by names of folders, whatever lies beside these; None where there is neither."""
    return _by_found_list(source) or _by_folders(source, None, others_may_be_left_out=True)


def parse_fractions(text: str) -> Fractions:
    """`0.8,0.1,0.1` -> fractions of train, val and test. Raises ValueError."""
    # Without exponents: one of eight digits takes hours.
    if not re.fullmatch(r"[\d\s.,/+-]{1,100}", text):
        raise ValueError("numbers are expected")
    train, val, test = (Fraction(part) for part in text.split(","))
    if min(train, val, test) < 0 or train + val + test != 1:
        raise ValueError("three fractions that add up to 1 are expected")
    return train, val, test


def given_fractions(text: str) -> Fractions:
    """`parse_fractions` of the trainer's --split. Raises UserError."""
    try:
        return parse_fractions(text)
    except (ValueError, ZeroDivisionError):
        raise UserError(f"--split: three fractions that add up to 1 are expected, not {text!r}") from None


# ---- by a list ------------------------------------------------------------------------------------------------------


def _by_found_list(source: Source) -> Plan | None:
    """The list inside the source that lies highest, or the one beside it, if it has to do with these images."""
    for item in sorted(source.lists, key=lambda item: (item.name.count("/"), item.name)):
        if is_mapping(item.name):
            continue
        try:
            data = item.read()
        except Rejected as error:
            raise refusal(source.where(item), str(error)) from error
        if plan := _by_list(source, source.where(item), os.path.basename(item.name), data):
            return plan
    for folder in _folders_beside(source):
        for name in PARTITION_LISTS:
            path = Path(folder, name)
            if path.is_file() and (plan := _by_list(source, str(path), name, _read_file(path))):
                note = f"split by {path}, which lies beside the images and names them; --partition none goes without it"
                return replace(plan, notes=(note,))
    return None


def _about_mapping(source: Source) -> tuple[str, ...]:
    """A note where CelebA-HQ's mapping is there, and is of no use."""
    beside = (Path(folder, name) for folder in _folders_beside(source) for name in MAPPINGS[:2])
    if not any(is_mapping(item.name) for item in source.lists) and not any(path.is_file() for path in beside):
        return ()
    return (
        f"CelebA-HQ's mapping is there, but not CelebA's {PARTITION_LISTS[0]}, which gives the split with it: put it "
        "beside the images",
    )


def _folders_beside(source: Source) -> list[str]:
    return sorted({os.path.dirname(os.path.abspath(path)) for path in (Path(source.path), *source.files)})


def _by_list(source: Source, where: str, name: str, data: bytes) -> Plan | None:
    """A list, called `where` in messages.

    It names images by their path in the source or, as CelebA's, by the last part of it; if none of these is there, by
    that without its suffix, so that it also serves for images stored in another format; or, of CelebA-HQ, by what its
    mapping calls them.
    """
    listed = parse_list(data, where)
    extra: dict[str, Any] = {}
    for parts in spellings(listed):
        part, met = _look_up(source, parts)
        if met:
            break
        parts = {os.path.splitext(name)[0]: number for name, number in parts.items()}
        part, met = _look_up(source, parts, suffix=False)
        if met:
            break
    else:
        mapped = _by_mapping(source, listed, where)
        if mapped is None:
            return None
        part, met, extra = mapped
    without = len(listed) - len(met)
    description = {
        "by": "list",
        "list": name,
        "digest": f"sha256:{hashlib.sha256(data).hexdigest()}",
        "lines": len(listed),
        "lines_without_image": without,
        "images_not_in_list": int((part == UNLISTED).sum()),
        **extra,
    }
    how = f"{name}" + (f" and {extra['mapping']}" if extra else "")
    how += f", of which {without} of {len(listed)} lines have no image here" if without else ""
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


def _by_mapping(
    source: Source, listed: dict[str, int], where: str
) -> tuple[np.ndarray, set[str], dict[str, Any]] | None:
    """(the part of each item, the lines met, what to add to the description) of CelebA-HQ's images by their numbers."""
    numbers = _hq_numbers(source)
    if not numbers:
        return None
    found = [(source.where(item), os.path.basename(item.name), item.read) for item in source.lists]
    folders = [*_folders_beside(source), os.path.dirname(os.path.abspath(where))]
    found += [
        (str(path), path.name, lambda path=path: _read_file(path))  # type: ignore[misc]
        for path in (Path(folder, name) for folder in folders for name in MAPPINGS)
        if path.is_file()
    ]
    for place, name, read in found:
        if not is_mapping(name):
            continue
        mapping = parse_mapping(read(), place)
        part = np.full(len(source.items), UNLISTED, np.int8)
        met = set()
        for item, number in numbers.items():
            if (file := mapping.get(number)) in listed:
                part[item] = listed[file]
                met.add(file)
        if met:
            return part, met, {"mapping": name}
    return None


def _hq_numbers(source: Source) -> dict[int, int]:
    """{item: number} of items that are named by a number, as CelebA-HQ's: `42.jpg`, `00042.png`, `imgHQ00042.png`."""
    found = {}
    for item, name in enumerate(item.name for item in source.items):
        if match := re.fullmatch(r"(?:imgHQ)?(\d{1,9})", os.path.splitext(name.rpartition("/")[2])[0]):
            found[item] = int(match[1])
    return found


# ---- by the names of folders and archives ---------------------------------------------------------------------------


def _by_folders(source: Source, seed: int | None, others_may_be_left_out: bool = False) -> Plan | None:
    """By folders, or archives, that are named as splits; None where none is. The highest on an image's path counts.
    Without a test, one is drawn from `train` by the seed, if there is one."""
    groups = _groups(source)
    part = np.full(len(source.items), OUTSIDE, np.int8)
    used: dict[int, set[str]] = {}
    for number, item in enumerate(source.items):
        names = item.name.split("/")[:-1]
        for depth, name in enumerate(names):
            group = groups.get("/".join(names[:depth]))
            if group and name in group:
                part[number] = group[name]
                used.setdefault(group[name], set()).add(name)
                if not others_may_be_left_out:
                    _check_below(source, names[depth + 1 :], item.name, group[name])
                break
    if not used:
        return None
    outside = np.flatnonzero(part == OUTSIDE)
    if not others_may_be_left_out:
        _check_all(source, used, outside)
    _check_empty(source, groups, part)
    description: dict[str, Any] = {"by": "folders", "images_outside": len(outside)}
    how = "archives" if len(source.files) > 1 else "sub-folders"
    if any([name.lower() for name in names] != [SPLITS[split]] for split, names in used.items()):
        how += f" ({'; '.join(f'{SPLITS[split]}: {_some(names)}' for split, names in sorted(used.items()))})"
    notes = (f"{count(len(outside), 'image')} beside the splits left out",) if len(outside) else ()
    if seed is not None and not (part == TEST).any() and (part == TRAIN).any():
        part[hold_out(source.path, _usable(source, part == TRAIN), seed)] = TEST
        description |= {"test": f"1/{HELD_OUT} of train", "seed": seed}
        how += f", a tenth of train for test (seed {seed})"
    return Plan(part, how, description, notes)


def _some(names: Iterable[str]) -> str:
    first = sorted(names)[:4]
    return ", ".join(first[:3]) + (", ..." if len(first) > 3 else "")


def _check_all(source: Source, used: dict[int, set[str]], outside: np.ndarray) -> None:
    """Refuses images beside those of the splits, and images for test without any to train on."""
    named = _some(name for names in used.values() for name in names)
    if len(outside):
        first = source.items[int(outside[0])].name
        raise refusal(
            source.path,
            f"is {named} a split or a class? {count(len(outside), 'image')} beside it, the first {first}, would be "
            f"left out: {AMBIGUOUS}",
        )
    if TRAIN not in used:
        raise refusal(
            source.path,
            f"its images lie in {named}, and there is no `train`: --partition none takes all as one set",
        )


def _groups(source: Source) -> dict[str, dict[str, int]]:
    """{folder: {name of a split's folder in it: split}}, of folders with images whose neighbours' names tell that they
    are splits."""
    children: dict[str, set[str]] = {}
    direct: Counter[str] = Counter()
    seen = set()
    for item in source.items:
        folder, _, _ = item.name.rpartition("/")
        direct[folder] += 1
        if folder in seen:
            continue
        seen.add(folder)
        names = folder.split("/") if folder else []
        for depth, name in enumerate(names):
            children.setdefault("/".join(names[:depth]), set()).add(name)
    groups = {}
    for parent, inside in children.items():
        words = {name: word for name in inside if (word := split_word(name))}
        kinds = {word.split for word in words.values()}
        alike = len(words) == len(inside) and not direct[parent]
        if (
            (alike and TRAIN in kinds)  # cars_train, cars_test
            or any(word.exact for word in words.values())  # train, testA; perhaps a class of that name
            or (TRAIN in kinds and kinds != {TRAIN})
            or (any(word.at_end and word.split == TEST for word in words.values()) and len(inside) + direct[parent] > 1)
        ):
            groups[parent] = {name: word.split for name, word in words.items()}
    return groups


def _check_below(source: Source, names: list[str], item: str, split: int) -> None:
    """Refuses a folder for test in one for training."""
    for name in names:
        word = split_word(name)
        if split == TRAIN and word is not None and word.exact and word.split == TEST:
            raise refusal(source.path, f"{item} is in a folder for training and in one for test: {AMBIGUOUS}")


def _check_empty(source: Source, groups: dict[str, dict[str, int]], part: np.ndarray) -> None:
    """Refuses a folder `train` or `test` that holds nothing, beside those that do."""
    for folder in sorted(source.split_folders):
        parent, _, name = folder.rpartition("/")
        word = split_word(name)
        if word is not None and parent in groups and word.split != VAL and not (part == word.split).any():
            raise refusal(os.path.join(source.path, folder), "holds no images")


# ---- at random ------------------------------------------------------------------------------------------------------


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


def _by_default(source: Source, seed: int, check: bool = False) -> Plan:
    """A tenth for test. `check` refuses images that are named as splits themselves: `train_1.png`, `test_1.png`."""
    if check:
        named: dict[int, str] = {}
        for name in (item.name for item in source.items):
            base = name.rpartition("/")[2]
            if re.search("tr|te?st|val|hold", base, re.IGNORECASE) and (word := split_word(os.path.splitext(base)[0])):
                named.setdefault(word.split, name)
        if {TRAIN, TEST} <= set(named):
            raise refusal(
                source.path,
                f"{named[TRAIN]} and {named[TEST]} look like images for training and for test: put them into folders "
                "train and test, or give --partition none to take all images as one set",
            )
    part = np.full(len(source.items), TRAIN, np.int8)
    part[hold_out(source.path, _usable(source, part == TRAIN), seed)] = TEST
    return Plan(
        part, f"a tenth for test (seed {seed})", {"by": "fractions", "fractions": ["9/10", "0", "1/10"], "seed": seed}
    )


def _by_fractions(source: Source, fractions: Fractions, seed: int) -> Plan:
    part = np.full(len(source.items), TRAIN, np.int8)
    order = np.random.default_rng(seed).permutation(_usable(source, part == TRAIN))
    tests = max(1, int(len(order) * fractions[TEST])) if fractions[TEST] else 0
    part[order[:tests]] = TEST
    part[order[tests : tests + int(len(order) * fractions[VAL])]] = VAL
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
