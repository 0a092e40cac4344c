"""Folders of pictures: what is written, what is said of it, and how a run goes on after any end."""

import cmath
import errno
import fcntl
import functools
import inspect
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import pytest
import torch
from PIL import Image

import pumice
from pumice import jobs, models
from pumice.io import Picture, within_budget
from pumice.jobs import methods
from pumice.protect import Options
from pumice.testbed import tiny_pipeline

job = sys.modules["pumice.jobs.pictures"]


@pytest.fixture(scope="module")
def pipe():
    return models.load(tiny_pipeline("sd1"))


@pytest.fixture
def calls(monkeypatch):
    """A method that takes no time stands in for mist, and for caat; its calls, by the pictures' sizes."""
    seen = []

    def noise(
        images: Any,
        pipe: Any,
        prompt: str = "a photo",
        *,
        eps: float = 8 / 255,
        steps: int = 1,
        **options: Unpack[Options],
    ) -> Any:
        seen.append([image.size for image in images])
        if steps > 100:
            raise ValueError("steps: got too many")
        done = []
        for image, seed in zip(images, options["seed"], strict=True):
            picture = Picture.open(image)
            change = torch.rand(picture.pixels.shape, generator=torch.Generator().manual_seed(seed))
            now = picture.pixels / 255 + (change * 2 - 1) * eps
            done.append(picture.with_pixels(within_budget(now, picture.pixels, eps)))
        return done

    monkeypatch.setattr(pumice.protect, "mist", noise)
    monkeypatch.setattr(pumice.protect, "caat", noise, raising=False)
    return seen


def write(path: Path, height: int = 20, width: int = 24, mode: str = "RGB", seed: int = 0, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    image = (
        Image.fromarray(pixels).convert("RGB").convert(mode) if mode != "RGBA" else Image.fromarray(pixels)
    )
    image.save(path, **options)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def four(folder: Path) -> Path:
    """Pictures that are told apart by their widths."""
    for number, name in enumerate(("a.png", "b.png", "sub/c.png", "sub/d.png")):
        write(folder / name, 20, 20 + number, seed=number)
    return folder


def test_pictures_of_every_kind(tmp_path, pipe):
    source, out = tmp_path / "in", tmp_path / "out"
    turned = Image.Exif()
    turned[0x0112], turned[0x013B] = 6, "somebody"
    write(source / "turned.jpg", 30, 50, exif=turned, quality=95)
    write(source / "deep/er/alpha.png", 33, 41, "RGBA")
    write(source / "grey.png", 20, 30, "L")
    write(source / "palette.gif", 25, 25, "P")
    write(source / "print.JPEG", 30, 30, "CMYK")
    write(source / "web.webp", 40, 20)
    Image.new("I;16", (20, 20)).save(source / "deep.tif")
    Image.new("RGB", (9, 9)).save(
        source / "moves.gif", save_all=True, append_images=[Image.new("RGB", (9, 9), "red")]
    )
    (source / "broken.png").write_bytes((source / "grey.png").read_bytes()[:100])
    (source / "notes.txt").write_text("no picture")
    (source / ".hidden.png").write_bytes(b"")

    found = jobs.protect(pipe, source, out, "mist", steps=2, eps=8 / 255, batch_size=3)
    assert (found.done, found.failed, found.skipped) == (6, 3, (".hidden.png", "notes.txt"))
    assert [line["source"] for line in found.lines] == sorted(line["source"] for line in found.lines)
    assert json.loads(json.dumps(found.to_dict()))["lines"] == list(found.lines)
    assert sorted(lines(out)[1:], key=lambda line: line["source"]) == list(found.lines)
    by_name = {line["source"]: line for line in found.lines}
    for name, reason in (("deep.tif", "I;16"), ("moves.gif", "2 frames"), ("broken.png", "truncated")):
        assert by_name[name]["status"] == "failed" and reason in by_name[name]["reason"]
        assert str(tmp_path) not in json.dumps(by_name[name]), "paths are relative"
    assert by_name["print.JPEG"]["notes"] and not by_name["web.webp"]["notes"]

    outputs = {line["output"] for line in found.lines if line["status"] == "done"}
    assert outputs == contents(out).keys() - {"manifest.jsonl"} and "deep/er/alpha.png" in outputs
    for line in found.lines:
        if line["status"] == "done":
            before, after = Picture.open(source / line["source"]), Picture.open(out / line["output"])
            change = after.pixels.double() - before.pixels
            assert 0 < change.abs().max() == line["max_change"] <= 8
            assert line["psnr"] == pytest.approx(-10 * math.log10((change / 255).square().mean()), abs=1e-6)
            assert tuple(change.shape[1:]) == (line["height"], line["width"])
    assert by_name["turned.jpg"]["height"] == 50, "upright"
    with Image.open(out / "turned.png") as image:
        assert image.getexif()[0x0112] == 1 and image.getexif()[0x013B] == "somebody"
    alpha = [Picture.open(folder / "deep/er/alpha.png").alpha for folder in (source, out)]
    assert torch.equal(*alpha) and alpha[0].unique().numel() > 2


def test_a_result_is_the_same_whatever_else_is_in_the_folder(tmp_path, pipe):
    source, settings = four(tmp_path / "in"), {"steps": 2, "eps": 8 / 255}
    jobs.protect(pipe, source, tmp_path / "all", "mist", **settings)
    jobs.protect(pipe, source, tmp_path / "chunk", "mist", **settings, chunk_size=4)
    (source / "a.png").unlink()
    (source / "sub/d.png").unlink()
    jobs.protect(pipe, source, tmp_path / "some", "mist", **settings)
    jobs.protect(pipe, source / "b.png", tmp_path / "one", "mist", **settings)
    jobs.protect(pipe, source / "b.png", tmp_path / "seed", "mist", **settings, seed=1)
    assert contents(tmp_path / "one").keys() == {"b.png", "manifest.jsonl"}
    found = {
        out: Picture.open(tmp_path / out / "b.png").pixels for out in ("all", "some", "one", "chunk", "seed")
    }
    assert torch.equal(found["all"], found["some"]) and torch.equal(found["all"], found["one"]), "to the bit"
    assert (found["all"] == found["chunk"]).float().mean() > 0.99, "up to the rounding of a batch"
    assert (found["all"] == found["seed"]).float().mean() < 0.9, "another seed is another result"


def test_random_numbers_are_of_the_path_in_the_folder(tmp_path, pipe, calls):
    for folder in ("here", "there"):
        for name in ("a.png", "sub/a.png"):
            write(tmp_path / folder / name)
        jobs.protect(pipe, tmp_path / folder, tmp_path / folder / "out", "mist")
    here, there = (contents(tmp_path / folder / "out") for folder in ("here", "there"))
    assert here == there and here["a.png"] != here["sub/a.png"]


def test_webp_has_the_same_pixels(tmp_path, pipe, calls):
    source = four(tmp_path / "in")
    for format in ("png", "webp"):
        jobs.protect(pipe, source, tmp_path / format, "mist", format=format)
    assert len(list((tmp_path / "webp").rglob("*.webp"))) == 4
    for file in (tmp_path / "webp").rglob("*.webp"):
        png = tmp_path / "png" / file.relative_to(tmp_path / "webp").with_suffix(".png")
        assert torch.equal(Picture.open(file).pixels, Picture.open(png).pixels)


def test_goes_on_where_it_was_interrupted(tmp_path, pipe, calls, monkeypatch):
    source = four(tmp_path / "in")
    jobs.protect(pipe, source, tmp_path / "whole", "mist")
    calls.clear()
    quick = pumice.protect.mist

    @functools.wraps(quick)
    def interrupted(*arguments: Any, **options: Any) -> Any:
        if len(calls) == 2:
            calls.append("interrupted")
            raise KeyboardInterrupt
        return quick(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(pumice.protect, "mist", interrupted)
        with pytest.raises(KeyboardInterrupt):
            jobs.protect(pipe, source, tmp_path / "part", "mist")
    found = jobs.protect(pipe, source, tmp_path / "part", "mist")
    assert calls == [[(20, 20)], [(21, 20)], "interrupted", [(22, 20)], [(23, 20)]]
    assert found.done == 4 and contents(tmp_path / "part") == contents(tmp_path / "whole")
    assert jobs.protect(pipe, source, tmp_path / "part", "mist").seconds is None and len(calls) == 5


@pytest.mark.parametrize("kill", range(1, 6))  # the manifest's first line, and four pictures
def test_ends_at_any_write_lose_a_chunk_at_most(tmp_path, pipe, calls, monkeypatch, kill):
    """A chunk of two: its pictures go through the networks together again, so results are the same bits."""
    source, replace, count = four(tmp_path / "in"), Path.replace, 0
    jobs.protect(pipe, source, tmp_path / "whole", "mist", chunk_size=2)

    def killed(self: Path, target: Path) -> Path:
        nonlocal count
        count += 1
        if count == kill:
            raise KeyboardInterrupt
        return replace(self, target)

    calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            jobs.protect(pipe, source, tmp_path / "part", "mist", chunk_size=2)
    for file in (tmp_path / "part").rglob("*.png"):
        Picture.open(file)
    jobs.protect(pipe, source, tmp_path / "part", "mist", chunk_size=2)
    assert contents(tmp_path / "part") == contents(tmp_path / "whole")
    chunks = [[(20, 20), (21, 20)], [(22, 20), (23, 20)]]
    again = 0 if kill <= 3 else 1
    assert calls == [*chunks[: again + 1], *chunks[again:]]


KILLED = """
import os, signal, sys
from pathlib import Path
from pumice import jobs
from pumice.testbed import tiny_pipeline

replace, count = Path.replace, 0

def killed(self, target):
    global count
    count += 1
    if count == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(self, target)

Path.replace = killed
jobs.protect(tiny_pipeline("sd1"), sys.argv[1], sys.argv[2], "mist", steps=1)
"""


def test_a_killed_process_leaves_nothing_half_written(tmp_path, pipe):
    source = four(tmp_path / "in")
    done = subprocess.run([sys.executable, "-c", KILLED, source, tmp_path / "out"], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = contents(tmp_path / "out").keys()
    assert {"a.png", "manifest.jsonl"} < left and "b.png" not in left, "killed before the second rename"
    assert [name for name in left if name.endswith(".partial")], "the file it was at"
    assert [line["source"] for line in lines(tmp_path / "out")[1:]] == ["a.png"]
    for out in ("out", "whole"):
        found = jobs.protect(pipe, source, tmp_path / out, "mist", steps=1)
        assert found.done == 4
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_line_that_was_cut_does_not_count(tmp_path, pipe, calls):
    source, out = four(tmp_path / "in"), tmp_path / "out"
    jobs.protect(pipe, source, out, "mist")
    whole = contents(out)
    for cut in (1, 30):
        (out / "manifest.jsonl").write_bytes(whole["manifest.jsonl"][:-cut])
        calls.clear()
        assert jobs.protect(pipe, source, out, "mist").done == 4
        assert calls == [[(23, 20)]] and contents(out) == whole


def test_what_is_new_changed_gone_or_failed_is_done_again(tmp_path, pipe, calls):
    source, out = four(tmp_path / "in"), tmp_path / "out"
    (source / "broken.png").write_bytes(b"")
    first = jobs.protect(pipe, source, out, "mist")
    assert (first.done, first.failed) == (4, 1)
    before = contents(out)
    calls.clear()
    again = jobs.protect(pipe, source, out, "mist")
    assert (again.done, again.failed, calls) == (4, 1, []), "nothing but another look at the broken one"
    write(source / "a.png", 20, 30, seed=7)
    (out / "b.png").unlink()
    write(source / "broken.png", 20, 31)
    write(source / "sub/new.png", 20, 32)
    found = jobs.protect(pipe, source, out, "mist")
    assert found.done == 5 + 1 and calls == [[(30, 20)], [(21, 20)], [(31, 20)], [(32, 20)]]
    after = contents(out)
    assert after["a.png"] != before["a.png"]
    assert {name: after[name] for name in ("b.png", "sub/c.png", "sub/d.png")} == {
        name: before[name] for name in ("b.png", "sub/c.png", "sub/d.png")
    }


def test_another_job_is_refused_with_the_difference(tmp_path, pipe, calls):
    source, out = four(tmp_path / "in"), tmp_path / "out"
    (tmp_path / "target").write_text("one")
    jobs.protect(pipe, source, out, "mist", steps=2, transforms=[tmp_path / "target"])
    before = contents(out)
    (tmp_path / "target").write_text("two")
    same = {"steps": 2, "transforms": [tmp_path / "target"]}
    for other, settings, words in (
        (pipe, same, "transforms was"),
        (pipe, same | {"steps": 3, "eps": 0.0625}, r"eps was 0.03137, is 0.0625, steps was 2, is 3"),
        (pipe, same | {"seed": 1}, "seed was 0, is 1"),
        (pipe, same | {"format": "webp"}, "format was 'png', is 'webp'"),
        (pipe, same | {"size": "tiles"}, "size was 'resize', is 'tiles'"),
        (pipe, same | {"method": "caat"}, "method was 'mist', is 'caat'"),
        (tiny_pipeline("sd1", seed=1), same, "model was"),
    ):
        method = settings.pop("method", "mist")
        with pytest.raises(ValueError, match=rf"^out: .* of another job: .*{words}.*; choose another folder"):
            jobs.protect(other, source, out, method, **settings)
    assert contents(out) == before
    (tmp_path / "target").write_text("one")
    (out / "kept.txt").write_text("of the user")
    calls.clear()
    jobs.protect(pipe, source, out, "mist", **same, batch_size=4, recompute=True)
    assert calls == [], "how it is computed is no difference"
    (source / "a.png").unlink()
    jobs.protect(pipe, source, out, "mist", steps=3, format="webp", restart=True)
    assert contents(out).keys() == {"b.webp", "sub/c.webp", "sub/d.webp", "kept.txt", "manifest.jsonl"}


def test_the_autoencoder_is_part_of_the_model(tmp_path, pipe, calls):
    source, other = four(tmp_path / "in"), tiny_pipeline("sd1")
    jobs.protect(other, source, tmp_path / "out", "mist")
    with torch.no_grad():
        other.vae.encoder.conv_in.weight[0, 0, 0, 0] += 1
    with pytest.raises(ValueError, match="model was"):
        jobs.protect(other, source, tmp_path / "out", "mist")


def test_the_noise_schedule_is_part_of_the_model(tmp_path, calls):
    source, other = four(tmp_path / "in"), tiny_pipeline("sd1")
    jobs.protect(other, source, tmp_path / "out", "mist")
    for change in ({"beta_end": 0.013}, {"prediction_type": "v_prediction"}):
        changed = tiny_pipeline("sd1")
        changed.scheduler = type(changed.scheduler).from_config(changed.scheduler.config, **change)
        with pytest.raises(ValueError, match="model was"):
            jobs.protect(changed, source, tmp_path / "out", "mist")


def test_pictures_in_settings_are_what_they_show(tmp_path, pipe, monkeypatch):
    def learner(
        images: Any,
        pipe: Any,
        target: Any = None,
        clean_images: Any = None,
        class_images: Any = None,
        style: str = "",
        **options: Unpack[Options],
    ) -> Any:
        return [image.copy() for image in images]

    monkeypatch.setattr(pumice.protect, "fsmg", learner)
    source, picture = four(tmp_path / "in"), tmp_path / "picture.png"
    for number, name in enumerate(("target", "clean_images", "class_images")):
        for path in (str(picture), [str(picture)]):
            write(picture, seed=2 * number)
            out = tmp_path / f"{name} {isinstance(path, str)}"
            jobs.protect(pipe, source, out, "fsmg", **{name: path})
            assert jobs.protect(pipe, source, out, "fsmg", **{name: path}).seconds is None
            write(picture, seed=2 * number + 1)
            with pytest.raises(ValueError, match=f"another job: {name} was"):
                jobs.protect(pipe, source, out, "fsmg", **{name: path})
    jobs.protect(pipe, source, tmp_path / "style", "fsmg", style=str(picture))
    write(picture, seed=9)
    assert jobs.protect(pipe, source, tmp_path / "style", "fsmg", style=str(picture)).seconds is None, "text"


def test_numbers_are_numbers(tmp_path, pipe, calls):
    source = four(tmp_path / "in")
    jobs.protect(pipe, source, tmp_path / "out", "mist", eps=0.25, steps=2)
    again = jobs.protect(pipe, source, tmp_path / "out", "mist", eps=np.float32(0.25), steps=np.int64(2))
    assert again.done == 4 and again.seconds is None


def test_functions_in_settings_have_names(tmp_path, pipe, calls):
    source, out = four(tmp_path / "in"), tmp_path / "out"

    def local() -> None:
        pass

    for value, shown in (
        (lambda: 0, "<lambda>"),
        (local, "<locals>.local"),
        (functools.partial(write, seed=1), "functools.partial"),
        (object(), "<object object at 0x"),
    ):
        with pytest.raises(ValueError, match=r"^transforms: got .*a function with a name") as caught:
            jobs.protect(pipe, source, out, "mist", transforms=[value])
        assert shown in str(caught.value) and not out.exists()
    jobs.protect(pipe, source, out, "mist", transforms=[math.sin])
    assert lines(out)[0]["job"]["transforms"] == ["math.sin"]
    with pytest.raises(ValueError, match=r"transforms was \['math.sin'\], is \['cmath.sin'\]"):
        jobs.protect(pipe, source, out, "mist", transforms=[cmath.sin])


def test_settings_that_do_not_work_leave_no_trace(tmp_path, pipe, calls):
    source, out = four(tmp_path / "in"), tmp_path / "out"
    with pytest.raises(ValueError, match=r"^steps: got too many"):
        jobs.protect(pipe, source, out, "mist", steps=101)
    assert contents(out) == {}
    (source / "a.png").write_bytes(b"")  # is a line of the manifest by then
    with pytest.raises(ValueError, match=r"^steps: got too many"):
        jobs.protect(pipe, source, out, "mist", steps=101)
    assert jobs.protect(pipe, source, out, "mist", steps=100).done == 3, "nothing was done of the other job"


def test_no_two_pictures_have_one_name(tmp_path, pipe, calls):
    source, out = tmp_path / "in", tmp_path / "out"
    for number, name in enumerate(("a.jpg", "a.png", "A.webp", "a.png.gif", "b.jpg", "b.png/c.jpg", "d.png")):
        write(source / name, 20, 20 + number, seed=number)
    found = jobs.protect(pipe, source, out, "mist")
    names = {line["source"]: line["output"] for line in found.lines}
    assert found.done == 7 and len({name.lower() for name in names.values()}) == 7
    assert (
        names["d.png"] == "d.png" and names["b.png/c.jpg"] == "b.png/c.png" and names["b.jpg"] == "b.jpg.png"
    )
    for line in found.lines:
        assert Image.open(out / line["output"]).size == Image.open(source / line["source"]).size
        usual = line["output"] == str(Path(line["source"]).with_suffix(".png"))
        assert usual or "is of another picture" in line["notes"][-1]
    write(source / "d.bmp", 20, 40)  # sorts before the one that has the name
    again = jobs.protect(pipe, source, out, "mist")
    assert {line["source"]: line["output"] for line in again.lines} == names | {"d.bmp": "d.bmp.png"}


def test_results_are_not_sources(tmp_path, pipe, calls):
    source = four(tmp_path / "in")
    for _ in range(2):
        assert jobs.protect(pipe, source, source / "mist", "mist").done == 4
    for _ in range(2):
        found = jobs.protect(pipe, source, source / "sub/caat", "caat")
    assert found.done == 4 and found.skipped == ("mist", "sub/caat")
    for out in (source, tmp_path, source / "sub/.."):
        with pytest.raises(ValueError, match=r"^out: .* which holds the source"):
            jobs.protect(pipe, source, out, "mist")
    with pytest.raises(ValueError, match=r"^out: .* which holds the source"):
        jobs.protect(pipe, source / "a.png", source, "mist")
    second = jobs.protect(pipe, source / "mist", tmp_path / "twice", "mist")
    assert second.done == 4, "unless they are asked for"


def test_only_regular_files_are_pictures(tmp_path, pipe, calls):
    source = four(tmp_path / "in")
    (source / "loop").symlink_to(source)
    (source / "link.png").symlink_to(source / "a.png")
    (source / "gone.png").symlink_to(source / "nowhere.png")
    os.mkfifo(source / "pipe.png")
    write(source / ".trash/e.png")
    (source / "folder.png").mkdir()
    found = jobs.protect(pipe, source, tmp_path / "out", "mist")
    assert found.done == 4 and found.failed == 0
    assert found.skipped == (".trash", "gone.png", "link.png", "loop", "pipe.png")


def test_names_that_are_no_unicode_or_too_long(tmp_path, pipe, calls):
    source, odd = tmp_path / "in", os.fsdecode(b"caf\xe9.webp")
    write(source / odd)
    write(source / ("x" * 251 + ".png"))
    write(source / "日本.png")
    write(tmp_path / "long" / ("日" * 83 + "xx.jpg"))
    assert jobs.protect(pipe, tmp_path / "long", tmp_path / "255", "mist").done == 1, "bytes, as they may be"
    calls.clear()
    for _ in range(2):
        found = jobs.protect(pipe, source, tmp_path / "out", "mist", format="webp")
        assert (found.done, found.failed) == (2, 1) and (tmp_path / "out" / odd).is_file()
        assert [line["reason"] for line in found.lines if line["status"] == "failed"] == [
            "File name too long"
        ]
    assert len(calls) == 2 + 2, "the failure is tried again"


def test_a_full_disk_ends_the_job_and_not_the_pictures(tmp_path, pipe, calls, monkeypatch):
    source, out, save = four(tmp_path / "in"), tmp_path / "out", job.save_lossless

    def full(image: Image.Image, path: Path) -> None:
        if path.name == "b.png":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        save(image, path)

    with monkeypatch.context() as patch:
        patch.setattr(job, "save_lossless", full)
        with pytest.raises(OSError, match=r"^out: cannot write to .*: No space left on device; what is done"):
            jobs.protect(pipe, source, out, "mist")
    assert [line["source"] for line in lines(out)[1:]] == ["a.png"] and len(calls) == 2
    assert jobs.protect(pipe, source, out, "mist").done == 4


def test_a_folder_is_a_subject(tmp_path, pipe, calls):
    source, out = four(tmp_path / "in"), tmp_path / "out"
    write(source / "sub/deeper/e.png", 20, 40)
    found = jobs.protect(pipe, source, out, "caat", chunk_size=1)
    assert found.done == 5 and calls == [[(20, 20), (21, 20)], [(22, 20), (23, 20)], [(40, 20)]]
    calls.clear()
    (source / "sub/bad.png").write_bytes(b"")
    found = jobs.protect(pipe, source, out, "caat")
    assert (found.done, found.failed, calls) == (5, 1, []), "nothing new that can be read"
    write(source / "sub/bad.png", 20, 50)
    assert jobs.protect(pipe, source, out, "caat").done == 6
    assert calls == [[(50, 20), (22, 20), (23, 20)]], "whole again, the others not"


def test_what_cannot_be_done_of_a_subject_is_left_out(tmp_path, pipe, calls):
    source, out = four(tmp_path / "in"), tmp_path / "out"
    (source / "bad.png").write_bytes(b"")
    write(source / "strip.png", 2, 90)  # no form of which is the model's
    for _ in range(2):
        found = jobs.protect(pipe, source, out, "caat")
        assert (found.done, found.failed) == (4, 2)
        reasons = {line["source"]: line["reason"] for line in found.lines if line["status"] == "failed"}
        assert reasons["bad.png"].startswith("cannot be read: ")
        assert reasons["strip.png"].startswith("got 2 x 90 pixels, expected at most 16 times")
        assert calls == [[(20, 20), (21, 20)], [(22, 20), (23, 20)]], "and once is enough"
    assert jobs.protect(pipe, source, tmp_path / "tiles", "caat", size="tiles").done == 5


def test_one_picture_at_fault_does_not_stop_a_chunk(tmp_path, pipe, calls, monkeypatch):
    source, quick = four(tmp_path / "in"), pumice.protect.mist

    def picky(images: Any, pipe: Any, **options: Unpack[Options]) -> Any:
        for image in images:
            if image.width == 21:
                raise ValueError("images: got 20 x 21 pixels, expected something else")
            if image.width == 22:
                raise torch.OutOfMemoryError("CUDA out of memory, in\nseveral lines")
            if image.width == 20:
                torch.empty(2**53, dtype=torch.uint8)  # on the CPU a plain RuntimeError
            if image.width == 23:
                raise ValueError("perturbed: got NaN, expected values in [0, 1]")
        return quick(images, pipe, **options)

    monkeypatch.setattr(pumice.protect, "mist", picky)
    found = jobs.protect(pipe, source, tmp_path / "out", "mist", chunk_size=4)
    assert [line.get("reason") for line in found.lines] == [
        "out of memory",
        "got 20 x 21 pixels, expected something else",
        "out of memory",
        "perturbed: got NaN, expected values in [0, 1]",
    ]
    monkeypatch.setattr(pumice.protect, "caat", picky)
    found = jobs.protect(pipe, source, tmp_path / "subjects", "caat")
    assert (found.done, found.failed) == (0, 4)

    def broken(images: Any, pipe: Any, **options: Unpack[Options]) -> Any:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(pumice.protect, "mist", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        jobs.protect(pipe, source, tmp_path / "broken", "mist")


def test_a_picture_is_not_blamed_for_others(tmp_path, pipe, monkeypatch):
    def learner(images: Any, pipe: Any, clean_images: Any = None, **options: Unpack[Options]) -> Any:
        raise ValueError("clean_images[0]: 'gone.png' cannot be read: it is not there")

    monkeypatch.setattr(pumice.protect, "caat", learner)
    with pytest.raises(ValueError, match=r"^clean_images\[0\]: 'gone.png' cannot be read"):
        jobs.protect(pipe, four(tmp_path / "in"), tmp_path / "out", "caat", clean_images=["gone.png"])
    assert contents(tmp_path / "out") == {}


def test_reasons_do_not_name_the_argument(tmp_path, pipe, calls, monkeypatch):
    def picky(images: Any, pipe: Any, **options: Unpack[Options]) -> Any:
        raise ValueError("images[0]: got something, expected something else")

    monkeypatch.setattr(pumice.protect, "mist", picky)
    found = jobs.protect(pipe, four(tmp_path / "in"), tmp_path / "out", "mist")
    assert {line["reason"] for line in found.lines} == {"got something, expected something else"}


def test_a_picture_that_did_not_change_is_said(tmp_path, pipe, monkeypatch):
    def idle(images: Any, pipe: Any, *, eps: float = 8 / 255, **options: Unpack[Options]) -> Any:
        return [image.copy() for image in images]

    monkeypatch.setattr(pumice.protect, "mist", idle)
    source = four(tmp_path / "in")
    for eps, notes in ((1 / 255, ["nothing changed"]), (0, []), (0.003, [])):
        found = jobs.protect(pipe, source, tmp_path / f"{eps}", "mist", eps=eps)
        assert found.done == 4 and [line["notes"] for line in found.lines] == [notes] * 4


def test_a_result_outside_the_budget_is_a_failure(tmp_path, pipe, monkeypatch):
    def careless(
        images: Any, pipe: Any, *, eps: float = 8 / 255, norm: str = "linf", **options: Unpack[Options]
    ) -> Any:
        return [image.point(lambda value: min(value + 9, 255)) for image in images]

    monkeypatch.setattr(pumice.protect, "mist", careless)
    source = four(tmp_path / "in")
    found = jobs.protect(pipe, source, tmp_path / "out", "mist")
    assert {line["reason"] for line in found.lines} == {"changed by 9 of 255, expected at most 8"}
    assert contents(tmp_path / "out").keys() == {"manifest.jsonl"}
    assert jobs.protect(pipe, source, tmp_path / "wide", "mist", eps=9 / 255).done == 4
    assert jobs.protect(pipe, source, tmp_path / "l2", "mist", norm="l2").done == 4, (
        "a budget of another kind"
    )


def test_two_jobs_do_not_share_a_folder(tmp_path, pipe, calls):
    source, out = four(tmp_path / "in"), tmp_path / "out"
    out.mkdir()
    folder = os.open(out, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match=r"^out: another process is at work in"):
        jobs.protect(pipe, source, out, "mist")
    os.close(folder)
    assert jobs.protect(pipe, source, out, "mist").done == 4


def test_a_manifest_cannot_name_files_elsewhere(tmp_path, pipe, calls):
    source, out = four(tmp_path / "in"), tmp_path / "out"
    jobs.protect(pipe, source, out, "mist")
    precious = write(tmp_path / "precious.png")
    with (out / "manifest.jsonl").open("a") as file:
        file.write(
            json.dumps({"source": "x.png", "status": "done", "output": "../precious.png"}) + "\n[]\nnull\n"
        )
    jobs.protect(pipe, source, out, "mist", restart=True)
    assert precious.is_file()


def test_only_what_the_job_left_half_written_goes(tmp_path, pipe, calls):
    source, out = four(tmp_path / "in"), tmp_path / "out"
    for name in (".git/.mine.partial", ".mine.partial"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("of the user")
    jobs.protect(pipe, source, out, "mist")
    assert (out / ".git/.mine.partial").is_file() and (out / ".mine.partial").is_file()
    (out / "sub/.killed.partial").write_text("")
    jobs.protect(pipe, source, out / "sub/another", "mist")
    (out / "sub/another/.at-work.partial").write_text("")
    jobs.protect(pipe, source, out, "mist")
    partial = {name for name in contents(out) if name.endswith(".partial")}
    assert partial == {".git/.mine.partial", "sub/another/.at-work.partial"}


def test_bad_input_is_refused_before_any_work(tmp_path, pipe, calls, monkeypatch):
    def needy(images: Any, pipe: Any, target: Any, **options: Unpack[Options]) -> Any:
        raise AssertionError

    monkeypatch.setattr(pumice.protect, "glaze", needy, raising=False)
    source, empty, full = four(tmp_path / "in"), tmp_path / "empty", tmp_path / "full"
    empty.mkdir()
    (empty / "readme.md").write_text("no pictures")
    write(full / "mine.png")
    (tmp_path / "file").write_text("")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/manifest.jsonl").write_text('{"of": "something else"}\n')
    good = {"source": source, "out": tmp_path / "out", "method": "mist"}
    for change, message in (
        ({"source": tmp_path / "nowhere"}, "source: there is no"),
        ({"source": empty}, "source: .* has no pictures among 1 files"),
        ({"out": full}, "out: .* is not empty and of no job"),
        ({"out": tmp_path / "odd"}, "out: .* is not empty and of no job"),
        ({"out": tmp_path / "file"}, "out: cannot write to"),
        ({"out": tmp_path / "file/below"}, "out: cannot write to"),
        ({"out": tmp_path / "cloaked.JPG"}, "out: got .*cloaked.JPG', the name of a picture"),
        ({"method": "mits"}, "method: got 'mits', expected one of ace, advdm"),
        ({"method": "glaze"}, "target: got none, expected one, which glaze needs"),
        ({"format": "jpeg"}, "format: got 'jpeg'"),
        ({"chunk_size": 0}, "chunk_size: got 0"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"eps": 8}, "eps: got 8, expected 0 to 1, in the unit of the pictures: 8/255"),
        ({"eps": math.nan}, "eps: got nan"),
        ({"sharpness": 1}, "sharpness: got one, which mist does not take"),
        ({"mask": None}, "mask: got one"),
        ({"timesteps": None}, "timesteps: got one"),
        ({"images": []}, "images: got one"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            jobs.protect(pipe, **good | change)
    with pytest.raises(TypeError):
        jobs.protect(pipe, **good, seed=0.5)
    assert not calls and not (tmp_path / "out").exists()


def test_the_model_stays_as_it_is(tmp_path, pipe):
    before = models.fingerprint(pipe)
    jobs.protect(pipe, four(tmp_path / "in"), tmp_path / "out", "mist", steps=1)
    assert models.fingerprint(pipe) == before
    assert all(weight.requires_grad for weight in pipe.unet.parameters())


def test_noise_needs_no_model(tmp_path):
    found = jobs.protect(None, four(tmp_path / "in"), tmp_path / "out", "random", eps=4 / 255)
    assert found.done == 4 and {line["max_change"] for line in found.lines} == {4}
    with pytest.raises(ValueError, match=r"^eps: got none, expected one, which random needs"):
        jobs.protect(None, tmp_path / "in", tmp_path / "other", "random")


def test_pictures_of_a_subject_go_together(tmp_path, pipe):
    """Cross-attention learns from all of them, so that each result depends on the others."""
    source = four(tmp_path / "in")
    settings = {"steps": 3, "lr": 1e-2, "eps": 8 / 255, "step_size": 1 / 255}
    assert jobs.protect(pipe, source, tmp_path / "all", "caat", **settings).done == 4
    (source / "a.png").unlink()
    jobs.protect(pipe, source, tmp_path / "some", "caat", **settings)
    found = [contents(tmp_path / out) for out in ("all", "some")]
    assert found[0]["sub/c.png"] == found[1]["sub/c.png"] and found[0]["b.png"] != found[1]["b.png"]


def test_the_table_is_of_what_there_is():
    assert list(jobs.METHODS) == sorted(jobs.METHODS)
    for method in jobs.METHODS.values():
        function = getattr(pumice.protect, method.function)
        taken = inspect.signature(function).parameters
        assert next(iter(taken)) == "images" and ("seed" in taken or "seed" in methods._options(function))
