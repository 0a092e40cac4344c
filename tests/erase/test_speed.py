"""SPEED: its formula against dense inverses and a direct constrained solution, its filter against a loop."""

from __future__ import annotations

import pytest
import torch

from pumice import models, testbed
from pumice.erase import ErasureWarning
from pumice.erase.null_space import Move, least_seen, null_space, retained_gram
from pumice.erase.speed import _invariants, speed
from pumice.models import UnsupportedModelError
from pumice.testbed import tiny_pipeline, world

D = 24
pytestmark = pytest.mark.filterwarnings("ignore:the edit changes")  # tiny models have short tokens
PLAIN = {"influence_filter": False, "augmentations": 0}


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(n: int, retained: int = 10) -> tuple[torch.Tensor, ...]:
    c, a, r, k = rows(n, D), rows(n, D, seed=1), rows(retained, D, seed=2), rows(4, D, seed=3)
    return c, a, r, k, null_space(r.T @ r / retained, 1e-9)


def published(c, a, k, projector, alpha, lamb2) -> torch.Tensor:
    """X as it is written, with explicit inverses; columns of k are invariants."""
    eye, k = torch.eye(D, dtype=torch.float64), k.T
    s_tt, s_at = c.T @ c / len(c), a.T @ c / len(c)
    m0 = torch.linalg.inv(s_tt @ projector + alpha * eye)
    inner = k.T @ projector @ m0 @ k + lamb2 * torch.eye(k.shape[1], dtype=torch.float64)
    constrained = eye - m0 @ k @ torch.linalg.inv(inner) @ k.T @ projector
    return (s_at - s_tt) @ projector @ constrained @ m0


@pytest.mark.parametrize("n", [1, 7, D, 60])
@pytest.mark.parametrize("lamb2", [0.0, 0.5])
@pytest.mark.parametrize("alpha", [1.0, 0.05])
def test_the_factored_solution_is_the_published_formula(n, lamb2, alpha):
    c, a, _, k, basis = problem(n)
    found = Move.of(c, a).inside(basis, k, retain_scale=alpha, lamb2=lamb2)
    x = found.dense() - torch.eye(D, dtype=torch.float64)
    torch.testing.assert_close(x, published(c, a, k, basis @ basis.T, alpha, lamb2), rtol=1e-9, atol=1e-10)
    assert len(found.down) == min(n, D)


@pytest.mark.parametrize("n", [3, 60])
def test_it_solves_the_constrained_problem(n):
    """X = Y B^T, B a basis of what is in the null space and orthogonal to the invariants: a ridge in Y."""
    alpha = 0.3
    c, a, _, k, basis = problem(n)
    inside = basis @ basis.T @ k.T
    left = torch.linalg.svd(inside, full_matrices=False).U
    q = torch.linalg.svd(basis - left @ (left.T @ basis)).U[:, : basis.shape[1] - 4]
    features = c @ q
    ridge = features.T @ features / n + alpha * torch.eye(q.shape[1], dtype=torch.float64)
    expected = ((a - c).T @ features / n) @ torch.linalg.inv(ridge) @ q.T
    found = Move.of(c, a).inside(basis, k, retain_scale=alpha, lamb2=0.0)
    torch.testing.assert_close(found.up @ found.down, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("n", [2, 60])
def test_retained_rows_and_invariants_do_not_move(n):
    c, a, r, k, basis = problem(n)
    projector = basis @ basis.T
    torch.testing.assert_close(projector @ projector, projector, rtol=0, atol=1e-12)
    found = Move.of(c, a).inside(basis, k, retain_scale=0.1, lamb2=0.0)
    for still in (r, k):
        torch.testing.assert_close(found(still), still, rtol=0, atol=1e-10)
    softer = Move.of(c, a).inside(basis, k, retain_scale=0.1, lamb2=0.5)
    torch.testing.assert_close(softer(r), r, rtol=0, atol=1e-10)
    assert (softer(k) - k).norm() > 1e-3


def test_concepts_get_to_their_anchors_as_alpha_vanishes():
    c, a, _, k, basis = problem(3)
    way = [
        float((Move.of(c, a).inside(basis, k, retain_scale=alpha, lamb2=0.0)(c) - a).norm() / (a - c).norm())
        for alpha in (10.0, 1.0, 0.1, 1e-8)
    ]
    assert way == sorted(way, reverse=True)
    assert way[0] < 1
    assert way[-1] < 1e-6


@pytest.mark.parametrize("lamb2", [0.0, 0.5])
def test_invariants_that_are_retained_anyway_do_no_harm(lamb2):
    c, a, r, k, basis = problem(3)
    nothing = rows(0, D)
    expected = Move.of(c, a).inside(basis, nothing, retain_scale=1.0, lamb2=lamb2).dense()
    inside = torch.cat([r[:1], r[1:2] + r[2:3]])
    found = Move.of(c, a).inside(basis, inside, retain_scale=1.0, lamb2=lamb2)
    torch.testing.assert_close(found.dense(), expected, rtol=0, atol=1e-9)
    if lamb2 == 0:
        repeated = torch.cat([k, k[:1], r[:2]])
        once = Move.of(c, a).inside(basis, k, retain_scale=1.0, lamb2=0.0)
        often = Move.of(c, a).inside(basis, repeated, retain_scale=1.0, lamb2=0.0)
        torch.testing.assert_close(often.dense(), once.dense(), rtol=0, atol=1e-9)


def test_the_null_space_is_what_the_threshold_says():
    vectors = torch.linalg.qr(rows(D, D)).Q
    values = torch.logspace(-6, 3, D, dtype=torch.float64)
    gram = vectors * values @ vectors.T
    for threshold in (1e-3, 1.0):
        expected = vectors[:, values < threshold]
        basis = null_space(gram, threshold)
        torch.testing.assert_close(basis @ basis.T, expected @ expected.T, rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="threshold: got 1e-08"):
        null_space(gram, 1e-8)


@pytest.mark.parametrize("width", [8, D, 40])
def test_the_direction_that_a_layer_sees_least(width):
    weight = rows(width, D, seed=4)
    expected = torch.linalg.svd(weight, full_matrices=False).Vh[-1]
    found = least_seen(weight)
    torch.testing.assert_close(found * (found @ expected).sign(), expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("n", [2, 60])
@pytest.mark.parametrize(("influence_filter", "copies"), [(True, 3), (True, 0), (False, 3), (False, 0)])
def test_what_a_layer_retains_as_a_loop_collects_it(n, influence_filter, copies):
    c, a, r, _, _ = problem(n, retained=17)
    weight, noise = rows(10, D, seed=5), rows(17, copies, seed=6)
    s_tt, s_at = c.T @ c / n, a.T @ c / n
    edit = weight @ (s_at - s_tt) @ torch.linalg.inv(torch.eye(D, dtype=torch.float64) + s_tt)
    v = least_seen(weight)

    def hit(these):
        lengths = [float((edit @ row).norm()) for row in these]
        mean = sum(lengths) / max(len(lengths), 1)
        chosen = zip(these, lengths, strict=True)
        return [row for row, length in chosen if length > mean or not influence_filter]

    originals = list(r)
    numbered = {id(row): z for row, z in zip(originals, noise, strict=True)}
    kept = hit(originals)
    copied = hit([row + z * v for row in kept for z in numbered[id(row)]])
    everything = torch.stack(kept + copied)
    if influence_filter:
        assert 0 < len(kept) < 17
        assert copies == 0 or 0 < len(copied) < copies * len(kept)
    found = retained_gram(r, weight, Move.of(c, a), noise, influence_filter=influence_filter)
    torch.testing.assert_close(found, everything.T @ everything / len(everything), rtol=1e-9, atol=1e-10)


def test_rows_that_are_hit_alike_are_all_retained():
    c, a, r, _, _ = problem(2, retained=1)
    found = retained_gram(r, rows(10, D, seed=5), Move.of(c, a), rows(1, 0), influence_filter=True)
    torch.testing.assert_close(found, r.T @ r)


def test_the_invariants_are_bos_and_three_centres():
    groups = torch.eye(D, dtype=torch.float64)[[0, 5, 9]] * 20
    empty = torch.cat([rows(1, D), groups.repeat_interleave(8, 0) + 0.01 * rows(24, D, seed=7)])
    found = _invariants(empty, seed=0)
    assert torch.equal(found[0], empty[0])
    centres = found[1:][found[1:].argmax(1).argsort()]
    torch.testing.assert_close(centres, groups, rtol=0, atol=0.02)
    assert torch.equal(_invariants(empty, seed=0), found)
    few = torch.cat([rows(1, D), groups[:2].repeat_interleave(5, 0)])
    assert len(_invariants(few, seed=0)) == 3


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_retained_texts_do_not_move_in_any_family(family):
    pipe = tiny_pipeline(family)
    before = models.fingerprint(models.load(pipe))
    retain = ["dog", "house", "tree"]
    edit = speed(pipe, ["cat", "boat"], anchor="cube", retain=retain, threshold=1e-9, lamb2=0.5, **PLAIN)
    (change,) = set(edit.changes.values())
    assert all(name.endswith("to_v.weight") for name in edit.changes)
    assert len(edit.changes) == len(models.load(pipe).cross_attention)
    encoded = models.load(pipe).encode_prompt(retain)
    for embeds, text in zip(encoded.embeds, encoded.tokens, strict=True):
        r = embeds[text.eos - 1]
        assert (change.up @ (change.down @ r)).norm() < 1e-4 * r.norm()
    assert edit.details["residual"] < 1
    assert models.fingerprint(models.load(pipe)) == before


def factors(edit) -> list[torch.Tensor]:
    return [change.up @ change.down for change in edit.changes.values()]


def test_layers_share_one_map_unless_they_filter_or_copy():
    pipe = tiny_pipeline("sd1")
    few = {"retain": ["dog", "house", "tree", "car"], "threshold": 1e-3}
    layers = len(models.load(pipe).cross_attention)
    assert len(set(speed(pipe, "cat", parameters="kv", **few, **PLAIN).changes.values())) == 1
    for kind in ({"influence_filter": True, "augmentations": 0}, {"influence_filter": False}):
        edit = speed(pipe, "cat", parameters="kv", **few, **kind)
        assert len(set(edit.changes.values())) == 2 * layers
        assert edit.details["rank"] == 1
    alone = speed(pipe, "cat", parameters="v", **few)
    both = speed(pipe, "cat", parameters="kv", **few)
    for name, change in alone.changes.items():
        assert torch.equal(both.changes[name].down, change.down)


def test_the_seed_decides_the_noise():
    pipe = tiny_pipeline("sd1")
    few = {
        "retain": ["dog", "house", "tree", "car"],
        "threshold": 0.05,
        "influence_filter": False,
        "lamb2": 1e9,
    }
    first, again, other = (factors(speed(pipe, "cat", seed=seed, **few)) for seed in (0, 0, 1))
    assert all(map(torch.equal, first, again))
    assert not all(map(torch.equal, first, other))


def test_a_relative_threshold_scales_with_the_tokens():
    pipe = tiny_pipeline("sd1")
    retain = ["dog", "house", "tree", "car"]
    encoded = models.load(pipe).encode_prompt(retain)
    r = torch.stack([e[t.eos - 1] for e, t in zip(encoded.embeds, encoded.tokens, strict=True)])
    r = r.detach().double()
    scale = float(r.square().sum(1).mean()) / 28**2
    relative = speed(pipe, "cat", retain=retain, threshold=2.0, **PLAIN)
    absolute = speed(pipe, "cat", retain=retain, threshold=2.0 * scale, threshold_relative=False, **PLAIN)
    for a, b in zip(factors(relative), factors(absolute), strict=True):
        torch.testing.assert_close(a, b)


def test_presets_are_the_published_values_unless_others_are_given():
    pipe = tiny_pipeline("sd1")
    found = speed(pipe, ["cat"], preset="celebrities", retain=["dog"], threshold=1.0).settings
    assert found["anchor"] == ["person"]
    assert (found["influence_filter"], found["threshold"], found["retain_scale"]) == (False, 1.0, 0.05)
    found = speed(pipe, ["cat"], preset="nudity", threshold=10.0).settings
    assert (found["tokens"], found["retain_scale"], found["lamb2"], found["anchor"]) == (
        "all",
        0.7,
        0.5,
        [""],
    )
    assert speed(pipe, "cat", concept_type="style", retain="dog").settings["anchor"] == ["art"]


def test_bad_arguments_are_refused():
    pipe = tiny_pipeline("sd1")
    for match, arguments in {
        "concepts: got 0": {"concepts": []},
        "concepts: got 'cat' and 'Cat'": {"concepts": ["cat", "Cat"]},
        "concepts: 'word word": {"concepts": "word " * 99, "anchor": "x"},
        "anchor: got 'CAT'": {"anchor": "CAT"},
        "anchor: got 2": {"anchor": ["a", "b"]},
        "retain: got the concept": {"retain": ["dog", "cat "]},
        "preset: got 'few'": {"preset": "few"},
        "concept_type: got 'x'": {"concept_type": "x"},
        "tokens: got 'x'": {"tokens": "x"},
        "parameters: got 'q'": {"parameters": "q"},
        "augmentations: got -1": {"augmentations": -1},
        "threshold: got 0": {"threshold": 0.0},
        "threshold: got 1e-30": {"threshold": 1e-30, "tokens": "all", "retain": [f"a {i}" for i in range(9)]},
        "retain_scale: got 0": {"retain_scale": 0.0},
        "lamb2: got -1": {"lamb2": -1.0},
    }.items():
        with pytest.raises(ValueError, match=match) as error:
            speed(pipe, **({"concepts": "cat"} | arguments))
        assert "\n" not in str(error.value)
    with pytest.raises(TypeError, match="retain: got a int"):
        speed(pipe, "cat", retain=[1])
    with pytest.warns(ErasureWarning, match="retain: 'a cat toy' speaks of 'cat'"):
        speed(pipe, "cat", retain=["a cat toy"])
    for family in ("sd3", "flux"):
        with pytest.raises(UnsupportedModelError):
            speed(tiny_pipeline(family), "cat")
    next(iter(models.load(pipe).cross_attention.values())).to_v.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        speed(pipe, "cat")


def test_on_trained_weights_the_concept_goes_and_the_others_stay():
    pipe = testbed.load()
    pipe.set_progress_bar_config(disable=True)
    reader = testbed.load_reader()
    colours, places = list(world.COLOURS), list(world.PLACES)

    def captions(thing):
        return [f"a {colour} {thing} at the {places[i % 6]}" for i, colour in enumerate(colours)]

    edit = speed(
        pipe,
        captions("ball"),
        anchor=captions("box"),
        retain=[thing for thing in world.OBJECTS if thing != "ball"],
        tokens="all",
        threshold=1.0,
        retain_scale=0.05,
    )
    prompts = captions("ball")[:4] + [captions(thing)[4] for thing in ("star", "fish", "ring", "tent")]
    with edit.hook(pipe):
        pictures = pipe(
            prompts,
            num_inference_steps=12,
            guidance_scale=5,
            generator=[torch.Generator().manual_seed(seed) for seed in range(8)],
            output_type="pt",
        ).images
    seen = [scene.object for scene in reader.read(pictures)]
    assert seen[:4].count("ball") <= 1
    kept = sum(a == b for a, b in zip(seen[4:], ("star", "fish", "ring", "tent"), strict=True))
    assert kept >= 3
