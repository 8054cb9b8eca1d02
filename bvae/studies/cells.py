"""A cell on disk: which of its steps are done, the command of the next, and the figures that its run's folder holds.

Everything is decided by files that the commands leave (config.json, metrics.jsonl, results.json, priors/), so that a
study goes on wherever it was killed.
"""

import json
import math
import os
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bvae.errors import UserError
from bvae.files import encode_json, exists, write_atomically
from bvae.studies.kinds import FromRow, Row
from bvae.studies.plan import Cell, Options, Plan, PlannedRow, arguments

RUNS = "runs"
CHECKPOINTS = "checkpoints"
FIRST_EPOCH = "first_epoch.json"

KEPT = "kept"
"""folder of what the figures need of a run"""

Figures = Mapping[str, float | None]


@dataclass(frozen=True)
class Step:
    """One command of a cell."""

    what: str
    command: tuple[str, ...]
    training: bool = False


@dataclass(frozen=True)
class Scope:
    """The plan and where its runs are."""

    plan: Plan

    @property
    def options(self) -> Options:
        return self.plan.options

    def folder(self, cell: Cell) -> Path:
        return self.options.out / RUNS / cell.name

    def row(self, cell: Cell) -> PlannedRow:
        return self.plan.rows[cell.row]

    # ---- what is wanted ---------------------------------------------------------------------------------------

    def parts(self, row: Row, seed: int) -> list[str]:
        """The FIDs of a row with runs of its own that are measured on this seed, priors aside."""
        if self.options.inception is None:
            return []
        return [name for name in of_seed(row.fids, seed) if self._has(row, name)]

    def _has(self, row: Row, name: str) -> bool:
        """Whether the row's run has what this FID, or the quality of this prior, is measured on."""
        return bool(self.plan.owner(row).config.get("epochs2")) or not name.startswith(("gen2", "second-stage"))

    def wanted(self, row: Row, seed: int) -> list[str]:
        """Metrics without which this row's value under a seed is not complete."""
        if row.read:
            own = [] if row.run else ["mse_sampled"]
            if self.options.inception is None or not self._has(row, row.read.get("fid", "")):
                return own
            return [*own, *row.read]
        if row.at < 1:
            return ["mse_sampled"]
        priors = of_seed(row.priors, seed) if self.options.inception is not None else []
        return ["mse_sampled", *self.parts(row, seed), *(f"gen_{name}" for name in priors)]

    # ---- the next step ----------------------------------------------------------------------------------------

    def next_step(self, cell: Cell, found: Mapping[str, float], skip: Collection[str] = ()) -> Step | None:
        """What is to be run next; None where nothing is left.

        found: values of the settings that other rows' runs find, by setting. skip: steps that have failed.
        """
        step = self._training(cell, found)
        if step is None:
            step = next((s for s in self._scoring(cell) if s.what not in skip), None)
        return None if step is None or step.what in skip else step

    def _training(self, cell: Cell, found: Mapping[str, float]) -> Step | None:
        planned, folder = self.row(cell), self.folder(cell)
        limit: int | None = None
        if planned.row.moments:
            limit = next_point(folder, planned.row.moments)
            if limit is None:
                return None
        elif is_trained(folder, planned.config):
            return None
        capped = [] if limit is None else ["--max-steps", str(limit)]
        if exists(folder / CHECKPOINTS):
            return Step("training", _module("bvae.train", "--resume", str(folder), *capped), training=True)
        settings = {**planned.settings, **found}
        if settings.get("fid_every"):
            settings |= self._fid_settings()
        more = ["--seed", str(cell.seed), "--device", self.options.device, "--out", str(folder), *capped]
        return Step("training", _module("bvae.train", *arguments(settings), *more), training=True)

    def _fid_settings(self) -> dict[str, Any]:
        o = self.options
        if o.inception is None:
            return {"fid_every": 0}
        return {"inception": o.inception, "fid_protocol": o.protocol, "fid_num": o.fid_num, "allow_few": True}

    def _scoring(self, cell: Cell) -> list[Step]:
        planned, folder, o = self.row(cell), self.folder(cell), self.options
        row, steps = planned.row, []
        device = ("--device", o.device)
        for name in of_seed(row.priors, cell.seed):
            if not exists(prior_file(folder, name)):
                steps.append(
                    Step(f"prior {name}", _module("bvae.prior", str(folder), name, "--seed", str(cell.seed), *device))
                )
        steps += self._samples(cell, folder)
        if o.inception is None:
            return steps
        scoring = ("--inception", o.inception, "--protocol", o.protocol, "--precision", o.precision, *device)
        images = ("--fid-num", str(o.fid_num), "--allow-few")
        there = scores(folder, o)
        missing = [name for name in self.parts(row, cell.seed) if name not in there]
        fitted = [name for name in of_seed(row.priors, cell.seed) if exists(prior_file(folder, name))]
        priors = [name for name in fitted if f"gen_{name}" not in there]
        if missing or priors:
            more = (*(("--prior", ",".join(priors)) if priors else ()), "--only", *missing)
            steps.append(Step("FIDs", _module("bvae.evaluate", str(folder), *scoring, *images, *more)))
        kept = read_quality(folder, o)
        unfitted = [name for name in row.priors if name not in fitted]
        wanted = [name for name in of_seed(row.quality, cell.seed) if self._has(row, name)]
        quality = [name for name in wanted if name not in kept and name not in unfitted]
        if quality:
            command = _module("bvae.studies.quality", str(folder), *quality, *scoring, "--num", str(o.fid_num))
            steps.append(Step("precision and recall", command))
        return steps

    def _samples(self, cell: Cell, folder: Path) -> list[Step]:
        """Pictures that training does not leave: of the priors, and of a study that consists of samples."""
        out, study = self.options.out, self.plan.study
        if cell.seed:
            return []
        wanted: dict[str, tuple[Path, tuple[str, ...]]] = {}
        if study.picture == "samples" and cell.row == study.rows[0].name:
            wanted["samples"] = (out / f"{study.name}.npz", ("--stage", "2"))
        for row in self.plan.readers(cell):
            prior = row.read.get("fid", "").removeprefix("gen_")
            if prior in self.row(cell).row.priors and exists(prior_file(folder, prior)):
                wanted[f"samples of {prior}"] = (samples_picture(out, row.slug), ("--prior", prior, "--columns", "8"))
        command = ("bvae.sample", str(folder), "--num", "64", "--device", self.options.device, "--out")
        return [
            Step(what, _module(*command, str(path), *how)) for what, (path, how) in wanted.items() if not exists(path)
        ]

    # ---- figures ----------------------------------------------------------------------------------------------

    def figures(self, cell: Cell) -> dict[str, Figures]:
        """row -> its figures, of every row that reads this cell's run; empty where it has not been trained."""
        folder, planned = self.folder(cell), self.row(cell)
        if not is_trained(folder, planned.config):
            return {}
        final = _final(folder, self.options)
        found: dict[str, Figures] = {}
        for row in self.plan.readers(cell):
            own: Figures = final if row.at == 1 else _at(folder, row.at, planned.config)
            read = {name: own.get(source) for name, source in row.read.items()}
            found[row.name] = read if row.run and read else {**own, **read}
        return found

    def findings(self, cell: Cell, values: Mapping[str, Mapping[str, Any]]) -> dict[str, float] | None:
        """Values of the settings that other rows' runs find; None where one is not known yet.

        values: row -> metric -> values by seed.
        """
        found = {}
        for name, source in self.row(cell).settings.items():
            if isinstance(source, FromRow):
                by_seed = values.get(source.row, {}).get(source.metric, ())
                value = by_seed[cell.seed] if cell.seed < len(by_seed) else None
                if value is None:
                    return None
                found[name] = source.factor * value
        return found


def of_seed(names: Mapping[str, int | None], seed: int) -> list[str]:
    """The names that count for this seed; each has its number of seeds, None for all."""
    return [name for name, seeds in names.items() if seeds is None or seed < seeds]


def _module(name: str, *rest: str) -> tuple[str, ...]:
    return (sys.executable, "-m", name, *rest)


def prior_file(folder: Path, name: str) -> Path:
    return folder / "priors" / f"{name}.safetensors"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is no file. Raises UserError for anything else."""
    if not exists(path):
        return {}
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: does not hold a JSON object")
    return found


def results_of(folder: Path) -> dict[str, Any]:
    return read_json(folder / "results.json")


def is_trained(folder: Path, config: Mapping[str, Any]) -> bool:
    """results.json is what training writes last."""
    results = results_of(folder)
    return "stage1" in results and ("stage2" in results or not config.get("epochs2"))


def records_of(folder: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl, less a line that is being written."""
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def scores(folder: Path, options: Options) -> dict[str, float]:
    """The FIDs of a run that were measured as the options say."""
    found = (results_of(folder).get("fid") or {}).get(options.protocol) or {}
    if found.get("precision") != options.precision or found.get("n") != options.fid_num:
        return {}
    names = ("rec", "rec_mean", "gen1", "gen2", "gen2_rescaled")
    return {
        name: value
        for name, value in found.items()
        if (name in names or name.startswith("gen_")) and isinstance(value, int | float)
    }


def quality_file(folder: Path, options: Options) -> Path:
    return folder / f"quality-{options.protocol}-{options.precision}-{options.fid_num}.json"


def read_quality(folder: Path, options: Options) -> dict[str, dict[str, float]]:
    """prior -> fid, precision, recall, density, coverage, as bvae.studies.quality wrote them."""
    return read_json(quality_file(folder, options))


def _final(folder: Path, options: Options) -> dict[str, float | None]:
    results = results_of(folder)
    first = results["stage1"]
    names = ("mse_sampled", "mse_mean", "kl", "variance_law", "inactive", "active", "gamma2")
    found: dict[str, float | None] = {name: first[name] for name in names if first.get(name) is not None}
    last = {record["stage"]: record for record in records_of(folder)}
    for stage, name in ((1, "balance"), (2, "balance2")):
        if stage in last and last[stage].get("balance") is not None:
            found[name] = last[stage]["balance"]
    if "factors" in results:
        best = [max(column) for column in zip(*results["factors"]["correlation"], strict=True)]
        found["factor_correlation"] = math.fsum(best) / len(best)
    found |= scores(folder, options)
    for prior, of_prior in read_quality(folder, options).items():
        found |= {f"{prior}/{name}": value for name, value in of_prior.items()}
    return found


FROM_RECORDS = {
    "test_mse": "mse_sampled",
    "test_kl": "kl",
    "variance_law": "variance_law",
    "inactive": "inactive",
    "gamma2": "gamma2",
    "balance": "balance",
    "fid_rec": "rec",
    "fid_gen1": "gen1",
}


def _at(folder: Path, share: float, config: Mapping[str, Any]) -> dict[str, float | None]:
    """Figures after that share of each stage's epochs, from the nearest record that has them."""
    records = records_of(folder)
    found: dict[str, float | None] = {}
    for stage, epochs, names in (
        (1, "epochs", FROM_RECORDS),
        (2, "epochs2", {"fid_gen2": "gen2", "balance": "balance2"}),
    ):
        place = share * config.get(epochs, 0)
        for key, name in names.items():
            having = [r for r in records if r["stage"] == stage and r.get(key) is not None]
            if having:
                found[name] = min(having, key=lambda r: abs(r["epoch"] - place))[key]
    return found


def samples_picture(out: Path, slug: str) -> Path:
    """Samples of seed 0 of a row."""
    return out / KEPT / f"{slug}-samples.png"


# ---- points within the first epoch ----------------------------------------------------------------------------


def next_point(folder: Path, points: int) -> int | None:
    """The step up to which a run is to train next, so that its latents are known at `points` steps of its epoch.

    A record of an unfinished epoch holds means over the epoch so far; they are kept in FIRST_EPOCH after each leg.
    None where all are there.
    """
    path = folder / FIRST_EPOCH
    kept = read_json(path) or {"steps": [], "latent_sigma2": []}
    info = read_json(folder / "config.json")
    if not info:
        return 1
    steps = int(info["data"]["train"]) // int(info["config"]["batch"])
    targets = sorted({max(1, round(steps * i / (points - 1))) for i in range(points)})
    records = records_of(folder)
    if records and len(kept["steps"]) < len(targets):
        target, last = targets[len(kept["steps"])], records[-1]
        done = results_of(folder).get("stage1", {}).get("steps") == target
        if done and last.get("step") == target:
            kept["steps"].append(target)
            kept["latent_sigma2"].append(last["latent_sigma2"])
            write_atomically(path, encode_json(kept).encode())
    left = targets[len(kept["steps"]) :]
    return left[0] if left else None


def read_first_epoch(folder: Path) -> dict[str, Any]:
    """{"steps": [n], "latent_sigma2": [n][k]}: means over the steps since the point before."""
    kept = read_json(folder / FIRST_EPOCH)
    if not kept:
        return {}
    out: list[list[float]] = []
    before, sums = 0, [0.0] * len(kept["latent_sigma2"][0])
    for step, means in zip(kept["steps"], kept["latent_sigma2"], strict=True):
        now = [mean * step for mean in means]
        out.append([(b - a) / (step - before) for a, b in zip(sums, now, strict=True)])
        before, sums = step, now
    return {"steps": kept["steps"], "latent_sigma2": out}


# ---- progress -------------------------------------------------------------------------------------------------


def last_record(folder: Path) -> dict[str, Any]:
    """The last finished epoch of a run, read from the end of its file; {} where there is none."""
    try:
        with open(folder / "metrics.jsonl", "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 2**18))
            lines = file.read().splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            return record
    return {}
