"""What each change does to a weight, in every dtype, and that an edit of them comes off to the bit."""

from __future__ import annotations

import gc
import json
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from pumice import models
from pumice.models import Added, Edit, Mapped, Shifted, Zeroed
from pumice.models.changes import Chain, nearest
from pumice.testbed import tiny_pipeline

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2"
TO_K, TO_V = f"{LAYER}.to_k.weight", f"{LAYER}.to_v.weight"
OTHER = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def factors(rows: int = 32, width: int = 32, rank: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, rank, generator=generator, dtype=torch.float64) / 4,
        torch.randn(rank, width, generator=generator, dtype=torch.float64) / 4,
    )


def matrix(rows: int, dtype: torch.dtype = torch.float32, width: int = 32) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(9)).to(dtype)


def mapped(seed: int = 0, rank: int = 3) -> Mapped:
    return Mapped.of(*factors(rank=rank, seed=seed))


def added(rows: int = 32, seed: int = 0) -> Added:
    return Added(*(factor.float() for factor in factors(rows, seed=seed)))


def shifted(shape: tuple[int, ...] = (32, 32), seed: int = 0) -> Shifted:
    return Shifted(torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / 4)


def edit(pipe, seed: int = 0) -> Edit:
    """A map that two layers share, one of another, and a matrix that is added to a third."""
    shared = mapped(seed)
    changes = {TO_K: shared, TO_V: shared, OTHER: mapped(seed + 1, rank=5)}
    changes[OTHER.replace("to_k", "to_v")] = added(16, seed + 2)
    return Edit.made(
        models.load(pipe), changes, method="by hand", targets=("a cat",), settings={"seed": seed}
    )


def bits(pipe) -> dict[str, Tensor]:
    return {
        name: weight.detach().clone().contiguous().view(torch.uint8)
        for name, weight in pipe.unet.named_parameters()
    }


def same(pipe, before: dict[str, Tensor]) -> bool:
    after = bits(pipe)
    return all(torch.equal(after[name], weight) for name, weight in before.items())


@pytest.mark.parametrize("dtype", DTYPES)
class TestApply:
    """Sums run in float32 or better, and each result is rounded once to the weight's dtype."""

    def check(self, actual: Tensor, expected: Tensor, dtype: torch.dtype, least: float = 1e-13) -> None:
        assert actual.dtype == dtype and actual.shape == expected.shape
        step = max(torch.finfo(dtype).eps, 1e-6 if dtype == torch.float32 else least)
        torch.testing.assert_close(actual.double(), expected, rtol=step, atol=step)

    def test_mapped_is_the_product(self, dtype):
        change = mapped()
        weights = [matrix(8, dtype), matrix(20, dtype)]
        inner = torch.eye(32) + change.up.double() @ change.down.double()
        expected = [weight.double() @ inner for weight in weights]
        change.apply(weights)
        for weight, wanted in zip(weights, expected, strict=True):
            self.check(weight, wanted, dtype)

    def test_added_is_the_sum(self, dtype):
        change, weight = added(20), matrix(20, dtype)
        expected = weight.double() + change.up.double() @ change.down.double()
        change.apply([weight])
        self.check(weight, expected, dtype)

    def test_added_to_a_convolution_is_the_sum_of_what_an_output_reads(self, dtype):
        change, weight = added(20), matrix(20, dtype).view(20, 2, 4, 4).to(memory_format=torch.channels_last)
        expected = weight.double() + (change.up.double() @ change.down.double()).view(20, 2, 4, 4)
        change.check("here", weight)
        change.apply([weight])
        self.check(weight, expected, dtype)

    @pytest.mark.parametrize("shape", [(32,), (20, 32), (4, 8, 4, 2)])
    def test_shifted_is_the_sum_for_any_shape(self, shape, dtype):
        change = shifted(shape)
        weight = matrix(max(1, change.delta.numel() // 32), dtype).view(shape)
        expected = weight.double() + change.delta.double()
        change.apply([weight])
        self.check(weight, expected, dtype)

    def test_a_chain_is_one_after_the_other(self, dtype):
        """Rounded to the weight's dtype after each, as edits that are applied one on the other."""
        parts = (mapped(), shifted(), added(), Zeroed.pack(matrix(32) > 1))
        weight, expected = matrix(32, dtype), matrix(32, dtype)
        for part in parts:
            part.apply([expected])
        chain = Chain(parts)
        chain.check("here", weight)
        chain.apply([weight])
        assert torch.equal(weight, expected)

    @pytest.mark.parametrize("change", [mapped(), added()], ids=["mapped", "added"])
    def test_as_a_lora(self, change, dtype):
        weight = matrix(32, dtype)
        up, down = change.lora(weight)
        assert up.dtype == down.dtype == torch.float32
        expected = weight.double() + up.double() @ down.double()
        change.apply([weight])
        self.check(weight, expected, dtype, least=1e-6)  # its factors are float32 whatever the weight

    @pytest.mark.parametrize(
        "change",
        [mapped(), added(), shifted(), Chain((shifted(), mapped(), Zeroed.pack(matrix(32) > 0)))],
        ids=["mapped", "added", "shifted", "chain"],
    )
    def test_what_was_there_comes_back_to_the_bit(self, change, dtype):
        weight = matrix(32, dtype)
        weight[0, :2] = torch.tensor([-0.0, float("nan")])
        before = weight.clone().view(torch.uint8)
        kept = change.originals(weight)
        change.apply([weight])
        assert not torch.equal(weight.view(torch.uint8), before)
        change.undo(weight, kept)
        assert torch.equal(weight.view(torch.uint8), before)


class TestMapped:
    def test_a_rank_above_the_width_becomes_the_width(self):
        up, down = factors(rank=50)
        change = Mapped.of(up, down)
        assert change.rank == 32 and change.up.shape == change.down.shape == (32, 32)
        torch.testing.assert_close(change.up @ change.down, (up @ down).float(), rtol=1e-6, atol=1e-6)

    def test_one_after_the_other(self):
        changes = [mapped(seed, rank) for seed, rank in ((0, 3), (1, 5), (2, 30))]
        weight = matrix(8, torch.float64)
        expected = weight.clone()
        for change in changes:
            change.apply([expected])
        product = changes[0].then(changes[1]).then(changes[2])
        assert product.rank == 32
        product.apply([weight])
        torch.testing.assert_close(weight, expected, rtol=0, atol=1e-5)
        assert changes[0].then(changes[1]).rank == 8

    def test_the_nearest_of_a_lower_rank(self):
        change = mapped(rank=6)
        whole = change.up.double() @ change.down.double()
        values = torch.linalg.svdvals(whole)
        for rank in (1, 4, 6):
            smaller = change.at_most(rank)
            assert type(smaller) is Mapped and smaller.rank == rank
            left = (whole - smaller.up.double() @ smaller.down.double()).norm()
            torch.testing.assert_close(left, values[rank:].norm(), rtol=1e-4, atol=1e-5)


class TestShifted:
    def test_the_nearest_of_a_rank(self):
        change = shifted((20, 32))
        values = torch.linalg.svdvals(change.delta.double())
        for rank in (1, 5, 20):
            up, down = nearest(change, torch.zeros(20, 32), rank)
            assert up.shape == (20, rank) and down.shape == (rank, 32)
            left = (change.delta.double() - up.double() @ down.double()).norm()
            torch.testing.assert_close(left, values[rank:].norm(), rtol=1e-4, atol=1e-5)

    def test_a_convolution_is_a_matrix_of_all_that_an_output_reads(self):
        change = shifted((4, 2, 3, 3))
        up, down = nearest(change, torch.ones(4, 2, 3, 3), 4)
        torch.testing.assert_close(up @ down, change.delta.flatten(1))

    @pytest.mark.parametrize(
        ("delta", "message"),
        [
            (torch.zeros(2, 2).double(), "not float32"),
            (torch.tensor([torch.nan]), "not finite"),
            (torch.tensor([torch.inf]), "not finite"),
        ],
    )
    def test_tensors_that_are_none(self, delta, message):
        with pytest.raises(ValueError, match=message):
            Shifted(delta)


@pytest.mark.parametrize("kind", [Mapped, Added])
@pytest.mark.parametrize(
    ("up", "down", "message"),
    [
        (torch.zeros(4, 2).double(), torch.zeros(2, 4), "not float32 matrices"),
        (torch.zeros(4), torch.zeros(1, 4), "not float32 matrices"),
        (torch.zeros(4, 2), torch.zeros(3, 4), r"\(4, 2\) and \(3, 4\), do not fit"),
        (torch.full((4, 2), torch.nan), torch.zeros(2, 4), "not finite"),
        (torch.zeros(4, 2), torch.full((2, 4), torch.inf), "not finite"),
    ],
)
def test_factors_that_are_none(kind, up, down, message):
    with pytest.raises(ValueError, match=message):
        kind(up, down)


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (mapped(), None),
        (added(20), 20),
        (Zeroed.pack(matrix(20) > 0), 20),
        (shifted((20, 32)), 20),
        (Chain((mapped(), added(20))), 20),
    ],
)
def test_a_change_fits_weights_of_its_shape(change, rows):
    change.check("here", torch.zeros(rows or 7, 32))
    for shape in ((rows or 7, 31), *([(21, 32)] if rows else [])):
        with pytest.raises(ValueError, match=rf"^here has shape \({shape[0]}, {shape[1]}\), its "):
            change.check("here", torch.zeros(shape))


CONVOLUTION, BIAS = "conv_in.weight", "conv_in.bias"


def of_text(pipe, network: str) -> str:
    """The name of a weight of a text encoder."""
    end = "layers.0.self_attn.q_proj.weight"
    of = models.edit.weights(models.load(pipe))
    return next(name for name in of if name.startswith(f"{network}.") and name.endswith(end))


def trained(pipe) -> Edit:
    """What training leaves: convolutions, biases, layers of the text encoder, with and without a LoRA."""
    of = models.edit.weights(models.load(pipe))
    changes = {
        name: shifted(tuple(of[name].shape))
        for name in (TO_K, CONVOLUTION, BIAS, of_text(pipe, "text_encoder"))
    }
    inputs = of["conv_out.weight"][0].numel()
    changes["conv_out.weight"] = Added(torch.ones(len(of["conv_out.weight"]), 1), torch.ones(1, inputs))
    return Edit.made(models.load(pipe), changes, method="by hand", targets=("a cat",))


@pytest.mark.parametrize(
    ("change", "shape"),
    [
        (Added(torch.ones(16, 1), torch.ones(1, 1)), (16,)),
        (Mapped(torch.ones(1, 1), torch.ones(1, 1)), (16,)),
        (Mapped(torch.ones(36, 1), torch.ones(1, 36)), (16, 4, 3, 3)),
    ],
)
def test_factors_are_of_matrices(change, shape):
    """What is added, of convolutions, too, and what maps, of what enters as rows."""
    with pytest.raises(ValueError, match=r"^here has shape \(16,.*\), its change is for"):
        change.check("here", torch.zeros(shape))


class TestWhatTrainingLeaves:
    def all_bits(self, pipe) -> dict[str, Tensor]:
        of = models.edit.weights(models.load(pipe))
        return {name: weight.detach().clone().contiguous() for name, weight in of.items()}

    @pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_on_off_and_from_a_file(self, family, dtype, tmp_path):
        pipe = tiny_pipeline(family).to(dtype=dtype)
        before, one = self.all_bits(pipe), trained(pipe)
        one.save(tmp_path / "edit.safetensors")
        read, applied = Edit.load(tmp_path / "edit.safetensors"), []
        for each in (one, read):
            with each.on(pipe):
                applied.append(self.all_bits(pipe))
            after = self.all_bits(pipe)
            assert all(torch.equal(after[name], weight) for name, weight in before.items())
        changed = {name for name in before if not torch.equal(before[name], applied[0][name])}
        assert changed == one.changes.keys()
        assert all(torch.equal(applied[0][name], applied[1][name]) for name in before)
        for name, change in one.changes.items():
            if isinstance(change, Shifted):
                expected = (before[name].float() + change.delta).to(dtype)
                assert torch.equal(applied[0][name], expected), name

    def test_the_second_text_encoder_has_a_name_of_its_own(self):
        pipe = tiny_pipeline("sdxl")
        name = of_text(pipe, "text_encoder_2")
        weight = pipe.text_encoder_2.get_parameter(name.removeprefix("text_encoder_2."))
        first, before = pipe.text_encoder.state_dict(), weight.detach().clone()
        first = {key: value.clone() for key, value in first.items()}
        change = shifted(tuple(weight.shape))
        with Edit.made(models.load(pipe), {name: change}, method="x", targets=("a",)).on(pipe):
            assert torch.equal(weight, before + change.delta)
            assert all(
                torch.equal(first[key], value) for key, value in pipe.text_encoder.state_dict().items()
            )
        assert torch.equal(weight, before)

    def test_a_network_that_is_not_there_is_refused(self):
        pipe = tiny_pipeline("sd1")
        name = of_text(pipe, "text_encoder").replace("text_encoder.", "text_encoder_2.")
        wrong = Edit.made(models.load(pipe), {name: shifted()}, method="x", targets=("a",))
        with pytest.raises(ValueError, match=f"^pipe: it has no weight {name}, which the edit changes$"):
            wrong.apply(pipe)

    def test_a_lora_of_whole_weights_wants_a_rank(self, tmp_path):
        pipe = tiny_pipeline("sd1")
        change = Shifted((torch.randn(32, 2) @ torch.randn(2, 32)) / 4)
        one = Edit.made(models.load(pipe), {TO_K: change}, method="esd", targets=("a",))
        with pytest.raises(ValueError, match=r"^rank: got None, expected one: esd changes whole weights"):
            one.save_lora(tmp_path / "lora.safetensors")
        bias = {"conv_in.bias": Shifted(torch.ones(16)), **one.changes}
        with pytest.warns(
            models.EditWarning, match=r"path: 1 norms and biases, such as conv_in.bias, are left"
        ):
            replace(one, changes=bias).save_lora(tmp_path / "lora.safetensors", rank=2)
        alone = replace(one, changes={"conv_in.bias": bias["conv_in.bias"]})
        with pytest.raises(
            ValueError, match=r"^edit: esd changes norms and biases alone, .* save_single_file$"
        ):
            alone.save_lora(tmp_path / "none.safetensors", rank=2)
        expected = pipe.unet.get_parameter(TO_K).detach() + change.delta
        pipe.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
        pipe.fuse_lora()
        pipe.unload_lora_weights()
        torch.testing.assert_close(pipe.unet.get_parameter(TO_K).detach(), expected, rtol=0, atol=1e-5)


EVERY = {
    "mapped": {TO_K: mapped()},
    "added": {TO_K: added(), "conv_in.weight": Added(*(f.float() for f in factors(16, 36)))},
    "shifted": {TO_K: shifted(), "conv_in.weight": shifted((16, 4, 3, 3)), "conv_in.bias": shifted((16,))},
    "zeroed": {TO_K: Zeroed.pack(matrix(32) > 0)},
}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline("sd1")


@pytest.mark.filterwarnings("ignore::pumice.models.EditWarning")
@pytest.mark.parametrize("second", [None, *EVERY])
@pytest.mark.parametrize("first", EVERY)
class TestEveryKind:
    """An edit of each, and each composed with each."""

    def made(self, pipe, first: str, second: str | None) -> Edit:
        of = {"a": first} | ({"b": second} if second else {})
        edits = [
            Edit.made(models.load(pipe), EVERY[kind], method=kind, targets=(target,))
            for target, kind in of.items()
        ]
        return Edit.compose(edits) if second else edits[0]

    def applied(self, one: Edit, pipe) -> dict[str, Tensor]:
        with one.on(pipe):
            return bits(pipe)

    def test_from_a_file_and_on_a_descendant(self, pipe, first, second, tmp_path):
        one, before = self.made(pipe, first, second), bits(pipe)
        one.save(tmp_path / "edit.safetensors")
        read = Edit.load(tmp_path / "edit.safetensors")
        assert read.to_dict() == one.to_dict()
        expected = self.applied(one, pipe)
        again = self.applied(read, pipe)
        assert all(torch.equal(expected[name], again[name]) for name in expected) and same(pipe, before)
        tuned = tiny_pipeline("sd1")
        with torch.no_grad():
            tuned.unet.conv_out.bias.add_(1)
        moved = self.applied(read.rebased(tuned), tuned)
        assert all(torch.equal(expected[name], moved[name]) for name in one.changes)

    def test_scaled_by_one_and_without_a_part(self, pipe, first, second):
        one = self.made(pipe, first, second)
        kinds = {first, second} - {None}
        if kinds <= {"added", "shifted"}:
            expected, found = self.applied(one, pipe), self.applied(one.scaled(1), pipe)
            assert all(torch.equal(expected[name], found[name]) for name in expected)
        else:
            with pytest.raises(
                ValueError, match=r"^edit: (mapped|zeroed) does more to .* than to add to it$"
            ):
                one.scaled(1)
        if second:
            alone, left = self.made(pipe, second, None), one.without("a")
            assert left.method == second and left.changes == alone.changes

    def test_as_a_lora_of_a_rank(self, pipe, first, second, tmp_path):
        one = self.made(pipe, first, second)
        path = tmp_path / "lora.safetensors"
        if "zeroed" in (first, second):
            with pytest.raises(ValueError, match=r"^edit: .* changes weights as no LoRA does"):
                one.save_lora(path, rank=32)
            return
        one.save_lora(path, rank=36)
        expected = {name: pipe.unet.get_parameter(name).detach().clone() for name in one.changes}
        for name, change in one.changes.items():
            change.apply([expected[name]])
        again = tiny_pipeline("sd1")
        again.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
        again.fuse_lora()
        again.unload_lora_weights()
        for name, weight in expected.items():
            if weight.ndim > 1:
                found = again.unet.get_parameter(name).detach()
                torch.testing.assert_close(found, weight, rtol=0, atol=2e-5)


class TestOnAModel:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_it_comes_off_to_the_bit(self, dtype):
        pipe = tiny_pipeline("sd1").to(dtype=dtype)
        before, one = bits(pipe), edit(pipe)
        one.apply(pipe)
        assert not same(pipe, before)
        one.remove(pipe)
        assert same(pipe, before)

    def test_only_its_weights_change(self):
        pipe = tiny_pipeline("sd1")
        before, one = bits(pipe), edit(pipe)
        with one.on(pipe):
            after = bits(pipe)
        assert {name for name in before if not torch.equal(before[name], after[name])} == one.changes.keys()

    @pytest.mark.parametrize("stop", [KeyboardInterrupt, torch.OutOfMemoryError])
    @pytest.mark.parametrize("at", [1, 2])
    def test_an_interrupt_in_the_midst_leaves_what_was_there(self, stop, at, monkeypatch):
        """The kernel has written some layers already."""
        from pumice.models import changes

        pipe = tiny_pipeline("sd1")
        before, one = bits(pipe), edit(pipe)
        real, calls = changes.low_rank_edit_, []

        def interrupted(weights, up, down):
            real(weights, up, down)
            calls.append(len(weights))
            if len(calls) == at:
                raise stop("now")

        monkeypatch.setattr(changes, "low_rank_edit_", interrupted)
        with pytest.raises(stop, match="now"):
            one.apply(pipe)
        assert same(pipe, before) and calls == [2, 1][:at]
        monkeypatch.undo()
        one.apply(pipe)
        assert not same(pipe, before)
        one.remove(pipe)
        assert same(pipe, before)

    def test_edits_of_other_weights_come_off_in_any_order(self):
        pipe = tiny_pipeline("sd1")
        before = bits(pipe)
        first = Edit.made(models.load(pipe), {TO_K: mapped()}, method="one", targets=("a",))
        first.apply(pipe)
        second = Edit.made(models.load(pipe), {OTHER: mapped(1)}, method="two", targets=("b",))
        second.apply(pipe)
        first.remove(pipe)
        second.remove(pipe)
        assert same(pipe, before)

    @pytest.mark.parametrize("family", ["sd2", "sdxl"])
    def test_another_model_is_refused(self, family):
        one, other = edit(tiny_pipeline("sd1")), tiny_pipeline(family)
        before = bits(other)
        for work in (one.apply, lambda pipe: one.hook(pipe).__enter__()):
            with pytest.raises(
                ValueError, match=r"^pipe: got weights of the fingerprint .*, expected"
            ) as caught:
                work(other)
            assert "\n" not in str(caught.value) and same(other, before)

    def test_a_change_that_does_not_fit_is_refused(self):
        pipe = tiny_pipeline("sd1")
        before, model = bits(pipe), models.load(pipe)
        narrow = Mapped.of(*factors(16, 16))
        for changes, message in (
            ({TO_K: narrow}, rf"{TO_K} has shape \(32, 32\), its change is for \(16, 16\)"),
            ({f"{LAYER}.to_x.weight": mapped()}, f"pipe: it has no weight {LAYER}.to_x.weight"),
        ):
            wrong = Edit.made(model, changes, method="by hand", targets=())
            with pytest.raises(ValueError, match=message):
                wrong.apply(pipe)
            assert same(pipe, before)


class TestFiles:
    def test_every_bit_of_every_change_comes_back(self, tmp_path):
        pipe = tiny_pipeline("sd1")
        one = edit(pipe)
        one.save(tmp_path / "edit.safetensors")
        again = Edit.load(tmp_path / "edit.safetensors")
        assert again.to_dict() == one.to_dict() and again.changes.keys() == one.changes.keys()
        for name, change in one.changes.items():
            found = again.changes[name]
            assert type(found) is type(change)
            assert torch.equal(found.up, change.up) and torch.equal(found.down, change.down)
        assert again.changes[TO_K] is again.changes[TO_V] and again.changes[TO_K] is not again.changes[OTHER]

    def test_what_layers_share_is_there_once(self, tmp_path):
        one = edit(tiny_pipeline("sd1"))
        one.save(tmp_path / "edit.safetensors")
        assert len(load_file(tmp_path / "edit.safetensors")) == 6  # two factors of three changes

    def test_a_file_cut_anywhere_is_refused(self, tmp_path):
        content = self.content(tmp_path)
        for end in [*range(0, 40), *range(40, len(content), 211), len(content) - 1]:
            self.refused(content[:end], tmp_path)
        self.refused(content + b"\0", tmp_path)

    def test_a_flipped_bit_anywhere_is_refused(self, tmp_path):
        content = self.content(tmp_path)
        for at in [*range(0, 64), *range(64, len(content), 29), len(content) - 1]:
            spoilt = bytearray(content)
            spoilt[at] ^= 1 << (at % 8)
            self.refused(bytes(spoilt), tmp_path)

    @pytest.mark.parametrize(
        "relabel",
        [
            lambda about: about | {"targets": ["a dog"]},
            lambda about: about | {"base": "0" * 64},
            lambda about: about | {"method": "nemo"},
            lambda about: about | {"settings": {"seed": 1}},
        ],
        ids=["targets", "base", "method", "settings"],
    )
    def test_another_label_is_refused(self, relabel, tmp_path):
        self.content(tmp_path)
        tensors = load_file(tmp_path / "edit.safetensors")
        with safe_open(tmp_path / "edit.safetensors", "pt") as file:
            header = file.metadata()
        changed = header | {"edit": json.dumps(relabel(json.loads(header["edit"])))}
        self.refused(safetensors.torch.save(tensors, changed), tmp_path)

    @pytest.mark.parametrize("swap", [True, False])
    def test_other_tensors_are_refused(self, swap, tmp_path):
        """Those of two changes exchanged, or one of another edit."""
        self.content(tmp_path)
        tensors = load_file(tmp_path / "edit.safetensors")
        with safe_open(tmp_path / "edit.safetensors", "pt") as file:
            header = file.metadata()
        names = sorted(tensors)
        if swap:
            tensors = dict(zip(names, [tensors[name] for name in reversed(names)], strict=True))
        else:
            tensors[names[0]] = tensors[names[0]] + 1
        self.refused(safetensors.torch.save(tensors, header), tmp_path)

    def content(self, tmp_path) -> bytes:
        edit(tiny_pipeline("sd1")).save(tmp_path / "edit.safetensors")
        return (tmp_path / "edit.safetensors").read_bytes()

    def refused(self, content: bytes, tmp_path) -> None:
        (tmp_path / "spoilt").write_bytes(content)
        with pytest.raises(ValueError, match=r"^path: '.*spoilt' cannot be read as an edit: .+") as caught:
            Edit.load(tmp_path / "spoilt")
        assert "\n" not in str(caught.value)


class TestExports:
    def test_something_at_the_path_stays(self, tmp_path):
        pipe = tiny_pipeline("sd1")
        one = edit(pipe)
        path = tmp_path / "file.safetensors"
        path.write_bytes(b"mine")
        for write in (one.save_lora, one.save_single_file):
            with pytest.raises(ValueError, match=r"path: .* is there already"):
                write(path)
        assert path.read_bytes() == b"mine" and list(tmp_path.iterdir()) == [path]
        assert not one._originals

    def test_a_lora_of_an_edit_that_is_on_is_of_the_weights_before(self, tmp_path):
        pipe = tiny_pipeline("sd1")
        one = edit(pipe)
        one.save_lora(tmp_path / "before.safetensors")
        with one.on(pipe):
            one.save_lora(tmp_path / "while.safetensors")
            one.save_single_file(tmp_path / "model.safetensors")
        one.save_single_file(tmp_path / "again.safetensors")
        for pair in (("before", "while"), ("model", "again")):
            a, b = (load_file(tmp_path / f"{name}.safetensors") for name in pair)
            assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)

    def test_a_lower_rank_is_asked_for(self, tmp_path):
        one = edit(tiny_pipeline("sd1"))
        pipe = tiny_pipeline("sd1")
        one.save_lora(tmp_path / "edit.safetensors", pipe, rank=2)
        assert {min(t.shape) for t in load_file(tmp_path / "edit.safetensors").values()} == {2}
        one.save_lora(tmp_path / "all.safetensors", pipe, rank=9)
        assert {min(t.shape) for t in load_file(tmp_path / "all.safetensors").values()} == {5}
        with pytest.raises(ValueError, match="rank: got 0, expected at least 1"):
            one.save_lora(tmp_path / "none.safetensors", pipe, rank=0)

    def test_zeroed_weights_are_no_lora(self, tmp_path):
        pipe = tiny_pipeline("sd1")
        changes = {TO_K: Zeroed.pack(pipe.unet.get_parameter(TO_K) > 0)}
        one = Edit.made(models.load(pipe), changes, method="by hand", targets=("a cat",))
        with pytest.raises(
            ValueError, match=r"^edit: by hand changes weights as no LoRA does; use save_single_file$"
        ):
            one.save_lora(tmp_path / "edit.safetensors")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("export", ["save_lora", "save_single_file"])
    def test_the_pipeline_has_to_be_there(self, export, tmp_path):
        pipe = tiny_pipeline("sd1")
        one = edit(pipe)
        path = tmp_path / "file.safetensors"
        one.save(tmp_path / "edit.safetensors")
        read = Edit.load(tmp_path / "edit.safetensors")
        with pytest.raises(ValueError, match=rf"^pipe: .* give it: {export}\(path, pipe\)"):
            getattr(read, export)(path)
        with pytest.raises(ValueError, match=r"^pipe: got weights of the fingerprint"):
            getattr(read, export)(path, tiny_pipeline("sd1", seed=1))
        with pytest.raises(TypeError, match=r"^pipe: got a str, expected a loaded pipeline"):
            getattr(read, export)(path, "a/model")
        getattr(read, export)(path, pipe)
        del pipe
        gc.collect()
        with pytest.raises(ValueError, match=rf"^pipe: .* give it: {export}\(path, pipe\)"):
            getattr(one, export)(tmp_path / "gone.safetensors")
        assert not (tmp_path / "gone.safetensors").exists()
