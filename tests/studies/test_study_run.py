"""Running a study: what is missing, side by side, killed and gone on with, with failures, and in parts."""

import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from fakes import STUDY, options, run_study
from fakes import faked as faked

from bvae.errors import Interrupted, UserError
from bvae.studies.beyond import PRIORS
from bvae.studies.cells import Scope, next_point, read_first_epoch
from bvae.studies.plan import make_plan
from bvae.studies.store import Store

pytestmark = pytest.mark.usefixtures("faked")
forked = multiprocessing.get_context("fork")


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with a line for each command that was run."""
    monkeypatch.setenv("FAKE_CALLS", str(tmp_path / "calls"))
    (tmp_path / "calls").touch()
    return tmp_path / "calls"


def lines(calls: Path) -> list[str]:
    return calls.read_text().splitlines()


def test_every_cell_is_trained_and_scored_once(tmp_path: Path, calls: Path) -> None:
    _, failed = run_study(options(tmp_path / "s"))
    assert failed == 0
    found = json.loads((tmp_path / "s" / "study.json").read_text())
    assert [row["name"] for row in found["rows"]] == ["computed", "learned", "fixed"]
    learned = found["rows"][1]["metrics"]["mse_sampled"]
    assert learned["values"] == pytest.approx([0.012, 0.0121])
    assert (learned["mean"], learned["n"]) == (pytest.approx(0.01205), 2)
    assert learned["sd"] == pytest.approx(0.0001 / 2**0.5)  # n - 1
    assert {"name", "command", "scale", "protocol", "precision", "rows"} <= set(found)
    assert {"name", "settings", "epochs", "n_images", "metrics", "published"} <= set(found["rows"][0])
    trained = [line for line in lines(calls) if line.startswith("bvae.train")]
    assert len(trained) == 6 and all("--no-compile" in line for line in trained)

    before = lines(calls)
    run_study(options(tmp_path / "s"))
    assert lines(calls) == before  # nothing was missing
    run_study(options(tmp_path / "s", seeds=3))
    more = lines(calls)[len(before) :]
    assert sum(line.startswith("bvae.train") for line in more) == 3 and all(
        "--seed 2" in m for m in more if "--out" in m
    )


def test_a_setting_found_by_another_row_is_that_of_the_same_seed(tmp_path: Path, calls: Path) -> None:
    run_study(options(tmp_path / "s"))
    fixed = [line for line in lines(calls) if "--balance fixed" in line]
    assert ["--beta 0.01 " in line for line in fixed] == [True, False]
    assert ["--beta 0.011" in line for line in fixed] == [False, True]


def test_killed_twice_it_ends_as_if_it_had_not_been(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_study(options(tmp_path / "s", inception=None))
    before = {p.name: p.read_bytes() for p in (tmp_path / "s").glob("**/*.json")}
    table = (tmp_path / "s" / "study.json").read_bytes()
    shutil.rmtree(tmp_path / "s")

    monkeypatch.setenv("FAKE_SECONDS", "0.1")
    for wait in (0.5, 0.9):
        process = forked.Process(target=run_study, args=(options(tmp_path / "s", inception=None),))
        process.start()
        time.sleep(wait)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert (tmp_path / "s" / "study.json").read_bytes() != table  # it was not done yet
    run_study(options(tmp_path / "s", inception=None))
    assert (tmp_path / "s" / "study.json").read_bytes() == table
    assert {p.name: p.read_bytes() for p in (tmp_path / "s").glob("**/*.json")} == before


def test_a_failed_cell_is_named_and_does_not_end_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_FAIL", "learned")
    store, failed = run_study(options(tmp_path / "s"))
    assert failed == 2
    rows = {row["name"]: row for row in store.to_dict()["rows"]}
    assert rows["learned"]["failed"] == {
        "0": "training: its weights have diverged",
        "1": rows["learned"]["failed"]["1"],
    }
    assert rows["learned"]["metrics"] == {}
    assert rows["fixed"]["metrics"]["rec"]["n"] == 2
    monkeypatch.delenv("FAKE_FAIL")
    store, failed = run_study(options(tmp_path / "s"))  # tried again
    assert failed == 0 and store.to_dict()["rows"][1]["failed"] == {}


def test_what_needs_a_failed_row_fails_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_FAIL", "computed")
    store, failed = run_study(options(tmp_path / "s", seeds=1))
    assert failed == 2
    assert "has failed" in store.failed["fixed"][0]


def test_values_in_study_json_count_though_the_runs_are_gone(tmp_path: Path, calls: Path) -> None:
    run_study(options(tmp_path / "s"))
    table = (tmp_path / "s" / "study.json").read_bytes()
    shutil.rmtree(tmp_path / "s" / "runs")
    before = lines(calls)
    run_study(options(tmp_path / "s"))
    assert lines(calls) == before
    assert (tmp_path / "s" / "study.json").read_bytes() == table


def test_parts_do_each_cell_once_and_merge(tmp_path: Path, calls: Path) -> None:
    run_study(options(tmp_path / "whole", inception=None))
    calls.write_text("")
    for part in ((3, 3), (1, 3), (2, 3)):
        run_study(options(tmp_path / "s", part=part, inception=None))
    assert sum(line.startswith("bvae.train") for line in lines(calls)) == 6
    assert (tmp_path / "s" / "study.json").read_bytes() == (tmp_path / "whole" / "study.json").read_bytes()


def test_a_failure_that_another_part_has_mended_is_not_written_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [options(tmp_path / "s", seeds=1, part=(i, 2), inception=None) for i in (1, 2)]
    plans = [make_plan(STUDY, o) for o in parts]
    learned = next(i for i, plan in enumerate(plans) if any(c.row == "learned" for c in plan.cells_of_part()))
    monkeypatch.setenv("FAKE_FAIL", "learned")
    run_study(parts[learned])
    other = Store(Scope(plans[1 - learned]), "command")
    assert other.failed["learned"]
    monkeypatch.delenv("FAKE_FAIL")
    run_study(parts[learned])
    assert other.save()["rows"][1]["failed"] == {}


def test_parts_run_at_the_same_time_and_a_whole_one_is_refused_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SECONDS", "0.15")
    processes = [
        forked.Process(target=run_study, args=(options(tmp_path / "s", part=(i, 2), inception=None), STUDY, 1))
        for i in (1, 2)
    ]
    for process in processes:
        process.start()
    time.sleep(0.4)
    monkeypatch.setattr("bvae.studies.jobs.PATIENCE_SECONDS", 0.1)
    with pytest.raises(UserError, match="another study is using it"):
        run_study(options(tmp_path / "s"))
    for process in processes:
        process.join()
    found = json.loads((tmp_path / "s" / "study.json").read_text())
    assert [row["metrics"]["mse_sampled"]["n"] for row in found["rows"]] == [2, 2, 2]


def test_a_signal_ends_it_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_SECONDS", "1")
    began = time.monotonic()
    timer = forked.Process(
        target=lambda parent: (time.sleep(0.5), os.kill(parent, signal.SIGTERM)), args=(os.getpid(),)
    )
    timer.start()
    with pytest.raises(Interrupted):
        run_study(options(tmp_path / "s"))
    timer.join()
    assert time.monotonic() - began < 3
    records = list((tmp_path / "s" / "runs").glob("*/metrics.jsonl"))
    sizes = [p.stat().st_size for p in records]
    time.sleep(1.2)
    assert [p.stat().st_size for p in records] == sizes


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"scale": 0.5}, "scale 1"),
        ({"precision": "bf16"}, "precision fp32"),
        ({"sets": ("lr=0.5",)}, "with lr None, not 0.5"),
    ],
)
def test_another_recipe_in_the_same_folder_is_refused(tmp_path: Path, changes: dict, says: str) -> None:
    run_study(options(tmp_path / "s", seeds=1))
    with pytest.raises(UserError, match=says):
        run_study(options(tmp_path / "s", **changes))


def test_a_gamma_that_has_not_settled_is_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = run_study(options(tmp_path / "settled", seeds=3))
    verdicts = {(c.row, c.metric): c for c in store.comparisons()}
    assert verdicts["computed", "rec"].verdict.startswith("lower by 2, ")
    monkeypatch.setenv("FAKE_UNSETTLED", "1")
    store, _ = run_study(options(tmp_path / "s", seeds=3))
    assert store.to_dict()["rows"][1]["unsettled"] == {"stage1": [0, 1, 2], "stage2": []}
    verdicts = {(c.row, c.metric): c for c in store.comparisons()}
    assert verdicts["computed", "rec"].verdict == "not compared: gamma not settled"
    assert verdicts["fixed", "rec"].difference is not None


def test_priors_are_fitted_and_scored_on_one_frozen_stage_1(tmp_path: Path, calls: Path) -> None:
    store, failed = run_study(options(tmp_path / "s", seeds=1), PRIORS)
    assert failed == 0
    assert sum(line.startswith("bvae.train") for line in lines(calls)) == 1
    rows = {row["name"]: row["metrics"] for row in store.to_dict()["rows"]}
    assert rows["gmm"]["fid"]["values"] == rows["gmm"]["gen_gmm"]["values"] == [pytest.approx(10 + 35)]
    assert rows["real training images"]["fid"]["values"] == [2.5]
    assert rows["flow-matching"]["coverage"]["values"] == [0.7]
    assert "fid" not in rows["second-stage"]  # this run has no second stage
    assert (tmp_path / "s" / "kept" / "gmm-samples.png").exists()


def test_points_within_an_epoch_are_means_since_the_one_before(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    assert next_point(run, 3) == 1
    (run / "config.json").write_text(json.dumps({"data": {"train": 400}, "config": {"batch": 100}}))
    for step, mean, following in ((1, 0.9, 2), (2, 0.8, 4), (4, 0.6, None)):
        (run / "results.json").write_text(json.dumps({"stage1": {"steps": step}}))
        record = {"stage": 1, "epoch": 1, "step": step, "latent_sigma2": [mean]}
        (run / "metrics.jsonl").write_text(json.dumps(record) + "\n")
        assert next_point(run, 3) == following
        assert next_point(run, 3) == following  # asked again after a kill
    found = read_first_epoch(run)
    assert found["steps"] == [1, 2, 4]
    # (2 * .8 - 1 * .9) / 1 and (4 * .6 - 2 * .8) / 2
    assert [v for (v,) in found["latent_sigma2"]] == pytest.approx([0.9, 0.7, 0.4])
