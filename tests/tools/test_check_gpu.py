"""tools/check_gpu.sh with stand-ins for what it runs: it needs no GPU to say what has failed."""

import itertools
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "check_gpu.sh"
PYTHON = """#!/bin/sh
echo "caching ${PYTORCH_NO_CUDA_MEMORY_CACHING:-on}: $*" >>"$CALLS"
case "$*" in
-) [ -e "$INSTALLED" ] || printf "$ABSENT" ;;
*"pip install"*) [ "$FAILING" = pip ] && exit 1; touch "$INSTALLED" ;;
*--collect-only*)
    [ "$FAILING" = collect-nothing ] ||
        printf 'tests/%s\\n' 'test_ops.py::test_a[1]' test_ops.py::test_b data/test_x.py::test_c
    [ "$FAILING" != collect ] || exit 2
    ;;
*"$SLOW"*) exec sleep 60 ;;
*"$FAILING"*) echo 'what went wrong'; exit 3 ;;
*) echo 'a line' ;;
esac
"""
SANITIZER = """#!/bin/sh
echo "sanitizer: $*" >>"$CALLS"
shift 4
"$@"
"""
NOTHING = "nothing that is run"


class Check:
    def __init__(self, folder, failing=NOTHING, slow=NOTHING, images=None, absent="", **more):
        """A check in which commands with `failing` in them fail, and `absent` packages are missing."""
        (folder / "bin").mkdir()
        for name, text in (("python", PYTHON), ("compute-sanitizer", SANITIZER)):
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)
        (folder / "calls").touch()
        environment = {
            "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "CALLS": str(folder / "calls"),
            "INSTALLED": str(folder / "installed"),
            "WORK": str(folder / "work"),
            "FAILING": failing,
            "SLOW": slow,
            "ABSENT": absent,
            **more,
        }
        arguments = ["bash", str(SCRIPT), str(folder / "out"), *([str(images)] if images else [])]
        done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=120)
        self.code, self.shown, self.errors = done.returncode, done.stdout, done.stderr
        self.calls = (folder / "calls").read_text().splitlines()
        self.out = folder / "out"
        table = self.out / "results.txt"
        self.rows = {line.split()[0]: line for line in (table.read_text().splitlines() if table.exists() else [])}

    def called(self, text):
        return [c for c in self.calls if text in c]


def test_each_file_of_tests_has_its_process_and_memcheck_sees_each_tensor(tmp_path):
    check = Check(tmp_path)
    assert check.code == 0 and "FAILED" not in check.shown and not check.errors
    tests = sorted(c for c in check.calls if c.startswith("caching on: -m pytest -q -m gpu"))
    assert tests == [f"caching on: -m pytest -q -m gpu tests/{name}.py" for name in ("data/test_x", "test_ops")]
    sanitized = [c for before, c in itertools.pairwise(check.calls) if before.startswith("sanitizer: --tool mem")]
    assert len(sanitized) == 4 and all(c.startswith("caching 1: -m pytest") for c in sanitized)
    assert check.called("setup.py egg_info build_ext --inplace"), "else bvae has no version"


def test_what_tells_most_comes_first(tmp_path):
    order = list(Check(tmp_path).rows)
    assert order[:4] == ["build", "info", "smoke", "profile"]
    assert sorted(order[4:6]) == ["test_ops", "test_x"]
    assert order[6:9] == ["bench_train", "bench_train_compiled", "bench_kernels"]
    assert order.index("memcheck_test_ops") < order.index("random") < order.index("racecheck_test_ops")


def test_parts_are_all_of_it_once(tmp_path):
    (tmp_path / "whole").mkdir()
    whole = list(Check(tmp_path / "whole").rows)
    parts = []
    for n in "1234":
        (tmp_path / n).mkdir()
        parts += Check(tmp_path / n, PART=n).rows
    assert sorted(parts) == sorted(whole)


def test_a_row_that_failed_is_shown_and_ends_the_check_with_an_error(tmp_path):
    check = Check(tmp_path, "gpu tests/data/test_x.py")
    assert check.code == 1
    (row,) = [line for line in check.shown.splitlines() if "FAILED" in line]
    assert row.startswith("test_x ") and "FAILED 3" in row and row.endswith("what went wrong")
    assert check.called("bvae.train"), "the rest is run all the same"


def test_results_come_back_in_two_files(tmp_path):
    check = Check(tmp_path, ONLY="^(build|bench_train)$")
    assert sorted(path.name for path in check.out.iterdir()) == ["results.tar.gz", "results.txt"]
    assert all(line in check.shown.splitlines() for line in check.rows.values()) and len(check.rows) == 2
    with tarfile.open(check.out / "results.tar.gz") as archive:
        assert {"./build.log", "./bench_train.log"} <= set(archive.getnames())


def test_packages_that_are_missing_are_named_before_anything_is_done(tmp_path):
    check = Check(tmp_path, absent="typeguard\\ntyro\\n")
    assert check.code == 2 and not check.rows
    assert "lacks typeguard tyro" in check.errors and "WHEELS=DIR" in check.errors
    assert len(check.calls) == 1


@pytest.mark.parametrize("failing", [NOTHING, "pip"])
def test_missing_packages_are_taken_from_a_folder_of_wheels(tmp_path, failing):
    check = Check(tmp_path, failing, absent="typeguard\\ntyro\\n", WHEELS="/some/wheels", ONLY="^build$")
    (call,) = check.called("pip install")
    assert call.endswith("--no-index --find-links /some/wheels typeguard tyro")
    assert (check.code, list(check.rows)) == ((2, []) if failing == "pip" else (0, ["build"]))


def test_the_packages_asked_for_are_those_of_the_project(tmp_path):
    """Not by the stand-in: which of them this Python has, with a package among them that nobody has."""
    script = SCRIPT.read_text()
    program = script[script.index("<<'END'\n") + 8 : script.index("\nEND\n")]
    (tmp_path / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools>=77"]\n[project]\ndependencies = ["no-such.package>=1", "numpy<9"]\n'
    )
    done = subprocess.run(["python3", "-"], input=program, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "no-such.package" in done.stdout.split()


def test_what_there_is_no_time_for_is_shown(tmp_path):
    check = Check(tmp_path, slow="bench_kernels", LIMIT="6", ONLY="^(build|bench_kernels|bench_stream)$")
    assert check.code == 1
    assert " ok " in check.rows["build"]
    assert " NO TIME " in check.rows["bench_kernels"]
    assert check.rows["bench_stream"].endswith("not run: no time")
    assert not check.called("bench_stream")


def test_some_rows_alone(tmp_path):
    check = Check(tmp_path, ONLY="^(build|test_x)$")
    assert check.code == 0 and list(check.rows) == ["build", "test_x"]
    assert len(check.calls) == 4, "and the packages and the collection"


def test_tests_that_cannot_be_collected_are_a_failure(tmp_path):
    """Of a file that cannot be imported pytest lists nothing: it would be left out without a word."""
    check = Check(tmp_path, "collect", ONLY="^test_")
    assert check.code == 1 and "FAILED 2" in check.rows["test_collect"]
    assert " ok " in check.rows["test_ops"], "what was found is run all the same"


def test_where_no_test_is_found_that_is_a_failure(tmp_path):
    check = Check(tmp_path, "collect-nothing")
    assert check.code == 1 and "FAILED" in check.rows["test_collect"]


def test_without_images_the_recipe_is_timed_on_random_ones(tmp_path):
    check = Check(tmp_path)
    (call,) = check.called("random.npy --amp")
    assert "--max-steps 20000" in call
    for name in ("cifar10", "learned"):
        assert check.rows[name].endswith("not run: no images were given")


def test_images_are_trained_on_both_ways(tmp_path):
    images = tmp_path / "images.npy"
    images.touch()
    check = Check(tmp_path, images=images, STEPS="30", ONLY="^(cifar10|learned|random)$")
    runs = check.called("-m bvae.train")
    assert [f"--data {images}" in run and "--max-steps 30" in run for run in runs] == [True, True]
    assert ["--balance learned" in run for run in runs] == [False, True]
    assert "random" not in check.rows
