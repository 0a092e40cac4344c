"""The shortcut's cause, measured: what pictures show for CLIP, and how far that is from their subject."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pumice.evaluate.preprocess import check_images, clip_preprocessing
from pumice.evaluate.scores import mean
from pumice.models import RowBudget
from pumice.models.arguments import check_prompt
from pumice.models.freezing import frozen

_SCALE = 100.0  # of cosines, CLIP's own after its training (arXiv:2103.00020)


@dataclass(frozen=True, eq=False)
class Mismatch:
    """What CLIP takes groups of pictures for.

    Attributes:
        rows: one a group, of plain numbers.

            - name, and pictures, how many
            - share: of the pictures that are rather the subject than the other word
            - probability, probability_low, probability_high: mean of the subject's, and its normal 95 %
              interval
            - displacement: of the mean embedding from that of the first group, embeddings having length 1
        probabilities: by name, (N,) float32, of the subject.
        points: by name, (N, 2) float32, embeddings on the plane in which they differ most.
        settings: the words as they were asked for, and the CLIP.
    """

    rows: tuple[dict[str, Any], ...]
    probabilities: dict[str, Tensor]
    points: dict[str, Tensor]
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, for JSON."""
        return {
            "rows": [dict(row) for row in self.rows],
            "probabilities": {name: values.tolist() for name, values in self.probabilities.items()},
            "points": {name: points.tolist() for name, points in self.points.items()},
            "settings": dict(self.settings),
        }

    def table(self) -> list[tuple[str, ...]]:
        """`rows` to be read, under a line of titles."""
        return [
            ("pictures", "count", "share", "probability", "displacement"),
            *(
                (
                    row["name"],
                    str(row["pictures"]),
                    f"{row['share']:.2f}",
                    f"{row['probability']:.3f}",
                    f"{row['displacement']:.3f}",
                )
                for row in self.rows
            ),
        ]


@torch.no_grad()
def mismatch(
    pictures: Mapping[str, Tensor | Sequence[Tensor]],
    clip: Any,
    processor: Any,
    subject: str = "person",
    *,
    other: str = "noise",
    template: str = "a photo of {}",
    batch_size: int = 32,
) -> Mismatch:
    """Measure the latent mismatch: whether CLIP still sees the subject in pictures, or noise.

    ::

        p = softmax(100 [cos(e, text of subject), cos(e, text of other)])      e the embedding of a picture
        displacement = |mean e / |e| - the same of the first group|

    of arXiv:2406.18944, where protection takes what CLIP calls a person from about 70 to 30 % of portraits:
    a model that is then trained on pictures that do not fit their prompt learns noise under a rare word. Set
    clean pictures first, then with noise of the same budget, protected, and purified ones.

    Points are a truncated singular value decomposition of all embeddings together, centred; the sign of an
    axis is the one that makes its largest coordinate positive.

    Args:
        pictures: groups by name, (N, 3, H, W) floating in [0, 1], or a list of (3, H, W) of any size;
            displacement is from the first group.
        clip: a CLIPModel of transformers. The paper's own is not known; ViT-B/32 is assumed.
        processor: its CLIPProcessor; or a tokenizer alone, as of `evaluate.clip_agreement`.
        subject: what pictures should show.
        other: what they should not. Default of the paper.
        template: of both prompts, with {} for the word. Those of the paper are not known.
        batch_size: pictures in one call; halved on out-of-memory.

    Returns:
        A `Mismatch`. Numbers of different CLIPs cannot be compared: name the one.

    Raises:
        TypeError: if groups come without names, a group is no floating tensor, or a word no string.
        ValueError: for no groups, pictures of another shape or range, a template without {}, or two words
            that are the same.
    """
    groups = _checked(pictures, subject, other, template)
    prompts = [template.replace("{}", word) for word in (subject, other)]
    tokenizer = getattr(processor, "tokenizer", processor)
    prepare = clip_preprocessing(clip, getattr(processor, "image_processor", None))
    text = tokenizer(prompts, padding=True, truncation=True, return_tensors="pt").to(clip.device)
    budget = RowBudget(batch_size)

    def embed(images: list[Tensor], rows: int) -> tuple[Tensor, Tensor]:
        """Of pictures (N, D) and of both prompts (2, D), of length 1."""
        parts = []
        prepared = torch.cat([prepare(batch.to(clip.device)) for batch in images])  # now of one size
        for part in prepared.split(rows):
            found = clip(
                input_ids=text.input_ids,
                attention_mask=text.attention_mask,
                pixel_values=part.to(clip.dtype),
            )
            parts.append(F.normalize(found.image_embeds.float(), dim=1).cpu())
        return torch.cat(parts), F.normalize(found.text_embeds.float(), dim=1).cpu()

    embeddings, probabilities = {}, {}
    with frozen([clip]):
        for name, images in groups.items():
            embeddings[name], texts = budget.run(partial(embed, images))
            probabilities[name] = (_SCALE * embeddings[name] @ texts.T).softmax(1)[:, 0]
    first = next(iter(embeddings.values())).mean(0)
    rows = tuple(
        {
            "name": name,
            "pictures": len(found),
            "share": float((found > 0.5).float().mean()),
            **mean("probability", found.double()),
            "displacement": float((embeddings[name].mean(0) - first).norm()),
        }
        for name, found in probabilities.items()
    )
    settings = {
        "subject": prompts[0],
        "other": prompts[1],
        "clip": Path(clip.name_or_path).name or type(clip).__name__,
    }
    return Mismatch(rows, probabilities, _plane(embeddings), settings)


def _plane(embeddings: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Coordinates on the two axes along which all embeddings vary most."""
    every = torch.cat(list(embeddings.values())).double()
    u, s, _ = torch.linalg.svd(every - every.mean(0), full_matrices=False)
    points = F.pad((u * s)[:, :2], (0, max(0, 2 - len(s))))
    largest = points.abs().argmax(0, keepdim=True)
    points = points * torch.where(points.gather(0, largest) < 0, -1.0, 1.0)
    parts = points.float().split([len(found) for found in embeddings.values()])
    return dict(zip(embeddings, parts, strict=True))


def _checked(
    pictures: Mapping[str, Tensor | Sequence[Tensor]], subject: str, other: str, template: str
) -> dict[str, list[Tensor]]:
    """The groups in batches of one size."""
    if not isinstance(pictures, Mapping) or not all(isinstance(name, str) for name in pictures):
        raise TypeError(f"pictures: got a {type(pictures).__name__}, expected groups of pictures by name")
    if not pictures or not all(map(len, pictures.values())):
        raise ValueError(f"pictures: got {len(pictures)} groups, expected at least one, none of them empty")
    groups = {
        name: [images] if isinstance(images, Tensor) else [image[None] for image in images]
        for name, images in pictures.items()
    }
    for name, batches in groups.items():
        for batch in batches:
            check_images(f"pictures[{name!r}]", batch)
    for name, text in {"subject": subject, "other": other, "template": template}.items():
        check_prompt(name, text)
    if "{}" not in template:
        raise ValueError(f"template: got {template!r}, expected one with {{}} for the word")
    if subject == other:
        raise ValueError(f"other: got {other!r}, expected another word than subject")
    return groups
