"""The story of arXiv:2406.18944 on the embedded model: what protection costs, and which part brings it back.

`python benchmarks/shortcut_ablation.py [--out DIR] [--json FILE] [--workers 2] [--subjects 0] [--seeds 3]`

Eight pictures of a subject that the model has never seen are protected by `mist` at 11/255, and learned by
DreamBooth ("plain"), after purification by `gridpure` with one pass a round ("purified"), with contrastive
decoupling ("decoupled"), and with both. How, and who judges: `evaluate.embedded_study`.

  identity, quality   of the drawings, means over all, with their normal 95 % intervals
  score               their mean
  recovered           of the score that protection costs, per cent, and its 95 % bootstrap interval over
                      subjects and seeds

A run that was stopped goes on: --out has all that took time. On two cores the default takes about 25 minutes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import machine
from pumice import evaluate
from pumice.evaluate import Study
from pumice.evaluate.study import gridpure, mist

CELLS = {
    "clean + plain": ("none", "none", "dreambooth"),
    "clean + both": ("none", "gridpure", "decoupling"),
    "protected + plain": ("mist", "none", "dreambooth"),
    "protected + purified": ("mist", "gridpure", "dreambooth"),
    "protected + decoupled": ("mist", "none", "decoupling"),
    "protected + both": ("mist", "gridpure", "decoupling"),
}


def study(subjects: tuple[int, ...], seeds: tuple[int, ...]) -> Study:
    whole = evaluate.embedded_study(subjects=subjects, seeds=seeds)
    return replace(
        whole,
        protections={"none": None, "mist": mist},
        purifiers={"none": None, "gridpure": partial(gridpure, one_shot=True)},
        recipes={name: whole.recipes[name] for name in ("dreambooth", "decoupling")},
    )


def row(found: evaluate.Matrix, name: str) -> dict[str, Any]:
    cell = CELLS[name]
    keys = ("protection", "purifier", "recipe")
    return {"cell": name} | next(each for each in found.rows if tuple(each[key] for key in keys) == cell)


def show(rows: list[dict[str, Any]]) -> None:
    print(f"{'':23}{'identity':>22}{'quality':>22}{'score':>8}   recovered, %")
    for each in rows:
        judged = "".join(
            f"  {each[key]:.3f} [{each[f'{key}_low']:.3f}, {each[f'{key}_high']:.3f}]"
            for key in ("identity", "quality")
        )
        back = "-"
        if each["recovered"] is not None:
            back = f"{100 * each['recovered']:.0f}"
            if each["recovered_low"] is not None:
                back += f" [{100 * each['recovered_low']:.0f}, {100 * each['recovered_high']:.0f}]"
        print(f"{each['cell']:23}{judged}{each['score']:8.3f}   {back}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="a folder to go on from; default a temporary one")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--subjects", type=lambda text: tuple(map(int, text.split(","))), default=(0,))
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    print(machine.line("cpu"))
    with tempfile.TemporaryDirectory() as scratch:
        found = evaluate.matrix(
            partial(study, given.subjects, tuple(range(given.seeds))),
            given.out or scratch,
            workers=given.workers,
            progress=True,
        )
    rows = [row(found, name) for name in CELLS]
    show(rows)
    if given.json:
        record = {"machine": machine.describe("cpu"), "rows": rows, "settings": found.settings}
        given.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
