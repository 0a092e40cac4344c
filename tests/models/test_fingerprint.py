"""A fingerprint belongs to the weights and to nothing else."""

import hashlib

import pytest
import torch

from pumice import models
from pumice.models import UnsupportedModelError, drawing_state, fingerprint
from pumice.testbed import tiny_pipeline


def test_sees_every_edit():
    pipe = tiny_pipeline("sd1")
    model = models.load(pipe)
    seen = {fingerprint(model)}
    layer = next(iter(model.cross_attention.values()))
    for weight in (layer.to_k.weight, pipe.text_encoder.get_input_embeddings().weight):
        with torch.no_grad():
            weight[0, 0] += 1
        assert fingerprint(model) not in seen
        seen.add(fingerprint(model))
    assert fingerprint(models.load(tiny_pipeline("sd1"))) in seen


def test_is_the_sha256_of_names_shapes_dtypes_and_bytes():
    model = models.load(tiny_pipeline("sd1").to(torch.bfloat16))
    digest = hashlib.sha256()
    for part in (model.unet, *model.text_encoders):
        for name, weight in part.state_dict().items():
            bits = weight.flatten().view(torch.int16 if weight.dtype == torch.bfloat16 else weight.dtype)
            digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode() + bits.numpy().tobytes())
    assert fingerprint(model) == digest.hexdigest()


def test_another_scheduler_and_memory_layout_change_nothing():
    pipe = tiny_pipeline("sd1")
    before = fingerprint(models.load(pipe))
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.scheduler = tiny_pipeline("sd2").scheduler
    assert fingerprint(models.load(pipe)) == before


def test_a_compiled_denoiser_has_the_same_weights():
    pipe = tiny_pipeline("sd1")
    before = fingerprint(models.load(pipe))
    pipe.unet = torch.compile(pipe.unet)
    assert fingerprint(models.load(pipe)) == before


def test_an_adapters_scale_and_switch_count():
    from peft import LoraConfig

    pipe = tiny_pipeline("sd1")
    pipe.unet.add_adapter(LoraConfig(target_modules=["to_k"], r=2, init_lora_weights=False))
    seen = {fingerprint(models.load(pipe))}
    pipe.unet.set_adapters("default", 0.5)
    seen.add(fingerprint(models.load(pipe)))
    pipe.unet.disable_adapters()
    seen.add(fingerprint(models.load(pipe)))
    assert len(seen) == 3


def test_offloaded_weights_are_refused():
    pipe = tiny_pipeline("sd1")
    pipe.unet.conv_in.to("meta")
    with pytest.raises(UnsupportedModelError, match="pipe: its weights are offloaded"):
        fingerprint(models.load(pipe))


def test_what_decides_the_drawing_does_not_depend_on_the_order_of_a_set():
    """diffusers notes which values are defaults in an order that changes from process to process."""
    pipe = tiny_pipeline("sd1")
    pipe.scheduler = type(pipe.scheduler).from_config({"beta_schedule": "scaled_linear"})
    state = drawing_state(models.load(pipe))
    assert not any(name.startswith("_") for name in state) and state["scheduler"] == "DDIMScheduler"
    with torch.no_grad():
        next(pipe.vae.parameters()).add_(1)
    assert drawing_state(models.load(pipe))["vae"] != state["vae"]
