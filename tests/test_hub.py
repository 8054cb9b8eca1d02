"""Models on the Hub, without a network: its cache on disk, and a stand-in for its uploads."""

import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors

import bvae
from bvae.config import Config
from bvae.errors import UserError
from bvae.run.hub import is_model_id
from bvae.two_stage import TwoStageVAE

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = "f" * 40


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    """An empty cache of the Hub, which cannot be reached; the working directory is empty as well."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "hub"


def build(seed=0):
    torch.manual_seed(seed)
    return TwoStageVAE(Config(preset="shapes", side=8, scales=2, base=4, fc=8, latents=3, hidden=16))


def cached(cache, commit=COMMIT, revision="main", repo_id="somebody/faces"):
    """A commit's folder in the cache, as huggingface_hub lays it out, for `revision` of a model."""
    model = cache / ("models--" + repo_id.replace("/", "--"))
    (model / "refs").mkdir(parents=True, exist_ok=True)
    (model / "refs" / revision).write_text(commit)
    snapshot = model / "snapshots" / commit
    snapshot.mkdir(parents=True)
    return snapshot


def same(a, b):
    return all(torch.equal(t, b.state_dict()[name]) for name, t in a.state_dict().items())


def test_a_name_is_looked_up_in_the_hubs_cache(offline):
    model, tagged = build(), build(seed=1)
    model.save_pretrained(cached(offline))
    tagged.save_pretrained(cached(offline, OTHER, "v2"))
    loaded = TwoStageVAE.from_pretrained("somebody/faces")
    assert not loaded.training
    assert same(loaded, model)
    assert same(TwoStageVAE.from_pretrained("somebody/faces", revision="v2"), tagged)
    assert same(TwoStageVAE.from_pretrained("somebody/faces", "cpu", revision=OTHER), tagged)


def test_a_folder_of_the_name_wins(offline):
    build().save_pretrained(cached(offline))
    here = build(seed=1)
    here.save_pretrained("somebody/faces")
    assert same(TwoStageVAE.from_pretrained("somebody/faces"), here)
    shutil.rmtree("somebody/faces")
    (offline.parent / "here" / "somebody" / "faces").mkdir()
    with pytest.raises(UserError, match="somebody/faces: not a run or a saved model"):
        TwoStageVAE.from_pretrained("somebody/faces")


def test_runs_and_paths_are_never_asked_of_the_hub(offline, tmp_path):
    build().save_pretrained(cached(offline))
    for load in (bvae.load, lambda name: TwoStageVAE.from_pretrained(tmp_path / name)):
        with pytest.raises(UserError, match="somebody/faces: not a run or a saved model"):
            load("somebody/faces")


def test_a_folder_has_no_revision(tmp_path):
    build().save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="no revision 'v2'"):
        TwoStageVAE.from_pretrained(tmp_path / "model", revision="v2")


@pytest.mark.parametrize(
    ("name", "known"),
    [
        *[("user/name", True), ("u/n.1-x_y", True), ("name", False), ("a/b/c", False), ("./b", False), ("/b", False)],
        *[("../b", False), ("a/", False), ("a b/c", False), ("", False), ("a/b\n", False), ("~/x", False)],
    ],
)
def test_names_of_models(name, known):
    assert is_model_id(name) == known


def test_errors_are_one_clear_line(offline, monkeypatch):
    with pytest.raises(UserError, match="somebody/faces: no such folder here, nor in the Hub's cache"):
        TwoStageVAE.from_pretrained("somebody/faces")
    with pytest.raises(UserError, match=r"a--b/c: .*repo_id"):  # the Hub's own rules for names
        TwoStageVAE.from_pretrained("a--b/c")
    snapshot = cached(offline)
    build().save_pretrained(snapshot)
    data = bytearray((snapshot / "model.safetensors").read_bytes())
    data[-20] ^= 1
    (snapshot / "model.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=r"model\.safetensors: its content does not match"):
        TwoStageVAE.from_pretrained("somebody/faces")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "pytorch_model.bin").write_bytes(b"a pickle, which nobody opens")
    with pytest.raises(UserError, match="nor in the Hub's cache"):
        TwoStageVAE.from_pretrained("somebody/faces")
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install 'bvae\[hub\]'"):
        TwoStageVAE.from_pretrained("somebody/faces")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        ("RepositoryNotFoundError", "no such model on the Hub, or no access to it"),
        ("GatedRepoError", "no such model on the Hub, or no access to it"),
        ("RevisionNotFoundError", "no such revision"),
        ("RemoteEntryNotFoundError", "not a model of bvae"),
        ("HfHubHTTPError", "x/y: first"),
    ],
)
def test_the_hubs_answers_are_told(monkeypatch, error, text):
    kind = getattr(errors, error)

    def refuse(*args, **kwargs):
        failure = kind.__new__(kind)  # its arguments are a response of the network library
        failure.args = ("first\nsecond",)
        raise failure

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(UserError, match=text) as caught:
        TwoStageVAE.from_pretrained("x/y")
    assert "\n" not in str(caught.value)


class FakeApi:
    """Keeps what is uploaded as a commit in the cache; the only user who may write is somebody."""

    def __init__(self, cache):
        self.cache = cache
        self.made = []

    def __call__(self, **kwargs):
        return self

    def create_repo(self, repo_id, *, private, exist_ok):
        if not repo_id.startswith("somebody/"):
            raise PermissionError("403 Forbidden: you are not this user\nmore")
        self.made.append((repo_id, private, exist_ok))
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        shutil.copytree(folder_path, cached(self.cache, repo_id=repo_id), dirs_exist_ok=True)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/{commit_message}")


def test_what_is_pushed_can_be_loaded(offline, monkeypatch):
    api = FakeApi(offline)
    monkeypatch.setattr(huggingface_hub, "HfApi", api)
    model = build()
    address = model.push_to_hub("somebody/faces", private=True, message="first")
    assert address == "https://hub/somebody/faces/first"
    assert api.made == [("somebody/faces", True, True)]
    (snapshot,) = (offline / "models--somebody--faces" / "snapshots").iterdir()
    assert sorted(f.name for f in snapshot.iterdir()) == ["config.json", "model.safetensors"]
    assert same(TwoStageVAE.from_pretrained("somebody/faces"), model)
    with pytest.raises(UserError, match=r"nobody/faces: 403 Forbidden: you are not this user$"):
        model.push_to_hub("nobody/faces")
