"""Training under torchrun as a whole, two gloo ranks on the CPU: the same run as one, whatever happens to a rank."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from bvae.api import make_trainer
from bvae.errors import Interrupted, UserError
from bvae.run.checkpoint import LAST, load_checkpoint
from bvae.run.data import load_data
from bvae.run.log import read_metrics
from bvae.train import main, parse
from bvae.world import World

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")

SECONDS = 240  # after which a job is given up
RUN = [
    "--side",
    "16",
    "--shapes-train",
    "300",
    "--shapes-test",
    "60",
    "--scales",
    "2",
    "--base",
    "4",
    "--latents",
    "8",
    "--fc",
    "16",
    "--hidden",
    "16",
    "--batch",
    "50",
    "--lr",
    "1e-3",
    "--bn-batches",
    "6",
    "--no-amp",
    "--device",
    "cpu",
    "--sync-bn",
    "--checkpoint-seconds",
    "0",
    "--epochs",
    "10",
    "--epochs2",
    "6",
]


class Job:
    """A torchrun of two processes."""

    def __init__(self, folder: Path, *argv: str, restarts: int = 0) -> None:
        self.out, self.err = folder / "stdout", folder / "stderr"
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
        command += ["--rdzv-endpoint=localhost:0", f"--max-restarts={restarts}", "-m", "bvae.train", *argv]
        with open(self.out, "w") as out, open(self.err, "w") as err:
            self.process = subprocess.Popen(command, stdout=out, stderr=err, env=os.environ | {"OMP_NUM_THREADS": "1"})

    def reach(self, run: Path, stage: int, step: int) -> None:
        """Waits until the run's last checkpoint is at or past that step."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                state = load_checkpoint(run / LAST)[1]
            except UserError:  # not there yet
                state = {"stage": 0, "step": 0}
            if (state["stage"], state["step"]) >= (stage, step):
                return
            time.sleep(0.01)
        raise AssertionError(f"stage {stage}, step {step} not reached: {self.err.read_text()}")

    def worker(self, rank: int) -> int:
        """The process id of a rank."""
        pid = self.process.pid
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            if f"\0RANK={rank}\0" in Path(f"/proc/{child}/environ").read_text():
                return int(child)
        raise AssertionError(f"there is no rank {rank}")

    def wait(self) -> int:
        return self.process.wait(timeout=SECONDS)

    def said(self) -> list[str]:
        """The lines of stderr that are the trainer's, not torchrun's."""
        return [line for line in self.err.read_text().splitlines() if re.match("error: |stopped in ", line)]


@contextmanager
def torchrun(folder: Path, *argv: str, restarts: int = 0) -> Iterator[Job]:
    job = Job(folder, *argv, restarts=restarts)
    try:
        yield job
    finally:
        if job.process.poll() is None:  # a failed test: torchrun takes its processes down with it
            job.process.terminate()
            try:
                job.process.wait(timeout=40)
            finally:
                job.process.kill()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run by one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    assert main([*RUN, "--out", str(out)]) == 0
    return out


def same_course(run: Path, alone: Path) -> None:
    """Every epoch is there once, and its figures are those of one process, but for the order of sums."""
    ours, whole = read_metrics(run), read_metrics(alone)
    assert [(r["stage"], r["epoch"], r["step"]) for r in ours] == [(r["stage"], r["epoch"], r["step"]) for r in whole]
    for a, b in zip(ours, whole, strict=True):
        for name in a.keys() - {"seconds", "images_per_s"}:
            assert a[name] == pytest.approx(b[name], rel=0.03, abs=2e-3), (name, a)


def files(run: Path) -> set[str]:
    return {re.sub(r"\d{10}", "", str(p.relative_to(run))) for p in run.rglob("*") if p.is_file()}


def test_from_one_to_two_and_back(alone: Path, tmp_path: Path) -> None:
    """Stopped by signals, which reach the ranks at different steps: they must agree on where to stop."""
    run = tmp_path / "run"
    config, _ = parse([*RUN, "--out", str(run)])
    trainer = make_trainer(config, load_data(config), run, quiet=True)
    trainer.stop = signal.SIGTERM
    with pytest.raises(Interrupted):
        trainer.run()
    assert 0 < load_checkpoint(run / LAST)[1]["step"] < 6, "in mid-epoch"
    with torchrun(tmp_path, "--resume", str(run)) as job:
        job.reach(run, 1, 12)
        job.process.send_signal(signal.SIGTERM)
        assert job.wait() != 0
    state = load_checkpoint(run / LAST)[1]
    where = f"stage {state['stage']} after step {state['step']}"
    assert job.said() == [f"stopped in {where}; go on with: python -m bvae.train --resume {run}"]
    assert main(["--resume", str(run)]) == 0
    same_course(run, alone)


def test_a_dead_rank_ends_the_attempt_and_torchrun_resumes_it(alone: Path, tmp_path: Path) -> None:
    """By the same command line, which names a folder that is there by then. It is the rank that writes who dies."""
    run = tmp_path / "run"
    with torchrun(tmp_path, *RUN, "--out", str(run), restarts=1) as job:
        job.reach(run, 1, 8)
        os.kill(job.worker(0), signal.SIGKILL)
        assert job.wait() == 0, job.err.read_text()
    assert len(job.said()) == 1, job.err.read_text()
    assert job.said()[0].startswith("error: rank 1 has lost the other processes") and f"--resume {run}" in job.said()[0]
    assert ", from step " in job.out.read_text()
    same_course(run, alone)
    assert files(run) == files(alone), "rank 0 alone writes"
    assert job.out.read_text().count("pictures, results.json and the model") == 1


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    config, _ = parse([*RUN, "--out", str(tmp_path / "run")])
    data = load_data(config)
    with pytest.raises(UserError, match="--batch 50 is that of a whole step: 3 processes"):
        make_trainer(config, data, tmp_path / "run", world=World(0, 3))
    config, _ = parse([*RUN, "--scales", "5", "--batch", "2", "--no-sync-bn"])
    with pytest.raises(UserError, match="1 a process"):
        make_trainer(config, data, tmp_path / "run", world=World(0, 2))
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_train_as_one(tmp_path: Path) -> None:
    """With steps replayed from graphs, NCCL's exchange among them."""
    argv = [*RUN, "--device", "cuda", "--log-every", "3"]
    assert main([*argv, "--out", str(tmp_path / "alone")]) == 0
    with torchrun(tmp_path, *argv, "--out", str(tmp_path / "run")) as job:
        assert job.wait() == 0, job.err.read_text()
    assert "not as a CUDA graph" not in job.out.read_text()
    same_course(tmp_path / "run", tmp_path / "alone")
