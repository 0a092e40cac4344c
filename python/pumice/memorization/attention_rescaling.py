"""Attention moved away from the tokens that trigger a replay (Ren et al., ECCV 2024)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pumice.memorization.arguments import check_finite
from pumice.models import DiffusionModel, PromptTokens, UnsupportedModelError


@contextmanager
def rescaled_attention(
    model: DiffusionModel,
    tokens: Sequence[PromptTokens],
    *,
    scale: float = 1.25,
    rows: Sequence[bool] | Tensor | None = None,
) -> Iterator[None]:
    """Inside the block every cross-attention layer looks more at BOS and not at all at padding.

    ::

        attention = softmax_i( c_i q . k_i / sqrt(head_dim) + m_i )
        c_i = scale for BOS, in the conditional half, else 1
        m_i = -inf for padding, in both halves, else 0

    (Ren et al., arXiv:2403.11052.) Memorized prompts attend to tokens that say nothing, the padding among
    them. The logit of BOS is multiplied by way of its key, (c q) . k = q . (c k), so that fused attention
    stays. Attention processors and weights are not touched; the hooks are gone after the block, also after an
    error.

    Args:
        model: whose denoiser is called inside the block with N conditional samples, or with 2N in diffusers'
            order, [unconditional x N, conditional x N].
        tokens: of the prompts of the N samples; EOS is kept. Both halves lose the positions that are padding
            in the sample's own prompt.
        scale: c of BOS. Default 1.25, the released script's; above 1 it damps all other tokens, where the
            logit of BOS is positive.
        rows: (N,) bool, the samples to change. Default all.

    Differences from the released code: conditional samples are taken from the second half of the batch, not
    from every other row, which holds for one sample only.

    Raises:
        ValueError: if scale is not finite, there are no tokens or not as many rows, or, from inside, if the
            denoiser is called with another number of samples.
        UnsupportedModelError: if keys and values are fused, or the denoiser is compiled: its layers would not
            call the hooks.
    """
    check_finite("scale", scale)
    chosen = torch.as_tensor([True] * len(tokens) if rows is None else rows, device="cpu")
    if not len(tokens) or chosen.shape != (len(tokens),) or chosen.dtype != torch.bool:
        raise ValueError(
            f"tokens, rows: got {len(tokens)} prompts and rows {tuple(chosen.shape)} {chosen.dtype}, "
            "expected at least one prompt and a bool for each"
        )
    _check_hooks_run(model)
    samples, length = len(tokens), len(tokens[0].ids)
    factor = torch.ones(2 * samples, length, 1, dtype=torch.float64)
    bias = torch.zeros(2 * samples, 1, length)
    for row in chosen.nonzero().flatten().tolist():
        factor[samples + row, tokens[row].bos] = scale
        bias[[row, samples + row], :, tokens[row].pads.start : tokens[row].pads.stop] = -torch.inf
    factor, bias = (table.to(model.dtype).to(model.device) for table in (factor, bias))

    def of_batch(table: Tensor, batch: int) -> Tensor:
        if batch not in (samples, 2 * samples):
            raise ValueError(
                f"tokens: got {samples} prompts, expected as many as the samples of the denoiser's "
                f"call of {batch} rows, or half as many"
            )
        return table[-batch:]  # without guidance there is only the conditional half

    def scale_bos(to_k: nn.Module, args: tuple[Tensor, ...], key: Tensor) -> Tensor:
        return key * of_batch(factor, len(key))

    def mask_pads(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = kwargs.get("attention_mask")
        mask = of_batch(bias, len(args[0]))
        return args, kwargs | {"attention_mask": mask if given is None else given + mask}

    with ExitStack() as hooks:
        for layer in model.cross_attention.values():
            for hook in (
                layer.to_k.register_forward_hook(scale_bos),
                layer.module.register_forward_pre_hook(mask_pads, with_kwargs=True),
            ):
                hooks.callback(hook.remove)
        yield


def _check_hooks_run(model: DiffusionModel) -> None:
    compiled = hasattr(model.unet, "_orig_mod") or any(
        module._compiled_call_impl is not None for module in model.unet.modules()
    )
    if compiled:
        raise UnsupportedModelError(
            "model: its denoiser is compiled, and would not run the hooks of its layers; use the eager one"
        )
    for name, layer in model.cross_attention.items():
        if type(layer.module.processor).__name__.startswith("Fused"):
            raise UnsupportedModelError(
                f"{name}: its projections are fused, to_k is no longer read; "
                "call unfuse_qkv_projections() first"
            )
