"""AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning (arXiv 2303.10512).

Every update is a sum of triplets, kept near a singular value decomposition by a penalty, and a falling budget of triplets
over all layers goes to the most important ones:

    W' = W + s B diag(E) A,   B (out x r), A (r x in) ~ N(0, 0.02^2), E (r) = 0,   s = alpha / init_r
    penalty = orth_reg_weight * mean over all A and B of ||A A^T - I||_F, ||B^T B - I||_F

After update t (from 0), with g the gradient: I = |p g|, the smoothed J <- beta1 J + (1 - beta1) I and its unsteadiness
U <- beta2 U + (1 - beta2) |I - J|; an entry's score is J U, a triplet's that of its E and the means over its row of A and
its column of B. Every deltaT updates, E of all triplets but the best `budget` is set to zero, where

    budget = all until tinit, then (all - target)(1 - (t - tinit)/(T - tfinal - tinit))^3 + target, target_r a layer

A pruned triplet still gets gradients and may come back, until T - tfinal; then the choice is final. `peft` divides by
init_r + 1e-5, and so does this file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ftrecipes.errors import UserError
from ftrecipes.methods.adapters.delta import Delta, DeltaMethod, Factors, Layer, check_rank

if TYPE_CHECKING:
    from ftrecipes.run import Run
    from ftrecipes.tasks.base import Batch, Outputs


class Triplets(Delta):
    """s B diag(E) A."""

    def __init__(self, layer: Layer, method: Any, rng: Callable[[str], torch.Generator]) -> None:
        super().__init__(layer, method, rng)
        rank, (rows, cols) = method.init_r, layer.shape
        check_rank(method, layer, rank, "init_r")
        self.A = self.parameter(rank, cols, init=lambda t: t.normal_(0, 0.02, generator=rng("A")))
        self.B = self.parameter(rows, rank, init=lambda t: t.normal_(0, 0.02, generator=rng("B")))
        self.E = self.parameter(rank, 1)
        self.scale = method.alpha / (rank + 1e-5)
        self.dropout = nn.Dropout(method.dropout)

    def delta(self) -> Tensor:
        return self.scale * self.B @ (self.E * self.A)

    def factors(self) -> Factors | None:
        return Factors(self.B, self.E * self.A, self.scale * self.strength)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if x.is_floating_point():
            x = self.dropout(x)
        return y + self.scale * self.product(x, self.B, self.E * self.A)


class AdaLoRA(DeltaMethod):
    """Low-rank updates whose ranks follow importance under a falling budget."""

    module = Triplets
    init_r: int
    target_r: int
    tinit: float
    tfinal: float
    deltaT: int
    beta1: float
    beta2: float
    orth_reg_weight: float

    def prepare(self, run: Run) -> None:
        if self.target_r > self.init_r:
            raise UserError(f"adalora.target_r={self.target_r}: the budget falls from init_r={self.init_r}; take a smaller one")
        super().prepare(run)
        self.reset()
        self.chosen: dict[str, Tensor] = {}
        if run.data:
            total, tinit, tfinal = self.phases(run)
            if tinit >= total - tfinal:
                raise UserError(
                    f"adalora: {total} updates leave none between tinit={tinit} and the last tfinal={tfinal}; take less of either"
                )

    def phases(self, run: Run) -> tuple[int, int, int]:
        """Updates in all, before the budget falls, and after it has fallen; shares below 1 are of all."""
        total = run.planned_steps
        tinit, tfinal = (int(t * total) if t < 1 else int(t) for t in (self.tinit, self.tfinal))
        return total, tinit, tfinal

    def budget(self, run: Run, t: int) -> int:
        """Triplets that are left after update t."""
        total, tinit, tfinal = self.phases(run)
        all_, target = self.init_r * len(self.deltas), self.target_r * len(self.deltas)
        if t <= tinit:
            return all_
        if t > total - tfinal:
            return target
        return int((all_ - target) * (1 - (t - tinit) / (total - tfinal - tinit)) ** 3 + target)

    def penalty(self, run: Run, batch: Batch, outputs: Outputs) -> Tensor:
        grams = [gram for d in self.triplets() for gram in (d.A @ d.A.T, d.B.T @ d.B)]
        eye = torch.eye(self.init_r, dtype=grams[0].dtype, device=grams[0].device)
        regular = torch.stack(torch._foreach_norm([gram - eye for gram in grams])).mean()
        run.log("adalora/orth", regular.detach())
        return self.orth_reg_weight * regular

    def triplets(self) -> list[Triplets]:
        return [delta for delta in self.deltas.values() if isinstance(delta, Triplets)]

    def entries(self) -> list[Tensor]:
        """A, B, E of every layer in turn."""
        return [p for d in self.triplets() for p in (d.A, d.B, d.E)]

    # -- importance -----------------------------------------------------------------------------------------------

    def reset(self) -> None:
        self.J, self.U = ([torch.zeros_like(p) for p in self.entries()] for _ in range(2))

    @torch.no_grad()
    def updated(self, run: Run) -> None:
        t, (total, tinit, tfinal) = run.step - 1, self.phases(run)
        if t < total - tfinal:
            self.weigh()
            if t > tinit and t % self.deltaT == 0:
                self.allocate(run, self.budget(run, t))
        elif t == total - tfinal:
            self.allocate(run, self.budget(run, t))
            self.reset()
        else:
            self.mask()

    def weigh(self) -> None:
        """Smoothed sensitivity and unsteadiness of every entry, with the gradients of this update."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.entries()]
        torch._foreach_mul_(ipt := [p.detach().clone() for p in self.entries()], grads)
        torch._foreach_abs_(ipt)
        torch._foreach_lerp_(self.J, ipt, 1 - self.beta1)
        torch._foreach_sub_(ipt, self.J)
        torch._foreach_abs_(ipt)
        torch._foreach_lerp_(self.U, ipt, 1 - self.beta2)

    def scores(self) -> dict[str, Tensor]:
        """Importance of each layer's triplets (r,)."""
        products = torch._foreach_mul(self.J, self.U)
        groups = zip(products[0::3], products[1::3], products[2::3], strict=True)
        return {name: A.mean(1) + B.mean(0) + E[:, 0] for name, (A, B, E) in zip(self.deltas, groups, strict=True)}

    def allocate(self, run: Run, budget: int) -> None:
        """Keep the best triplets of all layers, `budget` of them; of equal ones at the edge none."""
        scores = self.scores()
        every = torch.cat([*scores.values()])
        surplus = len(every) - budget
        if surplus:
            edge = every.kthvalue(surplus).values
            self.chosen = {name: score > edge for name, score in scores.items()}
            self.mask()
        run.log("adalora/budget", budget)
        run.count("allocations")

    def mask(self) -> None:
        """Set E of what is not chosen to zero."""
        for name, keep in self.chosen.items():
            E = self.deltas[name].E
            assert isinstance(E, Tensor)
            E.mul_(keep.to(E.device)[:, None])

    def finish(self, run: Run) -> None:
        run.results["adalora_ranks"] = {
            name: int(delta.E.count_nonzero()) for name, delta in zip(self.deltas, self.triplets(), strict=True)
        }

    # -- the record -----------------------------------------------------------------------------------------------

    def restore(self, run: Run, structure: dict[str, Any]) -> None:
        super().restore(run, structure)
        self.reset()
        self.chosen = {}

    def state_dict(self) -> dict[str, Any]:
        return {"J": self.J, "U": self.U, "chosen": self.chosen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for here, saved in ((self.J, state["J"]), (self.U, state["U"])):
            for own, value in zip(here, saved, strict=True):
                own.copy_(value)
        self.chosen = state["chosen"]
