"""Writing the report: what is read of each run, and the page made of it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bvae.config import Config
from bvae.data import Dataset
from bvae.engine.trainer import RESULTS
from bvae.errors import UserError
from bvae.files import exists, write_atomically
from bvae.machine import pick_device, versions
from bvae.report.page import RunContent, render
from bvae.report.views import Views, compute_views
from bvae.run.data import load_data
from bvae.run.log import METRICS, read_metrics
from bvae.two_stage import WEIGHTS, load, read_config, read_run

REPORT = "report.html"
COMPARISON = "comparison.html"


class DataCache:
    """The images of one configuration at a time: runs that are compared mostly share theirs."""

    def __init__(self, source: str | None = None) -> None:
        """source: --data, in place of a run's own path."""
        self.source = source
        self.data: Dataset | None = None
        self.key: tuple[Any, ...] = ()

    def of(self, c: Config) -> Dataset:
        """Raises UserError where the images cannot be had."""
        key = (c.data, c.side, c.channels, c.jpeg_roundtrip, c.data_seed, c.shapes_train, c.shapes_test)
        if self.data is None or key != self.key:
            self.data = None  # not two sets at once
            self.data, self.key = load_data(c, self.source), key
        return self.data


def read_content(
    folder: Path, name: str, cache: DataCache, device: str = "auto", views: Views | None = None
) -> RunContent:
    """What there is to show of a run, finished or not. Raises UserError where `folder` is no run at all.

    views: of its model, where they have been made already; neither the model nor the images are read then.
    """
    run = RunContent(name, read_run(folder), {}, [], "")
    # Whatever else cannot be read leaves a sentence: a report on half a run is worth having.
    try:
        run.results = _results(folder)
    except UserError as error:
        run.notes.append(f"The final figures are missing: {error}.")
    try:
        run.records = read_metrics(folder) if exists(folder / METRICS) else []
    except UserError as error:
        run.notes.append(f"The curves are missing: {error}.")
    finished = exists(folder / WEIGHTS)  # what training writes last; results may come from bvae.evaluate
    run.state = _state(run, finished)
    if views is not None:
        run.views, run.notes = views, run.notes + views.missing
        return run
    try:
        config = read_config(folder)
        model = load(folder, device=pick_device(device))
    except UserError as error:
        run.notes.append(f"There are no pictures, for the model cannot be read: {error}.")
        return run
    data = None
    try:
        data = cache.of(config)
    except UserError as error:
        if cache.source is not None:
            raise
        run.notes.append(
            f"Reconstructions and nearest training images are missing, for the images are not at hand: {error}. "
            "With --data PATH they are read from elsewhere."
        )
    trained_on = run.info.get("data", {}).get("digest")
    if data is not None and trained_on not in (None, data.digest):
        run.notes.append(f"The images, {data.name}, are not the ones this run was trained on.")
    stages = [stage for stage in _stages(run, finished) if stage == 1 or model.stage2 is not None]
    run.views = compute_views(model, run.records, data, stages, config.seed)
    run.notes += run.views.missing
    return run


def _results(folder: Path) -> Mapping[str, Any]:
    path = folder / RESULTS
    if not exists(path):
        return {}
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error})") from error
    if not isinstance(values, dict) or not all(isinstance(values.get(f"stage{n}", {}), dict) for n in (1, 2)):
        raise UserError(f"{path} does not hold the figures of a run")
    return values


def _stages(run: RunContent, finished: bool) -> list[int]:
    """The stages that have been trained, at least in part."""
    return [1, 2] if finished else sorted({1} | {r["stage"] for r in run.records} & {1, 2})


def _state(run: RunContent, finished: bool) -> str:
    if finished:
        return "Finished." if run.records or run.results else "A saved model, without the records of its training."
    if not run.records:
        return "Not finished: no epoch is over."
    last = run.records[-1]
    of = run.info["config"].get("epochs" if last["stage"] == 1 else "epochs2", "?")
    return (
        f"Not finished: stage {last['stage']} has had {last['epoch']} of {of} epochs. Pictures are of the last "
        "checkpoint, whose batch norm still lags behind its weights."
    )


def write_report(
    folders: Sequence[Path],
    out: Path | None = None,
    *,
    source: str | None = None,
    device: str = "auto",
    views: Views | None = None,
) -> Path:
    """Writes the page on one run or several; returns where.

    Args:
        folders: of the runs, finished or not.
        out: the file; by default report.html in the run's folder, and comparison.html here for several runs.
        source: where images are read from; by default from where each run's own configuration says.
        views: of the only run, where they have been made already.

    Raises:
        UserError: for a folder that is no run, for a `source` that cannot be read, and where `out` cannot be written.
    """
    places = [folder.resolve() for folder in folders]
    for place, folder in zip(places, folders, strict=True):
        if places.count(place) > 1:
            raise UserError(f"{folder}: given twice")
    names = [place.name for place in places]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    cache = DataCache(source)
    runs = [read_content(folder, name, cache, device, views) for folder, name in zip(folders, names, strict=True)]
    if out is None:
        out = folders[0] / REPORT if len(folders) == 1 else Path(COMPARISON)
    write_atomically(out, render(runs, versions()["bvae"]).encode())
    return out
