import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPProcessor

try:
    from transformers import CLIPImageProcessorPil as CLIPImageProcessor
except ImportError:  # newer transformers need no other one
    from transformers import CLIPImageProcessor

from pumice import testbed
from pumice.evaluate.clip import clip_agreement
from pumice.testbed import world


@pytest.fixture(scope="module")
def small():
    return testbed.load_clip()


@pytest.fixture(scope="module")
def shown():
    items = [world.training_picture(10**8 + i) for i in range(12)]
    return (
        torch.from_numpy(np.stack([picture for _, picture, _ in items])),
        [world.full_caption(scene) for *_, scene in items],
    )


def test_captions_agree_with_their_pictures_better_than_with_others(small, shown):
    images, captions = shown
    agreement = clip_agreement(*small)
    own = agreement(images, captions)
    assert own.shape == (12,) and own.dtype == torch.float32 and own.abs().max() <= 1
    assert (own > agreement(images, captions[1:] + captions[:1])).float().mean() > 0.9


def test_it_is_the_cosine_that_the_model_gives(small, shown):
    clip, tokenizer = small
    images, captions = shown
    ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        found = clip(input_ids=ids, pixel_values=images * 2 - 1)
    expected = found.logits_per_image.diagonal() / clip.logit_scale.exp()
    torch.testing.assert_close(
        clip_agreement(clip, tokenizer)(images, captions), expected, rtol=1e-4, atol=1e-5
    )


def test_batches_change_nothing(small, shown):
    one = clip_agreement(*small, batch_size=1)(*shown)
    for batch_size in (5, 12):
        torch.testing.assert_close(clip_agreement(*small, batch_size=batch_size)(*shown), one)


@pytest.mark.parametrize("size", [(80, 80), (200, 131)])
def test_a_processor_prepares_the_pictures_as_transformers_would(small, size):
    _, tokenizer = small
    torch.manual_seed(0)
    part = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = part | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(
        text_config=text, vision_config=part | {"image_size": 48, "patch_size": 8}, projection_dim=8
    )
    model = CLIPModel(config).eval()
    processor = CLIPProcessor(
        CLIPImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}), tokenizer
    )
    rng = np.random.default_rng(0)
    pictures = [
        Image.fromarray(rng.integers(0, 256, (7, 5, 3), np.uint8)).resize(size[::-1]) for _ in range(3)
    ]
    prompts = ["a red ball", "snow", "a blue fish at the beach"]
    with torch.no_grad():
        found = model(**processor(text=prompts, images=pictures, padding=True, return_tensors="pt"))
    expected = torch.nn.functional.cosine_similarity(found.image_embeds, found.text_embeds)
    images = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) / 255 for p in pictures])
    torch.testing.assert_close(clip_agreement(model, processor)(images, prompts), expected, rtol=0, atol=5e-3)
    assert (clip_agreement(model, tokenizer)(images, prompts) - expected).abs().max() > 5e-3


def test_long_prompts_are_cut(small):
    found = clip_agreement(*small)(torch.rand(1, 3, 64, 64), ["a red ball at the beach " * 40])
    assert found.isfinite().all()


def test_the_model_is_left_as_it_was(small, shown):
    clip, tokenizer = testbed.load_clip()
    clip.train()
    torch.testing.assert_close(clip_agreement(clip, tokenizer)(*shown), clip_agreement(*small)(*shown))
    assert clip.training and all(p.requires_grad for p in clip.parameters())


@pytest.mark.parametrize(
    ("images", "prompts", "error", "message"),
    [
        (torch.rand(2, 3, 64, 64), ["a"], ValueError, "prompts: got 1, expected a list of 2"),
        (torch.rand(1, 3, 64, 64), "a", ValueError, "prompts: got 1, expected a list of 1"),
        (torch.rand(1, 3, 64, 64) * 255, ["a"], ValueError, "images: got .* expected values in"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), ["a"], TypeError, r"images: got torch.uint8"),
        (torch.rand(3, 64, 64), ["a"], ValueError, r"images: got shape \(3, 64, 64\)"),
    ],
)
def test_bad_input_is_one_line_that_names_the_argument(small, images, prompts, error, message):
    with pytest.raises(error, match=message) as caught:
        clip_agreement(*small)(images, prompts)
    assert "\n" not in str(caught.value)
