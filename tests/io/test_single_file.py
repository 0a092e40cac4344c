from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils as inverse
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import CLIPTextConfig

from pumice import testbed
from pumice.io import save_single_file
from pumice.io.original_layout import clip_layer, open_clip_layer, unet_layer, vae_layer
from pumice.models import UnsupportedModelError, load
from pumice.testbed import tiny_pipeline
from real_unets import UNETS

PIPELINES = ("sd1", "sd2", "sdxl", "testbed")
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


def pipeline(name: str):
    return testbed.load() if name == "testbed" else tiny_pipeline(name)


def weights(pipe) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{name}": weight
        for part in PARTS
        if getattr(pipe, part, None) is not None
        for name, weight in getattr(pipe, part).state_dict().items()
    }


def read_back(pipe, path, folder):
    pipe.save_pretrained(folder)
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    return type(pipe).from_single_file(str(path), config=str(folder), local_files_only=True)


def refuses(pipe, path, message: str, error: type[Exception] = ValueError, **arguments) -> None:
    before = sorted(path.parent.iterdir()) if path.parent.is_dir() else None
    with pytest.raises(error, match=message) as caught:
        save_single_file(pipe, path, **arguments)
    assert "\n" not in str(caught.value)
    assert before is None or sorted(path.parent.iterdir()) == before


@pytest.mark.parametrize("name", PIPELINES)
def test_diffusers_reads_back_every_bit(name, tmp_path):
    pipe = pipeline(name)
    save_single_file(pipe, tmp_path / "model.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    expected = weights(pipe)
    actual = weights(read_back(pipe, tmp_path / "model.safetensors", tmp_path / "config"))
    assert actual.keys() == expected.keys()
    for key, weight in expected.items():
        assert actual[key].dtype == weight.dtype and torch.equal(actual[key], weight), key


@pytest.mark.parametrize("name", PIPELINES)
def test_the_file_holds_every_number_once(name, tmp_path):
    pipe = pipeline(name)
    save_single_file(pipe, tmp_path / "model.safetensors")
    written = load_file(tmp_path / "model.safetensors")
    total = sum(weight.double().sum() for weight in weights(pipe).values())
    assert sum(weight.numel() for weight in written.values()) == sum(
        weight.numel() for weight in weights(pipe).values()
    )
    torch.testing.assert_close(sum(weight.double().sum() for weight in written.values()), total)


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        (
            "sd1",
            {
                "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (16, 32),
                "model.diffusion_model.input_blocks.1.1.proj_in.weight": (16, 16, 1, 1),
                "first_stage_model.encoder.mid.attn_1.q.weight": (16, 16, 1, 1),
                "first_stage_model.encoder.mid.attn_1.q.bias": (16,),
                "cond_stage_model.transformer.text_model.encoder.layers.1.self_attn.q_proj.weight": (32, 32),
            },
        ),
        (
            "sd2",
            {
                "model.diffusion_model.input_blocks.1.1.proj_in.weight": (16, 16),
                "cond_stage_model.model.transformer.resblocks.1.attn.in_proj_weight": (144, 48),
                "cond_stage_model.model.transformer.resblocks.1.attn.in_proj_bias": (144,),
                "cond_stage_model.model.positional_embedding": (77, 48),
                "cond_stage_model.model.ln_final.bias": (48,),
            },
        ),
        (
            "sdxl",
            {
                "model.diffusion_model.label_emb.0.0.weight": (64, 88),
                "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight": (32,),
                "conditioner.embedders.1.model.text_projection": (48, 40),
                "conditioner.embedders.1.model.ln_final.weight": (48,),
            },
        ),
    ],
)
def test_the_keys_by_which_programs_know_a_family(name, keys, tmp_path):
    save_single_file(tiny_pipeline(name), tmp_path / "model.safetensors")
    written = load_file(tmp_path / "model.safetensors")
    assert {key: tuple(written[key].shape) for key in keys} == keys


@pytest.mark.parametrize(
    ("name", "part", "layers"), [("sd2", "text_encoder", 23), ("sdxl", "text_encoder_2", 32)]
)
def test_open_clip_with_all_its_layers(name, part, layers, tmp_path):
    pipe = tiny_pipeline(name)
    encoder = getattr(pipe, part)
    encoder = type(encoder)(CLIPTextConfig(**encoder.config.to_dict() | {"num_hidden_layers": layers}))
    setattr(pipe, part, encoder)
    save_single_file(pipe, tmp_path / "model.safetensors")
    again = getattr(read_back(pipe, tmp_path / "model.safetensors", tmp_path / "config"), part).state_dict()
    assert all(torch.equal(again[key], weight) for key, weight in encoder.state_dict().items())


def test_the_picture_is_the_same(tmp_path):
    pipe = testbed.load()
    save_single_file(load(pipe), tmp_path / "new" / "model.safetensors")
    again = read_back(pipe, tmp_path / "new" / "model.safetensors", tmp_path / "config")
    again.set_progress_bar_config(disable=True)

    def draw(pipe):
        generator = torch.Generator().manual_seed(0)
        return pipe("a red circle", num_inference_steps=2, generator=generator, output_type="pt").images

    assert torch.equal(draw(again), draw(pipe))


class TestDtypes:
    def test_each_weight_keeps_its_own(self, tmp_path):
        pipe = tiny_pipeline("sdxl")
        pipe.unet.to(torch.float16)
        pipe.text_encoder_2.to(torch.bfloat16)
        save_single_file(pipe, tmp_path / "model.safetensors")
        written = load_file(tmp_path / "model.safetensors")
        expected = {
            "model.": torch.float16,
            "first_stage_model.": torch.float32,
            "conditioner.embedders.0.": torch.float32,
            "conditioner.embedders.1.": torch.bfloat16,
        }
        for prefix, dtype in expected.items():
            assert {weight.dtype for name, weight in written.items() if name.startswith(prefix)} == {dtype}

    def test_or_has_the_one_asked_for(self, tmp_path):
        pipe = tiny_pipeline("sd1")
        save_single_file(pipe, tmp_path / "model.safetensors", dtype=torch.float16)
        written = load_file(tmp_path / "model.safetensors")
        assert {weight.dtype for weight in written.values()} == {torch.float16}
        half = written["model.diffusion_model.input_blocks.0.0.weight"]
        assert torch.equal(half, pipe.unet.conv_in.weight.half())
        assert pipe.unet.dtype == torch.float32

    def test_that_is_none(self, tmp_path):
        for dtype in ("float16", torch.int8):
            refuses(tiny_pipeline("sd1"), tmp_path / "m.safetensors", "dtype: got ", TypeError, dtype=dtype)


def test_layouts_in_memory_do_not_matter(tmp_path):
    pipe = tiny_pipeline("sd1")
    save_single_file(pipe, tmp_path / "a.safetensors")
    pipe.unet = torch.compile(pipe.unet.to(memory_format=torch.channels_last))
    save_single_file(pipe, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


class TestPathsThatDoNotDo:
    def test_nothing_is_overwritten(self, tmp_path):
        path = tmp_path / "model.safetensors"
        path.write_bytes(b"mine")
        refuses(tiny_pipeline("sd1"), path, "path: .* is there already")
        assert path.read_bytes() == b"mine"

    def test_another_suffix(self, tmp_path):
        refuses(tiny_pipeline("sd1"), tmp_path / "model.ckpt", "path: .* ends in .safetensors")

    def test_a_folder_that_cannot_be_made(self, tmp_path):
        (tmp_path / "file").write_text("")
        refuses(tiny_pipeline("sd1"), tmp_path / "file" / "m.safetensors", "path: cannot write to ")

    def test_a_failure_leaves_nothing(self, tmp_path, monkeypatch):
        def fails(tensors, path, metadata):
            path.write_bytes(b"half")
            raise OSError("disk full")

        monkeypatch.setattr("pumice.io.files.save_file", fails)
        with pytest.raises(OSError, match="disk full"):
            save_single_file(tiny_pipeline("sd1"), tmp_path / "m.safetensors")
        assert list(tmp_path.iterdir()) == []


class TestPipelinesThatDoNotFit:
    def test_another_family(self, tmp_path):
        refuses(tiny_pipeline("flux"), tmp_path / "m.safetensors", "FluxPipeline", UnsupportedModelError)

    def test_a_path(self, tmp_path):
        refuses(tmp_path, tmp_path / "m.safetensors", "pipe: got a PosixPath", TypeError)

    def test_an_adapter(self, tmp_path):
        pipe = tiny_pipeline("sd1")
        pipe.unet.add_adapter(LoraConfig(target_modules=["conv1"]))
        refuses(pipe, tmp_path / "m.safetensors", "conv1: a LoRA adapter is attached", UnsupportedModelError)

    @pytest.mark.parametrize("part", PARTS[:3])
    def test_offloaded_weights(self, part, tmp_path):
        pipe = tiny_pipeline("sd1")
        getattr(pipe, part).to("meta")
        refuses(pipe, tmp_path / "m.safetensors", "meta device", UnsupportedModelError)

    def test_one_offloaded_convolution(self, tmp_path):
        pipe = tiny_pipeline("sd1")
        pipe.unet.conv_in.to("meta")
        refuses(pipe, tmp_path / "m.safetensors", "conv_in.weight: is offloaded", UnsupportedModelError)

    def test_quantised_weights(self, tmp_path):
        pipe = tiny_pipeline("sd1")
        pipe.text_encoder.to(torch.float8_e4m3fn)
        refuses(pipe, tmp_path / "m.safetensors", "expected float16 or wider", UnsupportedModelError)

    @pytest.mark.parametrize("part", ["unet", "vae"])
    def test_fused_projections(self, part, tmp_path):
        pipe = tiny_pipeline("sd1")
        getattr(pipe, part).fuse_qkv_projections()
        refuses(pipe, tmp_path / "m.safetensors", "has no place in the original", UnsupportedModelError)

    def test_class_embeddings(self, tmp_path):
        pipe = tiny_pipeline("sd1")
        pipe.unet = UNet2DConditionModel.from_config(pipe.unet.config, class_embed_type="timestep")
        refuses(
            pipe,
            tmp_path / "m.safetensors",
            "class_embedding.linear_1.weight: has no place",
            UnsupportedModelError,
        )


def named(part: torch.nn.Module, rename: Callable[[str], str | None]) -> dict[str, str]:
    """The name in the original of every weight, `in_proj` still in three."""
    names = {key: f"{rename(key.rpartition('.')[0])}.{key.rpartition('.')[2]}" for key in part.state_dict()}
    assert "None" not in " ".join(names.values())
    assert len(set(names.values())) == len(names)
    return names


@pytest.fixture
def on_meta(monkeypatch):
    """Models of the released sizes in a moment: no memory, and no random numbers."""
    for layer in (torch.nn.Linear, torch.nn.modules.conv._ConvNd, torch.nn.Embedding):
        monkeypatch.setattr(layer, "reset_parameters", lambda self: None)
    with torch.device("meta"):
        yield


@pytest.mark.real_empty
@pytest.mark.usefixtures("on_meta")
class TestRealSizes:
    """All names of the released models, whose weights stay on the meta device."""

    @pytest.mark.parametrize(
        ("name", "count", "landmarks"),
        [
            (
                "sd1",
                686,
                {
                    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": "input_blocks.1.1."
                    "transformer_blocks.0.attn2.to_k",
                    "up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_v": "output_blocks.11.1."
                    "transformer_blocks.0.attn2.to_v",
                    "up_blocks.3.resnets.2.conv_shortcut": "output_blocks.11.0.skip_connection",
                    "up_blocks.0.upsamplers.0.conv": "output_blocks.2.1.conv",
                    "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
                    "down_blocks.2.downsamplers.0.conv": "input_blocks.9.0.op",
                    "mid_block.resnets.1.time_emb_proj": "middle_block.2.emb_layers.1",
                    "conv_norm_out": "out.0",
                },
            ),
            ("sd2", 686, {"time_embedding.linear_2": "time_embed.2"}),
            (
                "sdxl",
                1680,
                {
                    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k": "input_blocks.4.1."
                    "transformer_blocks.0.attn2.to_k",
                    "mid_block.attentions.0.transformer_blocks.9.attn2.to_v": "middle_block.1."
                    "transformer_blocks.9.attn2.to_v",
                    "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
                    "add_embedding.linear_1": "label_emb.0.0",
                },
            ),
        ],
    )
    def test_the_unet(self, name, count, landmarks):
        unet = UNet2DConditionModel(**UNETS[name])
        names = named(unet, lambda layer: unet_layer(layer, unet.config))
        assert len(names) == count
        for layer, original in landmarks.items():
            assert names[f"{layer}.weight"] == f"{original}.weight"
        checkpoint = {f"model.diffusion_model.{names[key]}": w for key, w in unet.state_dict().items()}
        back = inverse.convert_ldm_unet_checkpoint(checkpoint, unet.config)
        assert {key: id(w) for key, w in back.items()} == {
            key: id(checkpoint[f"model.diffusion_model.{names[key]}"]) for key in names
        }

    def test_the_autoencoder(self):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            layers_per_block=2,
        )
        names = named(vae, lambda layer: vae_layer(layer, vae.config))
        assert len(names) == 248
        for layer, original in {
            "decoder.up_blocks.0.resnets.0.norm1": "decoder.up.3.block.0.norm1",
            "decoder.up_blocks.2.resnets.0.conv_shortcut": "decoder.up.1.block.0.nin_shortcut",
            "decoder.up_blocks.0.upsamplers.0.conv": "decoder.up.3.upsample.conv",
            "encoder.down_blocks.0.downsamplers.0.conv": "encoder.down.0.downsample.conv",
            "encoder.mid_block.resnets.1.conv2": "encoder.mid.block_2.conv2",
            "decoder.mid_block.attentions.0.to_out.0": "decoder.mid.attn_1.proj_out",
            "encoder.conv_norm_out": "encoder.norm_out",
        }.items():
            assert names[f"{layer}.weight"] == f"{original}.weight"
        checkpoint = {f"first_stage_model.{names[key]}": w for key, w in vae.state_dict().items()}
        back = inverse.convert_ldm_vae_checkpoint(checkpoint, vae.config)
        assert {key: id(w) for key, w in back.items()} == {
            key: id(checkpoint[f"first_stage_model.{names[key]}"]) for key in names
        }

    @pytest.mark.parametrize("prefix", ["", "text_model."])
    def test_the_text_encoders(self, prefix):
        assert clip_layer(f"{prefix}encoder.layers.11.self_attn.q_proj") == (
            "text_model.encoder.layers.11.self_attn.q_proj"
        )
        assert clip_layer(f"{prefix}embeddings.position_embedding") == (
            "text_model.embeddings.position_embedding"
        )
        assert clip_layer("text_projection") is None
        for layer, original in {
            "embeddings.token_embedding": "token_embedding",
            "encoder.layers.22.mlp.fc2": "transformer.resblocks.22.mlp.c_proj",
            "encoder.layers.0.layer_norm1": "transformer.resblocks.0.ln_1",
            "encoder.layers.0.self_attn.out_proj": "transformer.resblocks.0.attn.out_proj",
            "final_layer_norm": "ln_final",
        }.items():
            assert open_clip_layer(prefix + layer) == original
        assert open_clip_layer("text_projection") == "text_projection"
        assert open_clip_layer("encoder.layers.0.self_attn.rotary") is None
