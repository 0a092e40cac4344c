"""DreamBooth: what a step is, what it leaves alone, and what comes out."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from contextlib import nullcontext

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import SafetensorError
from torch import Tensor

from pumice import testbed
from pumice.models import load
from pumice.models.draws import Draws
from pumice.personalize import NOISE_PHRASE, PersonalizationWarning, dreambooth, sample
from pumice.testbed import tiny_pipeline
from pumice.training import examples
from pumice.training.student import check_moves

PROMPT, CLASS = "a photo of sks dog", "a photo of dog"
MODES = ("fp32_master", "bf16_faithful", "lora")


def pictures(count: int, height: int = 32, width: int = 32) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(count))


def trained(pipe, *, text: bool = True) -> list[Tensor]:
    networks = [pipe.unet]
    networks += [
        getattr(pipe, name) for name in ("text_encoder", "text_encoder_2") if text and hasattr(pipe, name)
    ]
    return [weight.detach() for network in networks for weight in network.parameters()]


def state(pipe) -> dict[str, object]:
    """Everything of a pipeline that a careless training would change."""
    found: dict[str, object] = {"scheduler": dict(pipe.scheduler.config), "parts": set(vars(pipe))}
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            for key, weight in part.named_parameters():
                found[f"{name}.{key}"] = id(weight), weight.requires_grad, weight.grad, weight._version
            found |= {f"{name}.{key} module": (type(m), m.training) for key, m in part.named_modules()}
    return found


def assert_close(first, second, start) -> None:
    """As near as rounding allows, beside what training moved."""
    for mine, theirs, before in zip(first, second, start, strict=True):
        # keys have no use for a bias: its gradient is rounding alone
        assert (mine - theirs).norm() <= 1e-3 * (theirs - before).norm() + 1e-9


def plain(
    pipe, subject, of_class, *, text: bool, clip: float, steps: int = 2, seed: int = 5, prior: float = 0.25
):
    """AdamW on autograd's gradients of the formula; the weights, the losses and the norms of gradients."""
    model = load(copy.deepcopy(pipe))
    networks = (model.unet, *(model.text_encoders if text else ()))
    parameters = [weight.requires_grad_() for network in networks for weight in network.parameters()]
    optimizer = torch.optim.AdamW(parameters, 1e-3, betas=(0.9, 0.999), weight_decay=1e-2)
    draws = Draws([f"{seed}/training/{row}" for row in range(2)], torch.device("cpu"))
    losses, norms = [], []
    for step in range(steps):
        epoch, place = divmod(step, max(len(subject), len(of_class)))
        item = int(draws.permutation(0, "order", epoch, max(len(subject), len(of_class)))[place])
        loss = torch.zeros(())
        for row, (images, prompt, weight) in enumerate([(subject, PROMPT, 1.0), (of_class, CLASS, prior)]):
            image = images[item % len(images)][None]
            shape = model.latent_shape(*image.shape[2:])
            posterior, noise = (draws.normal([row], what, step, shape) for what in ("posterior", "noise"))
            t = draws.integers([row], "timestep", step, 1000)
            with torch.no_grad():
                z = model.encode_image(image, noise=posterior).float()
            output = model.predict(model.add_noise(z, noise, t), t, model.encode_prompt(prompt))
            loss = loss + weight * (output - model.schedule.target(z, noise, t)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        gradients = [weight.grad for weight in parameters if weight.grad is not None]
        norms.append(float(torch.cat([gradient.flatten() for gradient in gradients]).norm()))
        for gradient in gradients:
            gradient.mul_(min(1.0, clip / (norms[-1] + 1e-6)))
        optimizer.step()
        losses.append(loss.item())
    return [weight.detach() for weight in parameters], losses, norms


@pytest.mark.parametrize(
    ("family", "text"), [("sd1", True), ("sd2", False), ("sdxl", True)]
)  # epsilon and v-prediction, one text encoder and two
def test_two_steps_are_those_of_a_plain_loop(family, text):
    pipe = tiny_pipeline(family).to(torch.float64)
    subject, of_class = pictures(3), pictures(2, 32, 48)
    _, _, norms = plain(pipe, subject, of_class, text=text, clip=float("inf"), steps=1)
    clip = norms[0] / 3
    theirs, losses, norms = plain(pipe, subject, of_class, text=text, clip=clip)
    assert norms[0] > clip
    result = dreambooth(
        pipe,
        subject,
        PROMPT,
        CLASS,
        class_images=of_class,
        prior_weight=0.25,
        steps=2,
        learning_rate=1e-3,
        train_text_encoder=text,
        max_grad_norm=clip,
        seed=5,
    )
    assert_close(trained(result.pipe, text=text), theirs, trained(pipe, text=text))
    assert torch.allclose(result.losses, torch.tensor(losses), rtol=1e-4)
    if not text:
        assert result.pipe.text_encoder is pipe.text_encoder


def test_clipping_counts():
    """Moments of the first step, clipped or not, reach into the second one."""
    pipe = tiny_pipeline("sd1").to(torch.float64)
    how = {"steps": 2, "learning_rate": 1e-3, "batch_size": 1}
    far, near = (dreambooth(pipe, pictures(3), PROMPT, max_grad_norm=norm, **how) for norm in (1e9, 0.3))
    with pytest.raises(AssertionError):
        assert_close(trained(far.pipe), trained(near.pipe), trained(pipe))


def test_rows_memory_and_recomputing_change_nothing(monkeypatch):
    pipe = tiny_pipeline("sd1").to(torch.float64)

    def run(**how):
        result = dreambooth(
            pipe,
            pictures(3),
            PROMPT,
            CLASS,
            class_images=pictures(2, 32, 48),
            batch_size=2,
            steps=2,
            learning_rate=1e-3,
            **how,
        )
        assert not any(getattr(part, "gradient_checkpointing", False) for part in result.pipe.unet.modules())
        return trained(result.pipe)

    whole = run()
    assert_close(run(rows=1), whole, trained(pipe))
    for mine, theirs in zip(run(recompute=True), whole, strict=True):
        assert torch.equal(mine, theirs)
    real, calls = examples.denoising_loss, []

    def short_of_memory(model, rows, *args):
        calls.append(len(rows))
        if len(calls) == 2:  # when gradients of the first shape are there already
            raise torch.OutOfMemoryError
        return real(model, rows, *args)

    monkeypatch.setattr(examples, "denoising_loss", short_of_memory)
    assert_close(run(rows=2), whole, trained(pipe))
    assert calls == [2, 2, *[1] * 8]


@pytest.mark.parametrize("mode", MODES)
def test_a_saved_model_draws_the_same_in_plain_diffusers_and_its_source_stays(mode, tmp_path):
    pipe = tiny_pipeline("sd1")
    pipe.unet.train().requires_grad_(True)
    before = state(pipe)
    result = dreambooth(
        pipe,
        pictures(2),
        PROMPT,
        CLASS,
        class_images=pictures(3),
        noise_phrase=NOISE_PHRASE,
        mode=mode,
        steps=2,
        learning_rate=1e-2,
    )
    assert state(pipe) == before
    assert all(not weight.requires_grad for weight in result.pipe.unet.parameters())
    result.save(tmp_path / "out")
    if mode == "lora":
        again = tiny_pipeline("sd1")
        again.load_lora_weights(tmp_path / "out")
    else:
        again = StableDiffusionPipeline.from_pretrained(tmp_path / "out")
        again.set_progress_bar_config(disable=True)
    how = {"num_images": 2, "num_inference_steps": 2}
    drawn = sample(result, PROMPT, **how)
    assert torch.equal(drawn, sample(again, PROMPT, noise_phrase=NOISE_PHRASE, **how))
    assert not torch.equal(drawn, sample(pipe, PROMPT, noise_phrase=NOISE_PHRASE, **how))
    with pytest.raises(ValueError, match=r"folder: .* is there already"):
        result.save(tmp_path / "out")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left")])
def test_nothing_half_written_is_left(error, tmp_path, monkeypatch):
    result = dreambooth(tiny_pipeline("sd1"), pictures(2), PROMPT, steps=1, learning_rate=1e-3)

    def full(*args, **kwargs):
        (tmp_path / ".out.partial" / "half").write_text("half")
        raise error

    monkeypatch.setattr(type(result.pipe.unet), "save_pretrained", full)
    with pytest.raises(OSError, match="No space"):
        result.save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@torch.no_grad()
def test_a_subject_is_learned():
    """Its denoising loss falls, on timesteps and noise that training does not draw."""
    pipe, trial = testbed.load(), testbed.subject_trial(0)

    def loss(pipe) -> float:
        model, draw, total = load(pipe), torch.Generator().manual_seed(0), 0.0
        z, embeds = model.encode_image(trial.pictures[:4]), model.encode_prompt(trial.prompt)
        for t in range(50, 1000, 100):
            noise = torch.randn(z.shape, generator=draw)
            output = model.predict(model.add_noise(z, noise, t), t, embeds)
            total += float((output - model.schedule.target(z, noise, t)).square().mean()) / 10
        return total

    result = dreambooth(pipe, trial.pictures[:4], trial.prompt, steps=8, batch_size=4, learning_rate=5e-4)
    assert loss(result.pipe) < 0.85 * loss(pipe)


def test_a_rate_that_would_round_away_is_refused():
    pipe = tiny_pipeline("sd1").to(torch.bfloat16)
    how = {"steps": 1, "learning_rate": 1e-9}
    with pytest.raises(
        ValueError, match=r"learning_rate: got 1e-09, at which \d+% of the weights, in bfloat16"
    ):
        dreambooth(pipe, pictures(2), PROMPT, **how)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PersonalizationWarning)
        dreambooth(pipe, pictures(2), PROMPT, mode="bf16_faithful", **how)
        moved = dreambooth(pipe, pictures(2), PROMPT, steps=1, learning_rate=1e-2)
    assert moved.pipe.unet.dtype == torch.bfloat16
    assert not torch.equal(moved.pipe.unet.conv_in.weight, pipe.unet.conv_in.weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("octave", [2.0**-7, 1.0, 8.0])
def test_rates_are_refused_that_do_not_reach_half_a_spacing(octave, dtype):
    """Which is the same for all weights of an octave; told by what rounding leaves of them."""
    network = torch.nn.Linear(64, 1, bias=False, dtype=dtype)
    network.weight.data = torch.linspace(1.02, 1.98, 64).mul(octave)[None].to(dtype)
    half = torch.finfo(dtype).eps / 2 * octave
    for farthest in (0.98 * half, 1.02 * half):
        moved = (network.weight.double() + farthest).to(dtype) != network.weight
        assert moved.all() == moved.any() == (farthest > half)
        with nullcontext() if moved.all() else pytest.raises(ValueError, match="100% of the weights"):
            check_moves(list(network.parameters()), farthest / 2, 2)
    torch.nn.init.zeros_(network.weight)
    check_moves(list(network.parameters()), 1e-30, 1)


def test_what_is_wrong_is_said_before_the_model_is_copied(monkeypatch):
    pipe = tiny_pipeline("sd1").to(torch.bfloat16)
    monkeypatch.setattr(sys.modules["pumice.personalize.dreambooth"], "Student", None)
    for message, given in (
        ("learning_rate: got 1e-09, at which", {"learning_rate": 1e-9, "steps": 1}),
        ("images: got an empty list", {"images": []}),
        ("class_images: got an empty list", {"class_prompt": CLASS, "class_images": []}),
    ):
        with pytest.raises(ValueError, match=message):
            dreambooth(pipe, **{"images": pictures(2), "prompt": PROMPT, **given})


def test_it_leaves_the_callers_accelerate_alone():
    script = """
import torch
from accelerate import Accelerator
from pumice.personalize import dreambooth
from pumice.testbed import tiny_pipeline

dreambooth(tiny_pipeline("sd1"), torch.rand(2, 3, 32, 32), "a photo of sks dog", steps=1)
assert Accelerator(mixed_precision="bf16").mixed_precision == "bf16"
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_what_cannot_be_learned_is_said(tmp_path):
    pipe = tiny_pipeline("sd1")
    with pytest.warns(PersonalizationWarning, match="images: got 1 picture"):
        dreambooth(pipe, pictures(1), PROMPT, steps=1)
    for error, message, given in (
        (ValueError, "images: got an empty list", {"images": []}),
        (ValueError, "images: got shape", {"images": torch.zeros(0, 3, 32, 32)}),
        (ValueError, "cannot be read", {"images": tmp_path}),
        (ValueError, "images: got NaN", {"images": torch.full((1, 3, 32, 32), torch.nan)}),
        (ValueError, "prompt: .* names no subject", {"class_prompt": PROMPT}),
        (ValueError, "class_images: got some", {"class_images": pictures(2)}),
        (ValueError, "steps: got 0", {"steps": 0}),
        (ValueError, "mode: got 'fp8'", {"mode": "fp8"}),
        (ValueError, "learning_rate: got nan", {"learning_rate": float("nan")}),
        (TypeError, "steps: got a float", {"steps": 1.5}),
        (TypeError, "train_text_encoder: got 'no'", {"train_text_encoder": "no"}),
        (ValueError, "class_prompt: got none, expected one with", {"noise_phrase": NOISE_PHRASE}),
        (
            ValueError,
            "prior_weight: got 0, expected more with a noise_phrase",
            {"noise_phrase": NOISE_PHRASE, "class_prompt": CLASS, "prior_weight": 0},
        ),
    ):
        with pytest.raises(error, match=message):
            dreambooth(pipe, **{"images": pictures(2), "prompt": PROMPT, **given})
