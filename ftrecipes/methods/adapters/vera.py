"""VeRA: Vector-based Random Matrix Adaptation (arXiv 2310.11454).

Two random matrices, A (r x in) and B (out x r), are drawn once, frozen, and shared by all layers; each layer trains two
vectors that scale their rows:

    W' = W + diag(b) B diag(d) A,   d (r) = d_initial, b (out) = 0, so W' = W at the start

A and B are Kaiming uniform and as large as the largest target; a smaller layer takes their first columns and rows. They
are not saved: `projection_seed` draws them again, as in `peft` with the same key.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ftrecipes.method import parts_of
from ftrecipes.methods.adapters.delta import Delta, DeltaMethod, Factors, Layer, linear

if TYPE_CHECKING:
    from ftrecipes.anatomy import Part
    from ftrecipes.run import Run


class Vectors(Delta):
    """diag(b) B diag(d) A."""

    A: Tensor
    B: Tensor

    def __init__(self, layer: Layer, method: Any, rng: Callable[[str], torch.Generator]) -> None:
        super().__init__(layer, method, rng)
        A, B = method.shared
        self.register_buffer("A", A, persistent=False)
        self.register_buffer("B", B, persistent=False)
        self.d = self.parameter(method.rank, init=lambda t: t.fill_(method.d_initial))
        self.b = self.parameter(layer.shape[0])
        self.dropout = torch.nn.Dropout(method.dropout)

    def sliced(self) -> tuple[Tensor, Tensor]:
        """This layer's share of the random matrices: B (rows x r), A (r x cols)."""
        rows, cols = self.layer.shape
        return self.B[:rows], self.A[:, :cols]

    def delta(self) -> Tensor:
        B, A = self.sliced()
        return (self.b[:, None] * B) @ (self.d[:, None] * A)

    def factors(self) -> Factors | None:
        B, A = self.sliced()
        return Factors(self.b[:, None] * B, self.d[:, None] * A, self.strength)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if x.is_floating_point():
            x = self.dropout(x)
        B, A = self.sliced()
        h = self.layer.into(x, A)
        return y + self.b.to(y.dtype) * linear(self.d.to(h.dtype) * h, B)


class VeRA(DeltaMethod):
    """Scaling vectors around shared random matrices."""

    module = Vectors
    rank: int
    projection_seed: int

    def prepare(self, run: Run) -> None:
        self.draw(parts_of(run, self, self.targets, self.blocks))
        super().prepare(run)

    def restore(self, run: Run, structure: dict[str, Any]) -> None:
        self.draw(part for part in run.anatomy.parts if part.name in structure["deltas"])
        super().restore(run, structure)

    def draw(self, parts: Iterable[Part]) -> None:
        """The random matrices for the largest of these parts, on their device."""
        layers = [Layer(part.name, part.module) for part in parts]
        rows, cols = (max(layer.shape[side] for layer in layers) for side in (0, 1))
        rng = torch.Generator().manual_seed(self.projection_seed)
        self.shared = tuple(
            torch.empty(shape).uniform_(-bound, bound, generator=rng).to(layers[0].device, layers[0].dtype)
            for shape, bound in (((self.rank, cols), math.sqrt(6 / cols)), ((rows, self.rank), math.sqrt(6 / self.rank)))
        )
