"""What purifying a picture costs: seconds for each picture, against the published loops.

`python benchmarks/e2e_purify.py [--shape testbed|sd15] [--json FILE]`

Baselines are the published algorithms as they are, in plain torch and diffusers, a picture at a time; they
get our random numbers, and their pictures are compared with ours before anything is timed:
  gridpure         box after box, coefficients looked up at each step, 8 bits between rounds
  latent_diffpure  without a prompt: both branches of the guidance, in float32
  impress          gradients of weights that nobody reads, features of the given picture at each step, three
                   numbers read a step
Runs are short and take turns; times are medians, made those of the usual number of steps. On a GPU
`gridpure` passes 512 px through a denoiser of the shape of guided diffusion's at 256 px, in float16, and ours
runs in bfloat16 otherwise; weights are random.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor

import end_to_end
from pumice import purify, testbed
from pumice.models import DiffusionModel
from pumice.models.draws import Draws
from pumice.testbed import world

T, ITERATIONS, GAMMA = 10, 20, 0.1  # of GrIDPure
LATENT_T, SCALE = 300, 7.5
IMPRESS_STEPS = 3000

Work = Mapping[str, tuple[int, Callable[[], Tensor]]]


# --- The published algorithms, a picture at a time


@torch.no_grad()
def published_gridpure(pipe: DDPMPipeline, image: Tensor, iterations: int, seed: int) -> Tensor:
    side, device = pipe.unet.config.sample_size, pipe.unet.device
    half, length = side // 2, image.shape[1]
    abar = pipe.scheduler.alphas_cumprod.double().numpy()
    before = np.append(1.0, abar[:-1])
    beta = 1 - abar / before

    def at(table: np.ndarray, i: int) -> Tensor:
        return torch.from_numpy(table).to(device)[i].float().expand(1, 3, side, side)

    def step(x: Tensor, i: int, noise: Tensor) -> Tensor:
        output = pipe.unet(x.to(pipe.unet.dtype), torch.tensor([i], device=device)).sample.float()
        epsilon, v = output.chunk(2, dim=1)
        low = at(np.log(np.append(beta[1], beta[1:] * (1 - before[1:]) / (1 - abar[1:]))), i)
        log_variance = (v + 1) / 2 * at(np.log(beta), i) + (1 - (v + 1) / 2) * low
        x0 = at(np.sqrt(1 / abar), i) * x - at(np.sqrt(1 / abar - 1), i) * epsilon
        mean = at(beta * np.sqrt(before) / (1 - abar), i) * x0.clamp(-1, 1)
        mean = mean + at((1 - before) * np.sqrt(1 - beta) / (1 - abar), i) * x
        return mean + (i > 0) * (log_variance / 2).exp() * noise

    starts = range(0, length - half, half)
    places = list(itertools.product(starts, starts))
    for turn in range(iterations):
        corners = torch.cat((image[:, :half], image[:, -half:]), 1)
        corners = torch.cat((corners[..., :half], corners[..., -half:]), 2)
        boxes = [image[:, y : y + side, x : x + side] for y, x in places] + [corners]
        total, count = torch.zeros_like(image), torch.zeros_like(image)
        done = []
        for part, box in enumerate(boxes):
            draws = Draws([f"{seed}/{part}"], device)
            x = (box * 2 - 1)[None]
            x = at(np.sqrt(abar), T - 1) * x + at(np.sqrt(1 - abar), T - 1) * draws.normal(
                [0], "start", turn, box.shape
            )
            for number, i in enumerate(reversed(range(T))):
                x = step(x, i, draws.normal([0], f"step {number}", turn, box.shape))
            done.append((x[0] / 2 + 0.5).clamp(0, 1))
        for (top, left), box in zip(places, done, strict=False):
            total[:, top : top + side, left : left + side] += box
            count[:, top : top + side, left : left + side] += 1
        for rows, columns in itertools.product((slice(None, half), slice(-half, None)), repeat=2):
            total[:, rows, columns] += done[-1][:, rows, columns]
            count[:, rows, columns] += 1
        mixed = (1 - GAMMA) * total / count + GAMMA * image
        image = (mixed * 255).cpu().byte().to(device) / 255
    return image


@torch.no_grad()
def published_latent(model: DiffusionModel, image: Tensor, t: int, seed: int) -> Tensor:
    draws, pipe = Draws([f"{seed}/0"], model.device), model.pipe
    shape = model.latent_shape(*image.shape[1:])
    posterior = pipe.vae.encode((image * 2 - 1)[None]).latent_dist
    z = posterior.mean + posterior.std * draws.normal([0], "posterior", 0, shape)
    z = model.add_noise(z * pipe.vae.config.scaling_factor, draws.normal([0], "start", 0, shape), t)
    embeds = model.encode_prompt(["", ""]).embeds
    abar = model.schedule.alphas_cumprod
    for step, i in enumerate(range(t, -1, -1)):
        away, to = pipe.unet(torch.cat((z, z)), i, encoder_hidden_states=embeds).sample.chunk(2)
        z0 = model.schedule.to_x0(away + SCALE * (to - away), z, i)
        now, before = float(abar[i]), float(abar[i - 1]) if i else 1.0
        beta = 1 - now / before
        z = (before**0.5 * beta * z0 + (1 - beta) ** 0.5 * (1 - before) * z) / (1 - now)
        if i:
            deviation = (beta * (1 - before) / (1 - now)) ** 0.5
            z = z + deviation * draws.normal([0], f"step {step}", 0, shape)
    return (pipe.vae.decode(z / pipe.vae.config.scaling_factor).sample[0] / 2 + 0.5).clamp(0, 1)


def published_impress(model: DiffusionModel, image: Tensor, steps: int, seed: int) -> Tensor:
    vae, given = model.vae, image[None]
    noise = Draws([f"{seed}/0"], model.device).normal([0], "start", 0, image.shape)
    x = (given * 2 - 1 + 0.1 * noise).clamp(-1, 1).requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.01, eps=1e-5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=1e-5)
    for _ in range(steps):
        optimizer.zero_grad()
        passed = vae.decode(vae.encode(x.to(vae.dtype)).latent_dist.mode()).sample.float()
        error = (passed - x).square().mean()
        maps = zip(*map(purify.laplacian_pyramid, (x / 2 + 0.5, given)), strict=True)
        distance = sum((now - was).square().sum(1).mean() for now, was in maps)
        loss = error + 0.1 * (distance - 0.1).clamp(min=0)
        loss.backward()
        optimizer.step()
        schedule.step()
        x.data.clamp_(-1, 1)
        _ = loss.item(), error.item(), distance.item()  # in the progress bar
    vae.zero_grad()
    return x.detach()[0] / 2 + 0.5


# --- Measuring


def close(ours: Tensor, theirs: Tensor, least: float, within: float) -> float:
    """The share of values within so many levels of 255."""
    share = float(((ours - theirs).abs() <= within / 255).float().mean())
    assert share > least, f"only {share:.3f} of the values agree with the published algorithm's"
    return share


def row(method: str, work: Work, usual: float, repeats: int, **more: Any) -> dict[str, Any]:
    """Seconds for each picture of a run `usual` times as long; runs take turns."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for turn, (name, (_, run)) in itertools.product(range(repeats + 1), work.items()):
        start = time.perf_counter()
        run().cpu()  # read, so that a GPU is done
        if turn:  # the first one warms up
            times[name].append(time.perf_counter() - start)
    found = {name: usual * statistics.median(times[name]) / work[name][0] for name in work}
    faster = {name: found["published"] / seconds for name, seconds in found.items() if name != "published"}
    return {"method": method, "s_a_picture": found, "faster_than_published": faster} | more


def gridpure(pipe: DDPMPipeline, image: Tensor, counts: tuple[int, int], repeats: int) -> dict[str, Any]:
    def ours(count: int, **how: Any) -> Tensor:
        found: Tensor = purify.gridpure(
            image.expand(count, -1, -1, -1), pipe, t=T, iterations=1, batch_size=40, **how
        )
        return found

    # a level up or down, where rounding decides about 8 bits
    same = close(ours(1, faithful_quantize=True)[0], published_gridpure(pipe, image, 1, 0), 0.99, within=1.01)
    work = {"published": (1, lambda: published_gridpure(pipe, image, 1, 0))}
    work |= {f"ours, {n} pictures": (n, lambda n=n: ours(n)) for n in counts}
    return row("gridpure", work, ITERATIONS, repeats, same=same)


def latent(
    model: DiffusionModel, fast: DiffusionModel, image: Tensor, counts: tuple[int, int], repeats: int
) -> dict[str, Any]:
    t = 9

    def ours(which: DiffusionModel, count: int) -> Tensor:
        found: Tensor = purify.latent_diffpure(image.expand(count, -1, -1, -1), which, t=t)
        return found

    same = close(ours(model, 1)[0], published_latent(model, image, t, 0), 0.99, within=1)
    work = {"published": (1, lambda: published_latent(model, image, t, 0))}
    work |= {f"ours, {n} pictures": (n, lambda n=n: ours(fast, n)) for n in counts}
    return row("latent_diffpure", work, (LATENT_T + 1) / (t + 1), repeats, same=same)


def impress(
    model: DiffusionModel, fast: DiffusionModel, image: Tensor, counts: tuple[int, int], repeats: int
) -> dict[str, Any]:
    steps = 4

    def ours(which: DiffusionModel, count: int) -> Tensor:
        found: Tensor = purify.impress(image.expand(count, -1, -1, -1), which, steps=steps)
        return found

    same = close(ours(model, 1)[0], published_impress(model, image, steps, 0), 0.99, within=0.1)
    work = {"published": (1, lambda: published_impress(model, image, steps, 0))}
    work |= {f"ours, {n} pictures": (n, lambda n=n: ours(fast, n)) for n in counts}
    return row("impress", work, IMPRESS_STEPS / steps, repeats, same=same)


def guided_diffusion() -> DDPMPipeline:
    """Random weights of the shape of the unconditional denoiser of 256 px (552.8 M)."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        unet = UNet2DModel(
            sample_size=256,
            out_channels=6,
            layers_per_block=2,
            block_out_channels=(256, 256, 512, 512, 1024, 1024),
            down_block_types=("ResnetDownsampleBlock2D",) * 3 + ("AttnDownBlock2D",) * 3,
            up_block_types=("AttnUpBlock2D",) * 3 + ("ResnetUpsampleBlock2D",) * 3,
            attention_head_dim=64,
            resnet_time_scale_shift="scale_shift",
            downsample_type="resnet",
            upsample_type="resnet",
        )
    return DDPMPipeline(unet.half().eval(), DDPMScheduler(variance_type="learned_range"))


def on_gpu(shape: str, repeats: int) -> list[dict[str, Any]]:
    image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    image = torch.nn.functional.interpolate(image[None], (512, 512), mode="bilinear")[0].cuda()

    def models() -> tuple[DiffusionModel, DiffusionModel]:
        plain, fast = (
            end_to_end.load("cuda", shape, dtype=dtype, autoencoder=True)
            for dtype in (torch.float32, torch.bfloat16)
        )
        for part in (plain.unet, plain.vae):
            part.to(memory_format=torch.contiguous_format)
        return plain, fast

    rows: list[dict[str, Any]] = []
    for method, work in (
        ("gridpure", lambda: gridpure(guided_diffusion(), image, (1, 4), repeats)),
        ("latent_diffpure", lambda: latent(*models(), image, (1, 4), repeats)),
        ("impress", lambda: impress(*models(), image, (1, 4), repeats)),
    ):
        try:
            rows.append(work())
        except Exception as error:  # one must not take the others with it
            rows.append({"method": method, "error": f"{type(error).__name__}: {error}"})
        torch.cuda.empty_cache()
        print(rows[-1], flush=True)
    return rows


def on_cpu(repeats: int) -> list[dict[str, Any]]:
    image = torch.from_numpy(world.subject(0, 0))
    model, denoiser = end_to_end.load("cpu", "testbed"), testbed.load_denoiser()
    return [
        gridpure(denoiser, image, (1, 4), repeats),
        latent(model, model, image, (1, 4), repeats),
        impress(model, model, image, (1, 4), repeats),
    ]


def main() -> None:
    parser = end_to_end.arguments(__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    given = end_to_end.parse(parser)
    if given.device == "cuda":
        end_to_end.record(given, {"rows": lambda: on_gpu(given.shape, min(given.repeats, 3))})
    else:
        end_to_end.record(given, {"rows": lambda: on_cpu(given.repeats)})


if __name__ == "__main__":
    main()
