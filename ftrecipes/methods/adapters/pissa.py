"""PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models (arXiv 2404.02948).

LoRA that starts with the principal part of the weight in its factors and leaves the rest frozen, so that what trains is
what the weight mostly does. With the SVD W = U diag(S) V^T (out x in), r leading triplets and s = alpha / r:

    B0 = U_r sqrt(S_r / s) (out x r),   A0 = sqrt(S_r / s) V_r^T (r x in),   W' = (W - s B0 A0) + s B A

B = B0 and A = A0 at the start, so W' = W. The authors take alpha = r, thus s = 1. `svd_iterations` finds the triplets by a
randomized SVD, as the authors' fast option does.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ftrecipes.methods.adapters.delta import Layer
from ftrecipes.methods.adapters.offset import OffsetMethod
from ftrecipes.methods.adapters.svd import svd


class PiSSA(OffsetMethod):
    """LoRA over the principal triplets of each weight."""

    rank: int
    alpha: float | None
    svd_iterations: int | None

    def __init__(self, key: str, knobs: dict[str, Any]) -> None:
        super().__init__(key, knobs)
        if self.alpha is None:
            self.alpha = float(self.rank)

    def prepare(self, run: Any) -> None:
        super().prepare(run)
        run.count("decompositions", len(self.deltas))

    def factors_of(self, run: Any, layer: Layer) -> tuple[Tensor, Tensor]:
        rng = run.generator("pissa", layer.name)
        U, S, V = svd(layer.weight, self.rank, iterations=self.svd_iterations, rng=rng)
        assert self.alpha is not None
        root = (S * (self.rank / self.alpha)).sqrt()
        return U * root, (V * root).T
