"""Networks in ONNX Runtime beside torch: milliseconds for each picture, and whether they agree.

`python benchmarks/e2e_onnx.py [--shape testbed|sd15] [--threads 2] [--json FILE]`

The pixel denoiser, the text-to-image denoiser, encoder and decoder of the embedded model, or on a GPU (with
onnxruntime-gpu) those of Stable Diffusion 1.5's shape with random weights; then screening of prompts and
GrIDPure, whole. Outputs are compared before anything is timed, and both take turns; times are medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import end_to_end
from pumice import memorization, models, purify, testbed
from pumice.models import DiffusionModel
from pumice.testbed import world

REPEATS, BATCHES = 7, (1, 8)


def row(name: str, batch: int, ours: Callable[[], Tensor], theirs: Callable[[], Tensor]) -> dict[str, Any]:
    """`ours` runs in ONNX Runtime."""
    with torch.no_grad():
        found, expected = ours().float(), theirs().float()
        far = float((found - expected).abs().max() / expected.abs().max())
        assert far < (1e-3 if found.device.type == "cpu" else 2e-2), f"{name}: they differ by {far:g}"
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(REPEATS):
            for work, kept in zip((ours, theirs), times, strict=True):
                start = time.perf_counter()
                work().sum().item()
                kept.append(1e3 * (time.perf_counter() - start) / batch)
    onnx, torch_ = (statistics.median(each) for each in times)
    return {
        "what": name,
        "batch": batch,
        "torch_ms": round(torch_, 3),
        "onnxruntime_ms": round(onnx, 3),
        "times_faster": round(torch_ / onnx, 2),
        "relative_difference": far,
    }


def networks(model: DiffusionModel, exported: DiffusionModel) -> list[dict[str, Any]]:
    found, embeds = [], model.encode_prompt("a photo of a creature")
    for batch in BATCHES:
        z = torch.randn(batch, *model.latent_shape(), device=model.device)
        images = torch.rand(batch, 3, *(8 * side for side in z.shape[2:]), device=model.device)
        t = torch.full((batch,), 500, device=model.device)
        calls: dict[str, Callable[[DiffusionModel], Tensor]] = {
            "denoiser": lambda m, z=z, t=t: m.predict(z, t, embeds),  # type: ignore[misc]
            "encoder": lambda m, images=images: m.encode_image(images),  # type: ignore[misc]
            "decoder": lambda m, z=z: m.decode_latents(z),  # type: ignore[misc]
        }
        for name, call in calls.items():
            found.append(row(name, batch, lambda c=call: c(exported), lambda c=call: c(model)))
    return found


def pixels() -> list[dict[str, Any]]:
    denoiser = models.load_denoiser(testbed.load_denoiser())
    exported = models.load_denoiser(denoiser, backend="onnxruntime")
    found, t = [], torch.tensor(50)
    for batch in (1, 16):
        x = torch.randn(batch, 3, 32, 32)
        found.append(
            row("pixel denoiser", batch, lambda x=x: exported(x, t).x0, lambda x=x: denoiser(x, t).x0)
        )
    images = torch.stack([torch.from_numpy(world.subject(0, number)) for number in range(4)])
    how: dict[str, Any] = {"iterations": 2, "sampler": "one_shot"}
    purified = [lambda m=m: purify.gridpure(images, m, **how) for m in (exported, denoiser)]
    return [*found, row("gridpure, 2 rounds of one prediction", len(images), *purified)]


def screening(model: DiffusionModel, exported: DiffusionModel) -> list[dict[str, Any]]:
    prompts = testbed.fresh_prompts()[:16]
    both = [lambda m=m: memorization.detect(m, prompts).scores for m in (exported, model)]
    return [row("memorization.detect, a prompt", len(prompts), *both)]


def main() -> None:
    parser = end_to_end.arguments(__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = end_to_end.parse(parser)
    torch.set_num_threads(given.threads)
    model = end_to_end.load(given.device, given.shape, autoencoder=True)
    exported = models.load(model, backend="onnxruntime")
    parts: dict[str, Callable[[], Any]] = {"networks": lambda: networks(model, exported)}
    if given.shape == "testbed":
        parts |= {"pixels": pixels, "screening": lambda: screening(model, exported)}
    end_to_end.record(given, parts)


if __name__ == "__main__":
    main()
