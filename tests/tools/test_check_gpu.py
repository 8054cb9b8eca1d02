"""tools/check_gpu.sh with stand-ins for what it runs: it needs no GPU to say what has failed."""

import itertools
import os
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "tools" / "check_gpu.sh"
PYTHON = """#!/bin/sh
echo "caching ${PYTORCH_NO_CUDA_MEMORY_CACHING:-on}: $*" >>"$CALLS"
case "$*" in
*--collect-only*)
    [ "$FAILING" = collect-only ] ||
        printf 'tests/%s\\n' 'test_ops.py::test_a[1]' test_ops.py::test_b data/test_x.py::test_c
    ;;
*"$SLOW"*) exec sleep 60 ;;
*"$FAILING"*) echo 'what went wrong'; exit 3 ;;
esac
"""
SANITIZER = """#!/bin/sh
echo "sanitizer: $*" >>"$CALLS"
shift 4
"$@"
"""


def check(tmp_path, failing="nothing that is run", slow="nothing that is run", **more):
    """(the exit code, what was printed, the calls) of a check in which commands with `failing` in them fail."""
    (tmp_path / "bin").mkdir()
    for name, text in (("python", PYTHON), ("compute-sanitizer", SANITIZER)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "CALLS": str(tmp_path / "calls"),
        "FAILING": failing,
        "SLOW": slow,
        **more,
    }
    done = subprocess.run(["bash", str(SCRIPT), str(tmp_path / "out")], env=environment, capture_output=True, text=True)
    assert not done.stderr
    return done.returncode, done.stdout, (tmp_path / "calls").read_text().splitlines()


def test_each_file_of_tests_has_its_process_and_memcheck_sees_each_tensor(tmp_path):
    code, shown, calls = check(tmp_path)
    assert code == 0 and "FAILED" not in shown
    assert [c for c in calls if c.startswith("caching on: -m pytest -q -m gpu")] == [
        "caching on: -m pytest -q -m gpu tests/data/test_x.py",
        "caching on: -m pytest -q -m gpu tests/test_ops.py",
    ]
    sanitized = [c for before, c in itertools.pairwise(calls) if before.startswith("sanitizer: --tool mem")]
    assert len(sanitized) == 2 and all(c.startswith("caching 1: -m pytest") for c in sanitized)


def test_a_row_that_failed_is_shown_and_ends_the_check_with_an_error(tmp_path):
    code, shown, calls = check(tmp_path, "gpu tests/data/test_x.py")
    assert code == 1
    (row,) = [line for line in shown.splitlines() if "FAILED" in line]
    assert row.startswith("test_x ") and "FAILED 3" in row and row.endswith("what went wrong")
    assert any("bvae.train" in c for c in calls), "the rest is run all the same"


def test_what_there_is_no_time_for_is_shown(tmp_path):
    code, shown, calls = check(tmp_path, slow="bench_kernels", LIMIT="4")
    assert code == 1
    rows = {line.split()[0]: line for line in shown.splitlines() if line and not line.startswith("==")}
    assert " ok " in rows["bench_train"]
    assert " NO TIME " in rows["bench_kernels"]
    assert rows["bench_stream"].endswith("not run: no time")
    assert not any("bench_stream" in c for c in calls)


def test_some_rows_alone(tmp_path):
    code, shown, calls = check(tmp_path, ONLY="^(build|test_x)$")
    assert code == 0
    assert [line.split()[1] for line in shown.splitlines() if line.startswith("==")] == ["build:", "test_x:"]
    assert len(calls) == 3, "and the collection"


def test_where_no_test_is_found_that_is_a_failure(tmp_path):
    code, shown, _ = check(tmp_path, "collect-only")
    assert code == 1
    assert "test_collect " in shown and "FAILED" in shown
