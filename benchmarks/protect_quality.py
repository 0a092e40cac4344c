"""Does protection work on the embedded model: what is seen of each method, and what is still learned.

`python benchmarks/protect_quality.py [--json FILE] [--sheets DIR] [--only mist,aspl] [--quick]`

Eight pictures of a subject that the model has never seen are protected by each method at each budget, and
rounded to 8 bits; a copy of the model learns them and draws (how, and who judges: `testbed.subject_trial`).
"clean" are the pictures as they are, "random" is noise of the same budget, "none" the model that learned
nothing. Methods run with their own defaults but for what `METHODS` says; who protects knows the prompt that
the pictures are learned under.

  PSNR, SSIM     of the protected pictures
  displacement   of their latents, relative
  identity       cosine to other pictures of the subject, mean over all drawings
  quality        of the drawings
  lost           per cent of what "clean" has, from drawings of the same noise, with its normal 95 % interval
  seconds        of protecting eight pictures

With --json, rows that the file has are not measured again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import end_to_end
import machine
from pumice import evaluate, protect, testbed
from pumice.models import DiffusionModel
from pumice.testbed import SubjectTrial

BUDGETS = (8, 16, 4)  # levels of 1/255, in the order in which they are measured
CLASS = "a photo of a creature"
COLUMNS = (0, 1, *range(2, 18, 2))  # of a row's pictures those that a sheet has

Protect = Callable[[Tensor, DiffusionModel, str, float], Tensor]

# A surrogate of 5 million weights has to take larger steps than one of 860 million.
SURROGATE: dict[str, Any] = {"lr": 1e-4, "num_class_images": 8}

# What differs from a method's defaults: the step that goes with the budget as in its paper, and sizes for the
# testbed.
METHODS: dict[str, Protect] = {
    "random": lambda x, m, prompt, eps: protect.random_noise(x, eps=eps),
    "photoguard": lambda x, m, prompt, eps: protect.photoguard(x, m, eps=eps, step_size=eps / 3, steps=200),
    "advdm": lambda x, m, prompt, eps: protect.advdm(x, m, prompt, eps=eps),
    "advdm-": lambda x, m, prompt, eps: protect.advdm(x, m, prompt, direction="-", eps=eps),
    "mist": lambda x, m, prompt, eps: protect.mist(x, m, prompt, eps=eps),
    "mist texture": lambda x, m, prompt, eps: protect.mist(x, m, prompt, mode="texture", eps=eps),
    "sds": lambda x, m, prompt, eps: protect.sds(x, m, prompt, eps=eps),
    "sdst": lambda x, m, prompt, eps: protect.sdst(x, m, prompt, eps=eps),
    "fsmg": lambda x, m, prompt, eps: protect.fsmg(
        x, m, prompt, CLASS, eps=eps, step_size=eps / 10, train_steps=200, **SURROGATE
    ),
    "aspl": lambda x, m, prompt, eps: protect.aspl(
        x, m, prompt, CLASS, eps=eps, step_size=eps / 10, **SURROGATE
    ),
    "simac": lambda x, m, prompt, eps: protect.simac(x, m, prompt, CLASS, eps=eps, **SURROGATE),
    "metacloak": lambda x, m, prompt, eps: protect.metacloak(
        x,
        m,
        prompt,
        CLASS,
        eps=eps,
        step_size=eps / 10,
        train_steps=200,
        interval=100,
        trials=1,
        rounds=20,
        **SURROGATE,
    ),
    "ace": lambda x, m, prompt, eps: protect.ace(
        x, m, prompt, class_prompt=CLASS, num_class_images=8, eps=eps
    ),
    "caat": lambda x, m, prompt, eps: protect.caat(x, m, prompt, eps=eps, step_size=eps / 10),
    "photoguard diffusion": lambda x, m, prompt, eps: protect.photoguard_diffusion(
        x, m, norm="linf", eps=eps, steps=25, grad_reps=2
    ),
}


def measure(
    model: DiffusionModel, trial: SubjectTrial, images: Tensor, **learning: Any
) -> tuple[dict[str, Any], Tensor]:
    """A row without its names, and what was drawn, (N, 3, 64, 64) uint8."""
    moved = evaluate.latent_displacement(images, trial.pictures, model, trial.prompt)
    learned = evaluate.learnability(
        model, images, trial.prompt, trial.prompts, **{**trial.learning, **learning}
    )
    drawn = learned.pictures.flatten(0, 2)
    row = {
        **evaluate.visibility(images, trial.pictures).mean(),
        "displacement": float(moved.latent.mean()),
        "loss_change": float((moved.loss / moved.original_loss).mean() - 1),
        "identity": trial.identity(drawn / 255).tolist(),
        "quality": trial.quality(drawn / 255).tolist(),
    }
    return row, drawn


def protected(model: DiffusionModel, trial: SubjectTrial, method: str, levels: int) -> tuple[Tensor, float]:
    """The pictures after a method, in 8 bits, and how long it took."""
    start = time.perf_counter()
    images = METHODS[method](trial.pictures, model, trial.prompt, levels / 255)
    seconds = time.perf_counter() - start
    return (images * 255).round() / 255, seconds


def summary(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over all subjects: one row for each method and budget."""
    rows = list(rows)
    clean = {row["subject"]: row for row in rows if row["method"] == "clean"}
    found = []
    for method, levels in dict.fromkeys((row["method"], row["levels"]) for row in rows):
        of = [row for row in rows if (row["method"], row["levels"]) == (method, levels)]
        line: dict[str, Any] = {"method": method, "levels": levels, "subjects": len(of)}
        for judge in ("identity", "quality"):
            scores = torch.tensor([row[judge] for row in of])
            compared = torch.tensor([clean[row["subject"]][judge] for row in of])
            line |= {judge: float(scores.mean())} | evaluate.share_lost(judge, scores, compared)
        for key in ("psnr", "ssim", "displacement", "seconds"):
            line[key] = _mean(row[key] for row in of)
        found.append(line)
    return found


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def show(found: list[dict[str, Any]]) -> None:
    titles = f"{'method':21}eps   PSNR   SSIM  displ.  identity  quality"
    print(f"{titles}  {'identity lost, %':>21}  {'quality lost, %':>21}       s")
    for row in sorted(found, key=lambda row: (row["levels"], row["identity_lost"])):
        seen = "    -      -" if row["psnr"] is None else f"{row['psnr']:5.1f}  {row['ssim']:.3f}"
        lost = "  ".join(
            f"{row[key]:5.1f} [{row[f'{key}_low']:5.1f}, {row[f'{key}_high']:5.1f}]"
            for key in ("identity_lost", "quality_lost")
        )
        print(
            f"{row['method']:21}{row['levels']:3}  {seen}   {row['displacement']:.3f}  "
            f"   {row['identity']:.3f}    {row['quality']:.3f}  {lost}  {row['seconds']:6.1f}"
        )


def sheet(folder: Path, subject: int, measured: Iterable[dict[str, Any]]) -> None:
    """The rows of a subject below each other."""
    names = [_name(row) for row in measured if row["subject"] == subject]
    names = [name for name in names if (folder / f"{name}.png").exists()]
    rows = []
    for name in names:
        strip = torch.from_numpy(np.array(Image.open(folder / f"{name}.png"))).permute(2, 0, 1)
        pictures = strip.split(strip.shape[1], dim=2)
        rows.append([pictures[column] for column in COLUMNS])
    columns = ["learned" if column < 2 else "drawn" for column in COLUMNS]
    labels = [name.split("-", 1)[1] for name in names]
    evaluate.contact_sheet(rows, columns=columns, labels=labels, picture_px=96).save(
        folder / f"subject{subject}.png"
    )


def _name(row: dict[str, Any]) -> str:
    return f"{row['subject']}-{row['method']}" + (f" {row['levels']}" if row["levels"] else "")


def main() -> None:
    parser = end_to_end.arguments(__doc__)
    parser.add_argument("--subjects", type=int, default=2)
    parser.add_argument("--only", type=lambda text: text.split(","), help="methods, with commas between")
    parser.add_argument("--minutes", type=float, help="begin no row after that")
    parser.add_argument("--quick", action="store_true", help="one subject, 8/255 alone")
    parser.add_argument("--sheets", type=Path, help="a folder for pictures of each row")
    given = end_to_end.parse(parser)
    methods = given.only or list(METHODS)
    if unknown := set(methods) - set(METHODS):
        parser.error(f"--only: got {', '.join(sorted(unknown))}, expected some of {', '.join(METHODS)}")
    model = end_to_end.load(given.device, "testbed")
    subjects, budgets = (1, BUDGETS[:1]) if given.quick else (given.subjects, BUDGETS)
    record: dict[str, Any] = {"machine": machine.describe(given.device), "rows": []}
    if given.json and given.json.exists():
        record["rows"] = json.loads(given.json.read_text())["rows"]
    if given.sheets:
        given.sheets.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    wanted = [(subject, name, 0) for subject in range(subjects) for name in ("clean", "none")]
    wanted += [(s, name, levels) for levels in budgets for s in range(subjects) for name in methods]
    done = {(row["subject"], row["method"], row["levels"]) for row in record["rows"]}
    for subject, method, levels in wanted:
        late = given.minutes and time.monotonic() - began > 60 * given.minutes
        if (subject, method, levels) in done or late:
            continue
        trial = testbed.subject_trial(subject)
        images, seconds = trial.pictures, 0.0
        if levels:
            images, seconds = protected(model, trial, method, levels)
        untrained = {"steps": 0} if method == "none" else {}
        row, drawn = measure(model, trial, images, **untrained)
        row = {"subject": subject, "method": method, "levels": levels, **row, "seconds": seconds}
        record["rows"].append(row)
        print(
            f"subject {subject}  {method:22}{levels:3}  identity {np.mean(row['identity']):.3f}  "
            f"quality {np.mean(row['quality']):.3f}  {seconds:.1f} s",
            flush=True,
        )
        if given.json:
            record["summary"] = summary(record["rows"])
            given.json.write_text(json.dumps(record, indent=1))
        if given.sheets:
            strip = torch.cat([*(images[:2] * 255).round().byte(), *drawn], dim=2)
            Image.fromarray(strip.permute(1, 2, 0).numpy()).save(given.sheets / f"{_name(row)}.png")
    show(summary(record["rows"]))
    if given.sheets:
        for subject in range(subjects):
            sheet(given.sheets, subject, record["rows"])


if __name__ == "__main__":
    main()
