"""Exponential moving average of the weights: Acceleration of stochastic approximation by averaging (Polyak and Juditsky, 1992).

Beside the weights an average of their path is kept, and at the end it takes their place:

    avg <- d avg + (1 - d) theta   every `every` updates,   d = decay, or min(decay, (1 + t) / (10 + t)) at the t-th with `warmup`

The average begins as the weights of update `start` (the first it sees). With adapters the average is that of their
tensors. It is kept in the dtype of what trains; training itself is not touched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ftrecipes.errors import RunFailed
from ftrecipes.method import Method

if TYPE_CHECKING:
    from ftrecipes.run import Run


class EMA(Method):
    """Ends with the average of the weights over the last updates."""

    decay: float
    warmup: bool
    every: int
    start: int

    def prepare(self, run: Run) -> None:
        self.average: dict[str, Tensor] = {}
        self.updates = 0
        self.chosen: list[Any] = []

    def holds(self, run: Run) -> dict[str, int]:
        return {"copies": sum(p.numel() * p.element_size() for p in run.trainable().values())}

    @torch.no_grad()
    def updated(self, run: Run) -> None:
        if run.step < self.start or (run.step - self.start) % self.every:
            return
        here = run.trainable()
        chosen = [module.chosen.index for module in run.model.modules() if hasattr(module, "chosen")]  # type: ignore[union-attr]
        if self.chosen and any(now is not then for now, then in zip(chosen, self.chosen, strict=True)):
            raise RunFailed("ema: another method chose other entries to train, so the average would mix different weights; leave ema out")
        self.chosen = chosen
        if not self.average:
            self.average = {name: p.detach().clone() for name, p in here.items()}
            return
        self.updates += 1
        self.average = {name: average.to(here[name].device) for name, average in self.average.items()}  # moves after a resume alone
        torch._foreach_lerp_(list(self.average.values()), list(here.values()), 1 - self.rate())
        run.count("averages")

    def rate(self) -> float:
        """d of the present average."""
        return min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay

    @torch.no_grad()
    def finish(self, run: Run) -> None:
        for name, average in self.average.items():
            run.trainable()[name].copy_(average)

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average, self.updates = dict(state["average"]), state["updates"]
