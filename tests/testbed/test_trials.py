import pytest
import torch

from pumice import testbed
from pumice.testbed import world


@pytest.fixture(scope="module")
def caption():
    return testbed.memorized_captions()[0]


@pytest.mark.parametrize(("concept", "attribute"), [("ball", "object"), ("varga", "style")])
def test_prompts_name_what_their_labels_say(concept, attribute):
    trial = testbed.trial(concept, 12)
    assert trial.concept == concept and len(trial.erased) == len(trial.preserved) == 12
    assert {label for _, label in trial.erased} == {concept}
    assert all(concept in prompt for prompt, _ in trial.erased)
    names = {*world.OBJECTS} if attribute == "object" else {*world.STYLES, "plain"}
    assert {label for _, label in trial.preserved} <= names - {concept}
    for prompt, label in trial.preserved:
        assert concept not in prompt and (label in prompt or label == "plain")


def test_labels_are_read_from_pictures():
    pairs = [world.training_picture(10**8 + i) for i in range(40)]
    images = torch.stack([torch.from_numpy(picture) for _, picture, _ in pairs])
    for concept, attribute in (("ball", "object"), ("varga", "style")):
        found = testbed.trial(concept, 1).classify(images)
        wanted = [getattr(scene, attribute) or "plain" for *_, scene in pairs]
        hits = sum(labels[0] == label for labels, label in zip(found, wanted, strict=True))
        assert hits >= 38, attribute
        assert all(len(set(labels)) == len(labels) == len(found[0]) for labels in found)


def test_a_memorized_caption_is_one_prompt_and_is_told_from_ordinary_pictures(caption):
    trial = testbed.trial(caption, 6)
    assert trial.erased == ((caption, caption),) and len(trial.preserved) == 6
    replay = torch.from_numpy(world.memorized(0).picture)
    _, ordinary, scene = world.training_picture(10**8)
    found = trial.classify(torch.stack([replay, torch.from_numpy(ordinary)]))
    assert found[0][0] == caption and found[1][0] == scene.object


def test_the_same_seed_gives_the_same_scenes_and_another_gives_others():
    one, same, other = (testbed.trial("fish", 8, seed=seed) for seed in (0, 0, 1))
    assert (one.erased, one.preserved) == (same.erased, same.preserved)
    assert set(one.preserved) != set(other.preserved)


@pytest.mark.parametrize("concept", ["dragon", "Ball", ""])
def test_a_concept_that_the_world_does_not_have(concept):
    with pytest.raises(ValueError, match=r"concept: got .* expected an object or artist") as caught:
        testbed.trial(concept)
    assert "\n" not in str(caught.value)
