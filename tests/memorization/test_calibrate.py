"""Calibrations: halves, thresholds, what they refuse, and the embedded model's own."""

import dataclasses
import json
import warnings

import pytest
import torch
from diffusers import DDIMScheduler

from pumice import memorization, models, testbed
from pumice.memorization import Anisotropy, Calibration, Magnitude, calibrate, detect, self_test
from pumice.testbed import tiny_pipeline, world

MEMORIZED = [f"a {word} in the city" for word in ("cat", "dog", "horse", "bird", "car", "house")]
FRESH = [f"a {word}" for word in ("tree", "flower", "person", "woman", "man", "sea", "beach", "mountain")]


@pytest.fixture(scope="module")
def made():
    pipe = tiny_pipeline("sd1")
    return pipe, calibrate(pipe, MEMORIZED, FRESH, seeds=2, fpr=0.25, name="tiny", fresh_name="words")


def test_saves_and_loads(made, tmp_path):
    _, calibration = made
    calibration.save(tmp_path / "calibration.json")
    assert Calibration.load(tmp_path / "calibration.json") == calibration
    data = json.loads((tmp_path / "calibration.json").read_text())
    assert data["schema"] == 1 and data["checkpoint"]["name"] == "tiny" and data["fresh"]["count"] == 8
    assert data["dtype"] == "float32" and data["prediction_type"] == "epsilon"
    assert data["settings"]["metric"] == {"name": "magnitude", "steps": 1}


def test_the_threshold_is_set_on_one_half_and_judged_on_the_other(made):
    pipe, calibration = made
    assert calibration.held_out["memorized"] == 3 and calibration.held_out["fresh"] == 4
    scores = detect(pipe, FRESH, seeds=2).scores
    above = int((scores > calibration.threshold).sum())
    assert calibration.held_out["fpr"]["value"] * 4 == above - 1, "one of four may be above on the first half"
    low, high = calibration.held_out["fpr"]["low"], calibration.held_out["fpr"]["high"]
    assert low <= calibration.held_out["fpr"]["value"] <= high


def test_the_order_of_the_lists_changes_nothing(made):
    pipe, calibration = made
    other = calibrate(pipe, MEMORIZED[::-1], FRESH[::-1], seeds=2, fpr=0.25)
    assert other.threshold == pytest.approx(calibration.threshold, rel=1e-5)
    assert other.held_out["tpr"] == calibration.held_out["tpr"]
    assert other.auc["value"] == calibration.auc["value"]


def test_prompts_of_one_picture_stay_in_one_half(made):
    pipe, _ = made
    calibration = calibrate(pipe, MEMORIZED, FRESH, seeds=1, pictures=[0, 0, 0, 0, 0, 1])
    assert calibration.held_out["memorized"] in (1, 5)


def test_detect_decides_by_it_and_takes_its_settings(made):
    pipe, calibration = made
    found = detect(pipe, [*MEMORIZED, *FRESH], calibration=calibration)
    assert found.seeds == (0, 1) and found.threshold == calibration.threshold
    assert found.memorized == tuple(score > calibration.threshold for score in found.scores.tolist())
    assert detect(pipe, MEMORIZED).memorized is None


def test_sequential_looks_decide_alike_and_skip_seeds(made):
    pipe, calibration = made
    found = detect(pipe, [*MEMORIZED, *FRESH], calibration=calibration, sequential=True)
    plain = detect(pipe, [*MEMORIZED, *FRESH], calibration=calibration)
    torch.testing.assert_close(found.values[:, 0], plain.values[:, 0])
    skipped = found.seed_scores[:, 1].isnan()
    assert skipped.any() and not skipped.all()
    for index in range(len(found.prompts)):
        flagged, undecided = calibration.looks[0](found.seed_scores[index : index + 1, :1])
        assert bool(undecided) != bool(skipped[index])
        if skipped[index]:
            assert found.memorized[index] == bool(flagged)
        else:
            assert found.memorized[index] == (found.scores[index].item() > calibration.looks[1].flag_above)
    assert None in found.to_dict()["seed_scores"][int(skipped.nonzero()[0])]
    json.dumps(found.to_dict(), allow_nan=False)


def test_its_own_prompts_score_again(made):
    pipe, calibration = made
    assert self_test(pipe, calibration) <= calibration.self_test["tolerance"]
    off = dict(calibration.self_test, scores=[score + 1 for score in calibration.self_test["scores"]])
    with pytest.raises(ValueError, match=r"calibration: its own prompts score up to 1 off here"):
        self_test(pipe, dataclasses.replace(calibration, self_test=off))


def other_weights(pipe):
    with torch.no_grad():
        pipe.unet.conv_in.weight[0, 0, 0, 0] += 1e-3


def half(pipe):
    pipe.to(torch.bfloat16)


def velocity(pipe):
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")


def other_betas(pipe):
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, beta_end=0.02)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (other_weights, "its weights' sha256 is"),
        (half, "its dtype is float32, this one's bfloat16"),
        (velocity, "its prediction type is epsilon, this one's v_prediction"),
        (other_betas, "its noise schedule is"),
    ],
)
def test_a_foreign_calibration_is_refused_with_the_reason(made, change, reason):
    pipe = tiny_pipeline("sd1")
    change(pipe)
    with pytest.raises(ValueError, match=f"calibration: made for another model: {reason}") as caught:
        detect(pipe, "a cat", calibration=made[1])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"metric": "anisotropy"}, "metric: got Anisotropy"),
        ({"metric": Magnitude(steps=2)}, r"metric: got Magnitude\(steps=2\), the calibration was made with"),
        ({"seeds": 4}, r"seeds: got \(0, 1, 2, 3\), the calibration was made with \(0, 1\)"),
        ({"num_inference_steps": 25}, "num_inference_steps: got 25, the calibration was made with 50"),
        ({"guidance_scale": 5.0}, "guidance_scale: got 5.0"),
        ({"height": 64, "width": 64}, r"height, width: got \(4, 32, 32\)"),
    ],
)
def test_other_settings_are_refused(made, settings, reason):
    pipe, calibration = made
    with pytest.raises(ValueError, match=reason):
        detect(pipe, "a cat", calibration=calibration, **settings)


def test_what_only_rounds_differently_is_a_warning(made):
    pipe, calibration = made
    with pytest.warns(UserWarning, match="calibration: made with batch size 32, now 8"):
        detect(pipe, "a cat", calibration=calibration, batch_size=8)
    with pytest.warns(UserWarning, match="calibration: made with attention Other, now AttnProcessor"):
        detect(pipe, "a cat", calibration=dataclasses.replace(calibration, attention_backend="Other"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        detect(pipe, "a cat", calibration=calibration)


BAD = {
    "few memorized": (MEMORIZED[:3], FRESH, {}, "memorized: got 3 different prompts, expected at least 4"),
    "few fresh": (MEMORIZED, FRESH[:1] * 9, {}, "fresh: got 1 different prompts"),
    "both": (MEMORIZED, [*FRESH, MEMORIZED[0]], {}, "fresh: 'a cat in the city' is also among"),
    "pictures": (MEMORIZED, FRESH, {"pictures": [1, 2]}, "pictures: got 2, expected one for each of 6"),
    "one picture": (MEMORIZED, FRESH, {"pictures": [1] * 6}, "pictures: got 1 different ones"),
    "rate": (MEMORIZED, FRESH, {"fpr": 0.0}, "fpr: got 0.0"),
}


@pytest.mark.parametrize(("memorized", "fresh", "settings", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input(memorized, fresh, settings, message):
    with pytest.raises(ValueError, match=message):
        calibrate(tiny_pipeline("sd1"), memorized, fresh, **settings)


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"schema": 99}', '{"schema": 1, "score": ""}'])
def test_a_file_that_is_none(tmp_path, content):
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(ValueError, match=r"calibration: '.*c\.json' is not a calibration") as caught:
        Calibration.load(tmp_path / "c.json")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"calibration: cannot read '.*none\.json'"):
        Calibration.load(tmp_path / "none.json")


def test_another_picture_size_is_the_calibrations(tmp_path):
    pipe = tiny_pipeline("sd1")
    calibration = calibrate(pipe, MEMORIZED[:4], FRESH[:4], seeds=1, height=48, width=64)
    assert calibration.settings.latent_shape == (4, 24, 32)
    self_test(pipe, calibration)
    found = detect(pipe, MEMORIZED[:4], calibration=calibration)
    again = detect(pipe, MEMORIZED[:4], seeds=1, height=48, width=64)
    torch.testing.assert_close(found.scores, again.scores)


@pytest.mark.parametrize(("family", "metric"), [("sdxl", "magnitude"), ("sd1", "attention_entropy")])
def test_the_floor_is_rounding_alone(family, metric):
    calibration = calibrate(tiny_pipeline(family), MEMORIZED[:4], FRESH[:4], metric=metric, seeds=2)
    assert calibration.floor < 1e-3 * abs(calibration.threshold)


def test_no_more_than_allowed_of_the_first_half_are_called_memorized():
    """Whatever is rounded: the threshold is one of the scores, and scores are compared as they were made."""
    pipe = tiny_pipeline("sd1")
    for first in range(0, 6, 2):
        fresh = FRESH[first:] + FRESH[:first]
        calibration = calibrate(pipe, MEMORIZED, fresh[:6], seeds=3, fpr=0.01)
        found = detect(pipe, fresh[:6], calibration=calibration)
        assert found.memorized == tuple(score > calibration.threshold for score in found.scores.tolist())
        assert found.scores.tolist().count(calibration.threshold) == 1


def test_every_metric_can_be_calibrated():
    calibration = calibrate(
        tiny_pipeline("sd1"), MEMORIZED[:4], FRESH[:4], metric=Anisotropy(1.0, 0.5), seeds=1
    )
    assert calibration.settings.metric == Anisotropy(1.0, 0.5)
    assert len(calibration.looks) == 1


def test_the_embedded_models_own():
    pipe = testbed.load()
    calibration = testbed.calibration()
    assert self_test(pipe, calibration) <= calibration.self_test["tolerance"]
    known = [world.memorized(i).caption for i in range(6)]
    fresh = world.fresh_captions(6, seed=77)
    found = memorization.detect(pipe, [*known, *fresh], calibration=calibration, sequential=True)
    assert found.memorized == (True,) * 6 + (False,) * 6
    assert found.seed_scores[:, 1:].isnan().float().mean() > 0.5, "most are decided by one seed"
    assert models.load(pipe).prediction_type == calibration.prediction_type == "v_prediction"
