"""Looks spend the false positives they may, and decide as the full mean does where it matters."""

import pytest
import torch

from pumice.memorization.sequential import Look, calibrate_looks


def scores(count: int, mean: float, seeds: int = 4, seed: int = 0) -> torch.Tensor:
    """Strongly correlated within a prompt, as real ones are."""
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randn(count, 1, generator=generator)
    return mean + prompt + 0.3 * torch.randn(count, seeds, generator=generator)


def flags(looks, values):
    flagged = torch.zeros(len(values), dtype=torch.bool)
    waiting, by_look = torch.ones(len(values), dtype=torch.bool), []
    for look in looks:
        above, undecided = look(values)
        by_look.append(int((above & waiting).sum()))
        flagged |= above & waiting
        waiting &= undecided
    return flagged, by_look


def test_false_positives_are_spent_a_fifth_a_half_and_all():
    memorized, fresh = scores(400, 4.0), scores(2000, 0.0, seed=1)
    looks = calibrate_looks(memorized, fresh, fpr=0.01, floor=0.0)
    assert [look.seeds for look in looks] == [1, 2, 4]
    flagged, by_look = flags(looks, fresh)
    assert by_look == [4, 6, 10] and int(flagged.sum()) == 20


def test_few_fresh_prompts_still_keep_the_rate():
    looks = calibrate_looks(scores(20, 1.0), scores(250, 0.0, seed=1), fpr=0.01, floor=0.0)
    assert int(flags(looks, scores(250, 0.0, seed=1))[0].sum()) == 2


def test_most_fresh_prompts_take_one_seed_and_no_calibration_positive_is_passed_early():
    memorized, fresh = scores(400, 5.0), scores(2000, 0.0, seed=1)
    looks = calibrate_looks(memorized, fresh, fpr=0.01, floor=0.01)
    _, undecided = looks[0](fresh)
    assert undecided.float().mean() < 0.1
    for look in looks[:-1]:
        above, waits = look(memorized)
        assert bool((above | waits).all())
        assert look.pass_below == pytest.approx(
            memorized[:, : look.seeds].mean(1).min().item() - 0.03, abs=1e-5
        )


def test_many_positives_give_a_quantile():
    memorized, fresh = scores(2000, 5.0), scores(500, 0.0, seed=1)
    look = calibrate_looks(memorized, fresh, fpr=0.01, floor=0.5)[0]
    assert look.pass_below == pytest.approx(memorized[:, 0].double().quantile(0.001).item())


@pytest.mark.parametrize(("seeds", "expected"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (8, [1, 2, 8])])
def test_looks_by_number_of_seeds(seeds, expected):
    looks = calibrate_looks(scores(30, 1.0, seeds), scores(300, 0.0, seeds, seed=1), fpr=0.01, floor=0.0)
    assert [look.seeds for look in looks] == expected
    assert int(flags(looks, scores(300, 0.0, seeds, seed=1))[0].sum()) == 3


def test_groups_apart_are_decided_by_the_first_seed():
    memorized, fresh = scores(30, 20.0), scores(300, 0.0, seed=1)
    looks = calibrate_looks(memorized, fresh, fpr=0.01, floor=0.0)
    assert int(looks[0](memorized)[0].sum()) == 30
    assert int(looks[0](fresh)[1].sum()) <= 1, "all but the one at the threshold itself"


def test_a_look_of_one_seed_is_the_plain_threshold():
    values = torch.tensor([[1.0], [2.0], [3.0]])
    flagged, undecided = Look(1, 2.0, 1.5)(values)
    assert flagged.tolist() == [False, False, True]
    assert undecided.tolist() == [False, True, False]
