"""Training as a whole: learning, repeating, resuming after any kind of death, and refusing what cannot be."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import bvae
from bvae import api
from bvae.api import make_trainer
from bvae.data import load
from bvae.engine import trainer
from bvae.errors import Interrupted, UserError, run_command
from bvae.run.checkpoint import BEST, LAST, load_checkpoint, save_checkpoint
from bvae.run.data import load_data
from bvae.run.log import read_metrics
from bvae.stages import build, images, latents
from bvae.train import main, parse

TINY = [
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
    "--epochs",
    "3",
    "--epochs2",
    "3",
    "--lr",
    "1e-3",
    "--bn-batches",
    "6",
    "--no-amp",
    "--device",
    "cpu",
]


def train(out: Path, *more: str) -> dict:
    """A tiny run in this process; what its results.json holds."""
    assert main([*TINY, "--out", str(out), *more]) == 0
    return json.loads((out / "results.json").read_text())


def fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Runs the command line, which must end with exit code 2 and one line on stderr; returns the line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run_command(lambda: main(list(argv)))
    error = capsys.readouterr().err
    assert stopped.value.code == 2, error
    assert len(error.splitlines()) == 1 and error.startswith("error: "), error
    return error


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny run, not to be changed."""
    out = tmp_path_factory.mktemp("train") / "run"
    train(out)
    return out


def test_a_run_leaves_what_it_should(run: Path) -> None:
    for name in ("config.json", "metrics.jsonl", "results.json", "model.safetensors", LAST, BEST):
        assert (run / name).stat().st_size > 0, name
    for name in ("reconstructions", "samples-stage1", "samples-stage2", "curves", "latents", "factors"):
        assert np.asarray(Image.open(run / f"{name}.png")).std() > 5, f"{name}.png is blank"
    assert [(r["stage"], r["epoch"]) for r in read_metrics(run)] == [(s, e) for s in (1, 2) for e in (1, 2, 3)]
    results = json.loads((run / "results.json").read_text())
    for stage in ("stage1", "stage2"):
        assert {"mse_sampled", "mse_mean", "kl", "variance_law", "inactive", "active", "gamma2"} <= results[
            stage
        ].keys()
    assert len(results["factors"]["correlation"]) == 8 and results["factors"]["true"] == 8
    assert list((run / "tensorboard").rglob("events.*"))
    assert not list(run.rglob("*.tmp")) and not list(run.rglob("*.pkl")) and not list(run.rglob("*.pt"))


def test_learns(tmp_path: Path) -> None:
    more = ["--shapes-train", "1000", "--batch", "20", "--fc", "64", "--lr", "2e-3", "--lr-halve", "30"]
    results = train(tmp_path / "run", *more, "--epochs", "19", "--epochs2", "1", "--eval-every", "0")
    losses = [r["loss"] for r in read_metrics(tmp_path / "run") if r["stage"] == 1]
    assert losses[-1] < losses[len(losses) // 2] < losses[0]
    data = load("shapes", side=16, channels=3, num_train=1000, num_test=60)
    mean_image = data.train.mean(0) / 255
    assert results["stage1"]["mse_sampled"] < 0.7 * ((data.test / 255 - mean_image) ** 2).mean()
    assert results["stage1"]["active"] >= 1


def test_one_seed_repeats_and_two_differ(run: Path, tmp_path: Path) -> None:
    train(tmp_path / "again")
    train(tmp_path / "other", "--seed", "1")
    first, again, other = (load_file(p / "model.safetensors") for p in (run, tmp_path / "again", tmp_path / "other"))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["stage1.encoder.mu.weight"], other["stage1.encoder.mu.weight"])


@pytest.mark.parametrize("balance", [["computed"], ["learned"], ["fixed", "--gamma", "0.1"], ["fixed", "--beta", "1"]])
def test_every_balance_trains(tmp_path: Path, balance: list[str]) -> None:
    results = train(tmp_path / "run", "--epochs", "2", "--epochs2", "1", "--balance", *balance)
    gamma2 = results["stage1"]["gamma2"]
    assert gamma2 == pytest.approx({"--gamma": 0.01, "--beta": 1.0}[balance[1]]) if balance[1:] else 0 < gamma2 < 1


def test_amp_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 learns as fp32 does: the same seed ends near the same error."""
    monkeypatch.setattr(api, "has_bf16", lambda device: True)
    plain, amp = train(tmp_path / "plain", "--epochs", "12"), train(tmp_path / "amp", "--amp", "--epochs", "12")
    first = read_metrics(tmp_path / "amp")[0]["mse"]
    assert amp["stage1"]["mse_sampled"] == pytest.approx(plain["stage1"]["mse_sampled"], rel=0.1)
    assert amp["stage1"]["mse_sampled"] < 0.8 * first
    assert train(tmp_path / "flipped", "--hflip")["stage1"]["mse_sampled"] < first


def test_amp_without_bf16_units_is_fp32(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """... which is many times faster there, and says so."""
    monkeypatch.setattr(api, "has_bf16", lambda device: False)
    train(tmp_path / "amp", "--amp")
    assert capsys.readouterr().out.count("--amp: in fp32, for there are no bf16 units here\n") == 1
    fp32, amp = (load_file(p / "model.safetensors") for p in (run, tmp_path / "amp"))
    assert all(torch.equal(fp32[name], amp[name]) for name in fp32)


def test_computed_gamma_keeps_the_balance_and_a_fixed_one_does_not(tmp_path: Path) -> None:
    """sse/(2 gamma2 D) stays near 1/2 while the error falls (the paper, section III).

    gamma2 comes down from 1 by 1 % a step at most and then trails the error by some hundred steps; a network that
    learns this fast leaves the balance that far below 1/2 on its way, and back at it where the error settles.
    """
    more = ["--shapes-train", "1600", "--batch", "40", "--fc", "64", "--lr", "2e-3", "--lr-halve", "30"]
    more += ["--kl-weight", "0.1", "--epochs", "30", "--epochs2", "0", "--eval-every", "0"]
    train(tmp_path / "computed", *more)
    records = read_metrics(tmp_path / "computed")
    assert records[-1]["mse"] < 0.98 * records[13]["mse"] < 0.5 * records[0]["mse"]
    balance = [r["balance"] for r in records[20:]]
    assert abs(np.mean(balance) - 0.5) < 0.04 and all(abs(b - 0.5) < 0.07 for b in balance), balance
    # A gamma fixed at what suits the first epoch's error: the ratio then falls with the error.
    gamma = str(records[0]["mse"] ** 0.5)
    train(tmp_path / "fixed", *more, "--epochs", "10", "--balance", "fixed", "--gamma", gamma)
    fixed = [r["balance"] for r in read_metrics(tmp_path / "fixed")]
    assert fixed[0] > 0.35 and fixed[-1] < 0.2, fixed


def test_max_steps_caps_both_stages_and_can_be_raised(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(out, "--max-steps", "8")
    assert [(r["stage"], r["epoch"], r["step"]) for r in read_metrics(out)] == [
        (1, 1, 6),
        (1, 2, 8),
        (2, 1, 6),
        (2, 2, 8),
    ]
    assert main(["--resume", str(out), "--max-steps", "11"]) == 0
    assert [(r["stage"], r["step"]) for r in read_metrics(out)] == [(1, 6), (1, 8), (2, 6), (2, 11)]


def test_stage_1_alone(tmp_path: Path) -> None:
    results = train(tmp_path / "run", "--epochs2", "0")
    assert "stage2" not in results
    with pytest.raises(UserError, match="no second stage"):
        bvae.load(tmp_path / "run").sample(1)
    assert bvae.load(tmp_path / "run").sample(2, stage=1).shape == (2, 3, 16, 16)


def test_the_loaded_model_is_the_trained_one(run: Path) -> None:
    model = bvae.load(run)
    assert torch.equal(model.sample(3), bvae.TwoStageVAE.from_pretrained(run).sample(3))
    data = load("shapes", side=16, channels=3, num_train=300, num_test=60)
    x = torch.from_numpy(data.test).permute(0, 3, 1, 2)
    mse = (model.reconstruct(x) - x / 255).square().mean().item()
    assert mse == pytest.approx(json.loads((run / "results.json").read_text())["stage1"]["mse_mean"], rel=1e-4)
    assert bvae.load(run, checkpoint="best").sample(1).shape == (1, 3, 16, 16)


def test_dry_run_prints_the_configuration(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    os.chdir(tmp_path)
    assert main(["--preset", "cifar10", "--dry-run", "--kl-weight", "auto"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["parameters"] == {"stage1": 5190467, "stage2": 17457344}
    assert printed["kl_weight"] == 1.0 and printed["lr_halve2"] == 100
    assert not list(tmp_path.iterdir())


# ---- interruption -----------------------------------------------------------------------------------------------

SLOW = ["--epochs", "12", "--epochs2", "12", "--checkpoint-seconds", "0", "--eval-every", "4"]


def start(*argv: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "bvae.train", *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(process: subprocess.Popen[str], out: Path, stage: int, step: int) -> None:
    """Until the run's last checkpoint is at or past that step."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            state = load_checkpoint(out / LAST)[1]
        except UserError:  # not there yet
            state = {"stage": 0, "step": 0}
        if (state["stage"], state["step"]) >= (stage, step):
            return
        time.sleep(0.005)
    raise AssertionError(f"stage {stage}, step {step} not reached: {process.communicate()}")


def timeless(out: Path) -> list[dict]:
    return [{k: v for k, v in r.items() if k not in ("seconds", "images_per_s")} for r in read_metrics(out)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    train(out, *SLOW)
    return out


def same_end(out: Path, uninterrupted: Path) -> None:
    ended, whole = load_file(out / "model.safetensors"), load_file(uninterrupted / "model.safetensors")
    assert [name for name in whole if not torch.equal(whole[name], ended[name])] == []
    assert timeless(out) == timeless(uninterrupted)
    assert (out / "samples-stage2.png").read_bytes() == (uninterrupted / "samples-stage2.png").read_bytes()


def test_killed_in_each_stage_and_resumed_ends_bit_identical(uninterrupted: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    argv = [*TINY, *SLOW, "--out", str(out)]
    for stage, step in ((1, 20), (2, 15)):
        process = start(*argv)
        wait_for(process, out, stage, step)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        argv = ["--resume", str(out)]
    assert main(argv) == 0
    same_end(out, uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_very_step_and_says_how_to_go_on(uninterrupted: Path, tmp_path: Path, number: int) -> None:
    out = tmp_path / "run"
    process = start(*TINY, *SLOW, "--out", str(out))
    wait_for(process, out, 1, 10)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert (
        error.splitlines()[-1].endswith(f"go on with: python -m bvae.train --resume {out}") and "Traceback" not in error
    )
    assert main(["--resume", str(out)]) == 0
    same_end(out, uninterrupted)


SHORT = [*TINY, "--batch", "100", "--epochs", "2", "--epochs2", "2"]
"""two epochs of three steps, both stages"""


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Such a run that nothing stopped, not to be changed."""
    out = tmp_path_factory.mktemp("short") / "run"
    train(out, *SHORT)
    return out


@pytest.mark.parametrize("step", range(1, 13))
def test_a_stop_after_any_step_loses_nothing(short: Path, step: int, tmp_path: Path) -> None:
    """At epoch ends and stage ends too."""
    config, _ = parse([*SHORT, "--out", str(tmp_path / "run")])
    trainer = make_trainer(config, load_data(config), tmp_path / "run", quiet=True)
    left = step

    def count_down(n: int = 1, values: object = None) -> None:
        nonlocal left
        left -= n
        if left == 0:
            trainer.stop = signal.SIGTERM

    trainer.log.step = count_down  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        trainer.run()
    assert main(["--resume", str(tmp_path / "run")]) == 0
    same_end(tmp_path / "run", short)
    assert results_of(tmp_path / "run") == results_of(short)


def results_of(out: Path) -> dict:
    results = json.loads((out / "results.json").read_text())
    for r in results.values():
        r.pop("images_per_s", None)
        r.pop("latents_per_s", None)
    return results


def test_resuming_stage_1_alone_changes_nothing(tmp_path: Path) -> None:
    train(tmp_path / "run", "--epochs2", "0", "--lr", "3e-3")
    before = results_of(tmp_path / "run"), timeless(tmp_path / "run")
    assert main(["--resume", str(tmp_path / "run")]) == 0
    assert (results_of(tmp_path / "run"), timeless(tmp_path / "run")) == before


def test_resuming_a_finished_run_changes_nothing_and_more_epochs_go_on(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(out)
    before = load_file(out / "model.safetensors")
    assert main(["--resume", str(out)]) == 0
    again = load_file(out / "model.safetensors")
    assert all(torch.equal(before[name], again[name]) for name in before)
    assert main(["--resume", str(out), "--epochs2", "4"]) == 0
    assert json.loads((out / "config.json").read_text())["config"]["epochs2"] == 4
    assert [r["epoch"] for r in read_metrics(out) if r["stage"] == 2] == [1, 2, 3, 4]
    more = load_file(out / "model.safetensors")
    assert not all(torch.equal(before[name], more[name]) for name in before)


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--batch", "400"], "300 training images are fewer than one batch of 400"),
        (["--side", "24"], "--side must be a power of two"),
        (["--scales", "9"], "--scales 9 does not fit"),
        (["--channels", "2"], "--channels must be 1 or 3"),
        (["--gamma", "0.1"], "--gamma needs --balance fixed or annealed"),
        (["--balance", "guessed"], "there is no such balance; choose from computed, learned, fixed"),
        (["--network", "guessed"], "there is no such network; choose from resnet"),
        (["--balance", "fixed"], "exactly one of --gamma and --beta"),
        (["--balance", "fixed", "--gamma", "1", "--beta", "1"], "exactly one of --gamma and --beta"),
        (["--l2", "0.1"], "--l2 and --l2-on go together"),
        (["--eval-images", "0"], "--eval-images must be at least 1"),
        (["--rescale", "--epochs2", "0"], "--rescale needs a second stage"),
        (["--hidden", "1000000000"], "--hidden must be at most"),
        (["--data", ""], "--data is empty"),
        (["--out", "x" * 300], "File name too long"),
        (["--lr", "nan"], "--lr must be a positive number"),
        (["--kl-weight", "-1"], "--kl-weight must be auto or"),
        (["--preset", "nonsense"], "there is no such preset"),
        (["--preset", "cifar10"], "needs --data"),
        (["--data", "missing.npy"], "missing.npy: no such file"),
        (["--data", "empty.npz"], "empty.npz"),
        (["--data", "short.npy"], "short.npy"),
        (["--data", "floats.npy"], "floats.npy"),
        (["--data", "wide.npy"], "wide.npy"),
        (["--data", "."], ".: holds no images"),
    ],
)
def test_refuses(
    argv: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.npz").touch()
    np.save(tmp_path / "floats.npy", np.zeros((200, 16, 16, 3), np.float32))
    np.save(tmp_path / "wide.npy", np.zeros((200, 16, 17, 3), np.uint8))
    np.save(tmp_path / "short.npy", np.zeros((200, 16, 16, 3), np.uint8))
    os.truncate(tmp_path / "short.npy", 1000)
    assert said in fails(capsys, *TINY, "--out", "run", *argv)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("argv", [["--no-such-flag"], ["--batch", "many"]])
def test_the_parser_refuses_with_exit_code_2(
    argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*TINY, "--out", str(tmp_path / "run"), *argv])
    assert stopped.value.code == 2
    assert argv[-1].lstrip("-") in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_refuses_a_folder_that_exists(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "exists already" in fails(capsys, *TINY, "--out", str(run))


def test_refuses_an_out_below_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert f"cannot write {tmp_path / 'file' / 'run'}" in fails(capsys, *TINY, "--out", str(tmp_path / "file" / "run"))


@pytest.mark.parametrize(
    "argv",
    [["--batch", "25"], ["--seed", "5"], ["--latents", "9"], ["--balance", "learned"], ["--lr", "2e-3"], ["--amp"],
     ["--epochs2", "0"]],
)  # fmt: skip
def test_refuses_to_resume_another_run(run: Path, argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert f"cannot resume with {argv[0]}" in fails(capsys, "--resume", str(run), *argv)


def test_refuses_more_epochs_of_a_stage_that_has_ended(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "stage 1 has ended" in fails(capsys, "--resume", str(run), "--epochs", "5")


def test_refuses_to_resume_on_other_data(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "other.npy", np.random.default_rng(0).integers(0, 256, (400, 16, 16, 3), np.uint8))
    assert "is not the data the run was trained on" in fails(
        capsys, "--resume", str(run), "--data", str(tmp_path / "other.npy")
    )


def test_refuses_to_resume_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "not a run" in fails(capsys, "--resume", str(tmp_path))


def test_refuses_out_beside_resume(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "contradict" in fails(capsys, "--resume", str(run), "--out", "x")


@pytest.mark.parametrize("damage", ["truncated", "flipped", "foreign", "empty"])
def test_refuses_a_damaged_checkpoint(
    run: Path, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    (out / "checkpoints").mkdir(parents=True)
    (out / "config.json").write_bytes((run / "config.json").read_bytes())
    data = bytearray((run / LAST).read_bytes())
    if damage == "truncated":
        del data[len(data) // 2 :]
    elif damage == "flipped":
        data[-100] ^= 1
    elif damage == "empty":
        data.clear()
    else:
        data = bytearray((run / "model.safetensors").read_bytes())
    (out / LAST).write_bytes(data)
    assert str(out / LAST) in fails(capsys, "--resume", str(out))


def test_refuses_a_checkpoint_of_another_optimiser(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    (out / "checkpoints").mkdir(parents=True)
    (out / "config.json").write_bytes((run / "config.json").read_bytes())
    tensors, description = load_checkpoint(run / LAST)
    save_checkpoint(out / LAST, {k: t for k, t in tensors.items() if not k.startswith("step.loss")}, description)
    assert str(out / LAST) in fails(capsys, "--resume", str(out))


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    """A limit on the size of files acts as a full disk does: the first checkpoint cannot be written."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    command = [sys.executable, "-m", "bvae.train", *TINY, "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot write ") and len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir()), "a run that could not begin leaves no folder"


def test_a_run_that_diverges_stops_with_its_last_good_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    line = fails(capsys, *TINY, "--out", str(out), "--lr", "1e18", "--epochs", "9", "--log-every", "5")
    assert "not finite" in line and str(out / LAST) in line
    tensors, _ = load_checkpoint(out / LAST)
    assert all(t.isfinite().all() for t in tensors.values())


def test_steps_have_the_kernels_for_training_and_what_is_measured_has_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that bvae.evaluate, which trains nothing, finds the same figures."""
    training = False
    seen = set()

    @contextlib.contextmanager
    def kernels(device: torch.device, amp: bool):
        nonlocal training
        training = True
        yield
        training = False

    def watch(owner: object, name: str) -> None:
        call = getattr(owner, name)

        def watched(*args, **kwargs):
            seen.add((name, training))
            return call(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    monkeypatch.setattr(trainer, "training_kernels", kernels)
    watch(trainer.Step, "__call__")
    watch(images, "score_images")
    watch(images.ImageStage, "_next_statistics")
    watch(latents, "score_latents")
    watch(build, "encode_images")
    train(tmp_path / "run", "--epochs", "1", "--epochs2", "1")
    measured = {(n, False) for n in ("score_images", "score_latents", "encode_images", "_next_statistics")}
    assert seen == measured | {("__call__", True)}
