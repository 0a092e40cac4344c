"""Separation and its uncertainty: closed forms, brute force, and the two conventions."""

import pytest
import torch

from pumice.memorization.statistics import auc, auc_interval, clopper_pearson, tpr_at_fpr


def test_auc_is_the_share_of_ordered_pairs():
    torch.manual_seed(0)
    positive, negative = torch.randint(0, 9, (37,)) + 2.0, torch.randint(0, 9, (53,)) + 0.0
    pairs = [(p > n) + 0.5 * (p == n) for p in positive.tolist() for n in negative.tolist()]
    assert auc(positive, negative) == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)
    assert auc(negative, positive) == pytest.approx(1 - auc(positive, negative), abs=1e-12)


def test_auc_of_groups_apart_and_alike():
    assert auc(torch.tensor([2.0, 3.0]), torch.tensor([0.0, 1.0])) == 1
    assert auc(torch.ones(4), torch.ones(5)) == 0.5
    assert auc_interval(torch.tensor([2.0, 3.0]), torch.tensor([0.0, 1.0])) == (1, 1)


def test_the_interval_covers_the_true_auc_about_as_often_as_it_says():
    """Normal scores one standard deviation apart: AUC = Phi(1 / sqrt 2) = 0.7602."""
    torch.manual_seed(1)
    hits = 0
    for trial in range(60):
        low, high = auc_interval(torch.randn(60) + 1, torch.randn(60), resamples=200, seed=trial)
        assert low < high
        hits += low <= 0.7602 <= high
    assert hits >= 51


def test_the_interval_is_that_of_resampled_scores():
    torch.manual_seed(2)
    positive, negative = torch.randn(30) + 1, torch.randn(40)
    generator = torch.Generator().manual_seed(5)
    found = []
    for _ in range(300):
        rows = torch.randint(30, (30,), generator=generator)
        columns = torch.randint(40, (40,), generator=generator)
        found.append(auc(positive[rows], negative[columns]))
    expected = torch.tensor(found, dtype=torch.float64).quantile(torch.tensor([0.025, 0.975]).double())
    assert auc_interval(positive, negative, resamples=300, seed=5) == pytest.approx(expected.tolist())


def test_the_two_conventions_of_tpr_differ_as_published():
    """One false positive of 120 is 0.83 %, the nearest to 1 %; "nearest" takes the first such point."""
    negative, positive = torch.arange(120.0), torch.tensor([119.5, 118.5, 117.5, 0.5])
    assert tpr_at_fpr(positive, negative, convention="below") == 0.5
    assert tpr_at_fpr(positive, negative, convention="nearest") == 0.25


@pytest.mark.parametrize("count", [100, 200, 300, 500, 1000])
def test_below_means_less_than_even_where_a_share_is_exactly_that(count):
    """The hundredth part of the negatives above is 1 %, which is not less than 1 %."""
    negative = torch.arange(float(count))
    positive = torch.tensor([count + 1.0, count - count / 100 - 0.5])
    assert tpr_at_fpr(positive, negative, convention="below") == 0.5


def test_nearest_may_lie_above_the_wanted_rate():
    negative = torch.arange(60.0)
    positive = torch.tensor([58.5, 59.5])
    assert tpr_at_fpr(positive, negative, convention="below") == 0.5
    assert tpr_at_fpr(positive, negative, 0.016, convention="nearest") == 0.5
    assert tpr_at_fpr(torch.tensor([58.5, 58.6]), negative, 0.016, convention="nearest") == 0


@pytest.mark.parametrize("convention", ["below", "nearest"])
def test_tpr_against_every_threshold(convention):
    torch.manual_seed(3)
    positive, negative = torch.randn(40).mul(4).round() + 4, torch.randn(300).mul(4).round()
    points = [(0.0, 0.0)]
    for threshold in sorted({*positive.tolist(), *negative.tolist()}, reverse=True):
        points.append(
            ((negative >= threshold).double().mean().item(), (positive >= threshold).double().mean().item())
        )
    if convention == "below":
        expected = max(true for false, true in points if false < 0.05)
    else:
        expected = min(points, key=lambda point: abs(point[0] - 0.05))[1]
    assert tpr_at_fpr(positive, negative, 0.05, convention=convention) == pytest.approx(expected)


def test_clopper_pearson_golden():
    assert clopper_pearson(5, 500) == pytest.approx((0.00325, 0.02318), abs=5e-6)


def test_clopper_pearson_closed_forms():
    low, high = clopper_pearson(0, 20)
    assert low == 0 and high == pytest.approx(1 - 0.025 ** (1 / 20))
    assert clopper_pearson(20, 20)[0] == pytest.approx(0.025 ** (1 / 20))


BAD = {
    "no positives": (lambda: auc(torch.tensor([]), torch.ones(2)), "positive: got 0 scores"),
    "NaN": (lambda: auc(torch.ones(2), torch.tensor([float("nan")])), "negative: got 1 scores"),
    "rate": (lambda: tpr_at_fpr(torch.ones(2), torch.ones(2), 1.0), "fpr: got 1.0"),
    "convention": (lambda: tpr_at_fpr(torch.ones(2), torch.ones(2), convention="x"), "convention: got 'x'"),
    "hits": (lambda: clopper_pearson(3, 2), "hits: got 3 of 2"),
    "nothing counted": (lambda: clopper_pearson(0, 0), "hits: got 0 of 0"),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
