"""Find the few neurons that replay memorized pictures, and zero them: NeMo (Hintersdorf et al., 2024)."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from pumice import models
from pumice.memorization import engine
from pumice.memorization.arguments import check_finite, check_first_step, checked_prompts, checked_seeds
from pumice.memorization.ms_ssim import min_max, ms_ssim
from pumice.models import (
    CrossAttentionLayer,
    DiffusionModel,
    Edit,
    PromptEmbeds,
    RowBudget,
    Zeroed,
    fingerprint,
)

_PROMPTS_A_BLOCK = 64  # encoded together, and in memory together
_NO_EFFECT = 1e-4  # on a similarity: more than rounding, less than anything that shows
_SELECTIONS = [(5 - 0.25 * k, k) for k in range(17)]  # deviations, and top-k: ever more neurons

Similarity = Callable[[Tensor], Tensor]
"""Of masks (K, neurons) how similar (K,) the noise difference stays with the neurons of each blocked."""


@torch.inference_mode()
def nemo(
    pipe: Any,
    memorized: str | Sequence[str],
    *,
    fresh: Sequence[str],
    threshold: float | None = None,
    seeds: int | Sequence[int] = 10,
    num_inference_steps: int = 50,
    batch_size: int = 32,
    progress: bool = False,
) -> Edit:
    """Find the value neurons of cross-attention that memorized prompts are replayed by, and zero them.

    ::

        neurons      output channels of to_v in the cross-attention of the down blocks and the mid block
        a_i          = mean over tokens of |W_v e|_i                of the prompt's embeddings e
        d            = min-max over (h, w) of epsilon_cond(x_T) - x_T                of each seed and channel
        strength     = max over pairs of seeds of MS-SSIM(d, d');    seeds above the threshold are kept
        similarity   = max over kept seeds of MS-SSIM(d, d with neurons blocked)

        selection    {|a - mean| / std > 5 - k/4} and the k largest a of each layer, k = 0, 1, ..., 16,
                     until the similarity is not above the threshold
        refinement   from the last layer to the first each layer, then each neuron, is given back if the
                     similarity stays not above the threshold

    (Hintersdorf et al., arXiv:2406.02366.) The activations follow from the text embeddings alone. Many sets
    of neurons are tried in one call of the denoiser, each row with its own neurons blocked; parts to give
    back are tried as if those before them had been accepted, up to the first that is not, which finds what
    one by one finds. A prompt whose similarity stays above the threshold with the whole last selection
    blocked is refined against that similarity (plus 0.0001, as rounding is not to decide), and told in the
    details as unsolved.

    Args:
        pipe: a diffusers pipeline, a path, a hub id, or a DiffusionModel; it is not changed.
        memorized: prompts that replay training pictures, at least one.
        fresh: prompts that do not, at least two: what activations are usual (and the threshold) is taken
            from them. The paper takes 50000 captions.
        threshold: of strength and similarity. Default mean plus one standard deviation of the strengths of
            `fresh`, which costs a row of the denoiser for each of them and each seed; that of Stable
            Diffusion 1.4 is 0.428 (the paper's).
        seeds: how many (0, 1, 2, ...), or which, at least two. Default 10, the paper's.
        num_inference_steps: of the sampler whose first timestep is looked at. Default 50.
        batch_size: rows in one call of the denoiser; halved on out-of-memory.
        progress: show a bar over the prompts.

    Returns:
        An `Edit` that zeroes the rows of to_v of all neurons found. Its details tell the threshold, and by
        prompt the strength and the neurons of each layer (none for a prompt that is not memorized), and which
        prompts are unsolved.

    Differences from the released code: the first timestep itself is looked at (the code discards that call
    and scores the second timestep on the same noise); v-predictions are converted to epsilon; latents too
    small for three scales of windows of 11 are compared as `ms_ssim` says.

    Raises:
        TypeError: if a prompt is not a string, or seeds are not integers.
        ValueError: if there are too few prompts or seeds, for numbers out of range, and for a model whose
            first step is pure noise (zero terminal SNR) or whose predictions are not finite.
        UnsupportedModelError: if the model's family is not supported, or its to_v cannot be edited.
    """
    prompts, fresh = checked_prompts(memorized, "memorized"), checked_prompts(fresh, "fresh")
    different = list(dict.fromkeys(prompts))
    seeds = checked_seeds(seeds)
    for name, values in (("fresh", fresh), ("seeds", seeds)):
        if len(values) < 2:
            raise ValueError(f"{name}: got 1, expected at least 2")
    if threshold is not None:
        check_finite("threshold", threshold)
    budget = RowBudget(operator.index(batch_size))
    model = models.load(pipe)
    timestep = int(model.schedule.timesteps(num_inference_steps)[0])
    check_first_step(model, timestep)
    layers = value_layers(model)
    model.check_editable(layers)
    noise = engine.initial_noise(seeds, model.latent_shape()).to(model.device)
    bar = tqdm(total=len(different), unit="prompt", disable=not progress, desc="nemo")
    neurons: dict[str, Tensor] = {}
    strength: dict[str, float] = {}
    unsolved: list[str] = []
    with model.frozen(), bar:
        probe = _Probe(model, layers, noise, timestep, budget)
        usual = _usual(model, probe, fresh)
        if threshold is None:
            of_fresh = torch.stack([_strengths(d).amax() for _, d in probe.differences(fresh)])
            threshold = float(of_fresh.mean() + of_fresh.std())
        for prompt, (embeds, d) in zip(different, probe.differences(different), strict=True):
            of_seed = _strengths(d)
            strength[prompt] = float(of_seed.amax())
            if not math.isfinite(strength[prompt]):
                raise ValueError(f"pipe: its predictions are not finite in {model.dtype}")
            kept = of_seed > threshold
            neurons[prompt], solved = _find(probe, embeds, noise[kept], d[kept], usual, threshold)
            if not solved:
                unsolved.append(prompt)
            bar.update()
    settings = {"seeds": list(seeds), "num_inference_steps": num_inference_steps, "fresh": len(fresh)}
    details = {
        "threshold": threshold,
        "strength": strength,
        "neurons": {prompt: _by_layer(layers, of, probe.widths) for prompt, of in neurons.items()},
        "unsolved": unsolved,
    }
    changes = {}
    every = torch.stack(list(neurons.values())).any(0)
    for layer, rows in zip(layers, every.split(probe.widths), strict=True):
        for name, parameter in layer.to_v.named_parameters() if bool(rows.any()) else ():
            mask = rows.reshape(-1, *[1] * (parameter.dim() - 1)).expand(parameter.shape)
            changes[f"{layer.name}.to_v.{name}"] = Zeroed.pack(mask)
    return Edit(changes, fingerprint(model), "nemo", prompts, settings, details)


def value_layers(model: DiffusionModel) -> list[CrossAttentionLayer]:
    """The cross-attention of the down blocks and the mid block, in the order in which they run."""
    return [layer for name, layer in model.cross_attention.items() if not name.startswith("up_blocks.")]


@contextmanager
def blocked(layers: Sequence[CrossAttentionLayer], neurons: Tensor) -> Iterator[None]:
    """Inside the block, row r of a call runs without the value neurons that are True in neurons[r].

    Args:
        layers: of the denoiser.
        neurons: (rows, neurons of all layers) bool.
    """
    widths = [layer.to_v.out_features for layer in layers]

    def without(off: Tensor, _module: nn.Module, _inputs: object, values: Tensor) -> Tensor:
        return values.masked_fill(off[:, None], 0)

    handles = [
        layer.to_v.register_forward_hook(partial(without, off))
        for layer, off in zip(layers, neurons.split(widths, dim=1), strict=True)
    ]
    try:
        # a compiled denoiser would not see the hooks
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for handle in handles:
            handle.remove()


class _Probe:
    """What the denoiser answers at the first timestep, with neurons blocked or not."""

    def __init__(
        self,
        model: DiffusionModel,
        layers: Sequence[CrossAttentionLayer],
        noise: Tensor,
        timestep: int,
        budget: RowBudget,
    ) -> None:
        self._model, self._layers, self._noise = model, layers, noise
        self._t, self.budget = torch.tensor(timestep, device=model.device), budget
        self.widths = [layer.to_v.out_features for layer in layers]
        self.neurons = sum(self.widths)

    def activations(self, embeds: PromptEmbeds) -> Tensor:
        """(B, neurons) float32, from the layers' value projections of the text alone."""
        text = embeds.embeds.to(self._model.device, self._model.dtype)
        return torch.cat([layer.to_v(text).float().abs().mean(1) for layer in self._layers], dim=1)

    def differences(self, prompts: Sequence[str]) -> Iterator[tuple[PromptEmbeds, Tensor]]:
        """Of each prompt its embeddings, and d of every seed (S, C, h, w)."""
        for embeds in _encoded(self._model, prompts):
            x = self._noise.repeat(len(embeds), 1, 1, 1)
            d = self._run(embeds.repeat(len(self._noise)), x)
            yield from ((embeds[i], of) for i, of in enumerate(d.split(len(self._noise))))

    def similarity(self, embeds: PromptEmbeds, noise: Tensor, unblocked: Tensor, masks: Tensor) -> Tensor:
        """Of masks (K, neurons), how similar (K,) the prompt's d stays to the `unblocked` of that noise."""
        seeds = len(noise)
        rows = masks.repeat_interleave(seeds, 0)
        d = self._run(embeds.repeat(len(rows)), noise.repeat(len(masks), 1, 1, 1), rows)
        return ms_ssim(unblocked.repeat(len(masks), 1, 1, 1), d).reshape(-1, seeds).amax(1)

    def _run(self, embeds: PromptEmbeds, x: Tensor, neurons: Tensor | None = None) -> Tensor:
        found: list[Tensor] = []
        first = 0
        while first < len(x):
            found.append(self.budget.run(partial(self._call, embeds, x, neurons, first)))
            first += len(found[-1])
        return torch.cat(found)

    def _call(self, embeds: PromptEmbeds, x: Tensor, neurons: Tensor | None, first: int, rows: int) -> Tensor:
        part = slice(first, first + rows)
        x = x[part]
        with blocked(self._layers, neurons[part]) if neurons is not None else nullcontext():
            return min_max(self._model.predict_noise(x, self._t, embeds[part]) - x)


def _encoded(model: DiffusionModel, prompts: Sequence[str]) -> Iterator[PromptEmbeds]:
    for first in range(0, len(prompts), _PROMPTS_A_BLOCK):
        yield model.encode_prompt(prompts[first : first + _PROMPTS_A_BLOCK])


def _usual(model: DiffusionModel, probe: _Probe, fresh: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every neuron's activation, (neurons,) float32."""
    total, squares = torch.zeros(2, probe.neurons, dtype=torch.float64, device=model.device)
    for embeds in _encoded(model, fresh):
        activations = probe.activations(embeds).double()
        total += activations.sum(0)
        squares += activations.square().sum(0)
    mean = total / len(fresh)
    variance = (squares - len(fresh) * mean**2) / (len(fresh) - 1)
    return mean.float(), variance.clamp_min(0).sqrt().float()


def _strengths(d: Tensor) -> Tensor:
    """The largest MS-SSIM of every seed's d with another's, (S,)."""
    first, second = torch.triu_indices(len(d), len(d), 1, device=d.device)
    pairs = ms_ssim(d[first], d[second])
    table = pairs.new_zeros(len(d), len(d))
    table[first, second] = table[second, first] = pairs
    return table.amax(1)


def _find(
    probe: _Probe,
    embeds: PromptEmbeds,
    noise: Tensor,
    d: Tensor,
    usual: tuple[Tensor, Tensor],
    threshold: float,
) -> tuple[Tensor, bool]:
    """The mask of a prompt's neurons on the CPU, and whether they solve it; noise and d of the kept seeds."""
    if not len(noise):
        return torch.zeros(probe.neurons, dtype=torch.bool), True
    mean, std = usual
    activation = probe.activations(embeds)[0]
    similarity = partial(probe.similarity, embeds, noise, d)
    most = max(1, probe.budget.rows // len(noise))
    selections = _selections(activation, (activation - mean).abs() / std, probe.widths)
    neurons, remaining = _select(selections, similarity, threshold, most)
    solved = remaining <= threshold
    neurons = _refine(
        neurons, similarity, threshold if solved else remaining + _NO_EFFECT, probe.widths, most
    )
    return neurons.cpu(), solved


def _selections(activation: Tensor, deviation: Tensor, widths: list[int]) -> Tensor:
    """Ever larger sets of neurons, (17, neurons): unusual ones, and each layer's most active ones."""
    rows = []
    for above, most in _SELECTIONS:
        top = [
            torch.zeros_like(of, dtype=torch.bool).scatter(0, of.topk(min(most, len(of))).indices, True)
            for of in activation.split(widths)
        ]
        rows.append((deviation > above) | torch.cat(top))
    return torch.stack(rows)


def _select(selections: Tensor, similarity: Similarity, threshold: float, most: int) -> tuple[Tensor, float]:
    """The first selection whose similarity is not above the threshold, else the last; `most` in a call."""
    different = torch.cat([selections[:1].any(1), (selections[1:] != selections[:-1]).any(1)])
    for group in selections[different].split(most):
        values = similarity(group).tolist()
        for neurons, value in zip(group, values, strict=True):
            if value <= threshold:
                return neurons, value
    return neurons, value


def _refine(
    neurons: Tensor, similarity: Similarity, threshold: float, widths: list[int], most: int
) -> Tensor:
    """Give back what does not matter: from the last layer to the first, whole layers, then single neurons."""
    layers = torch.eye(len(widths), dtype=torch.bool, device=neurons.device)
    layers = layers.repeat_interleave(torch.tensor(widths, device=neurons.device), dim=1).flip(0)
    neurons = _give_back(neurons, layers, similarity, threshold, most)
    singles = torch.cat([F.one_hot((layer & neurons).nonzero().flatten(), len(neurons)) for layer in layers])
    return _give_back(neurons, singles.bool(), similarity, threshold, most)


def _give_back(neurons: Tensor, parts: Tensor, similarity: Similarity, threshold: float, most: int) -> Tensor:
    """One part (row of `parts`) after the other, unless the similarity then is above the threshold.

    A call tries `most` parts, each together with all before it: if those are accepted, that is what one by
    one would try. What is behind the first that is not is tried again, without it.
    """
    parts = parts[(parts & neurons).any(1)]
    while len(parts):
        tried = neurons & (parts[:most].cumsum(0) == 0)
        values = similarity(tried).tolist()
        accepted = next((i for i, value in enumerate(values) if value > threshold), len(values))
        if accepted:
            neurons = tried[accepted - 1]
        parts = parts[accepted + 1 if accepted < len(values) else accepted :]
    return neurons


def _by_layer(
    layers: Sequence[CrossAttentionLayer], neurons: Tensor, widths: list[int]
) -> dict[str, list[int]]:
    """Indices of the neurons in each layer that has any."""
    parts = zip(layers, neurons.split(widths), strict=True)
    return {layer.name: part.nonzero().flatten().tolist() for layer, part in parts if bool(part.any())}
