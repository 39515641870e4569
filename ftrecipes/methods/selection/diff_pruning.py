"""Parameter-Efficient Transfer Learning with Diff Pruning (arXiv 2012.07463).

A task is a sparse difference on top of the pretrained weights. Every entry has a gate whose expected number of open ones
is penalised; the difference is then cut to a target density by magnitude, and what is left is tuned once more.

    theta = theta_pre + z_g z w        w = 0 and logits a = a_g = 5 at first, a_g one per tensor, the task's head ungated
    z = clip(s (r - l) + l, 0, 1),  s = sigmoid(log u - log(1 - u) + a),  u ~ U(0, 1)        (hard concrete, (l, r) = (-1.5, 1.5))
    stage 1   loss + lambda sum_i P(z_i > 0) + lambda sum_g P(z_g > 0),   P(z > 0) = sigmoid(a - log(-l / r))
    stage 2   of |theta - theta_pre|, with the gates drawn once more, the largest `target_sparsity` of all gated entries stay
    stage 3   theta = theta_pre + mask w, from stage 1's w; only w on the mask trains

The penalty above is that of the authors' code, whose scripts `lambda` comes from; the paper multiplies the probability of
an entry with that of its tensor (`penalty: product`). One draw of the gates serves the forward passes and both gradients
of an update. w and the logits have an AdamW of their own, the logits at a constant rate, each clipped by itself. The
record holds positions and values of the difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ftrecipes.errors import RunFailed, UserError
from ftrecipes.method import Method
from ftrecipes.optim import Together
from ftrecipes.rng import generator
from ftrecipes.update import wide

if TYPE_CHECKING:
    from ftrecipes.run import Run

GATED, FIXED = "gated", "fixed mask"
LANGUAGE = ("causal-lm", "seq2seq")
"""Domains whose head is a pretrained part of the model and not the task's own."""


class Diff:
    """The difference of one tensor: w, logits and last draw s while gated; positions and w of the mask when it is fixed."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.theta = parameter
        self.pre = parameter.detach().clone()
        self.w = wide(torch.zeros_like(self.pre))
        self.index: Tensor | None = None

    def gate(self, start: float, structured: bool) -> None:
        self.a = torch.full_like(self.w, start)
        self.group = torch.full((1,), start, dtype=self.w.dtype, device=self.w.device) if structured else None
        self.s = self.s_group = torch.empty(0)

    def logits(self) -> list[Tensor]:
        return [] if self.index is not None else [self.a, *([self.group] if self.group is not None else [])]

    def fix(self, index: Tensor, values: Tensor) -> None:
        """Only these entries differ from now on; the start of the others is in theta."""
        self.theta.detach().copy_(self.pre)
        self.pre, self.index, self.w = self.pre.flatten()[index], index, values
        self.a = self.s = self.s_group = torch.empty(0)
        self.group = None
        self.write()

    def write(self) -> None:
        """theta = theta_pre + w on the mask."""
        assert self.index is not None
        self.theta.detach().view(-1)[self.index] = (wide(self.pre) + self.w).to(self.theta.dtype)


class DiffPruning(Method):
    """Learns which entries differ."""

    picks = True
    sparsity_pen: float
    penalty_form: str
    target_sparsity: float
    structured: bool
    concrete: list[float]
    alpha_init: float
    alpha_lr: float
    max_grad_norm: float
    fixmask_share: float
    fixmask_lr_scale: float
    ungated: list[str] | None

    def prepare(self, run: Run) -> None:
        self.begin_with(run)
        for diff in self.diffs.values():
            diff.gate(self.alpha_init, self.structured)

    def begin_with(self, run: Run) -> None:
        """Every tensor trains, and all but the task's head through a difference."""
        low, high = self.concrete
        if not low < 0 < 1 <= high:
            raise UserError(f"{self.key}.concrete={self.concrete}: gates close and open fully only where l < 0 and r >= 1")
        run.model.requires_grad_(True)
        roles = self.ungated if self.ungated is not None else [] if run.task.domain in LANGUAGE else ["head"]
        free = {id(p) for part in run.anatomy.parts if part.role in roles for p in part.module.parameters(recurse=False)}
        free |= {id(run.model.get_parameter(name)) for name in run.loaded.fresh}
        self.stage = GATED
        self.diffs = {name: Diff(p) for name, p in run.model.named_parameters() if id(p) not in free}

    def drive(self, run: Run, fit: Callable[..., Any]) -> None:
        second = round(run.planned_steps * self.fixmask_share)
        fit(run.planned_steps - second, name=GATED)
        run.once("diff_pruning", lambda: self.project(run))
        if second:
            fit(second, name=FIXED)

    # -- stage 1 --------------------------------------------------------------------------------------------------

    def begin(self, run: Run) -> None:
        if self.stage == GATED and not any(diff.theta.is_meta for diff in self.diffs.values()):
            self.draw(run)
            run.count("draws")

    @torch.no_grad()
    def draw(self, run: Run) -> None:
        """Draw the gates and put theta where they say."""
        rngs: dict[torch.device, torch.Generator] = {}
        for diff in self.diffs.values():
            device = diff.w.device
            if device not in rngs:
                rngs[device] = generator(run.seed, "gates", run.fit_index, run.step, device=device)
            rng = rngs[device]
            diff.s = draw(diff.a, rng)
            z = self.stretch(diff.s)
            if diff.group is not None:
                diff.s_group = draw(diff.group, rng)
                z = z * self.stretch(diff.s_group)
            diff.theta.copy_(wide(diff.pre) + z * diff.w)

    def stretch(self, s: Tensor) -> Tensor:
        """z of a draw s."""
        low, high = self.concrete
        return (s * (high - low) + low).clamp(0, 1)

    def slope(self, s: Tensor) -> Tensor:
        """dz / da at a draw s: zero where z is clipped."""
        low, high = self.concrete
        stretched = s * (high - low) + low
        return (high - low) * s * (1 - s) * ((stretched > 0) & (stretched < 1))

    def open(self, a: Tensor) -> Tensor:
        """P(z > 0)."""
        low, high = self.concrete
        return torch.sigmoid(a - math.log(-low / high))

    @torch.no_grad()
    def gradients_of_gates(self, run: Run) -> None:
        """From dL/dtheta to gradients of w and of the logits, penalty included."""
        expected: Tensor | float = 0.0
        entries = 0
        for diff in self.diffs.values():
            g = diff.theta.grad
            if g is None:
                g = torch.zeros_like(diff.theta)
            g = wide(g)
            if diff.index is not None:
                diff.w.grad = g.flatten()[diff.index]
                continue
            z, open_ = self.stretch(diff.s), self.open(diff.a)
            z_group: Tensor | float = self.stretch(diff.s_group) if diff.group is not None else 1.0
            diff.w.grad = g * z * z_group
            diff.a.grad = g * diff.w * z_group * self.slope(diff.s)
            of_entries: Tensor | float = 1.0
            if diff.group is not None:
                open_group = self.open(diff.group)
                of_group = open_.sum() if self.penalty_form == "product" else 1.0
                diff.group.grad = (g * diff.w * z).sum() * self.slope(diff.s_group) + self.sparsity_pen * of_group * open_group * (
                    1 - open_group
                )
                of_entries = open_group if self.penalty_form == "product" else 1.0
                expected = expected + open_.sum() * open_group
            else:
                expected = expected + open_.sum()
            diff.a.grad += self.sparsity_pen * of_entries * open_ * (1 - open_)
            entries += open_.numel()
        if entries:
            run.log("diff/expected_density", expected / entries)

    def optimizer(self, run: Run, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        own = {id(diff.theta): diff.w for diff in self.diffs.values()}
        scale = self.fixmask_lr_scale if self.stage == FIXED else 1.0
        w = [{**g, "params": [own.get(id(p), p) for p in g["params"]], "peak": g["peak"] * scale} for g in groups]
        logits = [a for diff in self.diffs.values() for a in diff.logits()]
        return GatedAdamW(self, run, w, logits)

    # -- stage 2 --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def project(self, run: Run) -> dict[str, float]:
        """Keep the largest differences over all tensors and drop the rest; where many are equal, the first of them."""
        self.draw(run)
        sizes = {name: wide(diff.theta.detach() - diff.pre).abs() for name, diff in self.diffs.items()}
        entries = sum(size.numel() for size in sizes.values())
        budget = int(self.target_sparsity * entries)
        below, threshold = cut(list(sizes.values()), budget)
        left = budget - sum(int((size > threshold).sum()) for size in sizes.values())
        kept = 0
        for name, diff in self.diffs.items():
            size = sizes.pop(name).flatten()
            keep = size > threshold
            equal = ((size > below) & ~keep).nonzero().flatten()[:left]
            keep[equal], left = True, left - len(equal)
            index = keep.nonzero().flatten()
            diff.fix(index, diff.w.flatten()[index].clone())
            kept += len(index)
        if not kept:
            raise RunFailed(f"{self.key}: of {entries} entries none is left; raise method.{self.key}.target_sparsity or train longer")
        self.stage = FIXED
        run.count("projections")
        return {"kept": kept, "entries": entries, "threshold": threshold}

    def updated(self, run: Run) -> None:
        if self.stage == FIXED:
            for diff in self.diffs.values():
                diff.write()

    def finish(self, run: Run) -> None:
        run.touched -= set(self.diffs)  # the record holds positions and values

    # -- saving ---------------------------------------------------------------------------------------------------

    def writes(self) -> set[str]:
        return set(self.diffs)

    def structure(self) -> dict[str, Any]:
        if self.stage == GATED:
            return {"stage": GATED}
        return {"stage": FIXED, "diffs": {name: {"index": diff.index.int(), "w": diff.w} for name, diff in self.diffs.items()}}  # type: ignore[union-attr]

    def restore(self, run: Run, structure: dict[str, Any]) -> None:
        if structure["stage"] == GATED:
            self.prepare(run)
            return
        self.begin_with(run)
        self.stage = FIXED
        for name, diff in self.diffs.items():
            saved = structure["diffs"][name]
            diff.fix(saved["index"].long().to(diff.w.device), saved["w"].to(diff.w))

    def state_dict(self) -> dict[str, Any]:
        if self.stage == FIXED:
            return {}
        return {name: {"w": diff.w, "a": diff.a, "group": diff.group} for name, diff in self.diffs.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, saved in state.items():
            diff = self.diffs[name]
            diff.w.copy_(saved["w"])
            diff.a.copy_(saved["a"])
            if diff.group is not None:
                diff.group.copy_(saved["group"])


class GatedAdamW(Together):
    """AdamW over the differences (and the head) and, at a constant rate, over the logits; each group of gradients is clipped."""

    def __init__(self, method: DiffPruning, run: Run, groups: list[dict[str, Any]], logits: list[Tensor]) -> None:
        self.method, self.run, self.logits = method, run, logits
        parts = [torch.optim.AdamW(groups, foreach=True)]
        if logits:
            rate = method.alpha_lr
            parts.append(torch.optim.AdamW([{"params": logits, "lr": rate, "peak": rate}], weight_decay=0.0, foreach=True))
        super().__init__(list(parts))

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.method.gradients_of_gates(self.run)
        for part in self.parts:
            tensors = [t for group in part.param_groups for t in group["params"]]
            nn.utils.clip_grad_norm_(tensors, self.method.max_grad_norm)
        for part in self.parts[1:]:
            part.param_groups[0]["lr"] = self.method.alpha_lr
        super().step()
        for part in self.parts:
            part.zero_grad()


def draw(a: Tensor, rng: torch.Generator) -> Tensor:
    """s = sigmoid(log u - log(1 - u) + a) for uniform u between 1e-4 and 1 - 1e-4."""
    u = torch.rand(a.shape, generator=rng, dtype=a.dtype, device=a.device).clamp_(1e-4, 1 - 1e-4)
    return torch.sigmoid(u.logit() + a)


def cut(sizes: list[Tensor], k: int, rounds: int = 60) -> tuple[float, float]:
    """(below, threshold), by bisection: at most k entries lie above the threshold; those between are equal up to rounding."""
    low, high = 0.0, max(float(size.max()) for size in sizes if size.numel())
    if sum(int((size > low).sum()) for size in sizes) <= k:
        return low, low
    for _ in range(rounds):
        middle = (low + high) / 2
        if sum(int((size > middle).sum()) for size in sizes) <= k:
            high = middle
        else:
            low = middle
    return low, high
