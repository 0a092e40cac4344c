"""Who is on a picture and how clean it is: the judges tell it for subjects that they have not seen."""

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch.nn import functional as F

from pumice import models, testbed
from pumice.testbed import world
from pumice.testbed.identity import IdentityNet
from pumice.testbed.training import identity as training
from pumice.testbed.training.__main__ import main

SUBJECTS = range(world.SUBJECT_COUNT)


def stacked(pictures):
    return torch.from_numpy(np.stack(list(pictures)))


def share_above(high, low):
    """The area under the ROC curve."""
    return (high.flatten()[:, None] > low.flatten()[None]).float().mean()


@pytest.fixture(scope="module")
def net():
    return testbed.load_identity()


@pytest.fixture(scope="module")
def model():
    return models.load(testbed.load())


@pytest.fixture(scope="module")
def references():
    return [stacked(world.subject(i, k) for k in range(4)) for i in SUBJECTS]


@pytest.fixture(scope="module")
def pictures():
    return [stacked(world.subject(i, 100 + k) for k in range(20)) for i in SUBJECTS]


@pytest.fixture(scope="module")
def scenes():
    return [world.training_picture(10**9 + k) for k in range(120)]


@pytest.fixture(scope="module")
def decoded(model, pictures):
    """What the autoencoder makes of the subjects."""
    with torch.no_grad():
        return [model.decode_latents(model.encode_image(images[:8])) for images in pictures]


def scores(net, pictures, references):
    """Of each subject's pictures for the subject itself, and for the others."""
    same = torch.cat([net.identity_score(pictures[i], references[i]) for i in SUBJECTS])
    other = [net.identity_score(pictures[i], references[j]) for i in SUBJECTS for j in SUBJECTS if i != j]
    return same, torch.cat(other)


# Made when the subjects were drawn first.
FINGERPRINTS = [
    (-14.398, 31.082), (-8.684, 4.384), (-6.458, -15.816), (5.683, 5.786), (2.366, -37.32), (24.214, -10.148),
]  # fmt: skip


class TestCreatures:
    def test_the_subjects_are_who_they_were(self):
        """Sums over pictures 0 and 7, weighted differently everywhere: a pixel that moves shows."""
        weights = np.sin(np.arange(3 * world.SIZE**2)).reshape(3, world.SIZE, world.SIZE)
        found = [[float((world.subject(i, k) * weights).sum()) for k in (0, 7)] for i in SUBJECTS]
        np.testing.assert_allclose(found, FINGERPRINTS, atol=2e-3)

    def test_a_creature_is_the_same_at_another_place(self):
        one, again, other = (world.creature(*who, place="cave") for who in ((3, 5), (3, 5), (3, 6)))
        assert np.array_equal(one, again) and not np.array_equal(one, other)
        assert one.shape == (3, world.SIZE, world.SIZE) and one.dtype == np.float32
        styled = world.creature(3, 5, place="cave", style="varga")
        assert 0.03 < np.abs(styled - one).mean() < 0.3

    def test_none_is_a_subject(self, monkeypatch):
        """A creature whose colours and ears would be a subject's gets others."""
        drawn = []
        monkeypatch.setattr(world, "_draw_creature", lambda looks, *_: drawn.append(looks))
        for looks in range(3000):
            world.creature(looks, 0)
        subjects = {looks.kind for looks in world._SUBJECTS}
        assert not subjects & {looks.kind for looks in drawn}
        assert len({looks.kind for looks in drawn}) > 850, "all other kinds turn up"
        monkeypatch.setattr(world, "_SUBJECTS", ())
        for looks in range(3000):
            world.creature(looks, 0)
        assert subjects & {looks.kind for looks in drawn[3000:]}, "they would have, by chance"

    def test_there_is_none_below_zero(self):
        with pytest.raises(ValueError, match="looks: got -1, expected 0 or more"):
            world.creature(-1, 0)


class TestIdentity:
    def test_it_tells_unseen_subjects_apart(self, net, pictures, references):
        same, other = scores(net, pictures, references)
        assert share_above(same, other) > 0.99
        assert same.mean() > 0.93 and same.quantile(0.05) > 0.85
        assert other.mean() < 0.15 and other.quantile(0.95) < 0.5

    def test_after_the_autoencoder_too(self, net, decoded, references):
        same, other = scores(net, decoded, references)
        assert share_above(same, other) > 0.99
        assert same.mean() > 0.9 and other.mean() < 0.15

    def test_it_tells_creatures_apart_that_differ_in_little(self, net):
        """Forty others, some with two of three colours in common."""
        known, new = (
            torch.stack(
                [net(stacked(world.creature(10**6 + c, first + k) for k in range(4)))[0] for c in range(40)]
            ).detach()
            for first in (0, 50)
        )
        cosines = new @ F.normalize(known.mean(1), dim=1).T
        same = torch.eye(40, dtype=torch.bool)[:, None].expand_as(cosines)
        assert share_above(cosines[same], cosines[~same]) > 0.99

    @pytest.mark.parametrize("kind", ["scenes", "collages", "noise"])
    def test_what_is_no_creature_scores_low(self, net, scenes, references, kind):
        images = {
            "scenes": lambda: stacked(picture for _, picture, _ in scenes),
            "collages": lambda: stacked(world.memorized(i).picture for i in range(world.MEMORIZED_COUNT)),
            "noise": lambda: torch.rand(40, 3, 64, 64, generator=torch.Generator().manual_seed(0)),
        }[kind]()
        found = torch.cat([net.identity_score(images, reference) for reference in references])
        assert found.mean() < 0.15 and found.quantile(0.95) < 0.5

    def test_it_is_the_cosine_to_the_mean_embedding(self, net, pictures, references):
        images, known = pictures[1][:5], references[1]
        with torch.no_grad():
            embeddings, mean = net(images)[0].double(), net(known)[0].double().mean(0)
        assert torch.allclose(embeddings.norm(dim=1), torch.ones(5, dtype=torch.float64), atol=1e-6)
        expected = embeddings @ mean / mean.norm()
        found = net.identity_score(images, known)
        assert found.shape == (5,) and not found.requires_grad
        assert torch.allclose(found.double(), expected, atol=1e-5)
        assert torch.allclose(net.identity_score(images, known.flip(0)), found, atol=1e-5)
        assert net.identity_score(images[:1], images[:1]) == pytest.approx(1, abs=1e-5)


class TestQuality:
    def test_clean_pictures_are_good(self, net, pictures, decoded, scenes):
        assert net.quality(torch.cat(pictures)).quantile(0.05) > 0.8
        assert net.quality(torch.cat(decoded)).mean() > 0.8
        for style in (None, *world.STYLES):
            of_it = stacked(picture for _, picture, scene in scenes if scene.style == style)
            assert net.quality(of_it).mean() > 0.7, style

    def test_the_models_own_drawings_are_good(self, net, model):
        captions = [world.full_caption(scene) for _, _, scene in map(world.training_picture, range(12))]
        drawn = model.pipe(
            captions,
            num_inference_steps=25,
            guidance_scale=5.0,
            output_type="pt",
            generator=torch.Generator().manual_seed(0),
        ).images
        assert net.quality(drawn).mean() > 0.7

    @pytest.mark.parametrize("period", [None, 4, 6, 8, 12], ids=str)
    def test_patterns_are_bad_the_more_the_stronger(self, net, pictures, period):
        """Noise of every scale and of one period in px, limited to +-level as an attack's is."""
        images, rng = torch.cat(pictures), np.random.default_rng(0)
        noise = rng.standard_normal(images.shape)
        if period:
            y, x = np.fft.fftfreq(world.SIZE)[:, None], np.fft.rfftfreq(world.SIZE)[None]
            ring = np.exp(-8 * (np.hypot(x, y) * period - 1) ** 2)
            noise = np.fft.irfft2(np.fft.rfft2(noise) * ring, s=images.shape[2:])
        signs = torch.from_numpy(noise).sign().float()
        clean, faint, middle, strong = (
            net.quality((images + level / 255 * signs).clamp(0, 1)) for level in (0, 4, 8, 16)
        )
        assert clean.mean() > faint.mean() > middle.mean() > strong.mean()
        assert share_above(clean, middle) > 0.99
        assert middle.mean() < 0.35 and strong.mean() < 0.1

    def test_what_noisy_latents_decode_to_is_bad(self, net, model, pictures):
        with torch.no_grad():
            latents = model.encode_image(torch.cat([images[:4] for images in pictures]))
            noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
            found = [net.quality(model.decode_latents(latents + k * noise)).mean() for k in (0, 0.5, 1, 2)]
        assert found == sorted(found, reverse=True) and found[0] - found[2] > 0.4 and found[3] < 0.15


class TestInput:
    def test_a_batch_is_its_pictures_one_by_one(self, net, pictures, references):
        images = torch.cat([images[:2] for images in pictures])
        for judge in (net.quality, lambda images: net.identity_score(images, references[2])):
            single = torch.cat([judge(image[None]) for image in images])
            assert torch.allclose(judge(images), single, atol=1e-5)

    @pytest.mark.parametrize(
        ("images", "error", "message"),
        [
            (torch.zeros(3, 64, 64), ValueError, r"got shape \(3, 64, 64\), expected \(B, 3, 64, 64\)"),
            (torch.zeros(2, 3, 32, 64), ValueError, r"got shape \(2, 3, 32, 64\)"),
            (torch.zeros(0, 3, 64, 64), ValueError, r"got shape \(0, 3, 64, 64\)"),
            (torch.full((1, 3, 64, 64), 255.0), ValueError, r"got 255 to 255, expected values in \[0, 1\]"),
            (torch.full((1, 3, 64, 64), torch.nan), ValueError, r"got NaN, expected values in \[0, 1\]"),
            (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), TypeError, "got torch.uint8, expected a floating"),
            (np.zeros((1, 3, 64, 64)), TypeError, "got ndarray, expected a floating"),
        ],
    )
    def test_other_input(self, net, images, error, message):
        good = torch.full((1, 3, 64, 64), 0.5)
        for name, judge in (
            ("images", net.quality),
            ("images", lambda images: net.identity_score(images, good)),
            ("references", lambda images: net.identity_score(good, images)),
        ):
            with pytest.raises(error, match=f"^{name}: {message}"):
                judge(images)


class TestTraining:
    @pytest.fixture(autouse=True)
    def little(self, monkeypatch):
        for name, value in (
            ("CREATURES", 16),
            ("SEEN_OF_EACH", 1),
            ("SEEN_OTHERS", 8),
            ("DRAWINGS", 2),
            ("CHUNK", 20),
        ):
            monkeypatch.setattr(training, name, value)

    def test_the_command_trains_resumes_and_writes_what_ships(self, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "pipeline").symlink_to(testbed.WEIGHTS)

        def train(work, *limits):
            where = ("--work", tmp_path / work, "--out", tmp_path / "out", "--device", "cpu")
            return CliRunner().invoke(main, ["identity", "--steps", "3", *map(str, where), *limits])

        def trained(work):
            return torch.load(tmp_path / work / "identity.pt", weights_only=True)["modules"]["identity"]

        assert train("a").exit_code == 0
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "seen.safetensors").symlink_to(tmp_path / "a" / "seen.safetensors")
        stopped = train("b", "--minutes", "0")
        assert stopped.exit_code == 1 and "identity: stopped after 0 minutes" in stopped.output
        assert train("b").exit_code == 0
        whole, parts = trained("a"), trained("b")
        assert all(torch.equal(whole[name], parts[name]) for name in whole)
        written = testbed.shipped.load_file(tmp_path / "out" / "identity.safetensors")
        assert {name: it.shape for name, it in written.items()} == {
            name: it.shape for name, it in IdentityNet().state_dict().items()
        }
        assert all(torch.equal(written[name], whole[name].half()) for name in whole)

    def test_damage_is_the_distance_to_the_unharmed_twin(self):
        picture, rng = torch.from_numpy(world.creature(0, 0)), np.random.default_rng(0)
        found = [training._damaged(picture, rng) for _ in range(300)]
        same = [torch.equal(harmed, picture) for harmed, _ in found]
        assert same == [damage == 0 for _, damage in found] and 0.3 < np.mean(same) < 0.5
        distances = [float((harmed - picture).square().mean().sqrt()) for harmed, _ in found]
        agree = [abs(d - damage) < 1e-6 for d, (_, damage) in zip(distances, found, strict=True)]
        assert np.mean(agree) > 0.8, "all but the straying outlines"
        assert all(0 <= harmed.min() and harmed.max() <= 1 for harmed, _ in found)
