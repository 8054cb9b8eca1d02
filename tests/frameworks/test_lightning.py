import json
import subprocess
import sys
from pathlib import Path

import lightning
import pytest
import torch
from snippets import blobs, classes, run
from torch.utils.data import DataLoader

OPTIONS = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def loader(n=320, batch=32):
    return DataLoader(blobs(n).flatten(1), batch_size=batch)


def test_the_snippet_and_its_checkpoint(tmp_path):
    """bf16, accumulation and clipping; then the model of the checkpoint that Lightning has written."""
    torch.manual_seed(0)
    names = run("Lightning", loader=loader(), folder=tmp_path, options=OPTIONS)
    trainer = names["trainer"]
    assert trainer.global_step == 10  # 2 epochs of 10 batches, two a step
    gamma2 = trainer.lightning_module.criterion.gamma2
    assert gamma2.dtype == torch.float32
    assert 0.99**10 < gamma2 < 0.99**10 + 0.1 * 0.5
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    loaded = names["LitVAE"].load_from_checkpoint(checkpoint, weights_only=True)
    assert loaded.criterion.gamma2 == gamma2


def test_a_resumed_run_ends_as_one_that_was_not_stopped(tmp_path):
    kind = classes("Lightning")["LitVAE"]

    def train(model, epochs, **how):
        settings = OPTIONS | {"default_root_dir": tmp_path, "accumulate_grad_batches": 2}
        trainer = lightning.Trainer(max_epochs=epochs, **settings)
        torch.manual_seed(1)
        trainer.fit(model, loader(), **how)
        return trainer

    torch.manual_seed(0)
    start = kind().state_dict()
    models = [kind() for _ in range(2)]
    for model in models:
        model.load_state_dict(start)
    whole, part = models
    train(part, 1).save_checkpoint(tmp_path / "x.ckpt")
    resumed = kind()
    train(resumed, 2, ckpt_path=tmp_path / "x.ckpt", weights_only=True)
    train(whole, 2)
    # The noise of the second epoch is another one, the number of gamma2's steps is the same.
    assert resumed.criterion.gamma2.item() == pytest.approx(whole.criterion.gamma2.item(), rel=1e-3)
    assert resumed.criterion.gamma2 < part.criterion.gamma2


def gammas(tmp_path, ranks, batch, parts, steps=3):
    job = Path(__file__).with_name("lightning_job.py")
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    out = tmp_path / f"{ranks}-{parts}"
    out.mkdir()
    command = [sys.executable, *launcher, job, out, batch, parts, steps]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(ranks)]


def test_two_ranks_with_accumulation_have_the_gamma2_of_one(tmp_path):
    (alone,) = gammas(tmp_path, 1, 32, 1)
    first, second = gammas(tmp_path, 2, 8, 2)
    assert first == second
    assert first == pytest.approx(alone, rel=1e-6)
