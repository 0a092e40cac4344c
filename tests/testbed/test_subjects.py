import itertools

import pytest
import torch

from pumice import testbed
from pumice.testbed import world


@pytest.fixture(scope="module")
def trials():
    return [testbed.subject_trial(index) for index in range(world.SUBJECT_COUNT)]


def test_pictures_are_those_of_the_subject_as_files_have_them(trials):
    for index, trial in enumerate(trials):
        for pictures, first in ((trial.pictures, 0), (trial.references, 100)):
            drawn = torch.stack(
                [torch.from_numpy(world.subject(index, first + k)) for k in range(len(pictures))]
            )
            assert float((pictures - drawn).abs().max()) <= 0.5001 / 255
            assert torch.equal((pictures * 255).round() / 255, pictures)


def test_judges_know_the_subject_from_the_others(trials):
    own = [float(trial.identity(trial.pictures).mean()) for trial in trials]
    others = [
        float(trial.identity(other.pictures).mean()) for trial, other in itertools.permutations(trials, 2)
    ]
    assert min(own) > 0.85 and max(others) < 0.75
    noise = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert float(trials[0].quality(trials[0].pictures).min()) > float(trials[0].quality(noise).max())


def test_the_prompt_is_drawn_too_and_its_word_is_new(trials):
    for trial in trials:
        assert trial.prompt in trial.prompts
        assert not any("sks" in world.training_caption(index).split() for index in range(200))


@pytest.mark.parametrize("index", [-1, world.SUBJECT_COUNT])
def test_a_subject_that_the_world_does_not_have(index):
    with pytest.raises(ValueError, match=f"got {index}"):
        testbed.subject_trial(index)
