"""What pictures show, as networks of transformers tell it: classifiers, and CLIP without any training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pumice.evaluate.erasure import Classify
from pumice.evaluate.preprocess import check_images, clip_preprocessing, preprocessing
from pumice.models import RowBudget
from pumice.models.freezing import frozen


def image_classifier(model: Any, processor: Any, *, batch_size: int = 32) -> Classify:
    """Get a function that ranks all labels of a classifier for each picture, such as `erasure` takes.

    Labels are those of `model.config.id2label` as they stand there, "church, church building" in one string;
    those that pictures are counted by have to be the same, but for their case.

    Args:
        model: a *ForImageClassification of transformers, trained to tell one label a picture.
        processor: its image processor, which says how pictures are prepared.
        batch_size: pictures in one call; halved on out-of-memory.

    Returns:
        `classify(images)`: pictures (B, 3, H, W) in [0, 1] to the labels of each, likeliest first.
    """
    prepare, names = preprocessing(processor), model.config.id2label

    def logits(images: Tensor) -> Tensor:
        return model(pixel_values=prepare(images.to(model.device)).to(model.dtype)).logits

    return _ranking(model, logits, [names[place] for place in range(len(names))], batch_size)


def clip_classifier(
    model: Any,
    processor: Any,
    labels: Sequence[str],
    *,
    template: str = "a photo of a {}",
    batch_size: int = 32,
) -> Classify:
    """Get a function that ranks any labels for each picture by CLIP, such as `erasure` takes.

    ::

        score[i, l] = cosine of (image embedding of picture i, text embedding of label l in the template)

    (Radford et al., arXiv:2103.00020, zero-shot.) A picture is called by the nearest of these labels,
    whatever it shows: give those of what might be there instead of a concept, too.

    Args:
        model: a CLIPModel of transformers.
        processor: its CLIPProcessor; or a tokenizer alone, for a CLIP that takes pictures squeezed to its own
            size in [-1, 1], such as the testbed's.
        labels: at least two, each once.
        template: with one "{}" for the label. Default the paper's, "a photo of a {}".
        batch_size: pictures in one call; halved on out-of-memory.

    Returns:
        `classify(images)`: pictures (B, 3, H, W) in [0, 1] to the labels of each, likeliest first.

    Raises:
        TypeError: if labels are no list of strings.
        ValueError: for fewer than two labels, one twice or blank, or a template without its one "{}".
    """
    labels = list(labels) if not isinstance(labels, str) else [labels]
    if not all(isinstance(label, str) for label in labels):
        raise TypeError("labels: expected a list of strings")
    if len(labels) < 2 or len({label.casefold() for label in labels}) < len(labels):
        known = ", ".join(map(repr, labels)) or "none"
        raise ValueError(f"labels: got {known}, expected two or more, each once")
    if not all(label.strip() for label in labels):
        raise ValueError("labels: got a blank one, expected words")
    if template.count("{}") != 1:
        raise ValueError(f"template: got {template!r}, expected one {{}} for the label")
    tokenizer = getattr(processor, "tokenizer", processor)
    prepare = clip_preprocessing(model, getattr(processor, "image_processor", None))
    text = tokenizer(
        [template.replace("{}", label) for label in labels],
        padding=True,
        truncation=True,
        return_tensors="pt",
    ).to(model.device)

    def scores(images: Tensor) -> Tensor:
        found = model(**text, pixel_values=prepare(images.to(model.device)).to(model.dtype))
        return F.normalize(found.image_embeds.float()) @ F.normalize(found.text_embeds.float()).T

    return _ranking(model, scores, labels, batch_size)


def _ranking(
    model: Any, score: Callable[[Tensor], Tensor], names: Sequence[str], batch_size: int
) -> Classify:
    budget = RowBudget(batch_size)

    @torch.no_grad()
    def classify(images: Tensor) -> list[list[str]]:
        check_images("images", images)

        def run(rows: int) -> Tensor:
            return torch.cat([score(part).float().cpu() for part in images.split(rows)])

        with frozen([model]):
            order = budget.run(run).argsort(dim=1, descending=True, stable=True)
        return [[names[place] for place in places] for places in order.tolist()]

    return classify
