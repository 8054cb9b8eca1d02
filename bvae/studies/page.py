"""report.html: a study on one self-contained page, with the style, script and policy of a run's report."""

import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from PIL import Image

from bvae.files import exists
from bvae.machine import versions
from bvae.report.charts import DASHES, Chart, log_axis, short
from bvae.report.page import Picture, encoded_picture, inline_json, own_file, plotly, policy
from bvae.studies import table
from bvae.studies.cells import Scope, samples_picture
from bvae.studies.kept import CURVES, Curve, band, curves
from bvae.studies.kinds import Row, label

PANELS = {
    "mse": ("Mean squared error, training", "mse per element", True),
    "kl": ("KL divergence, training", "nats", False),
    "gamma2": ("gamma2", "gamma2", True),
    "balance": ("Balance: sse / (2 gamma2 D)", "per sample", False),
    "test_mse": ("Mean squared error, test", "mse per element", True),
    "inactive": ("Inactive latents", "latents", False),
    "fid_rec": ("FID of reconstructions", "FID", False),
    "fid_gen1": ("FID of GEN-1", "FID", False),
    "fid_gen2": ("FID of GEN-2", "FID", False),
}
STAGES = {1: "Stage 1: images", 2: "Stage 2: latent vectors"}
COLORS = 8  # number of colors that the page has
SAMPLES_WIDTH = 8 * 68
"""pixels of a picture of samples, at most"""


def render_page(scope: Scope, found: Mapping[str, Any], pictures: Sequence[Path]) -> str:
    """The page. Equal content gives equal bytes.

    found: what study.json holds. pictures: the study's own figures.
    """
    study = scope.plan.study
    charts: list[Chart] = []

    def place(chart: Chart) -> int:
        charts.append(chart)
        return len(charts) - 1

    def charts_as_json() -> Markup:
        return inline_json([{"traces": c.traces, "colors": c.colors, "layout": c.layout} for c in charts])

    columns = table.columns_of(study, found)
    scripts = [plotly(), own_file("page.js")]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = files("bvae.studies").joinpath("study.html").read_text("utf-8")
    return environment.from_string(template).render(
        title=study.title,
        study=study,
        scale=found["scale"],
        command=found["command"],
        facts=table.facts(study, found),
        columns=[label(metric) for metric in columns],
        rows=[
            {
                "name": row["name"] + (f" {table.MARK}" if table.is_unsettled(row) else ""),
                "epochs": table.epochs_of(row),
                "cells": [table.figure(metric, row["metrics"].get(metric)) for metric in columns],
                "remarks": table.remarks(row),
                "failed": bool(row["failed"] or row["problem"]) and not row["metrics"],
            }
            for row in found["rows"]
        ],
        published=table.published_rows(found),
        comparisons=table.comparison_rows(found),
        seeds=table.seed_rows(found, columns),
        figures=[p for metric in columns if (p := figure_chart(metric, found)) is not None],
        curves={name: own for stage, name in STAGES.items() if (own := curve_charts(scope, stage))},
        pictures=[_picture(path, 10_000, f"{study.title}: the figure") for path in pictures],
        samples=samples(scope),
        version=versions()["bvae"],
        style=Markup(own_file("page.css")),
        scripts=[Markup(script) for script in scripts],
        policy=policy(scripts),
        place=place,
        charts_as_json=charts_as_json,
    )


def figure_chart(metric: str, found: Mapping[str, Any]) -> Chart | None:
    """A line a row: mean and standard deviation, every seed's value, and the published figure where there is one."""
    rows = [row for row in found["rows"] if row["metrics"].get(metric, {}).get("n")]
    if not rows:
        return None
    names = [escape(row["name"]) for row in rows]
    means = [row["metrics"][metric]["mean"] for row in rows]
    deviations = [row["metrics"][metric]["sd"] for row in rows]
    each = [
        (name, short(v), seed)
        for name, row in zip(names, rows, strict=True)
        for seed, v in enumerate(row["metrics"][metric]["values"])
        if v is not None
    ]
    traces: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": "each seed",
            "x": [value for _, value, _ in each],
            "y": [name for name, _, _ in each],
            "text": [f"seed {seed}" for _, _, seed in each],
            "hovertemplate": "%{y}, %{text}: %{x}<extra></extra>",
            "marker": {"size": 5, "symbol": "line-ns-open"},
        },
        {
            "type": "scatter",
            "mode": "markers",
            "name": "mean ± sd",
            "x": [short(mean) for mean in means],
            "y": names,
            "error_x": {"type": "data", "array": [short(sd) or 0 for sd in deviations], "thickness": 1.5},
            "hovertemplate": "%{y}: %{x}<extra></extra>",
            "marker": {"size": 9},
        },
    ]
    published = [
        (name, row["published"][metric]) for name, row in zip(names, rows, strict=True) if metric in row["published"]
    ]
    if published:
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "published, another protocol",
                "x": [float(re.match(r"[\d.]+", p["value"])[0]) for _, p in published],  # type: ignore[index]
                "y": [name for name, _ in published],
                "text": [escape(f"{p['value']}: {p['source']}") for _, p in published],
                "hovertemplate": "%{text}<extra></extra>",
                "marker": {"size": 9, "symbol": "diamond-open"},
            }
        )
    layout: dict[str, Any] = {
        "xaxis": {"title": {"text": label(metric)}},
        "yaxis": {"type": "category", "categoryarray": names[::-1], "range": [-0.6, len(names) - 0.4]},
        "hovermode": "closest",
        "showlegend": False,
        "height": 90 + 26 * len(names),
    }
    values = [value for trace in traces for value in trace["x"] if value is not None]
    if metric in ("gamma2", "mse_sampled") and min(values) > 0 and max(values) > 20 * min(values):
        layout["xaxis"] |= log_axis(min(values), max(values))
    parts = "; ".join(f"{row['name']} {table.figure(metric, row['metrics'][metric])}" for row in rows)
    return Chart(label(metric), "", f"{label(metric)}: {parts}.", traces, [7, 0, 1], layout)


def curve_charts(scope: Scope, stage: int) -> list[Chart]:
    """Curves over a stage's epochs, a line a row with a band of one standard deviation over its seeds."""
    owners = [row for row in scope.plan.study.owners if scope.plan.rows[row.name].config]
    found = []
    for key in CURVES:
        if key not in PANELS:
            continue
        bands = [(row, _band(scope, row, stage, key)) for row in owners]
        chart = _curve_chart(key, [(row, own) for row, own in bands if own[0]])
        if chart is not None:
            found.append(chart)
    return found


def _band(scope: Scope, row: Row, stage: int, key: str) -> tuple[list[float], list[float], list[float | None]]:
    cells = [scope.plan.cell(row.name, seed) for seed in range(scope.options.seeds)]
    found: list[Curve] = curves(scope.options.out, cells, stage, key)
    return band(found)


def _curve_chart(
    key: str, bands: Sequence[tuple[Row, tuple[list[float], list[float], list[float | None]]]]
) -> Chart | None:
    title, unit, log = PANELS[key]
    traces: list[dict[str, Any]] = []
    colors, texts = [], []
    for number, (row, (epochs, means, deviations)) in enumerate(bands):
        name = escape(row.name)
        group = {"legendgroup": name, "x": epochs}
        if any(sd for sd in deviations):
            pairs = list(zip(means, [sd or 0.0 for sd in deviations], strict=True))
            low = [short(max(m - s, m / 10) if log else m - s) for m, s in pairs]
            for values, fill in ((low, None), ([short(m + s) for m, s in pairs], "tonexty")):
                edge = {"type": "scatter", "mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
                traces.append({**group, **edge, "y": values, "showlegend": False, **({"fill": fill} if fill else {})})
                colors.append(number)
        traces.append(
            {
                **group,
                "type": "scatter",
                "mode": "lines+markers" if len(epochs) <= 40 else "lines",
                "name": name,
                "y": [short(m) for m in means],
                "line": {"width": 2, "dash": DASHES[number // COLORS % len(DASHES)][0]},
                "marker": {"size": 4},
            }
        )
        colors.append(number)
        texts.append(f"{row.name} from {means[0]:.4g} to {means[-1]:.4g}")
    if not traces:
        return None
    longest = max(len(trace["x"]) for trace in traces)
    layout: dict[str, Any] = {
        "xaxis": {"title": {"text": "epoch"}, **({"dtick": 1} if longest <= 8 else {})},
        "yaxis": {"title": {"text": unit}},
        "hovermode": "closest",
        "showlegend": len(bands) > 1,
    }
    if log:
        shown = [v for trace in traces for v in trace["y"] if v]
        layout["yaxis"] |= log_axis(min(shown), max(shown)) if min(shown) > 0 else {}
    if key == "balance":
        line = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": 0.5, "y1": 0.5}
        layout["shapes"] = [{**line, "line": {"width": 1, "dash": "dash"}}]
    return Chart(title, "", f"{title} over epochs: {'; '.join(texts)}.", traces, colors, layout)


def samples(scope: Scope) -> list[tuple[str, Picture]]:
    """(row, samples of seed 0), of the rows whose pictures are there."""
    found = []
    for row in scope.plan.study.rows:
        path = samples_picture(scope.options.out, row.slug)
        if exists(path):
            found.append((row.name, _picture(path, SAMPLES_WIDTH, f"Samples of {row.name}, seed 0")))
    return found


def _picture(path: Path, most: int, alt: str) -> Picture:
    """A PNG file, made smaller by a whole number of pixels where it was enlarged by one."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGBA"))
    step = max(1, math.ceil(pixels.shape[1] / most))
    return encoded_picture(pixels[step // 2 :: step, step // 2 :: step], alt)
