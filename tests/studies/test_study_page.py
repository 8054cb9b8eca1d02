"""What a study writes: table.md, report.html, and the pictures with their data."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from fakes import STUDY, options, run_study
from fakes import faked as faked
from PIL import Image

from bvae.studies.cells import Scope
from bvae.studies.kept import band
from bvae.studies.kinds import Published, Row, Study
from bvae.studies.plan import make_plan
from bvae.studies.store import without_paths
from bvae.studies.write import write_all

pytestmark = pytest.mark.usefixtures("faked")


def written(out: Path, study: Study = STUDY, **changes: object) -> list[Path]:
    o = options(out, **changes)
    store, _ = run_study(o, study, command="python -m bvae.study fake")
    return write_all(Scope(make_plan(study, o)), store.to_dict())


def test_the_table_has_figures_failures_and_every_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_FAIL", "learned")
    written(tmp_path / "s", seeds=3, scale=0.5)
    text = (tmp_path / "s" / "table.md").read_text()
    assert text.startswith("# A study, scaled by 0.5\n")
    assert "    python -m bvae.study fake\n" in text
    (computed,) = (line for line in text.splitlines() if line.startswith("| computed | 2 |"))
    assert "0.01010 ± 0.00010 (3)" in computed
    (learned,) = (line for line in text.splitlines() if line.startswith("| learned | 2 |"))
    assert learned.count("failed") == 5
    assert "* learned: failed (seed 0, 1, 2): training: its weights have diverged" in text
    fold = text[text.index("<details>") : text.index("</details>")]
    assert "| computed | test mse | 0.01000, 0.01010, 0.01020 |" in fold
    assert "protocol tf1, fp32, 10,000 generated images" in text
    assert "not comparable with any other" in text  # 100 test images


def test_published_figures_stand_beside_with_their_source(tmp_path: Path) -> None:
    study = Study(
        name="fake", title="T", about="A.", columns=("rec",), settings={"preset": "fake"},
        rows=(Row(name="computed", published={"rec": Published("29.3 ± 1.0", "Somebody | 2019")}),),
    )  # fmt: skip
    written(tmp_path / "s", study, seeds=1)
    text = (tmp_path / "s" / "table.md").read_text()
    assert "| computed | REC | 25.00 (1) | 29.3 ± 1.0 | Somebody \\| 2019 |" in text


def test_the_page_is_complete_in_itself_and_drawn_from_what_is_kept(tmp_path: Path) -> None:
    written(tmp_path / "s", seeds=3)
    page = (tmp_path / "s" / "report.html").read_text()
    shutil.rmtree(tmp_path / "s" / "runs")
    written(tmp_path / "s", seeds=3)
    assert (tmp_path / "s" / "report.html").read_text() == page
    markup = page[: page.index("<script>")]  # the scripts that follow are those of a run's report
    assert "http://" not in markup and "https://" not in markup and "default-src &#39;none&#39;" in markup
    charts = json.loads(page.split('id="charts">')[1].split("</script>")[0])
    mse = charts[0]["traces"]
    assert mse[1]["y"] == ["computed", "learned", "fixed"]
    assert mse[1]["error_x"]["array"][0] == pytest.approx(0.0001)
    curves = [c for c in charts if c["layout"]["xaxis"]["title"]["text"] == "epoch"]
    named = [t["name"] for t in curves[0]["traces"] if t.get("name")]
    assert named == ["computed", "learned", "fixed"]
    bands = [t for t in curves[0]["traces"] if t.get("fill") == "tonexty"]
    assert len(bands) == 3 and len(bands[0]["y"]) == 3


def test_a_band_is_the_deviation_at_epochs_that_all_have() -> None:
    found = [{"epoch": [1, 2, 3], "value": [1.0, 2.0, 9.0]}, {"epoch": [1, 2], "value": [3.0, 6.0]}]
    epochs, means, deviations = band(found)
    assert (epochs, means) == ([1, 2], [2.0, 4.0])
    assert deviations == pytest.approx([np.std([1, 3], ddof=1), np.std([2, 6], ddof=1)])
    assert band(found[:1])[2] == [None, None, None]


def test_latents_are_drawn_with_their_data(tmp_path: Path) -> None:
    study = Study(
        name="fig", title="F", about="A.", columns=("mse_sampled",), settings={"preset": "fake"}, picture="latents",
        rows=(Row(name="computed", fids={}),),
    )  # fmt: skip
    paths = written(tmp_path / "s", study, seeds=1)
    assert tmp_path / "s" / "fig.png" in paths
    data = json.loads((tmp_path / "s" / "fig.json").read_text())
    assert data["epoch"] == [1, 2, 3] and data["sigma2"] == [[0.1, 0.9]] * 3
    with Image.open(tmp_path / "s" / "fig.png") as image:
        assert len(np.unique(np.asarray(image).reshape(-1, image.size[1] and 4), axis=0)) > 20


def test_filters_are_drawn_from_photographs(tmp_path: Path) -> None:
    from bvae.studies.paper import FIG7

    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (218, 178, 3), np.uint8)).save(tmp_path / "photos" / f"{i}.png")
    written(tmp_path / "s", FIG7, seeds=1, data=(str(tmp_path / "photos"),))
    with np.load(tmp_path / "s" / "fig7.npz") as found:
        assert set(found) == {"nearest", "bilinear", "bicubic", "lanczos"}
        assert found["nearest"].shape == (3, 64, 64, 3)
        # Noise survives nearest, and an antialiased filter averages it away.
        assert found["nearest"].std() > 1.5 * found["bilinear"].std()
    assert (tmp_path / "s" / "fig7.png").exists()


def test_a_copy_for_others_names_no_folder() -> None:
    text = without_paths("python -m bvae.study x --data mnist=/a/b/mnist --out /a/s", ["/a/b/mnist", "/a/s", ""])
    assert text == "python -m bvae.study x --data mnist=mnist --out s"
