import pytest
import torch

from pumice import erase, models, testbed


@pytest.fixture(scope="package")
def tiny():
    return testbed.tiny_pipeline("sd1")


@pytest.fixture(scope="package")
def edit(tiny):
    return erase.uce(tiny, "ball", tokens="all", guide="box")


@pytest.fixture(scope="package")
def pictures(tiny):
    model = models.load(tiny)
    side = model.latent_shape()[1] * model.vae_scale_factor
    return torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="package")
def text_edit(tiny):
    """An edit of a text encoder alone, which has to be attacked through that text encoder."""
    model = models.load(tiny)
    name = "text_model.encoder.layers.0.mlp.fc1.weight"
    name = name if name in dict(tiny.text_encoder.named_parameters()) else name.removeprefix("text_model.")
    shape = tiny.text_encoder.get_parameter(name).shape
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    changes = {f"text_encoder.{name}": models.Shifted(delta)}
    return models.Edit.made(model, changes, method="text", targets=())
