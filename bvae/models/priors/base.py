"""The contract of a prior, and what all fitted priors share: held-out codes, whitening, fresh posterior samples."""

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bvae import ops
from bvae.errors import UserError
from bvae.models.posterior import Posterior
from bvae.seeds import derive

Progress = Callable[[int, int], None]  # steps done, steps in all

HELD_OUT = 10  # one code in ten is not fitted on
SCORED = 2048  # held-out images whose log-likelihood is measured
VARIANCE_FLOOR = 1e-6  # relative to the mean variance of a latent
CHUNK = 4096  # latents through a network at a time: bounds memory


def silent(done: int, total: int) -> None:
    """Progress that nobody follows."""


class Prior(nn.Module):
    """A density over latents z [n,k].

    Args:
        latents: k.
        settings: an instance of the class's `Settings`; by default its defaults.

    Raises:
        UserError: settings that cannot be, or an extra that is not installed.
    """

    name: ClassVar[str]
    Settings: ClassVar[type | None] = None
    """frozen dataclass of what can be set; None where nothing can"""
    fitted: ClassVar[bool] = False
    """False for a prior that is fixed, or that a stage of training makes"""

    def __init__(self, latents: int, settings: Any = None) -> None:
        super().__init__()
        self.latents = latents
        self.settings = self.Settings() if settings is None and self.Settings is not None else settings
        self.check(self.settings)

    @classmethod
    def check(cls, settings: Any) -> None:
        """Raises UserError where the prior cannot be built from `settings` here."""

    @classmethod
    def check_fit(cls) -> None:
        """Raises UserError where the prior could be built but not fitted here."""

    def fit(self, posterior: Posterior, *, seed: int, progress: Progress | None = None) -> dict[str, Any]:
        """Fits the prior to the aggregate posterior; {} for a prior that is not fitted.

        Returns:
            figures of the fit, which can be written as JSON.
        """
        return {}

    def sample(self, n: int, rng: Tensor) -> Tensor:
        """n latents [n,k] float32. `rng` is int64 [2] of bvae.ops.make_rng and does not advance.

        The same rng gives the same samples on every device up to rounding; the first m of n are those of m.
        """
        raise NotImplementedError

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z) in nats: [n,k] -> [n] float64."""
        raise NotImplementedError


class Whitening(nn.Module):
    """w = V^T (z - m) / s, with the mean m and the covariance V diag(s^2) V^T of the aggregate posterior.

    s^2 has the floor 1e-6 times the mean variance of a latent. A direction below it hardly varies, as a latent of a
    deterministic encoder that is not used; its codes then get Gaussian noise that fills the variance up to the floor
    (`fill`), so that the density exists and no prior meets a direction of variance 0.
    """

    mean: Tensor
    basis: Tensor
    scale: Tensor
    fill: Tensor

    def __init__(self, latents: int) -> None:
        super().__init__()
        for name, shape in (("mean", (latents,)), ("basis", (latents, latents)), ("scale", (latents,))):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("fill", torch.zeros(latents, dtype=torch.float64))

    def measure(self, posterior: Posterior) -> None:
        """Raises UserError where the codes do not vary at all."""
        mean, covariance = (t.cpu() for t in posterior.moments())  # eigh of a small matrix is faster there
        variance, basis = torch.linalg.eigh(covariance)
        average = variance.mean()
        if not average > 0:
            raise UserError("all images have the same code: there is nothing to fit a prior to")
        floor = VARIANCE_FLOOR * average
        self.mean.copy_(mean)
        self.basis.copy_(basis)
        self.scale.copy_(variance.clamp(min=floor).sqrt())
        self.fill.copy_((1 - variance / floor).clamp(0, 1).sqrt())

    def forward(self, z: Tensor) -> Tensor:
        """z [n,k] -> w [n,k] float32."""
        return (((z.double() - self.mean) @ self.basis) / self.scale).float()

    def filled(self, w: Tensor, rng: Tensor) -> Tensor:
        """w with noise in the directions below the floor; advances `rng`."""
        noise = ops.philox_normal(rng, len(w), w.shape[1])
        rng[1] += 1
        return w + noise * self.fill.float()

    def degenerate(self) -> int:
        """Number of directions below the floor."""
        return int((self.fill > 0).sum())

    def inverse(self, w: Tensor) -> Tensor:
        """w [n,k] -> z [n,k] float32."""
        return ((w.double() * self.scale) @ self.basis.T + self.mean).float()

    def log_det(self) -> Tensor:
        """log |dw/dz|, a float64 scalar."""
        return -self.scale.log().sum()


class Codes:
    """Whitened posterior samples of the images that a prior is fitted on; every draw has fresh noise."""

    def __init__(self, posterior: Posterior, whitening: Whitening, seed: int) -> None:
        self.posterior = posterior
        self.whitening = whitening
        self.device = device = posterior.mu.device
        self.count = len(posterior.mu)
        self.rng = ops.make_rng(derive(seed, "prior codes"), device)
        self.generator = torch.Generator(device).manual_seed(derive(seed, "prior order"))
        self.fills = whitening.degenerate() > 0  # found once: asking the device for it at every draw would wait

    @torch.no_grad()
    def draw(self, index: Tensor | None = None) -> Tensor:
        """w [n,k] float32 of all images, or of those at `index`."""
        posterior = self.posterior if index is None else self.posterior.rows(index)
        w = self.whitening(posterior.draw(self.rng))
        return self.whitening.filled(w, self.rng) if self.fills else w

    def batches(self, batch: int) -> Iterator[Tensor]:
        """Batches w [batch,k] without end, reshuffled every epoch; the last partial one is dropped."""
        batch = min(batch, self.count)
        while True:
            order = torch.randperm(self.count, generator=self.generator, device=self.device)
            for index in order[: self.count // batch * batch].split(batch):
                yield self.draw(index)


class FittedPrior(Prior):
    """A prior that is fitted after training, on whitened samples of the aggregate posterior.

    A subclass gives `_fit`, `_sample` and `_log_prob`, all over whitened latents w.
    """

    fitted = True

    def __init__(self, latents: int, settings: Any = None) -> None:
        super().__init__(latents, settings)
        self.whitening = Whitening(latents)

    def fit(self, posterior: Posterior, *, seed: int, progress: Progress | None = None) -> dict[str, Any]:
        """Fits the prior to nine tenths of the images; see `split`.

        Args:
            posterior: of the training images, on the prior's device.
            seed: fixes the held-out tenth, the noise and the initial weights. On a CPU it fixes the result.
            progress: called with the steps done and the steps in all.

        Returns:
            figures: `log_likelihood`, the mean log p(z) in nats of samples z of held-out images, and `error`, its
            standard error; `fitted_on`, `held_out` and `scored`, numbers of images (at most 2,048 of those held out are
            scored: the same ones, with the same noise, for every prior of one seed); `degenerate`, directions whose
            variance is below the floor (see Whitening); and figures of the prior's own.

        Raises:
            UserError: codes that are not finite, that do not vary or are too few, or a fit that did not converge to
                finite numbers.
        """
        posterior = Posterior(*posterior)
        self._check_codes(posterior)
        fitted, held_out = split(len(posterior.mu), seed, posterior.mu.device)
        self.whitening.measure(posterior.rows(fitted))
        own = self._fit(Codes(posterior.rows(fitted), self.whitening, seed), seed, progress or silent)
        scored = Codes(posterior.rows(held_out[:SCORED]), self.whitening, derive(seed, "held out")).draw()
        with torch.no_grad():
            log_likelihood = self._log_prob(scored) + self.whitening.log_det()
        if not bool(log_likelihood.isfinite().all()):
            raise UserError(f"the fit of the prior {self.name} ended with numbers that are not finite")
        error = log_likelihood.std(correction=0) / len(log_likelihood) ** 0.5
        return {
            "log_likelihood": log_likelihood.mean().item(),
            "error": error.item(),
            "fitted_on": len(fitted),
            "held_out": len(held_out),
            "scored": len(scored),
            "degenerate": self.whitening.degenerate(),
            **own,
        }

    def _check_codes(self, posterior: Posterior) -> None:
        n, k = posterior.mu.shape
        if k != self.latents:
            raise ValueError(f"the posterior has {k} latents, the prior {self.latents}")
        if n < self.fewest():
            raise UserError(f"the prior {self.name} needs at least {self.fewest()} images, not {n}")
        for part in posterior:
            if part is not None and not bool(part.isfinite().all()):
                raise UserError("the encoder gives codes that are not finite: no prior can be fitted to them")

    def fewest(self) -> int:
        """Images that a fit needs, held-out ones included."""
        return 2 * HELD_OUT

    @torch.no_grad()
    def sample(self, n: int, rng: Tensor) -> Tensor:
        return self.whitening.inverse(self._sample(n, rng))

    @torch.no_grad()
    def log_prob(self, z: Tensor) -> Tensor:
        return self._log_prob(self.whitening(z)) + self.whitening.log_det()

    def _fit(self, codes: Codes, seed: int, progress: Progress) -> dict[str, Any]:
        """Fits the density of w; returns figures of its own."""
        raise NotImplementedError

    def _sample(self, n: int, rng: Tensor) -> Tensor:
        raise NotImplementedError

    def _log_prob(self, w: Tensor) -> Tensor:
        """[n,k] -> [n] float64"""
        raise NotImplementedError


def split(count: int, seed: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """(images fitted on, images held out): int64 indices, one in ten held out, the same on every device."""
    generator = torch.Generator().manual_seed(derive(seed, "prior held out"))
    order = torch.randperm(count, generator=generator).to(device)
    return order[count // HELD_OUT :], order[: count // HELD_OUT]
