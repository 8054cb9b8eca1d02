"""What FID refuses it refuses before the network has seen an image, by the rules of preparing; what it does not know it
does not say."""

import gzip
import importlib.util
import json
import os
import struct
import zlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from inception_samples import QuickNetwork
from PIL import Image

from bvae import fid as fid_command
from bvae.data.decoders.pillow import decode_image
from bvae.data.recipe import Recipe
from bvae.errors import UserError
from bvae.metrics import sources
from bvae.metrics.cache import default_folder
from bvae.metrics.extract import Extractor
from bvae.metrics.frechet import frechet_distance
from bvae.metrics.measure import real_floor
from bvae.metrics.protocols import PROTOCOLS
from bvae.metrics.sources import ArrayImages, EncodedImages, Images, open_images
from bvae.metrics.statistics import fid

RNG = np.random.default_rng(3)
PIXELS = RNG.integers(0, 256, (12, 6, 8, 3), np.uint8)
MORE = ("--allow-few", "--no-cache")


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("statistics") / "known.npz"
    np.savez(path, mu=np.zeros(2048), sigma=np.eye(2048, dtype=np.float16))
    return path


@pytest.fixture
def tool(tmp_path: Path, known: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The command in a folder with images `a` and `b` and statistics, with a quick network that counts its batches."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BVAE_CACHE", str(tmp_path / "cache"))
    Path("weights.pth").touch()
    monkeypatch.setenv("BVAE_INCEPTION", "weights.pth")
    for name, part in (("a", PIXELS[:6]), ("b", PIXELS[6:])):
        Path(name).mkdir()
        for i, image in enumerate(part):
            Image.fromarray(image).save(f"{name}/{i}.png")
    os.link(known, "known.npz")
    network = QuickNetwork()
    monkeypatch.setattr(fid_command, "load_inception", lambda path, device, precision: (network, "sha256:w"))
    monkeypatch.setattr(fid_command, "network", network, raising=False)
    return fid_command


def call(tool: ModuleType, *argv: str) -> dict:
    tool.main([*argv, *MORE, "--json", "out.json"])
    return json.loads(Path("out.json").read_text())


def refused(tool: ModuleType, *argv: str) -> str:
    with pytest.raises(UserError) as error:
        tool.main(list(argv))
    assert tool.network.seen == [], "nothing may have gone through the network"  # type: ignore[attr-defined]
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- refused first --------------------------------------------------------------------------------------------------


def test_a_damaged_image_of_b_is_found_before_a_is_measured(tool: ModuleType) -> None:
    whole = Path("b/3.png").read_bytes()
    Path("b/3.png").write_bytes(whole[: len(whole) // 2])
    assert "B: b: 3.png cannot be decoded" in refused(tool, "a", "b", *MORE)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("a", "b", "--json", "no/a.json"), "cannot write no/a.json"),
        (("a", "--save-stats", "no/a.npz"), "cannot write no/a.npz"),
        (("a", "--save-stats", "stats"), "must end in .npz"),
        (("known.npz", "b", "--json", "known.npz"), "would replace what is measured"),
        (("a", "b", "--json", "a"), "would replace what is measured"),
        (("a", "b", "--prdc", "--num", "5"), "precision and recall need at least 6"),
        (("a", "b", "--num", "1"), "a covariance needs at least 2"),
        (("a", "b", "--drop-last", "7"), "0 image(s)"),
        (("", "b"), "A: the path is empty"),
        (("a", " "), "B: the path is empty"),
        (("a", "--save-stats", "x.npz", "--kid"), "--kid has no effect on --save-stats"),
        (("a", "--save-stats", "x.npz", "--json", "x.json"), "--json has no effect"),
        (("a", "--save-stats", "x.npz", "--stretch"), "--stretch has no effect"),
        (("a", "b", "--seed", "3"), "--seed has no effect"),
        (("known.npz", "known.npz", "--num", "5"), "--num has no effect on statistics on both sides"),
        (("known.npz", "known.npz", "--batch-size", "5"), "--batch-size has no effect"),
        (("known.npz", "known.npz", "--kid"), "need images"),
    ],
)
def test_what_cannot_be_done_is_refused_first(tool: ModuleType, argv: tuple[str, ...], said: str) -> None:
    assert said in refused(tool, *argv, "--allow-few")
    assert not list(Path().glob("*.tmp")) and not Path("x.json").exists()


@pytest.mark.parametrize(
    "argv",
    [("--kid", "--seed", "-1"), ("--num", "0"), ("--json", ""), ("--cache", "x", "--no-cache"), ("--inception", "")],
)
def test_values_out_of_range_are_the_parsers_to_refuse(
    tool: ModuleType, argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        tool.main(["a", "b", "--allow-few", *argv])
    assert ended.value.code == 2 and tool.network.seen == []  # type: ignore[attr-defined]
    assert argv[-1] in capsys.readouterr().err


def test_a_set_that_changes_while_it_is_measured_is_not_kept(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save("c.npy", np.repeat(PIXELS, 20, 0))
    forward = tool.network.forward  # type: ignore[attr-defined]

    def touch(x: torch.Tensor) -> torch.Tensor:
        np.save("c.npy", np.repeat(PIXELS[::-1], 20, 0))
        return forward(x)

    monkeypatch.setattr(tool.network, "forward", touch)  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"A: .*c\.npy: has changed while it was read"):
        tool.main(["c.npy", "b", "--allow-few"])
    assert not list(Path("cache").rglob("*.npz"))


def test_names_with_markup_are_names(tool: ModuleType) -> None:
    Path("a [").mkdir()
    os.rename("a", "a [/bold] [red")
    assert call(tool, "a [/bold] [red", "b")["n_reference"] == 6


# ---- the rules of preparing -----------------------------------------------------------------------------------------


def png16(pixels: np.ndarray, colour: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["rgb", "grey and alpha", "ppm"])
def test_more_than_8_bits_are_refused_as_in_preparing(tool: ModuleType, kind: str) -> None:
    deep = PIXELS[0].astype(np.uint16) * 4
    data = {
        "rgb": png16(deep, 2),
        "grey and alpha": png16(deep[..., :2], 4),
        "ppm": b"P6 8 6 65535\n" + deep.astype(">u2").tobytes(),
    }[kind]
    Path("b/2.png").write_bytes(data)
    assert "B: b: 2.png is deeper than 8 bits" in refused(tool, "a", "b", *MORE)


def test_pixels_are_those_of_preparing(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = Image.fromarray(PIXELS[0])
    upright.rotate(90, expand=True).save(tmp_path / "0.png", exif=exif)
    upright.convert("RGBA").save(tmp_path / "1.png")
    upright.convert("P").save(tmp_path / "2.gif")
    upright.convert("CMYK").save(tmp_path / "3.tif")
    upright.save(tmp_path / "4.jfif", "JPEG")
    (tmp_path / "5.heic").write_bytes(b"x")
    images = open_images(str(tmp_path))
    assert isinstance(images, Images) and images.n == 5 and images.notes and "5.heic" in images.notes[0]
    (batch,) = images.batches()
    recipe = Recipe(size=(6, 8), channels=3, crop="none")
    for image, file in zip(batch.numpy(), sorted(tmp_path.iterdir()), strict=False):
        np.testing.assert_array_equal(image, decode_image(file.read_bytes(), recipe))
    np.testing.assert_array_equal(batch[:2].numpy(), [PIXELS[0]] * 2)


def test_memory_is_bounded_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(9):
        Image.fromarray(np.full((100, 50, 3), i, np.uint8)).save(tmp_path / f"{i}.png")
    monkeypatch.setattr(sources, "READ_BYTES", 40_000)
    monkeypatch.setattr(sources, "KEPT_BYTES", 0)
    encoded = open_images(str(tmp_path))
    array = ArrayImages(np.stack([np.full((100, 50, 3), i, np.uint8) for i in range(9)]), "x")
    for images in (encoded, array):
        assert isinstance(images, Images)
        images.check()
        assert [len(batch) for batch in images.batches()] == [2, 2, 2, 2, 1]
        assert [int(batch[0, 0, 0, 0]) for batch in images.batches(1, 3)] == [2, 8]
    extractor = Extractor(QuickNetwork(), "sha256:w", PROTOCOLS["tf1"], 4)  # type: ignore[arg-type]
    whole = extractor.features(torch.from_numpy(array.array))
    monkeypatch.setattr("bvae.metrics.extract.PREPARED_BYTES", 100_000)
    prepared: list[int] = []
    prepare = PROTOCOLS["tf1"].prepare
    monkeypatch.setattr(type(PROTOCOLS["tf1"]), "prepare", lambda self, x: (prepared.append(len(x)), prepare(x))[1])
    assert torch.equal(extractor.features(torch.from_numpy(array.array)), whole)
    assert max(prepared) == 1 and len(prepared) == 9


def test_what_was_checked_is_not_decoded_again(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    images = open_images("a")
    assert isinstance(images, EncodedImages)
    images.check()
    monkeypatch.setattr(images, "_decoded", lambda rank, ranks: pytest.fail("decoded twice"))
    np.testing.assert_array_equal(torch.cat(list(images.batches())).numpy(), PIXELS[:6])


@pytest.mark.parametrize("beyond", [1.0000001, -1e-6])
def test_rounding_beyond_0_and_1_is_clipped(beyond: float) -> None:
    floats = np.full((2, 4, 4, 3), beyond, np.float32)
    images = ArrayImages(floats, "x")
    images.digest()
    (batch,) = images.batches()
    assert batch.min() >= 0 and batch.max() <= 1


@pytest.mark.parametrize(
    ("value", "said"),
    [(1.001, "found 1.00100005 to 1.00100005"), (255.0, "uint8"), (-1.0, "[-1,1]"), (1.5, "found 1.5")],
)
def test_other_ranges_are_named(value: float, said: str) -> None:
    with pytest.raises(UserError) as error:
        ArrayImages(np.full((2, 4, 4, 3), value, np.float32), "x").digest()
    assert said in str(error.value) and ("uint8" in str(error.value)) == (value == 255)


# ---- sources --------------------------------------------------------------------------------------------------------


def test_splits_of_folders_lists_and_known_sets(tmp_path: Path) -> None:
    for part, rows in (("train", range(5)), ("test", range(5, 8)), ("extra", range(8, 10))):
        (tmp_path / "set" / part).mkdir(parents=True)
        for i in rows:
            Image.fromarray(PIXELS[i]).save(tmp_path / "set" / part / f"{i}.png")

    def pixels(text: str) -> np.ndarray:
        images = open_images(text, grey=True)
        assert isinstance(images, Images)
        return torch.cat(list(images.batches())).numpy()

    np.testing.assert_array_equal(pixels(f"{tmp_path}/set:train"), PIXELS[:5])
    np.testing.assert_array_equal(pixels(f"{tmp_path}/set:test"), PIXELS[5:8])
    whole = open_images(f"{tmp_path}/set")
    assert isinstance(whole, Images) and whole.n == 10 and any(":test" in note for note in whole.notes)
    for text, said in ((f"{tmp_path}/set:val", "no images for val"), (f"{tmp_path}/set/train:train", "has no splits")):
        with pytest.raises(UserError, match=said):
            open_images(text)
    grey = RNG.integers(0, 256, (4, 28, 28), np.uint8)
    for name, part in (("train", grey[:3]), ("t10k", grey[3:])):
        data = struct.pack(">IIII", 2051, len(part), 28, 28) + part.tobytes()
        (tmp_path / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(data))
    np.testing.assert_array_equal(pixels(f"{tmp_path}:train")[..., 0], grey[:3])
    np.testing.assert_array_equal(pixels(f"{tmp_path}/t10k-images-idx3-ubyte.gz")[..., 0], grey[3:])
    with pytest.raises(UserError, match="--grey"):
        open_images(str(tmp_path))


def test_samples_of_other_tools(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez("samples.npz", arr_0=PIXELS, arr_1=np.zeros(12))
    np.savez("flat.npz", data=np.zeros((5, 3 * 16), np.uint8), labels=np.zeros(5))
    assert call(tool, "samples.npz", "flat.npz")["n"] == 5
    assert "A is of 8x6, B of 4x4" in capsys.readouterr().err


# ---- what a file does not say ---------------------------------------------------------------------------------------


def test_of_foreign_statistics_the_protocol_decides(
    tool: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bvae.metrics.statistics.frechet_distance", lambda *moments: 1.0)  # which takes its time
    for protocol in PROTOCOLS:
        result = call(tool, "known.npz", "b", "--protocol", protocol)
        assert result["protocol"] == protocol and result["unknown_origin"] == ["A"]
        out, err = capsys.readouterr()
        assert f"protocol {protocol}" in out and "A: origin unknown" in out and "does not say how it was made" in err
    assert call(tool, "known.npz", "b")["protocol"] == "tf1"
    tool.main(["b", "--save-stats", "own.npz", "--allow-few", "--protocol", "clean"])
    tool.main(["known.npz", "own.npz", "--allow-few", "--json", "out.json"])
    result = json.loads(Path("out.json").read_text())
    assert result["protocol"] == "clean" and result["unknown_origin"] == ["A"]


def test_statistics_of_another_dimension_are_named(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("c", "d"):
        np.savez(f"{name}.npz", mu=RNG.random(64), sigma=np.eye(64), arr_0=PIXELS)
    tool.main(["c.npz", "d.npz"])
    out, err = capsys.readouterr()
    assert "64 features" in out and "protocol unknown" in out and "A and B: origin unknown" in out
    assert "not arr_0" in err


def test_impossible_statistics_are_refused(tool: ModuleType) -> None:
    np.savez("wrong.npz", mu=np.zeros(2048), sigma=-np.eye(2048))
    assert "B: wrong.npz: sigma is no covariance" in refused(tool, "a", "wrong.npz", *MORE)


def test_a_set_against_itself_is_at_0_and_not_below(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(tool, "a", "a")["fid"] >= 0
    assert "FID 0.0000" in capsys.readouterr().out
    x = torch.from_numpy(RNG.normal(size=(60, 40)))
    for seed in range(40):
        mean, covariance = x[seed:].mean(0), torch.cov(x[seed % 20 :].T) * 10.0**seed
        assert frechet_distance(mean, covariance, mean, covariance) >= 0


def test_a_user_without_a_home_measures_without_a_cache(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("HOME", "BVAE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def nobody(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr("pwd.getpwuid", nobody)
    assert default_folder() is None
    tool.main(["a", "b", "--allow-few"])
    out, err = capsys.readouterr()
    assert "FID" in out and "not kept" in err


def test_the_floor_is_the_fid_of_real_images() -> None:
    extractor = Extractor(QuickNetwork(), "sha256:w", PROTOCOLS["tf1"], 50)  # type: ignore[arg-type]
    train, test = (RNG.integers(0, 256, (n, 8, 8, 3), np.uint8) for n in (30, 20))
    found = real_floor(train, test, extractor, num=25, allow_few=True)
    a, b = (extractor.statistics([torch.from_numpy(part)]) for part in (test, train[:25]))
    assert found["fid"] == pytest.approx(fid(a, b)) and (found["n"], found["n_reference"]) == (25, 20)
    assert found["protocol"] == "tf1" and found["label"] == "few images"
    with pytest.raises(UserError, match="test: 20 images; fewer than 2048"):
        real_floor(train, test, extractor)


def test_the_old_path_of_the_command_works() -> None:
    spec = importlib.util.spec_from_file_location("fid_tool", Path(__file__).parents[2] / "tools" / "fid.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main is fid_command.main
