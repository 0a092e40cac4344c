import math

import pytest
import torch

from pumice import models, testbed
from pumice.evaluate import learnability

PROMPT = "a photo of a sks creature"
QUICK = {"steps": 3, "learning_rate": 1e-3, "batch_size": 2, "drawings": 2, "num_inference_steps": 2}


def pictures(count):
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def pipe(request):
    return testbed.tiny_pipeline(request.param)


@pytest.fixture(scope="module")
def tiny():
    return testbed.tiny_pipeline("sd1")


def state(pipe):
    """All that a caller could see of a pipeline."""
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    return {
        "weights": {
            f"{name}.{key}": value.clone()
            for name, part in parts.items()
            for key, value in part.state_dict().items()
        },
        "flags": [(p.requires_grad, p.grad is None) for part in parts.values() for p in part.parameters()],
        "modes": [module.training for part in parts.values() for module in part.modules()],
        "components": {name: id(part) for name, part in pipe.components.items()},
        "scheduler": (pipe.scheduler.num_inference_steps, pipe.scheduler.timesteps.tolist()),
        "bar": dict(getattr(pipe, "_progress_bar_config", {})),
    }


def assert_same_state(before, after):
    weights, others = before.pop("weights"), after.pop("weights")
    assert before == after and weights.keys() == others.keys()
    assert all(torch.equal(weights[key], others[key]) for key in weights)


def test_the_callers_pipeline_stays_as_it_is(pipe):
    pipe.unet.train()
    pipe.vae.requires_grad_(False)
    before = state(pipe)
    learnability(pipe, pictures(2), PROMPT, **QUICK)
    assert_same_state(before, state(pipe))


def test_an_interruption_leaves_the_callers_pipeline_as_it_is(tiny, monkeypatch):
    before, calls = state(tiny), []

    def interrupted(self, closure=None):
        calls.append(self)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return real(self, closure)

    real = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        learnability(tiny, pictures(2), PROMPT, **QUICK)
    assert_same_state(before, state(tiny))


def test_the_same_seeds_learn_and_draw_the_same_and_a_copy_does_not_depend_on_the_others(tiny):
    both = learnability(tiny, pictures(2), PROMPT, ["a", "b"], seeds=(4, 1), **QUICK)
    assert both.pictures.shape == (2, 2, 2, 3, 32, 32) and both.losses.shape == (2, 3)
    alone = learnability(tiny, pictures(2), PROMPT, ["a", "b"], seeds=[1], rows=1, **QUICK)
    torch.testing.assert_close(alone.losses[0], both.losses[1])
    assert int((alone.pictures[0].int() - both.pictures[1].int()).abs().max()) <= 1
    assert not torch.equal(both.losses[0], both.losses[1])


def test_without_a_step_it_draws_as_the_pipeline_does(tiny):
    found = learnability(
        tiny, pictures(1), "x", ["a ball", "a box"], steps=0, seeds=[2], drawings=3, num_inference_steps=2
    )
    images = tiny(
        ["a box"] * 3,
        height=32,
        width=32,
        num_inference_steps=2,
        guidance_scale=7.5,
        generator=[torch.Generator().manual_seed(seed) for seed in (6, 7, 8)],
        output_type="pt",
    ).images
    expected = (images * 255).round().to(torch.uint8)
    assert int((found.pictures[0, 1].int() - expected.int()).abs().max()) <= 1
    assert found.losses.shape == (1, 0)


def test_the_first_loss_is_the_formula_and_training_lowers_it(pipe):
    images, model = pictures(3), models.load(pipe)
    found = learnability(
        pipe, images, PROMPT, steps=20, learning_rate=2e-3, batch_size=4, drawings=1, num_inference_steps=1
    )
    generator = torch.Generator().manual_seed(0)
    which = torch.randint(3, (4,), generator=generator)
    t = torch.randint(model.schedule.num_train_timesteps, (4,), generator=generator)
    with torch.no_grad():
        z = model.encode_image(images)[which]
        noise = torch.randn(z.shape, generator=generator)
        output = model.predict(model.add_noise(z, noise, t), t, model.encode_prompt(PROMPT))
        expected = (output - model.schedule.target(z, noise, t)).square().mean()
    torch.testing.assert_close(found.losses[0, 0], expected)
    assert float(found.losses[0, -5:].mean()) < 0.9 * float(found.losses[0, :5].mean())


def test_a_pipeline_in_bfloat16_is_trained_in_float32(monkeypatch):
    """A step of the paper's size would be rounded away."""
    pipe, dtypes = testbed.tiny_pipeline("sd1").to(torch.bfloat16), set()
    real = torch.optim.AdamW.step

    def step(self):
        dtypes.update(p.dtype for group in self.param_groups for p in group["params"])
        real(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    found = learnability(pipe, pictures(2), PROMPT, **QUICK)
    assert dtypes == {torch.float32}
    assert {parameter.dtype for parameter in pipe.unet.parameters()} == {torch.bfloat16}
    assert found.pictures.float().std() > 0 and bool(found.losses.isfinite().all())


def test_stable_diffusion_xl_and_other_sizes():
    pipe = testbed.tiny_pipeline("sdxl")
    images = torch.rand(2, 3, 48, 32, generator=torch.Generator().manual_seed(0))
    found = learnability(pipe, images, PROMPT, **QUICK)
    assert found.pictures.shape == (1, 1, 2, 3, 48, 32)
    assert (found.settings["height"], found.settings["width"]) == (48, 32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pictures": torch.zeros(3, 32, 32)}, ValueError, r"pictures: got shape \(3, 32, 32\)"),
        ({"pictures": "a.png"}, TypeError, "pictures: got str"),
        ({"pictures": torch.zeros(1, 3, 32, 33)}, ValueError, "got 33"),
        ({"prompt": None}, TypeError, "prompt: got a NoneType"),
        ({"prompts": "a"}, TypeError, "prompts: got 'a'"),
        ({"prompts": [1]}, TypeError, r"prompts: got \[1\]"),
        ({"steps": -1}, ValueError, "steps: got -1, expected at least 0"),
        ({"batch_size": 0}, ValueError, "batch_size: got 0"),
        ({"drawings": 0}, ValueError, "drawings: got 0"),
        ({"num_inference_steps": 0}, ValueError, "num_inference_steps: got 0"),
        ({"learning_rate": 0.0}, ValueError, "learning_rate: got 0.0"),
        ({"learning_rate": math.inf}, ValueError, "learning_rate: got inf"),
        ({"guidance_scale": math.nan}, ValueError, "guidance_scale: got nan"),
        ({"seeds": []}, ValueError, "seeds: got"),
        ({"rows": 0}, ValueError, "got 0"),
    ],
)
def test_bad_input_to_learnability(tiny, change, error, message):
    good = {"pictures": torch.zeros(1, 3, 32, 32), "prompt": PROMPT, **QUICK} | change
    with pytest.raises(error, match=message) as caught:
        learnability(tiny, good.pop("pictures"), good.pop("prompt"), **good)
    assert "\n" not in str(caught.value)
