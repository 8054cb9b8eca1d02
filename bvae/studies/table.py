"""table.md: a study as a document. Every cell is mean ± sd (n); every seed's value is in a fold below."""

from collections.abc import Mapping
from typing import Any

from bvae.studies.kinds import ABSENT, Study, label, shown

MARK = "†"
FEW = 2048
PUBLISHED_NOTE = "Published by others, under protocols, splits and epochs of their own: the neighbourhood, no more."
COMPARED_NOTE = (
    "Differences are paired by seed: the mean of row minus other, with a 95 % t interval. The smallest difference of "
    "FIDs that matters was set to 2 beforehand."
)


def figure(metric: str, found: Mapping[str, Any] | None) -> str:
    """mean ± sd (n) of one metric of a row."""
    if not found or not found["n"]:
        return ABSENT
    sd = "" if found["sd"] is None else f" ± {shown(found['sd'], metric)}"
    return f"{shown(found['mean'], metric)}{sd} ({found['n']})"


def columns_of(study: Study, found: Mapping[str, Any]) -> list[str]:
    """The study's columns that some row has a figure for; all where there is none at all."""
    having = {metric for row in found["rows"] for metric, m in row["metrics"].items() if m["n"]}
    return [metric for metric in study.columns if metric in having] or list(study.columns)


def is_unsettled(row: Mapping[str, Any]) -> bool:
    return any(row["unsettled"].values())


def epochs_of(row: Mapping[str, Any]) -> str:
    second = f" + {row['epochs2']}" if row["epochs2"] else ""
    return f"{row['epochs']}{second}" if row["epochs"] else ABSENT


def remarks(row: Mapping[str, Any]) -> list[str]:
    """Remarks that a reader of a row needs beside its figures."""
    said = [row["problem"]] if row["problem"] else []
    unsettled = [
        f"stage {stage[-1]}, seed {', '.join(map(str, seeds))}" for stage, seeds in row["unsettled"].items() if seeds
    ]
    if unsettled:
        said.append(f"gamma not settled ({'; '.join(unsettled)}): not compared")
    reasons: dict[str, list[str]] = {}
    for seed, reason in row["failed"].items():
        if reason != row["problem"]:
            reasons.setdefault(reason, []).append(seed)
    said += [f"failed (seed {', '.join(seeds)}): {reason}" for reason, seeds in reasons.items()]
    return said


def facts(study: Study, found: Mapping[str, Any]) -> list[str]:
    """Sentences on how the figures were made."""
    said = []
    if found["scale"] != 1:
        said.append(f"Epochs and halving intervals are scaled by {found['scale']:g}: not the study's own recipe.")
    rows = [row for row in found["rows"] if any(m in row["metrics"] for m in ("rec", "gen1", "gen2", "fid"))]
    if rows:
        counts = ", ".join(f"{n:,}" for n in sorted({row["n_images"] for row in rows}))
        said.append(f"FIDs: protocol {found['protocol']}, {found['precision']}, {counts} generated images.")
        tests = [row["data"]["test"] for row in rows if row["data"]]
        if min([*tests, *(row["n_images"] for row in rows)], default=FEW) < FEW:
            said.append(f"FIDs of fewer than {FEW:,} images are not comparable with any other.")
    elif any(metric in study.columns for metric in ("rec", "gen1", "gen2", "fid")):
        said.append("FIDs were not measured.")
    data = sorted(
        {
            f"{row['data']['name']} ({row['data']['train']:,} training, {row['data']['test']:,} test images)"
            for row in found["rows"]
            if row["data"]
        }
    )
    if data:
        said.append(f"Data: {'; '.join(data)}.")
    environment = found["environment"]
    if environment["devices"]:
        versions = "; ".join(", ".join(f"{k} {v}" for k, v in each.items()) for each in environment["versions"])
        said.append(f"Trained on {'; '.join(environment['devices'])}; {versions}.")
    if any(is_unsettled(row) for row in found["rows"]):
        said.append(
            f"{MARK} gamma not settled: sse/(2 gamma2 D) of the last epoch is outside 0.45 to 0.55, so that gamma2 is "
            "not yet the error; not compared."
        )
    said.append("The last weights are scored. ± is the standard deviation (n - 1) over seeds.")
    return said


def markdown(study: Study, found: Mapping[str, Any]) -> str:
    columns = columns_of(study, found)
    scaled = f", scaled by {found['scale']:g}" if found["scale"] != 1 else ""
    lines = [f"# {study.title}{scaled}", "", study.about, "", f"    {found['command']}", ""]
    lines += [f"* {fact}" for fact in facts(study, found)] + [""]
    if columns:
        lines += _table(["row", "epochs", *map(label, columns)], [_row(row, columns) for row in found["rows"]])
    lines += [f"* {row['name']}: {text}" for row in found["rows"] for text in remarks(row)] + [""]
    for heading, note, head, rows in (
        ("## Published\n", PUBLISHED_NOTE, ["row", "figure", "here", "published", "source"], published_rows(found)),
        ("## Compared\n", COMPARED_NOTE, ["row", "against", "figure", "difference", "verdict"], comparison_rows(found)),
    ):
        lines += [heading, note, "", *_table(head, rows)] if rows else []
    if seeds := seed_rows(found, columns):
        fold = _table(["row", "figure", "seeds 0, 1, ..."], seeds)
        lines += ["<details><summary>Every seed's value</summary>", "", *fold, "</details>"]
    return "\n".join(lines).rstrip() + "\n"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in [head, *rows]]
    lines = ["| " + " | ".join(row) + " |" for row in escaped]
    return [lines[0], "|" + "---|" * len(head), *lines[1:], ""]


def _row(row: Mapping[str, Any], columns: list[str]) -> list[str]:
    name = row["name"] + (f" {MARK}" if is_unsettled(row) else "")
    failed = "failed" if (row["failed"] or row["problem"]) and not row["metrics"] else None
    return [name, epochs_of(row), *(failed or figure(metric, row["metrics"].get(metric)) for metric in columns)]


def published_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Row, figure, here, published, source."""
    return [
        [row["name"], label(metric), figure(metric, row["metrics"].get(metric)), p["value"], p["source"]]
        for row in found["rows"]
        for metric, p in row["published"].items()
    ]


def comparison_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Row, other, figure, difference, verdict."""
    return [
        [c["row"], c["other"], label(c["metric"]), _difference(c["difference"]), c["verdict"]]
        for c in found["comparisons"]
    ]


def _difference(value: float | None) -> str:
    return ABSENT if value is None else f"{value:+.4g}"


def seed_rows(found: Mapping[str, Any], columns: list[str]) -> list[list[str]]:
    """Row, figure, every seed's value."""
    return [
        [row["name"], label(metric), ", ".join(shown(v, metric) for v in row["metrics"][metric]["values"])]
        for row in found["rows"]
        for metric in columns
        if metric in row["metrics"]
    ]
