"""Whether the word that an explanation ranks first is one that makes the model replay, and what it costs.

`python benchmarks/e2e_explain.py [--shape sd15] [--json FILE]`

On the testbed's memorized captions, how often the word ranked first is a trigger, by two ground truths:
  construction   it is of the title alone: a name, an ornament or a noun; not a medium, a common word, a comma
  behaviour      leave-one-out: the word whose replacement by "thing" lowers the magnitude most ("most"), or
                 one that lowers it at least half as much ("half")
and how often a special token would be ranked before all words. Three controls stand beside: a word at random,
the word of most tokens, and the strongest single token instead of whole words.

Time and memory, at the first step with 4 seeds, against two baselines, scores compared before:
  released   the released procedure: prompt by prompt, both branches in one call of 2 x seeds rows, gradient
             through both, weights that require gradients, one norm over the batch
  batched    the best plain set-up: weights frozen, both branches of all prompts in calls of the same rows
Memory, of one prompt: what autograd saves for the backward (distinct storages, without parameters), and the
growth of the peak of the process (of the allocator on a GPU), each measured in a process of its own.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import end_to_end
from pumice import memorization
from pumice.memorization import engine
from pumice.memorization.explain import Explanation, explain
from pumice.models import DiffusionModel, PromptEmbeds
from pumice.testbed import world

SEEDS = 4
COMMON = {"a", "and", "of", "the", "with", ",", *world._MEDIA}
SETTINGS: list[dict[str, Any]] = [
    {"wrt": wrt, "seeds": seeds, "steps": steps}
    for wrt in ("embedding", "input")
    for seeds, steps in ((1, 1), (4, 1), (1, 10), (4, 10))
] + [{"variant": "wen", "seeds": 4, "steps": steps} for steps in (1, 10)]


# --- The ranking


def drops_by_word(model: DiffusionModel, captions: list[str]) -> list[list[float]]:
    """How much the magnitude falls when one word of a caption becomes "thing"."""
    changed, owner = [], []
    for index, caption in enumerate(captions):
        end = 0
        for word in model.tokenize(caption)[0].words:
            start = caption.index(word.text, end)
            end = start + len(word.text)
            changed.append(f"{caption[:start]}thing{caption[end:]}")
            owner.append(index)
    whole, without = (
        memorization.detect(model, prompts, metric="magnitude", seeds=SEEDS).scores.tolist()
        for prompts in (captions, changed)
    )
    found: list[list[float]] = [[] for _ in captions]
    for index, score in zip(owner, without, strict=True):
        found[index].append(whole[index] - score)
    return found


def hits(
    explanations: tuple[Explanation, ...], drops: list[list[float]], first: Callable
) -> dict[str, float]:
    """The share of captions whose word number `first(explanation)` is a trigger."""
    places = [first(explanation) for explanation in explanations]
    texts = [e.words[place].text for e, place in zip(explanations, places, strict=True)]
    shares = [fall[place] / max(fall) for fall, place in zip(drops, places, strict=True)]
    return {
        "construction": statistics.mean(text not in COMMON for text in texts),
        "behaviour_most": statistics.mean(share == 1 for share in shares),
        "behaviour_half": statistics.mean(share >= 0.5 for share in shares),
    }


def strongest(explanation: Explanation) -> int:
    return explanation.words.index(explanation.ranking()[0])


def of_strongest_token(explanation: Explanation) -> int:
    best = int(explanation.token_scores[list(explanation.tokens.content)].argmax()) + 1
    return next(i for i, word in enumerate(explanation.words) if best in word.positions)


def of_most_tokens(explanation: Explanation) -> int:
    lengths = [len(word.positions) for word in explanation.words]
    return lengths.index(max(lengths))


def ranking(model: DiffusionModel) -> dict[str, Any]:
    captions = [world.memorized(i).caption for i in range(world.MEMORIZED_COUNT)]
    drops = drops_by_word(model, captions)
    table = []
    for settings in SETTINGS:
        found = explain(model, captions, batch_size=12, **settings)
        special = [e.ranking(include_special=True)[0].text.startswith("<") for e in found]
        table.append({**settings, **hits(found, drops, strongest), "special_first": statistics.mean(special)})
    found = explain(model, captions, wrt="input", batch_size=12)
    everywhere = [
        hits((e,), [fall], lambda e, place=place: place)  # type: ignore[misc]
        for e, fall in zip(found, drops, strict=True)
        for place in range(len(e.words))
    ]
    return {
        "captions": len(captions),
        "table": table,
        "controls": {
            "any word": {key: statistics.mean(hit[key] for hit in everywhere) for key in everywhere[0]},
            "word of most tokens": hits(found, drops, of_most_tokens),
            "strongest single token, wrt input": hits(found, drops, of_strongest_token),
        },
    }


# --- The cost


def released(model: DiffusionModel, prompt: str, seeds: int) -> Tensor:
    """(L,): the released procedure at the first step."""
    for weight in model.unet.parameters():
        weight.requires_grad_(True)
    noise = engine.initial_noise(range(seeds), model.latent_shape()).to(model.device)
    with torch.no_grad():
        uncond, cond = model.unconditional().repeat(seeds), model.encode_prompt(prompt).repeat(seeds)
    rows = torch.cat([uncond.embeds, cond.embeds]).requires_grad_()
    both = torch.cat([rows[:1].detach().expand(seeds, -1, -1), rows[-1:].expand(seeds, -1, -1)])
    t = model.schedule.timesteps(50)[0]
    output = model.predict(
        torch.cat([noise, noise]), t, PromptEmbeds(both, None, (*uncond.tokens, *cond.tokens))
    ).float()
    scale = float(model.schedule.epsilon_scale(t))
    loss = (output[seeds:] - output[:seeds]).norm() * scale
    return torch.autograd.grad(loss, rows)[0].float().mean(0).norm(dim=1).cpu()


def batched(model: DiffusionModel, prompts: list[str], seeds: int, rows: int) -> Tensor:
    """(P, L): our scores, with both branches of the same rows in every call."""
    noise = engine.initial_noise(range(seeds), model.latent_shape()).to(model.device)
    t = model.schedule.timesteps(50)[0]
    scale = float(model.schedule.epsilon_scale(t))
    found = []
    with model.frozen():
        with torch.no_grad():
            embeds, uncond = model.encode_prompt(prompts), model.unconditional()
        for first in range(0, len(prompts) * seeds, rows // 2):
            row = torch.arange(first, min(first + rows // 2, len(prompts) * seeds))
            x, cond = noise[row % seeds], embeds[(row // seeds).tolist()]
            leaf = cond.embeds.requires_grad_()
            both = PromptEmbeds.cat([uncond.repeat(len(row)), cond])
            without, output = model.predict(torch.cat([x, x]), t, both).float().chunk(2)
            loss = (output - without).flatten(1).norm(dim=1).sum() * scale
            found.append(torch.autograd.grad(loss, leaf)[0].float().norm(dim=2))
    return torch.cat(found).cpu().unflatten(0, (len(prompts), seeds)).mean(1)


def token_scores(model: DiffusionModel, prompts: list[str], **settings: Any) -> Tensor:
    return torch.stack([found.token_scores for found in explain(model, prompts, **settings)])


def compare(model: DiffusionModel, prompts: list[str], rows: int) -> None:
    """All three compute the same, up to the released code's factor 2N and its sum over seeds."""
    exact = model.dtype == torch.float32
    tolerance = {"rtol": 1e-3 if exact else 0.2, "atol": 1e-6 if exact else 1e-3}
    with_bugs = token_scores(model, prompts[:2], seeds=SEEDS, variant="wen")
    one, four = token_scores(model, prompts[:2]), token_scores(model, prompts[:2], seeds=SEEDS)
    for index, prompt in enumerate(prompts[:2]):
        torch.testing.assert_close(released(model, prompt, SEEDS), with_bugs[index], **tolerance)
        torch.testing.assert_close(released(model, prompt, 1) * 2, one[index], **tolerance)
    torch.testing.assert_close(batched(model, prompts[:2], SEEDS, rows), four, **tolerance)


def speed(model: DiffusionModel, prompts: list[str], rows: int, repeats: int) -> dict[str, Any]:
    """Seconds a prompt, the medians of runs that take turns."""
    compare(model, prompts, rows)  # also the warm-up
    work: dict[str, Callable[[], object]] = {
        "ours": lambda: explain(model, prompts, seeds=SEEDS, batch_size=rows),
        "ours, wrt input": lambda: explain(model, prompts, seeds=SEEDS, wrt="input", batch_size=rows),
        "released": lambda: [released(model, prompt, SEEDS) for prompt in prompts],
        "batched": lambda: batched(model, prompts, SEEDS, rows),
    }
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(repeats):
        for name, run in work.items():
            start = time.perf_counter()
            run()  # ends with a copy to the host, so the device is done
            times[name].append((time.perf_counter() - start) / len(prompts))
    medians = {name: statistics.median(found) for name, found in times.items()}
    return {
        "prompts": len(prompts),
        "seeds": SEEDS,
        "rows_a_call": rows,
        "s_per_prompt": medians,
        "times_faster_than": {name: medians[name] / medians["ours"] for name in ("released", "batched")},
    }


def saved_for_backward(model: DiffusionModel, work: Callable[[], object]) -> int:
    """Bytes of the distinct storages that autograd holds, without parameters."""
    weights = {p.untyped_storage().data_ptr() for p in model.unet.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage  # kept, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        work()
    return sum(storage.nbytes() for storage in saved.values())


def one_prompt(model: DiffusionModel, name: str) -> Callable[[], object]:
    prompt = world.fresh_captions(1, seed=3000)[0]
    if name == "released":
        return lambda: released(model, prompt, SEEDS)
    return lambda: explain(model, prompt, seeds=SEEDS, batch_size=SEEDS)


def peak_growth(model: DiffusionModel, work: Callable[[], object]) -> int:
    """How far the peak of the process, or of the GPU's allocator, rises above where it starts, in bytes."""
    explain(model, "a", batch_size=1)  # libraries make their own buffers at the first call
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def memory(model: DiffusionModel, device: str, shape: str) -> dict[str, Any]:
    found: dict[str, Any] = {"rows": {"ours": SEEDS, "released": 2 * SEEDS}}
    for name in ("ours", "released"):
        command = [sys.executable, __file__, "--device", device, "--shape", shape, "--peak", name]
        peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]
        found[name] = {
            "saved_for_backward_bytes": saved_for_backward(model, one_prompt(model, name)),
            "peak_growth_bytes": int(peak),
        }
    found["times_less"] = {key: found["released"][key] / value for key, value in found["ours"].items()}
    return found


def main() -> None:
    parser = end_to_end.arguments(__doc__)
    parser.add_argument("--peak", choices=["ours", "released"], help="print only this one's growth, in bytes")
    given = end_to_end.parse(parser)
    model = end_to_end.load(given.device, given.shape)
    if given.peak:
        print(peak_growth(model, one_prompt(model, given.peak)))
        return
    parts: dict[str, Callable[[], Any]] = {
        "speed": lambda: speed(model, world.fresh_captions(8, seed=3000), rows=16, repeats=7),
        "memory": lambda: memory(model, given.device, given.shape),
    }
    if given.shape == "testbed":
        parts["ranking"] = lambda: ranking(model)
    end_to_end.record(given, parts)


if __name__ == "__main__":
    main()
