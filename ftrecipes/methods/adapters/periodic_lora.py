"""PeriodicLoRA: Breaking the Low-Rank Bottleneck in LoRA Optimization (arXiv 2402.16141).

LoRA in stages. At the end of a stage the update is folded into the frozen weight, and adapter, optimizer and
learning-rate schedule start anew; T stages give an update of rank up to T r at the memory of one rank-r adapter.

    stage t:  A_t ~ Kaiming uniform, B_t = 0;   D_t = s B_t A_t after `stage_steps` updates
    unload:   V_t = m V_(t-1) + (1 - m) D_t,   W_t = W_(t-1) + V_t        (m = `momentum`, V_0 = 0; m = 0: W_t = W_(t-1) + D_t)

`momentum_rule: carry` folds in (1 - m) D_t and keeps m B_t, A_t in the adapter instead, so the function does not jump. The
momentum's formula is a reconstruction: of the paper only its existence and purpose are known. Finished stages are kept
as their factors, so the record is one LoRA of rank T r and the base is never copied.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ftrecipes.methods.adapters.delta import Delta, DeltaMethod, Factors, Layer, tied_weights, untie
from ftrecipes.methods.adapters.lora import LowRank

if TYPE_CHECKING:
    from ftrecipes.anatomy import Part
    from ftrecipes.run import Run


class PeriodicLoRA(DeltaMethod):
    """LoRA that is unloaded and restarted every `stage_steps` updates."""

    module = LowRank
    stage_steps: int
    momentum: float
    momentum_rule: str
    rank: int
    unload_last: bool

    def prepare(self, run: Run) -> None:
        self.stages: list[dict[str, tuple[Tensor, Tensor]]] = []
        super().prepare(run)

    def drive(self, run: Run, fit: Callable[..., Any]) -> None:
        total, stage = run.planned_steps, 0
        while total > 0:
            steps = min(self.stage_steps, total)
            total -= steps
            fit(steps, name=f"stage-{stage}")
            stage += 1
            if total > 0 or self.unload_last:
                run.once(f"unload-{stage}", lambda: self.unload(run))

    def attach(self, run: Run, part: Part, saved: dict[str, Any] | None = None) -> None:
        if part.name in tied_weights(run.model):  # folding into a shared weight would change its other owner too
            untie(run.model, part.module)
        super().attach(run, part, saved)

    @torch.no_grad()
    def unload(self, run: Run) -> int:
        """Fold the stage's update into the weights and start the adapter anew."""
        carry = self.momentum_rule == "carry"
        factors = {}
        for name, delta in self.deltas.items():
            assert isinstance(delta, LowRank)
            share = (1 - self.momentum) if carry else 1.0
            factors[name] = (share * delta.B.detach().clone(), delta.A.detach().clone())
        self.stages.append(factors)
        for delta in self.deltas.values():
            self._fold(delta.layer, self.increment(delta, len(self.stages) - 1))
            self._restart(run, delta, carry)
        run.count("unloads")
        return len(self.stages)

    def increment(self, delta: Delta, stage: int) -> Tensor:
        """V_t of a layer: what unloading stage t adds to its weight."""
        total = torch.zeros(delta.layer.shape, dtype=delta.layer.dtype, device=delta.layer.device)
        for t in range(stage + 1):
            share = self.share(t, stage)
            if share:
                B, A = self.stages[t][delta.layer.name]
                total += share * delta.scale * (B.to(total) @ A.to(total))  # type: ignore[operator]
        return total

    def share(self, t: int, stage: int) -> float:
        """The coefficient of D_t in V_stage."""
        if self.momentum_rule == "carry" or not self.momentum:
            return float(t == stage)
        return (1 - self.momentum) * self.momentum ** (stage - t)

    @staticmethod
    def _fold(layer: Layer, increment: Tensor) -> None:
        weight: Tensor = layer.module.weight  # type: ignore[assignment]
        weight.copy_(layer.stored(layer.weight + increment).to(weight.dtype))

    def _restart(self, run: Run, delta: Delta, carry: bool) -> None:
        assert isinstance(delta, LowRank)
        if carry and self.momentum:
            delta.B.mul_(self.momentum)
            return
        delta.start(lambda factor: run.generator("init", delta.layer.name, factor, len(self.stages)))

    def stacked(self, name: str) -> tuple[Tensor, Tensor]:
        """All that was added to a weight, the live adapter included, as one LoRA: B (rows x R), A (R x cols), same scale."""
        delta = self.deltas[name]
        assert isinstance(delta, LowRank)
        last = len(self.stages) - 1
        pairs = []
        for t, factors in enumerate(self.stages):
            B, A = factors[name]
            pairs.append((B * sum(self.share(t, stage) for stage in range(t, last + 1)), A))
        pairs.append((delta.B.detach(), delta.A.detach()))
        return torch.cat([B for B, _ in pairs], 1), torch.cat([A for _, A in pairs], 0)

    def factors(self, name: str) -> Factors | None:
        delta = self.deltas[name]
        assert isinstance(delta, LowRank)
        return Factors(*self.stacked(name), delta.scale) if delta.strength == 1.0 else None

    def writes(self) -> set[str]:
        return {f"{name}.weight" for name in self.deltas}

    def structure(self) -> dict[str, Any]:
        stages = [{name: {"B": B, "A": A} for name, (B, A) in factors.items()} for factors in self.stages]
        return {**super().structure(), "stages": stages}

    def restore(self, run: Run, structure: dict[str, Any]) -> None:
        self.stages = []
        super().restore(run, structure)
        with torch.no_grad():
            for factors in structure["stages"]:
                self.stages.append({name: (saved["B"], saved["A"]) for name, saved in factors.items()})
                for delta in self.deltas.values():
                    self._fold(delta.layer, self.increment(delta, len(self.stages) - 1))
