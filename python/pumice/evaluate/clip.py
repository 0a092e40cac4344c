"""How well pictures agree with their prompts: CLIP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pumice.evaluate.preprocess import check_images, clip_preprocessing
from pumice.models import RowBudget
from pumice.models.freezing import frozen


def clip_agreement(
    model: Any, processor: Any, *, batch_size: int = 32
) -> Callable[[Tensor, Sequence[str]], Tensor]:
    """Get a function of pictures and prompts that tells how well each picture agrees with its prompt.

    ::

        agreement[i] = cosine of (image embedding of picture i, text embedding of prompt i)

    (Radford et al., arXiv:2103.00020.) Judge a mitigation against the *original* prompts: against a perturbed
    one, a picture of something else agrees. Numbers of different CLIPs cannot be compared: name the one.

    Args:
        model: a CLIPModel of transformers.
        processor: its CLIPProcessor, which says how pictures are prepared; or a tokenizer alone, for a CLIP
            that takes pictures squeezed to its own size in [-1, 1], such as the testbed's.
        batch_size: pictures in one call; halved on out-of-memory.

    Returns:
        `agreement(images, prompts)`: pictures (N, 3, H, W) in [0, 1] and N prompts to (N,) float32 on the
        CPU. Prompts longer than the text encoder takes are cut.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    prepare = clip_preprocessing(model, getattr(processor, "image_processor", None))
    budget = RowBudget(batch_size)

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        text = tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt")
        found = model(
            input_ids=text.input_ids.to(model.device),
            attention_mask=text.attention_mask.to(model.device),
            pixel_values=prepare(images.to(model.device)).to(model.dtype),
        )
        return F.cosine_similarity(found.image_embeds.float(), found.text_embeds.float()).cpu()

    @torch.no_grad()
    def agreement(images: Tensor, prompts: Sequence[str]) -> Tensor:
        check_images("images", images)
        if isinstance(prompts, str) or len(prompts) != len(images):
            count = 1 if isinstance(prompts, str) else len(prompts)
            raise ValueError(f"prompts: got {count}, expected a list of {len(images)}, one for each picture")

        def run(rows: int) -> Tensor:
            starts = range(0, len(images), rows)
            return torch.cat([score(images[i : i + rows], prompts[i : i + rows]) for i in starts])

        with frozen([model]):
            return budget.run(run)

    return agreement
