"""From a study and a command line to cells: what each row trains, and by which arguments of bvae.train.

The parser of bvae.train itself decides if a row can have a setting. A row that this version cannot train at all stays
in the plan with the reason.
"""

import contextlib
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bvae.errors import UserError
from bvae.studies.kinds import FromRow, Row, Study

SCALED = ("epochs", "epochs2", "lr_halve", "lr_halve2", "fid_every", "eval_every")
RESERVED = ("out", "resume", "seed", "data", "device", "dry_run", "max_steps", "inception", "allow_few", "logger")
STAND_IN = 0.01
"""value for a setting that another row's run has yet to find, where only the setting's name is checked"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """A study's command line."""

    out: Path
    data: tuple[str, ...] = ()
    seeds: int
    scale: float = 1.0
    sets: tuple[str, ...] = ()
    device: str = "auto"
    inception: str | None = None
    """weights of the FID network; None: FIDs are left out"""
    protocol: str = "tf1"
    precision: str = "fp32"
    fid_num: int = 10_000
    part: tuple[int, int] = (1, 1)
    """(i, n): this is the i-th of n parts, from 1"""


@dataclass
class PlannedRow:
    row: Row
    settings: dict[str, Any]
    """settings given to bvae.train; a FromRow where another run provides the value"""
    config: Mapping[str, Any]
    """all settings after that; empty where they are refused"""
    problem: str = ""
    """why it cannot be trained"""

    def stated(self) -> dict[str, Any]:
        """Its settings as study.json has them."""
        hidden = ("data",)  # a path of this machine
        return {
            name: str(value) if isinstance(value, FromRow) else list(value) if isinstance(value, tuple) else value
            for name, value in self.settings.items()
            if name not in hidden
        }

    @property
    def needs(self) -> list[FromRow]:
        return [value for value in self.settings.values() if isinstance(value, FromRow)]


@dataclass(frozen=True)
class Cell:
    """One training and its scores: a row that has runs of its own, and a seed."""

    row: str
    seed: int
    name: str
    """name of the run's folder"""


@dataclass
class Plan:
    study: Study
    options: Options
    rows: dict[str, PlannedRow]
    notes: list[str] = field(default_factory=list)

    def owner(self, row: Row) -> PlannedRow:
        return self.rows[row.owner]

    def readers(self, cell: Cell) -> list[Row]:
        """The rows that read this cell's run."""
        return [p.row for p in self.rows.values() if p.row.owner == cell.row and p.row.takes(cell.seed)]

    def cell(self, row: str, seed: int) -> Cell:
        return Cell(row, seed, f"{self.rows[row].row.slug}-s{seed}")

    def cells(self) -> list[Cell]:
        """All cells, seed by seed, each after those whose findings it needs."""
        found = []
        for seed in range(self.options.seeds):
            of_seed = [
                self.cell(p.row.name, seed)
                for p in self.rows.values()
                if not p.row.run and any(r.takes(seed) for r in self._all_readers(p.row.name))
            ]
            found += sorted(of_seed, key=lambda cell: bool(self.rows[cell.row].needs))
        return found

    def _all_readers(self, owner: str) -> list[Row]:
        return [p.row for p in self.rows.values() if p.row.owner == owner]

    def cells_of_part(self) -> list[Cell]:
        """The cells of --part: a cell goes with the one whose findings it needs."""
        part, parts = self.options.part
        groups: dict[tuple[str, int], list[Cell]] = {}
        for cell in self.cells():
            needs = self.rows[cell.row].needs
            groups.setdefault((needs[0].row if needs else cell.row, cell.seed), []).append(cell)
        shares: list[list[Cell]] = [[] for _ in range(parts)]
        for group in sorted(groups.values(), key=len, reverse=True):  # each to the part that has least to do
            min(shares, key=len).extend(group)
        mine = set(shares[part - 1])
        return [cell for cell in self.cells() if cell in mine]


class RefusedSetting(Exception):
    """bvae.train does not take these settings; the text says why."""


def arguments(settings: Mapping[str, Any]) -> list[str]:
    """Settings as arguments of bvae.train."""
    found = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, tuple | list):
            found += [f"--{flag}", *map(str, value)]
        else:
            found += [f"--{flag}", str(STAND_IN if isinstance(value, FromRow) else value)]
    return found


def resolve(settings: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a run with these given. Raises RefusedSetting."""
    from bvae.train import parse  # torch takes seconds to import, which --list need not wait for

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            config, _ = parse(arguments(settings))
    except UserError as error:
        raise RefusedSetting(str(error).partition("; choose from")[0]) from None
    except SystemExit:
        lines = [line.strip("│╭╮╰╯─- ") for line in said.getvalue().splitlines()]
        raise RefusedSetting(next((line for line in lines[1:] if line), "refused")) from None
    return config.to_dict()


def make_plan(study: Study, options: Options) -> Plan:
    """Every row with its settings. Raises UserError for a --set that no row takes, and for data that nothing names."""
    sets = dict(_parse_set(text) for text in options.sets)
    refused: dict[str, dict[str, str]] = {name: {} for name in sets}  # setting -> row -> why not
    plan = Plan(study, options, {})
    for row in study.rows:
        if row.run:
            continue
        planned = _plan_row(study, row, options, sets, refused)
        plan.rows[row.name] = planned
    for row in study.rows:  # in the study's order, those that read others' runs too
        planned = plan.rows.pop(row.owner) if not row.run else PlannedRow(row, {}, {})
        plan.rows[row.name] = planned
    for row in study.rows:
        if row.run:
            owner = plan.rows[row.owner]
            plan.rows[row.name] = PlannedRow(row, owner.settings, owner.config, owner.problem)
    possible = [row.name for row in study.owners if plan.rows[row.name].config]
    for name, rows in refused.items():
        reasons = "; ".join(f"{row} ({why})" for row, why in rows.items())
        if rows and len(rows) == len(possible):
            raise UserError(f"--set {name}: no row of {study.name} takes it: {reasons}")
        if rows:
            plan.notes.append(f"--set {name} does not act on {reasons}")
    return plan


def _plan_row(
    study: Study, row: Row, options: Options, sets: Mapping[str, str], refused: dict[str, dict[str, str]]
) -> PlannedRow:
    # torch.compile is chosen by timing, which trainings side by side disturb, and the results differ by roundings.
    own = {"compile": False, **study.settings, **row.settings}
    try:
        own |= _data(row, own, options.data)
    except RefusedSetting as error:
        return PlannedRow(row, own, {}, str(error))
    try:
        base = resolve(own)
    except RefusedSetting as error:
        return PlannedRow(row, own, {}, str(error))
    taken: dict[str, Any] = {}
    for name, text in sets.items():
        if name in row.settings:
            refused[name][row.name] = "it is what this row is about"
            continue
        try:
            value = _typed(text, base.get(name))
            resolve({**own, **taken, name: value})
            taken[name] = value
        except RefusedSetting as error:
            refused[name][row.name] = str(error)
    settings = {**own, **taken}
    config = resolve(settings)
    if options.scale != 1:
        settings |= {
            name: max(1, math.floor(config[name] * options.scale + 0.5)) for name in SCALED if config.get(name)
        }
        config = resolve(settings)
    return PlannedRow(row, settings, config)


def _parse_set(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    name = name.strip().replace("-", "_")
    if not equals or not name or not value:
        raise UserError(f"--set {text}: must be SETTING=VALUE, as in --set base=16")
    if name in RESERVED:
        raise UserError(f"--set {name}: is set by the study itself or by an option of its own")
    return name, value


def _typed(text: str, like: Any) -> Any:
    """The value of --set as the setting's kind: only switches and lists are not passed on as they are."""
    if isinstance(like, bool):
        if text.lower() not in ("true", "false"):
            raise RefusedSetting(f"must be true or false, not {text}")
        return text.lower() == "true"
    if isinstance(like, tuple | list):
        return tuple(text.split(","))
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def _data(row: Row, settings: Mapping[str, Any], given: Sequence[str]) -> dict[str, Any]:
    """{"data": the images of a row}, from --data PATH, --data NAME=PATH, or a folder that holds NAME."""
    named = dict(text.split("=", 1) for text in given if "=" in text and not Path(text).exists())
    plain = [text for text in given if text.partition("=")[0] not in named]
    if not row.data:
        return {"data": plain[0]} if plain else {}
    if row.data in named:
        return {"data": named[row.data]}
    for text in plain:
        if text == "shapes":
            return {"data": text}
        for name in (row.data, f"{row.data}.zip", f"{row.data}.npz"):
            if (Path(text) / name).exists():
                return {"data": str(Path(text) / name)}
    raise RefusedSetting(f"its images are not given: --data {row.data}=PATH")
