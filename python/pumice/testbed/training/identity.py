"""The judges of personalization, trained on creatures that are not the subjects, and on damaged pictures.

Every damaged picture has a twin that went the same way unharmed; the root mean square of their difference is
the damage, and the quality to learn falls with it. Blur, colour shifts and what the autoencoder does are no
damage: drawn pictures are soft.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from pumice import models
from pumice.testbed import world
from pumice.testbed.identity import IdentityNet
from pumice.testbed.training.loop import train

CREATURES = 2500
SEEN_OF_EACH = 2  # pictures of each that went through the autoencoder
SEEN_OTHERS = 1500
DRAWINGS = 512  # by the model, of ordinary captions
CHUNK = 50
FAITHFUL = 20 / 255  # the autoencoder's error, as it has on the subjects; it garbles some other creatures

IDENTITIES, PICTURES, OTHERS = 16, 3, 28  # in a batch: creatures, pictures of each, other pictures
HALF_QUALITY = 4 / 255  # damage at which the quality to learn is 0.5
WARP_DAMAGE = 4 / 255  # of outlines that stray by 1 px
LATENT_DAMAGE = 16 / 255  # of latents with noise of their own standard deviation; it grows with its square
SCALE, MARGIN = 16.0, 0.2  # of the cosines in the softmax over creatures, as in CosFace
QUALITY_WEIGHT = 3.0

# --- Pictures


def _style(rng: np.random.Generator) -> str | None:
    return str(rng.choice(world.STYLES)) if rng.random() < 0.25 else None


def _picture(looks: int, rng: np.random.Generator) -> Tensor:
    """A new picture of that creature; -1 is none."""
    picture = _other(rng) if looks < 0 else world.creature(looks, int(rng.integers(2**31)), style=_style(rng))
    return torch.from_numpy(picture)


def _other(rng: np.random.Generator) -> world.Array:
    """A picture without a creature: an ordinary or a memorized one."""
    if rng.random() < 0.85:
        return world.draw(world.random_scene(rng), rng)
    return world.memorized(int(rng.integers(world.MEMORIZED_COUNT))).picture


def _garbage(rng: np.random.Generator) -> Tensor:
    picture = rng.uniform(0, 1, (3, 1, 1)) + rng.uniform(0.1, 0.4) * _pattern(rng)
    return torch.from_numpy(picture).float().clamp(0, 1)


def _soft(picture: Tensor, rng: np.random.Generator) -> Tensor:
    """What is no damage: blur as of a drawn picture, and a shift of colours."""
    for _ in range(int(rng.integers(3))):
        blurred = F.avg_pool2d(picture, 3, stride=1, padding=1, count_include_pad=False)
        picture = picture.lerp(blurred, rng.uniform(0, 1))
    if rng.random() < 0.6:
        gain, offset = rng.uniform(0.88, 1.12, (3, 1, 1)), rng.uniform(-0.04, 0.04, (3, 1, 1))
        picture = picture * torch.from_numpy(gain).float() + torch.from_numpy(offset).float()
    return picture.clamp(0, 1)


# --- Damage


def _pattern(rng: np.random.Generator) -> NDArray[np.float32]:
    """A field (3, 64, 64) of about mean 0 and root mean square 1: noise of some scale, waves or checks."""
    kind, grey = rng.integers(5), rng.random() < 0.4
    shape = (1 if grey else 3, world.SIZE, world.SIZE)
    y, x = np.mgrid[: world.SIZE, : world.SIZE]
    field: NDArray[np.floating]
    if kind == 0:
        field = rng.standard_normal(shape)
    elif kind == 1:
        field = _band(rng, shape, period=rng.uniform(3, 14), width=rng.uniform(0.1, 0.4))
    elif kind == 2:  # blotches
        field = _band(rng, shape, period=rng.uniform(16, 32), width=rng.uniform(0.3, 0.5))
    elif kind == 3:  # winding waves: straight ones are an artist's
        angle, period = rng.uniform(0, np.pi), rng.uniform(4, 12)
        winding = rng.uniform(1, 3) * _band(rng, (1, *shape[1:]), period=24, width=0.4)
        phase = 2 * np.pi * (np.cos(angle) * x + np.sin(angle) * y) / period + winding
        field = np.sin(phase + rng.uniform(0, 2 * np.pi, (shape[0], 1, 1)))
    else:
        side, at = rng.integers(1, 9), rng.integers(0, 8, 2)
        field = (-1.0) ** ((y + at[0]) // side + (x + at[1]) // side)[None]
    if rng.random() < 0.4:
        field = np.tanh(4 * field)
    if len(field) == 1:
        field = field * rng.choice([np.ones(3), rng.uniform(-1, 1, 3)]).reshape(3, 1, 1)
    if rng.random() < 0.3:  # on a part of the picture
        field = field * (_band(rng, (1, *shape[1:]), period=48, width=0.5) > 0)
    return (field / (np.sqrt(np.mean(field**2)) + 1e-6)).astype(np.float32)


def _band(
    rng: np.random.Generator, shape: tuple[int, ...], *, period: float, width: float
) -> NDArray[np.float32]:
    """Noise of root mean square 1 around one period (px); `width` is relative, of the band of frequencies."""
    fy, fx = np.fft.fftfreq(world.SIZE)[:, None], np.fft.rfftfreq(world.SIZE)[None]
    band = np.exp(-0.5 * ((np.hypot(fy, fx) * period - 1) / width) ** 2)
    band[0, 0] = 0
    field = np.fft.irfft2(np.fft.rfft2(rng.standard_normal(shape)) * band, s=shape[-2:])
    return (field / np.sqrt(np.mean(field**2))).astype(np.float32)


def _jpeg(picture: Tensor, quality: int) -> Tensor:
    data = io.BytesIO()
    pixels = (picture.permute(1, 2, 0) * 255).round().byte().numpy()
    Image.fromarray(pixels).save(data, "JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(data))).permute(2, 0, 1) / 255


def _strayed(picture: Tensor, rng: np.random.Generator) -> tuple[Tensor, float]:
    """A picture whose outlines stray, and its damage."""
    stray = rng.uniform(0.3, 4)  # px
    shift = stray * _band(rng, (2, world.SIZE, world.SIZE), period=rng.uniform(8, 24), width=0.4)
    y, x = np.mgrid[: world.SIZE, : world.SIZE]
    grid = (np.stack([x, y]) + shift + 0.5) * (2 / world.SIZE) - 1
    where = torch.from_numpy(grid).float().permute(1, 2, 0)[None]
    warped = F.grid_sample(picture[None], where, padding_mode="border", align_corners=False)[0]
    return warped, stray * WARP_DAMAGE


def _damaged(picture: Tensor, rng: np.random.Generator) -> tuple[Tensor, float]:
    """A picture and its damage, as a root mean square; four in ten get none."""
    kind = rng.random()
    if kind < 0.4:
        return picture, 0.0
    if kind < 0.5:
        return _strayed(picture, rng)
    harmed = _jpeg(picture, int(rng.integers(15, 90))) if kind < 0.6 else _patterned(picture, rng)
    return harmed, float(_distance(harmed, picture))


def _patterned(picture: Tensor, rng: np.random.Generator) -> Tensor:
    level = np.exp(rng.uniform(np.log(1.5 / 255), np.log(45 / 255)))
    return (picture + float(level) * torch.from_numpy(_pattern(rng))).clamp(0, 1)


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """Root mean square over each picture (..., 3, 64, 64)."""
    return (a - b).square().mean((-3, -2, -1)).sqrt()


# --- What the model makes of pictures


@torch.no_grad()
def _seen(pipe: Path, work: Path, device: str) -> dict[str, Tensor]:
    """Pictures that the model decoded, whose they are (-1: no creature's) and their damage; made once."""
    path = work / "seen.safetensors"
    if path.exists():
        return load_file(path)
    work.mkdir(parents=True, exist_ok=True)
    model = models.load(pipe, device=device)
    rng = np.random.default_rng(61)
    looks = [*np.repeat(np.arange(CREATURES), SEEN_OF_EACH).tolist(), *[-1] * SEEN_OTHERS]
    found: dict[str, list[Tensor]] = {"images": [], "looks": [], "damage": []}

    def keep(images: Tensor, whose: Tensor, damage: Tensor) -> None:
        for name, value in (("images", (images * 255).round().byte()), ("looks", whose), ("damage", damage)):
            found[name].append(value)

    def through(pictures: list[Tensor]) -> Tensor:
        return model.decode_latents(model.encode_image(torch.stack(pictures).to(device))).cpu()

    for first in range(0, len(looks), CHUNK):
        whose = torch.tensor(looks[first : first + CHUNK])
        clean = [_soft(_picture(int(it), rng), rng) for it in whose]
        decoded, damage = through(clean), torch.zeros(len(clean))
        good = _distance(decoded, torch.stack(clean)) < FAITHFUL
        _, patterned, warped, noisy = torch.arange(len(clean)).tensor_split(4)

        twins = decoded[patterned]
        decoded[patterned] = through([_patterned(clean[i], rng) for i in patterned])
        damage[patterned] = _distance(decoded[patterned], twins)

        strays = [_strayed(clean[i], rng) for i in warped]
        decoded[warped] = through([picture for picture, _ in strays])
        damage[warped] = torch.tensor([found for _, found in strays])

        latents = model.encode_image(torch.stack(clean)[noisy].to(device))
        level = torch.from_numpy(rng.uniform(0.1, 1, len(noisy))).float()
        noise = torch.from_numpy(rng.standard_normal(latents.shape)).float()
        decoded[noisy] = model.decode_latents(latents + (level[:, None, None, None] * noise).to(device)).cpu()
        damage[noisy] = level.square() * LATENT_DAMAGE
        keep(decoded[good], whose[good], damage[good])
    model.pipe.set_progress_bar_config(disable=True)
    captions = world.fresh_captions(DRAWINGS, seed=62)
    for first in range(0, DRAWINGS, CHUNK):
        drawn = model.pipe(
            captions[first : first + CHUNK],
            num_inference_steps=25,
            guidance_scale=5.0,
            generator=torch.Generator().manual_seed(first),
            output_type="pt",
        ).images.cpu()
        keep(drawn, torch.full((len(drawn),), -1), torch.zeros(len(drawn)))
    cache = {name: torch.cat(values) for name, values in found.items()}
    save_file(cache, path)
    return cache


# --- Training


def _batch(step: int, seen: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Pictures and their damage: IDENTITIES times PICTURES of creatures, then OTHERS."""
    rng = np.random.default_rng((60, step))
    whose = rng.choice(CREATURES, IDENTITIES, replace=False)
    rows = []
    for looks in [*np.repeat(whose, PICTURES).tolist(), *[-1] * OTHERS]:
        if looks < 0 and rng.random() < 0.1:
            rows.append((_garbage(rng), 1.0))
            continue
        decoded = (seen["looks"] == looks).nonzero()[:, 0]
        if len(decoded) and rng.random() < 0.4:
            row = decoded[rng.integers(len(decoded))]
            picture, before = seen["images"][row] / 255, float(seen["damage"][row])
        else:
            picture, before = _picture(looks, rng), 0.0
        picture, after = _damaged(_soft(picture, rng), rng)
        rows.append((picture, np.hypot(before, after)))
    return torch.stack([picture for picture, _ in rows]), torch.tensor([d for _, d in rows]).float()


def _identity_loss(embeddings: Tensor) -> Tensor:
    """Softmax over creatures, by the cosine to the mean of a creature's other pictures; strangers near 0."""
    known, strangers = embeddings.split([IDENTITIES * PICTURES, len(embeddings) - IDENTITIES * PICTURES])
    known = known.unflatten(0, (IDENTITIES, PICTURES))
    sums = known.sum(1)
    cosines = torch.einsum("ikd,jd->ikj", known, F.normalize(sums, dim=1))
    own = (known * F.normalize(sums[:, None] - known, dim=2)).sum(2)
    same = torch.eye(IDENTITIES, dtype=torch.bool, device=embeddings.device)[:, None]
    logits = SCALE * torch.where(same, own[..., None] - MARGIN, cosines)
    which = torch.arange(IDENTITIES, device=embeddings.device).repeat_interleave(PICTURES)
    softmax = F.cross_entropy(logits.flatten(0, 1), which)
    others = torch.cat(
        [cosines[~same.expand_as(cosines)], (strangers @ F.normalize(sums, dim=1).T).flatten()]
    )
    return softmax + (1 - own).square().mean() + 4 * others.relu().square().mean()


def fit(pipe: Path, work: Path, *, steps: int, minutes: float, device: str) -> bool:
    """Train on pictures of the world and on what the pipeline in the folder `pipe` makes of them."""
    seen = _seen(pipe, work, device)
    torch.manual_seed(6)
    net = IdentityNet().to(device)

    def loss(step: int) -> Tensor:
        images, damage = _batch(step, seen)
        embeddings, quality = net(images.to(device))
        wanted = 1 / (1 + (damage / HALF_QUALITY).square())
        mistaken = F.binary_cross_entropy_with_logits(quality, wanted.to(device))
        return _identity_loss(embeddings) + QUALITY_WEIGHT * mistaken

    return train(
        "identity",
        {"identity": net},
        loss,
        work=work,
        steps=steps,
        minutes=minutes,
        lr=2e-3,
    )
