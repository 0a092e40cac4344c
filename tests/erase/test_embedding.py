"""A word is learned for pictures: what it replaces, what stays, and that it finds what they show."""

from __future__ import annotations

import pytest
import torch

from pumice import models, testbed
from pumice.erase.embedding import Word, learn_word
from pumice.testbed import tiny_pipeline


def pictures(count=2, size=32):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def states(pipe):
    return {
        f"{name}.{key}": value.clone()
        for name, part in pipe.components.items()
        if isinstance(part, torch.nn.Module)
        for key, value in part.state_dict().items()
    }


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("text", ["cat", "red cat"])
def test_a_word_with_the_embeddings_of_a_text_reads_as_that_text(family, text):
    model = models.load(tiny_pipeline(family))
    tokens = len(model.tokenizers[0](text, add_special_tokens=False).input_ids)
    word = Word(model, text, tokens=tokens)
    templates = ["{}", "a photo of {} at the beach"]
    with torch.no_grad():
        found = word.encode(model, templates)
        expected = model.encode_prompt([template.replace("{}", text) for template in templates])
    torch.testing.assert_close(found.embeds, expected.embeds)
    if expected.pooled is not None:
        torch.testing.assert_close(found.pooled, expected.pooled)


def test_fewer_tokens_start_as_the_mean():
    model = models.load(tiny_pipeline("sd1"))
    ids = model.tokenizers[0]("red cat", add_special_tokens=False).input_ids
    assert len(ids) > 1
    table = model.text_encoders[0].get_input_embeddings().weight
    for tokens in (1, len(ids) + 1):
        (vectors,) = Word(model, "red cat", tokens=tokens).vectors
        torch.testing.assert_close(vectors, table[ids].mean(0).expand(tokens, -1))


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_learning_moves_the_word_alone(family):
    pipe = tiny_pipeline(family)
    model, before = models.load(pipe), states(pipe)
    start = Word(model, "cat")
    word = learn_word(model, pictures(), initial="cat", steps=2, batch_size=2)
    for vectors, was in zip(word.vectors, start.vectors, strict=True):
        assert not vectors.requires_grad and (vectors - was).abs().max() > 1e-3
    after = states(pipe)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    for encoder in model.text_encoders:
        assert not encoder.get_input_embeddings()._forward_hooks
        assert all(weight.requires_grad and weight.grad is None for weight in encoder.parameters())


def test_the_seed_decides_and_the_rows_of_a_pass_do_not():
    model = models.load(tiny_pipeline("sd1"))

    def learned(**how):
        found = learn_word(model, pictures(), initial="cat", steps=2, batch_size=3, **how)
        return found.vectors[0].detach()

    one = learned()
    torch.testing.assert_close(learned(rows=1), one, rtol=0, atol=1e-4)
    assert torch.equal(learned(), one) and not torch.equal(learned(seed=1), one)


def test_a_word_for_the_testbeds_ball_answers_as_its_name_does():
    """From another word it comes nearer to what the model predicts for the pictures' own caption."""
    model = models.load(testbed.load())
    caption = "a red ball at the beach"
    with torch.no_grad(), model.frozen():
        noise = torch.randn(1, *model.latent_shape(), generator=torch.Generator().manual_seed(0))
        images = testbed.load()(caption, num_inference_steps=10, guidance_scale=5, output_type="pt")
        found = torch.as_tensor(images.images).float().clamp(0, 1)
    word = learn_word(
        model, found, initial="fish", templates=["a red {} at the beach"], steps=25, learning_rate=2e-2
    )
    start = Word(model, "fish")
    z = model.encode_image(found).detach()
    t = torch.arange(300, 1000, 100)
    rows = model.add_noise(z.expand(len(t), -1, -1, -1), noise.expand(len(t), -1, -1, -1), t)
    target = model.schedule.target(z.expand_as(rows), noise.expand_as(rows), t)
    errors = []
    with torch.no_grad():
        for each in (start, word):
            embeds = each.encode(model, ["a red {} at the beach"]).repeat(len(t))
            errors.append(float((model.predict(rows, t, embeds) - target).square().mean()))
    assert errors[1] < 0.9 * errors[0]


class TestBadInput:
    def refuses(self, message, error=ValueError, **how):
        model = models.load(tiny_pipeline("sd1"))
        with pytest.raises(error, match=message) as caught:
            learn_word(model, **{"images": pictures(), "initial": "cat", "steps": 1} | how)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("template", ["a cat", "{} and {}", "{}*", "cat " * 90 + "{}"])
    def test_templates(self, template):
        self.refuses("templates: got .* expected one {} that is a word of its own", templates=[template])

    def test_nothing(self):
        self.refuses("images: got an empty list", images=[])
        self.refuses("templates: got none", templates=[])
        self.refuses("initial: got '', expected a word", initial="")
        self.refuses("initial: got a int, expected a string", TypeError, initial=3)

    @pytest.mark.parametrize("name", ["steps", "batch_size", "tokens", "rows"])
    def test_counts(self, name):
        self.refuses(f"{name}: got 0, expected at least 1", **{name: 0})

    def test_a_rate_that_is_none(self):
        self.refuses("learning_rate: got 0", learning_rate=0)
