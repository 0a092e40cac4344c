"""Networks that keep only what a gradient in their input needs: the same numbers, less memory, no traces."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.activations import GEGLU
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn import functional as F

from pumice import ops
from pumice.models import DiffusionModel, data_gradient, frozen, load
from pumice.testbed.tiny import tiny_pipeline

FAMILIES = ("sd1", "sd2", "sdxl")


@pytest.fixture(autouse=True)
def no_size_is_small(monkeypatch) -> None:
    """On the CPU small tensors take the ordinary way."""
    monkeypatch.setattr(data_gradient, "_SMALL", 0, raising=False)


@pytest.fixture(params=FAMILIES)
def model(request) -> DiffusionModel:
    return load(tiny_pipeline(request.param))


def randn(*shape: int, dtype=torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def through_encoder(model: DiffusionModel, images: Tensor) -> tuple[Tensor, Tensor]:
    """Latents, and the gradient of a sum of them that no direction escapes."""
    images = images.clone().requires_grad_()
    z = model.encode_image(images)
    return z.detach(), torch.autograd.grad(z, images, randn(*z.shape, dtype=z.dtype))[0]


def through_denoiser(model: DiffusionModel, latents: Tensor) -> tuple[Tensor, Tensor]:
    latents = latents.clone().requires_grad_()
    output = model.predict(latents, torch.tensor([20, 700]), model.encode_prompt("a red cat"))
    return output.detach(), torch.autograd.grad(output, latents, randn(*output.shape, dtype=output.dtype))[0]


PATHS = {
    "encoder": (through_encoder, lambda model: randn(2, 3, 32, 48).sigmoid()),
    "denoiser": (through_denoiser, lambda model: randn(2, *model.latent_shape())),
}


# --- Numbers


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_networks_give_what_autograd_gives(model, path, dtype, tolerance):
    model.pipe.to(dtype=dtype)
    through, given = PATHS[path]
    x = given(model).to(dtype)
    with model.frozen():
        output, gradient = through(model, x)
    with model.frozen(data_gradient=True):
        lean_output, lean_gradient = through(model, x)
    # relative to the largest element: float32 rounds sums of terms that cancel
    for found, expected in ((lean_output, output), (lean_gradient, gradient)):
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize(
    "how",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "stride": 2},
        {"kernel_size": 1, "bias": False},
        {"kernel_size": 3, "padding": 2, "dilation": 2, "groups": 2},
    ],
)
def test_convolutions_give_what_autograd_gives(how):
    conv = nn.Conv2d(4, 6, **how).double().requires_grad_(False)
    x = randn(2, 4, 5, 7, dtype=torch.float64).requires_grad_()

    def forward(x: Tensor) -> Tensor:
        return data_gradient._convolution(conv, x)

    assert torch.equal(forward(x), conv(x))
    assert torch.autograd.gradcheck(forward, x)


def test_gated_gelus_give_what_autograd_gives():
    gated = GEGLU(3, 5).double().requires_grad_(False)
    x = randn(2, 4, 3, dtype=torch.float64).requires_grad_()

    def forward(x: Tensor) -> Tensor:
        return data_gradient._geglu(gated, x)

    torch.testing.assert_close(forward(x), gated(x), rtol=1e-14, atol=1e-14)
    assert torch.autograd.gradcheck(forward, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_no_worse_than_autograd(dtype):
    exact = load(tiny_pipeline("sd1"))
    low = load(tiny_pipeline("sd1").to(dtype=dtype))
    x = PATHS["encoder"][1](exact)
    with exact.frozen(), low.frozen():
        _, expected = through_encoder(exact, x)
        _, plain = through_encoder(low, x)
    with low.frozen(data_gradient=True):
        _, lean = through_encoder(low, x)
    assert (lean - expected).norm() <= 1.1 * (plain - expected).norm()


def test_autocast_is_left_to_torch():
    model = load(tiny_pipeline("sd1"))
    x = randn(2, *model.latent_shape())
    with model.frozen(), torch.autocast("cpu", torch.bfloat16):
        output, gradient = through_denoiser(model, x)
    with model.frozen(data_gradient=True), torch.autocast("cpu", torch.bfloat16):
        lean_output, lean_gradient = through_denoiser(model, x)
    torch.testing.assert_close(lean_output, output, rtol=0.05, atol=0.05)
    torch.testing.assert_close(lean_gradient, gradient, rtol=0.05, atol=0.05 * float(gradient.abs().max()))


def test_drawing_inside_is_drawing_outside():
    pipe = tiny_pipeline("sdxl")
    with load(pipe).frozen(data_gradient=True):
        inside = pipe("a cat", num_inference_steps=2, generator=torch.manual_seed(0), output_type="pt").images
    outside = pipe("a cat", num_inference_steps=2, generator=torch.manual_seed(0), output_type="pt").images
    torch.testing.assert_close(inside, outside, rtol=0, atol=1e-5)


# --- Memory


@contextmanager
def kept() -> Iterator[set[int]]:
    """Addresses of what autograd keeps."""
    found: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        found.add(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def watch(monkeypatch, found: list[Tensor], owner, name: str) -> None:
    """Collect what a function is called with, kept alive so that no address is given out twice."""
    real = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda x, *rest, **named: (found.append(x), real(x, *rest, **named))[1])


@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize("path", PATHS)
def test_inputs_of_convolutions_are_not_kept(monkeypatch, path, lean):
    model = load(tiny_pipeline("sd1"))
    convolved: list[Tensor] = []
    normalized: list[Tensor] = []
    watch(monkeypatch, convolved, F, "conv2d")
    watch(monkeypatch, normalized, F, "group_norm")
    watch(monkeypatch, normalized, ops, "group_norm_silu")
    through, given = PATHS[path]
    x = given(model)
    with model.frozen(data_gradient=lean), kept() as addresses:
        through(model, x)
    # what a block begins with goes through its shortcut, too, and is kept for its normalisation
    needed = {each.data_ptr() for each in normalized}
    wasted = {each.data_ptr() for each in convolved} & addresses - needed
    assert len(convolved) > 5
    assert bool(wasted) != lean


# --- Traces


def forwards(model: DiffusionModel) -> dict[str, object]:
    """The forward methods that are not their classes'."""
    parts = (model.unet, model.vae, *model.text_encoders)
    return {
        name: module.__dict__["forward"]
        for part in parts
        for name, module in part.named_modules()
        if "forward" in vars(module)
    }


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_forward_methods_are_put_back(model, error):
    def borrow() -> None:
        with model.frozen(data_gradient=True):
            assert len(forwards(model)) > 20
            raise error

    with pytest.raises(error):
        borrow()
    assert not forwards(model)


def test_blocks_nest(model):
    with model.frozen(data_gradient=True):
        outer = forwards(model)
        with model.frozen(data_gradient=True):
            assert forwards(model) == outer
        assert forwards(model) == outer
    assert not forwards(model)


def test_hooks_are_called_as_outside():
    """Of a convolution inside a block, of the norm that a block fuses, of an activation."""
    model = load(tiny_pipeline("sd1"))
    block = model.unet.mid_block.resnets[0]
    watched = [block.conv1, block.norm2, model.vae.encoder.conv_act, block]
    seen: list[list[Tensor]] = []
    for module in watched:
        module.register_forward_hook(lambda _, args, out: seen[-1].append(out.detach().clone()))
    x, latents = PATHS["encoder"][1](model), PATHS["denoiser"][1](model)
    for lean in (False, True):
        seen.append([])
        with model.frozen(data_gradient=lean):
            through_encoder(model, x), through_denoiser(model, latents)
    plain, inside = seen
    assert len(inside) == len(plain) == len(watched)
    for found, expected in zip(inside, plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_diffusers_hook_is_left_alone():
    class Doubling(ModelHook):
        def post_forward(self, module, output):
            return 2 * output

    pipe = tiny_pipeline("sd1")
    conv = pipe.unet.mid_block.resnets[0].conv1
    HookRegistry.check_if_exists_or_initialize(conv).register_hook(Doubling(), "doubling")
    model, latents = load(pipe), randn(2, 4, 16, 16)
    theirs = vars(conv)["forward"]
    with model.frozen():
        expected = through_denoiser(model, latents)
    with model.frozen(data_gradient=True):
        assert vars(conv)["forward"] is theirs
        found = through_denoiser(model, latents)
    assert vars(conv)["forward"] is theirs
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_lora_takes_part():
    pipe = tiny_pipeline("sd1")
    pipe.unet.add_adapter(
        LoraConfig(r=2, target_modules=["to_k", "to_v", "conv1", "proj"], init_lora_weights=False)
    )
    model, latents = load(pipe), randn(2, 4, 16, 16)
    with model.frozen():
        expected = through_denoiser(model, latents)
    pipe.unet.disable_adapters()
    with model.frozen():
        without = through_denoiser(model, latents)
    pipe.unet.enable_adapters()
    with model.frozen(data_gradient=True):
        found = through_denoiser(model, latents)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found[1], without[1], rtol=1e-2)
    assert all(parameter.requires_grad for name, parameter in pipe.unet.named_parameters() if "lora" in name)


def test_a_convolution_that_pads_otherwise_is_left_alone():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.Conv2d(4, 4, 3, padding="same")
    )
    x = randn(1, 3, 6, 6)
    with frozen(net, data_gradient=True):
        assert not any("forward" in vars(conv) for conv in net)
        found = net(x)
    assert torch.equal(found, net(x))


def test_weights_that_learn_inside_get_their_gradients():
    """A block that is borrowed frozen and then thawed, as a trainer may: nothing is lost without a word."""
    conv = nn.Conv2d(3, 4, 3)
    with frozen(conv, data_gradient=True):
        conv.weight.requires_grad_(True)
        conv(randn(1, 3, 6, 6)).sum().backward()
        inside = conv.weight.grad.clone()
    conv.weight.grad = None
    conv(randn(1, 3, 6, 6)).sum().backward()
    torch.testing.assert_close(inside, conv.weight.grad)
