"""DoRA: Weight-Decomposed Low-Rank Adaptation (arXiv 2402.09353).

A weight W0 (out x in) is split into the length of each of its rows and their direction. The lengths m (out) train
directly, the direction through a low-rank update that is renormalised:

    V = W0 + s B A,   c_i = ||V_i||,   W' = diag(m / c) V,   m = ||W0_i|| at the start, so W' = W0

c is held constant in the backward pass (the paper's section 4.3 on training overhead; `detach_norm: false` keeps it
live). It is computed from r-sized products only:

    c^2 = ||W0_i||^2 + 2 s rowsum((W0 A^T) * B) + s^2 rowsum((B A A^T) * B)

The paper speaks of columns of a d x k weight; its code, and this file, norm the rows of the stored (out x in) weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ftrecipes.methods.adapters.delta import Delta, DeltaMethod, Layer
from ftrecipes.methods.adapters.lora import LowRank


class Magnitude(Delta):
    """diag(m / ||W0||) W0: the lengths alone."""

    m: nn.Parameter
    norm0: Tensor

    def __init__(self, layer: Layer, method: Any, rng: Callable[[str], torch.Generator]) -> None:
        super().__init__(layer, method, rng)
        norms = layer.weight.norm(dim=1)
        self.m = nn.Parameter(norms.clone())
        self.register_buffer("norm0", norms, persistent=False)

    def merged(self, weight: Tensor) -> Tensor:
        return (self.m / self.norm0)[:, None] * weight

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return _rescale(y, self.m / self.norm0, self.layer.bias)


class Decomposed(LowRank):
    """diag(m / c) (W0 + s B A)."""

    m: nn.Parameter
    norm0: Tensor

    def __init__(self, layer: Layer, method: Any, rng: Callable[[str], torch.Generator]) -> None:
        super().__init__(layer, method, rng)
        norms = layer.weight.norm(dim=1)
        self.m = nn.Parameter(norms.clone())
        self.register_buffer("norm0", norms, persistent=False)
        self.detach_norm = method.detach_norm

    def norm(self) -> Tensor:
        """c (out), float32, without a product of the size of the weight."""
        A, B, s = self.A, self.B, self.scale
        W0A = (self.layer.matrix(self.layer.raw) @ A.T.to(self.layer.raw.dtype)).float()
        squared = self.norm0**2 + 2 * s * (W0A * B).sum(1) + s**2 * ((B @ (A @ A.T)) * B).sum(1)
        return squared.clamp_min(1e-24).sqrt()

    def merged(self, weight: Tensor) -> Tensor:
        V = weight + self.scale * self.B @ self.A
        return (self.m / V.norm(dim=1))[:, None] * V

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        c = self.norm()
        q = self.m / (c.detach() if self.detach_norm else c)
        q = q.to(y.dtype)
        if x.is_floating_point() and self.dropout.p and self.training:
            # the plain W0 x is not dropped out, what is added to it is
            x = self.dropout(x)
            base = self.layer.into(x, self.layer.matrix(self.layer.raw))
            return y + (q - 1) * base + q * self.scale * self.product(x, self.B, self.A)
        return _rescale(y, q, self.layer.bias) + q * self.scale * self.product(x, self.B, self.A)


def _rescale(y: Tensor, q: Tensor, bias: Tensor | None) -> Tensor:
    """q * (y - b) + b."""
    return y * q if bias is None else torch.addcmul(bias.to(y.dtype), y - bias, q.to(y.dtype))


class DoRA(DeltaMethod):
    """DoRA on `targets`; lengths alone on `magnitude_only`."""

    module = Decomposed
    targets: list[str]
    magnitude_only: list[str]

    def prepare(self, run: Any) -> None:
        super().prepare(run)
        if self.magnitude_only:
            for part in run.anatomy.select(self.magnitude_only, self.blocks):
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

    def group(self, name: str, parameter: nn.Parameter) -> dict[str, Any]:
        """Decay would pull all lengths to zero."""
        return {"weight_decay": 0.0} if name.endswith(".delta.m") else {}
