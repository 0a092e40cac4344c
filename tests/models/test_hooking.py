"""Samples of one batch under different edits: each as that edit alone, applied to the weights."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor, nn

from pumice import models, testbed
from pumice.models import Added, Edit, Mapped, UnsupportedModelError, Zeroed, hook_edits
from pumice.testbed import tiny_pipeline

PROMPTS = ["a cat", "a red house by the sea", "", "zebra"]


def pipeline(name: str):
    return testbed.load() if name == "testbed" else tiny_pipeline(name)


def projections(pipe, which: str = "kv") -> dict[str, nn.Parameter]:
    ends = tuple(f"attn2.to_{letter}.weight" for letter in which)
    return {name: weight for name, weight in pipe.unet.named_parameters() if name.endswith(ends)}


def mapped(width: int, rank: int, seed: int) -> Mapped:
    generator = torch.Generator().manual_seed(seed)
    return Mapped.of(
        torch.randn(width, rank, generator=generator) / 3, torch.randn(rank, width, generator=generator) / 3
    )


def of_all(pipe, seed: int = 0, rank: int = 2, which: str = "kv") -> Edit:
    """One map for all layers."""
    change = mapped(pipe.unet.config.cross_attention_dim, rank, seed)
    return made(pipe, dict.fromkeys(projections(pipe, which), change))


def of_each(pipe, seed: int = 0) -> Edit:
    """For each layer a map, or a matrix that is added, of its own; for XL the pooled embedding's too."""
    changes: dict = {}
    for number, (name, weight) in enumerate(projections(pipe).items()):
        change = mapped(weight.shape[1], 1 + number % 3, seed + number)
        if number % 2:
            up = torch.randn(len(weight), 4, generator=torch.Generator().manual_seed(number)) / 3
            change = Added(up, mapped(weight.shape[1], 4, seed).down)
        changes[name] = change
    if pipe.unet.config.addition_embed_type == "text_time":
        name = "add_embedding.linear_1.weight"
        changes[name] = mapped(pipe.unet.get_parameter(name).shape[1], 3, seed)
    return made(pipe, changes)


def made(pipe, changes) -> Edit:
    return Edit.made(models.load(pipe), changes, method="by hand", targets=("a cat",))


def predict(pipe, batch: int = 4) -> Tensor:
    model = models.load(pipe)
    latents = torch.randn(batch, *model.latent_shape(), generator=torch.Generator().manual_seed(0))
    embeds = model.encode_prompt([PROMPTS[i % 4] for i in range(batch)])
    with torch.no_grad():
        return model.predict(latents, 300, embeds)


def applied(pipe, edit: Edit | None, batch: int = 4) -> Tensor:
    if edit is None:
        return predict(pipe, batch)
    with edit.on(pipe):
        return predict(pipe, batch)


def hooks(pipe) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pipe.unet.modules())


def same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "testbed"])
class TestOneEdit:
    @pytest.mark.parametrize("make", [of_all, of_each])
    def test_draws_as_applied(self, name, make):
        pipe = pipeline(name)
        edit, before = make(pipe), predict(pipe)
        expected = applied(pipe, edit)
        assert (expected - before).abs().max() > 1e-2
        weights = {key: weight.clone() for key, weight in pipe.unet.state_dict().items()}
        with edit.hook(pipe):
            same(predict(pipe), expected)
            assert all(torch.equal(weights[key], weight) for key, weight in pipe.unet.state_dict().items())
        assert torch.equal(predict(pipe), before) and hooks(pipe) == 0

    def test_each_sample_under_its_own(self, name):
        """Of different ranks, of different layers, composed, and none."""
        pipe = pipeline(name)
        plain = predict(pipe)
        edits = [
            of_all(pipe, 1, rank=1),
            None,
            of_each(pipe, 2),
            Edit.compose([of_all(pipe, 3, which="k"), of_all(pipe, 4, rank=5)]),
        ]
        with hook_edits(pipe, edits):
            found = predict(pipe)
        for i, edit in enumerate(edits):
            same(found[i], applied(pipe, edit)[i])
            assert (found[i] - plain[i]).abs().max() > 1e-3 or edit is None


class TestBatches:
    @pytest.fixture
    def pipe(self):
        return tiny_pipeline("sd1")

    def test_edits_repeat_over_the_batch(self, pipe):
        edits = [of_all(pipe, 1), of_all(pipe, 2, rank=3), None]
        with hook_edits(pipe, edits):
            found = predict(pipe, 6)
        for i in range(6):
            same(found[i], applied(pipe, edits[i % 3], 6)[i])

    @pytest.mark.parametrize("batch", [1, 3, 5])
    def test_one_that_is_no_multiple_is_refused(self, pipe, batch):
        before = predict(pipe)
        with hook_edits(pipe, [of_all(pipe), None]):
            with pytest.raises(ValueError, match=f"edits: got 2 for a batch of {batch}, expected") as caught:
                predict(pipe, batch)
            assert "\n" not in str(caught.value)
        assert torch.equal(predict(pipe), before) and hooks(pipe) == 0

    def test_none_is_no_edit_to_the_bit(self, pipe):
        with hook_edits(pipe, [of_all(pipe), None]):
            found = predict(pipe, 2)
        expected = predict(pipe, 2)
        assert torch.equal(found[1], expected[1]) and not torch.equal(found[0], expected[0])
        with hook_edits(pipe, [None]):
            assert torch.equal(predict(pipe), predict(pipe)) and hooks(pipe) == 0

    def test_edits_from_a_generator(self, pipe):
        edit = of_all(pipe)
        with hook_edits(pipe, (one for one in [edit, None])):
            found = predict(pipe)
        same(found[::2], applied(pipe, edit)[::2])

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_in_the_models_dtype(self, dtype):
        pipe = tiny_pipeline("sd1").to(dtype=dtype)
        edit = of_each(pipe)
        with edit.hook(pipe):
            found = predict(pipe)
        assert found.dtype == dtype
        tolerance = 1e-12 if dtype == torch.float64 else 0.1
        torch.testing.assert_close(found, applied(pipe, edit), rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_a_pipelines_call_with_guidance(name, scale):
    """Both rows of a sample, with its prompt and without, meet its edit; two pictures a prompt too."""
    pipe = tiny_pipeline(name)
    edits = [of_all(pipe, 1, rank=1), None, of_each(pipe, 2), of_all(pipe, 3, rank=6)]

    def draw() -> Tensor:
        return pipe(
            PROMPTS[:2],
            num_images_per_prompt=2,
            num_inference_steps=2,
            guidance_scale=scale,
            generator=[torch.Generator().manual_seed(seed) for seed in range(4)],
            output_type="latent",
        ).images

    with hook_edits(pipe, edits):
        found = draw()
    plain = draw()
    assert torch.equal(found[1], plain[1])
    for i, edit in enumerate(edits):
        if edit is not None:
            with edit.on(pipe):
                torch.testing.assert_close(found[i], draw()[i], rtol=0, atol=1e-4)
            assert (found[i] - plain[i]).abs().max() > 1e-3


class TestTheyAreGone:
    @pytest.fixture
    def pipe(self):
        return tiny_pipeline("sd1")

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    def test_after_an_error_in_the_block(self, pipe, error):
        edit, before = of_all(pipe), predict(pipe)

        def fails():
            with edit.hook(pipe):
                predict(pipe)
                raise error("mine")

        with pytest.raises(error, match="mine"):
            fails()
        assert hooks(pipe) == 0 and torch.equal(predict(pipe), before)

    def test_after_an_error_on_the_way_in(self, pipe):
        """Some layers have their hooks when the one comes whose entries would be zeroed."""
        names = list(projections(pipe))
        zeroed = Zeroed.pack(projections(pipe)[names[-1]] > 0)
        edit = made(pipe, {names[0]: mapped(32, 1, 0), names[-1]: zeroed})
        with pytest.raises(ValueError, match=r"edits: one zeroes weights, .*; apply it"), edit.hook(pipe):
            pytest.fail("it was taken")
        assert hooks(pipe) == 0

    def test_and_those_of_others_stay(self, pipe):
        seen = []
        layer = next(m for name, m in pipe.unet.named_modules() if name.endswith("attn2.to_k"))
        handle = layer.register_forward_hook(lambda *args: seen.append(1))
        with of_all(pipe).hook(pipe):
            predict(pipe)
        predict(pipe)
        assert len(seen) == 2 and hooks(pipe) == 1
        handle.remove()

    def test_blocks_inside_each_other_map_one_after_the_other(self, pipe):
        """The inner one sees what the outer one made of the embeddings."""
        first, second = of_all(pipe, 1), of_all(pipe, 2)
        with first.hook(pipe), second.hook(pipe):
            found = predict(pipe)
        same(found, applied(pipe, Edit.compose([second, first])))


class TestRefused:
    @pytest.fixture
    def pipe(self):
        return tiny_pipeline("sd1")

    def refused(self, pipe, edits, message: str, error: type[Exception] = ValueError) -> None:
        with pytest.raises(error, match=message) as caught, hook_edits(pipe, edits):
            pytest.fail("it was taken")
        assert "\n" not in str(caught.value)

    def test_no_edits(self, pipe):
        self.refused(pipe, [], "edits: got none, expected one for each sample, or None")

    def test_a_path(self, pipe):
        self.refused("a/model", [of_all(pipe)], "pipe: got a str, expected a loaded pipeline", TypeError)

    def test_an_edit_of_another_model(self, pipe):
        other = of_all(tiny_pipeline("sd1", seed=1))
        self.refused(pipe, [None, of_all(pipe), other], "pipe: got weights of the fingerprint")
        assert hooks(pipe) == 0

    def test_an_edit_that_is_applied(self, pipe):
        edit = of_all(pipe)
        with edit.on(pipe):
            self.refused(pipe, [edit], "pipe: got weights of the fingerprint .* without other edits")

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (UNet2DConditionModel.fuse_qkv_projections, "fused.*call unfuse_qkv_projections"),
            (lambda unet: unet.add_adapter(LoraConfig(target_modules=["to_v"])), "call unload_lora_weights"),
        ],
        ids=["fused", "LoRA"],
    )
    def test_layers_that_are_not_plain(self, pipe, spoil, message):
        edit = of_all(pipe)
        spoil(pipe.unet)
        self.refused(pipe, [edit], message, UnsupportedModelError)
