"""Scans: thresholds, resuming after an interruption, and what a folder may be used for."""

import sys

import pytest
import torch
from PIL import Image

from pumice import jobs, memorization, pipelines
from pumice.testbed import tiny_pipeline

PROMPTS = ["a cat", "a dog in the sea", "a house", "a red bird", "a cat"]
SETTINGS = {"seeds": 2}


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(sys.modules["pumice.jobs.scan"], "SHARD", 2)


def test_scores_are_those_of_detect(tmp_path, small_shards):
    pipe = tiny_pipeline("sd1")
    found = jobs.scan(pipe, PROMPTS, tmp_path, **SETTINGS)
    expected = memorization.detect(pipe, PROMPTS, **SETTINGS)
    torch.testing.assert_close(found.detection.values, expected.values, rtol=1e-5, atol=1e-5)
    ranked = found.detection.scores[list(found.order)]
    assert torch.equal(ranked, ranked.sort(descending=True).values)
    assert found.threshold is None and found.memorized == (None,) * 5 and found.details == {}


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
    assert torch.equal(found.detection.values, expected.detection.values)
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
    with pytest.raises(ValueError, match="num_inference_steps: got 9999"):
        jobs.scan(tiny_pipeline("sd1"), PROMPTS, tmp_path / "new", seeds=1, num_inference_steps=9999)
    assert not list((tmp_path / "new").iterdir())


def pixels(file):
    return torch.tensor(list(Image.open(file).tobytes()))


def test_details_are_those_of_explain_and_of_the_pipeline(tmp_path):
    pipe = tiny_pipeline("sd1")
    found = jobs.scan(pipe, PROMPTS, tmp_path, details=3, **SETTINGS)
    assert tuple(found.details) == found.order[:3]
    for index, detail in found.details.items():
        drawn = pipelines.around(pipe)(
            PROMPTS[index],
            num_inference_steps=50,
            generator=torch.Generator().manual_seed(0),
            track_noise_norm=True,
        )
        expected = torch.tensor(list(drawn.images[0].tobytes()))
        assert (pixels(detail.picture) - expected).abs().max() <= 1
        assert detail.curve == pytest.approx(drawn.noise_norms[0].tolist(), rel=1e-3)
        assert detail.curve_timesteps[:2] == (981, 961) and len(detail.curve_timesteps) == 50
        (explained,) = memorization.explain(pipe, PROMPTS[index], seeds=2, wrt="input")
        assert [text for text, _ in detail.words] == [word.text for word in explained.words]
        assert [score for _, score in detail.words] == pytest.approx(
            [word.score for word in explained.words], rel=1e-3
        )
        assert detail.guarded is None


def test_a_guard_draws_again_what_is_above_the_threshold(tmp_path):
    pipe = tiny_pipeline("sd1")
    found = jobs.scan(pipe, PROMPTS, tmp_path, details=5, threshold=1e-6, guard="refuse", **SETTINGS)
    assert all(
        pixels(detail.guarded).max() == 0 < pixels(detail.picture).max() for detail in found.details.values()
    )


def test_details_have_the_size_that_was_scored(tmp_path):
    pipe = tiny_pipeline("sd1")
    found = jobs.scan(pipe, ["a cat"], tmp_path, details=1, seeds=1, height=48, width=64)
    assert Image.open(found.details[0].picture).size == (64, 48)
    (explained,) = memorization.explain(pipe, "a cat", wrt="input", height=48, width=64)
    assert found.details[0].words[1][1] == pytest.approx(explained.words[1].score, rel=1e-3)
    assert explained.magnitude == pytest.approx(found.detection.scores.item(), rel=1e-3)


def test_another_threshold_draws_guarded_pictures_anew(tmp_path):
    pipe = tiny_pipeline("sd1")
    high, low = (
        jobs.scan(pipe, ["a cat"], tmp_path, details=1, threshold=threshold, guard="refuse", **SETTINGS)
        for threshold in (1e6, 1e-6)
    )
    assert pixels(high.details[0].guarded).max() > 0 == pixels(low.details[0].guarded).max()


def test_details_of_a_prompt_without_words(tmp_path):
    found = jobs.scan(tiny_pipeline("sd1"), ["a cat", ""], tmp_path, details=2, **SETTINGS)
    assert found.details[1].words is None and len(found.details[0].words) == 2


def test_a_calibration_decides(tmp_path):
    pipe = tiny_pipeline("sd1")
    calibration = memorization.calibrate(
        pipe, PROMPTS[:4], ["a", "the sea", "man", "tree"], seeds=2, name="tiny"
    )
    found = jobs.scan(pipe, PROMPTS, tmp_path, calibration=calibration)
    assert found.threshold == calibration.threshold and found.threshold_source.startswith(
        "calibration tiny: "
    )
    assert found.memorized == tuple(score > found.threshold for score in found.detection.scores.tolist())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threshold": 1.0, "fresh": ["a"]}, "threshold, fresh: got 2 of them, expected one"),
        ({"threshold": float("nan")}, "threshold: got nan"),
        ({"fresh": []}, "fresh: got an empty list"),
        ({"details": -1}, "details: got -1"),
        ({"guard": "refuse"}, "guard: got 'refuse', which needs a calibration"),
        (
            {"guard": "refuse", "threshold": 1.0, "metric": "sharpness"},
            "guard: got 'refuse', which reads the magnitude at the first step",
        ),
        ({"fresh": ["a cat"], "fpr": 1.0}, "fpr: got 1.0"),
    ],
)
def test_bad_input(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        jobs.scan(tiny_pipeline("sd1"), PROMPTS, tmp_path, **SETTINGS | change)
