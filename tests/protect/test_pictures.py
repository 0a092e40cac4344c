"""Pictures of any kind and size are perturbed and come back as they came."""

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.ExifTags import Base

from pumice import models, protect, testbed
from pumice.io import Picture, save_lossless
from pumice.protect.fitting import Resized, Tiles, fit
from pumice.protect.pictures import Pictures

SIZES = ("resize", "tiles", "native")


@pytest.fixture(scope="module")
def pipe():
    return testbed.load()


@pytest.fixture(scope="module")
def model(pipe):
    return models.load(pipe)


def photo(height, width, seed=0):
    """Soft blobs, (3, height, width) uint8."""
    blobs = torch.rand(1, 3, height // 10 + 2, width // 10 + 2, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(blobs, (height, width), mode="bicubic")[0].clamp(0, 1)
    return (smooth * 255).round().byte()


def pil(pixels):
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def levels(image):
    """(3, H, W) int of a PIL image, without its alpha."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).int()


def noised(pictures, eps, seed=0):
    """The working pictures at the very edge of the budget."""
    generator = torch.Generator().manual_seed(seed)
    signs = [torch.rand(each.shape, generator=generator).sub(0.5).sign() for each in pictures.working]
    rows = zip(pictures.working, signs, pictures.masks, strict=True)
    return [(each + eps * sign * mask).clamp(0, 1) for each, sign, mask in rows]


def stub(size, factor=8, blocks=4):
    """What `fit` asks of a model."""
    return SimpleNamespace(
        vae_scale_factor=factor,
        latent_shape=lambda: (4, size // factor, size // factor),
        unet=SimpleNamespace(config=SimpleNamespace(block_out_channels=(1,) * blocks)),
    )


@pytest.mark.parametrize(
    ("model", "given", "working"),
    [
        (stub(512), (600, 600), (512, 512)),
        (stub(512), (1080, 1920), (512, 896)),  # 910 / 64 = 14.2
        (stub(512), (4000, 3000), (704, 512)),  # 683 / 64 = 10.7
        (stub(512), (100, 500), (512, 2560)),
        (stub(768), (1000, 1500), (768, 1152)),
        (stub(1024, blocks=3), (1000, 1500), (1024, 1536)),
        (stub(1024, blocks=3), (1000, 1040), (1024, 1056)),  # XL halves its latents twice: multiples of 32
        (stub(512), (16, 17), (512, 512)),
    ],
)
def test_what_resized_pictures_become(model, given, working):
    assert fit(*given, [model], "resize") == Resized(given, working)


def test_the_first_model_has_the_say_and_all_can_take_it():
    several = [stub(512), stub(1024, factor=16)]
    assert fit(600, 900, several, "resize") == Resized((600, 900), (512, 768))
    assert fit(600, 900, several, "native") == Tiles((600, 900), (608, 912))
    assert fit(600, 100, several, "tiles") == Tiles((600, 100), (512, 112))


@pytest.mark.parametrize("given", [(64, 64), (150, 200), (65, 64), (64, 321), (1, 200), (30, 40), (500, 73)])
def test_tiles_are_a_partition_of_unity(given):
    tiles = fit(*given, [stub(64)], "tiles")
    picture = torch.rand(3, *given, generator=torch.Generator().manual_seed(0))
    parts = tiles.parts(picture)
    assert {part.shape[1:] for part in parts} == {tiles.tile} and max(tiles.tile) <= 64
    ones = tiles.whole([torch.ones_like(part) for part in parts])
    assert float((ones - 1).abs().max()) <= 1e-6
    assert float((tiles.whole(parts) - picture).abs().max()) <= 1e-6
    signs = [part.sub(0.5).sign() for part in parts]
    assert float(tiles.whole(signs).abs().max()) <= 1 + 1e-6


def test_tiles_overlap_and_lie_inside():
    for length in range(1, 400):
        tiles = fit(length, 64, [stub(64)], "tiles")
        rows = tiles.parts(torch.arange(length).float().expand(3, 64, -1).mT / 400)
        first = [round(float(part[0, 0, 0]) * 400) for part in rows]
        assert first[0] == 0 and all(0 < b - a <= 56 for a, b in pairwise(first))
        assert first[-1] == max(0, length - 64)
        assert len(first) == max(1, 1 + -(-(length - 64) // 56))


@pytest.mark.parametrize(("given", "working"), [((5, 3), (8, 8)), ((1, 9), (8, 16)), ((16, 8), (16, 8))])
def test_small_pictures_are_mirrored(given, working):
    picture = torch.rand(3, *given, generator=torch.Generator().manual_seed(0))
    native = fit(*given, [stub(64)], "native")
    (part,) = native.parts(picture)
    more = [(0, 0), (0, working[0] - given[0]), (0, working[1] - given[1])]
    reference = np.pad(picture.numpy(), more, "symmetric")
    assert np.array_equal(part.numpy(), reference)
    (mask,) = native.masks(torch.ones(1, *given))
    assert mask[:, : given[0], : given[1]].min() == 1 and int(mask.sum()) == given[0] * given[1]
    assert torch.equal(native.whole([part]), picture)


@pytest.mark.parametrize("given", [(150, 200), (30, 40), (16, 200), (64, 64)])
def test_a_resized_change_stays_in_the_ball(given):
    resized = fit(*given, [stub(64)], "resize")
    (part,) = resized.parts(torch.rand(3, *given, generator=torch.Generator().manual_seed(0)).round())
    assert part.shape[1:] == resized.working and part.min() >= 0 and part.max() <= 1
    signs = torch.randn(part.shape, generator=torch.Generator().manual_seed(1)).sign()
    assert float(resized.whole([signs]).abs().max()) <= 1 + 1e-6
    torch.testing.assert_close(resized.whole([torch.full(part.shape, 0.03)]), torch.full((3, *given), 0.03))


def test_pictures_of_the_models_own_size_are_not_resampled(model):
    pixels = photo(64, 64)
    (working,) = Pictures(pil(pixels), [model], size="resize").working
    assert torch.equal(working, pixels / 255)


@pytest.mark.parametrize("size", SIZES)
def test_without_a_change_nothing_changes(model, size):
    several = [photo(150, 200), photo(30, 41, seed=1)]
    pictures = Pictures([pil(each) for each in several], [model], size=size)
    for before, after in zip(several, pictures.finish(pictures.working, 8 / 255), strict=True):
        assert torch.equal(levels(after), before.int())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("eps", "most"), [(4 / 255, 4), (0.025, 6), (8 / 255, 8)])
def test_the_budget_holds_at_the_pictures_own_size(model, size, eps, most):
    several = [photo(150, 200), photo(30, 41, seed=1), photo(64, 64, seed=2)]
    pictures = Pictures([pil(each) for each in several], [model], size=size)
    for before, after in zip(several, pictures.finish(noised(pictures, eps), eps), strict=True):
        change = int((levels(after) - before.int()).abs().max())
        assert change <= most and change >= most - 2 * (size == "resize")


def test_a_constant_change_comes_through_tiles_exactly(model):
    pixels = photo(150, 200).clamp(20, 200)
    pictures = Pictures(pil(pixels), [model], size="tiles")
    found = pictures.finish([each + 5 / 255 for each in pictures.working], 8 / 255)
    assert torch.equal(levels(found), pixels.int() + 5)


def test_without_a_bound_changes_are_rounded(model):
    pixels = photo(64, 64).clamp(0, 200)
    pictures = Pictures(pil(pixels), [model], size="native")
    found = pictures.finish([each + 40.4 / 255 for each in pictures.working], None)
    assert torch.equal(levels(found), pixels.int() + 40)


def test_tiles_leave_no_seam(pipe):
    """Jumps at the borders of tiles are among those elsewhere; pieces side by side stand out."""
    pixels = photo(150, 200)

    def change(piece, size):
        found = protect.photoguard(pil(piece), pipe, eps=8 / 255, steps=8, random_start=False, size=size)
        return levels(found) - piece.int()

    def jumps(change):
        return change.diff(dim=2).abs().float().mean((0, 1))

    blended = jumps(change(pixels, "tiles"))
    begin, end = [45, 91, 136], [64, 109, 155]  # of tiles inside the picture
    border = torch.zeros(199, dtype=torch.bool)
    border[[column - 1 for column in begin + end]] = True
    elsewhere = blended[~border]
    assert abs(float(blended[border].mean() - elsewhere.mean())) < 2 * float(elsewhere.std())
    assert float(blended[border].max() / elsewhere.mean()) < 2

    pieces = [change(piece, "native") for piece in (pixels[..., :64], pixels[..., 64:])]
    cut = jumps(torch.cat(pieces, dim=2))
    assert float(cut[63] / cut.mean()) > 3


@pytest.mark.parametrize("size", SIZES)
def test_masked_pixels_are_bit_identical(pipe, size):
    pixels, mask = photo(90, 130), torch.zeros(90, 130, dtype=torch.bool)
    mask[20:60, 31:97] = True
    found = protect.photoguard(pil(pixels), pipe, eps=8 / 255, steps=1, size=size, mask=mask)
    change = (levels(found) - pixels.int()).abs().amax(0)
    assert not change[~mask].any() and (change[mask] > 0).float().mean() > 0.9


def test_masks_of_every_form(model):
    pixels, mask = photo(90, 130), photo(90, 130, seed=1)[0] > 128
    (reference,) = Pictures(pil(pixels), [model], size="native", mask=mask).masks
    assert torch.equal(reference[:, :90, :130], mask[None].float()) and int(reference.sum()) == int(
        mask.sum()
    )
    image = Image.fromarray(mask.numpy())
    for given in (mask[None], mask[None, None].double(), [mask.half()], image, image.convert("L"), [image]):
        (found,) = Pictures(pil(pixels), [model], size="native", mask=given).masks
        assert torch.equal(found, reference)


def test_masks_of_tensors(pipe):
    images = torch.stack([photo(64, 64), photo(64, 64, seed=1)]) / 255
    mask = torch.zeros(2, 1, 64, 64)
    mask[0, :, :32], mask[1, :, :, 40:] = 1, 1
    found = protect.photoguard(images, pipe, eps=8 / 255, steps=2, mask=mask)
    changed = (found != images).any(1, keepdim=True)
    assert not changed[mask == 0].any() and changed[mask == 1].float().mean() > 0.9
    assert float((found - images).abs().max()) <= 8 / 255 + 1e-7


def test_soft_masks_scale_the_change(model):
    pixels, ramp = photo(64, 64).clamp(40, 200), torch.linspace(0, 1, 64).expand(64, 64)
    for images in (pil(pixels), pixels[None] / 255):
        pictures = Pictures(images, [model], mask=ramp)
        found = pictures.finish([each + 30 / 255 for each in pictures.working], None)
        found = levels(found) if isinstance(found, Image.Image) else found[0] * 255
        torch.testing.assert_close((found - pixels).float(), (30 * ramp).expand(3, -1, -1), atol=0.51, rtol=0)


def test_a_file_comes_back_upright_with_all_that_was_said(pipe, tmp_path):
    tags = Image.Exif()
    tags[Base.Orientation], tags[Base.Copyright] = 6, "mine"
    pil(photo(80, 120)).save(
        tmp_path / "a.jpg", exif=tags, icc_profile=b"a profile", quality=95, dpi=(300, 300)
    )
    found = protect.photoguard(tmp_path / "a.jpg", pipe, eps=8 / 255, steps=1)
    assert isinstance(found, Image.Image) and found.size == (80, 120)
    save_lossless(found, tmp_path / "b.png")
    before, after = Picture.open(tmp_path / "a.jpg"), Picture.open(tmp_path / "b.png")
    assert after.icc == b"a profile" and after.exif == before.exif
    with Image.open(tmp_path / "b.png") as image:
        assert image.getexif()[Base.Orientation] == 1 and image.getexif()[Base.Copyright] == "mine"
    assert 0 < int((after.pixels.int() - before.pixels.int()).abs().max()) <= 8


def test_transparency_stays_and_hidden_colours_change(pipe):
    alpha = torch.zeros(1, 64, 64, dtype=torch.uint8)
    alpha[:, 32:] = 200
    given = pil(torch.cat([photo(64, 64), alpha]))
    found = protect.photoguard(given, pipe, eps=8 / 255, steps=1)
    assert found.mode == "RGBA" and np.array_equal(found.getchannel("A"), given.getchannel("A"))
    change = (levels(found) - levels(given)).abs().amax(0)
    assert (change[:32] > 0).float().mean() > 0.9 and int(change.max()) <= 8


@pytest.mark.parametrize("size", SIZES)
def test_a_picture_among_others_is_as_alone(pipe, tmp_path, size):
    pil(photo(70, 72)).save(tmp_path / "a.png")
    pil(photo(60, 71, seed=1)).convert("L").save(tmp_path / "b.png")
    given = [str(tmp_path / "a.png"), tmp_path / "b.png", pil(photo(64, 64, seed=2))]
    options = {"eps": 8 / 255, "steps": 2, "size": size}
    together = protect.advdm(given, pipe, seed=[5, 6, 7], **options)
    assert isinstance(together, list) and [each.size for each in together] == [(72, 70), (71, 60), (64, 64)]
    for image, alone, seed in zip(together, given, (5, 6, 7), strict=True):
        single = protect.advdm(alone, pipe, seed=seed, **options)
        assert (
            levels(single) != levels(image)
        ).float().mean() < 1e-3  # sums of other orders flip a sign or two
    assert isinstance(protect.advdm((given[0],), pipe, **options), list)


def test_a_panorama_and_a_line(pipe):
    for size in SIZES:
        found = protect.photoguard(pil(photo(40, 200)), pipe, eps=8 / 255, steps=1, size=size)
        assert found.size == (200, 40)
    line = photo(1, 200)
    for size in ("tiles", "native"):
        found = protect.photoguard(pil(line), pipe, eps=8 / 255, steps=1, size=size)
        assert 0 < int((levels(found) - line.int()).abs().max()) <= 8
    with pytest.raises(ValueError, match=r"^images: got 1 x 200 pixels, expected at most 16 times as long"):
        protect.photoguard(pil(line), pipe, steps=1)
    with pytest.raises(ValueError, match=r"^images\[1\]: got 1 x 200 pixels"):
        protect.photoguard([pil(photo(8, 8)), pil(line)], pipe, steps=1)


def test_tensors_are_perturbed_as_they_are(model):
    images = torch.rand(2, 3, 64, 72, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pictures = Pictures(images.requires_grad_(), [model], size="resize")
    assert torch.equal(torch.stack(pictures.working), images.detach().float())
    perturbed = noised(pictures, 0.025)
    found = pictures.finish(perturbed, 0.025)
    assert found.dtype == torch.float32 and torch.equal(found, torch.stack(perturbed))
    assert float((found - images.detach().float()).abs().max()) <= 0.025 + 1e-7


def test_what_went_wrong_inside_is_said(model):
    pictures = Pictures(pil(photo(64, 64)), [model])
    with pytest.raises(ValueError, match="perturbed: got NaN"):
        pictures.finish([each * torch.nan for each in pictures.working], 8 / 255)


def test_a_budget_below_one_level_is_said(model):
    pictures = Pictures(pil(photo(64, 64)), [model])
    with pytest.warns(protect.ProtectionWarning, match=r"eps: got 0.003, less than one of 255 levels"):
        pictures.finish(pictures.working, 0.003)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([], ValueError, "images: got an empty list, expected at least one picture"),
        (
            [pil(photo(8, 8)), torch.zeros(1, 3, 64, 64)],
            TypeError,
            r"images\[1\]: got a Tensor, expected",
        ),
        (np.zeros((64, 64, 3)), TypeError, "images: got a ndarray, expected a tensor"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), TypeError, "images: got torch.uint8, .* images / 255"),
        (torch.zeros(3, 64, 64), ValueError, r"images: got shape \(3, 64, 64\), expected \(B, 3, H, W\)"),
        (
            torch.zeros(1, 3, 60, 64),
            ValueError,
            "images: got 60 x 64, expected a positive multiple of 8",
        ),
        (
            torch.zeros(1, 3, 4, 64),
            ValueError,
            "images: got 4 x 64, expected a positive multiple of 8",
        ),
        (torch.full((1, 3, 64, 64), 2.0), ValueError, "images: got 2 to 2, expected values in"),
        ("nowhere.png", ValueError, "images: 'nowhere.png' cannot be read: .*No such file"),
        (["nowhere.png"], ValueError, r"images\[0\]: 'nowhere.png' cannot be read"),
    ],
)
def test_pictures_that_are_refused(model, images, error, message):
    with pytest.raises(error, match=f"^{message}") as caught:
        Pictures(images, [model])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.ones(64, 64), ValueError, r"mask: got shape \(64, 64\), expected its picture's 90 x 130"),
        (torch.ones(3, 90, 130), ValueError, r"mask: got shape \(3, 90, 130\), expected its picture's"),
        ([torch.ones(90, 130)] * 2, ValueError, "mask: got 2, expected one, or one for each of 1 pictures"),
        (torch.ones(90, 130).int(), TypeError, "mask: got torch.int32, expected a tensor, bool or floating"),
        (torch.full((90, 130), 1.5), ValueError, "mask: got values out of range"),
        (torch.full((90, 130), float("nan")), ValueError, "mask: got values out of range"),
        (
            Image.new("L", (90, 130)),
            ValueError,
            r"mask: got shape \(130, 90\), expected its picture's 90 x 130",
        ),
        ("mask.png", TypeError, "mask: got a str"),
    ],
)
def test_masks_that_are_refused(model, mask, error, message):
    with pytest.raises(error, match=f"^{message}"):
        Pictures(pil(photo(90, 130)), [model], mask=mask)


def test_an_unknown_size(model):
    with pytest.raises(ValueError, match="size: got 'crop', expected one of resize, tiles, native"):
        Pictures(pil(photo(64, 64)), [model], size="crop")


@pytest.mark.parametrize("size", ["resize", "tiles"])
def test_the_norm_of_a_whole_pictures_change_is_kept_at_its_own_size(pipe, size):
    """A change of 64 x 64 pixels grows with the picture, and so do those of many tiles."""
    image = pil(photo(256, 256))
    how = {"norm": "l2", "eps": 2.0, "step_size": 1.0, "steps": 2, "grad_reps": 1, "num_inference_steps": 2}
    found = protect.photoguard_diffusion(image, pipe, size=size, **how)
    norm = float((levels(found) - levels(image)).float().norm()) / 255
    assert 0.1 < norm <= 2.0


def test_one_mask_with_a_batch_dimension_is_that_of_all(model):
    mask = torch.rand(1, 1, 16, 24, generator=torch.Generator().manual_seed(0))
    found = Pictures(torch.rand(3, 3, 16, 24), [model], mask=mask).masks
    assert len(found) == 3 and all(torch.equal(each, mask[0]) for each in found)
    with pytest.raises(ValueError, match="mask: got 2, expected one, or one for each of 3 pictures"):
        Pictures(torch.rand(3, 3, 16, 24), [model], mask=mask.expand(2, -1, -1, -1))
