"""Composed edits are edits made one after the other, and each can be left out as if never made."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pumice import models, testbed
from pumice.erase import uce
from pumice.models import Added, Edit, Mapped, Shifted, Zeroed
from pumice.models.changes import Change
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


def test_maps_are_what_composes(parts):
    assert all(isinstance(change, Mapped) for part in parts for change in part.changes.values())
