"""DALI as the decoder: Pillow's pixels, whatever else is in the batch."""

import contextlib
import io
import sys
import types

import numpy as np
import pytest
from decoder_samples import Held, encode, mixed_items, picture
from PIL import Image

from bvae.data.decoders import dali, open_decoder
from bvae.data.decoders.dali import DaliDecoder, cut_chunk, dali_installed
from bvae.data.decoders.pillow import PillowDecoder
from bvae.data.recipe import FILTERS, Recipe
from bvae.errors import UserError

needs_dali = pytest.mark.skipif(not dali_installed(), reason="DALI (nvidia-dali-cuda130) is not installed")


def both(recipe, items, chunk=8, workers=2):
    chunks = [items[i : i + chunk] for i in range(0, len(items), chunk)]
    with DaliDecoder(recipe, workers, "cpu", "") as dali, PillowDecoder(recipe, 1, "") as pillow:
        return list(dali.run(chunks)), list(pillow.run(chunks))


def same(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert (one.kept, one.rejected) == (other.kept, other.rejected)
        assert np.array_equal(one.pixels, other.pixels)


@needs_dali
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_plain_jpegs_have_pillows_pixels(subsampling, progressive):
    items = [
        Held(str(i), encode(picture(64 + i, 61 + i % 5, i), subsampling=subsampling, progressive=progressive))
        for i in range(24)
    ]
    for size in (16, (24, 16)):
        for crop in (31, "square", "none"):
            same(*both(Recipe(size=size, channels=3, crop=crop), items))


@needs_dali
@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_filter_is_pillows(filter, antialias, channels):
    items = [Held(str(i), encode(picture(70, 60, i))) for i in range(3)]
    items += [Held("grey", encode(picture(70, 60)[..., 0]))]
    same(*both(Recipe(size=16, channels=channels, crop=51, filter=filter, antialias=antialias), items))


@needs_dali
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_what_is_not_plain_goes_through_pillow(workers):
    same(*both(Recipe(size=16, channels=3, crop=60), mixed_items(), workers=workers))


@needs_dali
def test_a_damaged_image_takes_no_other_down():
    """DALI fails on some of these, and with them on their whole batches; which, is its own affair."""
    rng = np.random.default_rng(0)
    items = []
    for i in range(64):
        data = bytearray(encode(picture(64, 64, i)))
        if i % 5 == 0:
            for at in rng.integers(20, len(data) - 2, 12):
                data[at] = rng.integers(256)
        elif i % 16 == 1:
            data = data[:-500] + b"\xff\xd9"  # short, with an end
        items.append(Held(str(i), bytes(data)))
    recipe = Recipe(size=16, channels=3)
    ours, theirs = both(recipe, items, chunk=8)
    for chunk, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert len(one.kept) + len(one.rejected) == 8
        for position in range(8):
            number = 8 * chunk + position
            if number % 5 and number % 16 != 1:
                pixels = [d.pixels[d.kept.index(position)] for d in (one, other)]
                assert np.array_equal(*pixels)


@needs_dali
def test_chunks_of_any_length_and_sides_of_any_kind():
    items = [Held(str(i), encode(picture(40 + 9 * i, 100 - 7 * i, i))) for i in range(7)]
    chunks = [items[:1], [], items, items[2:4], [Held("text", b"text")], items * 5]
    recipe = Recipe(size=16, channels=3)
    with DaliDecoder(recipe, 2, "cpu", "") as dali, PillowDecoder(recipe, 1, "") as pillow:
        for _ in range(2):
            same(list(dali.run(chunks)), list(pillow.run(chunks)))


LIMITS = {"BATCH_BYTES": 9000, "BATCH_PIXELS": 20000, "LARGE": 9000}


def limit(monkeypatch):
    for name, value in LIMITS.items():
        monkeypatch.setattr(f"bvae.data.decoders.dali.{name}", value)


def uneven_items():
    items = mixed_items(20) + [Held(str(i), encode(picture(60 + 9 * i, 60 + 5 * i, i))) for i in range(12)]
    return [Held("short", encode(picture(9, 9))), *items, Held("heavy", encode(picture(60, 60), quality=100))]


def test_a_chunk_is_cut_where_it_would_fill_the_memory(monkeypatch):
    limit(monkeypatch)
    items = uneven_items()
    batches = list(cut_chunk(items, Recipe(size=16, channels=3, crop=60)))
    assert len(batches) > 4 and [batch.last for batch in batches] == [False] * (len(batches) - 1) + [True]
    held = [sorted(batch.plain + batch.others) for batch in batches]
    rejected = [i for i, result in enumerate(batches[-1].results) if result is not None]
    assert rejected and sorted([i for batch in held for i, _ in batch] + rejected) == list(range(len(items)))
    for batch in held:
        assert len(batch) == 1 or sum(len(data) for _, data in batch) <= LIMITS["BATCH_BYTES"]
    plain = [[Image.open(io.BytesIO(data)).size for _, data in batch.plain] for batch in batches]
    assert max(width * height for batch in plain for width, height in batch) <= LIMITS["LARGE"]
    assert max(sum(width * height for width, height in batch) for batch in plain) <= LIMITS["BATCH_PIXELS"]
    assert any(len(batch) > 1 for batch in plain)
    (empty,) = cut_chunk([], Recipe(size=16, channels=3))
    assert empty.last and not empty.results


@needs_dali
def test_a_chunk_that_is_cut_is_one_in_the_end(monkeypatch):
    limit(monkeypatch)
    same(*both(Recipe(size=16, channels=3, crop=60), uneven_items(), chunk=34))
    same(*both(Recipe(size=16, channels=3), uneven_items(), chunk=5))


@needs_dali
def test_it_is_named_with_versions():
    with open_decoder("dali", Recipe(size=8, channels=3), 2, device="cpu") as decoder:
        assert decoder.name == "dali-cpu" and set(decoder.versions) >= {"dali", "libjpeg-turbo"}


@needs_dali
def test_auto_takes_dali_where_bvae_was_built_without_libjpeg(monkeypatch):
    monkeypatch.setattr("bvae.data.decoders.jpeg_version", lambda: None)
    with open_decoder("auto", Recipe(size=8, channels=3), 2) as decoder:
        assert decoder.name == "dali-cpu" and "DALI" in decoder.why and "libjpeg-dev" in decoder.why


@needs_dali
def test_without_a_gpu_mixed_is_refused():
    try:
        with open_decoder("dali", Recipe(size=8, channels=3), 1, device="cuda") as decoder:
            assert decoder.name == "dali-mixed"
    except UserError as error:
        assert len(str(error).splitlines()) == 1 and "DALI" in str(error)


@pytest.mark.gpu
@needs_dali
def test_mixed_is_near_pillow():
    """nvJPEG interpolates chroma in its own way: near, and not the same."""
    recipe = Recipe(size=32, channels=3, crop=60)
    items = [Held(str(i), encode(picture(64, 64, i), quality=95)) for i in range(32)] + [Held("text", b"text")]
    with DaliDecoder(recipe, 2, "mixed", "") as dali, PillowDecoder(recipe, 1, "") as pillow:
        (ours,), (theirs,) = list(dali.run([items])), list(pillow.run([items]))
    assert (ours.kept, ours.rejected) == (theirs.kept, theirs.rejected)
    assert np.abs(ours.pixels.astype(int) - theirs.pixels).mean() < 2


@pytest.mark.skipif(dali_installed(), reason="DALI is installed")
def test_without_dali_the_message_says_how_to_get_it(monkeypatch):
    with pytest.raises(UserError, match=r"pip install 'bvae\[dali\]'.*--backend pillow works"):
        open_decoder("dali", Recipe(size=8, channels=3))
    monkeypatch.setattr("bvae.data.decoders.jpeg_version", lambda: None)
    with open_decoder("auto", Recipe(size=8, channels=3)) as decoder:
        assert r"DALI would be faster: pip install 'bvae[dali]'" in decoder.why


def test_a_broken_dali_is_no_reason_to_stop(monkeypatch):
    """`auto` goes on with Pillow where DALI is installed and cannot be loaded."""
    monkeypatch.setattr("bvae.data.decoders.jpeg_version", lambda: None)
    monkeypatch.setattr("bvae.data.decoders.dali_installed", lambda: True)
    monkeypatch.setattr("bvae.data.decoders.dali.dali_installed", lambda: True)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with open_decoder("auto", Recipe(size=8, channels=3), 1) as decoder:
        assert decoder.name.startswith("pillow") and "DALI cannot be loaded" in decoder.why
        image = Image.fromarray(picture())
        assert len(next(decoder.run([[Held("a", encode(image, "PNG"))]])).kept) == 1


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("device", ["cpu", "mixed"])
def test_the_gpu_fills_in_chroma_as_libjpeg_does_where_dali_can(monkeypatch, known, device):
    """On a stand-in for DALI, which has no GPU here: its argument is asked for by its name."""
    asked = []

    def image_slice(encoded, **options):
        asked.append(options)

    image_slice.__doc__ = "jpeg_fancy_upsampling : bool, optional" if known else "affine : bool, optional"

    class Pipeline(contextlib.nullcontext):
        def __init__(self, **options):
            super().__init__()

        def set_outputs(self, crops): ...
        def build(self): ...

    stand_in = types.SimpleNamespace(
        __version__="0", Pipeline=Pipeline, external_source=lambda **options: None,
        decoders=types.SimpleNamespace(image_slice=image_slice), UINT8=0, INT32=0, RGB=0,
    )  # fmt: skip
    monkeypatch.setattr(dali, "dali_installed", lambda: True)
    monkeypatch.setattr(dali.importlib, "import_module", lambda name: stand_in)
    with DaliDecoder(Recipe(size=8, channels=3), 1, device, "") as decoder:
        decoder._build(2)
    assert all(("jpeg_fancy_upsampling" in options) == (known and device == "mixed") for options in asked) and asked
