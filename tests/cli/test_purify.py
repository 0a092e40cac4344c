"""`pumice purify`: what it says, its exit codes, and that options reach the method under its names."""

import inspect
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image

from pumice import cli, jobs, purify, testbed
from pumice.cli.purify import METHODS, OPTIMIZED
from pumice.jobs.methods import _options
from pumice.purify import filters
from pumice.testbed import tiny_pipeline

command = sys.modules["pumice.cli.purify"].purify


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("denoiser")
    unet = UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(path)
    return path


@pytest.fixture
def pumice(monkeypatch, capsys):
    """Run `pumice purify` in this process; returns exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pumice", "purify", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        return exit_.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    for number, name in enumerate(("a.jpg", "sub/b.png")):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


@pytest.fixture
def called(monkeypatch):
    """What `jobs.purify` is called with, and does not do."""
    seen = {}

    def record(*arguments: object, **settings: object) -> jobs.Outcome:
        seen.update(settings, arguments=arguments)
        return jobs.Outcome(Path("manifest.jsonl"), (), (), None)

    monkeypatch.setattr(jobs, "purify", record)
    return seen


def test_a_filter_and_a_model(pumice, source, denoiser, tmp_path):
    (source / "bad\x1b[31m.png").write_text("")
    out = tmp_path / "deep" / "out"
    code, shown, errors = pumice(source, out, "--method", "jpeg", "--quality", 40)
    assert code == 1 and "embedded model" not in errors
    assert "failed: bad [31m.png: cannot be read" in errors and "\x1b" not in shown
    rows = dict(line.split("  ", 1) for line in shown.splitlines()[:-1])
    assert [value.strip() for value in rows.values()][:3] == ["2", "1", "0"]
    assert shown.splitlines()[-1] == f"manifest: {(out / 'manifest.jsonl').resolve()}"
    expected = np.asarray(filters.jpeg(source / "sub/b.png", quality=40))
    assert (np.asarray(Image.open(out / "sub/b.png")) == expected).all()

    (source / "bad\x1b[31m.png").unlink()
    options = ("--t", 2, "--iterations", 1, "--device", "cpu", "--quiet", "--format", "webp")
    code, shown, errors = pumice(source, tmp_path / "pure", "--model", denoiser, *options)
    assert code == 0 and len(shown.splitlines()) == 1, "gridpure, by default"
    assert errors.strip() == "" and (tmp_path / "pure/sub/b.webp").is_file()
    code, _, errors = pumice(source, tmp_path / "pure", "--model", denoiser, *options, "--gamma", 0.5)
    assert code == 2 and "OUT: " in errors and "gamma was 0.1, is 0.5" in errors
    code, *_ = pumice(source, tmp_path / "pure", "--model", denoiser, *options, "--gamma", 0.5, "--restart")
    assert code == 0


def test_options_are_arguments(pumice, source, denoiser, called, tmp_path):
    code, _, errors = pumice(
        *(source, tmp_path / "out", "--model", denoiser, "--device", "cpu", "--dtype", "float16"),
        *("--t", 7, "--iterations", 3, "--gamma", 0.2, "--sampler", "dpmsolver++", "--steps", 5),
        *("--variant", "ds", "--size", "native", "--batch-size", 3, "--seed", 5, "--restart", "--quiet"),
    )
    assert code == 0, errors
    model, *rest = called.pop("arguments")
    assert model.dtype == torch.float16 and rest == [source, tmp_path / "out", "gridpure"]
    assert called == {
        "t": 7,
        "iterations": 3,
        "gamma": 0.2,
        "sampler": "dpmsolver++",
        "num_inference_steps": 5,
        "variant": "ds",
        "size": "native",
        "batch_size": 3,
        "format": "png",
        "seed": 5,
        "restart": True,
        "progress": False,
    }
    pumice(source, tmp_path / "out", "--method", "median", "--size", 5, "--quiet")
    assert called["size"] == 5 and called["arguments"][0] is None


def test_each_method_has_its_model(pumice, source, called, tmp_path, monkeypatch):
    """Embedded by default, which is said."""
    opened = []
    monkeypatch.setattr(
        sys.modules["pumice.cli.purify"], "open_purifier", lambda *what: opened.append(what) or what
    )
    for method, kind in (("ddspure", "denoiser"), ("impress", "pipe"), ("codesr", "upscaler")):
        code, _, errors = pumice(source, tmp_path / "out", "--method", method, "--steps", 9, "--quiet")
        assert code == 0 and "the embedded model is for trying out" in errors
        assert opened.pop() == (kind, "testbed", "float32", None)
        assert called["steps" if method == "impress" else "num_inference_steps"] == 9
    pumice(source, tmp_path / "out", "--method", "pdm_pure", "--model", "one", "--upscaler", "two", "--quiet")
    assert [what[:2] for what in opened] == [("denoiser", "one"), ("upscaler", "two")]
    assert called["upscaler"][1] == "two"


def test_a_backend_runs_the_model(pumice, source, denoiser, called, tmp_path, monkeypatch):
    tiny_pipeline("sd1").save_pretrained(tmp_path / "model")
    run = []
    monkeypatch.setattr(
        sys.modules["pumice.models.onnx"], "onnxruntime", lambda model: run.append(model) or "run elsewhere"
    )
    for method, model in (("gridpure", denoiser), ("latent_diffpure", tmp_path / "model")):
        arguments = (
            source,
            tmp_path / "out",
            "--method",
            method,
            "--model",
            model,
            "--device",
            "cpu",
            "--quiet",
        )
        code, _, errors = pumice(*arguments, "--backend", "onnxruntime")
        assert code == 0, errors
        assert called["arguments"][0] == "run elsewhere"
        pumice(*arguments)
        assert called["arguments"][0] != "run elsewhere"
    assert [type(model).__name__ for model in run] == ["PixelDenoiser", "StableDiffusion"]


def test_the_models_are_opened_as_they_are_named(denoiser, tmp_path, monkeypatch):
    open_purifier = sys.modules["pumice.cli.options"].open_purifier
    tiny_pipeline("sd1").save_pretrained(tmp_path)
    assert open_purifier("pipe", str(tmp_path), "bfloat16", "cpu").dtype == torch.bfloat16
    assert open_purifier("denoiser", str(denoiser), "bfloat16", "cpu").dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"^upscaler: .* is a DDPMPipeline"):
        open_purifier("upscaler", str(denoiser), "float32", "cpu")
    embedded = DDPMPipeline.from_pretrained(denoiser)
    for kind in ("denoiser", "upscaler"):
        monkeypatch.setattr(testbed, f"load_{kind}", lambda: embedded)
        assert open_purifier(kind, "testbed", "bfloat16", "cpu").unet.dtype == torch.bfloat16


def test_the_names_are_those_of_methods():
    """Written down for --help, which should not import them."""
    assert METHODS == tuple(jobs.PURIFIERS)
    taken = {}
    for name, method in jobs.PURIFIERS.items():
        function = getattr(purify if method.model else filters, name)
        known = inspect.signature(function).parameters
        taken[name] = {*known, *(_options(function) if "options" in known else ())}
    own = {
        "source",
        "out",
        "method",
        "steps",
        "format",
        "restart",
        "model",
        "dtype",
        "device",
        "quiet",
        "backend",
    }
    assert {option.name for option in command.params} - own <= set().union(*taken.values())
    assert {name for name in taken if "steps" in taken[name]} == set(OPTIMIZED)


def test_bad_input_is_one_line_and_exit_code_2(pumice, source, denoiser, tmp_path):
    out, empty = tmp_path / "out", tmp_path / "empty"
    empty.mkdir()
    good = ("--model", denoiser, "--device", "cpu", "--quiet")
    for arguments, message in [
        ((tmp_path / "nowhere", out, *good), "'IN': Path"),
        ((empty, out, *good), "IN: "),
        ((source, source, *good), "OUT: got"),
        ((source, out, *good, "--quality", 90), "--quality: got one, which gridpure does not take"),
        ((source, out, "--method", "jpeg", "--steps", 3), "--steps: got one, which jpeg does not take"),
        ((source, out, "--method", "jpeg", "--quality", 0), "'--quality': 0"),
        ((source, out, "--method", "median", "--size", "x", "--quiet"), "'--size': got 'x'"),
        ((source, out, "--method", "median", "--size", "native"), "--size: got 'native', expected pixels"),
        ((source, out, "--method", "jpeg", "--model", denoiser), "--model: got"),
        (
            (source, out, "--method", "jpeg", "--device", "cpu"),
            "--device: got 'cpu', which jpeg does not take",
        ),
        ((source, out, "--method", "jpeg", "--dtype", "float16"), "--dtype: got 'float16', which jpeg"),
        ((source, out, "--method", "jpeg", "--backend", "torch"), "--backend: got 'torch', which jpeg"),
        (
            (source, out, "--method", "codesr", "--backend", "onnxruntime"),
            "--backend: got onnxruntime, which",
        ),
        (
            (source, out, "--method", "impress", "--backend", "onnxruntime"),
            "--backend: got onnxruntime, which",
        ),
        ((source, out, *good, "--gamma", 2), "--gamma: got 2.0, expected 0 to 1"),
        ((source, out, *good, "--variant", "odd"), "--variant: got 'odd'"),
        ((source, out, *good, "--method", "mits"), "--method"),
        ((source, out, *good, "--upscaler", denoiser), "--upscaler: "),
        ((source, out, "--model", empty), "--model: "),
        ((source, out, "--model", empty, "--method", "impress"), "--model: "),
        ((source, out, "--model", empty, "--method", "codesr"), "--model: "),
    ]:
        code, shown, errors = pumice(*arguments)
        assert code == 2, (arguments, shown, errors)
        lines = [line for line in errors.splitlines() if line and "Loading" not in line]
        assert len(lines) == 1 and lines[0].startswith("pumice: ") and message in lines[0], errors
        assert not out.exists() or not list(out.iterdir()), (arguments, "nothing half-written")
