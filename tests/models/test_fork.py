"""The second stream of a block, on stand-ins for CUDA's streams: who waits for whom, and when."""

import contextlib

import pytest
import torch

from bvae.models import fork


class Stream:
    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")


class Recorded:
    """A tensor, of which one sees which streams are told that they use its memory."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def record_stream(self, stream):
        self.log.append(f"{stream.name} keeps {self.name}")


@pytest.fixture
def log(monkeypatch):
    log = []

    @contextlib.contextmanager
    def stream(s):
        log.append(f"on {s.name}")
        yield
        log.append(f"off {s.name}")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream("main", log))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    return log


def branch(x):
    x.log.append("branch")
    return Recorded("result", x.log)


def test_off_a_branch_is_run_where_it_stands(log):
    out, join = fork.beside(branch, Recorded("x", log))
    join(out)
    assert log == ["branch"]


def test_on_the_branch_waits_for_its_input_and_its_user_for_the_branch(log):
    with fork.side_stream(Stream("side", log)):
        out, join = fork.beside(branch, Recorded("x", log))
        log.append("the other branch")
        join(out)
    assert log == [
        "side waits for main", "on side", "branch", "off side", "side keeps x", "the other branch",
        "main waits for side", "main keeps result",
    ]  # fmt: skip
    del log[:]
    fork.beside(branch, Recorded("x", log))
    assert log == ["branch"], "outside it is off again"
