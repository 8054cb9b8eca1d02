"""Parts of a run that a study keeps for its figures, so that the run's folder may go: curves, samples."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bvae.files import encode_json, exists, write_atomically
from bvae.studies.cells import KEPT, read_first_epoch, read_json, records_of, samples_picture
from bvae.studies.plan import Cell

MOST_POINTS = 200
"""most points of a curve; more cannot be told apart"""
CURVES = ("mse", "kl", "gamma2", "balance", "test_mse", "test_kl", "inactive", "fid_rec", "fid_gen1", "fid_gen2")

Curve = Mapping[str, list[float]]
"""epochs and values"""


def kept_file(out: Path, cell: Cell) -> Path:
    return out / KEPT / f"{cell.name}.json"


def keep(out: Path, folder: Path, cell: Cell, slug: str, latents: bool) -> None:
    """Copies from a run's folder what the figures need. latents: E(sigma^2) of every latent and epoch too."""
    records = records_of(folder)
    found: dict[str, Any] = {f"stage{stage}": _curves(records, stage) for stage in (1, 2)}
    if latents:
        own = [r for r in records if r["stage"] == 1 and "latent_sigma2" in r]
        found["latents"] = {
            "epoch": [r["epoch"] for r in own],
            "sigma2": [[round(v, 5) for v in r["latent_sigma2"]] for r in own],
        }
    found |= {"first_epoch": first} if (first := read_first_epoch(folder)) else {}
    write_atomically(kept_file(out, cell), encode_json(found).encode())
    if cell.seed == 0:
        for stage in (2, 1):
            source = folder / f"samples-stage{stage}.png"
            if exists(source):
                shutil.copyfile(source, samples_picture(out, slug))
                break


def _curves(records: Sequence[Mapping[str, Any]], stage: int) -> dict[str, Curve]:
    found: dict[str, Curve] = {}
    for key in CURVES:
        points = [(r["epoch"], r[key]) for r in records if r["stage"] == stage and isinstance(r.get(key), int | float)]
        if points:
            step = max(1, -(-len(points) // MOST_POINTS))
            shown = points[::step] if points[-1] in points[::step] else [*points[::step], points[-1]]
            found[key] = {"epoch": [e for e, _ in shown], "value": [float(f"{v:.6g}") for _, v in shown]}
    return found


def curves(out: Path, cells: Sequence[Cell], stage: int, key: str) -> list[Curve]:
    """The curves of one figure of the cells that have it."""
    kept = (read_json(kept_file(out, cell)).get(f"stage{stage}", {}) for cell in cells)
    return [found[key] for found in kept if key in found]


def band(found: Sequence[Curve]) -> tuple[list[float], list[float], list[float | None]]:
    """(epochs, mean, standard deviation with n-1) over curves, at the epochs that all of them have."""
    by_epoch = [dict(zip(curve["epoch"], curve["value"], strict=True)) for curve in found]
    epochs = sorted(set.intersection(*(set(each) for each in by_epoch))) if by_epoch else []
    means, deviations = [], []
    for epoch in epochs:
        values = [each[epoch] for each in by_epoch]
        mean = sum(values) / len(values)
        means.append(mean)
        many = len(values) > 1
        deviations.append((sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5 if many else None)
    return epochs, means, deviations
