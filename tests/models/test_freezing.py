from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from accelerate import cpu_offload
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

from pumice.models import DiffusionModel, load
from pumice.testbed.tiny import tiny_pipeline


@pytest.fixture
def model() -> DiffusionModel:
    """A model in a state that is neither all frozen nor all trainable, with a hook of its own."""
    pipe = tiny_pipeline("sdxl")
    pipe.unet.train()
    pipe.unet.mid_block.eval()
    pipe.vae.requires_grad_(False)
    pipe.text_encoder.get_input_embeddings().weight.requires_grad_(False)
    pipe.unet.register_forward_pre_hook(lambda *_: None)
    HookRegistry.check_if_exists_or_initialize(pipe.unet.mid_block).register_hook(ModelHook(), "theirs")
    return load(pipe)


def modules(model: DiffusionModel) -> list[nn.Module]:
    parts = [part for part in model.pipe.components.values() if isinstance(part, nn.Module)]
    return [module for part in parts for module in part.modules()]


def state(model: DiffusionModel) -> list[tuple]:
    return [
        (
            [parameter.requires_grad for parameter in module.parameters(recurse=False)],
            module.training,
            id(getattr(module, "processor", None)),
            list(module._forward_hooks.items()),
            list(module._forward_pre_hooks.items()),
            list(module._backward_hooks.items()),
            list(module._diffusers_hook.hooks) if hasattr(module, "_diffusers_hook") else [],
            {key: value.dtype for key, value in module.state_dict().items()},
        )
        for module in modules(model)
    ]


def disturb(model: DiffusionModel) -> None:
    model.unet.train()
    model.unet.requires_grad_(True)
    model.unet.set_attn_processor(AttnProcessor())
    model.unet.conv_in.register_forward_hook(lambda *_: None)
    model.unet.conv_out.register_full_backward_hook(lambda *_: None)
    model.unet._forward_pre_hooks.clear()
    for name in ("first", "second"):
        for module in (model.unet, model.unet.mid_block):
            HookRegistry.check_if_exists_or_initialize(module).register_hook(ModelHook(), name)


def test_everything_is_frozen_inside(model):
    with model.frozen():
        assert not any(p.requires_grad for module in modules(model) for p in module.parameters())
        assert not any(module.training for module in modules(model))
        images = torch.rand(1, 3, 32, 32, requires_grad=True)
        model.encode_image(images).sum().backward()
        assert images.grad.abs().sum() > 0


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_everything_is_put_back(model, error):
    latents = torch.ones(1, *model.latent_shape())
    predicted = model.predict(latents, 500, model.encode_prompt("a cat"))
    before = state(model)

    def borrow() -> None:
        with model.frozen():
            disturb(model)
            if error:
                raise error

    with pytest.raises(error) if error else nullcontext():
        borrow()
    assert state(model) == before
    assert torch.equal(model.predict(latents, 500, model.encode_prompt("a cat")), predicted)


@pytest.mark.parametrize("trained", [False, True])
def test_parameters_that_offloading_exchanges_inside_are_put_back(trained):
    model = load(tiny_pipeline("sd1"))
    model.vae.requires_grad_(trained)
    cpu_offload(model.vae, "cpu")
    before = dict(model.vae.named_parameters())
    with model.frozen():
        model.encode_image(torch.rand(1, 3, 32, 32))
        assert not any(parameter.requires_grad for parameter in model.vae.parameters())
    after = dict(model.vae.named_parameters())
    assert any(after[name] is not parameter for name, parameter in before.items())
    assert all(parameter.requires_grad == trained for parameter in after.values())


def test_prompts_first_encoded_inside_are_encoded_afterwards(model):
    with model.frozen():  # transformers adds hooks of its own at the first call, and only then
        inside = model.encode_prompt("a cat")
    assert torch.equal(model.encode_prompt("a cat").embeds, inside.embeds)


def test_blocks_nest(model):
    before = state(model)
    with model.frozen():
        inside = state(model)
        with model.frozen():
            disturb(model)
        assert state(model) == inside
    assert state(model) == before


def test_a_processor_with_weights_makes_room_for_the_one_before(model):
    class Trained(nn.Module):
        def __call__(self, attn, hidden_states, *args, **kwargs):
            return AttnProcessor()(attn, hidden_states, *args, **kwargs)

    before = state(model)
    with model.frozen():
        model.cross_attention["mid_block.attentions.0.transformer_blocks.0.attn2"].module.set_processor(
            Trained()
        )
    assert state(model) == before
