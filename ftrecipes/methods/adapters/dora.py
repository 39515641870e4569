"""DoRA: Weight-Decomposed Low-Rank Adaptation (arXiv 2402.09353).

A weight W0 (out x in) is split into the length of each of its rows and their direction. The lengths m (out) train
directly, the direction through a low-rank update that is renormalised:

    V = W0 + s B A,   c_i = ||V_i||,   W' = diag(m / c) V,   m = ||W0_i|| at the start, so W' = W0
    y = W0 x + b + (q - 1) * W0 xd + q * s B A xd,   q = m / c,   xd = dropout(x)

c is held constant in the backward pass (the paper's section 4.3 on training overhead; `detach_norm: false` keeps it
live). It is computed from r-sized products only, in float32 whatever the activations are in:

    c^2 = ||W0_i||^2 + 2 s rowsum((W0 A^T) * B) + s^2 rowsum((B A A^T) * B)

The paper speaks of columns of a d x k weight; its code, and this file, norm the rows of the stored (out x in) weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ftrecipes.method import parts_of
from ftrecipes.methods.adapters.delta import Delta, DeltaMethod, Factors, Layer, without_autocast
from ftrecipes.methods.adapters.lora import LowRank

ROWS = 2**22
"""Numbers of a 16-bit weight that are held in float32 at a time."""


TINY = 1e-12
"""Least length of a row; a row of zeros has no direction."""


def lengths(weight: Tensor) -> Tensor:
    """Norm of each row (rows,)."""
    return weight.norm(dim=1).clamp_min(TINY)


class Magnitude(Delta):
    """diag(m / ||W0||) W0: the lengths alone."""

    norm0: Tensor

    def __init__(self, layer: Layer, method: Any, rng: Callable[[str], torch.Generator]) -> None:
        super().__init__(layer, method, rng)
        norms = lengths(layer.weight)
        self.m = nn.Parameter(norms.clone())
        self.register_buffer("norm0", norms, persistent=False)
        self.dropout = nn.Dropout(method.dropout)

    def merged(self, weight: Tensor) -> Tensor:
        return (self.m / self.norm0)[:, None] * weight

    def factors(self) -> Factors | None:
        rows, cols = self.layer.shape
        return None if self.strength != 1.0 else Factors(self.m.new_zeros(rows, 1), self.m.new_zeros(1, cols), 1.0, self.m)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        _, base = _dropped(self, x, y)
        return _lengthen(y, base, self.m / self.norm0)


class Decomposed(LowRank):
    """diag(m / c) (W0 + s B A)."""

    norm0: Tensor

    def __init__(self, layer: Layer, method: Any, rng: Callable[[str], torch.Generator]) -> None:
        super().__init__(layer, method, rng)
        norms = lengths(layer.weight)
        self.m = nn.Parameter(norms.clone())
        self.register_buffer("norm0", norms, persistent=False)
        self.detach_norm = method.detach_norm

    def norm(self) -> Tensor:
        """c (out), without a product of the size of the weight."""
        A, B, s = self.A, self.B, self.scale
        W0 = self.layer.matrix(self.layer.raw)
        with without_autocast(W0.device):
            W0A = torch.cat([rows.to(A.dtype) @ A.T for rows in W0.split(max(1, ROWS // W0.shape[1]))])
            squared = self.norm0**2 + 2 * s * (W0A * B).sum(1) + s**2 * ((B @ (A @ A.T)) * B).sum(1)
            return squared.clamp_min(TINY**2).sqrt()

    def merged(self, weight: Tensor) -> Tensor:
        V = weight + self.scale * self.B @ self.A
        return (self.m / lengths(V))[:, None] * V

    def factors(self) -> Factors | None:
        return None if self.strength != 1.0 else Factors(self.B, self.A, self.scale, self.m)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detach_norm):
            c = self.norm()
        q = self.m / c
        dropped, base = _dropped(self, x, y)
        low_rank = self.product(dropped, self.B, self.A)
        if dropped is not x:
            return _lengthen(y, base, q) + (q * self.scale).to(y.dtype) * low_rank
        # one output-sized tensor is kept for the backward pass instead of two
        new = torch.add(y, low_rank, alpha=self.scale)
        return _lengthen(new, new if base is y else torch.add(base, low_rank, alpha=self.scale), q)


def _dropped(delta: Magnitude | Decomposed, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Input after dropout and W0 times it, without the bias; where nothing is dropped the product stands in y already."""
    layer = delta.layer
    if x.is_floating_point() and delta.dropout.p and delta.training:
        x = delta.dropout(x)
        return x, layer.into(x, layer.matrix(layer.raw))
    return x, y if layer.bias is None else y - layer.bias.to(y.dtype)


def _lengthen(y: Tensor, base: Tensor, q: Tensor) -> Tensor:
    """y + (q - 1) * base. Rounded to 16 bits, q is 1 for every change of a length below 0.4 %; q - 1 keeps its digits."""
    return torch.addcmul(y, base, (q - 1).to(y.dtype))


class DoRA(DeltaMethod):
    """DoRA on `targets`; lengths alone on `magnitude_only`."""

    module = Decomposed
    targets: list[str]
    magnitude_only: list[str]

    def prepare(self, run: Any) -> None:
        if self.targets or not self.magnitude_only:
            super().prepare(run)
        for part in parts_of(run, self, self.magnitude_only, self.blocks) if self.magnitude_only else []:
            if part.name not in self.deltas:
                self.attach(run, part, {"magnitude": True})

    def make(self, layer: Layer, rng: Callable[[str], torch.Generator], saved: dict[str, Any] | None) -> Delta:
        kind = Magnitude if (saved or {}).get("magnitude") else self.module
        return kind(layer, self, rng)

    def structure(self) -> dict[str, Any]:
        out = super().structure()
        for name, delta in self.deltas.items():
            out["deltas"][name]["magnitude"] = isinstance(delta, Magnitude)
        return out
