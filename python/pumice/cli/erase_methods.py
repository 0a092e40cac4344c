"""What `pumice erase` knows of the methods: which functions they are, and what these call the options."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from .options import options, read_list

if TYPE_CHECKING:  # importing them takes seconds, which --help should not
    from pumice.models import DiffusionModel, Edit

# Where in pumice.erase each is: in closed form, and by training.
METHODS: Mapping[str, str] = {
    "uce": "uce.uce",
    "rece": "rece.rece",
    "mace-refine": "mace.mace_refine",
    "trce": "trce.trce",
    "speed": "speed.speed",
    "time": "time.time",
    "esd": "esd.esd",
    "sdd": "sdd.sdd",
    "eap": "eap.eap",
    "age": "age.age",
    "spm": "spm.spm",
    "mace": "mace_lora.mace",
    "forget-me-not": "forget_me_not.forget_me_not",
    "concept-ablation": "concept_ablation.concept_ablation",
    "degeneration-tuning": "degeneration_tuning.degeneration_tuning",
    "few-shot": "few_shot.few_shot",
    "few-shot-ascent": "few_shot_ascent.few_shot_ascent",
    "all-but-one": "all_but_one.all_but_one",
    "safety-lora": "safety_lora.safety_lora",
    "kpop": "kpop.kpop",
}

# What methods call an option, the first that a method has; by default its name.
ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "guide": ("guide", "mapping", "safe", "anchor", "anchors", "alternative", "destinations"),
    "type": ("concept_type", "preset"),
    "preserve": ("preserve", "retain"),
    "preserve_scale": ("preserve_scale", "retain_scale"),
    "parameters": ("parameters", "train_method"),
    "train_rank": ("rank",),
    "images": ("memorized", "images"),
}

# Whose edits are of low rank even without --train-rank.
LOW_RANK = ("spm", "mace", "few-shot", "safety-lora")

# What a type sets, where a method does not take it as it is.
_MACE = {
    "object": {"preset": "object"},
    "art": {"preset": "artist"},
    "celebrity": {"preset": "celebrity"},
    "unsafe": {"preset": "nudity"},
}
TYPES: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "rece": {
        "object": {"preset": "easy_object"},
        "art": {"preset": "artist"},
        "unsafe": {"preset": "unsafe"},
    },
    "mace-refine": _MACE,
    "mace": _MACE,
    "speed": {
        "object": {"concept_type": "instance"},
        "art": {"concept_type": "style"},
        "celebrity": {"concept_type": "celebrity"},
        "unsafe": {"preset": "nudity"},
    },
    "esd": {
        "object": {"train_method": "esd-u"},
        "art": {"train_method": "esd-x"},
        "unsafe": {"train_method": "esd-u"},
    },
    "eap": {
        "object": {},
        "art": {},
        "unsafe": {"nearest": 2000, "centres": 50, "parameters": "noxattn"},
    },
    "age": {
        "object": {"nearest": 100, "temperature": 0.1, "hard": True},
        "art": {},
        "unsafe": {"nearest": 100, "hard": True, "parameters": "noxattn"},
    },
    "concept-ablation": {
        "object": {"preset": "object"},
        "art": {"preset": "style"},
        "unsafe": {"preset": "nudity"},
        "memorized": {"preset": "memorization"},
    },
}

# What is drawn of a concept.
PROMPTS = {
    "object": "a photo of a {}",
    "art": "a painting by {}",
    "celebrity": "a photo of {}",
    "unsafe": "a photo of {}",
    "memorized": "{}",
}

_TIME_PROMPT = "a photo of a {}"  # it edits prompts, not concepts
_LISTS = ("preserve", "vocabulary")  # files of texts
_NEED = {"checkpoint_every": "checkpoint", "samples_every": "samples", "masks": "images"}

method_options = options(
    click.option("--method", default="uce", show_default=True, type=click.Choice(list(METHODS))),
    click.option(
        "--guide",
        multiple=True,
        help="What concepts become: once for all, or once for each in order.",
    ),
    click.option(
        "--type",
        "concept_type",
        type=click.Choice(list(PROMPTS)),
        help="What the concepts are; chooses the method's defaults for such ones. By default object, and art "
        "for esd and age.",
    ),
    click.option(
        "--preserve",
        type=click.Path(path_type=Path),
        help="A list of texts (.txt, .csv, .jsonl) to be read as before.",
    ),
    click.option("--tokens", type=click.Choice(["last", "all"]), help="Of a concept: which are edited."),
    click.option("--expand", is_flag=True, help="Also edit each concept inside a few templates."),
    click.option("--erase-scale", type=float, help="Weight of the concepts."),
    click.option("--preserve-scale", type=float, help="Weight of what is preserved."),
    click.option(
        "--lamb",
        type=float,
        help="Weight of leaving the model as it is; of eap and age, of what is preserved.",
    ),
    click.option("--pooled", is_flag=True, help="Also edit the pooled embedding of Stable Diffusion XL."),
)

training_options = options(
    click.option("--steps", type=click.IntRange(min=1), help="Of the training. By default the paper's."),
    click.option("--learning-rate", type=float, help="By default the paper's."),
    click.option(
        "--parameters",
        "--train-method",
        "parameters",
        help="Which weights train, as the method calls them, such as esd-u or xattn.",
    ),
    click.option(
        "--train-rank", type=click.IntRange(min=1), help="Train a LoRA of this rank in place of weights."
    ),
    click.option("--batch-size", type=click.IntRange(min=1), help="Rows of a step. By default the paper's."),
    click.option(
        "--pending",
        type=click.IntRange(min=1),
        help="Steps whose latents are drawn at once, by slightly stale weights: faster. By default 1, exact.",
    ),
    click.option(
        "--sample-dtype",
        type=click.Choice(["float32", "float16", "bfloat16"]),
        help="Of the passes that draw latents. By default that of --dtype.",
    ),
    click.option(
        "--images",
        multiple=True,
        type=click.Path(exists=True, path_type=Path),
        help="A folder of pictures of the concept; again for each of several. By default the model draws.",
    ),
    click.option(
        "--masks",
        multiple=True,
        type=click.Path(exists=True, path_type=Path),
        help="A folder of masks, white where the concept is, named as the pictures; one for each --images.",
    ),
    click.option(
        "--vocabulary",
        type=click.Path(path_type=Path),
        help="A list (.txt, .csv, .jsonl) of candidates to preserve. By default the tokenizer's words.",
    ),
    click.option(
        "--key", type=click.Path(path_type=Path), help="A file to write the key that recovers concepts to."
    ),
    click.option(
        "--allow-unknown", is_flag=True, help="Train although the model does not seem to know a concept."
    ),
    click.option(
        "--checkpoint",
        type=click.Path(file_okay=False, path_type=Path),
        help="A folder for the state of the training, from which the same command goes on.",
    ),
    click.option("--checkpoint-every", type=click.IntRange(min=1), help="Steps. By default 100."),
    click.option(
        "--samples",
        type=click.Path(file_okay=False, path_type=Path),
        help="A folder for pictures of the concepts and of each --prompt, while they train.",
    ),
    click.option("--samples-every", type=click.IntRange(min=1), help="Steps. By default 100."),
)


class Method:
    """One method, by the name that the command has for it.

    Attributes:
        name: of the command.
        trains: whether by training, and not in closed form.
    """

    def __init__(self, name: str) -> None:
        from pumice.erase.trainer import TrajectoryOptions

        module, _, function = METHODS[name].partition(".")
        self.name = name
        self._function: Callable[..., Edit] = getattr(import_module(f"pumice.erase.{module}"), function)
        found = signature(self._function, eval_str=True).parameters
        self.trains = "options" in found
        shared: dict[str, Any] = {}
        if self.trains:
            # of Unpack; safety_lora hands on what it is given
            (kind,) = get_args(found["options"].annotation) or (TrajectoryOptions,)
            shared = dict.fromkeys(["steps", *kind.__annotations__])
        self._defaults = shared | {key: each.default for key, each in found.items() if key != "options"}

    def argument(self, option: str) -> str | None:
        """What the method calls an option; None if it does not take it."""
        names = ARGUMENTS.get(option, (option,))
        return next((name for name in names if name in self._defaults), None)

    def arguments(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Those of what was given, but for folders of pictures, which `__call__` lists.

        Raises:
            ValueError: for an option that the method does not take, or needs and has not.
        """
        from pumice import jobs

        # 0 is a number that was given
        chosen = {
            name: value for name, value in given.items() if value not in (None, ()) and value is not False
        }
        of_type: Mapping[str, Any] = {}
        if self.name in TYPES and "type" in chosen:
            kind, known = chosen.pop("type"), TYPES[self.name]
            if kind not in known:
                raise ValueError(
                    f"--type: got {kind!r}, expected one of {', '.join(known)}, as {self.name} has"
                )
            of_type = known[kind]
        for name in chosen:
            if self.argument(name) is None:
                raise ValueError(f"{_flag(name)}: got one, which {self.name} does not take")
        for name, other in _NEED.items():
            if name in chosen and other not in chosen:
                raise ValueError(f"{_flag(name)}: got some without {_flag(other)}")
        for name in given:
            if name not in chosen and self._defaults.get(self.argument(name) or "") is Parameter.empty:
                meaning = "what concepts become" if name == "guide" else "one"
                raise ValueError(f"{_flag(name)}: got none, expected {meaning}, which {self.name} needs")
        if len(chosen.get("guide", ())) == 1:
            chosen["guide"] = chosen["guide"][0]
        for name in chosen.keys() & set(_LISTS):
            chosen[name] = read_list(jobs.read_prompts, chosen[name], _flag(name))
        if self.argument("images") == "memorized" and "images" in chosen and given["type"] != "memorized":
            raise ValueError(f"--images: got some, of which {self.name} learns with --type memorized alone")
        return {**of_type, **{str(self.argument(name)): value for name, value in chosen.items()}}

    def accepted(self, **settings: Any) -> dict[str, Any]:
        """Those of the command's own settings that concern the method."""
        return {name: value for name, value in settings.items() if name in self._defaults}

    def flags(self, given: Iterable[str]) -> dict[str, str]:
        """What its arguments are called by the command, of these options."""
        return {argument: _flag(name) for name in given if (argument := self.argument(name)) is not None}

    def trains_weights(self, arguments: Mapping[str, Any]) -> bool:
        """Whether whole weights change, and not a LoRA beside them."""
        return self.trains and self.name not in LOW_RANK and "rank" not in arguments

    def __call__(self, model: DiffusionModel, concepts: tuple[str, ...], arguments: dict[str, Any]) -> Edit:
        """The edit."""
        import torch

        images = self.argument("images")
        if images in arguments:
            found: list[Any] = _pictures(arguments[images], arguments.get("masks", ()))
            if images == "memorized":  # a picture a concept, not a folder
                found = [[file for files in found[0] for file in files]]
            arguments = arguments | dict(zip((images, "masks"), found, strict=False))
        if "sample_dtype" in arguments:
            arguments = arguments | {"sample_dtype": getattr(torch, arguments["sample_dtype"])}
        if self.name == "time":
            concepts = tuple(_TIME_PROMPT.format(each) if each.strip() else each for each in concepts)
            guides = arguments["destinations"]
            several = tuple(map(_TIME_PROMPT.format, [guides] if isinstance(guides, str) else guides))
            arguments = arguments | {"destinations": several[0] if isinstance(guides, str) else several}
        return self._function(model, concepts, **arguments)


def _flag(option: str) -> str:
    return f"--{option.replace('_', '-')}"


def _pictures(images: Sequence[Path], masks: Sequence[Path]) -> list[list[list[Path]]]:
    """The files of each folder of pictures, and of masks if there are any."""
    from pumice.jobs import folders

    listed = [folders.right_in(folder, "--images") for folder in images]
    found = [[[root / name for name in names] for root, names in listed]]
    if masks:
        if len(masks) != len(images):
            raise ValueError(f"--masks: got {len(masks)}, expected one for each of {len(images)} --images")
        found.append([])
        for folder, (_, names) in zip(masks, listed, strict=True):
            root, files = folders.right_in(folder, "--masks")
            of = {Path(file).stem: root / file for file in files}
            stems = [Path(name).stem for name in names]
            if sorted(of) != sorted(stems):
                expected = f"one for each of {', '.join(names)}, named as it"
                raise ValueError(f"--masks: got {', '.join(files)}, expected {expected}")
            found[1].append([of[stem] for stem in stems])
    return found
