"""Training from Python: arrays and networks of one's own."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import bvae
from bvae.config import Config
from bvae.config.registry import networks
from bvae.data import load
from bvae.errors import UserError
from bvae.train import main

SHORT = {
    "epochs": 2,
    "epochs2": 1,
    "batch": 50,
    "hidden": 16,
    "lr": 1e-3,
    "bn_batches": 5,
    "device": "cpu",
    "quiet": True,
}


class Encoder(nn.Module):
    def __init__(self, side=28, channels=1, latents=6):
        super().__init__()
        h, w = (side, side) if isinstance(side, int) else side
        self.body = nn.Sequential(
            *(nn.Conv2d(channels, 16, 4, 2, 1), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU(), nn.Flatten(), nn.Dropout(0.1)),
        )
        self.heads = nn.Linear(32 * (h // 4) * (w // 4), 2 * latents)

    def forward(self, x):
        return self.heads(self.body(x)).chunk(2, dim=1)


def decoder(side=28, channels=1, latents=6):
    h, w = (side, side) if isinstance(side, int) else side
    return nn.Sequential(
        *(nn.Linear(latents, 32 * (h // 4) * (w // 4)), nn.Unflatten(1, (32, h // 4, w // 4))),
        *(nn.BatchNorm2d(32), nn.ReLU(), nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.ReLU()),
        nn.ConvTranspose2d(16, channels, 4, 2, 1),
    )


def pair(**sizes):
    return Encoder(**sizes), decoder(**sizes)


@pytest.fixture(scope="module")
def images():
    """Grey shapes of 28x28."""
    return load("shapes", side=32, channels=3, num_train=1200, num_test=1).train[:, 2:30, 2:30, :1].copy()


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    torch.manual_seed(5)
    out = tmp_path_factory.mktemp("fit") / "run"
    settings = SHORT | {"epochs": 15, "epochs2": 3, "lr": 2e-3, "hidden": 32}
    return bvae.fit(images[:1000], images[1000:], network=pair(), out=out, **settings)


def test_a_network_of_ones_own_learns(trained, images):
    assert trained.config.side == 28 and trained.config.channels == 1 and trained.config.latents == 6
    mean_image = images[:1000].mean(0) / 255
    of_mean = ((images[1000:] / 255 - mean_image) ** 2).mean()
    stage1 = trained.results["stage1"]
    assert stage1["mse_sampled"] < of_mean / 2
    assert stage1["weights"] == "last" and stage1["best_chosen_on"] == "test"
    assert len(trained.records) == 18
    # The statistics that evaluation uses are those of the final weights, of the user's own batch norms too.
    assert stage1["mse_sampled"] < 1.1 * stage1["mse_sampled_bn_ema"]


def test_it_is_sampled_loaded_and_reported(trained):
    samples = trained.sample(3)
    assert samples.shape == (3, 1, 28, 28) and samples.min() >= 0 and samples.max() <= 1
    with pytest.raises(UserError, match=r"neither registered nor given: .*network=\(encoder, decoder\)"):
        bvae.load(trained.folder)
    again = bvae.load(trained.folder, network=lambda: pair())
    assert torch.equal(again.sample(3), samples)
    assert trained.report().read_text().startswith("<!")
    unread = bvae.Run(trained.folder)
    assert unread.results == trained.results and unread.config.network == "custom"


def test_a_registered_network_is_found_by_its_name(images, tmp_path):
    def build(config: Config):
        return pair(side=config.height, channels=config.channels, latents=config.latents)

    bvae.register_network("mine", build)
    try:
        with pytest.raises(ValueError, match="built in"):
            bvae.register_network("resnet", build)
        run = bvae.fit(images, network="mine", latents=4, out=tmp_path / "run", **SHORT)
        assert run.config.network == "mine" and run.config.latents == 4
        assert torch.equal(bvae.load(run.folder).sample(2), run.sample(2))
        longer = bvae.fit(images, out=run.folder, resume=True, epochs2=2, quiet=True)
        assert longer.results["stage2"]["steps"] == 2 * 21
    finally:
        networks.remove("mine")
    with pytest.raises(UserError, match="'mine' was given from Python"):
        main(["--resume", str(run.folder)])


def test_a_run_goes_on_with_the_same_bits(images, tmp_path):
    settings = SHORT | {"network": pair, "seed": 3}
    whole = bvae.fit(images, out=tmp_path / "whole", **settings)
    again = bvae.fit(images, out=tmp_path / "again", **(settings | {"epochs2": 2}), max_steps=21)
    assert again.results["stage2"]["steps"] == 21
    part = bvae.fit(images, out=tmp_path / "part", **(settings | {"epochs2": 2}))
    gone_on = bvae.fit(images, out=whole.folder, resume=True, network=pair, epochs2=2, quiet=True)
    for name, t in part.model.state_dict().items():
        assert torch.equal(gone_on.model.state_dict()[name], t), name
    files = [(run.folder / "model.safetensors").read_bytes() for run in (part, gone_on)]
    assert files[0] == files[1], "equal runs give equal files"


@pytest.mark.parametrize("side", [(40, 28), 40])
def test_sides_that_the_resnet_cannot_take(side, tmp_path):
    h, w = (side, side) if isinstance(side, int) else side
    x = torch.randint(256, (120, h, w, 3), dtype=torch.uint8)
    run = bvae.fit(x, network=pair(side=side, channels=3), out=tmp_path / "run", **SHORT)
    assert run.sample(2).shape == (2, 3, h, w)
    saved = json.loads((tmp_path / "run/config.json").read_text())["config"]["side"]
    assert saved == (side if isinstance(side, int) else list(side))
    with pytest.raises(UserError, match="power of two"):
        bvae.fit(x, out=tmp_path / "resnet", **SHORT)
    assert not (tmp_path / "resnet").exists()


def test_held_out_images_choose_the_best_weights(images, tmp_path):
    run = bvae.fit(images, network=pair(), val=200, out=tmp_path / "run", **SHORT)
    assert run.results["stage1"]["best_chosen_on"] == "val"
    assert all({"val_mse", "val_kl", "test_mse"} <= r.keys() for r in run.records)
    assert run.info["data"]["train"] == 1080 - 200


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"latents": 3}, "latents=3, but the network's encoder gives 6"),
        ({"no_such": 1}, "no setting 'no_such'"),
        ({"network": (Encoder(), nn.Linear(6, 5))}, r"the decoder must give logits \[2, 1, 28, 28\]"),
        ({"network": (nn.Flatten(), decoder())}, "the network does not take images"),
        ({"network": "no_such"}, "there is no such network"),
        ({"batch": 5000}, "fewer than one batch"),
        ({"epochs": 0}, "--epochs must be at least 1"),
        ({"preset": "no_such"}, "no such preset"),
        ({"val": 5000}, "val"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(images, tmp_path, change, said):
    with pytest.raises(UserError, match=said):
        bvae.fit(images, out=tmp_path / "run", **({"network": pair()} | SHORT | change))
    assert not list(tmp_path.iterdir())


INTERRUPTED = """
import sys, numpy, bvae
images = numpy.random.default_rng(0).integers(0, 255, (200, 16, 16, 3), dtype=numpy.uint8)
try:
    small = {"scales": 2, "base": 2, "fc": 4, "hidden": 4, "latents": 2, "batch": 20}
    bvae.fit(images, out=sys.argv[1], epochs=100000, compile=False, device="cpu", **small)
except KeyboardInterrupt as stopped:
    print("stopped:", stopped, flush=True)
"""


def test_ctrl_c_leaves_a_run_that_goes_on(tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-W", "ignore", "-c", INTERRUPTED, str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if "epoch 2/" in line:
            process.send_signal(signal.SIGINT)
            break
    rest = process.communicate(timeout=60)[0]
    assert "stopped: stopped in stage 1 after step" in rest and process.returncode == 0
    assert bvae.load(out).stage1 is not None


def test_handlers_of_signals_are_put_back_and_threads_train(images, tmp_path):
    import threading

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    settings = SHORT | {"epochs": 1, "epochs2": 0}
    bvae.fit(images, network=pair(), out=tmp_path / "a", **settings)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    thread = threading.Thread(target=lambda: bvae.fit(images, network=pair(), out=tmp_path / "b", **settings))
    thread.start()
    thread.join()
    assert (tmp_path / "b/results.json").exists()


def test_a_black_set_ends_well(tmp_path):
    """Its moving averages give no finite figure; that is an auxiliary one, which says nothing about the weights."""
    black = np.zeros((300, 16, 16, 3), np.uint8)
    settings = {"scales": 2, "base": 4, "fc": 16, "latents": 4, "lr2": 1e-3} | SHORT | {"epochs": 12}
    run = bvae.fit(black, out=tmp_path / "run", **settings)
    assert run.results["stage1"]["mse_sampled"] < 1e-2
    assert Path(tmp_path / "run/model.safetensors").exists()
