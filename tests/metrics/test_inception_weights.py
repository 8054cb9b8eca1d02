"""Finding, checking and refusing weights of the network."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from inception_samples import needs_weights, random_weights, real_path

from bvae.errors import UserError
from bvae.metrics import weights as module
from bvae.metrics.weights import NAMES, find_weights, load_weights


def refuses(path: Path, said: str) -> None:
    with pytest.raises(UserError) as refused:
        load_weights(path)
    text = str(refused.value)
    assert said in text and str(path) in text and "--inception" in text and "\n" not in text


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("BVAE_INCEPTION", raising=False)
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def test_is_found_in_this_order(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_weights() is None
    (hub / NAMES[1]).touch()
    assert find_weights() == hub / NAMES[1]
    (hub / NAMES[0]).touch()
    assert find_weights() == find_weights("download") == hub / NAMES[0]
    (tmp_path / "mine").touch()
    monkeypatch.setenv("BVAE_INCEPTION", str(tmp_path / "mine"))
    assert find_weights() == tmp_path / "mine"
    (tmp_path / "given").touch()
    assert find_weights(tmp_path / "given") == tmp_path / "given"
    with pytest.raises(UserError, match="no such file"):
        find_weights(tmp_path / "missing")


def test_a_download_is_checked_and_leaves_nothing_half_done(hub: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "served").write_bytes(b"not the weights")
    monkeypatch.setattr(module, "URL", (tmp_path / "served").as_uri())
    with pytest.raises(UserError, match="invalid hash"):
        find_weights("download")
    assert not list(hub.iterdir())
    monkeypatch.setattr(module, "URL", (tmp_path / "missing").as_uri())
    with pytest.raises(UserError, match="cannot download"):
        find_weights("download")


@pytest.mark.parametrize(
    ("data", "said"),
    [(b"<!DOCTYPE html>\n<html>", "an HTML page"), (b"version https://git-lfs.github.com/spec/v1", "Git LFS")],
)
def test_a_page_that_was_saved_as_weights_is_called_one(tmp_path: Path, data: bytes, said: str) -> None:
    (tmp_path / "w.pth").write_bytes(data)
    refuses(tmp_path / "w.pth", f"not the Inception weights: it is {said}" if "HTML" in said else said)


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BVAE_INCEPTION", "TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    assert find_weights() is None
    with pytest.raises(UserError, match="TORCH_HOME"):
        find_weights("download")


def test_refuses_a_pickle_with_code_and_does_not_run_it(tmp_path: Path) -> None:
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    with open(tmp_path / "w.pth", "wb") as file:
        pickle.dump({"Conv2d_1a_3x3.conv.weight": Code()}, file)
    refuses(tmp_path / "w.pth", "was not run")
    torch.save({"x": Code()}, tmp_path / "w.pth")
    refuses(tmp_path / "w.pth", "was not run")
    assert not (tmp_path / "ran").exists()


def test_refuses_other_files(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(b"")
    refuses(path, "not the Inception weights")
    path.write_bytes(b"PK\x03\x04 and so on")
    refuses(path, "not the Inception weights")
    torch.save(torch.zeros(3), path)
    refuses(path, "no dictionary")
    torch.save({}, path)
    refuses(path, "Conv2d_1a_3x3.conv.weight is missing")


def test_refuses_other_networks(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    weights = random_weights()
    torch.save(weights, path)
    refuses(path, "other weights than FID's")
    torch.save(weights | {"AuxLogits.fc.weight": torch.zeros(2)}, path)
    refuses(path, "also holds AuxLogits")
    torch.save(weights | {"Mixed_7c.branch_pool.bn.bias": torch.zeros(191)}, path)
    refuses(path, "Mixed_7c.branch_pool.bn.bias is [191], not [192]")
    del weights["Mixed_6c.branch7x7_2.conv.weight"]
    torch.save(weights, path)
    refuses(path, "Mixed_6c.branch7x7_2.conv.weight is missing")


@needs_weights
def test_the_real_ones_load_with_and_without_the_head_and_one_changed_number_is_noticed(tmp_path: Path) -> None:
    found = load_weights(real_path())
    assert found.digest == f"sha256:{module.CONTENT_SHA256}"
    head = {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    counters = {
        name.replace("running_var", "num_batches_tracked"): torch.tensor(0) for name in found.tensors if "var" in name
    }
    torch.save(found.tensors | head | counters, tmp_path / "whole.pth")
    assert load_weights(tmp_path / "whole.pth").digest == found.digest
    found.tensors["Mixed_5b.branch1x1.bn.bias"][3] += 1e-3
    torch.save(found.tensors, tmp_path / "changed.pth")
    refuses(tmp_path / "changed.pth", "other weights than FID's")
