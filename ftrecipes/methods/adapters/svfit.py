"""SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular Values (arXiv 2409.05926).

A weight W (out x in) is split into its best approximation of rank r and a frozen rest; of the approximation only the
singular values train, so each number scales a direction that the pretrained weight uses already:

    W' = U_r diag(sigma) V_r^T + W_e,   W_e = W - U_r diag(s_r) V_r^T,   sigma = s_r at the start, so W' = W

Here W stays whole and what is added is U_r diag(sigma - s_r) V_r^T: the same weight, without the rounding of W_e.
`rank` is given (null: all of them), or `energy` finds it for each weight: the smallest r whose singular values hold that
share of sum s^2. The paper says that the values it trains hold over 99 % of a matrix's information, not by which measure.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ftrecipes.errors import UserError
from ftrecipes.methods.adapters.delta import Delta, DeltaMethod, Layer, check_rank, linear
from ftrecipes.methods.adapters.svd import check_probe, probe, svd


class SingularValues(Delta):
    """U_r diag(sigma - s_r) V_r^T."""

    U: Tensor
    V: Tensor
    start: Tensor

    def __init__(self, layer: Layer, method: Any, rng: Callable[[str], torch.Generator], saved: dict[str, Any] | None = None) -> None:
        super().__init__(layer, method, rng)
        if method.rank is not None:
            check_rank(method, layer, method.rank)
        U, s, V = svd(layer.weight, method.rank)
        if method.energy is not None and not s.is_meta:
            r = enough(s, method.energy)
            U, s, V = U[:, :r], s[:r], V[:, :r]
        self.probe = probe(U)
        if saved is not None:
            check_probe(method.key, layer.name, self.probe, saved["probe"])
        self.sigma = nn.Parameter(s.clone())
        self.register_buffer("start", s, persistent=False)
        self.register_buffer("U", U.to(layer.raw.dtype), persistent=False)
        self.register_buffer("V", V.to(layer.raw.dtype), persistent=False)

    def delta(self) -> Tensor:
        return self.U.to(self.layer.dtype) * (self.sigma - self.start) @ self.V.to(self.layer.dtype).T

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.layer.into(x, self.V.T)
        return y + linear(h * (self.sigma - self.start).to(h.dtype), self.U)

    def structure(self) -> dict[str, Any]:
        return {"probe": self.probe}


def enough(s: Tensor, energy: float) -> int:
    """The smallest r with sum_(i <= r) s_i^2 >= energy * sum s_i^2."""
    held = s.double().square().cumsum(0)
    return len(s) if energy >= 1.0 else int((held < energy * held[-1]).sum()) + 1


class SVFit(DeltaMethod):
    """Trains the leading singular values of each target."""

    module = SingularValues
    kinds = (nn.Linear, Conv1D, nn.Conv2d)
    rank: int | None
    energy: float | None

    def prepare(self, run: Any) -> None:
        if self.rank is not None and self.energy is not None:
            raise UserError("svfit: rank and energy both say how many singular values train; give one of them")
        super().prepare(run)
        run.count("decompositions", len(self.deltas))

    def make(self, layer: Layer, rng: Callable[[str], torch.Generator], saved: dict[str, Any] | None) -> Delta:
        return SingularValues(layer, self, rng, saved)
