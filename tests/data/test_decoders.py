"""What defines the pixels: `decode_image`, its resize and its reading of JPEG headers; and Pillow's processes."""

import io
import os
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import PIL
import pytest
from decoder_samples import Buggy, Deadly, Held, Unreadable, chunk, encode, mixed_items, picture, png
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, features

import bvae
from bvae.data.decoders import jpeg, open_decoder
from bvae.data.decoders import resize as resizing
from bvae.data.decoders.libraries import PILLOW_SIMD, jpeg_version, native
from bvae.data.decoders.pillow import PillowDecoder, decode_image, decode_items
from bvae.data.decoders.resize import resize
from bvae.data.recipe import FILTERS, Recipe, Rejected
from bvae.errors import UserError

RECIPE = Recipe(size=16, channels=3)
BUILT = pytest.mark.skipif(native is None, reason="the compiled extension is not there")
WITH_JPEG = pytest.mark.skipif(jpeg_version() is None, reason="bvae was built without libjpeg-turbo")

# ---- the resize -----------------------------------------------------------------------------------------------------


def defined_resize(pixels, size, filter, antialias, rounding=np.asarray):
    """The definition in resize.py in float64: uint8 [h, w, C] -> float64 [size, size, C]."""

    def f(x):
        x = abs(x)
        if filter == "bilinear":
            return np.maximum(1 - x, 0)
        if filter == "bicubic":
            far = (x < 2) * (-0.5 * x**3 + 2.5 * x**2 - 4 * x + 2)
            return np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, far)
        return (x < 3) * np.sinc(x) * np.sinc(x / 3)

    def matrix(n):
        s = n / size
        c = (np.arange(size)[:, None] + 0.5) * s
        j = np.arange(n)
        weights = (j == c // 1) * 1.0 if filter == "nearest" else f((j + 0.5 - c) / (max(s, 1) if antialias else 1))
        return weights / weights.sum(1, keepdims=True)

    height, width, _ = pixels.shape
    rows = rounding(np.einsum("jw,hwc->hjc", matrix(width), pixels.astype(float)).clip(0, 255))
    return rounding(np.einsum("ih,hjc->ijc", matrix(height), rows).clip(0, 255))


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize(("height", "width", "size"), [(128, 128, 64), (148, 140, 64), (33, 57, 16), (1, 9, 20)])
def test_the_resize_is_the_definition_within_one(filter, antialias, height, width, size):
    pixels = picture(height, width)
    result = resize(Image.fromarray(pixels), size, filter, antialias)
    # Two roundings to 8 bits, of which the first may be magnified by the second pass' negative weights.
    assert np.abs(result - defined_resize(pixels, size, filter, antialias)).max() <= 1.2
    grey = resize(Image.fromarray(pixels[..., 0]), size, filter, antialias)
    # pillow-simd, where it resizes, rounds one channel and three in other ways.
    assert np.abs(grey.astype(int) - result[..., 0]).max() <= int(PILLOW_SIMD and native is None)


@pytest.fixture(params=[pytest.param("built", marks=BUILT), "not built"])
def way(request, monkeypatch):
    """With bvae's own code, and as where it was not built: Pillow's resize where that is the same, or NumPy."""
    if request.param == "not built":
        monkeypatch.setattr(resizing, "native", None)
    return request.param


@pytest.mark.parametrize("filter", FILTERS)
def test_rounded_as_pillow_does_it_is_pillows_resize(filter, way):
    """The bound that pillow-simd keeps, with Lanczos since it is not asked."""
    rng = np.random.default_rng(0)
    off = []
    for seed in range(12):
        pixels = rng.integers(0, 256, (128, 128, 3), np.uint8) if seed % 2 else picture(128, 128, seed)
        expected = defined_resize(pixels, 64, filter, True, rounding=lambda x: np.floor(x + 0.5))
        off.append(np.abs(resize(Image.fromarray(pixels), 64, filter, True) - expected))
    assert np.max(off) <= 1
    assert np.mean(off) < (0.03 if PILLOW_SIMD and way == "not built" else 0.01)  # ties among them


SHAPES = [
    (128, 128, 64),
    (148, 140, 64),
    (33, 57, 16),
    (1, 9, 20),
    (100, 1, 7),
    (7, 7, 7),
    (600, 1100, 33),
    (999, 1001, 3),
]


@pytest.mark.parametrize("filter", FILTERS)
def test_every_way_is_pillows_to_the_bit(filter, way):
    rng = np.random.default_rng(1)
    for height, width, size in SHAPES:
        for pixels in (rng.integers(0, 256, (height, width, 3), np.uint8), picture(height, width) // 128 * 255):
            for image in (Image.fromarray(pixels), Image.fromarray(np.ascontiguousarray(pixels[..., 1]))):
                off = resize(image, size, filter, True).astype(int) - image.resize(
                    (size, size), resizing.RESAMPLING[filter]
                )
                # pillow-simd's own bounds: 1 with bicubic, 2 with Lanczos.
                assert np.abs(off).max() <= int(PILLOW_SIMD) * (2 if filter == "lanczos" else 1)


@BUILT
@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("filter", FILTERS)
def test_the_compiled_resize_is_its_definition_in_numpy(filter, antialias, monkeypatch):
    rng = np.random.default_rng(2)
    for height, width, size in [*SHAPES, (1025, 30, 31), (40, 2000, 5), (64, 48, 100)]:
        pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
        rows = resizing._along_second(pixels, size, filter, antialias)
        expected = resizing._along_second(rows.swapaxes(0, 1), size, filter, antialias).swapaxes(0, 1)
        for image in (pixels, Image.fromarray(pixels)):
            assert np.array_equal(resize(image, size, filter, antialias), expected)
        grey = Image.fromarray(np.ascontiguousarray(pixels[..., 2]))
        assert np.array_equal(resize(grey, size, filter, antialias), expected[..., 2])


@BUILT
def test_processors_without_avx2_give_the_same():
    script = """
import hashlib, numpy as np
from bvae.data.decoders.resize import resize
digest = hashlib.sha256()
for height, width, size in [(128, 128, 64), (31, 50, 17), (20, 20, 33)]:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    for filter in ("nearest", "bilinear", "lanczos"):
        digest.update(resize(pixels, size, filter, True).tobytes())
print(digest.hexdigest())
"""
    digests = set()
    for capability in ("baseline", "avx512"):
        env = {**os.environ, "BVAE_CPU_CAPABILITY": capability, "PYTHONPATH": str(Path(bvae.__file__).parent.parent)}
        done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
        digests.add(done.stdout)
    assert len(digests) == 1


@BUILT
def test_the_compiled_code_refuses_what_does_not_fit():
    first, weights = resizing.taps(8, 4, "bilinear", True)
    taps = native.Taps(8, first, weights)
    for bad in (
        (first - 8, weights),
        (first + 8, weights),
        (first[:2], weights),
        (first, weights[0]),
        (first[:0], weights[:0]),
    ):
        with pytest.raises(ValueError, match="taps"):
            native.Taps(8, *bad)
    with pytest.raises(TypeError):
        native.Taps(8, first.astype(np.int64), weights)
    with pytest.raises(ValueError, match="channels"):
        native.Resizer(taps, taps, channels=2)
    resizer = native.Resizer(taps, taps, channels=3)
    for shape in ((1, 8, 1), (1, 7, 3), (9, 8, 3), (8, 24)):
        with pytest.raises(ValueError, match="rows"):
            resizer.add(np.zeros(shape, np.uint8))
    with pytest.raises(TypeError):
        resizer.add(np.zeros((1, 8, 3), np.uint8)[:, ::2])
    resizer.add(np.zeros((7, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="rows are missing"):
        resizer.finish()
    with pytest.raises(ValueError, match="no more"):
        resizer.add(np.zeros((2, 8, 3), np.uint8))
    for left, top in ((-1, 0), (0, -1), (1, 0), (0, 1), (2**31 - 1, 0)):
        with pytest.raises(ValueError, match="crop"):
            native.decode_jpeg(b"", 8, 8, left, top, 3, taps, taps)


@pytest.mark.parametrize("filter", FILTERS)
def test_growing_needs_no_antialias(filter):
    image = Image.fromarray(picture(20, 14))
    with_it, without = (resize(image, 40, filter, antialias).astype(int) for antialias in (True, False))
    assert np.abs(with_it - without).max() <= int(PILLOW_SIMD and native is None)


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize("antialias", [True, False])
def test_pixel_centres_are_half_way(filter, antialias):
    """A resize that has no preferred side commutes with mirroring; on odd ratios nearest has ties nowhere."""
    pixels = picture(45, 45)
    plain, mirrored = (
        resize(Image.fromarray(np.ascontiguousarray(p)), 15, filter, antialias) for p in (pixels, pixels[::-1, ::-1])
    )
    assert np.abs(plain.astype(int) - mirrored[::-1, ::-1]).max() <= 1


def test_antialias_is_what_a_checkerboard_shows():
    board = np.repeat((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)[..., None], 3, -1)
    for filter in ("bilinear", "bicubic", "lanczos"):
        assert np.ptp(resize(Image.fromarray(board), 16, filter, True)[2:-2, 2:-2]) <= 12
    assert set(np.unique(resize(Image.fromarray(board), 16, "nearest", True))) <= {0, 255}
    assert np.ptp(resize(Image.fromarray(board), 9, "bilinear", False)) > 100


# ---- one image ------------------------------------------------------------------------------------------------------


def plainly(data, recipe):
    """The pixels without any short cut: everything decoded, turned, cropped, converted, resized."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB" if recipe.channels == 3 else "L")
    cropped = image.crop(recipe.box(*image.size))
    return resize(cropped, recipe.size, recipe.filter, recipe.antialias).reshape(recipe.size, recipe.size, -1)


@pytest.fixture(params=[pytest.param("libjpeg-turbo", marks=WITH_JPEG), "Pillow"])
def decodes(request, monkeypatch):
    """Who decodes plain JPEGs."""
    if request.param == "Pillow":
        monkeypatch.setattr(jpeg, "decode_plain", lambda data, header, recipe: None)
    return request.param


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("channels", [1, 3])
def test_sparing_rows_of_a_jpeg_changes_no_pixel(subsampling, progressive, channels, decodes):
    spared = 0
    for height in range(60, 93):
        data = encode(picture(height, 40), subsampling=subsampling, progressive=progressive)
        for crop in (1, 16, 31, 40, "square", "none"):
            recipe = Recipe(size=8, channels=channels, crop=crop)
            assert np.array_equal(decode_image(data, recipe), plainly(data, recipe))
            bottom = recipe.box(40, height)[3]
            spared += jpeg.keep_rows(data, jpeg.read_header(data), bottom) != data
    assert (spared > 0) != progressive


def test_restart_markers_and_grey_are_spared_alike(decodes):
    for data in (encode(picture(90, 40), restart_marker_blocks=2), encode(picture(90, 40)[..., 0], quality=95)):
        header = jpeg.read_header(data)
        assert header.plain and len(jpeg.keep_rows(data, header, 53)) == len(data) != 0
        assert jpeg.read_header(jpeg.keep_rows(data, header, 53)).height < 90
        for channels in (1, 3):
            recipe = Recipe(size=8, channels=channels, crop=16)
            assert np.array_equal(decode_image(data, recipe), plainly(data, recipe))


@WITH_JPEG
def test_libjpeg_decodes_plain_jpegs_and_leaves_the_others_to_pillow():
    recipe, grey = Recipe(size=8, channels=3, crop=16), Recipe(size=8, channels=1, crop=16)
    data = encode(picture(90, 40))
    header = jpeg.read_header(data)
    decoded = jpeg.decode_plain(data, header, recipe)
    assert np.array_equal(decoded, plainly(data, recipe)) and decoded.flags.writeable
    assert jpeg.decode_plain(data, header, grey) is None
    assert jpeg.decode_plain(encode(picture()[..., 0]), jpeg.read_header(encode(picture()[..., 0])), grey) is not None
    # Damage: in the crop it is Pillow's to judge, below it nobody looks.
    scan = data.index(b"\xff\xda")
    assert jpeg.decode_plain(data[: scan + 40] + b"\xff\xd9", header, recipe) is None
    assert jpeg.decode_plain(data[: scan + 60] + b"\xff\xd3" + data[scan + 60 :], header, recipe) is None
    last = len(data) - 12
    assert np.array_equal(jpeg.decode_plain(data[:last] + b"\xff\xd9", header, recipe), decoded)
    # Another size than the one it was cropped for.
    at = header.height_at
    for height in (89, 91):
        assert jpeg.decode_plain(data[:at] + height.to_bytes(2) + data[at + 2 :], header, recipe) is None
    with pytest.raises(Rejected, match="smaller than the crop of 41"):
        jpeg.decode_plain(data, header, Recipe(size=8, channels=3, crop=41))


@WITH_JPEG
@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    height=st.integers(1, 70), width=st.integers(1, 70), seed=st.integers(0, 9), subsampling=st.integers(0, 2),
    progressive=st.booleans(), quality=st.integers(10, 95), size=st.integers(1, 40), filter=st.sampled_from(FILTERS),
    crop=st.one_of(st.integers(1, 70), st.sampled_from(["square", "none"])), antialias=st.booleans(),
)  # fmt: skip
def test_what_libjpeg_decodes_are_pillows_pixels(
    height, width, subsampling, progressive, quality, size, crop, filter, antialias, seed
):
    recipe = Recipe(size=size, channels=3, crop=crop, filter=filter, antialias=antialias)
    data = encode(picture(height, width, seed), subsampling=subsampling, progressive=progressive, quality=quality)
    if isinstance(crop, int) and crop > min(height, width):
        return
    assert np.array_equal(jpeg.decode_plain(data, jpeg.read_header(data), recipe), plainly(data, recipe))


def test_what_is_not_a_plain_jpeg():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = picture()
    plain = encode(image)
    assert jpeg.read_header(plain).plain and jpeg.read_header(encode(image, progressive=True)).plain
    for data in (
        encode(image, exif=exif),
        encode(Image.fromarray(image).convert("CMYK")),
        encode(image, keep_rgb=True),
        plain[:-1],
        plain + b"\0",
    ):
        assert not jpeg.read_header(data).plain
    for data in (b"", b"\xff\xd8", b"\xff\xd8\xff", plain[:200], encode(image, "PNG"), b"\xff\xd8" + bytes(100)):
        assert jpeg.read_header(data) is None


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_orientation(orientation, format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(picture(40, 64), format, exif=exif, **({"quality": 95} if format == "JPEG" else {}))
    recipe = Recipe(size=40, channels=3, crop=40)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert (upright.size == (40, 64)) == (orientation >= 5)
    assert np.array_equal(decode_image(data, recipe), np.asarray(upright.crop(recipe.box(*upright.size))))
    for crop in (15, 16, "square", "none"):  # an odd pixel left over goes right and down of the upright image
        recipe = Recipe(size=12, channels=3, crop=crop)
        assert np.array_equal(decode_image(data, recipe), plainly(data, recipe))


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_a_whole_image_is_not_cropped_and_stays_usable(format):
    for mode in ("RGB", "RGBA"):
        data = encode(Image.fromarray(picture(30, 30)).convert(mode), format)
        assert np.array_equal(decode_image(data, Recipe(size=30, channels=3, crop=30)), picture(30, 30))


@pytest.mark.parametrize("filter", FILTERS)
def test_without_antialias_a_tall_image_is_resized_in_bands(filter):
    image = picture(1100, 20)
    result = resize(Image.fromarray(image), 16, filter, False)
    assert np.abs(result - defined_resize(image, 16, filter, False)).max() <= 1.2


def test_a_plain_bitmap_is_read():
    data = b"P1 16 16\n" + b"1 0 " * 128
    assert np.array_equal(decode_image(data, RECIPE), plainly(data, RECIPE))


MODES = {
    "PNG": ["1", "L", "LA", "P", "RGB", "RGBA"],
    "JPEG": ["1", "L", "RGB", "CMYK"],
    "TIFF": ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"],
    "BMP": ["1", "L", "P", "RGB", "RGBA"],
    "GIF": ["1", "L", "P", "RGB"],
    "PPM": ["1", "L", "RGB"],
    "WEBP": ["RGB", "RGBA"],
}


@pytest.mark.parametrize(("format", "mode"), [(format, mode) for format, modes in MODES.items() for mode in modes])
def test_modes_become_rgb_or_grey(mode, format):
    if format == "WEBP" and not features.check("webp"):
        pytest.skip("this Pillow is built without WebP")
    data = encode(Image.fromarray(picture(32, 32)).convert(mode), format)
    for channels in (1, 3):
        recipe = Recipe(size=16, channels=channels)
        assert np.array_equal(decode_image(data, recipe), plainly(data, recipe))


def test_the_first_frame_of_an_animation():
    frames = [Image.fromarray(picture(32, 32, seed)).convert("P") for seed in range(3)]
    for format in ("GIF", "PNG"):
        data = encode(frames[0], format, save_all=True, append_images=frames[1:])
        assert np.array_equal(decode_image(data, Recipe(size=32, channels=3)), np.asarray(frames[0].convert("RGB")))


def test_one_pixel():
    data = encode(Image.new("RGB", (1, 1), (10, 20, 30)), "PNG")
    assert (decode_image(data, RECIPE) == (10, 20, 30)).all()
    with pytest.raises(Rejected, match="1x1, smaller than the crop of 2"):
        decode_image(data, Recipe(size=16, channels=3, crop=2))


def tiff16(planes=False):
    """An RGB TIFF of 16 bits a channel, 4x4, which Pillow would cut down to 8; `planes`: one plane a channel."""
    arrays = {258: (200, [16] * 3)}
    entries = [(256, 4), (257, 4), (258, 200), (259, 1), (262, 2), (273, 300), (277, 3), (278, 4), (279, 96), (284, 1)]
    if planes:
        arrays |= {273: (210, [300, 332, 364]), 279: (220, [32] * 3)}
        entries = [(tag, {273: 210, 279: 220, 284: 2}.get(tag, value)) for tag, value in entries]
    data = b"II*\0" + struct.pack("<IH", 8, len(entries))
    for tag, value in entries:
        data += struct.pack("<HHII", tag, 3, 3 if tag in arrays else 1, value)
    for at, values in arrays.values():
        data = data.ljust(at, b"\0") + struct.pack("<HHH", *values)
    return data.ljust(300, b"\0") + bytes(96)


BAD = {
    "empty": (b"", "empty"),
    "text": (b"no image at all", "format"),
    "a header alone": (b"\xff\xd8\xff", "format"),
    "truncated JPEG": (encode(picture())[:-200], "cannot be decoded"),
    "JPEG cut in its header": (encode(picture())[:300], "cannot be decoded"),
    "truncated PNG": (encode(picture(), "PNG")[:-2000], "cannot be decoded"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n", "format"),
    "16-bit grey PNG": (png(4, 4, 16, 0, (b"\0" + bytes(8)) * 4), "8 bits"),
    "16-bit RGB PNG": (png(4, 4, 16, 2, (b"\0" + bytes(24)) * 4), "8 bits"),
    "16-bit RGBA PNG": (png(4, 4, 16, 6, (b"\0" + bytes(32)) * 4), "8 bits"),
    "16-bit RGB PPM": (b"P6 4 4 65535\n" + bytes(96), "8 bits"),
    "10-bit plain PPM": (b"P3 4 4 1023\n" + b"1 " * 48, "8 bits"),
    "16-bit RGB TIFF": (tiff16(), "8 bits"),
    "16-bit RGB TIFF in planes": (tiff16(planes=True), "8 bits"),
    "float TIFF": (encode(picture()[..., 0].astype(np.float32), "TIFF"), "8 bits"),
    "a bomb": (png(2**14, 2**13, 8, 2, bytes(1000)), "16384x8192, more than the 67108864 pixels"),
    "a larger bomb": (png(2**30, 2**30, 8, 2, bytes(1000)), "pixels"),
    "nothing by nothing": (b"P6 0 0 255\n", "format"),
}


@pytest.mark.parametrize("name", BAD)
def test_rejections_say_why_in_one_line(name):
    data, word = BAD[name]
    with pytest.raises(Rejected) as caught:
        decode_image(data, RECIPE)
    reason = str(caught.value)
    assert word in reason and len(reason.splitlines()) == 1 and len(reason) < 200
    assert "0x" not in reason  # an address would differ from run to run


def test_a_jpeg_bomb_is_rejected_before_it_is_decoded():
    data = bytearray(encode(picture()))
    at = jpeg.read_header(bytes(data)).height_at
    data[at : at + 4] = b"\xff\xff\xff\xff"
    with pytest.raises(Rejected, match="65535x65535, more than"):
        decode_image(bytes(data), RECIPE)


@pytest.fixture(scope="module")
def originals():
    formats = ["PNG", "JPEG", "BMP", "GIF", "TIFF", "PPM"] + ["WEBP"] * features.check("webp")
    return [encode(picture(48, 40, seed), format) for seed, format in enumerate(formats)]


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    which=st.integers(0, 6),
    changes=st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), max_size=6),
    kept=st.one_of(st.just(1.0), st.floats(0, 1)),
)
def test_mutated_files_decode_or_are_rejected(originals, which, changes, kept):
    data = bytearray(originals[which % len(originals)])
    for position, value in changes:
        data[position % min(len(data), 900)] = value
    data = bytes(data[: int(kept * len(data))])
    recipe = Recipe(size=8, channels=3, crop=16)
    (decoded,) = [decode_items([Held("a", data)], recipe)]
    assert len(decoded.kept) + len(decoded.rejected) == 1
    header = jpeg.read_header(data)
    if decoded.kept and header is not None:
        try:
            expected = plainly(data, recipe)
        except Exception:
            return  # damaged below the crop, where decode_image does not look
        assert np.array_equal(decoded.pixels[0], expected)


# ---- worker processes -----------------------------------------------------------------------------------------------


def everything(decoder, items, chunk=6):
    with decoder:
        return list(decoder.run(items[i : i + chunk] for i in range(0, len(items), chunk)))


def test_any_number_of_workers_gives_the_same():
    items = mixed_items()
    recipe = Recipe(size=16, channels=3, crop=60)
    results = [everything(PillowDecoder(recipe, workers, ""), items) for workers in (1, 2, 4)]
    for decoded in zip(*results, strict=True):
        for other in decoded[1:]:
            assert np.array_equal(other.pixels, decoded[0].pixels)
            assert (other.kept, other.rejected) == (decoded[0].kept, decoded[0].rejected)
    rejected = [reason for decoded in results[0] for _, reason in decoded.rejected]
    assert len(rejected) == 9 and "is encrypted" in rejected
    assert sum(len(decoded.kept) for decoded in results[0]) == len(items) - 9
    assert len(results[0][-1].kept) + len(results[0][-1].rejected) == len(items) % 6


def test_a_decoder_runs_again_and_takes_chunks_of_any_length():
    good = encode(picture())
    with open_decoder("pillow", RECIPE, 2) as decoder:
        for _ in range(2):
            chunks = [[Held("a", good)] * n for n in (1, 0, 3)] + [[Unreadable("b", b"")]]
            assert [len(decoded.pixels) for decoded in decoder.run(chunks)] == [1, 0, 3, 0]
        assert list(decoder.run([])) == []


def test_few_chunks_are_drawn_ahead():
    drawn = 0

    def chunks():
        nonlocal drawn
        for _ in range(100):
            drawn += 1
            yield [Held("a", encode(picture()))]

    with PillowDecoder(RECIPE, 2, "") as decoder:
        for taken, _ in enumerate(decoder.run(chunks())):
            assert drawn <= taken + 7
            if taken == 20:
                break


def test_a_worker_that_dies_ends_the_run_with_its_images_named():
    good = encode(picture())
    items = [Held(f"{i}.jpg", good) for i in range(40)]
    items[21] = Deadly("deadly.jpg", b"")
    with PillowDecoder(RECIPE, 2, "") as decoder:
        with pytest.raises(UserError, match=r"SIGKILL.*4 images from '20.jpg' to '23.jpg'.*fewer workers") as caught:
            list(decoder.run(items[i : i + 4] for i in range(0, 40, 4)))
        assert len(str(caught.value).splitlines()) == 1
        assert [len(decoded.kept) for decoded in decoder.run([items[:4]])] == [4]  # with new workers


def test_what_a_worker_raises_is_raised_here():
    with PillowDecoder(RECIPE, 2, "") as decoder, pytest.raises(ValueError, match="a bug"):
        list(decoder.run([[Held("a", encode(picture())), Buggy("b", b"")]]))


@pytest.mark.skipif(not features.check("libtiff"), reason="this Pillow is built without libtiff")
def test_what_libraries_write_about_a_damaged_file_is_not_shown(capfd):
    data = bytearray(encode(picture(), "TIFF", compression="tiff_lzw"))
    data[3000:6000] = bytes(range(250)) * 12
    with PillowDecoder(RECIPE, 2, "") as decoder:
        (decoded,) = decoder.run([[Held("a", bytes(data))]])
    assert decoded.rejected and capfd.readouterr().err == ""


def test_large_items_on_their_way_to_busy_workers_block_nobody():
    items = [Held(str(i), encode(picture(700, 700, i), "BMP")) for i in range(6)]
    recipe = Recipe(size=512, channels=3)
    results = everything(PillowDecoder(recipe, 2, ""), items, chunk=1)
    assert [len(decoded.kept) for decoded in results] == [1] * 6


SCRIPT = """
import os, signal, sys, time
from decoder_samples import Held, encode, picture
from bvae.data.decoders.pillow import PillowDecoder
from bvae.data.recipe import Recipe

assert "torch" not in sys.modules
decoder = PillowDecoder(Recipe(size=16, channels=3), 2, "")
chunks = ([Held("a", encode(picture()))] * 4 for _ in range(10**9))
for i, _ in enumerate(decoder.run(chunks)):
    if i == 5:
        print(*[worker.process.pid for worker in decoder._pool], flush=True)
        HOW
"""


@pytest.mark.parametrize(
    "how", ["os.kill(os.getpid(), signal.SIGKILL)", "os.kill(os.getpid(), signal.SIGINT)", "break"]
)
def test_workers_do_not_outlive_their_parent(how):
    """However it ends, also without closing the decoder; and a script needs no `if __name__ == "__main__"`."""
    paths = [str(Path(bvae.__file__).parent.parent), str(Path(__file__).parent)]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {paths}\n" + SCRIPT.replace("HOW", how)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2, done.stderr
    deadline = time.monotonic() + 20
    while any(_runs(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert "worker" not in done.stderr


def _runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[-1].split()[0] != "Z"
    except OSError:
        return False


def test_open_decoder_refuses_in_one_line():
    with pytest.raises(UserError, match="workers"):
        open_decoder("pillow", RECIPE, 0)
    with pytest.raises(UserError, match="backend"):
        open_decoder("opencv", RECIPE)


@WITH_JPEG
def test_auto_takes_pillow_with_libjpeg_and_has_no_more_to_say():
    with open_decoder("auto", RECIPE, 1) as decoder:
        assert decoder.name in decoder.versions and decoder.versions["libjpeg-turbo of bvae"] == jpeg_version()
        assert decoder.why == f"{decoder.name} {PIL.__version__} and libjpeg-turbo {jpeg_version()}, the fastest here"


def test_what_would_be_faster_is_said(monkeypatch):
    monkeypatch.setattr("bvae.data.decoders.jpeg_version", lambda: None)
    with open_decoder("pillow", RECIPE, 1) as decoder:
        assert decoder.name == ("pillow-simd" if PILLOW_SIMD else "pillow") and "as asked" in decoder.why
        assert set(decoder.versions) >= {decoder.name, "libjpeg-turbo"}
        assert "libjpeg-dev) would be faster" in decoder.why and len(decoder.why.splitlines()) == 1


def test_a_gpu_that_will_not_be_used_is_mentioned():
    for backend in ("auto", "pillow"):
        for device, said in (("cuda", True), ("cpu", False), (None, False)):
            with open_decoder(backend, RECIPE, 1, device) as decoder:
                assert ("--device cuda is for --backend dali" in decoder.why) == said


def test_a_webp_image_where_pillow_has_no_webp_is_a_rejection():
    riff = b"RIFF" + (100).to_bytes(4, "little") + b"WEBPVP8 " + bytes(90)
    with pytest.raises(Rejected):
        decode_image(riff, RECIPE)


def test_text_chunks_that_swell_are_rejected_or_ignored():
    swelling = png(4, 4, 8, 2, (b"\0" + bytes(12)) * 4).replace(
        b"\0\0\0\0IEND", chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**26))) + b"\0\0\0\0IEND"
    )
    decoded = decode_items([Held("a", swelling)], RECIPE)
    assert len(decoded.kept) + len(decoded.rejected) == 1
