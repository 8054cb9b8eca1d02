"""The studies as data, and what a command line makes of them."""

import json
import re
from pathlib import Path

import pytest
from fakes import STUDY, fake_resolve, options
from fakes import faked as faked

from bvae import study as command
from bvae.errors import UserError
from bvae.studies.definitions import STUDIES
from bvae.studies.kinds import FromRow, Study
from bvae.studies.plan import arguments, make_plan

NAMED = (
    *(
        "table1",
        "table2",
        "table3",
        "table4",
        "table5",
        "fig2",
        "fig3",
        "fig4",
        "fig5",
        "fig6",
        "fig7",
        "dai-wipf",
        "rae",
    ),
    *("balances", "priors", "kl-weight", "evidence-fashion", "evidence-mnist", "evidence-shapes"),
)


def test_all_studies_are_there() -> None:
    assert set(STUDIES) == set(NAMED)


@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
def test_rows_name_rows_that_are_there(study: Study) -> None:
    names = [row.name for row in study.rows]
    owners = [row.name for row in study.owners]
    assert len(set(names)) == len(names)
    assert len({row.slug for row in study.rows}) == len(names), "two rows would share a folder"
    for row in study.rows:
        assert not row.against or (row.against in names and row.against != row.name)
        assert not row.run or row.run in owners
        for value in row.settings.values():
            if isinstance(value, FromRow):
                assert value.row in owners and not any(
                    isinstance(v, FromRow) for v in study.row(value.row).settings.values()
                )
        assert not (row.run and (row.settings or row.priors or row.quality)), "it has no runs of its own"


def test_published_figures_have_sources_and_unverified_ones_are_absent() -> None:
    found = [(m, p) for study in STUDIES.values() for row in study.rows for m, p in row.published.items()]
    assert found and all(re.match(r"[\d.]+( ± [\d.]+)?$", p.value) and "Table 1" in p.source for _, p in found)
    table2 = STUDIES["table2"]
    assert table2.row("learned").published["gen2"].value == "72.9 ± 0.9"
    assert table2.row("RAE-L2").published["gen_gmm"].value == "74.16"
    assert not table2.row("computed").published, "the paper's own figures are not verified"
    assert STUDIES["evidence-fashion"].row("learned").published["gen2"].value == "29.3 ± 1.0"
    assert STUDIES["evidence-mnist"].row("learned").published["gen2"].value == "12.6 ± 1.5"


@pytest.mark.parametrize("name", NAMED)
def test_every_study_prints_its_cells(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([name, "--data", "shapes", "--scale", "0.01", "--dry-run"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "scaled by 0.01" in said[0]
    cells = [line for line in said if line.startswith("cell ")]
    assert said[-1] == f"{len(cells)} cells"
    # Each row that has runs of its own, with every seed that it takes.
    study = STUDIES[name]
    rows = [[r for r in study.rows if r.owner == owner.name] for owner in study.owners]
    assert len(cells) == sum(any(r.takes(s) for r in own) for own in rows for s in range(study.seeds))


def test_the_list_names_them_all(capsys: pytest.CaptureFixture[str]) -> None:
    command.main(["--list"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(STUDIES)


@pytest.mark.usefixtures("faked")
def test_scale_multiplies_epochs_and_halving_intervals_to_at_least_1(tmp_path: Path) -> None:
    plan = make_plan(STUDY, options(tmp_path, scale=0.5))
    computed = plan.rows["computed"]
    assert (computed.config["epochs"], computed.config["lr_halve"], computed.config["epochs2"]) == (2, 2, 0)
    assert make_plan(STUDY, options(tmp_path, scale=0.01)).rows["computed"].config["epochs"] == 1
    assert "epochs" not in make_plan(STUDY, options(tmp_path)).rows["computed"].settings


@pytest.mark.usefixtures("faked")
def test_a_set_acts_on_rows_that_have_the_setting_and_names_the_others(tmp_path: Path) -> None:
    plan = make_plan(STUDY, options(tmp_path, sets=("beta=0.5", "amp=true", "lr=0.01")))
    assert plan.rows["computed"].settings["beta"] == 0.5
    assert isinstance(plan.rows["fixed"].settings["beta"], FromRow)
    assert plan.notes == ["--set beta does not act on fixed (it is what this row is about)"]
    assert "--amp" in arguments(plan.rows["learned"].settings)
    for sets, says in (
        (("balance=learned",), "no row of fake takes it"),
        (("nonsense=1",), "Unrecognized options: --nonsense"),
        (("lr=-1",), "must be a positive number"),
        (("seed=1",), "set by the study itself"),
        (("lr",), "must be SETTING=VALUE"),
        (("amp=2",), "must be true or false"),
    ):
        with pytest.raises(UserError, match=says):
            make_plan(STUDY, options(tmp_path, sets=sets))


@pytest.mark.usefixtures("faked")
def test_parts_hold_every_cell_once_with_those_it_needs(tmp_path: Path) -> None:
    whole = make_plan(STUDY, options(tmp_path, seeds=5))
    parts = [make_plan(STUDY, options(tmp_path, seeds=5, part=(i, 4))).cells_of_part() for i in (1, 2, 3, 4)]
    assert sorted(c.name for part in parts for c in part) == sorted(c.name for c in whole.cells())
    for part in parts:
        names = {c.name for c in part}
        assert all(f"computed-s{c.seed}" in names for c in part if c.row == "fixed")
    assert max(map(len, parts)) - min(map(len, parts)) <= 2


def test_data_sets_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bvae.studies.plan.resolve", lambda settings: {"epochs": 1, **settings})
    (tmp_path / "fashion").mkdir()
    plan = make_plan(STUDIES["dai-wipf"], options(tmp_path, data=(str(tmp_path), "mnist=elsewhere")))
    data = {name: row.settings.get("data") for name, row in plan.rows.items()}
    assert data["mnist: computed"] == "elsewhere"
    assert data["fashion: computed"] == str(tmp_path / "fashion")
    assert plan.rows["celeba: computed"].problem == "its images are not given: --data celeba=PATH"


def test_the_commands_of_a_cell_are_what_their_programs_take(tmp_path: Path) -> None:
    """By the real parsers: a cell's training, alone and gone on with, and its scores."""
    from bvae import evaluate, train
    from bvae.studies.cells import Scope

    o = options(tmp_path, data=("shapes",), scale=0.01, sets=("amp=false",))
    scope = Scope(make_plan(STUDIES["table1"], o))
    (cell, _) = scope.plan.cells()
    step = scope.next_step(cell, {})
    assert step is not None and step.command[1:3] == ("-m", "bvae.train")
    config, arguments = train.parse(list(step.command[3:]))
    assert (config.epochs, config.fid_every, config.inception, config.seed) == (7, 1, "weights", 0)
    assert arguments.out == tmp_path / "runs" / "all-epochs-s0" and config.compile is False and not config.amp
    (tmp_path / "runs" / "all-epochs-s0").mkdir(parents=True)
    (tmp_path / "runs" / "all-epochs-s0" / "results.json").write_text('{"stage1": {}, "stage2": {}}')
    step = scope.next_step(cell, {})
    assert step is not None and step.what == "FIDs"
    args = evaluate.parse(list(step.command[3:]))
    assert (args.only, args.fid_num, args.precision, args.allow_few) == (["rec", "gen1", "gen2"], 10_000, "fp32", True)
    assert scope.next_step(cell, {}, skip=["FIDs"]) is None

    found = {"rec": 1.0, "gen1": 1.0, "gen2": 1.0, "n": 10_000, "precision": "fp32"}
    results = {"stage1": {}, "stage2": {}, "fid": {"tf1": found}}
    priors = Scope(make_plan(STUDIES["priors"], o))
    (cell, _) = priors.plan.cells()
    (priors.folder(cell) / "priors").mkdir(parents=True)
    (priors.folder(cell) / "results.json").write_text(json.dumps(results))
    step = priors.next_step(cell, {})
    assert step is not None and step.command[1:3] == ("-m", "bvae.prior") and step.what == "prior gaussian"
    for name in ("gaussian", "gmm"):  # the third could not be fitted: the others are scored all the same
        (priors.folder(cell) / "priors" / f"{name}.safetensors").touch()
    skip = ["prior flow-matching", *(f"samples of {name}" for name in ("gaussian", "gmm"))]
    step = priors.next_step(cell, {}, skip)
    assert step is not None and step.what == "FIDs"
    args = evaluate.parse(list(step.command[3:]))
    assert (args.prior, args.only) == ("gaussian,gmm", [])
    step = priors.next_step(cell, {}, [*skip, "FIDs"])
    assert step is not None and step.command[4:9] == ("normal", "second-stage", "gaussian", "gmm", "floor")


def test_bvae_train_is_asked_what_it_takes() -> None:
    """The real parser: the settings of a row are the configuration that a run of it has."""
    from bvae.studies.plan import RefusedSetting, resolve

    config = resolve({"preset": "celeba-1", "l2": 1e-3, "l2_on": ("decoder.upsample", "decoder.scales"), "amp": True})
    assert config["l2_on"] == ("decoder.upsample", "decoder.scales") and config["amp"] and config["side"] == 64
    with pytest.raises(RefusedSetting, match="Unrecognized options: --nonsense"):
        resolve({"preset": "shapes", "nonsense": 1})
    with pytest.raises(RefusedSetting, match="--lr must be a positive number"):
        resolve({"lr": -1})
    with pytest.raises(RefusedSetting, match=r"no such preset$"):
        resolve({"preset": "nonsense"})
    assert fake_resolve({})["epochs"] == 3


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["nonsense"], "no such study"),
        (["table1", "--seeds", "0"], "--seeds must be at least 1"),
        (["table1", "--scale", "-1"], "--scale must be a positive number"),
        (["table1", "--out", "never-made"], "table1 needs --data"),
    ],
)
def test_mistakes_are_told_before_anything_runs(argv: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        command.main(argv)
    assert not Path("never-made").exists()


def test_the_command_is_kept_without_where_it_ran() -> None:
    argv = ["table2", "--part", "1/2", "--seeds", "3", "--copy=x.json", "--set", "lr=1"]
    assert command.command_of(argv) == "python -m bvae.study table2 --seeds 3 --set lr=1"
