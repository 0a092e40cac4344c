"""What the end-to-end scripts share: their arguments, the models they run on, their records."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

import machine
from pumice import models, testbed
from pumice.models import DiffusionModel


def arguments(description: str | None) -> argparse.ArgumentParser:
    """--device, --shape and --json; read them with `parse`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--shape", choices=["testbed", "sd15"], help="default: sd15 on a GPU, else the testbed"
    )
    parser.add_argument("--json", type=Path)
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    found = parser.parse_args()
    found.shape = found.shape or ("sd15" if found.device == "cuda" else "testbed")
    return found


def load(device: str, shape: str) -> DiffusionModel:
    """The testbed, or Stable Diffusion 1.5's sizes with random weights, in float16 on a GPU."""
    if shape == "testbed":
        return models.load(testbed.load(device=device))
    return models.load(_sd15(device, torch.float16 if device == "cuda" else torch.float32))


def record(given: argparse.Namespace, parts: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """Run the parts and print what they found; --json has it after each part, if a later one is stopped."""
    print(machine.line(given.device))
    found: dict[str, Any] = {"machine": machine.describe(given.device), "model": given.shape}
    for name, part in parts.items():
        found[name] = part()
        print(name, json.dumps(found[name], indent=1), flush=True)
        if given.json:
            given.json.write_text(json.dumps(found, indent=1))
    return found


def seconds(work: Callable[[], object], repeats: int) -> float:
    """The median time of `work`, which ends with something read by the host, so that the device is done."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _sd15(device: str, dtype: torch.dtype) -> StableDiffusionPipeline:
    """The autoencoder, which nothing here uses, is small."""
    tiny = testbed.tiny_pipeline("sd1")
    text = CLIPTextConfig(
        vocab_size=len(tiny.tokenizer),
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=77,
        bos_token_id=tiny.tokenizer.bos_token_id,
        eos_token_id=tiny.tokenizer.eos_token_id,
        pad_token_id=tiny.tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        text_encoder = CLIPTextModel(text)
        vae = AutoencoderKL(
            latent_channels=4,
            block_out_channels=(32,) * 4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
    parts = {**tiny.components, "unet": unet, "text_encoder": text_encoder, "vae": vae}
    pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device=device, dtype=dtype)
    pipe.unet.to(memory_format=torch.channels_last)
    for part in (pipe.unet, pipe.text_encoder):
        part.eval()
    return pipe
