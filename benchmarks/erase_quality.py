"""What the erasers take from the embedded model, what they leave, and what attacks get back.

`python benchmarks/erase_quality.py [--concepts ball varga caption] [--workers 2] [--json FILE]`

Erased, one at a time: an object ("ball", becomes a box), an artist ("varga", becomes okoro) and the caption
of a memorized picture (becomes "a picture"), by every method of `erasers.py`. Closed forms that preserve
texts get the same 200 captions, of other scenes than those that they are judged by.

  ESR-1, PSR-1   share of pictures that no longer, or still, show what their prompt names, as the reader
                 tells; a memorized caption is erased if its picture is not replayed; 95 % Clopper-Pearson
  loss           points of PSR-1 against the model as it is
  agreement      CLIP, of the preserved pictures with their prompts
  distance       1 - MS-SSIM of the preserved pictures to those of the model as it is, from the same noise
  seconds        that the method took
  attacks        share of pictures, or of prompts, that show the concept again:
    concept-inversion  drawn with a word that was learned on the edited model from six pictures
    unlearn-diff-atk   with tokens before the prompt, searched on the edited model (UnlearnDiffAtk)
    p4d                with tokens in place of the prompt, that predict what the model as it is does
    ring-a-bell        with tokens that the text encoder reads as prompt and concept, without any model
    relearning         after a short fine-tuning of the edited model on six pictures

Attacks are far shorter than their papers': the column tells which edits give way at once. Models and edits
share batches of the denoiser where their changes can be hooked.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import end_to_end
import erasers
from erasers import CAPTION, GUIDES
from pumice import evaluate, testbed
from pumice.evaluate import attacks
from pumice.models import DiffusionModel, Edit

SEEDS = 32  # pictures of a caption that has one prompt
ATTACKED = 8  # prompts, or pictures, of an attack
DRAWN = {"num_inference_steps": 20, "guidance_scale": 5.0}


def made(
    model: DiffusionModel, concept: str, only: list[str]
) -> tuple[dict[str, Edit], dict[str, float], dict[str, str]]:
    """Edits and seconds by name, and why some could not be made."""
    guide = GUIDES[concept]
    keep = [prompt for prompt, _ in testbed.trial(concept, 200, seed=1).preserved]
    methods = {**erasers.closed_forms(concept, guide, keep), **erasers.trained(concept, guide)}
    edits, seconds, refused = {}, {}, {}
    for name, make in methods.items():
        if only and name not in only:
            continue
        start = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the table has the change
                edits[name] = make(model)
        except (TypeError, ValueError, RuntimeError) as error:
            refused[name] = str(error)
        seconds[name] = time.perf_counter() - start
        print(f"{concept[:20]}: {name}, {seconds[name]:.1f} s", flush=True)
    return edits, seconds, refused


def attacked(model: DiffusionModel, edits: dict[str, Edit], concept: str, pictures: Tensor) -> dict[str, Any]:
    """By attack and edit, the success at each budget of steps."""
    judged = testbed.trial(concept, ATTACKED, seed=2)
    prompts = [prompt for prompt, _ in judged.erased]
    how: dict[str, Any] = {
        "label": judged.erased[0][1],
        "classify": judged.classify,
        "rows": 64,
        **DRAWN,
    }
    few = pictures[:6] / 255
    guide = GUIDES[concept]
    named = [prompt for prompt, _ in testbed.trial(concept, 20, seed=3).erased]
    pairs = [(prompt, prompt.replace(concept, guide)) for prompt in named]
    word = erasers.WORDS[concept]
    found = {
        "concept-inversion": lambda: attacks.concept_inversion(
            model, edits, few, steps=100, checkpoints=(0, 25), seeds=ATTACKED, **how
        ),
        "unlearn-diff-atk": lambda: attacks.unlearn_diff_atk(
            model, edits, pictures[: len(prompts)] / 255, prompts,
            timesteps=4, steps=10, draw_every=2, **how,
        ),
        "p4d": lambda: attacks.p4d(model, edits, prompts, tokens=8, steps=40, draw_every=10, **how),
        "ring-a-bell": lambda: attacks.ring_a_bell(
            model, edits, pairs, prompts, eta=1, tokens=12, population=40, generations=300, **how
        ),
        "relearning": lambda: attacks.relearning(
            model, edits, few, word,
            steps=20, checkpoints=(0, 5, 10), learning_rate=1e-4, seeds=ATTACKED, **how,
        ),
    }  # fmt: skip
    curves: dict[str, Any] = {}
    for name, attack in found.items():
        start = time.perf_counter()
        try:
            result = attack()
            curves[name] = {edit: result.curve(edit) for edit in result.names}
        except (TypeError, ValueError, RuntimeError) as error:
            curves[name] = {"refused": str(error)}
        print(f"{concept[:20]}: {name}, {time.perf_counter() - start:.0f} s", flush=True)
    return curves


def trial(
    model: DiffusionModel, concept: str, prompts: int, only: list[str]
) -> tuple[dict[str, Any], list[list[Tensor]]]:
    """The rows of one concept; and pictures for the sheet, before and after each edit."""
    edits, seconds, refused = made(model, concept, only)
    judged = testbed.trial(concept, prompts)
    clip, tokenizer = testbed.load_clip()
    settings: dict[str, Any] = {
        "classify": judged.classify,
        "k": 1,
        "agreement": evaluate.clip_agreement(clip, tokenizer),
        "batch_size": 96,
        **DRAWN,
    }
    seeds = SEEDS if len(judged.erased) == 1 else 1
    gone = evaluate.erasure(model, edits, judged.erased, (), seeds=seeds, **settings)
    kept = evaluate.erasure(model, edits, (), judged.preserved, seeds=1, **settings)
    rows = {
        one["name"]: {key: two[key] if value is None else value for key, value in one.items()}
        for one, two in zip(gone.rows, kept.rows, strict=True)
    }
    for name, edit in edits.items():
        rows[name] |= {"overall_change": edit.report().get("overall_change"), "seconds": seconds[name]}
    for attack, curves in attacked(model, edits, concept, gone.pictures["none"]).items():
        for name, row in rows.items():
            row[attack] = curves.get(name)
    sheet = [[found.pictures[name][0] for name in rows] for found in (gone, kept)]
    return {"guide": GUIDES[concept], "rows": list(rows.values()), "refused": refused}, sheet


def of_concept(
    device: str, concept: str, prompts: int, only: list[str], threads: int
) -> tuple[dict[str, Any], Any]:
    """`trial` in a process of its own."""
    torch.set_num_threads(threads)
    return trial(end_to_end.load(device, "testbed"), concept, prompts, only)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """To be read: the last budget of each attack."""
    columns = ("concept-inversion", "unlearn-diff-atk", "p4d", "ring-a-bell", "relearning")
    lines = [" | ".join(("eraser", "ESR-1", "PSR-1", "agreement", "distance", *columns, "seconds"))]
    for row in rows:
        cells = [f"{row['esr_1']:.0f}", f"{row['psr_1']:.0f}", f"{row['agreement_preserved']:.3f}"]
        cells += [_number(row["distance_preserved"], ".3f")]
        cells += [f"{row[name][-1][1]:.0f}" if row[name] else "-" for name in columns]
        lines.append(" | ".join((row["name"], *cells, _number(row.get("seconds"), ".1f"))))
    return lines


def _number(value: float | None, how: str) -> str:
    return "-" if value is None else f"{value:{how}}"


def main() -> None:
    parser = end_to_end.arguments(__doc__)
    parser.add_argument("--concepts", nargs="+", default=list(GUIDES), choices=[*GUIDES, "caption"])
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--only", nargs="+", default=[], help="erasers, by the names of the table")
    parser.add_argument("--workers", type=int, default=1, help="concepts at a time, a thread each")
    parser.add_argument("--sheet", type=Path, help="write a picture of all edits")
    given = end_to_end.parse(parser)
    concepts = [CAPTION if concept == "caption" else concept for concept in given.concepts]
    threads = max(1, torch.get_num_threads() // given.workers)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(given.workers, context) as pool:
        waiting = {
            concept: pool.submit(of_concept, given.device, concept, given.prompts, given.only, threads)
            for concept in concepts
        }
        found = end_to_end.record(
            given, {concept: lambda concept=concept: waiting[concept].result()[0] for concept in concepts}
        )
        sheets = {concept: waiting[concept].result()[1] for concept in concepts}
    for concept in concepts:
        print(f"\n{concept}", *table(found[concept]["rows"]), sep="\n")
    if given.sheet:
        columns = [row["name"] for row in found[concepts[0]]["rows"]]
        same = [concept for concept in concepts if [r["name"] for r in found[concept]["rows"]] == columns]
        labels = [f"{concept}, {side}" for concept in same for side in ("erased", "preserved")]
        rows = [row for concept in same for row in sheets[concept]]
        evaluate.contact_sheet(rows, columns=columns, labels=labels, picture_px=64).save(given.sheet)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
