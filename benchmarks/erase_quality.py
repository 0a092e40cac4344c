"""What the erasers take from the embedded model and what they leave, and whether an attack gets it back.

`python benchmarks/erase_quality.py [--prompts 32] [--attack 100] [--json FILE] [--sheet FILE]`

Erased, one at a time: an object ("ball", becomes a box), an artist ("varga", becomes okoro) and the caption
of a memorized picture (becomes "a picture"). Every method has the same guide; those that preserve texts get
the same 200 captions, of other scenes than those that they are judged by. "defaults" is the function as it is
called without anything else; the other rows name what they were given.

  ESR-1, PSR-1   share of pictures that no longer, or still, show what their prompt names, as the reader
                 tells; a memorized caption is erased if its picture is not replayed; 95 % Clopper-Pearson
  loss           points of PSR-1 against the model as it is
  agreement      CLIP, of the preserved pictures with their prompts
  distance       1 - MS-SSIM of the preserved pictures to those of the model as it is, from the same noise
  attack         share of pictures that show it again, drawn with a word that was learned on the edited model
                 from six pictures (concept inversion), at each budget of steps

All models are drawn in one batch of the denoiser, each sample under its own map of the text embeddings.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import end_to_end
from pumice import erase, evaluate, testbed
from pumice.models import DiffusionModel, Edit

SEEDS = 32  # pictures of a caption that has one prompt
CAPTION = testbed.memorized_captions()[0]
GUIDES = {"ball": "box", "varga": "okoro", CAPTION: "a picture"}
TEMPLATES = {
    "ball": ("a {}", "a photo of a {}", "a {} at the beach", "a {} in the city"),
    "varga": ("in the style of {}", "a red ball, in the style of {}", "a blue tent, in the style of {}"),
}


def methods(concept: str, guide: str, keep: Sequence[str]) -> dict[str, Callable[[DiffusionModel], Edit]]:
    """By name, as the table has them."""
    everything: dict[str, Any] = {"tokens": "all", "guide": guide}
    templates = TEMPLATES.get(concept, ())
    kept: dict[str, Any] = {"preserve": keep, "preserve_scale": 0.01}
    wordings, anchors = (
        [template.replace("{}", text) for template in ("{}", *templates)] for text in (concept, guide)
    )
    # longer ones do not fit around a caption, and TIME wants as many words
    short = {"prompts": ("{}",)} if concept == CAPTION else {}
    source, destination = f"a picture of {concept}", f"a picture of {guide}"
    if concept == CAPTION:
        source, destination = concept, "a picture of a red box, beach"
    return {
        "uce, defaults": lambda m: erase.uce(m, concept, guide=guide),
        "uce, all tokens": lambda m: erase.uce(m, concept, **everything),
        "uce, all tokens, preserve": lambda m: erase.uce(m, concept, expand=templates, **everything, **kept),
        "uce, tensor, preserve": lambda m: erase.uce(
            m, concept, technique="tensor", expand=templates, **everything, **kept
        ),
        "rece, defaults": lambda m: erase.rece(m, concept, guide=guide),
        "rece, preserve": lambda m: erase.rece(m, concept, guide=guide, **kept),
        "mace refine, defaults": lambda m: erase.mace_refine(m, concept, guide, **short),
        "mace refine, preserve": lambda m: erase.mace_refine(m, concept, guide, lamb=0.5, **short, **kept),
        "trce, lamb 1": lambda m: erase.trce(m, concept, guide, lamb=1, **_templates(concept)),
        "trce, preserve": lambda m: erase.trce(m, concept, guide, lamb=0.1, **_templates(concept), **kept),
        "speed, defaults": lambda m: erase.speed(m, concept, anchor=guide),
        "speed, all tokens, retain": lambda m: erase.speed(
            m, wordings, anchor=anchors, tokens="all", retain=keep, retain_scale=0.05, threshold=1
        ),
        "time, defaults": lambda m: erase.time(m, source, destination),
    }


def _templates(concept: str) -> dict[str, Any]:
    return {"templates": ("{}",)} if concept == CAPTION else {}


def trial(
    model: DiffusionModel, concept: str, guide: str, prompts: int, attack: int
) -> tuple[dict[str, Any], list[list[Tensor]], list[str]]:
    """The rows of one concept; and pictures for the sheet, before and after each edit."""
    keep = [prompt for prompt, _ in testbed.trial(concept, 200, seed=1).preserved]
    edits, seconds, refused = {}, {}, {}
    for name, make in methods(concept, guide, keep).items():
        start = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", erase.ErasureWarning)  # the table has the change
                edits[name] = make(model)
        except ValueError as error:
            refused[name] = str(error)
        seconds[name] = time.perf_counter() - start
    judged = testbed.trial(concept, prompts)
    clip, tokenizer = testbed.load_clip()
    settings: dict[str, Any] = {
        "classify": judged.classify,
        "k": 1,
        "num_inference_steps": 20,
        "guidance_scale": 5,
        "agreement": evaluate.clip_agreement(clip, tokenizer),
        "batch_size": 8 * (len(edits) + 1),
    }
    seeds = SEEDS if len(judged.erased) == 1 else 1
    gone = evaluate.erasure(model, edits, judged.erased, (), seeds=seeds, **settings)
    kept = evaluate.erasure(model, edits, (), judged.preserved, seeds=1, **settings)
    rows = {
        one["name"]: {key: two[key] if value is None else value for key, value in one.items()}
        for one, two in zip(gone.rows, kept.rows, strict=True)
    }
    for name, edit in edits.items():
        report = edit.report()
        rows[name] |= {key: report[key] for key in ("overall_change", "drift", "rank")}
        rows[name]["seconds"] = seconds[name]
    if attack:
        inversion = evaluate.concept_inversion(
            model,
            edits,
            gone.pictures["none"][:6] / 255,
            label=judged.erased[0][1],
            classify=judged.classify,
            steps=attack,
            checkpoints=(0, attack // 4),
            seeds=12,
            num_inference_steps=20,
            guidance_scale=5,
            rows=8 * (len(edits) + 1),
        )
        for name in rows:
            rows[name]["attack"] = inversion.curve(name)
    sheet = [[found.pictures[name][0] for name in rows] for found in (gone, kept)]
    return {"guide": guide, "rows": list(rows.values()), "refused": refused}, sheet, list(rows)


def main() -> None:
    parser = end_to_end.arguments(__doc__)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--attack", type=int, default=100, help="steps; 0 leaves it out")
    parser.add_argument("--sheet", type=Path, help="write a picture of all edits")
    given = end_to_end.parse(parser)
    model = end_to_end.load(given.device, "testbed")
    rows: list[list[Tensor]] = []
    columns: list[str] = []
    labels: list[str] = []

    def part(concept: str, guide: str) -> dict[str, Any]:
        found, sheet, names = trial(model, concept, guide, given.prompts, given.attack)
        if not columns:
            columns.extend(names)
        if names == columns:
            rows.extend(sheet)
            labels.extend((f"{concept}, erased", "preserved"))
        return found

    end_to_end.record(
        given, {name: lambda name=name, guide=guide: part(name, guide) for name, guide in GUIDES.items()}
    )
    if given.sheet:
        evaluate.contact_sheet(rows, columns=columns, labels=labels, picture_px=88).save(given.sheet)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
