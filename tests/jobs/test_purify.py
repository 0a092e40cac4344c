"""Folders that are purified: by which method and model, and what a job depends on."""

import inspect
import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image

from pumice import jobs, purify
from pumice.io import Picture
from pumice.jobs import methods, networks
from pumice.purify import filters
from pumice.testbed import tiny_pipeline

FAST = {"t": 2, "iterations": 1}


def denoiser(seed: int = 0) -> DDPMPipeline:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DModel(
            sample_size=16,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
        )
    return DDPMPipeline(unet.eval(), DDPMScheduler())


@pytest.fixture
def source(tmp_path) -> Path:
    """Pictures that are told apart by their widths."""
    for number, name in enumerate(("a.png", "b.jpg", "sub/c.png")):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 20 + number, 3), dtype=np.uint8)
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "in" / name)
    return tmp_path / "in"


def pixels(path: Path) -> torch.Tensor:
    return Picture.open(path).pixels


def test_a_filter_of_each_picture(tmp_path, source):
    (source / "broken.png").write_bytes(b"")
    out = tmp_path / "out"
    found = jobs.purify(None, source, out, "jpeg", quality=30)
    assert (found.done, found.failed) == (3, 1)
    for line in found.lines:
        if line["status"] == "done":
            expected = filters.jpeg(source / line["source"], quality=30)
            assert torch.equal(pixels(out / line["output"]), Picture.open(expected).pixels)
            assert line["max_change"] > 8, "what purifies has no budget"
    job = json.loads((out / "manifest.jsonl").read_text().splitlines()[0])["job"]
    assert job["method"] == "jpeg" and job["quality"] == 30
    with pytest.raises(ValueError, match="quality was 30, is 75"):
        jobs.purify(None, source, out, "jpeg")
    again = jobs.purify(None, source, out, "jpeg", quality=30)
    assert again.done == 3 and again.seconds is None


def test_a_purifier_by_its_model(tmp_path, source):
    """Random numbers are of a picture's path; a chunk is one batch, and the same but for rounding."""
    model = denoiser()
    jobs.purify(model, source, tmp_path / "one", "gridpure", **FAST)
    jobs.purify(model, source, tmp_path / "three", "gridpure", **FAST, chunk_size=3)
    jobs.purify(model, source / "a.png", tmp_path / "alone", "gridpure", **FAST)
    jobs.purify(model, source / "a.png", tmp_path / "seed", "gridpure", **FAST, seed=1)
    for name in ("a.png", "b.png", "sub/c.png"):
        one, three = (pixels(tmp_path / out / name) for out in ("one", "three"))
        assert (one.int() - three.int()).abs().max() <= 1 and not torch.equal(one[0], one[1])
    first, alone, other = (pixels(tmp_path / out / "a.png") for out in ("one", "alone", "seed"))
    assert torch.equal(first, alone) and not torch.equal(first, other)


def test_the_model_is_part_of_the_job(tmp_path, source):
    out = tmp_path / "out"
    jobs.purify(denoiser(), source, out, "diffpure", t=2)
    assert jobs.purify(networks.load("denoiser", denoiser()), source, out, "diffpure", t=2).seconds is None
    denoiser().save_pretrained(tmp_path / "model")
    assert jobs.purify(tmp_path / "model", source, out, "diffpure", t=2).seconds is None, "wherever it is"
    fixed = denoiser()
    fixed.scheduler = DDPMScheduler(variance_type="fixed_large")
    for other in (denoiser(1), fixed):
        with pytest.raises(ValueError, match="another job: model was"):
            jobs.purify(other, source, out, "diffpure", t=2)


def test_a_second_model_is_a_setting(tmp_path, source, monkeypatch):
    def both(images: Any, denoiser: Any, upscaler: Any = None, *, t: int = 1, seed: Any = 0) -> Any:
        assert isinstance(denoiser, networks.PixelDenoiser) and upscaler in (None, "opened 1", "opened 2")
        return [image.copy() for image in images]

    load, told = networks.load, networks.told

    def opened(kind: str, given: Any) -> Any:
        return f"opened {given}" if kind == "upscaler" else load(kind, given)

    def named(*found: Any) -> str:
        return found[0] if isinstance(found[0], str) else told(*found)

    monkeypatch.setattr(purify, "pdm_pure", both)
    monkeypatch.setattr(networks, "load", opened)
    monkeypatch.setattr(networks, "told", named)
    out, model = tmp_path / "out", denoiser()
    jobs.purify(model, source, out, "pdm_pure", upscaler=1)
    assert jobs.purify(model, source, out, "pdm_pure", upscaler=1).seconds is None
    for other in ({"upscaler": 2}, {}):
        with pytest.raises(ValueError, match="another job: upscaler was"):
            jobs.purify(model, source, out, "pdm_pure", **other)
    jobs.purify(model, source, tmp_path / "alone", "pdm_pure")


def test_an_upscaler_and_a_pipeline_are_told_apart_by_their_weights():
    one, same, other = tiny_pipeline("sd1"), tiny_pipeline("sd1"), tiny_pipeline("sd1")
    with torch.no_grad():
        other.vae.decoder.conv_in.weight[0, 0, 0, 0] += 1
    assert networks.told(one) == networks.told(same) != networks.told(other)
    other = tiny_pipeline("sd1")
    other.scheduler = type(other.scheduler).from_config(other.scheduler.config, beta_end=0.013)
    assert networks.told(one) != networks.told(other)


def test_a_perturbation_is_no_budget(tmp_path, source, monkeypatch):
    def careless(images: Any, denoiser: Any, *, eps: float = 11 / 255) -> Any:
        return [image.point(lambda value: 255 - value) for image in images]

    monkeypatch.setattr(purify, "ddspure", careless)
    found = jobs.purify(denoiser(), source, tmp_path / "out", "ddspure", eps=1.5)
    assert found.done == 3


def test_bad_input_is_refused_before_any_work(tmp_path, source):
    out = tmp_path / "out"
    for method, model, settings, message in (
        ("mist", None, {}, "method: got 'mist', expected one of adverse_cleaner, bilateral"),
        ("jpeg", None, {"t": 3}, "t: got one, which jpeg does not take"),
        ("gridpure", denoiser(), {"denoiser": denoiser()}, "denoiser: got one, which gridpure does not take"),
        ("gridpure", denoiser(), {"images": []}, "images: got one"),
        ("gridpure", tmp_path, {}, "denoiser: .* is not a diffusers folder"),
        ("jpeg", None, {"format": "jpg"}, "format: got 'jpg'"),
        ("jpeg", None, {"chunk_size": 0}, "chunk_size: got 0"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            jobs.purify(model, source, out, method, **settings)
    for method, kind in (("gridpure", "denoiser"), ("codesr", "upscaler")):
        with pytest.raises(TypeError, match=f"^{kind}: got a NoneType"):
            jobs.purify(None, source, out, method)
    assert not out.exists()
    with pytest.raises(ValueError, match=r"^gamma: got 2"):
        jobs.purify(denoiser(), source, out, "gridpure", gamma=2)
    assert not list(out.iterdir())


def test_the_table_is_of_what_there_is():
    assert list(jobs.PURIFIERS) == sorted(jobs.PURIFIERS)
    for name, method in jobs.PURIFIERS.items():
        assert name == method.function and not method.per_subject
        function = getattr(purify if method.model else filters, name)
        taken = list(inspect.signature(function).parameters)
        assert taken[0] == "images"
        model = taken[1] if taken[1:] and taken[1] in get_args(networks.Kind) else None
        assert model == method.model, name
        assert method.model is None or "seed" in taken or "seed" in methods._options(function)
    there = {name for name in purify.__all__ if inspect.isfunction(getattr(purify, name))}
    there |= set(filters.__all__) - {"compose"}
    assert there - {"laplacian_pyramid"} == set(jobs.PURIFIERS)
