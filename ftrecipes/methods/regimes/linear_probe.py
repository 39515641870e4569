"""Linear probing: the model is a frozen feature extractor and its head alone trains.

A language model's head is often tied to the embedding, which is frozen here: the head gets a weight of its own, equal to
the embedding's at the start.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ftrecipes.errors import UserError
from ftrecipes.method import Method
from ftrecipes.methods.adapters.delta import tied_weights, untie

if TYPE_CHECKING:
    from ftrecipes.run import Run


class LinearProbe(Method):
    """Trains the head."""

    picks = True
    bias: bool

    def prepare(self, run: Run) -> None:
        heads = [part for part in run.anatomy.parts if part.role == "head"]
        if not heads:
            raise UserError(f"linear_probe: {run.settings.model.name} has no head")
        tied = tied_weights(run.model)
        for part in heads:
            if part.name in tied:
                untie(run.model, part.module)
            part.module.requires_grad_(True)
            if part.module.bias is not None:
                part.module.bias.requires_grad_(self.bias)  # type: ignore[union-attr, operator]
