import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from bvae.errors import UserError
from bvae.run.checkpoint import load_checkpoint, prefixed, save_checkpoint, under

DESCRIPTION = {"stage": 1, "step": 7, "best": None, "text": 'naïve "quotes"', "nested": {"a": [1, 2.5, True]}}


def tensors():
    g = torch.Generator().manual_seed(0)
    return {
        "float32": torch.randn(3, 4, generator=g),
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
        "float64": torch.randn(2, generator=g, dtype=torch.float64),
        "bfloat16": torch.randn(5, generator=g).bfloat16(),
        "float16": torch.randn(5, generator=g).half(),
        "int64": torch.tensor([2**62, -(2**62), 0]),
        "uint8": torch.arange(7, dtype=torch.uint8),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(1.25),
        "scalar int": torch.tensor(-3),
        "empty": torch.zeros(0),
        "empty rows": torch.zeros(4, 0, 2, dtype=torch.bfloat16),
        "channels_last": torch.randn(2, 3, 4, 5, generator=g).contiguous(memory_format=torch.channels_last),
        "transposed": torch.randn(6, 2, generator=g).t(),
        "parameter": torch.nn.Parameter(torch.randn(2, generator=g)),
    }


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "last.safetensors"
    save_checkpoint(file, tensors(), DESCRIPTION)
    return file


def refused(path, *texts):
    with pytest.raises(UserError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert str(path) in message
    for text in texts:
        assert text in message
    return message


# ---- what is written is what is read --------------------------------------------------------------------------------


def test_round_trip(path):
    loaded, description = load_checkpoint(path)
    assert description == DESCRIPTION
    expected = tensors()
    assert loaded.keys() == expected.keys()
    for name, t in expected.items():
        assert loaded[name].dtype == t.dtype
        assert loaded[name].shape == t.shape
        same = torch.equal(
            loaded[name].contiguous().view(-1).view(torch.uint8), t.detach().contiguous().view(-1).view(torch.uint8)
        )
        assert same, name
        assert not loaded[name].requires_grad


def test_what_was_read_can_be_changed_without_the_file(path):
    loaded, _ = load_checkpoint(path)
    for t in loaded.values():
        t.zero_()
    assert load_checkpoint(path)[0]["float32"].any()


def test_what_was_read_outlives_a_newer_file(path):
    loaded, _ = load_checkpoint(path)
    save_checkpoint(path, {name: torch.zeros_like(t) for name, t in tensors().items()}, DESCRIPTION)
    assert torch.equal(loaded["float32"], tensors()["float32"])


def test_parts_of_one_storage_are_written_apart(tmp_path):
    # As the batch-norm statistics are once they have been put into one vector.
    flat = torch.arange(10.0)
    parts = {"a": flat[:4], "b": flat[4:9].view(5, 1), "c": flat[9:].view(())}
    save_checkpoint(tmp_path / "x", parts, {})
    loaded, _ = load_checkpoint(tmp_path / "x")
    assert all(torch.equal(loaded[name], t) for name, t in parts.items())


def test_no_tensors_at_all(tmp_path):
    save_checkpoint(tmp_path / "x", {}, DESCRIPTION)
    assert load_checkpoint(tmp_path / "x") == ({}, DESCRIPTION)


def test_prefixes():
    state = {**prefixed({"a": 1, "b.c": 2}, "model"), **prefixed({"a": 3}, "model2")}
    assert state == {"model.a": 1, "model.b.c": 2, "model2.a": 3}
    assert under(state, "model") == {"a": 1, "b.c": 2}
    assert under(state, "model.b") == {"c": 2}
    assert under(state, "mod") == {}


# ---- what is not whole or not ours ----------------------------------------------------------------------------------


def test_a_missing_file(tmp_path):
    refused(tmp_path / "none.safetensors", "there is no such file")
    refused(tmp_path, "not a safetensors file")


def test_truncated_at_any_place(path):
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    places = [0, 1, 7, 8, 9, 8 + header // 2, 8 + header, 8 + header + 1, len(whole) // 2, len(whole) - 1]
    assert 8 + header + 1 < len(whole)
    for place in places:
        path.write_bytes(whole[:place])
        refused(path, "truncated")
    path.write_bytes(whole + b"\0")
    refused(path)
    path.write_bytes(whole)
    load_checkpoint(path)


def test_a_flipped_bit_anywhere(path):
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    for place in [0, 7, 8, 20, 8 + header // 3, 8 + header, 8 + header + 60, len(whole) - 1]:
        damaged = bytearray(whole)
        damaged[place] ^= 4
        path.write_bytes(bytes(damaged))
        refused(path)


def test_every_bit_of_the_header_is_guarded(path):
    """No single edit of the header may pass unless it changes nothing that is read."""
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    expected = load_checkpoint(path)
    for place in range(8, 8 + header, 7):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(bytes(damaged))
        try:
            loaded, description = load_checkpoint(path)
        except UserError as error:
            assert str(path) in str(error)
            continue
        assert description == expected[1]
        assert {n: t.shape for n, t in loaded.items()} == {n: t.shape for n, t in expected[0].items()}


def rewrite(path, **changes):
    """The same file with other metadata, as an editor of safetensors would write it."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    metadata |= changes
    save_file(content, path, {name: value for name, value in metadata.items() if value is not None})


def test_an_edited_description(path):
    rewrite(path)  # by itself this is harmless
    load_checkpoint(path)
    rewrite(path, bvae=json.dumps(DESCRIPTION | {"step": 8}))
    refused(path, "SHA-256")


def test_another_format_and_a_foreign_file(path):
    rewrite(path, bvae_format="0")
    refused(path, "format 0", "reads format 1")
    rewrite(path, bvae_format=None)
    refused(path, "not a checkpoint of bvae")
    save_file({"a": torch.zeros(2)}, path)
    refused(path, "not a checkpoint of bvae")
    save_file({"a": torch.zeros(2)}, path, {"bvae_format": "1"})
    refused(path, "SHA-256")


def test_tensors_added_renamed_or_cast(path):
    content, _ = load_checkpoint(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    for edit in (
        {**content, "more": torch.zeros(1)},
        {name: t for name, t in content.items() if name != "scalar"},
        {**content, "float32": content["float32"].view(torch.int32)},
        {**content, "float32": content["float32"].reshape(4, 3)},
        {**content, "float32": content["uint8"], "uint8": content["float32"]},
    ):
        save_file({name: t.contiguous() for name, t in edit.items()}, path, metadata)
        refused(path, "SHA-256")


class Bomb:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("how", ["pickle", "torch.save", "legacy torch.save", "text", "zeros"])
def test_other_files_are_refused_and_nothing_is_unpickled(tmp_path, how):
    path, marker = tmp_path / "last.safetensors", tmp_path / "unpickled"
    match how:
        case "pickle":
            path.write_bytes(pickle.dumps(Bomb(marker)))
        case "torch.save":
            torch.save({"a": Bomb(marker)}, path)
        case "legacy torch.save":
            torch.save({"a": Bomb(marker)}, path, _use_new_zipfile_serialization=False)
        case "text":
            path.write_text("version https://git-lfs.github.com/spec/v1\n")
        case "zeros":
            path.write_bytes(bytes(4096))
    refused(path)
    assert not marker.exists()


# ---- writing fails --------------------------------------------------------------------------------------------------


def test_a_missing_folder(tmp_path):
    path = tmp_path / "none" / "last.safetensors"
    with pytest.raises(UserError, match=r"cannot write .*none/last\.safetensors"):
        save_checkpoint(path, tensors(), DESCRIPTION)
    assert not path.parent.exists()


def test_a_folder_in_the_files_place(tmp_path):
    path = tmp_path / "last.safetensors"
    path.mkdir()
    with pytest.raises(UserError, match="cannot write"):
        save_checkpoint(path, tensors(), DESCRIPTION)
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file_and_no_other(path):
    pytest.importorskip("resource")
    before = path.read_bytes()
    program = """
        import resource, signal, sys
        from pathlib import Path
        import torch
        from bvae.run.checkpoint import save_checkpoint
        from bvae.errors import UserError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            save_checkpoint(Path(sys.argv[1]), {"big": torch.ones(100_000)}, {})
        except UserError as error:
            print(error)
            sys.exit(2)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program), str(path)], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stdout.startswith(f"cannot write {path}")
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_killed_while_writing_leaves_the_old_file(path):
    """kill -9 in the middle of a write: the file is whole, and the next write clears up."""
    program = """
        import os, signal, sys
        from pathlib import Path
        import torch
        from bvae.run.checkpoint import save_checkpoint
        os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
        save_checkpoint(Path(sys.argv[1]), {"big": torch.ones(100_000)}, {})
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program), str(path)], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert load_checkpoint(path)[1] == DESCRIPTION
    save_checkpoint(path, {"a": torch.ones(1)}, {"new": True})
    assert load_checkpoint(path)[1] == {"new": True}
    assert list(path.parent.iterdir()) == [path]
