"""What protecting a picture costs: a step of each method, in seconds for each picture.

`python benchmarks/e2e_protect.py [--shape testbed|mid|sd15] [--no-compile] [--json FILE]`

mid is Stable Diffusion 1.5 with half its channels and pictures of 128 x 128. Baselines get our random
numbers, and their pictures are compared with ours before anything is timed:
  published   the released algorithms as they are, in float32: one picture at a time, targets and prompts
              encoded at each step, gradients of weights that nobody reads, gradient checkpointing where they
              have it; ASPL with copies of the model in each round, and latents that are encoded at each
              training step
  plain       what a careful user of diffusers writes: frozen weights, constants encoded once, one loss and
              one backward pass for the batch, channels_last, scaled dot product attention
  compiled    the same, encoder and denoiser inside torch.compile
A step is what a longer run takes more than a shorter one, so what is done once does not count; medians of
runs that take turns. On a GPU ours, plain and compiled run in bfloat16, and whole runs are extrapolated.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import end_to_end
from pumice import protect
from pumice.models import DiffusionModel
from pumice.models.draws import Draws
from pumice.protect.targets import text_pattern

PROMPT, CLASS_PROMPT = "a photo of sks person", "a photo of person"
EPS, LENGTH = 16 / 255, 1 / 255
PHOTOGUARD_EPS, PHOTOGUARD_LENGTH = 0.03, 0.01
ASPL_EPS, ASPL_LENGTH, ASPL_LR = 0.025, 0.0025, 5e-7
RATE, SDST_RATE = 1e4, 5.0
METHODS = ("photoguard", "advdm", "mist", "sdst")
USUAL = {"photoguard": 200, "advdm": 100, "mist": 100, "sdst": 100, "aspl": 50}  # steps, or rounds
LONG = {"testbed": 13, "mid": 4, "sd15": 2}  # steps of a longer run on the CPU
SAME = 0.99  # of values, in pictures of float32 networks that rounding alone sets apart


class Drawn:
    """The random numbers that our methods draw for pictures of some seeds."""

    def __init__(self, model: DiffusionModel, images: Tensor, seeds: Sequence[int]) -> None:
        self._draws = Draws([f"{seed}/0" for seed in seeds], model.device)
        self._of, self._shape = range(len(seeds)), model.latent_shape(*images.shape[2:])
        self._timesteps, self._images = model.schedule.num_train_timesteps, images

    def start(self, eps: float = EPS) -> Tensor:
        share = self._draws.uniform(self._of, "start", 0, self._images.shape[1:])
        return (self._images + eps * (2 * share - 1)).clamp(0, 1)

    def posterior(self, step: int) -> Tensor:
        return self._draws.normal(self._of, "posterior", step, self._shape)

    def t(self, step: int) -> Tensor:
        return self._draws.integers(self._of, "timestep", step, self._timesteps)

    def noise(self, step: int) -> Tensor:
        return self._draws.normal(self._of, "noise", step, self._shape)


def encoded(model: DiffusionModel, images: Tensor, noise: Tensor | float) -> Tensor:
    posterior = model.vae.encode((images * 2 - 1).to(model.vae.dtype)).latent_dist
    return (posterior.mean.float() + posterior.std.float() * noise) * model.vae.config.scaling_factor


def embedded(model: DiffusionModel, prompt: str = PROMPT, rows: int = 1) -> Tensor:
    return model.encode_prompt([prompt] * rows).embeds


def pattern(images: Tensor) -> Tensor:
    return text_pattern(*images.shape[2:])[None].to(images)


def errors(model: DiffusionModel, z: Tensor, t: Tensor, noise: Tensor, embeds: Tensor) -> Tensor:
    """The denoising loss of each picture."""
    z_t = model.schedule.add_noise(z, noise, t)
    output = model.unet(z_t.to(model.dtype), t, embeds.expand(len(z), -1, -1)).sample.float()
    return (output - model.schedule.target(z, noise, t)).square().mean((1, 2, 3))


def score(model: DiffusionModel, z: Tensor, t: Tensor, noise: Tensor, embeds: Tensor) -> Tensor:
    z_t = model.schedule.add_noise(z, noise, t)
    output = model.unet(z_t.to(model.dtype), t, embeds.expand(len(z), -1, -1)).sample.float()
    return model.schedule.to_epsilon(output, z_t, t) - noise


def moved(x: Tensor, gradient: Tensor, images: Tensor, length: float, eps: float = EPS) -> Tensor:
    to = x.detach() + length * gradient.sign()
    return (images + (to - images).clamp(-eps, eps)).clamp(0, 1)


def photoguard_length(step: int, steps: int) -> float:
    return PHOTOGUARD_LENGTH * (1 - 0.99 * step / steps)


# --- The published algorithms, a picture at a time


def published_photoguard(model: DiffusionModel, image: Tensor, steps: int, drawn: Drawn) -> Tensor:
    x = drawn.start(PHOTOGUARD_EPS)
    for step in range(steps):
        x = x.detach().requires_grad_()
        loss = -torch.linalg.vector_norm(encoded(model, x, 0.0))
        (gradient,) = torch.autograd.grad(loss, x)
        loss.item()  # in the progress bar
        x = moved(x, gradient, image, photoguard_length(step, steps), PHOTOGUARD_EPS)
    return x


def published_advdm(model: DiffusionModel, image: Tensor, steps: int, drawn: Drawn) -> Tensor:
    """As packaged by Diff-Protect: the target goes through both networks, and its loss is thrown away."""
    x = drawn.start()
    for step in range(steps):
        x = x.detach().requires_grad_()
        t, noise, embeds = drawn.t(step), drawn.noise(step), embedded(model)
        errors(model, encoded(model, pattern(image), 0.0), t, noise, embeds)
        errors(model, encoded(model, x, drawn.posterior(step)), t, noise, embeds).sum().backward()
        x = moved(x, x.grad, image, LENGTH)
    return x


def published_mist(model: DiffusionModel, image: Tensor, steps: int, drawn: Drawn) -> Tensor:
    x = drawn.start()
    for step in range(steps):
        x = x.detach().requires_grad_()
        z = encoded(model, x, drawn.posterior(step))
        embedded(model)
        z_y = encoded(model, pattern(image), 0.0)
        embedded(model)
        again = encoded(model, x, drawn.posterior(step))
        semantic = errors(model, again, drawn.t(step), drawn.noise(step), embedded(model)).sum()
        (RATE * semantic - (z - z_y).square().sum()).backward()
        x = moved(x, x.grad, image, LENGTH)
    return x


def published_sdst(model: DiffusionModel, image: Tensor, steps: int, drawn: Drawn) -> Tensor:
    x = image
    for step in range(steps):
        x = x.detach().requires_grad_()
        z = encoded(model, x, drawn.posterior(step))
        with torch.no_grad():
            away = score(model, z, drawn.t(step), drawn.noise(step), embedded(model))
        z.backward(-SDST_RATE * away)
        texture = encoded(model, x, drawn.posterior(step)) - encoded(model, pattern(image), 0.0)
        (-texture.square().sum()).backward()
        x.grad.norm().item()
        x = moved(x, x.grad, image, LENGTH)
    return x


PUBLISHED: Mapping[str, Callable[..., Tensor]] = {
    "photoguard": published_photoguard,
    "advdm": published_advdm,
    "mist": published_mist,
    "sdst": published_sdst,
}


@contextmanager
def released(model: DiffusionModel, method: str) -> Iterator[None]:
    """Which weights require gradients, and what is checkpointed, in the released code."""
    model.vae.requires_grad_(method == "photoguard")
    model.unet.requires_grad_(True)
    for encoder in model.text_encoders:
        encoder.requires_grad_(method == "aspl")
    if method in ("advdm", "mist"):
        model.unet.enable_gradient_checkpointing()
        model.unet.train()
    try:
        yield
    finally:
        model.unet.disable_gradient_checkpointing()
        for part in (model.unet, model.vae, *model.text_encoders):
            part.eval().requires_grad_(True)
            part.zero_grad()


def published(model: DiffusionModel, method: str, images: Tensor, steps: int) -> Tensor:
    with released(model, method):
        parts = [
            PUBLISHED[method](model, image[None], steps, Drawn(model, image[None], [seed]))
            for seed, image in enumerate(images)
        ]
    return torch.cat(parts)


def published_aspl(model: DiffusionModel, images: Tensor, classes: Tensor, rounds: int) -> Tensor:
    """Anti-DreamBooth's: all pictures of the subject in a batch, a text encoder that learns, too."""
    main, trained, drawn = model, 0, Drawn(model, images, range(len(images)))
    main = copied(model)

    def train(pupil: DiffusionModel, instance: Tensor) -> DiffusionModel:
        nonlocal trained
        pupil = copied(pupil)
        weights = [weight for part in (pupil.unet, *pupil.text_encoders) for weight in part.parameters()]
        optimizer = torch.optim.AdamW(weights, ASPL_LR, betas=(0.9, 0.999), weight_decay=1e-2)
        draws = Draws([f"0/surrogate/{row}" for row in (0, 1)], model.device)
        for step in range(3):
            pair = torch.stack([instance[step % len(instance)], classes[step % len(classes)]])
            shape = pupil.latent_shape(*images.shape[2:])
            with torch.no_grad():
                z = encoded(pupil, pair, draws.normal([0, 1], "posterior", trained, shape))
            t = draws.integers([0, 1], "timestep", trained, pupil.schedule.num_train_timesteps)
            noise = draws.normal([0, 1], "noise", trained, shape)
            embeds = pupil.encode_prompt([PROMPT, CLASS_PROMPT]).embeds
            loss = errors(pupil, z, t, noise, embeds).sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            loss.item()
            trained += 1
        return pupil

    x = images
    with released(main, "aspl"):
        for turn in range(rounds):
            pupil = copied(train(main, images))
            for step in range(6 * turn, 6 * turn + 6):
                x = x.detach().requires_grad_()
                pupil.unet.zero_grad()
                for encoder in pupil.text_encoders:
                    encoder.zero_grad()
                z = encoded(pupil, x, drawn.posterior(step))
                embeds = embedded(pupil, rows=len(x))
                loss = errors(pupil, z, drawn.t(step), drawn.noise(step), embeds).mean()
                loss.backward()
                loss.item()
                x = moved(x, x.grad, images, ASPL_LENGTH, ASPL_EPS)
            main = train(main, x)
    return x


def copied(model: DiffusionModel) -> DiffusionModel:
    """Denoiser and text encoder copied, the autoencoder shared."""
    found = copy.copy(model)
    found.pipe = copy.copy(model.pipe)
    found.pipe.unet, found.pipe.text_encoder = map(copy.deepcopy, (model.unet, model.pipe.text_encoder))
    return found


# --- The best plain set-up


def plain(model: DiffusionModel, method: str, images: Tensor, steps: int) -> Tensor:
    drawn = Drawn(model, images, range(len(images)))
    photoguard = method == "photoguard"
    x = images if method == "sdst" else drawn.start(PHOTOGUARD_EPS if photoguard else EPS)
    with model.frozen():
        with torch.no_grad():
            embeds = embedded(model)
            z_y = encoded(model, pattern(images), 0.0) if method in ("mist", "sdst") else None
        for step in range(steps):
            x = x.detach().requires_grad_()
            noise = 0.0 if photoguard else drawn.posterior(step)
            loss = plain_loss(model, method, encoded(model, x, noise), z_y, embeds, drawn, step)
            (gradient,) = torch.autograd.grad(loss, x)
            if photoguard:
                x = moved(x, gradient, images, photoguard_length(step, steps), PHOTOGUARD_EPS)
            else:
                x = moved(x, gradient, images, LENGTH)
    return x


def plain_loss(
    model: DiffusionModel,
    method: str,
    z: Tensor,
    z_y: Tensor | None,
    embeds: Tensor,
    drawn: Drawn,
    step: int,
) -> Tensor:
    if method == "photoguard":
        return -torch.linalg.vector_norm(z, dim=(1, 2, 3)).sum()
    t, noise = drawn.t(step), drawn.noise(step)
    if method == "sdst":
        with torch.no_grad():
            away = score(model, z, t, noise, embeds)
        return -SDST_RATE * (away * z).sum() - (z - z_y).square().sum()
    semantic = errors(model, z, t, noise, embeds).sum()
    return semantic if method == "advdm" else RATE * semantic - (z - z_y).square().sum()


class Compiled:
    """Encoder and denoiser inside torch.compile, while in the block."""

    def __init__(self, model: DiffusionModel) -> None:
        self._modules = [model.vae.encoder, model.unet]
        self._compiled = []
        for module in self._modules:
            module.compile()
            self._compiled.append(module._compiled_call_impl)
            module._compiled_call_impl = None

    def __enter__(self) -> None:
        for module, impl in zip(self._modules, self._compiled, strict=True):
            module._compiled_call_impl = impl

    def __exit__(self, *_: object) -> None:
        for module in self._modules:
            module._compiled_call_impl = None


# --- Ours


def ours(model: DiffusionModel, method: str, images: Tensor, steps: int) -> Tensor:
    prompt = () if method == "photoguard" else (PROMPT,)
    found: Tensor = getattr(protect, method)(images, model, *prompt, steps=steps, batch_size=len(images))
    return found


def ours_aspl(model: DiffusionModel, images: Tensor, classes: Tensor, rounds: int) -> Tensor:
    found: Tensor = protect.aspl(
        images,
        model,
        PROMPT,
        CLASS_PROMPT,
        class_images=classes,
        max_train_steps=rounds,
        lr=ASPL_LR,
        batch_size=len(images),
    )
    return found


# --- Measuring


def same(a: Tensor, b: Tensor) -> float:
    """The share of values that agree to a thousandth of a level."""
    return float(((a.cpu() - b.cpu()).abs() < 1e-3 / 255).float().mean())


def seconds_a_step(
    work: Mapping[str, tuple[int, Callable[[int], Tensor]]], short: int, long: int, repeats: int
) -> dict[str, float]:
    """For each (pictures, run) what a step takes of a picture; runs take turns."""
    times: dict[str, dict[int, list[float]]] = {name: {short: [], long: []} for name in work}
    for _, (name, (_, run)), steps in itertools.product(range(repeats), work.items(), (short, long)):
        start = time.perf_counter()
        run(steps).cpu()  # read, so that a GPU is done
        times[name][steps].append(time.perf_counter() - start)
    return {
        name: (statistics.median(found[long]) - statistics.median(found[short]))
        / (long - short)
        / work[name][0]
        for name, found in times.items()
    }


def ratios(times: Mapping[str, float], of: str) -> dict[str, float]:
    return {name: other / times[of] for name, other in times.items() if name != of}


def pictures(model: DiffusionModel, count: int) -> Tensor:
    side = model.latent_shape()[1] * model.vae_scale_factor
    found = torch.rand(count, 3, side // 4, side // 4, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(found, (side, side), mode="bilinear")
    return smooth.to(model.device)


def on_cpu(model: DiffusionModel, compiled: Compiled | None, long: int, repeats: int) -> list[dict[str, Any]]:
    images, rows = pictures(model, 8), []
    for method in METHODS:
        found = ours(model, method, images, 3)  # also the warm-up
        agree = {"published": same(published(model, method, images[:2], 3), found[:2])}
        agree["plain"] = same(plain(model, method, images, 3), found)
        assert min(agree.values()) > SAME, (method, agree)

        def compiled_run(steps: int, method: str = method) -> Tensor:
            with compiled:
                return plain(model, method, images, steps)

        def run(how: Callable[..., Tensor], some: Tensor, method: str = method) -> Any:
            return len(some), lambda steps: how(model, method, some, steps)

        work = {
            "published": run(published, images[:1]),
            "plain": run(plain, images),
            "ours, 1 picture": run(ours, images[:1]),
            "ours, 8 pictures": run(ours, images),
        }
        if compiled:
            agree["compiled"] = same(compiled_run(3), found)
            work["compiled"] = len(images), compiled_run
        times = seconds_a_step(work, 1, long, repeats)
        rows.append(
            {
                "method": method,
                "same_as_ours": agree,
                "s_per_step_and_picture": times,
                "ours_1_faster_than": ratios(times, "ours, 1 picture"),
                "ours_8_faster_than": ratios(times, "ours, 8 pictures"),
            }
        )
    return rows


def aspl_on_cpu(model: DiffusionModel, repeats: int) -> dict[str, Any]:
    """Rounds of 3 training steps, 6 of PGD and 3 of training, of 4 pictures."""
    images, classes = pictures(model, 8).split(4)
    agree = same(published_aspl(model, images, classes, 2), ours_aspl(model, images, classes, 2))
    assert agree > SAME, agree
    work: dict[str, tuple[int, Callable[[int], Tensor]]] = {
        "published": (4, lambda rounds: published_aspl(model, images, classes, rounds)),
        "ours": (4, lambda rounds: ours_aspl(model, images, classes, rounds)),
    }
    times = seconds_a_step(work, 1, 2, repeats)
    return {
        "same_as_ours": agree,
        "s_per_round_and_picture": times,
        "ours_faster_than": ratios(times, "ours"),
    }


# --- On a GPU


def ours_on_gpu(model: DiffusionModel) -> list[dict[str, Any]]:
    images, classes = pictures(model, 16), pictures(model, 3)
    rows = [
        whole_run("ours", method, count, lambda n, m=method, x=images[:count]: ours(model, m, x, n))
        for method, count in itertools.product(("photoguard", "advdm", "mist"), (1, 4, 16))
    ]
    rows += [
        whole_run("ours", "aspl", count, lambda n, x=images[:count]: ours_aspl(model, x, classes, n))
        for count in (1, 4, 16)
    ]
    share = {"how": "ours", "method": "advdm", "batch": 4}
    return [*rows, attempt(share, lambda: {"group_norm_silu_share": norm_share(model, images[:4])})]


def published_on_gpu(shape: str) -> list[dict[str, Any]]:
    """The released code of PhotoGuard is in float16, the others' in float32."""
    rows = []
    for dtype, methods in ((torch.float16, ["photoguard"]), (torch.float32, ["advdm", "mist", "aspl"])):
        model = end_to_end.load("cuda", shape, dtype=dtype, autoencoder=True)
        for part in (model.unet, model.vae):
            part.to(memory_format=torch.contiguous_format)
        images, classes = pictures(model, 4), pictures(model, 3)
        for method in methods:
            if method == "aspl":
                run = partial(published_aspl, model, images, classes)
            else:
                run = partial(published, model, method, images[:1])
            rows.append(whole_run("published", method, 4 if method == "aspl" else 1, run))
    return rows


def plain_on_gpu(
    model: DiffusionModel, how: str, inside: AbstractContextManager[None], counts: Sequence[int]
) -> list[dict[str, Any]]:
    images = pictures(model, max(counts))

    def run(method: str, count: int, steps: int) -> Tensor:
        with inside:
            return plain(model, method, images[:count], steps)

    return [
        whole_run(how, method, count, partial(run, method, count))
        for count, method in itertools.product(counts, ("photoguard", "advdm", "mist"))
    ]


def whole_run(how: str, method: str, count: int, run: Callable[[int], Tensor]) -> dict[str, Any]:
    """Seconds for each picture of as many steps, or rounds, as the method takes."""

    def measured() -> dict[str, float]:
        run(1)  # compiles, chooses kernels
        torch.cuda.reset_peak_memory_stats()
        short, long = (1, 3) if method == "aspl" else (2, 8)
        (step,) = seconds_a_step({how: (count, run)}, short, long, 1).values()
        return {"s_a_picture": USUAL[method] * step, "peak_gb": torch.cuda.max_memory_allocated() / 1e9}

    return attempt({"how": how, "method": method, "batch": count}, measured)


def attempt(row: dict[str, Any], work: Callable[[], dict[str, float]]) -> dict[str, Any]:
    """A row that fails says why and does not lose the others."""
    try:
        row |= work()
    except Exception as error:
        torch.cuda.empty_cache()
        row["error"] = f"{type(error).__name__}: {error}"
    print(row, flush=True)
    return row


def norm_share(model: DiffusionModel, images: Tensor) -> float:
    """What `ops.group_norm_silu` takes of the device's time in a step of AdvDM."""
    on_gpu = model.device.type == "cuda"
    ours(model, "advdm", images, 1)
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as found:
        ours(model, "advdm", images, 3)
    times = {
        event.key: event.self_device_time_total if on_gpu else event.self_cpu_time_total
        for event in found.key_averages()
    }
    # a kernel goes by the name of its C++ argument, GroupNormSilu
    norm = [time for key, time in times.items() if "groupnormsilu" in key.lower().replace("_", "")]
    return sum(norm) / sum(times.values())


def faster(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Ours against the others at the same batch, and against the published algorithm as it is."""
    times = {(r["how"], r["method"], r["batch"]): r["s_a_picture"] for r in rows if "s_a_picture" in r}
    found = {}
    for (how, method, count), time_taken in times.items():
        for other, _, theirs in [key for key in times if how == "ours" != key[0] and key[1] == method]:
            if other == "published" or theirs == count:
                name = f"{method}, {count} at a time, than {other}"
                found[name] = times[other, method, theirs] / time_taken
    return found


def on_gpu(given: argparse.Namespace) -> None:
    """In parts, each of which is written down when it is done; what takes longest comes last."""
    model = end_to_end.load("cuda", given.shape, dtype=torch.bfloat16, autoencoder=True)
    rows: list[dict[str, Any]] = []

    def kept(some: list[dict[str, Any]]) -> list[dict[str, Any]]:
        rows.extend(some)
        return some

    parts: dict[str, Callable[[], Any]] = {
        "ours": lambda: kept(ours_on_gpu(model)),
        "published": lambda: kept(published_on_gpu(given.shape)),
        "plain": lambda: kept(plain_on_gpu(model, "plain", nullcontext(), (1, 4))),
        "faster": lambda: faster(rows),
        "compiled": lambda: kept(plain_on_gpu(model, "compiled", Compiled(model), (4,))),
        "faster, all": lambda: faster(rows),
        "rows": lambda: rows,
    }
    end_to_end.record(given, parts)


def main() -> None:
    parser = end_to_end.arguments(__doc__, ("testbed", "mid", "sd15"))
    parser.add_argument("--no-compile", action="store_true", help="on the CPU, without torch.compile")
    parser.add_argument("--repeats", type=int, default=5)
    given = end_to_end.parse(parser)
    if given.device == "cuda":
        on_gpu(given)
        return
    model = end_to_end.load(given.device, given.shape, autoencoder=True)
    compiled = None if given.no_compile else Compiled(model)
    parts: dict[str, Callable[[], Any]] = {
        "rows": lambda: on_cpu(model, compiled, LONG[given.shape], given.repeats),
        "aspl": lambda: aspl_on_cpu(model, given.repeats),
        "group_norm_silu_share": lambda: norm_share(model, pictures(model, 4)),
    }
    end_to_end.record(given, parts)


if __name__ == "__main__":
    main()
