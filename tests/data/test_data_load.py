"""bvae.data.load on NumPy files, stores and generated images, and what it refuses."""

import contextlib
import io
import json
import os
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bvae.data import load
from bvae.data.shapes import NAMES, render
from bvae.errors import UserError


def pixels(num, side=16, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (num, side, side, channels), dtype=np.uint8)


@contextlib.contextmanager
def refused(*words):
    """The block must raise a UserError of one line that has all these words."""
    with pytest.raises(UserError) as caught:
        yield
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    for word in words:
        assert str(word) in text


def check_form(data, side=16, channels=3):
    for images in (data.train, data.test):
        assert type(images) is np.ndarray and images.dtype == np.uint8
        assert images.shape[1:] == (side, side, channels) and len(images) > 0
        assert images.flags.c_contiguous and images.flags.writeable
    assert data.digest.startswith("sha256:") and len(data.digest) == 7 + 64


# --- generated


@pytest.mark.parametrize("path", [None, "shapes"])
def test_shapes_come_with_their_factors(path):
    data = load(path, side=16, channels=3, seed=4, num_train=50, num_test=20)
    check_form(data)
    assert data.name == "shapes" and data.factors.names == NAMES
    assert np.array_equal(render(data.factors.train, 16), data.train)
    assert np.array_equal(render(data.factors.test, 16), data.test)
    assert not (data.factors.train[:20, 2:] == data.factors.test[:, 2:]).any()


def test_shapes_follow_the_seed():
    def digest(seed):
        return load(None, side=16, channels=3, seed=seed, num_train=10, num_test=5).digest

    assert digest(1) == digest(1) != digest(2)


def test_shapes_refuse_what_they_cannot_be():
    with refused("shapes", "--channels 3"):
        load(None, side=16, channels=1)
    with refused("shapes", "--side"):
        load(None, side=20, channels=3)
    with refused("shapes", "at least one"):
        load(None, side=16, channels=3, num_train=0)
    with refused("shapes", "memory"):
        load(None, side=16, channels=3, num_train=10**14)
    with refused("--data-seed"):
        load(None, side=16, channels=3, seed=-1)
    with refused("--channels"):
        load(None, side=16, channels=2)
    with refused("--side"):
        load(None, side=0, channels=3)


# --- NumPy files


def test_npy_holds_out_a_tenth_by_the_seed(tmp_path):
    images = pixels(57)
    np.save(tmp_path / "a.npy", images)
    data = load(tmp_path / "a.npy", side=16, channels=3, seed=3)
    check_form(data)
    assert data.name == "a.npy" and data.factors is None
    assert len(data.test) == 5 and len(data.train) == 52
    assert sorted(map(bytes, [*data.train, *data.test])) == sorted(map(bytes, images))
    assert data.digest == load(str(tmp_path / "a.npy"), side=16, channels=3, seed=3).digest
    assert data.digest != load(tmp_path / "a.npy", side=16, channels=3, seed=4).digest


def test_npy_of_two_images_has_one_for_each_part_and_one_image_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", pixels(2))
    data = load(tmp_path / "a.npy", side=16, channels=3)
    assert len(data.train) == len(data.test) == 1
    np.save(tmp_path / "a.npy", pixels(1))
    with refused(tmp_path / "a.npy", "single image"):
        load(tmp_path / "a.npy", side=16, channels=3)


@pytest.mark.parametrize("shape", [(20, 16, 16), (20, 16, 16, 1)])
def test_grey_npy_with_and_without_a_channel_axis(tmp_path, shape):
    images = pixels(20, channels=1).reshape(shape)
    np.save(tmp_path / "grey.npy", np.asfortranarray(images))
    data = load(tmp_path / "grey.npy", side=16, channels=1)
    check_form(data, channels=1)
    assert sorted(map(bytes, [*data.train, *data.test])) == sorted(map(bytes, images))


@pytest.mark.parametrize("keys", [("train", "test"), ("x_train", "x_test"), ("images", "test_images")])
def test_npz_with_train_and_test(tmp_path, keys):
    train, test = pixels(9), pixels(4, seed=1)
    labels = np.zeros(9)
    np.savez_compressed(tmp_path / "a.npz", **{keys[0]: train, keys[1]: test, "labels": labels})
    data = load(tmp_path / "a.npz", side=16, channels=3)
    check_form(data)
    assert np.array_equal(data.train, train) and np.array_equal(data.test, test)


def test_npz_with_a_single_array_of_any_name(tmp_path):
    np.savez(tmp_path / "a.npz", whatever=pixels(20))
    data = load(tmp_path / "a.npz", side=16, channels=3)
    assert len(data.train) == 18 and len(data.test) == 2


def test_npz_where_the_choice_is_not_clear(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, first=pixels(3), second=pixels(3))
    with refused(path, "which array", "first [3, 16, 16, 3], second [3, 16, 16, 3]"):
        load(path, side=16, channels=3)
    np.savez(path)
    with refused(path, "none"):
        load(path, side=16, channels=3)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("train", "no array")
    with refused(path, "not an array"):
        load(path, side=16, channels=3)


def test_the_test_part_is_checked_too(tmp_path):
    np.savez(tmp_path / "a.npz", train=pixels(3), test=pixels(3, side=32))
    with refused(tmp_path / "a.npz", "(test)", "32x32"):
        load(tmp_path / "a.npz", side=16, channels=3)


def wrong_arrays():
    good = pixels(4)
    with_nan = np.full((4, 16, 16, 3), np.nan, np.float32)
    yield "float", good.astype(np.float32) / 255, ["float32", "uint8"]
    yield "nan", with_nan, ["float32", "uint8"]
    yield "int64", good.astype(np.int64), ["int64", "uint8"]
    yield "bool", good > 127, ["bool", "uint8"]
    yield "text", np.array(["a", "b"]), ["uint8"]
    yield "record", np.zeros(4, [("a", np.uint8)]), ["uint8"]
    yield "scalar", np.uint8(3), ["shape []"]
    yield "flat", good.reshape(4, -1), ["[4, 768]", "[N, H, W, C]"]
    yield "5d", good[None], ["[1, 4, 16, 16, 3]"]
    yield "empty", good[:0], ["no images"]
    yield "no pixels", good[:, :0, :0], ["0x0", "--side"]
    yield "planar", good.transpose(0, 3, 1, 2), ["[4, 3, 16, 16]", "channels come last"]
    yield "two channels", good[..., :2], ["[4, 16, 16, 2]"]
    yield "rgba", np.concatenate([good, good[..., :1]], -1), ["[4, 16, 16, 4]"]
    yield "not square", good[:, :8], ["8x16", "16x16", "--side 8x16"]
    yield "side", pixels(4, side=32), ["32x32", "16x16", "--side 32"]
    yield "grey", good[..., :1], ["1 channel", "--channels 1"]
    yield "grey 3d", good[..., 0], ["1 channel", "--channels 1"]


@pytest.mark.parametrize("suffix", ["npy", "npz"])
@pytest.mark.parametrize(("array", "words"), [pytest.param(a, w, id=name) for name, a, w in wrong_arrays()])
def test_arrays_are_never_converted_silently(tmp_path, suffix, array, words):
    path = tmp_path / f"a.{suffix}"
    np.save(path, array) if suffix == "npy" else np.savez(path, array)
    with refused(path, *words):
        load(path, side=16, channels=3)


def test_colour_into_a_grey_configuration(tmp_path):
    np.save(tmp_path / "a.npy", pixels(4))
    with refused(tmp_path / "a.npy", "3 channel", "--channels 3"):
        load(tmp_path / "a.npy", side=16, channels=1)


class Trap:
    """Unpickling it leaves a file behind."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_pickled_objects_in_numpy_files_are_refused_unread(tmp_path):
    trap = np.array([Trap(tmp_path / "sprung")], object)
    np.save(tmp_path / "a.npy", trap, allow_pickle=True)
    np.savez(tmp_path / "a.npz", train=trap)
    trap.dump(tmp_path / "b.npy")  # a bare pickle under the name of an array
    for name in ("a.npy", "a.npz", "b.npy"):
        with refused(tmp_path / name):
            load(tmp_path / name, side=16, channels=3)
    assert not (tmp_path / "sprung").exists()


def test_damaged_numpy_files(tmp_path):
    np.save(tmp_path / "whole.npy", pixels(4))
    np.savez(tmp_path / "whole.npz", train=pixels(4))
    for suffix in ("npy", "npz"):
        whole = (tmp_path / f"whole.{suffix}").read_bytes()
        path = tmp_path / f"a.{suffix}"
        for damaged in (b"", whole[:3], whole[:100], whole[:-1], b"junk" * 100):
            path.write_bytes(damaged)
            with refused(path, "not a readable"):
                load(path, side=16, channels=3)


def test_a_header_that_claims_terabytes(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (10**9, 16, 16, 3)})
    (tmp_path / "a.npy").write_bytes(header.getvalue() + bytes(768))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("train.npy", header.getvalue() + bytes(768))
    for name in ("a.npy", "a.npz"):
        with refused(tmp_path / name, "not a readable"):
            load(tmp_path / name, side=16, channels=3)


def test_exchanged_suffixes(tmp_path):
    np.save(tmp_path / "a.npy", pixels(4))
    np.savez(tmp_path / "b.npz", pixels(4))
    (tmp_path / "a.npy").rename(tmp_path / "a.npz")
    (tmp_path / "b.npz").rename(tmp_path / "b.npy")
    with refused(tmp_path / "a.npz", "rename"):
        load(tmp_path / "a.npz", side=16, channels=3)
    with refused(tmp_path / "b.npy", "rename"):
        load(tmp_path / "b.npy", side=16, channels=3)


# --- stores


def test_a_prepared_store(tmp_path):
    train, test = pixels(6), pixels(3, seed=1)
    np.save(tmp_path / "train.npy", train)
    np.save(tmp_path / "test.npy", test)
    np.save(tmp_path / "val.npy", pixels(2, seed=2))
    (tmp_path / "meta.json").write_text(json.dumps({"side": 16}))
    data = load(tmp_path, side=16, channels=3)
    check_form(data)
    assert data.name == tmp_path.name
    assert np.array_equal(data.train, train) and np.array_equal(data.test, test)
    # In memory, not mapped: another process may rewrite the store.
    np.save(tmp_path / "train.npy", np.zeros_like(train))
    assert np.array_equal(data.train, train)


def test_a_store_that_is_incomplete_or_damaged(tmp_path):
    np.save(tmp_path / "train.npy", pixels(6))
    with refused(tmp_path, "test.npy is missing"):
        load(tmp_path, side=16, channels=3)
    (tmp_path / "test.npy").write_bytes((tmp_path / "train.npy").read_bytes()[:-5])
    with refused(tmp_path / "test.npy", "not a readable"):
        load(tmp_path, side=16, channels=3)
    np.save(tmp_path / "test.npy", pixels(6, side=32))
    with refused(tmp_path, "(test)", "--side 32"):
        load(tmp_path, side=16, channels=3)


# --- paths


def test_paths_with_nothing_usable(tmp_path):
    with refused(tmp_path / "absent", "no such file or folder"):
        load(tmp_path / "absent", side=16, channels=3)
    (tmp_path / "notes.txt").write_text("hello")
    with refused(tmp_path / "notes.txt", "not a data set"):
        load(tmp_path / "notes.txt", side=16, channels=3)
    with refused(tmp_path, "no images"):
        load(tmp_path, side=16, channels=3)
    with refused("path"):
        load("a\0b", side=16, channels=3)
    with refused("two lines", "no such"):
        load(tmp_path / "two lines\nin a name", side=16, channels=3)
    with refused("no such"):
        load("/dev/null", side=16, channels=3)


# --- what holds for all sources


def test_the_digest_is_of_the_pixels_and_their_place(tmp_path):
    train, test = pixels(6), pixels(3, seed=1)

    def digest(train, test):
        np.savez(tmp_path / "a.npz", train=train, test=test)
        return load(tmp_path / "a.npz", side=16, channels=3).digest

    base = digest(train, test)
    np.savez_compressed(tmp_path / "b.npz", train=np.asfortranarray(train), test=test)
    assert load(tmp_path / "b.npz", side=16, channels=3).digest == base
    altered = train.copy()
    altered[5, 15, 15, 2] ^= 1
    together = np.concatenate([train, test])
    others = [digest(altered, test), digest(train[::-1], test), digest(together[:5], together[5:])]
    assert len({base, *others}) == 4


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_roundtrip_is_pillow_at_quality_75_with_halved_chroma(tmp_path, channels):
    train, test = (np.repeat(np.repeat(pixels(5, 8, channels, seed), 2, 1), 2, 2) for seed in (0, 1))
    np.savez(tmp_path / "a.npz", train=train, test=test)
    data = load(tmp_path / "a.npz", side=16, channels=channels, jpeg_roundtrip=True)
    check_form(data, channels=channels)
    for before, after in ((train, data.train), (test, data.test)):
        for image, result in zip(before, after, strict=True):
            Image.fromarray(image.squeeze()).save(tmp_path / "a.jpg", quality=75, subsampling="4:2:0")
            assert np.array_equal(np.asarray(Image.open(tmp_path / "a.jpg")).reshape(image.shape), result)
        assert not np.array_equal(before, after)
    assert data.digest != load(tmp_path / "a.npz", side=16, channels=channels).digest


# --- damage at random


@pytest.fixture(scope="module")
def victims(tmp_path_factory):
    folder = tmp_path_factory.mktemp("victims")
    np.save(folder / "a.npy", pixels(3, side=4))
    np.savez(folder / "a.npz", train=pixels(3, side=4), test=pixels(2, side=4))
    np.savez_compressed(folder / "b.npz", train=pixels(3, side=4) // 64)
    return folder, {name: (folder / name).read_bytes() for name in ("a.npy", "a.npz", "b.npz")}


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(["a.npy", "a.npz", "b.npz"]),
    changes=st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), max_size=8),
    kept=st.floats(0.5, 1.5),
)
@pytest.mark.filterwarnings("ignore")
def test_mutated_files_load_or_are_refused(victims, name, changes, kept):
    folder, originals = victims
    data = bytearray(originals[name])
    for position, value in changes:
        data[position % min(len(data), 400)] = value  # headers lie at the start
    data = data[: int(kept * len(data))]
    (folder / f"mutated-{name}").write_bytes(data)
    try:
        check_form(load(folder / f"mutated-{name}", side=4, channels=3), side=4)
    except UserError as error:
        assert len(str(error).splitlines()) == 1 and f"mutated-{name}" in str(error)
