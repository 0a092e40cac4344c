"""Detection on a GPU: the scores of the CPU, and no wait for the host inside its loop."""

import pytest
import torch

from pumice import memorization, models
from pumice.memorization import Anisotropy, AttentionEntropy, BrightEnding, Magnitude, Sharpness
from pumice.memorization.engine import Screen
from pumice.testbed import tiny_pipeline

METRICS = [Magnitude(), Magnitude(3), Anisotropy(), Sharpness(), AttentionEntropy(), BrightEnding()]
PROMPTS = ["a red cat", "a photo of a dog in the city", "house"]


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("metric", METRICS, ids=str)
def test_scores_are_those_of_the_cpu(family, metric):
    settings = {"metric": metric, "seeds": 2, "num_inference_steps": 5, "batch_size": 4}
    cpu = memorization.detect(tiny_pipeline(family), PROMPTS, **settings).values
    gpu = memorization.detect(tiny_pipeline(family).to("cuda"), PROMPTS, **settings).values
    torch.testing.assert_close(gpu, cpu, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("metric", METRICS, ids=str)
def test_nothing_waits_for_the_host(metric):
    model = models.load(tiny_pipeline("sd1").to("cuda"))
    with model.frozen(), torch.inference_mode():
        screen = Screen(model, [0, 1], num_inference_steps=5, batch_size=2)
        embeds = model.encode_prompt(PROMPTS)

        def work(screen, rows):
            torch.cuda.set_sync_debug_mode("error")
            try:
                return metric.measure(screen, rows)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        screen.measure(metric.measure, embeds, [0, 1], lambda rows: None)  # what is set up once
        screen.measure(work, embeds, [0, 1], lambda rows: None)
