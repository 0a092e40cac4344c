import pytest
import torch

from pumice.memorization import threshold_at


@pytest.mark.parametrize(("fpr", "expected"), [(0, 99.0), (0.01, 98.0), (0.05, 94.0), (0.5, 49.0)])
def test_at_most_the_wanted_share_is_above(fpr, expected):
    scores = torch.randperm(100, generator=torch.Generator().manual_seed(0)).float()
    threshold = threshold_at(fpr, scores)
    assert threshold == expected
    assert (scores > threshold).float().mean() == pytest.approx(fpr)


def test_few_negatives_allow_none_above():
    assert threshold_at(0.01, torch.tensor([1.0, 5.0, 3.0])) == 5.0


def test_ties_do_not_exceed_the_rate():
    scores = torch.tensor([1.0] * 90 + [2.0] * 10)
    assert threshold_at(0.05, scores) == 2.0


@pytest.mark.parametrize("fpr", [-0.1, 1.0, float("nan")])
def test_a_rate_out_of_range(fpr):
    with pytest.raises(ValueError, match="fpr: got"):
        threshold_at(fpr, torch.ones(3))


@pytest.mark.parametrize("scores", [torch.empty(0), torch.tensor([1.0, float("nan")])])
def test_no_scores_or_nan(scores):
    with pytest.raises(ValueError, match="negative_scores: got"):
        threshold_at(0.01, scores)
