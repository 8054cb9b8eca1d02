"""Nothing of a source is left out in silence, test images get into no training, and what is not read is named."""

import io
import pickle
import struct
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from pictures import encode, faces, picture, write_folder, write_tar, write_zip
from PIL import Image
from refusals import refused

from bvae.config import PRESETS
from bvae.data import Store, archive, cifar, load, prep
from bvae.data.archive import open_source
from bvae.data.decoders.pillow import _check_depth as check_depth
from bvae.data.decoders.pillow import decode_image
from bvae.data.recipe import Recipe, Rejected
from bvae.data.splits import TEST, TRAIN, VAL, make_plan
from bvae.run.data import load_data

PNG = encode(picture())


def names(source):
    return [item.name for item in source.items]


def split_of(path, **options):
    source = open_source(path)
    plan = make_plan(source, **options)
    return {name: int(part) for name, part in zip(names(source), plan.part, strict=True)}


# --- images under any name


def forms(kind):
    return encode(picture(), kind, **({"quality": 100} if kind in ("AVIF", "WEBP") else {}))


ODD = {
    "a.jfif": "JPEG", "b.jpe": "JPEG", "c": "PNG", "d.jpg_large": "JPEG", "e.JPEG": "JPEG", "f.avif": "AVIF",
    "g.jp2": "JPEG2000", "h.dib": "DIB", "i.qoi": "QOI", "j.tga": "TGA", "k.0001": "WEBP", "l.mpo": "JPEG",
}  # fmt: skip


@pytest.mark.parametrize("form", ["folder", "a.zip", "a.tar", "a.tgz"])
def test_what_can_be_opened_is_an_image_whatever_it_is_called(tmp_path, form):
    write = {"folder": write_folder, "a.zip": write_zip, "a.tar": write_tar}
    files = {name: forms(kind) for name, kind in ODD.items()}
    others = {"notes.txt": b"x", "readme": b"no image", "x.heic": b"x", "y": b"\0\0\0\x18ftypheic"}
    path = write.get(form, lambda path, files: write_tar(path, files, "w:gz"))(tmp_path / form, files | others)
    source = open_source(path)
    assert names(source) == sorted(ODD)
    assert [name for name, _ in source.unread] == ["x.heic", "y"]
    assert source.left_out() == [
        "2 images left out; the first: x.heic is HEIC, which is not read: convert it to PNG or JPEG",
        "2 other files left out, no images: 1 .txt, 1 without suffix",
    ]
    data = load(path, side=24, channels=3)
    assert len(data.train) + len(data.test) == len(ODD) and sum("left out" in note for note in data.notes) == 2
    for image in (*data.train, *data.test):
        assert np.abs(image.astype(int) - picture()).mean() < 6


def test_preparing_lists_images_that_are_not_read_among_the_rejects(tmp_path, capsys):
    source = write_folder(tmp_path / "in", faces(5, folder="") | {"z.heic": b"x", "z.txt": b"x"})
    prep.main([str(source), "--out", str(tmp_path / "s"), "--size", "16", "--workers", "1"])
    out, err = capsys.readouterr()
    assert "read 6 = kept 5 + rejected 1; 1 other file ignored" in out and "z.heic" in err and "1 .txt" in err
    assert 'z.heic,"is HEIC' in (tmp_path / "s" / "rejects.csv").read_text()
    refused(
        lambda: prep.prepare(source, tmp_path / "t", Recipe(size=16, channels=3), strict=True), "z.heic", "convert it"
    )


def deep(kind):
    """An image of more than 8 bits a channel that Pillow would hand over as one of 8."""
    if kind == "SGI":
        header = struct.pack(">HBBHHHHII", 474, 0, 2, 3, 4, 4, 3, 0, 65535)
        return header.ljust(512, b"\0") + bytes(4 * 4 * 3 * 2)
    data = bytearray(encode(picture(), "JPEG2000", no_jp2=True))
    at = data.index(b"\xff\x4f\xff\x51") + 42
    data[at] = data[at + 3] = data[at + 6] = 9
    return bytes(data)


def test_an_avif_of_10_bits_is_rejected():
    """Pillow writes none: its header is made to say so."""
    data = bytearray(forms("AVIF"))
    with Image.open(io.BytesIO(data)) as image:
        check_depth(image, bytes(data))
        data[data.index(b"av1C") + 6] |= 0x40
        with pytest.raises(Rejected, match="deeper than 8 bits"):
            check_depth(image, bytes(data))


@pytest.mark.parametrize("kind", ["SGI", "JPEG2000"])
def test_deeper_images_of_other_formats_are_rejected(kind):
    with pytest.raises(Rejected, match="deeper than 8 bits"):
        decode_image(deep(kind), Recipe(size=4, channels=3))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"<!DOCTYPE html><html>quota exceeded", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        (b"PAR1....", "parquet"),
    ],
)
def test_what_is_no_image_or_archive_is_called_what_it_is(tmp_path, data, words):
    write_folder(tmp_path / "a", {"1.png": PNG, "2.png": data, "a.zip": data, "a.tar": data})
    refused(lambda: load(tmp_path / "a", side=16, channels=3), "2.png", words)
    for name in ("a.zip", "a.tar"):
        refused(lambda name=name: open_source(tmp_path / "a" / name), name, words)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"data/train-00000-of-00001.parquet": b"PAR1"}, ["parquet", "docs/data.md"]),
        ({"data.mdb": b"x", "lock.mdb": b"x"}, ["LMDB", "docs/data.md"]),
        ({"data-00000-of-00001.arrow": b"ARROW1", "state.json": b"{}"}, ["Arrow", "docs/data.md"]),
        ({"images.npy": b"x"}, [".npy", "train.npy"]),
        ({"a.tfrecord": b"x"}, ["TensorFlow"]),
    ],
)
def test_other_containers_are_named_with_the_way_out(tmp_path, files, words):
    folder = write_folder(tmp_path / "a", files)
    refused(lambda: load(folder, side=16, channels=3), folder, *words)
    name = next(iter(files))
    if not name.endswith(".npy"):
        refused(lambda: load(folder / name, side=16, channels=3), *words)


# --- several archives


def test_archives_keep_their_images_apart(tmp_path):
    for suffix, write in (("zip", write_zip), ("tar", write_tar)):
        (tmp_path / suffix).mkdir()
        write(tmp_path / suffix / f"cat.{suffix}", {f"{n}.png": PNG for n in range(5)})
        write(tmp_path / suffix / f"dog.{suffix}", {f"{n}.png": PNG for n in range(7)})
    first, second = (names(open_source(tmp_path / suffix)) for suffix in ("zip", "tar"))
    assert len(first) == 12 and [name.replace(".zip", ".tar") for name in first] == second
    assert open_source(tmp_path / "zip").ignored == 0
    assert not any(isinstance(item, archive.UnusableItem) for item in open_source(tmp_path / "zip").items)


def test_a_zip_by_deflate64_is_named_or_read(tmp_path, monkeypatch):
    path = write_zip(tmp_path / "a.zip", {"a.png": PNG})
    data = bytearray(path.read_bytes())
    for mark, at in ((b"PK\1\2", 10), (b"PK\3\4", 8)):
        struct.pack_into("<H", data, data.index(mark) + at, 9)
    path.write_bytes(data)
    monkeypatch.setattr(archive, "inflate64", None)
    with pytest.raises(Rejected, match=r"Deflate64.*pip install"):
        open_source(path).items[0].read()

    class Inflater:  # as if nothing were compressed
        def inflate(self, data):
            return data

    monkeypatch.setattr(archive, "inflate64", type("module", (), {"Inflater": Inflater}))
    assert open_source(path).items[0].read() == PNG


def test_a_tar_by_zstandard_is_named_where_it_cannot_be_read(tmp_path):
    (tmp_path / "a.tar.zst").write_bytes(b"\x28\xb5\x2f\xfd junk")
    words = ["not a readable tar"] if archive.ZST_TARS else ["Zstandard", "pip install"]
    refused(lambda: load(tmp_path / "a.tar.zst", side=16, channels=3), tmp_path / "a.tar.zst", *words)
    refused(lambda: open_source(tmp_path / "a.tar.zst"), tmp_path / "a.tar.zst", *words)


@pytest.mark.skipif(archive.zstd is None, reason="neither Python 3.14 nor backports.zstd")
def test_a_tar_by_zstandard(tmp_path):
    packed = write_tar(tmp_path / "a.tar", {f"{n}.png": PNG for n in range(3)}).read_bytes()
    (tmp_path / "a.tar.zst").write_bytes(archive.zstd.compress(packed))
    source = open_source(tmp_path / "a.tar.zst")
    assert [item.read() for _, items in source.chunks(lambda n: True) for item in items] == [PNG] * 3


# --- test images stay out of training


SPLIT = {
    "words": ({"train": TRAIN, "dev": VAL, "eval": TEST}, None),
    "words2": ({"Training": TRAIN, "Testing": TEST}, None),
    "cyclegan": ({"trainA": TRAIN, "trainB": TRAIN, "testA": TEST, "testB": TEST}, None),
    "coco": ({"train2017": TRAIN, "val2017": VAL, "test2017": TEST}, None),
    "prefix": ({"cars_train": TRAIN, "cars_test": TEST}, None),
    "below": ({"cat/train": TRAIN, "cat/test": TEST, "dog/train": TRAIN, "dog/test": TEST}, None),
    "deep": ({"a/b/train/x": TRAIN, "a/b/valid/x": VAL, "a/b/test/train": TEST}, None),
    "shards": ({"train-000.tar": TRAIN, "train-001.tar": TRAIN, "test-000.tar": TEST}, write_tar),
    "zips": ({"train.zip": TRAIN, "test.zip": TEST}, write_zip),
}


@pytest.mark.parametrize(("folders", "write"), SPLIT.values(), ids=SPLIT)
def test_names_of_splits_are_understood(tmp_path, folders, write):
    (tmp_path / "s").mkdir()
    for folder in folders:
        files = {f"{n}.png": PNG for n in range(3)}
        (write or write_folder)(tmp_path / "s" / folder, files)
    expected = {f"{folder}/{n}.png": part for folder, part in folders.items() for n in range(3)}
    assert split_of(tmp_path / "s") == expected


@pytest.mark.parametrize(
    "folders",
    [
        ("apple", "bus", "train", "tulip"),
        ("apple", "test"),
        ("images", "test_images"),
        ("train", "test", "extra"),
        ("train/cat", "train/test"),
        ("test",),
        (".", "train"),
    ],
)
def test_where_names_leave_it_open_the_user_is_asked(tmp_path, folders):
    for folder in folders:
        write_folder(tmp_path / "s" / folder, {f"{n}.png": PNG for n in range(3)})
    for read in (lambda: load(tmp_path / "s", side=16, channels=3), lambda: split_of(tmp_path / "s")):
        refused(read, tmp_path / "s", "--partition none")
    found = split_of(tmp_path / "s", partition="none")
    assert len(found) == 3 * len(folders) and sorted(set(found.values())) == [TRAIN, TEST]


@pytest.mark.parametrize(
    "folders", [("bullet_train", "bicycle"), ("contest", "trainers"), ("crash_test_dummy", "doll"), ("train",)]
)
def test_other_names_are_those_of_classes(tmp_path, folders):
    for folder in folders:
        write_folder(tmp_path / "s" / folder, {f"{n}.png": PNG for n in range(10)})
    assert sorted(split_of(tmp_path / "s").values()).count(TEST) == len(folders)


def test_files_that_are_named_as_splits(tmp_path):
    write_folder(tmp_path, {"a/train_1.png": PNG, "a/train_2.png": PNG, "a/test_1.png": PNG})
    refused(lambda: split_of(tmp_path / "a"), "train_1.png", "test_1.png", "--partition none")


def test_a_list_beside_that_is_not_of_these_images_can_be_left_aside(tmp_path):
    files = {f"{n:06}.jpg": encode(picture(seed=n), "JPEG") for n in range(1, 10)}
    (tmp_path / "list_eval_partition.txt").write_text("".join(f"{n:06}.jpg 0\n" for n in range(1, 30)))
    folder = write_folder(tmp_path / "voc", files)
    refused(lambda: load(folder, side=16, channels=3), "list_eval_partition.txt", "--partition none")
    assert len(load(folder, side=16, channels=3, partition="none").train) == 8
    (tmp_path / "list_eval_partition.txt").write_text("".join(f"{n:06}.jpg {n % 3}\n" for n in range(1, 30)))
    (note,) = [note for note in load(folder, side=16, channels=3).notes if "lies beside" in note]
    assert str(tmp_path / "list_eval_partition.txt") in note and "--partition none" in note


# --- lists


@pytest.mark.parametrize(
    "lines",
    [
        "./a/1.png 0\n./a/2.png 1\n./a/3.png 2\n",
        "a\\1.png train\na\\2.png valid\na\\3.png test\n",
        "0 1.png 0\n1 2.png 1\n2 3.png 2\n",
        ",image_id,partition\n0,1.png,0\n1,2.png,1\n2,3.png,2\n",
        "7,1.png,0\n8,2.png,1\n9,3.png,2\n",
        "filename,label,split\n1.png,cat,train\n2.png,dog,val\n3.png,cat,test\n",
        "1.jpg 0\n2.jpg 1\n3.jpg 2\n",
        "image partition\n1.png 0\n2.png 1\n3.png 2\n",
    ],
)
def test_lists_as_people_write_them(tmp_path, lines):
    source = open_source(write_folder(tmp_path / "s", {f"a/{n}.png": PNG for n in (1, 2, 3)}))
    (tmp_path / "list.txt").write_text(lines)
    assert make_plan(source, partition=tmp_path / "list.txt").part.tolist() == [TRAIN, VAL, TEST]


def test_celeba_hq_is_split_by_its_mapping(tmp_path):
    rows = [(0, "000003.jpg"), (1, "000001.jpg"), (2, "000002.jpg")]
    mapping = "idx     orig_idx   orig_file\n" + "".join(f"  {i}   {int(f[:6]) - 1}  {f}\n" for i, f in rows)
    partition = "000001.jpg 0\n000002.jpg 1\n000003.jpg 2\n"
    hq = write_folder(tmp_path / "hq" / "CelebA-HQ-img", {f"{n}.jpg": PNG for n in range(3)})
    (tmp_path / "hq" / "CelebA-HQ-to-CelebA-mapping.txt").write_text(mapping)
    for source in (tmp_path / "hq", hq):
        plan = make_plan(open_source(source))
        assert plan.description["by"] == "fractions" and any("mapping" in note for note in plan.notes)
    (tmp_path / "hq" / "list_eval_partition.txt").write_text(partition)
    for source in (tmp_path / "hq", hq):
        plan = make_plan(open_source(source))
        assert plan.part.tolist() == [TEST, TRAIN, VAL] and "mapping" in plan.how
    padded = write_folder(tmp_path / "padded", {f"imgHQ{n:05}.png": PNG for n in range(3)})
    (tmp_path / "CelebA-HQ-to-CelebA-mapping.txt").write_text(mapping)
    plan = make_plan(open_source(padded), partition=tmp_path / "hq" / "list_eval_partition.txt")
    assert plan.part.tolist() == [TEST, TRAIN, VAL]
    refused(
        lambda: make_plan(open_source(padded), partition=tmp_path / "CelebA-HQ-to-CelebA-mapping.txt"),
        "list_eval_partition.txt",
    )


# --- sets that are known by their files


@pytest.mark.parametrize("form", ["binary", "python", "tar"])
def test_cifar100(tmp_path, monkeypatch, form):
    monkeypatch.setattr(cifar, "IMAGES_PER_BATCH", 4)
    rng = np.random.default_rng(0)
    pixels = {name: rng.integers(0, 256, (n, 3072), np.uint8) for name, n in (("train", 20), ("test", 4))}
    if form == "python":
        files = {"meta": b"x"}
        for name, array in pixels.items():
            files[name] = pickle.dumps({b"data": array, b"fine_labels": [1] * len(array)}, protocol=2)
        path = write_folder(tmp_path / "cifar-100-python", files)
    else:
        labels = {name: np.tile(np.uint8([[19, 99]]), (len(array), 1)) for name, array in pixels.items()}
        files = {f"{name}.bin": np.hstack([labels[name], array]).tobytes() for name, array in pixels.items()}
        path = write_folder(tmp_path / "cifar-100-binary", files)
        if form == "tar":
            members = {f"cifar-100-binary/{name}": data for name, data in files.items()}
            path = write_tar(tmp_path / "cifar-100-binary.tar.gz", members, "w:gz")
    for source in (path, tmp_path) if form != "tar" else (path,):
        data = load(source, side=32, channels=3)
        assert data.name == "cifar100" and np.array_equal(
            data.train, pixels["train"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        )
        assert data.test.shape == (4, 32, 32, 3)
    if form == "binary":
        (path / "test.bin").write_bytes(files["test.bin"][:-1])
        refused(lambda: load(path, side=32, channels=3), "test.bin", "CIFAR-100", "truncated")


def test_stl10(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 96, 96, 3), np.uint8)
    planar = {"train_X.bin": images[:3], "test_X.bin": images[3:], "unlabeled_X.bin": images}
    files = {name: array.transpose(0, 3, 2, 1).tobytes() for name, array in planar.items()}
    folder = write_folder(tmp_path / "stl10_binary", files)
    packed = write_tar(tmp_path / "a.tar.gz", {f"stl10_binary/{name}": data for name, data in files.items()}, "w:gz")
    for path in (folder, tmp_path, packed):
        data = load(path, side=96, channels=3)
        assert np.array_equal(data.train, images[:3]) and np.array_equal(data.test, images[3:])
        assert data.name == "stl10" and any("unlabeled" in note for note in data.notes)
    (folder / "train_X.bin").write_bytes(files["train_X.bin"][:-1])
    refused(lambda: load(folder, side=96, channels=3), "train_X.bin", "truncated")
    (folder / "train_X.bin").unlink()
    refused(lambda: load(folder, side=96, channels=3), "train_X.bin is missing")


def test_svhn(tmp_path):
    scipy_io = pytest.importorskip("scipy.io")
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
    for name, part, packed in (("train", images[:3], True), ("test", images[3:], False)):
        values = {"X": part.transpose(1, 2, 3, 0), "y": np.ones((len(part), 1), np.uint8)}
        scipy_io.savemat(tmp_path / f"{name}_32x32.mat", values, do_compression=packed)
    data = load(tmp_path, side=32, channels=3)
    assert np.array_equal(data.train, images[:3]) and np.array_equal(data.test, images[3:]) and data.name == "svhn"
    refused(lambda: load(tmp_path / "train_32x32.mat", side=32, channels=3), "folder")
    whole = (tmp_path / "train_32x32.mat").read_bytes()
    for damaged in (b"", whole[:100], whole[:-20], whole[:128], b"x" * 300, whole[:200] + b"x" * 40 + whole[240:]):
        (tmp_path / "train_32x32.mat").write_bytes(damaged)
        refused(lambda: load(tmp_path, side=32, channels=3), "train_32x32.mat")
    (tmp_path / "train_32x32.mat").unlink()
    refused(lambda: load(tmp_path, side=32, channels=3), "train_32x32.mat is missing")


def test_what_needs_no_preparing_is_said_so(tmp_path):
    np.save(tmp_path / "train.npy", np.zeros((3, 16, 16, 3), np.uint8))
    np.save(tmp_path / "test.npy", np.zeros((3, 16, 16, 3), np.uint8))
    refused(lambda: prep.prepare(tmp_path, tmp_path / "s", Recipe(size=16, channels=3)), "NumPy files", "--data")


# --- arrays of other tools


def images(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "train", "test", "unused"),
    [
        ({"arr_0": images(20), "arr_1": np.zeros(20)}, None, None, []),
        ({"samples": images(20), "label": np.zeros(20)}, None, None, []),
        ({"data": images(20).transpose(0, 3, 1, 2).reshape(20, -1), "labels": np.zeros(20)}, None, None, []),
        (
            {
                "train_images": images(9),
                "val_images": images(3),
                "test_images": images(4, 1),
                "train_labels": np.ones(9),
            },
            images(9),
            images(4, 1),
            ["val_images"],
        ),
        ({"train": images(9), "test": images(4, 1), "masks": images(9)}, images(9), images(4, 1), ["masks"]),
    ],
)
def test_npz_of_other_tools(tmp_path, arrays, train, test, unused):
    np.savez(tmp_path / "a.npz", **arrays)
    data = load(tmp_path / "a.npz", side=16, channels=3)
    if train is None:
        assert len(data.test) == 2
        assert sorted(map(bytes, (*data.train, *data.test))) == sorted(map(bytes, images(20)))
    else:
        assert np.array_equal(data.train, train) and np.array_equal(data.test, test)
    assert [word for word in unused if any(word in note for note in data.notes)] == unused
    assert len(data.notes) == bool(unused)


def test_an_npz_with_test_images_alone_is_not_trained_on(tmp_path):
    np.savez(tmp_path / "a.npz", x_test=images(20))
    refused(lambda: load(tmp_path / "a.npz", side=16, channels=3), "x_test", "no images to train on")


# --- the command


def test_it_works_with_standard_streams_closed(tmp_path):
    source = write_folder(tmp_path / "in", faces(8, folder=""))
    line = '"$0" -m bvae.data.prep "$1" --out "$2" --size 16 --workers 2 0<&- 1>&- 2>&-'
    done = subprocess.run(["sh", "-c", line, sys.executable, source, tmp_path / "s"], timeout=120)
    assert done.returncode == 0 and len(Store.open(tmp_path / "s", verify=True).train) == 7


def test_arguments_without_effect_are_refused(tmp_path, capsys):
    source = write_folder(tmp_path / "in", faces(4, folder=""))
    for argv, said in (
        (["", "--out", "s", "--size", "16"], "is empty"),
        ([source, "--out", "", "--size", "16"], "is empty"),
        ([source, "--out", "s", "--size", "16", "--partition", ""], "is empty"),
        ([source, "--preview", "p.png", "--size", "16", "--strict"], "--strict has no effect"),
        ([source, "--out", "s"], "--size is required"),
    ):
        with pytest.raises(SystemExit):
            prep.main([str(word) for word in argv])
        assert said in capsys.readouterr().err
    lines = "".join(f"{n:06}.jpg {2 * (n > 2)}\n" for n in range(1, 5))
    (tmp_path / "list.txt").write_text(lines)
    out = ["--out", str(tmp_path / "s"), "--size", "16", "--workers", "1"]
    prep.main([str(source), *out, "--partition", str(tmp_path / "list.txt"), "--seed", "3"])
    assert "--seed has no effect" in capsys.readouterr().err


def test_celebas_preset_and_the_options_old_and_new_names(tmp_path, capsys):
    source = write_folder(tmp_path / "in", {f"{n}.png": encode(picture(218, 178, n)) for n in range(3)})
    for out, argv in (("a", ["--preset", "celeba"]), ("b", ["--side", "64", "--crop", "128", "--data-seed", "0"])):
        prep.main([str(source), "--out", str(tmp_path / out), "--workers", "1", *argv])
    first, second = Store.open(tmp_path / "a"), Store.open(tmp_path / "b")
    assert (
        first.digest == second.digest and first.train.shape[1:] == (64, 64, 3) and first.meta["recipe"]["crop"] == 128
    )


def test_the_trainers_options_are_those_of_preparing(tmp_path):
    for folder in ("apple", "train"):
        write_folder(tmp_path / "s" / folder, {f"{n}.png": PNG for n in range(5)})
    config = PRESETS["shapes"]

    def counts(**options):
        data = load_data(replace(config, data=str(tmp_path / "s"), side=16, **options), quiet=True)
        return len(data.train), len(data.test)

    refused(lambda: counts(), "--partition none")
    assert counts(partition="none") == (9, 1) and counts(partition="folders") == (4, 1)
    assert counts(split="0.5,0,0.5") == (5, 5)
    refused(lambda: counts(split="1,1"), "--split", "1,1")
    lines = [f"{folder}/{n}.png,{2 * (n == 0)}\n" for folder in ("apple", "train") for n in range(5)]
    (tmp_path / "list.csv").write_text("".join(lines))
    assert counts(partition=str(tmp_path / "list.csv")) == (8, 2)
