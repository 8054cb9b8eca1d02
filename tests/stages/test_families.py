"""Every family trained: it resumes to the same bits, is scored, sampled and reported; contradictions are refused."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch import nn

import bvae
from bvae.api import make_trainer
from bvae.config import Config
from bvae.config.registry import Part, families, networks
from bvae.data import Dataset
from bvae.engine.trainer import Trainer
from bvae.errors import Interrupted, UserError
from bvae.evaluate import main as evaluate
from bvae.models.layers import Heads, SpectralDense
from bvae.models.vae import first_stage
from bvae.run.folder import Run
from bvae.stages.base import Plateau, Schedule
from bvae.train import parse, summary
from bvae.two_stage import TwoStageVAE

DETERMINISTIC = [name for name in families.names if families[name].deterministic]
SHORT = {"epochs": 2, "epochs2": 1, "batch": 20, "hidden": 8, "latents": 3, "lr": 1e-3, "bn_batches": 3, "side": 8}
SHORT |= {"device": "cpu", "channels": 1, "checkpoint_seconds": 600.0}
OWN = {"vamp": {"pseudo_inputs": 10}}
SMALL = {"scales": 2, "base": 2, "fc": 4}


def tiny(c, deterministic=False):
    """A dense network with spectral norm in its decoder."""
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(c.channels * 64, 16), nn.Tanh())
    encoder.append(Heads(16, c.latents, deterministic))
    layers = SpectralDense(c.latents, 16), nn.Tanh(), SpectralDense(16, c.channels * 64)
    return encoder, nn.Sequential(*layers, nn.Unflatten(1, (c.channels, 8, 8)))


@pytest.fixture(scope="module", autouse=True)
def tiny_network():
    networks.add(Part("tiny", tiny))
    yield
    networks.remove("tiny")


def images(count=100, side=8):
    """Dark ones: learning that is enough to lower the error."""
    rng = np.random.default_rng(0)
    return Dataset.from_arrays(rng.integers(0, 60, (count, side, side, 1), dtype=np.uint8), name="noise")


def config_of(family, **changes):
    normalised = {"network": "resnet", **SMALL} if family in ("vamp", "wae-mmd") else {"network": "tiny"}
    settings = SHORT | normalised | changes
    return Config(family=family, options=OWN.get(family, {}), **settings).validate()


def trained(config, folder, stop_after=None):
    """The trainer of a run, gone on with where it has been begun; ended by a signal after so many steps."""
    trainer = make_trainer(config, images(), folder, resume=folder.exists(), quiet=True)
    if stop_after is not None:
        due = trainer._due

        def stop():
            trainer.stop = 15 if trainer.steps >= stop_after else None
            return due()

        trainer._due = stop
    with trainer.log:
        try:
            trainer.run()
        except Interrupted:
            assert stop_after is not None
    return trainer


@pytest.mark.parametrize("family", families.names)
def test_it_trains_and_resumes_to_the_same_bits(family, tmp_path):
    config = config_of(family, lr=1e-2)
    whole = trained(config, tmp_path / "whole")
    cut = trained(config, tmp_path / "cut", stop_after=3)
    assert cut.steps == 3
    resumed = trained(config, tmp_path / "cut")
    state = whole.model.state_dict()
    for name, t in resumed.model.state_dict().items():
        assert torch.equal(t, state[name]), name
    first = whole.results["stage1"]
    assert resumed.results["stage1"]["mse_sampled"] == first["mse_sampled"]

    deterministic = family in DETERMINISTIC
    assert not deterministic or not {"kl", "gamma", "gamma2", "variance_law", "active", "inactive"} & set(first)
    assert not deterministic or first["mse_sampled"] == first["mse_mean"]
    assert deterministic or first["gamma2"] < 1
    [line, second] = summary(whole.results).splitlines()
    assert deterministic == ("variance of a code" in line) == ("KL" not in line)
    assert "gamma" in second
    total = "objective" if deterministic else "loss"
    records = Run(tmp_path / "whole").records
    assert records[1][total] < records[0][total]
    for record in records:
        assert ("kl" in record) == ("gamma2" in record) == ("latent_kl" in record)
        assert ("kl" in record) == (record["stage"] == 2 or not deterministic)


@pytest.mark.parametrize("family", ["rae-l2", "vamp"])
def test_it_samples_and_is_reported(family, tmp_path):
    settings = SHORT | SMALL | OWN.get(family, {}) | {"channels": 3, "side": 16, "quiet": True}
    run = bvae.fit("shapes", family=family, out=tmp_path / "run", shapes_train=100, shapes_test=40, **settings)
    for stage in (1, 2):
        assert run.sample(3, stage).shape == (3, 3, 16, 16)
    assert torch.equal(bvae.load(run.folder).sample(2, stage=1), run.sample(3, 1)[:2])
    page = run.report().read_text()
    text = page[page.rindex("</script>") if "<body" not in page else page.index("<body") :]
    assert ("KL, nats per image" in text) == (family == "vamp")
    assert ("L2-regularised autoencoder" in text) == (family == "rae-l2")
    assert "factors" in run.results and ("latent_kl" in run.results["factors"]) == (family == "vamp")
    if family == "rae-l2":
        with pytest.raises(UserError, match="--nll: the codes of --family rae-l2 are deterministic"):
            evaluate([str(run.folder), "--nll", "2", "--no-fid"])
    else:
        evaluate([str(run.folder), "--nll", "2", "--no-fid", "--num", "5", "--json", str(tmp_path / "figures.json")])
        assert json.loads((tmp_path / "figures.json").read_text())["likelihood"]["samples"] == 2
    mu, log_sigma = run.model.encode(torch.zeros(2, 3, 16, 16))
    assert mu.shape == (2, 3) and (log_sigma is None) == (family == "rae-l2")
    reconstructed = run.model.reconstruct(torch.zeros(2, 3, 16, 16), sample=True)
    assert torch.equal(reconstructed, run.model.decode(mu)) == (family == "rae-l2")


def test_pseudo_inputs_start_from_training_images(tmp_path):
    data = images()
    with pytest.raises(UserError, match="--pseudo-inputs 500 start from as many training images; there are 90"):
        make_trainer(dataclasses.replace(config_of("vamp"), options={}), data, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
    trainer = make_trainer(config_of("vamp"), data, tmp_path / "run", quiet=True)
    pixels = trainer.model.stage1.prior.inputs.permute(0, 2, 3, 1).flatten(1)
    distance = torch.cdist(pixels, torch.tensor(data.train).flatten(1) / 255).detach()
    assert (distance.amin(1) < 0.02 * 8).all() and len(distance.argmin(1).unique()) == 10


class Encoder(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 3))


def modules():
    return Encoder(), nn.Sequential(nn.Linear(3, 64), nn.Unflatten(1, (1, 8, 8)))


def test_an_encoder_of_yours_may_give_mu_alone(tmp_path):
    settings = {name: value for name, value in SHORT.items() if name != "latents"}
    run = bvae.fit(images(), family="wae-mmd", network=modules, out=tmp_path / "run", quiet=True, **settings)
    assert run.config.latents == 3 and run.config.network == "custom"
    again = bvae.load(run.folder, network=modules())
    assert torch.equal(again.sample(2), run.sample(2))
    with pytest.raises(UserError, match=r"must give \(mu, log_sigma\) for --family vae; it gives mu alone"):
        bvae.fit(images(), network=modules, out=tmp_path / "vae", quiet=True, **settings)
    with pytest.raises(UserError, match="has no layer with spectral norm"):
        bvae.fit(images(), family="rae-sn", network=modules, out=tmp_path / "sn", quiet=True, **settings)


# ---- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "option"),
    [
        *((family, ["--balance", "learned"]) for family in DETERMINISTIC),
        ("ae", ["--beta", "2"]),
        ("ae", ["--gamma", "1"]),
        ("ae", ["--kl-weight", "2"]),
    ],
)
def test_a_balance_is_refused_beside_a_family_that_has_none(family, option):
    with pytest.raises(UserError, match=f"{option[0]} needs --family vae or info-vae or vamp, not {family}"):
        parse(["--preset", "shapes", "--family", family, *option])


def test_a_presets_balance_is_ignored():
    c, _ = parse(["--preset", "mnist", "--family", "wae-mmd", "--mmd", "30"])
    assert (c.family, c.balance, c.kl_weight, c.options) == ("wae-mmd", "computed", 1.0, {"mmd": 30.0})
    c, _ = parse(["--preset", "cifar10-rae", "--family", "vae", "--balance", "fixed", "--gamma", "0.1"])
    assert (c.family, c.balance, c.gamma, c.options) == ("vae", "fixed", 0.1, {})
    assert "latent_l2" not in c.to_dict()


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--family", "vae", "--latent-l2", "1"], "--latent-l2 needs --family rae-l2 or rae-gp or rae-sn, not vae"),
        (["--family", "rae-gp", "--decoder-l2", "1"], "--decoder-l2 needs --family rae-l2, not rae-gp"),
        (["--family", "rae-l2", "--decoder-l2", "-1"], "--decoder-l2 must be a number of at least 0, not -1.0"),
        (["--family", "rae-gp", "--gradient-penalty", "inf"], "--gradient-penalty must be a number of at least 0"),
        (["--family", "wae-mmd", "--batch", "1"], "--batch 1 has no pair"),
        (["--family", "vamp", "--pseudo-inputs", "1"], "--pseudo-inputs must be from 2 to 65536, not 1"),
        (["--family", "vamp", "--balance", "free-bits"], "--balance free-bits needs the KL of each latent"),
        (["--family", "rae-sn"], "needs a decoder with spectral norm"),
        (["--family", "rae-sn", "--network", "rae"], "needs a decoder with spectral norm"),
        (["--family", "wgan"], "--family wgan: there is no such family; choose from vae, ae"),
        (["--plateau", "3"], "--plateau goes by the held-out images of --val"),
        (["--plateau", "3", "--val", "9", "--eval-every", "0"], "contradicts --eval-every 0"),
    ],
)
def test_contradictions_are_refused(argv, text):
    with pytest.raises(UserError, match=text):
        parse(["--preset", "shapes", *argv])


def test_a_deterministic_network_has_no_parameters_for_sigma():
    for network in ("resnet", "mlp", "infogan"):
        ae, vae = (first_stage(config_of(family, network=network, **SMALL)) for family in ("ae", "vae"))
        assert not any("log_sigma" in name for name, _ in ae.named_parameters())
        x = torch.rand(2, 1, 8, 8)
        assert ae.encode(x).log_sigma is None and vae.encode(x).log_sigma.shape == (2, 3)


def test_the_kl_of_each_latent_reaches_the_balance_of_info_vae(tmp_path):
    config = config_of("info-vae", balance="free-bits", epochs=1, epochs2=0)
    for bits, clipped in ((0.0, 0.0), (50.0, 1.0)):
        given = dataclasses.replace(config, options={"free_bits": bits, "mmd": 0.0}).validate()
        record = trained(given, tmp_path / f"{bits}").run_folder.records[0]
        assert record["clipped_latents"] == clipped
        counted = 3 * bits if clipped else record["kl"]
        assert record["loss"] - record["nll"] == pytest.approx(counted, rel=1e-3)


def test_the_model_passes_its_code_where_it_is_deterministic():
    model = TwoStageVAE(config_of("ae", network="resnet", **SMALL)).train()
    x = torch.rand(4, 1, 8, 8)
    recon, mu, log_sigma = model(x)
    assert log_sigma is None and recon.shape == x.shape and mu.shape == (4, 3)
    recon.sum().backward()
    assert model.stage1.encoder.mu.weight.grad.abs().sum() > 0
    assert model.encode(x).log_sigma is None


# ---- plateaus -------------------------------------------------------------------------------------------------------


def test_a_plateau_is_n_epochs_without_a_better_score():
    plateau, halvings = Plateau(3), []
    for epoch, better in enumerate([True, False, True, False, False, False, False, False, False, True, False], 1):
        plateau.score(epoch, better)
        halvings.append(plateau.halvings)
    assert halvings == [0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [Schedule(9, 1e-3, 4, 90).lr_in(5, n) for n in (0, 1, 2)] == pytest.approx([5e-4, 2.5e-4, 1.25e-4])
    never = Plateau(0)
    for epoch in range(1, 50):
        never.score(epoch, False)
    assert never.halvings == 0


def test_plateaus_halve_the_learning_rate_and_are_resumed(tmp_path, monkeypatch):
    """Under a score that gets worse from the second epoch on."""
    config = config_of("ae", plateau=2, val=20, epochs=8, epochs2=0)
    make = Trainer._start

    def start(self, number):
        make(self, number)
        score = self.stage.score
        self.stage.score = lambda: score()._replace(bound=float(self.steps))

    monkeypatch.setattr(Trainer, "_start", start)
    whole = trained(config, tmp_path / "whole")
    rates = [r["lr"] for r in whole.run_folder.records]
    assert rates == pytest.approx([1e-3] * 3 + [5e-4] * 2 + [2.5e-4] * 2 + [1.25e-4])
    per_epoch = whole.stage.batches.steps
    trained(config, tmp_path / "cut", stop_after=4 * per_epoch + 1)
    resumed = trained(config, tmp_path / "cut")
    assert [r["lr"] for r in resumed.run_folder.records] == rates
    for name, t in resumed.model.state_dict().items():
        assert torch.equal(t, whole.model.state_dict()[name]), name


def test_a_run_of_before_has_no_family_in_its_configuration(tmp_path):
    values = Config(preset="shapes").to_dict()
    del values["family"], values["plateau"]
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"config": values}))
    assert Run(tmp_path).config.family == "vae"
