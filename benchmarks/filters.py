"""What filtering a picture costs: `pumice.purify.filters` against loops over what others have.

`python benchmarks/filters.py [--pictures 32] [--side 512] [--repeats 3] [--json FILE]`

Ours takes all pictures as one float32 tensor, on one thread and on two; a rival takes them one by one, on
one thread, each in the form that it likes best: float32, or 8 bits where it has nothing else. Results are
compared before anything is timed. One thread is timed by what it takes of the processor, so that a busy
machine does not count; two by the clock. Rivals that are not installed are left out, none is a dependency:

    pip install --target rivals --no-deps opencv-contrib-python-headless scikit-image lazy-loader imageio \
        tifffile networkx cvxpy clarabel qdldl
    PYTHONPATH=rivals python benchmarks/filters.py
"""

from __future__ import annotations

import argparse
import importlib
import io
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

import machine
from pumice.purify import filters
from pumice.purify.filters.tvm import solve

Array = NDArray[Any]
PACKAGES = ("opencv-contrib-python-headless", "scikit-image", "pillow", "cvxpy", "clarabel", "numpy")
INSIDE = 8  # px from the border, where boxes are cut in one way or another


Check = Callable[[Tensor, Tensor, Tensor], None]


@dataclass(frozen=True)
class Rival:
    """`filter` takes what `prepare` made of a picture; `check` compares ours with it, given the picture."""

    prepare: Callable[[Tensor], Any]
    filter: Callable[[Any], Any]
    check: Check
    pictures: int | None = None  # fewer, where one takes seconds


@dataclass(frozen=True)
class Case:
    """A filter of ours, and what there is beside it."""

    name: str
    ours: Callable[[Tensor], Tensor]
    rivals: dict[str, Rival]
    pictures: int | None = None
    work: Callable[[Tensor], Tensor] = lambda images: images  # on something else than pictures


def close(tolerance: float, border: int = 0) -> Callable[[Tensor, Tensor, Tensor], None]:
    def check(ours: Tensor, theirs: Tensor, _: Tensor) -> None:
        inside = (..., *[slice(border, side - border) for side in ours.shape[-2:]])
        error = float((ours - theirs)[inside].abs().max())
        assert error <= tolerance, f"off by {error:.3g}"

    return check


def no_worse(objective: Callable[[Tensor, Tensor], float], slack: float) -> Callable[..., None]:
    """What is minimised, rather than where."""

    def check(ours: Tensor, theirs: Tensor, given: Tensor) -> None:
        mine, other = objective(ours, given), objective(theirs, given)
        assert mine <= other * (1 + slack), f"{mine} is more than {other}"

    return check


# --- Forms of a picture (3, H, W)


def floats(picture: Tensor) -> Array:
    return picture.permute(1, 2, 0).contiguous().numpy()


def levels(picture: Tensor) -> Array:
    return (picture * 255).round().byte().permute(1, 2, 0).contiguous().numpy()


def blue_first(picture: Tensor) -> Array:
    return levels(picture.flip(0))


def image(picture: Tensor) -> Image.Image:
    return Image.fromarray(levels(picture))


def planes(picture: Tensor) -> list[Image.Image]:
    return [Image.fromarray(plane) for plane in picture.numpy()]


def tensor(found: Any) -> Tensor:
    if isinstance(found, Tensor):
        return found
    if isinstance(found, list):
        return torch.stack([torch.from_numpy(np.array(plane)) for plane in found])
    array = torch.from_numpy(np.array(found)).permute(2, 0, 1)
    return array / 255 if array.dtype == torch.uint8 else array.float()


# --- Cases


def cases(cv2: Any, restoration: Any, cvxpy: Any) -> Iterator[Case]:
    def opencv(
        filter: Callable[[Any], Any], check: Check, name: str = "OpenCV", **how: Any
    ) -> dict[str, Rival]:
        return {name: Rival(how.get("prepare", floats), filter, check)} if cv2 else {}

    for sigma, size in ((1.0, 9), (5.0, 41)):
        theirs = opencv(partial(_opencv_gaussian, cv2, sigma, size), close(1e-5))
        yield Case(f"gaussian, sigma {sigma:g}", partial(filters.gaussian, sigma=sigma), theirs)
    for size in (3, 5):
        theirs = opencv(lambda x, k=size: cv2.medianBlur(x, k), close(0))
        yield Case(f"median, {size}", partial(filters.median, size=size), theirs)
    theirs = opencv(lambda x: cv2.medianBlur(x, 7), close(0), "OpenCV, 8 bits", prepare=levels)
    yield Case("median, 7", partial(filters.median, size=7), theirs)
    theirs = opencv(lambda x: cv2.bilateralFilter(x, 9, 75 / 255, 75), close(1e-4))
    yield Case("bilateral, 9", filters.bilateral, theirs)
    theirs = opencv(lambda x: cv2.ximgproc.guidedFilter(x, x, 4, 0.01), close(1e-3, INSIDE))
    yield Case("guided, radius 4", filters.guided, theirs)
    theirs = opencv(partial(_opencv_cleaner, cv2), close(0.02, 4 * INSIDE))
    yield Case("adverse_cleaner", filters.adverse_cleaner, theirs, pictures=2)

    variation = no_worse(partial(rudin_osher_fatemi, weight=0.1), 0)
    for ours, them in ((8, {}), (100, {"eps": 1e-9, "max_num_iter": 500})):  # to the same objective
        run = partial(_skimage_variation, restoration, **them)
        rival = {"scikit-image": Rival(floats, run, variation, pictures=1 if them else 4)}
        ours_run = partial(filters.total_variation, weight=0.1, iterations=ours)
        yield Case(f"total_variation, {ours}", ours_run, rival if restoration else {})
    guo = {
        "cvxpy": Rival(lambda x: x, partial(_cvxpy_tvm, cvxpy), no_worse(total_variance, 1e-3), pictures=1)
    }
    yield Case(
        "tvm, 64 px",
        lambda x: solve(x, kept(x), 0.01, 300),
        guo if cvxpy else {},
        pictures=16,
        work=lambda x: interpolate(x, (64, 64), mode="area"),
    )

    pillow = {
        "Pillow": Rival(planes, _pillow_resize, close(1e-5)),
        "Pillow, 8 bits": Rival(image, _pillow_resize_levels, close(6 / 255)),
    }
    yield Case("resize, half and back", filters.resize, pillow)
    theirs = opencv(partial(_opencv_jpeg, cv2), close(16 / 255), "OpenCV, 8 bits", prepare=blue_first)
    codecs = {
        "Pillow": Rival(floats, _pillow_jpeg_of_floats, close(1e-6)),
        "Pillow, 8 bits": Rival(image, _pillow_jpeg, close(1e-6)),
    }
    yield Case("jpeg, 75", filters.jpeg, codecs | theirs)
    rounded = {"NumPy": Rival(floats, lambda x: np.round(x * 31) / 31, close(1e-6))}
    yield Case("bit_depth, 5", filters.bit_depth, rounded)


def _opencv_gaussian(cv2: Any, sigma: float, size: int, x: Array) -> Array:
    return cv2.GaussianBlur(x, (size, size), sigma, borderType=cv2.BORDER_REFLECT_101)


def _opencv_cleaner(cv2: Any, x: Array) -> Array:
    """On a scale of 255: OpenCV takes determinants of less than 1e-6 for zero."""
    given = y = x * 255
    for _ in range(64):
        y = cv2.bilateralFilter(y, 5, 8, 8)
    for _ in range(4):
        y = cv2.ximgproc.guidedFilter(given, y, 4, 16)
    return y.clip(0, 255) / 255


def _skimage_variation(restoration: Any, x: Array, **how: Any) -> Array:
    return restoration.denoise_tv_chambolle(x, weight=0.1, channel_axis=-1, **how)


def _pillow_resize(given: list[Image.Image]) -> list[Image.Image]:
    size = given[0].size
    half = (round(size[0] / 2), round(size[1] / 2))
    small = [each.resize(half, Image.Resampling.LANCZOS) for each in given]
    return [each.resize(size, Image.Resampling.LANCZOS) for each in small]


def _pillow_resize_levels(given: Image.Image) -> Image.Image:
    half = (round(given.width / 2), round(given.height / 2))
    small = given.resize(half, Image.Resampling.LANCZOS)
    return small.resize(given.size, Image.Resampling.LANCZOS)


def _pillow_jpeg(given: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    given.save(buffer, "JPEG", quality=75, subsampling="4:2:0")
    return Image.open(buffer).convert("RGB")


def _pillow_jpeg_of_floats(given: Array) -> Array:
    read = _pillow_jpeg(Image.fromarray(np.round(given * 255).astype(np.uint8)))
    return np.asarray(read, dtype=np.float32) / 255


def _opencv_jpeg(cv2: Any, given: Array) -> Array:
    done, code = cv2.imencode(".jpg", given, [cv2.IMWRITE_JPEG_QUALITY, 75])
    assert done
    return cv2.imdecode(code, cv2.IMREAD_COLOR)[..., ::-1]


def rudin_osher_fatemi(u: Tensor, f: Tensor, weight: float) -> float:
    right = torch.nn.functional.pad(u.double().diff(dim=-1), (0, 1))
    down = torch.nn.functional.pad(u.double().diff(dim=-2), (0, 0, 0, 1))
    return float((u - f).double().square().sum() / 2 + weight * (right**2 + down**2).sqrt().sum())


def kept(x: Tensor) -> Tensor:
    """98 % of all values, the same of each picture."""
    share = torch.rand(x.shape[-3:], generator=torch.Generator().manual_seed(0))
    return (share >= 0.02).expand_as(x)


def total_variance(z: Tensor, x: Tensor) -> float:
    """Of pictures (..., 3, H, W), the sum."""
    norm = torch.linalg.vector_norm
    fidelity = norm((kept(x) * (z - x)).double(), dim=(-3, -2, -1)).sum()
    rows, columns = (norm(z.double().diff(dim=dim), dim=-3 - dim).sum() for dim in (-2, -1))
    return float(fidelity + 0.01 * (rows + columns))


def _cvxpy_tvm(cp: Any, x: Tensor) -> Tensor:
    """Guo et al.'s problem as one writes it down."""
    side, mask, given = x.shape[-1], kept(x).double().numpy(), x.double().numpy()
    z = [cp.Variable((side, side)) for _ in range(3)]
    missing = [cp.multiply(mask[k], z[k] - given[k]) for k in range(3)]
    variation = sum(
        cp.sum(cp.norm(p[1:] - p[:-1], axis=1)) + cp.sum(cp.norm(p[:, 1:] - p[:, :-1], axis=0)) for p in z
    )
    problem = cp.Minimize(cp.norm(cp.hstack([cp.vec(p, order="C") for p in missing])) + 0.01 * variation)
    cp.Problem(problem).solve(solver=cp.CLARABEL)
    return torch.stack([torch.from_numpy(p.value) for p in z]).float()


# --- Measuring


def pictures(count: int, side: int) -> Tensor:
    """Smooth ones with some noise, of 8 bits, far from 0 and 1: floating rivals do not clamp."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, side // 8, side // 8, generator=generator)
    fine = 0.02 * torch.randn(count, 3, side, side, generator=generator)
    found = interpolate(coarse, (side, side), mode="bicubic") * 0.5 + 0.25 + fine
    return (found.clamp(0, 1) * 255).round() / 255


def measured(case: Case, images: Tensor, repeats: int) -> dict[str, Any]:
    """Milliseconds for each picture; all take turns."""
    images = case.work(images[: case.pictures])
    found = case.ours(images)
    work: dict[str, tuple[int, Callable[[], float], Callable[[], Any]]] = {
        "ours, 1 thread": (len(images), time.process_time, partial(_ours, case, images, 1)),
        "ours, 2 threads": (len(images), time.perf_counter, partial(_ours, case, images, 2)),
    }
    for name, rival in case.rivals.items():
        prepared = [rival.prepare(picture) for picture in images[: rival.pictures]]
        rival.check(found[0], tensor(rival.filter(prepared[0])), images[0])
        work[name] = (len(prepared), time.process_time, partial(_each, rival.filter, prepared))
    times: dict[str, list[float]] = {name: [] for name in work}
    for _, (name, (count, clock, run)) in itertools.product(range(repeats), work.items()):
        start = clock()
        run()
        times[name].append(1e3 * (clock() - start) / count)
    medians = {name: statistics.median(found) for name, found in times.items()}
    ratios = itertools.product(("ours, 1 thread", "ours, 2 threads"), case.rivals)
    return {
        "filter": case.name,
        "shape": list(images.shape),
        "ms_a_picture": medians,
        "faster": {f"{ours} than {rival}": medians[rival] / medians[ours] for ours, rival in ratios},
    }


def _ours(case: Case, images: Tensor, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    case.ours(images)
    torch.set_num_threads(before)


def _each(filter: Callable[[Any], Any], prepared: list[Any]) -> None:
    for picture in prepared:
        filter(picture)


def installed(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        print(f"{name} is not installed")
        return None


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=32)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help="filters whose name begins so")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    cv2, restoration, cvxpy = (installed(name) for name in ("cv2", "skimage.restoration", "cvxpy"))
    if cv2:
        cv2.setNumThreads(1)
    print(machine.line("cpu"))
    record: dict[str, Any] = {"machine": machine.describe("cpu"), "versions": versions(), "rows": []}
    images = pictures(given.pictures, given.side)
    for case in cases(cv2, restoration, cvxpy):
        if not case.name.startswith(given.only):
            continue
        row = measured(case, images, given.repeats)
        record["rows"].append(row)
        times = ", ".join(f"{name} {ms:.2f}" for name, ms in row["ms_a_picture"].items())
        print(f"{case.name:<24} ms a picture: {times}", flush=True)
        if given.json:
            given.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
