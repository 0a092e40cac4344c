from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from torch import nn

from pumice.models import DiffusionModel, UnsupportedModelError, load
from pumice.testbed.tiny import tiny_pipeline

MID = "mid_block.attentions.0.transformer_blocks.0.attn2"


def predict(model: DiffusionModel) -> torch.Tensor:
    latents = torch.ones(1, *model.latent_shape())
    with torch.no_grad():
        return model.predict_noise(latents, 500, model.encode_prompt("a cat"))


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_layers_are_listed_in_the_order_in_which_they_run(family):
    model = load(tiny_pipeline(family))
    ran: list[str] = []
    for name, layer in model.cross_attention.items():
        assert layer.name == name
        assert layer.module is model.unet.get_submodule(name)
        assert layer.to_k.in_features == layer.to_v.in_features == model.unet.config.cross_attention_dim
        assert layer.to_k.out_features % layer.heads == 0
        layer.module.register_forward_hook(lambda *_, name=name: ran.append(name))
    predict(model)
    assert list(model.cross_attention) == ran
    everything = [name for name, _ in model.unet.named_modules() if name.endswith("attn2")]
    assert sorted(ran) == sorted(everything)


def test_a_compiled_denoiser_has_the_same_names():
    pipe = tiny_pipeline("sd1")
    names = list(load(pipe).cross_attention)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    model = load(pipe)
    assert list(model.cross_attention) == names
    model.check_editable()


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_plain_model_is_editable_and_edits_change_its_predictions(family):
    model = load(tiny_pipeline(family))
    model.check_editable()
    before = predict(model)
    with torch.no_grad():
        model.cross_attention[MID].to_v.weight.mul_(3.0)
    assert not torch.allclose(predict(model), before)


def refuses(model: DiffusionModel, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        model.check_editable()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_fused_projections_are_refused(family):
    pipe = tiny_pipeline(family)
    before = predict(load(pipe))
    pipe.fuse_qkv_projections()
    model = load(pipe)
    torch.testing.assert_close(predict(model), before)
    with torch.no_grad():
        model.cross_attention[MID].to_v.weight.mul_(3.0)
    torch.testing.assert_close(predict(model), before)  # the trap: the edit is not seen
    refuses(model, "projections are fused.*unfuse_qkv_projections")
    pipe.unfuse_qkv_projections()
    model.check_editable()
    assert not torch.allclose(predict(model), before)


def test_lora_adapters_are_refused_until_unloaded():
    pipe = tiny_pipeline("sd1")
    before = predict(load(pipe))
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights="gaussian"))
    model = load(pipe)
    torch.testing.assert_close(predict(model), before)
    refuses(model, "down_blocks.*to_k: a LoRA adapter is attached; call unload_lora_weights")
    pipe.unload_lora_weights()
    model.check_editable()


class Packed(torch.Tensor):
    """Stands for the tensor subclasses that quantisation libraries keep weights in."""


class Wrapped(nn.Linear):
    """Stands for the linears that quantisation libraries put in place of nn.Linear."""


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda linear: setattr(linear, "weight", nn.Parameter(linear.weight.to(torch.int8), False)),
            "a torch.int8",
        ),
        (
            lambda linear: linear.to(torch.float8_e4m3fn),
            "a torch.float8_e4m3fn Tensor, expected float16 or wider",
        ),
        (
            lambda linear: setattr(linear, "weight", nn.Parameter(linear.weight.data.as_subclass(Packed))),
            "Packed",
        ),
        (lambda linear: linear.to("meta"), "offloaded"),
        (lambda linear: setattr(linear, "__class__", Wrapped), r"it is a Wrapped \(quantised or wrapped\)"),
        (lambda linear: nn.utils.parametrizations.weight_norm(linear), "it is a ParametrizedLinear"),
    ],
    ids=["int8", "float8", "subclass", "meta", "class", "parametrized"],
)
def test_weights_that_are_not_plain_are_refused(spoil, message):
    model = load(tiny_pipeline("sd1"))
    spoil(model.cross_attention[MID].to_v)
    refuses(model, f"{MID}.to_v: .*{message}")
    model.check_editable(layer for name, layer in model.cross_attention.items() if name != MID)


def test_layerwise_casting_still_predicts_but_is_not_editable():
    pipe = tiny_pipeline("sd1")
    before = predict(load(pipe))
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    model = load(pipe)
    assert model.dtype == torch.float32
    torch.testing.assert_close(predict(model), before, rtol=0.2, atol=0.2)
    refuses(model, "float8")


def test_offloaded_weights_still_predict_but_are_not_editable():
    accelerate = pytest.importorskip("accelerate")
    pipe = tiny_pipeline("sd1")
    before = predict(load(pipe))
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        accelerate.cpu_offload(part, execution_device=torch.device("cpu"))
    model = load(pipe)
    assert model.device == torch.device("cpu")
    torch.testing.assert_close(predict(model), before)
    refuses(model, "its weight is offloaded")
    assert model.decode_latents(model.encode_image(torch.zeros(1, 3, 32, 32))).isfinite().all()
