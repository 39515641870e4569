"""GMT: Gradient-Mask Tuning Elevates the Upper Limits of LLM Performance (arXiv 2406.15330).

Every update keeps only the gradient entries of largest magnitude. With Gamma the gradient of the whole window,

    M(Gamma)_ij = Gamma_ij if |Gamma_ij| >= T else 0,   T = the k-th largest |Gamma| of the tensor, k = max(1, round(keep_ratio * p))

The choice is made anew at every update; nothing is frozen for good. The masked gradient enters clipping and the
optimizer, so with AdamW a masked entry may still move by its momentum; `mask_update` undoes such moves.
`scope: global` takes one threshold for all tensors, found in a histogram of magnitudes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ftrecipes.method import Method
from ftrecipes.update import wide

if TYPE_CHECKING:
    from ftrecipes.run import Run
    from ftrecipes.update import Window


class GMT(Method):
    """Keeps the largest gradient entries of each tensor."""

    keep_ratio: float
    scope: str
    mask_update: bool
    skip: list[str]

    def prepare(self, run: Run) -> None:
        self._before: dict[str, tuple[Tensor, Tensor]] = {}

    def gradients(self, run: Run, window: Window) -> None:
        if self.keep_ratio >= 1.0:
            return
        grads = {
            name: p.grad for name, p in run.active().items()
            if p.grad is not None and not any(word in name for word in self.skip)
        }  # fmt: skip
        shared = global_threshold(list(grads.values()), self.keep_ratio) if self.scope == "global" else None
        kept = total = 0
        for name, grad in grads.items():
            magnitude = grad.abs()
            keep = magnitude >= (threshold(magnitude, self.keep_ratio) if shared is None else shared)
            keep &= magnitude != 0  # a threshold of zero would keep what has no gradient at all
            grad.mul_(keep)
            kept += int(keep.sum())
            total += keep.numel()
            if self.mask_update:
                self._before[name] = (run.trainable()[name].detach().clone(), keep)
        run.log("gmt/density", kept / total)
        run.count("masks", len(grads))

    def updated(self, run: Run) -> None:
        with torch.no_grad():
            for name, (before, keep) in self._before.items():
                parameter = run.trainable()[name]
                parameter.copy_(torch.where(keep, parameter, before))
        self._before.clear()


def threshold(magnitude: Tensor, ratio: float) -> Tensor:
    """The k-th largest entry, k = max(1, round(ratio * entries))."""
    k = max(1, round(ratio * magnitude.numel()))
    flat = magnitude.flatten()
    if flat.device.type == "cpu":
        return flat.kthvalue(flat.numel() - k + 1).values
    return flat.topk(k, sorted=False).values.min()


def global_threshold(grads: list[Tensor], ratio: float, rounds: int = 4, bins: int = 512) -> Tensor:
    """The same over all tensors, by narrowing a histogram: its error is (largest entry) / bins^rounds."""
    high = wide(torch.stack([g.abs().max().to(grads[0]) for g in grads]).max())
    low, unit = torch.zeros_like(high), torch.linspace(0, 1, bins + 1, device=high.device, dtype=high.dtype)
    k = max(1, round(ratio * sum(g.numel() for g in grads)))
    for _ in range(rounds):
        edges = unit * (high - low) + low
        counts = torch.stack([_counts(g, edges) for g in grads]).sum(0)
        above = counts.flip(0).cumsum(0).flip(0)  # entries in a bin or in a higher one, those past the end included
        at = int((above[:-1] >= k).sum()) - 1
        low, high = edges[max(at, 0)], edges[max(at, 0) + 1]
    return low


def _counts(grad: Tensor, edges: Tensor) -> Tensor:
    """Entries by bin [edge_i, edge_i+1); the last count is of those at or past the end."""
    place = torch.bucketize(grad.abs().flatten().to(edges.dtype), edges, right=True) - 1
    return torch.bincount(place[place >= 0], minlength=len(edges))
