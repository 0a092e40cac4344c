"""`pumice protect`: what it says, its exit codes, and that options reach the method under its names."""

import inspect
import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pumice import cli, jobs, protect
from pumice.cli.protect import FIXED, METHODS
from pumice.jobs.methods import _options
from pumice.protect.plan import Plan
from pumice.testbed import tiny_pipeline

command = sys.modules["pumice.cli.protect"].protect


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_pipeline("sd1").save_pretrained(path)
    return path


@pytest.fixture
def pumice(monkeypatch, capsys):
    """Run `pumice protect` in this process; returns exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pumice", "protect", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        return exit_.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    for number, name in enumerate(("a.jpg", "sub/b.png")):
        pixels = np.random.default_rng(number).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


@pytest.fixture
def called(monkeypatch):
    """What `jobs.protect` is called with, and does not do."""
    seen = {}

    def record(*arguments: object, **settings: object) -> jobs.Outcome:
        seen.update(settings, arguments=arguments)
        return jobs.Outcome(Path("manifest.jsonl"), (), (), None)

    monkeypatch.setattr(jobs, "protect", record)
    return seen


def test_out_of_the_box(pumice, source, tmp_path):
    (source / "note.heic").write_text("")
    out = tmp_path / "deep" / "out"
    code, shown, errors = pumice(source, out, "--steps", 1, "--eps", "8/255", "--device", "cpu")
    assert code == 0, errors
    rows = dict(line.split("  ", 1) for line in shown.splitlines()[:-1])
    assert [value.strip() for value in rows.values()][:3] == ["2", "0", "1 (.heic 1)"]
    assert list(rows)[3:] == ["median PSNR", "s per picture"]
    assert shown.splitlines()[-1] == f"manifest: {(out / 'manifest.jsonl').resolve()}"
    assert "mist: 100%" in errors and "the embedded model is for trying out" in errors
    assert (out / "a.png").is_file() and (out / "sub/b.png").is_file()
    change = np.asarray(Image.open(out / "a.png"), int) - np.asarray(Image.open(source / "a.jpg"), int)
    assert 0 < abs(change).max() <= 8


def test_failures_are_listed_and_an_exit_code(pumice, source, model, tmp_path):
    (source / "bad\x1b[31m.png").write_text("")
    arguments = (
        source,
        tmp_path / "out",
        "--model",
        model,
        "--steps",
        1,
        "--method",
        "advdm",
        "--device",
        "cpu",
    )
    code, shown, errors = pumice(*arguments)
    assert code == 1 and "failed          1" in shown and "embedded model" not in errors
    assert (
        "failed: bad [31m.png: cannot be read" in errors
        and "\x1b" not in shown + errors.split("failed: ")[-1]
    )
    code, shown, errors = pumice(*arguments, "--quiet")
    assert code == 1 and shown.startswith("manifest: ") and len(shown.splitlines()) == 1
    assert errors.strip().startswith("failed: bad") and len(errors.strip().splitlines()) == 1
    (source / "bad\x1b[31m.png").unlink()
    assert pumice(*arguments, "--quiet")[0] == 0


def test_noise_opens_no_model(pumice, source, tmp_path):
    arguments = (
        source,
        tmp_path / "out",
        "--method",
        "random",
        "--eps",
        "0.02",
        "--model",
        tmp_path / "nowhere",
    )
    code, _, errors = pumice(*arguments, "--format", "webp")
    assert code == 0 and "embedded model" not in errors
    assert (tmp_path / "out/a.webp").is_file()


def test_options_are_arguments(pumice, source, called, tmp_path):
    code, _, errors = pumice(
        *(
            source,
            tmp_path / "out",
            "--eps",
            "0.03",
            "--step-size",
            "1/255",
            "--steps",
            7,
            "--prompt",
            "a dog",
        ),
        *("--target", tmp_path / "target.png", "--size", "tiles", "--batch-size", 3, "--format", "webp"),
        *("--seed", 5, "--restart", "--quiet"),
    )
    assert code == 0, errors
    assert called.pop("arguments")[1:] == (source, tmp_path / "out", "mist")
    assert called == {
        "eps": 0.03,
        "step_size": 1 / 255,
        "steps": 7,
        "prompt": "a dog",
        "target": tmp_path / "target.png",
        "size": "tiles",
        "batch_size": 3,
        "format": "webp",
        "seed": 5,
        "restart": True,
        "progress": False,
    }


@pytest.mark.parametrize(("text", "value"), [("8/255", 8 / 255), ("0.03", 0.03), ("1e-2", 0.01), ("0", 0.0)])
def test_budgets_as_people_write_them(pumice, source, called, tmp_path, text, value):
    assert pumice(source, tmp_path / "out", "--eps", text, "--quiet")[0] == 0
    assert called["eps"] == value


def test_the_names_are_those_of_methods():
    """Written down for --help, which should not import them."""
    assert METHODS == tuple(jobs.METHODS)
    taken = {}
    for name, method in jobs.METHODS.items():
        function = getattr(protect, method.function)
        known = inspect.signature(function).parameters
        taken[name] = {*known, *(_options(function) if "options" in known else ())}
    everywhere = set().union(*taken.values())
    own = {"source", "out", "method", "vram", "format", "restart", "model", "dtype", "device", "quiet"}
    assert {option.name for option in command.params} - own <= everywhere
    assert all(fixed.keys() <= taken[name] for name, fixed in FIXED.items())


def test_every_method_has_the_budget_of_eps(pumice, source, called, tmp_path):
    assert (
        pumice(source, tmp_path / "out", "--method", "photoguard_diffusion", "--eps", "8/255", "--quiet")[0]
        == 0
    )
    assert called["norm"] == "linf" and called["eps"] == 8 / 255


def test_a_memory_chooses_the_batch(pumice, source, called, tmp_path, model, monkeypatch):
    arguments = (source, tmp_path / "out", "--model", model, "--device", "cpu")
    code, shown, errors = pumice(*arguments, "--vram", "8GB")
    assert code == 0, errors
    assert called["batch_size"] >= 1 and called["recompute"] is False and "of 8.0 GB" in shown

    seen = []

    def planned(
        pipe: object, task: str, vram: str, height: int | None, width: int | None, *, surrogate: str
    ) -> Plan:
        seen.append((height, width))
        memory = {"8GB": 8 * 10**9, "1MB": 10**6}[vram]
        sizes = dict.fromkeys(("height", "width", "weights", "fixed", "each", "training"), 10**6)
        return Plan(task, **sizes, device="cpu", dtype=surrogate, memory=memory, batch_size=5, recompute=True)

    monkeypatch.setattr(sys.modules["pumice.protect.plan"], "plan", planned)
    assert pumice(*arguments, "--vram", "8GB", "--quiet")[0] == 0
    assert (called["batch_size"], called["recompute"]) == (5, True)
    assert pumice(*arguments, "--vram", "8GB", "--quiet", "--batch-size", 2)[0] == 0
    assert (called["batch_size"], called["recompute"]) == (2, True), "what is given counts"
    assert "lora" in pumice(*arguments, "--vram", "8GB", "--method", "aspl", "--surrogate", "lora")[1]
    code, _, errors = pumice(*arguments, "--vram", "1MB")
    assert code == 2 and "--vram: got 1MB, which is too little: mist" in errors

    own = 32
    assert {seen.pop() for _ in range(len(seen))} == {(own, 44)}, "30 x 40 pixels, resized"
    Image.new("RGB", (10, 45)).save(source / "tall.png")
    Image.new("RGB", (10, 200)).save(source / "strip.png")
    (source / "broken.png").write_text("")
    pumice(*arguments, "--vram", "8GB", "--quiet")
    assert seen == [(144, own)], "of those that can be done"
    pumice(*arguments, "--vram", "8GB", "--quiet", "--size", "tiles")
    assert seen[1:] == [(None, None)], "the model's own"


def test_warnings_are_lines(pumice, source, monkeypatch, tmp_path):
    def warn(*_: object, **__: object) -> jobs.Outcome:
        for _ in range(2):
            warnings.warn(
                "eps: got 0, pictures\x1b stay as they are", protect.ProtectionWarning, stacklevel=2
            )
        return jobs.Outcome(tmp_path / "manifest.jsonl", (), (), None)

    monkeypatch.setattr(jobs, "protect", warn)
    code, _, errors = pumice(source, tmp_path / "out", "--quiet", "--device", "cpu")
    assert code == 0 and errors.splitlines()[0] == "warning: eps: got 0, pictures  stay as they are"
    assert errors.count("warning") == 1


def test_an_interruption_says_how_to_go_on(pumice, source, monkeypatch, tmp_path):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "protect", interrupt)
    code, _, errors = pumice(source, tmp_path / "out", "--method", "random", "--eps", 0.1)
    assert (
        code == 130
        and "a folder, a training of personalize, a scan or bench goes on where it stopped" in errors
    )


def test_a_full_disk_is_one_line(pumice, source, monkeypatch, tmp_path):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr(sys.modules["pumice.jobs.pictures"], "save_lossless", full)
    code, _, errors = pumice(source, tmp_path / "out", "--method", "random", "--eps", 0.1, "--quiet")
    assert code == 2 and errors.startswith("pumice: OUT: cannot write to") and "No space left" in errors
    assert len(errors.splitlines()) == 1


def test_bad_input_is_one_line_and_exit_code_2(pumice, source, model, tmp_path):
    empty, mine = tmp_path / "empty", tmp_path / "mine"
    empty.mkdir()
    mine.mkdir()
    (mine / "file.txt").write_text("")
    good, out = ("--model", model, "--device", "cpu", "--steps", 1, "--quiet"), tmp_path / "out"
    for arguments, message in [
        ((tmp_path / "nowhere", out, *good), "'IN': Path"),
        ((empty, out, *good), "IN: "),
        ((source, source, *good), "OUT: got"),
        ((source, mine, *good), "OUT: "),
        ((source, mine / "file.txt", *good), "OUT: cannot write to"),
        (
            (source, out, *good, "--eps", 8),
            "'--eps': got 8, expected 0 to 1, in the unit of pictures: 8/255?",
        ),
        ((source, out, *good, "--eps", -1), "'--eps': got -1, expected 0 to 1"),
        ((source, out, *good, "--eps", "nan"), "'--eps': got 'nan'"),
        ((source, out, *good, "--eps", "1/0"), "'--eps': got '1/0'"),
        ((source, out, *good, "--step-size", 2), "'--step-size': got 2"),
        ((source, out, *good, "--steps", 0), "--steps"),
        ((source, out, *good, "--batch-size", 0), "--batch-size"),
        ((source, out, *good, "--method", "ace", "--num-class-images", 0), "--num-class-images"),
        ((source, tmp_path / "out.png", *good), "OUT: got"),
        ((source, out, *good, "--seed", -1), "--seed"),
        ((source, out, *good, "--method", "mits"), "--method"),
        ((source, out, *good, "--format", "jpg"), "--format"),
        ((source, out, *good, "--size", "crop"), "--size"),
        (
            (source, out, *good, "--class-prompt", "a cat"),
            "--class-prompt: got one, which mist does not take",
        ),
        ((source, out, *good, "--target", tmp_path / "gone.png"), "--target: "),
        ((source, out, *good, "--vram", "lots"), "--vram: got 'lots'"),
        ((source, out, *good, "--vram", "8GB", "--size", "native"), "--vram: got 8GB, which --size native"),
        ((source, out, "--method", "random", "--eps", 0.1, "--vram", "8GB"), "--vram: got 8GB, which random"),
        ((source, out, "--method", "random"), "--eps: got none, expected one, which random needs"),
        ((source, out, "--model", tmp_path / "nowhere"), "--model: "),
        ((source,), "OUT"),
    ]:
        code, shown, errors = pumice(*arguments)
        assert code == 2, (arguments, shown, errors)
        lines = [line for line in errors.splitlines() if line and "Loading" not in line]
        assert len(lines) == 1 and lines[0].startswith("pumice: ") and message in lines[0], errors
        assert not out.exists() or not list(out.iterdir()), (arguments, "nothing half-written")


def test_folders_are_looked_at_before_the_model(pumice, source, tmp_path, monkeypatch):
    def slow(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(sys.modules["pumice.cli.protect"], "open_model", slow)
    (tmp_path / "empty").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file.txt").write_text("")
    for arguments, name in (
        ((tmp_path / "empty", tmp_path / "out"), "IN"),
        ((source, source), "OUT"),
        ((source, tmp_path / "out.webp"), "OUT"),
        ((source, tmp_path / "mine"), "OUT"),
        ((source, tmp_path / "mine/file.txt"), "OUT"),
    ):
        code, _, errors = pumice(*arguments)
        assert code == 2 and errors.startswith(f"pumice: {name}: "), errors
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_job_is_refused_until_restart(pumice, source, tmp_path):
    arguments = (source, tmp_path / "out", "--method", "random", "--quiet")
    assert pumice(*arguments, "--eps", "8/255")[0] == 0
    code, _, errors = pumice(*arguments, "--eps", "4/255")
    assert code == 2 and "OUT: " in errors and "eps was 0.03137, is 0.01569" in errors
    assert pumice(*arguments, "--eps", "4/255", "--restart")[0] == 0
    lines = (tmp_path / "out/manifest.jsonl").read_text().splitlines()
    assert {json.loads(line)["max_change"] for line in lines[1:]} == {4}
