"""The tokenizer, and the small CLIP: a judge, and where the pipeline's text encoder starts from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from pumice.testbed import world
from pumice.testbed.training.loop import train

CONTEXT = 32
VOCABULARY = 1200
CAPTIONS = 20_000  # the tokenizer is trained on
WIDTH = 128
BATCH = 96
ALIKE = 8


def tokenizer_of(work: Path) -> CLIPTokenizer:
    """The tokenizer of a training, made by its first part.

    Kept in a file: the trainer breaks ties between equally frequent pairs in another way each time.
    """
    path = work / "tokenizer"
    if not path.exists():
        _train_tokenizer().save_pretrained(path)
    return CLIPTokenizer.from_pretrained(path, local_files_only=True)


def _train_tokenizer() -> CLIPTokenizer:
    """Byte-level BPE of CLIP's form, trained on captions in seconds."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.ByteLevel(False, use_regex=False),
        ]
    )
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=letters,
        end_of_word_suffix="</w>",
        min_frequency=20,
        show_progress=False,
    )
    texts = [world.training_caption(index) for index in range(CAPTIONS)]
    bpe.train_from_iterator(texts, trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    joined = ["".join(pair) for pair in merges]
    vocab = [
        *letters,
        *(letter + "</w>" for letter in letters),
        *dict.fromkeys(joined),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(vocab)},
        merges=merges,
        model_max_length=CONTEXT,
    )


def text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=WIDTH,
        max_position_embeddings=CONTEXT,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    vision = CLIPVisionConfig(
        image_size=world.SIZE,
        patch_size=8,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=WIDTH,
    )
    return CLIPModel(
        CLIPConfig(
            text_config=text_config(tokenizer).to_dict(), vision_config=vision.to_dict(), projection_dim=WIDTH
        )
    )


def token_ids(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids


def _batch(step: int) -> tuple[list[str], Tensor]:
    """Captioned pictures in [-1, 1] of different scenes: two of one scene would be wrong negatives.

    In groups of `ALIKE` that differ in the object alone: shapes are what is hard to tell.
    """
    rng = np.random.default_rng((21, step))
    scenes: dict[world.Scene, None] = {}
    while len(scenes) < BATCH:
        scene = world.random_scene(rng)
        objects = rng.permutation(list(world.OBJECTS))[:ALIKE]
        scenes |= dict.fromkeys(replace(scene, object=str(name)) for name in objects)
    order = list(scenes)[:BATCH]
    texts = [
        world.full_caption(scene) if rng.random() < 0.7 else world.caption(scene, rng) for scene in order
    ]
    return texts, torch.from_numpy(np.stack([world.draw(scene, rng) for scene in order])) * 2 - 1


def fit(work: Path, *, steps: int, minutes: float, device: str) -> bool:
    torch.manual_seed(1)
    tokenizer = tokenizer_of(work)
    clip = build_clip(tokenizer).to(device)

    def loss(step: int) -> Tensor:
        texts, images = _batch(step)
        noise = torch.Generator().manual_seed(step)
        images = images + 0.05 * torch.randn(images.shape, generator=noise)
        with torch.autocast(device, torch.bfloat16):
            result = clip(
                input_ids=token_ids(tokenizer, texts).to(device),
                pixel_values=images.to(device),
                return_loss=True,
            )
        return result.loss.float()

    return train("clip", {"clip": clip}, loss, work=work, steps=steps, minutes=minutes, lr=1e-3)
