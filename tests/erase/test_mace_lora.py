"""MACE's LoRAs and the whole of MACE: times, masks, stages."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file

from erase.test_forget_me_not import drawn, pictures
from pumice import models, testbed
from pumice.erase.attention_loss import energies, root, words
from pumice.erase.mace import mace_fuse, mace_refine
from pumice.erase.mace_lora import important, mace, mace_lora
from pumice.models import Added, fingerprint
from pumice.testbed import tiny_pipeline
from pumice.training.checkpoint import NAME

FULL = torch.ones(2, 32, 32)
TINY = {"steps": 3, "learning_rate": 1e-2, "allow_unknown": True}

pytestmark = pytest.mark.filterwarnings("ignore::pumice.erase.arguments.ErasureWarning")


@pytest.fixture(scope="module")
def pipe():
    return testbed.load()


@pytest.fixture(scope="module")
def tiny():
    return tiny_pipeline("sd1")


def same(one, two) -> bool:
    return one.changes.keys() == two.changes.keys() and all(
        torch.equal(change.up, two.changes[name].up) and torch.equal(change.down, two.changes[name].down)
        for name, change in one.changes.items()
    )


def test_times_are_drawn_by_the_papers_density():
    p = important(1000, True)
    assert float(p.sum()) == pytest.approx(1) and int(p.argmax()) == 300
    for t in (0, 199, 250, 400, 900):
        edge = 1 / (1 + math.exp(-0.05 * (t - 200))) - 1 / (1 + math.exp(-0.05 * (t - 400)))
        middle = 1 / (1 + math.exp(-5)) - 1 / (1 + math.exp(5))
        assert float(p[t] / p[300]) == pytest.approx(edge / middle)
    assert torch.equal(important(4, False), torch.full((4,), 0.25, dtype=torch.float64))
    assert float(important(500, True)[100:201].sum()) == pytest.approx(float(p[200:401].sum()), abs=2e-2)


@pytest.mark.parametrize("importance", [True, False])
def test_a_training_meets_these_times(tiny, monkeypatch, importance):
    from pumice.erase import attention_loss

    met, real = [], attention_loss.energies
    monkeypatch.setattr(
        attention_loss, "energies", lambda model, z, t, *rest: met.append(t) or real(model, z, t, *rest)
    )
    mace_lora(tiny, "cat", pictures(1), importance=importance, **TINY | {"steps": 4, "batch_size": 32})
    times = torch.cat(met).double()
    assert len(times) == 128
    p = important(1000, importance)
    cumulated = p.cumsum(0)[times.long()].sort().values
    distance = (cumulated - torch.linspace(0, 1, 128)).abs().max()  # of Kolmogorov and Smirnov
    assert distance < 1.63 / 128**0.5


def test_the_loss_is_a_norm_of_each_layer_inside_the_mask(tiny):
    """One step from the model as it is, whose LoRA is still zero."""
    images, masks = pictures(1), torch.zeros(1, 32, 32)
    masks[:, :, :16] = 1
    edit = mace_lora(tiny, "cat", images, masks, **TINY | {"steps": 1})
    model = models.load(tiny)
    from pumice.models.draws import Draws

    draws = Draws(["0/erase/0"], model.device)
    u = draws.uniform([0], "timestep", 0).double()
    t = torch.searchsorted(important(1000, True).cumsum(0), u)
    with torch.no_grad():
        z = model.encode_image(images, noise=draws.normal([0], "posterior", 0, model.latent_shape()))
        z = model.add_noise(z, draws.normal([0], "noise", 0, z.shape[1:]), t)
        columns = words(model, "a photo of {}", "cat", True)[None]
        found = energies(model, z, t, model.encode_prompt("a photo of cat"), columns, masks)
    assert edit.details["losses"] == [pytest.approx(float(root(found).sum()), rel=1e-5)]
    assert all(isinstance(change, Added) and change.rank == 1 for change in edit.changes.values())
    assert all(name.endswith((".attn2.to_k.weight", ".attn2.to_v.weight")) for name in edit.changes)


def test_a_mask_of_everything_is_none_and_what_is_outside_counts_for_nothing(tiny):
    images = pictures(2)
    everywhere = mace_lora(tiny, "cat", images, FULL, **TINY)
    assert same(everywhere, mace_lora(tiny, "cat", images, **TINY))
    masks = torch.zeros(2, 32, 32)
    masks[:, 4:12, 4:12] = 1
    inside = mace_lora(tiny, "cat", images, masks, **TINY)
    assert inside.details["losses"][0] < everywhere.details["losses"][0]
    assert same(inside, mace_lora(tiny, "cat", images, masks > 0.5, **TINY))


def test_a_model_stops_looking_at_the_word_inside_the_mask(pipe):
    images = drawn("ball", range(6))
    masks = ((images - drawn("ball", range(6), "blue")).abs().amax(1) > 0.1).float()
    assert 0.02 < float(masks.mean()) < 0.4
    edit = mace_lora(
        pipe, "ball", images, masks, prompt="a {}", steps=40, learning_rate=2e-3, allow_unknown=True
    )
    losses = edit.details["losses"]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


def test_presets(tiny):
    for preset, learning_rate, importance in (
        ("object", 1e-5, True),
        ("celebrity", 1e-4, True),
        ("nudity", 1e-5, False),
    ):
        edit = mace_lora(tiny, "cat", pictures(1), preset=preset, steps=1, allow_unknown=True)
        assert edit.settings["learning_rate"] == learning_rate and edit.settings["importance"] is importance
    assert (
        len(mace_lora(tiny, "cat", pictures(1), preset="artist", allow_unknown=True).details["losses"]) == 50
    )


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_mace_is_its_three_stages(family):
    pipe, other = tiny_pipeline(family), tiny_pipeline(family)
    before = fingerprint(models.load(pipe))
    images = {"cat": pictures(2), "a red house": pictures(1, seed=1)}
    whole = mace(pipe, list(images), "sky", list(images.values()), **TINY)
    assert fingerprint(models.load(pipe)) == before
    refined = mace_refine(other, list(images), "sky")
    loras = {}
    with refined.on(other):
        for concept, own in images.items():
            edit = mace_lora(other, concept, own, **TINY)
            assert whole.details["losses"][concept] == pytest.approx(edit.details["losses"], rel=1e-5)
            loras[concept] = {
                name.removesuffix(".weight"): (change.up, change.down)
                for name, change in edit.changes.items()
            }
    fused = mace_fuse(other, loras, refined=refined)
    for name, change in fused.changes.items():
        torch.testing.assert_close(
            whole.changes[name].up @ whole.changes[name].down, change.up @ change.down, atol=1e-5, rtol=1e-4
        )
    assert whole.method == "mace" and whole.targets == ("cat", "a red house")
    with whole.on(pipe), fused.on(other):
        pass


def test_mace_goes_on_where_it_stopped(tiny, tmp_path, monkeypatch):
    from pumice.training import steps

    how = {**TINY, "images": [pictures(1), pictures(2)], "checkpoint_every": 1}
    concepts = ["cat", "a red house"]
    expected = mace(tiny, concepts, "sky", **how)
    real, calls = steps._backward, iter(range(100))

    def stop(*args):
        if next(calls) == 4:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(steps, "_backward", stop)
    with pytest.raises(KeyboardInterrupt):
        mace(tiny, concepts, "sky", checkpoint=tmp_path, **how)
    monkeypatch.setattr(steps, "_backward", real)
    assert [len(load_file(tmp_path / str(number) / NAME)["losses"]) for number in (0, 1)] == [3, 1]
    with pytest.raises(ValueError, match=r"learning_rate was 0\.01, is 0\.02"):
        mace(tiny, concepts, "sky", checkpoint=tmp_path, **how | {"learning_rate": 0.02})
    assert same(mace(tiny, concepts, "sky", checkpoint=tmp_path, **how), expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"masks": FULL[:1]}, ValueError, r"^masks: got shape \(1, 32, 32\), expected \(2, 32, 32\)"),
        ({"masks": FULL[:, :16, :16]}, ValueError, r"^masks: got shape \(2, 16, 16\), expected"),
        ({"masks": 0 * FULL}, ValueError, "^masks: got one with nothing above 0.5"),
        ({"masks": [FULL, FULL]}, ValueError, "^masks: got 2, expected some for each of 1"),
        ({"masks": FULL, "images": None}, ValueError, "^masks: got some without images"),
        ({"rank": None}, ValueError, "^rank: got None, expected one"),
        ({"importance": "yes"}, TypeError, "^importance: got 'yes', expected a bool"),
        ({"preset": "car"}, ValueError, "^preset: got 'car', expected one of object, nudity"),
        ({"weight_decay": -1}, ValueError, "^weight_decay: got -1"),
        ({"rank": 0}, ValueError, "^rank: got 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_bad_input(tiny, change, error, message):
    before = fingerprint(models.load(tiny))
    with pytest.raises(error, match=message):
        mace_lora(tiny, "cat", **{"images": pictures(2)} | TINY | change)
    if "weight_decay" not in change:
        with pytest.raises(error, match=message):
            mace(tiny, "cat", "sky", **{"images": pictures(2)} | TINY | change)
    assert fingerprint(models.load(tiny)) == before


def test_bad_concepts(tiny):
    with pytest.raises(ValueError, match="mapping"):
        mace(tiny, "cat", "cat", pictures(1), **TINY)
    with pytest.raises(ValueError, match="concepts: got"):
        mace(tiny, [], "sky", **TINY)
