"""What an iteration of embedding mitigation costs, and on the testbed what mitigations achieve.

`python benchmarks/e2e_mitigate.py [--shape sd15] [--json FILE]`

Time, with 4 seeds a prompt and the same number of iterations, against two baselines whose losses are compared
with ours before anything is timed:
  released   the released procedure: prompt by prompt, both branches in one call of 2 x seeds rows, gradient
             through both, weights that require gradients, the text encoder's graph kept
  frozen     the same with weights frozen and the text encoder's graph gone
An iteration is a forward and a backward pass; it is what a longer run takes more than a shorter one, so what
is done once (encoding, our unconditional prediction, our last check) does not count. Whole runs stand beside.

On the testbed, the share of the memorized captions that still replay, by how far their embeddings are moved
(targets and learning rates), by how their noises are, and by what is put into their prompts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import end_to_end
from pumice import testbed
from pumice.memorization import engine
from pumice.memorization.initial_noise import adjust_initial_noise
from pumice.memorization.mitigate import mitigate
from pumice.memorization.perturb import perturb_embeds, perturb_prompt
from pumice.models import DiffusionModel, PromptEmbeds
from pumice.testbed import world

SEEDS, SHORT, LONG = 4, 2, 8  # iterations of a short and of a long run
STEPS, GUIDANCE = 25, 5.0
NEVER = 1e-6  # a target that is not reached
LR = {"testbed": 0.05, "sd15": 1e-3}  # random weights leave AdamW's first steps to rounding


# --- The cost


def released(
    model: DiffusionModel, prompt: str, iterations: int, lr: float, frozen: bool = False
) -> list[float]:
    """The batch norm at the start of every iteration."""
    for part in (model.unet, *model.text_encoders):
        part.requires_grad_(not frozen)
    noise = engine.initial_noise(range(SEEDS), model.latent_shape()).to(model.device)
    uncond, cond = model.unconditional(), model.encode_prompt(prompt)
    rows = cond.embeds.detach().float().requires_grad_()
    optimizer = torch.optim.AdamW([rows], lr=lr, weight_decay=0.01)
    t = model.schedule.timesteps(50)[0]
    scale = float(model.schedule.epsilon_scale(t))
    tokens = (*uncond.tokens * SEEDS, *cond.tokens * SEEDS)
    losses = []
    for _ in range(iterations):
        both = torch.cat([uncond.embeds.expand(SEEDS, -1, -1), rows.to(model.dtype).expand(SEEDS, -1, -1)])
        output = model.predict(torch.cat([noise, noise]), t, PromptEmbeds(both, None, tokens)).float()
        loss = (output[SEEDS:] - output[:SEEDS]).norm() * scale
        losses.append(loss.item())  # read at every iteration: it decides whether there is a next one
        (rows.grad,) = torch.autograd.grad(loss, rows)
        rows.grad[:, 0] = 0
        optimizer.step()
    for part in (model.unet, *model.text_encoders):
        part.requires_grad_(True)
    return losses


def ours(
    model: DiffusionModel, prompts: list[str], iterations: int, lr: float, rows: int
) -> list[list[float]]:
    found = mitigate(
        model,
        prompts,
        target=NEVER,
        seeds=SEEDS,
        max_iterations=iterations,
        lr=lr,
        variant="wen",
        batch_size=rows,
    )
    return [list(losses[:iterations]) for losses in found.trace]


def speed(model: DiffusionModel, prompts: list[str], lr: float, rows: int, repeats: int) -> dict[str, Any]:
    """Seconds a prompt, medians of runs that take turns."""
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.1
    expected = ours(model, prompts, LONG, lr, rows)  # also the warm-up
    for index, prompt in enumerate(prompts[:2]):
        for frozen in (False, True):
            found = torch.tensor(released(model, prompt, LONG, lr, frozen))
            torch.testing.assert_close(found, torch.tensor(expected[index]), rtol=tolerance, atol=tolerance)
    first = prompts[0]
    work: dict[str, tuple[int, Callable[[int], object]]] = {
        "ours": (1, lambda iterations: ours(model, [first], iterations, lr, rows)),
        "ours, batched": (len(prompts), lambda iterations: ours(model, prompts, iterations, lr, rows)),
        "released": (1, lambda iterations: released(model, first, iterations, lr)),
        "frozen": (1, lambda iterations: released(model, first, iterations, lr, frozen=True)),
    }
    times: dict[str, dict[int, list[float]]] = {name: {SHORT: [], LONG: []} for name in work}
    for _ in range(repeats):
        for name, (count, run) in work.items():
            for iterations in (SHORT, LONG):
                start = time.perf_counter()
                run(iterations)
                if model.device.type == "cuda":
                    torch.cuda.synchronize()
                times[name][iterations].append((time.perf_counter() - start) / count)
    whole = {name: statistics.median(found[LONG]) for name, found in times.items()}
    one = {
        name: (whole[name] - statistics.median(found[SHORT])) / (LONG - SHORT)
        for name, found in times.items()
    }
    return {
        "seeds": SEEDS,
        "prompts_in_a_batch": len(prompts),
        "rows_a_call": rows,
        "s_per_iteration_and_prompt": one,
        f"s_per_{LONG}_iterations_and_prompt": whole,
        "iterations_faster": {
            f"{name} than {other}": one[other] / one[name]
            for name in ("ours", "ours, batched")
            for other in ("released", "frozen")
        },
        "whole_runs_faster": {
            f"{name} than {other}": whole[other] / whole[name]
            for name in ("ours", "ours, batched")
            for other in ("released", "frozen")
        },
    }


# --- What mitigations achieve


def replays(pipe: Any, originals: Tensor, **prompts: Any) -> dict[str, float]:
    """All memorized captions drawn once each, and compared with their training pictures."""
    images = pipe(num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="pt", **prompts).images
    similarity = testbed.similarity(images.float().cpu(), originals).diagonal()
    return {
        "replayed": float((similarity > testbed.REPLAYED).double().mean()),
        "mean_similarity": float(similarity.mean()),
    }


def achieved(model: DiffusionModel) -> list[dict[str, Any]]:
    pipe, known = model.pipe, [world.memorized(i) for i in range(world.MEMORIZED_COUNT)]
    captions = [picture.caption for picture in known]
    originals = torch.stack([torch.as_tensor(picture.picture) for picture in known])
    with torch.no_grad():
        plain, empty = model.encode_prompt(captions), model.unconditional().repeat(len(captions)).embeds

    def from_seed() -> dict[str, Any]:
        return {"generator": [torch.Generator().manual_seed(0) for _ in captions]}

    def drawn(embeds: PromptEmbeds) -> dict[str, float]:
        conditions = {"prompt_embeds": embeds.embeds, "negative_prompt_embeds": empty}
        return replays(pipe, originals, **conditions, **from_seed())

    table: list[dict[str, Any]] = [
        {"how": "none", **replays(pipe, originals, prompt=captions, **from_seed())}
    ]
    for lr in (0.05, 0.1, 0.2):
        for target in (1.4, 1.2, 1.0):
            found = mitigate(
                model, captions, target=target, lr=lr, num_inference_steps=STEPS, batch_size=len(captions)
            )
            table.append(
                {
                    "how": "embedding",
                    "lr": lr,
                    "target": target,
                    "iterations": found.iterations.double().mean().item(),
                    "converged": found.converged.double().mean().item(),
                    **drawn(found.prompt_embeds),
                }
            )
    adjustments: list[dict[str, Any]] = [
        {"mode": "batch"},
        {"mode": "batch", "gamma": 10.0, "max_iterations": 4},
        {"mode": "per_sample", "target": 1.2},
        {"mode": "per_sample", "target": 1.2, "lr": 0.03},
    ]
    for settings in adjustments:
        noise = adjust_initial_noise(model, captions, num_inference_steps=STEPS, **settings)
        table.append(
            {
                "how": "noise",
                **settings,
                "before": noise.before.mean().item(),
                "after": noise.after.mean().item(),
                **replays(pipe, originals, prompt=captions, latents=noise.latents.flatten(0, 1)),
            }
        )
    for how in ("add_tokens", "add_numbers", "repeat_words", "replace_tokens"):
        for count in (1, 4):
            changed = [perturb_prompt(c, pipe.tokenizer, how=how, count=count) for c in captions]  # type: ignore[arg-type]
            table.append(
                {"how": how, "count": count, **replays(pipe, originals, prompt=changed, **from_seed())}
            )
    for strength in (0.1, 0.5, 1.0):
        table.append({"how": "noise on embeds", "scale": strength, **drawn(perturb_embeds(plain, strength))})
    return table


def main() -> None:
    given = end_to_end.parse(end_to_end.arguments(__doc__))
    model = end_to_end.load(given.device, given.shape)
    prompts = [world.memorized(i).caption for i in range(8)]
    parts: dict[str, Callable[[], Any]] = {
        "speed": lambda: speed(model, prompts, LR[given.shape], rows=32, repeats=5)
    }
    if given.shape == "testbed":
        parts["achieved"] = lambda: achieved(model)
    end_to_end.record(given, parts)


if __name__ == "__main__":
    main()
