from __future__ import annotations

import pytest
import torch

from pumice import testbed
from pumice.models import PromptEmbeds, load
from pumice.testbed.tiny import tiny_pipeline

PROMPTS = ["a photo of a zebra, and Cats", "", "  don't  blink: naïve 猫 😀", "a cat"]
LONG = "a red cat in the " + "xylophone " * 10 + "and a dog"


def model(family="sd1", length=None):
    pipe = tiny_pipeline(family)
    if length:
        pipe.tokenizer.model_max_length = length
    return load(pipe)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("prompts", ["a photo of a cat", PROMPTS])
def test_embeddings_are_those_of_the_pipeline(family, prompts):
    diffusion = model(family)
    encoded = diffusion.encode_prompt(prompts)
    embeds, negative, *pooled = diffusion.pipe.encode_prompt(
        prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
    )
    assert torch.equal(encoded.embeds, embeds)
    unconditional = diffusion.unconditional()
    torch.testing.assert_close(unconditional.embeds, negative[:1])
    if family == "sdxl":
        assert torch.equal(encoded.pooled, pooled[0])
        torch.testing.assert_close(unconditional.pooled, pooled[1][:1])
        assert encoded.embeds.shape[2] == sum(
            encoder.config.hidden_size for encoder in diffusion.text_encoders
        )
    else:
        assert encoded.pooled is None
        torch.testing.assert_close(unconditional.embeds, diffusion.encode_prompt("").embeds)


def test_xl_encodes_the_empty_prompt_where_the_pipeline_does():
    pipe = tiny_pipeline("sdxl")
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    torch.testing.assert_close(load(pipe).unconditional().embeds, load(pipe).encode_prompt("").embeds)


@pytest.mark.parametrize("family", ["sd1", "sd2"])
@pytest.mark.parametrize("length", [None, 20])
def test_the_bookkeeping_describes_what_was_encoded(family, length):
    diffusion = model(family, length)
    encoded = diffusion.encode_prompt([*PROMPTS, LONG])
    ids = torch.tensor([tokens.ids for tokens in encoded.tokens])
    assert ids.shape[1] == (length or 77)
    with torch.no_grad():
        torch.testing.assert_close(diffusion.text_encoders[0](ids)[0], encoded.embeds)

    tokenizer = diffusion.tokenizers[0]
    for tokens in encoded.tokens:
        assert [tokens.bos, *tokens.content, tokens.eos, *tokens.pads] == list(range(len(tokens.ids)))
        assert tokens.ids[tokens.bos] == tokenizer.bos_token_id
        assert tokens.ids[tokens.eos] == tokenizer.eos_token_id
        assert all(tokens.ids[pad] == tokenizer.pad_token_id for pad in tokens.pads)
        assert [position for word in tokens.words for position in word.positions] == list(tokens.content)


def test_words_are_the_prompts_own():
    first, empty, odd, _ = model().encode_prompt(PROMPTS).tokens
    assert [word.text for word in first.words] == ["a", "photo", "of", "a", "zebra", ",", "and", "Cats"]
    assert first.words[4].positions == range(5, 10)
    assert (empty.words, empty.content, empty.eos) == ((), range(1, 1), 1)
    assert [word.text for word in odd.words] == ["don", "'t", "blink", ":", "naïve", "猫", "😀"]


def test_truncation_is_reported():
    diffusion = model(length=12)
    encoded = diffusion.encode_prompt(["a cat", LONG])
    assert encoded.embeds.shape[1] == 12
    assert encoded.truncated[0] == ""
    tokens = encoded.tokens[1]
    kept = LONG.removesuffix(encoded.truncated[1])
    assert kept == "a red cat in the xylopho"  # x y l o pho: cut inside a word
    assert kept + tokens.truncated == LONG == tokens.prompt
    assert tokens.words[-1].text == "xylophone"
    assert tokens.words[-1].positions == range(6, 11)
    assert (tokens.eos, tokens.pads) == (11, range(12, 12))


def test_a_prompt_that_just_fits_is_not_truncated():
    diffusion = model(length=12)
    fits, one_more = diffusion.encode_prompt(["a cat " * 5, "a cat " * 5 + "the"]).tokens
    assert (fits.truncated, fits.eos) == ("", 11)
    assert one_more.truncated == "the"
    assert one_more.ids == fits.ids


def test_a_textual_inversion_of_several_vectors_counts_as_tokens():
    pipe = tiny_pipeline("sd1")
    pipe.load_textual_inversion({"<toy>": torch.randn(3, 32)})
    tokens = load(pipe).encode_prompt("a <toy> cat").tokens[0]
    assert [word.text for word in tokens.words] == ["a", "<toy>", "<toy>_1", "<toy>_2", "cat"]
    assert tokens.prompt == "a <toy> <toy>_1 <toy>_2 cat"
    assert tokens.content == range(1, 6)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_selecting_repeating_and_joining(family):
    diffusion = model(family)
    encoded = diffusion.encode_prompt(PROMPTS)
    assert len(encoded) == 4
    for index, rows in [(1, [1]), (-1, [3]), (slice(1, 3), [1, 2]), ([3, 0], [3, 0])]:
        selected = encoded[index]
        assert torch.equal(selected.embeds, encoded.embeds[rows])
        assert [tokens.prompt for tokens in selected.tokens] == [PROMPTS[row] for row in rows]
    expected = diffusion.pipe.encode_prompt(
        PROMPTS, device="cpu", num_images_per_prompt=2, do_classifier_free_guidance=False
    )
    repeated = encoded.repeat(2)
    assert torch.equal(repeated.embeds, expected[0])
    joined = PromptEmbeds.cat([encoded[:1], encoded[1:]])
    assert torch.equal(joined.embeds, encoded.embeds)
    assert joined.tokens == encoded.tokens
    if family == "sdxl":
        assert torch.equal(repeated.pooled, expected[2])
        assert torch.equal(joined.pooled, encoded.pooled)


def test_gradients_reach_the_text_encoder():
    diffusion = model()
    diffusion.encode_prompt("a cat").embeds.sum().backward()
    assert diffusion.text_encoders[0].get_input_embeddings().weight.grad.abs().sum() > 0


def test_bad_prompts_are_refused():
    with pytest.raises(ValueError, match="prompts: got an empty list"):
        model().encode_prompt([])
    with pytest.raises(TypeError, match="prompts: got a int, expected strings"):
        model().encode_prompt(["a cat", 3])


class TestWithoutPadding:
    """Up to their EOS, prompts are encoded the same: the text encoders look back only."""

    @pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "testbed"])
    @pytest.mark.parametrize("prompts", ["a cat", "", [*PROMPTS, LONG]])
    def test_the_embeddings_are_those_of_the_padded_prompt(self, family, prompts):
        diffusion = load(testbed.load()) if family == "testbed" else model(family)
        with torch.no_grad():
            padded, found = (diffusion.encode_prompt(prompts, padded=flag) for flag in (True, False))
        length = 1 + max(tokens.eos for tokens in padded.tokens)
        assert found.embeds.shape == (len(padded), length, padded.embeds.shape[2])
        for row, whole, tokens in zip(found.embeds, padded.embeds, padded.tokens, strict=True):
            end = tokens.eos + 1
            torch.testing.assert_close(row[:end], whole[:end], rtol=0, atol=1e-5)
        if family == "sdxl":
            torch.testing.assert_close(found.pooled, padded.pooled, rtol=0, atol=1e-5)
        else:
            assert found.pooled is None

    def test_the_bookkeeping_ends_with_the_longest(self):
        diffusion = model()
        padded, found = (diffusion.encode_prompt(PROMPTS, padded=flag).tokens for flag in (True, False))
        length = 1 + max(tokens.eos for tokens in padded)
        for whole, tokens in zip(padded, found, strict=True):
            assert tokens.ids == whole.ids[:length] and tokens.pads == range(whole.eos + 1, length)
            assert (tokens.eos, tokens.content, tokens.words) == (whole.eos, whole.content, whole.words)
            assert tokens.ids[tokens.eos] == diffusion.tokenizers[0].eos_token_id

    def test_a_prompt_that_does_not_fit_is_cut_as_before(self):
        diffusion = model(length=12)
        padded, found = (diffusion.encode_prompt(["a cat", LONG], padded=flag) for flag in (True, False))
        assert torch.equal(found.embeds, padded.embeds) and found.tokens == padded.tokens

    @pytest.mark.parametrize("word", ["!", "zebra!"])
    def test_a_word_that_is_the_padding_of_others(self, word):
        """The second tokenizer of XL pads with "!"."""
        diffusion = model("sdxl")
        with torch.no_grad():
            padded, found = (diffusion.encode_prompt([word, "a dog"], padded=flag) for flag in (True, False))
        end = padded.tokens[0].eos + 1
        torch.testing.assert_close(found.embeds[0, :end], padded.embeds[0, :end], rtol=0, atol=1e-5)
        torch.testing.assert_close(found.pooled, padded.pooled, rtol=0, atol=1e-5)
