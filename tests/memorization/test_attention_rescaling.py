"""Rescaled attention against the softmax written out in float64, and what it must leave alone."""

import pytest
import torch
from torch import nn

from pumice import models
from pumice.memorization.attention_rescaling import rescaled_attention
from pumice.models import UnsupportedModelError
from pumice.testbed import tiny_pipeline

PROMPTS = ["a red cat", "a photo of a dog in the city by the sea", "house"]


def by_hand(layer, x, embeds, logit_factor, masked):
    """Output of one cross-attention layer, logits and softmax explicit."""
    attention = layer.module
    q, k, v = attention.to_q(x), attention.to_k(embeds), attention.to_v(embeds)
    q, k, v = (part.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for part in (q, k, v))
    logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    logits = (logits * logit_factor[:, None, None, :]).masked_fill(masked[:, None, None, :], -torch.inf)
    out = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
    return attention.to_out[0](out)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("rows", [None, [True, False, True]])
@torch.no_grad()
def test_every_layer_equals_the_softmax_by_hand(family, rows):
    pipe = tiny_pipeline(family)
    pipe.unet.double()
    model = models.load(pipe)
    tokens = model.tokenize(PROMPTS)
    generator = torch.Generator().manual_seed(0)
    chosen = [True] * 3 if rows is None else rows
    factor, masked = torch.ones(6, 77).double(), torch.zeros(6, 77, dtype=torch.bool)
    for i, prompt in enumerate(tokens):
        if chosen[i]:
            factor[3 + i, 0] = 1.4
            masked[[i, 3 + i], prompt.eos + 1 :] = True
    for layer in model.cross_attention.values():
        x = torch.randn(6, 10, layer.module.to_q.in_features, generator=generator).double()
        embeds = torch.randn(6, 77, layer.to_k.in_features, generator=generator).double()
        with rescaled_attention(model, tokens, scale=1.4, rows=rows):
            changed = layer.module(x, encoder_hidden_states=embeds)
            # 32 padding tokens more or less: what they hold does not matter where they are masked
            other = embeds.masked_fill(masked[..., None], 1e3)
            assert torch.equal(layer.module(x, encoder_hidden_states=other), changed)
            # without guidance there is only the conditional half
            half = layer.module(x[3:], encoder_hidden_states=embeds[3:])
        torch.testing.assert_close(changed, by_hand(layer, x, embeds, factor, masked), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(half, changed[3:], rtol=1e-10, atol=1e-12)
        assert not torch.allclose(changed[3], layer.module(x, encoder_hidden_states=embeds)[3])


@torch.no_grad()
def test_samples_that_are_not_chosen_keep_their_predictions():
    model = models.load(tiny_pipeline("sd1"))
    embeds = models.PromptEmbeds.cat([model.unconditional()] * 3 + [model.encode_prompt(PROMPTS)])
    x = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(1)).repeat(2, 1, 1, 1)
    plain = model.predict(x, 500, embeds)
    with rescaled_attention(model, model.tokenize(PROMPTS), rows=[False, True, False]):
        changed = model.predict(x, 500, embeds)
    kept = [0, 2, 3, 5]
    torch.testing.assert_close(changed[kept], plain[kept], rtol=1e-5, atol=1e-6)
    assert (changed[[1, 4]] - plain[[1, 4]]).abs().amax((1, 2, 3)).min() > 1e-4


@torch.no_grad()
def test_a_mask_of_the_caller_stays():
    model = models.load(tiny_pipeline("sd1"))
    layer = next(iter(model.cross_attention.values()))
    x, embeds = torch.randn(2, 10, 16), torch.randn(2, 77, 32)
    mask = torch.zeros(2, 1, 77)
    mask[:, :, 3] = -torch.inf
    with rescaled_attention(model, model.tokenize(["a red cat"])):
        masked = layer.module(x, encoder_hidden_states=embeds, attention_mask=mask)
        embeds[:, 3] = 1e3
        assert torch.equal(layer.module(x, encoder_hidden_states=embeds, attention_mask=mask), masked)


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_leaves_no_hook_behind(error):
    model = models.load(tiny_pipeline("sd1"))
    processors = {name: id(processor) for name, processor in model.unet.attn_processors.items()}
    try:
        with rescaled_attention(model, model.tokenize(PROMPTS)):
            if error:
                raise error
    except (RuntimeError, KeyboardInterrupt):
        pass
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.unet.modules())
    assert processors == {name: id(processor) for name, processor in model.unet.attn_processors.items()}


BAD = {
    "a scale of NaN": ({"scale": float("nan")}, "scale: got nan, expected a finite number"),
    "no prompts": ({"tokens": []}, "tokens, rows: got 0 prompts"),
    "too few rows": ({"rows": [True]}, r"tokens, rows: got 3 prompts and rows \(1,\)"),
    "indices for rows": ({"rows": [0, 1, 2]}, r"tokens, rows: got 3 prompts and rows \(3,\) torch.int64"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_that_names_the_argument(change, message):
    model = models.load(tiny_pipeline("sd1"))
    arguments = {"tokens": model.tokenize(PROMPTS)} | change
    with (
        pytest.raises(ValueError, match=message) as caught,
        rescaled_attention(model, arguments.pop("tokens"), **arguments),
    ):
        pass
    assert "\n" not in str(caught.value)


@torch.no_grad()
def test_another_number_of_samples_is_refused():
    model = models.load(tiny_pipeline("sd1"))
    with (
        rescaled_attention(model, model.tokenize(PROMPTS)),
        pytest.raises(ValueError, match="tokens: got 3 prompts, expected as many as the samples"),
    ):
        model.predict(torch.randn(4, 4, 16, 16), 500, model.unconditional())


def test_layers_whose_hooks_would_not_run_are_refused():
    model = models.load(tiny_pipeline("sd1"))
    tokens = model.tokenize(PROMPTS)
    model.pipe.unet.fuse_qkv_projections()
    fused = pytest.raises(UnsupportedModelError, match="attn2: its projections are fused")
    with fused, rescaled_attention(model, tokens):
        pass
    model.pipe.unet.unfuse_qkv_projections()
    model.pipe.unet.mid_block.compile(backend="eager")
    compiled = pytest.raises(UnsupportedModelError, match="model: its denoiser is compiled")
    with compiled, rescaled_attention(model, tokens):
        pass


def test_every_layer_is_hooked():
    model = models.load(tiny_pipeline("sdxl"))
    with rescaled_attention(model, model.tokenize("a cat")):
        for layer in model.cross_attention.values():
            assert isinstance(layer.to_k, nn.Linear) and len(layer.to_k._forward_hooks) == 1
            assert len(layer.module._forward_pre_hooks) == 1
