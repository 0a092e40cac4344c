"""EAP: while a concept is erased, what would suffer most is preserved (Bui et al., NeurIPS 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack, get_args

import torch
from torch import Tensor

from pumice import models
from pumice.erase.arguments import check_scale, checked_texts
from pumice.erase.concept_search import (
    LATENTS,
    ConceptSearch,
    Search,
    SearchGradient,
    check_search_gradient,
    denoised,
    moved,
    read_differently,
)
from pumice.erase.trainer import Trainer, TrajectoryOptions, apart
from pumice.erase.vocabulary import Vocabulary, candidates
from pumice.models import Edit, PromptEmbeds
from pumice.models.arguments import checked_count


@torch.inference_mode(False)
def eap(
    pipe: Any,
    concepts: str | Sequence[str],
    vocabulary: Vocabulary = None,
    *,
    parameters: str = "xattn",
    negative_guidance: float = 1.0,
    lamb: float = 1.0,
    nearest: int = 1000,
    centres: int = 100,
    search: Search = "gumbel",
    temperature: float = 2.0,
    hard: bool = True,
    search_learning_rate: float = 1e-2,
    search_gradient: SearchGradient = "paper",
    search_every: int = 50,
    start_guidance: float = 3.0,
    num_inference_steps: int = 50,
    steps: int = 1000,
    learning_rate: float = 1e-5,
    **options: Unpack[TrajectoryOptions],
) -> Edit:
    """Erase concepts, and preserve of many others the one that the erasure moves most.

    ::

        min_theta' max_pi  |x0'(z_e, c_e) - T|^2 + lamb |x0'(z_r, c_r(pi)) - x0(z_r, c_r(pi))|^2
        T = x0(z_e, "") - eta (x0(z_e, c_e) - x0(z_e, ""))

    means over elements, of denoised latents, so that high noise weighs most where epsilon is predicted; x0'
    trains, x0 is that of the model as it was (Bui et al., arXiv:2410.15618). z_e and z_r lie on guided
    trajectories of c_e and c_r from one noise to one time. c_r is drawn of the concept's `candidates` by
    `gumbel_softmax` of its logits pi. Each step of the weights is followed by one of the logits, at a z_r and
    c_r of its own draw. Several concepts take turns at random, each with its own candidates.

    Args:
        pipe: a diffusers pipeline, a path, a hub id, or a DiffusionModel; it is not changed.
        concepts: as the model's captions word them.
        vocabulary, nearest, centres: what may be preserved, of `pumice.erase.vocabulary.candidates`, and how
            many stand for it: 1000 and 100 of the paper; for nudity its code takes 2000 and 50. Leave out
            what goes with a concept, such as "ball" for "a ball": it would be preserved.
        parameters: a set of weights, one of `pumice.erase.parameters.SETS`. Default "xattn", cross-attention,
            of the paper for objects and artists; for nudity "noxattn", everything else but output and time.
        negative_guidance: eta. Default 1, of the paper.
        lamb: weight of what is preserved. Default 1, of the paper.
        search: "gumbel", as above. "exhaustive": each `search_every` steps measure at four latents of the
            concepts how far the x0 of each candidate has moved, and preserve the farthest from then on; until
            then, random ones. "linear": likewise by how far its keys and values have moved, which takes no
            pass.
        temperature: of the mixture that has gradients. Default 2, of the paper.
        hard: draw one candidate; else preserve a mixture of their embeddings. Default True, of its scripts.
        search_learning_rate: Adam's, of the logits. Default 1e-2, of its scripts.
        search_gradient: "paper", of all that depends on the logits; "code" of x0'(z_r, c_r) alone, as in the
            released code, where x0(z_r, c_r) is a constant: the logits may then move away from what suffers.
        search_every: steps.
        start_guidance: of trajectories. Default 3, of the paper.
        num_inference_steps: of a whole trajectory. Default 50, of the paper.
        steps: of the weights. Default 1000, of the paper, which counts those of the logits, too.
        learning_rate: Adam's. Default 1e-5, of the paper.
        options: `pumice.erase.trainer.TrajectoryOptions`.

    Returns:
        An `Edit`: weights that are added, or with `rank` a LoRA. Its details tell how often each candidate
        was "preserved".

    Differences from the released code: beside `search_gradient`, a step of the logits draws no z_e, and its
    z_r shares noise and time with the step of the weights before it, as all three are drawn in one batch;
    `centres` is of each concept, not of all together; texts with other characters than letters are left out
    before the nearest are taken.

    Raises:
        TypeError, ValueError: naming the argument; for a concept that the model does not know, a vocabulary
            of nothing else, and if a loss or gradient is not finite, whereupon the last checkpoint stands.
        UnsupportedModelError: for quantised, offloaded or LoRA-wrapped weights.
    """
    if search not in get_args(Search):
        raise ValueError(f"search: got {search!r}, expected one of {', '.join(get_args(Search))}")
    if search == "linear" and parameters in ("noxattn", "selfattn"):
        raise ValueError(f"search: got 'linear' with parameters={parameters!r}, which leaves keys and values")
    check_search_gradient(search_gradient)
    eta = check_scale("negative_guidance", negative_guidance)
    lamb = check_scale("lamb", lamb)
    search_every = checked_count("search_every", search_every)
    temperature = check_scale("temperature", temperature, positive=True)
    search_learning_rate = check_scale("search_learning_rate", search_learning_rate, positive=True)
    start_guidance = check_scale("start_guidance", start_guidance)
    source = models.load(pipe)
    others = candidates(
        source, checked_texts("concepts", concepts), vocabulary, nearest=nearest, centres=centres
    )
    trainer = Trainer(
        source,
        concepts,
        parameters,
        method="eap",
        settings={
            "candidates": [list(texts) for texts in others],
            "negative_guidance": eta,
            "lamb": lamb,
            "search": search,
            "temperature": temperature,
            "hard": hard,
            "search_learning_rate": search_learning_rate,
            "search_gradient": search_gradient,
            "search_every": search_every,
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
        learning_rate=search_learning_rate,
        pending=options.get("pending", 1),
        rows=options.get("rows", 64),
    )

    def drawn(step: int) -> PromptEmbeds:
        branches = [trainer.encode(trainer.of_step(step)), *chosen.draw(step)]
        if search != "gumbel":
            del branches[2]
        return PromptEmbeds.cat([branch[row] for row in range(count) for branch in branches])

    trajectories = trainer.trajectories(
        drawn,
        guidance_scale=start_guidance,
        num_inference_steps=num_inference_steps,
        branches=3 if search == "gumbel" else 2,
    )

    def loss(step: int, rows: Sequence[int]) -> Tensor:
        latents = trajectories.at(step)
        (z_e, t), (z_r, _) = latents.of(rows, 0), latents.of(rows, 1)
        erased, preserved = trainer.encode(chosen.concepts(step))[rows], chosen.training(step, rows)
        empty = trainer.encode([""]).repeat(len(rows))
        with torch.no_grad():
            texts = PromptEmbeds.cat((empty, erased, preserved))
            away, towards, before = denoised(model, torch.cat((z_e, z_e, z_r)), t.repeat(3), texts).chunk(3)
        texts = PromptEmbeds.cat((erased, preserved))
        found, kept = denoised(student, torch.cat((z_e, z_r)), t.repeat(2), texts).chunk(2)
        goal = away - eta * (towards - away)
        return apart(found, goal, count) + lamb * apart(kept, before, count)

    def change(step: int, rows: Sequence[int]) -> Tensor:
        z, t = trajectories.at(step).of(rows, 2)
        texts = chosen.searching(step, rows)
        with torch.set_grad_enabled(search_gradient == "paper"):
            before = denoised(model, z, t, texts)
        return apart(denoised(student, z, t, texts), before, count)

    shape = model.latent_shape()
    z_met = torch.zeros(LATENTS, *shape, device=model.device)
    t_met = torch.zeros(LATENTS, dtype=torch.long, device=model.device)

    def after(step: int) -> None:
        chosen.count(step)
        if search == "gumbel":
            chosen.ascend(lambda rows: change(step, rows))
            return
        (z, t), place = trajectories.at(step).of([0]), step % LATENTS
        z_met[place], t_met[place] = z[0], t[0]
        if (step + 1) % search_every:
            return
        if search == "linear":
            chosen.settle(lambda texts: read_differently(trainer, texts))
        else:
            some = slice(min(step + 1, LATENTS))
            rows = options.get("rows", 64)
            chosen.settle(lambda texts: moved(model, student, z_met[some], t_met[some], texts, rows))

    return trainer.train(
        loss,
        after=after,
        kept={**chosen.state, "search.z": z_met, "search.t": t_met},
        details=lambda: {"preserved": chosen.often()},
    )
