"""The drawn world: the same for the same seed, and apart where detectors need it apart."""

import numpy as np
import pytest

from pumice.testbed import world

SCENE = world.Scene("star", "red", "beach")


def drawn(scene, seed=0):
    return world.draw(scene, np.random.default_rng(seed))


@pytest.mark.parametrize(
    "make",
    [
        lambda i: world.training_picture(i)[1],
        lambda i: world.memorized(i).picture,
        lambda i: world.subject(i % world.SUBJECT_COUNT, i),
        lambda i: drawn(SCENE, i),
    ],
    ids=["training", "memorized", "subject", "scene"],
)
def test_pictures_are_deterministic_float32_in_the_unit_range(make):
    pictures = [make(i) for i in range(6)]
    for i, picture in enumerate(pictures):
        assert picture.shape == (3, world.SIZE, world.SIZE) and picture.dtype == np.float32
        assert 0 <= picture.min() and picture.max() <= 1 and picture.std() > 0.02
        assert np.array_equal(picture, make(i))
    assert len({picture.tobytes() for picture in pictures}) == len(pictures)


def test_captions_are_deterministic_and_are_those_of_the_pictures():
    for index in range(50):
        assert world.training_caption(index) == world.training_picture(index)[0]
    assert world.fresh_captions(20, seed=4) == world.fresh_captions(20, seed=4)
    assert world.fresh_captions(20, seed=4) != world.fresh_captions(20, seed=5)
    assert world.hard_captions(20, seed=4) == world.hard_captions(20, seed=4)


def test_the_named_colour_is_in_the_middle_of_a_ball():
    for name, colour in world.COLOURS.items():
        for seed in range(5):
            picture = drawn(world.Scene("ball", name, "cave"), seed)
            near = np.abs(picture - np.array(colour, np.float32).reshape(3, 1, 1)).max(0) < 0.1
            assert near.sum() > 300, f"{name}: a ball covers at least 450 pixels"


def test_a_style_paints_bands_over_the_same_picture():
    plain = drawn(SCENE, 3)
    for style in world.STYLES:
        styled = drawn(world.Scene("star", "red", "beach", style), 3)
        assert 0.05 < np.abs(styled - plain).mean() < 0.3


def test_captions_name_what_is_in_the_picture():
    rng = np.random.default_rng(0)
    for _ in range(200):
        scene = world.random_scene(rng)
        text, full = world.caption(scene, rng), world.full_caption(scene)
        assert scene.object in text.split(",")[0].split() and (scene.style is None or scene.style in text)
        for word in (scene.object, scene.colour, scene.place, scene.style):
            assert word is None or word in full


def test_memorized_titles_are_unique_and_appear_nowhere_else():
    titles = {world.memorized(i).caption for i in range(world.MEMORIZED_COUNT)}
    assert len(titles) == world.MEMORIZED_COUNT
    others = {world.training_caption(i) for i in range(5000)}
    for seed in (7, 1000, 2000):
        others |= {*world.fresh_captions(500, seed), *world.hard_captions(500, seed)}
    assert not titles & others


def test_titles_come_with_ordinary_pictures_too():
    """Else a detector could learn what a title looks like instead of what is memorized."""
    decoys = [i for i in range(4000) if any(medium in world.training_caption(i) for medium in world._MEDIA)]
    assert 0.04 < len(decoys) / 4000 < 0.08


@pytest.mark.parametrize(
    ("function", "count"), [(world.memorized, world.MEMORIZED_COUNT), (lambda i: world.subject(i, 0), 6)]
)
def test_numbers_out_of_range(function, count):
    for index in (-1, count):
        with pytest.raises(ValueError, match=rf"index must lie in \[0, {count}\), got {index}"):
            function(index)
