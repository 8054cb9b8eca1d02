"""python -m bvae.prior."""

import json

import numpy as np
import pytest
import torch

from bvae import ops, prior
from bvae.config import Config
from bvae.errors import UserError, run_command
from bvae.evaluate import main as evaluate
from bvae.models.posterior import Posterior
from bvae.models.priors import find_prior
from bvae.models.priors.base import split
from bvae.models.priors.saved import prior_path
from bvae.run import priors
from bvae.run.checkpoint import load_checkpoint
from bvae.run.folder import load
from bvae.sample import main as sample
from bvae.train import main as train
from bvae.two_stage import TwoStageVAE

CONFIG = Config(
    preset="shapes",
    data="shapes",
    side=32,
    scales=2,
    base=4,
    fc=8,
    latents=3,
    hidden=8,
    shapes_train=200,
    shapes_test=10,
)


@pytest.fixture
def run(tmp_path):
    torch.manual_seed(0)
    TwoStageVAE(CONFIG).save_pretrained(tmp_path / "run")
    return tmp_path / "run"


def fails(capsys, *arguments):
    """The one line that the command ends with."""
    with pytest.raises(SystemExit) as caught:
        run_command(lambda: prior.main([str(a) for a in arguments]))
    output = capsys.readouterr()
    assert (caught.value.code, output.out, output.err.count("\n")) == (2, "", 1)
    assert output.err.startswith("error: ")
    return output.err


def test_it_fits_writes_and_tells_how_to_sample(run, capsys):
    prior.main([str(run), "gaussian", "--seed", "4", "--device", "cpu"])
    out = capsys.readouterr().out
    assert f"python -m bvae.sample {run} --prior gaussian" in out
    figures = json.loads(out[: out.index("\n}") + 2])
    assert figures["fitted_on"] == 180
    assert abs(figures["copying"]["closer"] - figures["copying"]["chance"]) < 5 * figures["copying"]["deviation"]
    model = load(run)
    loaded = priors.load_prior_of(run, model, "gaussian")
    assert loaded.seed == 4 and loaded.figures == figures
    assert loaded.prior.sample(5, ops.make_rng(0)).shape == (5, 3)
    assert [f.name for f in prior_path(run, "gaussian").parent.iterdir()] == ["gaussian.safetensors"]


def test_settings_reach_the_prior(run):
    arguments = ["--flow-matching-steps", "3", "--flow-matching-width", "8", "--flow-matching-heun", "2"]
    prior.main([str(run), "flow-matching", "--device", "cpu", *arguments])
    settings = priors.load_prior_of(run, load(run), "flow-matching").prior.settings
    assert (settings.flow_matching_steps, settings.flow_matching_width, settings.flow_matching_lr) == (3, 8, 1e-3)


def test_a_prior_of_other_weights_is_refused(run):
    prior.main([str(run), "gaussian", "--device", "cpu"])
    model = load(run)
    with pytest.raises(UserError, match=r"no prior gmm: fit it with python -m bvae\.prior .* gmm"):
        priors.load_prior_of(run, model, "gmm")
    next(model.stage1.parameters()).data[0] += 1
    with pytest.raises(UserError, match="other weights"):
        priors.load_prior_of(run, model, "gaussian")


def test_an_interrupted_fit_leaves_the_file_that_was_there(run, monkeypatch):
    arguments = [
        str(run),
        "flow-matching",
        "--device",
        "cpu",
        "--flow-matching-width",
        "8",
        "--flow-matching-heun",
        "2",
    ]
    path = prior_path(run, "flow-matching")

    def interrupted(done, total):
        raise KeyboardInterrupt

    def fit(self, posterior, *, seed, progress=None):
        return original(self, posterior, seed=seed, progress=interrupted)

    kind = find_prior("flow-matching")
    original = kind.fit
    with monkeypatch.context() as patch:
        patch.setattr(kind, "fit", fit)
        with pytest.raises(KeyboardInterrupt):
            prior.main([*arguments, "--flow-matching-steps", "2"])
        assert list(path.parent.iterdir()) == []
    prior.main([*arguments, "--flow-matching-steps", "2"])
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(kind, "fit", fit)
        with pytest.raises(KeyboardInterrupt):
            prior.main([*arguments, "--flow-matching-steps", "4"])
    assert path.read_bytes() == before
    prior.main([*arguments, "--flow-matching-steps", "4"])
    assert load_checkpoint(path)[1]["settings"]["flow_matching_steps"] == 4
    assert [f.name for f in path.parent.iterdir()] == [path.name]


def test_what_cannot_be_is_refused_before_work(run, tmp_path, capsys, monkeypatch):
    def never(*arguments, **keywords):
        raise AssertionError("work was done")

    monkeypatch.setattr(priors, "load_data", never)
    assert "'magic' is not one: choose from gaussian" in fails(capsys, run, "magic")
    assert "'normal' is not fitted" in fails(capsys, run, "normal")
    assert "--gmm-components is a setting of the prior gmm" in fails(capsys, run, "flow", "--gmm-components", 5)
    assert "--gmm-components must be" in fails(capsys, run, "gmm", "--gmm-components", 0, "--device", "cpu")
    assert "--seed" in fails(capsys, run, "gmm", "--seed", -1)
    assert str(tmp_path / "none") in fails(capsys, tmp_path / "none", "gaussian", "--device", "cpu")
    assert not (tmp_path / "none").exists()
    (run / "priors").write_text("")
    assert str(run / "priors") in fails(capsys, run, "gaussian", "--device", "cpu")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "bvae[gmm]" in fails(capsys, run, "gmm", "--device", "cpu")
    assert "bvae[flow]" in fails(capsys, run, "flow", "--device", "cpu")


def test_other_data_is_refused(run, capsys):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "data": {"digest": "another"}}))
    assert "not the data that" in fails(capsys, run, "gaussian", "--device", "cpu")


def test_a_copying_prior_is_told_by_its_figures(monkeypatch):
    g = torch.Generator().manual_seed(0)
    posterior = Posterior(torch.randn(4000, 2, generator=g), torch.full((4000, 2), -3.0))
    kind = find_prior("gaussian")
    honest = kind(2)
    honest.fit(posterior, seed=0)
    found = priors.copied_by(honest, posterior, 0)
    assert abs(found.closer - 0.9) < 4 * found.deviation
    fitted = posterior.mu[split(4000, 0)[0]]
    monkeypatch.setattr(kind, "sample", lambda self, n, rng: fitted[torch.randint(len(fitted), (n,), generator=g)])
    copying = priors.copied_by(honest, posterior, 0)
    assert copying.closer > 0.9 + 10 * copying.deviation
    collapsed = Posterior(torch.zeros(4000, 2), torch.zeros(4000, 2))
    assert priors.copied_by(honest, collapsed, 0) is None


def test_training_fits_what_is_asked_for_and_sampling_and_evaluation_know_it(tmp_path, capsys, monkeypatch):
    tiny = "--preset shapes --side 16 --shapes-train 200 --shapes-test 40 --scales 2 --base 2 --fc 4 --latents 3"
    tiny += " --hidden 4 --epochs 1 --epochs2 1 --device cpu --no-amp --bn-batches 2 --prior gaussian"
    out = tmp_path / "run"
    assert train([*tiny.split(), "--out", str(out)]) == 0
    assert "prior gaussian: log p(z)" in capsys.readouterr().out
    sample([str(out), "--prior", "gaussian", "--num", "4", "--out", str(tmp_path / "a.npz")])
    sample([str(out), "--prior", "gaussian", "--num", "2", "--out", str(tmp_path / "b.npz")])
    images = [np.load(tmp_path / name)["images"] for name in ("a.npz", "b.npz")]
    assert np.array_equal(images[0][:2], images[1])
    sample([str(out), "--prior", "normal", "--num", "4", "--out", str(tmp_path / "c.npz")])
    assert not np.array_equal(np.load(tmp_path / "c.npz")["images"], images[0])
    evaluate([str(out), "--no-fid", "--nll", "20", "--json", str(tmp_path / "figures.json")])
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["likelihood"]["nll"] < -figures["likelihood"]["elbo"] and figures["active_units"] <= 3
    with pytest.raises(UserError, match="no such prior"):
        sample([str(out), "--prior", "guessed"])
    with pytest.raises(UserError, match="has no prior gmm: fit it with"):
        sample([str(out), "--prior", "gmm"])
    with pytest.raises(UserError, match="contradict"):
        sample([str(out), "--prior", "gaussian", "--stage", "1"])
    with pytest.raises(UserError, match="--prior guessed: choose from"):
        train([*tiny.split(), "guessed", "--out", str(tmp_path / "other")])
    assert not (tmp_path / "other").exists()
