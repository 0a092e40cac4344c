"""What a plan says a step takes is what it takes."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import fake_models
from pumice import jobs, models, protect, testbed
from pumice.models.memory import _Live
from pumice.protect.pgd import PGD
from pumice.protect.plan import plan
from pumice.protect.surrogate import Surrogate
from pumice.training.examples import Examples

FAMILIES = ("sd1", "sd2", "sdxl")
plans = sys.modules["pumice.protect.plan"]  # the package has the function of that name


def tiny(family: str = "sd1", dtype: torch.dtype = torch.float32) -> models.DiffusionModel:
    return models.load(testbed.tiny_pipeline(family).to(dtype=dtype))


@pytest.fixture(scope="module")
def model() -> models.DiffusionModel:
    return tiny()


@pytest.fixture(scope="module")
def trained() -> models.DiffusionModel:
    return models.load(testbed.load())


@pytest.fixture(scope="module")
def real_sizes() -> models.DiffusionModel:
    """Of Stable Diffusion 1.5, in bfloat16."""
    return fake_models.stable_diffusion_1()


@pytest.fixture
def measured(monkeypatch) -> Callable[..., int]:
    """Runs a method and gives the bytes of its tensors, at their most, while it takes steps."""

    def run(method: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
        live, held, real = _Live(), [], PGD.ascend

        def ascend(self: PGD, *args: Any, **kwargs: Any) -> None:
            held.append(sum(x.nbytes for s in self._stacks for x in (s.now, s.clean, s.mask)))
            with live:
                real(self, *args, **kwargs)

        monkeypatch.setattr(PGD, "ascend", ascend)
        method(*args, **kwargs)
        return live.peak + held[0]

    return run


# --- The estimate


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("task", ["photoguard", "sds", "advdm"])
def test_a_step_takes_what_was_told(measured, trained, task, recompute):
    # two: on a CPU small tensors are kept otherwise than large ones, so that the bytes are no straight line
    pictures = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    taken = measured(getattr(protect, task), pictures, trained, steps=1, recompute=recompute)
    fixed, each = plans._step_bytes([trained], plans._TASKS[task], (64, 64), recompute)
    assert fixed + 2 * each == pytest.approx(taken, rel=0.05)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_step_through_the_sampler_takes_what_was_told(measured, model, recompute):
    pictures = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    how = {"steps": 1, "recompute": recompute, "batch_size": 2}
    taken = measured(protect.photoguard_diffusion, pictures, model, **how)
    task = plans._TASKS["photoguard_diffusion"]
    fixed, each = plans._step_bytes([model], task, (32, 32), recompute)
    assert fixed + 2 * each == pytest.approx(taken, rel=0.05)


def test_a_search_for_timesteps_takes_what_was_told(measured, trained):
    pictures = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = plan(trained, "select_timesteps", height=64, width=64)
    taken = measured(protect.select_timesteps, pictures, trained, rounds=1, batch_size=2)
    assert found.fixed + 2 * found.each == pytest.approx(taken, rel=0.05)
    assert found.each == plan(trained, "simac", height=64, width=64).each
    assert found.training == 0 and found.batch_size == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_of_every_family(measured, family):
    model = tiny(family)
    pictures = torch.rand(2, 3, 48, 32, generator=torch.Generator().manual_seed(0))
    found = plan(model, "advdm", height=48, width=32)
    taken = measured(protect.advdm, pictures, model, steps=1)
    assert found.fixed + 2 * found.each == pytest.approx(taken, rel=0.05)


def test_of_several_models(model, trained):
    both = plan([model, trained], height=64, width=64)
    alone = [plan(each, height=64, width=64) for each in (model, trained)]
    assert both.weights == sum(each.weights for each in alone)
    assert both.each == pytest.approx(max(each.each for each in alone), rel=0.05)


def test_weights_are_those_of_all_parts_each_once(model):
    parts = [model.unet, model.vae, model.pipe.text_encoder]
    expected = sum(p.nbytes for part in parts for p in (*part.parameters(), *part.buffers()))
    assert plan(model).weights == expected
    assert plan([model, model]).weights == expected


@pytest.mark.parametrize(
    ("mode", "dtype"),
    [
        ("fp32_master", torch.float32),
        ("fp32_master", torch.bfloat16),
        ("bf16_faithful", torch.float32),
    ],
    ids=str,
)
def test_a_surrogate_takes_what_was_told(mode, dtype):
    """Copies exactly; training, small parts of which are left out, about."""
    model = tiny("sd1", dtype)
    surrogate = Surrogate(model, mode, lr=1e-3)
    tensors = {id(t): t for t in (*surrogate._student.weights.values(), *surrogate._student.masters)}.values()
    copies = sum(tensor.nbytes for tensor in tensors)
    found = plan(model, "fsmg", surrogate=mode)
    assert found.weights - plan(model).weights == copies
    master = sum(tensor.nbytes for tensor in surrogate._student.masters)
    assert plan(model, "aspl", surrogate=mode).weights == found.weights + master

    examples = [Examples(surrogate.model, [torch.rand(3, 32, 32)], prompt) for prompt in ("a cat", "cats")]
    with _Live() as live:
        surrogate.train(examples, 2)
    assert found.training == pytest.approx(live.peak, rel=0.25)


def test_a_lora_takes_no_copies(model):
    assert plan(model, "aspl", surrogate="lora").weights == plan(model, "ace").weights == plan(model).weights


def test_what_a_step_passes_is_what_it_takes(model):
    found = {task: plan(model, task).each for task in ("photoguard", "sds", "advdm", "mist", "aspl", "simac")}
    assert found["photoguard"] <= found["sds"] < found["advdm"] == found["mist"] == found["aspl"]
    assert found["simac"] == pytest.approx(5 * found["advdm"], rel=0.1)  # timesteps are tried side by side


def test_every_method_of_a_job_has_a_plan():
    assert set(plans._TASKS) - {"select_timesteps"} == set(jobs.METHODS) - {"random"}


def test_on_a_gpu_a_step_stays_in_memory_while_a_surrogate_learns(model):
    found = plan(model, "aspl")
    step = found.fixed + found.batch_size * found.each
    assert found.estimate == found.weights + max(step, found.training)
    assert replace(found, device="cuda:0").estimate == found.weights + step + found.training


def test_a_caller_in_inference_mode():
    first, second = tiny(), tiny()
    tasks = ("advdm", "aspl")
    expected = [plan(first, task, "8GB") for task in tasks]
    with torch.inference_mode():
        assert [plan(second, task, "8GB") for task in tasks] == expected


# --- The choice


def test_stable_diffusion_on_cards_that_people_have(real_sizes, monkeypatch):
    monkeypatch.setattr(plans, "ROWS", 100)
    found = {vram: plan(real_sizes, "advdm", vram) for vram in ("3GB", "4GB", "8GB", "24 GiB", "80GB")}
    assert [each.recompute for each in found.values()] == [True, False, False, False, False]
    rows = [each.batch_size for each in found.values()]
    assert rows[0] == 1 and rows[1] == 1 and 4 <= rows[2] <= 5 and 18 <= rows[3] <= 22
    assert rows[4] == 63  # 64 pictures of 128 channels have 2^31 values
    for each in found.values():
        assert each.fits and each.estimate <= 0.9 * each.memory
    assert 1.0e9 < found["8GB"].each < 1.1e9


def test_no_picture_fits(real_sizes):
    found = plan(real_sizes, "advdm", "2GB")
    assert not found.fits and found.recompute and found.batch_size == 1
    assert found.estimate == found.weights + found.fixed + found.each > 1.8e9
    assert plan(real_sizes, "advdm", int(found.estimate / 0.9) + 1).fits
    assert not plan(real_sizes, "advdm", int(found.estimate / 0.9) - 10**6).fits


def test_a_surrogate_that_does_not_fit_is_told_what_would(real_sizes):
    found = plan(real_sizes, "aspl", "12GB")
    assert not found.fits
    (advice,) = found.advice
    assert 'surrogate="lora"' in advice
    assert plan(real_sizes, "aspl", "12GB", surrogate="lora").fits


def test_the_processor_takes_no_more_than_pays(model):
    assert plan(model, vram="1000GB").batch_size == plans.ROWS


def test_what_is_free_is_the_default(model):
    found = plan(model)
    assert 2**28 < found.memory < 2**46
    assert found.fits


# --- What people give and read


@pytest.mark.parametrize(
    ("vram", "expected"),
    [
        (5 * 10**9, 5 * 10**9),
        ("5000000000", 5 * 10**9),
        ("8GB", 8 * 10**9),
        ("8 gib", 8 * 2**30),
        (" 7.5GiB ", 15 * 2**29),
        ("900 MB", 9 * 10**8),
        ("8G", 8 * 10**9),
        ("900m", 9 * 10**8),
    ],
)
def test_memory_is_read(model, vram, expected):
    assert plan(model, vram=vram).memory == expected


@pytest.mark.parametrize("vram", ["", "GB", "8G B", "-8GB", "0GB", "8 bananas", -1, 0, True, "nan"])
def test_memory_that_says_nothing_is_refused(model, vram):
    with pytest.raises(ValueError, match=r"^vram: got .*expected bytes or a text"):
        plan(model, vram=vram)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"task": "none"}, "task: got 'none', expected one of photoguard, "),
        ({"surrogate": "fp16"}, "surrogate: got 'fp16', expected one of fp32_master"),
        ({"height": 33}, "height: got 33, expected a positive multiple of 2"),
        ({"width": 0}, "width: got 0, expected"),
    ],
)
def test_what_is_wrong_is_named(model, wrong, message):
    with pytest.raises(ValueError, match=f"^{message}") as error:
        plan(model, **wrong)
    assert "\n" not in str(error.value)


def test_a_plan_can_be_read(real_sizes):
    found = plan(real_sizes, "advdm", "8GB")
    lines = str(found).splitlines()
    assert lines[0] == f"advdm, 512 x 512, bfloat16 on cpu: {found.batch_size} pictures at a time"
    assert lines[1].startswith(f"{found.estimate / 1e9:.1f} GB of 8.0 GB: weights 1.9 GB, a step ")
    assert "does not fit" in str(plan(real_sizes, "advdm", "2GB"))
    told = json.loads(json.dumps(found.to_dict()))
    assert told["estimate"] == found.estimate and told["fits"] and told["batch_size"] == found.batch_size


# --- Counting


def test_a_model_is_counted_once_and_then_forgotten(monkeypatch):
    model = tiny()
    expected = plan(model)
    before = len(plans._told)
    with monkeypatch.context() as patch:
        patch.setattr(plans, "step_bytes", lambda step: pytest.fail("counted again"))
        again = plan(model, "mist")
    assert again.each == expected.each
    del model
    gc.collect()
    assert len(plans._told) < before


def test_weights_of_another_dtype_are_counted_anew():
    model = tiny()
    wide = plan(model)
    model.pipe.to(dtype=torch.bfloat16)
    assert plan(model).each < 0.7 * wide.each


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_stays_as_it_was(family):
    """Also what it keeps for later: no tensor without values is left behind."""
    model, other = tiny(family), tiny(family)
    model.unet.train()
    plan(model, "aspl")
    assert model.unet.training and all(w.requires_grad and w.grad is None for w in model.unet.parameters())
    assert not any("forward" in vars(module) for module in model.unet.modules())
    assert all(map(torch.equal, model.unet.state_dict().values(), other.unet.state_dict().values()))
    pictures = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(*(protect.advdm(pictures, each, steps=2) for each in (model, other)))
