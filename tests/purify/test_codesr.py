from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from pumice import purify, testbed
from pumice.models import UnsupportedModelError
from purify.test_noisy_upscaling import calls, tiny_upscaler

FEW: dict[str, Any] = {"num_inference_steps": 2}


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_upscaler()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))


def test_it_is_the_pipeline_on_pillows_small_picture(pipe: Any, images: Tensor) -> None:
    picture = Image.fromarray((images[0] * 255).byte().permute(1, 2, 0).numpy())
    small = np.asarray(picture.resize((12, 8), Image.Resampling.BICUBIC), np.float32) / 255
    expected = pipe(
        prompt=["A photo of a cat"],
        image=torch.from_numpy(small).permute(2, 0, 1)[None],
        generator=[torch.Generator().manual_seed(5)],
        output_type="pt",
        num_inference_steps=2,
    ).images
    found = purify.codesr(picture, pipe, "cat", seed=5, **FEW)
    assert found.size == (48, 32)
    # Pillow's small picture has 8 bits, and so has the result
    difference = np.asarray(found, np.float32) / 255 - expected[0].permute(1, 2, 0).numpy()
    assert np.abs(difference).max() < 0.02 and np.abs(difference).mean() < 0.003


def test_prompts(pipe: Any, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    persons = purify.codesr(images, pipe, **FEW)
    assert torch.equal(persons, purify.codesr(images, pipe, prompt="A photo of a person", **FEW))
    cats = purify.codesr(images, pipe, "cat", **FEW)
    mixed = purify.codesr(images, pipe, prompt=["A photo of a cat", "A photo of a person"], **FEW)
    torch.testing.assert_close(mixed[0], cats[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(mixed[1], persons[1], rtol=0, atol=1e-5)
    assert not torch.allclose(cats, persons, atol=1e-3)
    rows = calls(pipe, monkeypatch)
    purify.codesr(images, pipe, negative_prompt="A photo of a person", **FEW)
    assert rows == [2, 2]


def test_a_picture_is_the_same_alone_and_again(pipe: Any, images: Tensor) -> None:
    together = purify.codesr(images, pipe, seed=[8, 3], **FEW)
    assert torch.equal(together, purify.codesr(images, pipe, seed=[8, 3], **FEW))
    alone = purify.codesr(images[1:], pipe, seed=3, **FEW)
    torch.testing.assert_close(alone[0], together[1], rtol=0, atol=1e-5)


def test_sizes_that_are_no_multiples_of_four(pipe: Any) -> None:
    image = torch.rand(1, 3, 21, 30, generator=torch.Generator().manual_seed(1))
    found = purify.codesr(image, pipe, **FEW)
    whole = torch.cat((image, image[:, :, -3:].flip(2)), dim=2)
    whole = torch.cat((whole, whole[..., -2:].flip(3)), dim=3)
    assert found.shape == image.shape
    torch.testing.assert_close(found, purify.codesr(whole, pipe, **FEW)[..., :21, :30], rtol=0, atol=1e-5)
    # restored at twice the size, it is the same picture that is made small
    twice = purify.codesr(
        image, pipe, restorer=lambda x: x.repeat_interleave(2, 2).repeat_interleave(2, 3), **FEW
    )
    assert twice.shape == image.shape
    assert (twice - found).abs().mean() < 0.02


def test_a_restorer_is_what_reaches_the_upscaler(pipe: Any, images: Tensor) -> None:
    seen: list[tuple[int, ...]] = []

    def grey(pictures: Tensor) -> Tensor:
        seen.append(tuple(pictures.shape))
        assert not torch.is_grad_enabled()
        return torch.full_like(pictures, 0.5)

    found = purify.codesr(images, pipe, restorer=grey, **FEW)
    assert seen == [(2, 3, 32, 48)]
    expected = purify.codesr(torch.full_like(images, 0.5), pipe, **FEW)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


class Mixing(nn.Module):
    """Of two inputs, and with more than the picture to say, as CodeFormer."""

    def forward(self, x: Tensor, w: float) -> tuple[Tensor, Tensor]:
        return x * w, x


class Grey(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0 * x + 0.5


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # TorchScript is, but files of it are there
def test_a_restorer_in_a_file(pipe: Any, images: Tensor, tmp_path: Path) -> None:
    torch.jit.script(Mixing()).save(str(tmp_path / "mixing.pt"))
    torch.jit.script(Grey()).save(str(tmp_path / "grey.pt"))
    for fidelity, w in ((None, 0.5), (0.25, 0.25)):
        found = purify.codesr(images, pipe, restorer=tmp_path / "mixing.pt", fidelity=fidelity, **FEW)
        torch.testing.assert_close(found, purify.codesr(images * w, pipe, **FEW), rtol=0, atol=1e-5)
    traced = torch.jit.trace(Mixing(), (images, torch.tensor(1.0)))  # its w is a tensor
    traced.save(str(tmp_path / "traced.pt"))
    found = purify.codesr(images, pipe, restorer=str(tmp_path / "traced.pt"), fidelity=1, **FEW)
    torch.testing.assert_close(found, purify.codesr(images, pipe, **FEW), rtol=0, atol=1e-5)
    found = purify.codesr(images, pipe, restorer=tmp_path / "grey.pt", **FEW)
    torch.testing.assert_close(found, purify.codesr(0 * images + 0.5, pipe, **FEW), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="has one input only"):
        purify.codesr(images, pipe, restorer=tmp_path / "grey.pt", fidelity=0.5, **FEW)


@pytest.mark.parametrize(
    ("restorer", "said"),
    [
        (lambda x: None, "it returned NoneType"),
        (lambda x: (x * 255).byte(), r"it returned torch\.uint8"),
        (lambda x: x[..., :8], "expected the same shape or twice its sides"),
        (lambda x: x.repeat(1, 1, 3, 3), "expected the same shape or twice its sides"),
        (lambda x: x[:1], "expected the same shape"),
        (lambda x: x * 255, "values far from"),
        (lambda x: x * 2 - 1, "values far from"),
        (lambda x: x * torch.nan, "values far from"),
        (5, "restorer: got a int"),
        ("missing.pt", "'missing.pt' is not a file"),
        (__file__, "is not a TorchScript file"),
    ],
    ids=[
        "none",
        "bytes",
        "cut",
        "threefold",
        "fewer",
        "of 255",
        "of -1 to 1",
        "NaN",
        "number",
        "missing",
        "text",
    ],
)
def test_restorers_that_return_no_pictures(pipe: Any, images: Tensor, restorer: Any, said: str) -> None:
    with pytest.raises((ValueError, TypeError), match=said) as found:
        purify.codesr(images, pipe, restorer=restorer, **FEW)
    assert str(found.value).startswith("restorer") and "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"class_name": None}, "class_name: got a NoneType"),
        ({"fidelity": 0.5}, "fidelity: got 0.5"),
        ({"fidelity": 2}, "fidelity: got 2"),
        ({"noise_level": 1000}, "noise_level: got 1000"),
        ({"prompt": ["a cat"]}, "prompt: got 1"),
    ],
)
def test_bad_settings(pipe: Any, images: Tensor, settings: dict[str, Any], said: str) -> None:
    with pytest.raises((ValueError, TypeError), match=said):
        purify.codesr(images, pipe, **settings)


def test_other_models_are_refused(images: Tensor) -> None:
    class Other:
        components: dict[str, Any] = {}  # noqa: RUF012

    with pytest.raises(UnsupportedModelError, match="upscaler: got a Other"):
        purify.codesr(images, Other())


def test_the_trained_one_cleans_pictures() -> None:
    trial = testbed.subject_trial(0)
    clean = trial.pictures[:3].float()
    signs = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)).sign()
    protected = (clean + 8 / 255 * signs).clamp(0, 1)
    settings: dict[str, Any] = {"prompt": "a photo of a creature", "guidance_scale": 1}
    purified = purify.codesr(protected, testbed.load_upscaler(), num_inference_steps=20, **settings)
    assert trial.quality(protected).mean() < 0.25
    assert trial.quality(purified).mean() > 0.4
    # not another creature: colours and large shapes stay
    assert (purified - clean).square().mean() < 0.5 * (purified - clean.roll(1, 0)).square().mean()
