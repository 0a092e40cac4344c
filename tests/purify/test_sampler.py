"""The batched sampler with networks that are formulas."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from pumice.models import Denoised, NoiseSchedule
from pumice.purify.sampler import Sampler
from pumice.purify.walk import walk

SCHEDULE = NoiseSchedule.from_config(DDPMScheduler().config)
CPU = torch.device("cpu")
MEAN = 0.3


def gaussian(x: Tensor, t: Tensor) -> Denoised:
    """Exact for pictures of N(MEAN, 1), v = 1."""
    alpha, _ = SCHEDULE.alpha_sigma(t, dtype=torch.float32)
    return Denoised(MEAN + alpha * (x - alpha * MEAN), torch.ones_like(x))


def rows(*sizes: tuple[int, int]) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [MEAN + torch.randn(3, *size, generator=draw) for size in sizes]


@pytest.mark.parametrize("how", ["ddpm", "dpmsolver++", "one_shot"])
def test_a_batch_of_any_sizes_is_its_rows_alone(how):
    given, seeds, way = rows((8, 8), (8, 12), (8, 8), (8, 8)), [5, 6, 7, 8], walk(SCHEDULE, 20, how)
    batch = Sampler(gaussian, [1] * 4, CPU, seed=5, batch_size=2)(given, way)
    for row, seed, found in zip(given, seeds, batch, strict=True):
        (alone,) = Sampler(gaussian, [1], CPU, seed=seed)([row], way)
        assert torch.equal(alone, found)
    turned = Sampler(gaussian, [1] * 4, CPU, seed=seeds[::-1])(given[::-1], way)
    assert all(torch.equal(a, b) for a, b in zip(turned[::-1], batch, strict=True))


def test_a_gaussian_stays_what_it_is():
    given = rows(*[(100, 100)] * 4)  # 120,000 values
    found = torch.stack(Sampler(gaussian, [4], CPU)(given, walk(SCHEDULE, 99)))
    assert found.mean().item() == pytest.approx(MEAN, abs=0.012)
    assert found.var().item() == pytest.approx(1, abs=0.018)
    assert (found - torch.stack(given)).std() > 0.1  # but other values


def test_every_row_and_round_has_noise_of_its_own():
    given, way = [torch.zeros(3, 8, 8)] * 4, walk(SCHEDULE, 20)
    sampler = Sampler(gaussian, [1, 3], CPU)
    first, again, second = sampler(given, way), sampler(given, way), sampler(given, way, round=1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len({float(row.sum()) for row in (*first, *second)}) == 8


def test_running_out_of_memory_halves_the_batch_and_changes_nothing():
    given, way, sizes, ticks = rows(*[(8, 8)] * 5), walk(SCHEDULE, 2), [], []
    expected = Sampler(gaussian, [5], CPU)(given, way)

    def limited(x: Tensor, t: Tensor) -> Denoised:
        sizes.append(len(x))
        if len(x) > 1 and len(sizes) > 1:  # in the midst of a walk
            raise torch.OutOfMemoryError("CUDA out of memory")
        return gaussian(x, t)

    found = Sampler(limited, [5], CPU)(given, way, tick=ticks.append)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert sizes == [5, 5, 3, 2] + [1] * 15 and ticks == [1] * 5


def test_another_error_is_the_callers():
    def broken(x: Tensor, t: Tensor) -> Denoised:
        raise RuntimeError("shapes")

    with pytest.raises(RuntimeError, match="shapes"):
        Sampler(broken, [1], CPU)(rows((8, 8)), walk(SCHEDULE, 2))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"seed": [1, 2]}, ValueError, "seed: got 2, expected one, or one for each of 1 pictures"),
        ({"seed": 0.5}, TypeError, "seed: got a float"),
        ({"batch_size": 0}, ValueError, "batch_size: got 0"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        Sampler(gaussian, [1], CPU, **arguments)
