"""What a watcher is told against the weights that a plain attention computes; nothing else changes."""

import pytest
import torch

from pumice import models
from pumice.models import watch_attention
from pumice.testbed import tiny_pipeline

FAMILIES = ["sd1", "sd2", "sdxl"]


def inputs(model):
    torch.manual_seed(0)
    return torch.randn(2, *model.latent_shape()), 500, model.encode_prompt(["a cat", "a red house"])


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_probabilities_reproduce_every_layers_output(family):
    """The output rebuilt from them, to_v and to_out is the layer's own: they are what it attends by."""
    model = models.load(tiny_pipeline(family))
    seen, outputs, handles = {}, {}, []
    for name, layer in model.cross_attention.items():

        def keep(module, args, kwargs, output, name=name):
            outputs[name] = (kwargs["encoder_hidden_states"], output)

        handles.append(layer.module.register_forward_hook(keep, with_kwargs=True))
    with watch_attention(model.cross_attention.values(), seen.__setitem__):
        model.predict(*inputs(model))
    assert list(seen) == list(model.cross_attention), "told in the order of execution"
    for name, layer in model.cross_attention.items():
        text, output = outputs[name]
        values = layer.to_v(text).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
        rebuilt = layer.module.to_out[0]((seen[name] @ values).transpose(1, 2).flatten(2))
        torch.testing.assert_close(rebuilt, output, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(seen[name].sum(-1), torch.ones(seen[name].shape[:-1]))


@torch.no_grad()
def test_a_mask_hides_tokens():
    model = models.load(tiny_pipeline("sd1"))
    x, t, embeds = inputs(model)
    hidden = torch.zeros(2, 77).bool()
    hidden[:, 9:] = True
    seen = {}
    with watch_attention(model.cross_attention.values(), seen.__setitem__):
        model.unet(x, t, encoder_hidden_states=embeds.embeds, encoder_attention_mask=~hidden)
    for probabilities in seen.values():
        assert probabilities[..., 9:].max() < 1e-6 < probabilities[..., :9].min()


@torch.no_grad()
def test_watching_changes_nothing_and_ends():
    model = models.load(tiny_pipeline("sd1"))
    expected, count = model.predict(*inputs(model)), []
    with watch_attention(model.cross_attention.values(), lambda name, _: count.append(name)):
        assert torch.equal(model.predict(*inputs(model)), expected)
    assert len(count) == len(model.cross_attention)
    model.predict(*inputs(model))
    assert len(count) == len(model.cross_attention)


@torch.no_grad()
def test_an_exception_leaves_the_forward_pass_and_the_hooks_go():
    model = models.load(tiny_pipeline("sd1"))
    layers = list(model.cross_attention.values())

    def stop(name, probabilities):
        raise KeyError(name)

    with pytest.raises(KeyError, match=layers[2].name), watch_attention(layers[2:], stop):
        model.predict(*inputs(model))
    assert not any(layer.module._forward_pre_hooks for layer in layers)


@torch.no_grad()
def test_a_compiled_denoiser_is_watched_too():
    model = models.load(tiny_pipeline("sd1"))
    model.pipe.unet = torch.compile(model.unet, backend="eager")
    model.predict(*inputs(model))  # compiled without hooks
    seen = {}
    with watch_attention(model.cross_attention.values(), seen.__setitem__):
        model.predict(*inputs(model))
    assert list(seen) == list(model.cross_attention)
