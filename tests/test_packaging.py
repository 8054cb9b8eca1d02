"""The installed package: its version, types and files, and no trace of the machine that built it."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import bvae
from bvae.machine import versions

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = ("benchmarks", "bvae", "csrc", "docs", "tests", "tools")
LEFT_OUT = {".so", ".pyc", ".o"}


def files(*folders):
    """The project's files below the folders, as paths from its root; no results of builds and tests."""
    found = set()
    for folder in folders:
        for path in (ROOT / folder).rglob("*"):
            parts = path.relative_to(ROOT).parts
            if path.is_file() and path.suffix not in LEFT_OUT and "__pycache__" not in parts:
                found.add("/".join(parts))
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A source distribution, and a wheel made from it where there is no compiler: plain Python."""
    source = tmp_path_factory.mktemp("source")
    for folder in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / folder, source / folder, ignore=ignored)
    for path in ("LICENSE", "MANIFEST.in", "Makefile", "README.md", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / path, source / path)
    out = source.parent
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("BVAE_", "CXX"))}
    environment["PATH"] = str(out)

    def build(what, folder):
        code = f"from setuptools.build_meta import build_{what} as build; print(build({str(out)!r}))"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return out / done.stdout.splitlines()[-1]

    sdist = build("sdist", source)
    with tarfile.open(sdist) as archive:
        archive.extractall(out / "unpacked", filter="data")
    (unpacked,) = (out / "unpacked").iterdir()
    return unpacked, build("wheel", unpacked)


def test_the_version_is_one():
    assert bvae.__version__ == versions()["bvae"]
    assert "version" in PROJECT["project"]["dynamic"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "bvae.__version__"}


def test_the_source_distribution_is_whole(built):
    unpacked, _ = built
    inside = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    assert not files(*FOLDERS) - inside
    assert {"LICENSE", "Makefile", "README.md", "pyproject.toml", "setup.py", "tests/conftest.py"} <= inside
    assert not [name for name in inside if Path(name).suffix in LEFT_OUT]


def test_the_wheel_holds_what_is_used_at_run_time(built):
    _, wheel = built
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
        (entry,) = (name for name in inside if name.endswith("entry_points.txt"))
        assert "bvae = bvae.__main__:console" in archive.read(entry).decode()
        (metadata,) = (name for name in inside if name.endswith("METADATA"))
        assert f"Version: {bvae.__version__}\n" in archive.read(metadata).decode()
    assert not files("bvae") - inside
    assert "bvae/py.typed" in inside
    assert not [name for name in inside if name.startswith(("tests", "tools", "csrc", "docs"))]


def test_the_wheel_runs(built, tmp_path):
    _, wheel = built
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = "import bvae.__main__ as m; print(m.__file__); m.main(['prep', '--help'])"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.startswith(str(tmp_path))
    assert "prepared store" in done.stdout


def test_extras_for_development_hold_those_the_tests_need():
    extras = PROJECT["project"]["optional-dependencies"]
    assert any(requirement.startswith("bvae[test") for requirement in extras["dev"])
    own_extras = ",".join(re.findall(r"bvae\[(.*?)\]", " ".join(extras["test"]))).split(",")
    assert {"hub", "onnx"} <= set(own_extras)
    known = {requirement.split(">")[0].split("[")[0] for extra in extras.values() for requirement in extra}
    known |= {requirement.split(">")[0] for requirement in PROJECT["project"]["dependencies"]}
    names = {"PIL": "pillow", "sklearn": "scikit-learn", "nvidia": "nvidia-dali-cuda130", "yaml": "pyyaml"}
    own = {path.stem for path in (ROOT / "tests").rglob("*.py")} | {"bvae", "setup", "tests", "benchmarks"}
    own |= {path.stem for folder in ("tools", "benchmarks") for path in (ROOT / folder).glob("*.py")}
    imported = set()
    for name in files("tests"):
        if name.endswith(".py") and not name.startswith("tests/frameworks/"):
            for node in ast.walk(ast.parse((ROOT / name).read_text())):
                modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                modules += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
                imported |= {module.split(".")[0] for module in modules}
    missing = {names.get(m, m) for m in imported - set(sys.stdlib_module_names) - own} - known
    assert not missing - {"setuptools"}  # comes with the build


def test_the_extension_names_no_folder_of_its_build(needs_extension):
    """Messages of its checks name the source's file; the path must not be that of the machine it was built on."""
    rng = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(RuntimeError) as caught:
        torch.ops.bvae.philox_normal(rng, 1, 1, 0)
    assert "bvae: " in str(caught.value)
    assert str(ROOT) not in str(caught.value)
    include = str(Path(torch.__file__).parent)
    built = [path.read_bytes() for path in (ROOT / "bvae").glob("*.so")]
    assert built
    for content in built:
        for path in (f"{ROOT}/", f"{include}/"):
            assert path.encode() not in content


def test_the_container_runs_targets_and_copies_files_that_exist():
    text = (ROOT / "Dockerfile").read_text()
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M).group(1).split()
    used = set(re.findall(r"\bmake (\w+)$", text, re.M))
    assert {"train", "test", "install", "torch"} == used
    assert used <= set(targets)
    for source in re.findall(r"^COPY (\S+) ", text, re.M):
        assert (ROOT / source).exists()
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".venv", "**/*.so"} <= set(ignored)  # built on another machine
    assert not {"tests", "csrc", "docs", "tools", "bvae"} & set(ignored)


USER = """
import bvae
reveal_type(bvae.BalancedLoss())
reveal_type(bvae.load("x").rescales)
bvae.load(3.0)
"""


def test_a_users_type_checker_sees_types(tmp_path):
    """mypy takes the annotations of an installed package only where it has py.typed."""
    pytest.importorskip("mypy", reason="mypy is not installed (pip install 'bvae[dev]')")
    venv.create(tmp_path / "installed", with_pip=False)
    (site,) = (tmp_path / "installed").glob("lib/python3*/site-packages")
    shutil.copytree(ROOT / "bvae", site / "bvae", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / "user.py").write_text(USER)
    command = ["-m", "mypy", "--ignore-missing-imports", "--python-executable", tmp_path / "installed/bin/python"]
    environment = {name: value for name, value in os.environ.items() if name not in ("MYPYPATH", "PYTHONPATH")}
    done = subprocess.run(
        [sys.executable, *map(str, command), "user.py"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    notes = [line.split("note: ")[1] for line in done.stdout.splitlines() if "note: " in line]
    assert len(notes) == 2, done.stdout
    assert "BalancedLoss" in notes[0]
    assert "bool" in notes[1]
    assert 'user.py:5: error: Argument 1 to "load" has incompatible type "float"' in done.stdout
