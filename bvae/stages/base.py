"""The contract between a stage and the loop that trains it."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from bvae.batches.resident import Batches
from bvae.stages.objective import Noise, Objective


@dataclass(frozen=True)
class Schedule:
    """Length and learning rate of a stage.

    epochs: asked for. steps: optimiser steps in all, which --max-steps may end in mid-epoch.
    plateau: epochs without a better score after which the learning rate is halved; 0: it never is.
    """

    epochs: int
    lr: float
    lr_halve: int
    steps: int
    plateau: int = 0

    def lr_in(self, epoch: int, halvings: int = 0) -> float:
        """The learning rate in `epoch`, counted from 0, after `halvings` plateaus."""
        return self.lr * 0.5 ** (epoch // self.lr_halve + halvings)


@dataclass
class Plateau:
    """The halvings of a learning rate by plateaus of the score.

    patience: epochs without a better score that make a plateau; 0: there are none.
    halvings: so far. since: the epoch, counted from 1, of the best score or of the last halving.
    """

    patience: int
    halvings: int = 0
    since: int = 0

    def score(self, epoch: int, better: bool) -> None:
        """Takes notice of a score at the end of `epoch`: whether it is better than all before it."""
        if better:
            self.since = epoch
        elif self.patience and epoch - self.since >= self.patience:
            self.halvings += 1
            self.since = epoch


class Scored(NamedTuple):
    """Scores of a stage's model on data that it was not trained on."""

    record: dict[str, Any]
    """figures for the epoch's line in metrics.jsonl"""
    bound: float
    """the lower, the better the weights; comparable over the epochs of the stage"""


class Progress(NamedTuple):
    """How far the loop has come in a stage."""

    steps: int
    seconds: float
    """spent in them"""
    batch: int

    @property
    def samples_per_second(self) -> float:
        return self.steps * self.batch / max(self.seconds, 1e-9)


class Stage(ABC):
    """A network, its batches, the objective that is minimised on them, and its scores. The loop knows nothing else.

    Attributes:
        name: "stage1", "stage2": of its results and curves. number: its place in the run, from 1.
        model: what is trained, on its device.
        latents: k of the objective's moments; 0 where it gives none.
        calibrates: whether `calibrate` measures anything.
    """

    name: str
    number: int
    model: nn.Module
    objective: Objective
    batches: Batches
    schedule: Schedule
    noise: Noise
    latents: int
    calibrates = False

    @abstractmethod
    def score(self) -> Scored:
        """Figures on some held-out data, in eval mode."""

    @abstractmethod
    def finish(self, progress: Progress) -> dict[str, Any]:
        """Ends the stage: brings the model into its final state and measures it on the whole test set.

        Returns what it adds to results.json: an entry of its own name, and perhaps others.
        """

    def prepare_scores(self) -> None:  # noqa: B027 (most stages have nothing to prepare)
        """Makes the model fit to be scored in mid-training; the loop puts its buffers back afterwards."""

    def remark(self, record: dict[str, Any]) -> str | None:
        """A line for the run's output about an epoch's figures, where they call for one."""
        return None

    def fid(self) -> dict[str, Any]:
        """FIDs for the epoch's line in metrics.jsonl; nothing where they are not asked for."""
        return {}

    def calibrate(self) -> dict[str, float]:
        """Measures under the weights as they are the figures that sampling needs, and keeps them in the model."""
        return {}


def moment_figures(moments: Tensor, samples: int) -> dict[str, list[float]]:
    """Sums [4,k] of mu, mu^2, sigma^2 and KL over `samples` samples -> the latents' figures in an epoch's line."""
    if not moments.shape[1]:
        return {}
    means = (moments / max(samples, 1)).cpu()
    return {
        "latent_var_mu": (means[1] - means[0] ** 2).tolist(),
        "latent_sigma2": means[2].tolist(),
        "latent_kl": means[3].tolist(),
    }
