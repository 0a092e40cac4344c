"""From a folder to a model: what is learned and written, and how a run goes on after any end."""

import errno
import fcntl
import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from pumice import jobs, models, personalize
from pumice.io import Picture
from pumice.personalize import PersonalizationWarning
from pumice.purify import filters
from pumice.testbed import tiny_pipeline

job = sys.modules["pumice.jobs.personalize"]

NAMES = {"prompt": "a photo of a sks creature"}
OF_CLASS = {"class_prompt": "a photo of a creature"}
FAST: dict[str, Any] = {**NAMES, "steps": 2, "learning_rate": 1e-4, "samples": 0}


@pytest.fixture(scope="module")
def pipe():
    return models.load(tiny_pipeline("sd1"))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Drawings of two steps, where a hundred are usual."""
    monkeypatch.setattr(personalize, "sample", functools.partial(personalize.sample, num_inference_steps=2))


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "in"
    (folder / "below").mkdir(parents=True)
    for number, name in enumerate(("a.png", "b.jpg", "c.webp", "below/d.png")):
        pixels = np.random.default_rng(number).integers(0, 256, (36, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    (folder / ".hidden.png").write_bytes(b"")
    (folder / "link.png").symlink_to(folder / "a.png")
    return folder


def weights(pipe: Any) -> list[torch.Tensor]:
    return [*pipe.unet.state_dict().values(), *pipe.text_encoder.state_dict().values()]


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_becomes_a_model(tmp_path, pipe, source):
    before, out = models.fingerprint(pipe), tmp_path / "deep" / "mine"
    found = jobs.personalize(
        pipe,
        source,
        out,
        **FAST | OF_CLASS | {"samples": 2},
        purifiers=["jpeg", "median"],
        class_images=source,
        noise_phrase=personalize.NOISE_PHRASE,
        seed=3,
    )
    assert left(out.parent) == ["mine"], "and nothing beside it"
    assert models.fingerprint(pipe) == before

    kept = sorted((out / "purified").iterdir())
    assert [path.name for path in kept] == ["a.png", "b.png", "c.png"], "right in the folder, and pictures"
    for path, name in zip(kept, ("a.png", "b.jpg", "c.webp"), strict=True):
        expected = Picture.open(filters.median(filters.jpeg(source / name)))
        assert torch.equal(Picture.open(path).pixels, expected.pixels)

    alone = personalize.dreambooth(
        pipe,
        kept,
        **NAMES | OF_CLASS,
        class_images=[source / name for name in ("a.png", "b.jpg", "c.webp")],
        steps=2,
        learning_rate=1e-4,
        noise_phrase=personalize.NOISE_PHRASE,
        seed=3,
    )
    assert all(map(torch.equal, weights(found.pipe), weights(alone.pipe))), "what is kept is what was learned"
    loaded = StableDiffusionPipeline.from_pretrained(out)
    assert all(map(torch.equal, weights(found.pipe), weights(loaded)))

    told = json.loads((out / "personalization.json").read_text())
    assert told["noise_phrase"] == personalize.NOISE_PHRASE
    assert told["settings"]["purifiers"] == ["jpeg", "median"]
    assert told["settings"]["pictures"] == ["a.png", "b.png", "c.png"]
    drawn = personalize.sample(found, NAMES["prompt"], num_images=2, seed=3)[0]
    sheet = np.asarray(Image.open(out / "samples.png")).transpose(2, 0, 1)
    for picture in drawn.numpy():
        windows = np.lib.stride_tricks.sliding_window_view(sheet, picture.shape)[0]
        assert (windows == picture).all(axis=(2, 3, 4)).any(), "as `sample` draws them"


def test_a_lora_and_a_word(tmp_path, pipe, source):
    with pytest.warns(PersonalizationWarning, match="got 1 picture"):
        jobs.personalize(pipe, source / "a.png", tmp_path / "lora", **FAST, mode="lora")
    assert left(tmp_path / "lora") == ["personalization.json", "pytorch_lora_weights.safetensors"]
    word = {"placeholder_token": "<sks>", "initializer_token": "photo", "steps": 1, "samples": 1}
    found = jobs.personalize(pipe, source, tmp_path / "word", "textual_inversion", **word)
    assert left(tmp_path / "word") == ["learned_embeds.safetensors", "personalization.json", "samples.png"]
    assert found.settings["prompt"] == "a photo of <sks>"


def test_goes_on_where_it_was_interrupted(tmp_path, pipe, source, monkeypatch):
    """At a purifier, in the training, at drawing, and at the last write."""
    settings = FAST | {"purifiers": ["jpeg", "median"], "steps": 4, "checkpoint_every": 2, "samples": 1}
    whole = jobs.personalize(pipe, source, tmp_path / "whole", **settings)
    seen: list[str] = []

    def watch(owner: Any, name: str, at: int) -> None:
        """Interrupted the `at`-th time, and never again."""
        real, count = getattr(owner, name), 0

        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            seen.append(name)
            if count == at:
                raise KeyboardInterrupt
            return real(*arguments, **options)

        counted.__wrapped__ = real  # its signature
        monkeypatch.setattr(owner, name, counted)

    watch(filters, "median", 2)
    watch(sys.modules["pumice.training.steps"], "_backward", 4)
    watch(personalize, "sample", 1)
    watch(Path, "rename", 2)  # that of `Personalized.save` is the first
    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            jobs.personalize(pipe, source, tmp_path / "part", **settings)
        assert left(tmp_path) == [".part.training", "in", "whole"]
    found = jobs.personalize(pipe, source, tmp_path / "part", **settings)
    assert left(tmp_path) == ["in", "part", "whole"]
    assert all(map(torch.equal, weights(found.pipe), weights(whole.pipe)))
    assert torch.equal(found.losses, whole.losses)
    assert seen.count("median") == 3 + 1 and seen.count("_backward") == 4 + 2, "what is done is not repeated"
    for name in ("samples.png", "purified/c.png"):
        assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_folder_to_go_on_from(tmp_path, pipe, source):
    kept = tmp_path / "kept"
    jobs.personalize(pipe, source, tmp_path / "one", **FAST, checkpoint=kept, purifiers=["jpeg"])
    assert left(kept) == ["purified", "training"]
    (kept / "of the user").write_text("")
    other = FAST | {"learning_rate": 2e-4, "checkpoint": kept, "purifiers": ["jpeg"]}
    with pytest.raises(ValueError, match=r"^checkpoint: .*learning_rate was 0.0001, is 0.0002"):
        jobs.personalize(pipe, source, tmp_path / "two", **other)
    with pytest.raises(
        ValueError, match=r"^checkpoint: .*1 jpeg' is of another job: seed was 0, is 1.*restart$"
    ):
        jobs.personalize(pipe, source, tmp_path / "two", **other, seed=1)
    assert not (tmp_path / "two").exists()
    jobs.personalize(pipe, source, tmp_path / "two", **other, restart=True)
    assert left(kept) == ["of the user", "purified", "training"]


def test_a_restart_throws_away_what_is_of_the_job(tmp_path, pipe, source):
    kept, mine = tmp_path / "kept", []
    for name in (
        "training/mine.txt",
        "purified/mine.txt",
        "purified/1 jpeg/mine.txt",
        "training/class-mine/00000.png",
    ):
        mine.append(kept / name)
        mine[-1].parent.mkdir(parents=True, exist_ok=True)
        mine[-1].write_text("precious")
    given = FAST | {"checkpoint": kept, "restart": True}
    with pytest.raises(ValueError, match=r"^checkpoint: .*1 jpeg' is not empty and of no job"):
        jobs.personalize(pipe, source, tmp_path / "out", **given, purifiers=["jpeg"])
    drawn = kept / "training" / "class-0123456789ab"
    drawn.mkdir()
    (drawn / "00000.png").write_bytes(b"")
    jobs.personalize(pipe, source, tmp_path / "one", **given)
    jobs.personalize(pipe, source, tmp_path / "two", **given | {"learning_rate": 2e-4})
    assert all(path.read_text() == "precious" for path in mine) and not drawn.exists()

    (kept / "training/checkpoint.safetensors").write_bytes(b"of something else")
    with pytest.raises(ValueError, match=r"^checkpoint: .* cannot be read as one of a training, and is not"):
        jobs.personalize(pipe, source, tmp_path / "three", **given)
    assert (kept / "training/checkpoint.safetensors").read_bytes() == b"of something else"


def test_an_error_leaves_an_empty_checkpoint_of_the_user(tmp_path, pipe, source):
    (tmp_path / "kept").mkdir()
    for name in ("kept", "new"):
        with pytest.raises(ValueError, match="learning_rate"):
            jobs.personalize(
                pipe, source, tmp_path / "out", **FAST | {"learning_rate": -1.0}, checkpoint=tmp_path / name
            )
    assert left(tmp_path) == ["in", "kept"] and not left(tmp_path / "kept")


def test_a_subject_is_whole(tmp_path, pipe, source, monkeypatch):
    (source / "broken.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"^source: .*broken.png' cannot be read: .*; mend it, take it away"):
        jobs.personalize(pipe, source, tmp_path / "out", **FAST)

    median = filters.median

    def picky(images: Any, size: int = 3) -> Any:
        if "b.jpg" in str(getattr(images[0], "filename", "")) or images[0].getpixel((0, 0)) == first:
            raise ValueError("images[0]: got something, expected something else")
        return median(images, size)

    first = Image.open(source / "b.jpg").getpixel((0, 0))
    monkeypatch.setattr(filters, "median", picky)
    (source / "broken.png").unlink()
    with pytest.raises(ValueError, match=r"^source: 'b.jpg' cannot be purified by median: got something"):
        jobs.personalize(pipe, source, tmp_path / "out", **FAST, purifiers=["median"])
    assert not (tmp_path / "out").exists()
    (source / "broken.png").write_bytes(b"")
    with pytest.warns(PersonalizationWarning) as caught:
        found = jobs.personalize(
            pipe, source, tmp_path / "out", **FAST, purifiers=["median"], skip_broken=True
        )
    assert found.settings["pictures"] == ["a.png", "c.png"] == left(tmp_path / "out" / "purified")
    said = [str(warning.message) for warning in caught if "left out" in str(warning.message)]
    assert len(said) == 2 and "broken.png" in said[0] and "b.jpg" in said[1]
    (source / "broken.png").replace(tmp_path / "broken.png")
    with pytest.raises(ValueError, match=r"^source: none of the pictures of .* can be read"):
        jobs.personalize(pipe, tmp_path / "broken.png", tmp_path / "none", **FAST, skip_broken=True)


def test_a_full_disk_leaves_nothing_half_written(tmp_path, pipe, source, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(job, "save_lossless", full)
        with pytest.raises(OSError, match=r"^out: cannot write to .*out': No space left .*; call again"):
            jobs.personalize(pipe, source, tmp_path / "out", **FAST | {"samples": 1})
    assert left(tmp_path) == [".out.training", "in"]
    jobs.personalize(pipe, source, tmp_path / "out", **FAST | {"samples": 1})
    assert left(tmp_path) == ["in", "out"]


def test_two_do_not_share_a_folder(tmp_path, pipe, source):
    (tmp_path / ".out.training").mkdir()
    folder = os.open(tmp_path / ".out.training", os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match=r"^checkpoint: another process is at work in"):
        jobs.personalize(pipe, source, tmp_path / "out", **FAST)
    os.close(folder)


def test_class_pictures_of_a_folder(tmp_path, pipe, source, monkeypatch):
    seen = {}

    def record(
        pipe: Any,
        images: Any,
        prompt: str,
        class_prompt: str,
        *,
        class_images: Any,
        checkpoint: Any,
        seed: int,
        progress: bool,
    ) -> None:
        seen["class"] = class_images
        raise KeyboardInterrupt

    monkeypatch.setattr(personalize, "dreambooth", record)
    for given in (source / "below", str(source / "below")):
        with pytest.raises(KeyboardInterrupt):
            jobs.personalize(pipe, source, tmp_path / "out", **NAMES | OF_CLASS, class_images=given)
        assert seen.pop("class") == [source / "below" / "d.png"]
    assert left(tmp_path) == ["in"], "nothing was begun"


def test_bad_input_is_refused_before_any_work(tmp_path, pipe, source, monkeypatch):
    def never(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(job, "work", never)
    (tmp_path / "there").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    good = {"source": source, "out": tmp_path / "out"} | FAST
    for change, message in (
        ({"source": tmp_path / "nowhere"}, "source: there is no"),
        ({"source": tmp_path / "empty"}, "source: .* has no pictures in it"),
        ({"out": tmp_path / "there"}, "out: .* is there already, expected a new name"),
        ({"out": tmp_path / "file" / "out"}, "out: cannot write to"),
        ({"checkpoint": tmp_path / "file"}, "checkpoint: cannot write to"),
        ({"checkpoint": tmp_path / "out"}, "checkpoint: got .*out', expected a folder apart from"),
        ({"checkpoint": tmp_path / "out" / "x"}, "checkpoint: got .*x', expected a folder apart from"),
        (
            {"out": tmp_path / "x" / "training", "checkpoint": tmp_path / "x"},
            "checkpoint: got .*x', expected",
        ),
        ({"method": "lora"}, "method: got 'lora', expected one of dreambooth, textual_inversion"),
        ({"purifiers": ["jpg"]}, "purifiers: got 'jpg', expected some of"),
        ({"purifiers": ["jpeg", "gridpure"]}, "denoiser: got none, expected one, which gridpure needs"),
        ({"purifiers": ["codesr"]}, "upscaler: got none, expected one, which codesr needs"),
        (
            {"purifiers": ["jpeg"], "denoiser": "one"},
            "denoiser: got one, expected a purifier that works by it",
        ),
        ({"upscaler": "one"}, "upscaler: got one, expected a purifier that works by it"),
        ({"class_images": tmp_path / "empty"}, "class_prompt: got none, expected one with class_images"),
        ({"num_class_images": 3}, "class_prompt: got none, expected one with num_class_images"),
        (
            OF_CLASS | {"class_images": tmp_path / "empty"},
            "class_images: .* has no pictures in it",
        ),
        ({"samples": -1}, "samples: got -1"),
        ({"method": "textual_inversion"}, "prompt: got one, which textual_inversion does not take"),
        ({"num_vectors": 2}, "num_vectors: got one, which dreambooth does not take"),
        ({"images": 2}, "images: got one, which dreambooth does not take"),
        ({"class_prompt": NAMES["prompt"]}, "prompt: got .*, which names no subject"),
        (OF_CLASS | {"noise_phrase": "sks pattern"}, "noise_phrase: got .* in common with"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            jobs.personalize(pipe, **good | change)
    with pytest.raises(ValueError, match=r"^prompt: got none, expected one, which dreambooth needs"):
        jobs.personalize(pipe, source, tmp_path / "out")
    with pytest.raises(ValueError, match=r"^learning_rate: "):
        jobs.personalize(pipe, source, tmp_path / "out", **FAST | {"learning_rate": -1.0})
    assert left(tmp_path) == ["empty", "file", "in", "there"]


def test_models_are_opened_when_all_else_is_checked(tmp_path, pipe, source):
    opened = []

    def open_pipe() -> Any:
        opened.append("pipe")
        return pipe

    with pytest.raises(ValueError, match=r"^denoiser: got none"):
        jobs.personalize(open_pipe, source, tmp_path / "out", **FAST, purifiers=["gridpure"])
    (source / "bad.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"^source: "):
        jobs.personalize(open_pipe, source, tmp_path / "out", **FAST)
    assert not opened
    (source / "bad.png").unlink()
    jobs.personalize(open_pipe, source, tmp_path / "out", **FAST | {"steps": 1})
    assert opened == ["pipe"]


def test_what_cannot_be_drawn_leaves_the_training(tmp_path, pipe, source, monkeypatch):
    def fails(*_: object, **__: object) -> None:
        raise ValueError("pipe: it drew pictures that are not finite")

    monkeypatch.setattr(personalize, "sample", fails)
    with pytest.raises(ValueError, match="not finite"):
        jobs.personalize(pipe, source, tmp_path / "out", **FAST | {"samples": 1})
    assert left(tmp_path) == [".out.training", "in"]
