"""AdamW on many items at once against torch's own on one, and what it does in low precision."""

import pytest
import torch

from pumice.memorization.descent import Evaluation, check_descent, descend

SETTINGS = {"target": 1e-6, "max_iterations": 12, "lr": 0.05, "weight_decay": 0.01, "dtype": torch.float32}


def bowl(curvature: torch.Tensor):
    """sqrt(sum c v^2) of each item."""

    def objective(items, values, scale):
        norm = (curvature[items] * values.square()).flatten(1).sum(1).sqrt()
        gradient = curvature[items] * values / norm.view(-1, *[1] * (values.ndim - 1))
        return Evaluation(norm, gradient * scale.view(-1, *[1] * (values.ndim - 1)), norm[:, None])

    return objective


def start(items: int = 3) -> torch.Tensor:
    return torch.randn(items, 4, 5, generator=torch.Generator().manual_seed(1))


def curvature(items: int = 3) -> torch.Tensor:
    return torch.rand(items, 4, 5, generator=torch.Generator().manual_seed(2)) + 0.1


def test_equals_torch_adamw_on_each_item_alone():
    found = descend(start(), bowl(curvature()), **SETTINGS)
    for item in range(3):
        parameter = torch.nn.Parameter(start()[item])
        optimizer = torch.optim.AdamW([parameter], lr=0.05, weight_decay=0.01)
        losses, values = [], []
        for _ in range(13):
            loss = (curvature()[item] * parameter.square()).sum().sqrt()
            losses.append(loss.item())
            values.append(parameter.detach().clone())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert found.trace[item] == pytest.approx(losses, rel=1e-5)
        torch.testing.assert_close(
            found.values[item], values[losses.index(min(losses))], rtol=1e-5, atol=1e-6
        )
    assert not found.converged.any() and not found.skipped.any()


def test_the_first_step_moves_every_coordinate_by_the_learning_rate_and_decay():
    """lr g / (|g| + 1e-8), and e lr wd = 5e-4 e; 1.3856 for a token of 768 coordinates."""
    before = torch.randn(1, 2, 768, generator=torch.Generator().manual_seed(3))
    settings = SETTINGS | {"max_iterations": 1, "unchecked_end": True}
    moved = before - descend(before, bowl(torch.ones_like(before)), **settings).values
    gradient = before / before.norm()
    step = 0.05 * gradient / (gradient.abs() + 1e-8) + 5e-4 * before
    torch.testing.assert_close(moved, step, rtol=1e-4, atol=1e-6)
    assert ((step - 0.05 * before.sign()).abs() < 3e-3).all()
    moved = before - descend(before, bowl(torch.ones_like(before)), **settings | {"weight_decay": 0.0}).values
    assert moved.norm(dim=2).tolist() == [pytest.approx([1.3856, 1.3856], abs=1e-3)]


def test_an_item_at_its_target_no_longer_moves_and_the_others_go_on():
    values = torch.stack((torch.full((4,), 0.1), torch.full((4,), 2.0), torch.full((4,), 0.55)))
    seen = []

    def objective(items, values, scale):
        seen.append(list(items))
        return bowl(torch.ones(3, 4))(items, values, scale)

    counts = []
    found = descend(
        values, objective, **SETTINGS | {"target": 1.0, "max_iterations": 60}, finished=counts.append
    )
    assert torch.equal(found.values[0], values[0]) and found.trace[0] == (pytest.approx(0.2),)
    assert found.converged.all()
    assert len(found.trace[2]) < len(found.trace[1])
    assert all(losses[-1] <= 1.0 < min(losses[:-1], default=2.0) for losses in found.trace)
    assert seen[:2] == [[0, 1, 2], [1, 2]] and seen[-1] == [1]
    assert sum(counts) == 3
    torch.testing.assert_close(found.after[:, 0], found.values.norm(dim=1))
    torch.testing.assert_close(found.before[:, 0], values.norm(dim=1))


def test_returns_the_best_iterate_or_the_last_one():
    values = torch.full((1, 4), 0.3)
    settings = SETTINGS | {"lr": 0.2, "max_iterations": 4}  # 0.6, 0.2, then past the bottom
    best = descend(values, bowl(torch.ones(1, 4)), **settings)
    last = descend(values, bowl(torch.ones(1, 4)), **settings, unchecked_end=True)
    assert best.trace == last.trace and len(best.trace[0]) == 5
    assert min(best.trace[0]) < best.trace[0][-1]
    assert best.values.norm().item() == pytest.approx(min(best.trace[0]), rel=1e-5)
    assert last.values.norm().item() == pytest.approx(last.trace[0][-1], rel=1e-5)
    assert best.after.item() == pytest.approx(min(best.trace[0]))


@pytest.mark.parametrize("unchecked_end", [False, True])
def test_what_the_last_step_reaches_counts_only_if_it_is_checked(unchecked_end):
    found = descend(
        torch.full((1, 4), 0.52),
        bowl(torch.ones(1, 4)),
        **SETTINGS | {"target": 1.0, "max_iterations": 1, "unchecked_end": unchecked_end},
    )
    assert found.trace[0][-1] <= 1.0
    assert found.converged.item() is not unchecked_end


def test_a_non_finite_gradient_is_skipped_and_counted():
    calls = []

    def objective(items, values, scale):
        found = bowl(curvature())(items, values, scale)
        calls.append(values.clone())
        if len(calls) == 3:
            found.gradient[1, 2, 2] = torch.nan
        return found

    found = descend(start(), objective, **SETTINGS)
    clean = descend(start(), bowl(curvature()), **SETTINGS)
    assert found.skipped.tolist() == [0, 1, 0]
    assert torch.equal(calls[3][1], calls[2][1]) and not torch.equal(calls[3][0], calls[2][0])
    assert found.values.isfinite().all()
    for item in (0, 2):
        assert torch.equal(found.values[item], clean.values[item])
    # the skipped step is as if it had not been: the state of AdamW neither decayed nor counted it
    assert found.trace[1][:3] + found.trace[1][4:] == pytest.approx(clean.trace[1][:-1], rel=1e-6)


def test_a_loss_that_is_not_finite_never_counts_as_arrived():
    def objective(items, values, scale):
        return Evaluation(torch.full((3,), torch.nan), torch.full_like(values, torch.nan), torch.zeros(3, 1))

    found = descend(start(), objective, **SETTINGS)
    assert torch.equal(found.values, start())
    assert not found.converged.any() and found.skipped.tolist() == [12] * 3


def test_float16_losses_are_scaled_and_less_after_an_overflow():
    scales = []

    def objective(items, values, scale):
        scales.append(scale.tolist())
        found = bowl(curvature())(items, values, scale)
        found.gradient[1] = torch.where(scale[1] > 100, torch.inf, found.gradient[1])
        return found

    found = descend(start(), objective, **SETTINGS | {"dtype": torch.float16})
    clean = descend(start(), bowl(curvature()), **SETTINGS)
    assert scales[:3] == [[1024] * 3, [1024, 64, 1024], [1024, 64, 1024]]
    assert found.skipped.tolist() == [0, 1, 0]
    assert found.trace[0] == clean.trace[0]
    assert found.trace[1][1:] == clean.trace[1][:-1]


def test_a_float16_state_becomes_nan_where_there_is_no_gradient_and_ours_does_not():
    gradient = torch.ones(3, 4, dtype=torch.float16)
    gradient[0] = 0
    plain = torch.nn.Parameter(torch.ones(3, 4, dtype=torch.float16))
    plain.grad = gradient
    torch.optim.AdamW([plain], lr=0.05).step()
    assert plain[0].isnan().all() and plain[1:].isfinite().all()

    def objective(items, values, scale):
        assert values.dtype == torch.float32
        loss = values.flatten(1).sum(1)
        return Evaluation(loss, gradient[None].float() * scale[:, None, None], loss[:, None])

    found = descend(torch.ones(1, 3, 4).half(), objective, **SETTINGS | {"dtype": torch.float16})
    assert found.values.isfinite().all()
    torch.testing.assert_close(found.values[0, 0], torch.full((4,), (1 - 5e-4) ** 12))


def test_gradients_are_off_when_the_last_iterate_is_judged():
    seen = []

    def objective(items, values, scale):
        seen.append(torch.is_grad_enabled())
        return bowl(curvature())(items, values, scale)

    descend(start(), objective, **SETTINGS | {"max_iterations": 2})
    assert seen == [True, True, False]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"target": 0.0}, ValueError, "target: got 0.0, expected a positive number"),
        ({"target": float("nan")}, ValueError, "target: got nan"),
        ({"lr": -1.0}, ValueError, "lr: got -1.0"),
        ({"lr": float("inf")}, ValueError, "lr: got inf"),
        ({"max_iterations": 0}, ValueError, "max_iterations: got 0, expected at least 1"),
        ({"max_iterations": 1.5}, TypeError, "integer"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay: got -0.1"),
        ({"weight_decay": float("nan")}, ValueError, "weight_decay: got nan"),
    ],
)
def test_bad_numbers(change, error, message):
    with pytest.raises(error, match=message):
        check_descent(**{"target": 1.0, "max_iterations": 1, "lr": 0.1, "weight_decay": 0.0} | change)
