"""Pictures lie where their row and column are, and texts stay out of them."""

import numpy as np
import pytest
import torch

from pumice.evaluate import contact_sheet


def flat(*colour, size=(64, 64)):
    return torch.tensor(colour, dtype=torch.float32).view(3, 1, 1).expand(3, *size)


def boxes(sheet, colour):
    """(top, left, bottom, right) of the pixels of a colour; None without any."""
    there = (np.asarray(sheet) == np.array(colour, np.uint8)).all(-1)
    rows, columns = np.flatnonzero(there.any(1)), np.flatnonzero(there.any(0))
    return (rows[0], columns[0], rows[-1] + 1, columns[-1] + 1) if len(rows) else None


def test_pictures_stand_in_rows_and_columns():
    grid = [[flat(1, 0, 0), flat(0, 1, 0)], [flat(0, 0, 1), flat(1, 1, 0)]]
    sheet = contact_sheet(grid, columns=["before", "after"], labels=["one", "two"], picture_px=64)
    found = [[boxes(sheet, (picture[:, 0, 0] * 255).int().tolist()) for picture in row] for row in grid]
    for row in found:
        for top, left, bottom, right in row:
            assert bottom - top == right - left == 64
        assert row[0][0] == row[1][0] and row[0][3] < row[1][1]
    for above, below in zip(*found, strict=True):
        assert above[1] == below[1] and above[2] < below[0]
    assert sheet.mode == "RGB" and sheet.getpixel((0, 0)) == (255, 255, 255)


def test_bytes_and_floats_give_the_same_sheet():
    picture = torch.randint(
        0, 256, (3, 40, 40), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    sheets = [contact_sheet([[p]], columns=["a"], labels=["b"]) for p in (picture, picture / 255)]
    assert np.array_equal(*map(np.asarray, sheets))


def test_other_sizes_are_fitted_into_the_square_and_keep_their_shape():
    sheet = contact_sheet([[flat(1, 0, 0, size=(50, 100))]], columns=[""], labels=[""], picture_px=64)
    top, left, bottom, right = boxes(sheet, (255, 0, 0))
    assert (bottom - top, right - left) == (32, 64)


def test_texts_are_there_and_never_reach_a_picture():
    long = "a very long prompt with ornaments " * 20
    red = [[flat(1, 0, 0)]] * 2
    sheet = contact_sheet(red, columns=["t" * 300], labels=[long, "x" * 500], picture_px=64)
    assert boxes(sheet, (255, 0, 0))[3] - boxes(sheet, (255, 0, 0))[1] == 64
    bare = contact_sheet(red, columns=[""], labels=["", ""], picture_px=64)
    assert bare.size == sheet.size
    same = np.asarray(bare) == np.asarray(sheet)
    top, left, bottom, right = boxes(sheet, (255, 0, 0))
    assert same[top:bottom, left:right].all()
    assert not same[:top].all() and not same[top:, :left].all()
    assert same[:, right:].all() and same[bottom:].all() and same[:, :4].all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rows": []}, ValueError, "rows, columns: got 0 and 1"),
        ({"labels": ["a", "b"]}, ValueError, "labels: got 2, expected 1, one a row"),
        ({"columns": ["a", "b"]}, ValueError, "rows: got 1 pictures in one, expected 2, as columns"),
        ({"columns": "a"}, TypeError, "columns: expected a list of strings"),
        ({"rows": [[torch.rand(1, 3, 8, 8)]]}, ValueError, r"rows: got a picture \(1, 3, 8, 8\)"),
        ({"rows": [[torch.rand(3, 8, 8) * 255]]}, ValueError, "rows: got .*, expected values in"),
        (
            {"rows": [[torch.zeros(1, 8, 8, dtype=torch.uint8)]]},
            ValueError,
            r"rows: got a picture \(1, 8, 8\)",
        ),
        ({"picture_px": 4}, ValueError, "picture_px: got 4"),
    ],
)
def test_bad_input_is_one_line_that_names_the_argument(change, error, message):
    good = {"rows": [[flat(1, 0, 0)]], "columns": ["a"], "labels": ["b"]} | change
    with pytest.raises(error, match=message) as caught:
        contact_sheet(good.pop("rows"), **good)
    assert "\n" not in str(caught.value)
