import numpy as np
import pytest
from decoder_samples import Held, Unreadable, encode, picture
from PIL import Image

from bvae.data.prep import main
from bvae.data.preview import COLUMNS, LABEL, PAD, ROWS, write_preview
from bvae.data.recipe import Recipe
from bvae.errors import UserError

RECIPE = Recipe(size=32, channels=3, crop=60)


def tile_of(path, row, column, side):
    top, left = PAD + row * (side + PAD), LABEL + column * (side + PAD)
    return np.asarray(Image.open(path))[top : top + side, left : left + side]


def test_each_column_is_one_image_under_each_filter(tmp_path):
    items = [Unreadable("a", b""), Held("text", b"text")]
    items += [Held(str(i), encode(picture(90, 70, i), "PNG")) for i in range(COLUMNS + 3)]
    path = tmp_path / "preview.png"
    assert write_preview(items, RECIPE, path) == COLUMNS
    for column in (0, COLUMNS - 1):
        crop = Image.fromarray(picture(90, 70, column)).crop((5, 15, 65, 75))
        assert np.abs(tile_of(path, 0, column, 192).astype(int) - np.asarray(crop.resize((192, 192), 3))).max() <= 1
        for row, (filter, antialias) in enumerate(ROWS, 1):
            if antialias:
                resized = np.asarray(crop.resize((32, 32), Image.Resampling[filter.upper()]))
                assert np.array_equal(tile_of(path, row, column, 192), resized.repeat(6, 0).repeat(6, 1))
    rows = [tile_of(path, row, 0, 192).tobytes() for row in range(len(ROWS) + 1)]
    assert len(set(rows)) == len(rows)


@pytest.mark.parametrize(("filter", "antialias", "more"), [("nearest", False, 0), ("lanczos", False, 1)])
def test_the_chosen_filter_is_always_among_them(tmp_path, filter, antialias, more):
    recipe = Recipe(size=32, channels=1, crop=60, filter=filter, antialias=antialias)
    write_preview([Held("a", encode(picture(90, 70)))], recipe, tmp_path / "preview.png")
    width, height = Image.open(tmp_path / "preview.png").size
    assert (width, height) == (LABEL + 192 + PAD, PAD + (1 + len(ROWS) + more) * (192 + PAD))


def test_errors_are_the_users(tmp_path):
    with pytest.raises(UserError, match="none of the first images"):
        write_preview([Held("a", b"text")], RECIPE, tmp_path / "preview.png")
    with pytest.raises(UserError, match="cannot write"):
        write_preview([Held("a", encode(picture()))], RECIPE, tmp_path / "missing" / "preview.png")
    assert not list(tmp_path.iterdir())
    archive = tmp_path / "faces.zip"
    archive.write_bytes(b"faces")
    with pytest.raises(UserError, match=r"does not end in \.png"):
        write_preview([Held("a", encode(picture()))], RECIPE, archive)
    assert archive.read_bytes() == b"faces"


def test_from_the_command_line_without_a_store(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for i in range(3):
        (tmp_path / "in" / f"{i}.png").write_bytes(encode(picture(seed=i), "PNG"))
    main([str(tmp_path / "in"), "--size", "16", "--preview", str(tmp_path / "preview.png")])
    assert "3 images under each filter" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "preview.png"]
    with pytest.raises(SystemExit):
        main([str(tmp_path / "in"), "--size", "16"])
    assert "--out or --preview" in capsys.readouterr().err
