"""docs/results.md is what the kept results give, and they name no machine's folders."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
spec = importlib.util.spec_from_file_location("study_results", ROOT / "benchmarks" / "study_results.py")
assert spec is not None and spec.loader is not None
study_results = importlib.util.module_from_spec(spec)
spec.loader.exec_module(study_results)


def test_the_document_is_what_the_files_give() -> None:
    assert study_results.main(["--check"]) == 0, "run python benchmarks/study_results.py"


def test_a_kept_result_is_shown_and_no_longer_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_results, "ROOT", tmp_path)
    monkeypatch.setattr(study_results, "RESULTS", tmp_path)
    assert "## Not measured yet" in study_results.document()
    row = {"name": "computed", "settings": {}, "epochs": 10, "epochs2": 20, "n_images": 10_000, "published": {}}
    metrics = {"gen2": {"values": [30.0, 32.0], "mean": 31.0, "sd": 2**0.5, "n": 2}}
    data = {"name": "fashion", "train": 60_000, "test": 10_000}
    row |= {"metrics": metrics, "data": data, "unsettled": {"stage1": []}, "failed": {}, "problem": ""}
    found = {"name": "evidence-fashion", "command": "the command", "scale": 1.0, "protocol": "tf1", "precision": "bf16"}
    found |= {"environment": {"devices": ["a CPU"], "versions": [{"bvae": "1"}]}, "rows": [row], "comparisons": []}
    (tmp_path / "fashion.json").write_text(json.dumps(found))
    text = study_results.document()
    assert "| computed | 10 + 20 | 31.00 ± 1.41 (2) |" in text and "protocol tf1, bf16" in text
    assert "evidence-fashion --data" not in text and "evidence-mnist --data" in text


def test_kept_results_name_no_folder() -> None:
    for path in (ROOT / "benchmarks" / "results" / "studies").glob("*.json"):
        assert " /" not in json.loads(path.read_text())["command"]
