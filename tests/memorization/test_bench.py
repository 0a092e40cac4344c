import csv
import io
import json
import sys
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from pumice import testbed
from pumice.memorization.bench import bench
from pumice.testbed import tiny_pipeline, world

GALLERY = sys.modules["pumice.memorization.gallery"]
PROMPTS = ["a cat", "a dog", "a red car"]
SETTINGS = {"seeds": 2, "num_inference_steps": 2, "red_team_steps": 0}
KEYS = (
    "name replication replication_low replication_high similarity_mean similarity_p95 agreement quality "
    "red_team red_team_low red_team_high seconds"
).split()


def flat(*values, size=32):
    """Pictures of one grey each."""
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 3, size, size).contiguous()


def closeness(a, b):
    return 1 - (a.mean((1, 2, 3))[:, None] - b.mean((1, 2, 3))[None]).abs()


def drawing(images):
    """A mitigation that draws what a function makes of the prompts and seeds; it needs no denoiser."""

    def draw(prompt=None, *, generator, **inputs):
        prompts = prompt or ["embeddings"] * len(generator)
        seeds = [one.initial_seed() for one in generator]
        return SimpleNamespace(images=images(prompts, seeds))

    return lambda pipe: nullcontext(draw)


def grey(value):
    return drawing(lambda prompts, seeds: flat(*[value] * len(prompts)))


def run(pipe=None, prompts=PROMPTS, pictures=None, mitigations=None, similarity=closeness, **settings):
    return bench(
        pipe or tiny_pipeline("sd1"),
        prompts,
        flat(*[0.0] * len(prompts)) if pictures is None else pictures,
        mitigations={} if mitigations is None else mitigations,
        similarity=similarity,
        **SETTINGS | settings,
    )


def without_seconds(found):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in found.rows]


def row_of(found, name):
    return next(row for row in found.rows if row["name"] == name)


# --- What the numbers are


def test_a_prompt_is_replicated_if_any_picture_replays_any_reference():
    values = {"a cat": (0.2, 0.4), "a dog": (0.6, 1.0), "a red car": (0.0, 1.0)}
    pictures = [flat(0.4, 1.0), flat(0.2)[0], flat(0.4)]  # (R, 3, H, W), (3, H, W), (1, 3, H, W)
    spread = drawing(
        lambda prompts, seeds: flat(*[values[p][s] for p, s in zip(prompts, seeds, strict=True)])
    )
    found = run(pictures=pictures, mitigations={"spread": spread}, replayed=0.9)
    expected = torch.tensor([[0.8, 1.0], [0.6, 0.2], [0.6, 0.4]])
    torch.testing.assert_close(found.similarities["spread"], expected, rtol=0, atol=0.003)
    row = row_of(found, "spread")
    assert row["replication"] == pytest.approx(1 / 3)
    # Clopper-Pearson of 1 in 3
    assert (row["replication_low"], row["replication_high"]) == pytest.approx((0.0084, 0.9057), abs=1e-4)
    assert row["similarity_mean"] == pytest.approx(0.6, abs=0.003)
    assert row["similarity_p95"] == pytest.approx(0.8 + 0.75 * 0.2, abs=0.003)
    assert list(row) == KEYS and [row["name"] for row in found.rows] == ["none", "spread"]
    assert all(row[key] is None for key in ("agreement", "quality", "red_team", "red_team_low"))


def test_agreement_is_with_the_original_prompts_and_quality_of_the_fresh_ones():
    seen = {"agreement": [], "quality": []}

    def agreement(images, prompts):
        seen["agreement"] += prompts
        return images.mean((1, 2, 3))

    def quality(images, prompts):
        seen["quality"].append((len(images), tuple(prompts)))
        return 100 * images.mean((1, 2, 3)) if len(seen["quality"]) == 2 else 7.5

    @contextmanager
    def shouting(pipe):
        with grey(0.2)(pipe) as draw:
            yield lambda prompt, **inputs: draw([text.upper() for text in prompt], **inputs)

    found = run(
        mitigations={"shouting": shouting},
        agreement=agreement,
        fresh_prompts=["the sea", "a tree"],
        fresh_quality=quality,
    )
    assert set(seen["agreement"]) == set(PROMPTS) and len(seen["agreement"]) == 2 * 3 * 2
    assert seen["quality"] == [(2, ("the sea", "a tree"))] * 2
    assert [row["quality"] for row in found.rows] == pytest.approx([7.5, 20])
    assert row_of(found, "shouting")["agreement"] == pytest.approx(0.2)


def test_the_pictures_are_those_of_the_pipeline():
    pipe = tiny_pipeline("sd1")
    seen = []

    def similarity(images, references):
        seen.append(images)
        return closeness(images, references)

    run(pipe, similarity=similarity, batch_size=4, guidance_scale=3.0)
    assert len(seen) == len(PROMPTS)
    for prompt, images in zip(PROMPTS, seen, strict=True):
        expected = pipe(
            [prompt] * 2,
            generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)],
            num_inference_steps=2,
            guidance_scale=3.0,
            output_type="pt",
        ).images
        torch.testing.assert_close(images, expected, rtol=0, atol=1.1 / 255 / 2 + 1e-4)
        assert torch.equal(images, (images * 255).round() / 255), "as in an 8-bit file"


def test_a_mitigation_may_change_the_pipeline_itself():
    pipe = tiny_pipeline("sd1")

    @contextmanager
    def muted(pipe):
        saved = pipe.unet.conv_out.weight.data
        pipe.unet.conv_out.weight.data = torch.zeros_like(saved)
        try:
            yield
        finally:
            pipe.unet.conv_out.weight.data = saved

    found = run(pipe, mitigations={"muted": muted})
    assert (found.similarities["muted"] - found.similarities["none"]).abs().max() > 1e-3
    torch.testing.assert_close(found.similarities["none"], run(pipe).similarities["none"])


# --- The red team


@pytest.fixture
def attacks(monkeypatch):
    """The arguments of every attack, and embeddings that are as good as any."""
    calls = []

    def recorded(target, images, prompts, *, steps, progress):
        pipe = getattr(target, "pipe", target)
        calls.append(SimpleNamespace(pipe=pipe, images=images, prompts=prompts, steps=steps))
        calls[-1].muted = not pipe.unet.conv_out.weight.any()
        return real(target, images, prompts, steps=1, batch_size=1)

    real = GALLERY.dori
    monkeypatch.setattr(GALLERY, "dori", recorded)
    return calls


def test_the_red_team_works_against_the_weights_that_the_mitigation_leaves(attacks):
    pipe, other = tiny_pipeline("sd1"), tiny_pipeline("sd1", seed=1)

    @contextmanager
    def muted(pipe):
        saved = pipe.unet.conv_out.weight.data
        pipe.unet.conv_out.weight.data = torch.zeros_like(saved)
        yield
        pipe.unet.conv_out.weight.data = saved

    mitigations = {
        "muted": muted,
        "another model": lambda pipe: nullcontext(other),
        "prompts alone": lambda pipe: nullcontext(partial(pipe)),
    }
    found = run(pipe, mitigations=mitigations, red_team_steps=7, batch_size=2)
    assert [call.pipe is pipe for call in attacks] == [True] * 4 + [False] * 2 + [True] * 2
    assert [call.muted for call in attacks] == [False] * 2 + [True] * 2 + [False] * 4
    assert [call.prompts for call in attacks[:2]] == [PROMPTS[:2], PROMPTS[2:]]
    assert {call.steps for call in attacks} == {7}
    assert set(found.red_team_similarities) == {"none", *mitigations}
    assert all(0 <= row["red_team_low"] <= row["red_team"] <= row["red_team_high"] for row in found.rows)
    torch.testing.assert_close(
        found.red_team_similarities["prompts alone"], found.red_team_similarities["none"]
    )


def test_the_mitigation_draws_the_red_teams_pictures_too(attacks):
    hiding = drawing(lambda prompts, seeds: flat(*[0.0 if p == "embeddings" else 1.0 for p in prompts]))
    row = row_of(run(mitigations={"hiding": hiding}, red_team_steps=1), "hiding")
    assert (row["replication"], row["red_team"]) == (0, 1)


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_every_family_draws_from_its_embeddings(family):
    found = run(tiny_pipeline(family), prompts=["a cat"], red_team_steps=1, seeds=1)
    assert found.red_team_similarities["none"].shape == (1, 1)


def test_the_red_team_sees_the_middle_of_the_first_reference_at_the_models_size(attacks):
    wide = torch.zeros(3, 64, 192)
    wide[:, :, 64:128] = 1  # all that is left of it is white
    run(prompts=["a cat"], pictures=[torch.stack([wide, wide * 0])], red_team_steps=1)
    assert attacks[0].images.shape == (1, 3, 32, 32)
    assert (attacks[0].images[..., 1:-1] - 1).abs().max() < 1e-3


# --- Files


def test_files_are_kept_by_mitigation_and_prompt(tmp_path, attacks):
    values = {"a cat": (0.9, 0.1), "a dog": (0.2, 0.8), "a red car": (0.5, 0.4)}
    spread = drawing(
        lambda prompts, seeds: flat(
            *[values.get(p, (0.3, 0.3))[s] for p, s in zip(prompts, seeds, strict=True)]
        )
    )
    found = run(mitigations={"spread": spread}, out=tmp_path, red_team_steps=1, pictures=flat(0.0, 0.2, 0.4))

    def level(file):
        return np.array(Image.open(file)).mean() / 255

    assert [level(file) for file in found.reference_pictures] == pytest.approx([0, 0.2, 0.4], abs=0.003)
    assert [level(file) for file in found.pictures["spread"]] == pytest.approx([0.1, 0.2, 0.4], abs=0.003)
    assert [level(file) for file in found.red_team_pictures["spread"]] == pytest.approx([0.3] * 3, abs=0.003)
    assert {len(files) for files in found.pictures.values()} == {3} and list(found.pictures) == [
        "none",
        "spread",
    ]
    assert all(tmp_path / "parts" == file.parent for files in found.pictures.values() for file in files)


def test_without_a_folder_nothing_is_kept():
    found = run()
    assert found.reference_pictures == () and found.pictures == found.red_team_pictures == {}
    assert found.similarities["none"].shape == (3, 2)


def test_names_stay_inside_the_folder(tmp_path):
    name = "../../<b>évil</b> & co:*?"
    found = run(mitigations={name: grey(0.5)}, out=tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert all(file.parent == tmp_path / "out" / "parts" and file.exists() for file in found.pictures[name])


class Counting:
    """A mitigation that counts the pictures it draws, and may be interrupted."""

    def __init__(self, stop_after=None):
        self.drawn, self.stop_after = 0, stop_after

    def __call__(self, pipe):
        def draw(*, generator, **inputs):
            if self.stop_after is not None and self.drawn >= self.stop_after:
                raise KeyboardInterrupt
            self.drawn += len(generator)
            return pipe(generator=generator, **inputs)

        return nullcontext(draw)


def test_what_is_drawn_is_not_drawn_again(tmp_path):
    pipe, first, again, more = tiny_pipeline("sd1"), Counting(), Counting(), Counting()
    one = run(pipe, mitigations={"a": first}, out=tmp_path)
    other = run(pipe, mitigations={"b": more, "a": again}, out=tmp_path, replayed=0.99)
    assert (first.drawn, again.drawn, more.drawn) == (6, 0, 6)
    assert torch.equal(one.similarities["a"], other.similarities["a"])
    assert row_of(one, "a")["seconds"] == row_of(other, "a")["seconds"] > 0
    run(pipe, mitigations={"a": again}, out=tmp_path, restart=True)
    assert again.drawn == 6


def test_another_run_does_not_touch_the_folder(tmp_path):
    pipe = tiny_pipeline("sd1")
    run(pipe, out=tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    for change in (
        {"pipe": tiny_pipeline("sd1", seed=1)},
        {"prompts": PROMPTS[:2]},
        {"pictures": flat(0.0, 0.0, 0.1)},
        {"seeds": [1, 2]},
        {"guidance_scale": 3.0},
        {"red_team_steps": 1},
        {"fresh_prompts": ["a cat"], "fresh_quality": lambda images, prompts: 0.0},
    ):
        with pytest.raises(ValueError, match=r"^out: .* holds results of another model, list or settings"):
            run(**{"pipe": pipe, "out": tmp_path} | change)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_out_of_memory_halves_the_pictures_of_a_call():
    sizes = []

    def small(pipe):
        def draw(*, generator, **inputs):
            if len(generator) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
            sizes.append(len(generator))
            return pipe(generator=generator, **inputs)

        return nullcontext(draw)

    pipe = tiny_pipeline("sd1")
    found = run(pipe, mitigations={"small": small}, batch_size=5)
    assert sizes == [2, 2, 2]
    torch.testing.assert_close(found.similarities["small"], found.similarities["none"], rtol=0, atol=1e-4)


def test_the_red_team_forgets_no_prompt_when_memory_runs_out(attacks):
    def small(pipe):
        def draw(*, generator, prompt=None, **inputs):
            if prompt is None and len(generator) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
            return SimpleNamespace(images=flat(*[0.5] * len(generator)))

        return nullcontext(draw)

    found = run(prompts=[*PROMPTS, "a tree"], mitigations={"small": small}, red_team_steps=1, batch_size=2)
    assert found.red_team_similarities["small"].shape == (4, 2)
    assert [prompt for call in attacks[2:] for prompt in call.prompts] == [*PROMPTS, "a tree"]


def test_results_are_plain_data(tmp_path):
    found = run(mitigations={'with, "quotes"': grey(0.5)}, out=tmp_path)
    data = json.loads(json.dumps(found.to_dict()))
    assert data["prompts"] == PROMPTS and data["rows"] == [dict(row) for row in found.rows]
    assert torch.equal(torch.tensor(data["similarities"]["none"]), found.similarities["none"])
    assert data["settings"]["seeds"] == [0, 1] and data["settings"]["replayed"] == 0.5
    assert data["reference_pictures"] == [str(file) for file in found.reference_pictures]
    read = list(csv.DictReader(io.StringIO(found.to_csv())))
    assert list(read[0]) == KEYS
    assert [row["name"] for row in read] == ["none", 'with, "quotes"']
    assert (
        float(read[1]["similarity_mean"]) == found.rows[1]["similarity_mean"] and read[1]["agreement"] == ""
    )
    header, *lines = found.table().split("\n")
    assert header.split() == "mitigation replication similarity p95 agreement quality red team s".split()
    assert len(lines) == 2 and {len(line) for line in lines} == {len(header)}
    assert "0% [0%, 71%]" in run(mitigations={"white": grey(1.0)}).table().split("\n")[2]


def test_leaves_the_pipeline_as_it_was():
    pipe = tiny_pipeline("sd1")
    pipe.unet.train()
    before = [(p.requires_grad, p.clone()) for p in pipe.unet.parameters()]
    with pytest.raises(KeyboardInterrupt):
        run(pipe, mitigations={"stopped": Counting(stop_after=0)}, red_team_steps=1)
    assert pipe.unet.training and not pipe.vae.training
    for parameter, (flag, value) in zip(pipe.unet.parameters(), before, strict=True):
        assert parameter.requires_grad == flag and parameter.grad is None and torch.equal(parameter, value)


# --- On the trained model


def test_interrupted_and_resumed_it_finds_the_same(tmp_path):
    """Memorized captions, a mitigation that only looks at captions, and embeddings that go round it."""
    pipe = testbed.load()
    items = [world.memorized(i) for i in (0, 3, 6)]
    pictures = torch.from_numpy(np.stack([item.picture for item in items]))

    def deaf(counting):
        def mitigation(pipe):
            with counting(pipe) as draw:
                return nullcontext(
                    lambda prompt=None, **inputs: draw(prompt=prompt and [""] * len(prompt), **inputs)
                )

        return mitigation

    def whole(mitigation, out, **settings):
        return bench(
            pipe,
            [item.caption for item in items],
            pictures,
            mitigations={"deaf": mitigation},
            similarity=testbed.similarity,
            replayed=testbed.REPLAYED,
            agreement=lambda images, prompts: images.mean((1, 2, 3)),
            seeds=1,
            num_inference_steps=5,
            guidance_scale=5.0,
            red_team_steps=1,
            batch_size=2,
            out=out,
            **settings,
        )

    expected = whole(deaf(Counting()), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        # after 2 + 1 pictures of prompts, amid the red team's
        whole(deaf(Counting(stop_after=4)), tmp_path / "cut")
    rest = Counting()
    found = whole(deaf(rest), tmp_path / "cut")
    assert rest.drawn == 1
    assert without_seconds(found) == without_seconds(expected)
    assert row_of(found, "none")["replication"] == 1 and row_of(found, "deaf")["replication"] == 0
    assert row_of(found, "deaf")["red_team"] == 1, "what it hides is still there"


BAD = {
    "no prompts": ({"prompts": [], "pictures": flat(0.0)}, ValueError, "prompts: got an empty list"),
    "too few pictures": ({"pictures": flat(0.0, 0.0)}, ValueError, "pictures: got 2, expected 3, as prompts"),
    "bytes": ({"pictures": flat(0.0, 0.0, 0.0).byte()}, TypeError, "pictures: got torch.uint8"),
    "paths": ({"pictures": ["a.png"] * 3}, TypeError, "pictures: got str"),
    "flat pictures": ({"pictures": torch.zeros(3, 8, 8)}, ValueError, r"pictures: got shape \(8, 8\)"),
    "no reference": ({"pictures": [torch.zeros(0, 3, 8, 8)] * 3}, ValueError, r"pictures: got shape \(0, 3"),
    "values up to 255": (
        {"pictures": flat(0.0, 255.0, 0.0)},
        ValueError,
        "pictures: got values out of range",
    ),
    "NaN": (
        {"pictures": flat(0.0, float("nan"), 0.0)},
        ValueError,
        "pictures: got values out of range or NaN",
    ),
    "not callable": ({"mitigations": {"a": 3}}, TypeError, "mitigations: got a int under 'a'"),
    "no context": ({"mitigations": {"a": lambda pipe: pipe}}, TypeError, "mitigations: 'a' gave a Stable"),
    "none twice": ({"mitigations": {"none": nullcontext}}, ValueError, "mitigations: got the name 'none'"),
    "an empty name": ({"mitigations": {"": nullcontext}}, ValueError, "mitigations: got the name ''"),
    "a long name": ({"mitigations": {"é" * 99: nullcontext}}, ValueError, "mitigations: got the name"),
    "too few drawn": (
        {"mitigations": {"a": drawing(lambda prompts, seeds: flat(0.0))}},
        ValueError,
        r"mitigations: 'a' drew \(1, 3, 32, 32\) for 6 prompts",
    ),
    "NaN drawn": ({"mitigations": {"a": grey(float("nan"))}}, ValueError, "mitigations: 'a' drew pictures"),
    "another shape of similarity": (
        {"similarity": lambda a, b: torch.zeros(len(a))},
        ValueError,
        r"similarity: returned shape \(2,\)",
    ),
    "a similarity of NaN": (
        {"similarity": lambda a, b: closeness(a, b) * float("nan")},
        ValueError,
        "similarity",
    ),
    "a level of NaN": ({"replayed": float("nan")}, ValueError, "replayed: got nan"),
    "fresh prompts alone": (
        {"fresh_prompts": ["a"]},
        ValueError,
        "fresh_prompts, fresh_quality: got fresh_pr",
    ),
    "quality alone": (
        {"fresh_quality": len},
        ValueError,
        "fresh_prompts, fresh_quality: got fresh_quality al",
    ),
    "no fresh prompt": (
        {"fresh_prompts": [], "fresh_quality": len},
        ValueError,
        "fresh_prompts: got an empty",
    ),
    "no seeds": ({"seeds": 0}, ValueError, "seeds: got 0"),
    "no steps": ({"num_inference_steps": 0}, ValueError, "num_inference_steps: got 0"),
    "a guidance of NaN": ({"guidance_scale": float("nan")}, ValueError, "guidance_scale: got nan"),
    "negative red team": ({"red_team_steps": -1}, ValueError, "red_team_steps: got -1"),
    "batch of none": ({"batch_size": 0}, ValueError, "batch_size: got 0"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_that_names_the_argument(change, error, message):
    with pytest.raises(error, match=f"^{message}") as caught:
        run(**change)
    assert "\n" not in str(caught.value)


def test_a_file_for_a_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"^out: cannot write to '.*file'"):
        run(out=tmp_path / "file")
