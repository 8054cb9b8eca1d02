"""The CUDA kernels on the CPU: the tests of the ops through them, in several orders; mistakes that must be reported."""

import functools
import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "benchmarks" / "emulate_cuda.py"
spec = importlib.util.spec_from_file_location("emulate_cuda", TOOL)
assert spec is not None and spec.loader is not None
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)

pytestmark = pytest.mark.skipif(tool.missing() is not None, reason=f"the emulation needs {tool.missing()}")


@pytest.fixture(scope="module")
def extension(tmp_path_factory):
    return tool.build(tmp_path_factory.mktemp("emulation"))


# A device of few multiprocessors makes every block loop; a large one makes sums of many blocks, in stages. The largest
# sizes are left to whoever changes a kernel, and torch.compile says nothing about one.
@pytest.mark.parametrize(
    ("multiprocessors", "order", "but"),
    [(2, "reverse", "not ops_large"), (132, "5", "not 60000 and not 8388608 and not (5000011 and dtype1)")],
)
def test_the_tests_of_the_ops_pass_through_every_kernel(extension, multiprocessors, order, but):
    arguments = ["-q", "-k", f"{tool.CHOICE} and not opcheck and not compile and {but}", *tool.TESTS]
    run = tool.run(extension, multiprocessors, order, arguments, capture_output=True, text=True)
    assert run.returncode == 0, (run.stdout + run.stderr)[-6000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) > 90
    launched = dict(re.findall(r"^(\w+) (\d+) \d+$", run.stdout, re.MULTILINE))
    assert launched.keys() >= tool.kernels(), "does the op of a kernel that never ran ask runs_on_cpu (csrc/tensors.h)?"


@functools.cache
def mistakes(folder):
    return tool.build_program(tool.EMULATION / "mistakes.cu", folder)


@pytest.mark.parametrize("order", ["forward", "reverse", "1", "2"])
@pytest.mark.parametrize(
    ("kernel", "report"),
    [
        ("right", None),
        ("divergent_barrier", r"thread \(40, 0, 0\) has ended"),
        ("two_barriers", r"mistakes.cu:39.*mistakes.cu:37"),
        ("divergent_shuffle", r"at __shfl_down_sync, \S*mistakes.cu:44"),
        ("shuffle_at_a_barrier", r"at __syncthreads, \S*mistakes.cu:49.* at __shfl_down_sync, \S*mistakes.cu:48"),
        ("shuffle_from_outside", r"thread \(15, 0, 0\).*reads a lane that its mask does not name"),
        ("outside_of_memory", r"AddressSanitizer: heap-buffer-overflow[^$]*mistakes.cu:56"),
        ("outside_of_shared_memory", r"mistakes.cu:62\S* runtime error: index 64 out of bounds"),
        ("misaligned", r"mistakes.cu:65\S* runtime error: member access within misaligned address"),
        ("false_assertion", r"thread \(63, 0, 0\): assertion threadIdx.x < 63, \S*mistakes.cu:67"),
    ],
)
def test_mistakes_are_reported(tmp_path_factory, kernel, report, order):
    program = mistakes(tmp_path_factory.getbasetemp() / "mistakes")
    run = subprocess.run(
        [program, kernel], env={"CUDA_EMULATION_ORDER": order}, capture_output=True, text=True, timeout=60
    )
    if report is None:
        assert run.returncode == 0, run.stderr
    else:
        assert run.returncode != 0 and re.search(report, run.stderr), run.stderr
