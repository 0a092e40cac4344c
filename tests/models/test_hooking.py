"""Samples of one batch under different edits: each as that edit alone, applied to the weights."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor, nn

from pumice import models, testbed
from pumice.models import Added, Edit, Mapped, Shifted, UnsupportedModelError, Zeroed, hook_edits
from pumice.models.changes import Chain
from pumice.models.hooking import hooked
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


def parts(pipe, kind, leaf: str = "weight") -> list[str]:
    """The names of such weights of layers of a kind."""
    layers = [name for name, module in pipe.unet.named_modules() if isinstance(module, kind)]
    return [f"{name}.{leaf}" for name in layers if hasattr(pipe.unet.get_submodule(name), leaf)]


def shifted(pipe, names, seed: int = 0) -> dict:
    """What training leaves: small, beside weights and biases of any shape."""
    generator = torch.Generator().manual_seed(seed)
    weights = dict(pipe.unet.named_parameters())
    return {
        name: Shifted(torch.randn(weights[name].shape, generator=generator) / 10)
        for name in names
        if name in weights
    }


def low_rank(pipe, names, seed: int = 0, rank: int = 2) -> dict:
    """What LoRA leaves, of convolutions in rows of all that an output reads."""
    generator = torch.Generator().manual_seed(seed)
    changes = {}
    for name in names:
        rows = pipe.unet.get_parameter(name).flatten(1)
        up = torch.randn(len(rows), rank, generator=generator) / 10
        changes[name] = Added(up, torch.randn(rank, rows.shape[1], generator=generator) / 3)
    return changes


def chained(pipe, seed: int = 0) -> dict:
    """Maps, matrices and whole tensors of one weight, one after the other."""
    names = list(projections(pipe))
    first = of_all(pipe, seed).changes
    added, whole = low_rank(pipe, names, seed), shifted(pipe, names, seed)
    orders = [(whole, first), (first, added), (first, whole, added), (added, first)]
    return {
        name: Chain(tuple(part[name] for part in orders[number % 4])) for number, name in enumerate(names)
    }


TRAINED = {
    "linear weights": lambda pipe, seed: shifted(pipe, parts(pipe, nn.Linear), seed),
    "linear biases": lambda pipe, seed: shifted(pipe, parts(pipe, nn.Linear, "bias"), seed),
    "convolutions": lambda pipe, seed: shifted(pipe, parts(pipe, nn.Conv2d), seed),
    "convolutions' biases": lambda pipe, seed: shifted(pipe, parts(pipe, nn.Conv2d, "bias"), seed),
    "norms": lambda pipe, seed: shifted(pipe, parts(pipe, nn.GroupNorm | nn.LayerNorm), seed),
    "norms' biases": lambda pipe, seed: shifted(pipe, parts(pipe, nn.GroupNorm | nn.LayerNorm, "bias"), seed),
    "all": lambda pipe, seed: shifted(pipe, dict(pipe.unet.named_parameters()), seed),
    "LoRA of convolutions": lambda pipe, seed: low_rank(pipe, parts(pipe, nn.Conv2d), seed),
    "LoRA of all": lambda pipe, seed: low_rank(pipe, parts(pipe, nn.Linear | nn.Conv2d), seed, 1),
    "chains": chained,
}


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


def relative(actual: Tensor, expected: Tensor, original: Tensor) -> float:
    """By how much they differ, in parts of what the edit does."""
    return float((actual - expected).norm() / (expected - original).norm())


class TestTrained:
    """Changes that training makes: of any weight, whole or of low rank."""

    @pytest.mark.parametrize("name", ["sd1", "sdxl"])
    def test_edits_of_all_kinds_in_one_batch(self, name):
        pipe = tiny_pipeline(name)
        edits = [of_each(pipe, 5), *(made(pipe, make(pipe, 3)) for make in TRAINED.values()), None]
        plain = predict(pipe, len(edits))
        weights = {key: weight.clone() for key, weight in pipe.unet.state_dict().items()}
        with hook_edits(pipe, edits):
            found = predict(pipe, len(edits))
        assert all(torch.equal(weights[key], weight) for key, weight in pipe.unet.state_dict().items())
        assert hooks(pipe) == 0
        for i, edit in enumerate(edits[:-1]):
            assert relative(found[i], applied(pipe, edit, len(edits))[i], plain[i]) < 1e-4
        same(found[-1], plain[-1])

    @pytest.mark.parametrize("kind", ["all", "LoRA of all", "chains"])
    def test_they_repeat_over_the_batch(self, kind):
        pipe = tiny_pipeline("sd1")
        edits = [made(pipe, TRAINED[kind](pipe, 1)), None, made(pipe, TRAINED[kind](pipe, 2))]
        plain = predict(pipe, 6)
        with hook_edits(pipe, edits):
            found = predict(pipe, 6)
        for number in (0, 2):
            expected = applied(pipe, edits[number], 6)
            for i in (number, number + 3):
                assert relative(found[i], expected[i], plain[i]) < 1e-4
        assert torch.equal(found[1::3], plain[1::3])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.bfloat16, 0.2)])
def test_trained_in_the_models_dtype(dtype, tolerance):
    pipe = tiny_pipeline("sd1").to(dtype=dtype)
    edit = made(
        pipe, {**TRAINED["all"](pipe, 1), **TRAINED["LoRA of convolutions"](pipe, 2), **chained(pipe)}
    )
    plain = predict(pipe)
    with edit.hook(pipe):
        found = predict(pipe)
    assert found.dtype == dtype
    assert relative(found, applied(pipe, edit), plain) < tolerance


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layer", [nn.Linear(6, 5), nn.Conv2d(4, 6, 3, 2, 1), nn.GroupNorm(2, 4)])
def test_a_layer_is_as_near_as_its_dtype(layer, dtype):
    """Nearer than the edited weight, which is rounded to the dtype after the sum."""
    layer = nn.Sequential(copy.deepcopy(layer)).to(dtype)
    x = torch.randn(4, 4, 6, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    deltas = [torch.randn(layer[0].weight.shape, generator=torch.Generator().manual_seed(i)) for i in (1, 2)]
    with torch.no_grad(), hooked(layer, [{"0.weight": Shifted(delta)} for delta in deltas]):
        found = layer(x)
    assert found.dtype == dtype
    exact = copy.deepcopy(layer).double()
    for i in range(4):
        own = {"0.weight": exact[0].weight + deltas[i % 2].double(), "0.bias": exact[0].bias}
        expected = torch.func.functional_call(exact, own, (x[i : i + 1].double(),))[0]
        error = (found[i] - expected).abs().max() / expected.abs().max()
        assert error < 4 * torch.finfo(dtype).eps


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

    def test_a_change_of_a_text_encoder(self, pipe):
        name, weight = next(iter(pipe.text_encoder.named_parameters()))
        edit = made(pipe, {f"text_encoder.{name}": Shifted(torch.ones(weight.shape))})
        self.refused(pipe, [edit], "edits: one changes a text encoder, .*; apply it")

    def test_a_chain_that_zeroes(self, pipe):
        name, weight = next(iter(projections(pipe).items()))
        whole = Shifted(torch.ones(weight.shape))
        edit = made(pipe, {name: Chain((whole, Zeroed.pack(weight > 0)))})
        self.refused(pipe, [edit, None], r"edits: one zeroes weights, .*; apply it")

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
