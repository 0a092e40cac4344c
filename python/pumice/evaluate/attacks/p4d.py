"""P4D: a prompt under which the edited model predicts what the original does under one of the concept
(Chin et al., ICML 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pumice import models
from pumice.evaluate.attacks.attack import Attack, Judge, checked_scale, checked_seed, encoded, named
from pumice.evaluate.attacks.free_tokens import FreeTokens, Vocabulary
from pumice.evaluate.attacks.token_search import Lesson, Search
from pumice.evaluate.erasure import Classify
from pumice.memorization.arguments import checked_prompts
from pumice.models import Edit
from pumice.models.arguments import checked_count
from pumice.models.draws import Draws


@torch.inference_mode(False)
def p4d(
    pipe: Any,
    edits: Edit | Mapping[str, Edit],
    prompts: str | Sequence[str],
    *,
    label: str,
    classify: Classify,
    k: int = 1,
    tokens: int = 16,
    steps: int = 3000,
    learning_rate: float = 0.1,
    weight_decay: float = 0.1,
    draw_every: int = 50,
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    rows: int = 32,
    seed: int = 0,
    progress: bool = False,
) -> Attack:
    """Search for prompts under which the edited model predicts what it did before under those of a concept.

    ::

        loss(v) = mean |epsilon'(z_t, t, nearest(v)) - epsilon(z_t, t, prompt)|^2
        z_t     = alpha_t z + sigma_t noise
        v      <- AdamW step on loss(v), its gradient that at nearest(v)

    (Chin et al., arXiv:2309.06135; white box.) epsilon is the model without an edit, z what it draws of the
    prompt, and nearest(v) the tokens whose embeddings have the largest cosine with those of v (Wen et al.,
    arXiv:2302.03668). The found tokens are the whole prompt; the first picture of them that shows the concept
    ends the search.

    Success at 0 steps is that of the prompts themselves, and at the end that of those that draw the concept
    or for which tokens were found that do.

    Args:
        pipe: a diffusers pipeline, a path, a hub id, or a DiffusionModel; it is not changed.
        edits: by name ("none" is added), or one, named after its method.
        prompts: N, of the concept.
        label, classify, k: as of `concept_inversion`.
        tokens: of a found prompt. Default 16, the paper's.
        steps: of AdamW, each at another timestep and noise. Default 3000, that of Wen et al.
        learning_rate, weight_decay: AdamW's. Default 0.1 each, those of Wen et al.
        draw_every: steps after which pictures are drawn. Default 50.
        num_inference_steps: of the pipeline's own scheduler, to draw. Default 50.
        guidance_scale: to draw. Default 7.5.
        rows: searches in one batch, and pictures drawn at once; halved on out-of-memory.
        seed: of the first tokens, noises, timesteps and pictures.
        progress: show a bar.

    Returns:
        An `Attack`; its losses are (N, steps). A tokenizer may split its prompts into other tokens than those
        that were found.

    Differences from the paper: all prompts and edits of a batch are attacked together; the search starts at
    tokens drawn at random; BOS, EOS and padding are no words; a gradient that is not finite counts as zero.

    Raises:
        TypeError, ValueError: naming the argument; for an edit that was made for a model with other weights,
            and if what `classify` returns does not fit.
        UnsupportedModelError: if the model's family is not supported, or its tokenizers differ.
    """
    every, prompts = named(edits), checked_prompts(prompts)
    steps, draw_every = checked_count("steps", steps), checked_count("draw_every", draw_every)
    tokens, rows, seed = checked_count("tokens", tokens), checked_count("rows", rows), checked_seed(seed)
    learning_rate = checked_scale("learning_rate", learning_rate, positive=True)
    weight_decay = checked_scale("weight_decay", weight_decay)
    model = models.load(pipe)
    model.check_text_to_image()
    judge = Judge(model, label, classify, k, num_inference_steps, guidance_scale)
    vocabulary = Vocabulary(model)
    draws = Draws([f"{seed}/p4d/{row}" for row in range(len(prompts))], model.device)
    free = FreeTokens(model, ["{}"] * len(prompts), tokens, "tokens")
    with model.frozen(), torch.no_grad():
        text = model.encode_prompt(prompts)
        shown = judge.draw_all(prompts, range(seed, seed + len(prompts)), rows)
        z = encoded(model, shown / 255, rows)

    @torch.no_grad()
    def lesson(step: int, some: Sequence[int]) -> Lesson:
        t = draws.integers(some, "timestep", step, model.schedule.num_train_timesteps)
        latents = model.add_noise(z[list(some)], draws.normal(some, "noise", step, z.shape[1:]), t)
        return Lesson(latents, t, model.predict_noise(latents, t, text[some]))

    return Search(
        model=model,
        judge=judge,
        prompts=prompts,
        free=free,
        vocabulary=vocabulary,
        lesson=lesson,
        start=lambda of: _Nearest(vocabulary, draws, of, tokens, learning_rate, weight_decay),
        steps=steps,
        draw_every=draw_every,
        seed=seed,
    ).run(
        every,
        rows,
        progress=progress,
        attack="p4d",
        label=label,
        settings={
            "model": repr(model),
            "scheduler": type(model.pipe.scheduler).__name__,
            "k": judge.k,
            "tokens": tokens,
            "steps": steps,
            "learning_rate": learning_rate,
            "weight_decay": weight_decay,
            "draw_every": draw_every,
            **judge.settings,
            "seed": seed,
        },
    )


class _Nearest:
    """Embeddings (runs, tokens, d) that move freely and are read as the tokens next to them."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        draws: Draws,
        of: Sequence[int],
        tokens: int,
        learning_rate: float,
        weight_decay: float,
    ) -> None:
        self._vocabulary = vocabulary
        first = (draws.uniform(of, "tokens", 0, (tokens,)) * len(vocabulary)).long()
        self.vectors = vocabulary.table[first]
        self._optimizer = torch.optim.AdamW([self.vectors], lr=learning_rate, weight_decay=weight_decay)

    def read(self, step: int) -> Tensor:
        return self.found()

    def update(self, gradient: Tensor) -> None:
        self.vectors.grad = gradient
        self._optimizer.step()

    def found(self) -> Tensor:
        return self._vocabulary.nearest(self.vectors)
