"""Unlearning in the text encoder from few pictures, by LoRA (arXiv:2505.12395)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from pumice import models
from pumice.erase.arguments import (
    check_scale,
    checked_guides,
    checked_preserve,
    checked_templates,
    checked_texts,
)
from pumice.erase.embedding import learn_word
from pumice.erase.few_pictures import digests, given_pictures, named, of_pictures, picked, text_layers
from pumice.erase.trainer import Options, Trainer, apart, noises
from pumice.models import DiffusionModel, Edit, PromptEmbeds
from pumice.models.arguments import checked_count, first_seed
from pumice.training.class_pictures import drawn_pictures
from pumice.training.templates import PHRASES

_PICTURES = 4


@torch.inference_mode(False)
def few_shot(
    pipe: Any,
    concepts: str | Sequence[str],
    images: Any = None,
    *,
    anchor: str | Sequence[str] = "",
    preserve: str | Sequence[str] = (),
    templates: Sequence[str] = PHRASES,
    layers: int = 2,
    train_norm: bool = True,
    forget_weight: float = 1.0,
    word_weight: float = 1.0,
    preserve_weight: float = 1.0,
    word_steps: int = 50,
    steps: int = 100,
    learning_rate: float = 1e-3,
    **options: Unpack[Options],
) -> Edit:
    """Make the text encoder read concepts as something else, by a LoRA that a few pictures train.

    ::

        L =   forget_weight   |e'(z_t, c)  - e(z_t, anchor)|^2         c: the concept's name in a template
            + word_weight     |e'(z_t, c*) - e(z_t, anchor)|^2         c*: a word learned for the pictures
            + preserve_weight |e'(z_t, p)  - e(z_t, p)|^2              p: "", or one of `preserve`

    means over elements; e is epsilon as the model predicts it and e' with the text encoder that trains (after
    Few-Shot Concept Unlearning with Low Rank Adaptation, arXiv:2505.12395). z_t is one of the concept's
    pictures, noised at a uniform t. The word is textual inversion's, learned before on the model as it is:
    through it the encoder forgets what the pictures show, not their name alone.

    Args:
        pipe: a diffusers pipeline, a path, a hub id, or a DiffusionModel; it is not changed.
        concepts: as the model's captions word them.
        images: of the concept, (N, 3, H, W) in [0, 1], PIL images or paths, or a list of such, one for each
            of several; the paper takes 4 or 5. By default the model draws four, under the first template.
        anchor: what is read instead, one or one for each concept. Default "", nothing; on the testbed another
            thing ("a box" for "a ball"), together with `preserve`, erased more and lost less.
        preserve: what should be read as it was; the more, the less else is lost.
        templates: with {} for the concept; one at random for each row.
        layers: how many of each text encoder have a LoRA: the last that the denoiser reads, which with Stable
            Diffusion XL ends before the last.
        train_norm: of the norm behind them, too, where the denoiser reads it, whole as in the paper. LoRA
            files have no place for norms: without it, `Edit.save_lora` is exact.
        forget_weight, word_weight, preserve_weight: as above. Without `word_weight` no word is learned.
        word_steps: of textual inversion, four rows each.
        steps: of the training.
        learning_rate: Adam's.
        options: `pumice.erase.trainer.Options`; by default rank is 4, of the paper's 4 to 8, and
            batch_size 2. A checkpoint has the words, too, and the pictures that the model drew.

    Returns:
        An `Edit` of the text encoder: it serves every denoiser that has the same one.

    Assumptions, where the paper gives no figures or formula: the loss above, its weights, anchor, templates,
    layers, steps, batch and learning rates.

    Raises:
        TypeError, ValueError: naming the argument; for a concept that the model does not know, and if a loss
            or gradient is not finite, whereupon the last checkpoint stands.
        UnsupportedModelError: for quantised, offloaded or LoRA-wrapped weights, and for text encoders of
            another kind than CLIP's.
    """
    concepts = checked_texts("concepts", concepts)
    anchors = checked_guides(anchor, concepts, "anchor")
    kept = ("", *checked_preserve(preserve, concepts))
    templates = checked_templates("templates", templates, least=1)
    forget_weight = check_scale("forget_weight", forget_weight)
    word_weight = check_scale("word_weight", word_weight)
    preserve_weight = check_scale("preserve_weight", preserve_weight)
    if not isinstance(train_norm, bool):
        raise TypeError(f"train_norm: got {train_norm!r}, expected a bool")
    layers, word_steps = checked_count("layers", layers), checked_count("word_steps", word_steps)
    if options.setdefault("rank", 4) is None:
        raise ValueError("rank: got None, expected one, of the LoRA")
    options.setdefault("batch_size", 2)
    model = models.load(pipe)
    pictures = given_pictures(images, concepts, model)
    trainer = Trainer(
        model,
        concepts,
        [*_last_layers(model, layers, train_norm)],
        method="few_shot",
        settings={
            "images": digests(pictures),
            "anchor": list(anchors),
            "preserve": list(kept[1:]),
            "templates": list(templates),
            "layers": layers,
            "train_norm": train_norm,
            "forget_weight": forget_weight,
            "word_weight": word_weight,
            "preserve_weight": preserve_weight,
            "word_steps": word_steps,
        },
        steps=steps,
        learning_rate=learning_rate,
        **options,
    )
    student, draws, seed = trainer.student, trainer.draws, first_seed(options.get("seed", 0))
    checkpoint, progress = options.get("checkpoint"), options.get("progress", False)
    if pictures is None:
        prompts = named([templates[0]] * len(concepts), concepts)
        drawn = drawn_pictures(model, dict.fromkeys(prompts, range(_PICTURES)), seed, checkpoint, progress)
        pictures = {concept: drawn[prompt] for concept, prompt in zip(concepts, prompts, strict=True)}
    words = {
        concept: learn_word(
            model,
            torch.stack(found),
            initial=concept,
            templates=templates,
            steps=word_steps,
            rows=options.get("rows", 64),
            seed=seed,
            checkpoint=None if checkpoint is None else Path(checkpoint) / f"word-{number}",
            progress=progress,
        )
        for number, (concept, found) in enumerate(pictures.items())
        if word_weight
    }
    examples = of_pictures(model, pictures, draws, trainer.count)
    anchor_of = dict(zip(concepts, anchors, strict=True))

    def loss(step: int, rows: Sequence[int]) -> Tensor:
        of = [trainer.of_step(step)[row] for row in rows]
        under = picked(templates, draws, rows, "template", step)
        texts = picked(kept, draws, rows, "preserve", step)
        z, t, _ = examples(step, rows, of)
        away = [" ".join(text.split()) for text in named(under, [anchor_of[concept] for concept in of])]
        goal, same = noises(model, z, t, trainer.encode(away), trainer.encode(texts))
        read = [student.encode_prompt([*named(under, of), *texts])]
        terms = [(forget_weight, goal), (preserve_weight, same)]
        if words:
            pairs = zip(under, of, strict=True)
            read += [words[concept].encode(student, [template]) for template, concept in pairs]
            terms.append((word_weight, goal))
        embeds, times = PromptEmbeds.cat(read), len(terms)
        found = student.predict_noise(z.repeat(times, 1, 1, 1), t.repeat(times), embeds).chunk(times)
        parts = [
            weight * apart(each, to, trainer.count) for (weight, to), each in zip(terms, found, strict=True)
        ]
        return torch.stack(parts).sum()

    with models.frozen(student.unet, data_gradient=True):
        return trainer.train(loss)


def _last_layers(model: DiffusionModel, count: int, norm: bool) -> Iterator[str]:
    """The weights of linear layers of the last layers, and of the norm behind them."""
    for name, encoder, layers, norms in text_layers(model):
        for layer in layers[-count:]:
            for path, module in encoder.get_submodule(layer).named_modules():
                if isinstance(module, nn.Linear):
                    yield f"{name}.{layer}.{path}.weight"
        for path in norms if norm else ():
            yield from (f"{name}.{path}.weight", f"{name}.{path}.bias")
