import contextlib
import io
import json
import math
import os
import resource
import time

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bvae.errors import UserError
from bvae.files import write_atomically
from bvae.run.log import RunLog, read_metrics


def record(stage, epoch, loss=1.0, **more):
    return {"stage": stage, "epoch": epoch, "step": 10 * epoch, "loss": loss, "mse": 0.5, **more}


def write_run(folder, *epochs, resume_after=None, loss=1.0):
    with RunLog(folder, resume_after=resume_after, quiet=True) as log:
        for stage, epoch in epochs:
            log.epoch(record(stage, epoch, loss, latent_kl=[0.0, 1.0, float(epoch)]))


def keys(folder):
    return [(r["stage"], r["epoch"], r["loss"]) for r in read_metrics(folder)]


def events(folder, stage):
    accumulator = EventAccumulator(
        str(folder / "tensorboard" / f"stage{stage}"), size_guidance={"images": 0, "histograms": 0}
    )
    accumulator.Reload()
    return accumulator


def curve(folder, stage, key="loss"):
    return [(e.step, e.value) for e in events(folder, stage).Scalars(f"stage{stage}/{key}")]


@contextlib.contextmanager
def full_disk(size):
    """Lets no file of this process grow beyond so many bytes: only inside the block, for pytest writes to files too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_lines_keep_their_keys_and_order(tmp_path):
    with RunLog(tmp_path / "new" / "run", quiet=True) as log:
        log.epoch({"stage": 1, "epoch": 1, "zeta": 2, "alpha": "text", "list": np.array([1.5, 2.5], np.float32)})
    text = (tmp_path / "new" / "run" / "metrics.jsonl").read_text()
    assert text == '{"stage": 1, "epoch": 1, "zeta": 2, "alpha": "text", "list": [1.5, 2.5]}\n'


def test_numbers_that_are_not_finite_stay_valid_json(tmp_path):
    with RunLog(tmp_path, quiet=True) as log:
        log.epoch(record(1, 1, math.nan, kl=math.inf, nll=np.float32("-inf"), latent_kl=[0.5, math.nan]))

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line["loss"] is line["kl"] is line["nll"] is None
    assert line["latent_kl"] == [0.5, None]
    back = read_metrics(tmp_path)[0]
    assert math.isnan(back["loss"]) and math.isnan(back["latent_kl"][1])
    assert back["latent_kl"][0] == 0.5


def test_a_line_is_on_disk_before_epoch_returns(tmp_path):
    with RunLog(tmp_path, quiet=True) as log:
        for epoch in (1, 2):
            log.epoch(record(1, epoch))
            assert len(read_metrics(tmp_path)) == epoch
            assert len(curve(tmp_path, 1)) == epoch


def test_a_new_run_refuses_the_metrics_of_another(tmp_path):
    write_run(tmp_path, (1, 1))
    with pytest.raises(UserError, match=r"metrics\.jsonl: File exists"):
        RunLog(tmp_path, quiet=True)
    assert keys(tmp_path) == [(1, 1, 1.0)]


def test_a_closed_log_takes_no_more_epochs(tmp_path):
    log = RunLog(tmp_path, quiet=True)
    log.close()
    log.close()
    with pytest.raises(ValueError, match="closed"):
        log.epoch(record(1, 1))


@pytest.mark.parametrize(
    ("resume_after", "kept"),
    [
        ({}, []),
        ({1: 2}, [(1, 1), (1, 2)]),
        ({1: 3, 2: 1}, [(1, 1), (1, 2), (1, 3), (2, 1)]),
        ({1: 3, 2: 9}, [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2)]),
    ],
)
def test_resume_cuts_back_to_the_checkpoint(tmp_path, resume_after, kept):
    write_run(tmp_path, (1, 1), (1, 2), (1, 3), (2, 1), (2, 2))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    RunLog(tmp_path, resume_after=resume_after, quiet=True).close()
    # Byte for byte: what was kept is what had been written.
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(lines[: len(kept)])
    assert [key[:2] for key in keys(tmp_path)] == kept
    assert not list(tmp_path.glob("*.tmp"))


def test_resume_with_the_metrics_gone_goes_on(tmp_path):
    write_run(tmp_path, (1, 3), resume_after={1: 2})
    assert keys(tmp_path) == [(1, 3, 1.0)]


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_torn_last_line_is_dropped_and_written_again(tmp_path, cut):
    write_run(tmp_path, (1, 1), (1, 2))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[: -cut - 1])  # -1: more than the line's end is missing
    assert keys(tmp_path) == [(1, 1, 1.0)]
    write_run(tmp_path, (1, 2), resume_after={1: 2}, loss=7.0)
    assert keys(tmp_path) == [(1, 1, 1.0), (1, 2, 7.0)]


def test_a_whole_last_line_without_its_end_is_kept(tmp_path):
    write_run(tmp_path, (1, 1), (1, 2))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    assert len(keys(tmp_path)) == 2
    write_run(tmp_path, (1, 3), resume_after={1: 2})
    assert [key[1] for key in keys(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize("torn", ["\n", '\n{"stage": 1, "ep'])
@pytest.mark.parametrize(
    "bad", ["{", '{"stage": 1}', "[1]", "", '{"stage": 1, "epoch": 2.0}', '{"stage": true, "epoch": 1}', "\udcff"]
)
def test_corruption_elsewhere_names_the_line(tmp_path, bad, torn):
    write_run(tmp_path, (1, 1), (1, 2), (1, 3))
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines()
    lines[1] = bad
    before = ("\n".join(lines) + torn).encode(errors="surrogateescape")
    path.write_bytes(before)
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2"):
        read_metrics(tmp_path)
    with pytest.raises(UserError, match="line 2"):
        RunLog(tmp_path, resume_after={1: 3}, quiet=True)
    assert path.read_bytes() == before


def test_a_bad_last_line_that_has_its_end_is_no_torn_one(tmp_path):
    write_run(tmp_path, (1, 1))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"stage": 1,\n')
    with pytest.raises(UserError, match="line 2"):
        read_metrics(tmp_path)


def test_missing_metrics_are_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"metrics\.jsonl: No such file"):
        read_metrics(tmp_path)


def test_tensorboard_holds_scalars_histograms_and_images(tmp_path):
    picture = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    with RunLog(tmp_path, quiet=True) as log:
        log.start(1, 2, 10)
        for epoch in (1, 2):
            log.epoch(record(1, epoch, -epoch, note="text", latent_kl=[0.0, math.nan, 4.0, 4.0], empty=[math.nan]))
        log.image("grid", picture, 2)
        log.start(2, 2, 10)
        log.epoch(record(2, 1, 9.0))
        log.image("grid", picture[:, :, :1], 1)
    first, second = events(tmp_path, 1), events(tmp_path, 2)
    assert curve(tmp_path, 1) == [(1, -1.0), (2, -2.0)]
    assert curve(tmp_path, 2) == [(1, 9.0)]
    assert set(first.Tags()["scalars"]) == {"stage1/step", "stage1/loss", "stage1/mse"}
    assert first.Tags()["histograms"] == ["stage1/latent_kl"]
    histogram = first.Histograms("stage1/latent_kl")[0].histogram_value
    assert (histogram.num, histogram.min, histogram.max, histogram.sum) == (3, 0, 4, 8)
    assert sum(histogram.bucket) == 3 and histogram.bucket[0] == 1 and histogram.bucket[-1] == 2
    for accumulator, stage, shown in ((first, 1, picture), (second, 2, picture[:, :, 0])):
        (image,) = accumulator.Images(f"stage{stage}/grid")
        assert image.step == (2 if stage == 1 else 1)
        np.testing.assert_array_equal(np.array(Image.open(io.BytesIO(image.encoded_image_string))), shown)


def test_tensorboard_does_not_double_back_after_resume(tmp_path):
    write_run(tmp_path, (1, 1), (1, 2), (1, 3), (1, 4), loss=1.0)
    # A process killed in mid-write leaves a torn event too.
    (file,) = (tmp_path / "tensorboard" / "stage1").iterdir()
    file.write_bytes(file.read_bytes()[:-7])
    write_run(tmp_path, (1, 3), resume_after={1: 2}, loss=2.0)
    # A second resume within the same second must still be read after the first.
    write_run(tmp_path, (1, 4), (2, 1), (2, 2), resume_after={1: 3}, loss=3.0)
    write_run(tmp_path, (2, 2), resume_after={1: 4, 2: 1}, loss=4.0)
    assert curve(tmp_path, 1) == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 3.0)]
    assert curve(tmp_path, 2) == [(1, 3.0), (2, 4.0)]
    assert [e.step for e in events(tmp_path, 1).Histograms("stage1/latent_kl")] == [1, 2, 3, 4]


def test_a_stage_that_the_checkpoint_does_not_know_leaves_no_curve(tmp_path):
    write_run(tmp_path, (1, 1), (2, 1), (2, 2))
    RunLog(tmp_path, resume_after={1: 1}, quiet=True).close()
    assert curve(tmp_path, 2) == []
    assert curve(tmp_path, 1) == [(1, 1.0)]


def test_image_refuses_what_is_no_picture(tmp_path):
    picture = np.zeros((4, 4, 3), np.uint8)
    with RunLog(tmp_path, quiet=True) as log:
        with pytest.raises(ValueError, match="before start"):
            log.image("grid", picture, 1)
        log.start(1, 1, 1)
        for bad in (picture.astype(np.float32), picture[0], picture[:, :, :2]):
            with pytest.raises(ValueError, match="uint8"):
                log.image("grid", bad, 1)


def test_without_a_folder_nothing_is_written_or_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with RunLog(None) as log:
        log.start(1, 2, 10)
        log.step()
        log.epoch(record(1, 1))
        log.image("grid", np.zeros((4, 4, 3), np.uint8), 1)
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""


def test_quiet_writes_but_shows_nothing(tmp_path, capsys):
    with RunLog(tmp_path, quiet=True) as log:
        log.start(1, 2, 10)
        log.step(10)
        log.epoch(record(1, 1))
    assert capsys.readouterr().out == ""
    assert keys(tmp_path) == [(1, 1, 1.0)]


def test_plain_output_is_one_line_an_epoch(tmp_path, capsys):
    with RunLog(tmp_path) as log:
        log.start(1, 3, 10, first_step=10)
        for epoch in (2, 3):
            log.step(10)
            log.epoch(record(1, epoch, -7012.3, gamma2=0.0125, kl=math.nan, images_per_s=1234.5))
    begin, second, third = capsys.readouterr().out.splitlines()
    assert begin == "stage 1: 3 epochs of 10 steps, from step 10"
    assert second.startswith(
        "stage 1  epoch 2/3  step 20  loss -7012.3  mse 0.5  kl nan  gamma2 0.0125  1,234 images/s"
    )
    assert "epoch 3/3  step 30" in third and third.endswith("0:00:00 left")


def test_time_left_counts_only_the_steps_of_this_process(tmp_path, capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with RunLog(tmp_path, resume_after={1: 5}) as log:
        log.start(1, 10, 10, first_step=50)
        now[0] += 20.0  # 10 steps in 20 s, and 40 more to go
        log.step(10)
        log.epoch(record(1, 6))
    assert capsys.readouterr().out.splitlines()[-1].endswith("0:01:20 left")


def test_the_bar_shows_the_live_numbers_and_restores_the_cursor(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80, color_system=None)
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with pytest.raises(KeyboardInterrupt), RunLog(tmp_path, console=console) as log:
        log.start(1, 2, 10, images_per_step=100)
        now[0] += 2.0
        log.step(4, {"loss": 12.5})
        text = screen.getvalue()
        drawn = len(text)
        log.step(1)  # within the quarter second: counted, not drawn
        assert len(screen.getvalue()) == drawn
        log.epoch(record(1, 1, -3.25, gamma2=0.25))
        assert "loss -3.25" in screen.getvalue() and "gamma2 0.25" in screen.getvalue()
        log.step(10)
        raise KeyboardInterrupt
    assert "stage 1  epoch 1/2" in text and "4/20" in text
    assert "loss 12.5  200 images/s" in text
    assert max(len(line) for line in text.split("\n") if "\x1b" not in line) <= 80
    assert "20/20" in screen.getvalue()  # the last state stays on the screen
    assert screen.getvalue().rindex("\x1b[?25h") > screen.getvalue().rindex("\x1b[?25l")


def test_a_folder_that_cannot_be_made_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=r"cannot write .*file"):
            RunLog(folder, quiet=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").write_text("")
    with RunLog(tmp_path / "run", quiet=True) as log, pytest.raises(UserError, match=r"cannot write .*tensorboard"):
        log.epoch(record(1, 1))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_a_user_error(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="Permission denied"):
        RunLog(tmp_path, quiet=True)
    with pytest.raises(UserError, match="Permission denied"):
        write_atomically(tmp_path / "file", b"data")


def test_a_full_disk_leaves_whole_lines(tmp_path, capfd):
    with pytest.raises(UserError, match=r"cannot write .*metrics\.jsonl: File too large"):  # noqa: SIM117
        with RunLog(tmp_path, quiet=True) as log:
            log.epoch(record(1, 1))
            # Room for one more line of TensorBoard (some hundred bytes) but not for this line.
            with full_disk((tmp_path / "metrics.jsonl").stat().st_size + 500):
                log.epoch(record(1, 2, text="x" * 600))
    assert (tmp_path / "metrics.jsonl").read_text().endswith("}\n")
    assert keys(tmp_path) == [(1, 1, 1.0)]
    assert capfd.readouterr().err == ""


def test_a_full_disk_in_tensorboard_is_one_clear_error(tmp_path, capfd):
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    with pytest.raises(UserError, match=r"cannot write .*stage1: File too large"):  # noqa: SIM117
        with RunLog(tmp_path, quiet=True) as log:
            log.start(1, 1, 1)
            log.epoch(record(1, 1))
            with full_disk(2000):
                log.image("noise", picture, 1)
    assert curve(tmp_path, 1) == [(1, 1.0)]
    assert capfd.readouterr().err == ""


def test_write_atomically_replaces_or_leaves_alone(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()
    with pytest.raises(UserError, match=r"cannot write .*file: File too large"), full_disk(100):
        write_atomically(path, bytes(1000))
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    with pytest.raises(UserError, match="No such file"):
        write_atomically(tmp_path / "missing" / "file", b"data")


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_write_atomically_never_shows_a_part(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
