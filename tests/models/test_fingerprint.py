"""A fingerprint belongs to the weights and to nothing else."""

import hashlib

import torch

from pumice import models
from pumice.models import fingerprint
from pumice.testbed import tiny_pipeline


def test_sees_every_edit():
    pipe = tiny_pipeline("sd1")
    model = models.load(pipe)
    seen = {fingerprint(model)}
    layer = next(iter(model.cross_attention.values()))
    for weight in (layer.to_k.weight, pipe.text_encoder.get_input_embeddings().weight):
        with torch.no_grad():
            weight[0, 0] += 1
        assert fingerprint(model) not in seen
        seen.add(fingerprint(model))
    assert fingerprint(models.load(tiny_pipeline("sd1"))) in seen


def test_is_the_sha256_of_names_shapes_dtypes_and_bytes():
    model = models.load(tiny_pipeline("sd1").to(torch.bfloat16))
    digest = hashlib.sha256()
    for part in (model.unet, *model.text_encoders):
        for name, weight in part.state_dict().items():
            bits = weight.flatten().view(torch.int16 if weight.dtype == torch.bfloat16 else weight.dtype)
            digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode() + bits.numpy().tobytes())
    assert fingerprint(model) == digest.hexdigest()


def test_another_scheduler_and_memory_layout_change_nothing():
    pipe = tiny_pipeline("sd1")
    before = fingerprint(models.load(pipe))
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.scheduler = tiny_pipeline("sd2").scheduler
    assert fingerprint(models.load(pipe)) == before


def test_a_compiled_denoiser_has_the_same_weights():
    pipe = tiny_pipeline("sd1")
    before = fingerprint(models.load(pipe))
    pipe.unet = torch.compile(pipe.unet)
    assert fingerprint(models.load(pipe)) == before
