"""setup.py finds the CUDA toolkit, wherever it is named: nothing is built here."""

import importlib.util
import os
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("bvae_setup", Path(__file__).parents[1] / "setup.py")
assert spec is not None and spec.loader is not None
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)


def executable(path, text="#!/bin/sh\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def places(tmp_path, monkeypatch):
    """An nvcc in each of the three places, by name. The usual place is a folder of the test's own."""
    found = {name: executable(tmp_path / name / "bin" / "nvcc") for name in ("home", "usual", "on_path")}
    monkeypatch.setattr(tool, "USUAL_CUDA", str(tmp_path / "usual"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'on_path' / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("BVAE_CUDA", raising=False)
    return found


def test_nvcc_is_looked_for_in_three_places(places, monkeypatch):
    for name in ("home", "usual", "on_path"):
        assert tool.find_nvcc() == places[name]
        places[name].unlink()
    monkeypatch.setenv("PATH", str(places["home"].parent))
    assert tool.find_nvcc() is None


def test_no_cuda_is_wished_for(places, monkeypatch):
    monkeypatch.setenv("BVAE_CUDA", "0")
    assert tool.find_nvcc() is None


def test_the_libraries_are_those_of_the_toolkit_behind_a_script(tmp_path):
    """As distributions install it: what is on the PATH is a script far from the libraries, which nvcc names."""
    (tmp_path / "toolkit" / "lib").mkdir(parents=True)
    report = f'#$ TOP=x\n#$ LIBRARIES=  "-L{tmp_path}/toolkit/lib" "-L{tmp_path}/not/there"\n'
    nvcc = executable(tmp_path / "elsewhere" / "bin" / "nvcc", f"#!/bin/sh\ncat >&2 <<'END'\n{report}END\n")
    assert tool.cuda_libraries(nvcc) == [f"{tmp_path}/toolkit/lib"]
    (tmp_path / "elsewhere" / "lib64").mkdir()
    assert tool.cuda_libraries(nvcc)[0] == f"{tmp_path}/elsewhere/lib64"
