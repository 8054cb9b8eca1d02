"""Sets of images from every kind of source, and what is refused of them."""

import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bvae.data import jpeg
from bvae.errors import UserError
from bvae.metrics import sources
from bvae.metrics.protocols import stretch
from bvae.metrics.sources import ArrayImages, ChangedImages, Images, open_images
from bvae.metrics.statistics import Statistics

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (7, 6, 8, 3), np.uint8)  # higher than wide: nothing is cropped


def pixels_of(images: Images | Statistics, rank: int = 0, ranks: int = 1) -> np.ndarray:
    assert isinstance(images, Images)
    batches = list(images.batches(rank, ranks))
    return torch.cat(batches).numpy() if batches else np.empty((0, 6, 8, 3), np.uint8)


def png(pixels: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(data, "PNG")
    return data.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images" / "below").mkdir(parents=True)
    for i, image in enumerate(PIXELS):
        (tmp_path / "images" / ("below" if i > 4 else ".") / f"{i}.png").write_bytes(png(image))
    (tmp_path / "images" / "notes.txt").touch()
    return tmp_path / "images"


def test_a_folder_and_a_zip_of_it_are_the_same(folder: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for file in sorted(folder.rglob("*"), reverse=True):
            archive.write(file, file.relative_to(folder))
    one, other = open_images(str(folder)), open_images(str(tmp_path / "images.zip"))
    assert isinstance(one, Images) and isinstance(other, Images)
    assert one.n == other.n == 7 and one.digest() == other.digest()
    np.testing.assert_array_equal(pixels_of(one), PIXELS)
    np.testing.assert_array_equal(pixels_of(other), PIXELS)
    np.testing.assert_array_equal(pixels_of(one.first(3)), PIXELS[:3])
    assert one.first(3).digest() != one.digest() and one.first(3).n == 3


@pytest.mark.parametrize(
    ("name", "arrays"),
    [
        ("x.npy", None),
        ("x.npz", {"anything": PIXELS}),
        ("x.npz", {"images": PIXELS, "labels": np.zeros(7)}),
        ("x.npz", {"x_train": PIXELS[:2], "x_test": PIXELS}),
        ("x.npz:train", {"train": PIXELS, "test": PIXELS[:2]}),
    ],
)
def test_arrays(name: str, arrays: dict | None, tmp_path: Path) -> None:
    path = tmp_path / name.split(":")[0]
    if arrays:
        np.savez(path, **arrays)
    else:
        np.save(path, PIXELS)
    images = open_images(str(tmp_path / name))
    assert isinstance(images, Images)
    np.testing.assert_array_equal(pixels_of(images), PIXELS)
    assert images.digest() == ArrayImages(PIXELS, "x").digest()


def test_a_store_gives_its_test_split_unless_told(tmp_path: Path) -> None:
    np.save(tmp_path / "train.npy", PIXELS[:4])
    np.save(tmp_path / "test.npy", PIXELS[4:])
    np.testing.assert_array_equal(pixels_of(open_images(str(tmp_path))), PIXELS[4:])
    np.testing.assert_array_equal(pixels_of(open_images(f"{tmp_path}:train")), PIXELS[:4])
    with pytest.raises(UserError, match=r"has no val, only train and test"):
        open_images(f"{tmp_path}:val")


def test_floats_come_as_they_are(tmp_path: Path) -> None:
    floats = RNG.random((5, 4, 4, 3))
    np.save(tmp_path / "x.npy", floats)
    images = open_images(str(tmp_path / "x.npy"))
    np.testing.assert_allclose(pixels_of(images), floats.transpose(0, 3, 1, 2), rtol=1e-6)
    assert isinstance(images, Images) and images.digest() != ArrayImages(floats.astype(np.float32), "x").digest()


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_ranks_share_all_images(ranks: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "READ", 2)
    for images in (open_images(str(folder)), ArrayImages(PIXELS, "x")):
        parts = np.concatenate([pixels_of(images, rank, ranks) for rank in range(ranks)])
        assert sorted(p.tobytes() for p in parts) == sorted(p.tobytes() for p in PIXELS)


def test_changes_are_made_on_the_way() -> None:
    images = ArrayImages(PIXELS, "x")
    np.testing.assert_array_equal(pixels_of(ChangedImages(images, True, False)), jpeg.roundtrip(PIXELS))
    expected = stretch(torch.from_numpy(jpeg.roundtrip(PIXELS)))
    np.testing.assert_array_equal(pixels_of(ChangedImages(images, True, True)), expected)


def test_grey_images_are_taken_only_where_asked(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", PIXELS[..., :1])
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.png").write_bytes(png(PIXELS[0, ..., 0]))
    (tmp_path / "folder" / "b.png").write_bytes(png(PIXELS[1]))
    for name in ("x.npy", "folder"):
        with pytest.raises(UserError, match="grey images, where the network expects colour"):
            images = open_images(str(tmp_path / name))
            assert isinstance(images, Images)
            images.digest()
    assert pixels_of(open_images(str(tmp_path / "x.npy"), grey=True)).shape == (7, 6, 8, 1)
    assert pixels_of(open_images(str(tmp_path / "folder"), grey=True)).shape == (2, 6, 8, 3)


class Code:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


BAD = {
    "missing": "no such file",
    "nothing": "no images",
    "text.npy": "not a readable NumPy file",
    "wide.npy": "[N,H,W,3] is expected",
    "planar.npy": "channels come last",
    "no images.npy": "holds no images",
    "integers.npy": "int64",
    "big floats.npy": "found 0 to 255; pixels in 0..255 are given as uint8",
    "negative.npy": "must be in [0,1], found -1",
    "nan.npy": "not finite",
    "objects.npy": "not a readable NumPy file",
    "truncated.npz": "not a readable NumPy archive",
    "objects.npz": "not a readable array",
    "two.npz": "which array?",
    "code.pkl": "a pickle, which could run code",
    "sizes": "images of different sizes (8x6 and 4x4",
    "damaged": "b.png",
    "deep": "deeper than 8 bits",
    "x.npy:train": "no splits",
}


@pytest.mark.parametrize("name", BAD)
def test_refuses_in_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("nothing", "sizes", "damaged", "deep"):
        Path(folder).mkdir()
        if folder != "nothing":
            Path(folder, "a.png").write_bytes(png(PIXELS[0]))
    Path("sizes", "b.png").write_bytes(png(PIXELS[1, :4, :4]))
    Path("damaged", "b.png").write_bytes(png(PIXELS[1])[:100])
    Image.fromarray(PIXELS[0, ..., 0].astype(np.uint16) * 100).save("deep/b.png")
    Path("text.npy").write_text("hello")
    floats = RNG.random((3, 4, 4, 3))
    arrays = {
        "x": PIXELS,
        "wide": PIXELS[..., :2],
        "planar": PIXELS.transpose(0, 3, 1, 2),
        "no images": PIXELS[:0],
        "integers": PIXELS.astype(np.int64),
        "big floats": np.linspace(0, 255, 48).reshape(1, 4, 4, 3),
        "negative": np.where(floats > 0.5, -1, floats),
        "nan": np.where(floats > 0.5, np.nan, floats),
        "objects": np.array([Code(tmp_path / "ran")]),
    }
    for key, array in arrays.items():
        np.save(f"{key}.npy", array)
    np.savez("truncated.npz", PIXELS)
    os.truncate("truncated.npz", 700)
    np.savez("objects.npz", arrays["objects"])
    np.savez("two.npz", a=PIXELS, b=PIXELS)
    Path("code.pkl").write_bytes(pickle.dumps(Code(tmp_path / "ran")))
    with pytest.raises(UserError) as refused:
        images = open_images(name)
        assert isinstance(images, Images)
        images.digest()
        list(images.batches())
    text = str(refused.value)
    assert BAD[name] in text and name.split(":")[0].split(".")[0] in text and "\n" not in text
    assert not (tmp_path / "ran").exists()
