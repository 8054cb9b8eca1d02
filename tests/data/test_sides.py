"""Images whose height and width differ, from the recipe to the data set; sets made of arrays; images held out."""

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pictures import encode, picture, write_folder
from PIL import Image
from refusals import refused
from test_data_prep import write_mnist

from bvae.data import Dataset, Store, load, prep
from bvae.data.arrays import Rows
from bvae.data.decoders import jpeg, resize
from bvae.data.decoders.dali import DaliDecoder
from bvae.data.decoders.pillow import decode_image
from bvae.data.recipe import FILTERS, Recipe, Rejected
from bvae.errors import UserError


@pytest.mark.parametrize(
    ("size", "crop", "width", "height", "box"),
    [
        ((96, 64), "square", 178, 218, (16, 0, 161, 218)),  # 2:3; the height decides: 218 * 64 // 96 = 145 wide
        ((64, 96), "square", 178, 218, (0, 50, 178, 168)),  # the width decides: 178 * 64 // 96 = 118 high
        ((1, 50), "square", 10, 10, (0, 4, 10, 5)),  # never less than a pixel
        ((96, 64), 100, 178, 218, (39, 34, 139, 184)),  # the shorter side is 100
        ((64, 96), 100, 178, 218, (14, 59, 164, 159)),
        ((64, 96), "none", 178, 218, (0, 0, 178, 218)),
    ],
)
def test_the_crop_has_the_results_aspect(size, crop, width, height, box):
    assert Recipe(size=size, channels=3, crop=crop).box(width, height) == box


def test_two_equal_sides_are_one():
    assert Recipe(size=(64, 64), channels=3) == Recipe(size=64, channels=3)
    assert Recipe(size=(96, 64), channels=1).shape == (96, 64, 1)
    with pytest.raises(Rejected, match="is 178x170, smaller than the crop of 120x180"):
        Recipe(size=(96, 64), channels=3, crop=120).box(178, 170)
    for wrong in ((0, 8), (8,), (8, 8, 8), (8, 2**20), (8.0, 4), "8x4"):
        with pytest.raises(UserError, match="size"):
            Recipe(size=wrong, channels=3)


@pytest.mark.parametrize("built", [True, False])
@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("filter", FILTERS)
def test_each_side_is_resized_by_itself(filter, antialias, built, monkeypatch):
    """Rows then columns: the same as to a square of either length, of which the other is not looked at."""
    if not built:
        monkeypatch.setattr(resize, "native", None)
        monkeypatch.setattr(jpeg, "jpeg_version", lambda: None)
    pixels = picture(70, 50)
    wide = resize.resize(Image.fromarray(pixels), (21, 34), filter, antialias)
    assert wide.shape == (21, 34, 3)
    rows = resize.resize(np.ascontiguousarray(pixels), (70, 34), filter, antialias)
    assert np.array_equal(wide, resize.resize(np.ascontiguousarray(rows), (21, 34), filter, antialias))
    for data in (encode(pixels, "JPEG"), encode(pixels), encode(pixels[..., 0], "JPEG")):
        recipe = Recipe(size=(21, 34), channels=3, crop=20, filter=filter, antialias=antialias)
        whole = Image.open(io.BytesIO(data)).convert("RGB").crop(recipe.box(50, 70))
        assert whole.size == (32, 20)
        assert np.array_equal(decode_image(data, recipe), resize.resize(whole, (21, 34), filter, antialias))


def test_pillow_agrees_where_it_is_asked():
    pixels = picture(90, 60)
    for filter in ("bilinear", "bicubic"):
        theirs = np.asarray(Image.fromarray(pixels).resize((24, 32), resize.RESAMPLING[filter]))
        ours = resize.resize(Image.fromarray(pixels), (32, 24), filter, True)
        assert np.abs(ours.astype(int) - theirs).max() <= 1


def test_dali_resizes_to_both_sides():
    recipe = Recipe(size=(12, 20), channels=1)
    decoder = SimpleNamespace(recipe=recipe)
    ((place, pixels),) = DaliDecoder._resize(decoder, [3], [picture(24, 40)])
    assert place == 3 and pixels.shape == recipe.shape


def test_a_store_of_another_aspect_and_the_folder_it_came_from_are_one_set(tmp_path, capsys):
    write_folder(tmp_path / "in", {f"{n:02}.jpg": encode(picture(40, 30, n), "JPEG") for n in range(12)})
    prep.main([str(tmp_path / "in"), "--out", str(tmp_path / "s"), "--size", "24x16", "--workers", "1"])
    store = Store.open(tmp_path / "s", verify=True)
    assert store.train.shape == (11, 24, 16, 3) and store.meta["recipe"]["size"] == [24, 16]
    for source in ("in", "s"):
        data = load(tmp_path / source, side=(24, 16), channels=3)
        assert data.digest == store.digest and data.test.shape == (1, 24, 16, 3)
    refused(lambda: load(tmp_path / "s", side=(16, 24), channels=3), "24x16", "--side 24x16")
    refused(lambda: load(tmp_path / "s", side=16, channels=3), "--side 24x16")
    prep.main([str(tmp_path / "in"), "--size", "24x16", "--preview", str(tmp_path / "p.png")])
    with Image.open(tmp_path / "p.png") as preview:
        assert preview.height == 4 + 6 * (192 + 4) and preview.width == 168 + 6 * (128 + 4)
    with pytest.raises(SystemExit):
        prep.main([str(tmp_path / "in"), "--size", "24x", "--out", str(tmp_path / "t")])
    assert "HxW" in capsys.readouterr().err


def test_a_square_store_says_what_it_always_did(tmp_path):
    write_folder(tmp_path / "in", {f"{n}.png": encode(picture(40, 30, n)) for n in range(3)})
    prep.main([str(tmp_path / "in"), "--out", str(tmp_path / "s"), "--size", "16x16", "--workers", "1"])
    recipe = json.loads((tmp_path / "s" / "meta.json").read_text())["recipe"]
    assert recipe == {"size": 16, "channels": 3, "crop": "square", "filter": "bilinear", "antialias": True}


def test_mnist_as_it_is_and_padded(tmp_path):
    train, test = write_mnist(tmp_path / "mnist")
    data = load(tmp_path / "mnist", side=28, channels=1)
    assert np.array_equal(data.train[..., 0], train) and np.array_equal(data.test[..., 0], test)
    padded = load(tmp_path / "mnist", side=32, channels=1)
    assert np.array_equal(padded.train, np.pad(data.train, ((0, 0), (2, 2), (2, 2), (0, 0))))
    for side in (30, 64, (28, 32), 14):
        refused(lambda side=side: load(tmp_path / "mnist", side=side, channels=1), "28x28", "32x32")
    prep.main([str(tmp_path / "mnist"), "--out", str(tmp_path / "s"), "--size", "28"])
    store = Store.open(tmp_path / "s")
    assert store.digest == data.digest and store.meta["recipe"] == {"size": 28, "channels": 1, "padding": 0}


def test_shapes_are_square():
    refused(lambda: load(None, side=(32, 16), channels=3), "shapes", "square", "32x16")
    assert load(None, side=(16, 16), channels=3, num_train=2, num_test=1).train.shape == (2, 16, 16, 3)


# --- from arrays


def images(count, shape=(6, 9, 3), seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), np.uint8)


def test_arrays_and_tensors_are_the_set_that_their_file_is(tmp_path):
    train = images(40)
    np.save(tmp_path / "a.npy", train)
    loaded = load(tmp_path / "a.npy", side=(6, 9), channels=3, seed=5)
    for given in (train, torch.from_numpy(train), np.asfortranarray(train)):
        data = Dataset.from_arrays(given, seed=5)
        assert data.digest == loaded.digest and data.name == "arrays" and len(data.test) == 4
        assert np.array_equal(data.train, loaded.train) and data.train.flags.c_contiguous
    assert Dataset.from_arrays(train, seed=6).digest != loaded.digest
    both = Dataset.from_arrays(train, train[:7], name="mine")
    assert both.name == "mine" and np.array_equal(both.test, train[:7]) and len(both.train) == 40


def test_grey_arrays_get_their_channel_and_read_only_ones_a_copy():
    grey = images(10, (5, 7))
    grey.setflags(write=False)
    data = Dataset.from_arrays(grey, grey[:3])
    assert data.train.shape == (10, 5, 7, 1) and data.test.shape == (3, 5, 7, 1) and data.train.flags.writeable


def test_mapped_arrays_stay_on_the_disk(tmp_path):
    np.save(tmp_path / "a.npy", images(30))
    data = Dataset.from_arrays(np.load(tmp_path / "a.npy", mmap_mode="r"))
    assert isinstance(data.train, Rows) and isinstance(data.train.base, np.memmap)
    assert data.digest == load(tmp_path / "a.npy", side=(6, 9), channels=3).digest


@pytest.mark.parametrize(
    ("train", "test", "words"),
    [
        (images(4).astype(np.float32), None, ["arrays (train)", "float32", "uint8"]),
        (torch.zeros(4, 6, 9, 3), None, ["float32"]),
        (images(4).transpose(0, 3, 1, 2), None, ["channels come last"]),
        (images(4, (6, 9, 4)), None, ["1 or 3 channels"]),
        (images(4, (54,)), None, ["[4, 54]"]),
        (images(1), None, ["single image"]),
        (images(4)[:0], None, ["no images"]),
        (images(4), images(3, (9, 6, 3)), ["6x9x3", "9x6x3"]),
        (images(4), images(3, (6, 9)), ["6x9x3", "6x9x1"]),
        (images(4), images(4)[:0], ["arrays (test)", "no images"]),
        (images(4).tolist(), None, ["list"]),
        ("a.npy", None, ["str"]),
    ],
)
def test_other_arrays_are_refused(train, test, words):
    refused(lambda: Dataset.from_arrays(train, test), *words)


# --- held out for validation


@pytest.mark.parametrize("mapped", [False, True])
def test_images_held_out_are_taken_from_train(tmp_path, mapped):
    np.save(tmp_path / "a.npy", images(60))
    data = load(tmp_path / "a.npy", side=(6, 9), channels=3, mapped=mapped)
    held = data.hold_out(10, seed=3)
    assert held.digest == data.digest and held.val.shape == (10, 6, 9, 3) and len(held.train) == 44
    assert np.array_equal(held.test, data.test) and data.val is None and len(data.train) == 54
    rows = [image.tobytes() for image in np.asarray(data.train)]
    kept, taken = ([image.tobytes() for image in np.asarray(part)] for part in (held.train, held.val))
    assert sorted(kept + taken) == sorted(rows)
    assert kept == [row for row in rows if row in set(kept)] and taken == [row for row in rows if row in set(taken)]
    assert isinstance(held.train, Rows) == mapped
    again, other = data.hold_out(10, seed=3), data.hold_out(10, seed=4)
    assert np.array_equal(again.val, held.val) and not np.array_equal(other.val, held.val)


def test_a_mapped_store_can_hold_images_out(tmp_path):
    np.save(tmp_path / "train.npy", images(20))
    np.save(tmp_path / "test.npy", images(5, seed=1))
    held = load(tmp_path, side=(6, 9), channels=3, mapped=True).hold_out(4)
    assert isinstance(held.train, Rows) and len(held.train) == 16 and len(held.val) == 4


def test_factors_go_with_their_images():
    data = load(None, side=16, channels=3, num_train=30, num_test=5)
    held = data.hold_out(6, seed=1)
    for part, factors in ((held.train, held.factors.train), (held.val, held.factors.val)):
        for image, row in zip(part, factors, strict=True):
            (number,) = [n for n in range(30) if np.array_equal(data.factors.train[n], row)]
            assert np.array_equal(data.train[number], image)


def test_what_cannot_be_held_out():
    data = Dataset.from_arrays(images(10), images(2))
    for wrong in (0, -1, 10, 11):
        refused(lambda wrong=wrong: data.hold_out(wrong), "--val", "1 to 9", wrong)
    refused(lambda: data.hold_out(2).hold_out(2), "held out", "already")
