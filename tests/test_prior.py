"""python -m bvae.prior."""

import json

import pytest
import torch

from bvae import ops, prior
from bvae.config import Config
from bvae.errors import UserError, run_command
from bvae.models.posterior import Posterior
from bvae.models.priors import find_prior
from bvae.models.priors.saved import prior_path
from bvae.run.checkpoint import load_checkpoint
from bvae.two_stage import TwoStageVAE, load

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
    loaded = prior.load_prior_of(run, model, "gaussian")
    assert loaded.seed == 4 and loaded.figures == figures
    assert loaded.prior.sample(5, ops.make_rng(0)).shape == (5, 3)
    assert [f.name for f in prior_path(run, "gaussian").parent.iterdir()] == ["gaussian.safetensors"]


def test_settings_reach_the_prior(run):
    arguments = ["--flow-matching-steps", "3", "--flow-matching-width", "8", "--flow-matching-heun", "2"]
    prior.main([str(run), "flow-matching", "--device", "cpu", *arguments])
    settings = prior.load_prior_of(run, load(run), "flow-matching").prior.settings
    assert (settings.flow_matching_steps, settings.flow_matching_width, settings.flow_matching_lr) == (3, 8, 1e-3)


def test_a_prior_of_other_weights_is_refused(run):
    prior.main([str(run), "gaussian", "--device", "cpu"])
    model = load(run)
    with pytest.raises(UserError, match=r"no prior gmm: fit it with python -m bvae\.prior .* gmm"):
        prior.load_prior_of(run, model, "gmm")
    next(model.stage1.parameters()).data[0] += 1
    with pytest.raises(UserError, match="other weights"):
        prior.load_prior_of(run, model, "gaussian")


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

    monkeypatch.setattr(prior, "load_data", never)
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
    found = prior.copied_by(honest, posterior, 0)
    assert abs(found.closer - 0.9) < 4 * found.deviation
    fitted = posterior.mu[prior.split(4000, 0)[0]]
    monkeypatch.setattr(kind, "sample", lambda self, n, rng: fitted[torch.randint(len(fitted), (n,), generator=g)])
    copying = prior.copied_by(honest, posterior, 0)
    assert copying.closer > 0.9 + 10 * copying.deviation
    collapsed = Posterior(torch.zeros(4000, 2), torch.zeros(4000, 2))
    assert prior.copied_by(honest, collapsed, 0) is None
