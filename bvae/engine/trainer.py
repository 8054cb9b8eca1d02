"""The training loop: the stages of a run one after the other, their records, checkpoints and results."""

import math
import time
from typing import Any, Protocol

from torch import Tensor

from bvae.config import Config
from bvae.data import Dataset
from bvae.engine.compiling import choose_way
from bvae.engine.graph import Runner
from bvae.engine.saving import Saver
from bvae.engine.step import Step
from bvae.engine.threads import note_busy_cores
from bvae.errors import Interrupted, UserError
from bvae.machine import training_kernels
from bvae.run.checkpoint import LAST, under
from bvae.run.folder import Run
from bvae.run.log import RunLog
from bvae.run.trackers import Tracker, open_tracker
from bvae.stages.base import Plateau, Progress, Stage, moment_figures
from bvae.two_stage import TwoStageVAE
from bvae.world import World

MAX_BAD_STEP_SCORE = 10  # a run whose Sums.bad_step_score reaches it is given up


class Stages(Protocol):
    """The stages of a run, in their order; each is made when the one before has ended."""

    config: Config
    data: Dataset
    model: TwoStageVAE
    amp: bool
    count: int

    def make(self, number: int) -> Stage: ...


class Trainer:
    """Trains the stages of a run into its folder.

    Args:
        stages: of a validated configuration, on data that it can be trained on.
        run: its folder: new, or with `state` the one that the state was read from.
        state: the last checkpoint (tensors, description), to go on from.
        quiet: show no progress.
        world: the processes that train together, connected. All of them make the same calls. Rank 0 alone writes.

    Attributes:
        stop: a signal's number, once one asks the run to end after the step under way.

    Raises UserError for a folder that cannot be used and a checkpoint that does not fit, before anything is written.
    """

    def __init__(
        self,
        stages: Stages,
        run: Run,
        state: tuple[dict[str, Tensor], dict[str, Any]] | None,
        world: World,
        quiet: bool = False,
    ) -> None:
        self.stages = stages
        self.config = stages.config
        self.model = stages.model
        self.run_folder = run
        self.world = world
        self.device = world.device
        self.stop: int | None = None
        self.results: dict[str, Any] = {}
        self.saver = Saver(run, stages.config, stages.data, stages.model, world)
        if state is None:
            self._start(1)
            if world.first:
                self.saver.begin(self.stage, self.step, self._state())
        else:
            self._restore(*state)
            if world.first:
                self.saver.write_config()  # settings that may change have perhaps changed
        finished = dict.fromkeys(range(1, self.stage.number), 10**9)
        finished[self.stage.number] = self.finished_epochs
        tracker = _open_tracker(run, self.config, new=state is None) if world.first else None
        folder = run.folder if world.first else None
        self.log = RunLog(folder, resume_after=None if state is None else finished, tracker=tracker, quiet=quiet)
        if tracker is not None:
            self.log.note(f"{tracker.name}: {tracker.where}")
        if self.config.amp and not stages.amp:
            self.log.note("--amp: in fp32, for there are no bf16 units here")
        world.wait()  # until all have read the folder: from now on it changes

    # ---- the loop -----------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Trains what is left of every stage; returns the run's results. The log stays open."""
        began = self.stage.number, self.steps
        while True:
            self._train()
            if self.results.get(self.stage.name, {}).get("steps") != self.steps:  # else resumed after this
                self._finish()
            if self.stage.number == self.stages.count:
                break
            self._start(self.stage.number + 1)
            self._save_or_stop()
        if self.world.first:
            self.model.save_weights(self.run_folder.folder)
            self.run_folder.write_results(self.results, same_model=(self.stage.number, self.steps) == began)
        return self.results

    def _start(self, number: int) -> None:
        """Makes a stage and stands before its first step."""
        self.stage = stage = self.stages.make(number)
        self.step = Step(stage.model, stage.objective, stage.noise, stage.latents, self.stages.amp, self.world)
        self.steps, self.seconds = 0, 0.0
        self.compiled: bool | None = None
        self.saver.begin_stage()
        self.plateau = Plateau(stage.schedule.plateau)

    def _train(self) -> None:
        """The host looks at the device at log points, checkpoints and epoch ends only.

        The runner is gone when it returns: a graph must not outlive the communicator whose exchanges it replays.
        """
        stage, total, per_epoch = self.stage, self.stage.schedule.steps, self.stage.batches.steps
        self.log.start(
            stage.number, math.ceil(total / per_epoch), per_epoch, self.steps,
            images_per_step=stage.batches.batch, total_steps=total,
        )  # fmt: skip
        runner: Runner | None = None
        while self.steps < total:
            epoch, first = divmod(self.steps, per_epoch)
            stage.model.train()
            stage.objective.train()
            self.step.set_lr(stage.schedule.lr_in(epoch, self.plateau.halvings))
            with training_kernels(self.device, self.stages.amp):
                runner = runner or self._runner()
                stage.batches.begin(epoch, first)
                started = time.monotonic()
                end = min((epoch + 1) * per_epoch, total)
                while self.steps < end:
                    every = self.config.log_every
                    n = runner.run(min(end - self.steps, every - self.steps % every))
                    self.steps += n
                    self.log.step(n, self._look() if self.steps % every == 0 else None)
                    # Not at an epoch's last step: a checkpoint between it and the epoch's end would lose that end.
                    if self.steps % per_epoch and self._due():
                        self.seconds += time.monotonic() - started
                        self._save_or_stop()
                        started = time.monotonic()
            self._look()  # waits for the device, so that the clock counts its work
            self.seconds += time.monotonic() - started
            if self.steps % per_epoch == 0:
                self._end_epoch(epoch + 1)
                self.step.sums.reset()
                if self._due():
                    self._save_or_stop()
        if self.steps % per_epoch:  # --max-steps ended the stage in mid-epoch; its sums stay, for a resume with more
            self._end_epoch(self.steps // per_epoch + 1)

    def _runner(self) -> Runner:
        def note(text: str) -> None:
            self.log.note(f"stage {self.stage.number}: {text}")

        if self.steps == 0 and self.config.threads is None:
            note_busy_cores(self.stage.batches, self.step, self.stage.schedule.steps, note)
        wanted = self.compiled if self.config.compile is None else self.config.compile
        batches, total = self.stage.batches, self.stage.schedule.steps
        runner, self.compiled = choose_way(batches, self.step, self.config.graph, wanted, total, note)
        if runner.why_eager is not None and self.device.type == "cuda":
            note(f"steps run one by one, not as a CUDA graph: {runner.why_eager}")
        return runner

    def _look(self) -> dict[str, float]:
        """Means since the epoch's start; ends the run where too many steps were not finite."""
        self.world.settle()
        sums = self.step.sums
        if sums.bad_step_score.item() >= MAX_BAD_STEP_SCORE:
            self.save()
            raise UserError(
                f"stage {self.stage.number}, step {self.steps}: too many steps with a loss or gradient that is not "
                f"finite; they were undone, the last good state is in {self.run_folder.folder / LAST}; start a new run "
                "with a lower --lr"
            )
        good = sums.counts[0].item()
        means = dict(zip(sums.names, (sums.parts / (good or math.nan)).tolist(), strict=True))
        return {**means, **{name: t.item() for name, t in self.stage.objective.figures().items()}}

    def _end_epoch(self, epoch: int) -> None:
        """Writes the epoch's line, scores the model when that is due and keeps the best weights."""
        stage, config, sums = self.stage, self.config, self.step.sums
        means = self._look()
        good, bad = sums.counts.tolist()
        record: dict[str, Any] = {
            "stage": stage.number,
            "epoch": epoch,
            "step": self.steps,
            **means,
            "lr": stage.schedule.lr_in(epoch - 1, self.plateau.halvings),
            "skipped": int(bad),
            "images_per_s": self._progress().samples_per_second,
            "seconds": self.seconds,
            **moment_figures(sums.moments, int(good * stage.batches.batch)),
        }
        self.step.moved.keep()
        scores, scores_fid = (self._falls_due(epoch, every) for every in (config.eval_every, config.fid_every))
        scores_fid = scores_fid and bool(config.fid_every)
        if scores or scores_fid:
            stage.prepare_scores()
        if scores:
            scored = stage.score()
            record |= scored.record
            better = self.saver.offer(scored.bound)
            if self.steps % stage.batches.steps == 0:  # an epoch that --max-steps cut short may go on
                self.plateau.score(epoch, better)
        if scores_fid:
            record |= stage.fid()
        self.step.moved.put_back()
        self.log.epoch(record)
        if (remark := stage.remark(record)) is not None:
            self.log.note(f"stage {stage.number}: {remark}")

    @property
    def finished_epochs(self) -> int:
        """Epochs that the stage under way has finished."""
        return self.steps // self.stage.batches.steps

    def _falls_due(self, epoch: int, every: int) -> bool:
        return bool(every and epoch % every == 0) or self.steps == self.stage.schedule.steps

    def _progress(self) -> Progress:
        return Progress(self.steps, self.seconds, self.stage.batches.batch)

    def _finish(self) -> None:
        """Ends the stage: results, then one checkpoint of it all, then a verdict on figures that are not finite."""
        self.results |= self.stage.finish(self._progress())
        weights = {"weights": "last", "best_chosen_on": "val" if self.config.val else "test"}
        self.results[self.stage.name] |= weights
        if self.world.first and self.stage.calibrates:
            self.saver.calibrate_best(self.stage)
        self._save_or_stop()
        for name in ("mse_sampled", "mse_mean", "kl", "gamma2"):
            value = self.results[self.stage.name].get(name, 0.0)
            if not math.isfinite(value):
                raise UserError(
                    f"{self.run_folder.folder}: stage {self.stage.number} has ended with {name} {value}: its weights "
                    "have diverged; start a new run with a lower --lr"
                )

    # ---- state on disk ------------------------------------------------------------------------------------------

    def _due(self) -> bool:
        """Is it time to save or stop after this step?"""
        if self.world.size > 1 and self.device.type == "cuda":
            # Agreeing waits for the device: only where the host looks at it anyway.
            looks = not (self.steps % self.config.log_every and self.steps % self.stage.batches.steps)
            return looks and any(self._agree())
        return any(self._agree())

    def _agree(self) -> tuple[int, bool]:
        """(the signal that told any rank to stop, or 0; whether any finds it time for a checkpoint)."""
        late = self.saver.waited() > self.config.checkpoint_seconds
        stop, agreed = self.world.largest(self.stop or 0, late)
        return stop, bool(agreed)

    def _save_or_stop(self) -> None:
        """Writes a checkpoint; then ends the run where a signal asked for it."""
        self.save()
        stop, _ = self._agree()
        if stop:
            raise Interrupted(stop, f"stopped in stage {self.stage.number} after step {self.steps}")

    def save(self) -> None:
        """Writes a checkpoint."""
        self.saver.save(self.stage, self.step, self._state(), self.results)

    def _state(self) -> dict[str, Any]:
        plateau = [self.plateau.halvings, self.plateau.since]
        return {"step": self.steps, "seconds": self.seconds, "compiled": self.compiled, "plateau": plateau}

    def _restore(self, tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
        self.model.load_tensors(under(tensors, "model"), self.run_folder.folder / LAST)
        self._start(description["stage"])
        self.results = description["results"]
        self.plateau.halvings, self.plateau.since = description.get("plateau", [0, 0])  # absent in runs of before
        self.steps, self.seconds = description["step"], description["seconds"]
        if self.steps and description.get("device") == self.device.type:  # a trial's choice goes on, with its bits
            self.compiled = description["compiled"]
        self.saver.restore(self.stage, self.step, tensors, description)


def _open_tracker(run: Run, config: Config, new: bool) -> Tracker | None:
    """The tracker of --logger. Where it cannot begin, neither does the run, and a new one leaves no folder."""
    try:
        return open_tracker(config.logger, run.folder, config.to_dict())
    except UserError:
        if new:
            run.remove()
        raise
