"""LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters (arXiv 2405.17604).

Between frozen factors that the SVD of the weight gives, W = U S V^T (out x in), only a small square matrix trains:

    W' = W + s B R A,   B = U_r (out x r),   A = S_r V_r^T (r x in),   R (r x r) ~ N(0, 1e-5^2),   s = alpha / r

r^2 numbers a weight, whatever its size. The authors' singular values stand on the side of the inputs, as here. B and A are
not saved but found again from the weight; one number of each vector is saved, and a record with other vectors is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ftrecipes.methods.adapters.core import Core
from ftrecipes.methods.adapters.delta import Delta, DeltaMethod, Layer
from ftrecipes.methods.adapters.svd import check_probe, probe, svd

SIGMA = 1e-5
"""Standard deviation of R at the start."""


class Principal(Core):
    """s U_r R S_r V_r^T."""

    kept = False

    def __init__(self, layer: Layer, method: Any, rng: Callable[[str], torch.Generator], saved: dict[str, Any] | None = None) -> None:
        super().__init__(layer, method, rng)
        U, S, V = svd(layer.weight, method.rank, iterations=method.svd_iterations, rng=rng("svd"))
        self.probe = probe(U)
        if saved is not None:
            check_probe(method.key, layer.name, self.probe, saved["probe"])
        self.scale = (method.rank if method.alpha is None else method.alpha) / method.rank
        if U.is_meta:
            return
        self.hold(U, (V * S).T)
        with torch.no_grad():
            self.R.copy_(SIGMA * torch.randn(self.R.shape, generator=rng("R")))

    def structure(self) -> dict[str, Tensor]:
        return {"probe": self.probe}


class LoRAXS(DeltaMethod):
    """A square matrix between the leading singular vectors of each weight."""

    module = Principal
    kinds = (nn.Linear, Conv1D, nn.Conv2d)
    rank: int
    alpha: float | None
    svd_iterations: int | None

    def prepare(self, run: Any) -> None:
        super().prepare(run)
        run.count("decompositions", len(self.deltas))

    def make(self, layer: Layer, rng: Callable[[str], torch.Generator], saved: dict[str, Any] | None) -> Delta:
        return Principal(layer, self, rng, saved)
