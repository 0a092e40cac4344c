"""UnlearnDiffAtk: words before a prompt under which the edited model denoises pictures of a concept
(Zhang et al., ECCV 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import hardtanh

from pumice import models
from pumice.evaluate.attacks.attack import (
    Attack,
    Judge,
    batch_of,
    checked_scale,
    checked_seed,
    encoded,
    named,
)
from pumice.evaluate.attacks.free_tokens import FreeTokens, Vocabulary
from pumice.evaluate.attacks.simplex import project
from pumice.evaluate.attacks.token_search import Lesson, Search
from pumice.evaluate.erasure import Classify
from pumice.memorization.arguments import checked_prompts
from pumice.models import Edit
from pumice.models.arguments import checked_count
from pumice.models.draws import Draws


@torch.inference_mode(False)
def unlearn_diff_atk(
    pipe: Any,
    edits: Edit | Mapping[str, Edit],
    images: Any,
    prompts: str | Sequence[str],
    *,
    label: str,
    classify: Classify,
    k: int = 1,
    tokens: int = 3,
    timesteps: int = 50,
    steps: int = 40,
    learning_rate: float = 1e-2,
    weight_decay: float = 0.1,
    draw_every: int = 1,
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    rows: int = 32,
    seed: int = 0,
    progress: bool = False,
) -> Attack:
    """Search for words that, put before prompts of an erased concept, make the edited model draw it again.

    ::

        loss(w) = mean |epsilon - epsilon'(z_t, t, "words prompt")|^2,   words ~ w
        z_t     = alpha_t z + sigma_t epsilon
        w      <- project(Adam step on loss(w))

    (Zhang et al., arXiv:2310.11868; white box.) w has a distribution over the vocabulary for each word; a
    step reads one token of each, and the gradient of that choice, clipped as by hardtanh, is taken for that
    of w. The timesteps are taken up one after the other, some steps each; behind them the likeliest words
    draw a picture, and the first that shows the concept ends the search.

    Success at 0 steps is that of the prompts alone ("ASR-pre"), and at the end that of prompts that need no
    words or for which some were found ("ASR-post").

    Args:
        pipe: a diffusers pipeline, a path, a hub id, or a DiffusionModel; it is not changed.
        edits: by name ("none" is added), or one, named after its method.
        images: of each prompt one, as the model without an edit draws it: (N, 3, H, W) floating, in [0, 1],
            or PIL images or paths.
        prompts: N, of the concept.
        label, classify, k: as of `concept_inversion`.
        tokens: how many are put before the prompt. Default 3, the paper's for styles and objects; for nudity
            it has 5.
        timesteps: how many, drawn at random for each prompt. Default 50, the paper's.
        steps: at each timestep. Default 40, the paper's.
        learning_rate: Adam's. Default 1e-2, the paper's.
        weight_decay: Adam's. Default 0.1, the paper's.
        draw_every: timesteps after which pictures are drawn. Default 1, the paper's; with more the attack is
            cheaper, and has fewer chances.
        num_inference_steps: of the pipeline's own scheduler, to draw. Default 50, the paper's.
        guidance_scale: to draw. Default 7.5, the paper's.
        rows: searches in one batch, and pictures drawn at once; halved on out-of-memory. Each holds 12 bytes
            for each token of the vocabulary and word.
        seed: of words, noises, timesteps and pictures.
        progress: show a bar.

    Returns:
        An `Attack`; its losses are (N, timesteps * steps), its prompts those of the pictures. A tokenizer may
        split these texts into other tokens than those that were found.

    Differences from the paper: w starts as the projection of a normal draw; all prompts and edits of a batch
    are attacked together; BOS, EOS and padding are no words; a gradient that is not finite counts as zero.

    Raises:
        TypeError, ValueError: naming the argument; for an edit that was made for a model with other weights,
            and if what `classify` returns does not fit.
        UnsupportedModelError: if the model's family is not supported, or its tokenizers differ.
    """
    every, prompts = named(edits), checked_prompts(prompts)
    timesteps, steps = checked_count("timesteps", timesteps), checked_count("steps", steps)
    draw_every, rows = checked_count("draw_every", draw_every), checked_count("rows", rows)
    tokens, seed = checked_count("tokens", tokens), checked_seed(seed)
    learning_rate = checked_scale("learning_rate", learning_rate, positive=True)
    weight_decay = checked_scale("weight_decay", weight_decay)
    model = models.load(pipe)
    model.check_text_to_image()
    pictures = batch_of(images, model)
    if len(pictures) != len(prompts):
        raise ValueError(f"images: got {len(pictures)}, expected {len(prompts)}, one a prompt")
    height, width = pictures.shape[2:]
    judge = Judge(model, label, classify, k, num_inference_steps, guidance_scale, height=height, width=width)
    vocabulary = Vocabulary(model)
    draws = Draws([f"{seed}/unlearn_diff_atk/{row}" for row in range(len(prompts))], model.device)
    with model.frozen():
        z = encoded(model, pictures, rows)

    def lesson(step: int, some: Sequence[int]) -> Lesson:
        when = step // steps
        t = draws.integers(some, "timestep", when, model.schedule.num_train_timesteps)
        noise = draws.normal(some, "noise", when, z.shape[1:])
        return Lesson(model.add_noise(z[list(some)], noise, t), t, noise)

    return Search(
        model=model,
        judge=judge,
        prompts=prompts,
        free=FreeTokens(model, [f"{{}} {prompt}" for prompt in prompts], tokens, "tokens"),
        vocabulary=vocabulary,
        lesson=lesson,
        start=lambda of: _Distributions(vocabulary, draws, of, tokens, learning_rate, weight_decay),
        steps=timesteps * steps,
        draw_every=draw_every * steps,
        seed=seed,
    ).run(
        every,
        rows,
        progress=progress,
        attack="unlearn_diff_atk",
        label=label,
        settings={
            "model": repr(model),
            "scheduler": type(model.pipe.scheduler).__name__,
            "k": judge.k,
            "tokens": tokens,
            "timesteps": timesteps,
            "steps": steps,
            "learning_rate": learning_rate,
            "weight_decay": weight_decay,
            "draw_every": draw_every,
            **judge.settings,
            "seed": seed,
        },
    )


class _Distributions:
    """Of each run and word one over the vocabulary, (runs, tokens, V), and Adam on them."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        draws: Draws,
        of: Sequence[int],
        tokens: int,
        learning_rate: float,
        weight_decay: float,
    ) -> None:
        self._table, self._draws, self._of = vocabulary.table, draws, of
        self.weights = project(draws.normal(of, "words", 0, (tokens, len(vocabulary))))
        self._optimizer = torch.optim.Adam([self.weights], lr=learning_rate, weight_decay=weight_decay)

    def read(self, step: int) -> Tensor:
        """One token of each distribution, by the inverse of its sums."""
        sums = self.weights.cumsum(-1)
        level = self._draws.uniform(self._of, "token", step, self.weights.shape[1:2])[..., None]
        places = torch.searchsorted(sums, level * sums[..., -1:], right=True)
        return places.clamp(max=sums.shape[-1] - 1).squeeze(-1)  # where the product was rounded up

    def update(self, gradient: Tensor) -> None:
        self.weights.grad = hardtanh(gradient @ self._table.T)
        self._optimizer.step()
        self.weights.copy_(project(self.weights))

    def found(self) -> Tensor:
        return self.weights.argmax(-1)
