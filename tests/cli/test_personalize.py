"""`pumice personalize`: what it says, what reaches the job, and several processes."""

import inspect
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pumice import cli, jobs, personalize
from pumice.cli.options import named_as_options
from pumice.personalize import NEGATIVE_PROMPT, NOISE_PHRASE, PersonalizationWarning, Personalized
from pumice.testbed import tiny_pipeline

command = sys.modules["pumice.cli.personalize"].personalize
WORD = ("--method", "textual_inversion", "--placeholder-token", "<sks>", "--initializer-token", "photo")
PROMPTS = ("--prompt", "a photo of a sks creature", "--class-prompt", "a photo of a creature")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_pipeline("sd1").save_pretrained(path)
    return path


@pytest.fixture
def pumice(monkeypatch, capsys):
    """Run `pumice personalize` in this process; returns exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pumice", "personalize", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        return exit_.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    for number, name in enumerate(("a.jpg", "b.png")):
        pixels = np.random.default_rng(number).integers(0, 256, (36, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


@pytest.fixture
def called(monkeypatch):
    """What `jobs.personalize` is called with, and does not do."""
    seen = {}

    def record(*arguments: object, **settings: object) -> Personalized:
        seen.update(settings, arguments=arguments)
        told = {"pictures": ["a.png"], "purifiers": [], "prompt": "a photo of a sks\x1b creature"}
        return Personalized(None, torch.ones(3), told, settings.get("noise_phrase"), lambda folder: None)

    monkeypatch.setattr(jobs, "personalize", record)
    return seen


def fast(model: Path) -> tuple[object, ...]:
    return (*PROMPTS, "--model", model, "--device", "cpu", "--steps", 2, "--samples", 0)


def test_one_command_from_a_folder_to_a_model(pumice, source, model, tmp_path):
    """Class pictures are given, as drawing them takes a hundred passes."""
    out, more = tmp_path / "mine", ("--class-images", source, "--learning-rate", 1e-4)
    code, shown, errors = pumice(
        source, out, *fast(model), *more, "--purify", "jpeg, median", "--decouple", "--mode", "lora"
    )
    assert code == 0, errors
    rows = dict(line.split("  ", 1) for line in shown.splitlines()[:-1])
    rows = {name: value.strip() for name, value in rows.items()}
    assert rows.pop("loss").endswith("at last")
    assert rows == {
        "pictures": "2, purified by jpeg, median",
        "steps": "2",
        "draw with": f"a photo of a sks creature, without {NOISE_PHRASE}",
        "and against": NEGATIVE_PROMPT,
    }
    assert shown.splitlines()[-1] == f"model: {out.resolve()}"
    assert (out / "pytorch_lora_weights.safetensors").is_file() and (out / "purified/b.png").is_file()
    assert json.loads((out / "personalization.json").read_text())["settings"]["mode"] == "lora"
    assert "embedded model" not in errors

    code, shown, errors = pumice(source, tmp_path / "plain", *fast(model), *more, "--quiet")
    assert code == 0 and len(shown.splitlines()) == 1 and not errors.strip()
    assert not (tmp_path / "plain/purified").exists()


def test_options_are_arguments(pumice, source, model, called, tmp_path):
    code, shown, errors = pumice(
        *(source, tmp_path / "out", *PROMPTS, "--model", model, "--device", "cpu", "--dtype", "bfloat16"),
        *("--class-images", source, "--num-class-images", 7, "--mode", "lora", "--purify", "jpeg,tvm"),
        *("--noise-phrase", "xx pattern", "--steps", 9, "--learning-rate", 0.5, "--batch-size", 3),
        *("--rank", 2, "--no-train-text-encoder", "--samples", 5, "--skip-broken", "--restart"),
        *("--checkpoint", tmp_path / "kept", "--checkpoint-every", 11, "--seed", 6),
    )
    assert code == 0, errors
    assert "\x1b" not in shown and "sks  creature, without xx pattern" in shown
    opened, *rest = called.pop("arguments")
    assert opened().dtype == torch.bfloat16 and rest == [source, tmp_path / "out", "dreambooth"]
    assert called == {
        "prompt": "a photo of a sks creature",
        "class_prompt": "a photo of a creature",
        "class_images": source,
        "num_class_images": 7,
        "mode": "lora",
        "purifiers": ["jpeg", "tvm"],
        "noise_phrase": "xx pattern",
        "steps": 9,
        "learning_rate": 0.5,
        "batch_size": 3,
        "rank": 2,
        "train_text_encoder": False,
        "samples": 5,
        "skip_broken": True,
        "restart": True,
        "checkpoint": tmp_path / "kept",
        "checkpoint_every": 11,
        "seed": 6,
        "progress": True,
    }
    called.clear()
    word = ("--placeholder-token", "<sks>", "--initializer-token", "creature", "--num-vectors", 2)
    pumice(source, tmp_path / "out", *PROMPTS, "--mode", "full", "--model", model, "--quiet")
    assert called["mode"] == "fp32_master"
    called.clear()
    pumice(source, tmp_path / "out", "--method", "textual_inversion", *word, "--model", model, "--quiet")
    given = {name: called[name] for name in ("placeholder_token", "initializer_token", "num_vectors")}
    assert list(given.values()) == ["<sks>", "creature", 2]
    assert called["arguments"][3] == "textual_inversion" and not {"prompt", "mode"} & called.keys()


def test_embedded_purifiers_are_for_the_embedded_model(pumice, source, model, called, tmp_path, monkeypatch):
    opened = []
    module = sys.modules["pumice.cli.personalize"]
    monkeypatch.setattr(module, "open_purifier", lambda *what: opened.append(what[:2]) or what[1])
    monkeypatch.setattr(module, "open_model", lambda *what: None)
    both = ("--purify", "gridpure,codesr,jpeg", "--quiet")
    code, _, errors = pumice(source, tmp_path / "out", *PROMPTS, *both)
    assert code == 0 and "the embedded model is for trying out" in errors
    assert not opened, "which is the job's"
    assert (called["denoiser"](), called["upscaler"]()) == ("testbed", "testbed")
    assert opened == [("denoiser", "testbed"), ("upscaler", "testbed")]
    called.clear()
    opened.clear()
    pumice(source, tmp_path / "out", *PROMPTS, "--model", model, *both, "--upscaler", "mine")
    assert called["upscaler"]() == "mine" and "denoiser" not in called
    assert opened == [("upscaler", "mine")]


def test_the_names_are_those_of_methods():
    """Written down for --help, which should not import them."""
    methods = {name: inspect.signature(getattr(personalize, name)).parameters for name in jobs.TRAININGS}
    choices = {option.name: getattr(option.type, "choices", None) for option in command.params}
    assert list(choices["method"]) == list(jobs.TRAININGS)
    job = inspect.signature(jobs.personalize).parameters
    own = {"purify", "decouple", "model", "dtype", "device", "quiet"}
    assert choices.keys() - own <= set(job).union(*methods.values())
    (help,) = [option.help for option in command.params if option.name == "decouple"]
    assert f'"{NOISE_PHRASE}"' in help


def test_warnings_are_lines_and_an_interruption_says_how_to_go_on(
    pumice, source, model, tmp_path, monkeypatch
):
    def interrupt(*_: object, **__: object) -> None:
        for _ in range(2):
            warnings.warn("images: got 1 picture\x1b", PersonalizationWarning, stacklevel=2)
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "personalize", interrupt)
    code, _, errors = pumice(source, tmp_path / "out", *fast(model), "--quiet")
    lines = [line for line in errors.splitlines() if line]
    assert code == 130 and lines[0] == "warning: images: got 1 picture " and len(lines) == 2
    assert "a training" in lines[1] and "goes on where it stopped" in lines[1]


def test_bad_input_is_one_line_and_exit_code_2(pumice, source, model, tmp_path):
    out, empty, broken = tmp_path / "out", tmp_path / "empty", tmp_path / "broken"
    empty.mkdir()
    broken.mkdir()
    (broken / "bad.png").write_text("")
    good = (*fast(model), "--quiet")
    for arguments, message in [
        ((tmp_path / "nowhere", out, *good), "'IN': Path"),
        ((empty, out, *good), "IN: "),
        ((broken, out, *good), "IN: "),
        ((source, empty, *good), "OUT: "),
        ((source, out, *good[4:]), "--prompt: got none, expected one, which dreambooth needs"),
        ((source, out, *good, "--noise-phrase", "sks"), "--noise-phrase: got 'sks'"),
        ((source, out, *good, "--num-vectors", 2), "--num-vectors: got one, which dreambooth does not take"),
        ((source, out, *good, "--purify", "jpg"), "--purify: got 'jpg'"),
        ((source, out, *good, "--purify", "gridpure"), "--denoiser: got none, expected one"),
        ((source, out, *good, "--purify", "gridpure", "--denoiser", empty), "--denoiser: "),
        ((source, out, *good, "--purify", ""), "--purify: got ''"),
        ((source, out, *good, "--denoiser", empty), "--denoiser: got one, expected a purifier"),
        ((source, out, *good, "--purify", "jpeg", "--upscaler", empty), "--upscaler: got one, expected"),
        ((source, out, *good, "--class-images", empty), "--class-images: "),
        ((source, out, *good, "--class-images", broken), "--class-images[0]: "),
        (
            (source, out, *PROMPTS[:2], *good[4:], "--class-images", source),
            "--class-prompt: got none, expected one with --class-images",
        ),
        (
            (source, out, *PROMPTS[:2], *good[4:], "--decouple"),
            "--class-prompt: got none, expected one with a --",
        ),
        ((source, out, *good, "--learning-rate", -1), "--learning-rate: got -1"),
        ((source, out, *good, "--noise-phrase", ""), "--noise-phrase: got ''"),
        (
            (source, out, *WORD, *good[4:], "--decouple"),
            "--decouple: got one, which textual_inversion does not take",
        ),
        ((source, out, *good, "--rank", 2), "--rank: got 2, which is of --mode lora"),
        ((source, out, *good, "--mode", "full", "--rank", 2), "--rank: got 2, which is of --mode lora"),
        ((source, out, *good, "--device", "abacus"), "--device: 'abacus'"),
        ((source, out, *good, "--checkpoint", out / "x"), "--checkpoint: got"),
        ((source, out, *good, "--mode", "fp8"), "--mode"),
        ((source, out, *good, "--samples", -1), "--samples"),
        ((source, out, *PROMPTS, "--model", empty), "--model: "),
    ]:
        code, shown, errors = pumice(*arguments)
        assert code == 2, (arguments, shown, errors)
        lines = [line for line in errors.splitlines() if line and "Loading" not in line]
        assert len(lines) == 1 and lines[0].startswith("pumice: ") and message in lines[0], errors
        assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "empty", "in"]


def test_the_folder_is_looked_at_before_the_model(pumice, source, tmp_path, monkeypatch):
    def slow(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(sys.modules["pumice.cli.personalize"], "open_model", slow)
    (tmp_path / "there").mkdir()
    (source / "bad.png").write_text("")
    for arguments, name in (((source, tmp_path / "there"), "OUT"), ((source, tmp_path / "out"), "IN")):
        code, _, errors = pumice(*arguments, *PROMPTS)
        assert code == 2 and errors.startswith(f"pumice: {name}: "), errors


def test_another_training_is_refused_until_restart(pumice, source, model, tmp_path):
    kept = ("--mode", "lora", "--checkpoint", tmp_path / "kept", "--quiet", "--class-images", source)
    assert pumice(source, tmp_path / "one", *fast(model), *kept)[0] == 0
    arguments = (source, tmp_path / "two", *fast(model), *kept, "--learning-rate", 1e-4)
    code, _, errors = pumice(*arguments)
    assert code == 2 and errors.startswith("pumice: --checkpoint: "), errors
    assert "--learning-rate was 0.0005, is 0.0001; choose another folder, or --restart" in errors
    assert pumice(*arguments, "--restart")[0] == 0


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("images[2]: got nan", "IN[2]: got nan"),
        ("class_images[0]: 'a class_prompt' is gone", "--class-images[0]: 'a class_prompt' is gone"),
        ("steps: a float32 pipeline, or mode='lora'", "--steps: a float32 pipeline, or --mode 'lora'"),
        ("batch_size: in /a/class_prompt, other_word", "batch_size: in /a/class_prompt, other_word"),
        (
            "prompt: the subject's prompt, class_prompt 'x'",
            "--prompt: the subject's prompt, --class-prompt 'x'",
        ),
        (
            "out: of another; choose another folder, or restart",
            "OUT: of another; choose another folder, or --restart",
        ),
    ],
)
def test_errors_speak_of_options(said, shown):
    names = ("prompt", "class_prompt", "class_images", "mode", "steps")
    with pytest.raises(ValueError, match=f"^{re.escape(shown)}$"), named_as_options(names):
        raise ValueError(said)


def test_two_processes_make_one_model(pumice, source, model, tmp_path):
    """The first one alone writes and prints; what is learned is that of one process."""
    settings = [*fast(model), "--mode", "lora", "--purify", "jpeg", "--learning-rate", 1e-4]
    settings = [*map(str, settings), "--class-images", str(source)]
    code, _, errors = pumice(source, tmp_path / "one", *settings)
    assert code == 0, errors
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "pumice.cli"]
    done = subprocess.run(
        [sys.executable, *launch, "personalize", source, tmp_path / "two", *settings],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("model: ") == 1 and done.stdout.count("pictures") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "one", "two"]
    one, two = (load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=1e-5, rtol=0)
