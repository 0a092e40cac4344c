"""Facilitated transport: each of several edits is as strong as the prompt is near to its concept."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from pumice import models
from pumice.erase.arguments import checked_texts
from pumice.models import Edit, PromptEmbeds, hook_edits


@torch.no_grad()
def permeability(pipe: Any, prompts: str | Sequence[str], concepts: str | Sequence[str]) -> Tensor:
    """How near prompts are to concepts.

    ::

        gamma = max(cos(E(p), E(c)), |tokens of p and c| / |tokens of c|)

    E is the text embedding of all positions in one vector (SPM's code, Lyu et al., arXiv:2312.16145). What
    all texts share counts, too: padding makes short texts near to each other, as an article does.

    Args:
        pipe: a diffusers pipeline, a path, a hub id, or a DiffusionModel.
        prompts, concepts: texts.

    Returns:
        (prompts, concepts) float32 in [0, 1], on the CPU.

    Raises:
        TypeError, ValueError: for what are no texts.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    concepts = checked_texts("concepts", concepts)
    model = models.load(pipe)
    said, erased = model.encode_prompt(prompts), model.encode_prompt(list(concepts))
    near = _directions(said) @ _directions(erased).T
    shared = [[len(p & c) / max(1, len(c)) for c in _tokens(erased)] for p in _tokens(said)]
    return near.maximum(torch.tensor(shared)).clamp(max=1)


def transport(pipe: Any, edits: Sequence[Edit], prompts: str | Sequence[str]) -> AbstractContextManager[None]:
    """Inside the block, a prompt is drawn under edits, each as strong as the prompt is near to its targets.

    ::

        W + gamma_1 D_1 + gamma_2 D_2 + ...

    by `permeability`, of several targets the nearest (Lyu et al., arXiv:2312.16145). Weights stay as they
    are.

    Args:
        pipe: a loaded pipeline, or a DiffusionModel.
        edits: of `spm`, or others that only add to weights of the denoiser.
        prompts: what is drawn; of several, sample i of every batch is drawn as `prompts[i % len(prompts)]`
            is to be.

    Differences from the released code: gamma is a factor of what is added, not its square, and what several
    edits add is summed, with no products of one edit's factors with another's.

    Raises:
        TypeError, ValueError: for no edits or prompts, edits that map or zero weights or are for other
            models, and inside the block for a batch that is no multiple of the prompts.
        UnsupportedModelError: as for `Edit.apply`.
    """
    edits = list(edits)
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not edits or not prompts:
        raise ValueError(f"edits, prompts: got {len(edits)} and {len(prompts)}, expected at least one each")
    odd = next((edit for edit in edits if not isinstance(edit, Edit)), None)
    if odd is not None:
        raise TypeError(f"edits: got a {type(odd).__name__}, expected edits")
    gammas = [permeability(pipe, prompts, edit.targets).amax(1).tolist() for edit in edits]
    of_prompts = [
        [edit.scaled(gamma) for edit, gamma in zip(edits, row, strict=True)]
        for row in zip(*gammas, strict=True)
    ]
    return hook_edits(pipe, [row[0] if len(row) == 1 else Edit.compose(row) for row in of_prompts])


def _directions(texts: PromptEmbeds) -> Tensor:
    return normalize(texts.embeds.flatten(1).float(), dim=1).cpu()


def _tokens(texts: PromptEmbeds) -> list[set[int]]:
    return [set(tokens.ids[tokens.content.start : tokens.content.stop]) for tokens in texts.tokens]
