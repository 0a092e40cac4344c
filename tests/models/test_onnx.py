"""ONNX Runtime gives what torch gives, for every network, batch and size, and says what it cannot."""

import copy
import sys

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import nn

from pumice import erase, memorization, models, ops, personalize, purify
from pumice.models import PixelDenoiser, UnsupportedModelError
from pumice.models.onnx import Denoiser, Graph
from pumice.testbed import tiny_pipeline


@pytest.fixture(scope="module")
def denoiser():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=16,
            out_channels=6,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
            attention_head_dim=4,
            resnet_time_scale_shift="scale_shift",
        )
    return PixelDenoiser(unet.eval(), DDPMScheduler(variance_type="learned_range"))


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    return tmp_path_factory.mktemp("graphs")


def test_a_pixel_denoiser_of_any_batch_and_size(denoiser, graphs):
    exported = models.onnxruntime(denoiser, graphs)
    for shape in ((2, 3, 16, 16), (1, 3, 16, 16), (5, 3, 24, 32)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).contiguous(
            memory_format=torch.channels_last
        )
        with torch.no_grad():
            for ours, theirs in zip(
                exported(x, torch.tensor(400)), denoiser(x, torch.tensor(400)), strict=True
            ):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


def test_purification_is_the_same(denoiser, graphs, monkeypatch):
    images = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(2))
    exported = models.onnxruntime(denoiser, graphs)
    how = {"t": 3, "iterations": 2, "seed": 4}
    torch.testing.assert_close(
        purify.gridpure(images, exported, **how), purify.gridpure(images, denoiser, **how), rtol=0, atol=1e-4
    )
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: pytest.fail("exported again"))
    models.onnxruntime(denoiser, graphs)


def test_a_text_to_image_model(graphs):
    model = models.load(tiny_pipeline("sd1"))
    exported = models.onnxruntime(model, graphs)
    assert type(model.pipe.unet) is not type(exported.pipe.unet), "the given pipeline keeps its networks"
    assert models.fingerprint(exported) == models.fingerprint(model), "it is the same model"
    images = torch.rand(3, 3, 32, 48, generator=torch.Generator().manual_seed(3))
    t = torch.tensor([1, 500, 999])
    with torch.no_grad():
        embeds = model.encode_prompt(["a red cat", "", "the sea"])
        z = model.encode_image(images)
        pairs = [
            (exported.encode_image(images), z),
            (exported.decode_latents(z), model.decode_latents(z)),
            (exported.predict(z, t, embeds), model.predict(z, t, embeds)),
        ]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_pipeline_draws_by_it_and_nothing_else_is_promised(graphs):
    model = models.load(tiny_pipeline("sd1"))
    exported = models.onnxruntime(model, graphs)
    how = {"num_inference_steps": 2, "output_type": "pt"}
    ours, theirs = (
        each.pipe("a red cat", generator=torch.Generator().manual_seed(0), **how).images
        for each in (exported, model)
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)
    t = 500.9  # as Euler's schedulers have them
    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        embeds = model.encode_prompt("a red cat").embeds
        found, expected = (each.unet(z, t, embeds, return_dict=False)[0] for each in (exported, model))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(UnsupportedModelError, match="ONNX Runtime"):
        erase.uce(exported, "cat")
    with pytest.raises(UnsupportedModelError, match="ONNX Runtime"):
        personalize.dreambooth(exported, torch.rand(2, 3, 32, 32), "a photo of sks cat", steps=1)
    with pytest.raises(UnsupportedModelError, match="takes no class_labels"):
        exported.unet(z, 1, embeds, class_labels=torch.zeros(1))


def test_narrower_networks(graphs):
    half = models.load(tiny_pipeline("sd1").to(torch.float16))
    exported, images = models.onnxruntime(half, graphs), torch.rand(1, 3, 32, 32)
    assert exported.vae.dtype == torch.float32
    with torch.no_grad():
        z = half.encode_image(images)
        torch.testing.assert_close(exported.encode_image(images), z, rtol=0, atol=1e-2)
        embeds = half.encode_prompt("a red cat")
        found, expected = (each.predict(z, 5, embeds) for each in (exported, half))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-2)
    with pytest.raises(UnsupportedModelError, match=r"in torch.bfloat16, expected float32 or float16"):
        models.onnxruntime(models.load(tiny_pipeline("sd1").to(torch.bfloat16)), graphs)


def test_a_graph_that_does_not_run_is_not_kept(denoiser, tmp_path, monkeypatch):
    monkeypatch.setattr("onnxruntime.InferenceSession", lambda *_, **__: 1 / 0)
    with pytest.raises(UnsupportedModelError, match=r"onnxruntime cannot run denoiser-.*division by zero"):
        models.onnxruntime(denoiser, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_conditioning_of_sdxl(graphs):
    model = models.load(tiny_pipeline("sdxl"))
    exported = copy.copy(model)
    exported.pipe = copy.copy(model.pipe)
    exported.pipe.unet = Denoiser(model.unet, graphs)
    z, t = torch.randn(3, 4, 16, 24, generator=torch.Generator().manual_seed(6)), torch.tensor(300)
    with torch.no_grad():
        embeds = model.encode_prompt(["a red cat", "", "the sea"])
        ours, theirs = (each.predict(z, t, embeds) for each in (exported, model))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_screening_for_memorization_is_the_same(graphs):
    pipe, prompts = tiny_pipeline("sd1"), ["a red cat", "the sea by the city", "a photo"]
    exported = models.onnxruntime(models.load(pipe), graphs)
    ours, theirs = (memorization.detect(each, prompts, seeds=2) for each in (exported, pipe))
    torch.testing.assert_close(ours.scores, theirs.scores, rtol=1e-3, atol=1e-4)


def test_an_operator_of_ours_is_exported_as_those_of_onnx(tmp_path):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            generator = torch.Generator().manual_seed(5)
            self.weight, self.bias = (nn.Parameter(torch.randn(8, generator=generator)) for _ in range(2))

        def forward(self, x):
            return ops.group_norm_silu(x, 4, self.weight, self.bias, 1e-6)

    block, x = Block(), torch.randn(2, 8, 6, 5)
    graph = Graph(tmp_path / "block.onnx", block, {"x": x}, lambda x: x)
    with torch.no_grad():
        torch.testing.assert_close(graph(x), block(x), rtol=0, atol=1e-5)


def test_gradients_are_refused(denoiser, graphs):
    exported = models.onnxruntime(denoiser, graphs)
    with pytest.raises(UnsupportedModelError, match="gives no gradients"):
        exported(torch.zeros(1, 3, 16, 16, requires_grad=True), torch.tensor(0))


def test_what_is_missing_is_said(denoiser, monkeypatch):
    with pytest.raises(ValueError, match="backend: got 'tensorrt', expected one of torch, onnxruntime"):
        models.load_denoiser(denoiser, backend="tensorrt")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(
        ValueError, match=r'needs onnxruntime, which is not installed: pip install "pumice\[onnx\]"'
    ):
        models.load_denoiser(denoiser, backend="onnxruntime")


def test_nothing_is_half_written(denoiser, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.onnx, "export", fails)
    denoiser.unet.train()
    with pytest.raises(KeyboardInterrupt):
        models.onnxruntime(denoiser, tmp_path)
    assert not list(tmp_path.iterdir())
    assert denoiser.unet.training and denoiser.unet.conv_in.training
    denoiser.unet.eval()
