"""Pictures from arrays: grids of images as pixels, and the figures of a run as PNG files.

Nothing here knows of models or of training. Equal input gives equal bytes: no dates, no versions and no settings of
the user's matplotlib enter a file. Whatever writes a file raises UserError where the folder or the disk fails.
"""

import contextlib
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from PIL import Image

from bvae.files import write_atomically

# Okabe and Ito's colours, which stay apart for colour-blind readers.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"
READABLE_SIDE = 800  # pixels that an enlarged picture's longer side comes near to
MARKED_EPOCHS = 40  # with more points than this, markers run into each other
STAGES = {1: "Stage 1: images", 2: "Stage 2: latent vectors"}
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.2,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "figure.dpi": 130,
}


def _tiles(images: np.ndarray, name: str) -> np.ndarray:
    """`images` with three channels, or ValueError unless they are uint8 [N,H,W,1] or [N,H,W,3] with N > 0."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape:
        raise ValueError(f"{name} must be uint8 [N,H,W,1] or [N,H,W,3], not {images.dtype} {list(images.shape)}")
    return np.broadcast_to(images, (*images.shape[:3], 3))


def image_grid(images: np.ndarray, columns: int, pad: int = 2) -> np.ndarray:
    """Images row by row on white, with `pad` white pixels between and around them.

    images: uint8 [N,H,W,C], C 1 or 3, N > 0. columns: at most N are used. Returns uint8 [h,w,3]. Raises ValueError
    for other images or columns < 1.
    """
    tiles = _tiles(images, "images")
    if columns < 1:
        raise ValueError(f"columns must be at least 1, not {columns}")
    count, height, width, _ = tiles.shape
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    grid = np.full((rows * (height + pad) + pad, columns * (width + pad) + pad, 3), 255, np.uint8)
    for i, tile in enumerate(tiles):
        top, left = pad + i // columns * (height + pad), pad + i % columns * (width + pad)
        grid[top : top + height, left : left + width] = tile
    return grid


def reconstruction_grid(x: np.ndarray, x_hat: np.ndarray, columns: int = 8) -> np.ndarray:
    """Originals, each with its reconstruction right below it; a wider gap parts one pair from the next.

    x, x_hat: uint8 [N,H,W,C] of one shape, C 1 or 3, N > 0. Returns uint8 [h,w,3]: rows of up to `columns` pairs.
    Raises ValueError for other arrays.
    """
    originals, reconstructions = _tiles(x, "x"), _tiles(x_hat, "x_hat")
    if x.shape != x_hat.shape:
        raise ValueError(f"x {list(x.shape)} and x_hat {list(x_hat.shape)} differ in shape")
    line = np.full((len(x), 1, x.shape[2], 3), 255, np.uint8)
    return image_grid(np.concatenate([originals, line, reconstructions], axis=1), columns, pad=6)


def save_png(path: Path, array: np.ndarray, scale: int | None = None) -> None:
    """Write pixels as a PNG file, enlarged `scale` times without smoothing.

    array: uint8 [h,w], [h,w,1] or [h,w,3]. scale: whole number >= 1; None brings small pictures near to 800 pixels
    and leaves larger ones as they are. Raises ValueError for other arrays, UserError if the file cannot be written.
    """
    if array.ndim == 2:
        array = array[:, :, None]
    (pixels,) = _tiles(array[None], "the picture")
    if scale is None:
        scale = max(1, round(READABLE_SIDE / max(pixels.shape[:2])))
    if scale < 1:
        raise ValueError(f"scale must be at least 1, not {scale}")
    png = io.BytesIO()
    Image.fromarray(pixels.repeat(scale, axis=0).repeat(scale, axis=1)).save(png, "png")
    write_atomically(path, png.getvalue())


@contextlib.contextmanager
def _style() -> Iterator[None]:
    """matplotlib's own defaults plus `STYLE`, whatever the user's settings; they come back afterwards."""
    with matplotlib.style.context(["default", STYLE]):
        yield


def _save(figure: Figure, path: Path) -> None:
    png = io.BytesIO()
    figure.savefig(png, format="png", metadata={"Software": None})
    write_atomically(path, png.getvalue())


def _series(records: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Epochs and values of `key` in the records that have it, NaN where the value is no finite number."""
    found = [(record["epoch"], record[key]) for record in records if key in record]
    epochs = np.array([epoch for epoch, _ in found], dtype=np.int64)
    values = np.array([math.nan if value is None else value for _, value in found], dtype=np.float64)
    values[~np.isfinite(values)] = math.nan
    return epochs, values


def _panel(axes: Axes, title: str, unit: str, log: bool = False) -> None:
    axes.set_title(title, loc="left")
    axes.set_xlabel("epoch")
    axes.set_ylabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    if log:
        axes.set_yscale("log")


def _plot(
    axes: Axes,
    records: Sequence[Mapping[str, Any]],
    key: str,
    label: str,
    color: str,
    transform: Callable[[np.ndarray], np.ndarray] | None = None,
    **style: Any,
) -> bool:
    """A line of `key` over epochs; False, and nothing drawn, where no value can be shown on these axes."""
    epochs, values = _series(records, key)
    shown = values > 0 if axes.get_yscale() == "log" else np.isfinite(values)
    if not shown.any():
        return False
    values = np.where(shown, values, math.nan)
    style = {"marker": "o", "markersize": 3, **style}
    if len(epochs) > MARKED_EPOCHS:
        style["marker"] = None
    axes.plot(epochs, transform(values) if transform else values, label=label, color=color, **style)
    return True


def _finish(axes: Axes, drawn: Sequence[bool], legend: bool = True) -> None:
    """The ticks and legend of a panel, or a word in their place where nothing could be drawn."""
    if not any(drawn):
        # Limits of a log axis without data are no use either.
        axes.set_yscale("linear")
        axes.set_yticks([])
        axes.text(0.5, 0.5, "no finite values", transform=axes.transAxes, ha="center", color=GREY)
        return
    if axes.get_yscale() == "log":
        low, high = axes.get_ylim()
        # Plain numbers, and enough of them: the default is one tick a decade, and the error rarely spans one.
        subs = (1, 1.5, 2, 3, 5, 7) if high < 10 * low else (1, 2, 5) if high < 100 * low else (1,)
        axes.yaxis.set_major_locator(LogLocator(subs=subs))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    if legend:
        axes.legend()


def curves(records: Sequence[Mapping[str, Any]], out: Path) -> None:
    """The run over its epochs as one PNG: loss and nll, kl, mse (train and test), gamma, balance, learning rate.

    records: as `bvae.run.log.read_metrics` gives them, with "stage" (1 or 2) and "epoch"; a block of panels for each
    stage that occurs. Missing keys, None and NaN leave gaps. Raises ValueError without records, UserError if the
    file cannot be written.
    """
    stages = sorted({record["stage"] for record in records})
    if not stages:
        raise ValueError("no records to draw")
    with _style():
        figure = Figure(figsize=(11, 5.6 * len(stages)), layout="constrained")
        for block, stage in zip(figure.subfigures(len(stages), 1, squeeze=False)[:, 0], stages, strict=True):
            own = [record for record in records if record["stage"] == stage]
            draw = _deterministic_panels if any("objective" in record for record in own) else _stage_panels
            draw(block.subplots(2, 3).flat, own, "image" if stage == 1 else "latent vector")
            skipped = np.nansum(_series(own, "skipped")[1])
            note = f"  ({skipped:,.0f} steps skipped: not finite)" if skipped else ""
            block.suptitle(STAGES[stage] + note, fontsize=12)
        _save(figure, out)


# Figures that the objective of a deterministic family reports beside the error: (key, title, unit).
TERMS = (
    ("latent_norm2", "Codes", "mean of |z|²"),
    ("decoder_norm2", "Decoder's kernels", "sum of w²"),
    ("gradient_norm2", "Decoder's gradient", "mean of its squared norm"),
    ("mmd", "Codes against N(0, I)", "MMD"),
)


def _deterministic_panels(panels: Iterator[Axes], records: Sequence[Mapping[str, Any]], sample: str) -> None:
    objective, mse, *others, lr = panels
    _panel(objective, "Objective", f"squared error per {sample}")
    _finish(objective, [_plot(objective, records, "objective", "train", BLUE)], legend=False)
    _errors(mse, records)
    terms = [term for term in TERMS if any(term[0] in record for record in records)]
    for axes, (key, title, unit) in zip(others, terms, strict=False):
        _panel(axes, title, unit)
        _finish(axes, [_plot(axes, records, key, "train", BLUE)], legend=False)
    for axes in others[len(terms) :]:
        axes.set_axis_off()
    _rates(lr, records)


def _errors(mse: Axes, records: Sequence[Mapping[str, Any]]) -> None:
    _panel(mse, "Mean squared error", "mse per element", log=True)
    _finish(
        mse,
        [
            _plot(mse, records, "mse", "train", BLUE),
            _plot(mse, records, "test_mse", "test", ORANGE, marker="D", linestyle="--"),
        ],
    )


def _rates(lr: Axes, records: Sequence[Mapping[str, Any]]) -> None:
    _panel(lr, "Learning rate", "learning rate", log=True)
    _finish(lr, [_plot(lr, records, "lr", "lr", BLUE, drawstyle="steps-post")], legend=False)


def _stage_panels(panels: Iterator[Axes], records: Sequence[Mapping[str, Any]], sample: str) -> None:
    loss, kl, mse, gamma, balance, lr = panels
    # The loss under the nll: where KL is small against it, the two lines lie on each other.
    _panel(loss, "Loss and reconstruction term", f"nats per {sample}")
    _finish(
        loss,
        [
            _plot(loss, records, "loss", "loss", GREY, linewidth=2.6, alpha=0.6),
            _plot(loss, records, "nll", "reconstruction (nll)", BLUE),
        ],
    )
    _panel(kl, "KL divergence", f"nats per {sample}")
    _finish(
        kl,
        [
            _plot(kl, records, "kl", "train", BLUE),
            _plot(kl, records, "test_kl", "test", ORANGE, marker="D", linestyle="--"),
        ],
    )
    _errors(mse, records)
    _panel(gamma, r"Estimated error, $\gamma$", r"$\gamma$ (units of the data)", log=True)
    _finish(gamma, [_plot(gamma, records, "gamma2", "gamma", BLUE, transform=np.sqrt)], legend=False)
    _panel(balance, "Balance", rf"sse / $(2\,\gamma^2 D)$ per {sample}")
    drawn = _plot(balance, records, "balance", "mean of the epoch", BLUE)
    if drawn:
        balance.axhline(0.5, color=ORANGE, linestyle="--", linewidth=1, label="1/2", zorder=1)
    _finish(balance, [drawn])
    _rates(lr, records)


def latent_curves(
    records: Sequence[Mapping[str, Any]], out: Path, inactive_threshold: float = 0.8, stage: int = 1
) -> None:
    """Every latent's Var(mu_j) and E(sigma_j^2) over the epochs of a stage as one PNG (the paper's Figs. 5 and 6).

    An active latent goes to Var(mu) near 1 and sigma^2 near 0, an inactive one the other way. A latent is called
    inactive where its last finite E(sigma_j^2) is at least `inactive_threshold`, and drawn dashed in another colour.

    records: with "stage", "epoch" and lists "latent_var_mu" and "latent_sigma2" [k], k the same in all; other
    records are passed over, None and NaN leave gaps. Raises ValueError where no record of the stage has them,
    UserError if the file cannot be written.
    """
    own = [r for r in records if r["stage"] == stage and "latent_var_mu" in r and "latent_sigma2" in r]
    if not own:
        raise ValueError(f"no records of stage {stage} with latent_var_mu and latent_sigma2")
    epochs = np.array([record["epoch"] for record in own])
    # float64 makes NaN of None.
    var_mu, sigma2 = (np.array([r[key] for r in own], dtype=np.float64) for key in ("latent_var_mu", "latent_sigma2"))
    kinds = [_kind(latent, inactive_threshold) for latent in sigma2.T]
    looks: dict[str, dict[str, Any]] = {
        "active": {"color": BLUE, "linestyle": "-"},
        "inactive": {"color": ORANGE, "linestyle": "--"},
        "never finite": {"color": GREY, "linestyle": ":"},
    }
    count = {kind: kinds.count(kind) for kind in looks}
    marker = "o" if len(own) <= MARKED_EPOCHS else None
    with _style():
        figure = Figure(figsize=(11, 4.4), layout="constrained")
        panels = figure.subplots(1, 2)
        for axes, values, title in (
            (panels[0], var_mu, r"Variance of the mean: Var($\mu_j$) over the data"),
            (panels[1], sigma2, r"Variance of the noise: E($\sigma_j^2$) over the data"),
        ):
            _panel(axes, title, "variance (prior: 1)")
            for kind, latent in zip(kinds, values.T, strict=True):
                shown = np.where(np.isfinite(latent), latent, math.nan)
                axes.plot(epochs, shown, linewidth=0.8, alpha=0.6, marker=marker, markersize=2.5, **looks[kind])
            axes.set_ylim(0, max(1.05, axes.get_ylim()[1]))
        panels[1].axhline(inactive_threshold, color="black", linewidth=1, linestyle="-.")
        handles = [Line2D([], [], label=f"{kind}: {n}", **looks[kind]) for kind, n in count.items() if n]
        panels[0].legend(handles=handles, title="latents", loc="best")
        label = f"inactive from {inactive_threshold:g}"
        panels[1].legend(handles=[Line2D([], [], color="black", linewidth=1, linestyle="-.", label=label)], loc="best")
        parts = ", ".join(f"{n} {kind}" for kind, n in count.items() if n or kind != "never finite")
        figure.suptitle(f"{STAGES[stage]}. {len(kinds)} latents after epoch {epochs[-1]}: {parts}", fontsize=12)
        _save(figure, out)


def _kind(sigma2: np.ndarray, inactive_threshold: float) -> str:
    finite = sigma2[np.isfinite(sigma2)]
    if not finite.size:
        return "never finite"
    return "inactive" if finite[-1] >= inactive_threshold else "active"


def factor_correlation(
    corr: np.ndarray, names: Sequence[str], active: np.ndarray, out: Path, kl: np.ndarray | None = None
) -> None:
    """A heat map of |correlation| between the active latents and the true factors, each cell with its value.

    corr: [k,F], in [-1,1]; NaN (a factor or latent that never varies) is shown as such. names: the F factors.
    active: bool [k]. kl: [k], nats; sorts the rows, most information first (without it they come as they are), and
    is written beside them. Raises ValueError for shapes that do not agree, UserError if the file cannot be written.
    """
    corr, active = np.asarray(corr, dtype=np.float64), np.asarray(active)
    if corr.ndim != 2 or corr.shape[1] != len(names) or active.shape != corr.shape[:1] or active.dtype != np.bool_:
        raise ValueError(
            f"corr {list(corr.shape)}, {len(names)} names and {active.dtype} active {list(active.shape)} do not agree"
        )
    if kl is not None and np.shape(kl) != active.shape:
        raise ValueError(f"kl {list(np.shape(kl))} and active {list(active.shape)} do not agree")
    rows = np.flatnonzero(active)
    labels = [f"z{j}" for j in range(len(active))]
    if kl is not None:
        # argsort puts NaN last.
        rows = rows[np.argsort(-np.asarray(kl, dtype=np.float64)[rows], kind="stable")]
        labels = [f"z{j}  ({value:.2f} nats)" for j, value in enumerate(kl)]
    shown = np.abs(corr[rows])
    with _style():
        size = (1.6 + 0.75 * len(names), 1.5 + 0.3 * max(len(rows), 2))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        axes.set_title(f"|correlation|: {len(rows)} active of {len(active)} latents, {len(names)} factors", loc="left")
        axes.grid(False)
        axes.tick_params(length=0)
        colors = matplotlib.colormaps["Blues"].with_extremes(bad="#eeeeee")
        long = any(len(name) > 10 for name in names)
        axes.set_xticks(range(len(names)), names, rotation=30 if long else 0, ha="right" if long else "center")
        axes.set_ylabel("latent, most KL first" if kl is not None else "latent")
        if len(rows):
            axes.imshow(shown, cmap=colors, vmin=0, vmax=1, aspect="auto")
            axes.set_yticks(range(len(rows)), [labels[j] for j in rows])
        else:
            axes.set_xlim(-0.5, len(names) - 0.5)
            axes.set_yticks([])
            axes.text(0.5, 0.5, "no active latent", transform=axes.transAxes, ha="center", color=GREY)
        for (row, column), value in np.ndenumerate(shown):
            text = f"{value:.2f}" if np.isfinite(value) else "n/a"
            axes.text(column, row, text, ha="center", va="center", size=8, color="white" if value > 0.6 else "black")
        _save(figure, out)
