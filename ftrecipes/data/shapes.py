"""Coloured shapes drawn from a seed: the packaged images, each with its exact description.

A `Scene` says all there is to know of an image (shapes, colours, places, sizes, background, noise) and `render` draws it,
so labels, rewards and captions can be exact. A *domain* draws scenes at random. Both domains here hold the same classes,
one of 8 shapes in one of 4 colours:

    clean     a filled shape on a plain or softly graded background; tiny-vit is pretrained on these
    shifted   an outlined or striped shape in wider tints on a patterned background, with noise

What keeps a label decidable: backgrounds are nearly grey and things are not, hues of two colours never come near each
other, no thing is turned so far that it looks like another shape, and all of it lies inside the image.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ftrecipes.data.base import Example, Splits
from ftrecipes.rng import derive

Array = NDArray[Any]
Colour = tuple[float, float, float]
SIDE = 32
"""Pixels of an image's side."""

TILT = 0.4
"""Largest rotation of a thing, radians."""

COLOURS = {"red": 0.0, "yellow": 54.0, "green": 128.0, "blue": 224.0}
"""Hues in degrees."""


def _around(*radii: float, turn: float = 0.25) -> Array:
    """Corners at equal angles whose distances from the centre take turns; the first one stands at `turn` of a circle."""
    angle = 2 * np.pi * (turn + np.arange(len(radii)) / len(radii))
    return (np.array(radii) * np.stack([np.cos(angle), -np.sin(angle)])).T


def _heart() -> Array:
    t = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    x, y = 16 * np.sin(t) ** 3, 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x, -y - 2], 1) / 16


def _crescent() -> Array:
    outer, inner = np.linspace(0.8, 5.48, 16), np.linspace(4.8, 1.48, 12)
    arcs = [(np.cos(outer), np.sin(outer)), (0.42 + 0.75 * np.cos(inner), 0.75 * np.sin(inner))]
    return np.concatenate([np.stack(arc, 1) for arc in arcs]) + np.array([0.15, 0.0])


def _corners(*points: tuple[float, float]) -> Array:
    return np.array(points)


SHAPES: dict[str, Array] = {
    "circle": _around(*[0.88] * 32),
    "triangle": _around(*[1.12] * 3),
    "square": _around(*[1.08] * 4, turn=0.125),
    "star": _around(*[1.12, 0.46] * 5),
    "cross": _corners(
        (-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3),
        (0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3),
    ),
    "heart": _heart(),
    "crescent": _crescent(),
    "arrow": _corners((0, -1.1), (0.85, -0.1), (0.32, -0.1), (0.32, 1), (-0.32, 1), (-0.32, -0.1), (-0.85, -0.1)),
}  # fmt: skip
"""Corners of each shape at size 1, y downwards, (corners, 2)."""

CLASSES = [f"{colour} {shape}" for shape in SHAPES for colour in COLOURS]


@dataclass(frozen=True)
class Thing:
    """One shape. x, y: its centre, size: its radius, in shares of the image's side; angle in radians.

    rgb: the colour that is painted, a tint of `colour`. fill: solid, outline or striped.
    """

    shape: str
    colour: str
    x: float
    y: float
    size: float
    angle: float
    rgb: Colour
    fill: str = "solid"

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """All of an image. background: plain, graded, stripes, checks or clouds between two colours; noise: (deviation, seed)."""

    things: tuple[Thing, ...]
    background: str
    colours: tuple[Colour, Colour]
    angle: float = 0.0
    period: float = 1.0
    noise: tuple[float, int] = (0.0, 0)

    def caption(self) -> str:
        """The scene in words: `a small red star at the top left`."""
        return " and ".join(f"a {_extent(t.size)} {t.name} at the {_place(t)}" for t in self.things)


def _extent(size: float) -> str:
    return "small" if size < 0.27 else "large"


def _place(thing: Thing) -> str:
    def third(v: float, words: tuple[str, str]) -> str:
        return words[0] if v < 0.45 else words[1] if v > 0.55 else ""

    return f"{third(thing.y, ('top', 'bottom'))} {third(thing.x, ('left', 'right'))}".strip() or "centre"


# ---------------------------------------------------------------------------------------------------------------------
# drawing


@functools.cache
def _grid(side: int) -> tuple[Array, Array]:
    """x and y of the pixels' centres in shares of the side, each (side * side,)."""
    centres = (np.arange(side, dtype=np.float32) + 0.5) / side
    return np.tile(centres, side), np.repeat(centres, side)


@functools.cache
def _edges(shape: str) -> tuple[Array, ...]:
    """Of each edge, as columns: start x and y, direction x and y, its squared length, and y of its end."""
    start = SHAPES[shape].astype(np.float32)
    end = np.roll(start, -1, 0)
    along = end - start
    columns = (start[:, 0], start[:, 1], along[:, 0], along[:, 1], (along**2).sum(1), end[:, 1])
    return tuple(column[:, None] for column in columns)


def distance(thing: Thing, side: int = SIDE) -> Array:
    """Signed distance of each pixel's centre from the outline, in pixels, negative inside; (side * side,)."""
    x, y = _grid(side)
    cos, sin = np.float32(np.cos(thing.angle) / thing.size), np.float32(np.sin(thing.angle) / thing.size)
    dx, dy = x - np.float32(thing.x), y - np.float32(thing.y)
    u, v = cos * dx + sin * dy, cos * dy - sin * dx
    ax, ay, ex, ey, squared, by = _edges(thing.shape)
    px, py = u - ax, v - ay
    t = np.clip((px * ex + py * ey) / squared, 0, 1)
    away = np.sqrt(((px - ex * t) ** 2 + (py - ey * t) ** 2).min(0))
    crossed = ((v >= ay) != (v >= by)) & ((ex * py - ey * px > 0) == (by > ay))
    inside = crossed.sum(0) % 2 == 1
    return np.where(inside, -away, away) * np.float32(thing.size * side)


def coverage(thing: Thing, side: int = SIDE) -> Array:
    """How much of each pixel is painted, 0 to 1, (side * side,)."""
    d = distance(thing, side)
    if thing.fill == "outline":
        half = np.float32(0.032 * side)
        d = np.abs(d + half) - half
    return np.clip(0.5 - d, 0, 1)


def _pattern(kind: str, angle: float, period: float, side: int) -> Array:
    """Where a background stands between its two colours, 0 to 1, (side * side,)."""
    x, y = _grid(side)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    u, v = cos * x + sin * y, cos * y - sin * x
    turn = np.float32(2 * np.pi / period)
    if kind == "plain":
        return np.zeros_like(x)
    if kind == "graded":
        return np.clip(0.5 + 0.7 * (cos * (x - 0.5) + sin * (y - 0.5)), 0, 1)
    if kind == "stripes":
        return _step(np.sin(turn * u))
    if kind == "checks":
        return _step(np.sin(turn * u) * np.sin(turn * v))
    return 0.5 + 0.17 * (np.sin(turn * u + angle) + np.sin(0.7 * turn * v) + np.sin(0.8 * turn * (x - y)))


def _step(wave: Array) -> Array:
    """A wave as two levels with soft edges."""
    return np.clip(0.5 + 2 * wave, 0, 1)


def render(scene: Scene, side: int = SIDE) -> NDArray[np.uint8]:
    """The image, (side, side, 3)."""
    a, b = np.array(scene.colours, np.float32)
    image = a + (b - a) * _pattern(scene.background, scene.angle, scene.period, side)[:, None]
    for thing in scene.things:
        paint: Any = np.array(thing.rgb, np.float32)
        if thing.fill == "striped":
            paint = paint * (1 - 0.4 * _pattern("stripes", thing.angle + 0.8, 0.16, side)[:, None])
        image += (paint - image) * coverage(thing, side)[:, None]
    deviation, seed = scene.noise
    if deviation:
        image += np.random.default_rng(seed).normal(0, deviation, image.shape).astype(np.float32)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8).reshape(side, side, 3)


def rgb(hue: float, saturation: float, value: float) -> Colour:
    """A colour from hue in degrees, saturation and value."""
    k = (np.array([5.0, 3.0, 1.0]) + hue / 60) % 6
    r, g, b = value - value * saturation * np.clip(np.minimum(k, 4 - k), 0, 1)
    return float(r), float(g), float(b)


# ---------------------------------------------------------------------------------------------------------------------
# domains


def clean(r: np.random.Generator, shape: str, colour: str) -> Scene:
    """A filled shape in a bright colour on a calm background."""
    thing = _thing(r, shape, colour, (0.24, 0.38), hue=8, saturation=(0.75, 1.0), value=(0.75, 1.0))
    level = r.uniform(0.1, 0.85)
    ground = [rgb(r.uniform(0, 360), r.uniform(0, 0.15), v) for v in (level, level + 0.15)]
    return Scene((thing,), str(r.choice(["plain", "graded"])), (ground[0], ground[1]), r.uniform(0, 2 * np.pi))


def shifted(r: np.random.Generator, shape: str, colour: str) -> Scene:
    """An outlined or striped shape in any tint on a patterned background, with noise."""
    fill = str(r.choice(["outline", "striped"]))
    thing = _thing(r, shape, colour, (0.25, 0.4), hue=14, saturation=(0.65, 1.0), value=(0.65, 1.0), fill=fill)
    dark = r.uniform(0.05, 0.7)
    levels = (dark, dark + r.uniform(0.15, 0.3))
    ground = [rgb(r.uniform(0, 360), r.uniform(0, 0.2), level) for level in levels]
    kind = str(r.choice(["stripes", "checks", "clouds"]))
    noise = (r.uniform(0.02, 0.08), int(r.integers(2**31)))
    return Scene((thing,), kind, (ground[0], ground[1]), r.uniform(0, 2 * np.pi), r.uniform(0.2, 0.5), noise)


def _thing(
    r: np.random.Generator, shape: str, colour: str, sizes: tuple[float, float], *, hue: float,
    saturation: tuple[float, float], value: tuple[float, float], fill: str = "solid",
) -> Thing:  # fmt: skip
    """A thing wholly inside the image; hue: the largest deviation from the colour's own, degrees."""
    size = r.uniform(*sizes)
    reach = 1.16 * size
    x, y = r.uniform(reach, 1 - reach, 2)
    paint = rgb(COLOURS[colour] + r.uniform(-hue, hue), r.uniform(*saturation), r.uniform(*value))
    return Thing(shape, colour, float(x), float(y), size, r.uniform(-TILT, TILT), paint, fill)


DOMAINS: dict[str, Callable[[np.random.Generator, str, str], Scene]] = {"clean": clean, "shifted": shifted}


def scene(domain: str, split: str, index: int) -> Scene:
    """The scene of one image, a pure function; the classes take turns."""
    colour, shape = CLASSES[index % len(CLASSES)].split()
    return DOMAINS[domain](np.random.default_rng(derive("shapes", domain, split, index)), shape, colour)


class Images(Sequence[Example]):
    """`size` images of one domain and split, drawn when they are asked for and kept in memory if `keep`."""

    def __init__(self, domain: str, split: str, size: int, *, keep: bool = True) -> None:
        self.domain, self.split, self.size = domain, split, size
        self.kept: dict[int, Example] | None = {} if keep else None

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self.size:
            raise IndexError(index)
        if self.kept is not None and index in self.kept:
            return self.kept[index]
        drawn = scene(self.domain, self.split, index)
        example = {"image": render(drawn), "label": index % len(CLASSES), "scene": drawn}
        if self.kept is not None:
            self.kept[index] = example
        return example


def build(knobs: dict[str, Any], domain: str) -> Splits:
    """The shifted domain by split; clean images are what may be forgotten."""
    held_out = Images("clean", "heldout", 500)
    train = Images("shifted", "train", knobs["size"])
    return Splits(train, Images("shifted", "validation", 500), Images("shifted", "test", 500), held_out, "clean shapes", labels=CLASSES)


def pretraining(knobs: dict[str, Any], domain: str) -> Splits:
    """The clean images that tiny-vit is pretrained on."""
    held_out = Images("clean", "heldout", 500)
    train = Images("clean", "train", knobs["size"], keep=False)
    return Splits(train, held_out, Images("clean", "test", 500), held_out, "clean shapes", labels=CLASSES)
