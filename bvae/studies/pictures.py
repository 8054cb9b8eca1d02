"""The figures of a study as PNG files, each with its data beside it. Kinds: what a study's `picture` names."""

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bvae.data.archive import open_source
from bvae.data.decoders.pillow import decode_items
from bvae.data.recipe import FILTERS, Recipe
from bvae.errors import UserError
from bvae.files import encode_json, exists, write_atomically
from bvae.metrics.latent import INACTIVE
from bvae.report import figures
from bvae.studies.cells import Scope, read_json
from bvae.studies.kept import band, curves, kept_file
from bvae.studies.plan import Cell

FACES = 8  # faces in Fig. 7
COLORS = (figures.BLUE, figures.ORANGE, figures.GREEN)


def draw(scope: Scope, found: Mapping[str, Any]) -> list[Path]:
    """Draws the study's picture and writes its data beside it; returns the picture where there is one."""
    kinds: dict[str, Callable[[Scope, str], list[Path]]] = {
        "fids": _fids,
        "samples": _samples,
        "first epoch": _first_epoch,
        "latents": _latents,
        "filters": _filters,
    }
    study = scope.plan.study
    if not study.picture:
        return []
    scaled = f", scaled by {found['scale']:g}" if found["scale"] != 1 else ""
    return kinds[study.picture](scope, study.title + scaled)


def _cells(scope: Scope, row: str) -> list[Cell]:
    return [cell for cell in scope.plan.cells() if cell.row == row]


def _figure(
    out: Path, name: str, plot: Callable[[Axes], None], title: str, size: tuple[float, float] = (7, 4.2)
) -> Path:
    with matplotlib.style.context(["default", figures.STYLE]):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        axes.set_title(title, loc="left")
        plot(axes)
        png = io.BytesIO()
        figure.savefig(png, format="png", metadata={"Software": None})
    path = out / f"{name}.png"
    write_atomically(path, png.getvalue())
    return path


def _data(out: Path, name: str, values: Mapping[str, Any]) -> None:
    write_atomically(out / f"{name}.json", encode_json(values).encode() + b"\n")


def _fids(scope: Scope, title: str) -> list[Path]:
    """REC, GEN-1 and GEN-2 over the share of either stage's epochs, with a band of one standard deviation."""
    out, row = scope.options.out, scope.plan.study.rows[0]
    cells, config = _cells(scope, row.name), scope.plan.rows[row.name].config
    data: dict[str, Any] = {}
    for key, label, stage in (("fid_rec", "REC", 1), ("fid_gen1", "GEN-1", 1), ("fid_gen2", "GEN-2", 2)):
        epochs, mean, sd = band(curves(out, cells, stage, key))
        if epochs:
            # Stage 2's epochs are drawn on stage 1's axis: the paper gives it twice as many.
            factor = config["epochs"] / config["epochs2"] if stage == 2 else 1.0
            data[label] = {"epoch": [factor * e for e in epochs], "mean": mean, "sd": sd, "n": len(cells)}
    if not data:
        return []

    def plot(axes: Axes) -> None:
        for color, (label, curve) in zip(COLORS, data.items(), strict=False):
            x, y = np.array(curve["epoch"]), np.array(curve["mean"])
            sd = np.array([0 if v is None else v for v in curve["sd"]])
            axes.plot(x, y, color=color, label=label, marker="o" if len(x) < 30 else None, markersize=3)
            axes.fill_between(x, y - sd, y + sd, color=color, alpha=0.2, linewidth=0)
        axes.set_xlabel("epochs of stage 1 (GEN-2: as large a share of stage 2's)")
        axes.set_ylabel("FID")
        axes.legend()

    _data(out, scope.plan.study.name, data)
    return [_figure(out, scope.plan.study.name, plot, title)]


def _samples(scope: Scope, _: str) -> list[Path]:
    """The first samples of seed 0."""
    out, study = scope.options.out, scope.plan.study
    source = out / f"{study.name}.npz"
    if not exists(source):
        return []
    with np.load(source) as found:
        figures.save_png(out / f"{study.name}.png", figures.image_grid(found["images"], 8))
    return [out / f"{study.name}.png"]


def _variances(axes: Axes, x: Sequence[float], sigma2: np.ndarray, unit: str) -> None:
    """A line for each latent, inactive ones in another colour."""
    for latent in sorted(range(sigma2.shape[1]), key=lambda j: -sigma2[-1, j]):
        idle = sigma2[-1, latent] >= INACTIVE
        color, dashes = (figures.ORANGE, "--") if idle else (figures.BLUE, "-")
        axes.plot(x, sigma2[:, latent], color=color, linestyle=dashes, linewidth=0.8, alpha=0.7)
    axes.axhline(INACTIVE, color="black", linewidth=1, linestyle="-.")
    axes.set_ylim(0, max(1.05, float(sigma2.max())))
    axes.set_xlabel(unit)
    axes.set_ylabel(r"E($\sigma_j^2$) over the data")
    idle_count = int((sigma2[-1] >= INACTIVE).sum())
    text = f"{sigma2.shape[1] - idle_count} active (blue), {idle_count} inactive (orange, dashed) at the end"
    axes.text(0.99, 0.02, text, transform=axes.transAxes, ha="right", size=8, color="#333333")


def _first_epoch(scope: Scope, title: str) -> list[Path]:
    out, study = scope.options.out, scope.plan.study
    kept = read_json(kept_file(out, _cells(scope, study.rows[0].name)[0])).get("first_epoch")
    if not kept:
        return []
    _data(out, study.name, kept)
    sigma2 = np.array(kept["latent_sigma2"])
    return [_figure(out, study.name, lambda axes: _variances(axes, kept["steps"], sigma2, "step"), title)]


def _latents(scope: Scope, title: str) -> list[Path]:
    out, study = scope.options.out, scope.plan.study
    cells = _cells(scope, study.rows[0].name)
    kept = read_json(kept_file(out, cells[0])).get("latents")
    if not kept or not kept["epoch"]:
        return []
    epochs, mean, sd = band(curves(out, cells, 1, "inactive"))
    _data(out, study.name, {**kept, "inactive": {"epoch": epochs, "mean": mean, "sd": sd, "n": len(cells)}})
    sigma2 = np.array(kept["sigma2"])
    return [_figure(out, study.name, lambda axes: _variances(axes, kept["epoch"], sigma2, "epoch"), title)]


def _filters(scope: Scope, title: str) -> list[Path]:
    """The first photographs of --data, cropped to 128 and resized to 64: a row for each filter."""
    out, study = scope.options.out, scope.plan.study
    source = open_source(scope.options.data[0])
    rows: dict[str, np.ndarray] = {}
    for name in FILTERS:
        decoded = decode_items(source.items[:FACES], Recipe(size=64, channels=3, crop=128, filter=name))
        if not decoded.kept:
            raise UserError(f"{source.path}: none of its first images can be used: {decoded.rejected[0][1]}")
        rows[name] = decoded.pixels
    grid = figures.image_grid(np.concatenate(list(rows.values())), len(decoded.kept))

    def plot(axes: Axes) -> None:
        axes.imshow(grid, interpolation="nearest")
        axes.grid(False)
        axes.set_xticks([])
        axes.set_yticks([33 + 66 * i for i in range(len(rows))], list(rows))
        axes.tick_params(length=0)
        for side in axes.spines.values():
            side.set_visible(False)

    data = io.BytesIO()
    np.savez_compressed(data, **rows)  # type: ignore[arg-type]
    write_atomically(out / f"{study.name}.npz", data.getvalue())
    return [_figure(out, study.name, plot, title, (9, 5))]
