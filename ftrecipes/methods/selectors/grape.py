"""The Best Instruction-Tuning Data are Those That Fit (GRAPE, arXiv 2502.04194).

Where an instruction x has several responses y_1 … y_m (of several teachers, of people), keep the one that the untouched
target model itself finds most probable per token, then fine-tune as usual on it:

    s(y | x) = 1/|y| sum_t log p_theta0(y_t | x, y_<t),     y* = argmax_j s(y_j | x)

Tokens are those that training counts (the response and what closes it), teacher-forced in the same template and cut at
the same length. Examples of one instruction are those with the same prompt (and system prompt, and earlier turns);
every instruction keeps one response. The model is the very checkpoint that will be tuned; nothing is scored anew later.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ftrecipes.errors import UserError
from ftrecipes.methods.selectors.selector import Selector
from ftrecipes.tasks.causal_lm import TokenOutputs, messages_of

if TYPE_CHECKING:
    from ftrecipes.data.base import Example
    from ftrecipes.run import Run
    from ftrecipes.tasks.base import Batch


class GRAPE(Selector):
    """Keeps the response that fits the model best, of those to one instruction."""

    select: str
    normalize: str
    per_instruction: int

    def features(self, run: Run, batch: Batch) -> Tensor:
        """Sum of the log-probabilities and number of the learned tokens of each example (n, 2)."""
        outputs = run.task.outputs(run.model, batch)
        assert isinstance(outputs, TokenOutputs)
        found = torch.zeros(len(batch["example"]), 2, dtype=torch.float64, device=outputs.logps.device)
        return found.index_add_(0, outputs.row, torch.stack([outputs.logps.double(), torch.ones_like(outputs.logps).double()], 1))

    def choose(self, run: Run, features: Tensor) -> tuple[list[int], Tensor]:
        scores = self.scores(run, features)
        groups: dict[str, list[int]] = {}
        train = run.data["train"]
        for row, position in enumerate(train.keep):
            groups.setdefault(instruction(train.raw[position]), []).append(row)
        if all(len(rows) <= self.per_instruction for rows in groups.values()):
            raise UserError(
                f"{self.key} chooses among responses to one instruction, and no instruction of data={run.settings.data.name} "
                f"has more than {self.per_instruction}; give rows that share a prompt"
            )
        run.count("instructions", len(groups))
        kept = [row for rows in groups.values() for row in sorted(rows, key=lambda r: -float(scores[r]))[: self.per_instruction]]
        return sorted(kept), scores

    def scores(self, run: Run, features: Tensor) -> Tensor:
        """What is the larger, the better; the first of equals is kept."""
        total, count = features.unbind(1)
        fit = total / count if self.normalize == "length" else total
        return {
            "max": lambda: fit,
            "min": lambda: -fit,
            "longest": lambda: count,
            "random": lambda: torch.rand(len(fit), generator=run.generator("grape"), dtype=torch.float64),
        }[self.select]()


def instruction(example: Example) -> str:
    """What an example asks, whatever its form."""
    if "text" in example:
        raise UserError("grape: texts have no instruction; give rows with prompt and response, or messages")
    asked: Any = example["prompt"] if "completion" in example else messages_of(example)[:-1]
    return json.dumps(asked, sort_keys=True)
