"""LIFT: LIFT the Veil for the Truth: Principal Weights Emerge after Rank Reduction (arXiv 2506.00772).

The entries of a weight that are largest *after* truncating it to a low rank are the ones worth training. For every
linear weight W (m x n) of the blocks, with W_r its best approximation of rank `filter_rank`:

    train the k = min((m + n) * rank_budget, m n) entries with the largest |W_r|

as many numbers as LoRA of that rank has. Every `update_interval` updates the selection is made again from the current W;
entries in both selections keep their moments, newcomers start at zero, a leaver stays where it was moved to. The
optimizer is Adam with eps outside the bias correction and a step counter that a new selection does not reset.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ftrecipes.methods.selection.sparse import SparseMethod, largest

if TYPE_CHECKING:
    from ftrecipes.anatomy import Part
    from ftrecipes.run import Run


class LIFT(SparseMethod):
    """Trains principal weights."""

    rank_budget: int
    filter_rank: int
    update_interval: int
    betas: list[float]
    eps: float
    svd: str

    def select(self, run: Run, part: Part) -> Tensor:
        W = part.weight.detach().flatten(1)
        m, n = W.shape
        k = min((m + n) * self.rank_budget, m * n)
        if W.is_meta:
            return largest(W, k)
        rng = run.generator("lift", part.name, run.step)
        return largest(low_rank(W, self.filter_rank, exact=self.svd == "exact", rng=rng).abs(), k)

    def due(self, run: Run) -> bool:
        return (run.step + 1) % self.update_interval == 0

    def optimizer(self, run: Run, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return SparseAdam(groups, betas=(self.betas[0], self.betas[1]), eps=self.eps)


def low_rank(W: Tensor, rank: int, *, exact: bool = True, rng: torch.Generator | None = None) -> Tensor:
    """The best approximation of W of this rank, float32; randomized with two power iterations when not exact."""
    W = W.float()
    if exact:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        return (U[:, :rank] * S[:rank]) @ Vh[:rank]
    q = min(2 * rank, *W.shape)
    Q = torch.linalg.qr(W @ torch.randn(W.shape[1], q, generator=rng).to(W)).Q
    for _ in range(2):
        Q = torch.linalg.qr(W @ torch.linalg.qr(W.T @ Q).Q).Q
    U, S, Vh = torch.linalg.svd(Q.T @ W, full_matrices=False)
    return (Q @ (U[:, :rank] * S[:rank])) @ Vh[:rank]


class SparseAdam(torch.optim.Optimizer):
    """Adam over compact vectors: w -= lr sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + eps), decay of the chosen entries."""

    def __init__(self, params: Any, betas: tuple[float, float], eps: float) -> None:
        super().__init__(params, {"betas": betas, "eps": eps, "lr": 0.0, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = [p.grad for p in params]
            for p in params:
                if not self.state[p]:
                    self.state[p] = {"m": torch.zeros_like(p), "v": torch.zeros_like(p), "t": 0}
                self.state[p]["t"] += 1
            m, v = [self.state[p]["m"] for p in params], [self.state[p]["v"] for p in params]
            b1, b2 = group["betas"]
            torch._foreach_mul_(m, b1)
            torch._foreach_add_(m, grads, alpha=1 - b1)
            torch._foreach_mul_(v, b2)
            torch._foreach_addcmul_(v, grads, grads, value=1 - b2)
            denominator = torch._foreach_sqrt(v)
            torch._foreach_add_(denominator, group["eps"])
            sizes = [-group["lr"] * math.sqrt(1 - b2 ** self.state[p]["t"]) / (1 - b1 ** self.state[p]["t"]) for p in params]
            torch._foreach_addcdiv_(params, m, denominator, sizes)
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
