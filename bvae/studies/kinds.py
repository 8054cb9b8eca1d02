"""A study as data: rows of settings, the figures that are read of each, and what others have published beside them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bvae.studies.statistics import MIN_FID_DIFFERENCE

ABSENT = "\u2013"
"""stands where there is no figure"""
SETTLED = (0.45, 0.55)
"""Range for sse/(2 gamma2 D) of the last epoch, under the rules that make it 1/2."""
SETTLING = ("computed", "learned", "optimal")
"""Balances under which gamma2 should equal the mse."""
FIDS = ("rec", "gen1", "gen2")


@dataclass(frozen=True)
class Published:
    """A figure as its authors print it, and where; only such as somebody has seen in the publication."""

    value: str
    source: str


@dataclass(frozen=True)
class FromRow:
    """A setting's value that the run of another row has found under the same seed: factor * metric."""

    row: str
    metric: str
    factor: float = 1.0

    def __str__(self) -> str:
        return f"{self.metric} of {self.row}" + (f" x {self.factor:g}" if self.factor != 1 else "")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of a study's table."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    """settings of bvae.train; they override the study's own"""
    data: str = ""
    """the data set by name, where a study has several"""
    run: str = ""
    """the row whose runs it reads; its own where empty"""
    at: float = 1.0
    """the share of either stage's epochs after which it is read; 1: the final figures"""
    read: Mapping[str, str] = field(default_factory=dict)
    """its metric -> the run's metric; a row that reads another's runs then has these figures alone"""
    fids: Mapping[str, int | None] = field(default_factory=lambda: dict.fromkeys(FIDS))
    """FID -> the number of seeds it is measured on (None: all); of a row with runs of its own"""
    priors: Mapping[str, int | None] = field(default_factory=dict)
    """prior -> the number of seeds it is fitted and scored on (None: all); of a row with runs of its own"""
    quality: Mapping[str, int | None] = field(default_factory=dict)
    """prior whose precision, recall, density and coverage are measured, `floor` for real training images -> the number
    of seeds (None: all); of a row with runs of its own"""
    moments: int = 0
    """points within the first epoch at which the latents' variances are read"""
    seeds: int | None = None
    """at most this number of seeds"""
    against: str = ""
    """the row it is compared with"""
    published: Mapping[str, Published] = field(default_factory=dict)

    @property
    def owner(self) -> str:
        return self.run or self.name

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9.]+", "-", self.name.lower()).strip("-")

    def takes(self, seed: int) -> bool:
        return self.seeds is None or seed < self.seeds


@dataclass(frozen=True, kw_only=True)
class Study:
    """A table: rows and columns, and what is drawn of it."""

    name: str
    title: str
    about: str
    """the question it asks, and notes for its readers"""
    rows: tuple[Row, ...]
    columns: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    """settings of bvae.train, in all rows"""
    judged: tuple[str, ...] = FIDS
    """metrics by which a row is compared with its `against`"""
    seeds: int = 5
    precision: str = "fp32"
    """precision of the FID network, where the command names none"""
    picture: str = ""
    """the kind of figure, see bvae.studies.pictures"""

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    @property
    def owners(self) -> list[Row]:
        return [row for row in self.rows if not row.run]


def is_fid(metric: str) -> bool:
    return metric in ("rec", "rec_mean", "fid") or metric.startswith("gen")


def matters(metric: str) -> float | None:
    """The smallest difference of this metric that matters."""
    return MIN_FID_DIFFERENCE if is_fid(metric) else None


LABELS = {
    "mse_sampled": "test mse",
    "mse_mean": "test mse, z = mu",
    "kl": "KL, nats",
    "variance_law": "variance law",
    "inactive": "inactive latents",
    "active": "active latents",
    "gamma2": "gamma2",
    "balance": "balance",
    "balance2": "balance, stage 2",
    "factor_correlation": "factor correlation",
    "rec": "REC",
    "rec_mean": "REC, z = mu",
    "gen1": "GEN-1",
    "gen2": "GEN-2",
    "gen2_rescaled": "GEN-2, rescaled",
    "fid": "FID",
}
FORMATS = {
    "mse_sampled": ".5f",
    "mse_mean": ".5f",
    "kl": ".2f",
    "variance_law": ".3f",
    "inactive": ".1f",
    "active": ".1f",
    "gamma2": ".5f",
    "balance": ".3f",
    "balance2": ".3f",
}


def label(metric: str) -> str:
    return LABELS.get(metric) or metric.replace("gen_", "GEN, ").replace("_", "-")


def shown(value: float | None, metric: str) -> str:
    return ABSENT if value is None else format(value, FORMATS.get(metric, ".2f" if is_fid(metric) else ".3f"))
