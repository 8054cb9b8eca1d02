"""Writing the report: what is read of each run, and the page made of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bvae.config import Config
from bvae.data import Dataset
from bvae.errors import UserError
from bvae.files import write_atomically
from bvae.machine import pick_device, versions
from bvae.report.page import RunContent, render
from bvae.report.views import Views, compute_views
from bvae.run.data import data_arguments, load_data
from bvae.run.folder import Run

REPORT = "report.html"
COMPARISON = "comparison.html"


class DataCache:
    """The images of one configuration at a time: runs that are compared mostly share theirs."""

    def __init__(self, source: str | None = None) -> None:
        """source: --data, in place of a run's own path."""
        self.source = source
        self.data: Dataset | None = None
        self.arguments: dict[str, Any] = {}

    def of(self, c: Config) -> Dataset:
        """Raises UserError where the images cannot be had."""
        arguments = data_arguments(c, self.source)
        if self.data is None or arguments != self.arguments:
            self.data = None  # not two sets at once
            self.data, self.arguments = load_data(c, self.source), arguments
        return self.data


def read_content(
    folder: Path | Run, name: str, cache: DataCache, device: str = "auto", views: Views | None = None
) -> RunContent:
    """What there is to show of a run, finished or not. Raises UserError where `folder` is no run at all.

    views: of its model, where they have been made already; neither the model nor the images are read then.
    """
    run = folder if isinstance(folder, Run) else Run(folder)
    content = RunContent(name, run.info, {}, [], "")
    # A part that cannot be read leaves a sentence: a report on half a run is worth having.
    try:
        content.results = run.results
    except UserError as error:
        content.notes.append(f"The final figures are missing: {error}.")
    try:
        content.records = run.records
    except UserError as error:
        content.notes.append(f"The curves are missing: {error}.")
    content.state = _state(content, run.finished)
    if views is not None:
        content.views, content.notes = views, content.notes + views.missing
        return content
    try:
        model = run.load_model(device=pick_device(device))
    except UserError as error:
        content.notes.append(f"There are no pictures, for the model cannot be read: {error}.")
        return content
    data = None
    try:
        data = cache.of(run.config)
    except UserError as error:
        if cache.source is not None:
            raise
        content.notes.append(
            f"Reconstructions and nearest training images are missing, for the images are not at hand: {error}. "
            "With --data PATH they are read from elsewhere."
        )
    trained_on = run.info.get("data", {}).get("digest")
    if data is not None and trained_on not in (None, data.digest):
        content.notes.append(f"The images, {data.name}, are not the ones this run was trained on.")
    stages = [stage for stage in _stages(content, run.finished) if stage == 1 or model.stage2 is not None]
    content.views = compute_views(model, content.records, data, stages, run.config.seed)
    content.notes += content.views.missing
    return content


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
    folders: Sequence[Path | Run],
    out: Path | None = None,
    *,
    source: str | None = None,
    device: str = "auto",
    views: Views | None = None,
) -> Path:
    """Writes the page on one run or several; returns where.

    Args:
        folders: of the runs, finished or not; or the runs themselves.
        out: the file; by default report.html in the run's folder, and comparison.html here for several runs.
        source: where images are read from; by default from where each run's own configuration says.
        views: of the only run, where they have been made already.

    Raises:
        UserError: for a folder that is no run, for a `source` that cannot be read, and where `out` cannot be written.
    """
    runs = [folder if isinstance(folder, Run) else Run(folder) for folder in folders]
    places = [run.folder.resolve() for run in runs]
    for place, run in zip(places, runs, strict=True):
        if places.count(place) > 1:
            raise UserError(f"{run.folder}: given twice")
    names = [place.name for place in places]
    if len(set(names)) < len(names):
        names = [str(run.folder) for run in runs]
    cache = DataCache(source)
    contents = [read_content(run, name, cache, device, views) for run, name in zip(runs, names, strict=True)]
    if out is None:
        out = runs[0].folder / REPORT if len(runs) == 1 else Path(COMPARISON)
    # Names of files need not be UTF-8.
    write_atomically(out, render(contents, versions()["bvae"]).encode(errors="backslashreplace"))
    return out
