"""What closed-form erasure costs: the algebra, the file that it leaves, and the calls of the text encoder.

`python benchmarks/e2e_erase.py [--json FILE]`

On key and value weights of Stable Diffusion 1.5's and XL's shapes with random entries, and random token
rows (norm 28, half of it in one common direction, as text embeddings are), so that nothing is downloaded.
Baselines are the published algorithms, with their loops: their results are compared with ours before the
times count.
  uce, all tokens    the code of the published UCE results: for every matrix, for every concept, the target
                     values of *all* matrices, outer products of all rows, one inverse a matrix; float32
  uce, last token    the code of 2025: for every matrix a rank-1 product a concept, and one inverse; float32
  rece               for every epoch and concept two sums of Gram products over all matrices and an inverse,
                     then the first of the above
The text encoder's calls are counted on a tiny pipeline, where the published procedure runs as a whole.
"""

from __future__ import annotations

import ctypes
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

import end_to_end
from end_to_end import seconds
from pumice import erase, io, models, ops
from pumice.erase.closed_form import LinearMap, Preserved, solve, sweep_lamb
from pumice.erase.rece import derived, gram_of_weights
from pumice.testbed import tiny_pipeline

LAMB = 0.5
RIDGE, RECE_LAMB, EPOCHS = 0.1, 0.1, 3
SD15 = [320] * 10 + [640] * 10 + [1280] * 12
SDXL = [640] * 20 + [1280] * 120


def weights(rows: Sequence[int], width: int, device: str) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    return [torch.randn(o, width, generator=generator, device=device) / width**0.5 for o in rows]


def tokens(count: int, width: int, device: str, seed: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    common = torch.randn(width, generator=generator, device=device)
    rows = torch.randn(count, width, generator=generator, device=device) + common
    return 28 * torch.nn.functional.normalize(rows, dim=1)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


# --- published algorithms


def published_all_tokens(
    all_weights: list[Tensor], concepts: Tensor, guides: Tensor, lamb: float = LAMB
) -> list[Tensor]:
    """concepts, guides (n, T, d)."""
    new = []
    for index, weight in enumerate(all_weights):
        left = lamb * weight
        right = lamb * torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
        for c, g in zip(concepts, guides, strict=True):
            values = [g @ other.T for other in all_weights]  # one of them is used
            left = left + torch.bmm(values[index][:, :, None], c[:, None, :]).sum(0)
            right = right + torch.bmm(c[:, :, None], c[:, None, :]).sum(0)
        new.append(left @ torch.inverse(right))
    return new


def published_last_token(all_weights: list[Tensor], concepts: Tensor, guides: Tensor) -> list[Tensor]:
    """concepts, guides (n, d)."""
    new = []
    for weight in all_weights:
        left = LAMB * weight
        right = LAMB * torch.eye(weight.shape[1], device=weight.device)
        for c, g in zip(concepts, guides, strict=True):
            left = left + (weight @ g)[:, None] @ c[None]
            right = right + c[:, None] @ c[None]
        new.append(left @ torch.inverse(right))
    return new


def published_derived(edited: list[Tensor], original: list[Tensor], concepts: Tensor) -> Tensor:
    """concepts (n, T, d). The embeddings that the edited matrices read as the original ones read concepts."""
    new = []
    for c in concepts:
        after = RIDGE * torch.eye(c.shape[1], dtype=c.dtype, device=c.device)
        before = torch.zeros_like(after)
        for w, w0 in zip(edited, original, strict=True):
            after, before = after + w.T @ w, before + w.T @ w0
        new.append(c @ (torch.inverse(after) @ before).T)
    return torch.stack(new)


# --- ours


def write(all_weights: list[Tensor], found: LinearMap) -> None:
    ops.low_rank_edit_(all_weights, found.up.float().contiguous(), found.down.float().contiguous())


def algebra(
    device: str, rows: list[int], width: int, count: int, per_concept: int, *, published: bool = True
) -> dict[str, Any]:
    """Ours, from rows to dense weights, against the published loop."""
    original = weights(rows, width, device)
    concepts, guides = (tokens(count * per_concept, width, device, seed) for seed in (1, 2))

    def ours(target: list[Tensor]) -> LinearMap:
        found = solve(concepts.double(), guides.double(), lamb=LAMB)
        write(target, found)
        return found

    edited = [weight.clone() for weight in original]
    ours(edited)  # also the warm-up
    target = [weight.clone() for weight in original]
    solving = seconds(lambda: float(solve(concepts.double(), guides.double(), lamb=LAMB).up.sum()), 5)
    whole = seconds(lambda: float(ours(target).up.sum()), 5)

    exact = direct(original[0], concepts, guides)
    ours_error = relative(edited[0] - original[0], exact - original[0].double())
    assert ours_error < 1e-4, ours_error
    found: dict[str, Any] = {
        "matrices": len(rows),
        "width": width,
        "concepts": count,
        "rows_a_concept": per_concept,
        "seconds": {"solve": solving, "solve and write": whole},
        "error_of_the_change": {"ours": ours_error},
    }
    if published:
        shape = (count, per_concept, width)
        loop: Callable[..., list[Tensor]] = published_last_token
        pairs = concepts, guides
        if per_concept > 1:
            loop, pairs = published_all_tokens, (concepts.view(shape), guides.view(shape))
        start = time.perf_counter()
        theirs = loop(original, *pairs)
        took = time.perf_counter() - start
        error = relative(theirs[0] - original[0], exact - original[0].double())
        assert error < 0.1, error  # float32, by explicit inverse
        found["error_of_the_change"]["published"] = error
        found["seconds"]["published"] = took
        found["times_faster"] = took / whole
    return found


def rece_map(h: Tensor, concepts: Tensor, guides: Tensor) -> LinearMap:
    """concepts, guides (n T, d) float64; from the original weights, without texts to preserve."""
    found = LinearMap(h.new_zeros(len(h), 0), h.new_zeros(0, len(h)))
    for _ in range(EPOCHS):
        new = derived(h, found, concepts, guides, ridge=RIDGE)
        found = found.then(solve(new, guides, lamb=RECE_LAMB))
    return found


def rece_agrees() -> None:
    """On four small matrices, in float64, the published loops and ours make the same weights."""
    original = [w.double() for w in weights([40, 40, 80, 80], 64, "cpu")]
    concepts, guides = (tokens(2 * 20, 64, "cpu", seed).double().view(2, 20, 64) for seed in (1, 2))
    edited = original
    for _ in range(EPOCHS):
        new = published_derived(edited, original, concepts)
        edited = published_all_tokens(edited, new, guides, RECE_LAMB)
    h = gram_of_weights(dict(enumerate(original)), torch.device("cpu"))
    found = rece_map(h, concepts.flatten(0, 1), guides.flatten(0, 1)).dense()
    for weight, theirs in zip(original, edited, strict=True):
        assert relative(weight @ found - weight, theirs - weight) < 1e-6


def rece(device: str, count: int) -> dict[str, Any]:
    """Ours, from embeddings to dense weights, against the published loops, both on all 77 positions."""
    rece_agrees()
    original = weights(SD15, 768, device)
    concepts, guides = (tokens(count * 77, 768, device, seed) for seed in (1, 2))
    target = [weight.clone() for weight in original]

    def ours() -> None:
        h = gram_of_weights(dict(enumerate(original)), concepts.device)
        write(target, rece_map(h, concepts.double(), guides.double()))
        float(target[0][0, 0])

    def theirs() -> None:
        shape, edited = (count, 77, 768), original
        for _ in range(EPOCHS):
            new = published_derived(edited, original, concepts.view(shape))
            edited = published_all_tokens(edited, new, guides.view(shape), RECE_LAMB)
        float(edited[0][0, 0])

    times = {"ours": seconds(ours, 3), "published": seconds(theirs, 1)}
    return {
        "concepts": count,
        "epochs": EPOCHS,
        "seconds": times,
        "times_faster": times["published"] / times["ours"],
    }


def encoder_calls() -> dict[str, int]:
    """Of the text encoder, for 20 concepts on a tiny pipeline: the published loop's and ours."""
    pipe = tiny_pipeline("sd1")
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    concepts = [
        f"{colour} {thing}"
        for colour in ("red", "green", "blue", "black")
        for thing in ("cat", "dog", "horse", "bird", "house")
    ]
    model = models.load(pipe)
    handle = pipe.text_encoder.register_forward_hook(count)
    edit = erase.uce(pipe, concepts, tokens="all", preserve_scale=0.0)
    ours, calls = calls, 0
    with torch.no_grad():
        for name, change in edit.changes.items():
            weight = pipe.unet.get_parameter(name)
            left, right = 0.5 * weight, 0.5 * torch.eye(weight.shape[1])
            for concept in concepts:
                embeds = model.encode_prompt([concept, " "])
                first, second = (tokens.eos - 1 for tokens in embeds.tokens)
                length = embeds.embeds.shape[1] - max(first, second)
                c, g = embeds.embeds[0, first : first + length], embeds.embeds[1, second : second + length]
                left, right = left + weight @ g.T @ c, right + c.T @ c
            theirs = left @ torch.inverse(right)
            up, down = change.lora(weight)
            assert relative(up @ down, theirs - weight) < 1e-2
    handle.remove()
    return {"concepts": len(concepts), "ours": ours, "published": calls}


def direct(weight: Tensor, concepts: Tensor, guides: Tensor) -> Tensor:
    """The formula for one matrix, float64."""
    w, c, g = weight.double(), concepts.double(), guides.double()
    eye = torch.eye(w.shape[1], dtype=w.dtype, device=w.device)
    return (LAMB * w + (w @ g.T) @ c) @ torch.linalg.inv(LAMB * eye + c.T @ c)


def sweep(device: str) -> dict[str, Any]:
    """Ten values of lambda: one eigendecomposition against ten solutions, both with a preserved set."""
    c, g = (tokens(7500, 768, device, seed).double() for seed in (1, 2))
    preserved = Preserved.of(tokens(1000, 768, device, 3))
    lambs = [10.0**k for k in range(-5, 5)]

    def again() -> list[LinearMap]:
        return [solve(c, g, lamb=lamb, preserved=preserved) for lamb in lambs]

    def once() -> list[LinearMap]:
        return list(sweep_lamb(c, g, lambs, erase_scale=1.0, preserved=preserved))

    for a, b in zip(again(), once(), strict=True):
        assert relative(a.up @ a.down, b.up @ b.down) < 1e-6
    times = {"ten solutions": seconds(again, 3), "one eigendecomposition": seconds(once, 3)}
    return {"seconds": times}


def lora_export(concepts: int = 100) -> dict[str, Any]:
    """Stable Diffusion XL's shapes: from rows of 100 concepts to a LoRA file."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
    names = [name for name, _ in unet.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v"))]
    rows = [unet.get_submodule(name).out_features for name in names]
    matrices = dict(zip(names, weights(rows, 2048, "cpu"), strict=True))
    c, g = (tokens(concepts, 2048, "cpu", seed).double() for seed in (1, 2))
    before = _peak_kb(reset=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lora.safetensors"
        start = time.perf_counter()
        found = solve(c, g, lamb=LAMB)
        change = models.Mapped.of(found.up, found.down)
        io.save_lora(path, {name: change.lora(weight) for name, weight in matrices.items()}, unet)
        took = time.perf_counter() - start
        size = path.stat().st_size
    peak = _peak_kb() - before
    return {
        "matrices": len(names),
        "concepts": concepts,
        "seconds": took,
        "file_mb": size / 1e6,
        "peak_above_the_weights_mb": peak * 1024 / 1e6,
    }


def _peak_kb(*, reset: bool = False) -> int:
    """The most memory that the process had since the last reset, which gives back what is free."""
    if reset:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


def table(found: dict[str, Any]) -> None:
    """What was measured, a line each."""
    print(f"{'':<34} {'pumice, s':>10} {'published, s':>13} {'times faster':>13}")
    for name, part in found.items():
        times = part.get("seconds") if isinstance(part, dict) else None
        if isinstance(times, float):
            times = {"ours": times}
        if not times:
            continue
        ours = times.get("solve and write", times.get("ours", times.get("one eigendecomposition")))
        theirs = times.get("published", times.get("ten solutions"))
        line = f"{name:<34} {ours:10.4f}"
        print(line if theirs is None else f"{line} {theirs:13.2f} {theirs / ours:13.1f}")


def main() -> None:
    given = end_to_end.parse(end_to_end.arguments(__doc__))
    device = given.device
    found = end_to_end.record(
        given,
        {
            "lora_export_sdxl": lora_export,
            "sd15_1_concept_last_token": lambda: algebra(device, SD15, 768, 1, 1),
            "sd15_1000_concepts_last_token": lambda: algebra(device, SD15, 768, 1000, 1),
            "sdxl_100_concepts_last_token": lambda: algebra(device, SDXL, 2048, 100, 1, published=False),
            "sweep_of_10_lambdas": lambda: sweep(device),
            "encoder_calls": encoder_calls,
            "rece_10_concepts_3_epochs": lambda: rece(device, 10),
            "sd15_100_concepts_all_tokens": lambda: algebra(device, SD15, 768, 100, 75),
        },
    )
    table(found)


if __name__ == "__main__":
    main()
