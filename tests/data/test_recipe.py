import pickle

import numpy as np
import pytest

from bvae.data.recipe import Recipe, Rejected, collect
from bvae.errors import UserError


def test_the_papers_crop_of_celeba():
    assert Recipe(size=64, channels=3, crop=128).box(178, 218) == (25, 45, 153, 173)


@pytest.mark.parametrize(
    ("crop", "width", "height", "box"),
    [
        (140, 178, 218, (19, 39, 159, 179)),
        (148, 178, 218, (15, 35, 163, 183)),
        (178, 178, 218, (0, 20, 178, 198)),
        ("none", 178, 218, (0, 0, 178, 218)),
        ("square", 178, 218, (0, 20, 178, 198)),
        ("square", 7, 4, (1, 0, 5, 4)),
        ("square", 1, 1, (0, 0, 1, 1)),
        (3, 6, 8, (1, 2, 4, 5)),  # an odd pixel left over goes right and down
    ],
)
def test_crops_are_centred(crop, width, height, box):
    assert Recipe(size=8, channels=3, crop=crop).box(width, height) == box


def test_smaller_than_the_crop_is_rejected():
    with pytest.raises(Rejected, match="200x100, smaller than the crop of 128"):
        Recipe(size=8, channels=3, crop=128).box(200, 100)


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": 0},
        {"size": 2_000_000_000},
        {"channels": 2},
        {"crop": 0},
        {"crop": "round"},
        {"crop": 2.5},
        {"filter": "box"},
    ],
)
def test_wrong_recipes_are_the_users_errors(wrong):
    with pytest.raises(UserError, match=str(next(iter(wrong.values())))):
        Recipe(**({"size": 8, "channels": 3} | wrong))


def test_collecting_keeps_order_and_counts():
    recipe = Recipe(size=2, channels=1)
    images = [np.full((2, 2, 1), i, np.uint8) for i in range(3)]
    decoded = collect([images[2], Rejected("a"), images[0], Rejected("b")], recipe)
    assert decoded.kept == [0, 2] and decoded.rejected == [(1, "a"), (3, "b")]
    assert np.array_equal(decoded.pixels, np.stack([images[2], images[0]]))
    none = collect([], recipe)
    assert none.pixels.shape == (0, 2, 2, 1) and none.pixels.dtype == np.uint8


def test_recipes_and_rejections_can_be_sent():
    recipe = Recipe(size=2, channels=1)
    assert pickle.loads(pickle.dumps(recipe)) == recipe
    assert str(pickle.loads(pickle.dumps(Rejected("why")))) == "why"
