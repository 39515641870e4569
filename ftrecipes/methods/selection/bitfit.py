"""BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models (arXiv 2106.10199).

Every bias of the model trains, those of norms included, and nothing else does besides the head of a new task. `targets`
narrows it to the biases of some roles; the paper's smaller set is that of the queries and of the first feed-forward
layer, [q, up].
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from ftrecipes.errors import UserError
from ftrecipes.method import Method, parts_of

if TYPE_CHECKING:
    from ftrecipes.run import Run


class BitFit(Method):
    """Trains biases."""

    picks = True
    targets: list[str]
    blocks: str | int | list[int]

    def prepare(self, run: Run) -> None:
        parts = parts_of(run, self, self.targets, self.blocks)
        biases = [b for part in parts if isinstance(b := getattr(part.module, "bias", None), nn.Parameter)]
        if not biases:
            raise UserError(
                f"bitfit: {run.settings.model.name} has no bias in targets={self.targets} blocks={self.blocks}, so nothing would train; "
                "choose another method or model"
            )
        for bias in biases:
            bias.requires_grad_(True)
        run.count("biases", len(biases))
