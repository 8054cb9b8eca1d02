"""Files that a training keeps: its last state, and the best weights of the stage under way."""

import math
import time
from typing import Any

from torch import Tensor

from bvae.config import Config
from bvae.data import Dataset
from bvae.engine.step import Step
from bvae.errors import UserError
from bvae.machine import describe_device, versions
from bvae.run.checkpoint import LAST, prefixed, under
from bvae.run.folder import Run
from bvae.stages.base import Stage
from bvae.two_stage import TwoStageVAE
from bvae.world import World


class Saver:
    """The checkpoints of a run.

    Args:
        run: the run's folder; rank 0 alone writes to it.
        model: the whole model, of every stage.

    Attributes:
        best: the bound of the best weights of the stage under way; infinite before there are any.
    """

    def __init__(self, run: Run, config: Config, data: Dataset, model: TwoStageVAE, world: World) -> None:
        self.run = run
        self.config = config
        self.data = data
        self.model = model
        self.world = world
        self.begin_stage()
        self._saved_at = time.monotonic()

    def begin_stage(self) -> None:
        """Forgets the best weights, which were another stage's."""
        self.best = math.inf
        self._best_weights: dict[str, Tensor] | None = None
        self._unsaved = False

    def waited(self) -> float:
        """Seconds since the last checkpoint."""
        return time.monotonic() - self._saved_at

    def offer(self, bound: float) -> bool:
        """Keeps the weights as they are where `bound` is the lowest so far; returns whether it is."""
        better = bound < self.best
        if better:
            self.best = bound
            self._keep_weights()
        return better

    def _keep_weights(self) -> None:
        if self.world.first:
            self._best_weights = {name: t.clone() for name, t in self.model.state_dict().items()}
            self._unsaved = True

    def calibrate_best(self, stage: Stage) -> None:
        """Measures for the best weights too the figures that sampling from them needs."""
        best = self._best_weights or self.run.load_best()
        if not best:
            return
        last = {name: t.clone() for name, t in self.model.state_dict().items()}
        self.model.load_state_dict(best)
        stage.calibrate()
        self._keep_weights()
        self.model.load_state_dict(last)

    def save(self, stage: Stage, step: Step, progress: dict[str, Any], results: dict[str, Any]) -> None:
        """Writes the last checkpoint, and the best one where there are new best weights.

        progress: {"step", "seconds", "compiled", "plateau"} of the stage.
        """
        self._save(self.run, stage, step, progress, results)

    def begin(self, stage: Stage, step: Step, progress: dict[str, Any]) -> None:
        """Makes the run's folder, with its configuration and a first checkpoint."""

        def write(run: Run) -> None:
            self.write_config(run)
            self._save(run, stage, step, progress, {})

        self.run.begin(write)

    def write_config(self, run: Run | None = None) -> None:
        (run or self.run).write_config(self.config, self.data, describe_device(self.world.device))

    def _save(self, run: Run, stage: Stage, step: Step, progress: dict[str, Any], results: dict[str, Any]) -> None:
        self._saved_at = time.monotonic()
        if not self.world.first:
            return
        description = {
            "stage": stage.number,
            **progress,
            "device": self.world.device.type,
            "config": self.config.to_dict(),
            "data_digest": self.data.digest,
            "best": self.best if math.isfinite(self.best) else None,
            "results": results,
            "versions": versions(),
        }
        if self._unsaved and self._best_weights is not None:
            run.save_best(prefixed(self._best_weights, "model"), description)
            self._unsaved = False
        tensors = {
            **prefixed(self.model.state_dict(), "model"),
            **prefixed(step.tensors(), "step"),
            **prefixed(stage.batches.state(), "batches"),
        }
        run.save_state(tensors, description)

    def restore(self, stage: Stage, step: Step, tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
        """Takes over a checkpoint's state beside the model. Raises UserError where it does not fit."""
        self.best = math.inf if description["best"] is None else description["best"]
        try:
            step.load_tensors({name: t.to(self.world.device) for name, t in under(tensors, "step").items()})
            step.sums.bad_step_score.zero_()  # a run that was given up gets another chance
            for name, t in stage.batches.state().items():
                t.copy_(tensors[f"batches.{name}"])
        except (KeyError, RuntimeError) as error:
            path = self.run.folder / LAST
            raise UserError(f"{path}: its optimiser state does not fit the model ({error})") from error
