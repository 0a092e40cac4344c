"""Which words of a prompt make a model replay a picture: token-wise significance (Wen et al., ICLR 2024)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pumice import models
from pumice.models import DiffusionModel, PromptEmbeds, PromptTokens, RowBudget

from .arguments import check_finite, check_first_step, checked_prompts, checked_seeds, checked_steps
from .engine import Screen

T = TypeVar("T")

_FLOAT16_LOSS_SCALE = 2.0**10  # d|x|/dx of 16384 latents is about 1/128 an element; tokens' shares underflow


@dataclass(frozen=True)
class WordScore:
    """How strongly the tokens at `positions`, together, pull the prediction."""

    text: str
    positions: range
    score: float


@dataclass(frozen=True, eq=False)
class Explanation:
    """What each token and word of one prompt contributes, from S seeds and T steps.

    Attributes:
        prompt: as it was given.
        tokens: what stands at each of the L positions.
        gradients: (S, T, L) float32, |dm/de_i| of each seed, step and token; NaN where a step was left out
            because its gradient was not finite. With variant "wen" (1, T, L): its gradient is of all seeds.
        magnitudes: (S, T) float32, |epsilon_cond - epsilon_uncond|.
        seeds: of the S initial noises.
        timesteps: of the T steps.
    """

    prompt: str
    tokens: PromptTokens
    gradients: Tensor
    magnitudes: Tensor
    seeds: tuple[int, ...]
    timesteps: tuple[int, ...]

    @property
    def token_scores(self) -> Tensor:
        """(L,), the mean of `gradients` over seeds and steps, special tokens included."""
        return self.gradients.nanmean((0, 1))

    @property
    def step_scores(self) -> Tensor:
        """(T, L), the mean over seeds; NaN for a step that was left out for all of them."""
        return self.gradients.nanmean(0)

    @property
    def words(self) -> tuple[WordScore, ...]:
        """The prompt's words in order."""
        return tuple(self._scored(word.text, word.positions) for word in self.tokens.words)

    @property
    def special(self) -> tuple[WordScore, ...]:
        """Beginning, end and padding: through them a causal text encoder hands on the whole prompt."""
        tokens = self.tokens
        places = {
            "<bos>": range(tokens.bos, tokens.bos + 1),
            "<eos>": range(tokens.eos, tokens.eos + 1),
            "<pads>": tokens.pads,
        }
        return tuple(self._scored(text, positions) for text, positions in places.items() if positions)

    @property
    def magnitude(self) -> float:
        """The mean of `magnitudes`, by which `detect` scores a prompt with the metric `Magnitude`."""
        return float(self.magnitudes.nanmean())

    @property
    def left_out(self) -> int:
        """How many of the gradients were not finite and are not in the scores."""
        return int(self.gradients[:, :, 0].isnan().sum())

    def ranking(self, *, include_special: bool = False) -> tuple[WordScore, ...]:
        """The words, strongest first; with the special tokens among them where asked for."""
        scored = self.words + (self.special if include_special else ())
        return tuple(sorted(scored, key=lambda word: -word.score))

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON; None is a step that was left out for all seeds."""
        return {
            "prompt": self.prompt,
            "magnitude": self.magnitude,
            "words": [{"text": word.text, "score": word.score} for word in self.words],
            "special": [{"text": word.text, "score": word.score} for word in self.special],
            "token_scores": self.token_scores.tolist(),
            "step_scores": [None if row.isnan().any() else row.tolist() for row in self.step_scores],
            "left_out": self.left_out,
            "seeds": list(self.seeds),
            "timesteps": list(self.timesteps),
        }

    def _scored(self, text: str, positions: range) -> WordScore:
        """The norm of the gradient by all these tokens jointly, averaged as single tokens are."""
        joint = self.gradients[:, :, positions.start : positions.stop].norm(dim=2)
        return WordScore(text, positions, float(joint.nanmean()))


@torch.inference_mode(False)  # a caller's inference mode would leave nothing to differentiate
@torch.no_grad()
def explain(
    pipe: Any,
    prompts: str | Sequence[str],
    *,
    seeds: int | Sequence[int] = 1,
    steps: int | None = 1,
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    wrt: Literal["embedding", "input"] = "embedding",
    variant: Literal["wen"] | None = None,
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 8,
    progress: bool = False,
) -> tuple[Explanation, ...]:
    """Score tokens and words by how much the magnitude (see `Magnitude`) of their prompt depends on them.

    ::

        m[s, t]  = |epsilon(x_t, t, e) - epsilon(x_t, t, e_empty)|_2    over (C, h, w), x_T the noise of s
        token i  = mean over s and t of |dm/de_i|_2
        word     = mean over s and t of sqrt(sum over its tokens i of |dm/de_i|_2^2)

    (Wen et al., arXiv:2407.21720, token-wise significance.) Norms are per sample, in float32, and in epsilon
    whatever the model predicts; x_t follows DDIM with guidance. Only the branch with the prompt is
    differentiated, and the weights are frozen. At the first step the branch without is computed once a seed.

    Args:
        pipe: a diffusers pipeline, a path, a hub id, or a DiffusionModel.
        prompts: one or more.
        seeds: how many (0, 1, 2, ...), or which; the same ones for every prompt. Default 1; the released
            notebook takes 4.
        steps: how many of the sampler's first steps to average over; None for all, as in the notebook.
            Default 1, the cheapest setting: memorized prompts pull hardest there.
        num_inference_steps: of the DDIM sampler. Default 50, the paper's.
        guidance_scale: of the sampler, from the second step on. Default 7.5, the paper's.
        wrt: what e_i is. "embedding", the paper's: the text encoder's output, in which a token carries all
            before it, and the special tokens much of the prompt. "input": the token embedding that goes into
            the text encoder; one more backward of the text encoder, and the words that it ranks first are
            far more often those that matter (benchmarks/e2e_explain.py). Of Stable Diffusion XL, e_i is what
            both encoders have at position i; its pooled embedding belongs to no position: with "embedding"
            it is held constant, with "input" it depends on the tokens as the rest does.
        variant: "wen" for what the released code computes, see below.
        height, width: of the pictures, in px; default the model's own.
        batch_size: prompts x seeds in one call of the denoiser; halved on out-of-memory.
        progress: show a bar.

    Returns:
        A tuple with one `Explanation` a prompt, in order. A gradient that is not finite is left out of the
        means, and counted.

    Differences of the released code, which "wen" reproduces: (1) it exchanges the two predictions in the
    guidance, so that from the second step on x_t is guided away from the prompt; (2) its magnitude is one
    norm over the batch of N seeds, M = sqrt(sum_s m_s^2), of one embedding for all of them, so that seeds
    are summed before the norm is taken; (3) it averages over 2N rows of which one is not zero::

        token i = mean over t of |sum_s m_s dm_s/de_i|_2 / (2 N M)

    At one seed and the first step that is half of ours. Not reproduced: its norms in the model's dtype, its
    float16 backward without loss scaling, and its v-predictions taken as epsilon.

    Raises:
        TypeError: if a prompt is not a string, or seeds or steps are not integers.
        ValueError: if there are no prompts or no seeds, a prompt has no tokens of its own, for numbers out of
            range, unknown options, a model whose first step is pure noise (zero terminal SNR), and one that
            has no finite gradient at any step of some prompt and seed.
        UnsupportedModelError: if the model's family is not supported.
    """
    prompts = checked_prompts(prompts)
    seeds = checked_seeds(seeds)
    check_finite("guidance_scale", guidance_scale)
    if wrt not in ("embedding", "input"):
        raise ValueError(f"wrt: got {wrt!r}, expected 'embedding' or 'input'")
    if variant not in (None, "wen"):
        raise ValueError(f"variant: got {variant!r}, expected 'wen' or None")
    model = models.load(pipe)
    tokens = model.tokenize(prompts)
    for prompt, places in zip(prompts, tokens, strict=True):
        if not places.words:
            raise ValueError(f"prompts: got {prompt!r}, expected words; it has none that could be explained")

    bar = tqdm(total=len(prompts) * len(seeds), unit="row", disable=not progress, desc="explain")
    with model.frozen(), bar:
        screen = Screen(
            model,
            seeds,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            height=height,
            width=width,
            batch_size=batch_size,
        )
        steps = checked_steps(steps, len(screen.sampler.timesteps))
        timesteps = tuple(screen.sampler.timesteps[:steps].tolist())
        check_first_step(model, timesteps[0])
        rows = _Rows(screen, prompts, steps, wrt, variant == "wen", RowBudget(batch_size), bar.update)
        gradients, magnitudes = rows.all_seeds() if variant == "wen" else rows.each_seed()
    finite = gradients.isfinite().all(dim=3)
    lost = ~finite.any(dim=2).all(dim=1)
    if bool(lost.any()):
        raise ValueError(
            f"pipe: its gradients for {int(lost.sum())} of {len(prompts)} prompts are not finite "
            f"in {model.dtype}"
        )
    gradients = gradients.where(finite[..., None], torch.nan)
    return tuple(
        Explanation(
            prompt=prompt,
            tokens=tokens[index],
            gradients=gradients[index].float(),
            magnitudes=magnitudes[index].float(),
            seeds=seeds,
            timesteps=timesteps,
        )
        for index, prompt in enumerate(prompts)
    )


class _Rows:
    """Trajectories of (prompt, seed) pairs, numbered prompt by prompt, and the gradients along them."""

    def __init__(
        self,
        screen: Screen,
        prompts: Sequence[str],
        steps: int,
        wrt: str,
        swapped: bool,
        budget: RowBudget,
        advance: Callable[[int], object],
    ) -> None:
        self._screen, self._prompts, self._steps = screen, prompts, steps
        self._wrt, self._swapped, self._budget, self._advance = wrt, swapped, budget, advance
        self._loss_scale = _FLOAT16_LOSS_SCALE if screen.model.dtype == torch.float16 else 1.0

    def each_seed(self) -> tuple[Tensor, Tensor]:
        """|dm/de_i| (P, S, T, L), and m (P, S, T), on the CPU."""
        shape = (len(self._prompts), len(self._screen.noise))
        calls = _calls(range(shape[0] * shape[1]), self._budget, self._norms)
        gradients, magnitudes = (torch.cat(parts).cpu() for parts in zip(*calls, strict=True))
        return gradients.unflatten(0, shape), magnitudes.unflatten(0, shape)

    def all_seeds(self) -> tuple[Tensor, Tensor]:
        """The released code's token scores (P, 1, T, L), and m (P, S, T), on the CPU."""
        seeds = len(self._screen.noise)
        found = []
        for first in range(0, len(self._prompts) * seeds, seeds):
            calls = _calls(range(first, first + seeds), self._budget, self._weighted_sums)
            sums, parts = zip(*calls, strict=True)
            magnitudes = torch.cat(parts)
            gradient = sum(sums) / magnitudes.norm(dim=0)[:, None, None]
            found.append((gradient.norm(dim=2)[None] / (2 * seeds), magnitudes))
        gradients, all_magnitudes = (torch.stack(parts).cpu() for parts in zip(*found, strict=True))
        return gradients, all_magnitudes

    def _norms(self, rows: range) -> tuple[Tensor, Tensor]:
        """|dm/de_i| (R, T, L), and m (R, T)."""
        steps = [(gradient.norm(dim=2), magnitude) for gradient, magnitude in self._walk(rows)]
        gradients, magnitudes = (torch.stack(parts, dim=1) for parts in zip(*steps, strict=True))
        return gradients, magnitudes

    def _weighted_sums(self, rows: range) -> tuple[Tensor, Tensor]:
        """The sum of m dm/de over the rows, (T, L, D), and m (R, T)."""
        steps = [(torch.einsum("r,rld->ld", m, gradient), m) for gradient, m in self._walk(rows)]
        sums, magnitudes = zip(*steps, strict=True)
        return torch.stack(sums), torch.stack(magnitudes, dim=1)

    def _walk(self, rows: range) -> Iterator[tuple[Tensor, Tensor]]:
        """At each step, dm/de (R, L, D) and m (R,)."""
        screen = self._screen
        places, seeds = zip(*(divmod(row, len(screen.noise)) for row in rows), strict=True)
        x, uncond = screen.noise[list(seeds)], screen.unconditional(0)[list(seeds)]
        if self._wrt == "embedding":
            texts = self._prompts[places[0] : places[-1] + 1]
            embeds = screen.model.encode_prompt(texts)[[place - places[0] for place in places]]
            leaves = [embeds.embeds.requires_grad_()]
        for step in range(self._steps):
            if step > 0:
                uncond = screen.predict(x, step)
            with torch.enable_grad():
                if self._wrt == "input":
                    leaves, embeds = _cut_at_the_input(screen.model, [self._prompts[i] for i in places])
                cond = screen.predict(x, step, embeds)
                # its gradient at 0 is 0, where that of a square root is NaN
                magnitude = torch.linalg.vector_norm(screen.difference(cond, uncond, step).flatten(1), dim=1)
                # a sum, as a row's magnitude depends on its own copy of the embedding alone
                parts = torch.autograd.grad(magnitude.sum() * self._loss_scale, leaves)
            gradient = torch.cat([part.float() for part in parts], dim=2) / self._loss_scale
            yield gradient, magnitude.detach()
            if step + 1 < self._steps:
                toward, away = (uncond, cond.detach()) if self._swapped else (cond.detach(), uncond)
                x = screen.sampler.step(step, x, toward, away).sample
        self._advance(len(rows))


def _cut_at_the_input(model: DiffusionModel, prompts: Sequence[str]) -> tuple[list[Tensor], PromptEmbeds]:
    """The token embeddings (R, L, D) that each text encoder reads, as leaves, and what it makes of them."""
    leaves: list[Tensor] = []

    def cut(module: object, args: object, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    hooks = [encoder.get_input_embeddings().register_forward_hook(cut) for encoder in model.text_encoders]
    try:
        return leaves, model.encode_prompt(prompts)
    finally:
        for hook in hooks:
            hook.remove()


def _calls(rows: range, budget: RowBudget, work: Callable[[range], T]) -> Iterator[T]:
    """`work` on all rows in turn, as many at once as the budget has."""
    while rows:
        yield budget.run(lambda size, rest=rows: work(rest[:size]))  # type: ignore[misc]
        rows = rows[budget.rows :]
