"""A set of images as FID sees it: mean, covariance and count of its features, and how the features were made.

Files are .npz with the arrays `mu` and `sigma`, which pytorch-fid reads too, beside `meta`, JSON in bytes. Nothing in
them is ever unpickled.
"""

import dataclasses
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typeguard import check_type

from bvae.errors import UserError
from bvae.files import encode_json, write_atomically
from bvae.metrics.frechet import frechet_distance, frechet_distance_of_features
from bvae.metrics.inception import FEATURES

FEW = 2048  # images on a side, below which the covariance has no full rank and FID says little
LABEL_FEW = "few images"


@dataclass(frozen=True)
class Origin:
    """Everything besides the images that decides about features.

    protocol: its name, with what was done to the images before it: `tf1`, `tf1+jpeg`, `tf1+stretch`, ...
    weights: digest of the network's weights.
    precision: fp32 or bf16.

    Each is None for a file that does not say, as other tools' do not.
    """

    protocol: str | None
    weights: str | None
    precision: str | None

    @property
    def base(self) -> str | None:
        """The protocol's name alone."""
        return None if self.protocol is None else self.protocol.split("+", 1)[0]


UNKNOWN = Origin(None, None, None)


@dataclass(frozen=True)
class Statistics:
    """Feature statistics of one set of images.

    mean [d], covariance [d,d]: float64.
    n: images; None where a file does not say.
    features: [n,d] float32 where they were kept.
    notes: lines for the user: what else the file holds.
    """

    mean: Tensor
    covariance: Tensor
    n: int | None
    origin: Origin
    features: Tensor | None = None
    notes: tuple[str, ...] = ()

    def to(self, device: torch.device) -> "Statistics":
        features = None if self.features is None else self.features.to(device)
        return dataclasses.replace(
            self, mean=self.mean.to(device), covariance=self.covariance.to(device), features=features
        )

    def without_features(self) -> "Statistics":
        return dataclasses.replace(self, features=None)


def fid(a: Statistics, b: Statistics) -> float:
    """The Frechet Inception distance. Raises UserError where the two are not of one making."""
    if a.mean.shape != b.mean.shape:
        raise UserError(f"statistics of {len(a.mean)} and of {len(b.mean)} features cannot be compared")
    if None not in (a.origin.base, b.origin.base) and a.origin.base != b.origin.base:
        raise UserError(f"statistics of protocol {a.origin.base} and of {b.origin.base} cannot be compared")
    if None not in (a.origin.precision, b.origin.precision) and a.origin.precision != b.origin.precision:
        raise UserError(f"features in {a.origin.precision} and in {b.origin.precision} cannot be compared")
    if None not in (a.origin.weights, b.origin.weights) and a.origin.weights != b.origin.weights:
        raise UserError("statistics by different weights of the network cannot be compared")
    if a.features is not None and b.features is not None and min(len(a.features), len(b.features)) < len(a.mean):
        return frechet_distance_of_features(a.features, b.features)
    return frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


def check_enough(n: int | None, what: str, allow_few: bool) -> str | None:
    """The label of a figure from n images of `what`; raises UserError for too few that were not allowed."""
    if n is None or n >= FEW:
        return None
    if not allow_few:
        raise UserError(
            f"{what}: {n} images; fewer than {FEW} give an FID that says little and cannot be compared "
            "(--allow-few measures it nevertheless, and labels it)"
        )
    return LABEL_FEW


# ---- files ----------------------------------------------------------------------------------------------------------


def save_statistics(path: Path, statistics: Statistics, meta: dict[str, Any] | None = None) -> None:
    """Writes `path`, whole or not at all; `meta` is stored beside what is known of their making."""
    values = {"n": statistics.n, **dataclasses.asdict(statistics.origin), **(meta or {})}
    arrays = {
        "mu": statistics.mean.cpu().numpy(),
        "sigma": statistics.covariance.cpu().numpy(),
        "meta": np.frombuffer(encode_json(values).encode(), np.uint8),
    }
    if statistics.features is not None:
        arrays["features"] = statistics.features.cpu().numpy()
    data = io.BytesIO()
    np.savez(data, **arrays)  # type: ignore[arg-type]
    write_atomically(path, data.getvalue())


def holds_statistics(names: list[str]) -> bool:
    """True if an .npz with these arrays holds statistics."""
    return {"mu", "sigma"} <= set(names)


def load_statistics(path: Path) -> tuple[Statistics, dict[str, Any]]:
    """(statistics, the whole `meta`) of a file of save_statistics or of pytorch-fid.

    Other tools' say nothing of their making: their origin is UNKNOWN.
    Raises UserError for what is damaged, holds objects, or cannot be a mean and a covariance.
    """
    arrays = {}
    try:
        with np.load(path, allow_pickle=False) as archive:
            for name in ("mu", "sigma", "meta", "features"):
                if name in archive.files:
                    arrays[name] = archive[name]
        meta = json.loads(arrays["meta"].tobytes()) if "meta" in arrays else {}
        n = meta.get("n")
        origin = Origin(meta["protocol"], meta.get("weights"), meta.get("precision", "fp32")) if meta else UNKNOWN
        check_type(n, int | None)
        check_type(dataclasses.astuple(origin), tuple[str | None, str | None, str | None])
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # NumPy and zipfile report damage in many ways
        raise UserError(
            f"{path}: not readable statistics ({str(error).splitlines()[0] if str(error) else error!r})"
        ) from error
    for name in ("mu", "sigma"):
        array = arrays.get(name)
        if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
            raise UserError(f"{path}: not statistics: {name} is missing or not of real numbers")
        if not np.isfinite(array).all():
            raise UserError(f"{path}: {name} holds values that are not finite")
    mu, sigma = arrays["mu"], arrays["sigma"]
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise UserError(f"{path}: mu {list(mu.shape)} and sigma {list(sigma.shape)} are no mean and covariance")
    features = arrays.get("features")
    if n is not None and n < 2:
        raise UserError(f"{path}: statistics of {n} image(s), which have no covariance")
    _check_covariance(path, torch.from_numpy(sigma.astype(np.float64)))
    if features is not None and (features.dtype.kind != "f" or features.shape != (n, len(mu))):
        raise UserError(f"{path}: features {list(features.shape)} are not of {n} images")
    return (
        Statistics(
            torch.from_numpy(mu.astype(np.float64)),
            torch.from_numpy(sigma.astype(np.float64)),
            n,
            origin,
            None if features is None else torch.from_numpy(features),
        ),
        meta,
    )


def _check_covariance(path: Path, sigma: Tensor) -> None:
    """Refuses what is no covariance: not symmetric, or with variances below 0 beyond the rounding of float32."""
    largest = sigma.abs().max()
    if (sigma - sigma.T).abs().max() > 1e-5 * largest:
        raise UserError(f"{path}: sigma is no covariance: it is not symmetric")
    trace = sigma.trace()
    shifted = sigma + torch.eye(len(sigma), dtype=sigma.dtype) * (1e-6 * trace.abs() + torch.finfo(sigma.dtype).tiny)
    if trace < 0 or torch.linalg.cholesky_ex(shifted).info:
        raise UserError(f"{path}: sigma is no covariance: in some direction the variance is below 0")


def check_dimension(statistics: Statistics, path: Path | str) -> None:
    """Raises UserError for statistics that no image's features can be compared with."""
    if len(statistics.mean) != FEATURES:
        raise UserError(f"{path}: statistics of {len(statistics.mean)} features, images have {FEATURES}")
