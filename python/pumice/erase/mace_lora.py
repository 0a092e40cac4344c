"""MACE: refinement, a LoRA for each concept, fusion (Lu et al., CVPR 2024); here the LoRAs, and all of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor

from pumice import models
from pumice.erase.arguments import check_scale, checked_guides, checked_texts
from pumice.erase.attention_loss import Subjects, root
from pumice.erase.known import check_known
from pumice.erase.mace import Preset, mace_fuse, mace_refine
from pumice.erase.trainer import Options, Trainer
from pumice.models import Added, DiffusionModel, Edit
from pumice.models.arguments import first_seed
from pumice.training.student import Part


class _Preset(NamedTuple):
    learning_rate: float
    steps: int
    importance: bool


_PRESETS: dict[Preset, _Preset] = {
    "object": _Preset(1e-5, 50, True),
    "nudity": _Preset(1e-5, 120, False),
    "celebrity": _Preset(1e-4, 50, True),
    "artist": _Preset(1e-4, 50, True),
}


@torch.inference_mode(False)
def mace_lora(
    pipe: Any,
    concepts: str | Sequence[str],
    images: Any = None,
    masks: Any = None,
    *,
    prompt: str = "a photo of {}",
    preset: Preset | None = None,
    importance: bool | None = None,
    num_images: int = 8,
    steps: int | None = None,
    learning_rate: float | None = None,
    weight_decay: float = 0.01,
    **options: Unpack[Options],
) -> Edit:
    """Train a LoRA of keys and values under which pictures of a concept do not look at the words for it.

    ::

        sum over layers l  |A_l[positions inside, S]|_F       A_l = softmax(q k^T / sqrt(d)), all heads
        p(t) ~ sigmoid(0.05 (t - 200)) - sigmoid(0.05 (t - 400))       of 1000 timesteps, with `importance`

    of noised pictures of the concept, inside the mask that tells where they show it; S are its tokens in the
    prompt, and EOS (Lu et al., arXiv:2403.06135, stage 2). `mace` does all three stages.

    Args:
        pipe: a diffusers pipeline, a path, a hub id, or a DiffusionModel; it is not changed. In the paper it
            is refined by `mace_refine` already.
        concepts: as the model's captions word them. In the paper each has a LoRA of its own; several take
            turns at random.
        images: of the concept, (N, 3, H, W) in [0, 1], PIL images or paths, or a list of such, one for each
            of several. By default the model draws `num_images` of each.
        masks: (N, H, W), above 0.5 where a picture shows the concept, or PIL images or paths, which are cut
            as pictures are, or a list of such; brought to the grid of each layer by the nearest value. By
            default everywhere. The paper has them from Grounded-SAM.
        prompt: a template with one "{}" for the concept.
        preset: the paper's `learning_rate`, `steps` and `importance` by task, each of which the argument of
            its name overrides. "object" 1e-5, 50, True; "nudity" 1e-5, 120, False; "celebrity" and "artist"
            1e-4, 50, True. Default "object".
        importance: whether timesteps are drawn from p(t), else uniformly. By default the preset's.
        num_images: how many are drawn. Default 8, of the paper.
        steps: by default the preset's.
        learning_rate: AdamW's. By default the preset's.
        weight_decay: AdamW's. Default 0.01, that of torch: an assumption.
        options: `pumice.erase.trainer.Options`; `rank` is 1 by default, as in the paper. A checkpoint has the
            pictures that the model drew, too.

    Returns:
        An `Edit`: low-rank matrices that are added.

    Differences from the released code: with a `batch_size` each picture has norms of its own, and the loss is
    their mean; maps of attention are not kept (`pumice.ops.attention_columns`).

    Raises:
        TypeError, ValueError: naming the argument; for masks that do not fit the pictures, for a concept that
            the model does not know, and if a loss or gradient is not finite, whereupon the last checkpoint
            stands.
        UnsupportedModelError: for quantised, offloaded or LoRA-wrapped weights.
    """
    if preset is not None and preset not in _PRESETS:
        raise ValueError(f"preset: got {preset!r}, expected one of {', '.join(_PRESETS)}")
    task = _PRESETS[preset or "object"]
    importance = task.importance if importance is None else importance
    if not isinstance(importance, bool):
        raise TypeError(f"importance: got {importance!r}, expected a bool")
    check_scale("weight_decay", weight_decay)
    if options.setdefault("rank", 1) is None:
        raise ValueError("rank: got None, expected one, of the LoRA")
    concepts = checked_texts("concepts", concepts)
    model = models.load(pipe)
    model.check_editable()  # that q and k are there to be read
    subjects = Subjects(model, concepts, images, masks, prompt=prompt, with_eos=True, num_images=num_images)
    trainer = Trainer(
        model,
        concepts,
        "xattn-kv",
        method="mace_lora",
        settings={**subjects.settings, "importance": importance, "weight_decay": float(weight_decay)},
        steps=task.steps if steps is None else steps,
        learning_rate=task.learning_rate if learning_rate is None else learning_rate,
        **options,
    )
    subjects.draw(first_seed(options.get("seed", 0)), options)
    until = important(model.schedule.num_train_timesteps, importance).cumsum(0)

    def loss(step: int, rows: Sequence[int]) -> Tensor:
        u = trainer.draws.uniform(rows, "timestep", step).cpu().double()
        t = torch.searchsorted(until, u, right=True).clamp(max=len(until) - 1).to(model.device)
        return root(subjects.energies(trainer, step, rows, t)).sum() / trainer.count

    return trainer.train(loss, weight_decay=weight_decay)


def important(count: int, importance: bool) -> Tensor:
    """(count,) float64, the probability of each of so many timesteps."""
    t = torch.arange(count, dtype=torch.float64) * (1000 / count)
    weights = (
        (0.05 * (t - 200)).sigmoid() - (0.05 * (t - 400)).sigmoid() if importance else torch.ones_like(t)
    )
    return weights / weights.sum()


@torch.inference_mode(False)
def mace(
    pipe: Any,
    concepts: str | Sequence[str],
    mapping: str | Sequence[str],
    images: Any = None,
    masks: Any = None,
    *,
    prompt: str = "a photo of {}",
    prompts: Sequence[str] | None = None,
    preset: Preset | None = None,
    lamb: float | None = None,
    preserve: str | Sequence[str] = (),
    domain: str | Sequence[str] = (),
    preserve_scale: float | None = None,
    domain_scale: float | None = None,
    importance: bool | None = None,
    num_images: int = 8,
    steps: int | None = None,
    learning_rate: float | None = None,
    **options: Unpack[Options],
) -> Edit:
    """Erase concepts, many at once: refine, train a LoRA for each on what is refined, fuse all of them.

    `mace_refine` takes a concept out of what the words around it tell, `mace_lora` takes the attention of its
    pictures away from its own words, and `mace_fuse` lets each LoRA act on prompts of its concept alone (Lu
    et al., arXiv:2403.06135).

    Args:
        pipe: a diffusers pipeline, a path, a hub id, or a DiffusionModel; it is not changed.
        concepts: as the model's captions word them.
        mapping: as `mace_refine`.
        images: as `mace_lora`. By default the model, as it is, draws `num_images` of each.
        masks: as `mace_lora`. By default the whole picture counts as the concept, which is not what the paper
            does: its masks are Grounded-SAM's.
        prompt: that pictures are learned under, a template with one "{}".
        prompts, lamb, preserve, domain, preserve_scale, domain_scale: as `mace_refine` and `mace_fuse`.
        preset: of all three stages. Default "object".
        importance, num_images, steps, learning_rate: as `mace_lora`.
        options: `pumice.erase.trainer.Options`, of each LoRA; their checkpoints and samples are in folders
            0, 1, ... of those given.

    Returns:
        An `Edit`: a low-rank matrix is added to each key and value projection.

    Differences from the released code: as the three stages.

    Raises:
        TypeError, ValueError, UnsupportedModelError: as the three stages.
    """
    concepts = checked_texts("concepts", concepts)
    mapping = checked_guides(mapping, concepts, "mapping")
    model = models.load(pipe)
    subjects = Subjects(model, concepts, images, masks, prompt=prompt, with_eos=True, num_images=num_images)
    if not options.get("allow_unknown", False):
        check_known(model, concepts)  # here, as the refined model may not
    closed: dict[str, Any] = {
        "prompts": prompts,
        "preset": preset,
        "lamb": lamb,
        "preserve": preserve,
        "domain": domain,
        "preserve_scale": preserve_scale,
        "domain_scale": domain_scale,
    }
    refined = mace_refine(model, concepts, mapping, **closed)
    subjects.draw(first_seed(options.get("seed", 0)), options)
    trained = _with(model, refined)
    loras, learned = {}, []
    for number, concept in enumerate(concepts):
        own: dict[str, Any] = {**options, **_folders(options, number), "allow_unknown": True}
        found = mace_lora(
            trained,
            concept,
            subjects.pictures[concept],
            subjects.masks.get(concept),
            prompt=prompt,
            preset=preset,
            importance=importance,
            steps=steps,
            learning_rate=learning_rate,
            **own,
        )
        learned.append(found)
        loras[concept] = {
            name.removesuffix(".weight"): (change.up, change.down)
            for name, change in found.changes.items()
            if isinstance(change, Added)
        }
    fused = mace_fuse(model, loras, refined=refined, **closed)
    of_loras = {name: value for name, value in learned[0].settings.items() if name not in ("images", "masks")}
    return replace(
        fused,
        method="mace",
        settings={**of_loras, **fused.settings, **subjects.settings, "mapping": list(mapping)},
        details={
            **fused.details,
            "losses": {
                concept: edit.details["losses"] for concept, edit in zip(concepts, learned, strict=True)
            },
            "seconds": sum(edit.details["seconds"] for edit in learned),
        },
    )


def _with(model: DiffusionModel, refined: Edit) -> DiffusionModel:
    """A copy of the model that is refined; all weights but those are the model's own."""
    found = Part(model, list(refined.changes)).model
    refined.apply(found)
    return found


def _folders(options: Options, number: int) -> dict[str, Path]:
    """Those of one of several trainings."""
    given = {"checkpoint": options.get("checkpoint"), "samples": options.get("samples")}
    return {name: Path(folder) / str(number) for name, folder in given.items() if folder is not None}
