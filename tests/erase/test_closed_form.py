"""The map behind every closed-form edit, against the normal equations of one layer."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from pumice.erase.closed_form import (
    LinearMap,
    Preserved,
    SingularError,
    down_factor,
    solve,
    sweep_erase_scale,
    sweep_lamb,
)

WIDTH, OUT = 12, 7
FEW, MANY = 4, 40


def rows(count: int, seed: int = 0, width: int = WIDTH) -> Tensor:
    """Like tokens: they share much of their direction."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(width, generator=generator, dtype=torch.float64)
    return 3 * (shared + torch.randn(count, width, generator=generator, dtype=torch.float64))


def weight() -> Tensor:
    return torch.randn(OUT, WIDTH, generator=torch.Generator().manual_seed(99), dtype=torch.float64)


def published(w: Tensor, c: Tensor, g: Tensor, p: Tensor, *, eta: float, gamma: float, lamb: float) -> Tensor:
    """W' of one layer as the papers write it, token by token."""
    left, a = lamb * w, lamb * torch.eye(w.shape[1], dtype=w.dtype)
    for source, target, scale in ((c, g, eta), (p, p, gamma)):
        for x, y in zip(source, target, strict=True):
            left = left + scale * torch.outer(w @ y, x)
            a = a + scale * torch.outer(x, x)
    return left @ torch.linalg.inv(a)


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def preserved(count: int, gamma: float = 1.0) -> Preserved | None:
    return Preserved.of(rows(count, seed=2), gamma) if count else None


@pytest.mark.parametrize("p", [0, FEW, MANY])
@pytest.mark.parametrize("m", [1, 3, WIDTH // 2, WIDTH - 1, WIDTH, WIDTH + 1, 3 * WIDTH])
class TestSolve:
    """m < d/2 is the dual form, m > d a map of full rank, the others the primal form."""

    def test_every_layer_becomes_what_its_own_equation_says(self, m, p):
        w, c, g = weight(), rows(m), rows(m, seed=1)
        found = solve(c, g, erase_scale=1.3, lamb=0.5, preserved=preserved(p, 0.7))
        expected = published(w, c, g, rows(p, seed=2), eta=1.3, gamma=0.7, lamb=0.5)
        assert error(w @ found.dense(), expected) < 1e-10
        assert len(found.down) <= WIDTH

    def test_no_weight_is_better(self, m, p):
        """The gradient of the objective is zero there, and is not where the weights came from."""
        w, c, g, kept = weight(), rows(m), rows(m, seed=1), rows(p, seed=2)

        def gradient(edited: Tensor) -> float:
            edited = edited.detach().requires_grad_()
            loss = 1.3 * (c @ edited.T - g @ w.T).square().sum() + 0.5 * (edited - w).square().sum()
            loss = loss + 0.7 * (kept @ edited.T - kept @ w.T).square().sum()
            (slope,) = torch.autograd.grad(loss, edited)
            return float(slope.norm())

        found = solve(c, g, erase_scale=1.3, lamb=0.5, preserved=preserved(p, 0.7))
        assert gradient(w @ found.dense()) < 1e-10 * gradient(w)

    def test_targets_that_are_the_rows_themselves_are_no_edit_at_all(self, m, p):
        c, x = rows(m), rows(5, seed=3)
        found = solve(c, c.clone(), lamb=0.5, preserved=preserved(p))
        assert torch.equal(found(x), x) and torch.equal(found.dense(), torch.eye(WIDTH, dtype=x.dtype))

    def test_a_repeated_concept_counts_twice(self, m, p):
        c, g = rows(m), rows(m, seed=1)
        twice = solve(torch.cat([c, c]), torch.cat([g, g]), lamb=0.5, preserved=preserved(p))
        assert (
            error(twice.dense(), solve(c, g, erase_scale=2.0, lamb=0.5, preserved=preserved(p)).dense())
            < 1e-10
        )

    def test_a_ridge_without_end_leaves_everything(self, m, p):
        c, g = rows(m), rows(m, seed=1)
        changes = [
            float((solve(c, g, lamb=lamb, preserved=preserved(p)).dense() - torch.eye(WIDTH)).norm())
            for lamb in (0.5, 1e3, 1e6, 1e9)
        ]
        assert all(more > less for more, less in pairwise(changes)) and changes[-1] < 1e-4

    def test_the_condition_number_is_that_of_the_matrix(self, m, p):
        c, g, kept = rows(m), rows(m, seed=1), rows(p, seed=2)
        a = 0.5 * torch.eye(WIDTH, dtype=c.dtype) + 1.3 * c.T @ c + 0.7 * kept.T @ kept
        exact = float(torch.linalg.cond(a))
        found = solve(c, g, erase_scale=1.3, lamb=0.5, preserved=preserved(p, 0.7)).condition
        assert exact / 1.2 <= found <= exact * (1 + 1e-6)


@pytest.mark.parametrize("p", [0, FEW, MANY])
@pytest.mark.parametrize("m", [1, WIDTH // 2 - 1])
def test_the_dual_form_is_the_primal_one(m, p):
    """Rows of zeros say nothing, but make them so many that the primal form is taken, or full rank."""
    c, g = rows(m), rows(m, seed=1)
    dual = solve(c, g, lamb=0.3, preserved=preserved(p)).dense()
    for more in (WIDTH // 2, WIDTH + 1):
        zeros = torch.zeros(more, WIDTH, dtype=c.dtype)
        primal = solve(torch.cat([c, zeros]), torch.cat([g, zeros]), lamb=0.3, preserved=preserved(p))
        assert error(primal.dense(), dual) < 1e-12


def test_one_token():
    """M = I + eta (g - c) c^T / (lambda + eta |c|^2): c goes the share k of the way to g."""
    c, g = rows(1), rows(1, seed=1)
    eta, lamb = 1.7, 0.5
    square = float(c.square().sum())
    found = solve(c, g, erase_scale=eta, lamb=lamb)
    expected = torch.eye(WIDTH) + eta * torch.outer((g - c)[0], c[0]) / (lamb + eta * square)
    assert error(found.dense(), expected) < 1e-14
    k = eta * square / (lamb + eta * square)
    torch.testing.assert_close(found(c), c + k * (g - c), rtol=1e-13, atol=0)
    assert found.condition == pytest.approx((lamb + eta * square) / lamb, rel=1e-9)


def test_what_is_orthogonal_to_the_concepts_stays():
    c, g = rows(3), rows(3, seed=1)
    away = rows(5, seed=3)
    away = away - away @ torch.linalg.pinv(c) @ c
    found = solve(c, g, lamb=0.5)
    torch.testing.assert_close(found(away), away, rtol=0, atol=1e-12)
    assert (found(c) - c).norm() > 0.9 * (g - c).norm()


def test_the_weights_of_erasing_and_preserving_say_who_wins():
    c, g, kept = rows(3), rows(3, seed=1), rows(5, seed=2)
    found = solve(
        c, g, lamb=1e-9, preserved=Preserved.of(kept)
    )  # 8 rows for 12 dimensions: both are possible
    torch.testing.assert_close(found(c), g, rtol=0, atol=1e-6)
    torch.testing.assert_close(found(kept), kept, rtol=0, atol=1e-6)
    for scales, stays in (((1.0, 1e9), True), ((1e9, 1.0), False)):
        found = solve(c, g, erase_scale=scales[0], lamb=0.5, preserved=Preserved.of(c, scales[1]))
        torch.testing.assert_close(found(c), c if stays else g, rtol=0, atol=1e-6)


def test_nothing_to_erase_with_is_no_edit():
    found = solve(rows(3), rows(3, seed=1), erase_scale=0.0, lamb=0.5, preserved=preserved(FEW))
    assert torch.equal(found.dense(), torch.eye(WIDTH, dtype=torch.float64))


class TestPreserved:
    def test_rows_of_any_precision_are_summed_in_float64(self):
        kept = rows(FEW, seed=2).float()
        found = Preserved.of(kept, 0.7)
        assert found.gram.dtype == torch.float64 and found.rows == FEW
        torch.testing.assert_close(found.gram, 0.7 * kept.double().T @ kept.double(), rtol=1e-14, atol=0)

    def test_it_is_factored_once_for_each_ridge(self):
        kept = preserved(FEW)
        first = kept.factor(0.5)
        solve(rows(1), rows(1, seed=1), lamb=0.5, preserved=kept)
        assert kept.factor(0.5) is first and kept.factor(0.1) is not first

    def test_it_serves_one_edit_after_the_other(self):
        kept = preserved(FEW)
        for seed, lamb in ((1, 0.5), (5, 0.1), (7, 0.5)):
            c, g = rows(2, seed=seed), rows(2, seed=seed + 1)
            again = solve(c, g, lamb=lamb, preserved=kept)
            assert torch.equal(again.dense(), solve(c, g, lamb=lamb, preserved=preserved(FEW)).dense())


@pytest.mark.parametrize("p", [0, FEW, MANY])
@pytest.mark.parametrize("m", [1, WIDTH - 1, 2 * WIDTH])
class TestSweeps:
    def test_over_erase_scales(self, m, p):
        c, g, kept = rows(m), rows(m, seed=1), preserved(p)
        scales = (0.0, 0.1, 1.0, 30.0)
        for scale, found in zip(
            scales, sweep_erase_scale(c, g, scales, lamb=0.5, preserved=kept), strict=True
        ):
            alone = solve(c, g, erase_scale=scale, lamb=0.5, preserved=kept)
            assert error(found.dense(), alone.dense()) < 1e-11
            assert len(found.down) <= WIDTH
            assert found.condition == pytest.approx(alone.condition, rel=0.2)

    def test_over_ridges(self, m, p):
        c, g, kept = rows(m), rows(m, seed=1), preserved(p)
        lambs = (1e-3, 0.5, 100.0)
        for lamb, found in zip(lambs, sweep_lamb(c, g, lambs, erase_scale=1.3, preserved=kept), strict=True):
            alone = solve(c, g, erase_scale=1.3, lamb=lamb, preserved=kept)
            assert error(found.dense(), alone.dense()) < 1e-10
            assert found.condition == pytest.approx(alone.condition, rel=0.2)


class TestLinearMap:
    def test_it_maps_rows(self):
        found, x = solve(rows(3), rows(3, seed=1), lamb=0.5), rows(5, seed=3)
        torch.testing.assert_close(found(x), x @ found.dense().T, rtol=1e-12, atol=1e-12)

    def test_one_after_the_other_is_their_product(self):
        found = [solve(rows(7, seed=s), rows(7, seed=s + 1), lamb=0.5) for s in (0, 5, 9)]
        product = found[0].then(found[1]).then(found[2])
        assert error(product.dense(), found[0].dense() @ found[1].dense() @ found[2].dense()) < 1e-13
        assert len(product.down) == WIDTH  # of 21 rows
        assert product.condition == max(one.condition for one in found)

    def test_the_second_edit_of_a_model_starts_from_the_first(self):
        """Targets of the second are read from the weights that the first left."""
        w, kept = weight(), preserved(FEW)
        for seed in (0, 5):
            c, g = rows(2, seed=seed), rows(2, seed=seed + 1)
            w = published(w, c, g, rows(FEW, seed=2), eta=1.0, gamma=1.0, lamb=0.5)
        first, second = (
            solve(rows(2, seed=seed), rows(2, seed=seed + 1), lamb=0.5, preserved=kept) for seed in (0, 5)
        )
        assert error(weight() @ first.then(second).dense(), w) < 1e-11

    def test_more_factors_than_dimensions_become_one_matrix(self):
        found = LinearMap(rows(20).T.contiguous(), rows(20, seed=1), 3.0)
        compact = found.compact()
        assert compact.up.shape == compact.down.shape == (WIDTH, WIDTH) and compact.condition == 3
        assert error(compact.dense(), found.dense()) < 1e-14
        assert compact.compact() is compact


class TestWithoutARidge:
    """Enough rows to preserve, or to edit, make the solution one."""

    @pytest.mark.parametrize(("m", "p"), [(1, WIDTH), (3, MANY), (8, MANY), (3, WIDTH - 2), (8, FEW)])
    def test_enough_rows(self, m, p):
        w, c, g = weight(), rows(m), rows(m, seed=1)
        found = solve(c, g, lamb=0.0, preserved=preserved(p))
        expected = published(w, c, g, rows(p, seed=2), eta=1.0, gamma=1.0, lamb=0.0)
        assert error(w @ found.dense(), expected) < 1e-9

    def test_of_edited_rows_alone_it_is_least_squares(self):
        c, g = rows(20), rows(20, seed=1)
        expected = torch.linalg.lstsq(c, g).solution.T
        assert error(solve(c, g, lamb=0.0).dense(), expected) < 1e-11

    @pytest.mark.parametrize(("m", "p"), [(1, 0), (8, 0), (1, FEW), (8, 2), (30, 0)])
    def test_too_few_rows_are_refused(self, m, p):
        c, kept = rows(m), preserved(p)
        if m > WIDTH:
            c = c[:3].repeat(10, 1)  # thirty rows in three dimensions
        with pytest.raises(SingularError, match=r"rows|singular") as caught:
            solve(c, rows(m, seed=1), lamb=0.0, preserved=kept)
        assert isinstance(caught.value, ValueError) and "\n" not in str(caught.value)

    def test_preserving_one_text_many_times_is_not_enough(self):
        kept = Preserved.of(rows(1, seed=2).repeat(MANY, 1))
        with pytest.raises(SingularError):
            solve(rows(1), rows(1, seed=1), lamb=0.0, preserved=kept)


def test_down_is_all_of_an_edit_that_its_targets_do_not_change():
    c, kept = rows(3), preserved(FEW)
    down, condition = down_factor(c, erase_scale=1.3, lamb=0.5, preserved=kept)
    for seed in (1, 5):
        g = rows(3, seed=seed)
        found = solve(c, g, erase_scale=1.3, lamb=0.5, preserved=kept)
        assert torch.equal(found.down, down) and torch.equal(found.up, 1.3 * (g - c).T)
        assert found.condition == condition


def test_it_keeps_its_digits_where_float32_loses_them():
    """Nearly collinear rows as padding has them, a small ridge: every row is still moved all its way."""
    generator = torch.Generator().manual_seed(0)
    base = rows(1)
    c = base + 1e-3 * torch.randn(5, WIDTH, generator=generator, dtype=torch.float64)
    g = rows(5, seed=1)
    found = solve(c, g, lamb=1e-9)
    assert 1e10 < found.condition < 1e13
    expected = published(weight(), c, g, rows(0), eta=1.0, gamma=1.0, lamb=1e-9)
    assert error(weight() @ found.dense(), expected) < 1e-3
    assert (found(c) - g).norm() < 2e-2 * (c - g).norm()
