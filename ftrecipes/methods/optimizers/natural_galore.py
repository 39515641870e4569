"""Natural GaLore: Accelerating GaLore for memory-efficient LLM Training and Fine-tuning (arXiv 2410.16029).

GaLore, but Adam is given natural gradients of the subspace: the projected gradient times the inverse of a damped
empirical Fisher matrix, which is made of the last s projected gradients, the present one included. With g = vec(R) of
k numbers and G = [g_1 … g_s] (k, s), one matrix for each weight,

    ng = (lambda I + G G')^-1 g = g / lambda - G S^-1 G' g / lambda^2,   S = I + G' G / lambda  (s, s)       (Woodbury)
       = G (lambda I + G' G)^-1 e,   as g is the column e of G

The last form is what is computed: it needs one pass over the history and does not subtract two large numbers that are
nearly equal, which the middle one does where lambda is far below ||g||^2. The history is a ring of s rows; rows that
are still empty change nothing. All s x s systems of a step are solved together, in float64.

The paper projects one side as GaLore does; the released code both sides (`projector: tucker`, R (r, r)). It takes a
history over a change of basis as it is (`history_on_refresh: keep`), though its vectors then belong to another basis.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ftrecipes.methods.optimizers.projected import Bases, ProjectedAdamW, ProjectedMethod
from ftrecipes.update import wide

if TYPE_CHECKING:
    from ftrecipes.run import Run


class NaturalGaLore(ProjectedMethod):
    """GaLore with natural gradients of the subspace."""

    natural_history: int
    lambda_damping: float
    projector: str
    history_on_refresh: str

    def prepare(self, run: Run) -> None:
        self.proj_type = {"one_sided": "std", "tucker": "full"}[self.projector]
        super().prepare(run)

    def build(self, groups: list[dict[str, Any]], run: Run) -> NaturalAdamW:
        history: dict[str, Any] = {"history": self.natural_history, "damping": self.lambda_damping, "on_refresh": self.history_on_refresh}
        return NaturalAdamW(groups, count=run.count, **self.settings(), **history)

    def numbers(self, shape: torch.Size) -> int:
        m, n, r = *shape, self.rank
        return super().numbers(shape) + self.natural_history * (r * r if self.projector == "tucker" else r * max(m, n))


class NaturalAdamW(ProjectedAdamW):
    """ProjectedAdamW on natural gradients. history: s, 0 for none. damping: lambda."""

    def __init__(self, groups: list[dict[str, Any]], *, history: int, damping: float, on_refresh: str, **settings: Any) -> None:
        super().__init__(groups, **settings)
        self.history, self.damping, self.on_refresh = history, damping, on_refresh

    def transform(self, group: dict[str, Any], params: list[Tensor], projected: list[Tensor]) -> list[Tensor]:
        if not self.history:
            return projected
        grams, rows = [], []
        for parameter, R in zip(params, projected, strict=True):
            state = self.state[parameter]
            if "history" not in state:
                state["history"] = R.new_zeros(self.history, R.numel())
            rows.append(state["step"] % self.history)
            state["history"][rows[-1]] = R.flatten()
            G = wide(state["history"])
            grams.append(G @ G.T)
        weights = self.solve(torch.stack(grams).double(), torch.tensor(rows, device=grams[0].device))
        self.count("natural_steps")
        out = []
        for parameter, R, w in zip(params, projected, weights, strict=True):
            G = wide(self.state[parameter]["history"])
            out.append((w.to(G.dtype) @ G).view_as(R).to(R.dtype))
        return out

    def solve(self, grams: Tensor, rows: Tensor) -> Tensor:
        """(lambda I + G' G)^-1 e for each Gram matrix (count, s, s) and the row of its present gradient (count,); (count, s).

        By eigenvalues, since rounding can leave a Gram matrix of nearly equal gradients with negative ones.
        """
        values, V = torch.linalg.eigh(grams)
        e = V.gather(1, rows.view(-1, 1, 1).expand(-1, 1, self.history))  # (count, 1, s): the rows' parts
        return (V * (e / (values.clamp_min(0) + self.damping)[:, None])).sum(-1)

    def refreshed(self, parameter: Tensor, old: Bases, new: Bases) -> None:
        if "history" not in self.state[parameter] or self.on_refresh == "keep":
            return
        history = self.state[parameter]["history"]
        if self.on_refresh == "reset":
            history.zero_()
            return
        past = history.view(self.history, *self.state[parameter]["exp_avg"].shape)
        if old.P is not None and new.P is not None:
            past = (new.P.T @ old.P) @ past
        if old.Q is not None and new.Q is not None:
            past = past @ (old.Q.T @ new.Q)
        history.copy_(past.flatten(1))
