"""The pictures that a finished run leaves in its folder, and in TensorBoard or a tracker."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bvae.data import Dataset
from bvae.metrics.latent import INACTIVE
from bvae.report import figures
from bvae.report.views import Views, compute_views
from bvae.run.log import RunLog, read_metrics
from bvae.two_stage import TwoStageVAE


def draw(folder: Path, model: TwoStageVAE, data: Dataset, results: Mapping[str, Any], log: RunLog, epoch: int) -> Views:
    """Draws a run's samples, reconstructions, curves and factors into its folder; returns the model's views.

    epoch: the last stage's, at which the log gets pictures and final figures.
    """
    records = read_metrics(folder)
    views = compute_views(model, records, data, seed=model.config.seed)
    for name, picture in views.pictures().items():
        figures.save_png(folder / f"{name}.png", picture)
        log.image(name, picture, epoch)
    log.final(results, epoch)
    if any(r["stage"] == 1 for r in records):  # somebody may have removed the file
        figures.curves(records, folder / "curves.png")
        if not model.stage1.deterministic:
            figures.latent_curves(records, folder / "latents.png", INACTIVE)
    if "factors" in results:
        f = results["factors"]
        active = np.zeros(model.config.latents, bool)
        active[f["active_latents"]] = True
        path = folder / "factors.png"
        kl = np.array(f["latent_kl"]) if "latent_kl" in f else None
        figures.factor_correlation(np.array(f["correlation"]), f["names"], active, path, kl=kl)
    return views
