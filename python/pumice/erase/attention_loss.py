"""What a model looks at: the attention of noised pictures of a concept to the words for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from pumice.erase.arguments import checked_templates
from pumice.erase.trainer import Options, Trainer
from pumice.models import DiffusionModel, PromptEmbeds
from pumice.models.arguments import checked_count
from pumice.ops import attention_columns
from pumice.training.class_pictures import drawn_pictures
from pumice.training.examples import Examples
from pumice.training.pictures import digest, learnable, of_each


class Subjects:
    """Pictures of concepts, where each is in them, and where its words stand in the prompt.

    Args:
        concepts: checked already.
        images: (N, 3, H, W) in [0, 1], PIL images or paths of the concept, or a list of such, one for each
            of several; None for `num_images` of each that the model draws from the prompt.
        masks: such as well, but tensors are (N, H, W): above 0.5 where a picture shows its concept. None for
            everywhere.
        prompt: a template with one "{}" for the concept.
        with_eos: whether EOS counts as one of its words.

    Attributes:
        pictures: (N, 3, H, W) float32 by concept, those given or, after `draw`, drawn.
        masks: (N, H, W) by concept, those given.
        prompts: that pictures are learned under, by concept.
        columns: (L,) bool, where a concept's words stand, by concept.
        settings: what a training depends on here, plain data.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    def __init__(
        self,
        model: DiffusionModel,
        concepts: Sequence[str],
        images: Any,
        masks: Any,
        *,
        prompt: str,
        with_eos: bool,
        num_images: int,
    ) -> None:
        (prompt,) = checked_templates("prompt", [prompt])
        if not isinstance(with_eos, bool):
            raise TypeError(f"with_eos: got {with_eos!r}, expected a bool")
        self._model, self._count = model, checked_count("num_images", num_images)
        if masks is not None and images is None:
            raise ValueError("masks: got some without images, expected the images that they are of")
        pictures = [] if images is None else [learnable(own, model) for own in of_each(images, concepts)]
        inside = [] if masks is None else of_each(masks, concepts, "masks")
        self.prompts = {concept: prompt.replace("{}", concept) for concept in concepts}
        self.columns = {concept: words(model, prompt, concept, with_eos) for concept in concepts}
        self.pictures = {concept: torch.stack(own) for concept, own in zip(concepts, pictures, strict=False)}
        self.masks = {
            concept: _masks(own, self.pictures[concept], model)
            for concept, own in zip(concepts, inside, strict=False)
        }
        self._cached: dict[str, Examples] = {}
        self.settings = {
            "prompt": prompt,
            "with_eos": with_eos,
            "images": [digest(own) for own in pictures] or num_images,
            "masks": [digest(own.float()) for own in self.masks.values()],
        }

    def draw(self, seed: int, options: Options) -> None:
        """Make pictures of the concepts, where none were given; they are kept beside a checkpoint."""
        if self.pictures:
            return
        drawn = drawn_pictures(
            self._model,
            dict.fromkeys(self.prompts.values(), range(self._count)),
            seed,
            options.get("checkpoint"),
            options.get("progress", False),
        )
        self.pictures = {concept: torch.stack(drawn[prompt]) for concept, prompt in self.prompts.items()}

    def energies(self, trainer: Trainer, step: int, rows: Sequence[int], t: Tensor) -> Tensor:
        """`energies` of these rows of a step under the model that trains, (B, layers) in any order of rows.

        Each is of a random picture of its concept, noised to its t (B,).
        """
        of, draws, model = trainer.of_step(step), trainer.draws, trainer.student
        numbers = draws.uniform(rows, "picture", step).tolist()
        sizes: dict[torch.Size, list[tuple[int, str, int, Tensor]]] = {}
        for place, (row, number) in enumerate(zip(rows, numbers, strict=True)):
            examples = self._examples(of[row])
            index = int(number * len(examples))
            z = examples.latents(index, draws, row, step)
            sizes.setdefault(z.shape, []).append((place, of[row], index, z))
        found = []
        for group in sizes.values():  # which go through the denoiser together
            places, concepts, indices, latents = zip(*group, strict=True)
            z = torch.stack(latents)
            noise = draws.normal([rows[place] for place in places], "noise", step, z.shape[1:])
            at = t[list(places)]
            masks = [
                self.masks[concept][i] for concept, i in zip(concepts, indices, strict=True) if self.masks
            ]
            found.append(
                energies(
                    model,
                    model.add_noise(z, noise, at),
                    at,
                    trainer.encode([self.prompts[concept] for concept in concepts]),
                    torch.stack([self.columns[concept] for concept in concepts]),
                    torch.stack(masks).to(model.device) if masks else None,
                )
            )
        return torch.cat(found)

    def _examples(self, concept: str) -> Examples:
        if concept not in self._cached:
            self._cached[concept] = Examples(self._model, list(self.pictures[concept]), self.prompts[concept])
        return self._cached[concept]


def words(model: DiffusionModel, prompt: str, concept: str, with_eos: bool) -> Tensor:
    """(L,) bool on the model's device, where a concept's tokens stand in the prompt, and EOS on request.

    Raises:
        ValueError: if they do not fit.
    """
    before = prompt.split("{}")[0]
    whole = model.tokenize(prompt.replace("{}", concept))[0]
    start, stop = (model.tokenize(text)[0].eos for text in (before, before + concept))
    if whole.truncated or start >= stop:
        raise ValueError(f"prompt: {whole.prompt[:60]!r} has no place for the tokens of {concept!r}")
    found = torch.zeros(len(whole.ids), dtype=torch.bool)
    found[start:stop] = True
    found[whole.eos] = with_eos
    return found.to(model.device)


def energies(
    model: DiffusionModel,
    z: Tensor,
    t: Tensor,
    embeds: PromptEmbeds,
    columns: Tensor,
    masks: Tensor | None = None,
) -> Tensor:
    """How much each cross-attention layer looks at some tokens, squared.

    ::

        |A_l[heads, positions inside, columns]|_F^2        A_l = softmax(q k^T / sqrt(d)) of layer l

    Args:
        z, t, embeds: (B, C, h, w), (B,) and B prompts, as of `predict`.
        columns: (B, L) bool.
        masks: (B, H, W) of any size, brought to the grid of each layer by the nearest value; inside is above
            0.5. None for everywhere.

    Returns:
        (B, layers) float32, differentiable.
    """
    found: list[Tensor] = []

    def collect(squares: Tensor) -> None:
        if masks is not None:
            grid = _grid(squares.shape[2], *z.shape[2:])
            inside = interpolate(masks[:, None].float(), grid).flatten(2) > 0.5
            squares = squares * inside.to(squares)
        found.append(squares.sum((1, 2)))

    with _looking(model, columns, collect):
        model.predict(z, t, embeds)
    return torch.stack(found, dim=1)


def root(squares: Tensor) -> Tensor:
    """Square roots, with a gradient of 0 at 0."""
    return squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt()


@contextmanager
def _looking(model: DiffusionModel, columns: Tensor, collect: Any) -> Iterator[None]:
    """Inside the block, q and k of every cross-attention layer go through `attention_columns`, too."""
    queries: dict[str, Tensor] = {}
    handles = []

    def query(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        queries[name] = output

    def key(name: str, heads: int, scale: float, module: nn.Module, args: Any, output: Tensor) -> None:
        q, k = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (queries.pop(name), output))
        collect(attention_columns(q, k, columns, scale))

    try:
        for name, layer in model.cross_attention.items():
            attention: Any = layer.module
            handles += [
                attention.to_q.register_forward_hook(partial(query, name)),
                attention.to_k.register_forward_hook(partial(key, name, layer.heads, attention.scale)),
            ]
        # a compiled denoiser would not see the hooks
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _grid(positions: int, height: int, width: int) -> tuple[int, int]:
    """The sides of a layer's grid, halved from those of latents until they have so many positions."""
    while height * width > positions:
        height, width = -(-height // 2), -(-width // 2)
    return height, width


def _masks(given: Any, images: Tensor, model: DiffusionModel) -> Tensor:
    """(N, H, W) of so many pictures of a concept; PIL images and files are cut as those of pictures are."""
    if isinstance(given, Tensor):
        found = given.detach()
    else:
        found = torch.stack(learnable(given, model, "masks")).mean(1)
    expected = (len(images), *images.shape[2:])
    if found.shape != expected:
        raise ValueError(f"masks: got shape {tuple(found.shape)}, expected {expected}, as the images")
    if not bool((found > 0.5).flatten(1).any(1).all()):
        raise ValueError(
            "masks: got one with nothing above 0.5, expected where the picture shows the concept"
        )
    return found
