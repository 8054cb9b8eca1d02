"""The stage over latents: a dense VAE on the frozen first stage's posterior, from which GEN-2 samples."""

import math
from typing import Any

from bvae.batches.resident import Batches
from bvae.config import Config
from bvae.metrics.fid_scores import FIDScorer
from bvae.metrics.scores import score_latents
from bvae.models.posterior import Posterior
from bvae.models.vae import VAE
from bvae.stages.base import Progress, Schedule, Scored, Stage
from bvae.stages.images import bound
from bvae.stages.objective import Noise, Objective
from bvae.two_stage import TwoStageVAE
from bvae.world import World


class LatentStage(Stage):
    """Stage 2.

    Args:
        model: its second stage is trained; the first one is frozen.
        posterior: of the training set, from which batches are drawn and the latent rescale is measured.
        test: posterior of the whole test set. val: of the held-out images; may be None.
        fid: scores the epochs that --fid-every names; None where none are.
    """

    name = "stage2"
    number = 2
    calibrates = True

    def __init__(
        self,
        config: Config,
        model: TwoStageVAE,
        objective: Objective,
        batches: Batches,
        schedule: Schedule,
        noise: Noise,
        posterior: Posterior,
        test: Posterior,
        val: Posterior | None,
        fid: FIDScorer | None,
        world: World,
    ) -> None:
        assert model.stage2 is not None
        self.config = config
        self.whole = model
        self.model: VAE = model.stage2
        self.objective = objective
        self.batches = batches
        self.schedule = schedule
        self.noise = noise
        self.latents = config.latents
        self.posterior = posterior
        self.test = test
        self.val = val
        self.scorer = fid
        self.world = world

    def score(self) -> Scored:
        c = self.config
        mu, log_sigma = self.test
        some = Posterior(mu[: c.eval_images], None if log_sigma is None else log_sigma[: c.eval_images])
        figures = score_latents(self.model, some, c.seed, self.world).figures
        record = {"test_mse": figures["mse_sampled"], "test_kl": figures["kl"]}
        record |= {key: figures[key] for key in ("variance_law", "inactive")}
        if self.val is not None:
            figures = score_latents(self.model, self.val, c.seed, self.world).figures
            record |= {"val_mse": figures["mse_sampled"], "val_kl": figures["kl"]}
        return Scored(record, bound(c.latents, figures["mse_sampled"], figures["kl"]))

    def fid(self) -> dict[str, Any]:
        return {} if self.scorer is None else self.scorer.curve(self.whole, 2, self.config.seed)

    def finish(self, progress: Progress) -> dict[str, Any]:
        scores = score_latents(self.model, self.test, self.config.seed, self.world)
        gamma2 = self.objective.figures()["gamma2"].item()
        found = {
            **scores.figures,
            "gamma2": gamma2,
            "gamma": math.sqrt(gamma2),
            "steps": progress.steps,
            "latents_per_s": progress.samples_per_second,
        }
        return {self.name: found, "rescale": {**self.calibrate(), "applied": self.whole.rescales}}

    def calibrate(self) -> dict[str, float]:
        """Measures the latent rescale (Asperti & Trentin 2020, section IV-B) on the training set's posterior."""
        return self.whole.measure_rescale(*self.posterior, seed=self.config.seed)
