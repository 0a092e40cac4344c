"""Composed edits are edits made one after the other, and each can be left out as if never made."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pumice import models, testbed
from pumice.erase import transport, uce
from pumice.models import Added, Edit, Mapped, Shifted, Zeroed
from pumice.models.changes import Chain, Change
from pumice.testbed import tiny_pipeline

CONCEPTS = {"cat": "dog", "red house": "tree", "zebra": ""}

pytestmark = pytest.mark.filterwarnings("ignore::pumice.erase.ErasureWarning")


def pipeline(name: str):
    return testbed.load() if name == "testbed" else tiny_pipeline(name)


@pytest.fixture(scope="module")
def sd1():
    return tiny_pipeline("sd1")


@pytest.fixture(scope="module")
def parts(sd1) -> list[Edit]:
    return [uce(sd1, concept, guide=guide) for concept, guide in CONCEPTS.items()]


def projections(pipe) -> dict[str, Tensor]:
    return {
        name: weight.detach().clone()
        for name, weight in pipe.unet.named_parameters()
        if ".attn2.to_k" in name or ".attn2.to_v" in name or name.startswith("add_embedding.linear_1.w")
    }


def edited(pipe, edit: Edit) -> dict[str, Tensor]:
    with edit.on(pipe):
        return projections(pipe)


def same_bits(one: Edit, other: Edit) -> bool:
    return one.changes.keys() == other.changes.keys() and all(
        torch.equal(change.up, other.changes[name].up) and torch.equal(change.down, other.changes[name].down)
        for name, change in one.changes.items()
    )


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("sd1", {}),
        ("sd2", {"tokens": "all"}),
        ("sdxl", {"pooled": True}),
        ("testbed", {"tokens": "all"}),
    ],
)
def test_it_is_as_if_each_were_made_on_what_the_others_left(name, arguments):
    """Targets of the second are then read from the weights that the first left."""
    pipe = pipeline(name)

    def erase(concept: str) -> Edit:
        return uce(pipe, concept, guide=CONCEPTS[concept], preserve="a tree", **arguments)

    before = projections(pipe)
    composed = Edit.compose([erase(concept) for concept in CONCEPTS])
    found = edited(pipe, composed)
    made = []
    for concept in CONCEPTS:
        made.append(erase(concept))
        made[-1].apply(pipe)
    expected = projections(pipe)
    for edit in reversed(made):
        edit.remove(pipe)
    for weight, wanted in expected.items():
        scale = (wanted - before[weight]).norm()
        assert (found[weight] - wanted).norm() < 2e-5 * scale, weight
    assert all(torch.equal(weight, before[key]) for key, weight in projections(pipe).items())


class TestCompose:
    def test_it_says_what_it_is_of(self, sd1, parts):
        composed = Edit.compose(parts)
        assert composed.method == "compose" and composed.targets == tuple(CONCEPTS)
        assert composed.parts == tuple(parts) and composed.base == parts[0].base
        for part, found in zip(parts, composed.report()["parts"], strict=True):
            assert found["targets"] == list(part.targets)
            assert found["overall_change"] == part.report()["overall_change"]

    def test_layers_share_the_product_as_they_share_the_maps(self, sd1, parts):
        composed = Edit.compose(parts)
        assert len({id(change) for change in composed.changes.values()}) == 1
        assert next(iter(composed.changes.values())).rank == 3

    def test_the_order_counts(self, sd1, parts):
        there, back = (edited(sd1, Edit.compose(order)) for order in (parts[:2], parts[1::-1]))
        assert any((there[name] - back[name]).abs().max() > 1e-4 for name in there)

    def test_its_parts_stay_as_they_were(self, sd1, parts):
        before = [change.up.clone() for part in parts for change in part.changes.values()]
        Edit.compose(parts)
        after = [change.up for part in parts for change in part.changes.values()]
        assert all(map(torch.equal, before, after))

    def test_of_composed_edits_it_is_of_all_their_parts(self, sd1, parts):
        flat = Edit.compose(parts)
        for nested in (
            Edit.compose([Edit.compose(parts[:2]), parts[2]]),
            Edit.compose([parts[0], Edit.compose(parts[1:])]),
        ):
            assert nested.targets == flat.targets
            assert same_bits(nested, flat) and same_bits(nested.without("zebra"), flat.without("zebra"))

    def test_edits_of_different_weights(self, sd1, parts):
        keys, values = (
            Edit.made(
                models.load(sd1),
                {name: change for name, change in part.changes.items() if which in name},
                method="half",
                targets=part.targets,
            )
            for part, which in zip(parts, ("to_k", "to_v"), strict=False)
        )
        both = edited(sd1, Edit.compose([keys, values, parts[2]]))
        for half, other in ((keys, "to_v"), (values, "to_k")):
            alone = edited(sd1, Edit.compose([half, parts[2]]))
            for name, weight in alone.items():
                assert torch.equal(weight, both[name]) == (other not in name)

    def test_more_rows_than_dimensions_are_a_map_of_full_rank(self, sd1):
        edits = [uce(sd1, concept, tokens="all") for concept in CONCEPTS]
        composed = Edit.compose(edits)
        assert next(iter(composed.changes.values())).rank == 32


class TestWithout:
    def test_it_is_as_if_that_one_had_never_been_made(self, sd1, parts):
        composed = Edit.compose(parts)
        first, second, third = CONCEPTS
        for concept, left in (
            (first, [second, third]), (second, [first, third]), (third, [first, second]),
        ):  # fmt: skip
            never = Edit.compose([uce(sd1, concept, guide=CONCEPTS[concept]) for concept in left])
            found = composed.without(concept)
            assert found.targets == tuple(left) and same_bits(found, never)
            weights, expected = edited(sd1, found), edited(sd1, never)
            assert all(torch.equal(weights[name], expected[name]) for name in expected)

    def test_of_two_the_other_is_left(self, sd1, parts):
        assert Edit.compose(parts[:2]).without("cat") is parts[1]

    def test_all_parts_that_erase_it_go(self, sd1, parts):
        again = uce(sd1, "cat", tokens="all")
        assert Edit.compose([parts[0], parts[1], again]).without("cat") is parts[1]

    def test_what_it_cannot_do(self, sd1, parts):
        together = uce(sd1, ["cat", "bird"])
        for edit, concept, message in (
            (Edit.compose(parts), "bird", "concept: got 'bird', .* 'cat', 'red house', 'zebra'$"),
            (parts[0], "cat", "concept: got 'cat', expected that of a part of a composed edit: none"),
            (
                Edit.compose([together, parts[1]]),
                "cat",
                "concept: 'cat' was erased together with others in one",
            ),
            (Edit.compose([parts[0], parts[0]]), "cat", "concept: 'cat' is all that the edit erases"),
        ):
            with pytest.raises(ValueError, match=f"^{message}") as caught:
                edit.without(concept)
            assert "\n" not in str(caught.value)


class TestFiles:
    def test_a_composed_edit_comes_back_with_its_parts(self, sd1, parts, tmp_path):
        composed = Edit.compose(parts)
        composed.save(tmp_path / "edit.safetensors")
        again = Edit.load(tmp_path / "edit.safetensors")
        assert again.to_dict() == composed.to_dict() and same_bits(again, composed)
        for part, found in zip(parts, again.parts, strict=True):
            assert found.to_dict() == part.to_dict() and same_bits(found, part)
        assert same_bits(again.without("cat"), composed.without("cat"))
        before = edited(sd1, composed)
        assert all(torch.equal(weight, before[name]) for name, weight in edited(sd1, again).items())

    def test_it_is_exported_whole(self, sd1, parts, tmp_path):
        composed = Edit.compose(parts)
        composed.save_lora(tmp_path / "lora.safetensors")
        expected, model = edited(sd1, composed), models.load(sd1)
        sd1.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
        sd1.fuse_lora()
        sd1.unload_lora_weights()
        try:
            for name, weight in projections(sd1).items():
                torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6)
        finally:
            fresh = tiny_pipeline("sd1").unet.state_dict()
            model.unet.load_state_dict(fresh)
        assert models.fingerprint(model) == composed.base

    def test_hooked_it_draws_as_applied(self, sd1, parts):
        composed, model = Edit.compose(parts), models.load(sd1)
        latents = torch.randn(1, *model.latent_shape(), generator=torch.Generator().manual_seed(0))

        def predict() -> Tensor:
            with torch.no_grad():
                return model.predict(latents, 500, model.encode_prompt("a cat in a red house"))

        with composed.on(sd1):
            expected = predict()
        with composed.hook(sd1):
            torch.testing.assert_close(predict(), expected, rtol=0, atol=1e-5)


class TestRefused:
    @pytest.mark.parametrize("count", [0, 1])
    def test_fewer_than_two(self, parts, count):
        with pytest.raises(ValueError, match=f"^edits: got {count}, expected at least two$"):
            Edit.compose(parts[:count])

    def test_edits_of_different_models(self, parts):
        other = uce(tiny_pipeline("sd1", seed=1), "cat")
        with pytest.raises(ValueError, match=r"^edits: they were made for models with different weights"):
            Edit.compose([parts[0], other])


def random(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / 4


KINDS = {
    "mapped": lambda seed: Mapped.of(random((32, 2), seed), random((2, 32), seed + 1)),
    "added": lambda seed: Added(random((32, 3), seed), random((3, 32), seed + 1)),
    "shifted": lambda seed: Shifted(random((32, 32), seed)),
    "zeroed": lambda seed: Zeroed.pack(random((32, 32), seed) > 0.2),
}


class TestChangesOfAllKinds:
    """Of one weight, in any order and number: as if applied one on the other."""

    def made(self, pipe, kind: str, seed: int) -> tuple[str, Edit]:
        name = next(name for name, weight in projections(pipe).items() if weight.shape == (32, 32))
        change: Change = KINDS[kind](seed)
        return name, Edit.made(models.load(pipe), {name: change}, method=kind, targets=(f"{kind} {seed}",))

    def one_on_the_other(self, weight: Tensor, edits: list[Edit], name: str) -> Tensor:
        weight = weight.clone()
        for edit in edits:
            edit.changes[name].apply([weight])
        return weight

    @pytest.mark.parametrize("second", KINDS)
    @pytest.mark.parametrize("first", KINDS)
    def test_two_and_three(self, sd1, first, second, tmp_path):
        edits = [self.made(sd1, kind, seed)[1] for kind, seed in ((first, 0), (second, 5), (first, 9))]
        name, _ = self.made(sd1, first, 0)
        before = projections(sd1)
        for some in (edits[:2], edits):
            composed = Edit.compose(some)
            expected = self.one_on_the_other(before[name], some, name)
            torch.testing.assert_close(edited(sd1, composed)[name], expected, rtol=0, atol=1e-6)
            assert torch.equal(projections(sd1)[name], before[name])
            composed.save(tmp_path / "edit.safetensors")
            again = Edit.load(tmp_path / "edit.safetensors")
            assert again.to_dict() == composed.to_dict()
            assert torch.equal(edited(sd1, again)[name], edited(sd1, composed)[name])
        left = composed.without(edits[1].targets[0])
        expected = self.one_on_the_other(before[name], [edits[0], edits[2]], name)
        torch.testing.assert_close(edited(sd1, left)[name], expected, rtol=0, atol=1e-6)

    def test_what_is_added_stays_of_low_rank_and_goes_into_a_lora(self, sd1, tmp_path):
        name, one = self.made(sd1, "added", 0)
        composed = Edit.compose([one, self.made(sd1, "added", 7)[1]])
        change = composed.changes[name]
        assert isinstance(change, Added) and change.rank == 6
        composed.save_lora(tmp_path / "lora.safetensors")
        both = Edit.compose([one, self.made(sd1, "mapped", 7)[1]])
        with pytest.raises(ValueError, match=r"^rank: got None, expected one: compose changes whole weights"):
            both.save_lora(tmp_path / "other.safetensors")
        both.save_lora(tmp_path / "other.safetensors", rank=32)

    def test_the_order_of_unlike_changes_counts(self, sd1):
        (name, one), (_, two) = self.made(sd1, "mapped", 0), self.made(sd1, "shifted", 1)
        there, back = (edited(sd1, Edit.compose(order))[name] for order in ([one, two], [two, one]))
        assert (there - back).abs().max() > 1e-3


CONVOLUTION = "conv_in.weight"


def of_convolution(pipe, change: Change, target: str = "a") -> Edit:
    return Edit.made(
        models.load(pipe), {CONVOLUTION: change}, method="esd", targets=(target,), settings={"steps": 4}
    )


class TestWhatTrainingAdds:
    """Sums of whole weights and of factors beside them, here of a convolution, (16, 4, 3, 3)."""

    @pytest.fixture
    def whole(self, sd1) -> Edit:
        return of_convolution(sd1, Shifted(random((16, 4, 3, 3), 0)), "a")

    @pytest.fixture
    def beside(self, sd1) -> Edit:
        return of_convolution(sd1, Added(random((16, 2), 1), random((2, 36), 2)), "b")

    @pytest.mark.parametrize("order", ["whole whole", "whole beside", "beside whole", "beside whole beside"])
    def test_is_one_sum(self, sd1, whole, beside, order):
        edits = [{"whole": whole, "beside": beside}[kind] for kind in order.split()]
        composed = Edit.compose(edits)
        change = composed.changes[CONVOLUTION]
        assert type(change) is Shifted
        expected = sum(
            (c.delta if isinstance(c, Shifted) else (c.up @ c.down).view(16, 4, 3, 3)).double()
            for c in (edit.changes[CONVOLUTION] for edit in edits)
        )
        torch.testing.assert_close(change.delta.double(), expected, rtol=0, atol=1e-6)
        weight = sd1.unet.get_parameter(CONVOLUTION).detach().clone()
        with composed.on(sd1):
            found = sd1.unet.get_parameter(CONVOLUTION).detach().clone()
        for edit in edits:
            edit.changes[CONVOLUTION].apply([weight])
        torch.testing.assert_close(found, weight, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("factor", [0.5, -2.0, 0.0])
    def test_is_scaled_as_one(self, sd1, whole, beside, factor, tmp_path):
        composed = Edit.compose([whole, beside])
        scaled = composed.scaled(factor)
        delta = composed.changes[CONVOLUTION].delta
        torch.testing.assert_close(scaled.changes[CONVOLUTION].delta, factor * delta)
        assert scaled.targets == ("a", "b") and scaled.details["scaled"] == factor
        share = composed.details["overall_change"]
        assert scaled.details["overall_change"] == pytest.approx(abs(factor) * share)
        assert scaled.details["relative_change"][CONVOLUTION] == pytest.approx(abs(factor) * share)
        torch.testing.assert_close(
            scaled.without("b").changes[CONVOLUTION].delta, factor * whole.changes[CONVOLUTION].delta
        )
        scaled.save(tmp_path / "edit.safetensors")
        again = Edit.load(tmp_path / "edit.safetensors")
        assert again.to_dict() == scaled.to_dict()
        assert torch.equal(again.changes[CONVOLUTION].delta, scaled.changes[CONVOLUTION].delta)

    def test_in_a_chain_is_scaled_and_a_map_there_is_refused(self, sd1, whole, beside):
        pair = whole.changes[CONVOLUTION], beside.changes[CONVOLUTION]
        half = of_convolution(sd1, Chain(pair)).scaled(0.5)
        weight, expected = torch.zeros(16, 4, 3, 3), torch.zeros(16, 4, 3, 3)
        half.changes[CONVOLUTION].apply([weight])
        Chain(pair).apply([expected])
        torch.testing.assert_close(weight, expected / 2)
        name = next(name for name, weight in projections(sd1).items() if weight.shape == (32, 32))
        for kind in ("mapped", "zeroed"):
            edits = [
                Edit.made(models.load(sd1), {name: KINDS[each](0)}, method=each, targets=("a",))
                for each in ("shifted", kind)
            ]
            with pytest.raises(ValueError, match=f"^edit: {kind} does more to {name} than to add to it$"):
                Edit.compose(edits).scaled(0.5)

    def test_composed_is_transported(self, sd1, whole, beside):
        model = models.load(sd1)
        latents = torch.randn(1, *model.latent_shape(), generator=torch.Generator().manual_seed(0))

        def predict(edit: Edit) -> Tensor:
            with torch.no_grad(), transport(sd1, [edit], "a"):
                return model.predict(latents, 500, model.encode_prompt("a"))

        composed = Edit.compose([whole, beside])
        with torch.no_grad(), composed.on(sd1):
            expected = model.predict(latents, 500, model.encode_prompt("a"))
        torch.testing.assert_close(predict(composed), expected, rtol=0, atol=1e-5)  # "a" is a target of it

    def test_layers_share_what_two_are_together(self, sd1):
        names = [name for name, weight in projections(sd1).items() if weight.shape == (32, 32)][:2]
        edits = [
            Edit.made(
                models.load(sd1), dict.fromkeys(names, KINDS["shifted"](seed)), method="x", targets=("a",)
            )
            for seed in (0, 1, 2)
        ]
        changes = Edit.compose(edits).changes
        assert changes[names[0]] is changes[names[1]]

    def test_of_low_precision_it_is_rounded_once(self):
        pipe = tiny_pipeline("sd1").to(dtype=torch.bfloat16)
        edits = [of_convolution(pipe, Shifted(random((16, 4, 3, 3), seed)), str(seed)) for seed in (0, 1)]
        weight = pipe.unet.get_parameter(CONVOLUTION)
        expected = weight.float() + sum(edit.changes[CONVOLUTION].delta for edit in edits)
        with Edit.compose(edits).on(pipe):
            assert torch.equal(weight, expected.bfloat16())


class TestExtent:
    """|dW| / |W| by its definition, of every kind."""

    @pytest.mark.parametrize("second", KINDS)
    @pytest.mark.parametrize("first", KINDS)
    def test_is_measured_of_all_kinds(self, sd1, first, second):
        name = next(name for name, weight in projections(sd1).items() if weight.shape == (32, 32))
        model, convolution = models.load(sd1), Shifted(random((16, 4, 3, 3), 3))
        edits = [
            Edit.made(model, {name: KINDS[kind](seed)}, method=kind, targets=(kind,), settings={"k": seed})
            for kind, seed in ((first, 0), (second, 5))
        ]
        composed = Edit.compose([*edits, of_convolution(sd1, convolution)])
        before = {key: sd1.unet.get_parameter(key).detach().double() for key in (name, CONVOLUTION)}
        before = {key: weight.clone() for key, weight in before.items()}
        with composed.on(sd1):
            moved = {key: sd1.unet.get_parameter(key).detach() - weight for key, weight in before.items()}
        report = composed.report()
        for key, weight in before.items():
            share = float(moved[key].norm() / weight.norm())
            assert report["relative_change"][key] == pytest.approx(share, rel=1e-5)
        whole, change = (
            torch.cat([tensor.flatten() for tensor in of.values()]).norm() for of in (before, moved)
        )
        assert report["overall_change"] == pytest.approx(float(change / whole), rel=1e-5)
        assert "rank" not in report
        of_parts = [(part["method"], part["settings"]) for part in report["parts"]]
        assert of_parts == [(first, {"k": 0}), (second, {"k": 5}), ("esd", {"steps": 4})]

    def test_of_factors_that_cancel_it_is_nothing(self, sd1):
        change = Added(random((16, 2), 1), random((2, 36), 2))
        there, back = of_convolution(sd1, change), of_convolution(sd1, Added(-change.up, change.down))
        found = Edit.compose([there, back]).details
        assert found["rank"] == 4 and found["overall_change"] < 1e-7


def test_maps_are_what_composes(parts):
    assert all(isinstance(change, Mapped) for part in parts for change in part.changes.values())
