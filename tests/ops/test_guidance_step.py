from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from opchecks import STORAGE, assert_kernel_close, assert_magnitudes_close, layouts
from pumice import ops
from pumice.ops.guidance_step import PREDICTIONS

COEFFICIENTS = [0.8, 0.6, 0.9, 0.3, 0.05, 0.4]


def inputs(
    shape: tuple[int, ...], device: str, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[Tensor]:
    """x, cond, uncond, noise."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g).to(device, dtype) for _ in range(4)]


def coefficients(device: str, *rows: list[float]) -> Tensor:
    return torch.tensor(rows[0] if len(rows) == 1 else rows, device=device)


def step(
    x: Tensor, cond: Tensor, uncond: Tensor, noise: Tensor | None = None, **kwargs: Any
) -> ops.GuidanceStep:
    kwargs = {"guidance_scale": 7.5, "coefficients": coefficients(x.device.type, COEFFICIENTS), **kwargs}
    if x.dtype == torch.float64:
        kwargs["coefficients"] = kwargs["coefficients"].double()
    return ops.guidance_step(x, cond, uncond, noise=noise, **kwargs)


def check(x: Tensor, cond: Tensor, uncond: Tensor, noise: Tensor | None = None, **kwargs: Any) -> None:
    actual = step(x, cond, uncond, noise, **kwargs)
    with ops.backend("torch"):
        plain = step(x, cond, uncond, noise, **kwargs)
        doubles = (None if t is None else t.double() for t in (x, cond, uncond, noise))
        exact = step(*doubles, **kwargs)  # type: ignore[arg-type]
    assert actual.sample.dtype == x.dtype
    assert actual.sample.stride() == plain.sample.stride()
    assert_kernel_close(actual.sample, plain.sample, exact.sample)
    assert (actual.magnitude is None) == (not kwargs.get("magnitude"))
    if actual.magnitude is not None:
        assert_magnitudes_close(actual.magnitude, plain.magnitude, exact.magnitude, cond)


def test_ddim_ddpm_and_euler() -> None:
    """The layout of the coefficients, against the three samplers' own formulas."""
    x, cond, uncond, noise = (t.double() for t in inputs((2, 4, 3, 3), "cpu"))
    out = uncond + 3.0 * (cond - uncond)
    abar, before = 0.3, 0.6

    a, s, pa, ps = abar**0.5, (1 - abar) ** 0.5, before**0.5, (1 - before) ** 0.5
    x0 = (x - s * out) / a
    std = 0.5 * (ps**2 / s**2 * (1 - abar / before)) ** 0.5
    ddim = pa * x0 + (ps**2 - std**2) ** 0.5 * out + std * noise
    row = torch.tensor([a, s, pa, (ps**2 - std**2) ** 0.5, 0, std])
    torch.testing.assert_close(
        step(x, cond, uncond, noise, guidance_scale=3.0, coefficients=row).sample, ddim
    )

    alpha = abar / before
    x0 = x0.clamp(-1, 1)
    mean = pa * (1 - alpha) / (1 - abar) * x0 + alpha**0.5 * (1 - before) / (1 - abar) * x
    std = ((1 - before) / (1 - abar) * (1 - alpha)) ** 0.5
    row = torch.tensor([a, s, pa * (1 - alpha) / (1 - abar), 0, alpha**0.5 * (1 - before) / (1 - abar), std])
    ddpm = step(x, cond, uncond, noise, guidance_scale=3.0, coefficients=row, clip_sample=1.0).sample
    torch.testing.assert_close(ddpm, mean + std * noise)

    sigma, lower = 0.7, 0.5
    row = torch.tensor([1 - sigma, sigma, 1 - lower, lower, 0, 0])
    euler = step(x, cond, uncond, guidance_scale=3.0, coefficients=row, prediction_type="flow").sample
    torch.testing.assert_close(euler, x + (lower - sigma) * out)


def test_v_prediction_is_the_same_step() -> None:
    x, cond, uncond, _ = (t.double() for t in inputs((2, 4, 3, 3), "cpu"))
    a, s = COEFFICIENTS[:2]  # v of x0 and eps, where x = a x0 + s eps: eps = a v + s x
    by_v = step(x, cond, uncond, prediction_type="v_prediction").sample
    by_eps = step(x, a * cond + s * x, a * uncond + s * x).sample
    torch.testing.assert_close(by_v, by_eps, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("magnitude", [False, True], ids=["plain", "magnitude"])
@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_kernel(kernel: str, device: str, dtype: torch.dtype, magnitude: bool, prediction: Any) -> None:
    for shape in ((1, 1, 1), (3, 4, 33, 37), (2, 4, 64, 64)):
        x, cond, uncond, noise = inputs(shape, device, dtype)
        check(x, cond, uncond, noise, magnitude=magnitude, prediction_type=prediction, clip_sample=1.0)
        check(x, cond, uncond, magnitude=magnitude, prediction_type=prediction)


@pytest.mark.parametrize("magnitude", [False, True], ids=["plain", "magnitude"])
def test_dtypes_of_x_and_model_may_differ(kernel: str, device: str, magnitude: bool) -> None:
    for state in STORAGE:
        for model in STORAGE:
            x, cond, uncond, noise = inputs((2, 4, 6, 6), device)
            check(x.to(state), cond.to(model), uncond.to(model), noise.to(state), magnitude=magnitude)


@pytest.mark.parametrize("magnitude", [False, True], ids=["plain", "magnitude"])
def test_tails(kernel: str, device: str, magnitude: bool) -> None:
    for tail in range(17):
        check(*inputs((2, 3, 16 + tail), device), magnitude=magnitude)


@pytest.mark.parametrize("magnitude", [False, True], ids=["plain", "magnitude"])
def test_layouts(kernel: str, device: str, magnitude: bool) -> None:
    shape = (2, 4, 5, 7)
    tensors = inputs(shape, device)
    g = torch.Generator().manual_seed(1)
    for _, other in layouts(lambda *s: torch.randn(s, generator=g).to(device), shape):
        for i in range(4):
            check(*tensors[:i], other, *tensors[i + 1 :], magnitude=magnitude)
        check(other, other * 2, other * 3, other, magnitude=magnitude)


@pytest.mark.parametrize("magnitude", [False, True], ids=["plain", "magnitude"])
def test_per_sample(kernel: str, device: str, magnitude: bool) -> None:
    x, cond, uncond, noise = inputs((3, 4, 5, 5), device)
    rows = coefficients(device, COEFFICIENTS, [0.5, 0.8, 1, 0, 0, 0], [1, 0, 0, 0, 1, 0])
    scales = torch.tensor([7.5, 1.0, 0.0], device=device)
    check(x, cond, uncond[:1], noise, guidance_scale=scales, coefficients=rows, magnitude=magnitude)
    check(
        x,
        cond,
        uncond,
        noise,
        guidance_scale=scales,
        coefficients=rows.t().contiguous().t(),
        magnitude=magnitude,
    )


def test_empty(kernel: str, device: str) -> None:
    for shape in ((0, 4, 2, 2), (2, 4, 0)):
        assert step(*inputs(shape, device), magnitude=True).sample.shape == shape


def test_nan(kernel: str, device: str) -> None:
    for position in range(4):
        tensors = inputs((2, 4, 3, 3), device)
        tensors[position][0, 1, 2, 2] = torch.nan
        check(*tensors, clip_sample=1.0, magnitude=True)


def test_gradcheck(device: str) -> None:
    tensors = [t.double().requires_grad_() for t in inputs((2, 2, 2, 2), device)]

    def f(*tensors: Tensor) -> tuple[Tensor, ...]:
        result = step(*tensors, magnitude=True, prediction_type="v_prediction")
        return (result.sample, *result.magnitude)

    assert torch.autograd.gradcheck(f, tensors)


def test_opcheck(device: str) -> None:
    x, cond, uncond, noise = inputs((2, 4, 5, 7), device)
    row = coefficients(device, COEFFICIENTS).view(1, 6)
    op = torch.ops.pumice.guidance_step.default
    torch.library.opcheck(
        op, (x, cond.half(), uncond[:1].half(), 2.0, None, row, noise, "epsilon", None, False)
    )
    last = [t.to(memory_format=torch.channels_last) for t in (x, cond, uncond)]
    scales = torch.ones(2, device=device)
    torch.library.opcheck(op, (*last, 0.0, scales, row, None, "v_prediction", 1.0, True))


@pytest.mark.real_empty
def test_compiles(device: str) -> None:
    def f(x: Tensor, cond: Tensor, uncond: Tensor, noise: Tensor) -> Tensor:
        result = step(x * 2, cond, uncond, noise, magnitude=True)
        return result.sample.sum((1, 2, 3)) + result.magnitude.difference

    tensors = inputs((2, 4, 8, 8), device)
    torch.testing.assert_close(torch.compile(f, fullgraph=True, backend="aot_eager")(*tensors), f(*tensors))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 4, 3).long()}, TypeError, "^x is int64"),
        ({"cond": torch.zeros(2, 4, 5)}, ValueError, "^uncond has shape"),
        ({"x": torch.zeros(1, 4, 3)}, ValueError, "^cond has shape"),
        ({"noise": torch.zeros(2, 4, 4)}, ValueError, "^noise has shape"),
        ({"noise": torch.zeros(2, 4, 3).half()}, TypeError, "^noise is float16"),
        ({"coefficients": torch.zeros(5)}, ValueError, r"^coefficients has shape \(5,\)"),
        ({"coefficients": torch.zeros(6).double()}, TypeError, "^coefficients is float64"),
        ({"coefficients": [0.0] * 6}, TypeError, "^coefficients must be a tensor"),
        ({"guidance_scale": None}, TypeError, "^guidance_scale must be a number"),
        ({"guidance_scale": torch.ones(5)}, ValueError, "^guidance_scale has shape"),
        ({"prediction_type": "sample"}, ValueError, "^prediction_type is 'sample'"),
        ({"clip_sample": 0.0}, ValueError, "^clip_sample is 0.0"),
    ],
    ids=str,
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {name: torch.zeros(2, 4, 3) for name in ("x", "cond", "uncond")}
    arguments |= {"guidance_scale": 7.5, "coefficients": torch.ones(6)} | change
    with pytest.raises(error, match=message):
        ops.guidance_step(**arguments)
