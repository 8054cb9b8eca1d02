import colorsys
import math

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from bvae.data.shapes import DISCRETE, KINDS, LAYOUT, NAMES, RANGES, SATURATION, make_shapes, render
from bvae.errors import UserError

KIND = {name: float(index) for index, name in enumerate(KINDS)}


def one(**changes):
    """A factor row in the middle of all ranges: one square."""
    row = {name: sum(RANGES[name]) / 2 for name in NAMES} | {"number": 1.0, "kind": KIND["square"], "rotation": 0.3}
    return np.array([[{**row, **changes}[name] for name in NAMES]])


def reference(factors, side):
    """The same picture pixel by pixel, with vertices and half-planes in place of symmetric distance formulas."""
    number, kind, x, y, size, rotation, hue, background = (float(value) for value in factors)
    ring, radius = (unit * size for unit in LAYOUT[int(number)])
    colour = colorsys.hsv_to_rgb(hue % 1, SATURATION, 1)

    def turned(px, py, angle):
        return px * math.cos(angle) - py * math.sin(angle), px * math.sin(angle) + py * math.cos(angle)

    def polygon(vertices, px, py):
        edges = zip(vertices, vertices[1:] + vertices[:1], strict=True)  # clockwise on the screen: outside is positive
        return max(
            ((py - ay) * -(bx - ax) + (px - ax) * (by - ay)) / math.hypot(bx - ax, by - ay)
            for (ax, ay), (bx, by) in edges
        )

    def box(half_width, half_height):
        return [
            (-half_width, -half_height),
            (half_width, -half_height),
            (half_width, half_height),
            (-half_width, half_height),
        ]

    outlines = {
        "square": [box(0.72 * radius, 0.72 * radius)],
        "cross": [box(0.9 * radius, 0.3 * radius), box(0.3 * radius, 0.9 * radius)],
        "triangle": [
            [(1.04 * radius * math.sin(t), -1.04 * radius * math.cos(t)) for t in (0, 2 * math.pi / 3, 4 * math.pi / 3)]
        ],
    }
    image = np.empty((side, side, 3), np.uint8)
    for row in range(side):
        for column in range(side):
            distance = math.inf
            for copy in range(int(number)):
                cx, cy = turned(0, -ring, rotation + copy * 2 * math.pi / number)
                px, py = turned((column + 0.5) / side - x - cx, (row + 0.5) / side - y - cy, -rotation)
                if KINDS[int(kind)] == "disc":
                    distance = min(distance, math.hypot(px, py) - 0.86 * radius)
                else:
                    distance = min(distance, *(polygon(v, px, py) for v in outlines[KINDS[int(kind)]]))
            cover = min(max(0.5 - distance * side, 0), 1)
            image[row, column] = [
                math.floor((background + cover * (channel - background)) * 255 + 0.5) for channel in colour
            ]
    return image


def test_images_are_those_of_a_pixel_by_pixel_renderer():
    images, factors = make_shapes(40, 16, seed=3)
    assert len(np.unique(factors[:, :2], axis=0)) == 12  # every number with every kind
    expected = np.stack([reference(row, 16) for row in factors])
    # A pixel may only differ where the two formulas round to either side of a half.
    assert np.abs(images.astype(int) - expected).max() <= 1
    assert (images != expected).mean() < 1e-3


def test_a_seed_gives_the_same_bytes_and_another_seed_or_stream_does_not():
    images, factors = make_shapes(64, 32, seed=5)
    again, factors_again = make_shapes(64, 32, seed=5)
    assert images.tobytes() == again.tobytes() and factors.tobytes() == factors_again.tobytes()
    for other in (make_shapes(64, 32, seed=6), make_shapes(64, 32, seed=5, stream=1)):
        assert not (factors[:, 2:] == other[1][:, 2:]).any()
        assert (images != other[0]).any(axis=(1, 2, 3)).all()


def test_a_smaller_set_begins_a_larger_one_and_the_side_does_not_change_the_factors():
    images, factors = make_shapes(300, 16, seed=1)
    fewer, fewer_factors = make_shapes(7, 16, seed=1)
    assert np.array_equal(images[:7], fewer) and np.array_equal(factors[:7], fewer_factors)
    assert np.array_equal(make_shapes(300, 64, seed=1)[1], factors)


def test_images_are_a_function_of_their_factors():
    images, factors = make_shapes(200, 32, seed=9)
    assert images.shape == (200, 32, 32, 3) and images.dtype == np.uint8
    assert factors.shape == (200, 8) and factors.dtype == np.float32
    order = np.random.default_rng(0).permutation(200)
    assert np.array_equal(render(factors[order], 32), images[order])


@pytest.mark.parametrize("name", NAMES)
def test_every_factor_shows(name):
    low, high = RANGES[name]
    base = one()
    changed = one(**{name: 3.0 if name in DISCRETE else low + 0.8 * (high - low)})
    assert (render(base, 32) != render(changed, 32)).any(axis=-1).mean() > 0.01


def test_rotation_covers_one_period_of_the_square():
    turned, square = render(one(rotation=math.pi / 2 + 0.3), 32), render(one(), 32)
    assert np.abs(turned.astype(int) - square).max() <= 1
    assert (render(one(rotation=math.pi / 4 + 0.3), 32) != square).any()


def test_factors_are_uniform_and_independent():
    _, factors = make_shapes(20_000, 16, seed=0)
    for column, (name, (low, high)) in enumerate(RANGES.items()):
        values = factors[:, column]
        assert values.min() >= low and values.max() <= np.float32(high)
        if name in DISCRETE:
            levels, counts = np.unique(values, return_counts=True)
            assert list(levels) == list(np.arange(low, high + 1))
            assert (counts / 20_000 * len(levels)).round(1).tolist() == [1.0] * len(levels)
        else:
            counts, _ = np.histogram(values, 10, (low, high))
            assert counts.min() > 1800 and counts.max() < 2200
    correlation = np.corrcoef(factors.T.astype(float)) - np.eye(8)
    assert np.abs(correlation).max() < 0.03


def test_nothing_leaves_the_image_and_copies_do_not_touch():
    corners = [
        one(number=number, kind=kind, x=xy, y=xy, size=RANGES["size"][1], rotation=rotation, background=0.0)
        for number in LAYOUT
        for kind in range(len(KINDS))
        for xy in RANGES["x"]
        for rotation in np.linspace(0, math.pi / 2, 7)
    ]
    # A large side, since antialiasing softens a sharp corner by up to a pixel beyond its tip.
    for row, image in zip(np.concatenate(corners), render(np.concatenate(corners), 256), strict=True):
        border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
        assert (border == 0).all(), dict(zip(NAMES, row, strict=True))

    factors = np.concatenate([one(number=number, kind=kind, background=0.0) for number in LAYOUT for kind in range(4)])
    for row, image in zip(factors, render(factors, 256), strict=True):
        mask = Image.fromarray(np.where(image.max(axis=-1) > 127, 255, 0).astype(np.uint8))
        mask = mask.filter(ImageFilter.MaxFilter(3))  # joins a corner's last pixels, and would join copies that touch
        pieces = 0
        while mask.getextrema()[1] and pieces < 9:
            top, left = (int(index) for index in np.argwhere(np.asarray(mask))[0])
            ImageDraw.floodfill(mask, (left, top), 0)
            pieces += 1
        assert pieces == row[0]


@pytest.mark.parametrize("side", [0, 8, 24, 33, -32])
def test_sides_that_are_no_power_of_two_are_refused(side):
    with pytest.raises(UserError, match="--side"):
        make_shapes(1, side, 0)


def test_senseless_arguments_are_refused():
    with pytest.raises(UserError, match="negative"):
        make_shapes(-1, 16, 0)
    with pytest.raises(UserError, match="seed"):
        make_shapes(1, 16, -1)
    assert make_shapes(0, 16, 0)[0].shape == (0, 16, 16, 3)
    for wrong in (one(number=4), one(kind=0.5), one(x=np.nan), one()[:, :7], one()[0]):
        with pytest.raises(ValueError):
            render(wrong, 16)
