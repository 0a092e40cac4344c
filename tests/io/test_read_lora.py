"""A LoRA file is read as diffusers reads it, whoever wrote it."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from pumice.io import save_lora
from pumice.io.lora import read_lora
from pumice.testbed import tiny_pipeline

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
OTHER = "up_blocks.0.attentions.1.transformer_blocks.0.attn2.to_v"


def factors(unet, names, *, rank=2, dtype=torch.float32) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name in names:
        layer = unet.get_submodule(name)
        up = torch.randn(layer.out_features, rank, generator=generator).to(dtype)
        found[name] = up, torch.randn(rank, layer.in_features, generator=generator).to(dtype)
    return found


def linears(unet) -> list[str]:
    return [name for name, module in unet.named_modules() if isinstance(module, nn.Linear)]


def same(found, expected) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(a, b) for name in expected for a, b in zip(found[name], expected[name], strict=True)
    )


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_what_save_lora_wrote_comes_back_to_the_bit(family, format, tmp_path):
    unet = tiny_pipeline(family).unet
    layers = factors(unet, linears(unet))
    save_lora(tmp_path / "a.safetensors", layers, unet, format=format)
    assert same(read_lora(tmp_path / "a.safetensors", unet), layers)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_factors_of_any_dtype_become_float32(dtype, tmp_path):
    unet = tiny_pipeline("sd1").unet
    layers = factors(unet, [LAYER], dtype=dtype)
    save_lora(tmp_path / "a.safetensors", layers, unet)
    expected = {LAYER: tuple(factor.float() for factor in layers[LAYER])}
    assert same(read_lora(tmp_path / "a.safetensors", unet), expected)


@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_the_alphas_of_diffusers_own_files(rank_stabilised, tmp_path):
    """Written by diffusers from an adapter with an alpha for all layers and one of its own."""
    pipe = tiny_pipeline("sdxl")
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=[LAYER, OTHER],
        alpha_pattern={OTHER: 2},
        rank_pattern={OTHER: 3},
        use_rslora=rank_stabilised,
        init_lora_weights=False,
    )
    pipe.unet.add_adapter(config)
    type(pipe).save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(pipe.unet),
        unet_lora_adapter_metadata=config.to_dict(),
    )
    found = read_lora(tmp_path / "pytorch_lora_weights.safetensors", tiny_pipeline("sdxl").unet)
    assert found.keys() == {LAYER, OTHER}
    for name, (up, down) in found.items():
        torch.testing.assert_close(up @ down, pipe.unet.get_submodule(name).get_delta_weight("default"))


def test_kohyas_alpha_divides_by_the_rank(tmp_path):
    unet = tiny_pipeline("sdxl").unet
    layers = factors(unet, [LAYER], rank=4)
    save_lora(tmp_path / "a.safetensors", layers, unet, format="kohya")
    tensors = load_file(tmp_path / "a.safetensors")
    save_file(
        {k: torch.tensor(1.0) if "alpha" in k else v for k, v in tensors.items()}, tmp_path / "b.safetensors"
    )
    up, down = read_lora(tmp_path / "b.safetensors", unet)[LAYER]
    assert torch.equal(up, layers[LAYER][0] / 4) and torch.equal(down, layers[LAYER][1])


@pytest.mark.parametrize(
    "pattern",
    [
        "unet.{}.lora.{}.weight",
        "{}.lora.{}.weight",
        "unet.{}_lora.{}.weight",
        "lora_unet_{}.lora_{}.weight",
    ],
)
def test_names_of_older_files(pattern, tmp_path):
    unet = tiny_pipeline("sdxl").unet
    layers = factors(unet, [LAYER])
    name = LAYER.replace(".", "_") if "lora_unet" in pattern else LAYER
    if "_lora.{}" in pattern:
        name = name.replace("attn2.", "attn2.processor.")
    save_file(
        {pattern.format(name, half): layers[LAYER][half == "down"] for half in ("up", "down")},
        tmp_path / "a.safetensors",
    )
    assert same(read_lora(tmp_path / "a.safetensors", unet), layers)


class TestBadFiles:
    def refuses(self, path, message: str) -> None:
        with pytest.raises(ValueError, match=message) as caught:
            read_lora(path, tiny_pipeline("sd1").unet)
        assert "\n" not in str(caught.value) and str(caught.value).startswith("path: ")

    def written(self, tmp_path, tensors, metadata=None):
        save_file(tensors, tmp_path / "a.safetensors", metadata)
        return tmp_path / "a.safetensors"

    def test_none(self, tmp_path):
        self.refuses(tmp_path / "none.safetensors", "cannot be read as a LoRA")

    def test_no_safetensors(self, tmp_path):
        (tmp_path / "a.safetensors").write_bytes(b"PK\x03\x04 a pickle")
        self.refuses(tmp_path / "a.safetensors", "cannot be read as a LoRA")

    def test_empty(self, tmp_path):
        self.refuses(self.written(tmp_path, {}), "got none, expected at least one")

    @pytest.mark.parametrize("header", ["{", "[]"])
    def test_a_header_that_is_no_table(self, header, tmp_path):
        layers = factors(tiny_pipeline("sd1").unet, [LAYER])
        tensors = {f"unet.{LAYER}.lora_{half}.weight": layers[LAYER][half == "A"] for half in "AB"}
        path = self.written(tmp_path, tensors, {"lora_adapter_metadata": header})
        self.refuses(path, "cannot be read as a LoRA")

    def test_an_alpha_that_is_no_number(self, tmp_path):
        path = self.written(tmp_path, {f"unet.{LAYER}.alpha": torch.ones(2)})
        self.refuses(path, "cannot be read as a LoRA")

    @pytest.mark.parametrize(
        "key",
        [
            "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight",
            "unet.conv_norm_out.lora_A.weight",
            f"unet.{LAYER}.lora_magnitude_vector",
            f"unet.{LAYER}.weight",
            LAYER,
        ],
    )
    def test_what_is_no_lora(self, key, tmp_path):
        self.refuses(
            self.written(tmp_path, {key: torch.ones(2, 2)}),
            "is no LoRA of a linear layer or convolution of the model",
        )

    def test_half_of_a_layer(self, tmp_path):
        path = self.written(tmp_path, {f"unet.{LAYER}.lora_A.weight": torch.ones(1, 32)})
        self.refuses(path, f"it has one of the two factors of '{LAYER}'")

    @pytest.mark.parametrize(
        ("up", "down"), [((32, 2), (3, 32)), ((31, 2), (2, 32)), ((32, 0), (0, 32)), ((), ())]
    )
    def test_shapes(self, up, down, tmp_path):
        tensors = {
            f"unet.{LAYER}.lora_B.weight": torch.ones(up),
            f"unet.{LAYER}.lora_A.weight": torch.ones(down),
        }
        self.refuses(self.written(tmp_path, tensors), r"got up \(.*\) and down \(.*\), expected \(32, r\)")
