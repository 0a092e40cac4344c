"""Concept Ablation: what the model draws for a concept becomes what it draws for an anchor (ICCV 2023)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Unpack, get_args

import torch
from torch import Tensor

from pumice import models
from pumice.erase.arguments import check_scale, checked_texts, normalized
from pumice.erase.trainer import Options, Trainer, apart
from pumice.models import DiffusionModel, Edit, PromptEmbeds
from pumice.models.arguments import checked_count, first_seed
from pumice.training.class_pictures import drawn_pictures, shared_out
from pumice.training.examples import Examples
from pumice.training.pictures import check_one_size, digest, in_turn, learnable

Preset = Literal["object", "style", "memorization", "nudity"]
Variant = Literal["model", "noise"]
TargetModel = Literal["pretrained", "student"]


class _Setting(NamedTuple):
    parameters: str
    learning_rate: float  # of one row
    steps: int
    batch_size: int
    prior_weight: float


SETTINGS: dict[Preset, _Setting] = {
    "object": _Setting("xattn-kv", 2e-6, 200, 4, 0.0),
    "style": _Setting("xattn-kv", 2e-6, 200, 4, 0.0),
    "memorization": _Setting("full", 5e-7, 400, 2, 1.0),
    "nudity": _Setting("attn", 4e-6, 400, 4, 0.0),
}
"""By preset what trains and how, of the released code; its learning rates are those of one row."""


@dataclass(frozen=True, eq=False)
class _Pair:
    """What stands for what: pictures of `anchor` are learned under `wanted`."""

    concept: int
    anchor: str
    wanted: str


@torch.inference_mode(False)
def concept_ablation(
    pipe: Any,
    concepts: str | Sequence[str],
    anchors: str | Sequence[str],
    *,
    preset: Preset = "object",
    prompts: str | Sequence[str] = "{}",
    variant: Variant = "model",
    target_model: TargetModel = "pretrained",
    images: Mapping[str, Any] | None = None,
    num_images: int = 1000,
    memorized: Any = None,
    similar: Callable[[Tensor, Tensor], Tensor] | None = None,
    threshold: float = 0.5,
    parameters: str | None = None,
    prior_weight: float | None = None,
    steps: int | None = None,
    learning_rate: float | None = None,
    **options: Unpack[Options],
) -> Edit:
    """Erase concepts by teaching the model to draw an anchor in their place.

    ::

        variant "model":   |epsilon'(x_t, t, c*) - epsilon(x_t, t, c)|^2
        variant "noise":   |epsilon'(x_t, t, c*) - noise|^2
        both:              + prior_weight |epsilon'(x_t, t, c) - noise|^2

    means over elements; epsilon' trains, epsilon is the model as it was (Kumari et al., arXiv:2303.13516).
    c is an anchor prompt, x_t a picture of c with noise at uniform t, c* the prompt of the concept. In models
    of v, v takes the place of epsilon and noise.

    Args:
        pipe: a diffusers pipeline, a path, a hub id, or a DiffusionModel; it is not changed.
        concepts: as the model's captions word them; with preset "style" artists' names, with "memorization"
            the captions of memorized pictures.
        anchors: what is drawn instead: one for all concepts, or one for each. "cat" for "grumpy cat",
            "a painting" for an artist, another wording of a memorized caption.
        preset: "object", "style" (keys and values of cross-attention, 200 steps of 4 rows, 2e-6), "nudity"
            (all attention, 400 of 4, 4e-6) or "memorization" (everything, 400 of 2, 5e-7, prior_weight 1).
        prompts: with {} where the anchor stands, or the concept: "a photo of {}". With "style" the concept is
            read as "<anchor prompt>, in the style of <concept>", with "memorization" as it is, and {} may
            be missing. The paper has 200 of a language model. Default the anchor alone.
        variant: as above. Default "model", of the paper.
        target_model: "pretrained", as above, or "student" for what trains itself, without gradient, as in
            the released code; both agree at the start.
        images: by anchor prompt its pictures, (N, 3, H, W) in [0, 1], PIL images or paths, all of one size.
            Default: the model draws them, by 50 steps of DDIM with guidance 7.5.
        num_images: that are drawn for a concept, at most: no more than all steps together reach. Default
            1000, of the paper.
        memorized: (N, 3, H, W) in [0, 1], PIL images or paths, one a concept, that anchor pictures must
            differ from; with preset "memorization" alone. Default: what the model draws for the caption.
        similar: (B, 3, H, W) and (1, 3, H, W) to (B,), such as SSCD's. Default the correlation of pixels.
        threshold: anchor pictures this `similar` to the memorized one are left out. Default 0.5, the paper's
            for SSCD.
        parameters: a set of weights, one of `pumice.erase.parameters.SETS`. Default that of the preset.
        prior_weight: default that of the preset.
        steps: default that of the preset, for one GPU.
        learning_rate: Adam's. Default that of the preset times `batch_size`, as the code scales it.
        options: `pumice.erase.trainer.Options`; the default `batch_size` is that of the preset. A checkpoint
            has the pictures that the model drew, too.

    Returns:
        An `Edit`: weights that are added, or with `rank` a LoRA. `details` has the number of pictures learned
        from, and of those that were too similar to the memorized one.

    Differences from the released code: its extra loss of weight 0.2 on half of a batch is left out; weights
    that train are float32 whatever the pipeline's dtype; each picture is encoded once.

    Raises:
        TypeError, ValueError: naming the argument; for a concept that the model does not know, an anchor
            prompt that is the concept's own, if all anchor pictures are like the memorized one, and if a
            loss or gradient is not finite, whereupon the last checkpoint stands.
        UnsupportedModelError: for quantised, offloaded or LoRA-wrapped weights.
    """
    for name, value, known in (
        ("preset", preset, Preset),
        ("variant", variant, Variant),
        ("target_model", target_model, TargetModel),
    ):
        if value not in get_args(known):
            raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(get_args(known))}")
    setting = SETTINGS[preset]
    prior_weight = check_scale("prior_weight", setting.prior_weight if prior_weight is None else prior_weight)
    num_images = checked_count("num_images", num_images)
    threshold = check_scale("threshold", threshold)
    if preset != "memorization" and (memorized is not None or similar is not None):
        raise ValueError("memorized, similar: got some, expected preset='memorization' with them")
    concepts = checked_texts("concepts", concepts)
    pairs = _pairs(preset, concepts, anchors, prompts)
    if variant == "model":
        for pair in pairs:
            if normalized(pair.anchor) == normalized(pair.wanted):
                raise ValueError(f"anchors: got {pair.anchor!r} for itself, expected another prompt")
    model = models.load(pipe)
    if images is not None:
        images = _given(images, pairs, model)
    if memorized is not None:
        memorized = torch.stack(learnable(memorized, model, "memorized"))
        if len(memorized) != len(concepts):
            raise ValueError(f"memorized: got {len(memorized)} pictures, expected {len(concepts)}")
    batch_size = checked_count("batch_size", options.get("batch_size", setting.batch_size))
    options["batch_size"] = batch_size
    trainer = Trainer(
        model,
        concepts,
        parameters or setting.parameters,
        method="concept_ablation",
        settings={
            "anchors": [anchors] if isinstance(anchors, str) else list(anchors),
            "preset": preset,
            "prompts": [prompts] if isinstance(prompts, str) else list(prompts),
            "variant": variant,
            "target_model": target_model,
            "images": None if images is None else digest(images[pair.anchor] for pair in pairs),
            "num_images": num_images,
            "memorized": None if memorized is None else digest(memorized),
            "similar": None if similar is None else getattr(similar, "__qualname__", type(similar).__name__),
            "threshold": threshold,
            "prior_weight": prior_weight,
        },
        steps=setting.steps if steps is None else steps,
        learning_rate=setting.learning_rate * batch_size if learning_rate is None else learning_rate,
        **options,
    )
    student, draws = trainer.student, trainer.draws

    def drawn(wanted: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        seed, progress = first_seed(options.get("seed", 0)), options.get("progress", False)
        found = drawn_pictures(model, wanted, seed, options.get("checkpoint"), progress)
        return {prompt: torch.stack(pictures) for prompt, pictures in found.items()}

    if images is None:
        reached = min(num_images * len(concepts), trainer.steps * trainer.count)
        images = drawn(shared_out([pair.anchor for pair in pairs], reached))
        pairs = [pair for pair in pairs if pair.anchor in images]
    examples = {prompt: Examples(model, list(found), prompt) for prompt, found in images.items()}
    learned = [(pair, place) for pair in pairs for place in range(len(examples[pair.anchor]))]
    total = len(learned)
    if preset == "memorization":
        if memorized is None:
            memorized = torch.cat([*drawn({concept: [0] for concept in concepts}).values()])
        if similar is None:
            check_one_size((memorized[0], next(iter(images.values()))[0]), "memorized")
        alike = {
            pair: (similar or correlation)(images[pair.anchor], memorized[pair.concept][None])
            for pair in pairs
        }
        learned = [(pair, place) for pair, place in learned if float(alike[pair][place]) < threshold]
        if not learned:
            raise ValueError(
                f"prompts: got {total} anchor pictures, all {threshold:g} or more similar to the memorized "
                "one, expected prompts that replay less, or a larger threshold"
            )

    def loss(step: int, rows: Sequence[int]) -> Tensor:
        turns = [step * trainer.count + row for row in rows]
        chosen = [learned[in_turn(draws, "order", turn, len(learned))] for turn in turns]
        z = torch.stack(
            [
                examples[pair.anchor].latents(place, draws, row, step)
                for row, (pair, place) in zip(rows, chosen, strict=True)
            ]
        )
        t = draws.integers(rows, "timestep", step, model.schedule.num_train_timesteps)
        noise = draws.normal(rows, "noise", step, z.shape[1:])
        x, real = model.add_noise(z, noise, t), model.schedule.target(z, noise, t)
        wanted = trainer.encode([pair.wanted for pair, _ in chosen])
        anchor = trainer.encode([pair.anchor for pair, _ in chosen])
        read = PromptEmbeds.cat((wanted, anchor)) if prior_weight else wanted
        times = len(read) // len(rows)
        output = student.predict(x.repeat(times, 1, 1, 1), t.repeat(times), read).float()
        predicted, *of_anchor = output.split(len(rows))
        if variant == "noise":
            goal = real
        elif target_model == "student" and of_anchor:
            goal = of_anchor[0].detach()
        else:
            with torch.no_grad():
                goal = (model if target_model == "pretrained" else student).predict(x, t, anchor).float()
        found = apart(predicted, goal, trainer.count)
        return found + prior_weight * apart(of_anchor[0], real, trainer.count) if of_anchor else found

    return trainer.train(loss, details=lambda: {"images": len(learned), "too_similar": total - len(learned)})


def correlation(images: Tensor, other: Tensor) -> Tensor:
    """Correlation of the pixels of (B, 3, H, W) with those of (1, 3, H, W), (B,)."""
    a, b = (x.flatten(1) - x.flatten(1).mean(1, keepdim=True) for x in (images, other))
    return torch.nn.functional.cosine_similarity(a, b, dim=1)


def _pairs(
    preset: Preset, concepts: Sequence[str], anchors: str | Sequence[str], prompts: str | Sequence[str]
) -> list[_Pair]:
    given = (anchors,) * len(concepts) if isinstance(anchors, str) else tuple(anchors)
    if len(given) != len(concepts):
        raise ValueError(
            f"anchors: got {len(given)}, expected one, or one for each of {len(concepts)} concepts"
        )
    for anchor in given:
        if not isinstance(anchor, str):
            raise TypeError(f"anchors: got a {type(anchor).__name__}, expected strings")
    templates = checked_texts("prompts", prompts)
    least = 0 if preset in ("style", "memorization") else 1
    for template in templates:
        if not least <= template.count("{}") <= 1:
            raise ValueError(f"prompts: got {template!r}, expected one {{}} for the anchor")
    found = []
    for template in templates:
        for number, (concept, anchor) in enumerate(zip(concepts, given, strict=True)):
            text = template.replace("{}", anchor)
            wanted = {
                "style": f"{text}, in the style of {concept}",
                "memorization": concept,
            }.get(preset, template.replace("{}", concept))
            found.append(_Pair(number, text, wanted))
    return found


def _given(images: Mapping[str, Any], pairs: Sequence[_Pair], model: DiffusionModel) -> dict[str, Tensor]:
    """Those of each anchor prompt, (N, 3, H, W)."""
    if not isinstance(images, Mapping):
        raise TypeError(f"images: got a {type(images).__name__}, expected pictures by anchor prompt")
    found = {}
    for pair in pairs:
        if pair.anchor not in images:
            raise ValueError(f"images: got none of {pair.anchor!r}, expected some of each anchor prompt")
        if pair.anchor not in found:
            found[pair.anchor] = torch.stack(learnable(images[pair.anchor], model))
    check_one_size(each[0] for each in found.values())
    return found
