import json

import pytest
import torch

from pumice import testbed
from pumice.evaluate import mismatch
from pumice.testbed import world


def creatures(style=None, count=12):
    return torch.stack([torch.from_numpy(world.creature(k, 0, style=style)) for k in range(count)])


@pytest.fixture(scope="module")
def clip():
    return testbed.load_clip()


@pytest.fixture(scope="module")
def groups():
    return {"clean": creatures(), "banded": creatures("tanaka"), "few": creatures("varga", 3)}


@pytest.fixture(scope="module")
def found(clip, groups):
    return mismatch(groups, *clip, "a creature", other="tanaka")


@pytest.fixture(scope="module")
def embeddings(clip, groups):
    """Of both prompts and of each group, float64 of length 1, by the model itself."""
    model, tokenizer = clip
    prompts = ["a photo of a creature", "a photo of tanaka"]
    ids = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        seen = {name: model(input_ids=ids, pixel_values=x * 2 - 1) for name, x in groups.items()}
    texts = torch.nn.functional.normalize(seen["clean"].text_embeds.double(), dim=1)
    images = {n: torch.nn.functional.normalize(s.image_embeds.double(), dim=1) for n, s in seen.items()}
    return texts, images


def test_rows_are_the_formulas(found, embeddings):
    texts, images = embeddings
    for row in found.rows:
        e = images[row["name"]]
        p = torch.softmax(100 * e @ texts.T, dim=1)[:, 0]
        torch.testing.assert_close(found.probabilities[row["name"]].double(), p, rtol=0, atol=2e-3)
        assert row["pictures"] == len(e) and row["share"] == pytest.approx(float((p > 0.5).double().mean()))
        assert row["probability"] == pytest.approx(float(p.mean()), abs=1e-3)
        moved = (e.mean(0) - images["clean"].mean(0)).norm()
        assert row["displacement"] == pytest.approx(float(moved), abs=1e-5)


def test_points_are_the_plane_of_the_largest_variance(found, embeddings):
    _, images = embeddings
    every = torch.cat(list(images.values()))
    variances = torch.linalg.eigvalsh((every - every.mean(0)).T @ (every - every.mean(0)))
    points = torch.cat(list(found.points.values())).double()
    gram = points.T @ points
    torch.testing.assert_close(gram, torch.diag(variances[-2:].flip(0)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(points.mean(0), torch.zeros(2).double(), rtol=0, atol=1e-6)
    assert all(float(axis[axis.abs().argmax()]) > 0 for axis in points.T)
    assert {name: len(points) for name, points in found.points.items()} == {
        "clean": 12,
        "banded": 12,
        "few": 3,
    }


def test_what_looks_like_the_other_word_is_taken_for_it(found):
    clean, banded, _ = found.rows
    assert clean["displacement"] == 0 and banded["displacement"] > 0.1
    assert banded["probability"] < clean["probability"] - 0.3


def test_batches_lists_and_sizes_change_nothing(clip, groups, found):
    again = mismatch(groups, *clip, "a creature", other="tanaka", batch_size=5)
    listed = {name: list(images) for name, images in groups.items()}
    listed["few"][0] = listed["few"][0].repeat_interleave(2, 1).repeat_interleave(2, 2)
    alone = mismatch(listed, *clip, "a creature", other="tanaka")
    for name in groups:
        torch.testing.assert_close(again.probabilities[name], found.probabilities[name], rtol=0, atol=1e-3)
        torch.testing.assert_close(again.points[name], found.points[name], rtol=0, atol=1e-4)
    torch.testing.assert_close(alone.points["clean"], found.points["clean"], rtol=0, atol=0.02)


def test_one_picture_is_a_point_without_an_interval(clip):
    found = mismatch({"one": creatures(count=1)}, *clip)
    assert found.points["one"].tolist() == [[0, 0]] and found.rows[0]["probability_low"] is None
    assert found.settings == {"subject": "a photo of person", "other": "a photo of noise", "clip": "clip"}


def test_results_are_plain_data_and_a_table(found):
    again = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert again["rows"] == [dict(row) for row in found.rows] and len(again["points"]["few"][0]) == 2
    titles, *lines = found.table()
    assert titles == ("pictures", "count", "share", "probability", "displacement")
    assert [line[0] for line in lines] == ["clean", "banded", "few"] and lines[0][-1] == "0.000"


def test_the_model_is_left_as_it_was(found, groups):
    model, tokenizer = testbed.load_clip()
    model.train()
    again = mismatch(groups, model, tokenizer, "a creature", other="tanaka")
    torch.testing.assert_close(again.probabilities["few"], found.probabilities["few"], rtol=0, atol=1e-3)
    assert model.training and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pictures": torch.zeros(1, 3, 64, 64)}, TypeError, "pictures: got a Tensor, expected groups"),
        ({"pictures": {}}, ValueError, "pictures: got 0 groups"),
        ({"pictures": {"a": []}}, ValueError, "none of them empty"),
        ({"pictures": {"a": torch.full((1, 3, 8, 8), 2.0)}}, ValueError, r"pictures\['a'\]: got 2"),
        ({"pictures": {"a": [torch.zeros(3, 8, 8, dtype=torch.uint8)]}}, TypeError, "got torch.uint8"),
        ({"subject": 3}, TypeError, "subject: got a int"),
        ({"other": "person"}, ValueError, "other: got 'person', expected another"),
        ({"template": "a photo"}, ValueError, "template: got 'a photo', expected one with {}"),
        ({"batch_size": 0}, ValueError, "batch_size: got 0"),
    ],
)
def test_bad_input_is_one_line_that_names_the_argument(clip, change, error, message):
    given = {"pictures": {"a": torch.zeros(1, 3, 64, 64)}} | change
    with pytest.raises(error, match=message) as caught:
        mismatch(given.pop("pictures"), *clip, **given)
    assert "\n" not in str(caught.value)
