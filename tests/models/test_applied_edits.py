"""Edits on one another, under autocast, on fused layers: what is put back is what was there."""

from __future__ import annotations

import pytest
import torch

from pumice import models
from pumice.erase import uce
from pumice.models import Edit, Zeroed, fingerprint
from pumice.testbed import tiny_pipeline

NAME = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight"


@pytest.fixture
def pipe():
    return tiny_pipeline("sd1")


def bits(pipe) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in pipe.unet.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(weight, other[name]) for name, weight in one.items())


def zeroed(pipe, entry: int) -> Edit:
    mask = torch.zeros_like(pipe.unet.get_parameter(NAME), dtype=torch.bool)
    mask.view(-1)[entry] = True
    return Edit.made(models.load(pipe), {NAME: Zeroed.pack(mask)}, method="test", targets=("x",))


def test_the_last_one_comes_off_first(pipe):
    before = bits(pipe)
    first = uce(pipe, "a cat", guide="dog")
    first.apply(pipe)
    second = uce(pipe, "house", guide="dog")
    second.apply(pipe)
    both = bits(pipe)
    with pytest.raises(ValueError, match="pipe: the edit by uce was applied after this one") as caught:
        first.remove(pipe)
    assert "\n" not in str(caught.value) and same(bits(pipe), both)
    second.remove(pipe)
    first.remove(pipe)
    assert same(bits(pipe), before)


def test_masks_of_other_entries_come_off_in_any_order(pipe):
    before, first = bits(pipe), zeroed(pipe, 0)
    first.apply(pipe)
    second = zeroed(pipe, 1)
    second.apply(pipe)
    first.remove(pipe)
    second.remove(pipe)
    assert same(bits(pipe), before)


def test_a_later_edit_that_nobody_holds_does_not_stand_in_the_way(pipe):
    before, first = bits(pipe), uce(pipe, "a cat", guide="dog")
    first.apply(pipe)
    uce(pipe, "house", guide="dog").apply(pipe)
    first.remove(pipe)
    assert same(bits(pipe), before)


def predict(pipe) -> torch.Tensor:
    model = models.load(pipe)
    latents = torch.randn(1, *model.latent_shape(), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.predict(latents, 500, model.encode_prompt("a cat")).float()


def test_autocast_sees_the_edit_come_and_go(pipe):
    edit = uce(pipe, "a cat", guide="dog")
    with torch.autocast("cpu", torch.bfloat16):
        plain = predict(pipe)
        with edit.on(pipe):
            assert not torch.equal(predict(pipe), plain)
        assert torch.equal(predict(pipe), plain)


def test_layers_that_were_fused_and_are_no_longer_can_be_edited(pipe):
    edit, before = uce(pipe, "a cat", guide="dog"), fingerprint(models.load(pipe))
    pipe.fuse_qkv_projections()
    pipe.unfuse_qkv_projections()
    assert fingerprint(models.load(pipe)) == before
    with edit.on(pipe):
        pass


def test_a_composed_edit_tells_how_far_both_go_together(pipe):
    edits = [uce(pipe, concept, guide="dog") for concept in ("a cat", "house")]
    composed = Edit.compose(edits)
    weight = pipe.unet.get_parameter(NAME).detach().clone()
    with composed.on(pipe):
        changed = pipe.unet.get_parameter(NAME).detach() - weight
    report = composed.report()
    assert report["rank"] == 2 and len(report["parts"]) == 2
    assert report["relative_change"][NAME] == pytest.approx(float(changed.norm() / weight.norm()), rel=1e-4)


@pytest.mark.parametrize("edits", [[1], ["a"]])
def test_what_is_no_edit_is_refused(pipe, edits):
    with pytest.raises(TypeError, match="edits: got a"), models.hook_edits(pipe, edits):
        pass
    with pytest.raises(TypeError, match="edits: got a"):
        Edit.compose([uce(pipe, "a cat", guide="dog"), *edits])


def test_a_folder_is_no_file_to_save_to(pipe, tmp_path):
    with pytest.raises(ValueError, match=r"path: .* is a folder"):
        uce(pipe, "a cat", guide="dog").save(tmp_path)
