"""Devices to test on, and the skip of GPU tests where there is none."""

import os

# For the tests that turn on deterministic algorithms: cuBLAS reads it once, before its first product.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

NO_GPU = "no CUDA device on this machine"


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=NO_GPU))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


@pytest.fixture
def needs_extension():
    from bvae import ops

    if ops.EXTENSION_ERROR is not None:
        pytest.skip(f"the compiled extension is not in use: {ops.EXTENSION_ERROR}")
