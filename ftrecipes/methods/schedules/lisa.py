"""LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning (arXiv 2403.17919).

Embedding, final norm and head always train. Of the N blocks exactly `gamma` do, drawn uniformly without replacement and
anew every `interval` updates, so gradients and AdamW's moments exist for gamma blocks only. At a switch the moments of
all blocks are dropped, also of a block that is drawn twice running: by their own account the authors ran the paper's
intervals as trainings of their own. Their public callback keeps the moments of sleeping blocks (`keep_state`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ftrecipes.errors import UserError
from ftrecipes.methods.schedules.activity import Activity

if TYPE_CHECKING:
    from ftrecipes.run import Run


class LISA(Activity):
    """Redraws which blocks train."""

    gamma: int
    interval: int
    keep_state: bool
    chances: list[float] | None

    def prepare(self, run: Run) -> None:
        super().prepare(run)
        self.drop_state = not self.keep_state
        count = len(run.anatomy.blocks)
        if self.gamma > count:
            raise UserError(f"lisa.gamma={self.gamma}: the model has {count} blocks")
        if self.chances is not None and len(self.chances) != count:
            raise UserError(f"lisa.chances: {len(self.chances)} given, the model has {count} blocks")
        if self.chances is not None and sum(chance > 0 for chance in self.chances) < self.gamma:
            raise UserError(f"lisa.chances={self.chances}: lisa.gamma={self.gamma} blocks are drawn, fewer have a chance")

    def due(self, run: Run) -> bool:
        return run.step % self.interval == 0

    def awake(self, run: Run) -> list[int]:
        period = run.step // self.interval
        chances = torch.tensor(self.chances or [1.0] * len(run.anatomy.blocks), dtype=torch.float32)
        return torch.multinomial(chances, self.gamma, generator=run.generator("lisa", period)).tolist()
