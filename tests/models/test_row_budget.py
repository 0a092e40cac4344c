"""Out of memory: half the rows, for good."""

import pytest
import torch

from pumice.models import RowBudget


def fits(most):
    def work(rows):
        if rows > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return rows

    return work


def test_halves_until_it_fits_and_stays_so():
    budget = RowBudget(11)
    assert budget.run(fits(3)) == 3
    assert budget.rows == 3
    assert budget.run(fits(100)) == 3


def test_one_row_that_does_not_fit_is_an_error():
    with pytest.raises(torch.OutOfMemoryError):
        RowBudget(4).run(fits(0))


def test_other_errors_pass():
    def work(rows):
        raise ValueError("no")

    budget = RowBudget(4)
    with pytest.raises(ValueError, match="no"):
        budget.run(work)
    assert budget.rows == 4


def test_no_rows():
    with pytest.raises(ValueError, match="batch_size: got 0"):
        RowBudget(0)


def test_torchscripts_out_of_memory_counts():
    def work(rows):
        if rows > 2:
            raise RuntimeError(
                "The following operation failed in the interpreter.\nCUDA out of memory. Tried"
            )
        return rows

    assert RowBudget(8).run(work) == 2
