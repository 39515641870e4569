"""Scaling Sparse Fine-Tuning to Large Language Models, SpIEL (arXiv 2401.16405).

Of each weight K entries differ from the pretrained ones, and which they are is learned: the entries that moved least are
dropped, others are grown, and the rest trains on. Nothing dense is kept.

    K_j = int(B numel_j / sum numel),  B = int(density * all weights of the model);   the first entries are drawn at random
    after A updates, and then A updates after every S-th:   q = int(K p),  p = 1 at first, later p = rate (1 - done / T)
    drop the q smallest |values|, which return to the pretrained weight; entries that are dropped and grown stay as they are

`ag` (accumulated gradients) grows from the K largest gradients of the phase's first backward pass, by |sum of gradients|
over the phase, which opens one update before every S-th. With n updates in a phase a grown entry starts at age n, with
m = mean g (1 - b1^n) and v = mean g^2 (1 - b2^n), so that Adam, which counts the age of each entry, divides both out again.
`ma` (momentum approximation) keeps one number per row and column of each weight, as SM3 does,

    u = min(row_r, col_c) + g^2,   row_r = max(row_r, u),  col_c = max(col_c, u),   values -= lr g / sqrt(u + eps)

and grows the entries with the largest row_r col_c. Decay pulls changes to zero: to the pretrained weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ftrecipes.errors import UserError
from ftrecipes.methods.selection.sparse import Chosen, SparseMethod
from ftrecipes.optim import Together
from ftrecipes.update import wide

if TYPE_CHECKING:
    from ftrecipes.anatomy import Part
    from ftrecipes.run import Run


class Candidates:
    """Gradients of the entries that may be grown: of this window so far, and the sums over windows of g and g^2."""

    def __init__(self, index: Tensor, total: Tensor, square: Tensor) -> None:
        self.index, self.total, self.square = index, total, square
        self.window = torch.zeros_like(total)


class SpIEL(SparseMethod):
    """Drops and grows sparse changes."""

    deltas = True
    variant: str
    density: float
    tunable: int | None
    reselection_steps: int
    selection_accumulation_steps: int
    initial_reselection_rate: float
    betas: list[float]
    eps: float | None

    def begin_with(self, run: Run) -> None:
        super().begin_with(run)
        if not self.selection_accumulation_steps < self.reselection_steps:
            raise UserError(
                f"{self.key}.selection_accumulation_steps={self.selection_accumulation_steps} must be below "
                f"{self.key}.reselection_steps={self.reselection_steps}"
            )
        self.targeted = sum(part.weight.numel() for part in self.parts.values())
        self.budget = self.tunable or int(self.density * sum(p.numel() for p in run.model.parameters()))
        if self.budget > self.targeted:
            raise UserError(f"{self.key}: {self.budget} entries were asked for and {self.key}.targets hold {self.targeted}")
        self.candidates: dict[str, Candidates] = {}
        self.updates = 0
        self.grown = False

    def select(self, run: Run, part: Part) -> Tensor:
        """K entries at random, ascending."""
        numel = part.weight.numel()
        k = self.budget * numel // self.targeted
        if not k:
            raise UserError(f"{self.key}.density={self.density}: gives {part.name} ({numel} entries) nothing; raise it")
        if part.weight.is_meta:
            return torch.empty(k, dtype=torch.long, device="meta")
        return torch.randperm(numel, generator=run.generator("spiel", part.name))[:k].sort().values

    # -- phases ---------------------------------------------------------------------------------------------------

    def open(self, done: int) -> bool:
        """Whether the update after `done` updates of the fit gathers gradients."""
        S, A = self.reselection_steps, self.selection_accumulation_steps
        return self.variant == "ag" and (done % S < A or (done + 1) % S == 0)

    def begin(self, run: Run) -> None:
        if run.fit_step == 0:
            self.candidates, self.updates = {}, 0
        for name, chosen in self.chosen.items():
            chosen.watch = self.watch(run, name) if self.open(run.fit_step) else None

    def watch(self, run: Run, name: str) -> Callable[[Tensor], None]:
        """Adds a dense gradient to what the candidates have seen; the first of a phase names them."""

        def see(gradient: Tensor) -> None:
            if name not in self.candidates:
                index = gradient.abs().topk(len(self.chosen[name].index), sorted=False).indices
                if run.update.world.rank:
                    index.zero_()
                run.update.world.sum([index])  # those of the first process
                zeros = torch.zeros(len(index), dtype=self.chosen[name].values.dtype, device=index.device)
                self.candidates[name] = Candidates(index, zeros, zeros.clone())
            found = self.candidates[name]
            scale = run.update.scaler.scale if run.update.scaler else 1.0
            found.window += wide(gradient[found.index]) / scale

        return see

    def updated(self, run: Run) -> None:
        done = run.fit_step
        if self.open(done - 1):
            run.update.world.sum([found.window for found in self.candidates.values()])
            for found in self.candidates.values():
                found.total += found.window
                found.square += found.window.square()
                found.window.zero_()
            self.updates += 1
        if done % self.reselection_steps == self.selection_accumulation_steps:
            rate = self.initial_reselection_rate * (1 - done / run.fit_steps) if self.grown else 1.0
            replaced = sum(self.regrow(run, name, part, rate) for name, part in self.parts.items())
            self.candidates, self.updates, self.grown = {}, 0, True
            run.log("spiel/rate", rate)
            run.log("spiel/replaced", replaced)
            run.count("reselections")

    @torch.no_grad()
    def regrow(self, run: Run, name: str, part: Part, rate: float) -> int:
        """Drop the entries of a weight that moved least and grow others in their places; returns how many changed."""
        chosen = self.chosen[name]
        state = next((o.state[chosen.values] for o in _parts(run.optimizer) if chosen.values in o.state), None)
        q = int(len(chosen.index) * rate)
        if state is None or not q or (self.variant == "ag" and name not in self.candidates):
            return 0
        slots = chosen.values.abs().topk(q, largest=False, sorted=True).indices
        if self.variant == "ma":
            score = torch.outer(state["row"], state["col"]).flatten()
            score[chosen.index] = -1.0
            index = score.topk(min(q, len(score) - len(chosen.index)), sorted=False).indices
            slots = slots[: len(index)]
        else:
            found = self.candidates[name]
            leaving = chosen.index[slots]
            stay = torch.ones(len(chosen.index), dtype=torch.bool, device=slots.device)
            stay[slots] = False
            free = (~torch.isin(found.index, chosen.index[stay])).nonzero().flatten()
            free = free[found.total[free].abs().topk(min(q, len(free)), sorted=True).indices]
            grown = found.index[free]
            slots = slots[~torch.isin(leaving, grown)]  # what is dropped and grown stays
            free = free[~torch.isin(grown, leaving)]
            slots, index, n = slots[: len(free)], found.index[free], self.updates
            b1, b2 = self.betas
            state["age"][slots] = n
            state["m"][slots] = found.total[free] / n * (1 - b1**n)
            state["v"][slots] = found.square[free] / n * (1 - b2**n)
        chosen.replace(part.weight, slots, index)
        return len(slots)

    def optimizer(self, run: Run, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        own = {id(chosen.values): (chosen, self.parts[name].weight) for name, chosen in self.chosen.items()}
        mine = [{**g, "params": [p for p in g["params"] if id(p) in own]} for g in groups]
        rest = [{**g, "params": [p for p in g["params"] if id(p) not in own]} for g in groups]
        mine, rest = [g for g in mine if g["params"]], [g for g in rest if g["params"]]
        b1, b2 = self.betas
        first: torch.optim.Optimizer
        if self.variant == "ma":
            first = SparseSM3(mine, {p: own[id(p)] for g in mine for p in g["params"]}, self.eps or 1e-8)
        else:
            first = AgedAdamW(mine, (b1, b2), self.eps or 1e-6)
        return Together([first, torch.optim.AdamW(rest, betas=(b1, b2))]) if rest else first

    # -- saving ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        phase = {name: {"index": c.index, "total": c.total, "square": c.square} for name, c in self.candidates.items()}
        return {"candidates": phase, "updates": self.updates, "grown": self.grown}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates, self.grown = state["updates"], state["grown"]
        for name, saved in state["candidates"].items():
            index, total, square = (saved[key].to(self.chosen[name].index.device) for key in ("index", "total", "square"))
            self.candidates[name] = Candidates(index, total, square)


def _parts(optimizer: Any) -> list[torch.optim.Optimizer]:
    return getattr(optimizer, "parts", [optimizer] if optimizer else [])


class AgedAdamW(torch.optim.Optimizer):
    """Adam in which every entry has an age t of its own, eps before the correction, decay after the step.

    values -= lr m / ((sqrt(v) + eps) (1 - b1^t) / sqrt(1 - b2^t)), then t += 1
    """

    def __init__(self, params: Any, betas: tuple[float, float], eps: float) -> None:
        super().__init__(params, {"betas": betas, "eps": eps, "lr": 0.0, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p] = {"age": torch.ones_like(p), "m": torch.zeros_like(p), "v": torch.zeros_like(p)}
            grads = [p.grad for p in params]
            age, m, v = ([self.state[p][key] for p in params] for key in ("age", "m", "v"))
            b1, b2 = group["betas"]
            torch._foreach_mul_(m, b1)
            torch._foreach_add_(m, grads, alpha=1 - b1)
            torch._foreach_mul_(v, b2)
            torch._foreach_addcmul_(v, grads, grads, value=1 - b2)
            denominator = torch._foreach_sqrt(v)
            torch._foreach_add_(denominator, group["eps"])
            for beta, root in ((b1, False), (b2, True)):
                correction = torch._foreach_pow(beta, age)
                torch._foreach_neg_(correction)
                torch._foreach_add_(correction, 1.0)
                if root:
                    torch._foreach_sqrt_(correction)
                    torch._foreach_div_(denominator, correction)
                else:
                    torch._foreach_mul_(denominator, correction)
            torch._foreach_addcdiv_(params, m, denominator, value=-group["lr"])
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(age, 1.0)


class SparseSM3(torch.optim.Optimizer):
    """SM3 over chosen entries: one accumulator per row and column of the weight, no momentum; decay after the step."""

    def __init__(self, params: Any, owners: dict[nn.Parameter, tuple[Chosen, Tensor]], eps: float) -> None:
        super().__init__(params, {"eps": eps, "lr": 0.0, "weight_decay": 0.0})
        self.owners = owners

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                chosen, weight = self.owners[p]
                cols = weight[0].numel()
                if not self.state[p]:
                    self.state[p] = {"row": p.new_zeros(len(weight)), "col": p.new_zeros(cols)}
                row, col = self.state[p]["row"], self.state[p]["col"]
                r, c = chosen.index // cols, chosen.index % cols
                u = torch.minimum(row[r], col[c]).addcmul_(p.grad, p.grad)
                row.scatter_reduce_(0, r, u, "amax")
                col.scatter_reduce_(0, c, u, "amax")
                p.addcdiv_(p.grad, u.add_(group["eps"]).sqrt_(), value=-group["lr"])
                if group["weight_decay"]:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
