"""Properties of latents under a posterior over a data set: variance law, inactive latents, what each latent encodes."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

INACTIVE = 0.8  # the paper's threshold on E[sigma^2], footnote 3


def latent_variances(mu: Tensor, log_sigma: Tensor | None) -> tuple[Tensor, Tensor]:
    """(Var_x(mu_j), E_x[sigma_j^2]), each [k] float64, of a posterior mu, log_sigma [N,k]; Var is the population's.

    log_sigma: None stands for sigma = 0.
    """
    var_mu = mu.double().var(0, correction=0)
    return var_mu, torch.zeros_like(var_mu) if log_sigma is None else (2 * log_sigma.double()).exp().mean(0)


def variance_law(var_mu: Tensor, sigma2: Tensor) -> Tensor:
    """mean_j of Var_x(mu_j) + E_x[sigma_j^2], which should be 1 (eq. 7)."""
    return (var_mu + sigma2).mean()


def inactive(sigma2: Tensor) -> Tensor:
    """True for the latents [k] that carry nothing: E_x[sigma_j^2] >= 0.8."""
    return sigma2 >= INACTIVE


def factor_correlation(mu: np.ndarray, factors: np.ndarray, types: Sequence[float | str]) -> np.ndarray:
    """Absolute correlation of each latent with each factor.

    Args:
        mu: posterior means [N,k].
        factors: true factors [N,F].
        types: of each factor "linear"; "categorical", where the figure is the correlation ratio (the multiple
            correlation with the categories' indicators, whose order then means nothing); or, of a circular one, its
            period: the multiple correlation with cosine and sine, which does not depend on where the circle is cut.

    Returns:
        [k,F] in [0,1]; 0 where a latent or factor does not vary.
    """

    def standardised(columns: np.ndarray) -> np.ndarray:
        centred = columns - columns.mean(0)
        norm = np.sqrt((centred**2).sum(0))
        # Rounding leaves a constant column a small norm, which is proportional to the size of the constant.
        varies = norm > 1e-12 * np.sqrt(len(columns)) * np.abs(columns).max(0, initial=0)
        return np.divide(centred, norm, out=np.zeros_like(centred), where=varies)

    latent = standardised(np.asarray(mu, np.float64))
    result = np.zeros((latent.shape[1], factors.shape[1]))
    for f, kind in enumerate(types):
        column = np.asarray(factors[:, f], np.float64)
        if kind == "linear":
            columns = column[:, None]
        elif kind == "categorical":
            columns = (column[:, None] == np.unique(column)).astype(np.float64)
        else:
            angle = 2 * np.pi * column / float(kind)
            columns = np.stack([np.cos(angle), np.sin(angle)], 1)
        # The multiple correlation is the length of the projection onto the columns' span.
        u, s, _ = np.linalg.svd(standardised(columns), full_matrices=False)
        result[:, f] = np.sqrt(np.clip(((latent.T @ u[:, s > 1e-9]) ** 2).sum(1), 0, 1))
    return result
