"""Take memorized prompts out of a model's feed-forward weights: Wanda pruning (Chavhan et al., 2024)."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from pumice import models
from pumice.memorization import engine
from pumice.memorization.arguments import check_finite, checked_prompts, checked_seeds, checked_steps
from pumice.models import DiffusionModel, Edit, GuidedSampler, PromptEmbeds, RowBudget, Zeroed, fingerprint
from pumice.models.attention import check_plain

_PROMPTS_A_BLOCK = 64  # encoded together


@dataclass(frozen=True, eq=False)
class WandaStatistics:
    """How strongly prompts, and the empty prompt, drive the input columns of a model's feed-forward layers.

    Attributes:
        target: by layer, the norms A of the columns of its second linear's input, (steps, columns) float32.
        base: the same of the empty prompt, as if it had been run once for each of the prompts.
        prompts: that the target is of.
        fingerprint: of the model.
        settings: with which they were collected.
    """

    target: Mapping[str, Tensor]
    base: Mapping[str, Tensor]
    prompts: tuple[str, ...]
    fingerprint: str
    settings: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON."""
        return {
            "target": {name: norms.tolist() for name, norms in self.target.items()},
            "base": {name: norms.tolist() for name, norms in self.base.items()},
            "prompts": list(self.prompts),
            "fingerprint": self.fingerprint,
            "settings": dict(self.settings),
        }


@torch.inference_mode()
def wanda(
    pipe: Any,
    memorized: str | Sequence[str],
    *,
    sparsity: float = 0.01,
    steps: int = 10,
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    seeds: int | Sequence[int] = (0,),
    select_ratio: float = 0.0,
    rows: Literal["both", "cond"] = "both",
    batch_size: int = 32,
    progress: bool = False,
) -> Edit:
    """Find the feed-forward weights that serve memorized prompts more than the empty one, and zero them.

    ::

        h          input rows (tokens) of a block's second feed-forward linear W, each divided by its norm
        A[t, j]    = sqrt(sum over rows of h_j^2)    at step t: of the prompts, and of "" once for each prompt
        S[t, i, j] = |W_ij| A[t, j]
        M[t]       = the floor(sparsity columns) largest S_prompts of each row i  and  S_prompts > S_empty
        zeroed     = those in M[t] at more than  select_ratio steps  of the first `steps` steps

    (Wanda scores of Sun et al., arXiv:2306.11695, as used on memorized prompts by Chavhan et al.,
    arXiv:2406.18566.) Only the first `steps` steps are run, the empty prompt once for all prompts, and only
    the masks leave the device. For several sparsities collect `wanda_statistics` once and call `wanda_edit`
    for each.

    Args:
        pipe: a diffusers pipeline, a path, a hub id, or a DiffusionModel; it is not changed.
        memorized: prompts that replay training pictures, at least one.
        sparsity: share of each row's weights that a step may select, (0, 1]. Default 0.01, the paper's.
        steps: of the sampler that are used. Default 10, the released code's.
        num_inference_steps: of the sampler. Default 50, the paper's.
        guidance_scale: of the sampler. Default 7.5, the paper's.
        seeds: how many (0, 1, 2, ...), or which. Default seed 0, as released.
        select_ratio: share of the steps, [0, 1); a weight has to be selected at more of them. Default 0, the
            released code's: once is enough.
        rows: "both" counts the rows of both branches of guidance, as the paper does; "cond" those of the
            conditional one alone.
        batch_size: rows in one call of the denoiser, two for a prompt and seed; halved on out-of-memory.
        progress: show a bar.

    Returns:
        An `Edit` that zeroes the selected weights.

    Differences from the released code: DDIM without noise instead of PNDM, so 50 calls and not 51; rows are
    normalised in float32, where a zero row stays zero; of equal scores the lower column is selected.

    Raises:
        TypeError: if a prompt is not a string, or seeds or steps are not integers.
        ValueError: if there are no prompts or no seeds, for numbers out of range, or if predictions are not
            finite.
        UnsupportedModelError: if the model's family is not supported, or its feed-forward weights cannot be
            edited.
    """
    _check_selection(sparsity, select_ratio)
    model = models.load(pipe)
    statistics = wanda_statistics(
        model,
        memorized,
        steps=steps,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        seeds=seeds,
        rows=rows,
        batch_size=batch_size,
        progress=progress,
    )
    return _edit(model, statistics, sparsity, select_ratio)


@torch.inference_mode()
def wanda_statistics(
    pipe: Any,
    memorized: str | Sequence[str],
    *,
    steps: int = 10,
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    seeds: int | Sequence[int] = (0,),
    rows: Literal["both", "cond"] = "both",
    batch_size: int = 32,
    progress: bool = False,
) -> WandaStatistics:
    """Collect what `wanda` decides by: the first part of its work, and all of its calls of the denoiser.

    Args, Raises: as `wanda`.

    Returns:
        `WandaStatistics`, to make edits of any sparsity from by `wanda_edit`.
    """
    prompts = checked_prompts(memorized, "memorized")
    seeds = checked_seeds(seeds)
    check_finite("guidance_scale", guidance_scale)
    if rows not in ("both", "cond"):
        raise ValueError(f"rows: got {rows!r}, expected 'both' or 'cond'")
    budget = RowBudget(operator.index(batch_size))
    model = models.load(pipe)
    sampler = GuidedSampler(model, num_inference_steps, guidance_scale)
    steps = checked_steps(steps, len(sampler.timesteps))
    layers = feed_forward(model)
    noise = engine.initial_noise(seeds, model.latent_shape()).to(model.device)
    bar = tqdm(total=(len(prompts) + 1) * len(seeds), unit="row", disable=not progress, desc="wanda")
    with model.frozen(), bar:
        collector = _Collector(model, layers, sampler, noise, steps, rows == "both", budget, bar)
        target = collector(prompts)
        base = {name: sums * len(prompts) for name, sums in collector([""]).items()}
    target, base = ({name: sums.sqrt().float() for name, sums in of.items()} for of in (target, base))
    if not all(bool(norms.isfinite().all()) for of in (target, base) for norms in of.values()):
        raise ValueError(f"pipe: its feed-forward activations are not finite in {model.dtype}")
    settings = {
        "steps": steps,
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "seeds": list(seeds),
        "rows": rows,
    }
    return WandaStatistics(target, base, prompts, fingerprint(model), settings)


@torch.inference_mode()
def wanda_edit(
    pipe: Any, statistics: WandaStatistics, *, sparsity: float = 0.01, select_ratio: float = 0.0
) -> Edit:
    """Select by `statistics` of the same model the weights that `wanda` zeroes.

    Args:
        pipe: as for `wanda`.
        statistics: collected from it.
        sparsity, select_ratio: as for `wanda`.

    Returns:
        An `Edit`.

    Raises:
        ValueError: for numbers out of range, and for statistics of another model.
        UnsupportedModelError: if the feed-forward weights cannot be edited.
    """
    _check_selection(sparsity, select_ratio)
    model = models.load(pipe)
    if statistics.fingerprint != fingerprint(model):
        raise ValueError("statistics: they were collected from a model with other weights than pipe's")
    return _edit(model, statistics, sparsity, select_ratio)


def _edit(model: DiffusionModel, statistics: WandaStatistics, sparsity: float, select_ratio: float) -> Edit:
    layers = feed_forward(model)
    columns = max(layer.in_features for layer in layers.values())
    if selected_per_row(sparsity, columns) == 0:
        raise ValueError(f"sparsity: got {sparsity}, expected at least 1/{columns}, one weight of a row")
    changes = {
        f"{name}.weight": Zeroed.pack(
            select(layer.weight, statistics.target[name], statistics.base[name], sparsity, select_ratio)
        )
        for name, layer in layers.items()
    }
    settings = {"sparsity": sparsity, **statistics.settings, "select_ratio": select_ratio}
    return Edit(changes, statistics.fingerprint, "wanda", statistics.prompts, settings)


def select(weight: Tensor, target: Tensor, base: Tensor, sparsity: float, select_ratio: float) -> Tensor:
    """The mask of one layer: weight (rows, columns), target and base (steps, columns).

    As |W| is the same on both sides, S_prompts > S_empty is A_prompts > A_empty wherever W is not zero.
    """
    magnitude = weight.float().abs()
    stronger = (target > base).to(weight.device)
    count = selected_per_row(sparsity, weight.shape[1])
    times = torch.zeros_like(weight, dtype=torch.int32)
    for norms, columns in zip(target.to(weight.device), stronger, strict=True):
        times += largest(magnitude * norms, count) & columns
    return (times > select_ratio * len(target)) & (magnitude > 0)


def selected_per_row(sparsity: float, columns: int) -> int:
    """floor(sparsity columns), where 0.29 of 100 is 29."""
    return math.floor(sparsity * columns + 1e-9)


def largest(scores: Tensor, count: int) -> Tensor:
    """The mask of the `count` largest of every row of (rows, columns); of equal ones those further left."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    least = scores.topk(count, sorted=False).values.amin(1, keepdim=True)
    above, equal = scores > least, scores == least
    left = count - above.sum(1, keepdim=True)
    return above | (equal & (equal.cumsum(1, dtype=torch.int32) <= left))


def feed_forward(model: DiffusionModel) -> dict[str, nn.Linear]:
    """The second linear of the feed-forward of every transformer block, by its name in the denoiser.

    Raises:
        UnsupportedModelError: if one of them cannot be edited.
    """
    layers = {name: module for name, module in model.eager_unet.named_modules() if name.endswith(".ff.net.2")}
    for name, layer in layers.items():
        check_plain(name, layer)
    return cast(dict[str, nn.Linear], layers)


class _Collector:
    """Sums of the squares of normalised inputs over prompts x seeds, per layer (steps, columns) float64.

    A row's norm is its own, and sums of different calls are added in float64, so neither batches nor their
    order matter.
    """

    def __init__(
        self,
        model: DiffusionModel,
        layers: Mapping[str, nn.Linear],
        sampler: GuidedSampler,
        noise: Tensor,
        steps: int,
        both: bool,
        budget: RowBudget,
        bar: Any,
    ) -> None:
        self._model, self._layers, self._sampler, self._noise = model, layers, sampler, noise
        self._steps, self._both, self._budget, self._bar = steps, both, budget, bar

    def __call__(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        blocks = [prompts[i : i + _PROMPTS_A_BLOCK] for i in range(0, len(prompts), _PROMPTS_A_BLOCK)]
        embeds = PromptEmbeds.cat([self._model.encode_prompt(block) for block in blocks])
        uncond = self._model.unconditional()
        sums = {
            name: torch.zeros(self._steps, layer.in_features, dtype=torch.float64, device=layer.weight.device)
            for name, layer in self._layers.items()
        }
        first, total = 0, len(prompts) * len(self._noise)
        while first < total:
            count, found = self._budget.run(partial(self._trajectories, embeds, uncond, first, total))
            for name, added in found.items():
                sums[name] += added  # only now: a call that ran out of memory leaves nothing behind
            first += count
            self._bar.update(count)
        return sums

    def _trajectories(
        self, prompts: PromptEmbeds, uncond: PromptEmbeds, first: int, total: int, rows: int
    ) -> tuple[int, dict[str, Tensor]]:
        """As many as fit into a call of `rows` rows, from the first one on, and their sums."""
        count = min(max(rows // 2, 1), total - first)
        index = torch.arange(first, first + count)
        seeds = len(self._noise)
        both = PromptEmbeds.cat([uncond.repeat(count), prompts[(index // seeds).tolist()]])
        x = self._noise[(index % seeds).to(self._noise.device)]
        steps = []
        with self._watching(0 if self._both else count) as sums:
            for step, t in enumerate(self._sampler.t[: self._steps]):
                without, cond = self._model.predict(torch.cat([x, x]), t, both).float().chunk(2)
                x = self._sampler.step(step, x, cond, without).sample
                steps.append(dict(sums))
                sums.clear()
        return count, {name: torch.stack([found[name] for found in steps]) for name in self._layers}

    @contextmanager
    def _watching(self, first: int) -> Iterator[dict[str, Tensor]]:
        """Inside the block, what calls of each layer add, (columns,) float64, by samples from `first` on."""
        sums: dict[str, Tensor] = {}

        def watch(name: str, inputs: tuple[Tensor, ...]) -> None:
            squares = inputs[0][first:].float().square()
            squares /= squares.sum(-1, keepdim=True).clamp_min_(1e-24)  # a zero row adds nothing
            # added, as with forward chunking a layer is called several times
            sums[name] = sums.get(name, 0) + squares.sum(1).double().sum(0)

        handles = [
            layer.register_forward_pre_hook(lambda _, inputs, name=name: watch(name, inputs))
            for name, layer in self._layers.items()
        ]
        try:
            # a compiled denoiser would not see the hooks
            with torch.compiler.set_stance("force_eager"):
                yield sums
        finally:
            for handle in handles:
                handle.remove()


def _check_selection(sparsity: float, select_ratio: float) -> None:
    if not 0 < sparsity <= 1:
        raise ValueError(f"sparsity: got {sparsity}, expected a share in (0, 1]")
    if not 0 <= select_ratio < 1:
        raise ValueError(f"select_ratio: got {select_ratio}, expected a share in [0, 1)")
