"""study.json: every row's figures by seed, what failed, and what was compared. Parts of a study write it in turn."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bvae.errors import UserError
from bvae.files import encode_json, write_atomically
from bvae.studies.cells import Figures, Scope, read_json
from bvae.studies.jobs import alone
from bvae.studies.kinds import SETTLED, SETTLING, Row, matters
from bvae.studies.plan import Cell
from bvae.studies.statistics import Comparison, Values, compare, mean_sd

FILE = "study.json"
OF_STAGE2 = ("gen2", "gen2_rescaled", "gen_second-stage")
"""metrics on which the second stage's gamma bears too"""


class Store:
    """All that is known of a study, in memory and in its folder.

    Raises UserError where the folder holds another study, or rows of other settings.
    """

    def __init__(self, scope: Scope, command: str, copy: Path | None = None, paths: Sequence[str] = ()) -> None:
        """copy: written with study.json, for others to read: of the `paths` in the command the last part alone."""
        self.scope = scope
        self.command = command
        self.path = scope.options.out / FILE
        self.copy = copy
        self.paths = paths
        self.values: dict[str, dict[str, list[float | None]]] = {name: {} for name in scope.plan.rows}
        self.failed: dict[str, dict[int, str]] = {name: {} for name in scope.plan.rows}
        self.about: dict[str, dict[str, Any]] = {name: {} for name in scope.plan.rows}
        self.devices: list[str] = []
        self.versions: list[dict[str, str]] = []
        there = read_json(self.path)
        if there:
            self._check_same(there)
            self._merge(there)

    # ---- what is known ----------------------------------------------------------------------------------------

    def value(self, row: str, metric: str, seed: int) -> float | None:
        found = self.values[row].get(metric, [])
        return found[seed] if seed < len(found) else None

    def done(self, cell: Cell) -> bool:
        """True if every figure wanted of the cell is known, even if its run's folder has changed or gone."""
        readers = self.scope.plan.readers(cell)
        wanted = [(row.name, metric) for row in readers for metric in self.scope.wanted(row, cell.seed)]
        return bool(wanted) and all(self.value(row, metric, cell.seed) is not None for row, metric in wanted)

    def add(self, cell: Cell, figures: Mapping[str, Figures], info: Mapping[str, Any]) -> None:
        """Takes in what a cell's run holds. Raises UserError where it was trained on other images than its row's.

        info: the run's config.json.
        """
        data = {key: info.get("data", {}).get(key) for key in ("name", "digest", "train", "test")}
        for name, found in figures.items():
            known = self.about[name].get("data")
            if known and data["digest"] and known["digest"] != data["digest"]:
                raise UserError(f"{cell.name} was trained on other images than the row's other runs")
            self.about[name]["data"] = data
            for metric, value in found.items():
                if value is not None:
                    values = self.values[name].setdefault(metric, [])
                    values += [None] * (cell.seed + 1 - len(values))
                    values[cell.seed] = value
            self.failed[name].pop(cell.seed, None)
        for text in filter(None, [info.get("device")]):
            self.devices = sorted({*self.devices, text})
        if info.get("versions") and info["versions"] not in self.versions:
            self.versions.append(dict(info["versions"]))

    def fail(self, cell: Cell, reason: str) -> None:
        for row in self.scope.plan.readers(cell):
            self.failed[row.name][cell.seed] = reason

    def unsettled(self, row: Row) -> dict[int, list[int]]:
        """stage -> the seeds whose sse/(2 gamma2 D) was not near 1/2 in the last epoch though the rule makes it so."""
        config = self.scope.plan.owner(row).config
        if config.get("balance") not in SETTLING or config.get("family", "vae") not in ("vae", "vamp"):
            return {1: [], 2: []}
        low, high = SETTLED
        return {
            stage: [
                s for s, v in enumerate(self.values[row.name].get(name, ())) if v is not None and not low <= v <= high
            ]
            for stage, name in ((1, "balance"), (2, "balance2"))
        }

    def comparisons(self) -> list[Comparison]:
        plan, found = self.scope.plan, []
        for planned in plan.rows.values():
            row = planned.row
            if not row.against:
                continue
            other = plan.rows[row.against].row
            for metric in plan.study.judged:
                a, b = (self._values(r, metric) for r in (row, other))
                if not any(v is not None for v in a) or not any(v is not None for v in b):
                    continue
                excluded = {seed for r in (row, other) for seed in self._excluded(r, metric)}
                found.append(compare(row.name, other.name, metric, a, b, matters(metric), sorted(excluded)))
        return found

    def _values(self, row: Row, metric: str) -> Values:
        return self.values[row.name].get(metric, [])

    def _excluded(self, row: Row, metric: str) -> list[int]:
        unsettled = self.unsettled(row)
        second = row.read.get(metric, metric) in OF_STAGE2
        return unsettled[1] + (unsettled[2] if second else [])

    # ---- the file ---------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        options = self.scope.options
        return {
            "name": self.scope.plan.study.name,
            "command": self.command,
            "scale": options.scale,
            "protocol": options.protocol,
            "precision": options.precision,
            "environment": {"devices": self.devices, "versions": self.versions},
            "rows": [self._row(name) for name in self.scope.plan.rows],
            "comparisons": [comparison.to_dict() for comparison in self.comparisons()],
        }

    def _row(self, name: str) -> dict[str, Any]:
        planned, values = self.scope.plan.rows[name], self.values[name]
        row, config, data = planned.row, planned.config, self.about[name].get("data")
        scored = any(metric in values for metric in ("rec", "gen1", "gen2", "fid"))
        # Figures of another data set are no neighbourhood.
        published = {} if data and data["name"] == "shapes" else row.published
        metrics = {}
        for metric in sorted(values):
            mean, sd, n = mean_sd(values[metric])
            metrics[metric] = {"values": values[metric], "mean": mean, "sd": sd, "n": n}
        return {
            "name": name,
            "settings": planned.stated(),
            "epochs": _share(row, config.get("epochs")),
            "epochs2": _share(row, config.get("epochs2")),
            "n_images": self.scope.options.fid_num if scored else data and data["test"],
            "metrics": metrics,
            "published": {m: {"value": p.value, "source": p.source} for m, p in published.items()},
            "data": data,
            "unsettled": {f"stage{stage}": seeds for stage, seeds in self.unsettled(row).items()},
            "failed": {str(seed): reason for seed, reason in sorted(self.failed[name].items())},
            "problem": planned.problem,
        }

    def save(self) -> dict[str, Any]:
        """Writes study.json with what other parts have added to it meanwhile; returns what it holds."""
        with alone(self.path.with_name(".writing")):
            there = read_json(self.path)
            if there:
                self._merge(there)
            found = self.to_dict()
            write_atomically(self.path, encode_json(found, indent=1).encode() + b"\n")
        if self.copy is not None:
            shared = {**found, "command": without_paths(self.command, self.paths)}
            write_atomically(self.copy, encode_json(shared, indent=1).encode() + b"\n")
        return found

    def _merge(self, there: Mapping[str, Any]) -> None:
        """Adds the figures of a study.json that are not known here. Figures known here take precedence."""
        mine = {
            (row.name, cell.seed) for cell in self.scope.plan.cells_of_part() for row in self.scope.plan.readers(cell)
        }
        for row in there["rows"]:
            name = row["name"]
            for metric, found in row["metrics"].items():
                own = self.values[name].setdefault(metric, [])
                own += [None] * (len(found["values"]) - len(own))
                for seed, value in enumerate(found["values"]):
                    own[seed] = value if own[seed] is None else own[seed]
            # For cells that others run, the state that they wrote last is valid.
            theirs = {int(s): reason for s, reason in row.get("failed", {}).items() if (name, int(s)) not in mine}
            self.failed[name] = {s: r for s, r in self.failed[name].items() if (name, s) in mine} | theirs
            if row.get("data"):
                self.about[name].setdefault("data", row["data"])
        environment = there.get("environment", {})
        self.devices = sorted({*self.devices, *environment.get("devices", ())})
        self.versions += [v for v in environment.get("versions", ()) if v not in self.versions]

    def _check_same(self, there: Mapping[str, Any]) -> None:
        options, folder = self.scope.options, self.path.parent
        try:
            checked = [
                (name, there[name], own)
                for name, own in (
                    ("name", self.scope.plan.study.name),
                    ("scale", options.scale),
                    ("protocol", options.protocol),
                    ("precision", options.precision),
                )
            ]
            rows = {row["name"]: row["settings"] for row in there["rows"]}
            used = {row["name"] for row in there["rows"] if row["metrics"]}
        except (KeyError, TypeError) as error:
            raise UserError(f"{self.path}: not the figures of a study ({error!r})") from None
        for name, old, new in checked:
            if old != new:
                raise UserError(f"{folder}: holds a study with {name} {old}, not {new}: choose another --out")
        for name, planned in self.scope.plan.rows.items():
            if not planned.config:
                continue
            was, now = rows.get(name, {}), planned.stated()
            changed = next((key for key in {**was, **now} if was.get(key) != now.get(key)), None)
            if name in used and changed:
                raise UserError(
                    f"{folder}: holds runs of {name!r} with {changed} {was.get(changed)}, not {now.get(changed)}: "
                    "choose another --out"
                )
        unknown = sorted(set(rows) - set(self.scope.plan.rows))
        if unknown:
            raise UserError(
                f"{folder}: holds a row {unknown[0]!r} that this version's study has not: choose another --out"
            )


def _share(row: Row, epochs: int | None) -> int | None:
    """The epochs after which the row is read; None where they are not known."""
    return max(1, round(row.at * epochs)) if epochs else epochs


def without_paths(command: str, paths: Sequence[str]) -> str:
    """The command for a file that others read: of each path the last part alone."""
    for path in sorted(filter(None, paths), key=len, reverse=True):
        command = command.replace(path, Path(path).name)
    return command
