"""The report as one HTML page, from what was read of the runs and the views that were made of their models.

The page is self-contained: styles, script, plotly.js and pictures are inside it, and its content security policy
forbids every request and every script but those. All text that a user can choose is escaped.
"""

import base64
import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from PIL import Image

from bvae.config.registry import families
from bvae.files import encode_json
from bvae.report import figures
from bvae.report.charts import Chart, distance_chart, information_chart, latent_charts, stage_charts
from bvae.report.views import NEIGHBOURS, STEPS, VALUES, Views

WIDTH = 640  # pixels that an enlarged picture may take
ABSENT = "\u2013"  # stands where there is no figure
OPEN_TRAVERSALS = 12  # the rest is folded away
STAGES = {1: "Stage 1: images", 2: "Stage 2: latent vectors"}


@dataclass
class RunContent:
    """One run as the page shows it. What is not there is empty, and `notes` say why."""

    name: str
    info: Mapping[str, Any]
    """config.json: config, data, versions, device"""
    results: Mapping[str, Any]
    """results.json"""
    records: Sequence[Mapping[str, Any]]
    """metrics.jsonl"""
    state: str
    """finished, or how far it came"""
    views: Views | None = None
    notes: list[str] = field(default_factory=list)


# FID, lower is better. Protocols, splits and networks differ from paper to paper and from ours.
PUBLISHED = {
    "CIFAR-10": (
        ("Two-stage VAE, learned gamma", "Dai & Wipf 2019", "72.9 ± 0.9"),
        ("RAE-L2 + GMM", "Ghosh et al. 2020", "74.2"),
        ("LEBM", "Pang et al. 2020", "70.2"),
        ("Multi-NCP", "Xiao & Han 2022", "65.0"),
        ("Joint EBM", "Cui & Han 2023", "63.4"),
    ),
    "CelebA 64x64": (
        ("Two-stage VAE, learned gamma", "Dai & Wipf 2019", "44.4 ± 0.7"),
        ("RAE-L2 + GMM", "Ghosh et al. 2020", "48.0"),
        ("Best RAE + GMM", "Ghosh et al. 2020", "40.95"),
        ("LEBM", "Pang et al. 2020", "37.9"),
        ("Multi-NCP", "Xiao & Han 2022", "35.4"),
        ("Joint EBM", "Cui & Han 2023", "32.2"),
    ),
}

# (label, stage, key in results.json, format)
FIGURES: tuple[tuple[str, int, str, str], ...] = (
    ("Test mse, z sampled", 1, "mse_sampled", ".5f"),
    ("Test mse, z = mu", 1, "mse_mean", ".5f"),
    ("KL, nats per image", 1, "kl", ".2f"),
    ("gamma", 1, "gamma", ".4f"),
    ("Variance law (should be 1)", 1, "variance_law", ".3f"),
    ("Variance of a code, mean over latents", 1, "code_variance", ".3f"),
    ("Active latents", 1, "active", "d"),
    ("Inactive latents", 1, "inactive", "d"),
    ("Steps", 1, "steps", ",d"),
    ("Training images per second", 1, "images_per_s", ",.0f"),
    ("Test mse of latents, sampled", 2, "mse_sampled", ".4f"),
    ("KL, nats per latent vector", 2, "kl", ".2f"),
    ("gamma", 2, "gamma", ".4f"),
    ("Variance law (should be 1)", 2, "variance_law", ".3f"),
    ("Active latents", 2, "active", "d"),
    ("Inactive latents", 2, "inactive", "d"),
    ("Steps", 2, "steps", ",d"),
)
FID_PARTS = (
    ("rec", "REC"),
    ("rec_contrast", "REC, contrast"),
    ("rec_mean", "REC, z = mu"),
    ("rec_mean_contrast", "REC, z = mu, contrast"),
    ("gen1", "GEN-1"),
    ("gen2", "GEN-2"),
    ("gen2_rescaled", "GEN-2, rescaled"),
)


def number(value: Any, form: str) -> str:
    """A figure as text; a dash where there is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        return ABSENT
    return format(round(value) if form.endswith("d") else value, form)


@dataclass
class Picture:
    uri: str
    width: int
    """on a screen that is wide enough, a whole number of times the pixels it has"""
    alt: str


def _picture(pixels: np.ndarray, grid_of: Callable[[np.ndarray], np.ndarray], alt: str) -> Picture:
    """`grid_of(pixels)` with the white between its images made transparent, so that it fits a dark page too."""
    grid = grid_of(pixels)
    gaps = grid_of(np.zeros_like(pixels))[..., :1]
    return encoded_picture(np.concatenate([grid, 255 - gaps], axis=2), alt)


def encoded_picture(rgba: np.ndarray, alt: str) -> Picture:
    """Pixels uint8 [h,w,4] as a PNG inside the page."""
    png = io.BytesIO()
    Image.fromarray(rgba, "RGBA").save(png, "png", optimize=True)
    uri = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
    return Picture(uri, rgba.shape[1] * max(1, WIDTH // rgba.shape[1]), alt)


def _images(images: np.ndarray, columns: int, alt: str) -> Picture:
    return _picture(images, lambda x: figures.image_grid(x, columns), alt)


def _pairs(x: np.ndarray, x_hat: np.ndarray, alt: str) -> Picture:
    return _picture(np.stack([x, x_hat]), lambda both: figures.reconstruction_grid(both[0], both[1]), alt)


@dataclass
class Row:
    label: str
    cells: list[str]
    group: str = ""
    differs: bool = False


def result_rows(runs: Sequence[RunContent]) -> list[Row]:
    """The final figures, a column for each run; figures that no run has are left out."""
    rows = []
    for label, stage, key, form in FIGURES:
        cells = [number(run.results.get(f"stage{stage}", {}).get(key), form) for run in runs]
        if set(cells) != {ABSENT}:
            rows.append(Row(label, cells, STAGES[stage]))
    return rows


def headlines(run: RunContent) -> list[tuple[str, str]]:
    """The few figures that say how a run went: (label, figure)."""
    first = run.results.get("stage1", {})
    found = [
        ("test mse", number(first.get("mse_sampled"), ".4f")),
        ("nats of KL per image", number(first.get("kl"), ".1f")),
        ("gamma", number(first.get("gamma"), ".3f")),
        ("variance law, should be 1", number(first.get("variance_law"), ".2f")),
        (f"of {run.info['config'].get('latents')} latents active", number(first.get("active"), "d")),
    ]
    for protocol, score in (run.results.get("fid") or {}).items():
        if isinstance(score, Mapping):
            found.append((f"FID of GEN-2 ({protocol})", number(score.get("gen2"), ".1f")))
    return [(label, figure) for label, figure in found if figure != ABSENT]


@dataclass
class FidTable:
    head: list[str]
    rows: list[tuple[str, list[str]]]
    published: list[tuple[str, str, str]]
    """method, source, FID of samples"""
    on: str
    """the data set that the published figures are of; empty where none are of this data"""


def fid_table(runs: Sequence[RunContent]) -> FidTable:
    """A row for each run and protocol under which it was scored, and what others have published on the same data."""
    scored = []
    for run in runs:
        for protocol, score in (run.results.get("fid") or {}).items():
            if isinstance(score, Mapping):
                scored.append((run.name, protocol, score))
    known = dict(FID_PARTS)
    of_priors = sorted({key for _, _, score in scored for key in score if key.startswith("gen_")})
    labels = known | {key: f"GEN, {key.removeprefix('gen_')}" for key in of_priors}
    parts = [(key, label) for key, label in labels.items() if any(score.get(key) is not None for _, _, score in scored)]
    rows = []
    for name, protocol, score in scored:
        count = f"{number(score.get('n'), ',d')} against {number(score.get('n_reference'), ',d')}"
        label = ", ".join(str(part) for part in (score.get("precision"), score.get("label")) if part)
        rows.append((name, [protocol, *(number(score.get(key), ".2f") for key, _ in parts), f"{count}, {label}"]))
    found = {published_on(run.info) for run in runs} - {""}
    on = found.pop() if len(found) == 1 else ""
    return FidTable(["Protocol", *(label for _, label in parts), "Images"], rows, list(PUBLISHED.get(on, ())), on)


def published_on(info: Mapping[str, Any]) -> str:
    """Which data set's published figures a run can be held against: "" if none."""
    config = info["config"]
    if info.get("data", {}).get("name") == "cifar10":
        return "CIFAR-10"
    return "CelebA 64x64" if str(config.get("preset", "")).startswith("celeba") and config.get("side") == 64 else ""


def setting_rows(runs: Sequence[RunContent]) -> list[Row]:
    """Every setting, a column for each run; those that differ come first."""
    configs = [run.info["config"] for run in runs]
    names = list(dict.fromkeys(name for config in configs for name in config))
    rows = []
    for name in names:
        cells = [_setting(config[name]) if name in config else "not known" for config in configs]
        rows.append(Row(name, cells, differs=len(set(cells)) > 1))
    return sorted(rows, key=lambda row: not row.differs)


def _setting(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def origin_rows(runs: Sequence[RunContent]) -> list[Row]:
    """Data, versions and device, a column for each run."""

    def data(run: RunContent, key: str) -> str:
        value = run.info.get("data", {}).get(key)
        if key == "digest":
            value = value and f"{str(value)[:23]}…"  # enough to see whether two runs had the same
        return ABSENT if value is None else f"{value:,}" if isinstance(value, int) else str(value)

    rows = [
        Row(label, [data(run, key) for run in runs])
        for label, key in (
            ("Data", "name"),
            ("Path", "path"),
            ("Training images", "train"),
            ("Test images", "test"),
            ("Digest", "digest"),
        )
    ]
    rows.append(Row("Device", [str(run.info.get("device", ABSENT)) for run in runs]))
    versions = [run.info.get("versions") or {} for run in runs]
    for name in dict.fromkeys(name for v in versions for name in v):
        rows.append(Row(name, [str(v.get(name, ABSENT)) for v in versions]))
    return rows


def sentence(run: RunContent) -> str:
    """What was trained on what, for the head of the page."""
    config, data = run.info["config"], run.info.get("data", {})
    balance = {"computed": "computed gamma", "learned": "learned gamma", "fixed": "a fixed gamma"}
    gamma = balance.get(config.get("balance"), "some gamma")
    name = str(config.get("family", "vae"))
    title = (families[name].title or name) if name in families else name
    with_gamma = "" if name in families and families[name].deterministic else f" with {gamma}"
    parts = [f"A {'two' if config.get('epochs2') else 'one'}-stage {title}{with_gamma}"]
    parts.append(f", preset {config.get('preset')}, {config.get('latents')} latents")
    side, channels = config.get("side"), config.get("channels")
    if data.get("name"):
        parts.append(f", trained on {data['name']}")
        if isinstance(data.get("train"), int):
            parts.append(f" ({data['train']:,} images of {side}x{side}x{channels})")
    if run.info.get("device"):
        parts.append(f" on {run.info['device']}")
    return "".join(parts) + "."


@dataclass
class Strip:
    """Images in a row, and what they are."""

    picture: Picture
    caption: str


@dataclass
class Gallery:
    """The pictures of one run."""

    name: str
    samples: list[tuple[int, Picture]]
    reconstructions: Picture | None
    traversals: list[Strip]
    interpolations: Picture | None
    interpolated: str
    nearest: list[Strip]
    distances: Chart | None
    verdict: str
    factors: list[Row]
    factor_names: list[str]
    latent_charts: list[Chart]


def gallery(run: RunContent) -> Gallery:
    factors = run.results.get("factors") or {}
    out = Gallery(
        run.name,
        [],
        None,
        [],
        None,
        "",
        [],
        None,
        "",
        factor_rows(factors),
        list(factors.get("names", ())),
        latent_charts(run.records),
    )
    views = run.views
    if views is None:
        return out
    of = f"of {run.name}"
    out.samples = [
        (stage, _images(images, 8, f"{len(images)} samples {of}, GEN-{stage}"))
        for stage, images in views.samples.items()
    ]
    if views.reconstructions is not None:
        x, x_hat = views.reconstructions
        out.reconstructions = _pairs(x, x_hat, f"{len(x)} test images, each above its reconstruction by {run.name}")
    if views.latents is not None:
        of_latent = dict(
            zip(views.latents.index.tolist(), zip(views.latents.kl, views.latents.sigma2, strict=True), strict=True)
        )
        for latent, images in zip(views.traversed, views.traversals, strict=True):
            kl, sigma2 = of_latent[latent]
            best = most_correlated(factors, latent)
            alt = f"Latent z{latent} {of} from {VALUES[0]:g} to {VALUES[-1]:g}"
            out.traversals.append(
                Strip(_images(images, len(VALUES), alt), f"z{latent}: {kl:.2f} nats, E(σ²) {sigma2:.3f}{best}")
            )
    rows = views.interpolations.reshape(-1, *views.interpolations.shape[2:])
    count = len(views.interpolations)
    out.interpolations = _images(rows, STEPS, f"{count} interpolations between {views.interpolated} {of}")
    out.interpolated = views.interpolated
    if (m := views.memorising) is not None:
        for i, images in enumerate(views.strips()):
            alt = f"A sample {of}, then its {images.shape[0] - 1} nearest training images"
            place, distance = m.found.index[i, 0], m.found.distance[i, 0]
            out.nearest.append(Strip(_images(images, 1 + NEIGHBOURS, alt), f"{distance:.3f} from image {place}"))
        out.distances = distance_chart(run.name, m.found.distance[:, 0], m.test_distance)
        z = (m.closer - 0.5) / m.deviation
        says = (
            "no sign of memorising"
            if z < 3
            else "more than chance explains: the samples lean towards the training images"
        )
        median = np.median(m.found.distance[:, 0])
        out.verdict = (
            f"{m.closer:.0%} of {len(m.samples)} samples are nearer to {m.compared:,} training images than to as many "
            f"test images; a model that copies nothing has 50% ± {m.deviation:.0%}. So this is {says}. Median distance "
            f"to the nearest training image: {median:.3f} of samples, {np.median(m.test_distance):.3f} of test images."
        )
    return out


def factor_rows(factors: Mapping[str, Any]) -> list[Row]:
    """|correlation| of the active latents with the true factors, most information first."""
    if not factors:
        return []
    kl, correlation = factors.get("latent_kl"), factors["correlation"]
    if kl is None:  # a deterministic code
        return [Row(f"z{j}", [number(c, ".2f") for c in correlation[j]]) for j in factors["active_latents"]]
    order = sorted(factors["active_latents"], key=lambda j: -(kl[j] or 0))
    return [Row(f"z{j} ({number(kl[j], '.2f')} nats)", [number(c, ".2f") for c in correlation[j]]) for j in order]


def most_correlated(factors: Mapping[str, Any], latent: int) -> str:
    if not factors:
        return ""
    best = max(range(len(factors["names"])), key=lambda f: factors["correlation"][latent][f] or 0)
    return f", {factors['names'][best]} {number(factors['correlation'][latent][best], '.2f')}"


def plotly() -> str:
    """plotly.js, as its Python package ships it."""
    return files("plotly").joinpath("package_data/plotly.min.js").read_text("utf-8")


def own_file(name: str) -> str:
    """A file of the page, such as page.css."""
    return files("bvae.report").joinpath(name).read_text("utf-8")


def inline_json(values: Any) -> Markup:
    """JSON that may stand inside a script element: no `<` can end it there."""
    text = encode_json(values)
    return Markup(text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"))


def _digest(script: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() + "'"


def policy(scripts: Sequence[str]) -> str:
    """The page's content security policy: no request, and no script but these."""
    return "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src " + " ".join(
        map(_digest, scripts)
    )


def render(runs: Sequence[RunContent], version: str) -> str:
    """The page. Equal content gives equal bytes."""
    galleries = [gallery(run) for run in runs]
    curves = {stage: stage_charts(stage, [(run.name, run.records) for run in runs]) for stage in (1, 2)}
    known = [(run.name, run.views.latents) for run in runs if run.views is not None and run.views.latents is not None]
    charts: list[Chart] = []

    def place(chart: Chart) -> int:
        charts.append(chart)
        return len(charts) - 1

    def charts_as_json() -> Markup:
        return inline_json([{"traces": c.traces, "colors": c.colors, "layout": c.layout} for c in charts])

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    scripts = [plotly(), own_file("page.js")]
    return environment.from_string(own_file("page.html")).render(
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared",
        runs=runs,
        sentences=[sentence(run) for run in runs],
        galleries=galleries,
        headlines=headlines(runs[0]) if len(runs) == 1 else [],
        results=result_rows(runs),
        fid=fid_table(runs),
        curves={STAGES[stage]: found for stage, found in curves.items() if found},
        information=information_chart(known) if known else None,
        origins=origin_rows(runs),
        settings=setting_rows(runs),
        open_traversals=OPEN_TRAVERSALS,
        values=[f"{value:g}".replace("-", "\u2212") for value in VALUES],
        version=version,
        style=Markup(own_file("page.css")),
        scripts=[Markup(script) for script in scripts],
        policy=policy(scripts),
        place=place,
        zip=zip,
        absent=ABSENT,
        charts_as_json=charts_as_json,
    )
