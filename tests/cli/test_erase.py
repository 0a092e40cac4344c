"""`pumice erase`: what it writes and says, and what it refuses before any work."""

import sys
from functools import wraps
from importlib import import_module
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from pumice import cli, erase, models, testbed
from pumice.cli.erase import _prompts
from pumice.cli.erase import erase as command
from pumice.cli.erase_methods import METHODS, PROMPTS, TYPES, Method, _pictures
from pumice.cli.options import in_options
from pumice.models import Edit
from pumice.testbed import tiny_pipeline

CLOSED = ("uce", "rece", "mace-refine", "trce", "speed", "time")
TRAINED = [name for name in METHODS if name not in CLOSED]
QUICK = ("--learning-rate", 1e-3, "--allow-unknown", "--no-picture")
NEEDED = {
    "concept-ablation": ("--guide", "dog"),
    "mace": ("--guide", "dog"),
    "kpop": ("--key", "k.safetensors"),
}


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
    found = _prompts(("fish", "ball"), PROMPTS["object"], "testbed")
    assert found[:2] == ("a photo of a fish", "a photo of a ball") and len(found) == 4
    assert not any("fish" in text or "ball" in text for text in found[2:])
    found = _prompts(("Dog", "Woman"), PROMPTS["art"], "another")
    assert found[0] == "a painting by Dog" and not any("dog" in t or "woman" in t for t in found[2:])
    assert len(_prompts([f"thing {i}" for i in range(100)], PROMPTS["unsafe"], "another")) == 10


@pytest.mark.parametrize("method", [name for name in CLOSED if name != "uce"])
def test_every_closed_form_makes_an_edit_of_the_concept(pumice, model, method):
    ridge = ("--lamb", 0.5) if method == "trce" else ()
    code, shown, errors = pumice(
        *("cat", "--method", method, "--guide", "dog", "--model", model, "--out", "edit.safetensors"),
        *("--no-picture", *ridge),
    )
    assert code == 0, errors
    assert "picture: " not in shown and not Path("edit.png").exists()
    assert Edit.load("edit.safetensors").targets == ("cat",)


@pytest.mark.parametrize("method", TRAINED)
def test_every_method_that_trains_gets_its_arguments(pumice, model, monkeypatch, method):
    """What the function is called with, in place of a training."""
    module, _, name = METHODS[method].partition(".")
    function, calls = getattr(import_module(f"pumice.erase.{module}"), name), []

    @wraps(function)
    def called(*arguments, **more):
        signature(function).bind(*arguments, **more)
        calls.append(more)
        return erase.uce(arguments[0], arguments[1], guide="dog")

    monkeypatch.setattr(sys.modules[f"pumice.erase.{module}"], name, called)
    draws = Method(method).argument("sample_dtype") is not None
    more = ("--checkpoint", "kept", "--train-rank", 3, *(("--sample-dtype", "bfloat16") if draws else ()))
    code, _, errors = pumice(
        *("cat", "--method", method, "--steps", 2, *NEEDED.get(method, ()), "--model", model, *QUICK),
        *(*more, "--out", "edit.safetensors"),
    )
    assert code == 0, errors
    expected = {"steps": 2, "learning_rate": 1e-3, "rank": 3, "checkpoint": Path("kept"), "seed": 0}
    expected |= {"progress": True, "allow_unknown": True} | (
        {"sample_dtype": torch.bfloat16} if draws else {}
    )
    assert expected.items() <= calls[0].items()
    if method in NEEDED:
        assert NEEDED[method][1] in {str(value) for value in calls[0].values()}


@pytest.mark.parametrize(("method", "more"), NEEDED.items())
def test_methods_that_need_more_train(pumice, model, method, more):
    code, shown, errors = pumice(
        *("cat", "--method", method, "--steps", 1, *more, "--model", model, *QUICK),
        *("--batch-size", 1, "--out", "edit.safetensors"),
    )
    assert code == 0, errors
    table = dict(line.split(maxsplit=1) for line in shown.splitlines())
    assert table["steps"] == "1" and " at first, " in table["loss"]
    assert Edit.load("edit.safetensors").targets == ("cat",)
    written = {"edit.safetensors", *([more[1]] if method == "kpop" else [])}
    assert {file.name for file in Path().iterdir()} == written


def test_options_are_arguments_of_some_method_and_types_of_theirs():
    methods = {name: Method(name) for name in METHODS}
    own = {"method", "concepts", "out", "lora", "lora_format", "rank", "single_file", "prompts", "no_picture"}
    own |= {"num_inference_steps", "model", "dtype", "device", "quiet", "concept_type"}
    for option in {parameter.name for parameter in command.params} - own:
        assert any(method.argument(option) for method in methods.values()), option
    for name, types in TYPES.items():
        assert types.keys() <= PROMPTS.keys()
        for chosen in types.values():
            assert methods[name].accepted(**chosen) == chosen, name


@pytest.mark.parametrize(
    ("method", "kind", "expected"),
    [
        ("uce", "art", {"guide": ["art"]}),
        ("esd", "object", {"train_method": "esd-u"}),
        ("rece", "art", {"preset": "artist", "guide": ["art"]}),
        ("speed", "art", {"anchor": ["art"]}),
        ("speed", "celebrity", {"anchor": ["person"]}),
    ],
)
def test_a_type_chooses_the_methods_defaults(pumice, model, method, kind, expected):
    arguments = ("cat", "--method", method, "--type", kind, "--model", model, "--out", "e.safetensors")
    code, _, errors = pumice(*arguments, *(("--steps", 1, *QUICK) if method == "esd" else ("--no-picture",)))
    assert code == 0, errors
    settings = Edit.load("e.safetensors").settings
    assert {name: settings[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("method", "kind", "expected"),
    [
        ("eap", "unsafe", {"nearest": 2000, "centres": 50, "parameters": "noxattn"}),
        ("eap", "art", {}),
        ("age", "object", {"nearest": 100, "temperature": 0.1, "hard": True}),
        ("age", "unsafe", {"nearest": 100, "hard": True, "parameters": "noxattn"}),
        ("mace", "celebrity", {"preset": "celebrity"}),
        ("sdd", None, {}),
    ],
)
def test_a_type_sets_what_its_papers_have(method, kind, expected):
    found = Method(method).arguments({"guide": "x" if method == "mace" else (), "type": kind})
    assert {name: value for name, value in found.items() if name != "mapping"} == expected
    if "parameters" in expected:
        found = Method(method).arguments({"type": kind, "parameters": "full"})
        assert found["parameters"] == "full", "what was given goes first"


def test_only_methods_that_draw_trajectories_take_their_options():
    takes = {name: Method(name).argument("pending") is not None for name in TRAINED}
    assert takes["esd"] and takes["kpop"] and takes["safety-lora"]
    assert not any(takes[name] for name in ("mace", "few-shot", "forget-me-not", "concept-ablation"))


def test_messages_speak_of_options():
    names = {"allow_unknown": "--allow-unknown", "memorized": "--images", "path": "--lora"}
    for said, shown in [
        (
            "concept: word it, or go on with allow_unknown=True",
            "concept: word it, or go on with --allow-unknown",
        ),
        ("memorized, similar: got some", "--images, similar: got some"),
        ("path[2]: a_path, allow_unknown='x'", "--lora[2]: a_path, --allow-unknown 'x'"),
        ("other=True", "other=True"),
    ]:
        assert in_options(said, names) == shown


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
    assert "warning: --preserve: 'a photo of a cat' speaks of 'cat'" in shown
    code, shown, errors = pumice(*arguments, "--quiet")
    assert code == 0 and "warning: " not in shown and "warning: --preserve:" in errors


def test_an_interrupted_picture_leaves_the_edit(pumice, model, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("pumice.evaluate.contact_sheet", interrupt)
    code, _, errors = pumice(
        "cat", "--model", model, "--num-inference-steps", 1, "--out", "out/e.safetensors"
    )
    assert code == 130 and "the edit is in 'out/e.safetensors'" in errors
    assert [file.name for file in Path("out").iterdir()] == ["e.safetensors"]
    Edit.load("out/e.safetensors")


@pytest.fixture
def train(pumice, model):
    """Run `pumice erase --method esd` for a few steps."""
    how = ("--parameters", "esd-x-strict", "--steps", 4, "--pending", 2, "--learning-rate", 1e-3)
    small = ("--num-inference-steps", 2, "--model", model, "--allow-unknown")
    return lambda *more: pumice("a ball", "--method", "esd", *how, *small, *more)


def test_a_training_shows_its_loss_and_its_pictures(train):
    code, shown, errors = train(
        *("--samples", "seen", "--samples-every", 2, "--prompt", "a box"),
        *("--batch-size", 2, "--lora", "l.safetensors", "--rank", 2),
        *("--seed", 3, "--out", "e.safetensors"),
    )
    assert code == 0 and "4/4" in errors and "loss=" in errors, errors
    assert [line.split()[0] for line in shown.splitlines()] == [
        *("picture:", "overall", "steps", "loss", "seconds", "lora:", "edit:")
    ]
    names = [f"step-{step:06d}.png" for step in (0, 2, 4)]
    assert sorted(file.name for file in Path("seen").iterdir()) == names
    with Image.open(Path("seen", names[0])) as row:
        assert row.size == (2 * 32, 32), "the concept and the prompt"
    settings = Edit.load("e.safetensors").settings
    expected = {"train_method": "esd-x-strict", "batch_size": 2, "seed": 3}
    assert {name: settings[name] for name in expected} == expected
    with safe_open("l.safetensors", "pt") as file:
        assert {min(file.get_tensor(key).shape) for key in file.keys()} == {2}  # noqa: SIM118


def test_an_interrupted_training_goes_on_to_the_same_edit(train, monkeypatch):
    from pumice.training import checkpoint

    code, _, errors = train("--out", "whole/e.safetensors", "--no-picture")
    assert code == 0, errors
    write = checkpoint.Checkpoint.write

    def interrupt(*arguments):
        write(*arguments)
        raise KeyboardInterrupt

    going = ("--checkpoint", "kept", "--checkpoint-every", 2, "--out", "parts/e.safetensors", "--no-picture")
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.Checkpoint, "write", interrupt)
        code, shown, errors = train(*going)
    assert code == 130 and not shown and not list(Path("parts").iterdir())
    assert "run the same command again to go on" in errors
    code, _, errors = train(*going)
    assert code == 0 and "2/4" in errors, errors
    one, two = (Edit.load(Path(name, "e.safetensors")) for name in ("whole", "parts"))
    assert one.changes.keys() == two.changes.keys()
    assert all(torch.equal(one.changes[name].delta, two.changes[name].delta) for name in one.changes)
    code, shown, errors = train(*going, "--seed", 1)
    assert code == 2 and "--checkpoint: " in errors and "seed was 0, is 1" in errors


def test_without_a_checkpoint_an_interruption_says_what_would_have_helped(train, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("pumice.erase.trainer.Trainer.train", interrupt)
    code, shown, errors = train("--out", "e.safetensors", "--quiet")
    assert code == 130 and not shown and "give --checkpoint DIR to be able to go on" in errors
    assert "a training of personalize" in errors, "no other one goes on by itself"


def test_only_the_first_of_several_processes_writes(train, monkeypatch):
    other = SimpleNamespace(is_main_process=False, num_processes=1, device=torch.device("cpu"))
    monkeypatch.setattr(import_module("pumice.jobs.personalize"), "processes", lambda: other)
    code, shown, _ = train("--out", "out/e.safetensors")
    assert code == 0 and not shown and not list(Path("out").iterdir())


def test_pictures_and_masks_go_together_by_name(pumice):
    for name in ("images/b.png", "images/a.png", "masks/a.png", "masks/b.png"):
        Path(name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(name)
    folders = [Path("images"), Path("masks")]
    paths = [[folder.resolve() / name for name in ("a.png", "b.png")] for folder in folders]
    found = [
        [[path.resolve() for path in files] for files in each]
        for each in (*_pictures(folders, []), *_pictures(folders[:1], folders[1:]))
    ]
    assert found == [paths, paths[:1], paths[1:]]
    with pytest.raises(ValueError, match="--masks: got 1, expected one for each of 2"):
        _pictures(folders[:1] * 2, folders[1:])
    Path("masks", "a.png").rename(Path("masks", "c.png"))
    with pytest.raises(ValueError, match=r"--masks: got b.png, c.png, expected one for each of a.png, b.png"):
        _pictures(folders[:1], folders[1:])


def test_a_folder_of_memorized_pictures_has_one_a_concept(pumice, model):
    Path("images").mkdir()
    for name, grey in (("b.png", 0), ("a.png", 255)):
        Image.new("RGB", (40, 32), (grey,) * 3).save(Path("images", name))
    given = ("--method", "concept-ablation", "--type", "memorized", "--guide", "x", "--images", "images")
    more = ("--model", model, "--out", "e.safetensors", "--steps", 1, "--batch-size", 1, *QUICK)
    code, _, errors = pumice("cat", *given, *more)
    assert code == 2 and "--images: got 2 pictures, expected 1" in errors


def test_bad_input_is_one_line_and_exit_code_2(pumice, model, tmp_path):
    Path("there.safetensors").write_bytes(b"old")
    Path("folder.safetensors").mkdir()
    Path("empty.txt").write_text("\n")
    Path("cat.txt").write_text("a dog\nCat\n")
    tiny_pipeline("sd3").save_pretrained(tmp_path / "sd3")
    before = {file: file.stat().st_mtime_ns for file in Path().rglob("*")}
    other = ("--out", "new.safetensors")
    esd = ("cat", "--method", "esd", *other)
    for arguments, message in [
        ((*other,), "CONCEPTS"),
        (("cat",), "--out"),
        ((" ", *other), "CONCEPTS: got ' ', expected texts that are not empty"),
        (("cat", "Cat", *other), "CONCEPTS: got 'cat' and 'Cat', expected each once"),
        (("cat", "--method", "scissors", *other), "--method"),
        (("cat", "--type", "song", *other), "--type"),
        ((*esd, "--type", "memorized"), "--type: got 'memorized', expected one of object, art, unsafe"),
        (("cat", "--guide", "cat", *other), "--guide: got 'cat' for"),
        (("cat", "dog", "bird", "--guide", "a", "--guide", "b", *other), "--guide: got 2, expected one, or"),
        (("cat", "--method", "mace-refine", *other), "--guide: got none"),
        (("cat", "--method", "mace-refine", "--guide", "cat", *other), "--guide: got 'cat'"),
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
        (("cat", "--steps", 2, *other), "--steps: got one, which uce does not take"),
        ((*esd, "--steps", 0), "--steps"),
        ((*esd, "--images", tmp_path), "--images: got one, which esd does not take"),
        (
            ("cat", "--method", "forget-me-not", "--pending", 2, *other),
            "--pending: got one, which forget-me-not does not take",
        ),
        (
            ("cat", "--method", "concept-ablation", "--guide", "x", "--images", tmp_path, *other),
            "--images: got some, of which concept-ablation learns with --type memorized alone",
        ),
        ((*esd, "--guide", "dog"), "--guide: got one, which esd does not take"),
        (("cat", "--method", "kpop", *other), "--key: got none, expected one, which kpop needs"),
        ((*esd, "--parameters", "some"), "--parameters: got 'some', expected one of"),
        ((*esd, "--learning-rate", 0), "--learning-rate: got 0.0"),
        ((*esd, "--train-rank", 0), "--train-rank"),
        ((*esd, "--steps", 1), "as its captions do, or go on with --allow-unknown"),  # it knows none
        ((*esd, "--checkpoint-every", 2), "--checkpoint-every: got some without --checkpoint"),
        ((*esd, "--samples-every", 2), "--samples-every: got some without --samples"),
        ((*esd, "--checkpoint", "there.safetensors"), "--checkpoint"),
        ((*esd, "--lora", "l.safetensors"), "--lora: got one without --rank; esd trains whole weights"),
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
