"""Transition points of traces worked out by hand, and the arithmetic that withholds guidance."""

import pytest
import torch

from pumice.memorization.dynamic_guidance import Transition, transition_step, with_guidance_scale

TRACES = {
    "the step after the first minimum": ([5, 4, 3, 3.5], None, 3),
    "as early as the third step": ([5, 4, 4.5, 1], None, 2),
    "the first of two minima": ([5, 4, 4.5, 3, 6], None, 2),
    "after a rise": ([3, 5, 4, 4.1], None, 3),
    "a flat bottom is no minimum": ([5, 4, 4, 4.5], None, None),
    "a rising trace has none": ([1, 2, 3], None, None),
    "a falling trace has none": ([3, 2, 1], None, None),
    "two steps are too few": ([2, 1], None, None),
    "no steps": ([], None, None),
    "a flat bottom ends at the latest step": ([5, 4, 4, 4.5, 5], 3, 3),
    "a minimum before the latest step": ([5, 4, 4.5, 5], 3, 2),
    "a latest step before the minimum": ([5, 4, 3, 3.5], 1, 1),
    "a latest step of 0 withholds nothing": ([5, 4, 3, 3.5], 0, 0),
    "NaN is no minimum": ([5, float("nan"), 6, 7], None, None),
}


@pytest.mark.parametrize(("trace", "latest", "expected"), TRACES.values(), ids=TRACES.keys())
def test_the_transition_of_a_trace(trace, latest, expected):
    assert transition_step(trace, latest) == expected
    assert transition_step(torch.tensor(trace, dtype=torch.float64), latest) == expected


def test_samples_pass_on_their_own_and_stay_so():
    traces = torch.tensor([[5, 4, 3, 3.5, 1, 0.5], [5, 4, 4.5, 4, 3, 2], [1, 2, 3, 4, 5, 6]])
    transition = Transition()
    passed = torch.stack([transition.update(traces[:, i], due=i == 5) for i in range(6)], dim=1)
    expected = [[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]]
    assert torch.equal(passed, torch.tensor(expected, dtype=torch.bool))


def test_a_trace_of_several_samples_is_refused():
    with pytest.raises(ValueError, match=r"^trace: got shape \(2, 3\), expected \(steps,\)$"):
        transition_step(torch.zeros(2, 3))


@pytest.mark.parametrize("wanted", [1.0, 0.0, -2.0, 3.0])
def test_the_sampler_ends_up_with_the_wanted_scale(wanted):
    cond, uncond = torch.randn(2, 3, 4, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = torch.tensor([True, False, True])
    changed = with_guidance_scale(cond, uncond, rows, guidance_scale=7.5, wanted=wanted)
    assert torch.equal(changed[1], cond[1])
    guided = uncond + 7.5 * (changed - uncond)
    expected = uncond + wanted * (cond - uncond)
    torch.testing.assert_close(guided[rows], expected[rows])
