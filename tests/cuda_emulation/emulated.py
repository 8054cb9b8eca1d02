"""A plugin of pytest: the emulated extension in the place of bvae._C, and a count of the kernels it ran."""

import ctypes
import importlib.util
import os
import sys

import torch  # noqa: F401  its libraries must be loaded before the extension that links to them

PATH = os.environ["CUDA_EMULATION_EXTENSION"]
HEADING = "launches of emulated kernels, the most blocks of one"

spec = importlib.util.spec_from_file_location("bvae._C", PATH)
assert spec is not None and spec.loader is not None
sys.modules["bvae._C"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["bvae._C"])


def pytest_terminal_summary(terminalreporter):
    report = ctypes.CDLL(PATH).cuda_emulation_report
    report.restype = ctypes.c_char_p
    terminalreporter.section(HEADING)
    terminalreporter.write(report().decode())
