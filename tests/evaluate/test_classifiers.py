import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import ConvNextConfig, ConvNextForImageClassification, ViTConfig, ViTForImageClassification

from pumice import testbed
from pumice.evaluate import clip_classifier, image_classifier
from pumice.testbed import world

NAMES = ["ball", "Gas pump, petrol pump", "fish"]


def image_processor(name, **settings):
    """Some versions of transformers call those without torchvision by another name."""
    kind = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)
    return kind(**settings)


def vit(size=32):
    torch.manual_seed(0)
    part = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    names = dict(enumerate(NAMES))
    return ViTForImageClassification(ViTConfig(**part, image_size=size, patch_size=8, id2label=names)).eval()


def convnext():
    torch.manual_seed(0)
    names = dict(enumerate(NAMES))
    config = ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, id2label=names)
    return ConvNextForImageClassification(config).eval()


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (7, 5, 3), np.uint8)).resize((84, 70), resample=3)
        for _ in range(4)
    ]


@pytest.fixture(scope="module")
def images(pictures):
    return torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) / 255 for p in pictures])


def spread_apart(model):
    """Random networks hardly tell pictures apart: make the distances between their scores large."""
    with torch.no_grad():
        model.classifier.weight.mul_(100)
    return model


@pytest.mark.parametrize(
    ("build", "processor"),
    [
        (vit, image_processor("ViTImageProcessor", size={"height": 32, "width": 32})),
        (vit, image_processor("ViTImageProcessor", size={"height": 32, "width": 32}, do_normalize=False)),
        (
            vit,
            image_processor(
                "CLIPImageProcessor", size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}
            ),
        ),
        (convnext, image_processor("ConvNextImageProcessor", size={"shortest_edge": 56}, crop_pct=0.875)),
        (convnext, image_processor("ConvNextImageProcessor", size={"shortest_edge": 384})),
    ],
)
def test_pictures_are_prepared_as_transformers_would(build, processor, pictures, images):
    model, seen = build(), []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    found = image_classifier(model, processor)(images)
    expected = processor(pictures, return_tensors="pt")["pixel_values"]
    assert seen[0]["pixel_values"].shape == expected.shape
    # eight bits between the steps there, none here
    assert (seen[0]["pixel_values"] - expected).abs().mean() < 0.01
    assert len(found) == 4 and all(sorted(labels) == sorted(NAMES) for labels in found)


def test_labels_are_ranked_by_the_logits(images):
    model = spread_apart(vit())
    processor = image_processor("ViTImageProcessor", size={"height": 32, "width": 32})
    logits = []
    model.register_forward_hook(lambda *args: logits.append(args[-1].logits))
    found = image_classifier(model, processor)(images)
    for labels, row in zip(found, logits[0].tolist(), strict=True):
        assert labels == [name for _, name in sorted(zip(row, NAMES, strict=True), reverse=True)]
    for batch_size in (1, 3):
        assert image_classifier(model, processor, batch_size=batch_size)(images) == found


@pytest.fixture(scope="module")
def shown():
    items = [world.training_picture(10**8 + i) for i in range(48)]
    return torch.from_numpy(np.stack([picture for _, picture, _ in items])), [s.object for *_, s in items]


def test_clip_names_what_the_testbeds_pictures_show(shown):
    images, objects = shown
    clip = testbed.load_clip()
    found = clip_classifier(*clip, list(world.OBJECTS))(images)
    hits = [labels[0] == name for labels, name in zip(found, objects, strict=True)]
    assert np.mean(hits) > 0.5, "one in ten by chance"
    assert all(sorted(labels) == sorted(world.OBJECTS) for labels in found)
    assert clip_classifier(*clip, list(world.OBJECTS), batch_size=7)(images) == found


def test_the_template_is_what_clip_is_asked(shown):
    clip, tokenizer = testbed.load_clip()
    styles, seen = ["varga", "okoro"], []
    clip.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    clip_classifier(clip, tokenizer, styles, template="in the style of {}")(shown[0][:2])
    ids = tokenizer(["in the style of varga", "in the style of okoro"], padding=True).input_ids
    assert seen[0]["input_ids"].tolist() == ids


def test_the_model_is_left_as_it_was(images):
    model = vit().train()
    processor = image_processor("ViTImageProcessor", size={"height": 32, "width": 32})
    image_classifier(model, processor)(images)
    assert model.training and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("labels", "settings", "error", "message"),
    [
        ([], {}, ValueError, "labels: got none, expected two or more"),
        ("ball", {}, ValueError, "labels: got 'ball', expected two or more"),
        (["ball", "Ball"], {}, ValueError, "labels: got 'ball', 'Ball', expected two or more, each once"),
        (["ball", " "], {}, ValueError, "labels: got a blank one"),
        (["ball", 3], {}, TypeError, "labels: expected a list of strings"),
        (["ball", "box"], {"template": "a photo"}, ValueError, "template: got 'a photo', expected one {}"),
        (["ball", "box"], {"batch_size": 0}, ValueError, "batch_size: got 0, expected at least 1"),
    ],
)
def test_bad_labels_are_one_line_that_names_the_argument(labels, settings, error, message):
    with pytest.raises(error, match=message) as caught:
        clip_classifier(*testbed.load_clip(), labels, **settings)
    assert "\n" not in str(caught.value)


def test_bad_pictures_and_processors(images):
    processor = image_processor("ViTImageProcessor", size={"height": 32, "width": 32})
    with pytest.raises(ValueError, match="images: got"):
        image_classifier(vit(), processor)(images * 255)
    with pytest.raises(ValueError, match=r"processor: ViTImageProcessor.* expected pixels"):
        image_classifier(vit(), image_processor("ViTImageProcessor", do_resize=False))
