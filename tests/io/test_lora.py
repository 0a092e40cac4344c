from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from peft.tuners.lora import Linear as LoraLinear
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from pumice import erase, models, testbed
from pumice.io import save_lora
from pumice.io.lora import read_lora
from pumice.models import Added, Edit
from pumice.testbed import tiny_pipeline
from real_unets import UNETS

PIPELINES = ("sd1", "sd2", "sdxl", "testbed")
LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"


def pipeline(name: str):
    return testbed.load() if name == "testbed" else tiny_pipeline(name)


def linears(unet) -> dict[str, nn.Linear]:
    return {name: module for name, module in unet.named_modules() if isinstance(module, nn.Linear)}


def factors(unet, *, ranks=(1, 2, 3), chosen=None) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Random ones for every linear layer (or the chosen), each of its own rank."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: (
            torch.randn(layer.out_features, ranks[i % len(ranks)], generator=generator) / 10,
            torch.randn(ranks[i % len(ranks)], layer.in_features, generator=generator),
        )
        for i, (name, layer) in enumerate(linears(unet).items())
        if chosen is None or name in chosen
    }


def predict(pipe) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    config = pipe.unet.config
    channels, size, text = config.in_channels, config.sample_size, config.cross_attention_dim
    latents = torch.randn(2, channels, size, size, generator=generator).to(pipe.unet.dtype)
    inputs = {"encoder_hidden_states": torch.randn(2, 7, text, generator=generator).to(latents)}
    if config.addition_embed_type == "text_time":
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        pooled = torch.randn(2, width, generator=generator).to(latents)
        inputs["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": torch.ones(2, 6)}
    with torch.no_grad():
        return pipe.unet(latents, 300, **inputs).sample


def changed(pipe, layers):
    """The pipeline with the change in its weights themselves."""
    unet = copy.deepcopy(pipe.unet)
    with torch.no_grad():
        for name, (up, down) in layers.items():
            weight = unet.get_submodule(name).weight
            weight += up.to(weight) @ down.to(weight)
    return type(pipe)(**{**pipe.components, "unet": unet})


def refuses(path, layers, message: str, error: type[Exception] = ValueError, **arguments) -> None:
    before = sorted(path.parent.iterdir()) if path.parent.is_dir() else None
    with pytest.raises(error, match=message) as caught:
        save_lora(path, layers, tiny_pipeline("sd1").unet, **arguments)
    assert "\n" not in str(caught.value)
    assert before is None or sorted(path.parent.iterdir()) == before


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
@pytest.mark.parametrize("name", PIPELINES)
class TestThroughDiffusers:
    """Read by plain diffusers, at the weight 1 that it gives every adapter."""

    def test_it_computes_as_the_changed_weights_do(self, name, format, tmp_path):
        pipe = pipeline(name).to(torch.float64)
        layers = factors(pipe.unet)
        save_lora(tmp_path / "a.safetensors", layers, pipe.unet, format=format, metadata={"made": "here"})
        expected, before = predict(changed(pipe, layers)), predict(pipe)
        pipe.load_lora_weights(str(tmp_path), weight_name="a.safetensors")
        actual = predict(pipe)
        assert (expected - before).abs().max() > 0.05
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)

    def test_every_bit_of_every_layer_arrives(self, name, format, tmp_path):
        pipe = pipeline(name)
        layers = factors(pipe.unet)
        save_lora(tmp_path / "a.safetensors", layers, pipe.unet, format=format)
        pipe.load_lora_weights(str(tmp_path), weight_name="a.safetensors", adapter_name="edit")
        adapted = {name: m for name, m in pipe.unet.named_modules() if isinstance(m, LoraLinear)}
        assert adapted.keys() == layers.keys()
        for name, (up, down) in layers.items():
            module, rank = adapted[name], len(down)
            assert module.scaling == {"edit": 1}
            assert torch.equal(module.lora_A["edit"].weight[:rank], down)
            assert torch.equal(module.lora_B["edit"].weight[:, :rank], up)
            assert not module.lora_A["edit"].weight[rank:].any()
            assert not module.lora_B["edit"].weight[:, rank:].any()

    def test_fusing_it_gives_the_changed_weights(self, name, format, tmp_path):
        pipe = pipeline(name)
        layers = factors(pipe.unet, chosen=[LAYER])
        save_lora(tmp_path / "a.safetensors", layers, pipe.unet, format=format)
        expected = changed(pipe, layers).unet.state_dict()
        pipe.load_lora_weights(str(tmp_path), weight_name="a.safetensors")
        pipe.fuse_lora()
        pipe.unload_lora_weights()
        for key, weight in pipe.unet.state_dict().items():
            torch.testing.assert_close(weight, expected[key], rtol=0, atol=1e-6)


ENCODERS = ("text_encoder", "text_encoder_2")


def everything(pipe, kinds=(nn.Linear, nn.Conv2d), chosen=lambda name: True):
    """Random factors of all layers of the UNet and the text encoders, by their names."""
    generator = torch.Generator().manual_seed(0)
    parts = {"": pipe.unet} | {f"{name}.": getattr(pipe, name, None) for name in ENCODERS}
    found = {}
    for prefix, network in parts.items():
        for name, layer in network.named_modules() if network is not None else ():
            if isinstance(layer, kinds) and chosen(prefix + name):
                rows = layer.weight.flatten(1)
                up = torch.randn(len(rows), 2, generator=generator) / 20
                down = torch.randn(2, rows.shape[1], generator=generator)
                found[prefix + name] = up, down
    return found


def encoders(pipe) -> list[nn.Module]:
    return [getattr(pipe, name) for name in ENCODERS if getattr(pipe, name, None) is not None]


def edited(pipe, layers) -> Edit:
    changes = {f"{name}.weight": Added(up, down) for name, (up, down) in layers.items()}
    return Edit.made(models.load(pipe), changes, method="test", targets=("cat",))


def outputs(pipe) -> list[torch.Tensor]:
    """What the text encoders and the UNet compute."""
    with torch.no_grad():
        text = models.load(pipe).encode_prompt(["a red ball", "a fish"])
    return [predict(pipe), text.embeds, *([] if text.pooled is None else [text.pooled])]


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
class TestTextEncodersAndConvolutions:
    def test_diffusers_computes_as_the_applied_edit(self, name, format, tmp_path):
        pipe = tiny_pipeline(name).to(torch.float64)
        layers = everything(pipe)
        edit = edited(pipe, layers)
        edit.save_lora(tmp_path / "a.safetensors", format=format)
        before = outputs(pipe)
        with edit.on(pipe):
            expected = outputs(pipe)
        pipe.load_lora_weights(str(tmp_path), weight_name="a.safetensors")
        for was, wanted, found in zip(before, expected, outputs(pipe), strict=True):
            assert (wanted - was).abs().max() > 0.01
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)

    def test_it_comes_back_to_the_bit(self, name, format, tmp_path):
        pipe = tiny_pipeline(name)
        layers, text = everything(pipe), encoders(pipe)
        save_lora(tmp_path / "a.safetensors", layers, pipe.unet, text_encoders=text, format=format)
        found = read_lora(tmp_path / "a.safetensors", pipe.unet, text_encoders=text)
        assert found.keys() == layers.keys()
        for layer, factors in layers.items():
            assert all(torch.equal(a, b) for a, b in zip(found[layer], factors, strict=True))

    @pytest.mark.parametrize("leaf", ["q_proj", "fc1"])
    def test_one_kind_of_layer_alone(self, name, format, leaf, tmp_path):
        """By whose names diffusers tells the layouts."""
        pipe = tiny_pipeline(name).to(torch.float64)
        edit = edited(pipe, everything(pipe, chosen=lambda layer: layer.endswith(leaf)))
        edit.save_lora(tmp_path / "a.safetensors", format=format)
        with edit.on(pipe):
            expected = outputs(pipe)
        assert (outputs(pipe)[1] - expected[1]).abs().max() > 1e-4
        pipe.load_lora_weights(str(tmp_path), weight_name="a.safetensors")
        for wanted, found in zip(expected, outputs(pipe), strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)


class TestKeysOfTextEncoders:
    @pytest.mark.parametrize(
        ("name", "network", "format", "key"),
        [
            ("sd1", "text_encoder", "diffusers", "text_encoder.text_model.encoder.layers.1.mlp.fc1"),
            ("sdxl", "text_encoder_2", "diffusers", "text_encoder_2.text_model.encoder.layers.1.mlp.fc1"),
            ("sd2", "text_encoder", "kohya", "lora_te_text_model_encoder_layers_1_mlp_fc1"),
            ("sdxl", "text_encoder", "kohya", "lora_te1_text_model_encoder_layers_1_mlp_fc1"),
            ("sdxl", "text_encoder_2", "kohya", "lora_te2_text_model_encoder_layers_1_mlp_fc1"),
        ],
    )
    def test_files_have_text_model_whatever_transformers_has(self, name, network, format, key, tmp_path):
        pipe = tiny_pipeline(name)
        wanted = f"{network}."
        layers = everything(
            pipe, chosen=lambda layer: layer.startswith(wanted) and layer.endswith("layers.1.mlp.fc1")
        )
        save_lora(tmp_path / "a.safetensors", layers, pipe.unet, text_encoders=encoders(pipe), format=format)
        names = {name.partition(".lora_")[0] for name in load_file(tmp_path / "a.safetensors")}
        assert key in names  # beside it an output projection of zeros, without which diffusers reads nothing
        assert all(name.removesuffix(".alpha") == key or "out_proj" in name for name in names)

    def test_convolutions_have_kernels(self, tmp_path):
        unet = tiny_pipeline("sd1").unet
        i, o = unet.conv_in.in_channels, unet.conv_in.out_channels
        layers = {"conv_in": (torch.randn(o, 3), torch.randn(3, 9 * i))}
        save_lora(tmp_path / "a.safetensors", layers, unet, format="kohya")
        written = load_file(tmp_path / "a.safetensors")
        assert written["lora_unet_conv_in.lora_down.weight"].shape == (3, i, 3, 3)
        assert written["lora_unet_conv_in.lora_up.weight"].shape == (o, 3, 1, 1)

    def test_a_text_encoder_that_was_not_given(self, tmp_path):
        pipe = tiny_pipeline("sd1")
        layers = everything(pipe, chosen=lambda layer: layer.startswith("text_encoder."))
        refuses(tmp_path / "a.safetensors", layers, "layers: the model has nothing at 'text_encoder")


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_the_pooled_text_layer_alone(format, tmp_path):
    pipe = tiny_pipeline("sdxl").to(torch.float64)
    layers = factors(pipe.unet, chosen=["add_embedding.linear_1"])
    save_lora(tmp_path / "a.safetensors", layers, pipe.unet, format=format)
    expected, before = predict(changed(pipe, layers)), predict(pipe)
    pipe.load_lora_weights(str(tmp_path), weight_name="a.safetensors")
    assert (expected - before).abs().max() > 1e-3
    torch.testing.assert_close(predict(pipe), expected, rtol=0, atol=1e-10)


def test_the_header_takes_the_metadata(tmp_path):
    unet = tiny_pipeline("sd1").unet
    save_lora(tmp_path / "a.safetensors", factors(unet, chosen=[LAYER]), unet, metadata={"title": "no cats"})
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "title": "no cats"}


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_all_layers_have_the_largest_rank(format, tmp_path):
    """Else diffusers before 0.42, and its reader of kohya's format, scale the others."""
    unet = tiny_pipeline("sd1").unet
    save_lora(tmp_path / "a.safetensors", factors(unet, ranks=(1, 5, 2)), unet, format=format)
    for key, tensor in load_file(tmp_path / "a.safetensors").items():
        if key.endswith(".alpha"):
            assert tensor.shape == () and tensor == 5
        else:
            assert tensor.shape["lora_up" in key or "lora_B" in key] == 5


class TestKeys:
    def keys(self, tmp_path, name, layer, format):
        unet = tiny_pipeline(name).unet
        save_lora(tmp_path / "a.safetensors", factors(unet, chosen=[layer]), unet, format=format)
        return set(load_file(tmp_path / "a.safetensors"))

    def test_diffusers(self, tmp_path):
        assert self.keys(tmp_path, "sdxl", LAYER, "diffusers") == {
            f"unet.{LAYER}.lora_A.weight",
            f"unet.{LAYER}.lora_B.weight",
        }

    @pytest.mark.parametrize(
        ("name", "layer", "key"),
        [
            ("sd1", LAYER, "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"),
            (
                "sd2",
                "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0",
                "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_out_0",
            ),
            ("sdxl", LAYER, "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_k"),
            (
                "sdxl",
                "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_v",
                "lora_unet_input_blocks_3_1_transformer_blocks_1_attn2_to_v",
            ),
            (
                "sdxl",
                "up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_v",
                "lora_unet_output_blocks_3_1_transformer_blocks_0_attn2_to_v",
            ),
            ("sdxl", "add_embedding.linear_1", "lora_unet_label_emb_0_0"),
        ],
    )
    def test_kohya(self, name, layer, key, tmp_path):
        assert self.keys(tmp_path, name, layer, "kohya") == {
            f"{key}.lora_down.weight",
            f"{key}.lora_up.weight",
            f"{key}.alpha",
        }


@pytest.mark.real_empty
@pytest.mark.parametrize(
    ("name", "count", "some"),
    [
        (
            "sd1",
            184,
            {
                "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": "lora_unet_down_blocks_0"
                "_attentions_0_transformer_blocks_0_attn2_to_k",
            },
        ),
        (
            "sdxl",
            743,
            {
                "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k": "lora_unet_input_blocks_4_1"
                "_transformer_blocks_0_attn2_to_k",
                "mid_block.attentions.0.transformer_blocks.9.attn2.to_v": "lora_unet_middle_block_1"
                "_transformer_blocks_9_attn2_to_v",
                "up_blocks.1.attentions.2.transformer_blocks.1.attn2.to_k": "lora_unet_output_blocks_5_1"
                "_transformer_blocks_1_attn2_to_k",
                "add_embedding.linear_1": "lora_unet_label_emb_0_0",
            },
        ),
    ],
)
def test_kohyas_names_of_every_layer_of_the_released_models(name, count, some, tmp_path, monkeypatch):
    for layer in (nn.Linear, nn.modules.conv._ConvNd):  # no random numbers for weights that nobody has
        monkeypatch.setattr(layer, "reset_parameters", lambda self: None)
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNETS[name])
    layers = {
        name: (torch.full((layer.out_features, 1), float(i)), torch.zeros(1, layer.in_features))
        for i, (name, layer) in enumerate(linears(unet).items())
    }
    save_lora(tmp_path / "a.safetensors", layers, unet, format="kohya")
    written = load_file(tmp_path / "a.safetensors")
    assert len(layers) == count and len(written) == 3 * count
    for layer, key in some.items():
        assert torch.equal(written[f"{key}.lora_up.weight"], layers[layer][0])
    back, _ = StableDiffusionXLPipeline.lora_state_dict(written, unet_config=unet.config)
    back = convert_unet_state_dict_to_peft(back)
    assert len(back) == 2 * count
    for layer, (up, _) in layers.items():
        assert torch.equal(back[f"unet.{layer}.lora_B.weight"], up)


def test_factors_may_share_memory_lie_anyhow_and_have_gradients(tmp_path):
    unet = tiny_pipeline("sd1").unet
    names = [name for name in linears(unet) if name.endswith("attn2.to_k")]
    down = torch.randn(32, 4).T
    layers = {
        name: (torch.randn(4, linears(unet)[name].out_features, requires_grad=True).T, down) for name in names
    }
    save_lora(tmp_path / "a.safetensors", layers, unet)
    written = load_file(tmp_path / "a.safetensors")
    for name in names:
        assert torch.equal(written[f"unet.{name}.lora_A.weight"], down)
        assert torch.equal(written[f"unet.{name}.lora_B.weight"], layers[name][0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_factors_keep_their_dtype(dtype, tmp_path):
    unet = tiny_pipeline("sd1").unet
    up, down = factors(unet, chosen=[LAYER])[LAYER]
    save_lora(tmp_path / "new" / "a.safetensors", {LAYER: (up.to(dtype), down.to(dtype))}, unet)
    written = load_file(tmp_path / "new" / "a.safetensors")
    assert torch.equal(written[f"unet.{LAYER}.lora_B.weight"], up.to(dtype))


def test_a_compiled_unet(tmp_path):
    unet = tiny_pipeline("sdxl").unet
    layers = factors(unet)
    save_lora(tmp_path / "a.safetensors", layers, unet, format="kohya")
    save_lora(tmp_path / "b.safetensors", layers, torch.compile(unet), format="kohya")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


class TestWhatDoesNotFit:
    @pytest.fixture
    def layers(self):
        return factors(tiny_pipeline("sd1").unet, chosen=[LAYER])

    def test_nothing_is_overwritten(self, layers, tmp_path):
        path = tmp_path / "a.safetensors"
        path.write_bytes(b"mine")
        refuses(path, layers, "path: .* is there already")
        assert path.read_bytes() == b"mine"

    def test_another_suffix(self, layers, tmp_path):
        refuses(tmp_path / "a.pt", layers, r"path: got .*a\.pt', expected a name that ends in \.safetensors")

    def test_a_folder_that_cannot_be_made(self, layers, tmp_path):
        (tmp_path / "file").write_text("")
        refuses(tmp_path / "file" / "a.safetensors", layers, "path: cannot write to ")

    def test_an_unknown_format(self, layers, tmp_path):
        refuses(tmp_path / "a.safetensors", layers, "format: got 'a1111', expected one of", format="a1111")

    def test_no_layers(self, tmp_path):
        refuses(tmp_path / "a.safetensors", {}, "layers: got none")

    @pytest.mark.parametrize(
        ("name", "found"),
        [("down_blocks.9", "nothing"), ("conv_norm_out", "a GroupNorm"), (f"{LAYER}.weight", "nothing")],
    )
    def test_layers_that_are_not_there(self, name, found, layers, tmp_path):
        refuses(
            tmp_path / "a.safetensors", {name: layers[LAYER]}, f"layers: the UNet has {found} at '{name}'"
        )

    def test_a_layer_under_an_adapter(self, layers, tmp_path):
        pipe = tiny_pipeline("sd1")
        save_lora(tmp_path / "a.safetensors", layers, pipe.unet)
        pipe.load_lora_weights(str(tmp_path), weight_name="a.safetensors")
        with pytest.raises(ValueError, match=r"expected an nn\.Linear"):
            save_lora(tmp_path / "b.safetensors", layers, pipe.unet)

    @pytest.mark.parametrize(
        ("up", "down"),
        [
            ((32, 2), (3, 32)),
            ((31, 2), (2, 32)),
            ((32, 2), (2, 31)),
            ((32, 0), (0, 32)),
            ((32,), (32,)),
            ((), ()),
        ],
    )
    def test_shapes(self, up, down, tmp_path):
        layers = {LAYER: (torch.zeros(up), torch.zeros(down))}
        message = r"layers: .* got up \(.*\) and down \(.*\), expected \(32, r\) and \(r, 32\)"
        refuses(tmp_path / "a.safetensors", layers, message)

    def test_integers(self, tmp_path):
        layers = {LAYER: (torch.zeros(32, 1, dtype=torch.int64), torch.zeros(1, 32))}
        refuses(tmp_path / "a.safetensors", layers, "are not floating tensors", TypeError)

    def test_a_layer_without_a_name_in_the_original(self, tmp_path):
        unet = tiny_pipeline("sdxl").unet
        unet.class_embedding = nn.Linear(3, 5)
        layers = {"class_embedding": (torch.zeros(5, 1), torch.zeros(1, 3))}
        with pytest.raises(ValueError, match="layers: 'class_embedding' has no place in the original layout"):
            save_lora(tmp_path / "a.safetensors", layers, unet, format="kohya")
        assert list(tmp_path.iterdir()) == []


ALONE = """
import sys, torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
model, folder = sys.argv[1:]
pipe = StableDiffusionPipeline.from_pretrained(model)
inputs = load_file(folder + "/inputs.safetensors")
pipe.load_lora_weights(folder, weight_name="lora.safetensors")
with torch.no_grad():
    found = pipe.unet(inputs["latents"], 500, encoder_hidden_states=inputs["embeds"]).sample
torch.testing.assert_close(found, inputs["expected"], rtol=1e-4, atol=1e-4)
assert not any(name.split(".")[0] == "pumice" for name in sys.modules)
"""


def test_a_program_without_pumice_draws_as_the_edited_model(tmp_path):
    pipe = testbed.load()
    edit = erase.uce(pipe, "ball", guide="box", tokens="all")
    edit.save_lora(tmp_path / "lora.safetensors")
    model = models.load(pipe)
    latents = torch.randn(2, *model.latent_shape(), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        embeds = model.encode_prompt(["a red ball", "a blue fish"])
        plain = model.predict(latents, 500, embeds)
        with edit.on(pipe):
            expected = model.predict(latents, 500, embeds)
    assert (expected - plain).abs().max() > 0.1
    tensors = {"latents": latents, "embeds": embeds.embeds.contiguous(), "expected": expected}
    save_file(tensors, tmp_path / "inputs.safetensors")
    command = [sys.executable, "-c", ALONE, str(testbed.WEIGHTS), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
