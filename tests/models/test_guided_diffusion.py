from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from pumice import models
from pumice.models import UnsupportedModelError
from pumice.models.guided_diffusion import converted, load_guided_diffusion

Weights = dict[str, Tensor]


def checkpoint(
    width: int = 64,
    mults: tuple[int, ...] = (1, 2),
    attention: tuple[int, ...] = (1,),
    blocks: int = 1,
    *,
    updown: bool = True,
    scale_shift: bool = True,
    out_channels: int = 6,
    device: str = "cpu",
) -> Weights:
    """Random weights under the names of a UNetModel; nothing is zero, nor is any norm the identity."""
    draw = torch.Generator(device).manual_seed(0) if device == "cpu" else None
    weights: Weights = {}

    def layer(name: str, *shape: int) -> None:
        spread = 1 / math.sqrt(max(1, math.prod(shape[1:])))
        weights[f"{name}.weight"] = torch.randn(shape, generator=draw, device=device) * spread
        weights[f"{name}.bias"] = torch.randn(shape[0], generator=draw, device=device) * 0.1

    def norm(name: str, channels: int) -> None:
        weights[f"{name}.weight"] = 1 + 0.2 * torch.randn(channels, generator=draw, device=device)
        weights[f"{name}.bias"] = 0.2 * torch.randn(channels, generator=draw, device=device)

    def res(name: str, before: int, after: int) -> None:
        norm(f"{name}.in_layers.0", before)
        layer(f"{name}.in_layers.2", after, before, 3, 3)
        layer(f"{name}.emb_layers.1", after * (2 if scale_shift else 1), 4 * width)
        norm(f"{name}.out_layers.0", after)
        layer(f"{name}.out_layers.3", after, after, 3, 3)
        if before != after:
            layer(f"{name}.skip_connection", after, before, 1, 1)

    def attend(name: str, channels: int) -> None:
        norm(f"{name}.norm", channels)
        layer(f"{name}.qkv", 3 * channels, channels, 1)
        layer(f"{name}.proj_out", channels, channels, 1)

    layer("time_embed.0", 4 * width, width)
    layer("time_embed.2", 4 * width, 4 * width)
    layer("input_blocks.0.0", width, 3, 3, 3)
    now, skips, number = width, [width], 1
    for level, mult in enumerate(mults):
        for _ in range(blocks):
            res(f"input_blocks.{number}.0", now, mult * width)
            now = mult * width
            if level in attention:
                attend(f"input_blocks.{number}.1", now)
            skips.append(now)
            number += 1
        if level < len(mults) - 1:
            if updown:
                res(f"input_blocks.{number}.0", now, now)
            else:
                layer(f"input_blocks.{number}.0.op", now, now, 3, 3)
            skips.append(now)
            number += 1
    res("middle_block.0", now, now)
    attend("middle_block.1", now)
    res("middle_block.2", now, now)
    number = 0
    for level, mult in reversed(list(enumerate(mults))):
        for block in range(blocks + 1):
            res(f"output_blocks.{number}.0", now + skips.pop(), mult * width)
            now = mult * width
            if level in attention:
                attend(f"output_blocks.{number}.1", now)
            if level and block == blocks:
                name = f"output_blocks.{number}.{1 + (level in attention)}"
                if updown:
                    res(name, now, now)
                else:
                    layer(f"{name}.conv", now, now, 3, 3)
            number += 1
    norm("out.0", now)
    layer("out.2", out_channels, now, 3, 3)
    return weights


def forward(weights: Weights, x: Tensor, t: Tensor) -> Tensor:
    """A UNetModel from its description, in float64; where it changes the size is read off its names."""
    w = {key: value.double() for key, value in weights.items()}
    width = w["time_embed.0.weight"].shape[1]
    frequencies = torch.exp(-math.log(10000) * torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    angles = t.double()[:, None] * frequencies
    steps = torch.cat((angles.cos(), angles.sin()), dim=1)

    def linear(name: str, h: Tensor) -> Tensor:
        return F.linear(h, w[f"{name}.weight"], w[f"{name}.bias"])

    def conv(name: str, h: Tensor, stride: int = 1) -> Tensor:
        weight = w[f"{name}.weight"]
        return F.conv2d(h, weight, w[f"{name}.bias"], stride=stride, padding=weight.shape[-1] // 2)

    def norm(name: str, h: Tensor) -> Tensor:
        return F.group_norm(h, 32, w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-5)

    emb = linear("time_embed.2", F.silu(linear("time_embed.0", steps)))

    def res(name: str, h: Tensor, scale: float) -> Tensor:
        inner = F.silu(norm(f"{name}.in_layers.0", h))
        if scale != 1:
            mode = "area" if scale < 1 else "nearest"
            inner, h = (F.interpolate(each, scale_factor=scale, mode=mode) for each in (inner, h))
        inner = conv(f"{name}.in_layers.2", inner)
        of_time = linear(f"{name}.emb_layers.1", F.silu(emb))[..., None, None]
        if of_time.shape[1] == 2 * inner.shape[1]:
            gain, shift = of_time.chunk(2, dim=1)
            inner = norm(f"{name}.out_layers.0", inner) * (1 + gain) + shift
        else:
            inner = norm(f"{name}.out_layers.0", inner + of_time)
        if f"{name}.skip_connection.weight" in w:
            h = conv(f"{name}.skip_connection", h)
        return h + conv(f"{name}.out_layers.3", F.silu(inner))

    def attend(name: str, h: Tensor) -> Tensor:
        flat = norm(f"{name}.norm", h).flatten(2)
        qkv = F.conv1d(flat, w[f"{name}.qkv.weight"], w[f"{name}.qkv.bias"])
        found = []
        for q, k, v in (head.chunk(3, dim=1) for head in qkv.split(3 * 64, dim=1)):
            found.append(v @ (q.transpose(1, 2) @ k / 8).softmax(dim=2).transpose(1, 2))
        out = F.conv1d(torch.cat(found, dim=1), w[f"{name}.proj_out.weight"], w[f"{name}.proj_out.bias"])
        return h + out.unflatten(2, h.shape[2:])

    def block(name: str, h: Tensor, resampling: float) -> Tensor:
        """All modules of a block; `resampling` is what its last ResNet block does to the size."""
        number = 0
        while any(key.startswith(f"{name}.{number}.") for key in w):
            part, number = f"{name}.{number}", number + 1
            last = not any(key.startswith(f"{name}.{number}.") for key in w)
            if f"{part}.qkv.weight" in w:
                h = attend(part, h)
            elif f"{part}.op.weight" in w:
                h = conv(f"{part}.op", h, stride=2)
            elif f"{part}.conv.weight" in w:
                h = conv(f"{part}.conv", F.interpolate(h, scale_factor=2.0, mode="nearest"))
            elif f"{part}.in_layers.0.weight" in w:
                h = res(part, h, resampling if last else 1)
            else:
                h = conv(part, h)
        return h

    inputs = 1 + max(int(key.split(".")[1]) for key in w if key.startswith("input_blocks"))
    ups = [f"output_blocks.{n}" for n in range(inputs) if _enlarges(w, n)]
    period = 1 + int(ups[0].split(".")[1]) if ups else inputs
    h, skips = x.double(), []
    for n in range(inputs):
        h = block(f"input_blocks.{n}", h, 0.5 if n and n % period == 0 else 1)
        skips.append(h)
    h = block("middle_block", h, 1)
    for n in range(inputs):
        name = f"output_blocks.{n}"
        h = block(name, torch.cat((h, skips.pop()), dim=1), 2.0 if name in ups else 1)
    return conv("out.2", F.silu(norm("out.0", h)))


def _enlarges(w: Weights, n: int) -> bool:
    names = (f"output_blocks.{n}.{part}.{kind}" for part in (1, 2) for kind in ("conv", "in_layers.0"))
    return any(f"{name}.weight" in w for name in names)


def written(path: Path, weights: Weights, **metadata: str) -> Path:
    save_file(weights, path, metadata or None)
    return path


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"updown": False, "out_channels": 3},
        {"mults": (1, 1, 2), "attention": (1, 2), "blocks": 2},
        {"mults": (1, 2, 2), "attention": (1,), "scale_shift": False, "updown": False},
        {"attention": (), "blocks": 2},
        {"mults": (1,), "attention": (0,)},
    ],
    ids=["resnets", "convolutions", "three levels", "no scale", "attention in the middle only", "one level"],
)
def test_it_is_the_network_of_the_description(tmp_path: Path, shape: dict[str, Any]) -> None:
    weights = checkpoint(**shape)
    unet = load_guided_diffusion(written(tmp_path / "x.safetensors", weights)).double()
    x = torch.randn(2, 3, 16, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([3, 871])
    with torch.no_grad():
        found = unet(x, t, return_dict=False)[0]
        expected = forward(weights, x, t)
    # the timestep's sines are float32 in diffusers
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.real_empty  # there is no memory to poison, and on "meta" it is slow
def test_the_published_one_has_its_parameters() -> None:
    weights = checkpoint(256, (1, 1, 2, 2, 4, 4), (3, 4, 5), blocks=2, device="meta")
    config, renamed = converted(weights, Path("256x256_diffusion_uncond.safetensors"))
    with torch.device("meta"):
        unet = UNet2DModel(**config)
    assert {key: value.shape for key, value in unet.state_dict().items()} == {
        key: value.shape for key, value in renamed.items()
    }
    assert round(sum(each.numel() for each in renamed.values()) / 1e5) == 5528  # 552.8 million


def test_a_denoiser_of_it(tmp_path: Path) -> None:
    path = written(tmp_path / "small.safetensors", checkpoint(), image_size="32")
    denoiser = models.load_denoiser(path)
    assert (denoiser.size, denoiser.variance, denoiser.multiple) == (32, "learned_range", 2)
    assert denoiser.schedule.num_train_timesteps == 1000
    assert not denoiser.unet.training
    unsaid = written(tmp_path / "plain.safetensors", checkpoint(out_channels=3))
    denoiser = models.load_denoiser(unsaid, dtype=torch.bfloat16)
    assert (denoiser.size, denoiser.variance, denoiser.dtype) == (256, "fixed_large", torch.bfloat16)
    assert denoiser(torch.zeros(1, 3, 16, 16), torch.tensor(5)).x0.isfinite().all()


def refusal(path: Path) -> str:
    with pytest.raises(ValueError, match="denoiser") as found:
        models.load_denoiser(path)
    assert "\n" not in str(found.value)
    return str(found.value)


def test_a_file_of_torch_is_told_how_to_be_converted(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(checkpoint(), path)
    assert "safetensors.torch.save_file(torch.load(path, weights_only=True)" in refusal(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"nothing of the kind")
    assert "cannot be loaded" in refusal(path)
    assert "image_size 'large'" in refusal(written(path, checkpoint(), image_size="large"))
    assert "image_size '0'" in refusal(written(path, checkpoint(), image_size="0"))
    assert "is not of guided diffusion" in refusal(written(path, {"weight": torch.zeros(2)}))


def without(name: str) -> Weights:
    return {key: value for key, value in checkpoint().items() if not key.startswith(name)}


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (lambda: {**checkpoint(), "label_emb.weight": torch.zeros(10, 256)}, "is of classes"),
        (lambda: {**checkpoint(), "more.weight": torch.zeros(1)}, "has more than"),
        (lambda: without("out.2"), "no 'out.2.weight'"),
        (lambda: without("middle_block.1"), "no 'middle_block.1"),
        (lambda: without("output_blocks"), "no 'output_blocks"),
        (lambda: checkpoint(32, (2, 4)), "expected one width"),
        (lambda: checkpoint(32, (1, 3)), "no attention heads of 64"),
    ],
    ids=["classes", "more", "no output", "no middle", "nothing upwards", "other width", "other heads"],
)
def test_other_models_are_refused(tmp_path: Path, weights: Callable[[], Weights], said: str) -> None:
    path = written(tmp_path / "x.safetensors", weights())
    with pytest.raises(UnsupportedModelError):
        models.load_denoiser(path)
    assert said in refusal(path)


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    weights = checkpoint()
    weights["output_blocks.1.0.in_layers.2.weight"] = torch.zeros(128, 64, 3, 3)
    assert "cannot be loaded" in refusal(written(tmp_path / "x.safetensors", weights))
