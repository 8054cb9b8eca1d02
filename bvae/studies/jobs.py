"""Processes side by side: the folder's lock, the places on cores and GPUs, and children that end with their parent."""

import contextlib
import ctypes
import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bvae.errors import UserError
from bvae.files import writing

PATIENCE_SECONDS = 3.0
"""longest wait for a lock: the children of a study that was just killed take a moment to end"""
PR_SET_PDEATHSIG = 1  # value in Linux's prctl.h
_libc = ctypes.CDLL(None, use_errno=True)


class Lock:
    """The use of a study's folder by one process, or by one for each part.

    The kernel holds it for the open file, which the children inherit: it ends when the last of them has ended, and not
    before, so that nobody goes on with a run that is still being written.
    """

    def __init__(self, folder: Path, part: tuple[int, int]) -> None:
        """Raises UserError where another process uses the folder, or this part of it."""
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._whole = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
            self._part = os.open(folder / f".lock-{part[0]}-of-{part[1]}", os.O_RDWR | os.O_CREAT, 0o666)
        kind = fcntl.LOCK_EX if part[1] == 1 else fcntl.LOCK_SH
        for file, how in ((self._whole, kind), (self._part, fcntl.LOCK_EX)):
            if not _acquired(file, how):
                self.close()
                raise UserError(f"{folder}: another study is using it; wait for that one, or choose another --out")

    @property
    def files(self) -> tuple[int, int]:
        """The lock files that children inherit."""
        return self._whole, self._part

    def close(self) -> None:
        for file in (self._whole, self._part):
            os.close(file)

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _acquired(file: int, how: int) -> bool:
    end = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            fcntl.flock(file, how | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
            time.sleep(0.05)


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Waits until no other process is in this block for the same path: parts write one study.json in turn."""
    with writing(path), open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@dataclass(frozen=True)
class Place:
    """Where a child runs: its environment and, on a CPU, its core."""

    name: str
    environment: Mapping[str, str] = field(default_factory=dict)
    core: int | None = None


def cpu_places(jobs: int) -> list[Place]:
    """One job: whatever this process may use. Several: a core and one thread each. Raises UserError for too many."""
    if jobs == 1:
        return [Place("cpu")]
    cores = sorted(os.sched_getaffinity(0))
    if jobs > len(cores):
        raise UserError(f"--jobs {jobs}: there are {len(cores)} cores here, and each training takes one")
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return [Place(f"core {core}", one_thread, core) for core in cores[:jobs]]


def gpu_places(jobs: int, devices: Sequence[str]) -> list[Place]:
    """Jobs spread over the devices, one after the other; as many on each as there are places."""
    return [
        Place(f"gpu {devices[i % len(devices)]}", {"CUDA_VISIBLE_DEVICES": devices[i % len(devices)]})
        for i in range(jobs)
    ]


def visible_gpus(count: int) -> list[str]:
    """The devices this process may use, as CUDA_VISIBLE_DEVICES names them; `count` is what torch sees."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in named.split(",")] if named else [str(i) for i in range(count)]
    return names[:count]


class Child:
    """A command in a process group of its own, which the kernel kills when this process ends."""

    def __init__(self, command: Sequence[str], log: Path, place: Place, inherited: Sequence[int] = ()) -> None:
        """log: gets what it prints, after what is there."""
        parent = os.getpid()

        def prepare() -> None:
            _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:  # it has ended in the meantime
                os._exit(1)
            if place.core is not None:
                os.sched_setaffinity(0, {place.core})

        with writing(log):
            log.parent.mkdir(parents=True, exist_ok=True)
            file = open(log, "ab")  # noqa: SIM115 (closed below)
        with file:
            self._start = file.seek(0, os.SEEK_END)
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **place.environment},
                preexec_fn=prepare,
                process_group=0,
                pass_fds=tuple(inherited),
            )
        self.log = log

    @property
    def pid(self) -> int:
        return self._process.pid

    def poll(self) -> int | None:
        return self._process.poll()

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Sends a signal to the whole group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def wait(self, seconds: float) -> bool:
        """True if it ends within that time."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def reason(self) -> str:
        """The line that says why it failed: that of a UserError, or the last one."""
        with open(self.log, "rb") as file:
            file.seek(self._start)
            lines = file.read().decode(errors="replace").splitlines()
        said = [line.strip() for line in lines if line.strip()]
        errors = [line for line in said if line.startswith("error: ")]
        code = self._process.returncode
        ended = f"killed by signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        return errors[-1].removeprefix("error: ") if errors else f"{ended}: {said[-1]}" if said else ended
