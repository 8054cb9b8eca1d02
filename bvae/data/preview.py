"""The same images under each filter, side by side: what the choice does to a data set (the paper's Fig. 7)."""

import io
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from bvae.data.decoders.pillow import decode_image, quiet
from bvae.data.recipe import Filter, Item, Recipe, Rejected
from bvae.errors import UserError
from bvae.files import write_atomically

COLUMNS = 6
TILE = 192  # pixels that a tile's side comes near to
PAD = 4
LABEL = 168  # width of the labels' column
ROWS: list[tuple[Filter, bool]] = [
    ("nearest", True),
    ("bilinear", False),
    ("bilinear", True),
    ("bicubic", True),
    ("lanczos", True),
]


def write_preview(items: Iterable[Item], recipe: Recipe, path: Path) -> int:
    """Draws the first images that can be used, one a column, as PNG; returns how many.

    The top row has the crops as they are, scaled to the tiles; the others have the recipe's size, enlarged without
    smoothing. The recipe's own filter and antialias are among them, and marked.

    Raises:
        UserError: if no image can be used, the file's name does not end in .png, or it cannot be written.
    """
    if path.suffix.lower() != ".png":  # a slip of the keys must not replace the archive
        raise UserError(f"--preview draws a PNG: {path} does not end in .png")
    own = recipe.filter, recipe.antialias or recipe.filter == "nearest"
    rows = ROWS if own in ROWS else [*ROWS, own]
    columns: list[list[np.ndarray]] = []
    scale = max(1, round(TILE / max(recipe.height, recipe.width)))
    tall, wide = scale * recipe.height, scale * recipe.width
    with quiet():
        for item in items:
            try:
                data = item.read()
                top = decode_image(data, replace(recipe, size=(tall, wide), filter="bicubic", antialias=True))
                under = [decode_image(data, replace(recipe, filter=f, antialias=a)) for f, a in rows]
            except Rejected:
                continue
            columns.append([top, *(row.repeat(scale, 0).repeat(scale, 1) for row in under)])
            if len(columns) == COLUMNS:
                break
    if not columns:
        raise UserError("--preview: none of the first images can be used")

    width, height = LABEL + len(columns) * (wide + PAD), PAD + (1 + len(rows)) * (tall + PAD)
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    font, small = ImageFont.load_default(20), ImageFont.load_default(14)
    labels = [("original", "the crop as it is")]
    for filter, antialias in rows:
        note = "" if filter == "nearest" else "antialias" if antialias else "no antialias"
        labels.append((filter, note + (" (chosen)" if (filter, antialias) == own else "")))
    for row, (name, note) in enumerate(labels):
        y = PAD + row * (tall + PAD)
        draw.text((10, y + tall // 2 - 20), name, "black", font)
        draw.text((10, y + tall // 2 + 6), note.strip(), "#555555", small)
        for column, tiles in enumerate(columns):
            pixels = np.broadcast_to(tiles[row], (tall, wide, 3))
            picture.paste(Image.fromarray(pixels), (LABEL + column * (wide + PAD), y))
    png = io.BytesIO()
    picture.save(png, "png")
    write_atomically(path, png.getvalue())
    return len(columns)
