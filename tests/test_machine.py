"""What CUDA and the process are told for training, which can be told without a CUDA device."""

import platform
import subprocess
import sys

import pytest
import torch

from bvae.machine import training_kernels

CUDA = torch.device("cuda")


def told():
    return torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.fixture(autouse=True)
def as_it_was():
    before = told()
    yield
    torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_tf32_is_of_training_in_fp32():
    before = told()
    assert before == (False, False, True)
    with training_kernels(CUDA, amp=False):
        assert told() == (True, True, True)
    assert told() == before
    with training_kernels(CUDA, amp=True):
        assert told() == (True, False, True)
    with pytest.raises(KeyError), training_kernels(CUDA, amp=False):
        raise KeyError
    assert told() == before


def test_where_tf32_is_off_it_stays_off():
    torch.backends.cudnn.allow_tf32 = False
    with training_kernels(CUDA, amp=False):
        assert told() == (True, False, False)


def test_what_was_set_before_is_kept():
    torch.backends.cudnn.benchmark = torch.backends.cuda.matmul.allow_tf32 = True
    with training_kernels(CUDA, amp=True):
        assert told() == (True, True, True)
    assert told() == (True, True, True)


def test_nothing_is_told_on_a_cpu_or_where_algorithms_are_deterministic():
    before = told()
    with training_kernels(torch.device("cpu"), amp=False):
        assert told() == before
    torch.use_deterministic_algorithms(True)
    try:
        with training_kernels(CUDA, amp=False):
            assert told() == before
    finally:
        torch.use_deterministic_algorithms(False)


FAULTS = """
import resource, torch
from bvae.machine import prepare_process

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.full((2**20,), 1.0), torch.full((2**21,), 1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

prepare_process()
faults()
print(faults(), torch.full((1,), 1e-30).mul(1e-10).item())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_a_prepared_process_keeps_its_memory_and_has_no_denormals():
    run = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    faults, denormal = run.stdout.split()
    assert int(faults) < 200  # giving 12 MiB back each time would take 20 * 3072 of them
    assert float(denormal) == 0
