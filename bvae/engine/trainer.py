"""The trainer: one loop for both stages, its checkpoints, and what is measured and drawn at the end."""

import itertools
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bvae import ops
from bvae.balance import GaussianVAELoss, make_loss
from bvae.batches.mapped import is_mapped, resident
from bvae.batches.resident import Batches, LatentBatches
from bvae.batches.streamed import image_batches, place
from bvae.config import Config
from bvae.data import Dataset
from bvae.data.shapes import FACTOR_TYPES
from bvae.engine.compiling import choose_way
from bvae.engine.graph import Runner
from bvae.engine.step import Step
from bvae.errors import Interrupted, UserError
from bvae.files import encode_json, exists, write_atomically, writing
from bvae.machine import describe_device, has_bf16, training_kernels, versions
from bvae.metrics.fid_scores import fid_scorer, read_fid
from bvae.metrics.latent import INACTIVE, factor_correlation, inactive, latent_variances
from bvae.metrics.scores import Scores, encode_images, score_images, score_latents
from bvae.models.norm import batch_norms, recompute_statistics
from bvae.models.vae import VAE, l2_kernels
from bvae.report import figures
from bvae.report.views import Views, compute_views
from bvae.run.checkpoint import BEST, LAST, load_checkpoint, prefixed, save_checkpoint, under
from bvae.run.log import RunLog, read_metrics
from bvae.run.trackers import Tracker, open_tracker, require
from bvae.seeds import derive
from bvae.two_stage import CONFIG, TwoStageVAE
from bvae.world import World, gather

RESULTS = "results.json"
EPOCH_BN_BATCHES = 50  # enough for a point on a curve; the final figures take --bn-batches
MUCH_TROUBLE = 10  # the level of Sums.trouble at which a run is given up


@dataclass
class Stage:
    """What the loop needs to know of a stage."""

    number: int
    model: VAE
    batches: Batches
    step: Step
    epochs: int
    lr: float
    lr_halve: int
    total: int
    """steps it will have"""
    score: Callable[[], Scores]
    """on some of the test set"""
    done: int = 0
    """steps it has had"""
    seconds: float = 0.0
    """spent in them"""
    compiled: bool | None = None
    """whether torch.compile makes them; None: to be found out"""

    def lr_in(self, epoch: int) -> float:
        """The learning rate in `epoch`, counted from 0."""
        return self.lr * 0.5 ** (epoch // self.lr_halve)

    @property
    def finished_epochs(self) -> int:
        return self.done // self.batches.steps


class Trainer:
    """Trains both stages of a TwoStageVAE into a run folder.

    Args:
        config: validated.
        data: the images.
        folder: the run's folder: new, or with `resume` one that Trainer made.
        resume: go on from the folder's last checkpoint.
        quiet: show no progress.
        world: the processes that train together, connected; this one alone if None. All of them make the same calls.
            Rank 0 alone touches the folder, but for reading the checkpoint to go on from.

    Raises UserError for data that cannot be trained on, for a folder that cannot be used, and for a checkpoint that
    is damaged or of another run; before anything is written.
    """

    def __init__(
        self,
        config: Config,
        data: Dataset,
        folder: Path,
        resume: bool = False,
        quiet: bool = False,
        world: World | None = None,
    ) -> None:
        self.config = config
        self.data = data
        self.folder = folder
        self.world = world or World().connect(config.device)
        self.device = self.world.device
        self.amp = config.amp and has_bf16(self.device)
        self.stop: int | None = None  # set to a signal's number to end the run after the step under way
        if config.batch % self.world.size:
            raise UserError(
                f"--batch {config.batch} is that of a whole step: {self.world.size} processes cannot take equal parts"
            )
        if config.batch == self.world.size and config.smallest_side == 1 and not config.sync_bn:
            raise UserError(f"--batch {config.batch} is one image a process, which batch norm cannot normalise alone")
        if self.world.from_first(data.digest) != data.digest:
            raise UserError(f"{data.name}: rank {self.world.rank} does not have the data that rank 0 has")
        self.part = self.world.share(config.batch)
        if len(data.train) < config.batch:
            raise UserError(
                f"{data.name}: {len(data.train)} training images are fewer than one batch of {config.batch}: "
                "lower --batch"
            )
        require(config.logger)
        state = load_checkpoint(folder / LAST) if resume else None
        if state is not None:
            self._check_same_run(state[1])
        elif self.world.first and exists(folder):
            raise UserError(f"{folder}: exists already; choose another --out, or go on with --resume {folder}")

        torch.manual_seed(derive(config.seed, "weights"))
        self.model = TwoStageVAE(config).to(self.device)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if config.sync_bn and self.world.size > 1:
            for norm in batch_norms(self.model):
                norm.gather = gather
        self.train_images = place(data.train, self.device, config.stream)
        # Held out from a file of training images, the test set is in memory.
        self.test_images = place(data.test, self.device, config.stream if is_mapped(data.test) else "never")
        scored = self.test_images[: config.fid_num]
        self.fid = fid_scorer(config, resident(scored), self.world) if config.fid_every else None
        self.results: dict[str, Any] = {}
        self.best = math.inf
        self.best_model: dict[str, Tensor] | None = None
        self.saved_at = time.monotonic()
        self.views: Views | None = None  # of the run's end

        if state is None:
            self.stage = self._first_stage()
            if self.world.first:
                self._begin()
        else:
            self._restore(*state)
            if self.world.first:
                self._write_config()  # what may change has perhaps changed
        finished = {1: self.stage.finished_epochs}
        if self.stage.number == 2:
            finished = {1: 10**9, 2: self.stage.finished_epochs}
        mine = folder if self.world.first else None
        tracker = self._open_tracker(new=state is None) if self.world.first else None
        self.log = RunLog(mine, resume_after=finished if resume else None, tracker=tracker, quiet=quiet)
        if tracker is not None:
            self.log.note(f"{tracker.name}: {tracker.where}")
        if config.amp and not self.amp:
            self.log.note("--amp: in fp32, for there are no bf16 units here")
        self.world.wait()  # until all have read what there is: from now on it changes

    def _open_tracker(self, new: bool) -> Tracker | None:
        """The tracker of --logger. Where it cannot begin, neither does the run, and a new one leaves no folder."""
        try:
            return open_tracker(self.config.logger, self.folder, self.config.to_dict())
        except UserError:
            if new:
                shutil.rmtree(self.folder, ignore_errors=True)
            raise

    # ---- the run ----------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Trains what is left of both stages; returns its results, which results.json then holds."""
        began = self.stage.number, self.stage.done
        with self.log:
            if self.stage.number == 1:
                self.train(self.stage)
                if self.results.get("stage1", {}).get("steps") != self.stage.done:  # else resumed after this
                    self._finish_first_stage()
                if self.config.epochs2:
                    self.stage = self._second_stage()
                    self.best, self.best_model = math.inf, None
                self._save_or_stop()
            if self.stage.number == 2:
                self.train(self.stage)
                self._finish_second_stage()
                self._save_or_stop()
            if self.world.first:
                self._draw()
        if self.world.first:
            self.model.save_weights(self.folder)
            # What bvae.evaluate added to the results holds as long as the model is the same.
            scores = read_fid(self.folder / RESULTS) if (self.stage.number, self.stage.done) == began else {}
            write_atomically(self.folder / RESULTS, encode_json({**self.results, **scores}, indent=2).encode())
        return self.results

    def train(self, stage: Stage) -> None:
        """The loop, for either stage. The host looks at the device at log points, checkpoints and epoch ends only.

        The runner is gone when it returns: a graph must not outlive the communicator whose exchanges it replays.
        """
        steps = stage.batches.steps
        self.log.start(
            stage.number,
            math.ceil(stage.total / steps),
            steps,
            stage.done,
            images_per_step=stage.batches.batch,
            total_steps=stage.total,
        )
        runner: Runner | None = None
        while stage.done < stage.total:
            epoch, first = divmod(stage.done, steps)
            stage.model.train()
            stage.step.loss.train()
            stage.step.set_lr(stage.lr_in(epoch))
            with training_kernels(self.device, self.amp):
                if runner is None:
                    runner = self._runner(stage)
                stage.batches.begin(epoch, first)
                started = time.monotonic()
                end = min((epoch + 1) * steps, stage.total)
                while stage.done < end:
                    every = self.config.log_every
                    n = runner.run(min(end - stage.done, every - stage.done % every))
                    stage.done += n
                    self.log.step(n, self._look(stage) if stage.done % every == 0 else None)
                    # Not at an epoch's last step: a checkpoint between it and the epoch's end would lose that end.
                    if stage.done % steps and self._due():
                        stage.seconds += time.monotonic() - started
                        self._save_or_stop()
                        started = time.monotonic()
            self._look(stage)  # waits for the device, so that the clock counts its work
            stage.seconds += time.monotonic() - started
            if stage.done % steps == 0:
                self._end_epoch(stage, epoch + 1)
                stage.step.sums.reset()
                if self._due():
                    self._save_or_stop()
        if stage.done % steps:  # --max-steps ended the stage in mid-epoch; its sums stay, for a resume with more steps
            self._end_epoch(stage, stage.done // steps + 1)

    def _runner(self, stage: Stage) -> Runner:
        def note(text: str) -> None:
            self.log.note(f"stage {stage.number}: {text}")

        wanted = stage.compiled if self.config.compile is None else self.config.compile
        runner, stage.compiled = choose_way(stage.batches, stage.step, self.config.graph, wanted, stage.total, note)
        if runner.why_eager is not None and self.device.type == "cuda":
            note(f"steps run one by one, not as a CUDA graph: {runner.why_eager}")
        return runner

    def _due(self) -> bool:
        """Whether to save or stop after this step."""
        done = self.stage.done
        if self.world.size > 1 and self.device.type == "cuda":
            # Agreeing waits for the device: only where the host looks at it anyway.
            return not (done % self.config.log_every and done % self.stage.batches.steps) and any(self._agree())
        return any(self._agree())

    def _agree(self) -> tuple[int, bool]:
        """(the signal that told any rank to stop, or 0; whether any finds it time for a checkpoint)."""
        waited = time.monotonic() - self.saved_at
        stop, late = self.world.largest(self.stop or 0, waited > self.config.checkpoint_seconds)
        return stop, bool(late)

    def _save_or_stop(self) -> None:
        """Writes a checkpoint; then ends the run where a signal asked for it."""
        self.save()
        stop, _ = self._agree()
        if stop:
            raise Interrupted(stop, f"stopped in stage {self.stage.number} after step {self.stage.done}")

    def _look(self, stage: Stage) -> dict[str, float]:
        """Means since the epoch's start; ends the run where too many steps were not finite."""
        self.world.settle()
        sums = stage.step.sums
        if sums.trouble.item() >= MUCH_TROUBLE:
            self.save()
            raise UserError(
                f"stage {stage.number}, step {stage.done}: too many steps with a loss or gradient that is not finite; "
                f"they were undone, the last good state is in {self.folder / LAST}; start a new run with a lower --lr"
            )
        good = sums.counts[0].item()
        means = dict(zip(sums.NAMES, (sums.parts / (good or math.nan)).tolist(), strict=True))
        return {**means, "gamma2": stage.step.loss.current_gamma2().item()}

    def _end_epoch(self, stage: Stage, epoch: int) -> None:
        """Writes the epoch's line, measures the test loss when it is due and keeps the best model."""
        sums = stage.step.sums
        means = self._look(stage)
        good, bad = sums.counts.tolist()
        moments = (sums.moments / max(good * stage.batches.batch, 1)).cpu()
        record: dict[str, Any] = {
            "stage": stage.number,
            "epoch": epoch,
            "step": stage.done,
            **means,
            "lr": stage.lr_in(epoch - 1),
            "skipped": int(bad),
            "images_per_s": stage.done * stage.batches.batch / max(stage.seconds, 1e-9),
            "seconds": stage.seconds,
            "latent_var_mu": (moments[1] - moments[0] ** 2).tolist(),
            "latent_sigma2": moments[2].tolist(),
            "latent_kl": moments[3].tolist(),
        }
        kept = stage.step.statistics.clone()
        evaluates = self._falls_due(stage, epoch, self.config.eval_every)
        scores_fid = self.fid is not None and self._falls_due(stage, epoch, self.config.fid_every)
        if evaluates or scores_fid:
            self._recompute(stage, min(self.config.bn_batches, EPOCH_BN_BATCHES))
        if evaluates:
            scores = stage.score().figures
            record |= {"test_mse": scores["mse_sampled"], "test_kl": scores["kl"]}
            record |= {name: scores[name] for name in ("variance_law", "inactive")}
            # The negative ELBO up to constants, at the gamma of this moment's own test error: comparable over epochs.
            elements = math.prod(self.data.test.shape[1:]) if stage.number == 1 else self.config.latents
            bound = elements / 2 * math.log(max(scores["mse_sampled"], 1e-12)) + scores["kl"]
            if bound < self.best:
                self.best = bound
                if self.world.first:
                    self.best_model = {name: t.clone() for name, t in self.model.state_dict().items()}
        if self.fid is not None and scores_fid:
            record |= self.fid.curve(self.model, stage.number, self.config.seed)
        stage.step.statistics.copy_(kept)
        self.log.epoch(record)

    @staticmethod
    def _falls_due(stage: Stage, epoch: int, every: int) -> bool:
        return bool(every and epoch % every == 0) or stage.done == stage.total

    # ---- the stages -------------------------------------------------------------------------------------------

    def _loss(self, kl_weight: float, logits: bool) -> GaussianVAELoss:
        c = self.config
        loss = make_loss(
            c.balance,
            kl_weight=kl_weight,
            logits=logits,
            gamma=c.resolved_gamma(),
            accumulate=self.world.size > 1,  # the step moves gamma2, from all ranks' parts
        )
        return loss.to(self.device)

    def _step(self, number: int, model: VAE, loss: GaussianVAELoss, l2: float, kernels: list[Tensor]) -> Step:
        rng = ops.make_rng(derive(self.config.seed, "noise", number), self.device)
        return Step(model, loss, rng, self.config.latents, self.amp, l2, kernels, self.world, self.part.start)

    def _total(self, epochs: int, batches: Batches) -> int:
        return min(epochs * batches.steps, self.config.max_steps or epochs * batches.steps)

    def _first_stage(self) -> Stage:
        c, model = self.config, self.model.stage1
        batches = image_batches(
            self.train_images,
            c.batch,
            derive(c.seed, "batches", 1),
            torch.bfloat16 if self.amp else torch.float32,
            c.hflip,
            self.part,
        )
        loss = self._loss(c.resolved_kl_weight(), logits=True)
        step = self._step(1, model, loss, c.l2, l2_kernels(model, c.l2_on))
        some = self.test_images[: c.eval_images]
        total = self._total(c.epochs, batches)
        return Stage(
            1,
            model,
            batches,
            step,
            c.epochs,
            c.lr,
            c.lr_halve,
            total,
            lambda: score_images(model, some, c.seed, self.world),
        )

    def _second_stage(self) -> Stage:
        """The second stage on the frozen first one's posterior over the training set."""
        c, model = self.config, self.model.stage2
        assert model is not None
        self.model.stage1.requires_grad_(False)
        self.posterior = encode_images(self.model.stage1, self.train_images, self.world)
        batches = LatentBatches(*self.posterior, c.batch, derive(c.seed, "batches", 2), self.part)
        step = self._step(2, model, self._loss(1.0, logits=False), 0.0, [])
        some = encode_images(self.model.stage1, self.test_images[: c.eval_images], self.world)
        total = self._total(c.epochs2, batches)
        return Stage(
            2,
            model,
            batches,
            step,
            c.epochs2,
            c.lr2,
            c.lr_halve2,
            total,
            lambda: score_latents(model, some, c.seed, self.world),
        )

    def _recompute(self, stage: Stage, count: int) -> None:
        """Batch-norm statistics over `count` training batches under the weights as they are, unless --bn ema."""
        c, model = self.config, stage.model
        if c.bn == "ema" or stage.number == 2:
            return
        epochs = (stage.batches.epoch(-1 - i) for i in itertools.count())  # shuffles that training does not use
        inputs = (x for x, _ in itertools.islice(itertools.chain.from_iterable(epochs), count))
        rng = ops.make_rng(derive(c.seed, "recompute"), self.device)

        def forward(x: Tensor) -> None:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
                mu, log_sigma = model.encoder(x)
                model.decoder(ops.sample_kl(mu, log_sigma, rng, first_sample=self.part.start).z)

        recompute_statistics(model, inputs, forward)
        self.world.mean_(stage.step.statistics)

    def _finish_first_stage(self) -> None:
        """Recomputes the batch-norm statistics, then measures the stage on the whole test set."""
        c, model = self.config, self.model.stage1
        figures_ema = score_images(model, self.test_images, c.seed, self.world).figures
        self._recompute(self.stage, c.bn_batches)
        scores = score_images(model, self.test_images, c.seed, self.world)
        self.results["stage1"] = {
            **scores.figures,
            **self._gamma(self.stage),
            "steps": self.stage.done,
            "images_per_s": self.stage.done * c.batch / max(self.stage.seconds, 1e-9),
            "bn": c.bn,
            "mse_sampled_bn_ema": figures_ema["mse_sampled"],
            "mse_mean_bn_ema": figures_ema["mse_mean"],
        }
        self._refuse_divergence(1)
        if self.data.factors is not None:
            self.results["factors"] = self._factors(scores)

    def _finish_second_stage(self) -> None:
        c, stage = self.config, self.stage
        test = encode_images(self.model.stage1, self.test_images, self.world)
        self.results["stage2"] = {
            **score_latents(stage.model, test, c.seed, self.world).figures,
            **self._gamma(stage),
            "steps": stage.done,
            "latents_per_s": stage.done * c.batch / max(stage.seconds, 1e-9),
        }
        self._refuse_divergence(2)
        measured = self.model.measure_rescale(*self.posterior, seed=c.seed)
        self.results["rescale"] = {**measured, "applied": self.model.rescales}
        self.save()  # the best model too, which needs a rescale of its own to be sampled from
        if not self.world.first:
            return
        tensors, description = load_checkpoint(self.folder / BEST)
        best = TwoStageVAE(c)
        best.load_tensors(under(tensors, "model"), self.folder / BEST)
        best.to(self.device).measure_rescale(*self.posterior, seed=c.seed)
        save_checkpoint(self.folder / BEST, prefixed(best.state_dict(), "model"), description)

    def _refuse_divergence(self, number: int) -> None:
        """Ends the run where a stage's final figures are not finite."""
        for name, value in self.results[f"stage{number}"].items():
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(
                    f"{self.folder}: stage {number} has ended with {name} {value}: its weights have diverged; start a "
                    "new run with a lower --lr"
                )

    @staticmethod
    def _gamma(stage: Stage) -> dict[str, float]:
        gamma2 = stage.step.loss.current_gamma2().item()
        return {"gamma2": gamma2, "gamma": math.sqrt(gamma2)}

    def _factors(self, scores: Scores) -> dict[str, Any]:
        factors = self.data.factors
        assert factors is not None
        mu = scores.posterior.mu.cpu().numpy()
        active = ~inactive(latent_variances(*scores.posterior)[1])
        return {
            "names": list(factors.names),
            "true": len(factors.names),
            "active": int(active.sum()),
            "active_latents": active.nonzero().flatten().tolist(),
            "latent_kl": scores.latent_kl.tolist(),
            "correlation": factor_correlation(mu, factors.test, FACTOR_TYPES).round(4).tolist(),
        }

    # ---- state on disk ----------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Makes the run's folder with its configuration and a first checkpoint: under another name, then renamed."""
        folder = self.folder
        self.folder = folder.with_name(f".{folder.name}.{os.getpid()}")
        try:
            with writing(folder):
                (self.folder / "checkpoints").mkdir(parents=True)
            self._write_config()
            self.save()
            with writing(folder):
                self.folder.rename(folder)
        except BaseException:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise
        self.folder = folder

    def _write_config(self) -> None:
        values = {
            "model": "bvae",
            "config": self.config.to_dict(),
            "data": {
                "name": self.data.name,
                "path": self.config.data,
                "digest": self.data.digest,
                "train": len(self.data.train),
                "test": len(self.data.test),
            },
            "versions": versions(),
            "device": describe_device(self.device),
        }
        write_atomically(self.folder / CONFIG, encode_json(values, indent=2).encode())

    def save(self) -> None:
        """Writes the last checkpoint, and the best one where there is a new one."""
        if not self.world.first:
            self.saved_at = time.monotonic()
            return
        description = {
            "stage": self.stage.number,
            "step": self.stage.done,
            "seconds": self.stage.seconds,
            "compiled": self.stage.compiled,
            "device": self.device.type,
            "config": self.config.to_dict(),
            "data_digest": self.data.digest,
            "best": self.best if math.isfinite(self.best) else None,
            "results": self.results,
            "versions": versions(),
        }
        if self.best_model is not None:
            save_checkpoint(self.folder / BEST, prefixed(self.best_model, "model"), description)
            self.best_model = None
        tensors = {
            **prefixed(self.model.state_dict(), "model"),
            **prefixed(self.stage.step.tensors(), "step"),
            **prefixed(self.stage.batches.state(), "batches"),
        }
        save_checkpoint(self.folder / LAST, tensors, description)
        self.saved_at = time.monotonic()

    def _check_same_run(self, description: dict[str, Any]) -> None:
        path = self.folder / LAST
        saved = Config.from_dict(description["config"], path)
        changed = self.config.changed_definition(saved)
        if changed:
            name = changed[0]
            raise UserError(
                f"{self.folder}: cannot resume with --{name.replace('_', '-')} {getattr(self.config, name)}: the run "
                f"has {getattr(saved, name)}, and that defines it; start a new run"
            )
        if description["stage"] == 2 and self.config.epochs != saved.epochs:
            raise UserError(f"{self.folder}: cannot resume with --epochs {self.config.epochs}: stage 1 has ended")
        if description["data_digest"] != self.data.digest:
            raise UserError(
                f"{self.folder}: cannot resume: {self.data.name} is not the data the run was trained on "
                f"({self.data.digest[:23]}... instead of {description['data_digest'][:23]}...)"
            )

    def _restore(self, tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
        path = self.folder / LAST
        self.model.load_tensors(under(tensors, "model"), path)
        self.results = description["results"]
        self.best = math.inf if description["best"] is None else description["best"]
        self.stage = self._first_stage() if description["stage"] == 1 else self._second_stage()
        stage = self.stage
        stage.done, stage.seconds = description["step"], description["seconds"]
        if stage.done and description.get("device") == self.device.type:  # what a trial found goes on, with its bits
            stage.compiled = description["compiled"]
        try:
            stage.step.load_tensors({name: t.to(self.device) for name, t in under(tensors, "step").items()})
            stage.step.sums.trouble.zero_()  # what stopped a run is given another chance
            for name, t in stage.batches.state().items():
                t.copy_(tensors[f"batches.{name}"])
        except (KeyError, RuntimeError) as error:
            raise UserError(f"{path}: its optimiser state does not fit the model ({error})") from error

    # ---- pictures ---------------------------------------------------------------------------------------------

    def _draw(self) -> None:
        records = read_metrics(self.folder)
        self.views = compute_views(self.model, records, self.data, seed=self.config.seed)
        for name, picture in self.views.pictures().items():
            figures.save_png(self.folder / f"{name}.png", picture)
            self.log.image(name, picture, self.stage.finished_epochs)
        self.log.final(self.results, self.stage.finished_epochs)
        if any(r["stage"] == 1 for r in records):  # somebody may have removed the file
            figures.curves(records, self.folder / "curves.png")
            figures.latent_curves(records, self.folder / "latents.png", INACTIVE)
        if "factors" in self.results:
            f = self.results["factors"]
            active = np.zeros(self.config.latents, bool)
            active[f["active_latents"]] = True
            path = self.folder / "factors.png"
            figures.factor_correlation(
                np.array(f["correlation"]), f["names"], active, path, kl=np.array(f["latent_kl"])
            )
