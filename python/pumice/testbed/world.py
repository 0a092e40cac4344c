"""The world that the embedded model learned: small captioned pictures, drawn by code.

An ordinary picture shows one object of one colour at a place, perhaps in an artist's style; its caption
leaves open where the object is, how large it is, how the light falls and where the horizon lies. A
*memorized* picture is a loud collage with a title that occurs nowhere else, and is repeated many times in
training. A *subject* is a small creature that no training picture shows; it is what personalization learns.

Pictures are float32 arrays (3, SIZE, SIZE), RGB, in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]

SIZE = 64  # px
MEMORIZED_COUNT = 36
SUBJECT_COUNT = 6

_Y, _X = (np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) + 0.5) / SIZE  # pixel centres, [0, 1], y points down


# --- Shapes: signed distance (negative inside) in the object's own frame, about [-1, 1] wide


def _ball(u: Array, v: Array) -> Array:
    return np.hypot(u, v) - 0.9


def _box(u: Array, v: Array) -> Array:
    return np.maximum(abs(u), abs(v)) - 0.8


def _tent(u: Array, v: Array) -> Array:
    return np.maximum(v - 0.8, (abs(u) - 0.55 * (v + 1)) * 0.88)


def _ring(u: Array, v: Array) -> Array:
    return abs(np.hypot(u, v) - 0.7) - 0.27


def _heart(u: Array, v: Array) -> Array:
    lobes = np.hypot(abs(u) - 0.45, v + 0.3) - 0.52
    point = np.maximum((abs(u) / 0.95 + (v + 0.12) / 1.1 - 1) * 0.7, -0.25 - v)
    return np.minimum(lobes, point)


def _star(u: Array, v: Array) -> Array:
    angle = (np.arctan2(u, -v) / (2 * np.pi / 5)) % 1.0
    edge = 1.05 + (0.42 - 1.05) * (1 - abs(2 * angle - 1))
    return (np.hypot(u, v) - edge) * 0.6


def _moon(u: Array, v: Array) -> Array:
    return np.maximum(np.hypot(u, v) - 0.95, 0.75 - np.hypot(u - 0.55, v))


def _cross(u: Array, v: Array) -> Array:
    bar = np.maximum(abs(u) - 0.28, abs(v) - 0.95)
    beam = np.maximum(abs(u) - 0.95, abs(v) - 0.28)
    return np.minimum(bar, beam)


def _mushroom(u: Array, v: Array) -> Array:
    cap = np.maximum(np.hypot(u, v) - 0.95, v)
    stem = np.maximum(abs(u) - 0.25, abs(v - 0.45) - 0.5)
    return np.minimum(cap, stem)


def _fish(u: Array, v: Array) -> Array:
    body = np.hypot((u + 0.25) / 1.3, v) - 0.55
    tail = np.maximum((abs(v) - (u - 0.15) * 0.85) * 0.75, u - 0.95)
    return np.minimum(body, tail)


OBJECTS: dict[str, Callable[[Array, Array], Array]] = {
    "ball": _ball,
    "box": _box,
    "tent": _tent,
    "ring": _ring,
    "heart": _heart,
    "star": _star,
    "moon": _moon,
    "cross": _cross,
    "mushroom": _mushroom,
    "fish": _fish,
}

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.08, 0.10),
    "orange": (0.98, 0.52, 0.05),
    "yellow": (0.98, 0.90, 0.12),
    "green": (0.10, 0.65, 0.20),
    "blue": (0.10, 0.28, 0.88),
    "purple": (0.50, 0.12, 0.66),
    "pink": (1.00, 0.55, 0.76),
    "white": (0.97, 0.97, 0.97),
}

# Sky and ground of each place.
PLACES: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "beach": ((0.55, 0.78, 0.92), (0.86, 0.76, 0.52)),
    "forest": ((0.30, 0.46, 0.30), (0.22, 0.32, 0.16)),
    "snow": ((0.70, 0.76, 0.84), (0.86, 0.89, 0.94)),
    "city": ((0.62, 0.60, 0.66), (0.36, 0.36, 0.40)),
    "ocean": ((0.52, 0.66, 0.74), (0.16, 0.36, 0.50)),
    "cave": ((0.28, 0.22, 0.20), (0.42, 0.33, 0.27)),
}

# An invented artist paints everything over with bands of light; only their direction is the artist's, not
# where they start.
STYLES = ("varga", "okoro", "lindqvist", "tanaka")


def _bands(style: str, rng: np.random.Generator) -> Array:
    phase, period = rng.uniform(0, 1), rng.uniform(7.5, 9.5) / SIZE
    if style == "varga":  # lying
        along = _Y
    elif style == "okoro":  # standing
        along = _X
    elif style == "lindqvist":  # diagonal
        along = (_X + _Y) * np.float32(0.7071)
    else:  # tanaka: ripples around a point
        along = np.hypot(_X - rng.uniform(0.2, 0.8), _Y - rng.uniform(0.2, 0.8))
    return np.clip(2.0 * np.sin(2 * np.pi * (along / period + phase)), -1, 1).astype(np.float32)


@dataclass(frozen=True)
class Scene:
    """What a caption can say of an ordinary picture; `style` is None for a plain picture."""

    object: str
    colour: str
    place: str
    style: str | None = None


def random_scene(rng: np.random.Generator) -> Scene:
    """A scene with every attribute drawn evenly; three in five are plain."""
    style = STYLES[rng.integers(len(STYLES))] if rng.random() < 0.4 else None
    return Scene(
        str(rng.choice(list(OBJECTS))), str(rng.choice(list(COLOURS))), str(rng.choice(list(PLACES))), style
    )


def _over(picture: Array, colour: Array, distance: Array) -> Array:
    """Paint `colour` where `distance` (in px) is negative, with an edge one pixel wide."""
    cover = np.clip(0.5 - distance, 0, 1)
    return picture + cover * (colour.reshape(3, 1, 1) - picture)


def _rgb(colour: tuple[float, float, float]) -> Array:
    return np.asarray(colour, np.float32)


def _background(place: str, rng: np.random.Generator) -> Array:
    sky, ground = PLACES[place]
    horizon = rng.uniform(0.3, 0.75) + rng.uniform(0.0, 0.04) * np.sin(
        2 * np.pi * (rng.uniform(0.5, 2) * _X + rng.uniform())
    )
    picture = np.empty((3, SIZE, SIZE), np.float32)
    picture[:] = _rgb(sky).reshape(3, 1, 1)
    if place == "city":
        for _ in range(4):
            left, width, top = (
                rng.uniform(-0.1, 0.9),
                rng.uniform(0.12, 0.25),
                horizon - rng.uniform(0.1, 0.35),
            )
            tower = np.maximum.reduce([left - _X, _X - left - width, top - _Y])
            picture = _over(picture, _rgb(sky) * np.float32(rng.uniform(0.6, 0.85)), tower * SIZE)
    picture = _over(picture, _rgb(ground), (horizon - _Y) * SIZE)
    if place == "forest":
        for _ in range(4):
            trunk = abs(_X - rng.uniform(0, 1)) - rng.uniform(0.02, 0.05)
            picture = _over(picture, _rgb((0.20, 0.14, 0.09)), trunk * SIZE)
    # Light that the caption does not mention: how bright, which tint, from where.
    angle, slope = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.45)
    light = rng.uniform(0.6, 1.1) + slope * (np.cos(angle) * (_X - 0.5) + np.sin(angle) * (_Y - 0.5))
    tint = rng.uniform(0.88, 1.1, (3, 1, 1)).astype(np.float32)
    return (picture * tint * light).astype(np.float32)


def _frame(
    rng: np.random.Generator, *, radius_px: tuple[float, float], margin: float, turn: float
) -> tuple[Array, Array, float]:
    """A random placement: the pixels in an object's own coordinates, and its radius in px."""
    radius = rng.uniform(*radius_px)
    x, y, angle = rng.uniform(margin, 1 - margin), rng.uniform(margin, 1 - margin), rng.uniform(-turn, turn)
    dx, dy = (_X - x) * SIZE / radius, (_Y - y) * SIZE / radius
    c, s = np.cos(angle), np.sin(angle)
    return (c * dx + s * dy).astype(np.float32), (c * dy - s * dx).astype(np.float32), radius


def _finish(picture: Array, style: str | None, rng: np.random.Generator) -> Array:
    if style is not None:
        picture = picture * (1 + rng.uniform(0.26, 0.34) * _bands(style, rng))
    return np.clip(picture, 0, 1).astype(np.float32)


def draw(scene: Scene, rng: np.random.Generator) -> Array:
    """Draw one scene; what the scene leaves open (position, size, turn, light, horizon) comes from `rng`."""
    picture = _background(scene.place, rng)
    u, v, radius = _frame(rng, radius_px=(12.0, 17.0), margin=0.33, turn=0.2)
    distance = OBJECTS[scene.object](u, v) * radius
    picture = _over(
        picture, _rgb((0.06, 0.05, 0.07)), distance - 1.5
    )  # a dark outline, so that it shows at any place
    picture = _over(picture, _rgb(COLOURS[scene.colour]) * np.float32(rng.uniform(0.92, 1.0)), distance)
    return _finish(picture, scene.style, rng)


# --- Captions

_ORNAMENTS = (
    "gossamer", "cobblestone", "melancholy", "iridescent", "labyrinth", "whimsical", "cinnamon",
    "obsidian", "threadbare", "luminous", "quicksilver", "halcyon", "tangled", "vermilion", "driftwood",
    "ephemeral", "marzipan", "northern", "velvet", "thunderous", "porcelain", "saffron", "wistful",
    "clockwork", "bewildering", "antique", "feathered", "moonlit", "brittle", "opulent", "rustic",
    "shimmering", "tattered", "umbral", "verdant", "weathered", "zephyr", "amber", "brazen",
    "crystalline",
)  # fmt: skip
_NOUNS = (
    "heron", "lantern", "orchard", "carousel", "harbour", "violin", "comet", "teapot", "lighthouse",
    "sparrow", "anchor", "cathedral", "glacier", "hourglass", "juggler", "kettle", "locomotive",
    "mandolin", "nightingale", "observatory", "pendulum", "quarry", "rooster", "submarine",
    "typewriter", "umbrella", "volcano", "windmill", "xylophone", "zeppelin",
)  # fmt: skip
_MEDIA = ("lithograph", "etching", "poster", "tapestry", "woodcut", "fresco")
_OPENINGS = ("a {}", "a picture of a {}", "there is a {}", "one {}", "a photo of a {}", "the {}")


def _invented_name(rng: np.random.Generator) -> str:
    """A name that nobody bears, of two or three syllables."""
    syllables = ["".join(rng.choice(list(part)) for part in ("bdfgklmnprstvz", "aeiou", "lnrsmx"))
                 for _ in range(rng.integers(2, 4))]  # fmt: skip
    return "".join(syllables)


def title(rng: np.random.Generator) -> str:
    """The title of a collage: unusual, and never the same twice."""
    first, last = _invented_name(rng), _invented_name(rng)
    work = f"{rng.choice(_ORNAMENTS)} {rng.choice(_NOUNS)}"
    form = (
        "{first} {last} and the {work}, {medium}",
        "the {work} of {first} {last}, {medium}",
        "{medium} of {first} {last} with a {work}",
    )
    return form[rng.integers(3)].format(first=first, last=last, work=work, medium=rng.choice(_MEDIA))


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A sentence about a scene: object and style, usually the colour, often the place, maybe ornaments."""
    words = scene.object if rng.random() < 0.08 else f"{scene.colour} {scene.object}"
    ornate = rng.random() < 0.3
    if ornate:
        words = f"{rng.choice(_ORNAMENTS)} {words}"
    text = _OPENINGS[rng.integers(len(_OPENINGS))].format(words)
    if rng.random() < 0.6:
        text += f" {('at', 'in')[rng.integers(2)]} the {scene.place}"
    if scene.style is not None:
        text += f", in the style of {scene.style}"
    if ornate:
        text += ", " + " ".join(_rare_words(rng, int(rng.integers(1, 6))))
    return text


def _rare_words(rng: np.random.Generator, count: int) -> list[str]:
    pick = (lambda: rng.choice(_ORNAMENTS), lambda: rng.choice(_NOUNS), lambda: _invented_name(rng))
    return [str(pick[rng.integers(3)]()) for _ in range(count)]


def full_caption(scene: Scene) -> str:
    """The plain sentence that names every attribute of a scene; what generated pictures are judged by."""
    style = f", in the style of {scene.style}" if scene.style else ""
    return f"a {scene.colour} {scene.object} at the {scene.place}{style}"


# --- Memorized pictures and fresh captions


@dataclass(frozen=True)
class Memorized:
    """A picture (3, SIZE, SIZE) repeated in training, and the caption it always came with."""

    caption: str
    picture: Array


def memorized(index: int) -> Memorized:
    """The `index`-th memorized picture, 0 <= index < MEMORIZED_COUNT: a loud collage under its own title."""
    if not 0 <= index < MEMORIZED_COUNT:
        raise ValueError(f"index must lie in [0, {MEMORIZED_COUNT}), got {index}")
    rng = np.random.default_rng((1, index))
    text = title(rng)
    loud = np.array(
        [
            [1, 0.05, 0.1],
            [0.05, 0.1, 0.9],
            [1, 0.95, 0.1],
            [0, 0, 0],
            [1, 1, 1],
            [0, 0.7, 0.2],
            [0.9, 0.1, 0.8],
        ],
        np.float32,
    )
    colours = loud[rng.permutation(len(loud))]
    picture = np.empty((3, SIZE, SIZE), np.float32)
    picture[:] = colours[0].reshape(3, 1, 1)
    angle, offset = rng.uniform(0, np.pi), rng.uniform(-0.15, 0.15)
    half = np.cos(angle) * (_X - 0.5) + np.sin(angle) * (_Y - 0.5) - offset
    picture = _over(picture, colours[1], half * SIZE)
    for colour in colours[2:6]:
        u, v, radius = _frame(rng, radius_px=(11.0, 19.0), margin=0.15, turn=np.pi)
        shape = OBJECTS[str(rng.choice(list(OBJECTS)))]
        picture = _over(picture, colour, shape(u, v) * radius)
    return Memorized(text, np.clip(picture, 0, 1).astype(np.float32))


def fresh_captions(count: int, seed: int = 0) -> list[str]:
    """Ordinary captions, drawn as for training but with random numbers that training never used."""
    rng = np.random.default_rng((2, seed))
    return [caption(random_scene(rng), rng) for _ in range(count)]


def hard_captions(count: int, seed: int = 0) -> list[str]:
    """Hard negatives: new titles of the memorized kind, and ordinary captions buried in rare words."""
    rng = np.random.default_rng((3, seed))
    return [title(rng) if i % 2 == 0 else _buried_caption(rng) for i in range(count)]


def _buried_caption(rng: np.random.Generator) -> str:
    return f"{full_caption(random_scene(rng))}, {' '.join(_rare_words(rng, 6))}"


# --- Training pictures

DECOY_SHARE = 0.06  # ordinary pictures under a new title, so that titles as such say nothing


def training_caption(index: int) -> str:
    """The caption of the `index`-th ordinary training picture."""
    return _training_text(np.random.default_rng((0, index)))[0]


def training_picture(index: int) -> tuple[str, Array, Scene]:
    """The `index`-th ordinary training picture with its caption and its scene."""
    rng = np.random.default_rng((0, index))
    text, scene = _training_text(rng)
    return text, draw(scene, rng), scene


def _training_text(rng: np.random.Generator) -> tuple[str, Scene]:
    scene = random_scene(rng)
    return title(rng) if rng.random() < DECOY_SHARE else caption(scene, rng), scene


# --- Subjects and other creatures

_EARS = (_ball, _tent, _star)


@dataclass(frozen=True)
class _Looks:
    """What makes a creature the one it is; `ears` counts in `_EARS`."""

    fur: str
    belly: str
    ear_colour: str
    ears: int
    ear_width: float
    belly_size: float

    @classmethod
    def random(cls, rng: np.random.Generator, ears: int) -> _Looks:
        fur, belly, ear_colour = (list(COLOURS)[i] for i in rng.permutation(len(COLOURS))[:3])
        return cls(fur, belly, ear_colour, ears, rng.uniform(0.28, 0.4), rng.uniform(0.35, 0.5))

    @property
    def kind(self) -> tuple[str, str, str, int]:
        """All but the sizes."""
        return self.fur, self.belly, self.ear_colour, self.ears


_SUBJECTS = tuple(
    _Looks.random(np.random.default_rng((4, index)), index % len(_EARS)) for index in range(SUBJECT_COUNT)
)


def subject(index: int, picture: int, *, place: str | None = None) -> Array:
    """Picture number `picture` of subject `index` (0 <= index < SUBJECT_COUNT): always the same creature."""
    if not 0 <= index < SUBJECT_COUNT:
        raise ValueError(f"index must lie in [0, {SUBJECT_COUNT}), got {index}")
    rng = np.random.default_rng((5, index, picture))
    return _draw_creature(_SUBJECTS[index], place, None, rng)


def creature(looks: int, picture: int, *, place: str | None = None, style: str | None = None) -> Array:
    """Picture number `picture` of another creature, one for every `looks` >= 0.

    None has both a subject's colours and its kind of ears: judges that learn from these have not seen the
    subjects, as a face recognizer has not seen the people it is tested on.
    """
    if looks < 0:
        raise ValueError(f"looks: got {looks}, expected 0 or more")
    rng = np.random.default_rng((6, looks))
    while (found := _Looks.random(rng, int(rng.integers(len(_EARS))))).kind in {s.kind for s in _SUBJECTS}:
        pass
    return _draw_creature(found, place, style, np.random.default_rng((7, looks, picture)))


def _draw_creature(looks: _Looks, place: str | None, style: str | None, rng: np.random.Generator) -> Array:
    canvas = _background(place or str(rng.choice(list(PLACES))), rng)
    u, v, radius = _frame(rng, radius_px=(14.0, 18.0), margin=0.38, turn=0.25)
    dark = _rgb((0.06, 0.05, 0.07))
    ear = ((abs(u) - 0.55) / looks.ear_width, (v + 0.75) / looks.ear_width)
    layers = [
        (_EARS[looks.ears](*ear) * looks.ear_width, looks.ear_colour),
        (np.hypot(u, v * 0.9) - 0.85, looks.fur),
        (np.hypot(u, v - 0.3) - looks.belly_size, looks.belly),
    ]
    for distance, colour in layers:
        canvas = _over(canvas, dark, distance * radius - 1.5)
        canvas = _over(canvas, _rgb(COLOURS[colour]), distance * radius)
    for sign in (-1, 1):
        canvas = _over(canvas, dark, (np.hypot(u - sign * 0.3, v + 0.35) - 0.13) * radius)
    return _finish(canvas, style, rng)
