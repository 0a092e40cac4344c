"""Words that are put into prompts: where, how many, and that they stay the tokens they were drawn as."""

import pytest
import torch

from pumice import models, testbed
from pumice.memorization.perturb import perturb_embeds, perturb_prompt
from pumice.testbed import tiny_pipeline, world

TOKENIZER = tiny_pipeline("sd1").tokenizer
PROMPT = "a red cat and a Small dog, on the beach"
INSERTING = ["add_tokens", "add_numbers", "repeat_words"]


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def without(words: list[str], original: list[str]) -> list[str] | None:
    """What is left when `original`, in order, is taken out of `words`; None if it is not in there."""
    left, rest = [], list(original)
    for word in words:
        if rest and word == rest[0]:
            rest.pop(0)
        else:
            left.append(word)
    return None if rest else left


@pytest.mark.parametrize("how", [*INSERTING, "replace_tokens"])
def test_a_seed_is_a_prompt(how):
    one = perturb_prompt(PROMPT, TOKENIZER, how=how, seed=1)
    assert perturb_prompt(PROMPT, TOKENIZER, how=how, seed=1) == one != PROMPT
    assert len({perturb_prompt(PROMPT, TOKENIZER, how=how, seed=seed) for seed in range(10)}) > 8


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("how", INSERTING)
def test_words_are_put_in_and_all_others_stay_in_order(how, seed):
    for count in (1, 4, 7):
        words = perturb_prompt(PROMPT, TOKENIZER, how=how, count=count, seed=seed).split(" ")
        added = without(words, PROMPT.split())
        assert added is not None and len(added) == count
        if how == "add_numbers":
            assert all(0 <= int(word) < 100_000 for word in added)
        if how == "repeat_words":
            assert set(added) <= set(PROMPT.split())


@pytest.mark.parametrize("how", INSERTING)
def test_every_place_can_be_drawn(how):
    words = [perturb_prompt("X Y", TOKENIZER, how=how, count=1, seed=seed).split() for seed in range(40)]
    if how != "repeat_words":
        assert {tuple(word in ("X", "Y") for word in found) for found in words} == {
            (False, True, True),
            (True, False, True),
            (True, True, False),
        }
    else:
        assert {"".join(found) for found in words} == {"XXY", "XYX", "XYY", "YXY"}


@pytest.mark.parametrize("tokenizer", [TOKENIZER, testbed.load().tokenizer], ids=["tiny", "testbed"])
def test_drawn_words_are_one_token_which_survives_beside_any_neighbour(tokenizer):
    prompt = PROMPT if tokenizer is TOKENIZER else world.memorized(0).caption

    def tokens(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    drawn = set()
    for seed in range(20):
        found = perturb_prompt(prompt, tokenizer, how="add_tokens", count=3, seed=seed)
        added = without(found.split(), prompt.split())
        assert added is not None
        drawn |= set(added)
        assert all(len(tokens(word)) == 1 for word in added)
        # the prompt's own tokens and the three new ones, nothing merged
        assert tokens(found) == [token for word in found.split() for token in tokens(word)]
        assert len(tokens(found)) == len(tokens(prompt)) + 3
    assert len(drawn) > 15


@pytest.mark.parametrize("count", [1, 4, 100])
def test_replaced_words_keep_the_number_of_words(count):
    words, found = (
        PROMPT.split(),
        perturb_prompt(PROMPT, TOKENIZER, how="replace_tokens", count=count).split(),
    )
    assert len(found) == len(words)
    changed = [new for old, new in zip(words, found, strict=True) if old != new]
    assert (
        len(changed) <= count and len(changed) >= min(count, len(words)) - 2
    )  # some may be drawn as they were
    assert all(len(ids(word)) == 1 for word in changed)


@pytest.mark.parametrize("how", [*INSERTING, "replace_tokens"])
def test_nothing_that_is_returned_falls_off_the_end(how):
    long = " ".join(f"the cat{i}" for i in range(60))
    found = perturb_prompt(long, TOKENIZER, how=how, count=4, seed=2)
    assert len(TOKENIZER(found)["input_ids"]) <= TOKENIZER.model_max_length
    added = (
        without(found.split(), long.split()[: len(found.split()) - 4]) if how != "replace_tokens" else [1] * 4
    )
    assert added is not None and len(added) == 4
    assert len(ids(found)) > TOKENIZER.model_max_length - 12, "no more is dropped than has to be"


def test_an_empty_prompt_can_be_filled():
    assert len(perturb_prompt("", TOKENIZER, how="add_tokens", count=2).split()) == 2


def test_noise_on_embeddings():
    model = models.load(tiny_pipeline("sdxl"))
    with torch.no_grad():
        clean = model.encode_prompt(["a cat", "a dog"])
    found = perturb_embeds(clean, scale=0.3, seed=4)
    noise = found.embeds - clean.embeds
    assert noise.std().item() == pytest.approx(0.3, rel=0.03) and abs(noise.mean()) < 0.01
    torch.testing.assert_close(noise[0], noise[1], rtol=0, atol=1e-6)
    assert torch.equal(perturb_embeds(clean[1], scale=0.3, seed=4).embeds[0], found.embeds[1])
    assert not torch.equal(perturb_embeds(clean, scale=0.3, seed=5).embeds, found.embeds)
    assert torch.equal(perturb_embeds(clean, scale=0.0).embeds, clean.embeds)
    assert found.pooled is clean.pooled and found.tokens == clean.tokens
    half = models.PromptEmbeds(clean.embeds.half(), None, clean.tokens)
    assert perturb_embeds(half).embeds.dtype == torch.float16


BAD = {
    "another way": ({"how": "shuffle"}, ValueError, "how: got 'shuffle', expected one of add_tokens"),
    "not a string": ({"prompt": 3}, TypeError, "prompt: got a int"),
    "nothing to do": ({"count": 0}, ValueError, "count: got 0, expected at least 1"),
    "half a word": ({"count": 1.5}, TypeError, "integer"),
    "a negative seed": ({"seed": -1}, ValueError, "seed: got -1"),
    "no words to repeat": ({"prompt": " ", "how": "repeat_words"}, ValueError, "prompt: got ' '"),
    "no words to replace": ({"prompt": "", "how": "replace_tokens"}, ValueError, "prompt: got ''"),
    "too many": ({"how": "add_numbers", "count": 80}, ValueError, "count: got 80, expected changes that fit"),
    "more than there are": ({"count": 10_000}, ValueError, "count: got 10000, expected at most"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_that_names_the_argument(change, error, message):
    arguments = {"prompt": PROMPT, "how": "add_tokens"} | change
    with pytest.raises(error, match=message) as caught:
        perturb_prompt(arguments.pop("prompt"), TOKENIZER, **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scale", [-0.1, float("nan"), float("inf")])
def test_bad_scales(scale):
    embeds = models.PromptEmbeds(torch.zeros(1, 2, 3), None, (None,))
    with pytest.raises(ValueError, match=f"scale: got {scale}"):
        perturb_embeds(embeds, scale)
