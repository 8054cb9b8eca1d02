"""The look at busy cores, on a clock and steps of the test's own."""

import os

import pytest
import torch

from bvae import machine
from bvae.engine.threads import ROUNDS, STEPS, choose_threads, look
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


def test_busy_cores_get_one_thread_and_a_word():
    steps, said = Steps({4: 0.9, 1: 0.2}), []
    assert choose_threads(steps.run, None, said.append, steps.clock) == 1
    assert torch.get_num_threads() == 1
    (line,) = said
    assert "a step takes 900.0 ms with 4 threads and 200.0 ms with one" in line
    assert "--threads 4 keeps them" in line
    assert steps.calls == [(4, 1), *[(4, STEPS), (1, STEPS)] * ROUNDS]


@pytest.mark.parametrize("seconds", [{4: 0.1, 1: 0.3}, {4: 0.19, 1: 0.2}, {4: 0.24, 1: 0.2}])
def test_quiet_cores_keep_all_threads(seconds):
    steps, said = Steps(seconds), []
    assert choose_threads(steps.run, None, said.append, steps.clock) == 4
    assert torch.get_num_threads() == 4
    assert not said
    if seconds[4] <= seconds[1]:
        assert len(steps.calls) == 3  # the first round has told


def test_one_hiccup_is_not_busy():
    steps = Steps({4: 0.1, 1: 0.3}, {1: 5.0})  # the first turn with four threads
    found = look(steps.run, steps.clock)
    assert not found.busy
    assert found.seconds == pytest.approx(0.1)


def test_a_wanted_number_is_set_and_nothing_is_tried():
    steps, said = Steps({}), []
    assert choose_threads(steps.run, 2, said.append, steps.clock) == 2
    assert torch.get_num_threads() == 2
    assert not said
    assert not steps.calls


def test_one_thread_is_not_tried():
    torch.set_num_threads(1)
    steps = Steps({})
    assert look(steps.run, steps.clock) is None
    assert choose_threads(steps.run, None, pytest.fail, steps.clock) == 1
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
