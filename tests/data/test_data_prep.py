"""From any source to a store: what is kept, what is rejected and why, and that the result depends on nothing else."""

import csv
import dataclasses
import gzip
import io
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest
from pictures import encode, faces, picture, write_folder, write_tar, write_zip
from PIL import Image
from refusals import refused

from bvae.config import PRESETS
from bvae.data import Store, dataset, load, prep
from bvae.data.archive import open_source
from bvae.data.decoders.pillow import decode_image
from bvae.data.prep import prepare
from bvae.data.recipe import Recipe
from bvae.errors import UserError
from bvae.run.data import load_data

RECIPE = Recipe(size=16, channels=3)
REAL = os.environ.get("BVAE_TEST_CELEBA")
TOOL = Path(__file__).parents[2] / "tools" / "prep_celeba.py"


def pillow(source, out, recipe=RECIPE, **options):
    """In this process: starting workers takes longer than a few images."""
    return prepare(source, out, recipe, **({"backend": "pillow", "workers": 1} | options))


def rejects(store):
    with open(store / "rejects.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["name", "reason"]
    return dict(rows[1:])


def adds_up(meta):
    counts = meta["counts"]
    assert counts["read"] == counts["kept"] + counts["rejected"]
    assert counts["kept"] == counts["train"] + counts["val"] + counts["test"]
    assert {split: len(names) for split, names in meta["names"].items()} == {
        split: counts[split] for split in ("train", "val", "test")
    }
    return counts


# --- what is kept


def test_a_store_holds_what_decoding_gives_in_the_order_of_names(tmp_path, capsys):
    files = faces(30)
    lines = "".join(f"{name.rpartition('/')[2]} {i % 3}\n" for i, name in enumerate(files))
    source = write_zip(tmp_path / "a.zip", dict(reversed(files.items())))
    (tmp_path / "list_eval_partition.txt").write_text(lines)
    prep.main([str(source), "--out", str(tmp_path / "s"), "--size", "16", "--workers", "1", "--crop", "20"])
    out, err = capsys.readouterr()
    assert "read 30 = kept 30 + rejected 0" in out and "train 10, val 10, test 10" in out and "images/s" in out
    assert str(tmp_path / "s") in out.splitlines()[-1] and "list_eval_partition.txt" in err
    store = Store.open(tmp_path / "s", verify=True)
    recipe = Recipe(size=16, channels=3, crop=20)
    for number, split in enumerate(("train", "val", "test")):
        names = list(files)[number::3]
        assert store.meta["names"][split] == names
        assert np.array_equal(getattr(store, split), [decode_image(files[name], recipe) for name in names])
    meta = store.meta
    assert adds_up(meta)["read"] == 30 and rejects(tmp_path / "s") == {}
    assert meta["recipe"] == {"size": 16, "channels": 3, "crop": 20, "filter": "bilinear", "antialias": True}
    assert meta["source"]["kind"] == "zip" and meta["decoder"]["name"] in meta["decoder"]["versions"]
    sums = subprocess.run(["sha256sum", str(source)], capture_output=True, text=True, check=True).stdout
    assert meta["source"]["digest"] == "sha256:" + sums.split()[0]


def test_every_kind_of_source_gives_the_same_arrays_and_so_does_loading_it(tmp_path):
    files = faces(40)
    half = len(files) // 2
    first, second = (dict(list(files.items())[part]) for part in (slice(0, half), slice(half, None)))
    (tmp_path / "shards").mkdir()
    write_tar(tmp_path / "shards" / "a-000.tar", first)
    write_tar(tmp_path / "shards" / "a-001.tar", second)
    write_zip(tmp_path / "drive-001.zip", second)
    write_zip(tmp_path / "drive-002.zip", first | {"__MACOSX/._x.jpg": b"x"})
    sources = [
        write_folder(tmp_path / "folder", files),
        write_zip(tmp_path / "a.zip", files, zipfile.ZIP_DEFLATED),
        write_tar(tmp_path / "a.tar", files),
        write_tar(tmp_path / "a.tar.gz", dict(sorted(files.items(), reverse=True)), "w:gz"),
        tmp_path / "shards" / "a-{000..001}.tar",
        tmp_path / "drive-001.zip",
    ]
    metas = [pillow(source, tmp_path / f"s{i}", seed=3).meta for i, source in enumerate(sources)]
    assert len({meta["digest"] for meta in metas}) == 1
    for source in [*sources, tmp_path / "s0"]:
        data = load(source, side=16, channels=3, seed=3)
        assert data.digest == metas[0]["digest"] and len(data.test) == 4
    sums = subprocess.run(
        ["sha256sum", *sorted(files)], cwd=tmp_path / "folder", capture_output=True, text=True, check=True
    ).stdout
    command = subprocess.run(["sha256sum"], input=sums, capture_output=True, text=True, check=True)
    assert metas[0]["source"]["digest"] == "sha256:" + command.stdout.split()[0]


def test_the_result_does_not_depend_on_the_number_of_workers(tmp_path, monkeypatch):
    monkeypatch.setattr("bvae.data.images.CHUNK_IMAGES", 16)
    files = faces(210)
    for name in list(files)[::15]:
        files[name] = files[name][: len(files[name]) // 2]
    for suffix, write in (("zip", write_zip), ("tgz", lambda path, files: write_tar(path, files, "w:gz"))):
        source = write(tmp_path / f"a.{suffix}", files)
        results = set()
        for workers in (1, 2, 4):
            out = tmp_path / f"{suffix}{workers}"
            result = pillow(source, out, workers=workers)
            assert adds_up(result.meta)["rejected"] == 14
            results.add(tuple((out / name).read_bytes() for name in sorted(os.listdir(out))))
        assert len(results) == 1


def test_celebas_defaults_cut_the_papers_square(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {f"img_align_celeba/{n:06}.png": rng.integers(0, 256, (218, 178, 3), dtype=np.uint8) for n in (1, 2, 3)}
    faces = {name: encode(array) for name, array in arrays.items()}
    lists = {"list_eval_partition.txt": b"000001.png 0\n000002.png 1\n000003.png 2\n"}
    source = write_zip(tmp_path / "a.zip", faces | lists)
    done = subprocess.run(
        [sys.executable, str(TOOL), str(source), "--out", str(tmp_path / "s"), "--backend", "pillow"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(TOOL.parents[1])},
    )
    assert done.returncode == 0, done.stderr
    store = Store.open(tmp_path / "s", verify=True)
    for split, array in zip(("train", "val", "test"), arrays.values(), strict=True):
        square = Image.fromarray(array[45:173, 25:153]).resize((64, 64), Image.Resampling.BILINEAR)
        assert np.array_equal(getattr(store, split)[0], np.asarray(square))
    data = load_data(dataclasses.replace(PRESETS["celeba"], data=str(source)), quiet=True)
    assert np.array_equal(data.train, store.train) and data.digest == store.digest


# --- what is rejected


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def hostile():
    """{name: (bytes, whether it is kept or a word of the reason)}."""
    good, face = picture(24, 30), encode(picture(24, 30), "JPEG")
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = io.BytesIO()
    Image.fromarray(good).save(frames, "GIF", save_all=True, append_images=[Image.fromarray(255 - good)])
    size = struct.pack(">IIBBBBB", 2**16, 2**16, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(bytes(999))) + chunk(b"IEND", b"")
    modes = {mode: encode(Image.fromarray(good).convert(mode)) for mode in ("L", "P", "LA", "RGBA", "1")}
    return {
        "truncated.jpg": (face[: len(face) // 2], "decoded"),
        "header only.jpg": (face[:20], ""),
        "empty.jpg": (b"", "empty"),
        "zeros.jpg": (bytes(1000), "not an image"),
        "text.jpg": (b"hello, world\n" * 50, "not an image"),
        "page.jpg": (b"<!DOCTYPE html><html>quota exceeded</html>", "not an image"),
        "postscript.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "not an image"),
        "bomb.png": (bomb, "pixels"),
        "1x1.png": (encode(picture(1, 1)), "smaller than the crop"),
        "19x30.png": (encode(picture(19, 30)), "smaller than the crop"),
        "20x20.png": (encode(picture(20, 20)), None),
        "cmyk.jpg": (encode(Image.fromarray(good).convert("CMYK"), "JPEG"), None),
        "grey.jpg": (encode(good[..., 0], "JPEG"), None),
        "16 bit.png": (encode(good[..., 0].astype(np.uint16) * 256), "8 bits"),
        "float.tiff": (encode(good[..., 0].astype(np.float32), "TIFF"), "8 bits"),
        **{f"mode {mode}.png": (data, None) for mode, data in modes.items()},
        "turned.jpg": (encode(good, "JPEG", exif=exif), None),
        "animated.gif": (frames.getvalue(), None),
        "really a png.jpg": (encode(good), None),
        "жираф 北京 \u202e.jpg": (face, None),
        "../../escaped.jpg": (face, None),
        "/absolute.jpg": (face, None),
        'line\nbreak, "quoted".jpg': (b"x", "not an image"),
        "set/../x.jpg": (face, None),
    }


@pytest.mark.parametrize("kind", ["zip", "tar", "tgz", "folder"])
def test_hostile_files_are_kept_or_listed_and_the_counts_add_up(tmp_path, kind, recwarn):
    corpus = hostile()
    if kind == "folder":
        corpus = {name: what for name, what in corpus.items() if "../" not in name and not name.startswith("/")}
    good = {f"good/{n}.jpg": encode(picture(40, 40, n), "JPEG") for n in range(6)}
    files = {name: data for name, (data, _) in corpus.items()} | good
    junk = {"readme.txt": b"x", "inner.zip": b"PK\x05\x06" + bytes(18), ".hidden.jpg": b"x"}
    place = tmp_path / "deep" / "er"
    place.mkdir(parents=True)
    write = {"zip": write_zip, "tar": write_tar, "tgz": lambda p, f: write_tar(p, f, "w:gz"), "folder": write_folder}
    source = write[kind](place / f"a.{kind}", files | junk)
    recipe = Recipe(size=16, channels=3, crop=20)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    result = pillow(source, place / "out", recipe)
    counts = adds_up(result.meta)
    bad = {name: word for name, (_, word) in corpus.items() if word is not None}
    assert counts["read"] == len(files) and counts["rejected"] == len(bad) and counts["ignored"] == len(junk)
    listed = rejects(place / "out")
    assert set(listed) == set(bad)
    for name, word in bad.items():
        assert word in listed[name] and len(listed[name].splitlines()) == 1
    made = {str(path) for path in tmp_path.rglob("*")} - set(before)
    written = ("train.npy", "val.npy", "test.npy", "meta.json", "rejects.csv")
    assert made == {str(place / "out"), *(str(place / "out" / name) for name in written)}
    assert not [warning for warning in recwarn if "image" in str(warning.message).lower()]
    store = Store.open(place / "out", verify=True)
    for split in ("train", "test"):
        for name, pixels in zip(store.meta["names"][split], getattr(store, split), strict=True):
            assert np.array_equal(pixels, decode_image(files[name], recipe))
    refused(lambda: pillow(source, place / "strict", recipe, strict=True), f"a.{kind}")
    refused(lambda: load(source, side=16, channels=3, crop=20), f"a.{kind}")
    assert not (place / "strict").exists() and not list(place.glob(".*"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_that_may_not_be_read_is_rejected_alone(tmp_path):
    source = write_folder(tmp_path / "a", faces(6, folder=""))
    (source / "000003.jpg").chmod(0)
    result = pillow(source, tmp_path / "s")
    assert adds_up(result.meta)["rejected"] == 1 and "Permission" in rejects(tmp_path / "s")["000003.jpg"]


@pytest.mark.parametrize("kind", ["removed", "rewritten", "replaced"])
@pytest.mark.parametrize("form", ["folder", "a.zip", "a.tar", "a.tgz"])
@pytest.mark.parametrize("reader", ["prepare", "load"])
def test_a_source_that_changes_while_it_is_read_gives_nothing(tmp_path, monkeypatch, kind, form, reader):
    """Not only where it is then damaged: another whole archive would give rows of both."""
    writers = {"folder": write_folder, "a.zip": write_zip, "a.tar": write_tar}
    write = writers.get(form, lambda path, files: write_tar(path, files, "w:gz"))
    source = write(tmp_path / form, faces(6, folder=""))
    other = write(tmp_path / f"other-{form}", dict.fromkeys(faces(6, folder=""), encode(picture(27, 22, 9), "JPEG")))
    victim, other = (path / "000003.jpg" if form == "folder" else path for path in (source, other))

    def open_and_change(path):
        opened = open_source(path)
        if kind == "removed":
            victim.unlink()
        elif kind == "rewritten":
            victim.write_bytes(other.read_bytes())
        else:
            os.replace(other, victim)
        return opened

    monkeypatch.setattr(prep if reader == "prepare" else dataset, "open_source", open_and_change)
    read = {"prepare": lambda: pillow(source, tmp_path / "s"), "load": lambda: load(source, side=16, channels=3)}
    refused(read[reader], victim, "has changed while it was read")
    assert not (tmp_path / "s").exists()


def test_images_missing_from_the_list_are_rejected(tmp_path):
    source = write_zip(tmp_path / "a.zip", faces(6))
    (tmp_path / "list_eval_partition.txt").write_text("000001.jpg 0\n000002.jpg 0\n000003.jpg 2\n000099.jpg 1\n")
    result = pillow(source, tmp_path / "s")
    assert adds_up(result.meta)["rejected"] == 3 and result.meta["split"]["lines_without_image"] == 1
    assert rejects(tmp_path / "s") == {
        f"img_align_celeba/00000{n}.jpg": "is not in list_eval_partition.txt" for n in (4, 5, 6)
    }
    refused(lambda: pillow(source, tmp_path / "t", strict=True), "000004.jpg", "not in list")
    refused(lambda: load(source, side=16, channels=3), "000004.jpg", "not in list")


def test_where_nothing_can_be_used_there_is_no_store(tmp_path):
    source = write_zip(tmp_path / "a.zip", {f"{n}.jpg": b"x" for n in range(20)})
    refused(lambda: pillow(source, tmp_path / "s"), "no image for train can be used", "0.jpg")
    files = {"train/a.jpg": b"x", "train/b.png": encode(picture()), "test/c.jpg": b"x", "test/d.jpg": b"x"}
    refused(lambda: pillow(write_folder(tmp_path / "a", files), tmp_path / "s"), "no image for test", "test/c.jpg")
    assert sorted(os.listdir(tmp_path)) == ["a", "a.zip"]


def test_a_reject_whose_name_the_terminal_cannot_show(tmp_path):
    source = write_zip(tmp_path / "a.zip", faces(6) | {"日本.jpg": b"x"})
    options = ("--out", tmp_path / "s", "--size", "8", "--backend", "pillow", "--workers", "1")
    done = subprocess.run(
        [sys.executable, "-m", "bvae.data.prep", source, *options],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONIOENCODING": "latin-1"},
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert r"\u65e5\u672c.jpg" in done.stdout and "read 7 = kept 6 + rejected 1" in done.stdout


def test_a_preview_replaces_no_image_of_the_source(tmp_path):
    source = write_folder(tmp_path / "a", {f"{n}.png": encode(picture(seed=n)) for n in range(3)})
    before = (source / "0.png").read_bytes()
    refused(lambda: prep.main([str(source), "--size", "8", "--preview", str(source / "0.png")]), source / "0.png")
    assert (source / "0.png").read_bytes() == before


def test_a_checkout_that_is_not_installed_prepares_too(tmp_path, monkeypatch):
    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(prep, "version", absent)
    assert pillow(write_zip(tmp_path / "a.zip", faces(6)), tmp_path / "s").meta["bvae"] == "not installed"


# --- MNIST


def write_mnist(folder, packed=True, counts=(30, 10)):
    folder.mkdir(parents=True, exist_ok=True)
    arrays = []
    for stem, count in zip(("train", "t10k"), counts, strict=True):
        array = np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        images = struct.pack(">IIII", 2051, count, 28, 28) + array.tobytes()
        labels = struct.pack(">II", 2049, count) + bytes(count)
        for kind, data in (("images-idx3", images), ("labels-idx1", labels)):
            path = folder / f"{stem}-{kind}-ubyte{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(data) if packed else data)
        arrays.append(array)
    return arrays


@pytest.mark.parametrize(("inner", "packed"), [("", True), ("MNIST/raw", False)])
def test_mnist_is_padded_and_keeps_its_split(tmp_path, inner, packed):
    train, test = write_mnist(tmp_path / "mnist" / inner, packed)
    prep.main([str(tmp_path / "mnist"), "--out", str(tmp_path / "s"), "--size", "32"])
    store = Store.open(tmp_path / "s", verify=True)
    for array, images in ((train, store.train), (test, store.test)):
        assert np.array_equal(images[:, 2:30, 2:30, 0], array)
        assert images.sum() == array.sum() and images.shape[1:] == (32, 32, 1)
    assert adds_up(store.meta)["val"] == 0 and store.meta["source"]["kind"] == "idx"
    assert store.meta["recipe"] == {"size": 32, "channels": 1, "padding": 2}
    data = load(tmp_path / "mnist", side=32, channels=1)
    assert data.digest == store.digest and data.train.flags.writeable


def test_mnist_that_is_not_whole(tmp_path):
    folder = tmp_path / "mnist"
    write_mnist(folder)
    grey = Recipe(size=32, channels=1)
    refused(lambda: pillow(folder, tmp_path / "s", Recipe(size=64, channels=1)), "--size 28", "--size 32")
    refused(lambda: pillow(folder, tmp_path / "s", grey, partition=tmp_path / "x"), "--partition")
    refused(lambda: pillow(folder, tmp_path / "s", Recipe(size=32, channels=1, filter="lanczos")), "--filter")
    refused(lambda: prep.main([str(folder), "--size", "32", "--preview", str(tmp_path / "p.png")]), "--preview")
    refused(lambda: load(folder, side=32, channels=3), "--channels 1")
    file = folder / "t10k-images-idx3-ubyte.gz"
    whole = gzip.decompress(file.read_bytes())
    for damaged, word in (
        (gzip.compress(whole[:-1]), "pixels"),
        (gzip.compress(whole + b"x"), "pixels"),
        (gzip.compress(whole[:10]), "not an idx"),
        (gzip.compress(struct.pack(">IIII", 2051, 2**31, 28, 28)), "images"),
        (gzip.compress(struct.pack(">IIII", 2051, 10, 14, 56) + whole[16:]), "14x56"),
        (file.read_bytes()[:-20], "cannot be read"),
        (b"junk", "cannot be read"),
    ):
        file.write_bytes(damaged)
        refused(lambda: pillow(folder, tmp_path / "s", grey), file, word)
    file.unlink()
    refused(lambda: pillow(folder, tmp_path / "s", grey), "t10k-images-idx3-ubyte.gz is missing")
    assert not (tmp_path / "s").exists()


# --- the command line


def command(*args, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "bvae.data.prep", *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_stopped_in_the_middle_it_leaves_no_store_and_a_rerun_finishes(tmp_path, number):
    files = {f"{n:05}.jpg": data for n, data in enumerate(list(faces(20).values()) * 60)}
    source = write_zip(tmp_path / "a.zip", files)
    args = (source, "--out", tmp_path / "s", "--size", "64", "--backend", "pillow", "--workers", "2")
    process = command(*args)
    file = tmp_path / ".s.partial" / "train.npy"
    limit = time.monotonic() + 60
    while not (file.exists() and file.stat().st_size > 0) and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.002)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 130), err
    assert "Traceback" not in err
    assert sorted(os.listdir(tmp_path)) == ([".s.partial", "a.zip"] if number == signal.SIGKILL else ["a.zip"])
    process = command(*args)
    out, err = process.communicate()
    assert process.returncode == 0 and "kept 1200" in out, err
    assert sorted(os.listdir(tmp_path)) == ["a.zip", "s"]
    Store.open(tmp_path / "s", verify=True)


def test_what_a_user_can_get_wrong_ends_in_one_line(tmp_path):
    source = write_zip(tmp_path / "a.zip", faces(50))
    cases = [
        (["absent.zip"], {}, "no such file"),
        ([source], {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))}, "cannot write"),
        ([source, "--crop", "100"], {}, "smaller than the crop"),
        ([source, "--size", "0"], {}, "size"),
    ]
    for args, options, word in cases:
        process = command(
            *args, "--workers", 1, "--out", tmp_path / "s", *([] if "--size" in args else ["--size", 16]), **options
        )
        out, err = process.communicate()
        assert process.returncode == 2 and out == ""
        assert word in err.splitlines()[-1] and err.splitlines()[-1].startswith("error: ") and "Traceback" not in err
        assert os.listdir(tmp_path) == ["a.zip"]


@pytest.mark.parametrize("args", [["--crop", "0"], ["--crop", "big"], ["--split", "1,1,1"], ["--seed", "-1"], []])
def test_usage(tmp_path, args, capsys):
    with pytest.raises(SystemExit) as caught:
        prep.main(["a.zip", "--out", str(tmp_path / "s"), *args, *(["--size", "16"] if args else [])])
    assert caught.value.code == 2 and "usage" in capsys.readouterr().err


def test_options_reach_the_recipe(tmp_path):
    source = write_folder(tmp_path / "in", faces(10))
    args = "--size 8 --crop none --filter lanczos --no-antialias --channels 1 --split 0.5,0.2,0.3 --seed 4 --workers 1"
    prep.main([str(source), "--out", str(tmp_path / "s"), *args.split()])
    meta = Store.open(tmp_path / "s").meta
    assert meta["recipe"] == {"size": 8, "channels": 1, "crop": "none", "filter": "lanczos", "antialias": False}
    assert [meta["counts"][split] for split in ("train", "val", "test")] == [5, 2, 3]
    assert meta["split"] == {"by": "fractions", "fractions": ["1/2", "1/5", "3/10"], "seed": 4}
    prep.main([str(source), "--out", str(tmp_path / "s"), "--size", "8", "--workers", "1", "--overwrite"])
    assert Store.open(tmp_path / "s", verify=True).meta["counts"]["test"] == 1


def test_progress_is_told_line_by_line_where_there_is_no_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("bvae.data.images._LINE_SECONDS", 0.0)
    monkeypatch.setattr("bvae.data.images.CHUNK_IMAGES", 10)
    source = write_zip(tmp_path / "a.zip", faces(30))
    told = []
    pillow(source, tmp_path / "s", say=told.append)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines] == ["10/30", "20/30", "30/30"]
    assert all("images, " in line and "/s, " in line and line.endswith("s left") for line in lines)
    assert "30 images, split by a tenth for test" in told[0] and "pillow" in told[1]
    pillow(source, tmp_path / "t")
    load(source, side=16, channels=3)
    assert capsys.readouterr() == ("", "")


# --- damage at random


def test_mutated_images_and_archives_never_crash(tmp_path):
    """For a bounded time, bytes of JPEGs and of the archives around them are changed, cut and doubled."""
    rng = random.Random(0)
    face = encode(picture(40, 30), "JPEG")
    good = {f"good{n}.png": encode(picture(20, 20, n)) for n in range(10)}
    end = time.monotonic() + 5
    rounds = kept = 0
    while rounds < 150 and time.monotonic() < end:
        rounds += 1
        files = dict(good)
        for n in range(10):
            files[f"face{n}.jpg"] = mutate(face, rng, rng.choice((1, 3, 30)))
        kind = rng.choice(("zip", "zip", "tar", "tgz"))
        path = tmp_path / f"a.{kind}"
        if kind == "zip":
            write_zip(path, files, rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))
        else:
            write_tar(path, files, "w:gz" if kind == "tgz" else "w")
        if rounds % 2:
            data = path.read_bytes()
            tail = max(0, len(data) - 2500) if kind == "zip" else 0  # the central directory lies at the end
            path.write_bytes(data[:tail] + mutate(data[tail:], rng, rng.choice((1, 3, 10))))
        try:
            counts = adds_up(pillow(path, tmp_path / "s", overwrite=True).meta)
            kept += counts["kept"]
            assert counts["read"] <= 40
        except UserError as error:
            assert len(str(error).splitlines()) == 1 and str(path) in str(error)
        assert set(os.listdir(tmp_path)) <= {"a.zip", "a.tar", "a.tgz", "s"}
    assert kept > 10


def mutate(data, rng, changes):
    data = bytearray(data)
    for _ in range(changes):
        at = rng.randrange(max(1, len(data)))
        how = rng.random()
        if how < 0.7:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif how < 0.8:
            data[at : at + rng.randrange(1, 9)] = b"\xff" * rng.randrange(9)
        elif how < 0.9:
            data[at:at] = data[at : at + rng.randrange(64)]
        elif changes > 1 and how < 0.93:
            del data[max(at, 1) :]
    return bytes(data)


# --- the real faces


@pytest.mark.skipif(not REAL, reason="BVAE_TEST_CELEBA does not name a folder with CelebA's zip and partition list")
def test_real_celeba(tmp_path):
    source = Path(REAL) / "img_align_celeba.zip"
    result = pillow(source, tmp_path / "s", Recipe(size=64, channels=3, crop=128), workers=None)
    counts = adds_up(result.meta)
    with zipfile.ZipFile(source) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        text = (Path(REAL) / "list_eval_partition.txt").read_text()
        lines = dict(line.split() for line in text.splitlines())
        assert counts["kept"] == len(names) and counts["rejected"] == 0
        store = Store.open(tmp_path / "s", verify=True)
        for number, split in enumerate(("train", "val", "test")):
            expected = [name for name in names if lines[name.rpartition("/")[2]] == str(number)]
            assert store.meta["names"][split] == expected
            for row in (0, len(expected) // 2, -1):
                image = Image.open(io.BytesIO(archive.read(expected[row])))
                square = image.crop((25, 45, 153, 173)).resize((64, 64), Image.Resampling.BILINEAR)
                assert np.array_equal(getattr(store, split)[row], np.asarray(square))
    shutil.rmtree(tmp_path / "s")
