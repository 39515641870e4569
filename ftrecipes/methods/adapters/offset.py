"""Low-rank updates that start with both factors filled and leave the function as it was: W + s (B A - B0 A0).

What a paper trains on a shrunken base, s B A over W - s B0 A0, is this: the base stays bit-equal, no rounding of a new one
moves the start, and the record fits the untouched model. A paper subclasses `OffsetMethod` and gives

    factors_of(run, layer)    B0 (rows x r), A0 (r x cols) for one weight

Factors enter as differences, B A - B0 A0 = (B - B0) A + B0 (A - A0), so the start is exact and a small change of a factor
is not lost where products run in 16 bits. The start is in the record: it cannot be found again without the data, or only
up to what a decomposition leaves open.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ftrecipes.methods.adapters.delta import DeltaMethod, Factors, Layer
from ftrecipes.methods.adapters.lora import LowRank


class Offset(LowRank):
    """s (B A - B0 A0)."""

    A0: Tensor
    B0: Tensor

    def __init__(self, layer: Layer, method: Any, rng: Callable[[str], torch.Generator]) -> None:
        super().__init__(layer, method, rng)
        self.register_buffer("A0", self.A.detach().clone())
        self.register_buffer("B0", self.B.detach().clone())

    def start(self, rng: Callable[[str], torch.Generator]) -> None:
        """Zeros, until `begin` or a record fills them."""

    @torch.no_grad()
    def begin(self, B: Tensor, A: Tensor) -> None:
        """Start both the factors and what is taken off at these."""
        for mine, given in ((self.B, B), (self.B0, B), (self.A, A), (self.A0, A)):
            mine.copy_(given)

    def pair(self) -> tuple[Tensor, Tensor]:
        """The update over s as one product: (rows x 2r), (2r x cols)."""
        return torch.cat([self.B - self.B0, self.B0], 1), torch.cat([self.A, self.A - self.A0])

    def delta(self) -> Tensor:
        left, right = self.pair()
        return self.scale * left @ right

    def factors(self) -> Factors | None:
        return Factors(*self.pair(), self.scale * self.strength)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.training and self.dropout.p and x.is_floating_point():  # of what is taken off, nothing is dropped
            return y + self.scale * (self.product(self.dropout(x), self.B, self.A) - self.product(x, self.B0, self.A0))
        return y + self.scale * self.product(x, *self.pair())


class OffsetMethod(DeltaMethod):
    """Puts an `Offset` on each target and starts it."""

    module = Offset
    kinds = (nn.Linear, Conv1D, nn.Conv2d)

    def prepare(self, run: Any) -> None:
        super().prepare(run)
        for delta in self.deltas.values():
            if not delta.layer.raw.is_meta:
                cast(Offset, delta).begin(*self.factors_of(run, delta.layer))

    def factors_of(self, run: Any, layer: Layer) -> tuple[Tensor, Tensor]:
        raise NotImplementedError
