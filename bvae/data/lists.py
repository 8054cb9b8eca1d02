"""Lists that say which image is for what: CelebA's, its like, and CelebA-HQ's mapping; and the words for splits."""

import csv
import re
from functools import lru_cache
from typing import NamedTuple

from bvae.data.kinds import SUFFIXES, suffix
from bvae.data.refusal import refusal

TRAIN, VAL, TEST = range(3)

PARTITION_LISTS = ("list_eval_partition.txt", "list_eval_partition.csv")
MAPPINGS = ("CelebA-HQ-to-CelebA-mapping.txt", "CelebA-HQ-to-CelebA-mapping.csv", "image_list.txt")

WORDS = {
    **dict.fromkeys(("train", "training", "trn", "trainset"), TRAIN),
    **dict.fromkeys(("val", "valid", "validation", "dev", "valset", "devset"), VAL),
    **dict.fromkeys(("test", "testing", "tst", "testset", "eval", "evaluation", "evalset", "holdout", "heldout"), TEST),
}
# Beside one of these words they leave a name that of a split: `train2017`, `testA`, `val_images`.
_PLAIN = {"set", "data", "dataset", "split", "part", "images", "image", "imgs", "img", "files", "shard", "shards"}

_NUMBERS = {"0": TRAIN, "1": VAL, "2": TEST}
_VALUES = _NUMBERS | WORDS
_NAME_COLUMNS = ("image_id", "image", "filename", "file_name", "file", "name", "path", "filepath", "img", "id")
_SPLIT_COLUMNS = ("partition", "split", "set", "subset", "part", "phase")


class SplitWord(NamedTuple):
    """The split that the name of a folder or archive stands for.

    split: TRAIN, VAL or TEST.
    exact: the name is that of a split and nothing else, as `train` or `testA`; not so `cars_train`.
    at_end: the word is the first or the last of the name.
    """

    split: int
    exact: bool
    at_end: bool


@lru_cache(maxsize=2**14)
def split_word(name: str) -> SplitWord | None:
    """The split that a name stands for, or None. An archive's suffixes count for nothing."""
    if len(name) > 255:
        return None
    stem = re.sub(r"(\.(zip|tar|tgz|gz|bz2|tbz2|xz|txz|zst|tzst))+$", "", name, flags=re.IGNORECASE)
    words = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", stem)]
    found = {WORDS[word] for word in words if word in WORDS}
    if len(found) != 1:
        return None
    rest = [word for word in words if word not in WORDS]
    exact = all(word.isdigit() or len(word) == 1 or word in _PLAIN for word in rest)
    telling = [word for word in words if not (word.isdigit() or len(word) == 1)]
    return SplitWord(found.pop(), exact, telling[0] in WORDS or telling[-1] in WORDS)


def is_list(path: str) -> bool:
    """True if a file of this name may list the images of each split."""
    base = path.rpartition("/")[2]
    return base in PARTITION_LISTS or base in MAPPINGS


def is_mapping(path: str) -> bool:
    return path.rpartition("/")[2] in MAPPINGS


def parse_list(data: bytes, where: str) -> dict[str, int]:
    """A partition list's lines -> {name: TRAIN, VAL or TEST}.

    Args:
        data: `000001.jpg 0` a line, as CelebA's list_eval_partition.txt, or CSV, with or without a heading. The split
            is 0, 1, 2 or a word (train, val, test, ...), and stands last, unless a heading says where.
        where: the list's name, for messages.

    Raises:
        UserError: naming the line that is not of this form, or that contradicts another.
    """
    text = _text(data, where)
    lines = text.splitlines()
    fields = " ".join(lines).split(" ")
    if len(fields) == 2 * len(lines) == 2 * len(set(fields[::2])) and set(fields[1::2]) <= set(_NUMBERS):
        return dict(zip(fields[::2], map(_NUMBERS.__getitem__, fields[1::2]), strict=True))  # CelebA's own, at once
    parts: dict[str, int] = {}
    columns: tuple[int, int] | None = None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if number == 1 and (columns := _heading(line)):
            continue
        name, value = _row(line, columns)
        split = _VALUES.get(value.lower())
        of_words = name and split is None and suffix(name) not in SUFFIXES and not value.isdigit()
        if number == 1 and len(lines) > 1 and of_words:
            continue  # a heading
        if not name or split is None:
            raise refusal(where, f"line {number} is no `name 0`, 1 (val) or 2 (test), or a word: {line[:80]!r}")
        if parts.setdefault(name, split) != split:
            raise refusal(where, f"line {number} puts {name} into another part than a line before")
    if not parts:
        raise refusal(where, "holds no lines")
    return parts


def parse_mapping(data: bytes, where: str) -> dict[int, str]:
    """CelebA-HQ's mapping -> {number of the image: CelebA's file}. Raises UserError for another file."""
    rows = [re.split(r"[\s,]+", line.strip()) for line in _text(data, where).splitlines() if line.strip()]
    heading = [word.lower() for word in rows[0]] if rows else []
    if "idx" not in heading or "orig_file" not in heading:
        raise refusal(where, "not CelebA-HQ's mapping: columns idx and orig_file are expected")
    at, file = heading.index("idx"), heading.index("orig_file")
    try:
        return {int(row[at]): row[file] for row in rows[1:]}
    except (ValueError, IndexError) as error:
        raise refusal(where, "not CelebA-HQ's mapping", error) from error


def spellings(parts: dict[str, int]) -> list[dict[str, int]]:
    """A list's names as they are, and as they may be meant: without `./`, with `/` for a backslash, without an index
    column in front. Ways in which two names become one of two splits are left out."""
    ways = [parts]
    for change in (_clean, lambda name: _clean(re.sub(r"^\d+[\s,]+", "", name))):
        changed: dict[str, int] = {}
        if all(changed.setdefault(change(name), split) == split for name, split in parts.items()):
            ways.append(changed)
    return [way for number, way in enumerate(ways) if way not in ways[:number]]


def _clean(name: str) -> str:
    return re.sub(r"^(\./)+", "", name.replace("\\", "/"))


def _text(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise refusal(where, "not a partition list", error) from error


def _heading(line: str) -> tuple[int, int] | None:
    """(column of the name, column of the split) where a line is a CSV's heading that says so."""
    words = [word.strip().strip('"').lower() for word in line.split(",")]
    name = next((words.index(word) for word in _NAME_COLUMNS if word in words), None)
    split = next((words.index(word) for word in _SPLIT_COLUMNS if word in words), None)
    return None if name is None or split is None else (name, split)


def _row(line: str, columns: tuple[int, int] | None) -> tuple[str, str]:
    """(name, split as it is written) of a line; empty where there is none."""
    if columns is not None:
        cells = next(csv.reader([line], skipinitialspace=True), [])
        return (cells[columns[0]].strip(), cells[columns[1]].strip()) if len(cells) > max(columns) else ("", line)
    fields = line.rsplit("," if "," in line else None, 1)
    name, value = (text.strip().strip('"') for text in (fields if len(fields) == 2 else ("", line)))
    return name, value
