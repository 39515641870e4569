"""PSFT: Proximal Supervised Fine-Tuning (arXiv 2508.17784).

Supervised fine-tuning is policy gradient with advantage 1. PPO's clipped ratio to an old policy takes the place of the
log-likelihood: tokens whose probability has grown past the clip stop pushing, so the model stays near where it was.

    r_t = p(y_t) / p_old(y_t),   L = -(1/N) sum_t min( r_t, clip(r_t, 1 - low, 1 + high) ),   N = counted tokens of the update

With advantage 1 the lower clip never binds: a token's gradient is -r_t d log p_t while r_t <= 1 + high, and 0 beyond.
The old policy is the model at the start of an outer batch of `train_batch` examples; these are learned in mini-batches of
`trainer.batch`, one update each, then the old policy is taken anew. In an outer batch's first update r = 1: the gradient
is that of plain fine-tuning and the loss is -1. Kept of the old policy: one number a counted token of the outer batch.
`warm_up` updates of plain fine-tuning can go before (the paper's variant for weak starts).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ftrecipes.errors import UserError
from ftrecipes.methods.objectives.tokens import Objective
from ftrecipes.tasks.causal_lm import TokenOutputs

if TYPE_CHECKING:
    from ftrecipes.run import Run
    from ftrecipes.tasks.base import Batch


class PSFT(Objective):
    """Clipped ratios to a policy that is taken anew every outer batch."""

    blurred_by_dropout = True
    clip_ratio_low: float
    clip_ratio_high: float
    train_batch: int
    warm_up: int

    def prepare(self, run: Run) -> None:
        mini = run.settings.trainer.batch
        if self.train_batch % mini:
            raise UserError(f"{self.key}.train_batch={self.train_batch} must be a multiple of trainer.batch={mini}, its mini-batches")
        self.inner = self.train_batch // mini
        self.old: dict[int, Tensor] = {}

    def begin(self, run: Run) -> None:
        super().begin(run)
        done = run.fit_step - self.warm_up
        if done >= 0 and done % self.inner == 0:
            self.snapshot(run, min(self.inner, run.fit_steps - run.fit_step))

    def snapshot(self, run: Run, updates: int) -> None:
        """Take the model as the old policy for the examples of the coming updates."""
        self.old = {}
        entropies = []
        with run.evaluating():
            for batch in (batch for k in range(updates) for batch in run.window(run.step + k)):
                batch = run.stack.batch(run, run.move(batch))
                outputs: TokenOutputs = run.task.outputs(run.model, batch)

                def judge(hidden: Tensor, labels: Tensor, outputs: TokenOutputs = outputs) -> Tensor:
                    logits = outputs.logits(hidden).float()
                    entropy = logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)
                    return torch.stack([-F.cross_entropy(logits, labels, reduction="none"), entropy], -1)

                logps, entropy = outputs.per_chunk(judge, outputs.labels).unbind(-1)
                entropies.append(entropy)
                order, lengths = by_example(outputs, batch)
                self.old |= zip(batch["example"].tolist(), logps[order].split(lengths), strict=True)
        if entropies:
            run.log("entropy", torch.cat(entropies).mean())
            run.count("snapshots")

    def loss(self, run: Run, batch: Batch) -> Tensor:
        outputs = run.task.outputs(run.model, batch)
        logps = outputs.logps
        run.report("nll", -logps.detach().sum())
        if self.old and run.fit_step >= self.warm_up:
            order, _ = by_example(outputs, batch)
            old = torch.empty_like(logps, requires_grad=False)
            old[order] = torch.cat([self.old[i].to(old) for i in batch["example"].tolist()])
        elif run.fit_step < self.warm_up:
            return -logps.sum()
        else:
            old = logps.detach()  # before the first update the model is its own old policy
        r = (logps - old).exp()
        run.report("clip_fraction", (r.detach() > 1 + self.clip_ratio_high).sum())
        run.report("ratio", r.detach().sum())
        return -torch.minimum(r, r.clamp(1 - self.clip_ratio_low, 1 + self.clip_ratio_high)).sum()

    def state_dict(self) -> dict[str, Any]:
        lengths = [len(logps) for logps in self.old.values()]
        return {"examples": list(self.old), "lengths": lengths, "logps": torch.cat(list(self.old.values())) if self.old else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["logps"] is not None:
            self.old = dict(zip(state["examples"], state["logps"].split(state["lengths"]), strict=True))


def by_example(outputs: TokenOutputs, batch: Batch) -> tuple[Tensor, list[int]]:
    """The order in which the counted tokens of a micro-batch stand example by example, and how many each has."""
    return outputs.row.argsort(stable=True), outputs.row.bincount(minlength=len(batch["example"])).tolist()
