"""Prompts in which some tokens are free: their embeddings are given, not those of the vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pumice.models import DiffusionModel, PromptEmbeds, UnsupportedModelError
from pumice.models.arguments import checked_count
from pumice.models.free_words import places, reading, stand_ins
from pumice.models.prompts import tokenize


class FreeTokens:
    """Prompts with so many free tokens in the place of {}.

    Args:
        model: that reads them.
        prompts: each with {}, as a word of its own.
        tokens: how many.
        name: of the argument, in errors.

    Attributes:
        tokens: as given.
        truncated: the end of each prompt that does not fit.

    Raises:
        ValueError: if the free tokens do not fit.
    """

    def __init__(self, model: DiffusionModel, prompts: Sequence[str], tokens: int, name: str) -> None:
        self.tokens = checked_count("tokens", tokens)
        self._model, self._templates = model, tuple(prompts)
        self._prompts = [prompt.replace("{}", stand_ins(tokens), 1) for prompt in prompts]
        self._places: list[list[list[int]]] = []  # by text encoder and prompt
        self.truncated: list[str] = []
        for tokenizer in model.tokenizers:
            rows = tokenize(tokenizer, self._prompts)
            self.truncated = [row.truncated for row in rows]
            found = [places(row)[:tokens] for row in rows]
            for prompt, row, own in zip(prompts, rows, found, strict=True):
                if len(own) != tokens:
                    if row.truncated:
                        raise ValueError(f"{name}: {row.truncated[-40:]!r} of {prompt!r} does not fit")
                    raise ValueError(f"{name}: got {prompt!r}, expected {{}} as a word of its own")
            self._places.append(found)

    def encode(self, vectors: Sequence[Tensor], which: Sequence[int]) -> PromptEmbeds:
        """Prompt `which[i]` with the i-th of the free tokens, (B, tokens, d) for each text encoder."""
        at = [[found[row] for row in which] for found in self._places]
        with reading(self._model, at, vectors):
            return self._model.encode_prompt([self._prompts[row] for row in which])

    def text(self, prompt: int, words: str) -> str:
        """A prompt with words in the place of the free tokens."""
        return self._templates[prompt].replace("{}", words, 1)


class Vocabulary:
    """The tokens that a prompt can hold, all but BOS, EOS and padding.

    Args:
        model: that reads them; with two text encoders, what they read of one token stands side by side.
        words: only tokens that are words and can be typed, so that a text of them is split into the same.

    Attributes:
        table: (V, sum of d) float32, the token embeddings.

    Raises:
        UnsupportedModelError: if the model's tokenizers have different tokens.
    """

    def __init__(self, model: DiffusionModel, *, words: bool = False) -> None:
        self._tokenizer = model.tokenizers[0]
        known = self._tokenizer.get_vocab()
        if any(other.get_vocab() != known for other in model.tokenizers[1:]):
            raise UnsupportedModelError("pipe: its tokenizers have different tokens, expected the same ones")
        special = {index for tokenizer in model.tokenizers for index in tokenizer.all_special_ids}
        tables = [encoder.get_input_embeddings().weight.detach() for encoder in model.text_encoders]
        ids = [index for index in sorted(known.values()) if index not in special]
        if words:
            texts = [text.strip() for text in self._tokenizer.batch_decode([[index] for index in ids])]
            again = self._tokenizer([f"{text} {text}" for text in texts], add_special_tokens=False).input_ids
            ids = [
                index
                for index, text, pair in zip(ids, texts, again, strict=True)
                if text.isprintable() and pair == [index, index]
            ]
        self._ids = torch.tensor(ids)
        where = self._ids.to(model.device)
        self._sizes = [table.shape[1] for table in tables]
        self.table = torch.cat([table[where].float() for table in tables], dim=1)

    def __len__(self) -> int:
        return len(self.table)

    def split(self, vectors: Tensor) -> tuple[Tensor, ...]:
        """Embeddings (..., sum of d), one tensor a text encoder."""
        return vectors.split(self._sizes, dim=-1)

    def nearest(self, vectors: Tensor) -> Tensor:
        """The tokens of which embeddings (..., sum of d) have the largest cosine, (...) int64."""
        table = torch.nn.functional.normalize(self.table, dim=1)
        return (vectors @ table.T).argmax(-1)

    def texts(self, tokens: Tensor) -> list[str]:
        """Rows (B, k) of tokens as words."""
        return [self._tokenizer.decode(row).strip() for row in self._ids[tokens.cpu()].tolist()]
