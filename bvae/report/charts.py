"""The charts of a report as plain data for plotly.js: what is drawn, in which of the page's colours, and in words.

Colours are numbers here; the page's script turns them into its own, light or dark. plotly reads a little HTML in names,
so that what a user has chosen is escaped in them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from bvae.metrics.latent import INACTIVE
from bvae.report.views import Latents

MOST_POINTS = 400  # of a curve; more cannot be told apart on a screen
MOST_LATENT_POINTS = 150
MOST_LATENT_CURVES = 256
DASHES = (("solid", "solid"), ("dash", "dashed"), ("dot", "dotted"))  # plotly's word, and a reader's

Records = Sequence[Mapping[str, Any]]


@dataclass
class Chart:
    """traces: plotly's. colors: one for each trace, an index into the page's palette. layout: plotly's."""

    title: str
    key: str
    """what tells its lines apart beside the legend; may be empty"""
    text: str
    """what the chart shows, for those who do not see it"""
    traces: list[dict[str, Any]]
    colors: list[int]
    layout: dict[str, Any]


@dataclass(frozen=True)
class Curve:
    key: str
    label: str
    transform: Callable[[float], float] = float


@dataclass(frozen=True)
class Panel:
    title: str
    unit: str
    curves: tuple[Curve, ...]
    log: bool = False
    line: float | None = None
    """a horizontal line: where the curve should be"""


def panels(stage: int, protocol: str = "") -> tuple[Panel, ...]:
    """What is drawn of a stage's records, key by key as docs/method.md names them."""
    sample = "image" if stage == 1 else "latent vector"
    nats = f"nats per {sample}"
    return (
        Panel("Loss and its reconstruction term", nats, (Curve("loss", "loss"), Curve("nll", "reconstruction (nll)"))),
        Panel("Objective", f"squared error per {sample}", (Curve("objective", "objective"),)),
        Panel("KL divergence", nats, (Curve("kl", "train"), Curve("test_kl", "test"))),
        Panel("Mean squared error", "mse per element", (Curve("mse", "train"), Curve("test_mse", "test")), log=True),
        Panel("gamma", "gamma, in units of the data", (Curve("gamma2", "gamma", math.sqrt),), log=True),
        Panel("Balance: sse / (2 gamma² D)", f"per {sample}", (Curve("balance", "balance"),), line=0.5),
        Panel("Codes: mean of |z|²", "in units of the codes", (Curve("latent_norm2", "train"),)),
        Panel("Decoder's kernels: sum of w²", "sum over the kernels", (Curve("decoder_norm2", "train"),)),
        Panel("Decoder's gradient: mean of its squared norm", f"per {sample}", (Curve("gradient_norm2", "train"),)),
        Panel("MMD between codes and N(0, I)", "sum of seven kernels", (Curve("mmd", "train"),), line=0.0),
        Panel("Variance law", "Var(mu) + E(sigma²), mean", (Curve("variance_law", "test"),), line=1.0),
        Panel(
            f"FID{protocol}",
            "FID, lower is better",
            (Curve("fid_rec", "REC"), Curve("fid_gen1", "GEN-1"), Curve("fid_gen2", "GEN-2")),
        ),
    )


def short(value: Any) -> float | None:
    """A number with five digits, which is what a chart can show; None where it is not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(f"{value:.5g}")


def thin(count: int, most: int) -> np.ndarray:
    """At most `most` of `count` places, evenly spaced, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)) if count else np.empty(0, int)


def _curve(records: Records, curve: Curve, log: bool) -> tuple[list[int], list[float | None]]:
    """Epochs and values; a value that these axes cannot show is a gap."""
    values = []
    for record in records:
        if curve.key in record:
            value = short(record[curve.key])
            if value is not None and (curve.transform is not math.sqrt or value >= 0):
                value = short(curve.transform(value))
            values.append((record["epoch"], None if value is None or (log and value <= 0) else value))
    kept = [values[i] for i in thin(len(values), MOST_POINTS)]
    return [epoch for epoch, _ in kept], [value for _, value in kept]


def stage_charts(stage: int, runs: Sequence[tuple[str, Records]]) -> list[Chart]:
    """The curves of a stage, those of several runs over each other; panels without a finite value are left out."""
    own = [(name, [r for r in records if r["stage"] == stage]) for name, records in runs]
    protocols = sorted({str(r["fid_protocol"]) for _, records in own for r in records if "fid_protocol" in r})
    return [
        chart
        for panel in panels(stage, f" ({', '.join(protocols)})" if protocols else "")
        if (chart := _panel(panel, own)) is not None
    ]


def _panel(panel: Panel, runs: Sequence[tuple[str, Records]]) -> Chart | None:
    traces: list[dict[str, Any]] = []
    colors, texts = [], []
    named: set[int] = set()
    drawn: set[int] = set()
    several = len(runs) > 1
    for number, (name, records) in enumerate(runs):
        for part, curve in enumerate(panel.curves):
            x, y = _curve(records, curve, panel.log)
            finite = [value for value in y if value is not None]
            if not finite:
                continue
            # One run has a colour for each part; several have one each, and the parts differ in their dashes.
            label = f"{name}: {curve.label}" if several else curve.label
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers" if len(finite) <= 40 else "lines",
                    "name": escape(name if several else curve.label),
                    "legendgroup": number if several else part,
                    "showlegend": not several or number not in named,
                    "x": x,
                    "y": y,
                    "line": {"width": 2, "dash": DASHES[part][0] if several else "solid"},
                    "marker": {"size": 5},
                }
            )
            colors.append(number if several else part)
            named.add(number)
            drawn.add(part)
            texts.append(f"{label} from {finite[0]:g} to {finite[-1]:g}")
    if not traces:
        return None
    layout: dict[str, Any] = {
        "xaxis": {"title": {"text": "epoch"}},
        "yaxis": {"title": {"text": panel.unit}},
        "hovermode": "x unified",
        "showlegend": len(traces) > 1,
    }
    if panel.log:
        values = [v for trace in traces for v in trace["y"] if v is not None]
        layout["yaxis"] |= log_axis(min(values), max(values))
    if panel.line is not None:
        layout["shapes"] = [
            {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": panel.line, "y1": panel.line}
            | {"line": {"width": 1, "dash": "dash"}}
        ]
        texts.append(f"it should be near {panel.line:g}")
    key = ", ".join(f"{DASHES[part][1]} {panel.curves[part].label}" for part in sorted(drawn))
    text = f"{panel.title} over epochs: {'; '.join(texts)}."
    return Chart(panel.title, key if several and len(drawn) > 1 else "", text, traces, colors, layout)


def log_axis(low: float, high: float) -> dict[str, Any]:
    """A log axis with plain numbers at its ticks, or a linear one where the values span less than a factor of two.

    plotly's own ticks are bare digits, or none at all, where the values span less than a decade.
    """
    if high < 2 * low:
        return {"type": "linear"}
    factors = (1, 1.5, 2, 3, 5, 7) if high < 10 * low else (1, 2, 5) if high < 100 * low else (1,)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [float(f"{factor * 10.0**decade:.5g}") for decade in decades for factor in factors]
    return {"type": "log", "tickmode": "array", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}


def latent_charts(records: Records, stage: int = 1) -> list[Chart]:
    """Var(mu_j) and E(sigma_j^2) of every latent over the epochs of a stage (the paper's Figs. 5 and 6)."""
    own = [r for r in records if r["stage"] == stage and "latent_var_mu" in r and "latent_sigma2" in r]
    own = [own[i] for i in thin(len(own), MOST_LATENT_POINTS)]
    if not own or len({len(r[key]) for r in own for key in ("latent_var_mu", "latent_sigma2")}) != 1:
        return []
    epochs = [r["epoch"] for r in own]
    last = np.asarray(own[-1]["latent_sigma2"], np.float64)
    idle = ~(last < INACTIVE)
    shown = thin(len(last), MOST_LATENT_CURVES).tolist()
    some = "" if len(shown) == len(last) else f", {len(shown)} of them shown"
    summary = f"{int((~idle).sum())} active and {int(idle.sum())} inactive latents at the end{some}"
    charts = []
    for key, title, line in (
        ("latent_var_mu", "Variance of the mean: Var(mu) of each latent", None),
        ("latent_sigma2", "Variance of the noise: E(sigma²) of each latent", INACTIVE),
    ):
        traces, colors, named = [], [], set()
        # The inactive ones first, so that the others lie over them.
        for j in sorted(shown, key=lambda j: (not idle[j], j)):
            kind = "inactive" if idle[j] else "active"
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers" if len(own) == 1 else "lines",
                    "name": kind,
                    "legendgroup": kind,
                    "showlegend": kind not in named,
                    "x": epochs,
                    "y": [short(r[key][j]) for r in own],
                    "line": {"width": 1.3, "dash": "dot" if idle[j] else "solid"},
                    "opacity": 0.75,
                    "hovertemplate": f"z{j}, {kind}: %{{y}}<br>epoch %{{x}}<extra></extra>",
                }
            )
            colors.append(int(idle[j]))
            named.add(kind)
        layout: dict[str, Any] = {
            "xaxis": {"title": {"text": "epoch"}},
            "yaxis": {"title": {"text": "variance (prior: 1)"}, "rangemode": "tozero"},
            "hovermode": "closest",
            "showlegend": True,
        }
        if line is not None:
            layout["shapes"] = [
                {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": line, "y1": line}
                | {"line": {"width": 1, "dash": "dash"}}
            ]
        charts.append(Chart(title, "", f"{title} over the epochs: {summary}.", traces, colors, layout))
    return charts


def information_chart(runs: Sequence[tuple[str, Latents]]) -> Chart:
    """KL of every latent by rank; a flat tail at 0 are the latents that carry nothing."""
    traces, texts = [], []
    for name, latents in runs:
        shown = [int(i) for i in thin(len(latents.index), MOST_POINTS)]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": escape(name),
                "x": [i + 1 for i in shown],
                "y": [short(float(latents.kl[i])) for i in shown],
                "text": [
                    f"z{latents.index[i]}, {'active' if latents.active[i] else 'inactive'}, "
                    f"E(sigma²) {latents.sigma2[i]:.3f}"
                    for i in shown
                ],
                "hovertemplate": "%{text}<br>%{y} nats<extra></extra>",
                "marker": {"size": 5},
                "line": {"width": 2},
            }
        )
        total = float(np.nansum(latents.kl))
        texts.append(f"{name}: {total:.4g} nats in all, {int(latents.active.sum())} active latents")
    layout = {
        "xaxis": {"title": {"text": "rank of the latent"}},
        "yaxis": {"title": {"text": "KL, nats"}, "rangemode": "tozero"},
        "hovermode": "closest",
        "showlegend": len(runs) > 1,
    }
    title = "Information in each latent"
    return Chart(title, "", f"{title}. {'; '.join(texts)}.", traces, list(range(len(runs))), layout)


def distance_chart(name: str, sample_distance: np.ndarray, test_distance: np.ndarray) -> Chart:
    """Histograms, as shares, of the distance to the nearest training image: of samples and of test images."""
    low = float(min(sample_distance.min(), test_distance.min()))
    high = float(max(sample_distance.max(), test_distance.max()))
    edges = np.linspace(low, high if high > low else low + 1e-3, 31)
    traces, texts = [], []
    for label, values in (("samples", sample_distance), ("test images", test_distance)):
        share = np.histogram(values, edges)[0] / len(values)
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": label,
                "x": [short(float(x)) for x in (edges[1:] + edges[:-1]) / 2],
                "y": [short(float(y)) for y in share],
                "line": {"width": 2, "shape": "hvh"},
                "fill": "tozeroy",
                "hovertemplate": f"{label}: %{{y:.1%}} at %{{x}}<extra></extra>",
            }
        )
        texts.append(f"median {float(np.median(values)):.4f} of {label}")
    layout = {
        "xaxis": {"title": {"text": "distance (rms, pixels in [0,1])"}},
        "yaxis": {"title": {"text": "share"}, "tickformat": ".0%", "rangemode": "tozero"},
        "hovermode": "closest",
        "showlegend": True,
    }
    title = "Distance to the nearest training image"
    return Chart(title, "", f"{title}, {name}: {'; '.join(texts)}.", traces, [0, 1], layout)
