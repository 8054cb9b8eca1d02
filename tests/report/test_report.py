import base64
import dataclasses
import io
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import plotly.graph_objects
import pytest
import torch
from PIL import Image
from report_runs import FID, KL, epoch_record, images, make_run

from bvae.config import Config
from bvae.errors import UserError
from bvae.report import page as report_page
from bvae.report import write as report
from bvae.report.__main__ import main as report_command
from bvae.report.charts import latent_charts, log_axis, stage_charts, thin
from bvae.report.figures import image_grid, reconstruction_grid
from bvae.report.page import FidTable, fid_table, published_on, render
from bvae.report.write import read_content, write_report
from bvae.run.folder import load
from bvae.two_stage import to_uint8

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Checks that elements close in the order in which they open, and keeps what tests look at."""

    def __init__(self, html):
        super().__init__()
        self.open, self.texts, self.tags, self.scripts = [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        (self.scripts if self.open and self.open[-1] in ("script", "style") else self.texts).append(data)

    def of(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def charts(self):
        return json.loads(next(script for script in self.scripts if script.startswith("[")))


@pytest.fixture(autouse=True)
def small_library(monkeypatch):
    """What is tested here does not depend on plotly.js, and reading five megabytes of it again and again takes long."""
    monkeypatch.setattr(report_page, "plotly", lambda: "// plotly")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return images(tmp_path_factory.mktemp("data") / "images.npz")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data):
    return make_run(tmp_path_factory.mktemp("runs") / "first", data, results={"fid": FID})


@pytest.fixture
def run(finished, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(finished, tmp_path / "run")


def page_of(*folders, **kwargs):
    out = write_report(folders, **kwargs)
    return Page(out.read_text("utf-8"))


def decoded(uri):
    assert uri.startswith("data:image/png;base64,")
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
        return np.asarray(image)


# ---- what is on the page ----------------------------------------------------------------------------------------


def test_a_finished_run(run):
    page = page_of(run)
    assert (run / "report.html").exists() and not list(run.glob("*.tmp"))
    for expected in (
        "A two-stage VAE with computed gamma, preset shapes, 6 latents, trained on images.npz (40 images of 8x8x3) on "
        "a processor. Finished.",
        "Test mse, z sampled 0.01230",
        "Variance law (should be 1) 1.010",
        "z3: 3.00 nats",
        "Between the reconstructions of two test images",
        "tf1 61.23 60.10 110.50 92.75 10,000 against 10,000, fp32",
        "There are no published figures of comparable models on this data.",
    ):
        assert expected in page.text
    # Most information first, and only what is active.
    assert re.findall(r"z(\d): [\d.]+ nats", page.text) == ["3", "1", "2", "5"]
    assert all(attributes.get("alt") for attributes in page.of("img"))


def test_pictures_are_the_models_with_transparent_gaps(run, data):
    page = page_of(run)
    model = load(run)
    samples = to_uint8(model.sample(64, 2, 0))
    with np.load(data) as arrays:
        x = arrays["test"][:24][:20]
    x_hat = to_uint8(model.reconstruct(torch.tensor(x).permute(0, 3, 1, 2)))
    found = {a["alt"]: decoded(a["src"]) for a in page.of("img")}
    for alt, grid in (
        ("64 samples of run, GEN-2", image_grid(samples, 8)),
        ("20 test images, each above its reconstruction by run", reconstruction_grid(x, x_hat)),
    ):
        assert (found[alt][..., :3] == grid).all()
    rgba = found["64 samples of run, GEN-2"]
    assert (rgba[:2, :, 3] == 0).all() and (rgba[2:10, 2:10, 3] == 255).all()
    assert (rgba[..., 3] == 255).sum() == 64 * 8 * 8


def test_charts_are_valid_plotly_and_hold_the_records(run):
    charts = page_of(run).charts()
    for chart in charts:
        plotly.graph_objects.Figure(data=chart["traces"], layout=chart["layout"])  # refuses unknown properties
        assert len(chart["traces"]) == len(chart["colors"])
    loss = charts[0]["traces"][0]
    assert loss["name"] == "loss" and loss["x"] == [1, 2, 3, 4, 5]
    assert loss["y"] == pytest.approx([epoch_record(1, e)["loss"] for e in range(1, 6)], rel=1e-4)
    gamma = next(t for c in charts for t in c["traces"] if t["name"] == "gamma")
    assert gamma["y"] == pytest.approx([epoch_record(1, e)["gamma2"] ** 0.5 for e in range(1, 6)], rel=1e-4)


def test_a_comparison_has_a_column_a_run_and_curves_over_each_other(run, tmp_path, data, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = make_run(tmp_path / "other", data, seed=1, hidden=24, results={"stage1": {"mse_sampled": 0.5}})
    page = page_of(run, other)
    assert (tmp_path / "comparison.html").exists() and not (run / "report.html").exists()
    assert "2 runs compared" in page.text
    assert "Test mse, z sampled 0.01230 0.50000" in page.text
    assert "Settings that differ run other hidden 16 24" in page.text
    assert {"64 samples of run, GEN-2", "64 samples of other, GEN-2"} <= {a["alt"] for a in page.of("img")}
    loss = page.charts()[0]
    assert [(t["name"], t["line"]["dash"], t["showlegend"]) for t in loss["traces"]] == [
        ("run", "solid", True), ("run", "dash", False), ("other", "solid", True), ("other", "dash", False),
    ]  # fmt: skip
    assert loss["colors"] == [0, 0, 1, 1]


def test_runs_of_the_same_name_are_told_apart_by_their_paths(finished, tmp_path):
    folders = [shutil.copytree(finished, tmp_path / part / "run") for part in "ab"]
    page = page_of(*folders, out=tmp_path / "page.html")
    for folder in folders:
        assert f"64 samples of {folder}, GEN-1" in {a["alt"] for a in page.of("img")}


def test_the_same_content_gives_the_same_bytes(run, tmp_path):
    assert write_report([run]).read_bytes() == write_report([run], tmp_path / "again.html").read_bytes()


# ---- nothing that a user chooses gets out of its place ----------------------------------------------------------


def test_everything_is_escaped(tmp_path, data):
    evil = "<script>alert(1)</script>\"'&{{7*7}}</style>"
    folder = make_run(
        tmp_path / evil.replace("/", "\u2044"),
        data,
        preset=f"{evil}",
        info={"device": evil, "versions": {evil: evil}},
        results={
            "fid": {evil: {**FID["tf1"], "label": evil, "precision": evil}},
            "factors": {"names": [evil], "correlation": [[0.5]] * 6, "active_latents": [1], "latent_kl": KL, "true": 1},
        },
    )
    other = make_run(tmp_path / "other", data)
    html = write_report([folder, other], tmp_path / "out.html").read_text("utf-8")
    page = Page(html)
    assert "<script>alert" not in html
    assert len(page.of("script")) == 3  # the charts' data, plotly and the page's own
    assert len(page.of("style")) == 1
    assert evil in page.text
    names = {t["name"] for c in page.charts() for t in c["traces"]}
    assert not any("<" in name for name in names)


def test_the_page_may_ask_for_nothing_and_runs_no_other_script(run):
    page = page_of(run)
    policy = next(a["content"] for a in page.of("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data: blob:;")
    assert "unsafe-inline" not in policy.partition("script-src")[2]
    addresses = [v for _, attributes in page.tags for k, v in attributes.items() if k in ("src", "href", "srcset")]
    assert all(a.startswith(("data:", "#")) for a in addresses)


def test_headings_tables_and_charts_have_names(run):
    page = page_of(run)
    assert len(page.of("h1")) == 1
    assert all(a.get("aria-label") for a in page.of("div") if a.get("role"))
    assert len(page.of("table")) == sum(tag == "caption" for tag, _ in page.tags)
    assert all(a.get("scope") for a in page.of("th"))
    anchors = {a["href"][1:] for a in page.of("a")}
    assert anchors == {a["id"] for a in page.of("section")}


# ---- what is missing leaves a sentence --------------------------------------------------------------------------


def test_without_the_images(run, data, tmp_path):
    gone = tmp_path / "gone.npz"
    settings = json.loads((run / "config.json").read_text())
    settings["config"]["data"] = str(gone)
    (run / "config.json").write_text(json.dumps(settings))
    page = page_of(run)
    assert "images are not at hand" in page.text and "gone.npz" in page.text
    assert "No reconstructions" in page.text and "Not searched" in page.text
    assert "Between two samples" in page.text
    assert "test images, each" not in " ".join(a["alt"] for a in page.of("img"))
    # --data finds them again.
    assert "images are not at hand" not in page_of(run, source=str(data)).text


def test_other_images_than_those_it_was_trained_on_are_used_and_named(run, tmp_path):
    page = page_of(run, source=str(images(tmp_path / "others.npz", seed=3)))
    assert "The images, others.npz, are not the ones this run was trained on." in page.text
    assert "Not searched" not in page.text


def test_an_unfinished_run(tmp_path, data):
    page = page_of(make_run(tmp_path / "run", data, epochs=(2, 0), results=False))
    assert "Not finished: stage 1 has had 2 of 5 epochs." in page.text
    assert "No final figures yet" in page.text and "FID has not been measured" in page.text
    assert {"64 samples of run, GEN-1"} == {a["alt"] for a in page.of("img") if "GEN" in a["alt"]}
    # Scores from bvae.evaluate do not make it a finished one.
    (tmp_path / "run" / "results.json").write_text(json.dumps({"stage1": {"kl": 6.25}, "stage2": {}, "fid": FID}))
    page = page_of(tmp_path / "run")
    assert "Not finished" in page.text and "KL, nats per image 6.25" in page.text and "61.23" in page.text


def test_a_model_without_its_training(finished, tmp_path):
    load(finished).save_pretrained(tmp_path / "model")
    page = page_of(tmp_path / "model")
    assert "A saved model, without the records of its training." in page.text
    assert "No epoch has been logged." in page.text and "none is traversed" in page.text
    assert "64 samples of model, GEN-2" in {a["alt"] for a in page.of("img")}


def test_a_stage_that_was_switched_off(tmp_path, data):
    folder = make_run(tmp_path / "run", data, epochs=(3, 0), epochs2=0, results={"stage2": {}})
    page = page_of(folder)
    assert "A one-stage VAE" in page.text and "Stage 2" not in page.text
    assert {"64 samples of run, GEN-1"} == {a["alt"] for a in page.of("img") if "GEN" in a["alt"]}


@pytest.mark.parametrize(
    ("name", "damage", "sentence"),
    [
        ("metrics.jsonl", lambda b: b[:-20], "Finished."),  # torn by a killed process: the rest is shown
        ("metrics.jsonl", lambda b: b"nonsense\n" + b, "The curves are missing"),
        ("metrics.jsonl", lambda b: b"", "No epoch has been logged."),
        ("results.json", lambda b: b[:-3], "The final figures are missing"),
        ("results.json", lambda b: b"[1]", "The final figures are missing"),
        ("results.json", lambda b: b'{"stage1": 3}', "The final figures are missing"),
        ("model.safetensors", lambda b: b[:-3], "There are no pictures"),
    ],
)
def test_damaged_files(run, name, damage, sentence):
    (run / name).write_bytes(damage((run / name).read_bytes()))
    assert sentence in page_of(run).text


@pytest.mark.parametrize("name", ["metrics.jsonl", "results.json", "model.safetensors"])
def test_absent_files(run, name):
    (run / name).unlink()
    page_of(run)


def test_a_configuration_of_another_version_still_has_its_curves(run):
    settings = json.loads((run / "config.json").read_text())
    settings["config"]["something_new"] = [1]
    (run / "config.json").write_text(json.dumps(settings))
    page = page_of(run)
    assert "something_new" in page.text and "the model cannot be read" in page.text
    assert len(page.charts()) > 6


def test_values_that_are_not_finite_are_gaps():
    records = [{"stage": 1, "epoch": e, "loss": v, "mse": v} for e, v in enumerate((1.0, float("nan"), -2.0, 3.0), 1)]
    loss, mse = stage_charts(1, [("run", records)])
    assert loss.traces[0]["y"] == [1.0, None, -2.0, 3.0]
    assert mse.traces[0]["y"] == [1.0, None, None, 3.0]  # on a log axis
    assert stage_charts(1, [("run", [{"stage": 1, "epoch": 1, "loss": None}])]) == []


def test_long_runs_are_thinned_and_keep_their_ends():
    records = [{**epoch_record(1, e), "latent_kl": KL} for e in range(1, 1401)]
    (loss, *_), latents = stage_charts(1, [("run", records)]), latent_charts(records)
    assert len(loss.traces[0]["x"]) == 400 and loss.traces[0]["x"][0] == 1 and loss.traces[0]["x"][-1] == 1400
    assert len(latents) == 2 and len(latents[0].traces) == 6 and len(latents[0].traces[0]["x"]) == 150
    assert "4 active and 2 inactive" in latents[0].text
    assert thin(0, 5).size == 0 and thin(3, 5).tolist() == [0, 1, 2] and thin(1, 5).tolist() == [0]


@pytest.mark.parametrize(("low", "high"), [(0.01, 0.03), (0.9, 1.8), (1e-4, 1e-3), (1e-6, 30.0), (3.0, 7.0)])
def test_a_log_axis_has_ticks_among_its_values(low, high):
    axis = log_axis(low, high)
    assert axis["type"] == "log"
    assert 2 <= sum(low <= tick <= high for tick in axis["tickvals"]) <= 12
    assert log_axis(1.0, 1.5) == {"type": "linear"}


# ---- FID beside what others published ---------------------------------------------------------------------------


def info(name="", preset="cifar10", side=32):
    return {"config": {"preset": preset, "side": side}, "data": {"name": name}}


def test_published_figures_stand_beside_runs_on_the_same_data_only():
    assert published_on(info("cifar10")) == "CIFAR-10"
    assert published_on(info("faces", "celeba-2", 64)) == "CelebA 64x64"
    assert published_on(info("faces", "celeba", 32)) == published_on(info("shapes", "shapes")) == ""

    def content(**kwargs):
        return report_page.RunContent("run", info(**kwargs), {"fid": FID}, [], "")

    table = fid_table([content(name="cifar10"), content(name="shapes")])
    assert table.on == "CIFAR-10" and ("Joint EBM", "Cui & Han 2023", "63.4") in table.published
    assert fid_table([content(name="cifar10"), content(preset="celeba", side=64)]).published == []
    assert table.head == ["Protocol", "REC", "REC, z = mu", "GEN-1", "GEN-2", "Images"]  # none was rescaled
    assert isinstance(table, FidTable) and len(table.rows) == 2
    text = Page(render([content(name="cifar10")], "1")).text
    assert "Published FID of samples" in text and "72.9 ± 0.9" in text and "protocols" in text


# ---- the command line -------------------------------------------------------------------------------------------


def test_the_command_line(run, tmp_path):
    command = [sys.executable, "-m", "bvae.report", str(run), "--out", str(tmp_path / "page.html")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"report: {tmp_path / 'page.html'}\n"
    assert "plotly.js v" in (tmp_path / "page.html").read_text("utf-8")


def test_a_folder_that_is_no_run(run, tmp_path):
    with pytest.raises(UserError, match="not a run or a saved model"):
        report_command([str(run), str(tmp_path)])
    with pytest.raises(UserError, match="not a run"):
        write_report([tmp_path])
    assert not (run / "report.html").exists() and not (tmp_path / "report.html").exists()


def test_what_was_asked_for_must_be_there(run, tmp_path):
    with pytest.raises(UserError, match="no such file"):
        write_report([run], source=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="given twice"):
        write_report([run, run / ".." / "run"])
    with pytest.raises(UserError, match="cannot write"):
        write_report([run], tmp_path / "no" / "folder.html")


def test_views_that_are_ready_are_not_made_again(run, monkeypatch):
    views = read_content(run, "run", report.DataCache()).views
    monkeypatch.setattr(report, "compute_views", None)
    assert read_content(run, "run", report.DataCache(), views=views).views is views


def test_runs_that_differ_in_one_setting_of_their_images_do_not_share_them(monkeypatch):
    """Whatever that setting is: the loader's own arguments decide."""
    loaded = []
    monkeypatch.setattr(report, "load_data", lambda config, source: loaded.append(config) or len(loaded))
    cache = report.DataCache("images.zip")
    first = Config(crop=128, side=64)
    assert [cache.of(first), cache.of(dataclasses.replace(first, lr=1.0))] == [1, 1]
    assert cache.of(dataclasses.replace(first, crop=140)) == 2
    assert cache.of(dataclasses.replace(first, crop=140, channels=1)) == 3
    assert cache.of(first) == 4
