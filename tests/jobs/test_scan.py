"""Scans: thresholds, resuming after an interruption, and what a folder may be used for."""

import sys

import pytest
import torch
from PIL import Image

from pumice import jobs, memorization
from pumice.testbed import tiny_pipeline

PROMPTS = ["a cat", "a dog in the sea", "a house", "a red bird", "a cat"]
SETTINGS = {"seeds": 2, "steps": 1}


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(sys.modules["pumice.jobs.scan"], "SHARD", 2)


def test_scores_are_those_of_detect(tmp_path, small_shards):
    pipe = tiny_pipeline("sd1")
    found = jobs.scan(pipe, PROMPTS, tmp_path, **SETTINGS)
    expected = memorization.detect(pipe, PROMPTS, **SETTINGS)
    torch.testing.assert_close(found.detection.magnitudes, expected.magnitudes, rtol=1e-5, atol=1e-5)
    ranked = found.detection.scores[list(found.order)]
    assert torch.equal(ranked, ranked.sort(descending=True).values)
    assert found.threshold is None and found.memorized == (None,) * 5 and found.pictures == {}


def test_a_given_threshold(tmp_path):
    found = jobs.scan(tiny_pipeline("sd1"), PROMPTS, tmp_path, threshold=1.05, **SETTINGS)
    assert found.memorized == tuple(score > 1.05 for score in found.detection.scores.tolist())
    assert found.threshold_source == "given"


def test_a_threshold_from_fresh_prompts(tmp_path):
    fresh = ["a tree", "a car", "a woman in the city"]
    pipe = tiny_pipeline("sd1")
    found = jobs.scan(pipe, PROMPTS, tmp_path, fresh=fresh, fpr=0.01, **SETTINGS)
    assert found.threshold == pytest.approx(memorization.detect(pipe, fresh, **SETTINGS).scores.max().item())


def test_goes_on_where_it_was_interrupted(tmp_path, small_shards, monkeypatch):
    pipe = tiny_pipeline("sd1")
    expected = jobs.scan(pipe, PROMPTS, tmp_path / "whole", **SETTINGS)
    detect, calls = memorization.detect, []

    def interrupted(model, prompts, **settings):
        calls.append(list(prompts))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return detect(model, prompts, **settings)

    monkeypatch.setattr(memorization, "detect", interrupted)
    with pytest.raises(KeyboardInterrupt):
        jobs.scan(pipe, PROMPTS, tmp_path / "part", **SETTINGS)
    found = jobs.scan(pipe, PROMPTS, tmp_path / "part", **SETTINGS)
    assert calls == [PROMPTS[:2], PROMPTS[2:4], PROMPTS[2:4], PROMPTS[4:]], (
        "the first shard is not scored again"
    )
    assert torch.equal(found.detection.magnitudes, expected.detection.magnitudes)
    assert not [file for file in tmp_path.rglob("*") if "partial" in file.name]
    jobs.scan(pipe, PROMPTS, tmp_path / "part", **SETTINGS)
    assert len(calls) == 4, "nothing is left to do"


def test_another_job_does_not_touch_the_folder(tmp_path):
    pipe = tiny_pipeline("sd1")
    jobs.scan(pipe, PROMPTS, tmp_path, **SETTINGS)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    for other in (
        lambda: jobs.scan(tiny_pipeline("sd1", seed=1), PROMPTS, tmp_path, **SETTINGS),
        lambda: jobs.scan(pipe, PROMPTS[:2], tmp_path, **SETTINGS),
        lambda: jobs.scan(pipe, PROMPTS, tmp_path, **SETTINGS | {"seeds": 3}),
    ):
        with pytest.raises(ValueError, match=r"^out: .* holds results of another model, list or settings"):
            other()
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    assert len(jobs.scan(pipe, PROMPTS[:2], tmp_path, restart=True, **SETTINGS).order) == 2


def test_restart_deletes_only_what_a_scan_made(tmp_path):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"^out: .* is there and is not pumice's"):
        jobs.scan(tiny_pipeline("sd1"), PROMPTS, tmp_path, restart=True, **SETTINGS)
    assert (tmp_path / "parts" / "thesis.txt").read_text() == "mine"


def test_bad_settings_leave_nothing(tmp_path):
    with pytest.raises(ValueError, match="steps: got 99"):
        jobs.scan(tiny_pipeline("sd1"), PROMPTS, tmp_path / "new", seeds=1, steps=99)
    assert not list((tmp_path / "new").iterdir())


def test_pictures_are_those_of_the_first_seed(tmp_path):
    pipe = tiny_pipeline("sd1")
    found = jobs.scan(pipe, PROMPTS, tmp_path, pictures=3, **SETTINGS)
    assert tuple(found.pictures) == found.order[:3]
    index = found.order[0]
    expected = pipe(
        PROMPTS[index], num_inference_steps=25, generator=torch.Generator().manual_seed(0)
    ).images[0]
    shown = Image.open(found.pictures[index])
    difference = torch.tensor(list(shown.tobytes())).sub(torch.tensor(list(expected.tobytes()))).abs()
    assert difference.max() <= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threshold": 1.0, "fresh": ["a"]}, "threshold, fresh: got both"),
        ({"threshold": float("nan")}, "threshold: got nan"),
        ({"pictures": -1}, "pictures: got -1"),
        ({"fresh": ["a cat"], "fpr": 1.0}, "fpr: got 1.0"),
    ],
)
def test_bad_input(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        jobs.scan(tiny_pipeline("sd1"), PROMPTS, tmp_path, **SETTINGS | change)
