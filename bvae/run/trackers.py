"""Trackers that a run can be logged to beside TensorBoard: Weights & Biases and MLflow, behind one interface.

Both are optional (`pip install 'bvae[wandb]'`, `'bvae[mlflow]'`) and take their own environment variables. Data they
need to go on with the same run after a resume is kept in the run's folder, in ``logger.json``.
"""

import importlib
import importlib.util
import json
import logging
import os
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from bvae.errors import UserError
from bvae.files import encode_json, write_atomically

IDENTITY = "logger.json"
HISTOGRAM_BUCKETS = 32
PROJECT = "bvae"

Status = Literal["finished", "stopped", "failed"]


class Tracker(Protocol):
    """The place a run is logged to. Any method may raise anything: `bvae.run.log.RunLog` then goes on without it."""

    name: str
    where: str
    """for people: the place to look at it"""

    def values(self, values: Mapping[str, Any], step: int) -> None:
        """Numbers and lists of numbers of an epoch, named as in TensorBoard; anything else is passed over."""

    def image(self, tag: str, array: np.ndarray, step: int) -> None:
        """A picture, uint8 [H,W,C], C 1 or 3."""

    def final(self, values: Mapping[str, float]) -> None:
        """The run's final figures."""

    def close(self, status: Status) -> None: ...


def require(name: str) -> None:
    """Raises UserError, naming the extra to install, where the tracker called `name` is not there."""
    if name != "none" and importlib.util.find_spec(name) is None:
        raise UserError(f"--logger {name}: {name} is not installed; pip install 'bvae[{name}]' brings it")


def open_tracker(name: str, folder: Path, config: Mapping[str, Any]) -> Tracker | None:
    """The tracker called `name`, going on with the run that ``logger.json`` in `folder` knows; None for "none".

    Raises UserError where it is not installed or cannot begin.
    """
    if name == "none":
        return None
    require(name)
    kinds: dict[str, type[WandbTracker] | type[MlflowTracker]] = {"wandb": WandbTracker, "mlflow": MlflowTracker}
    known = _identities(folder)
    try:
        tracker = kinds[name](folder, config, known.get(name))
    except Exception as error:  # whatever they raise, and they raise a lot
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"--logger {name}: cannot begin: {reason}") from error
    write_atomically(folder / IDENTITY, encode_json({**known, name: tracker.identity}).encode())
    return tracker


def _identities(folder: Path) -> dict[str, str]:
    try:
        known = json.loads((folder / IDENTITY).read_text())
    except (OSError, ValueError):  # a run without it is logged as a new one
        return {}
    return {k: v for k, v in known.items() if isinstance(v, str)} if isinstance(known, dict) else {}


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {k: v for k, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}


class WandbTracker:
    """Weights & Biases. With WANDB_MODE=offline it writes into ``wandb`` in the run's folder, for `wandb sync`.

    Curves are over each stage's own epochs. The project is WANDB_PROJECT or "bvae".
    """

    name = "wandb"

    def __init__(self, folder: Path, config: Mapping[str, Any], identity: str | None) -> None:
        self._wandb: Any = importlib.import_module("wandb")
        self.identity = identity or uuid.uuid4().hex[:12]
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=folder.resolve().name,
            id=self.identity,
            resume="allow",
            dir=str(folder),
            config=dict(config),
            # The progress display is ours, and what is printed need not be sent anywhere.
            settings=self._wandb.Settings(silent=True, console="off"),
        )
        for stage in (1, 2):
            self._run.define_metric(f"stage{stage}/epoch", hidden=True)
            self._run.define_metric(f"stage{stage}/*", step_metric=f"stage{stage}/epoch")
        self.where = f"{folder / 'wandb'} (offline)" if self._run.offline else self._run.url

    def values(self, values: Mapping[str, Any], step: int) -> None:
        sent: dict[str, Any] = dict(_numbers(values))
        for tag, value in values.items():
            if isinstance(value, list):
                array = np.asarray(value, np.float64)
                array = array[np.isfinite(array)]
                if array.size:
                    sent[tag] = self._wandb.Histogram(np_histogram=np.histogram(array, HISTOGRAM_BUCKETS))
        self._log(sent, step)

    def image(self, tag: str, array: np.ndarray, step: int) -> None:
        self._log({tag: self._wandb.Image(array[:, :, 0] if array.shape[2] == 1 else array)}, step)

    def _log(self, sent: dict[str, Any], step: int) -> None:
        stages = {tag.partition("/")[0] for tag in sent}
        self._run.log({**sent, **{f"{stage}/epoch": step for stage in stages}})

    def final(self, values: Mapping[str, float]) -> None:
        self._run.summary.update(dict(values))

    def close(self, status: Status) -> None:
        self._run.finish(exit_code=0 if status == "finished" else 1)


class MlflowTracker:
    """MLflow. Without MLFLOW_TRACKING_URI it writes ``mlflow.db`` and ``mlartifacts`` in the run's folder.

    Its metrics are numbers: the lists that others show as histograms are left out.
    """

    name = "mlflow"

    def __init__(self, folder: Path, config: Mapping[str, Any], identity: str | None) -> None:
        # A server that does not answer must not hold up training for minutes, and a local file needs no telemetry.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        mlflow: Any = importlib.import_module("mlflow")
        self._entities: Any = importlib.import_module("mlflow.entities")
        for chatty in ("mlflow", "alembic"):
            logging.getLogger(chatty).setLevel(logging.WARNING)
        place = folder.resolve()
        local = None if os.environ.get("MLFLOW_TRACKING_URI") else f"sqlite:///{place / 'mlflow.db'}"
        self._client: Any = mlflow.MlflowClient(tracking_uri=local)
        self.where = local or os.environ["MLFLOW_TRACKING_URI"]
        if identity is not None and self._goes_on(identity):
            self.identity = identity
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = (
            self._client.create_experiment(name, (place / "mlartifacts").as_uri() if local else None)
            if experiment is None
            else experiment.experiment_id
        )
        self.identity = self._client.create_run(experiment_id, run_name=place.name).info.run_id
        params = [self._entities.Param(key, str(value)) for key, value in config.items()]
        self._client.log_batch(self.identity, params=params)

    def _goes_on(self, identity: str) -> bool:
        """True if the known run is still there: somebody may have removed it, or the server may be another one."""
        try:
            self._client.update_run(identity, status="RUNNING")
        except Exception:
            return False
        return True

    def values(self, values: Mapping[str, Any], step: int) -> None:
        now = int(time.time() * 1000)
        metrics = [self._entities.Metric(tag, value, now, step) for tag, value in _numbers(values).items()]
        self._client.log_batch(self.identity, metrics=metrics)

    def image(self, tag: str, array: np.ndarray, step: int) -> None:
        self._client.log_image(self.identity, array, artifact_file=f"{tag}-epoch{step}.png")

    def final(self, values: Mapping[str, float]) -> None:
        self.values(values, 0)

    def close(self, status: Status) -> None:
        words = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
        self._client.set_terminated(self.identity, words[status])
