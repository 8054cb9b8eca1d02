"""The look at busy cores, on a clock and steps of the test's own."""

import os

import pytest
import torch

from bvae import machine
from bvae.engine.threads import ROUNDS, STEPS, look
from bvae.errors import UserError
from bvae.machine import set_threads


class Steps:
    """A step takes `seconds[threads]`; one that stands for the n-th call can take another time."""

    def __init__(self, seconds, hiccups=()):
        self.seconds = seconds
        self.hiccups = dict(hiccups)
        self.now = 0.0
        self.calls = []

    def run(self, steps):
        threads = torch.get_num_threads()
        self.now += steps * self.hiccups.get(len(self.calls), self.seconds[threads])
        self.calls.append((threads, steps))

    def clock(self):
        return self.now


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(4))
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_busy_cores_are_noticed():
    steps = Steps({4: 0.9, 1: 0.2})
    found = look(steps.run, steps.clock)
    assert found.busy and torch.get_num_threads() == 4
    assert str(found) == "a step takes 900.0 ms with 4 threads and 200.0 ms with one"
    assert steps.calls == [(4, 1), *[(4, STEPS), (1, STEPS)] * ROUNDS]


@pytest.mark.parametrize("seconds", [{4: 0.1, 1: 0.3}, {4: 0.19, 1: 0.2}, {4: 0.24, 1: 0.2}])
def test_quiet_cores_are_not_called_busy(seconds):
    steps = Steps(seconds)
    assert not look(steps.run, steps.clock).busy
    assert torch.get_num_threads() == 4
    if seconds[4] <= seconds[1]:
        assert len(steps.calls) == 3  # the first round has told


def test_one_hiccup_is_not_busy():
    steps = Steps({4: 0.1, 1: 0.3}, {1: 5.0})  # the first turn with four threads
    found = look(steps.run, steps.clock)
    assert not found.busy
    assert found.seconds == pytest.approx(0.1)


def test_one_thread_is_not_tried():
    torch.set_num_threads(1)
    steps = Steps({})
    assert look(steps.run, steps.clock) is None
    assert not steps.calls


def test_a_step_that_fails_leaves_the_threads_as_they_were():
    def fail(steps):
        if torch.get_num_threads() == 1:
            raise KeyError

    with pytest.raises(KeyError):
        look(fail)
    assert torch.get_num_threads() == 4


@pytest.mark.parametrize("n", [0, -1, 5])
def test_numbers_that_cannot_be(n):
    with pytest.raises(UserError, match=f"--threads {n}: must be from 1 to 4"):
        set_threads(n)
    assert torch.get_num_threads() == 4
    machine.set_threads(4)
