"""What is counted is what was drawn: by hand, for any batch size, under any kind of edit."""

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline

from pumice import erase, models, testbed
from pumice.erase import ErasureWarning
from pumice.evaluate import erasure
from pumice.memorization.ms_ssim import ms_ssim
from pumice.memorization.statistics import clopper_pearson
from pumice.models import Edit, Zeroed
from pumice.testbed import world

DRAW = {"num_inference_steps": 2, "guidance_scale": 5.0}
ERASED = [("a red ball at the beach", "ball"), ("a blue ball at the snow", "ball")]
PRESERVED = [("a green star at the cave", "star"), ("a pink fish at the ocean", "fish"), ("a box", "box")]


@pytest.fixture(scope="module")
def pipe():
    return testbed.load()


@pytest.fixture(scope="module")
def uce(pipe):
    return erase.uce(pipe, "ball", tokens="all", guide="box")


@pytest.fixture(scope="module")
def other(pipe):
    return erase.uce(pipe, "star", tokens="all", guide="heart")


@pytest.fixture(scope="module")
def zeroed(pipe):
    model = models.load(pipe)
    layer = next(iter(model.cross_attention.values()))
    mask = torch.rand(layer.to_v.weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    return Edit.made(model, {f"{layer.name}.to_v.weight": Zeroed.pack(mask)}, method="test", targets=())


@pytest.fixture(scope="module")
def objects():
    return testbed.classifier("object")


@pytest.fixture(scope="module")
def judged(pipe, uce, zeroed, objects):
    edits = {"uce": uce, "zeroed": zeroed}
    return erasure(pipe, edits, ERASED, PRESERVED, classify=objects, seeds=[3, 8], **DRAW)


def plain(pipe, prompts, seed):
    generator = [torch.Generator().manual_seed(seed) for _ in prompts]
    return pipe(prompts, generator=generator, output_type="pt", **DRAW).images


def levels(a, b):
    """The largest difference of 8-bit pictures."""
    return int((a.int() - b.int()).abs().max())


def test_pictures_are_the_pipelines_own_and_each_edit_is_as_if_applied(pipe, uce, zeroed, judged):
    prompts = [prompt for prompt, _ in ERASED + PRESERVED]
    expected = {"none": plain(pipe, prompts, 3)}
    for name, edit in {"uce": uce, "zeroed": zeroed}.items():
        with edit.on(pipe):
            expected[name] = plain(pipe, prompts, 3)
    assert list(judged.pictures) == ["none", "uce", "zeroed"]
    for name, images in expected.items():
        assert judged.pictures[name].dtype == torch.uint8
        assert levels(judged.pictures[name], (images * 255).round()) <= 1
    assert all(levels(judged.pictures["none"], judged.pictures[name]) > 30 for name in ("uce", "zeroed"))


def test_the_pipeline_is_left_as_it_was(pipe, uce, zeroed, objects):
    before = models.fingerprint(models.load(pipe))
    pipe.unet.train()
    erasure(pipe, {"a": uce, "b": zeroed}, ERASED[:1], [], classify=objects, num_inference_steps=1)
    assert pipe.unet.training and all(p.requires_grad for p in pipe.unet.parameters())
    pipe.unet.eval()
    assert models.fingerprint(models.load(pipe)) == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipe.unet.modules())


@pytest.mark.parametrize("batch_size", [1, 4])
def test_results_do_not_depend_on_the_batch_size_or_on_other_edits(
    pipe, uce, other, judged, objects, batch_size
):
    edits = {"other": other, "uce": uce}
    found = erasure(
        pipe, edits, ERASED, PRESERVED, classify=objects, seeds=[3, 8], batch_size=batch_size, **DRAW
    )
    rows, expected = ({row["name"]: row for row in e.rows} for e in (found, judged))
    for name in ("none", "uce"):
        assert levels(found.pictures[name], judged.pictures[name]) <= 1
        assert found.labels[name] == judged.labels[name]
        for key, value in expected[name].items():
            assert value == (pytest.approx(rows[name][key], abs=1e-3) if value is not None else None)


def test_rates_intervals_and_losses_are_counts(judged):
    wanted = [label for _, label in ERASED + PRESERVED for _ in judged.settings["seeds"]]
    border = 2 * len(ERASED)
    psr = {}
    for row in judged.rows:
        for k in (1, 5):
            found = zip(wanted, judged.labels[row["name"]], strict=True)
            hits = [label in labels[:k] for label, labels in found]
            missed, kept = border - sum(hits[:border]), sum(hits[border:])
            psr.setdefault(k, 100 * kept / 6)
            assert row[f"esr_{k}"] == pytest.approx(100 * missed / 4)
            assert row[f"psr_{k}"] == pytest.approx(100 * kept / 6)
            assert row[f"loss_{k}"] == pytest.approx(psr[k] - 100 * kept / 6)
            for key, count, total in ((f"esr_{k}", missed, 4), (f"psr_{k}", kept, 6)):
                low, high = clopper_pearson(count, total)
                assert (row[f"{key}_low"], row[f"{key}_high"]) == pytest.approx((100 * low, 100 * high))


def test_labels_are_those_of_the_pictures(judged, objects):
    for name, pictures in judged.pictures.items():
        first_seed = judged.labels[name][::2]
        assert first_seed == tuple(tuple(labels[:5]) for labels in objects(pictures / 255))


def test_identical_lists_add_up_to_one_hundred(pipe, uce, objects):
    both = ERASED + PRESERVED
    found = erasure(pipe, {"uce": uce}, both, both, classify=objects, k=(1, 3, 5), **DRAW)
    for row in found.rows:
        for k in (1, 3, 5):
            assert row[f"esr_{k}"] + row[f"psr_{k}"] == pytest.approx(100)


def test_an_edit_erases_what_it_names_and_keeps_the_rest(pipe, uce, objects):
    def scenes(objects):
        return [(world.full_caption(world.Scene(o, "red", p)), o) for o in objects for p in ("snow", "ocean")]

    found = erasure(
        pipe,
        {"uce": uce},
        scenes(["ball"]),
        scenes(["star", "heart", "fish"]),
        classify=objects,
        num_inference_steps=12,
        guidance_scale=5.0,
    )
    original, edit = found.rows
    assert original["esr_1"] == 0 and edit["esr_1"] == 100
    assert original["psr_1"] == 100 and edit["loss_1"] == 0
    assert edit["distance_erased"] > 3 * edit["distance_preserved"]


def test_labels_are_compared_in_lower_case_and_a_large_k_is_left_out(pipe, uce):
    def classify(images):
        return [["BALL", "other"]] * len(images)

    found = erasure(pipe, {"uce": uce}, [("a", "Ball")], [("b", "Other")], classify=classify, **DRAW)
    assert [row["esr_1"] for row in found.rows] == [0, 0] and [row["psr_1"] for row in found.rows] == [0, 0]
    assert found.settings["k"] == [1] and "esr_5" not in found.rows[0]
    found = erasure(pipe, {}, [("a", "Ball")], [("b", "Other")], classify=classify, k=2, **DRAW)
    assert found.rows[0]["psr_2"] == 100


def test_a_label_that_no_classifier_knows_is_warned_of(pipe, objects):
    with pytest.warns(ErasureWarning, match="classify never returned 'bal'; if it has other names") as caught:
        erasure(pipe, {}, [("a red ball", "bal")], [], classify=objects, k=1, num_inference_steps=1)
    assert caught[0].filename == __file__


def test_agreement_and_distance_are_means_over_the_right_pictures(pipe, uce):
    def agreement(images, prompts):
        return images.mean((1, 2, 3)) + torch.tensor([float(len(prompt)) for prompt in prompts])

    def classify(images):
        return [["ball", "star", "fish", "box"]] * len(images)

    found = erasure(
        pipe, {"uce": uce}, ERASED, PRESERVED, classify=classify, agreement=agreement, batch_size=4, **DRAW
    )
    before, after = (found.pictures[name] / 255 for name in ("none", "uce"))
    lengths = torch.tensor([float(len(prompt)) for prompt, _ in ERASED + PRESERVED])
    scores = (after.mean((1, 2, 3)) + lengths).double()
    distances = (1 - ms_ssim(after, before)).double()
    row = found.rows[1]
    for side, part in (("erased", slice(2)), ("preserved", slice(2, 5))):
        for key, values in (("agreement", scores[part]), ("distance", distances[part])):
            half = 1.959964 * float(values.std()) / len(values) ** 0.5
            expected = [float(values.mean()), float(values.mean()) - half, float(values.mean()) + half]
            keys = [f"{key}_{side}", f"{key}_{side}_low", f"{key}_{side}_high"]
            assert [row[name] for name in keys] == pytest.approx(expected, abs=1e-6)
    assert found.rows[0]["distance_erased"] is None and found.settings["distance"] == "1 - MS-SSIM"
    own = erasure(
        pipe,
        {"uce": uce},
        ERASED,
        [],
        classify=classify,
        distance=lambda a, b: (a - b).abs().amax((1, 2, 3)),
        **DRAW,
    )
    assert own.rows[1]["distance_erased"] == pytest.approx(
        float((after - before).abs().amax((1, 2, 3))[:2].double().mean()), abs=0.005
    )
    assert own.rows[1]["psr_1"] is None and own.rows[1]["loss_1"] is None


def test_fid_is_between_the_preserved_pictures_of_model_and_edit(pipe, uce, zeroed):
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Colours(torch.nn.Module):
        num_features = 2

        def forward(self, images):
            return images.mean((2, 3))[:, :2]

    def classify(images):
        return [["ball"]] * len(images)

    fid = FrechetInceptionDistance(feature=Colours())
    found = erasure(
        pipe,
        {"uce": uce, "zeroed": zeroed},
        [(prompt, "ball") for prompt, _ in ERASED],
        [(prompt, "ball") for prompt, _ in [*PRESERVED, ("a red moon", "")]],
        classify=classify,
        fid=fid,
        batch_size=7,
        **DRAW,
    )
    assert not fid.update_called and found.rows[0]["fid"] is None

    def moments(name):
        features = (found.pictures[name][2:].double() / 255).mean((2, 3))[:, :2].numpy()
        return features.mean(0), np.cov(features.T)

    mean, cov = moments("none")
    for row in found.rows[1:]:
        other_mean, other_cov = moments(row["name"])
        roots = np.sqrt(np.linalg.eigvals(cov @ other_cov).astype(complex)).real.sum()
        expected = ((mean - other_mean) ** 2).sum() + np.trace(cov) + np.trace(other_cov) - 2 * roots
        assert row["fid"] == pytest.approx(expected, rel=1e-3, abs=1e-7)


def test_results_are_plain_data_and_a_table(judged):
    again = json.loads(json.dumps(judged.to_dict()))
    assert again["rows"] == [dict(row) for row in judged.rows] and "pictures" not in again
    assert (again["settings"]["height"], again["settings"]["width"]) == (64, 64)
    titles, *lines = judged.table()
    assert titles[:4] == ("edit", "ESR-1", "PSR-1", "loss-1")
    assert titles[-2:] == ("distance erased", "distance preserved")
    assert [line[0] for line in lines] == ["none", "uce", "zeroed"]
    assert {len(line) for line in lines} == {len(titles)} and lines[0][-1] == "-"


def test_stable_diffusion_xl_and_other_sizes():
    pipe = testbed.tiny_pipeline("sdxl")
    edit = erase.uce(pipe, "ball", pooled=True)
    found = erasure(
        pipe,
        {"uce": edit},
        [("a ball", "x")],
        [("a box", "x")],
        classify=lambda images: [["x"]] * len(images),
        height=48,
        width=32,
        num_inference_steps=2,
    )
    assert found.pictures["uce"].shape == (2, 3, 48, 32)
    with edit.on(pipe):
        expected = pipe(
            "a ball",
            height=48,
            width=32,
            num_inference_steps=2,
            guidance_scale=7.5,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images
    assert levels(found.pictures["uce"][:1], (expected * 255).round()) <= 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"edits": {"a": 1}}, TypeError, "edits: got a int under 'a', expected edits by name"),
        ({"edits": {"none": "uce"}}, ValueError, "edits: got the name 'none'"),
        ({"erased": [], "preserved": []}, ValueError, "erased, preserved: got no prompts"),
        ({"erased": ["a ball"]}, TypeError, "erased: got 'a ball', expected pairs"),
        ({"preserved": [("a", 1)]}, TypeError, r"preserved: got \('a', 1\), expected pairs"),
        ({"k": 0}, ValueError, "k: got 0"),
        ({"k": (1, 1)}, ValueError, r"k: got \(1, 1\)"),
        ({"k": 11}, ValueError, "k: got 11, expected at most 10"),
        ({"seeds": []}, ValueError, "seeds: got"),
        ({"batch_size": 0}, ValueError, "batch_size: got 0"),
        ({"guidance_scale": float("nan")}, ValueError, "guidance_scale: got nan"),
        ({"num_inference_steps": -1}, ValueError, "num_inference_steps: got -1"),
        ({"height": 33}, ValueError, "height: got 33"),
        ({"fid": object(), "preserved": []}, ValueError, "fid: got 0 preserved pictures"),
        ({"classify": lambda images: []}, ValueError, "classify: returned 0 lists of labels, expected 2"),
        ({"classify": lambda images: ["ball"] * len(images)}, ValueError, "classify: returned 'ball'"),
        ({"agreement": lambda images, prompts: torch.tensor([torch.nan])}, ValueError, "agreement: returned"),
        ({"distance": lambda a, b: torch.zeros(5)}, ValueError, "distance: returned"),
    ],
)
def test_bad_input_is_one_line_that_names_the_argument(pipe, uce, objects, change, error, message):
    good = {"edits": {"uce": uce}, "erased": ERASED[:1], "preserved": [], "classify": objects} | change
    if "uce" in good["edits"].values():
        good["edits"] = {"none": uce}
    arguments = [good.pop(name) for name in ("edits", "erased", "preserved")]
    with pytest.raises(error, match=message) as caught:
        erasure(pipe, *arguments, **{"num_inference_steps": 1} | good)
    assert "\n" not in str(caught.value)


def test_an_edit_of_another_model_is_refused(pipe, objects):
    stranger = erase.uce(testbed.tiny_pipeline("sd1"), "ball")
    with pytest.raises(ValueError, match="pipe: got weights of the fingerprint"):
        erasure(pipe, {"a": stranger}, ERASED, [], classify=objects)


def test_a_safety_checker_blackens_nothing_that_is_judged(pipe, uce, objects):
    class Checker(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, images, **_):
            return np.zeros_like(images), [True] * len(images)

    checker = Checker()
    pipe.safety_checker = checker
    try:
        found = erasure(pipe, {"uce": uce}, ERASED[:1], [], classify=objects, **DRAW)
        assert pipe.safety_checker is checker
    finally:
        pipe.safety_checker = None
    assert found.pictures["none"].float().mean() > 20


def test_the_bar_of_the_pipeline_is_hidden_and_comes_back(pipe, uce, objects, capfd):
    before = dict(pipe._progress_bar_config)
    pipe.set_progress_bar_config(disable=False)
    erasure(pipe, {"uce": uce}, ERASED[:1], [], classify=objects, num_inference_steps=1)
    assert pipe._progress_bar_config == {"disable": False} and capfd.readouterr().err == ""
    pipe.set_progress_bar_config(**before)


def test_a_picture_of_text_alone_is_needed(pipe, uce, objects):
    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    with pytest.raises(models.UnsupportedModelError, match="draws from pictures"):
        erasure(other, {"uce": uce}, ERASED[:1], [], classify=objects)


def test_edits_come_by_name(pipe, uce, objects):
    for edits in (uce, [uce]):
        with pytest.raises(TypeError, match=r"edits: got a .*, expected edits by name"):
            erasure(pipe, edits, ERASED[:1], [], classify=objects)
