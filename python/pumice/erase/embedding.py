"""A word that is learned for a concept from its pictures, all weights frozen (Gal et al., ICLR 2023)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pumice.models import DiffusionModel, PromptEmbeds
from pumice.models.arguments import check_prompt, check_scale, checked_count
from pumice.models.draws import Draws
from pumice.models.prompts import tokenize
from pumice.training.examples import Examples, Row, denoising_loss
from pumice.training.pictures import learnable
from pumice.training.steps import train
from pumice.training.student import Learner

STAND_IN = "*"  # one token in every vocabulary of CLIP's kind


class Word:
    """A word whose token embeddings are its own, whatever the vocabulary of the model.

    Args:
        model: whose text encoders read it.
        initial: what it starts as: a text of as many tokens, or else their mean in every place.
        tokens: how many it has.

    Attributes:
        vectors: (tokens, d) float32, one a text encoder, at the input of each.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    def __init__(self, model: DiffusionModel, initial: str, *, tokens: int = 1) -> None:
        check_prompt("initial", initial)
        self._tokens = checked_count("tokens", tokens)
        self.vectors: list[nn.Parameter] = []
        for tokenizer, encoder in zip(model.tokenizers, model.text_encoders, strict=True):
            pieces = tokenizer(initial, add_special_tokens=False).input_ids
            if not pieces:
                raise ValueError(f"initial: got {initial!r}, expected a word")
            table = encoder.get_input_embeddings().weight.detach()
            known = table[torch.tensor(pieces, device=table.device)].float()
            start = known.clone() if len(known) == tokens else known.mean(0).repeat(tokens, 1)
            self.vectors.append(nn.Parameter(start))

    def encode(self, model: DiffusionModel, templates: Sequence[str]) -> PromptEmbeds:
        """Templates with the word in the place of {}, as `model` reads them; gradients flow to both.

        model: the one that the word was made for, or a student of it.

        Raises:
            ValueError: for a template in which {} is no word of its own, or does not fit.
        """
        prompts = [template.replace("{}", " ".join([STAND_IN] * self._tokens)) for template in templates]
        with self._put(model, templates, prompts):
            return model.encode_prompt(prompts)

    @contextmanager
    def _put(self, model: DiffusionModel, templates: Sequence[str], prompts: Sequence[str]) -> Iterator[None]:
        with ExitStack() as stack:
            parts = zip(model.tokenizers, model.text_encoders, self.vectors, strict=True)
            for tokenizer, encoder, vectors in parts:
                places = self._places(tokenizer, templates, prompts)
                layer = encoder.get_input_embeddings()
                stack.callback(layer.register_forward_hook(partial(_replace, places, vectors)).remove)
            yield

    def _places(self, tokenizer: Any, templates: Sequence[str], prompts: Sequence[str]) -> list[list[int]]:
        """Where the word stands in each prompt."""
        found = []
        for template, tokens in zip(templates, tokenize(tokenizer, prompts), strict=True):
            words = [word for word in tokens.words if word.text == STAND_IN]
            places = [place for word in words for place in word.positions]
            if template.count("{}") != 1 or len(places) != self._tokens:
                raise ValueError(
                    f"templates: got {template!r}, expected one {{}} that is a word of its own and fits"
                )
            found.append(places)
        return found


def _replace(
    places: Sequence[Sequence[int]],
    vectors: Tensor,
    module: nn.Module,
    args: tuple[Tensor, ...],
    output: Tensor,
) -> Tensor:
    at = torch.tensor(places, device=output.device)  # (B, tokens)
    rows = torch.arange(len(at), device=output.device)[:, None]
    return output.index_put((rows, at), vectors.to(output).expand(len(at), -1, -1))


@torch.inference_mode(False)
def learn_word(
    model: DiffusionModel,
    images: Any,
    *,
    initial: str,
    templates: Sequence[str] = ("{}",),
    tokens: int = 1,
    steps: int = 500,
    learning_rate: float = 5e-3,
    batch_size: int = 4,
    rows: int = 64,
    seed: int = 0,
    progress: bool = False,
) -> Word:
    """Learn what a model would call some pictures.

    ::

        v* = argmin_v  E |network(z_t, t, c(template, v)) - target|^2

    a mean over elements and the batch, by AdamW on v, the embeddings of the word's tokens in each text
    encoder (textual inversion, arXiv:2208.01618). z is a sample of the posterior of one of the pictures, t
    uniform over all timesteps.

    Args:
        model: all of whose weights stay.
        images: of what it is to name: (N, 3, H, W) in [0, 1], PIL images or paths.
        initial: what v starts as: a text of as many tokens, or else their mean in every place.
        templates: with {} where the word stands, one at random for each picture and step.
        tokens: of the word. Default 1, of the paper.
        steps: default 500.
        learning_rate: default 5e-3, of the paper.
        batch_size: pictures in a step. Default 4, of the paper.
        rows: of a pass; halved on out-of-memory.
        seed: of all random numbers.
        progress: show a bar.

    Returns:
        The `Word`.

    Differences from the paper: 5000 steps there; templates are the caller's.

    Raises:
        TypeError, ValueError: naming the argument, and if a loss or gradient is not finite.
    """
    steps, batch_size = checked_count("steps", steps), checked_count("batch_size", batch_size)
    rows = checked_count("rows", rows)
    check_scale("learning_rate", learning_rate, positive=True)
    if not templates:
        raise ValueError("templates: got none, expected at least one")
    word = Word(model, initial, tokens=tokens)
    examples = Examples(model, learnable(images, model), initial)
    draws = Draws([f"{seed}/word/{row}" for row in range(batch_size)], model.device)
    learner = Learner(
        model,
        {f"{number}.word": vectors for number, vectors in enumerate(word.vectors)},
        trains_text=True,
        wide=False,
    )

    def loss(step: int, numbers: Sequence[int]) -> Tensor:
        which = draws.integers(numbers, "picture", step, len(examples)).tolist()
        under = draws.integers(numbers, "template", step, len(templates)).tolist()
        found = [
            Row(number, examples.latents(item, draws, number, step), templates[template], 1 / batch_size)
            for number, item, template in zip(numbers, which, under, strict=True)
        ]
        embeds = word.encode(model, [row.prompt for row in found])
        return denoising_loss(model, found, embeds, draws, step)

    with model.frozen(data_gradient=True):
        train(
            learner,
            loss,
            steps,
            learning_rate=learning_rate,
            count=batch_size,
            batch=rows,
            progress=progress,
        )
    for vectors in word.vectors:
        vectors.requires_grad_(False)
    return word
