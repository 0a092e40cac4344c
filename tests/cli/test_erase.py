"""`pumice erase`: what it writes and says, and what it refuses before any work."""

import sys
from inspect import signature
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from pumice import cli, erase, models, testbed
from pumice.cli.erase import ARGUMENTS, FUNCTIONS, TYPES, _prompts
from pumice.models import Edit
from pumice.testbed import tiny_pipeline


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_pipeline("sd1").save_pretrained(path)
    return path


@pytest.fixture
def pumice(monkeypatch, capsys, tmp_path):
    """Run `pumice erase` in this process and in an empty folder; returns exit code, stdout and stderr."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def run(*arguments: object) -> tuple[int, str, str]:
        words = ["pumice", "erase", *map(str, arguments), "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        return exit_.value.code, *capsys.readouterr()

    return run


def test_out_of_the_box_a_picture_comes_first_and_then_the_files(pumice):
    code, shown, errors = pumice(
        *("ball", "--guide", "box", "--tokens", "all", "--num-inference-steps", 2),
        *("--out", "out/no-ball.safetensors", "--lora", "out/no-ball-lora.safetensors"),
    )
    assert code == 0, errors
    lines = shown.splitlines()
    assert lines[0] == f"picture: {Path('out/no-ball.png').resolve()}"
    assert lines[-2:] == [
        f"lora: {Path('out/no-ball-lora.safetensors').resolve()}",
        f"edit: {Path('out/no-ball.safetensors').resolve()}",
    ]
    for name in (
        "overall change",
        "residual",
        "drift",
        "condition number",
        "rank",
        "encoder calls",
        "seconds",
    ):
        assert any(line.startswith(name) for line in lines), name
    with Image.open("out/no-ball.png") as sheet:
        assert sheet.height > 3 * 128, "the concept and two that stay"
    edit = Edit.load("out/no-ball.safetensors")
    assert (
        edit.targets == ("ball",) and edit.settings["guide"] == ["box"] and edit.settings["tokens"] == "all"
    )
    pipe = testbed.load()
    expected = erase.uce(pipe, "ball", guide="box", tokens="all")
    for name, change in expected.changes.items():
        assert torch.equal(edit.changes[name].up, change.up), name
    edit.check_fits(models.load(pipe))
    assert sorted(file.name for file in Path("out").iterdir()) == [
        "no-ball-lora.safetensors",
        "no-ball.png",
        "no-ball.safetensors",
    ], "nothing temporary is left"


def test_the_pictures_are_of_the_concepts_and_of_what_should_stay():
    found = _prompts(("fish", "ball"), "object", "testbed")
    assert found[:2] == ("a photo of a fish", "a photo of a ball") and len(found) == 4
    assert not any("fish" in text or "ball" in text for text in found[2:])
    found = _prompts(("Dog", "Woman"), "art", "another")
    assert found[0] == "a painting by Dog" and not any("dog" in t or "woman" in t for t in found[2:])
    assert len(_prompts([f"thing {i}" for i in range(100)], "unsafe", "another")) == 10


@pytest.mark.parametrize("method", [name for name in ARGUMENTS if name != "uce"])
def test_every_method_makes_an_edit_of_the_concept(pumice, model, method):
    ridge = ("--lamb", 0.5) if method == "trce" else ()
    code, shown, errors = pumice(
        *("cat", "--method", method, "--guide", "dog", "--model", model, "--out", "edit.safetensors"),
        *("--no-picture", *ridge),
    )
    assert code == 0, errors
    assert "picture: " not in shown and not Path("edit.png").exists()
    assert Edit.load("edit.safetensors").targets == ("cat",)


def test_methods_have_the_arguments_that_options_are_called_there():
    for method, arguments in ARGUMENTS.items():
        known = set(signature(getattr(erase, FUNCTIONS.get(method, method))).parameters)
        assert set(arguments.values()) <= known, method
        for chosen in TYPES.get(method, {}).values():
            assert set(chosen) <= known, method


@pytest.mark.parametrize(
    ("method", "kind", "expected"),
    [
        ("uce", "art", {"guide": ["art"]}),
        ("rece", "art", {"preset": "artist", "guide": ["art"]}),
        ("speed", "art", {"anchor": ["art"]}),
    ],
)
def test_a_type_chooses_the_methods_defaults(pumice, model, method, kind, expected):
    arguments = ("cat", "--method", method, "--type", kind, "--model", model, "--out", "e.safetensors")
    code, _, errors = pumice(*arguments, "--no-picture")
    assert code == 0, errors
    settings = Edit.load("e.safetensors").settings
    assert {name: settings[name] for name in expected} == expected


def test_numbers_of_zero_count_as_given(pumice, model):
    code, _, errors = pumice(
        "cat", "--erase-scale", 0, "--model", model, "--out", "e.safetensors", "--no-picture"
    )
    assert code == 0, errors
    assert Edit.load("e.safetensors").settings["erase_scale"] == 0


def test_a_lora_for_other_programs_and_a_whole_model(pumice, model):
    code, shown, errors = pumice(
        *("cat", "dog", "--guide", "car", "--guide", "tree", "--model", model, "--prompt", "a cat"),
        *("--num-inference-steps", 1, "--lora", "lora.safetensors", "--lora-format", "kohya", "--rank", 1),
        *("--single-file", "whole.safetensors", "--out", "e.safetensors", "--quiet"),
    )
    assert code == 0, errors
    assert [line.split(":")[0] for line in shown.splitlines()] == ["picture", "lora", "model", "edit"]
    with safe_open("lora.safetensors", "pt") as file:
        keys = list(file.keys())
        assert all(key.startswith("lora_unet_") for key in keys)
        assert {file.get_tensor(key).shape[0] for key in keys if "lora_down" in key} == {1}
    with safe_open("whole.safetensors", "pt") as file:
        assert any(key.startswith("model.diffusion_model.") for key in file.keys())  # noqa: SIM118
    assert Edit.load("e.safetensors").settings["guide"] == ["car", "tree"]


def test_warnings_are_lines_of_the_table(pumice, model):
    Path("keep.txt").write_text("a photo of a cat\n")
    arguments = ("cat", "--preserve", "keep.txt", "--model", model, "--no-picture", "--out", "e.safetensors")
    code, shown, errors = pumice(*arguments)
    assert code == 0 and "ErasureWarning" not in errors
    assert "warning: preserve: 'a photo of a cat' speaks of 'cat'" in shown
    code, shown, errors = pumice(*arguments, "--quiet")
    assert code == 0 and "warning: " not in shown and "warning: preserve:" in errors


def test_an_interruption_leaves_no_files(pumice, model, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("pumice.evaluate.contact_sheet", interrupt)
    code, _, errors = pumice(
        "cat", "--model", model, "--num-inference-steps", 1, "--out", "out/e.safetensors"
    )
    assert code == 130 and "interrupted" in errors
    assert not list(Path("out").iterdir())


def test_bad_input_is_one_line_and_exit_code_2(pumice, model, tmp_path):
    Path("there.safetensors").write_bytes(b"old")
    Path("folder.safetensors").mkdir()
    Path("empty.txt").write_text("\n")
    Path("cat.txt").write_text("a dog\nCat\n")
    tiny_pipeline("sd3").save_pretrained(tmp_path / "sd3")
    before = {file: file.stat().st_mtime_ns for file in Path().rglob("*")}
    other = ("--out", "new.safetensors")
    for arguments, message in [
        ((*other,), "CONCEPTS"),
        (("cat",), "--out"),
        ((" ", *other), "concepts: got ' ', expected texts that are not empty"),
        (("cat", "Cat", *other), "concepts: got 'cat' and 'Cat', expected each once"),
        (("cat", "--method", "scissors", *other), "--method"),
        (("cat", "--type", "song", *other), "--type"),
        (("cat", "--guide", "cat", *other), "--guide: got 'cat' for"),
        (("cat", "dog", "bird", "--guide", "a", "--guide", "b", *other), "--guide: got 2, expected one, or"),
        (("cat", "--method", "mace", *other), "--guide: got none"),
        (("cat", "--method", "mace", "--guide", "cat", *other), "--guide: got 'cat'"),
        (("cat", "--method", "time", "--guide", "two dogs", *other), "--guide: got 'a photo of a two dogs'"),
        (
            ("cat", "--method", "rece", "--tokens", "all", *other),
            "--tokens: got one, which rece does",
        ),
        (
            ("cat", "--method", "time", "--guide", "dog", "--type", "art", *other),
            "--type: got one",
        ),
        (("cat", "--method", "speed", "--pooled", *other), "--pooled: got one, which speed does not take"),
        (("cat", "--method", "speed", "--erase-scale", 0, *other), "--erase-scale: got one, which speed"),
        (("cat", "--pooled", *other), "pooled"),
        (("cat", "--erase-scale", -1, *other), "--erase-scale: got -1.0, expected a non-negative number"),
        (("cat", "--lamb", -1, *other), "--lamb: got -1.0"),
        (("cat", "--lamb", 0, *other), "--lamb: got 0.0 with too few rows"),
        (("cat", "--lamb", "much", *other), "--lamb"),
        (("cat", "--preserve", "gone.txt", *other), "cannot read 'gone.txt'"),
        (("cat", "--preserve", "empty.txt", *other), "'empty.txt' has no prompts"),
        (("cat", "--preserve", "cat.txt", *other), "--preserve: got the concept 'Cat' itself"),
        (("cat", "--lora", "there.safetensors", *other), "--lora: 'there.safetensors' is there already"),
        (
            ("cat", "--single-file", "there.safetensors", *other),
            "--single-file: 'there.safetensors' is there",
        ),
        (("cat", "--lora", "new.pt", *other), "--lora: got 'new.pt'"),
        (("cat", "--lora", "./new.safetensors", *other), "--out, --lora: got 'new.safetensors' for both"),
        (("cat", "--rank", 2, *other), "--rank: got 2 without --lora"),
        (("cat", "--lora-format", "kohya", *other), "--lora-format: got kohya without --lora"),
        (("cat", "--lora", "l.safetensors", "--rank", 0, *other), "--rank"),
        (("cat", "--prompt", "a cat", "--no-picture", *other), "--prompt: got one with --no-picture"),
        (("cat", "--out", "new.png"), "--out: got 'new.png'"),
        (("cat", "--out", "folder.safetensors"), "--out: 'folder.safetensors' is a folder"),
        (("cat", "--out", "there.safetensors/new.safetensors"), "--out: cannot write to"),
        (("cat", "--model", "nowhere", *other), "--model: 'nowhere' is neither"),
        (("cat", "--model", tmp_path / "sd3", *other), "not yet"),
    ]:
        if "--model" not in arguments:
            arguments = (*arguments, "--model", model)
        code, shown, errors = pumice(*arguments)
        lines = [line for line in errors.splitlines() if line and "Loading" not in line]
        assert code == 2 and not shown, (arguments, shown, errors)
        assert len(lines) == 1 and lines[0].startswith("pumice: ") and message in lines[0], (
            arguments,
            errors,
        )
        assert {file: file.stat().st_mtime_ns for file in Path().rglob("*")} == before, arguments
