"""A word that is learned for a concept from its pictures, all weights frozen (Gal et al., ICLR 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from pumice.models import DiffusionModel, PromptEmbeds, fingerprint
from pumice.models.arguments import check_prompt, check_scale, checked_count
from pumice.models.draws import Draws
from pumice.models.free_words import initial_vectors, places, reading, stand_ins
from pumice.models.prompts import tokenize
from pumice.training.checkpoint import Checkpoint
from pumice.training.examples import Examples, Row, denoising_loss
from pumice.training.pictures import digest, learnable
from pumice.training.steps import train
from pumice.training.student import Learner


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
        self.vectors = [nn.Parameter(start) for start in initial_vectors(model, initial, tokens)]

    def encode(self, model: DiffusionModel, templates: Sequence[str]) -> PromptEmbeds:
        """Templates with the word in the place of {}, as `model` reads them; gradients flow to both.

        model: the one that the word was made for, or a student of it.

        Raises:
            ValueError: for a template in which {} is no word of its own, or does not fit.
        """
        prompts = [template.replace("{}", stand_ins(self._tokens)) for template in templates]
        at = [self._places(tokenizer, templates, prompts) for tokenizer in model.tokenizers]
        with reading(model, at, self.vectors):
            return model.encode_prompt(prompts)

    def _places(self, tokenizer: Any, templates: Sequence[str], prompts: Sequence[str]) -> list[list[int]]:
        """Where the word stands in each prompt."""
        found = []
        for template, tokens in zip(templates, tokenize(tokenizer, prompts), strict=True):
            own = places(tokens)
            if template.count("{}") != 1 or len(own) != self._tokens:
                raise ValueError(
                    f"templates: got {template!r}, expected one {{}} that is a word of its own and fits"
                )
            found.append(own)
        return found


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
    checkpoint: str | PathLike[str] | None = None,
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
        checkpoint: a folder to write the state to, and to go on from.
        progress: show a bar.

    Returns:
        The `Word`.

    Differences from the paper: 5000 steps there; templates are the caller's.

    Raises:
        TypeError, ValueError: naming the argument, if the checkpoint is of another training, and if a
            loss or gradient is not finite.
    """
    steps, batch_size = checked_count("steps", steps), checked_count("batch_size", batch_size)
    rows = checked_count("rows", rows)
    check_scale("learning_rate", learning_rate, positive=True)
    if not templates:
        raise ValueError("templates: got none, expected at least one")
    word = Word(model, initial, tokens=tokens)
    pictures = learnable(images, model)
    settings = {
        "method": "word",
        "images": digest(pictures),
        "initial": initial,
        "templates": list(templates),
        "tokens": tokens,
        "steps": steps,
        "learning_rate": float(learning_rate),
        "batch_size": batch_size,
        "seed": seed,
    }
    kept = None
    if checkpoint is not None:
        kept = Checkpoint(checkpoint, {"model": fingerprint(model), **settings})
    examples = Examples(model, pictures, initial)
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
            checkpoint=kept,
            progress=progress,
        )
    for vectors in word.vectors:
        vectors.requires_grad_(False)
    return word
