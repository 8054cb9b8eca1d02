"""One Gaussian with a full covariance."""

from torch import Tensor

from bvae import ops
from bvae.models.priors.base import Codes, FittedPrior, Progress
from bvae.models.priors.normal import standard_normal_log_prob


class GaussianPrior(FittedPrior):
    """N(m, C) with the mean and covariance of the aggregate posterior, which are exact: no noise is drawn for them."""

    name = "gaussian"

    def _fit(self, codes: Codes, seed: int, progress: Progress) -> dict[str, object]:
        return {}  # the whitening is the fit

    def _sample(self, n: int, rng: Tensor) -> Tensor:
        return ops.philox_normal(rng, n, self.latents)

    def _log_prob(self, w: Tensor) -> Tensor:
        return standard_normal_log_prob(w)
