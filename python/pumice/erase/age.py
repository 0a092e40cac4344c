"""AGE: a concept becomes the mixture of others that its erasure moves most (Bui et al., ICLR 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from pumice import models
from pumice.erase.arguments import check_scale, checked_texts
from pumice.erase.concept_search import ConceptSearch, SearchGradient, check_search_gradient, denoised
from pumice.erase.trainer import Trainer, TrajectoryOptions, apart
from pumice.erase.vocabulary import Vocabulary, candidates
from pumice.models import Edit, PromptEmbeds
from pumice.models.arguments import checked_count


@torch.inference_mode(False)
def age(
    pipe: Any,
    concepts: str | Sequence[str],
    vocabulary: Vocabulary = None,
    *,
    parameters: str = "xattn",
    negative_guidance: float = 1.0,
    lamb: float = 1.0,
    nearest: int = 1000,
    centres: int = 100,
    temperature: float = 2.0,
    hard: bool = False,
    top_k: int = 5,
    search_learning_rate: float = 1e-2,
    search_gradient: SearchGradient = "paper",
    start_guidance: float = 3.0,
    num_inference_steps: int = 50,
    steps: int = 1000,
    learning_rate: float = 1e-5,
    **options: Unpack[TrajectoryOptions],
) -> Edit:
    """Erase concepts by turning each into others near it, which are preserved meanwhile.

    ::

        |x0'(z_e, c_e) - [x0(z_e, c_t) - eta (x0(z_e, c_e) - x0(z_e, c_t))]|^2
            + lamb |x0'(z_t, c_t) - x0(z_t, c_t)|^2                       down in the weights
        |x0'(z_e, c_e) - x0(z_e, c_t)|^2
            + lamb |x0'(z_t, c_t) - x0(z_t, c_t)|^2                       up in the logits pi
        c_t = sum_k w_k E_k      w = gumbel_softmax(pi)

    means over elements, of denoised latents; x0' trains, x0 is that of the model as it was (Bui et al.,
    arXiv:2501.18950). z_e and z_t lie on guided trajectories of c_e and c_t from one noise to one time. E are
    the embeddings of the concept's `candidates`. Each step of the weights is followed by one of the logits,
    at a z_t and c_t of its own draw. Several concepts take turns at random, each with its own candidates.

    The defaults are the paper's for artists. For objects it takes a vocabulary of classes, nearest=100,
    temperature=0.1, hard=True; for nudity nearest=100, hard=True, parameters="noxattn".

    Args:
        pipe: a diffusers pipeline, a path, a hub id, or a DiffusionModel; it is not changed.
        concepts: as the model's captions word them.
        vocabulary, nearest, centres: what they may become, of `pumice.erase.vocabulary.candidates`, and how
            many stand for it. Leave out what goes with a concept, such as "ball" for "a ball".
        parameters: a set of weights, one of `pumice.erase.parameters.SETS`. Default "xattn", cross-attention,
            of the paper for objects and artists; for nudity "noxattn", everything else but output and time.
        negative_guidance: eta. Default 1, of the paper.
        lamb: weight of what is preserved. Default 1, of the paper, which tries up to 10.
        temperature: of w.
        hard: w is one candidate.
        top_k: else so many of the largest w stand, and add up to one.
        search_learning_rate: Adam's, of the logits. Default 1e-2, of the paper.
        search_gradient: "paper", of all that depends on the logits; "code" of x0'(z_t, c_t) alone, as in the
            released code, where what the original model says is a constant, and so is the first term.
        start_guidance: of trajectories. Default 3, of the released code.
        num_inference_steps: of a whole trajectory. Default 50, of the released code.
        steps: of the weights. Default 1000, of the paper, which counts those of the logits, too.
        learning_rate: Adam's. Default 1e-5, of the paper.
        options: `pumice.erase.trainer.TrajectoryOptions`.

    Returns:
        An `Edit`: weights that are added, or with `rank` a LoRA. Its details tell how often each candidate
        was the "targets" largest part.

    Differences from the released code: beside `search_gradient`, a step of the logits shares z_e, noise and
    time with the step of the weights before it, as all latents are drawn in one batch; `centres` is of each
    concept, not of all together; texts with other characters than letters are left out before the nearest are
    taken.

    Raises:
        TypeError, ValueError: naming the argument; for a concept that the model does not know, a vocabulary
            of nothing else, and if a loss or gradient is not finite, whereupon the last checkpoint stands.
        UnsupportedModelError: for quantised, offloaded or LoRA-wrapped weights.
    """
    check_search_gradient(search_gradient)
    eta = check_scale("negative_guidance", negative_guidance)
    lamb = check_scale("lamb", lamb)
    temperature = check_scale("temperature", temperature, positive=True)
    search_learning_rate = check_scale("search_learning_rate", search_learning_rate, positive=True)
    top_k = checked_count("top_k", top_k)
    start_guidance = check_scale("start_guidance", start_guidance)
    source = models.load(pipe)
    others = candidates(
        source, checked_texts("concepts", concepts), vocabulary, nearest=nearest, centres=centres
    )
    trainer = Trainer(
        source,
        concepts,
        parameters,
        method="age",
        settings={
            "candidates": [list(texts) for texts in others],
            "negative_guidance": eta,
            "lamb": lamb,
            "temperature": temperature,
            "hard": hard,
            "top_k": top_k,
            "search_learning_rate": search_learning_rate,
            "search_gradient": search_gradient,
            "start_guidance": start_guidance,
            "num_inference_steps": num_inference_steps,
        },
        steps=steps,
        learning_rate=learning_rate,
        **options,
    )
    model, student, count = trainer.model, trainer.student, trainer.count
    chosen = ConceptSearch(
        trainer,
        others,
        temperature=temperature,
        hard=hard,
        top_k=top_k,
        learning_rate=search_learning_rate,
        pending=options.get("pending", 1),
        rows=options.get("rows", 64),
    )

    def drawn(step: int) -> PromptEmbeds:
        branches = (trainer.encode(trainer.of_step(step)), *chosen.draw(step))
        return PromptEmbeds.cat([branch[row] for row in range(count) for branch in branches])

    trajectories = trainer.trajectories(
        drawn, guidance_scale=start_guidance, num_inference_steps=num_inference_steps, branches=3
    )

    def loss(step: int, rows: Sequence[int]) -> Tensor:
        latents = trajectories.at(step)
        (z_e, t), (z_t, _) = latents.of(rows, 0), latents.of(rows, 1)
        erased, target = trainer.encode(chosen.concepts(step))[rows], chosen.training(step, rows)
        with torch.no_grad():
            texts = PromptEmbeds.cat((target, erased, target))
            towards, away, before = denoised(model, torch.cat((z_e, z_e, z_t)), t.repeat(3), texts).chunk(3)
        texts = PromptEmbeds.cat((erased, target))
        found, kept = denoised(student, torch.cat((z_e, z_t)), t.repeat(2), texts).chunk(2)
        goal = towards - eta * (away - towards)
        return apart(found, goal, count) + lamb * apart(kept, before, count)

    def affected(step: int, rows: Sequence[int]) -> Tensor:
        latents = trajectories.at(step)
        (z_e, t), (z_t, _) = latents.of(rows, 0), latents.of(rows, 2)
        target = chosen.searching(step, rows)
        kept = denoised(student, z_t, t, target)
        if search_gradient == "code":
            with torch.no_grad():
                before = denoised(model, z_t, t, target)
            return lamb * apart(kept, before, count)
        with torch.no_grad():
            found = denoised(student, z_e, t, trainer.encode(chosen.concepts(step))[rows])
        both = PromptEmbeds.cat((target, target))
        goal, before = denoised(model, torch.cat((z_e, z_t)), t.repeat(2), both).chunk(2)
        return apart(found, goal, count) + lamb * apart(kept, before, count)

    def after(step: int) -> None:
        chosen.count(step)
        chosen.ascend(lambda rows: affected(step, rows))

    return trainer.train(loss, after=after, kept=chosen.state, details=lambda: {"targets": chosen.often()})
