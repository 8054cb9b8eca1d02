import io
import os
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bvae.data import load
from bvae.data.archive import open_source
from bvae.data.decoders.pillow import decode_image
from bvae.data.recipe import Recipe
from bvae.errors import UserError


def picture(height=24, width=40, seed=0):
    """A smooth colour image: what JPEG and resizing keep."""
    y, x = np.mgrid[0:height, 0:width]
    phase = np.random.default_rng(seed).random(3) * 6
    return (127 + 60 * np.sin(x[..., None] / 7 + phase) + 60 * np.cos(y[..., None] / 5 + phase)).astype(np.uint8)


def read_image(path, side, channels):
    return decode_image(path.read_bytes(), Recipe(size=side, channels=channels))


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def refused(path, *words, side=16, channels=3):
    with pytest.raises(UserError) as caught:
        load(path, side=side, channels=channels)
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    for word in words:
        assert str(word) in text


def test_all_formats_anywhere_below_in_the_order_of_their_names(tmp_path):
    names = ["a.png", "b.JPG", "c/d.webp", "c/e.bmp", "f.ppm", "g/h/i.tiff", "j.gif", "k.jpeg"]
    for seed, name in enumerate(names):
        save(tmp_path / name, picture(seed=seed))
    for name in ("notes.txt", ".hidden.png", "._a.png", ".cache/x.png", "Thumbs.db"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("no image")
    assert [item.name for item in open_source(tmp_path).items] == names
    data = load(tmp_path, side=16, channels=3)
    assert data.name == tmp_path.name and data.factors is None
    assert len(data.train) == 7 and len(data.test) == 1
    one_by_one = [read_image(tmp_path / name, 16, 3) for name in names]
    assert sorted(map(bytes, [*data.train, *data.test])) == sorted(map(bytes, one_by_one))
    for seed, (name, image) in enumerate(zip(names, one_by_one, strict=True)):
        square = Image.fromarray(picture(seed=seed)[:, 8:32]).resize((16, 16), Image.Resampling.BILINEAR)
        # GIF keeps 256 colours, JPEG and WebP lose some.
        assert np.abs(image.astype(int) - np.asarray(square)).mean() < 8, name


def test_train_and_test_folders(tmp_path):
    for part, seeds in (("train", (0, 1, 2)), ("test", (3, 4))):
        for seed in seeds:
            save(tmp_path / part / f"{seed}.png", picture(16, 16, seed))
    save(tmp_path / "stray.png", picture())
    refused(tmp_path, "stray.png", "--partition folders")
    data = load(tmp_path, side=16, channels=3, partition="folders")
    assert any("1 image beside the splits left out" in note for note in data.notes)
    assert np.array_equal(data.train, np.stack([picture(16, 16, seed) for seed in (0, 1, 2)]))
    whole = load(tmp_path, side=16, channels=3, partition="none")
    assert len(whole.train) + len(whole.test) == 6
    (tmp_path / "stray.png").unlink()
    assert np.array_equal(data.test, np.stack([picture(16, 16, seed) for seed in (3, 4)]))
    for file in (tmp_path / "test").iterdir():
        file.unlink()
    refused(tmp_path, tmp_path / "test", "no images")
    (tmp_path / "test").rmdir()
    data = load(tmp_path, side=16, channels=3)
    assert len(data.train) == 2 and len(data.test) == 1


@pytest.mark.parametrize(("height", "width"), [(24, 40), (40, 24), (25, 40), (16, 16)])
def test_the_centre_is_cropped(tmp_path, height, width):
    array = picture(height, width)
    save(tmp_path / "a.png", array)
    edge = min(height, width)
    top, left = (height - edge) // 2, (width - edge) // 2
    assert np.array_equal(read_image(tmp_path / "a.png", edge, 3), array[top : top + edge, left : left + edge])


def test_resizing_antialiases(tmp_path):
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    save(tmp_path / "a.png", np.repeat(board[..., None], 3, -1))
    assert np.abs(read_image(tmp_path / "a.png", 16, 3).astype(int) - 127).max() <= 3


def test_exif_orientation_is_honoured(tmp_path):
    array = picture(16, 16)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated clockwise
    save(tmp_path / "a.png", array, exif=exif)
    assert np.array_equal(read_image(tmp_path / "a.png", 16, 3), np.rot90(array, -1))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_modes_become_rgb_or_grey(tmp_path, mode):
    image = Image.fromarray(picture(16, 16)).convert(mode)
    suffix = "tiff" if mode == "CMYK" else "png"
    image.save(tmp_path / f"a.{suffix}")
    image.save(tmp_path / f"b.{suffix}")
    for channels, target in ((3, "RGB"), (1, "L")):
        data = load(tmp_path, side=16, channels=channels)
        assert data.train.shape == (1, 16, 16, channels)
        assert np.array_equal(data.train[0].squeeze(), np.asarray(image.convert(target)))


@pytest.mark.parametrize("array", [picture()[..., 0].astype(np.uint16), picture()[..., 0].astype(np.float32)])
def test_deeper_images_are_refused_not_clipped(tmp_path, array):
    save(tmp_path / "a.tiff", array)
    save(tmp_path / "b.png", picture())
    refused(tmp_path, tmp_path / "a.tiff", "8 bits")


def test_one_bad_file_is_named(tmp_path):
    for seed in range(4):
        save(tmp_path / f"{seed}.png", picture(seed=seed))
    whole = (tmp_path / "2.png").read_bytes()
    damage = (
        (b"", "empty"),
        (b"no image at all", "not an image"),
        (whole[:20], ""),
        (whole[: len(whole) // 2], "decoded"),
    )
    for damaged, word in damage:
        (tmp_path / "2.png").write_bytes(damaged)
        refused(tmp_path, tmp_path / "2.png", word)
    (tmp_path / "2.png").unlink()
    (tmp_path / "2.png").symlink_to(tmp_path / "nowhere")
    refused(tmp_path, tmp_path / "2.png", "cannot be read")


def test_a_truncated_jpeg_is_named(tmp_path):
    save(tmp_path / "a.jpg", picture(200, 200))
    save(tmp_path / "b.png", picture())
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(whole[: len(whole) // 2])
    refused(tmp_path, tmp_path / "a.jpg", "cannot be decoded")


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("edge", [8193, 2**15, 2**30])
def test_a_decompression_bomb_is_refused(tmp_path, edge, recwarn):
    save(tmp_path / "b.png", picture())
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", edge, edge, 8, 2, 0, 0, 0))
    (tmp_path / "a.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )
    refused(tmp_path, tmp_path / "a.png", "pixels")
    assert not recwarn.list  # a warning would be a second line


def test_postscript_behind_an_image_suffix_starts_nothing(tmp_path):
    save(tmp_path / "b.png", picture())
    (tmp_path / "a.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n")
    refused(tmp_path, tmp_path / "a.png", "not an image")


def test_folders_with_too_little(tmp_path):
    refused(tmp_path, tmp_path, "no images", ".png")
    save(tmp_path / "a.png", picture())
    refused(tmp_path, tmp_path, "single image")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read(tmp_path):
    save(tmp_path / "sub" / "a.png", picture())
    (tmp_path / "sub").chmod(0)
    refused(tmp_path, tmp_path / "sub", "Permission denied")
    refused(tmp_path / "sub", tmp_path / "sub", "Permission denied")
    (tmp_path / "sub").chmod(0o700)


@pytest.fixture(scope="module")
def victim(tmp_path_factory):
    folder = tmp_path_factory.mktemp("victim")
    save(folder / "good.png", picture())
    originals = {}
    for suffix in ("png", "jpg", "webp", "bmp", "gif", "tiff"):
        buffer = io.BytesIO()
        Image.fromarray(picture()).save(buffer, Image.registered_extensions()[f".{suffix}"])
        originals[suffix] = buffer.getvalue()
    return folder, originals


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    suffix=st.sampled_from(["png", "jpg", "webp", "bmp", "gif", "tiff"]),
    changes=st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), max_size=6),
    kept=st.one_of(st.just(1.0), st.floats(0, 1)),
)
def test_mutated_images_load_or_are_refused(victim, suffix, changes, kept):
    folder, originals = victim
    data = bytearray(originals[suffix])
    for position, value in changes:
        data[position % min(len(data), 600)] = value
    path = folder / f"mutated.{suffix}"
    path.write_bytes(data[: int(kept * len(data))])
    try:
        assert load(folder, side=16, channels=3).train.shape == (1, 16, 16, 3)
    except UserError as error:
        assert len(str(error).splitlines()) == 1 and str(path) in str(error)
    finally:
        path.unlink()
