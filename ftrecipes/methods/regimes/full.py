"""Full fine-tuning: every weight of the model trains."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ftrecipes.method import Method

if TYPE_CHECKING:
    from ftrecipes.run import Run


class Full(Method):
    """Trains all weights."""

    picks = True

    def prepare(self, run: Run) -> None:
        run.model.requires_grad_(True)
