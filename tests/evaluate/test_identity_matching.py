"""The identity matching score against its definition, on embeddings whose distances are known."""

import math

import pytest
import torch

from pumice.evaluate import identity_matching_score


def at(*distances):
    """Unit vectors (n, 2) at these cosine distances from (1, 0)."""
    angles = torch.tensor([math.acos(1 - distance) for distance in distances])
    return torch.stack((angles.cos(), angles.sin()), dim=1)


DRAWING = torch.tensor([[3.0, 0.0]])  # lengths do not count


def test_no_match_is_minus_one_and_one_at_a_distance_is_what_is_left():
    assert identity_matching_score(DRAWING, at(0.41, 0.7, 1.2)).tolist() == [-1]
    assert identity_matching_score(DRAWING, at(0.41, 0.25, 1.2)).item() == pytest.approx(0.75, abs=1e-6)


def test_only_matches_are_averaged():
    assert identity_matching_score(DRAWING, at(0.1, 0.3, 0.9)).item() == pytest.approx(0.8, abs=1e-6)
    assert identity_matching_score(DRAWING, at(0.1, 0.3, 0.9), 0.2).item() == pytest.approx(0.9, abs=1e-6)


def test_every_drawing_has_its_own():
    drawings = torch.cat((DRAWING, -DRAWING))
    found = identity_matching_score(drawings.half(), at(0.0))
    assert found.dtype == torch.float64 and found.tolist() == pytest.approx([1, -1])
    assert identity_matching_score(drawings[:0], at(0.0)).shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((DRAWING.long(), DRAWING), TypeError, "embeddings: got torch.int64"),
        (([1.0], DRAWING), TypeError, "embeddings: got a list"),
        ((DRAWING[0], DRAWING), ValueError, r"embeddings: got shape \(2,\)"),
        ((DRAWING, DRAWING[:0]), ValueError, "references: got shape .* with R > 0"),
        ((DRAWING, torch.ones(1, 3)), ValueError, r"references: got shape \(1, 3\), expected \(R, 2\)"),
        ((DRAWING * math.nan, DRAWING), ValueError, "embeddings: got shape .* or NaN"),
        ((DRAWING, DRAWING, -1), ValueError, "threshold: got -1"),
    ],
)
def test_bad_input_is_one_line(arguments, error, message):
    with pytest.raises(error, match=message) as caught:
        identity_matching_score(*arguments)
    assert "\n" not in str(caught.value)
