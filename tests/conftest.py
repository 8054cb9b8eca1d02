"""Devices to test on, the skip of GPU tests where there is none, and the order and threads of tests side by side."""

import os
import signal
import sys
from pathlib import Path

# For the tests that turn on deterministic algorithms: cuBLAS reads it once, before its first product.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# pytest-xdist starts a process per core: one thread each, here and in the processes that tests start. Inductor's pool
# of compilers would be a second set of such processes.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
# A shell ignores SIGINT in what it starts in the background, and processes inherit that: the tests of interrupts would
# wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

# A machine that is busy with other work is no fault of the code.
settings.register_profile("bvae", suppress_health_check=[HealthCheck.too_slow], deadline=None)
settings.load_profile("bvae")

NO_GPU = "no CUDA device on this machine"
# A process takes whole files (their tests share runs), in this order: the longest come first, so that all end together.
LONGEST = (
    "test_cuda_emulation.py",
    "test_train.py",
    "test_step_compile.py",
    "test_two_stage.py",
    "test_study_real.py",
    "test_study_run.py",
    "test_graph.py",
    "test_train_ranks.py",
    "test_fid_first.py",
    "test_main.py",
    "test_export.py",
    "test_packaging.py",
    "test_report_browser.py",
    "test_balances.py",
    "test_balance.py",
)


def pytest_collection_modifyitems(items):
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(Path(item.fspath).name, len(rank)))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=NO_GPU))


@pytest.fixture(autouse=True, scope="module")
def two_threads_for_the_ops(request):
    """Their loops divide the work between threads; all other tests are content with what the process has."""
    before = torch.get_num_threads()
    if Path(request.fspath).name.startswith("test_ops"):
        torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="module")
def few_figures(request):
    """Of a file's figures matplotlib draws the first ones, those of one run; the others are built and left blank.

    Drawing them takes twice as long as a tiny run's training. tests/report and tests/studies draw every one.
    """
    figures = sys.modules.get("bvae.report.figures")
    if figures is None or Path(request.fspath).parent.name in ("report", "studies"):
        yield
        return
    save, left = figures._save, 3

    def save_few(figure, path):
        nonlocal left
        left -= 1
        if left >= 0:
            save(figure, path)
        else:
            figures.save_png(path, np.full((1, 1, 3), 255, np.uint8))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "_save", save_few)
        yield


@pytest.fixture(autouse=True)
def denormal_numbers():
    """bvae.train in a test's own process turns them off for good; hypothesis generates them."""
    torch.set_flush_denormal(False)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


@pytest.fixture
def needs_extension():
    from bvae import ops

    if ops.EXTENSION_ERROR is not None:
        pytest.skip(f"the compiled extension is not in use: {ops.EXTENSION_ERROR}")
