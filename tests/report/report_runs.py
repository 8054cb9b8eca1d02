"""Folders of small runs for the tests of reports: made, not trained."""

import json
import math

import numpy as np
import torch

from bvae.config import Config
from bvae.data import load
from bvae.run.checkpoint import LAST, prefixed, save_checkpoint
from bvae.run.log import RunLog
from bvae.two_stage import TwoStageVAE

CONFIG = Config(preset="shapes", side=8, scales=2, base=4, fc=8, latents=6, hidden=16, epochs=5, epochs2=3)
KL = [0.01, 2.0, 0.7, 3.0, 0.02, 0.5]
FID = {
    "tf1": {
        "n": 10000, "n_reference": 10000, "precision": "fp32", "weights": "sha256:0", "label": None,
        "rec": 61.234, "rec_mean": 60.1, "gen1": 110.5, "gen2": 92.75, "gen2_rescaled": None,
    },
}  # fmt: skip


def images(path, count=40, seed=0):
    array = np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    np.savez(path, train=array, test=array[: count // 2] ^ 1)
    return path


def epoch_record(stage, epoch):
    mse = 0.006 + 0.06 / epoch
    k = CONFIG.latents
    active = np.array(KL) > 0.1
    var_mu = np.where(active, 1 - 0.5**epoch, 0.02)
    return {
        "stage": stage, "epoch": epoch, "step": 10 * epoch, "loss": 1000.0 - 400 * math.log(epoch),
        "nll": 990.0 - 400 * math.log(epoch), "kl": 5.0 + epoch, "mse": mse, "balance": 0.45, "gamma2": 1.1 * mse,
        "lr": 1e-3, "skipped": 0, "images_per_s": 500.0, "test_mse": 1.1 * mse, "test_kl": 5.1 + epoch,
        "variance_law": 1.02, "inactive": 2, "latent_var_mu": var_mu.tolist(), "latent_sigma2": (1 - var_mu).tolist(),
        "latent_kl": KL if stage == 1 else [0.3] * k, "fid_rec": 80.0 - epoch, "fid_gen2": 120.0 - epoch,
        "fid_protocol": "tf1", "fid_n": 10000,
    }  # fmt: skip


def stage_results(**more):
    return {
        "mse_sampled": 0.0123, "mse_mean": 0.0121, "kl": 6.25, "variance_law": 1.01, "inactive": 2, "active": 4,
        "gamma2": 0.0144, "gamma": 0.12, "steps": 50, **more,
    }  # fmt: skip


def make_run(folder, data=None, epochs=(5, 3), results=True, seed=0, info=None, **changes):
    """A run's folder: epochs logged of either stage; `results` False or more of what results.json holds."""
    config = Config(**{**CONFIG.to_dict(), "data": None if data is None else str(data), **changes})
    torch.manual_seed(seed)
    model = TwoStageVAE(config)
    for p in model.parameters():  # or all images look alike
        p.data += 0.3 * torch.randn_like(p)
    model.save_pretrained(folder)
    if results is False:  # not finished: the model is in the last checkpoint
        (folder / "model.safetensors").unlink()
        (folder / "checkpoints").mkdir()
        save_checkpoint(folder / LAST, prefixed(model.state_dict(), "model"), {})
    described = {"name": "made up", "path": None, "digest": None, "train": 40, "test": 20}
    if data is not None:
        dataset = load(data, side=8, channels=3)
        described |= {"name": dataset.name, "path": str(data), "digest": dataset.digest}
    values = {
        "model": "bvae",
        "config": config.to_dict(),
        "data": described,
        "versions": {"bvae": "0.1.0", "torch": "2.13.0", "python": "3.11.7"},
        "device": "a processor",
        **(info or {}),
    }
    (folder / "config.json").write_text(json.dumps(values))
    with RunLog(folder, quiet=True) as log:
        for stage, count in zip((1, 2), epochs, strict=True):
            for epoch in range(1, count + 1):
                log.epoch(epoch_record(stage, epoch))
    if results is not False:
        found = {"stage1": stage_results(images_per_s=500.0), "stage2": stage_results(latents_per_s=900.0)}
        found |= results if isinstance(results, dict) else {}
        (folder / "results.json").write_text(json.dumps(found))
    return folder
