"""The prepared store: whole or not there, whatever happens while it is written, and checked when it is read."""

import csv
import json
import os
import resource
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from pictures import write_folder
from refusals import refused

from bvae.data import Store, load
from bvae.data.store import SPLITS, StoreWriter

SHAPE = (8, 8, 3)


def pixels(num, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (num, *SHAPE), dtype=np.uint8)


def write(path, counts=(7, 2, 3), seed=0, missing=(), overwrite=False):
    """A store of random images, of which some rows of each split never come; what it must hold."""
    arrays = dict(zip(SPLITS, (pixels(count, seed + i) for i, count in enumerate(counts)), strict=True))
    with StoreWriter(path, overwrite) as writer:
        writer.allocate({split: len(array) for split, array in arrays.items()}, SHAPE)
        expected = {}
        for split, array in arrays.items():
            rows = np.array([row for row in range(len(array)) if row not in missing], int)
            for some in np.array_split(rows[::-1], 3):  # in any order
                writer.place(split, some, array[some])
            expected[split] = array[rows]
        writer.finish({"note": "ж"}, [("a\nb.jpg", 'is "bad", really'), ("\udcff.png", "is empty")])
    return expected


def names(path):
    return sorted(os.listdir(path))


@pytest.mark.parametrize("missing", [(), (0,), (2, 3, 6), range(1, 7)])
def test_what_was_written_is_read(tmp_path, missing, monkeypatch):
    monkeypatch.setattr("bvae.data.store._BLOCK", 2 * 8 * 8 * 3)  # rows are moved two at a time
    expected = write(tmp_path / "s", missing=missing)
    assert names(tmp_path) == ["s"]
    assert names(tmp_path / "s") == ["meta.json", "rejects.csv", "test.npy", "train.npy", "val.npy"]
    store = Store.open(tmp_path / "s", verify=True)
    for split in SPLITS:
        array = getattr(store, split)
        assert isinstance(array, np.memmap) and not array.flags.writeable
        assert np.array_equal(array, expected[split])
        assert store.meta["arrays"][split]["shape"] == list(expected[split].shape)
        assert np.array_equal(np.load(tmp_path / "s" / f"{split}.npy"), expected[split])
    with open(tmp_path / "s" / "rejects.csv", newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [
            ["name", "reason"],
            ["a\nb.jpg", 'is "bad", really'],
            ["\\udcff.png", "is empty"],
        ]


def test_a_split_may_be_empty(tmp_path):
    write(tmp_path / "s", (3, 0, 2))
    assert Store.open(tmp_path / "s", verify=True).val.shape == (0, *SHAPE)


def test_loading_takes_the_stores_digest_and_checks_it(tmp_path):
    expected = write(tmp_path / "s")
    np.savez(tmp_path / "same.npz", train=expected["train"], test=expected["test"])
    digest = load(tmp_path / "same.npz", side=8, channels=3).digest
    assert Store.open(tmp_path / "s").digest == digest
    loaded = load(tmp_path / "s", side=8, channels=3)
    assert loaded.digest == digest and loaded.train.flags.writeable and type(loaded.train) is np.ndarray
    mapped = load(tmp_path / "s", side=8, channels=3, mapped=True)
    assert mapped.digest == digest and isinstance(mapped.train, np.memmap) and not mapped.train.flags.writeable
    assert np.array_equal(mapped.test, loaded.test)
    flip(tmp_path / "s" / "test.npy", -1)
    refused(lambda: load(tmp_path / "s", side=8, channels=3), tmp_path / "s", "has changed")
    refused(lambda: load(tmp_path / "s", side=16, channels=3), "--side 8")


def test_mapped_npy_files_give_the_rows_that_copying_gives(tmp_path):
    np.save(tmp_path / "a.npy", pixels(50))
    copied = load(tmp_path / "a.npy", side=8, channels=3, seed=4)
    mapped = load(tmp_path / "a.npy", side=8, channels=3, seed=4, mapped=True)
    assert mapped.digest == copied.digest
    assert not isinstance(mapped.train, np.ndarray) and mapped.train.shape == copied.train.shape == (45, *SHAPE)
    assert len(mapped.train) == 45 and mapped.train.nbytes == copied.train.nbytes
    assert np.array_equal(np.asarray(mapped.train), copied.train) and np.array_equal(mapped.test, copied.test)
    for key in (3, -1, slice(5, 9), np.array([7, 7, 0])):
        assert np.array_equal(mapped.train[key], copied.train[key])
    roundtrip = load(tmp_path / "a.npy", side=8, channels=3, seed=4, mapped=True, jpeg_roundtrip=True)
    assert roundtrip.digest == load(tmp_path / "a.npy", side=8, channels=3, seed=4, jpeg_roundtrip=True).digest


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_stores_that_were_changed(tmp_path):
    write(tmp_path / "whole")

    def damaged(change, *words, verify=False):
        shutil.rmtree(tmp_path / "s", ignore_errors=True)
        shutil.copytree(tmp_path / "whole", tmp_path / "s")
        change(tmp_path / "s")
        refused(lambda: Store.open(tmp_path / "s", verify), tmp_path / "s", *words)

    def edit(change):
        def apply(path):
            meta = json.loads((path / "meta.json").read_text())
            change(meta)
            (path / "meta.json").write_text(json.dumps(meta))

        return apply

    for split in SPLITS:
        damaged(lambda path, split=split: flip(path / f"{split}.npy", -1), f"{split}.npy", "digest", verify=True)
        damaged(lambda path, split=split: (path / f"{split}.npy").unlink(), f"{split}.npy")
        damaged(lambda path, split=split: os.truncate(path / f"{split}.npy", 200), f"{split}.npy")
        damaged(lambda path, split=split: np.save(path / f"{split}.npy", pixels(4)), f"{split}.npy", "shape")
    damaged(lambda path: np.save(path / "val.npy", pixels(2).astype(float)), "val.npy")
    damaged(lambda path: (path / "meta.json").unlink(), "no meta.json")
    damaged(lambda path: os.truncate(path / "meta.json", 100), "not readable JSON")
    damaged(lambda path: (path / "meta.json").write_text("[" * 10**5), "meta.json")
    damaged(lambda path: (path / "meta.json").write_text("[]"), "not of a prepared store")
    damaged(edit(lambda meta: meta.update(version=99)), "version 99")
    damaged(edit(lambda meta: meta.pop("arrays")), "says nothing of train.npy")
    damaged(edit(lambda meta: meta["arrays"].update(val=3)), "says nothing of val.npy")
    damaged(edit(lambda meta: meta["arrays"]["train"].update(digest="sha256:0")), "contradict")
    refused(lambda: Store.open(tmp_path / "absent"), "no such folder")


# --- where it is written


def test_what_is_there_is_not_replaced_unasked(tmp_path):
    write(tmp_path / "s")
    before = (tmp_path / "s" / "meta.json").read_bytes()
    refused(lambda: StoreWriter(tmp_path / "s"), tmp_path / "s", "exists already", "--overwrite")
    assert names(tmp_path) == ["s"] and (tmp_path / "s" / "meta.json").read_bytes() == before
    expected = write(tmp_path / "s", seed=9, overwrite=True)
    assert names(tmp_path) == ["s"]
    assert np.array_equal(Store.open(tmp_path / "s", verify=True).train, expected["train"])


def test_with_overwrite_the_old_store_stays_until_the_new_one_is_whole(tmp_path):
    write(tmp_path / "s")
    with pytest.raises(RuntimeError), StoreWriter(tmp_path / "s", overwrite=True) as writer:
        writer.allocate(dict.fromkeys(SPLITS, 3), SHAPE)
        writer.place("train", np.arange(3), pixels(3))
        Store.open(tmp_path / "s", verify=True)
        raise RuntimeError
    assert names(tmp_path) == ["s"]
    Store.open(tmp_path / "s", verify=True)


def test_folders_that_are_no_stores_are_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    for name, word in (("mine", "not a prepared store"), ("file", "not a folder")):
        for overwrite in (False, True):
            refused(lambda name=name, overwrite=overwrite: StoreWriter(tmp_path / name, overwrite), name, word)
    # Not even where the names are a store's, all of them.
    write_folder(tmp_path / "own", dict.fromkeys(("train.npy", "val.npy", "test.npy"), b"x"))
    for meta, word in (('{"dataset": "mine"}', "not a prepared store"), ("no JSON", "not readable JSON")):
        (tmp_path / "own" / "meta.json").write_text(meta)
        refused(lambda: StoreWriter(tmp_path / "own", overwrite=True), tmp_path / "own", word)
        assert names(tmp_path / "own") == ["meta.json", "test.npy", "train.npy", "val.npy"]
    write(tmp_path / "s")
    (tmp_path / "s" / "notes.txt").write_text("x")
    refused(lambda: StoreWriter(tmp_path / "s", overwrite=True), "notes.txt")
    (tmp_path / ".t.partial").mkdir()
    (tmp_path / ".t.partial" / "precious").write_text("x")
    refused(lambda: StoreWriter(tmp_path / "t"), ".t.partial", "precious")
    refused(lambda: StoreWriter("/"), "new folder")
    assert (tmp_path / ".t.partial" / "precious").exists() and (tmp_path / "mine" / "thesis.tex").exists()


def test_an_empty_folder_and_a_link_to_one_are_taken(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    Store.open(tmp_path / "empty", verify=True)


def test_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    refused(lambda: StoreWriter(tmp_path / "file" / "s"), "cannot write")
    refused(lambda: StoreWriter(tmp_path / ("x" * 300)), "cannot write")
    refused(lambda: StoreWriter("/proc/s"), "cannot write /proc/s")
    assert names(tmp_path) == ["file"]


def test_a_disk_that_is_too_small_is_known_before_any_work(tmp_path):
    writer = StoreWriter(tmp_path / "s")
    with writer:
        refused(lambda: writer.allocate({"train": 10**12, "val": 0, "test": 1}, SHAPE), "MiB", "left")
    assert names(tmp_path) == []


@pytest.mark.parametrize("limit", [10, 1000, 9000])
def test_a_disk_that_fills_up_leaves_nothing(tmp_path, limit):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        refused(lambda: write(tmp_path / "s", (50, 1, 1)), "cannot write", "too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) == []
    write(tmp_path / "s", (50, 1, 1))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")
def test_a_small_disk_leaves_nothing(tmp_path):
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(tmp_path)], capture_output=True
    ).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        with StoreWriter(tmp_path / "s") as writer:
            writer.allocate({"train": 200, "val": 0, "test": 100}, SHAPE)  # 56 KiB: it fits
            (tmp_path / "other").write_bytes(bytes(40_000))  # until somebody else takes the room
            refused(lambda: writer.place("train", np.arange(200), pixels(200)), "No space left")
        assert names(tmp_path) == ["other"]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


# --- interrupted and at the same time

CHANGES = ("pwrite", "fsync", "rename", "mkdir", "unlink", "ftruncate", "rmdir")


def write_and_die(path, seed, fatal):
    """Writes a store of one colour in a process that is killed before its `fatal`-th call that changes something; how
    it ended, and how many calls there were."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        calls = 0

        def counted(function):
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls == fatal:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return call

        try:
            os.fsync = bool  # a process that dies takes nothing with it that the kernel has; only its place counts
            for name in CHANGES:
                setattr(os, name, counted(getattr(os, name)))
            rows = np.full((6, *SHAPE), seed, np.uint8)
            with StoreWriter(path, overwrite=True) as store:
                store.allocate(dict.fromkeys(SPLITS, 6), SHAPE)
                for split in SPLITS:
                    store.place(split, np.arange(1, 6), rows[1:])
                store.finish({}, [])
            os.write(writer, str(calls).encode())
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writer)
    with open(reader) as output:
        answer = output.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), int(answer or 0)


@pytest.mark.parametrize("replace", [False, True])
def test_killed_at_any_call_there_is_no_store_or_a_whole_one_and_a_rerun_makes_it(tmp_path, replace):
    def colour():
        store = Store.open(tmp_path / "s", verify=True)
        values = {int(value) for split in SPLITS for value in np.unique(getattr(store, split))}
        assert len(values) == 1 and len(store.train) == 5
        return values.pop()

    code, calls = write_and_die(tmp_path / "s", 200, fatal=0)
    assert code == 0 and calls > 15
    killed, last = 0, 200
    for seed in range(1, calls + 8):
        # Twice: the second finds what the first has left.
        for fatal in (seed, 1 + seed // 2):
            if not replace and (tmp_path / "s").exists():
                shutil.rmtree(tmp_path / "s")
            code, _ = write_and_die(tmp_path / "s", seed, fatal)
            assert code in (0, -signal.SIGKILL)
            killed += code != 0
            if (tmp_path / "s").exists():
                last, before = colour(), last
                assert last == seed or (code and last == before)
            else:
                assert code
        if seed % 5 == 0:
            assert write_and_die(tmp_path / "s", 250, fatal=0)[0] == 0 and colour() == 250
            last = 250
    assert killed > calls
    assert write_and_die(tmp_path / "s", 250, fatal=0)[0] == 0 and colour() == 250
    assert names(tmp_path) == ["s"]


def test_two_at_a_time_are_kept_apart(tmp_path):
    code = (
        "import sys; from bvae.data.store import StoreWriter; w = StoreWriter(sys.argv[1]); print(1, flush=1); input()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "s")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline()
        refused(lambda: StoreWriter(tmp_path / "s"), "another process")
        other.kill()
        other.wait()
        write(tmp_path / "s")
    finally:
        other.kill()
        other.communicate()
    assert names(tmp_path) == ["s"]


def test_the_lock_goes_last_so_that_nobody_takes_a_folder_that_is_being_cleared(tmp_path, monkeypatch):
    removed, unlink = [], os.unlink

    def recorded(path, *args, **kwargs):
        unlink(path, *args, **kwargs)
        removed.append(os.path.basename(path))

    with StoreWriter(tmp_path / "s") as writer:
        writer.allocate(dict.fromkeys(SPLITS, 3), SHAPE)
        monkeypatch.setattr(os, "unlink", recorded)
    assert removed == ["train.npy", "val.npy", "test.npy", "rejects.csv"] and names(tmp_path) == []


def test_a_store_of_which_a_file_was_removed_is_not_put_into_place(tmp_path):
    with StoreWriter(tmp_path / "s") as writer:
        writer.allocate(dict.fromkeys(SPLITS, 3), SHAPE)
        (tmp_path / ".s.partial" / "train.npy").unlink()
        refused(lambda: writer.finish({}, []), ".s.partial", "lost its train.npy")
    assert names(tmp_path) == []
