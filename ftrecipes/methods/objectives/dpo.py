"""DPO: Direct Preference Optimization: Your Language Model is Secretly a Reward Model (arXiv 2305.18290).

The policy that maximises a reward under a KL constraint to a reference fixes that reward: beta log(pi / pi_ref). So a
preference of y_w over y_l is a classification of their margin, without a reward model and without sampling:

    m = beta [ log pi(y_w|x)/pi_ref(y_w|x) - log pi(y_l|x)/pi_ref(y_l|x) ],   log pi(y|x) = sum over the tokens of y

    sigmoid    -(1 - e) log s(m) - e log s(-m)                      e = label_smoothing (cDPO; 0 is the paper's)
    robust     [ -(1 - e) log s(m) + e log s(-m) ] / (1 - 2 e)      unbiased under labels flipped with chance e (2403.00409)
    hinge      max(0, 1 - m)                                        SLiC (2305.10425)
    ipo        ( m / beta - 1 / (2 beta) )^2                        IPO (2310.12036); log-ratios are means over tokens, as its
                                                                    authors computed them and as TRL does

The loss is a mean over pairs. `sft_weight` adds that of -log pi(y_w|x) / |y_w| (RPO, 2404.19733), which keeps the chosen
answers likely. The reference is the model before training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ftrecipes.errors import RunFailed, UserError
from ftrecipes.methods.objectives.tokens import Objective

if TYPE_CHECKING:
    from ftrecipes.run import Run
    from ftrecipes.tasks.base import Batch, Task


class DPO(Objective):
    """Classifies pairs of answers by the margin of their log-ratios to the reference."""

    blurred_by_dropout = True
    beta: float
    loss_type: str
    label_smoothing: float
    sft_weight: float

    def set_up(self, task: Task) -> None:
        task.unit, task.alternatives = "example", 1

    def looks_back(self) -> bool:
        return True

    def prepare(self, run: Run) -> None:
        if self.label_smoothing and self.loss_type not in ("sigmoid", "robust"):
            raise UserError(f"{self.key}.label_smoothing={self.label_smoothing} would be ignored by loss_type={self.loss_type}")
        train = run.data.get("train")
        if train is not None and "others" not in train[train.keep[0]]:
            raise UserError(
                f"{self.key} learns from chosen and rejected answers, and data {run.settings.data.name} has none; "
                "give it columns prompt, chosen, rejected (data.columns says which they are)"
            )

    def loss(self, run: Run, batch: Batch) -> Tensor:
        n, others = len(batch["example"]), batch.get("others")
        if others is None or len(others["owner"]) != n:
            raise RunFailed(f"{self.key}: a training example has no rejected answer, or several; each needs one")
        reference = self.reference(run)
        ratios, lengths, logps = [], [], []
        for answers in (batch, others):
            outputs = run.task.outputs(run.model, answers)
            logps.append(outputs.per_sequence(outputs.logps, n))
            lengths.append(outputs.per_sequence(torch.ones_like(outputs.logps), n))
            ratios.append(logps[-1] - reference.sums(answers, n))
        rewards = self.beta * torch.stack(ratios).detach()
        run.report("rewards/chosen", rewards[0].sum())
        run.report("rewards/rejected", rewards[1].sum())
        run.report("rewards/margins", (rewards[0] - rewards[1]).sum())
        run.report("rewards/accuracies", (rewards[0] > rewards[1]).float().sum())
        run.report("logps/chosen", logps[0].detach().sum())
        run.report("logps/rejected", logps[1].detach().sum())
        run.count("pairs", n)
        if self.loss_type == "ipo":
            ratios = [ratio / length for ratio, length in zip(ratios, lengths, strict=True)]
        losses = preference_loss(ratios[0] - ratios[1], self.loss_type, self.beta, self.label_smoothing)
        if self.sft_weight:
            losses = losses - self.sft_weight * logps[0] / lengths[0]
        return losses.sum()


def preference_loss(margin: Tensor, loss_type: str, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Losses (n,) of differences of log-ratios, chosen minus rejected (n,)."""
    if loss_type == "ipo":
        return (margin - 1 / (2 * beta)) ** 2
    m, e = beta * margin, label_smoothing
    if loss_type == "hinge":
        return (1 - m).relu()
    right, flipped = -F.logsigmoid(m), -F.logsigmoid(-m)
    if loss_type == "robust":
        return ((1 - e) * right - e * flipped) / (1 - 2 * e)
    return (1 - e) * right + e * flipped
