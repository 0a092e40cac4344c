import json
import math

import pytest
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

from pumice.evaluate import visibility


def pictures(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def noisy(images, amount, seed=1):
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return (images + amount * noise).clamp(0, 1)


def test_psnr_and_the_largest_change_of_known_changes():
    originals = torch.full((3, 3, 16, 20), 0.5)
    change = torch.zeros(3, 3, 16, 20)
    change[0] = 0.1
    change[1] = -8 / 255
    change[2, 0, 0, 0] = 0.4
    found = visibility(originals + change, originals)
    expected = [20, -20 * math.log10(8 / 255), -10 * math.log10(0.16 / (3 * 16 * 20))]
    assert found.psnr.tolist() == pytest.approx(expected, abs=1e-4)
    assert found.max_change.tolist() == pytest.approx([25.5, 8, 102], abs=1e-4)
    assert found.lpips is None


def test_darker_and_lighter_are_the_same_distance():
    """Subtracting bytes would wrap around."""
    originals = pictures(2, 3, 16, 16) * 0.5 + 0.25
    lighter, darker = (visibility(originals + sign * 4 / 255, originals) for sign in (1, -1))
    torch.testing.assert_close(lighter.psnr, darker.psnr)
    torch.testing.assert_close(lighter.psnr, torch.full((2,), -20 * math.log10(4 / 255)).double())


def test_the_same_pictures():
    images = pictures(2, 3, 16, 16)
    found = visibility(images, images)
    assert found.psnr.tolist() == [math.inf] * 2 and found.max_change.tolist() == [0, 0]
    torch.testing.assert_close(found.ssim, torch.ones(2).double(), rtol=0, atol=1e-12)
    assert found.mean()["psnr"] is None and found.to_dict()["psnr"] == [None, None]


def test_one_picture_that_is_the_same_leaves_the_psnr_of_the_set():
    originals = pictures(2, 3, 16, 16).double()
    images = originals.clone()
    images[1] = noisy(originals[1:], 0.1)[0]
    found = visibility(images, originals)
    assert found.psnr[0] == math.inf
    pooled = -10 * float((images - originals).square().mean().log10())
    assert found.mean()["psnr"] == pytest.approx(pooled) and pooled > float(found.psnr[1])


@pytest.mark.parametrize("size", [(12, 11), (37, 50), (64, 64)])
@pytest.mark.parametrize("amount", [0.01, 0.3])
def test_ssim_is_that_of_torchmetrics(size, amount):
    originals = pictures(3, 3, *size).double()
    images = noisy(originals, amount)
    _, everywhere = structural_similarity_index_measure(
        images, originals, data_range=1.0, sigma=1.5, reduction="none", return_full_image=True
    )
    expected = everywhere[..., 5:-5, 5:-5].mean((1, 2, 3))  # without the windows on mirrored borders
    torch.testing.assert_close(visibility(images, originals).ssim, expected, rtol=0, atol=1e-9)


def test_ssim_of_one_window_is_the_formula():
    originals = pictures(1, 3, 11, 11).double()
    images = noisy(originals, 0.1)
    offset = torch.arange(-5, 6).double()
    line = (-(offset**2) / (2 * 1.5**2)).exp()
    weight = torch.outer(line, line) / line.sum() ** 2
    colours = []
    for x, y in zip(images[0], originals[0], strict=True):
        mx, my = (weight * x).sum(), (weight * y).sum()
        vx, vy = (weight * (x - mx) ** 2).sum(), (weight * (y - my) ** 2).sum()
        cov = (weight * (x - mx) * (y - my)).sum()
        colours.append((2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)))
    torch.testing.assert_close(visibility(images, originals).ssim[0], torch.stack(colours).mean())


def test_a_picture_is_measured_as_if_alone_and_half_precision_as_float():
    originals = pictures(3, 3, 24, 16).half()
    images = noisy(originals.float(), 0.05).half()
    found = visibility(images, originals)
    floats = visibility(images.float(), originals.float())
    for place in range(3):
        alone = visibility(images[place : place + 1], originals[place : place + 1])
        for name in ("psnr", "ssim", "max_change"):
            assert getattr(alone, name)[0] == getattr(found, name)[place]
            assert getattr(floats, name)[place] == getattr(found, name)[place]


def test_a_perceptual_distance_is_taken_of_the_right_pictures():
    originals, images = pictures(2, 3, 16, 16), pictures(2, 3, 16, 16, seed=1)
    found = visibility(images, originals, lpips=lambda a, b: a.mean((1, 2, 3)) - b[:, 0, 0, 0])
    torch.testing.assert_close(found.lpips, (images.mean((1, 2, 3)) - originals[:, 0, 0, 0]).double())
    assert found.mean()["lpips"] == pytest.approx(float(found.lpips.mean()))


def test_results_are_plain_data():
    originals = pictures(2, 3, 16, 16)
    images = noisy(originals, 0.1)
    images[1] = originals[1]
    found = json.loads(json.dumps(visibility(images, originals).to_dict(), allow_nan=False))
    assert found["psnr"][1] is None and found["max_change"][1] == 0
    assert found["mean"]["max_change"] == max(found["max_change"])
    assert found["mean"]["ssim"] == pytest.approx(sum(found["ssim"]) / 2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": torch.zeros(1, 3, 16, 16, dtype=torch.uint8)}, TypeError, "images: got torch.uint8"),
        ({"originals": "a.png"}, TypeError, "originals: got str"),
        ({"images": torch.zeros(3, 16, 16)}, ValueError, r"images: got shape \(3, 16, 16\)"),
        ({"images": torch.full((1, 3, 16, 16), 2.0)}, ValueError, "images: got 2 to 2"),
        (
            {"images": torch.zeros(2, 3, 16, 16)},
            ValueError,
            r"images, originals: got shapes \(2, 3, 16, 16\)",
        ),
        ({"lpips": lambda a, b: torch.zeros(2)}, ValueError, r"lpips: returned shape \(2,\)"),
        ({"lpips": lambda a, b: torch.tensor([torch.nan])}, ValueError, "lpips: returned"),
    ],
)
def test_bad_input_is_one_line_that_names_the_argument(change, error, message):
    good = {"images": torch.zeros(1, 3, 16, 16), "originals": torch.zeros(1, 3, 16, 16)}
    with pytest.raises(error, match=message) as caught:
        visibility(**(good | change))
    assert "\n" not in str(caught.value)


def test_pictures_smaller_than_a_window_are_refused():
    with pytest.raises(ValueError, match="sides of 11 or more"):
        visibility(torch.zeros(1, 3, 10, 64), torch.zeros(1, 3, 10, 64))
