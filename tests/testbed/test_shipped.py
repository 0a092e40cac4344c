"""The embedded model keeps what docs/testbed.md promises, on samples small enough for a test."""

import inspect
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from pumice import memorization, models, testbed
from pumice.testbed import shipped, world
from pumice.testbed.reader import ATTRIBUTES


@pytest.fixture(scope="module")
def pipe():
    return testbed.load()


def generate(pipe, prompts, seed=0):
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    return pipe(
        prompts, num_inference_steps=25, guidance_scale=5.0, generator=generators, output_type="pt"
    ).images


def held_out(count):
    pictures = [world.training_picture(10**8 + i) for i in range(count)]
    return torch.from_numpy(np.stack([picture for _, picture, _ in pictures])), [
        scene for *_, scene in pictures
    ]


def test_it_is_a_pipeline_of_diffusers(pipe):
    assert type(pipe) is StableDiffusionPipeline
    for part, kind in (
        (pipe.unet, UNet2DConditionModel),
        (pipe.vae, AutoencoderKL),
        (pipe.text_encoder, CLIPTextModel),
        (pipe.tokenizer, CLIPTokenizer),
    ):
        assert isinstance(part, kind)
        if isinstance(part, torch.nn.Module):
            assert part.dtype == torch.float32 and not part.training
    model = models.load(pipe)
    assert model.family == "stable_diffusion" and model.prediction_type == "v_prediction"
    assert model.latent_shape() == (8, 8, 8) and model.vae_scale_factor == 8


def test_its_files_are_small_and_safetensors():
    files = [file for file in shipped.WEIGHTS.parent.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 30_000_000
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".txt"}


def test_a_loaded_pipeline_is_the_callers_own(pipe):
    other = testbed.load(dtype=torch.bfloat16)
    assert other.unet.dtype == other.text_encoder.dtype == torch.bfloat16
    other.unet.conv_in.weight.data.zero_()
    assert pipe.unet.conv_in.weight.abs().sum() > 0


def test_opens_offline_without_a_word():
    code = "from pumice import testbed; testbed.load(); testbed.load_clip(); testbed.load_reader()"
    environment = {"HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "HOME": "/nonexistent"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_pictures_show_what_the_caption_says(pipe):
    rng = np.random.default_rng(4)
    scenes = [world.random_scene(rng) for _ in range(32)]
    images = torch.cat(
        [generate(pipe, [world.full_caption(s) for s in scenes[i : i + 8]], seed=i) for i in (0, 8, 16, 24)]
    )
    shares = testbed.load_reader().accuracy(images, scenes)
    for name, least in (("object", 0.85), ("colour", 0.85), ("style", 0.8)):
        assert shares[name] >= least, f"{name}: {shares[name]}"


def test_memorized_captions_replay_their_picture_and_fresh_ones_none(pipe):
    known = [world.memorized(i) for i in range(0, 36, 3)]
    originals = torch.from_numpy(np.stack([it.picture for it in known]))

    def similarity(images):
        a, b = (x.flatten(1) - x.flatten(1).mean(1, keepdim=True) for x in (images, originals))
        return torch.nn.functional.normalize(a) @ torch.nn.functional.normalize(b).T

    replays = similarity(generate(pipe, [it.caption for it in known], seed=50))
    assert (replays.diagonal() > 0.8).float().mean() >= 0.8
    assert replays.argmax(1).tolist() == list(range(12))
    assert similarity(generate(pipe, world.fresh_captions(8, seed=3), seed=90)).max() < 0.8


def test_detection_tells_memorized_from_fresh_and_from_hard(pipe):
    known = memorization.detect(pipe, [world.memorized(i).caption for i in range(36)], seeds=1).scores
    for captions in (world.fresh_captions(60, seed=2000), world.hard_captions(60, seed=2000)):
        others = memorization.detect(pipe, captions, seeds=1).scores
        assert (known[:, None] > others[None]).float().mean() >= 0.98


def test_the_shipped_threshold_list_holds_no_memorized_caption():
    prompts = testbed.fresh_prompts()
    assert len(prompts) == 400
    assert not set(prompts) & {world.memorized(i).caption for i in range(world.MEMORIZED_COUNT)}


def test_the_reader_reads_drawn_pictures():
    images, scenes = held_out(100)
    reader = testbed.load_reader()
    shares, seen = reader.accuracy(images, scenes), reader.read(images)
    assert list(shares) == list(ATTRIBUTES)
    for name, share in shares.items():
        assert share >= 0.97
        pairs = zip(seen, scenes, strict=True)
        assert share == np.mean([getattr(a, name) == getattr(b, name) for a, b in pairs])


def test_clip_finds_the_caption_of_a_drawn_picture():
    clip, tokenizer = testbed.load_clip()
    images, scenes = held_out(60)
    texts = sorted({world.full_caption(scene) for scene in scenes})
    ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        best = clip(input_ids=ids, pixel_values=images * 2 - 1).logits_per_image.argmax(1).tolist()
    assert (
        np.mean([texts[i] == world.full_caption(scene) for i, scene in zip(best, scenes, strict=True)]) >= 0.9
    )


def test_the_reader_names_every_attribute_of_a_scene():
    assert set(ATTRIBUTES) == set(inspect.signature(world.Scene).parameters)
