"""Writes what a study gives: table.md, its picture with the data of it, and report.html."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bvae.files import write_atomically
from bvae.studies.cells import Scope
from bvae.studies.jobs import alone
from bvae.studies.page import render_page
from bvae.studies.pictures import draw
from bvae.studies.table import markdown

TABLE = "table.md"
REPORT = "report.html"


def write_all(scope: Scope, found: Mapping[str, Any]) -> list[Path]:
    """Writes the files beside study.json from what it holds and from the runs that are there; returns their paths."""
    out, study = scope.options.out, scope.plan.study
    with alone(out / ".writing"):
        written = draw(scope, found)
        write_atomically(out / TABLE, markdown(study, found).encode())
        write_atomically(out / REPORT, render_page(scope, found, written).encode())
    return [*written, out / TABLE, out / REPORT]
