"""Textual inversion: new rows learn, and nothing else can."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pumice import testbed
from pumice.models import load
from pumice.models.draws import Draws
from pumice.personalize import sample, textual_inversion
from pumice.testbed import tiny_pipeline
from pumice.training.templates import TEMPLATES

WORD, PROMPT = "<creature>", "a photo of <creature>, big"


def pictures(count: int) -> Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(count))


def bits(pipe) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value.clone()
        for name, part in pipe.components.items()
        if isinstance(part, torch.nn.Module)
        for key, value in part.state_dict().items()
    }


def matrices(pipe) -> list[Tensor]:
    encoders = [pipe.text_encoder, *([pipe.text_encoder_2] if hasattr(pipe, "text_encoder_2") else [])]
    return [encoder.get_input_embeddings().weight.detach() for encoder in encoders]


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_only_new_rows_move(family):
    pipe = tiny_pipeline(family)
    pipe.unet.train().requires_grad_(True)
    before, tokenizer = bits(pipe), len(pipe.tokenizer)
    result = textual_inversion(pipe, pictures(3), WORD, "dog", num_vectors=2, steps=2, learning_rate=0.1)
    assert len(pipe.tokenizer) == tokenizer and len(result.pipe.tokenizer) == tokenizer + 2
    assert pipe.unet.training and all(weight.grad is None for weight in pipe.unet.parameters())
    start = pipe.tokenizer("dog", add_special_tokens=False).input_ids[0]
    for old, new in zip(matrices(pipe), matrices(result.pipe), strict=True):
        assert torch.equal(new[:-2], old)
        assert ((new[-2:] - old[start]).abs() > 0.01).float().mean() > 0.9  # two steps of Adam
        assert not torch.equal(new[-2], new[-1])
    now = bits(result.pipe)
    changed = [key for key in before if not torch.equal(before[key], now[key])]
    assert all("token_embedding" in key for key in changed)
    now = bits(pipe)
    assert all(torch.equal(before[key], now[key]) for key in before)
    # and what did not learn is not there twice
    assert result.pipe.unet.conv_in.weight.data_ptr() == pipe.unet.conv_in.weight.data_ptr()


def test_two_steps_are_those_of_a_plain_loop():
    """Against AdamW on autograd's gradients in a row that a hook puts in the new token's place."""
    pipe = tiny_pipeline("sdxl").to(torch.float64)
    subject = pictures(3)
    result = textual_inversion(pipe, subject, WORD, "dog", steps=2, learning_rate=0.01, batch_size=2, seed=5)
    model = load(copy.deepcopy(pipe))
    parameters = []
    new = len(pipe.tokenizer)
    assert new == len(pipe.tokenizer_2)
    for tokenizer, encoder in zip(model.tokenizers, model.text_encoders, strict=True):
        start = tokenizer("dog", add_special_tokens=False).input_ids[0]
        tokenizer.add_tokens([WORD])
        parameters.append(encoder.get_input_embeddings().weight[[start]].detach().clone().requires_grad_())
        encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)

        def learned(module, inputs, output, row=parameters[-1]):
            return torch.where((inputs[0] == new)[..., None], row, output)

        encoder.get_input_embeddings().register_forward_hook(learned)
    optimizer = torch.optim.AdamW(parameters, 0.01, betas=(0.9, 0.999), weight_decay=1e-2)
    draws = Draws([f"5/training/{row}" for row in range(2)], torch.device("cpu"))
    losses = []
    for step in range(2):
        loss = torch.zeros(())
        for row in range(2):
            epoch, place = divmod(2 * step + row, 3)
            image = subject[int(draws.permutation(0, "order", epoch, 3)[place])][None]
            prompt = TEMPLATES[int(draws.integers([row], "template", step, 27))].format(WORD)
            posterior, noise = (
                draws.normal([row], what, step, (4, 16, 16)) for what in ("posterior", "noise")
            )
            t = draws.integers([row], "timestep", step, 1000)
            with torch.no_grad():
                z = model.encode_image(image, noise=posterior).float()
            output = model.predict(model.add_noise(z, noise, t), t, model.encode_prompt(prompt))
            loss = loss + (output - model.schedule.target(z, noise, t)).square().mean() / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    for mine, theirs in zip(matrices(result.pipe), parameters, strict=True):
        assert torch.allclose(mine[-1], theirs[0], atol=1e-5)
    assert torch.allclose(result.losses, torch.tensor(losses), rtol=1e-4)


@pytest.mark.parametrize(("family", "vectors"), [("sd1", 1), ("sd2", 3), ("sdxl", 2)])
def test_the_saved_word_draws_the_same_in_plain_diffusers(family, vectors, tmp_path):
    result = textual_inversion(
        tiny_pipeline(family), pictures(2), WORD, "dog", num_vectors=vectors, steps=1, learning_rate=0.5
    )
    result.save(tmp_path / "out")
    again = tiny_pipeline(family)
    again.load_textual_inversion(str(tmp_path / "out"))
    if family == "sdxl":
        again.load_textual_inversion(
            str(tmp_path / "out"),
            weight_name="learned_embeds_2.safetensors",
            text_encoder=again.text_encoder_2,
            tokenizer=again.tokenizer_2,
        )
    how = {"num_images": 2, "num_inference_steps": 2}
    drawn = sample(result, PROMPT, **how)
    assert torch.equal(drawn, sample(again, PROMPT, **how))
    assert not torch.equal(drawn, sample(result, PROMPT.replace(WORD, "dog"), **how))


def test_narrow_networks_learn_in_float32(tmp_path):
    """In the pipeline's dtype steps of 2e-5 would round away, beside 0.02."""
    pipe = tiny_pipeline("sd1").to(torch.bfloat16)
    how = {"steps": 4, "learning_rate": 2e-5}
    result = textual_inversion(pipe, pictures(2), WORD, "dog", checkpoint=tmp_path, **how)
    master = load_file(tmp_path / "checkpoint.safetensors")["weight.text_encoder"]
    assert master.dtype == torch.float32
    assert matrices(result.pipe)[0].dtype == torch.bfloat16
    assert torch.equal(matrices(result.pipe)[0][-1], master[0].bfloat16())
    start = pipe.tokenizer("dog", add_special_tokens=False).input_ids[0]
    assert bool((master[0] != matrices(pipe)[0][start].float()).all())


def test_an_interrupted_training_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    pipe, how = tiny_pipeline("sdxl"), {"steps": 3, "learning_rate": 0.1, "checkpoint_every": 1}
    whole = textual_inversion(pipe, pictures(3), WORD, "dog", **how)
    step, taken = torch.optim.AdamW.step, []

    def stopped(self, *args):
        if len(taken) == 1:
            raise KeyboardInterrupt
        taken.append(step(self, *args))

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", stopped)
        with pytest.raises(KeyboardInterrupt):
            textual_inversion(pipe, pictures(3), WORD, "dog", checkpoint=tmp_path, **how)
    result = textual_inversion(pipe, pictures(3), WORD, "dog", checkpoint=tmp_path, **how)
    for mine, theirs in zip(matrices(result.pipe), matrices(whole.pipe), strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(result.losses, whole.losses)
    with pytest.raises(ValueError, match=r"num_vectors was 1, is 2"):
        textual_inversion(pipe, pictures(3), WORD, "dog", num_vectors=2, checkpoint=tmp_path, **how)


@torch.no_grad()
def test_a_subject_is_learned():
    """Its denoising loss falls, on timesteps and noise that training does not draw."""
    pipe, trial = testbed.load(), testbed.subject_trial(0)
    result = textual_inversion(
        pipe, trial.pictures[:4], WORD, "red", num_vectors=4, steps=12, batch_size=4, learning_rate=0.05
    )
    model, losses = load(result.pipe), {}
    z = model.encode_image(trial.pictures[:4])
    for word in ("red", WORD):
        draw, embeds = torch.Generator().manual_seed(0), model.encode_prompt(f"a photo of a {word}")
        losses[word] = 0.0
        for t in range(50, 1000, 100):
            noise = torch.randn(z.shape, generator=draw)
            output = model.predict(model.add_noise(z, noise, t), t, embeds)
            losses[word] += float((output - model.schedule.target(z, noise, t)).square().mean()) / 10
    assert losses[WORD] < 0.93 * losses["red"]


@pytest.mark.parametrize(
    ("error", "message", "given"),
    [
        (
            ValueError,
            "placeholder_token: got 'cat', but 'cat' is a token of the model already",
            {"word": "cat"},
        ),
        (ValueError, "placeholder_token: got 'a b', expected a word without spaces", {"word": "a b"}),
        (ValueError, "placeholder_token: got ''", {"word": ""}),
        (TypeError, "placeholder_token: got a int", {"word": 3}),
        (
            ValueError,
            "placeholder_token: got '<Creature>' of 2 vectors",
            {"word": "<Creature>", "num_vectors": 2},
        ),
        (ValueError, "placeholder_token: got '<creature>' of 90 vectors, of which 7", {"num_vectors": 90}),
        (
            ValueError,
            r"initializer_token: got 'creature', which is 7 tokens \('c', 're'",
            {"initializer": "creature"},
        ),
        (ValueError, "initializer_token: got 'big dog', expected a word", {"initializer": "big dog"}),
        (TypeError, "templates: got 'a {}', expected a list", {"templates": "a {}"}),
        (ValueError, "templates: got 'a dog', expected one {}", {"templates": ["a {}", "a dog"]}),
        (ValueError, "templates: got an empty list", {"templates": []}),
        (ValueError, "num_vectors: got 0", {"num_vectors": 0}),
        (ValueError, "learning_rate: got 0", {"learning_rate": 0}),
        (ValueError, "images: got an empty list", {"images": []}),
    ],
)
def test_what_cannot_be_learned_is_said(error, message, given):
    how = {"images": pictures(2), "word": WORD, "initializer": "dog", **given}
    with pytest.raises(error, match=message):
        textual_inversion(
            tiny_pipeline("sd1"), how.pop("images"), how.pop("word"), how.pop("initializer"), **how
        )


def test_a_word_is_learned_once():
    result = textual_inversion(tiny_pipeline("sd1"), pictures(2), WORD, "dog", num_vectors=2, steps=1)
    with pytest.raises(ValueError, match="'<creature>' is a token of the model already"):
        textual_inversion(result.pipe, pictures(2), WORD, "dog")
    again = textual_inversion(result.pipe, pictures(2), "<other>", "dog", steps=1, learning_rate=0.1)
    assert torch.equal(matrices(again.pipe)[0][:-1], matrices(result.pipe)[0])
