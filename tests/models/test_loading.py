from __future__ import annotations

import json
import shutil

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from pumice.models import UnsupportedModelError, load
from pumice.testbed.tiny import tiny_pipeline


def refuses(source, message: str, error: type[Exception] = ValueError, **arguments) -> None:
    with pytest.raises(error, match=message) as caught:
        load(source, **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "name"),
    [("sd1", "stable_diffusion"), ("sd2", "stable_diffusion"), ("sdxl", "stable_diffusion_xl")],
)
def test_a_folder_opens_as_the_pipeline_that_was_saved(family, name, tmp_path):
    model = load(tiny_pipeline(family))
    model.pipe.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert loaded.family == model.family == name
    latents = torch.ones(1, *model.latent_shape())
    expected = model.predict_noise(latents, 500, model.encode_prompt("a zebra"))
    actual = loaded.predict_noise(latents, 500, loaded.encode_prompt("a zebra"))
    torch.testing.assert_close(actual, expected)
    half = load(str(tmp_path), dtype=torch.bfloat16, device="cpu")
    assert half.dtype == half.vae.dtype == half.text_encoders[-1].dtype == torch.bfloat16
    half.pipe.save_pretrained(tmp_path)
    whole = load(tmp_path)
    assert whole.dtype == whole.vae.dtype == whole.text_encoders[-1].dtype == torch.float32


@pytest.mark.parametrize("device", ["abacus", "cuda:99"])
def test_a_device_that_cannot_be_used(device, tmp_path):
    refuses(tmp_path, f"device: '{device}' cannot be used", device=device)


def test_a_model_is_returned_and_a_pipeline_is_not_copied():
    pipe = tiny_pipeline("sd1")
    model = load(pipe)
    assert model.pipe is pipe
    assert load(model) is model


def test_subclasses_and_img2img_pipelines_have_their_familys_adapter():
    class Mine(diffusers.StableDiffusionXLPipeline):
        pass

    parts = tiny_pipeline("sdxl").components
    assert load(Mine(**parts, add_watermarker=False)).family == "stable_diffusion_xl"
    img2img = diffusers.StableDiffusionImg2ImgPipeline(
        **tiny_pipeline("sd1").components, requires_safety_checker=False
    )
    assert load(img2img).family == "stable_diffusion"


@pytest.mark.parametrize(("family", "name"), [("sd3", "StableDiffusion3Pipeline"), ("flux", "FluxPipeline")])
def test_other_families_are_refused_before_their_weights_are_read(family, name, tmp_path):
    pipe = tiny_pipeline(family)
    message = f"{name} is not supported; supported are StableDiffusionPipeline.*StableDiffusionXLPipeline"
    refuses(pipe, message, UnsupportedModelError)
    pipe.save_pretrained(tmp_path)
    shutil.rmtree(tmp_path / "transformer")
    refuses(tmp_path, message, UnsupportedModelError)


class TestPipelinesThatDoNotFit:
    def test_inpainting(self):
        parts = tiny_pipeline("sd1").components
        unet = diffusers.UNet2DConditionModel.from_config(parts["unet"].config, in_channels=9)
        pipe = diffusers.StableDiffusionPipeline(**{**parts, "unet": unet}, requires_safety_checker=False)
        refuses(pipe, "takes 9 channels and latents have 4; inpainting", UnsupportedModelError)

    def test_guidance_distillation(self):
        parts = tiny_pipeline("sd1").components
        unet = diffusers.UNet2DConditionModel.from_config(parts["unet"].config, time_cond_proj_dim=8)
        pipe = diffusers.StableDiffusionPipeline(**{**parts, "unet": unet}, requires_safety_checker=False)
        refuses(pipe, "guidance-distilled", UnsupportedModelError)

    def test_a_missing_text_encoder(self):
        parts = {**tiny_pipeline("sdxl").components, "text_encoder": None, "tokenizer": None}
        pipe = diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
        refuses(pipe, "lacks a part .*text_encoder, tokenizer", UnsupportedModelError)

    def test_a_flow_scheduler(self):
        pipe = tiny_pipeline("sd1")
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        refuses(pipe, "scheduler: has no beta_schedule", UnsupportedModelError)


class TestPathsThatAreNotModels:
    def test_missing(self, tmp_path):
        refuses(tmp_path / "nothing", "neither an existing path nor a hub id")
        refuses("./nothing/here", "neither an existing path nor a hub id")

    def test_a_hub_id_without_network(self):
        refuses("pumice-tests/no-such-model", "source: 'pumice-tests/no-such-model' cannot be loaded: ")

    def test_a_folder_of_something_else(self, tmp_path):
        refuses(tmp_path, "is not a diffusers folder, it has no model_index.json")

    @pytest.mark.parametrize(
        ("index", "message"),
        [
            ("{broken", "cannot be loaded"),
            ("{}", "None is not supported"),
            ('{"_class_name": ["pipeline", "Custom"]}', "Custom.* is not supported"),
        ],
    )
    def test_a_strange_index(self, index, message, tmp_path):
        (tmp_path / "model_index.json").write_text(index)
        refuses(tmp_path, message)

    def test_a_missing_part(self, tmp_path):
        tiny_pipeline("sd1").save_pretrained(tmp_path)
        shutil.rmtree(tmp_path / "vae")
        refuses(tmp_path, "cannot be loaded: ")

    def test_pickled_weights(self, tmp_path):
        tiny_pipeline("sd1").save_pretrained(tmp_path, safe_serialization=False)
        for file in tmp_path.rglob("*.safetensors"):  # transformers writes nothing else any more
            file.unlink()
        refuses(tmp_path, "cannot be loaded: ")

    def test_damaged_weights(self, tmp_path):
        tiny_pipeline("sd1").save_pretrained(tmp_path)
        (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"\0" * 100)
        refuses(tmp_path, "cannot be loaded: ")

    def test_weights_of_another_shape(self, tmp_path):
        tiny_pipeline("sd1").save_pretrained(tmp_path)
        file = tmp_path / "unet" / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "cross_attention_dim": 48}))
        refuses(tmp_path, "cannot be loaded: ")


class TestSingleFiles:
    @pytest.mark.parametrize(
        ("key", "name"),
        [
            ("cond_stage_model.transformer.text_model.final_layer_norm.bias", "StableDiffusionPipeline"),
            ("cond_stage_model.model.ln_final.bias", "StableDiffusionPipeline"),
            ("conditioner.embedders.1.model.ln_final.bias", "StableDiffusionXLPipeline"),
        ],
    )
    def test_the_family_is_read_from_the_weights(self, key, name, tmp_path, monkeypatch):
        save_file(
            {key: torch.zeros(1), "model.diffusion_model.x": torch.zeros(1)}, tmp_path / "m.safetensors"
        )
        opened = []
        pipe = tiny_pipeline("sdxl" if "XL" in name else "sd1")
        monkeypatch.setattr(
            getattr(diffusers, name), "from_single_file", lambda path: opened.append(path) or pipe
        )
        assert load(tmp_path / "m.safetensors").pipe is pipe
        assert opened == [str(tmp_path / "m.safetensors")]

    def test_what_cannot_be_read_is_one_line(self, tmp_path):
        (tmp_path / "m.ckpt").write_bytes(b"PK")
        refuses(tmp_path / "m.ckpt", "is not a .safetensors file")
        (tmp_path / "m.safetensors").write_bytes(b"not one")
        refuses(tmp_path / "m.safetensors", "cannot be loaded: ")
        save_file({"double_blocks.0.x": torch.zeros(1)}, tmp_path / "flux.safetensors")
        refuses(tmp_path / "flux.safetensors", "no text encoder of Stable Diffusion", UnsupportedModelError)
        save_file({"cond_stage_model.x": torch.zeros(1)}, tmp_path / "half.safetensors")
        refuses(tmp_path / "half.safetensors", "cannot be loaded: ")


def test_arguments_that_do_not_fit():
    pipe = tiny_pipeline("sd1")
    refuses(pipe, "dtype, device: got one with a loaded pipeline", dtype=torch.float16)
    refuses(load(pipe), "dtype, device: got one with a loaded pipeline", device="cpu")
    refuses(pipe.unet, "source: got a UNet2DConditionModel, expected a diffusers pipeline", TypeError)
    refuses(None, "source: got a NoneType", TypeError)
