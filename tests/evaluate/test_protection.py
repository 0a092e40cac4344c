import json
import math

import pytest
import torch

from pumice import models, testbed
from pumice.evaluate import latent_displacement, learnability, protection, share_lost, visibility
from pumice.testbed import world

PROMPT = "a photo of a sks creature"
QUICK = {"steps": 3, "learning_rate": 1e-3, "batch_size": 2, "drawings": 2, "num_inference_steps": 2}


def pictures(count):
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def moved(images, eps, seed=1):
    sign = torch.randint(0, 2, images.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return (images + eps * sign).clamp(0, 1)


def brightness(images):
    return images.mean((1, 2, 3))


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def pipe(request):
    return testbed.tiny_pipeline(request.param)


@pytest.fixture(scope="module")
def tiny():
    return testbed.tiny_pipeline("sd1")


def test_the_same_pictures_have_not_moved(pipe):
    found = latent_displacement(pictures(2), pictures(2), pipe)
    assert found.latent.tolist() == [0, 0] and torch.equal(found.loss, found.original_loss)


def test_displacement_and_losses_are_the_formulas(pipe):
    originals, model = pictures(2), models.load(pipe)
    images = moved(originals, 8 / 255)
    found = latent_displacement(images, originals, pipe, "a ball", timesteps=4, seed=3)
    with torch.no_grad():
        z, z0 = (model.encode_image(x).double() for x in (images, originals))
    expected = (z - z0).flatten(1).norm(dim=1) / z0.flatten(1).norm(dim=1)
    torch.testing.assert_close(found.latent, expected)
    noise = torch.randn(4, *z.shape[1:], generator=torch.Generator().manual_seed(3))
    for place, latents in ((0, z), (1, z), (0, z0)):
        errors = []
        for k, t in enumerate((125, 375, 625, 875)):
            x, n, when = latents[place : place + 1].float(), noise[k : k + 1], torch.tensor([t])
            with torch.no_grad():
                output = model.predict(model.add_noise(x, n, when), when, model.encode_prompt("a ball"))
            errors.append(float((output - model.schedule.target(x, n, when)).double().square().mean()))
        losses = found.original_loss if latents is z0 else found.loss
        assert float(losses[place]) == pytest.approx(sum(errors) / 4, rel=1e-5)


def test_displacement_grows_with_the_change_and_is_that_of_a_picture_alone(tiny):
    originals = pictures(3) * 0.8 + 0.1
    small, large = (latent_displacement(moved(originals, eps), originals, tiny) for eps in (0.01, 0.1))
    assert bool((large.latent > 2 * small.latent).all()) and bool((small.latent > 0).all())
    alone = latent_displacement(moved(originals, 0.1)[1:2], originals[1:2], tiny)
    for name in ("latent", "loss", "original_loss"):
        torch.testing.assert_close(getattr(alone, name), getattr(large, name)[1:2], rtol=1e-4, atol=1e-6)
    assert set(json.loads(json.dumps(large.to_dict()))) == {"latent", "loss", "original_loss"}


@pytest.fixture(scope="module")
def compared(tiny):
    clean = pictures(2)
    sets = {"clean": clean, "noise": moved(clean, 8 / 255), "again": clean}
    return sets, protection(
        tiny, sets, PROMPT, ["a", "b"], identity=brightness, quality=lambda x: x[:, 0, 0, 0], **QUICK
    )


def test_rows_are_what_was_learned_judged_and_compared(tiny, compared):
    sets, found = compared
    assert [row["name"] for row in found.rows] == ["none", "clean", "noise", "again"]
    none, clean, noise, again = found.rows
    learned = learnability(tiny, sets["noise"], PROMPT, ["a", "b"], **QUICK)
    assert torch.equal(found.drawn["noise"], learned.pictures)
    scores = (learned.pictures / 255).mean((3, 4, 5)).double()
    assert noise["identity"] == pytest.approx(float(scores.mean()), abs=1e-6)
    half = 1.959964 * float(scores.std()) / math.sqrt(scores.numel())
    assert noise["identity_high"] - noise["identity"] == pytest.approx(half, abs=1e-6)
    assert noise["quality"] == pytest.approx(float((learned.pictures[..., 0, 0, 0] / 255).mean()), abs=1e-6)
    seen = visibility(sets["noise"], sets["clean"]).mean()
    shift = latent_displacement(sets["noise"], sets["clean"], tiny, PROMPT)
    assert {key: noise[key] for key in seen} == seen
    assert noise["displacement"] == pytest.approx(float(shift.latent.mean()))
    assert noise["loss_change"] == pytest.approx(float((shift.loss / shift.original_loss).mean() - 1))
    assert noise["training_loss"] == pytest.approx(float(learned.losses[:, 2:].mean()))
    for row in (clean, again):
        assert (row["psnr"], row["displacement"]) == (None, 0)
        assert (row["identity_lost"], row["quality_lost"]) == (0, 0)
    assert again["identity"] == clean["identity"] and none["psnr"] is none["training_loss"] is None
    untrained = learnability(tiny, sets["clean"], PROMPT, ["a", "b"], **{**QUICK, "steps": 0})
    assert torch.equal(found.drawn["none"], untrained.pictures)


def test_what_is_lost_is_a_share_of_the_clean_scores_from_pairs():
    clean = torch.tensor([[[0.8, 0.6], [1.0, 0.8]]]).double()
    scores = clean - torch.tensor([[[0.4, 0.2], [0.4, 0.2]]]).double()
    found = share_lost("identity", scores, clean)
    beside = 0.625 * clean - scores  # 1 - 0.3 / 0.8 is 0.625
    half = 100 * 1.959964 * float(beside.std()) / (2 * 0.8)
    assert found["identity_lost"] == pytest.approx(37.5)
    assert found["identity_lost_low"] == pytest.approx(37.5 - half)
    assert found["identity_lost_high"] == pytest.approx(37.5 + half)
    assert set(share_lost("identity", scores, -clean).values()) == {None}


def test_what_is_wholly_lost_is_certain_and_a_share_of_each_is_too():
    clean = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0)).double()
    for share in (0, 0.3):
        lost = share_lost("identity", share * clean, clean)
        assert all(value == pytest.approx(100 * (1 - share)) for value in lost.values())


def test_the_interval_covers_what_is_lost_as_often_as_it_says():
    """Clean scores are drawn, too: they are not known exactly."""
    draw, covered, rounds = torch.Generator().manual_seed(0), 0, 1000
    for _ in range(rounds):
        clean = 0.6 + 0.3 * torch.randn(50, generator=draw).double()
        scores = 0.2 + 0.3 * torch.randn(50, generator=draw).double()
        found = share_lost("identity", scores, clean)
        covered += found["identity_lost_low"] <= 100 * (1 - 0.2 / 0.6) <= found["identity_lost_high"]
    assert 0.92 < covered / rounds < 0.97


def test_results_are_plain_data_and_a_table(compared):
    sets, found = compared
    again = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert again["rows"] == [dict(row) for row in found.rows] and again["settings"]["clean"] == "clean"
    assert torch.tensor(again["scores"]["noise"]["identity"]).shape == (1, 2, 2)
    titles, *lines = found.table()
    assert titles[:4] == ("pictures", "PSNR", "SSIM", "displacement")
    assert titles[4:] == ("identity", "quality", "identity lost", "quality lost")
    assert [line[0] for line in lines] == ["none", *sets] and {len(line) for line in lines} == {len(titles)}
    assert lines[0][1] == "-" and lines[1][-1] == "0.0"


def test_the_trained_model_learns_a_subject_it_has_not_seen():
    pipe, net = testbed.load(), testbed.load_identity()
    clean, references = (
        torch.stack([torch.from_numpy(world.subject(0, k)) for k in range(first, first + 8)])
        for first in (0, 100)
    )
    found = protection(
        pipe,
        {"clean": clean},
        PROMPT,
        identity=lambda images: net.identity_score(images, references),
        steps=40,
        learning_rate=1e-3,
        batch_size=4,
        drawings=6,
        num_inference_steps=8,
        guidance_scale=2,
    )
    none, learned = found.rows
    assert learned["identity_low"] > none["identity_high"] + 0.1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": torch.zeros(1, 3, 32, 32, dtype=torch.uint8)}, TypeError, "images: got torch.uint8"),
        ({"originals": torch.zeros(2, 3, 32, 32)}, ValueError, r"originals: got shape \(2, 3, 32, 32\)"),
        ({"timesteps": 0}, ValueError, "timesteps: got 0"),
        ({"prompt": 3}, TypeError, "prompt: got a int"),
    ],
)
def test_bad_input_to_displacement(tiny, change, error, message):
    good = {"images": torch.zeros(1, 3, 32, 32), "originals": torch.zeros(1, 3, 32, 32), "pipe": tiny}
    with pytest.raises(error, match=message) as caught:
        latent_displacement(**(good | change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pictures": torch.zeros(1, 3, 32, 32)}, TypeError, "pictures: got a Tensor, expected sets"),
        (
            {"pictures": {"a": torch.zeros(1, 3, 32, 32)}},
            ValueError,
            r"pictures: got \['a'\], expected 'clean'",
        ),
        ({"clean": "x"}, ValueError, "expected 'x' and no 'none'"),
        ({"identity": lambda images: torch.zeros(5)}, ValueError, r"identity: returned shape \(5,\)"),
        ({"quality": lambda images: images.mean((1, 2, 3)) / 0}, ValueError, "quality: returned"),
    ],
)
def test_bad_input_to_protection(tiny, change, error, message):
    good = {"pictures": {"clean": torch.zeros(1, 3, 32, 32)}, "identity": brightness} | change
    with pytest.raises(error, match=message) as caught:
        protection(tiny, good.pop("pictures"), PROMPT, **good, **QUICK)
    assert "\n" not in str(caught.value)


def test_sets_are_of_the_same_pictures(tiny):
    sets = {"clean": torch.zeros(1, 3, 32, 32), "x": torch.zeros(2, 3, 32, 32), "none": None}
    with pytest.raises(ValueError, match="expected 'clean' and no 'none'"):
        protection(tiny, sets, PROMPT, identity=brightness)
    del sets["none"]
    with pytest.raises(ValueError, match=r"pictures: got shape \(2, 3, 32, 32\) for 'x'"):
        protection(tiny, sets, PROMPT, identity=brightness)
