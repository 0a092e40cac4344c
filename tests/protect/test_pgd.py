from __future__ import annotations

import copy
import gc
import sys
import weakref

import pytest
import torch
from torch import Tensor

from pumice import protect, testbed
from pumice.models import DiffusionModel, load
from pumice.protect import ProtectionWarning
from pumice.protect.latent import LatentObjective, denoising_gradient
from pumice.protect.pgd import PGD
from pumice.testbed import world
from pumice.testbed.tiny import tiny_pipeline

EPS, STEP = 8 / 255, 1 / 255
METHODS = [protect.advdm, protect.mist, protect.sds, protect.sdst, protect.photoguard]


@pytest.fixture(scope="module")
def pipe():
    return testbed.load()


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return torch.stack([torch.from_numpy(world.subject(index, 0)) for index in range(3)])


def signs_agree(a: Tensor, b: Tensor, clean: Tensor) -> float:
    return ((a - clean).sign() == (b - clean).sign()).double().mean().item()


@pytest.mark.parametrize("method", METHODS)
def test_pictures_stay_in_budget_and_range_and_are_used_up(pipe, pictures, method):
    protected = method(pictures, pipe, eps=EPS, step_size=STEP, steps=10)
    assert protected.dtype == torch.float32
    assert 0 <= protected.min() and protected.max() <= 1
    change = (protected - pictures).abs()
    assert change.max() <= EPS + 1e-6
    assert change.mean() > EPS / 4  # ten steps of 1/255 go somewhere


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_is_its_pictures_alone(pipe, pictures, method):
    how = {"eps": EPS, "step_size": STEP, "steps": 5}
    batch = method(pictures, pipe, seed=7, **how)
    alone = torch.cat([method(pictures[i : i + 1], pipe, seed=7 + i, **how) for i in range(len(pictures))])
    assert signs_agree(batch, alone, pictures) > 0.999
    uneven = method(pictures, pipe, seed=[7, 8, 9], batch_size=2, **how)
    assert signs_agree(batch, uneven, pictures) > 0.999


@pytest.mark.parametrize("method", METHODS)
def test_a_caller_in_inference_mode(pictures, method):
    pipe, images = tiny_pipeline("sd1"), pictures[:1, :, :32, :32]
    expected = method(images, pipe, eps=EPS, steps=2)
    with torch.inference_mode():
        found = method(images.clone(), pipe, eps=EPS, steps=2)
    assert torch.equal(found, expected)


def test_the_seed_decides(pipe, pictures):
    first, again, other = (protect.advdm(pictures, pipe, eps=EPS, steps=2, seed=seed) for seed in (3, 3, 30))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_step_as_long_as_the_budget_is_the_fast_gradient_sign(pipe, pictures):
    model = load(pipe)
    direction = torch.randn(8, 8, 8, generator=torch.Generator().manual_seed(0))

    def cotangent(z: Tensor) -> Tensor:
        return direction.expand_as(z)

    pgd = PGD(pictures, pipe, eps=EPS, random_start=False)
    pgd.ascend([LatentObjective(model, cotangent, sample=False, noised=False)], 1, EPS)
    leaf = pictures.clone().requires_grad_()
    (model.encode_image(leaf) * direction).sum().backward()
    expected = (pictures + EPS * leaf.grad.sign()).clamp(0, 1)
    assert (pgd.finish() - expected).abs().gt(1e-6).double().mean() < 1e-3


def fixed_loss(model: DiffusionModel, images: Tensor) -> Tensor:
    """The denoising loss of each picture on timesteps and noise that no method draws."""
    draw = torch.Generator().manual_seed(1234)
    z, embeds, total = model.encode_image(images), model.encode_prompt("a photo"), 0.0
    for t in range(50, 1000, 100):
        noise = torch.randn(z.shape, generator=draw)
        output = model.predict(model.add_noise(z, noise, t), t, embeds)
        total = total + (output - model.schedule.target(z, noise, t)).square().mean((1, 2, 3))
    return total


@torch.no_grad()
def test_climbing_raises_the_denoising_loss_and_descending_lowers_it(pipe, pictures):
    model = load(pipe)
    how = {"eps": EPS, "step_size": STEP, "steps": 20, "random_start": False}
    before = fixed_loss(model, pictures)
    assert (fixed_loss(model, protect.advdm(pictures, pipe, **how)) > 1.5 * before).all()
    assert (fixed_loss(model, protect.advdm(pictures, pipe, direction="-", **how)) < before).all()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_every_family_and_either_way_to_the_gradient(family, recompute):
    pipe = tiny_pipeline(family)
    images = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    how = {"eps": EPS, "step_size": STEP, "steps": 3}
    found = protect.mist(images, pipe, recompute=recompute, **how)
    assert signs_agree(found, protect.mist(images, pipe, batch_size=1, **how), images) > 0.999


def test_several_models_add_their_gradients(pictures):
    first, second = (load(tiny_pipeline(family)) for family in ("sd1", "sd2"))
    images = pictures[:, :, :32, :32].contiguous()
    pgd = PGD(images, [first, second], eps=EPS, random_start=False)
    pgd.ascend(
        [LatentObjective(model, torch.ones_like, sample=False, noised=False) for model in pgd.models], 1, STEP
    )
    leaf = images.clone().requires_grad_()
    (first.encode_image(leaf).sum() + second.encode_image(leaf).sum()).backward()
    expected = (images + STEP * leaf.grad.sign()).clamp(0, 1)
    assert (pgd.finish() - expected).abs().gt(1e-6).double().mean() < 1e-3


def test_outside_the_mask_nothing_changes(pipe, pictures):
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[10:40, 20:50] = True
    protected = protect.advdm(pictures, pipe, eps=EPS, steps=5, mask=mask)
    assert torch.equal(protected[..., ~mask], pictures[..., ~mask])
    assert (protected - pictures)[..., mask].abs().mean() > 1 / 255


def test_a_soft_mask_scales_what_the_model_sees_and_what_comes_back(pipe, pictures):
    seen = []

    def cotangent(z: Tensor) -> Tensor:
        seen.append(z)
        return torch.ones_like(z)

    model = load(pipe)
    pgd = PGD(pictures, pipe, eps=EPS, random_start=False, mask=torch.full((64, 64), 0.5))
    pgd.ascend([LatentObjective(model, cotangent, sample=False, noised=False)], 10, STEP)
    protected = pgd.finish()
    assert 0.9 * EPS / 2 < (protected - pictures).abs().max() <= EPS / 2 + 1e-6
    pgd.ascend([LatentObjective(model, cotangent, sample=False, noised=False)], 1, STEP)
    torch.testing.assert_close(seen[-1], model.encode_image(protected), rtol=1e-4, atol=1e-4)


def test_a_gradient_that_is_not_finite_is_an_error(pictures):
    pipe = tiny_pipeline("sd1")
    with torch.no_grad():
        pipe.unet.conv_out.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"images\[0\]: its gradient is not finite in torch.float32"):
        protect.advdm(pictures[:, :, :32, :32].contiguous(), pipe, random_start=False)


def test_timesteps_for_a_method_without_any_are_refused(pipe, pictures):
    with pytest.raises(ValueError, match="timesteps: got some, expected none"):
        protect.photoguard(pictures, pipe, timesteps=[torch.tensor([1])] * 3)


def test_what_a_run_held_is_gone_when_it_ends(pipe, pictures):
    kept, init = [], PGD.__init__

    def spy(self: PGD, *args: object, **kwargs: object) -> None:
        init(self, *args, **kwargs)
        kept.append(weakref.ref(self))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PGD, "__init__", spy)
        gc.collect()
        gc.disable()
        try:
            protect.advdm(pictures, pipe, steps=1)
            assert kept[0]() is None
        finally:
            gc.enable()


def test_timesteps_are_drawn_from_those_that_are_allowed(pipe, pictures, monkeypatch):
    drawn = []

    def spy(model: DiffusionModel, z: Tensor, t: Tensor, *rest: object) -> Tensor:
        drawn.append(t.clone())
        return denoising_gradient(model, z, t, *rest)

    monkeypatch.setattr(sys.modules["pumice.protect.advdm"], "denoising_gradient", spy)
    allowed = [torch.tensor([5, 17]), torch.tensor([900]), torch.arange(100, 110)]
    protect.advdm(pictures, pipe, steps=12, timesteps=allowed)
    seen = torch.stack(drawn)
    assert set(seen[:, 0].tolist()) == {5, 17}
    assert set(seen[:, 1].tolist()) == {900}
    assert seen[:, 2].min() >= 100 and seen[:, 2].max() < 110 and len(seen[:, 2].unique()) > 3


def state(pipe: object) -> list[object]:
    parts = [pipe.unet, pipe.vae, pipe.text_encoder]
    return [
        (name, parameter.requires_grad, parameter.clone())
        for part in parts
        for name, parameter in part.named_parameters()
    ] + [
        (name, module.training, "forward" in vars(module))
        for part in parts
        for name, module in part.named_modules()
    ]


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("method", METHODS)
def test_the_pipeline_is_left_as_it_was(method, error, monkeypatch):
    pipe = tiny_pipeline("sd1")
    pipe.unet.train()
    pipe.vae.requires_grad_(False)
    before = state(pipe)
    images = torch.rand(1, 3, 32, 32)
    if error:

        def fail(*_: object, **__: object) -> None:
            raise error("on the way")

        monkeypatch.setattr(sys.modules["pumice.protect.pgd"].ops, "pgd_step", fail)
        with pytest.raises(error, match="on the way"):
            method(images, pipe, steps=2)
    else:
        method(images, pipe, steps=2)
    for (name, flag, value), (name_now, flag_now, value_now) in zip(before, state(pipe), strict=True):
        assert (name, flag) == (name_now, flag_now)
        assert torch.equal(value, value_now) if isinstance(value, Tensor) else value == value_now


def test_running_out_of_memory_halves_the_batch_and_changes_nothing(pipe, pictures, monkeypatch):
    how = {"eps": EPS, "step_size": STEP, "steps": 3}
    expected = protect.advdm(pictures, pipe, **how)
    sizes, vjp = [], DiffusionModel.vjp

    def limited(self: DiffusionModel, images: Tensor, *args: object, **kwargs: object) -> Tensor:
        sizes.append(len(images))
        if len(images) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return vjp(self, images, *args, **kwargs)

    monkeypatch.setattr(DiffusionModel, "vjp", limited)
    assert signs_agree(protect.advdm(pictures, pipe, **how), expected, pictures) > 0.999
    assert sizes == [3, 2] + [1] * 9


def test_half_precision_networks_keep_pictures_in_single_precision(pictures):
    pipe = testbed.load(dtype=torch.bfloat16)
    how = {"eps": EPS, "step_size": STEP / 100, "steps": 3, "random_start": False}
    protected = protect.advdm(pictures, pipe, **how)
    assert protected.dtype == torch.float32
    # steps of 4e-5 would vanish in bfloat16 beside values near 1
    assert (protected - pictures).abs().max() <= 3.01 * STEP / 100
    assert (protected != pictures).double().mean() > 0.9


def test_an_autoencoder_that_overflows_in_float16_runs_in_float32(pictures):
    pipe = tiny_pipeline("sd1")
    with torch.no_grad():
        pipe.vae.encoder.conv_in.weight.mul_(3e5)
    reference = copy.deepcopy(pipe)
    pipe.vae.half()
    images = pictures[:, :, :32, :32].contiguous()
    with pytest.warns(ProtectionWarning, match="overflows in float16"):
        found = protect.photoguard(images, pipe, steps=2, eps=EPS)
    assert pipe.vae.dtype == torch.float16
    expected = protect.photoguard(images, reference, steps=2, eps=EPS)
    assert signs_agree(found, expected, images) > 0.98


def test_no_budget_returns_the_pictures_and_says_so(pipe, pictures):
    with pytest.warns(ProtectionWarning, match="eps: got 0"):
        assert torch.equal(protect.advdm(pictures, pipe, eps=0), pictures)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"eps": 8}, ValueError, r"eps: got 8, expected 0 to 1.*8/255"),
        ({"eps": -0.1}, ValueError, "eps: got -0.1"),
        ({"eps": float("nan")}, ValueError, "eps: got nan"),
        ({"eps": "8/255"}, TypeError, "eps: got a str"),
        ({"steps": 0}, ValueError, "steps: got 0, expected at least 1"),
        ({"step_size": 2.0}, ValueError, "step_size: got 2"),
        ({"prompt": None}, TypeError, "prompt: got a NoneType"),
        ({"direction": "up"}, ValueError, "direction: got 'up'"),
        ({"seed": [1, 2]}, ValueError, "seed: got 2, expected one, or one for each of 3 pictures"),
        ({"batch_size": 0}, ValueError, "batch_size: got 0"),
        ({"timesteps": [torch.tensor([3])]}, ValueError, "timesteps: got 1, expected one list for each"),
        ({"timesteps": [torch.tensor([1000])] * 3}, ValueError, r"timesteps: got \[1000\], expected some"),
    ],
)
def test_bad_arguments(pipe, pictures, arguments, error, message):
    with pytest.raises(error, match=message):
        protect.advdm(pictures, pipe, **arguments)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.full((1, 3, 64, 64), torch.nan), ValueError, "images: got NaN"),
        (torch.full((1, 3, 64, 64), 1.5), ValueError, "images: got 1.5 to 1.5, expected values in"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), TypeError, "images: got torch.uint8"),
        (torch.zeros(3, 64, 64), ValueError, r"images: got shape \(3, 64, 64\)"),
        (torch.zeros(1, 3, 4, 4), ValueError, "4, expected a positive multiple of 8"),
        (torch.zeros(1, 3, 64, 60), ValueError, "60, expected a positive multiple of 8"),
    ],
)
def test_bad_pictures(pipe, images, error, message):
    with pytest.raises(error, match=message):
        protect.advdm(images, pipe)
