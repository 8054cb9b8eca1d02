"""REC, GEN-1 and GEN-2: in the evaluation, on the training curve, and with the contrast restored."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from inception_samples import QuickNetwork

from bvae import evaluate
from bvae.errors import UserError
from bvae.metrics import fid_scores
from bvae.metrics.extract import Extractor
from bvae.metrics.fid_scores import FIDScorer, restore_contrast
from bvae.metrics.protocols import PROTOCOLS
from bvae.metrics.statistics import fid
from bvae.run.folder import load
from bvae.run.log import read_metrics
from bvae.train import main as train
from bvae.two_stage import to_uint8

TINY = [
    *("--side", "16", "--scales", "2", "--base", "4", "--latents", "8", "--fc", "16", "--hidden", "32"),
    *("--batch", "50", "--shapes-train", "200", "--shapes-test", "60", "--no-amp", "--bn-batches", "4"),
    *("--device", "cpu"),
]
EPOCHS = ["--epochs", "4", "--epochs2", "3", "--fid-every", "2", "--fid-num", "40", "--allow-few"]


def quick_network(path: Path, device: torch.device, precision: str = "fp32") -> tuple[QuickNetwork, str]:
    return QuickNetwork(), "sha256:w"


@pytest.fixture(autouse=True)
def quick(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that only looks like the real one, weights that are only there, and a cache of its own."""
    folder = tmp_path_factory.mktemp("quick")
    (folder / "weights.pth").touch()
    monkeypatch.setenv("BVAE_INCEPTION", str(folder / "weights.pth"))
    monkeypatch.setenv("BVAE_CACHE", str(folder / "cache"))
    for module in (evaluate, fid_scores):
        monkeypatch.setattr(module, "load_inception", quick_network)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fid") / "run"
    with pytest.MonkeyPatch.context() as patch:
        weights = tmp_path_factory.mktemp("weights") / "weights.pth"
        weights.touch()
        patch.setenv("BVAE_CACHE", str(weights.parent))
        patch.setattr(fid_scores, "load_inception", quick_network)
        assert train([*TINY, *EPOCHS, "--inception", str(weights), "--out", str(out)]) == 0
    return out


def scorer_of(run: Path) -> FIDScorer:
    extractor = Extractor(QuickNetwork(), "sha256:w", PROTOCOLS["tf1"])  # type: ignore[arg-type]
    return FIDScorer(extractor, test_images(run), 40, allow_few=True)


def test_images(run: Path) -> torch.Tensor:
    from bvae.run.data import load_data

    return torch.from_numpy(load_data(load(run).config).test)


test_images.__test__ = False  # type: ignore[attr-defined]


# ---- the curve ------------------------------------------------------------------------------------------------------


def test_the_curve_has_them_at_the_epochs_asked_for(run: Path) -> None:
    records = read_metrics(run)
    found = {(r["stage"], r["epoch"]): sorted(key for key in r if key.startswith("fid_")) for r in records}
    first, second = ["fid_gen1", "fid_n", "fid_protocol", "fid_rec"], ["fid_gen2", "fid_n", "fid_protocol"]
    assert found == {(1, 1): [], (1, 2): first, (1, 3): [], (1, 4): first, (2, 1): [], (2, 2): second, (2, 3): second}
    last = records[-1]
    assert (last["fid_protocol"], last["fid_n"]) == ("tf1", 40)
    # The second stage's last epoch scored the model that the run ended with.
    assert last["fid_gen2"] == pytest.approx(scorer_of(run).generated(load(run), 2, 0, rescale=False), rel=1e-5)


def test_the_curve_leaves_training_alone(run: Path, tmp_path: Path) -> None:
    plain = [*TINY, *EPOCHS]
    plain[plain.index("--fid-every") + 1] = "0"
    assert train([*plain, "--out", str(tmp_path / "run")]) == 0
    ours, theirs = load(run).state_dict(), load(tmp_path / "run").state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_without_weights_or_with_few_images_no_run_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = [*TINY, *EPOCHS, "--out", str(tmp_path / "run")]
    with pytest.raises(UserError, match="the test set: 40 images"):
        train([arg for arg in argv if arg != "--allow-few"])
    monkeypatch.delenv("BVAE_INCEPTION")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    with pytest.raises(UserError, match="--fid-every: the weights"):
        train(argv)
    assert not (tmp_path / "run").exists()


# ---- the evaluation -------------------------------------------------------------------------------------------------


def test_evaluation_measures_them_all_and_extends_the_results(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = json.loads((run / "results.json").read_text())
    evaluate.main([str(run), "--fid-num", "40", "--allow-few", "--json", str(tmp_path / "out.json")])
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "out.json").read_text())
    found = printed["fid"]["tf1"]
    assert (found["n"], found["n_reference"], found["label"]) == (40, 40, "few images")
    model, scorer = load(run), scorer_of(run)
    assert found["rec"] == pytest.approx(scorer.reconstructed(model, 0), rel=1e-6)
    assert len({found[key] for key in ("rec", "rec_mean", "gen1", "gen2", "gen2_rescaled")}) == 5
    after = json.loads((run / "results.json").read_text())
    assert after.pop("fid") == {"tf1": found} and after == before
    assert printed["stage1"]["mse_mean"] == pytest.approx(before["stage1"]["mse_mean"], rel=1e-4)

    evaluate.main([str(run), "--fid-num", "40", "--allow-few", "--protocol", "clean", "--rec", "mean"])
    evaluate.main([str(run), "--fid-num", "40", "--allow-few", "--contrast", "--rec", "sampled"])
    fids = json.loads((run / "results.json").read_text())["fid"]
    assert fids["tf1"] == found | {"rec_contrast": fids["tf1"]["rec_contrast"]} and "rec" not in fids["clean"]
    assert fids["tf1"]["rec_contrast"] != found["rec"]


def test_evaluation_measures_those_alone_that_are_asked_for(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "run")
    few = [str(tmp_path / "run"), "--fid-num", "40", "--allow-few"]

    def measured(*only: str) -> dict[str, float]:
        capsys.readouterr()
        evaluate.main([*few, *only])
        found = json.loads(capsys.readouterr().out)["fid"]["tf1"]
        return {name: found[name] for name in found if name in evaluate.PARTS}

    everything = measured()
    (tmp_path / "run" / "results.json").unlink()
    assert measured("--only") == {}
    assert measured("--only", "gen2") == {"gen2": everything["gen2"]}
    assert measured("--only", "rec", "gen1") == {name: everything[name] for name in ("rec", "gen1")}
    kept = json.loads((tmp_path / "run" / "results.json").read_text())["fid"]["tf1"]
    assert {name: kept[name] for name in evaluate.PARTS if name in kept} == {
        name: everything[name] for name in ("rec", "gen1", "gen2")
    }


def test_a_resume_keeps_them_only_where_nothing_is_trained(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fid": {"tf1": {"gen1": 3.0}}}))
    assert train(["--resume", str(tmp_path / "run")]) == 0
    assert json.loads(path.read_text())["fid"] == {"tf1": {"gen1": 3.0}}
    assert train(["--resume", str(tmp_path / "run"), "--epochs2", "4"]) == 0
    assert "fid" not in json.loads(path.read_text())


def test_figures_are_those_of_images_written_to_files(run: Path) -> None:
    """GEN-1 from tensors against the same images as uint8 arrays, under a protocol that reads files."""
    extractor = Extractor(QuickNetwork(), "sha256:w", PROTOCOLS["pytorch-fid"])  # type: ignore[arg-type]
    scorer = FIDScorer(extractor, test_images(run), 40, allow_few=True)
    model = load(run)
    pixels = torch.from_numpy(to_uint8(model.sample(40, 1, 3, rescale=False)))
    expected = fid(scorer.reference, extractor.statistics([pixels]))
    assert scorer.generated(model, 1, 3, rescale=False) == pytest.approx(expected, rel=1e-9)


def test_without_weights_the_rest_is_measured(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("BVAE_INCEPTION")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    before = (run / "results.json").read_text()
    evaluate.main([str(run)])
    output = capsys.readouterr()
    assert "fid" not in json.loads(output.out) and "--inception download" in output.err
    assert len(output.err.splitlines()) == 1
    assert json.loads((run / "results.json").read_text()) == json.loads(before)
    evaluate.main([str(run), "--no-fid"])
    assert capsys.readouterr().err == ""


def test_other_checkpoints_and_data_leave_the_results_alone(run: Path) -> None:
    before = (run / "results.json").read_bytes()
    evaluate.main([str(run), "--checkpoint", "best", "--no-fid"])
    evaluate.main([str(run), "--num", "10", "--no-fid"])
    assert json.loads((run / "results.json").read_bytes()) == json.loads(before)


def test_few_images_are_refused(run: Path) -> None:
    with pytest.raises(UserError, match="the test set: 60 images; fewer than 2048"):
        evaluate.main([str(run)])


# ---- contrast -------------------------------------------------------------------------------------------------------


def test_contrast_is_brought_to_the_datas() -> None:
    rng = np.random.default_rng(0)
    data = rng.integers(60, 190, (300, 4, 4, 3), np.uint8)
    images = torch.from_numpy(data).permute(0, 3, 1, 2).float() / 255
    dull = 0.5 + 0.4 * (images - 0.5) + 0.02
    restored = torch.cat(list(restore_contrast(lambda: iter(dull.split(77)), torch.from_numpy(data))))
    deviation, wanted = (t.std(0, correction=0).mean().item() for t in (restored, images))
    assert deviation == pytest.approx(wanted, rel=1e-4)
    torch.testing.assert_close(restored.mean(0), dull.mean(0))
    bright = torch.cat(list(restore_contrast(lambda: iter((dull + 0.45).split(77)), torch.from_numpy(data))))
    assert bright.max() == 1
