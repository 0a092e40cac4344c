"""Interrupted trainings: the same weights bit for bit, and never half a file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import pumice
from pumice.models import load
from pumice.personalize import PersonalizationWarning, dreambooth
from pumice.testbed import tiny_pipeline
from pumice.training import checkpoint, class_pictures, examples
from pumice.training.checkpoint import TrainingWarning

PROMPT, CLASS = "a photo of sks dog", "a photo of dog"
NAME = "checkpoint.safetensors"


def pictures(count: int) -> Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(count))


def learned(pipe=None, folder=None, **how) -> dict[str, Tensor]:
    how = {"steps": 3, "learning_rate": 1e-2, "checkpoint_every": 1} | how
    result = dreambooth(pipe or tiny_pipeline("sd1"), pictures(3), PROMPT, checkpoint=folder, **how)
    return {name: w.detach() for name, w in result.pipe.unet.named_parameters()} | {"losses": result.losses}


def same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@contextmanager
def interrupted_after(steps: int) -> Iterator[None]:
    """Inside the block, Ctrl-C comes in the next step of an optimizer."""
    real, taken = torch.optim.AdamW.step, []

    def step(self, *args):
        if len(taken) == steps:
            raise KeyboardInterrupt
        taken.append(real(self, *args))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        yield


def done(folder: Path) -> int:
    return len(load_file(folder / NAME)["losses"])


@pytest.fixture(scope="module")
def whole() -> dict[str, Tensor]:
    """What nothing interrupted."""
    return learned()


@pytest.mark.parametrize(  # some layers of SDXL's text encoders no prompt reaches
    ("mode", "family"), [("fp32_master", "sdxl"), ("bf16_faithful", "sd1"), ("lora", "sd1")]
)
def test_a_training_goes_on_to_the_same_bits(mode, family, tmp_path):
    pipe, how = tiny_pipeline(family).to(torch.bfloat16), {"mode": mode}
    whole = learned(pipe, **how)
    with interrupted_after(2), pytest.raises(KeyboardInterrupt):
        learned(pipe, tmp_path, **how)
    assert done(tmp_path) == 2
    assert all(weight.grad is None for weight in pipe.unet.parameters()) and not pipe.unet.training
    with interrupted_after(1):  # one is left
        assert same_bits(learned(pipe, tmp_path, **how), whole)
    with interrupted_after(0):  # what is finished is read
        assert same_bits(learned(pipe, tmp_path, **how), whole)


def test_a_killed_process(whole, tmp_path):
    """SIGKILL in the third step, nothing but the folder is left."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal, sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import torch\n"
        "from test_checkpoint import learned\n"
        "step, taken = torch.optim.AdamW.step, []\n"
        "def killed(self, *args):\n"
        "    if len(taken) == 2:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    taken.append(step(self, *args))\n"
        "torch.optim.AdamW.step = killed\n"
        "learned(folder=sys.argv[1])\n"
    )
    found = subprocess.run(
        [sys.executable, script, tmp_path / "kept"], env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert found.returncode == -signal.SIGKILL
    assert done(tmp_path / "kept") == 2
    resumed = learned(folder=tmp_path / "kept")
    assert resumed.keys() == whole.keys()
    for name in whole:  # the number of threads decides the last bits
        assert torch.allclose(resumed[name], whole[name], rtol=1e-4, atol=1e-6)


def test_a_checkpoint_of_another_training_is_refused(tmp_path, monkeypatch):
    learned(folder=tmp_path, steps=1)
    other = tiny_pipeline("sd1", seed=1)
    for message, pipe, how in (
        ("learning_rate was 0.01, is 0.02", None, {"learning_rate": 0.02}),
        ("steps was 1, is 2", None, {"steps": 2}),
        ("mode was 'fp32_master', is 'lora'; rank was None, is 4", None, {"mode": "lora"}),
        ("model was", other, {}),
        ("class_images was", None, {"class_prompt": CLASS, "class_images": pictures(2)}),
        (
            "noise_phrase was None, is 'xx'",
            None,
            {"class_prompt": CLASS, "class_images": pictures(2), "noise_phrase": "xx"},
        ),
    ):
        with pytest.raises(ValueError, match=f"checkpoint: .* is of another training: .*{message}"):
            learned(pipe, tmp_path, **{"steps": 1, **how})
    monkeypatch.setattr(pumice, "__version__", "99")
    with pytest.raises(ValueError, match=r"checkpoint: .* is of another training: pumice was '.*', is '99'"):
        learned(folder=tmp_path, steps=1)


def test_numbers_of_numpy_are_numbers(tmp_path):
    names = ("learning_rate", "max_grad_norm", "prior_weight")
    numpy, python = ({name: kind(0.5) for name in names} for kind in (np.float32, float))
    assert same_bits(learned(folder=tmp_path, steps=1, **numpy), learned(folder=tmp_path, steps=1, **python))


def test_a_broken_checkpoint_is_said(tmp_path):
    path = tmp_path / NAME
    learned(folder=tmp_path, steps=1)
    whole, tensors = path.read_bytes(), {key: value.clone() for key, value in load_file(path).items()}
    with safe_open(path, framework="pt") as file:
        said = file.metadata()
    for content in (b"", b"garbage" * 100, whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"checkpoint: .*safetensors' cannot be read as one of a training"
        ):
            learned(folder=tmp_path, steps=1)
    for broken, metadata in (
        (tensors, None),
        (tensors, {"training": "[]"}),
        ({key: value for key, value in tensors.items() if "conv_in" not in key}, said),
    ):
        save_file(broken, path, metadata)
        with pytest.raises(ValueError, match="cannot be read as one of a training"):
            learned(folder=tmp_path, steps=1)


def test_a_full_disk_costs_the_checkpoint_only(whole, tmp_path, monkeypatch):
    real, writes = checkpoint.write_tensors, []

    def full(*args):
        writes.append(args)
        if len(writes) == 2:
            raise OSError(28, "No space left on device")
        real(*args)

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with pytest.warns(TrainingWarning, match="checkpoint: step . could not be written .No space") as said:
        assert same_bits(learned(folder=tmp_path), whole)
    assert len(writes) == 3 and "the one before stays" in str(said[0].message)
    assert [path.name for path in tmp_path.iterdir()] == [NAME] and done(tmp_path) == 3


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="checkpoint: cannot write to"):
        learned(folder=tmp_path / "file" / "below", steps=1)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_stops_and_the_last_good_state_stays(what, whole, tmp_path, monkeypatch):
    real = examples.denoising_loss

    def broken(model, rows, embeds, draws, step):
        loss = real(model, rows, embeds, draws, step)
        if step < 2:
            return loss
        if what == "loss":
            return loss * torch.nan
        weight = next(model.unet.parameters())
        return loss + (weight * 0).sum().abs().sqrt()  # 0, and its gradient 0 times infinity

    with monkeypatch.context() as patch:
        patch.setattr(examples, "denoising_loss", broken)
        with pytest.raises(ValueError, match=r"learning_rate: got 0.01, at which step 2 has a loss of .*nan"):
            learned(folder=tmp_path)
    assert done(tmp_path) == 2
    assert same_bits(learned(folder=tmp_path), whole)


@pytest.mark.parametrize("mode", ["fp32_master", "lora"])
def test_an_overflow_in_float16_stops_as_well(mode, monkeypatch):
    real = examples.denoising_loss
    monkeypatch.setattr(examples, "denoising_loss", lambda *given: 1e6 * real(*given))
    with pytest.raises(ValueError, match=r"pipe: got torch.float16, in which gradients overflow: step 0"):
        learned(tiny_pipeline("sd1").to(torch.float16), mode=mode)


@pytest.mark.filterwarnings("ignore:class_images")
def test_class_pictures_are_drawn_once(tmp_path, monkeypatch):
    """A killed training draws the rest, one of other settings takes them, another class has its own."""
    pipe = tiny_pipeline("sd1")
    monkeypatch.setattr(examples, "_STEPS", 3)
    how = {"steps": 2, "class_prompt": CLASS}
    with pytest.warns(
        PersonalizationWarning, match="class_images: got none, the model draws 2 of 'a photo of dog'"
    ):
        whole = learned(pipe, **how)
    save, kept = class_pictures.save_lossless, []

    def interrupted(image, path):
        if kept:
            raise KeyboardInterrupt
        save(image, path)
        kept.append(path)

    with monkeypatch.context() as patch:
        patch.setattr(class_pictures, "save_lossless", interrupted)
        with pytest.raises(KeyboardInterrupt):
            learned(pipe, tmp_path, **how)
    assert list(tmp_path.rglob("*.png")) == kept
    before = kept[0].stat().st_mtime_ns
    assert same_bits(learned(pipe, tmp_path, **how), whole)
    assert len(list(kept[0].parent.iterdir())) == 2 and kept[0].stat().st_mtime_ns == before
    (tmp_path / NAME).unlink()
    with monkeypatch.context() as patch:
        patch.setattr(class_pictures, "save_lossless", None)  # nothing is left to be drawn
        learned(pipe, tmp_path, **how | {"learning_rate": 1e-3})
    (tmp_path / NAME).unlink()
    learned(pipe, tmp_path, **how | {"class_prompt": "a photo of big dog", "prior_weight": 0.5, "steps": 1})
    assert len(list(tmp_path.glob("class-*"))) == 2
    (tmp_path / NAME).unlink()
    kept[0].write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"checkpoint: .*00000.png' cannot be read"):
        learned(pipe, tmp_path, **how)


def test_class_pictures_without_room_are_not_kept(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(examples, "_STEPS", 1)
    monkeypatch.setattr(class_pictures, "save_lossless", full)
    model = load(tiny_pipeline("sd1"))
    with pytest.warns(TrainingWarning, match="checkpoint: pictures that the model drew could not be") as said:
        found = class_pictures.drawn_pictures(model, {CLASS: range(3)}, 0, tmp_path, False)
    assert len(found[CLASS]) == 3 and len([each for each in said if "could not" in str(each.message)]) == 1
