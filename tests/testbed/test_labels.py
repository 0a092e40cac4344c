"""Labels of the testbed's pictures: right on its own drawings, ranked, and complete."""

import numpy as np
import pytest
import torch

from pumice import testbed
from pumice.testbed import world


def drawn(scenes):
    return torch.from_numpy(
        np.stack([world.draw(scene, np.random.default_rng(i)) for i, scene in enumerate(scenes)])
    )


@pytest.mark.parametrize(
    ("attribute", "names"),
    [
        ("object", set(world.OBJECTS)),
        ("colour", set(world.COLOURS)),
        ("place", set(world.PLACES)),
        ("style", {"plain", *world.STYLES}),
    ],
)
def test_every_name_is_ranked_and_the_right_one_is_first(attribute, names):
    rng = np.random.default_rng(3)
    scenes = [world.random_scene(rng) for _ in range(40)]
    found = testbed.classifier(attribute)(drawn(scenes))
    assert all(len(labels) == len(names) and set(labels) == names for labels in found)
    wanted = [getattr(scene, attribute) or "plain" for scene in scenes]
    assert np.mean([labels[0] == name for labels, name in zip(found, wanted, strict=True)]) > 0.9


def test_the_order_is_that_of_the_readers_logits():
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = testbed.load_reader()(images)["colour"]
    for labels, row in zip(testbed.classifier("colour")(images), logits, strict=True):
        ranked = [float(row[list(world.COLOURS).index(label)]) for label in labels]
        assert ranked == sorted(ranked, reverse=True)


def test_a_replay_has_the_caption_of_its_memorized_picture_and_others_none():
    items = [world.memorized(index) for index in (0, 7, 35)]
    pictures = torch.from_numpy(np.stack([item.picture for item in items]))
    noise = 0.02 * torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
    replays = testbed.replays()
    assert replays((pictures + noise).clamp(0, 1)) == [[item.caption] for item in items]
    others = drawn([world.Scene("star", "red", "beach"), world.Scene("fish", "blue", "cave", "varga")])
    assert replays(others) == [["none"], ["none"]]


def test_a_picture_that_is_half_of_each_of_two_replays_neither():
    a, b = (torch.from_numpy(world.memorized(index).picture) for index in (1, 2))
    half = torch.cat([a[:, :, :32], b[:, :, 32:]], dim=2)
    assert testbed.replays()(half[None]) == [["none"]]


def test_another_attribute_is_refused():
    with pytest.raises(ValueError, match="attribute: got 'size', expected one of object, colour"):
        testbed.classifier("size")
