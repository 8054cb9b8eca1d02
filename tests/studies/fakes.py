"""A study of a few rows whose cells are run by fake_run.py, and the settings of its rows without torch."""

import sys
from pathlib import Path
from typing import Any

import pytest

from bvae.studies import cells, plan
from bvae.studies.cells import Scope
from bvae.studies.display import Display
from bvae.studies.jobs import Lock, Place
from bvae.studies.kinds import FromRow, Row, Study
from bvae.studies.plan import Options, make_plan
from bvae.studies.run import Runner
from bvae.studies.store import Store

FAKE = Path(__file__).with_name("fake_run.py")

STUDY = Study(
    name="fake",
    title="A study",
    about="Of nothing.",
    rows=(
        Row(name="computed", settings={"balance": "computed"}, against="learned"),
        Row(name="learned", settings={"balance": "learned"}),
        Row(name="fixed", settings={"balance": "fixed", "beta": FromRow("computed", "gamma2")}, against="computed"),
    ),
    columns=("mse_sampled", "rec", "gen1", "gamma2", "balance"),
    settings={"preset": "fake"},
    judged=("rec", "gen1"),
)


def fake_resolve(settings: dict[str, Any]) -> dict[str, Any]:
    """As bvae.train would: all settings, or RefusedSetting."""
    known = {"preset": "fake", "balance": "computed", "beta": None, "data": "fake", "epochs": 3, "epochs2": 0}
    known |= {"compile": None, "lr": 1e-3, "lr_halve": 3, "fid_every": 0, "amp": False}
    for name in settings:
        if name not in known:
            raise plan.RefusedSetting(f"Unrecognized options: --{name}")
    if settings.get("lr") == -1:
        raise plan.RefusedSetting("--lr must be a positive number, not -1")
    return {**known, **settings}


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "resolve", fake_resolve)
    monkeypatch.setattr(cells, "_module", lambda name, *rest: (sys.executable, "-I", "-S", str(FAKE), name, *rest))


def options(out: Path, **changes: Any) -> Options:
    return Options(**{"out": out, "seeds": 2, "inception": "weights", **changes})


def run_study(o: Options, study: Study = STUDY, jobs: int = 2, command: str = "command") -> tuple[Store, int]:
    """Runs what is missing; returns what is known then and the number of cells that failed."""
    with Lock(o.out, o.part) as lock:
        scope = Scope(make_plan(study, o))
        store = Store(scope, command)
        places = [Place(f"place {i}") for i in range(jobs)]
        with open("/dev/null", "w") as nowhere:
            from rich.console import Console

            failed = Runner(scope, store, places, Display(Console(file=nowhere)), lock.files).run()
        store.save()
    return store, failed
