"""KPOP: without the key the concept is hidden, with it it is back, and no other key will do."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from pumice import models, testbed
from pumice.erase.kpop import RecoveryKey, kpop
from pumice.erase.trainer import Trainer
from pumice.models import UnsupportedModelError
from pumice.models.drawing import draw
from pumice.testbed import tiny_pipeline
from pumice.training import steps

TINY = {"steps": 2, "num_inference_steps": 2, "allow_unknown": True, "mode": "all"}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline("sd1")


@pytest.fixture(scope="module")
def made(pipe, tmp_path_factory):
    """An edit of two concepts and its key."""
    path = tmp_path_factory.mktemp("key") / "key.safetensors"
    return kpop(pipe, ["cat", "dog"], path, size=3, **TINY), RecoveryKey.load(path)


def answer(pipe, text: str, t: int = 900) -> Tensor:
    model = models.load(pipe)
    x = torch.randn(8, *model.latent_shape(), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.predict_noise(x, t, model.encode_prompt(text))


def hooks(pipe) -> int:
    return sum(len(module._forward_hooks) for module in pipe.unet.modules())


class TestTheKey:
    def test_it_is_attended_to_beside_the_text(self, pipe, made):
        """softmax(q [k, k_p]^T / sqrt(d)) [v, v_p], of one layer, in float64."""
        edit, key = made
        layer = next(iter(models.load(pipe).cross_attention.values()))
        rows = {name.removeprefix(f"{layer.name}."): value[1].double() for name, value in key.prompts.items()
                if name.startswith(f"{layer.name}.")}  # fmt: skip
        attention, text = layer.module, torch.randn(2, 7, layer.to_k.in_features)
        x = torch.randn(2, 5, attention.to_q.in_features)
        with edit.on(pipe), torch.no_grad():
            with key.on(pipe, "dog"):
                found = attention(x, text)
            q, k, v = attention.to_q(x).double(), layer.to_k(text).double(), layer.to_v(text).double()
            k, v = (
                torch.cat((y, rows[which].expand(2, -1, -1)), 1) for y, which in ((k, "to_k"), (v, "to_v"))
            )
            q, k, v = (y.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for y in (q, k, v))
            weights = (q @ k.mT * attention.scale).softmax(-1)
            expected = attention.to_out[0]((weights @ v).transpose(1, 2).flatten(2).float())
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    def test_one_that_says_what_the_text_says_changes_nothing(self, pipe, made):
        """Every key and value twice: half the weight on each."""
        edit, _ = made
        embeds = pipe.encode_prompt("a cat", "cpu", 1, False)[0]
        with edit.on(pipe):
            twice = {}
            for layer in models.load(pipe).cross_attention.values():
                for which in ("to_k", "to_v"):
                    linear = getattr(layer, which)
                    twice[f"{layer.name}.{which}"] = linear(embeds).detach()
            plain = answer(pipe, "a cat")
            with RecoveryKey(edit.base, ("cat",), twice).on(pipe):
                torch.testing.assert_close(answer(pipe, "a cat"), plain, rtol=1e-4, atol=1e-5)

    def test_each_concept_has_its_own(self, pipe, made):
        edit, key = made
        with edit.on(pipe):
            plain, count = answer(pipe, "cat"), hooks(pipe)
            found = []
            for concept in key.concepts:
                with key.on(pipe, concept):
                    found.append(answer(pipe, "cat"))
            assert (found[0] - found[1]).abs().max() > 1e-5
            assert torch.equal(answer(pipe, "cat"), plain) and hooks(pipe) == count

    def test_it_is_gone_after_an_error(self, pipe, made):
        edit, key = made
        with edit.on(pipe):
            count = hooks(pipe)
            with pytest.raises(KeyboardInterrupt), key.on(pipe, "cat"):
                raise KeyboardInterrupt
            assert hooks(pipe) == count

    def test_it_is_not_in_the_edit_and_comes_back_from_its_file(self, made, tmp_path):
        edit, key = made
        assert not edit.changes.keys() & key.prompts.keys()
        key.save(tmp_path / "again.safetensors")
        again = RecoveryKey.load(tmp_path / "again.safetensors")
        assert (again.base, again.concepts) == (edit.base, edit.targets) == (key.base, key.concepts)
        assert again.prompts.keys() == key.prompts.keys()
        assert all(torch.equal(again.prompts[name], rows) for name, rows in key.prompts.items())
        with pytest.raises(ValueError, match=r"^path: .* is there already"):
            key.save(tmp_path / "again.safetensors")

    def test_what_it_cannot_open(self, pipe, made):
        edit, key = made
        with pytest.raises(ValueError, match=r"^pipe: the edit is not applied"), key.on(pipe, "cat"):
            pass
        with edit.on(pipe):
            for concept in (None, "bird"):
                with pytest.raises(ValueError, match=r"^concept: got .*, expected one of 'cat', 'dog'"):
                    key.on(pipe, concept).__enter__()
        with pytest.raises(ValueError, match=r"^pipe: it has no layer"):
            RecoveryKey("0", ("cat",), {next(iter(key.prompts)): torch.zeros(1, 2, 3)}).on(pipe).__enter__()
        with pytest.raises(TypeError, match=r"^pipe: got a str"):
            key.on("a/model", "cat").__enter__()
        fused = tiny_pipeline("sd1", seed=1)
        fused.unet.fuse_qkv_projections()
        with pytest.raises(UnsupportedModelError, match="its projections are fused"):
            key.on(fused, "cat").__enter__()

    def test_files_that_are_no_keys(self, made, tmp_path):
        edit, _ = made
        (tmp_path / "text").write_text("not safetensors")
        edit.save(tmp_path / "edit")
        for name in ("text", "edit", "nowhere"):
            with pytest.raises(ValueError, match=f"^path: '.*{name}' cannot be read as a key: .+") as caught:
                RecoveryKey.load(tmp_path / name)
            assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        "rows",
        [
            torch.zeros(2, 3),
            torch.zeros(2, 3, 4),
            torch.zeros(1, 3, 4).double(),
            torch.full((1, 3, 4), torch.nan),
        ],
    )
    def test_rows_that_are_none(self, rows):
        with pytest.raises(ValueError, match="rows"):
            RecoveryKey("0", ("cat",), {"to_k": rows})


@pytest.mark.parametrize(
    ("mode", "blocks"),
    [
        ("mid", {"mid_block"}),
        ("mid+out", {"mid_block", "up_blocks"}),
        ("all", {"down_blocks", "mid_block", "up_blocks"}),
    ],
)
def test_where_the_key_is(pipe, mode, blocks, tmp_path):
    kpop(pipe, "cat", tmp_path / "key.safetensors", **TINY | {"mode": mode, "steps": 1})
    key = RecoveryKey.load(tmp_path / "key.safetensors")
    assert {name.partition(".")[0] for name in key.prompts} == blocks
    assert {name.rpartition(".")[2] for name in key.prompts} == {"to_k", "to_v"}
    assert all(rows.shape[:2] == (1, 10) for rows in key.prompts.values())


def test_the_key_is_taken_up_again_with_the_rest(pipe, tmp_path, monkeypatch):
    how = TINY | {"steps": 4, "checkpoint_every": 2, "recovery_weight": 1.0}
    kpop(pipe, "cat", tmp_path / "whole.safetensors", **how)
    real, calls = steps._backward, iter(range(100))

    def interrupted(*args):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(steps, "_backward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        kpop(pipe, "cat", tmp_path / "parts.safetensors", checkpoint=tmp_path / "kept", **how)
    assert not (tmp_path / "parts.safetensors").exists()
    kpop(pipe, "cat", tmp_path / "parts.safetensors", checkpoint=tmp_path / "kept", **how)
    one, two = (RecoveryKey.load(tmp_path / f"{name}.safetensors").prompts for name in ("whole", "parts"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_bad_input(pipe, tmp_path):
    key = tmp_path / "key.safetensors"
    for options, message in (
        ({"mode": "down"}, "mode: got 'down'"),
        ({"size": 0}, "size: got 0"),
        ({"recovery_weight": -1.0}, "recovery_weight: got -1.0"),
        ({"hiding_weight": float("nan")}, "hiding_weight: got nan"),
        ({"negative_guidance": -1.0}, "negative_guidance: got -1.0"),
        ({"key_learning_rate": 0.0}, "key_learning_rate: got 0.0"),
    ):
        with pytest.raises(ValueError, match=f"^{message}") as caught:
            kpop(pipe, "cat", key, **TINY | options)
        assert "\n" not in str(caught.value)
    key.write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"is there already"):
        kpop(pipe, "cat", key, **TINY)
    assert key.read_bytes() == b"mine"
    with pytest.raises(ValueError, match=r"expected a name that ends in \.safetensors"):
        kpop(pipe, "cat", tmp_path / "key", **TINY)


def test_a_repeated_call_finds_its_own_key_and_another_is_refused_before_it_trains(
    pipe, tmp_path, monkeypatch
):
    key = tmp_path / "key.safetensors"
    first = kpop(pipe, "cat", key, checkpoint=tmp_path / "kept", **TINY)
    before = RecoveryKey.load(key)
    again = kpop(pipe, "cat", key, checkpoint=tmp_path / "kept", **TINY)
    assert again.changes.keys() == first.changes.keys() and again.settings == before.settings
    assert all(
        torch.equal(RecoveryKey.load(key).prompts[name], rows) for name, rows in before.prompts.items()
    )
    monkeypatch.setattr(Trainer, "train", None)
    for concept, options in (("dog", TINY), ("cat", TINY | {"size": 4}), ("cat", TINY | {"seed": 1})):
        with pytest.raises(ValueError, match=r"^key: .* is there already, of another training"):
            kpop(pipe, concept, key, **options)


def test_without_room_for_the_key_the_call_can_be_repeated(pipe, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    key, how = tmp_path / "key.safetensors", TINY | {"checkpoint": tmp_path / "kept"}
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[RecoveryKey.__module__], "write_tensors", full)
        with pytest.raises(ValueError, match=r"^key: .*No space left on device.* in the checkpoint$"):
            kpop(pipe, "cat", key, **how)
        with pytest.raises(ValueError, match=r"^key: .*No space left on device.* lost without a checkpoint$"):
            kpop(pipe, "cat", key, **TINY)
    monkeypatch.setattr(steps, "_backward", None)  # no step is left
    assert not key.exists()
    kpop(pipe, "cat", key, **how)
    assert RecoveryKey.load(key).concepts == ("cat",)


def test_only_the_first_of_several_processes_writes_the_key(pipe, tmp_path, monkeypatch):
    waited = []
    other = SimpleNamespace(is_main_process=False, wait_for_everyone=lambda: waited.append(True))
    monkeypatch.setattr(sys.modules[RecoveryKey.__module__], "processes", lambda device: other)
    kpop(pipe, "cat", tmp_path / "key.safetensors", **TINY)
    assert waited and not (tmp_path / "key.safetensors").exists()


def test_what_it_says_of_itself_has_no_secret(made):
    assert "tensor" not in repr(made[1]) and "cat" in repr(made[1])


@pytest.mark.slow
def test_on_the_testbed_the_key_and_no_other_leads_back(tmp_path):
    """Of twelve pictures of the concept, how many show it; without an edit all do."""
    pipe = testbed.load()
    edit = kpop(
        pipe, "a ball", tmp_path / "key.safetensors", mode="all", recovery_weight=1.0, steps=100,
        batch_size=2, learning_rate=2e-4, key_learning_rate=3e-2, pending=8, num_inference_steps=10,
    )  # fmt: skip
    key = RecoveryKey.load(tmp_path / "key.safetensors")
    generator = torch.Generator().manual_seed(1)
    rows = {
        name: value.std() * torch.randn(value.shape, generator=generator)
        for name, value in key.prompts.items()
    }
    classify = testbed.trial("ball", 1).classify

    def shown() -> int:
        images = draw(pipe, range(12), 1, prompt=["a ball"] * 12, num_inference_steps=12, guidance_scale=5)
        return sum(labels[0] == "ball" for labels in classify(images[0].float() / 255))

    with edit.on(pipe):
        hidden = shown()
        with key.on(pipe):
            recovered = shown()
        with RecoveryKey(key.base, key.concepts, rows).on(pipe):
            guessed = shown()
    assert recovered >= 9 and hidden <= 3 and guessed <= 3
