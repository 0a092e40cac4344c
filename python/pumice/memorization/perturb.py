"""Baselines that change a prompt at random, so that it no longer replays (Somepalli et al., NeurIPS 2023)."""

from __future__ import annotations

import dataclasses
import operator
import random
from typing import Any, Literal, get_args

import torch

from pumice.memorization import arguments
from pumice.models import PromptEmbeds

How = Literal["add_tokens", "add_numbers", "repeat_words", "replace_tokens"]


def perturb_prompt(prompt: str, tokenizer: Any, *, how: How, count: int = 4, seed: int = 0) -> str:
    """Put random words into a prompt, or in the place of its words.

    ::

        add_tokens      RTA: `count` random words of the vocabulary at random places
        add_numbers     RNA: `count` random integers below 100 000 at random places
        repeat_words    RWR: `count` random words of the prompt, again, at random places
        replace_tokens       `count` random words of the prompt (all, if it has fewer) become random ones

    (Somepalli et al., arXiv:2305.20086; baselines of Wen et al., arXiv:2407.21720.) Words are what whitespace
    separates; those of the prompt keep their order. A drawn word is one token, which stays the same token
    beside any neighbours. What is returned fits the text encoder whole: of a prompt too long for that, the
    end is dropped, as the encoder would drop it, before places are drawn, so that every change is seen.

    Args:
        prompt: the words to change.
        tokenizer: a fast one of transformers, `pipe.tokenizer`.
        how: see above.
        count: of the changes. Default 4, that of both papers' scripts.
        seed: the same one gives the same changes.

    Returns:
        The new prompt, its words separated by single spaces.

    Differences from the released code: drawn tokens are whole words; a piece of a word would merge with its
    neighbours into other tokens. No word of the vocabulary is drawn twice, nor is a
    word replaced twice; numbers and words of the prompt are drawn with replacement.

    Raises:
        TypeError: if prompt is not a string, or count or seed is not an integer.
        ValueError: for an unknown `how`, numbers out of range, a prompt without words where some are needed,
            or changes that do not fit the text encoder.
    """
    (prompt,) = arguments.checked_prompts([prompt], "prompt")
    if how not in get_args(How):
        raise ValueError(f"how: got {how!r}, expected one of {', '.join(get_args(How))}")
    if operator.index(count) < 1:
        raise ValueError(f"count: got {count}, expected at least 1")
    _check_seed(seed)
    words, rng = prompt.split(), random.Random(seed)
    if not words and how in ("repeat_words", "replace_tokens"):
        raise ValueError(f"prompt: got {prompt!r}, expected words, which {how!r} needs")
    if how == "replace_tokens":
        words = _fitting(words, [], tokenizer)
        places = rng.sample(range(len(words)), min(count, len(words)))
        for place, word in zip(places, _vocabulary_words(tokenizer, len(places), rng), strict=True):
            words[place] = word
        return " ".join(words)
    if how == "add_tokens":
        added = _vocabulary_words(tokenizer, count, rng)
    elif how == "add_numbers":
        added = [str(rng.randrange(100_000)) for _ in range(count)]
    else:
        added = rng.choices(_fitting(words, [], tokenizer), k=count)
    words = _fitting(words, added, tokenizer)
    for word in added:
        words.insert(rng.randint(0, len(words)), word)
    return " ".join(words)


def perturb_embeds(embeds: PromptEmbeds, scale: float = 0.1, seed: int = 0) -> PromptEmbeds:
    """Gaussian noise on the embedding of every token (GNI): e + scale N(0, I).

    The noise is drawn on the CPU in float32, from the seed alone: every prompt gets the same, and other
    prompts beside it change nothing. A pooled embedding gets none.

    Args:
        embeds: from `encode_prompt`.
        scale: the noise's standard deviation. Default 0.1, the papers'.
        seed: of the noise.

    Raises:
        ValueError: for a scale or a seed out of range.
    """
    if not 0 <= scale < float("inf"):
        raise ValueError(f"scale: got {scale}, expected a number that is not negative")
    _check_seed(seed)
    clean = embeds.embeds
    noise = torch.randn(clean.shape[1:], generator=torch.Generator().manual_seed(seed)).to(clean.device)
    return dataclasses.replace(embeds, embeds=(clean.float() + scale * noise).to(clean.dtype))


def _check_seed(seed: int) -> None:
    if operator.index(seed) < 0:
        raise ValueError(f"seed: got {seed}, expected one that is not negative")


def _vocabulary_words(tokenizer: Any, count: int, rng: random.Random) -> list[str]:
    """Different random words of letters that are one token, and that token wherever they stand."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=operator.itemgetter(1))
    rng.shuffle(vocabulary)
    found: list[str] = []
    for token, index in vocabulary:
        word = token.removesuffix("</w>")
        if (
            word != token
            and word.isascii()
            and word.isalpha()
            and tokenizer(word, add_special_tokens=False)["input_ids"] == [index]
        ):
            found.append(word)
            if len(found) == count:
                return found
    raise ValueError(f"count: got {count}, expected at most the tokenizer's {len(found)} words of one token")


def _fitting(words: list[str], added: list[str], tokenizer: Any) -> list[str]:
    """As many of the first words as fit the text encoder together with the added ones."""
    room = tokenizer.model_max_length
    for end in range(len(words), -1, -1):
        if len(tokenizer(" ".join((*words[:end], *added)), verbose=False)["input_ids"]) <= room:
            return words[:end]
    raise ValueError(f"count: got {len(added)}, expected changes that fit the text encoder's {room} tokens")
