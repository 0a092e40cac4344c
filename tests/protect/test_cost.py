"""What a step of each method computes and keeps, counted on Stable Diffusion 1.5's sizes at 512 x 512."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

import fake_models
from pumice import protect
from pumice.models import DiffusionModel, load
from pumice.models.memory import _Live, peak_bytes
from pumice.protect.cost import ChecksPass
from pumice.protect.pgd import PGD
from pumice.testbed import tiny_pipeline

aten = torch.ops.aten
SIZE = (512, 512)


class Operations(TorchDispatchMode):
    """2 for each multiplication with an addition: of convolutions, products of matrices and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.tera = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        kind = func._overloadpacket
        if kind is aten._scaled_dot_product_flash_attention_for_cpu:
            count = sdpa_flop_count(*(t.shape for t in args[:3]))
        elif kind is aten._scaled_dot_product_flash_attention_for_cpu_backward:
            count = sdpa_backward_flop_count(*(t.shape for t in args[:4]))
        elif kind in flop_registry:
            count = flop_registry[kind](*args, **(kwargs or {}), out_val=out)
        else:
            return out
        self.tera += count / 1e12
        return out


@pytest.fixture(scope="module")
def model() -> DiffusionModel:
    return fake_models.stable_diffusion_1()


@dataclass(frozen=True)
class Step:
    """What a step of a method does: 10^12 operations, GB at most, passes of each network."""

    operations: float
    memory: float
    passes: Counter[str]


@pytest.fixture(scope="module")
def step(model) -> Callable[..., Step]:
    @functools.cache
    def run(method: Callable[..., Any], **settings: Any) -> Step:
        """The method itself on real pictures, whose one step is done on fake ones."""
        passes: Counter[str] = Counter()
        networks = {
            "encoder": model.vae.encoder,
            "decoder": model.vae.decoder,
            "denoiser": model.unet,
            "text encoder": model.pipe.text_encoder,
        }
        operations, live = Operations(), _Live()

        def stepped(self: PGD, *args: Any, **kwargs: Any) -> Tensor:
            handles = [
                network.register_forward_pre_hook(lambda *_, name=name: passes.update([name]))
                for name, network in networks.items()
            ]
            with FakeTensorMode(allow_non_fake_inputs=True), ChecksPass(), live, operations:
                real(self, *args, **kwargs)
            for handle in handles:
                handle.remove()
            return self._stacks[0].now  # the pictures stay where they are

        real = PGD._stepped
        with pytest.MonkeyPatch.context() as patch, ChecksPass():
            patch.setattr(PGD, "_stepped", stepped)
            method(torch.full((1, 3, *SIZE), 0.5), model, steps=1, **settings)
        return Step(operations.tera, live.peak / 1e9, passes)

    return run


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (protect.photoguard, 2.285),  # the encoder forward and backward
        (protect.sds, 3.09),  # and the denoiser forward
        (protect.sdst, 3.09),
        (protect.advdm, 4.08),  # and backward
        (protect.mist, 4.08),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_step_computes_nothing_that_nobody_uses(step, method, expected):
    """No gradient of a weight, no second pass, no target or prompt that is encoded again."""
    found = step(method)
    assert found.operations == pytest.approx(expected, rel=0.03)
    denoiser = {} if method is protect.photoguard else {"denoiser": 1}
    assert found.passes == {"encoder": 1} | denoiser


def test_computing_again_costs_a_pass_of_the_encoder_and_spares_its_memory(step):
    kept, again = step(protect.advdm), step(protect.advdm, recompute=True)
    assert again.passes == {"encoder": 2, "denoiser": 1}
    assert again.operations - kept.operations == pytest.approx(1.117, rel=0.03)
    assert again.memory < 0.6 * kept.memory


def test_the_denoiser_is_gone_from_memory_before_the_encoder_goes_backward(step):
    """One that is only passed forward adds nothing to the peak, one that goes backward less than itself."""
    encoder, forward, both = (step(m).memory for m in (protect.photoguard, protect.sds, protect.advdm))
    assert forward < 1.2 * encoder
    assert encoder < both < 2.2 * encoder


@pytest.mark.parametrize("frozen", [False, True])
def test_a_step_keeps_less_than_half_of_what_plain_diffusers_keeps(step, model, frozen):
    """AdvDM's step as autograd does it, with weights that require gradients and with frozen ones."""
    for part in (model.unet, model.vae):
        part.requires_grad_(not frozen)

    def plain() -> None:
        images = torch.rand(1, 3, *SIZE, dtype=torch.bfloat16).requires_grad_()
        z = model.vae.encode(images).latent_dist.mean
        output = model.unet(z, torch.zeros(1), torch.rand(1, 77, 768, dtype=torch.bfloat16)).sample
        (output.float() - 1).square().sum().backward()
        for part in (model.unet, model.vae):
            part.zero_grad()

    assert step(protect.advdm).memory < 0.5 * peak_bytes(plain) / 1e9


def test_no_step_walks_through_the_modules_of_the_pipeline(monkeypatch):
    """As diffusers does to tell the device, in milliseconds."""
    model = load(tiny_pipeline("sd1"))
    real, calls = type(model.pipe)._execution_device.fget, []
    monkeypatch.setattr(
        type(model.pipe), "_execution_device", property(lambda self: (calls.append(1), real(self))[1])
    )
    pictures = torch.full((1, 3, 32, 32), 0.5)

    def walks(steps: int) -> int:
        calls.clear()
        protect.advdm(pictures, model, steps=steps)
        return len(calls)

    assert walks(3) == walks(1)
