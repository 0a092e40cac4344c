"""Unlearning in the text encoder from a few pictures, by LoRA (arXiv:2505.12395) and by gradient ascent."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Unpack

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
from pumice.erase.trainer import Options, Trainer, apart, noises
from pumice.models import DiffusionModel, Edit, PromptEmbeds
from pumice.models.arguments import checked_count, first_seed
from pumice.models.draws import Draws
from pumice.models.edit import TEXT
from pumice.models.errors import UnsupportedModelError
from pumice.training.examples import Examples, draw_class
from pumice.training.pictures import check_one_size, digest, in_turn, learnable, of_each
from pumice.training.templates import PHRASES

_PICTURES = 4
_Noised = Callable[[int, Sequence[int], Sequence[str]], tuple[Tensor, Tensor, Tensor]]


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
            batch_size 2.

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
    options.setdefault("rank", 4)
    options.setdefault("batch_size", 2)
    model = models.load(pipe)
    pictures = _given(images, concepts, model)
    trainer = Trainer(
        model,
        concepts,
        [*_last_layers(model, layers, train_norm)],
        method="few_shot",
        settings={
            "images": _digests(pictures),
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
    if pictures is None:
        pictures = {
            concept: draw_class(model, templates[0].replace("{}", concept), _PICTURES, seed, False)
            for concept in concepts
        }
    words = {
        concept: learn_word(
            model,
            torch.stack(found),
            initial=concept,
            templates=templates,
            steps=word_steps,
            rows=options.get("rows", 64),
            seed=seed,
            progress=options.get("progress", False),
        )
        for concept, found in pictures.items()
        if word_weight
    }
    noised = _of_pictures(model, pictures, draws, trainer.count)
    anchor_of = dict(zip(concepts, anchors, strict=True))

    def loss(step: int, rows: Sequence[int]) -> Tensor:
        of = [trainer.of_step(step)[row] for row in rows]
        under = _picked(templates, draws, rows, "template", step)
        texts = _picked(kept, draws, rows, "preserve", step)
        z, t, _ = noised(step, rows, of)
        away = [" ".join(text.split()) for text in _named(under, [anchor_of[concept] for concept in of])]
        goal, same = noises(model, z, t, trainer.encode(away), trainer.encode(texts))
        read = [student.encode_prompt([*_named(under, of), *texts])]
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


@torch.inference_mode(False)
def few_shot_ascent(
    pipe: Any,
    concepts: str | Sequence[str],
    images: Any = None,
    *,
    latents: Literal["gaussian", "uniform"] = "gaussian",
    templates: Sequence[str] = PHRASES,
    steps: int = 8,
    learning_rate: float = 1e-5,
    **options: Unpack[Options],
) -> Edit:
    """Make the text encoder worse at a few pictures of concepts: gradient ascent on the diffusion loss.

    ::

        L = -|epsilon'(z_t, t, c) - noise|^2

    a mean over elements, by Adam with betas (0.9, 0.98), eps 1e-6 and weight decay 1e-8 on the text encoder's
    MLPs and its last self-attention (Fuchi and Takagi, arXiv:2405.07288). There is nothing that it converges
    to: steps and learning rate alone say how much is lost, of the concept and of all else.

    Args:
        pipe: a diffusers pipeline, a path, a hub id, or a DiffusionModel; it is not changed.
        concepts: as the model's captions word them.
        images: of the concept, (N, 3, H, W) in [0, 1], PIL images or paths, or a list of such, one for each
            of several; the paper takes 4. Without them the variant without pictures: z is random, anew in
            each row.
        latents: of that variant, standard normal, or "uniform" in [0, 1) as in the released code.
        templates: with {} for the concept; one at random for each row.
        steps: default 8, of the paper: 4 epochs of 4 pictures, two at a time.
        learning_rate: default 1e-5, of the paper.
        options: `pumice.erase.trainer.Options`; batch_size is 2 by default, of the paper.

    Returns:
        An `Edit` of the text encoder: it serves every denoiser that has the same one.

    Differences from the paper: templates are few, for concepts that come with their article;
    weight decay is AdamW's; with Stable Diffusion XL, layers are those of both encoders that the denoiser
    reads, which end before the last.

    Raises:
        TypeError, ValueError: naming the argument; for a concept that the model does not know, and if a loss
            or gradient is not finite, whereupon the last checkpoint stands.
        UnsupportedModelError: for quantised, offloaded or LoRA-wrapped weights, and for text encoders of
            another kind than CLIP's.
    """
    concepts = checked_texts("concepts", concepts)
    templates = checked_templates("templates", templates, least=1)
    if latents not in ("gaussian", "uniform"):
        raise ValueError(f"latents: got {latents!r}, expected 'gaussian' or 'uniform'")
    options.setdefault("batch_size", 2)
    model = models.load(pipe)
    pictures = _given(images, concepts, model)
    trainer = Trainer(
        model,
        concepts,
        [*_mlps(model, whole=options.get("rank") is None)],
        method="few_shot_ascent",
        settings={"images": _digests(pictures), "latents": latents, "templates": list(templates)},
        steps=steps,
        learning_rate=learning_rate,
        **options,
    )
    student, draws = trainer.student, trainer.draws
    if pictures is None:
        noised = _of_nothing(model, draws, draws.normal if latents == "gaussian" else draws.uniform)
    else:
        noised = _of_pictures(model, pictures, draws, trainer.count)

    def loss(step: int, rows: Sequence[int]) -> Tensor:
        of = [trainer.of_step(step)[row] for row in rows]
        z, t, noise = noised(step, rows, of)
        embeds = student.encode_prompt(_named(_picked(templates, draws, rows, "template", step), of))
        return -apart(student.predict_noise(z, t, embeds), noise, trainer.count)

    with models.frozen(student.unet, data_gradient=True):
        return trainer.train(loss, betas=(0.9, 0.98), eps=1e-6, weight_decay=1e-8)


def _named(templates: Sequence[str], concepts: Sequence[str]) -> list[str]:
    return [template.replace("{}", concept) for template, concept in zip(templates, concepts, strict=True)]


def _picked(texts: Sequence[str], draws: Draws, rows: Sequence[int], what: str, step: int) -> list[str]:
    """One at random for each row."""
    return [texts[index] for index in draws.integers(rows, what, step, len(texts)).tolist()]


def _of_pictures(
    model: DiffusionModel, pictures: Mapping[str, Sequence[Tensor]], draws: Draws, count: int
) -> _Noised:
    """z_t, t and the noise of a step's rows: pictures of their concepts, all of them in turn."""
    examples = {concept: Examples(model, found, concept) for concept, found in pictures.items()}

    def noised(step: int, rows: Sequence[int], of: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        clean = []
        for row, concept in zip(rows, of, strict=True):
            own = examples[concept]
            place = in_turn(draws, f"order of {concept}", step * count + row, len(own))
            clean.append(own.latents(place, draws, row, step))
        return _noise(model, torch.stack(clean), draws, step, rows)

    return noised


def _of_nothing(model: DiffusionModel, draws: Draws, random: Callable[..., Tensor]) -> _Noised:
    """The same of random latents."""

    def noised(step: int, rows: Sequence[int], of: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        return _noise(model, random(rows, "latents", step, model.latent_shape()), draws, step, rows)

    return noised


def _noise(
    model: DiffusionModel, z: Tensor, draws: Draws, step: int, rows: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    t = draws.integers(rows, "timestep", step, model.schedule.num_train_timesteps)
    noise = draws.normal(rows, "noise", step, z.shape[1:])
    return model.add_noise(z, noise, t), t, noise


def _read(model: DiffusionModel) -> Iterator[tuple[str, nn.Module, list[str], list[str]]]:
    """Name and module of each text encoder, and its layers and the norms behind them that the denoiser reads.

    Raises:
        UnsupportedModelError: for encoders of another kind than CLIP's.
    """
    for name, encoder in zip(TEXT, model.text_encoders, strict=False):
        modules = dict(encoder.named_modules())
        layers = [path for path in modules if f"{path}.self_attn" in modules and f"{path}.mlp" in modules]
        if not layers:
            raise UnsupportedModelError(f"pipe: {name} is a {type(encoder).__name__}, expected CLIP's")
        norms = [
            path
            for path, module in modules.items()
            if isinstance(module, nn.LayerNorm) and path.rpartition(".")[0] not in layers
        ]
        if len(model.text_encoders) > 1:  # Stable Diffusion XL reads what enters the last layer
            layers, norms = layers[:-1], []
        yield name, encoder, layers, norms


def _last_layers(model: DiffusionModel, count: int, norm: bool) -> Iterator[str]:
    """The weights of linear layers of the last layers, and of the norm behind them."""
    for name, encoder, layers, norms in _read(model):
        for layer in layers[-count:]:
            for path, module in encoder.get_submodule(layer).named_modules():
                if isinstance(module, nn.Linear):
                    yield f"{name}.{layer}.{path}.weight"
        for path in norms if norm else ():
            yield from (f"{name}.{path}.weight", f"{name}.{path}.bias")


def _mlps(model: DiffusionModel, *, whole: bool) -> Iterator[str]:
    """The weights, and the biases if they train whole, of all MLPs and the last self-attention."""
    for name, encoder, layers, _ in _read(model):
        parts = (*(f"{layer}.mlp." for layer in layers), f"{layers[-1]}.self_attn.")
        for path, weight in encoder.named_parameters():
            if path.startswith(parts) and (whole or weight.ndim > 1):
                yield f"{name}.{path}"


def _given(images: Any, concepts: Sequence[str], model: DiffusionModel) -> dict[str, list[Tensor]] | None:
    """Those of each concept, if there are any."""
    if images is None:
        return None
    found = {
        concept: learnable(own, model)
        for concept, own in zip(concepts, of_each(images, concepts), strict=True)
    }
    check_one_size(picture for own in found.values() for picture in own)
    return found


def _digests(pictures: Mapping[str, Sequence[Tensor]] | None) -> list[str] | None:
    return None if pictures is None else [digest(own) for own in pictures.values()]
