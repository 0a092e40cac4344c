"""`pumice evaluate`: tables, pictures and files, and what it refuses before it draws."""

import csv
import json
import sys
from dataclasses import replace
from functools import wraps
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification

from pumice import cli, testbed
from pumice.cli.attacks import ATTACKS, _inputs, _with_and_without, parsed
from pumice.cli.evaluate import _of_world
from pumice.erase import uce
from pumice.evaluate.attacks import p4d
from pumice.evaluate.study import embedded_study, learn
from pumice.testbed import tiny_pipeline, world

pytestmark = pytest.mark.filterwarnings("ignore::pumice.erase.ErasureWarning")  # of what is judged here
QUICK = ("--num-inference-steps", 2, "--device", "cpu")


@pytest.fixture(scope="module")
def edits(tmp_path_factory) -> Path:
    """A folder of edits of the testbed."""
    folder, pipe = tmp_path_factory.mktemp("edits"), testbed.load()
    uce(pipe, "ball", guide="box", tokens="all").save(folder / "no-ball.safetensors")
    uce(pipe, ["ball", "varga"], guide="box", tokens="all").save(folder / "two.safetensors")
    uce(pipe, "dragon", guide="box").save(folder / "dragon.safetensors")
    uce(tiny_pipeline("sd1"), "ball", guide="box").save(folder / "other.safetensors")
    content = bytearray((folder / "no-ball.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "tampered.safetensors").write_bytes(content)
    (folder / "again").mkdir()
    uce(pipe, "ball", guide="star", tokens="all").save(folder / "again" / "no-ball.safetensors")
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    part = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    labels = dict(enumerate(["Ball", "box", "fish"]))
    config = ViTConfig(**part, image_size=32, patch_size=8, id2label=labels)
    ViTForImageClassification(config).save_pretrained(path)
    kind = getattr(transformers, "ViTImageProcessorPil", transformers.ViTImageProcessor)
    kind(size={"height": 32, "width": 32}).save_pretrained(path)
    return path


@pytest.fixture
def lists(tmp_path) -> tuple[Path, Path]:
    gone, kept = tmp_path / "gone.csv", tmp_path / "kept.jsonl"
    gone.write_text('prompt,label\na red ball,Ball\n"a ball, at the beach",ball\n')
    kept.write_text('{"prompt": "a fish", "label": "fish"}\n{"prompt": "a box", "label": "box"}\n')
    return gone, kept


@pytest.fixture
def pumice(monkeypatch, capsys):
    """Run `pumice evaluate erase` or another in this process; returns exit code, stdout and stderr."""

    def run(*arguments: object, command: str = "erase") -> tuple[int, str, str]:
        words = [
            "pumice",
            "evaluate",
            command,
            *map(str, (*(QUICK if command == "erase" else ()), *arguments)),
        ]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        return exit_.value.code, *capsys.readouterr()

    return run


def test_the_testbed_brings_its_own_trials(pumice, edits, tmp_path):
    out = tmp_path / "deep" / "out"
    code, shown, errors = pumice(
        edits / "no-ball.safetensors", edits / "two.safetensors", "--out", out, "--prompts", 2
    )
    assert code == 0, errors
    lines = shown.splitlines()
    assert lines[0] == f"pictures: {(out / 'sheet.png').resolve()}"
    assert lines[-1] == f"report: {(out / 'report.html').resolve()}"
    assert lines[2] == "ball" and lines[3].split()[:4] == ["edit", "ESR-1", "PSR-1", "loss-1"]
    assert lines[8] == "varga", "one table a concept"
    rows = list(csv.DictReader((out / "rows.csv").open()))
    names = ["none", "no-ball", "two"]
    assert [(row["concept"], row["name"]) for row in rows] == [
        (concept, name) for concept in ("ball", "varga") for name in names
    ]
    assert all(row["agreement_preserved"] for row in rows)
    data = json.loads((out / "results.json").read_text())
    assert [one["concept"] for one in data["concepts"]] == ["ball", "varga"]
    assert data["concepts"][0]["erased"] == [list(pair) for pair in testbed.trial("ball", 2).erased]
    assert data["run"]["model"] == "testbed" and data["run"]["edits"] == "no-ball, two"
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.width > 3 * 128 and sheet.height > 8 * 128
    assert (out / "report.html").read_text().count("data:image/png") == 2 * 3 * 4
    assert sorted(file.name for file in out.iterdir()) == [
        "report.html",
        "results.json",
        "rows.csv",
        "sheet.png",
    ]


def test_what_is_erased_is_gone_and_the_rest_is_there(pumice, edits, tmp_path):
    arguments = (edits / "no-ball.safetensors", "--out", tmp_path, "--prompts", 6, "--quiet")
    code, shown, errors = pumice(*arguments, "--num-inference-steps", 8)
    assert code == 0 and len(shown.splitlines()) == 2, errors
    none, edited = csv.DictReader((tmp_path / "rows.csv").open())
    assert float(none["esr_1"]) <= 50 and float(edited["esr_1"]) >= 80


def test_every_attack_has_a_column_and_a_curve(pumice, edits, tmp_path):
    code, shown, errors = pumice(
        edits / "no-ball.safetensors",
        "--out",
        tmp_path,
        "--prompts",
        1,
        "--attacks",
        "all=1,concept-inversion=2",
    )
    assert code == 0, errors
    for line in (
        "concept-inversion: a word learned for ball, success in %",
        "unlearn-diff-atk: words found before prompts of ball, success in %",
        "p4d: prompts found in place of those of ball, success in %",
        "ring-a-bell: prompts found that read as if they named ball, success in %",
        "relearning: fine-tuned on pictures of ball, success in %",
    ):
        assert line in shown.splitlines()
    assert any(" ".join(line.split()).endswith(" ".join(ATTACKS)) for line in shown.splitlines())
    first = next(csv.DictReader((tmp_path / "rows.csv").open()))
    columns = [f"attack_{name}" for name in ATTACKS]
    assert [key for key in first if key.startswith("attack")] == columns
    data = json.loads((tmp_path / "results.json").read_text())
    found = data["concepts"][0]["attacks"]
    assert [one["attack"] for one in found] == list(ATTACKS) and data["run"]["attacks"]
    assert {one["label"] for one in found} == {"ball"}
    assert [row["steps"] for row in found[0]["rows"] if row["name"] == "no-ball"] == [0, 1, 2]
    assert all(max(row["steps"] for row in one["rows"]) == 1 for one in found[1:])
    assert all(0 <= float(first[name]) <= 100 for name in columns)
    assert (tmp_path / "report.html").read_text().count('data-label="ring-a-bell"') == 2


def test_a_failed_attack_is_told_of_and_does_not_end_the_others(pumice, edits, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr("pumice.evaluate.attacks.p4d", wraps(p4d)(fail))
    code, shown, errors = pumice(
        edits / "no-ball.safetensors", "--out", tmp_path, "--prompts", 1, "--attacks", "p4d,ring-a-bell=1"
    )
    assert code == 0, errors
    assert "warning: p4d of ball failed: out of memory" in shown.splitlines()
    data = json.loads((tmp_path / "results.json").read_text())["concepts"][0]["attacks"]
    assert data[0] == {"attack": "p4d", "label": "ball", "failed": "out of memory"}
    assert data[1]["attack"] == "ring-a-bell" and data[1]["rows"]
    first = next(csv.DictReader((tmp_path / "rows.csv").open()))
    assert first["attack_p4d"] == "" and first["attack_ring-a-bell"] != ""
    assert "Failed: out of memory" in (tmp_path / "report.html").read_text()


def test_an_interrupted_attack_leaves_what_was_found_before(pumice, edits, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("pumice.evaluate.attacks.p4d", interrupt)
    code, _, errors = pumice(
        edits / "no-ball.safetensors", "--out", tmp_path, "--prompts", 1, "--attacks", "ring-a-bell=1,p4d"
    )
    assert code == 130 and "interrupted" in errors
    data = json.loads((tmp_path / "results.json").read_text())["concepts"][0]
    assert data["rows"] and [one["attack"] for one in data["attacks"]] == ["ring-a-bell"]
    names = ["report.html", "results.json", "rows.csv", "sheet.png"]
    assert sorted(file.name for file in tmp_path.iterdir()) == names


def test_attacks_are_named_with_their_steps():
    assert parsed("concept-inversion") == {"concept-inversion": None}
    assert parsed("p4d=20, relearning") == {"p4d": 20, "relearning": None}
    assert parsed("all=3,p4d=9") == {name: 9 if name == "p4d" else 3 for name in ATTACKS}


@pytest.mark.parametrize("steps", [1, 39, 40, 41, 100, 2000])
def test_a_token_search_takes_its_steps_at_several_timesteps(steps):
    _, settings = _inputs("unlearn-diff-atk", "ball", ["a ball"], torch.zeros(1, 3, 8, 8), steps)
    assert 0 <= settings["timesteps"] * settings["steps"] - steps < settings["timesteps"], "rounded up"
    assert 20 <= settings["steps"] <= 40 or steps < 20


def test_prompts_with_and_without_what_is_looked_for():
    assert _with_and_without("a red Ball at home", "ball") == ("a red Ball at home", "a red at home")
    assert _with_and_without("a balloon", "ball") == ("a balloon, ball", "a balloon")
    (pairs, prompts), _ = _inputs("ring-a-bell", "a (ball)", ["a (ball)"], torch.zeros(1, 3, 8, 8), None)
    assert pairs == [("a (ball)", "")] and prompts == ["a (ball)"]


def test_a_target_in_words_is_the_concept_that_it_names():
    memorized = testbed.memorized_captions()[0]
    for target, concept in {
        "ball": "ball",
        "a ball": "ball",
        "in the style of varga": "varga",
        memorized: memorized,
        "a ball, in the style of varga": None,
        "balls": None,
    }.items():
        assert _of_world(target) == concept, target


def test_edits_of_one_name_are_told_apart_by_their_folders(pumice, edits, tmp_path):
    files = [edits / "no-ball.safetensors", edits / "again" / "no-ball.safetensors"]
    code, _, errors = pumice(*files, "--out", tmp_path, "--prompts", 1, "--quiet")
    assert code == 0, errors
    rows = csv.DictReader((tmp_path / "rows.csv").open())
    assert [row["name"] for row in rows] == ["none", *(str(file.with_suffix("")) for file in files)]


@pytest.mark.parametrize("judge", ["classifier", "clip"])
def test_lists_and_a_classifier_of_ones_own(pumice, edits, lists, classifier, tmp_path, judge):
    if judge == "clip":
        classifier = tmp_path / "clip"
        clip, tokenizer = testbed.load_clip()
        clip.save_pretrained(classifier)
        tokenizer.save_pretrained(classifier)
        kind = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
        kind(size={"height": 64, "width": 64}, do_center_crop=False).save_pretrained(classifier)
    out = tmp_path / "out"
    code, shown, errors = pumice(
        *(edits / "dragon.safetensors", "--out", out, "--erased", lists[0], "--preserved", lists[1]),
        *("--classifier", classifier, "--k", 1, "--k", 2, "--seeds", 2),
    )
    assert code == 0, errors
    data = json.loads((out / "results.json").read_text())["concepts"][0]
    assert data["erased"] == [["a red ball", "Ball"], ["a ball, at the beach", "ball"]]
    assert data["settings"]["k"] == [1, 2] and data["settings"]["seeds"] == [0, 1]
    assert {label for one in data["labels"]["none"] for label in one} <= {"ball", "box", "fish"}
    assert (data["rows"][0]["agreement_preserved"] is not None) == (judge == "clip")
    assert "ESR-2" in shown


def test_a_label_that_is_never_found_is_warned_of(pumice, edits, classifier, tmp_path):
    (tmp_path / "gone.csv").write_text("prompt,label\na dragon,dragon\n")
    code, shown, errors = pumice(
        *(edits / "dragon.safetensors", "--out", tmp_path / "out", "--erased", tmp_path / "gone.csv"),
        *("--classifier", classifier),
    )
    assert code == 0 and "ErasureWarning" not in errors
    assert "warning: erased, preserved: classify never returned 'dragon'" in shown


def test_bad_input_is_one_line_and_exit_code_2(pumice, edits, lists, classifier, tmp_path):
    good, out = edits / "no-ball.safetensors", ("--out", tmp_path / "out")
    gone, kept = lists
    model = tmp_path / "model"
    tiny_pipeline("sd1").save_pretrained(model)
    (tmp_path / "file").write_text("")
    (tmp_path / "empty.csv").write_text("prompt,label\n")
    (tmp_path / "blank.csv").write_text("prompt,label\na ball,\n")
    (tmp_path / "no-label.csv").write_text("prompt\na ball\n")
    (tmp_path / "list.txt").write_text("a ball\n")
    (tmp_path / "folder").mkdir()
    judged = ("--classifier", classifier)
    for arguments, message in [
        ((*out,), "EDITS"),
        ((good,), "--out"),
        ((tmp_path / "gone.safetensors", *out), "cannot be read as an edit"),
        ((edits / "tampered.safetensors", *out), "its content is not what was saved"),
        ((edits / "other.safetensors", *out), "EDITS: other: pipe: got weights of the fingerprint"),
        ((good, good, *out), "twice, expected each once"),
        ((edits / "dragon.safetensors", *out), "EDITS: got ones of 'dragon'"),
        ((good, "--out", tmp_path / "file"), "--out: cannot write to"),
        ((good, *out, "--prompts", 0), "--prompts"),
        ((good, *out, "--k", 0), "--k"),
        ((good, *out, "--attacks", "none"), "--attacks: got 'none', expected some of concept-inversion"),
        ((good, *out, "--attacks", "inversion"), "--attacks: got 'inversion', expected some of concept-inv"),
        ((good, *out, "--attacks", "p4d=0"), "--attacks: got '0' steps of p4d, expected a number"),
        ((good, *out, "--attacks", "p4d=x"), "--attacks: got 'x' steps of p4d"),
        ((good, *out, "--model", model), "--erased, --preserved: got none, expected lists"),
        ((good, *out, *judged), "--classifier: got one without --erased"),
        ((good, *out, "--erased", gone), "--classifier: got none"),
        ((good, *out, "--erased", gone, *judged, "--prompts", 3), "--prompts: got one with lists"),
        ((good, *out, "--erased", tmp_path / "no.csv", *judged), "cannot read"),
        ((good, *out, "--erased", tmp_path / "empty.csv", *judged), "has no prompts"),
        ((good, *out, "--erased", tmp_path / "blank.csv", *judged), "blank.csv, line 2: has no label"),
        ((good, *out, "--erased", tmp_path / "no-label.csv", *judged), "needs one column 'label'"),
        ((good, *out, "--preserved", tmp_path / "list.txt", *judged), "has no labels"),
        ((good, *out, "--preserved", kept, "--classifier", tmp_path / "folder"), "cannot be loaded"),
        ((good, *out, "--guidance-scale", "nan"), "guidance_scale"),
    ]:
        code, shown, errors = pumice(*arguments)
        lines = [line for line in errors.splitlines() if line and "Loading" not in line]
        assert code == 2 and not shown, (arguments, shown, errors)
        assert len(lines) == 1 and lines[0].startswith("pumice: "), (arguments, errors)
        assert message in lines[0], (arguments, errors)
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir()), arguments


@pytest.fixture
def folders(tmp_path) -> list[Path]:
    """Creatures, and the same with an artist's bands."""
    found = []
    for name, style in (("clean", None), ("banded", "tanaka")):
        (tmp_path / name).mkdir()
        for k in range(4):
            pixels = (world.creature(k, 0, style=style) * 255).round().astype("uint8").transpose(1, 2, 0)
            Image.fromarray(pixels).save(tmp_path / name / f"{k}.png")
        found.append(tmp_path / name)
    return found


def test_a_mismatch_of_folders(pumice, folders, tmp_path):
    given = (folders[0], f"{folders[1]}=protected", "--clip", "testbed", "--subject", "a creature")
    out = tmp_path / "out"
    code, shown, errors = pumice(*given, "--other", "tanaka", "--out", out, command="mismatch")
    assert code == 0, errors
    lines = shown.splitlines()
    assert lines[1] == "'a photo of a creature' or 'a photo of tanaka'"
    assert [line.split()[:2] for line in lines[3:5]] == [["clean", "4"], ["protected", "4"]]
    assert lines[-1] == f"report: {(out / 'report.html').resolve()}"
    data = json.loads((out / "results.json").read_text())
    clean, banded = data["rows"]
    assert banded["probability"] < clean["probability"] and data["run"]["other"] == "tanaka"
    assert "<svg" in (out / "report.html").read_text()
    code, shown, _ = pumice(*given, command="mismatch")
    assert code == 0 and "report" not in shown


def test_bad_input_to_a_mismatch_is_one_line(pumice, folders, tmp_path):
    (tmp_path / "empty").mkdir()
    clip = ("--clip", "testbed")
    for arguments, message in [
        ((*clip,), "FOLDER"),
        ((folders[0],), "--clip"),
        ((tmp_path / "no", *clip), "FOLDER: there is no"),
        ((tmp_path / "empty", *clip), "has no pictures in it"),
        ((folders[0], folders[0], *clip), "got 'clean' twice"),
        ((folders[0], "--clip", tmp_path / "empty"), "cannot be loaded as a CLIP"),
        ((folders[0], *clip, "--template", "x"), "template: got 'x'"),
        ((folders[0], *clip, "--other", "person"), "other: got 'person'"),
    ]:
        code, shown, errors = pumice(*arguments, command="mismatch")
        lines = [line for line in errors.splitlines() if line and "Loading" not in line]
        assert code == 2 and not shown, (arguments, shown, errors)
        assert len(lines) == 1 and lines[0].startswith("pumice: ") and message in lines[0], errors


LEARNED = []


def learned(*arguments, **options):
    LEARNED.append(options)
    return learn(*arguments, **options | {"steps": 1, "drawings": 1})


def test_a_matrix_of_the_testbed_goes_on(pumice, tmp_path, monkeypatch):
    """Trainings are of one step, the rest is as it is."""
    whole = embedded_study
    LEARNED.clear()

    def small(**settings):
        study = whole(**settings)
        return replace(
            study,
            protections={"none": None, "random": study.protections["random"]},
            purifiers={"none": None, "jpeg": study.purifiers["jpeg"]},
            recipes={"dreambooth": learned},
        )

    monkeypatch.setattr("pumice.evaluate.embedded_study", small)
    given = ("--quick", "--subjects", "2", "--out", tmp_path / "out")
    code, shown, errors = pumice(*given, command="matrix")
    assert code == 0 and len(LEARNED) == 4, errors
    out = tmp_path / "out"
    assert shown.splitlines()[-1] == f"report: {(out / 'report.html').resolve()}"
    assert "what is learned" in shown and "what CLIP sees" in shown
    rows = list(csv.DictReader((out / "rows.csv").open()))
    assert [(row["protection"], row["purifier"]) for row in rows] == [
        (protection, purifier) for protection in ("none", "random") for purifier in ("none", "jpeg")
    ]
    data = json.loads((out / "results.json").read_text())
    assert data["settings"]["subjects"] == ["2"] and data["settings"]["seeds"] == [0]
    groups = [row["name"] for row in data["mismatch"]["rows"]]
    assert groups == ["clean", "random", "random, jpeg"]
    assert {file.name for file in out.iterdir()} == {"parts", "report.html", "results.json", "rows.csv"}
    assert pumice(*given, "--quiet", command="matrix")[0] == 0 and len(LEARNED) == 4


def test_bad_input_to_a_matrix_is_one_line(pumice, tmp_path):
    out = ("--out", tmp_path / "out")
    (tmp_path / "file").write_text("")
    for arguments, message in [
        ((), "--out"),
        ((*out, "--subjects", "a"), "--subjects: got 'a', expected numbers"),
        ((*out, "--subjects", "99"), "index must lie in"),
        ((*out, "--seeds", 0), "--seeds"),
        ((*out, "--workers", 0), "--workers"),
        (("--out", tmp_path / "file"), "--out: cannot write to"),
    ]:
        code, shown, errors = pumice(*arguments, command="matrix")
        lines = [line for line in errors.splitlines() if line and "Loading" not in line]
        assert code == 2 and not shown, (arguments, shown, errors)
        assert len(lines) == 1 and message in lines[0], (arguments, errors)
