"""Which edits are drawn in one batch."""

import pytest
import torch

from pumice import models
from pumice.evaluate import drawing
from pumice.evaluate.drawing import edited, groups
from pumice.models import Added, Edit, Mapped, Shifted, Zeroed
from pumice.models.changes import Chain
from pumice.testbed import tiny_pipeline

NAME = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
MAPPED = Mapped.of(torch.ones(4, 1), torch.ones(1, 4))
ADDED = Added(torch.ones(6, 1), torch.ones(1, 4))
SHIFTED = Shifted(torch.ones(6, 4))
ZEROED = Zeroed.pack(torch.ones(6, 4) > 0)


def edit(*changes, name: str = NAME) -> Edit:
    return Edit({name: changes[0] if len(changes) == 1 else Chain(changes)}, "", "by hand", ())


def names(edits, most: int = 9) -> list[list[str]]:
    return [list(group) for group in groups({"none": None, **edits}, most)]


def test_all_that_can_be_hooked_share():
    edits = {"map": edit(MAPPED), "LoRA": edit(ADDED), "whole": edit(SHIFTED), "all": edit(MAPPED, SHIFTED)}
    assert names(edits) == [["none", *edits]]
    assert names(edits, 2) == [["none", "map"], ["LoRA", "whole"], ["all"]]


def test_what_zeroes_or_changes_text_encoders_is_alone():
    text = edit(SHIFTED, name="text_encoder.final_layer_norm.weight")
    edits = {"zeroed": edit(ZEROED), "map": edit(MAPPED), "chain": edit(SHIFTED, ZEROED), "text": text}
    assert names(edits) == [["none", "map"], ["zeroed"], ["chain"], ["text"]]


def test_what_trained_whole_convolutions_is_alone():
    whole = Shifted(torch.ones(6, 4, 3, 3))
    edits = {"whole": edit(whole), "chain": edit(ADDED, whole), "linear": edit(SHIFTED)}
    assert names(edits) == [["none", "linear"], ["whole"], ["chain"]]


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        (72, [["none", "a", "map", "chain", "b", "LoRA"]]),
        (48, [["none", "a", "map", "chain"], ["b", "LoRA"]]),
        (1, [["none"], ["a"], ["map"], ["chain"], ["b"], ["LoRA"]]),
    ],
)
def test_no_more_whole_weights_at_once_than_there_is_memory_for(monkeypatch, entries, expected):
    monkeypatch.setattr(drawing, "_ENTRIES", entries)
    edits = {"a": edit(SHIFTED), "map": edit(MAPPED), "chain": edit(MAPPED, ADDED), "b": edit(SHIFTED)}
    assert names({**edits, "LoRA": edit(ADDED)}) == expected


def test_one_alone_is_applied_and_several_are_hooked():
    pipe = tiny_pipeline("sd1")
    weight = pipe.unet.get_parameter(NAME)
    before = weight.detach().clone()
    one = Edit.made(models.load(pipe), {NAME: Shifted(torch.ones(weight.shape))}, method="x", targets=())
    with edited(pipe, [one]):
        assert torch.equal(weight, before + 1)
    with edited(pipe, [None, one]):
        assert torch.equal(weight, before) and len(layer(pipe)._forward_hooks) == 1
    with edited(pipe, [None]):
        assert torch.equal(weight, before) and not layer(pipe)._forward_hooks
    assert torch.equal(weight, before)


def layer(pipe):
    return pipe.unet.get_submodule(NAME.removesuffix(".weight"))
