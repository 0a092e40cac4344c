"""A guarded pipeline around a loaded one: the same networks and options, a calibration's threshold."""

import diffusers
import pytest
import torch

from pumice import memorization, pipelines, testbed
from pumice.models import UnsupportedModelError
from pumice.pipelines import Guard, around
from pumice.testbed import tiny_pipeline


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_shares_the_networks_as_they_are(family):
    pipe = tiny_pipeline(family).to(torch.bfloat16)
    pipe.vae.float()
    made = around(pipe)
    assert isinstance(made, type(pipe)) and type(made).__module__.startswith("pumice.")
    for name, part in pipe.components.items():
        assert getattr(made, name) is part
    assert pipe.unet.dtype == torch.bfloat16 and pipe.vae.dtype == torch.float32, "nothing was cast"
    assert {key: made.config[key] for key in pipe.config if not key.startswith("_")} == {
        key: value for key, value in pipe.config.items() if not key.startswith("_")
    }


def test_the_options_of_xl_come_along():
    pipe = tiny_pipeline("sdxl")
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    pipe.watermark = object()
    made = around(pipe)
    assert made.config.force_zeros_for_empty_prompt is False and made.watermark is pipe.watermark


def test_draws_what_the_pipeline_draws():
    pipe = tiny_pipeline("sd1")
    draw = {"num_inference_steps": 3, "output_type": "pt"}
    expected, found = (
        p("a cat", generator=torch.Generator().manual_seed(1), **draw).images for p in (pipe, around(pipe))
    )
    assert torch.equal(expected, found)


def test_other_families_are_refused():
    with pytest.raises(UnsupportedModelError, match="FluxPipeline is not supported"):
        around(tiny_pipeline("flux"))


def test_a_calibrated_guard_has_the_threshold_of_one_seed():
    calibration = testbed.calibration()
    guard = Guard.calibrated(calibration)
    assert guard.threshold == calibration.looks[0].flag_above and calibration.looks[0].seeds == 1
    assert (
        guard.mitigation == "embedding"
        and guard.target == calibration.quantiles["1"]["0.9"] < guard.threshold
    )
    assert Guard.calibrated(calibration, "refuse").target is None


def test_a_calibration_of_another_metric_is_no_guards():
    words = ["a cat", "a dog", "a house", "a tree"]
    calibration = memorization.calibrate(
        tiny_pipeline("sd1"), words, [f"{word} by the sea" for word in words], metric="anisotropy", seeds=1
    )
    with pytest.raises(ValueError, match="calibration: got one of Anisotropy"):
        Guard.calibrated(calibration)


def test_the_classes_are_those_of_diffusers_by_name():
    for name in ("StableDiffusionPipeline", "StableDiffusionXLPipeline"):
        assert issubclass(getattr(pipelines, name), getattr(diffusers, name))
