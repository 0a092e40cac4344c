"""Memory is told without taking any: fake tensors and real ones give the same count."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pumice.models import load
from pumice.models.memory import _Live, peak_bytes
from pumice.testbed.tiny import tiny_pipeline

MIB = 2**20


def block(mib: float) -> Tensor:
    return torch.empty(int(mib * MIB), dtype=torch.uint8)


def test_the_peak_is_what_lives_at_one_time():
    def work() -> None:
        first = block(3)
        second = block(4)
        del first
        third = block(2)
        del second, third
        block(6)

    assert peak_bytes(work) == 7 * MIB


def test_views_and_writes_in_place_take_nothing():
    def work() -> None:
        x = block(2)
        x.view(2, -1)[0].fill_(1)
        x.t().add_(1)
        x.reshape(4, -1).unbind()

    assert peak_bytes(work) == 2 * MIB


def test_what_was_there_before_does_not_count():
    weight = torch.ones(1024, 1024)
    assert peak_bytes(lambda: (weight.t(), weight[0], weight.view(-1))) == 0
    assert peak_bytes(lambda: F.linear(torch.ones(1, 1024), weight)) == 2 * 1024 * 4


def test_autograd_keeps_what_it_needs_until_the_backward_pass():
    x = torch.ones(MIB // 4, requires_grad=True)

    def squares(times: int) -> None:
        y = x
        for _ in range(times):
            y = y.square()  # keeps its input
        y.backward(torch.ones_like(y))
        x.grad = None

    grown = peak_bytes(lambda: squares(12)) - peak_bytes(lambda: squares(4))
    assert grown == pytest.approx(8 * MIB, abs=MIB)


def test_nothing_is_computed_and_nothing_taken():
    x = torch.ones(4)
    peak_bytes(lambda: x.add_(torch.ones(2**46).sum()))  # 256 TiB
    assert torch.equal(x, torch.ones(4))


def test_reading_a_value_back_is_refused():
    with pytest.raises(RuntimeError):
        peak_bytes(lambda: torch.ones(3).sum().item())


@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_fake_tensors_and_real_ones_agree(family, lean):
    model = load(tiny_pipeline(family))
    embeds, t = model.encode_prompt("a cat"), torch.tensor([500])
    latents = torch.zeros(1, *model.latent_shape())

    def work() -> None:
        x = latents.clone().requires_grad_()
        torch.autograd.grad(model.unet(x, t, embeds.embeds, **model._conditioning(x, embeds)).sample.sum(), x)

    with model.frozen(data_gradient=lean):
        told = peak_bytes(work)
        with _Live() as measured:
            work()
    assert told == pytest.approx(measured.peak, rel=0.05)
