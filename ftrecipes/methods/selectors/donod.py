"""DONOD: Robust and Generalizable Instruction Fine-Tuning for LLMs via Model-Intrinsic Dataset Pruning (arXiv 2504.14810).

What would one training step on a sample do to the model's output layer W? With g the gradient of the sample's mean token
loss with respect to W alone and W' = W - eta g,

    DON = |W|_F - |W'|_F   (delta of norm, signed),     NOD = |W' - W|_F = eta |g|_F   (norm of delta)

TOPSIS makes one rank of the two: columns divided by their length and weighted, distances D+ and D- to the ideal and the
worst corner, closeness C = D- / (D+ + D-). The share `prune_ratio` with the smallest C is dropped; no second model, no
validation set. A small NOD is better. Which DON is better is `don`: `shrink` takes the paper at its word (a large drop of
the norm), `grow` is its mirror image and the default, because it drops wrong answers, as the paper reports of its
method, where `shrink` keeps them: a surprising answer has a large <W, g> and shrinks W most.

No gradient is formed. With logits z_t = W h_t and r_t = softmax(z_t) - onehot(y_t) at the T counted tokens,

    <W, g> = 1/T sum_t z_t · r_t,     |g|^2 = 1/T^2 sum_st (r_s · r_t)(h_s · h_t),
    |W'| - |W| = a / (sqrt(|W|^2 + a) + |W|),  a = eta^2 |g|^2 - 2 eta <W, g>

so one forward pass over the data gives everything. A tied embedding is scored as an output layer alone.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ftrecipes.errors import UserError
from ftrecipes.methods.selectors.selector import Selector
from ftrecipes.tasks.causal_lm import TokenOutputs
from ftrecipes.update import wide

if TYPE_CHECKING:
    from ftrecipes.run import Run
    from ftrecipes.tasks.base import Batch


class DONOD(Selector):
    """Drops the samples that are worst by two norms of a step on the output layer."""

    prune_ratio: float
    eta: float
    don: str
    criteria_weights: list[float]
    depends = ("eta",)

    def features(self, run: Run, batch: Batch) -> Tensor:
        """The growth |W'| - |W| and NOD of each example (n, 2)."""
        outputs = run.task.outputs(run.model, batch)
        assert isinstance(outputs, TokenOutputs)
        head: Any = outputs.head
        if outputs.scale is not None or getattr(head, "bias", None) is not None:
            raise UserError(
                f"{self.key}: the output layer of {run.settings.model.name} has more than a weight (a bias, a cap), which is not covered"
            )
        norm = float(wide(head.weight).double().norm())
        out = torch.zeros(len(batch["example"]), 2, dtype=torch.float64)
        for i in outputs.row.unique().tolist():
            at = outputs.row == i
            hidden = wide(outputs.hidden[at])
            z = hidden @ wide(head.weight).T
            r = z.softmax(-1)
            r[torch.arange(len(r)), outputs.labels[at].long()] -= 1
            T = len(r)
            inner = float((z * r).sum(dtype=torch.float64)) / T
            square = max(float(((r @ r.T).double() * (hidden @ hidden.T).double()).sum()), 0.0) / T**2
            a = self.eta**2 * square - 2 * self.eta * inner
            out[i, 0] = a / (math.sqrt(max(norm**2 + a, 0.0)) + norm)
            out[i, 1] = self.eta * math.sqrt(square)
        return out

    def choose(self, run: Run, features: Tensor) -> tuple[list[int], Tensor]:
        better = torch.tensor([1.0 if self.don == "grow" else -1.0, -1.0], dtype=torch.float64)
        closeness = topsis(features, better, torch.tensor(self.criteria_weights, dtype=torch.float64))
        n = len(features)
        count = math.floor((1 - self.prune_ratio) * n + 1e-9)
        kept = closeness.sort(descending=True, stable=True).indices[:count]
        run.count("dropped", n - count)
        return sorted(kept.tolist()), closeness


def topsis(table: Tensor, better: Tensor, weights: Tensor) -> Tensor:
    """Closeness (n,) of each row to the ideal: 1 is best in every column, 0 worst in every one, 0.5 where all rows are equal.

    better: +1 for a column whose large values are good, -1 for one whose small values are.
    """
    lengths = table.norm(dim=0)
    v = torch.where(lengths > 0, table / lengths, 0.0) * weights * better
    best, worst = v.max(0).values, v.min(0).values
    to_best, to_worst = (v - best).norm(dim=1), (v - worst).norm(dim=1)
    whole = to_best + to_worst
    return torch.where(whole > 0, to_worst / whole, 0.5)
