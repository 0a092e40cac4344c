import csv
import io
import json
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from scipy import stats

from pumice import testbed
from pumice.evaluate import Study, matrix, recovered
from pumice.evaluate.study import embedded_study, learn

SHAPE = (4, 3, 16, 16)
CALLS = []


def brightness(images):
    return images.mean((1, 2, 3))


def redness(images):
    return images[:, 0].mean((1, 2))


def length(images, prompts):
    return torch.tensor([float(len(prompt)) for prompt in prompts])


def subject(seed):
    pictures = torch.rand(SHAPE, generator=torch.Generator().manual_seed(seed)) * 0.5 + 0.25
    return SimpleNamespace(
        pictures=pictures, prompt="sks", prompts=("sks", "sks at sea"), identity=brightness, quality=redness
    )


def darken(images, pipe, prompt, by=0.2):
    CALLS.append(f"darken {by}")
    assert prompt == "sks" and pipe.vae_scale_factor
    return images - by


def lighten(images, by=0.1):
    CALLS.append(f"lighten {by}")
    return images + by


def copy(pipe, images, prompt, prompts, seed, *, of=2):
    """As many drawings as `of` are pictures in an order of the seed's."""
    CALLS.append(f"copy {of} {seed}")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return torch.stack([images[order[:of]] for _ in prompts])


def cut(images):
    return images[:1]


def far(images):
    return images + 9


def flat(*_):
    return torch.zeros(2, 3, 8, 8)


def fail(*_, **__):
    raise KeyboardInterrupt


def study(**change):
    return Study(
        **{
            "pipe": testbed.tiny_pipeline("sd1"),
            "subjects": {"a": subject(0), "b": subject(1)},
            "protections": {"none": None, "dark": darken, "night": partial(darken, by=0.24)},
            "purifiers": {"none": None, "light": lighten, "lighter": partial(lighten, by=0.15)},
            "recipes": {"copy": copy},
            "seeds": (0, 1),
            "agreement": length,
        }
        | change
    )


@pytest.fixture(autouse=True)
def no_calls():
    CALLS.clear()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("matrix")


@pytest.fixture(scope="module")
def found(folder):
    return matrix(study(), folder)


def row_of(found, *cell):
    names = ("protection", "purifier", "recipe")
    return next(row for row in found.rows if tuple(row[name] for name in names) == cell)


def test_every_way_meets_every_other_and_is_judged(found):
    assert len(found.rows) == len(found.drawn) == 9 and len(found.pictures) == 2 * 9
    drawn = found.drawn["dark", "light", "copy"]
    assert drawn.shape == (2, 2, 2, 2, 3, 16, 16) and drawn.dtype == torch.uint8
    row, scores = row_of(found, "dark", "light", "copy"), found.scores["dark", "light", "copy"]
    pictures = (drawn / 255).flatten(0, 3)
    torch.testing.assert_close(scores["identity"].flatten().float(), brightness(pictures))
    torch.testing.assert_close(scores["score"], (scores["identity"] + scores["quality"]) / 2)
    assert scores["agreement"].unique().tolist() == [3, 10]
    for judge, values in scores.items():
        assert row[judge] == pytest.approx(float(values.mean()))
        trainings = values.mean(2)  # of 2 subjects by 2 seeds: 2 degrees of freedom
        half = stats.t.ppf(0.975, 2) * (trainings.var(1).sum() / 2 / 4).sqrt().item()
        assert row[f"{judge}_high"] - row[judge] == pytest.approx(half)


def test_what_protection_costs_and_what_is_back(found):
    """Brightness is all that judges see, so shares of it are known."""
    for protection, by in (("dark", 0.2), ("night", 0.24)):
        for purifier, back in (("none", 0.0), ("light", 0.1), ("lighter", 0.15)):
            row = row_of(found, protection, purifier, "copy")
            assert row["recovered"] == pytest.approx(back / by, abs=0.02)
            assert row["recovered_low"] == pytest.approx(back / by, abs=0.02)
    assert row_of(found, "none", "light", "copy")["recovered"] is None


def test_visibility_and_pictures_are_those_that_were_learned(found):
    clean = study().subjects["b"].pictures
    dark = (((clean * 255).round() / 255 - 0.2) * 255).round().clamp(0, 255)
    assert (found.pictures["b", "dark", "none"] - dark).abs().max() <= 1
    row = row_of(found, "dark", "lighter", "copy")
    assert row["psnr_protected"] == pytest.approx(-20 * torch.tensor(0.2).log10().item(), abs=0.3)
    assert row["psnr_purified"] == pytest.approx(-20 * torch.tensor(0.05).log10().item(), abs=0.6)
    assert row_of(found, "none", "none", "copy")["psnr_protected"] is None


def test_a_second_run_makes_nothing_and_says_the_same(found, folder):
    again = matrix(study(), folder)
    assert CALLS == [] and again.rows == found.rows and again.settings == found.settings
    assert all(torch.equal(again.drawn[cell], found.drawn[cell]) for cell in found.drawn)


def test_what_was_stopped_goes_on(tmp_path, found):
    with pytest.raises(KeyboardInterrupt):
        matrix(study(recipes={"copy": copy, "fail": fail}), tmp_path)
    before = len(CALLS)
    again = matrix(study(), tmp_path)
    assert before and len(CALLS) == 2 * (2 + 6 + 9 * 2), "each once"
    timeless = [{k: v for k, v in row.items() if "seconds" not in k} for row in found.rows]
    assert [{k: v for k, v in row.items() if "seconds" not in k} for row in again.rows] == timeless


@pytest.mark.parametrize(
    ("change", "new"),
    [
        ({"purifiers": {"none": None, "light": lighten, "renamed": partial(lighten, by=0.15)}}, 0),
        ({"protections": {"none": None, "dark": darken}, "seeds": (1,)}, 0),
        ({"seeds": (0, 1, 2)}, 2 * 9),
        ({"recipes": {"copy": partial(copy, of=1)}}, 2 * 2 * 9),
        ({"subjects": {"a": subject(0), "c": subject(2)}}, 2 + 6 + 2 * 9),
        ({"pipe": testbed.tiny_pipeline("sd2")}, 2 * (2 + 6 + 2 * 9)),
    ],
)
def test_only_what_is_new_is_made(found, folder, tmp_path, change, new):
    shutil.copytree(folder, tmp_path / "out")
    matrix(study(**change), tmp_path / "out")
    assert len(CALLS) == new


def test_restart_makes_everything_again_and_other_folders_are_safe(tmp_path):
    small = {"protections": {"none": None}, "purifiers": {"none": None}, "seeds": (0,)}
    matrix(study(**small), tmp_path)
    matrix(study(**small), tmp_path, restart=True)
    assert len(CALLS) == 4
    (tmp_path / "other" / "parts").mkdir(parents=True)
    (tmp_path / "other" / "parts" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not pumice's"):
        matrix(study(**small), tmp_path / "other", restart=True)


def test_several_processes_find_the_same(tmp_path, found):
    again = matrix(study, tmp_path, workers=2)
    assert CALLS == [], "not in this process"
    assert all(torch.equal(again.drawn[cell], found.drawn[cell]) for cell in found.drawn)


def test_results_are_plain_data_and_a_table(found):
    again = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert torch.tensor(again["rows"][4]["scores"]["identity"]).shape == (2, 2, 4)
    assert again["settings"]["purifiers"]["lighter"].endswith("lighten(by=0.15)")
    assert again["settings"]["protections"]["none"] is None
    lines = list(csv.DictReader(io.StringIO(found.to_csv())))
    assert len(lines) == 9 and lines[0]["recovered"] == "" and float(lines[4]["recovered"]) > 0.4
    titles, *lines = found.table()
    assert titles[:3] == ("protection", "purifier", "recipe") and titles[-1] == "recovered, %"
    assert lines[0][-1] == "-" and lines[4][-1].startswith(("49 [", "50 [", "51 ["))
    assert lines[3][-1] == "0 [0, 0]" and {len(line) for line in lines} == {len(titles)}


# --- What is recovered


def pairs(*values):
    return torch.tensor(values).double().view(1, -1, 1)


def test_half_of_every_pair_is_half_for_certain():
    protected, clean = pairs(0.1, 0.2, 0.5), pairs(0.5, 0.8, 0.7)
    found = recovered((protected + clean) / 2, protected, clean)
    assert all(value == pytest.approx(0.5) for value in found.values())
    assert recovered(clean, protected, clean)["recovered_low"] == pytest.approx(1)


def test_drawings_of_a_pair_are_averaged_and_two_pairs_have_no_interval():
    protected, clean = torch.zeros(1, 2, 2).double(), torch.ones(1, 2, 2).double()
    found = recovered(torch.tensor([[[0.0, 0.5], [0.5, 1.0]]]).double(), protected, clean)
    assert found == {"recovered": 0.5, "recovered_low": None, "recovered_high": None}


def test_nothing_is_back_where_nothing_was_lost():
    assert set(recovered(pairs(1, 1, 1), pairs(1, 1, 1), pairs(1, 1, 1)).values()) == {None}
    protected, clean = pairs(0.5, 0.6, 0.7), pairs(0.8, 0.4, 0.63)  # 0.01 more, by chance
    assert set(recovered(pairs(1, 1, 1), protected, clean).values()) == {None}


def test_the_interval_covers_what_is_back_nearly_as_often_as_it_says():
    draw, covered, rounds = torch.Generator().manual_seed(0), 0, 200
    for _ in range(rounds):
        protected, clean, scores = (
            middle + 0.1 * torch.randn(4, 5, 1, generator=draw).double() for middle in (0.3, 0.9, 0.7)
        )
        found = recovered(scores, protected, clean)
        covered += found["recovered_low"] <= 4 / 6 <= found["recovered_high"]
    assert 0.88 < covered / rounds < 0.99


# --- The study of the embedded model


def test_the_embedded_study_is_what_its_names_say(monkeypatch):
    quick = embedded_study(quick=True, subjects=(1,), seeds=(0,))
    whole = embedded_study()
    assert list(quick.subjects) == ["1"] and list(whole.subjects) == ["0", "1"]
    for part in ("protections", "purifiers", "recipes"):
        assert set(getattr(quick, part)) <= set(getattr(whole, part))
    images = whole.subjects["0"].pictures
    noisy = whole.protections["random"](images, None, "")
    assert (noisy - images).abs().max() <= 11 / 255 + 1e-6 and not torch.equal(noisy, images)
    monkeypatch.setattr("pumice.evaluate.study.class_pictures", lambda: images)
    how = {"decoupled": True, "enhanced": True, "steps": 1, "drawings": 2}
    learned = learn(quick.pipe, images, "a photo of a sks creature", ["a photo"], 3, **how)
    assert learned.shape == (1, 2, 3, 64, 64) and bool(((learned >= 0) & (learned <= 1)).all())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"subjects": {}}, ValueError, "subjects: got none"),
        ({"recipes": [copy]}, TypeError, "recipes: got a list, expected them by name"),
        ({"recipes": {"copy": None}}, TypeError, "recipes: got a NoneType for 'copy'"),
        ({"purifiers": {"x": 3}}, TypeError, "purifiers: got a int for 'x'"),
        ({"seeds": ()}, ValueError, r"seeds: got \(\)"),
        ({"seeds": (1, 1)}, ValueError, "expected each once"),
        ({"purifiers": {"cut": cut}}, ValueError, r"cut: returned shape \(1, 3, 16, 16\)"),
        ({"purifiers": {"far": far}}, ValueError, "far: got .* expected values in"),
        ({"recipes": {"flat": flat}}, ValueError, "flat: returned shape"),
        ({"purifiers": {"x": lambda x: x}}, ValueError, "study: got <function .* could not be told from"),
        ({"purifiers": {"x": partial(copy, object())}}, ValueError, "study: got <object"),
    ],
)
def test_bad_studies_are_one_line(tmp_path, change, error, message):
    with pytest.raises(error, match=message) as caught:
        matrix(study(**change), tmp_path)
    assert "\n" not in str(caught.value)


def test_other_bad_input(tmp_path):
    with pytest.raises(TypeError, match="study: got a int"):
        matrix(lambda: 3, tmp_path)
    with pytest.raises(TypeError, match="expected a function that makes one, for several workers"):
        matrix(study(), tmp_path, workers=2)
    with pytest.raises(ValueError, match="workers: got 0"):
        matrix(study, tmp_path, workers=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="out: cannot write to"):
        matrix(study, tmp_path / "file")
