"""The stage over images: a VAE of encoder and decoder, trained on uint8 images."""

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from bvae import ops
from bvae.batches.mapped import Images
from bvae.batches.resident import Batches
from bvae.config import Config
from bvae.data import Dataset
from bvae.data.shapes import FACTOR_TYPES
from bvae.metrics.fid_scores import FIDScorer
from bvae.metrics.latent import factor_correlation, inactive, latent_variances
from bvae.metrics.scores import Scores, score_images
from bvae.models.norm import recompute_statistics
from bvae.models.vae import VAE
from bvae.seeds import derive
from bvae.stages.base import Progress, Schedule, Scored, Stage
from bvae.stages.objective import Noise, Objective
from bvae.two_stage import TwoStageVAE
from bvae.world import World

EPOCH_BN_BATCHES = 50  # enough for a point on a curve; the final figures take --bn-batches


def bound(elements: int, mse: float, kl: float) -> float:
    """The negative ELBO up to constants, at the gamma that fits its own error: comparable over epochs."""
    return elements / 2 * math.log(max(mse, 1e-12)) + kl


class ImageStage(Stage):
    """Stage 1.

    Args:
        model: its first stage is trained.
        test: all test images. val: held-out training images, by which the best weights are chosen; may be None.
        amp: the networks run in bf16.
        fid: scores the epochs that --fid-every names; None where none are.
    """

    name = "stage1"
    number = 1

    def __init__(
        self,
        config: Config,
        model: TwoStageVAE,
        objective: Objective,
        batches: Batches,
        schedule: Schedule,
        noise: Noise,
        data: Dataset,
        test: Images,
        val: Images | None,
        amp: bool,
        fid: FIDScorer | None,
        world: World,
    ) -> None:
        self.config = config
        self.whole = model
        self.model: VAE = model.stage1
        self.objective = objective
        self.batches = batches
        self.schedule = schedule
        self.noise = noise
        self.latents = 0 if self.model.deterministic else config.latents
        self.data = data
        self.test = test
        self.val = val
        self.amp = amp
        self.scorer = fid
        self.world = world

    def score(self) -> Scored:
        record: dict[str, Any] = {}
        chosen = None
        for name, images in (("test", self.test), ("val", self.val)):
            if images is not None:
                chosen = score_images(self.model, images[: self.config.eval_images], self.config.seed, self.world)
                record[f"{name}_mse"] = chosen.figures["mse_sampled"]
                if "kl" in chosen.figures:
                    record[f"{name}_kl"] = chosen.figures["kl"]
                if name == "test":
                    shown = ("variance_law", "inactive", "code_variance")
                    record |= {key: chosen.figures[key] for key in shown if key in chosen.figures}
        assert chosen is not None
        elements = math.prod(self.test.shape[1:])
        # Of a deterministic family, the error alone.
        return Scored(record, bound(elements, chosen.figures["mse_sampled"], chosen.figures.get("kl", 0.0)))

    def fid(self) -> dict[str, Any]:
        return {} if self.scorer is None else self.scorer.curve(self.whole, 1, self.config.seed)

    def prepare_scores(self) -> None:
        self.recompute(min(self.config.bn_batches, EPOCH_BN_BATCHES))

    def recompute(self, count: int) -> None:
        """Batch-norm statistics over `count` training batches under the weights as they are, unless --bn ema."""
        if self.config.bn == "ema":
            return
        epochs = (self.batches.epoch(-1 - i) for i in itertools.count())  # shuffles that training does not use
        inputs = (x for x, _ in itertools.islice(itertools.chain.from_iterable(epochs), count))
        rng = ops.make_rng(derive(self.config.seed, "recompute"), self.noise.rng.device)

        def forward(x: Tensor) -> None:
            with torch.autocast(x.device.type, torch.bfloat16, enabled=self.amp):
                z, log_sigma = self.model.encode(x)
                if log_sigma is not None:
                    z = ops.sample_kl(z, log_sigma, rng, first_sample=self.noise.first_sample).z
                self.model.decoder(z)

        if recompute_statistics(self.model, inputs, forward) and self.world.size > 1:
            buffers = [b for b in self.model.buffers() if b.dtype == torch.float32 and b.is_contiguous()]
            for buffer, mean in zip(buffers, self.world.means(buffers), strict=True):
                buffer.copy_(mean)

    def finish(self, progress: Progress) -> dict[str, Any]:
        """Recomputes the batch-norm statistics, then measures the stage on the whole test set."""
        c = self.config
        with_moving_averages = score_images(self.model, self.test, c.seed, self.world).figures
        self.recompute(c.bn_batches)
        scores = score_images(self.model, self.test, c.seed, self.world)
        found: dict[str, Any] = dict(scores.figures)
        if (gamma2 := self.objective.figures().get("gamma2")) is not None:
            found |= {"gamma2": gamma2.item(), "gamma": math.sqrt(gamma2.item())}
        found |= {
            "steps": progress.steps,
            "images_per_s": progress.samples_per_second,
            "bn": c.bn,
            "mse_sampled_bn_ema": with_moving_averages["mse_sampled"],
            "mse_mean_bn_ema": with_moving_averages["mse_mean"],
        }
        results: dict[str, Any] = {self.name: found}
        if self.data.factors is not None:
            results["factors"] = factor_figures(self.data, scores)
        return results


def factor_figures(data: Dataset, scores: Scores) -> dict[str, Any]:
    """How the latents of the test images go with the true factors behind them (generated data only)."""
    factors = data.factors
    assert factors is not None
    mu = scores.posterior.mu.cpu().numpy()
    active = ~inactive(latent_variances(*scores.posterior)[1])
    found = {
        "names": list(factors.names),
        "true": len(factors.names),
        "active": int(active.sum()),
        "active_latents": active.nonzero().flatten().tolist(),
        "correlation": factor_correlation(mu, factors.test, FACTOR_TYPES).round(4).tolist(),
    }
    return found if scores.latent_kl is None else found | {"latent_kl": scores.latent_kl.tolist()}
