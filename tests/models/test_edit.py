"""An edit changes exactly its entries, comes off to the bit, and never stays half applied."""

from __future__ import annotations

import gc
import json

import pytest
import safetensors.torch
import torch
from peft import LoraConfig

from pumice import models
from pumice.models import Edit, Mapped, Shifted, UnsupportedModelError, Zeroed, fingerprint
from pumice.testbed import tiny_pipeline

FFN = "mid_block.attentions.0.transformer_blocks.0.ff.net.2.weight"
TO_V = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v.weight"


def weights(pipe) -> dict[str, torch.Tensor]:
    return {
        name: weight.clone(memory_format=torch.contiguous_format)
        for name, weight in pipe.unet.state_dict().items()
    }


def same(pipe, before: dict[str, torch.Tensor]) -> bool:
    """Bit by bit: NaN and the sign of zero count."""
    after = weights(pipe)
    return all(torch.equal(after[name].view(torch.uint8), w.view(torch.uint8)) for name, w in before.items())


def masks(pipe, names=(FFN, TO_V), share: float = 0.3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    parameters = dict(pipe.unet.named_parameters())
    return {name: torch.rand(parameters[name].shape, generator=generator) < share for name in names}


def make(pipe, **about) -> Edit:
    changes = {name: Zeroed.pack(mask) for name, mask in masks(pipe).items()}
    about = {"method": "by hand", "targets": ("a cat",), "settings": {"share": 0.3}} | about
    return Edit(changes, base=fingerprint(models.load(pipe)), **about)


def predict(pipe) -> torch.Tensor:
    model = models.load(pipe)
    with torch.no_grad():
        return model.predict_noise(torch.ones(1, *model.latent_shape()), 500, model.encode_prompt("a cat"))


@pytest.mark.parametrize("shape", [(3, 8), (5, 7), (1,), (2, 3, 3), (4, 0)])
def test_masks_are_packed_without_loss(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.4
    packed = Zeroed.pack(mask)
    assert packed.bits.dtype == torch.uint8 and len(packed.bits) == -(-mask.numel() // 8)
    assert torch.equal(packed.mask(), mask) and packed.count == mask.sum()


def test_the_first_entry_is_the_highest_bit():
    mask = torch.tensor([[True, False, False], [False, False, False], [False, True, True]])
    assert Zeroed.pack(mask).bits.tolist() == [0b10000001, 0b10000000]


def test_the_masked_entries_become_zero_and_nothing_else_changes():
    pipe = tiny_pipeline("sd1")
    before, expected = weights(pipe), weights(pipe)
    for name, mask in masks(pipe).items():
        expected[name][mask] = 0
    make(pipe).apply(pipe)
    assert same(pipe, expected) and not same(pipe, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_comes_off_to_the_bit(dtype, memory_format, tmp_path):
    pipe = tiny_pipeline("sd1").to(dtype=dtype)
    pipe.unet.to(memory_format=memory_format)
    with torch.no_grad():
        pipe.unet.get_parameter(FFN).view(-1)[:4] = torch.tensor([-0.0, 0.0, float("nan"), float("-inf")])
    before = weights(pipe)
    make(pipe).save(tmp_path / "edit.safetensors")
    edit = Edit.load(tmp_path / "edit.safetensors")
    edit.apply(pipe)
    assert not same(pipe, before)
    edit.remove(pipe)
    assert same(pipe, before)
    assert fingerprint(models.load(pipe)) == edit.base


def test_comes_off_a_weight_that_is_not_contiguous():
    pipe = tiny_pipeline("sd1")
    weight = pipe.unet.get_parameter(FFN)
    weight.data = weight.data.T.contiguous().T
    before = weights(pipe)
    with make(pipe).on(pipe):
        assert not same(pipe, before)
    assert same(pipe, before)


def test_comes_off_in_another_dtype_as_if_it_had_never_been():
    pipe, other = tiny_pipeline("sd1"), tiny_pipeline("sd1").to(dtype=torch.bfloat16)
    edit = make(pipe)
    edit.apply(pipe)
    pipe.to(dtype=torch.bfloat16)
    edit.remove(pipe)
    assert same(pipe, weights(other))


def test_works_on_a_model_adapter_and_inside_inference_mode():
    model = models.load(tiny_pipeline("sdxl"))
    before = weights(model.pipe)
    edit = make(model.pipe)
    with torch.inference_mode():
        edit.apply(model)
    assert not same(model.pipe, before)
    edit.remove(model.pipe)
    assert same(model.pipe, before)


def test_on_is_undone_after_an_error():
    pipe = tiny_pipeline("sd1")
    before, edit, plain = weights(pipe), make(pipe), predict(pipe)
    with edit.on(pipe):
        assert not torch.equal(predict(pipe), plain)
    assert same(pipe, before)

    def fails():
        with edit.on(pipe):
            assert not same(pipe, before)
            raise RuntimeError("the block's own")

    with pytest.raises(RuntimeError, match="the block's own"):
        fails()
    assert same(pipe, before)
    assert torch.equal(predict(pipe), plain)


def test_gradients_flags_and_modes_stay():
    pipe = tiny_pipeline("sd1")
    pipe.unet.train().get_parameter(FFN).requires_grad_(False)
    flags = [p.requires_grad for p in pipe.unet.parameters()]
    parameters = list(pipe.unet.parameters())
    with make(pipe).on(pipe):
        assert all(a is b for a, b in zip(parameters, pipe.unet.parameters(), strict=True))
    assert pipe.unet.training and flags == [p.requires_grad for p in pipe.unet.parameters()]


def test_two_edits_one_on_the_other():
    pipe = tiny_pipeline("sd1")
    before = weights(pipe)
    first = make(pipe)
    with first.on(pipe):
        second = make(pipe)
        assert second.base != first.base
        with second.on(pipe):
            pass
    assert same(pipe, before)
    with pytest.raises(ValueError, match="pipe: got weights of the fingerprint"):
        second.apply(pipe)


def test_says_what_it_does(tmp_path):
    pipe = tiny_pipeline("sd1")
    edit = make(pipe, details={"neurons": {"a cat": [1, 2]}})
    for name, mask in masks(pipe).items():
        assert edit.report()["zeroed"][name] == pytest.approx(float(mask.float().mean()))
    edit.save(tmp_path / "new folder" / "edit.safetensors")
    again = Edit.load(tmp_path / "new folder" / "edit.safetensors")
    assert again.to_dict() == edit.to_dict() == json.loads(json.dumps(edit.to_dict()))
    assert again.targets == ("a cat",) and again.details == {"neurons": {"a cat": [1, 2]}}
    assert again.version == edit.version and "1 targets" in repr(edit)
    assert [path.name for path in (tmp_path / "new folder").iterdir()] == ["edit.safetensors"]


def test_the_file_holds_packed_bits(tmp_path):
    pipe = tiny_pipeline("sd1")
    edit = make(pipe)
    edit.save(tmp_path / "edit.safetensors")
    tensors = safetensors.torch.load_file(tmp_path / "edit.safetensors")
    assert sorted(map(len, tensors.values())) == sorted(
        -(-change.size // 8) for change in edit.changes.values()
    )


def test_what_was_kept_goes_with_the_pipeline():
    pipe = tiny_pipeline("sd1")
    edit = make(pipe)
    edit.apply(pipe)
    assert len(edit._originals) == 1
    del pipe
    gc.collect()
    assert not edit._originals


def test_rebased_it_changes_a_descendant_by_the_same():
    """W0 + dW_edit + dW_finetune; of parts, too."""
    pipe, tuned = tiny_pipeline("sd1"), tiny_pipeline("sd1")
    with torch.no_grad():
        tuned.unet.get_parameter(FFN).add_(0.5)
    delta = torch.ones_like(pipe.unet.get_parameter(FFN).detach()) / 8
    width = pipe.unet.get_parameter(TO_V).shape[1]
    mapped = Mapped.of(torch.eye(width)[:, :1], torch.eye(width)[:1])
    model = models.load(pipe)
    shift = Edit.made(model, {FFN: Shifted(delta)}, method="one", targets=("a",))
    double = Edit.made(model, {TO_V: mapped}, method="two", targets=("b",))
    edit = Edit.compose([shift, double])
    with pytest.raises(ValueError, match="pipe: got weights of the fingerprint"):
        edit.apply(tuned)
    moved, before = edit.rebased(tuned), weights(tuned)
    assert moved.base == fingerprint(models.load(tuned)) == moved.parts[0].base
    assert moved.targets == edit.targets and edit.base == fingerprint(model)
    with moved.on(tuned):
        assert torch.equal(tuned.unet.get_parameter(FFN).detach(), before[FFN] + delta)
        expected = before[TO_V].clone()
        expected[:, 0] *= 2
        torch.testing.assert_close(tuned.unet.get_parameter(TO_V).detach(), expected, rtol=1e-6, atol=1e-6)
    assert same(tuned, before)
    with moved.without("b").on(tuned):
        assert torch.equal(tuned.unet.get_parameter(TO_V).detach(), before[TO_V])
    with pytest.raises(ValueError, match="pipe: got weights of the fingerprint"):
        moved.apply(pipe)


def test_rebased_to_what_is_no_descendant_is_refused():
    pipe, other = tiny_pipeline("sd1"), tiny_pipeline("sdxl")
    bias = FFN.replace("weight", "bias")
    edit = Edit.made(
        models.load(pipe),
        {bias: Shifted(torch.zeros(len(pipe.unet.get_parameter(bias)) + 1))},
        method="by hand",
        targets=("a",),
    )
    with pytest.raises(ValueError, match=r"^mid_block.* has shape .*, its change is for"):
        edit.rebased(pipe)
    missing = Edit.made(models.load(pipe), {"no.weight": Shifted(torch.zeros(1))}, method="x", targets=("a",))
    with pytest.raises(ValueError, match=r"^pipe: it has no weight no.weight"):
        missing.rebased(other)
    with pytest.raises(TypeError, match=r"^pipe: got a str, expected a loaded pipeline"):
        edit.rebased("a/model")


def refused(work, pipe, message: str, error=ValueError) -> None:
    before = weights(pipe)
    with pytest.raises(error, match=message) as caught:
        work()
    assert "\n" not in str(caught.value)
    assert same(pipe, before)


def test_another_checkpoint_is_refused():
    edit, other = make(tiny_pipeline("sd1")), tiny_pipeline("sd1", seed=1)
    found = fingerprint(models.load(other))
    refused(
        lambda: edit.apply(other), other, f"pipe: got weights of .*{found[:12]}, expected {edit.base[:12]}"
    )
    refused(lambda: edit.apply(tiny_pipeline("sdxl")), other, "pipe: got weights of")


def test_a_second_apply_or_remove_is_refused(tmp_path):
    pipe = tiny_pipeline("sd1")
    edit = make(pipe)
    edit.save(tmp_path / "edit.safetensors")
    loaded = Edit.load(tmp_path / "edit.safetensors")
    refused(lambda: edit.remove(pipe), pipe, "pipe: this edit is not applied")
    edit.apply(pipe)
    refused(lambda: edit.apply(pipe), pipe, "pipe: this edit is applied to it already")
    refused(lambda: loaded.apply(pipe), pipe, "pipe: got weights of the fingerprint")
    refused(lambda: loaded.remove(pipe), pipe, "pipe: this edit is not applied")
    refused(lambda: edit.remove(tiny_pipeline("sd1")), pipe, "pipe: this edit is not applied")
    edit.remove(pipe)
    refused(lambda: edit.remove(pipe), pipe, "pipe: this edit is not applied")


def test_nothing_stays_half_applied(monkeypatch):
    pipe = tiny_pipeline("sd1")
    edit, apply, calls = make(pipe), Zeroed.apply, []

    def fails_the_second_time(self, weight):
        apply(self, weight)
        calls.append(self)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Zeroed, "apply", fails_the_second_time)
    refused(lambda: edit.apply(pipe), pipe, "CUDA out of memory", torch.OutOfMemoryError)
    edit.apply(pipe)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda unet: unet.add_adapter(LoraConfig(r=2, target_modules=["ff.net.2"])),
            "ff.net.2: a LoRA adapter is attached",
        ),
        (
            lambda unet: unet.add_adapter(LoraConfig(r=2, target_modules=["to_v"])),
            "to_v: a LoRA adapter is attached",
        ),
        (lambda unet: unet.get_submodule(FFN[:-7]).to("meta"), "ff.net.2: its weight is offloaded"),
        (
            lambda unet: unet.get_submodule(TO_V[:-7]).to(torch.float8_e4m3fn),
            "to_v: its weight is a torch.float8",
        ),
        (lambda unet: unet.fuse_qkv_projections(), "its projections are fused"),
    ],
    ids=["LoRA on ffn", "LoRA on to_v", "offloaded", "quantised", "fused"],
)
def test_layers_that_are_not_plain_are_refused(spoil, message):
    pipe = tiny_pipeline("sd1")
    edit = make(pipe)
    spoil(pipe.unet)
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        edit.apply(pipe)
    assert "\n" not in str(caught.value)
    assert not edit._originals


def test_a_path_is_refused_as_a_pipeline():
    pipe = tiny_pipeline("sd1")
    refused(lambda: make(pipe).apply("stabilityai/sd"), pipe, "pipe: got a str, expected a loaded", TypeError)


def test_files_that_are_no_edits_are_refused(tmp_path):
    pipe = tiny_pipeline("sd1")
    good = tmp_path / "good.safetensors"
    make(pipe).save(good)
    with safetensors.safe_open(good, "pt") as file:
        header = file.metadata()
    tensors = safetensors.torch.load_file(good)
    short = {name: bits[1:] for name, bits in tensors.items()}
    files = {
        "text": b"not safetensors at all",
        "cut": good.read_bytes()[:-10],
        "weights": safetensors.torch.save({"a": torch.zeros(2)}),
        "another format": safetensors.torch.save(tensors, {**header, "format": "pumice.edit.9"}),
        "no masks": safetensors.torch.save({}, header),
        "short masks": safetensors.torch.save(short, header),
        "no JSON": safetensors.torch.save(tensors, {**header, "edit": "{"}),
        "a field too many": safetensors.torch.save(
            tensors, {**header, "edit": json.dumps(json.loads(header["edit"]) | {"more": 1})}
        ),
    }
    for name, content in files.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"^path: '.*{name}' cannot be read as an edit: .+") as caught:
            Edit.load(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="cannot be read as an edit"):
        Edit.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="path: cannot write to"):
        make(pipe).save(good / "below a file")
