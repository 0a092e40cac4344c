"""A copy of a model that knows one more word: its embeddings train, and nothing else can."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pumice.models import DiffusionModel
from pumice.training.student import Learner, trainable_parts, with_copies


class NewTokens(Learner):
    """A word that stands for rows of its own behind the embedding matrix, in each text encoder.

    All other weights are read from the pipeline and frozen. The rows are moved in float32.

    Args:
        source: the model.
        word: new to its tokenizers. Its further tokens are `word`_1, `word`_2, ..., as diffusers names them.
        initializer: a word of one token, whose embedding all rows start from.
        count: of rows.

    Raises:
        ValueError: if the word is known or not kept whole, or the initializer is not one token.
        UnsupportedModelError: for quantised, offloaded or LoRA-wrapped weights.
    """

    def __init__(self, source: DiffusionModel, word: str, initializer: str, count: int) -> None:
        parts = trainable_parts(source, "lora", train_text_encoder=True)
        model = with_copies(source, parts, "lora")
        self.word, self._tokens = word, [word, *(f"{word}_{number}" for number in range(1, count))]
        weights = {}
        for encoder, name in zip(model.text_encoders, ("tokenizer", "tokenizer_2"), strict=False):
            tokenizer = copy.deepcopy(getattr(model.pipe, name))
            setattr(model.pipe, name, tokenizer)
            start = _token(tokenizer, initializer)
            _add(tokenizer, self._tokens)
            matrix = encoder.get_input_embeddings().weight
            rows = nn.Parameter(matrix[[start] * count].detach().clone())
            first = tokenizer.convert_tokens_to_ids(word)
            encoder.set_input_embeddings(_Joined(matrix.detach()[:first], rows))
            weights[f"text_encoder{name.removeprefix('tokenizer')}"] = rows
        super().__init__(model, weights, trains_text=True, wide=True)

    def check_room(self, prompts: Sequence[str]) -> None:
        """Make sure that every row has its place in each prompt.

        Raises:
            ValueError: if the prompt is too long, or the tokenizer tears the word apart.
        """
        for tokenizer in self.model.tokenizers:
            wanted = tokenizer.convert_tokens_to_ids(self._tokens)
            for prompt in self.model.pipe.maybe_convert_prompt(list(prompts), tokenizer):
                ids = tokenizer(prompt, truncation=True).input_ids
                found = [id for id in ids if id in wanted]
                if found != wanted:
                    raise ValueError(
                        f"placeholder_token: got {self.word!r} of {len(wanted)} vectors, of which "
                        f"{len(found)} arrive at the text encoder from {prompt[:40]!r}; expected a "
                        "lower-case word such as '<creature>', and fewer vectors where a prompt is too long"
                    )

    def embeddings(self) -> list[Tensor]:
        """(count, d) of each text encoder, as it has them."""
        return [rows.detach() for rows in self.weights.values()]

    def settle(self) -> None:
        """Give text encoders a plain matrix with the new rows."""
        for encoder in self.model.text_encoders:
            matrix = encoder.get_input_embeddings().joined()
            encoder.set_input_embeddings(nn.Embedding.from_pretrained(matrix))
            encoder.config.vocab_size = len(matrix)


class _Joined(nn.Module):
    """An embedding matrix (n, d) that stays, with rows (k, d) that train for the ids from n on."""

    def __init__(self, old: Tensor, rows: nn.Parameter) -> None:
        super().__init__()
        self._old, self.rows = old, rows

    def forward(self, ids: Tensor) -> Tensor:
        new = ids - len(self._old)
        known = functional.embedding(ids.clamp(max=len(self._old) - 1), self._old)
        return torch.where(new[..., None] >= 0, functional.embedding(new.clamp(min=0), self.rows), known)

    @torch.no_grad()
    def joined(self) -> Tensor:
        return torch.cat((self._old, self.rows))


def _token(tokenizer: Any, word: str) -> int:
    ids = tokenizer(word, add_special_tokens=False).input_ids
    if len(ids) != 1:
        pieces = ", ".join(map(repr, tokenizer.tokenize(word))) or "none"
        raise ValueError(
            f"initializer_token: got {word!r}, which is {len(ids)} tokens ({pieces}); expected a word of one"
        )
    return int(ids[0])


def _add(tokenizer: Any, tokens: Sequence[str]) -> None:
    """Make a tokenizer know new words of one token each."""
    for token in tokens:
        if len(tokenizer.tokenize(token)) == 1:
            raise ValueError(
                f"placeholder_token: got {tokens[0]!r}, but {token!r} is a token of the model already; "
                "expected a new word such as '<creature>'"
            )
    tokenizer.add_tokens(list(tokens))
