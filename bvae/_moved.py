"""Old names of modules that have moved: imports of them work for one version, with a DeprecationWarning."""

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

NEW = {
    "bvae.checkpoint": "bvae.run.checkpoint",
    "bvae.compiling": "bvae.engine.compiling",
    "bvae.datasource": "bvae.run.data",
    "bvae.fid_scores": "bvae.metrics.fid_scores",
    "bvae.figures": "bvae.report.figures",
    "bvae.graph": "bvae.engine.graph",
    "bvae.mapped": "bvae.batches.mapped",
    "bvae.report_views": "bvae.report.views",
    "bvae.runlog": "bvae.run.log",
    "bvae.scores": "bvae.metrics.scores",
    "bvae.step": "bvae.engine.step",
    "bvae.streaming": "bvae.batches.streamed",
    "bvae.trackers": "bvae.run.trackers",
    "bvae.trainer": "bvae.engine.trainer",
}


class _Loader(importlib.abc.Loader):
    def exec_module(self, module: ModuleType) -> None:
        new = importlib.import_module(NEW[module.__name__])
        vars(module).update({name: value for name, value in vars(new).items() if not name.startswith("__")})


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in NEW:
            return None
        warnings.warn(f"{name} has moved to {NEW[name]}", DeprecationWarning, stacklevel=2)
        return importlib.machinery.ModuleSpec(name, _Loader())


def install() -> None:
    """Makes the old names importable; what lies under a name of today is always found first."""
    sys.meta_path.append(_Finder())
