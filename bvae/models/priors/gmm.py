"""A mixture of Gaussians with full covariances, fitted by scikit-learn and sampled here."""

import importlib.util
import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bvae import ops
from bvae.errors import UserError
from bvae.models.priors.base import HELD_OUT, Codes, FittedPrior, Progress
from bvae.models.priors.normal import standard_normal_log_prob
from bvae.seeds import derive


@dataclass(frozen=True)
class MixtureSettings:
    """Settings of the prior `gmm`."""

    gmm_components: int = 10
    """Gaussians in the mixture; some hundreds can memorise the training codes."""
    gmm_iterations: int = 2000
    """Most iterations of expectation maximisation."""
    gmm_tolerance: float = 1e-3
    """Expectation maximisation stops when the mean log-likelihood grows by less, in nats."""


class MixturePrior(FittedPrior):
    """p(w) = sum_c weight_c N(w; mean_c, L_c L_c^T) over whitened latents w (Ghosh et al. 2020 use 10 components)."""

    name = "gmm"
    Settings = MixtureSettings

    weights: Tensor
    means: Tensor
    factors: Tensor

    def __init__(self, latents: int, settings: MixtureSettings | None = None) -> None:
        super().__init__(latents, settings)
        m = self.settings.gmm_components
        self.register_buffer("weights", torch.full((m,), 1 / m, dtype=torch.float64))
        self.register_buffer("means", torch.zeros(m, latents, dtype=torch.float64))
        self.register_buffer("factors", torch.eye(latents, dtype=torch.float64).repeat(m, 1, 1))  # L, lower triangular

    @classmethod
    def check(cls, settings: MixtureSettings) -> None:
        if not 1 <= settings.gmm_components <= 100_000:
            raise UserError(f"--gmm-components must be from 1 to 100000, not {settings.gmm_components}")
        if settings.gmm_iterations < 1:
            raise UserError(f"--gmm-iterations must be at least 1, not {settings.gmm_iterations}")
        if not 0 <= settings.gmm_tolerance < math.inf:
            raise UserError(f"--gmm-tolerance must be a number of at least 0, not {settings.gmm_tolerance}")

    @classmethod
    def check_fit(cls) -> None:
        if importlib.util.find_spec("sklearn") is None:
            raise UserError("the prior gmm is fitted by scikit-learn, which is not installed: pip install 'bvae[gmm]'")

    def fewest(self) -> int:
        # The fit uses n - n // 10 of n images, and each component needs one.
        return max(super().fewest(), math.ceil(self.settings.gmm_components * HELD_OUT / (HELD_OUT - 1)))

    def _fit(self, codes: Codes, seed: int, progress: Progress) -> dict[str, Any]:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.mixture import GaussianMixture

        model = GaussianMixture(
            self.settings.gmm_components,
            covariance_type="full",
            max_iter=self.settings.gmm_iterations,
            tol=self.settings.gmm_tolerance,
            random_state=derive(seed, "gmm") % 2**32,
        )
        progress(0, 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # reported as `converged`
            model.fit(codes.draw().double().cpu().numpy())
        progress(1, 1)
        self.weights.copy_(torch.from_numpy(model.weights_))
        self.means.copy_(torch.from_numpy(model.means_))
        self.factors.copy_(torch.linalg.cholesky(torch.from_numpy(model.covariances_)))
        return {"iterations": int(model.n_iter_), "converged": bool(model.converged_)}

    def _sample(self, n: int, rng: Tensor) -> Tensor:
        noise = ops.philox_normal(rng, n, self.latents + 1)
        # The last column becomes a uniform number by the normal distribution function, and that a component.
        uniform = torch.special.ndtr(noise[:, -1].double())
        component = torch.bucketize(uniform, self.weights.cumsum(0)[:-1], right=True)
        w = torch.empty(n, self.latents, device=noise.device)
        for c, (mean, factor) in enumerate(zip(self.means.float(), self.factors.float(), strict=True)):
            rows = (component == c).nonzero()[:, 0]
            w[rows] = mean + noise[rows, :-1] @ factor.T
        return w

    def _log_prob(self, w: Tensor) -> Tensor:
        parts = []
        for weight, mean, factor in zip(self.weights, self.means, self.factors, strict=True):
            standard = torch.linalg.solve_triangular(factor, (w.double() - mean).T, upper=False).T
            parts.append(weight.log() - factor.diagonal().log().sum() + standard_normal_log_prob(standard))
        return torch.stack(parts).logsumexp(0)
