"""Prompted images: `two red circles left`, drawn exactly as the prompt says, and read back from pixels alone.

A prompt names count, colour, shape and place of what an image shows. The drawing is that of `shapes.py`. tiny-sd and tiny-dit
are pretrained on the `known` shapes; to draw the `new` ones is what fine-tuning has to learn.

`read` says what an image shows, without a learned model: things are the coloured regions on a nearly grey ground, and the
shape of each is the silhouette that fits it best. So metrics and rewards of sampled images are exact and repeatable.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ftrecipes.data.base import Example, Splits
from ftrecipes.data.shapes import COLOURS, SHAPES, SIDE, TILT, Scene, Thing, coverage, render, rgb
from ftrecipes.rng import derive

KNOWN = ["circle", "square", "triangle", "cross"]
NEW = [name for name in SHAPES if name not in KNOWN]
COUNTS = ["one", "two", "three"]
PLACES = ["left", "right", "top", "bottom", "centre"]
SIZES = {1: (0.20, 0.28), 2: (0.15, 0.19), 3: (0.12, 0.14)}
"""Radius of a thing in shares of the side, by how many there are."""

ASKED = ("count", "colour", "shape", "place")
"""What a prompt says, and what is checked of an image."""


@dataclass(frozen=True)
class Asked:
    """What an image shall show."""

    count: int
    colour: str
    shape: str
    place: str

    @property
    def prompt(self) -> str:
        return f"{COUNTS[self.count - 1]} {self.colour} {plural(self.shape, self.count)} {self.place}"


def plural(shape: str, count: int) -> str:
    """`circle`, `circles`, `crosses`."""
    return shape if count == 1 else f"{shape}es" if shape.endswith("s") else f"{shape}s"


def parse(prompt: str) -> Asked | None:
    """What a prompt of this form asks for; None where it is written otherwise."""
    words = prompt.lower().split()
    if len(words) != 4 or words[0] not in COUNTS or words[1] not in COLOURS or words[3] not in PLACES:
        return None
    count = COUNTS.index(words[0]) + 1
    shape = next((name for name in SHAPES if plural(name, count) == words[2]), None)
    return Asked(count, words[1], shape, words[3]) if shape else None


def asked_for(shapes: Sequence[str]) -> list[Asked]:
    """All that can be asked for with these shapes."""
    return [Asked(n, c, s, p) for s in shapes for c in COLOURS for n in (1, 2, 3) for p in PLACES]


def draw(asked: Asked, r: np.random.Generator) -> Scene:
    """A scene that shows what is asked for, on a nearly grey ground."""
    size = float(r.uniform(*SIZES[asked.count]))
    reach = 1.16 * size
    apart = 2.36 * size  # between neighbours, so that they never touch
    room = 1 - 2 * reach - apart * (asked.count - 1)
    step = apart + (r.uniform(0, 0.5) * room / (asked.count - 1) if asked.count > 1 else 0.0)
    along_y = asked.place in ("left", "right") or (asked.place == "centre" and r.random() < 0.5)
    length = step * (asked.count - 1)
    if asked.place == "centre":
        first, across = 0.5 - length / 2 + r.uniform(-0.02, 0.02), 0.5 + r.uniform(-0.04, 0.04)
    else:
        first = reach + r.uniform(0, 1) * max(0.0, 1 - 2 * reach - length)
        across = r.uniform(reach, max(reach + 0.01, 0.36))
        across = 1 - across if asked.place in ("right", "bottom") else across
    paint = rgb(COLOURS[asked.colour] + r.uniform(-8, 8), r.uniform(0.8, 1.0), r.uniform(0.8, 1.0))
    things = []
    for i in range(asked.count):
        x, y = (across, first + i * step) if along_y else (first + i * step, across)
        things.append(Thing(asked.shape, asked.colour, float(x), float(y), size, float(r.uniform(-TILT, TILT)), paint))
    level = r.uniform(0.1, 0.8)
    ground = [rgb(r.uniform(0, 360), r.uniform(0, 0.08), v) for v in (level, level + 0.1)]
    return Scene(tuple(things), str(r.choice(["plain", "graded"])), (ground[0], ground[1]), r.uniform(0, 2 * np.pi))


class Prompted(Sequence[Example]):
    """`size` prompted images of one split, drawn when they are asked for; prompts take turns in a shuffled order."""

    def __init__(self, shapes: Sequence[str], split: str, size: int, per_prompt: int | None = None) -> None:
        self.split, self.size = split, size
        every = asked_for(shapes)
        turns = np.random.default_rng(derive("scenes", "turns", *shapes)).permutation(len(every))
        self.asked = [every[i] for i in turns][: None if per_prompt is None else max(1, size // per_prompt)]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self.size:
            raise IndexError(index)
        asked = self.asked[index % len(self.asked)]
        r = np.random.default_rng(derive("scenes", self.split, asked.prompt, index))
        return {"image": render(draw(asked, r)), "prompt": asked.prompt}


def build(knobs: dict[str, Any], domain: str) -> Splits:
    """Images of the new shapes (or the known ones, or one alone); images of the known ones are what may be forgotten."""
    shapes = {"new": NEW, "known": KNOWN}.get(knobs["shapes"], [knobs["shapes"]])
    held_out = Prompted(KNOWN, "heldout", 500)
    train = Prompted(shapes, "train", knobs["size"])
    return Splits(train, Prompted(shapes, "validation", 500), Prompted(shapes, "test", 500), held_out, "known shapes")


def pretraining(knobs: dict[str, Any], domain: str) -> Splits:
    """What tiny-sd and tiny-dit are pretrained on."""
    held_out = Prompted(KNOWN, "heldout", 500)
    return Splits(Prompted(KNOWN, "pretraining", knobs["size"]), held_out, Prompted(KNOWN, "test", 500), held_out, "known shapes")


# ---------------------------------------------------------------------------------------------------------------------
# reading


CANON = 16
"""Pixels of the side on which silhouettes are compared."""
SPAN = 2.6
"""What that side shows of a silhouette, in square roots of its area."""
CHROMA = 0.3
"""Least difference of a pixel's largest and smallest channel in a thing."""
SPECK = 10
"""Regions of fewer pixels are noise."""
ANGLES = 9


@dataclass(frozen=True)
class Seen:
    """What an image shows: things, the colour and shape that most of them have (None where nothing is), their centre."""

    count: int
    colour: str | None
    shape: str | None
    x: float
    y: float

    def words(self) -> str:
        """`2 red circles left`."""
        if not self.count or self.shape is None:
            return "nothing"
        across = "left" if self.x < 0.45 else "right" if self.x > 0.55 else ""
        down = "top" if self.y < 0.45 else "bottom" if self.y > 0.55 else ""
        return f"{self.count} {self.colour} {plural(self.shape, self.count)} {f'{down} {across}'.strip() or 'centre'}"

    def shows(self, asked: Asked) -> dict[str, bool]:
        """Which of what was asked for is there."""
        inside = {
            "left": self.x < 0.45, "right": self.x > 0.55, "top": self.y < 0.45, "bottom": self.y > 0.55,
            "centre": max(abs(self.x - 0.5), abs(self.y - 0.5)) < 0.1,
        }  # fmt: skip
        place = self.count > 0 and inside[asked.place]
        return {
            "count": self.count == asked.count, "colour": self.colour == asked.colour,
            "shape": self.shape == asked.shape, "place": place,
        }  # fmt: skip


def silhouettes(weight: Tensor) -> Tensor:
    """Regions brought to one size and centre: (n, h, w) from 0 to 1 to (n, CANON * CANON), centred and of unit length."""
    n, height, width = weight.shape
    ys, xs = torch.meshgrid(*((torch.arange(s) + 0.5) / s * 2 - 1 for s in (height, width)), indexing="ij")
    area = weight.sum((1, 2)).clamp_min(1e-6)
    x, y = (weight * xs).sum((1, 2)) / area, (weight * ys).sum((1, 2)) / area
    span = SPAN / 2 * area.sqrt() / torch.tensor([width, height]).float().mean() * 2
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = span
    theta[:, 0, 2], theta[:, 1, 2] = x, y
    grid = F.affine_grid(theta, [n, 1, CANON, CANON], align_corners=False)
    flat = F.grid_sample(weight[:, None], grid, align_corners=False).flatten(1)
    flat = flat - flat.mean(1, keepdim=True)
    return flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-6)


@functools.cache
def templates() -> Tensor:
    """Silhouettes of all shapes at several angles, as small as they are drawn, (shapes * ANGLES, CANON * CANON)."""
    angles = np.linspace(-TILT, TILT, ANGLES)
    drawn = [coverage(Thing(name, "red", 0.5, 0.5, 0.17, float(a), (1.0, 0.0, 0.0)), SIDE) for name in SHAPES for a in angles]
    return silhouettes(torch.tensor(np.stack(drawn), dtype=torch.float32).view(-1, SIDE, SIDE))


def regions(mask: Tensor) -> Tensor:
    """Connected regions of a mask (n, h, w): each pixel has its region's number, 0 outside; neighbours share a side."""
    _, height, width = mask.shape
    number = torch.arange(1, height * width + 1, dtype=torch.float32).view(1, height, width) * mask
    while True:
        grown = number
        for shift in ((1, 1, 0, 0), (0, 0, 1, 1)):
            kernel = (1, 3) if shift[0] else (3, 1)
            grown = F.max_pool2d(F.pad(grown, shift), kernel, stride=1)
        grown = grown * mask
        if torch.equal(grown, number):
            return number.long()
        number = grown


@torch.no_grad()
def read(images: Tensor) -> list[Seen]:
    """What images show; (n, 3, h, w) from 0 to 1."""
    images = images.detach().float().cpu()
    least = images.amin(1)
    chroma = images.amax(1) - least
    number = regions((chroma > CHROMA).float())
    hues = torch.tensor([rgb(hue, 1.0, 1.0) for hue in COLOURS.values()])
    hues = hues / hues.norm(dim=1, keepdim=True)
    ys, xs = torch.meshgrid(*((torch.arange(s) + 0.5) / s for s in number.shape[1:]), indexing="ij")
    speck = SPECK * number[0].numel() / SIDE**2
    out = []
    for image, low, strength, numbers in zip(images, least, chroma, number, strict=True):
        found, sizes = numbers.flatten().unique(return_counts=True)
        masks = [numbers == i for i, size in zip(found.tolist(), sizes.tolist(), strict=True) if i and size >= speck]
        if not masks:
            out.append(Seen(0, None, None, 0.5, 0.5))
            continue
        weights = torch.stack([_soft(strength, mask) for mask in masks])
        fit = (silhouettes(weights) @ templates().T).view(len(masks), len(SHAPES), ANGLES).amax(2)
        tints = torch.stack([((image - low) * mask).sum((1, 2)) for mask in masks])
        shapes, colours = fit.argmax(1), (tints @ hues.T).argmax(1)
        whole = torch.stack(masks).any(0).float()
        x, y = (float((whole * axis).sum() / whole.sum()) for axis in (xs, ys))
        out.append(Seen(len(masks), list(COLOURS)[_most(colours)], list(SHAPES)[_most(shapes)], x, y))
    return out


def _soft(strength: Tensor, mask: Tensor) -> Tensor:
    """How much of each pixel a region covers: its edge included, by how colourful the edge is."""
    near = F.max_pool2d(mask[None, None].float(), 3, stride=1, padding=1)[0, 0]
    full = strength[mask].median().clamp_min(1e-3)
    return (strength / full).clamp(0, 1) * near


def _most(numbers: Tensor) -> int:
    return int(numbers.mode().values)


def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Which of count, colour, shape and place each image shows as its prompt asks, (n, 4) of 0 and 1.

    Raises ValueError for a prompt that is written otherwise.
    """
    rows = []
    for seen, prompt in zip(read(images), prompts, strict=True):
        asked = parse(prompt)
        if asked is None:
            raise ValueError(f"'{prompt}' is not of the form '{COUNTS[0]} {next(iter(COLOURS))} {KNOWN[0]} {PLACES[0]}'")
        rows.append([float(seen.shows(asked)[name]) for name in ASKED])
    return torch.tensor(rows)
