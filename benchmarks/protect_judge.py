"""How much room a protection has on the embedded model: the judge of `protect_quality.py` attacked itself.

`python benchmarks/protect_judge.py [--json FILE]`

No method: it knows the judge. Pictures descend their identity as it is after the autoencoder, at 8/255, and a
copy of the model learns them. Beside them the pictures as they are, and `mist` at 8/255, through the
autoencoder.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import end_to_end
from pumice import evaluate, ops, protect, testbed
from pumice.models import DiffusionModel
from pumice.testbed import SubjectTrial

EPS, LENGTH, STEPS = 8 / 255, 2 / 255, 60


def attacked(model: DiffusionModel, trial: SubjectTrial) -> Tensor:
    judge = testbed.load_identity().requires_grad_(False)
    subject = F.normalize(judge(trial.references)[0].mean(0), dim=0)
    x = trial.pictures
    with model.frozen():
        for _ in range(STEPS):
            leaf = x.clone().requires_grad_()
            seen = model.decode_latents(model.encode_image(leaf))
            (gradient,) = torch.autograd.grad((judge(seen)[0] @ subject).sum(), leaf)
            x = ops.pgd_step(x, gradient, trial.pictures, step_size=-LENGTH, eps=EPS)
    return (x * 255).round() / 255


@torch.no_grad()
def through(model: DiffusionModel, trial: SubjectTrial, images: Tensor) -> dict[str, float]:
    seen = model.decode_latents(model.encode_image(images))
    return {
        "identity": float(trial.identity(images).mean()),
        "identity_through_autoencoder": float(trial.identity(seen).mean()),
    }


def measure(model: DiffusionModel) -> dict[str, Any]:
    trial = testbed.subject_trial(0)
    images = attacked(model, trial)
    learned = evaluate.learnability(model, images, trial.prompt, trial.prompts, **trial.learning)
    drawn = learned.pictures.flatten(0, 2) / 255
    found: dict[str, Any] = {
        "clean": through(model, trial, trial.pictures),
        "mist": through(model, trial, protect.mist(trial.pictures, model, trial.prompt, eps=EPS)),
        "judge attacked": through(model, trial, images),
    }
    found["judge attacked"] |= {
        "identity_learned": float(trial.identity(drawn).mean()),
        "quality_learned": float(trial.quality(drawn).mean()),
    }
    return found


def main() -> None:
    given = end_to_end.parse(end_to_end.arguments(__doc__))
    model = end_to_end.load("cpu", "testbed")
    end_to_end.record(given, {"subject 0, 8/255": lambda: measure(model)})


if __name__ == "__main__":
    main()
