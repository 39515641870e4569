"""Three factors of which the small one in the middle trains: W + s B R A with B (rows x r) and A (r x cols) frozen.

A paper gives a subclass of `Core` whose __init__ calls `hold(B, A)`, or leaves that to its method once it knows them, and
fills `R`. Where B and A can be found again from the weight, `kept = False` leaves them out of the record, which then holds
r^2 numbers a weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ftrecipes.methods.adapters.delta import Delta, Factors, Layer, check_rank, linear


class Core(Delta):
    """s B R A; dropout acts on the input of A. B and A are held in the dtype of the base."""

    A: Tensor
    B: Tensor
    kept: ClassVar[bool] = True

    def __init__(self, layer: Layer, method: Any, rng: Callable[[str], torch.Generator]) -> None:
        super().__init__(layer, method, rng)
        r, (rows, cols) = method.rank, layer.shape
        check_rank(method, layer, r)
        self.R = self.parameter(r, r)
        self.register_buffer("A", layer.raw.new_zeros(r, cols), persistent=self.kept)
        self.register_buffer("B", layer.raw.new_zeros(rows, r), persistent=self.kept)
        self.scale = 1.0
        self.dropout = nn.Dropout(method.dropout)

    def hold(self, B: Tensor, A: Tensor) -> None:
        """Freeze these as the outer factors."""
        self.B.copy_(B)
        self.A.copy_(A)

    def delta(self) -> Tensor:
        dtype = self.layer.dtype
        return self.scale * self.B.to(dtype) @ self.R @ self.A.to(dtype)

    def factors(self) -> Factors | None:
        dtype = self.layer.dtype
        return Factors(self.B.to(dtype), self.R @ self.A.to(dtype), self.scale * self.strength)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if x.is_floating_point():
            x = self.dropout(x)
        return y + self.scale * linear(linear(self.layer.into(x, self.A), self.R), self.B)
