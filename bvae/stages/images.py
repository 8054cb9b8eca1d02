"""The stage over images: a VAE of encoder and decoder, trained on uint8 images."""

import math
from typing import Any

import torch

from bvae import ops
from bvae.batches.mapped import Images
from bvae.batches.resident import Batches
from bvae.config import Config
from bvae.data import Dataset
from bvae.data.shapes import FACTOR_TYPES
from bvae.engine.graph import Repeated
from bvae.metrics.fid_scores import FIDScorer
from bvae.metrics.latent import factor_correlation, inactive, latent_variances
from bvae.metrics.scores import Scores, score_images
from bvae.models.half import Copies, halved_weights
from bvae.models.norm import MeanStatistics
from bvae.models.vae import VAE
from bvae.seeds import derive
from bvae.stages.base import Progress, Schedule, Scored, Stage
from bvae.stages.objective import Noise, Objective
from bvae.two_stage import TwoStageVAE
from bvae.world import World

SETTLED = 0.45, 0.55  # bounds of sse/(2 gamma2 D), which is 1/2 where gamma2 is the error
FOLLOWING = ("computed", "learned", "optimal")  # balances whose gamma2 follows the error
LONG = 5  # epochs
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
        self.unsettled = 0
        self._statistics = MeanStatistics(self.model)
        self._copies = Copies(halved_weights(self.model) if amp else [])
        self._rng = torch.zeros_like(noise.rng)
        self._pass = Repeated(self._next_statistics, noise.rng.device, config.graph)

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
        # A deterministic family is judged by the error alone.
        return Scored(record, bound(elements, chosen.figures["mse_sampled"], chosen.figures.get("kl", 0.0)))

    def remark(self, record: dict[str, Any]) -> str | None:
        """A word, once, where a gamma that follows the error has been off it for long."""
        balance = record.get("balance", 0.5)
        settled = SETTLED[0] <= balance <= SETTLED[1] or self.config.balance not in FOLLOWING
        self.unsettled = 0 if settled else self.unsettled + 1
        if self.unsettled != LONG:
            return None
        return (
            f"sse/(2 gamma2 D) is {balance:.2f}, outside {SETTLED[0]:.2f}-{SETTLED[1]:.2f} for {LONG} epochs: gamma "
            "has not settled (docs/method.md says when it does)"
        )

    def fid(self) -> dict[str, Any]:
        return {} if self.scorer is None else self.scorer.curve(self.whole, 1, self.config.seed)

    def prepare_scores(self) -> None:
        self.recompute(min(self.config.bn_batches, EPOCH_BN_BATCHES))

    def recompute(self, count: int) -> None:
        """Batch-norm statistics over `count` training batches under the weights as they are, unless --bn ema."""
        if self.config.bn == "ema" or not self._statistics.norms:
            return
        self._rng.copy_(ops.make_rng(derive(self.config.seed, "recompute")))
        self._copies.renew()
        with torch.no_grad(), self._copies, self._statistics:
            for i in range(count):
                epoch, first = divmod(i, self.batches.steps)
                if first == 0:
                    self.batches.begin(-1 - epoch)  # shuffles that training does not use
                self.batches.fetch()
                self._pass()
        if self.world.size > 1:
            buffers = [b for b in self.model.buffers() if b.dtype == torch.float32 and b.is_contiguous()]
            for buffer, mean in zip(buffers, self.world.means(buffers), strict=True):
                buffer.copy_(mean)

    def _next_statistics(self) -> None:
        """One batch for `recompute`."""
        x, _ = self.batches.draw()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.amp):
            z, log_sigma = self.model.encode(x)
            if log_sigma is not None:
                z = ops.sample_kl(z, log_sigma, self._rng, first_sample=self.noise.first_sample).z
            self.model.decoder(z)
        self._statistics.add()

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
