"""Locks, places, and children that end with their parent."""

import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from bvae.errors import UserError
from bvae.studies import jobs
from bvae.studies.jobs import Child, Lock, Place, cpu_places, gpu_places, visible_gpus
from bvae.studies.mps import mps

forked = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "PATIENCE_SECONDS", 0.2)


def child(code: str, log: Path, place: Place | None = None, inherited: tuple[int, ...] = ()) -> Child:
    return Child([sys.executable, "-c", code], log, place or Place("here"), inherited)


def gone(pid: int, seconds: float = 5) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def wait_for(path: Path, seconds: float = 10) -> str:
    end = time.monotonic() + seconds
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.02)
    return path.read_text()


def test_a_folder_in_use_is_refused_until_it_is_free(tmp_path: Path) -> None:
    with Lock(tmp_path / "s", (1, 1)), pytest.raises(UserError, match="another study is using it"):
        Lock(tmp_path / "s", (1, 1))
    Lock(tmp_path / "s", (1, 1)).close()


def test_parts_share_a_folder_but_not_a_part(tmp_path: Path) -> None:
    with Lock(tmp_path, (1, 2)), Lock(tmp_path, (2, 2)):
        for part in ((1, 2), (1, 1)):
            with pytest.raises(UserError):
                Lock(tmp_path, part)


def parent_with_child(folder: Path, said: Path, inherit: bool) -> None:
    lock = Lock(folder, (1, 1))
    code = f"import os,time; open({str(said)!r},'w').write(str(os.getpid())); time.sleep(60)"
    child(code, folder / "log", inherited=lock.files if inherit else ())
    time.sleep(60)


def test_children_and_the_lock_end_with_a_killed_parent(tmp_path: Path) -> None:
    said = tmp_path / "pid"
    process = forked.Process(target=parent_with_child, args=(tmp_path / "s", said, True))
    process.start()
    pid = int(wait_for(said))
    with pytest.raises(UserError):
        Lock(tmp_path / "s", (1, 1))
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert gone(pid)
    Lock(tmp_path / "s", (1, 1)).close()


def test_the_lock_lasts_as_long_as_a_child_that_inherited_it(tmp_path: Path) -> None:
    lock = Lock(tmp_path / "s", (1, 1))
    running = child("import time; time.sleep(60)", tmp_path / "log", inherited=lock.files)
    lock.close()
    with pytest.raises(UserError):
        Lock(tmp_path / "s", (1, 1))
    running.stop(signal.SIGKILL)
    assert running.wait(5)
    Lock(tmp_path / "s", (1, 1)).close()


def test_a_stop_reaches_the_children_of_a_child(tmp_path: Path) -> None:
    said = tmp_path / "pid"
    code = (
        "import subprocess, sys; "
        f"p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); open({str(said)!r}, 'w')"
        ".write(str(p.pid)); p.wait()"
    )
    running = child(code, tmp_path / "log")
    grandchild = int(wait_for(said))
    running.stop()
    assert running.wait(5) and gone(grandchild)


def test_on_a_cpu_each_child_has_a_core_and_one_thread(tmp_path: Path) -> None:
    cores = sorted(os.sched_getaffinity(0))
    code = "import os, json; print(json.dumps([sorted(os.sched_getaffinity(0)), os.environ['OMP_NUM_THREADS']]))"
    places = cpu_places(len(cores)) if len(cores) > 1 else []
    for core, place in zip(cores, places, strict=False):
        running = child(code, tmp_path / f"log{core}", place)
        assert running.wait(20)
        assert json.loads((tmp_path / f"log{core}").read_text()) == [[core], "1"]
    assert cpu_places(1) == [Place("cpu")]  # all that this process may use
    with pytest.raises(UserError, match="each training takes one"):
        cpu_places(len(cores) + 1)


def test_on_gpus_jobs_go_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5")
    devices = visible_gpus(2)
    assert [p.environment["CUDA_VISIBLE_DEVICES"] for p in gpu_places(3, devices)] == ["3", "GPU-5", "3"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible_gpus(2) == ["0", "1"]


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import sys; print('error: no such thing', file=sys.stderr); sys.exit(2)", "no such thing"),
        ("raise ValueError('odd')", "exit code 1: ValueError: odd"),
        ("import os; os.kill(os.getpid(), 9)", "killed by signal 9"),
    ],
)
def test_a_failure_has_a_reason(tmp_path: Path, code: str, reason: str) -> None:
    (tmp_path / "log").write_text("error: of an earlier attempt\n")
    running = child(code, tmp_path / "log")
    assert running.wait(20)
    assert running.reason() == reason


CONTROL = """#!/bin/sh
echo "$* $CUDA_MPS_PIPE_DIRECTORY" >> {calls}
if [ "$1" = -f ]; then touch "$CUDA_MPS_PIPE_DIRECTORY/control"; sleep 30 & trap 'kill $!; exit 0' TERM; wait; fi
"""


def test_mps_runs_a_server_of_its_own_that_ends_with_the_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = tmp_path / "calls"
    program = tmp_path / "nvidia-cuda-mps-control"
    program.write_text(CONTROL.format(calls=calls))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("bvae.studies.mps.STOP_SECONDS", 0.2)
    with mps(tmp_path / "log") as environment:
        folder = environment["CUDA_MPS_PIPE_DIRECTORY"]
        assert Path(folder, "control").exists()
    begun, quit_ = calls.read_text().splitlines()
    assert begun == f"-f {folder}" and quit_ == f" {folder}"
    assert not Path(folder).exists()


def test_mps_without_its_program_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="is not installed"), mps(tmp_path / "log"):
        pass
