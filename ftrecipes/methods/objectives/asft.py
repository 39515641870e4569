"""ASFT: Anchored Supervised Fine-Tuning (arXiv 2509.23753).

Dynamic fine-tuning (see dft.py) weighs each token's cross-entropy with the token's own probability, and drifts away from
where it began. A KL divergence over the whole vocabulary to the model before training, at every counted token, holds it:

    L = (1/N) sum_t [ -sg(p_t) log p_t + kl_weight KL_t ],   N = counted tokens of the window
    KL_t = sum_v q_v (log q_v - log p_v)     forward, KL(q || p);  q = softmax of the reference's logits, no gradient
    KL_t = sum_v p_v (log p_v - log q_v)     reverse, KL(p || q)

The paper writes the reverse direction and the authors' three trainers compute the forward one, from which their results
come; forward is the default. `mode: sft+kl` leaves the weights out. kl_weight = 0 is dft, or plain fine-tuning.
p and q (rows, V) exist in float32 for a chunk of positions at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ftrecipes.methods.objectives.tokens import Objective

if TYPE_CHECKING:
    from ftrecipes.run import Run
    from ftrecipes.tasks.base import Batch


class ASFT(Objective):
    """Tokens weighed with their own probability, anchored to the model before training."""

    kl_weight: float
    kl_direction: str
    mode: str

    def looks_back(self) -> bool:
        return self.kl_weight > 0

    def loss(self, run: Run, batch: Batch) -> Tensor:
        outputs = run.task.outputs(run.model, batch)
        if self.looks_back():
            reference = self.reference(run)
            anchor = reference.outputs(batch)

            def terms(hidden: Tensor, labels: Tensor, start: Tensor) -> Tensor:
                log_p = F.log_softmax(outputs.logits(hidden).float(), -1)
                log_q = F.log_softmax(reference.logits(anchor, start), -1)
                return torch.stack([log_p.gather(1, labels[:, None])[:, 0], divergence(log_p, log_q, self.kl_direction)], -1)

            logps, kl = outputs.per_chunk(terms, outputs.labels, anchor.hidden).unbind(-1)
            run.count("anchored_batches")
            run.report("kl", kl.detach().sum())
        else:
            logps, kl = outputs.logps, None
        run.report("nll", -logps.detach().sum())
        losses = -logps
        if self.mode == "asft":
            p = logps.detach().exp()
            run.report("mean_p", p.sum())
            run.count("reweighted_batches")
            losses = losses * p
        return losses.sum() if kl is None else (losses + self.kl_weight * kl).sum()


def divergence(log_p: Tensor, log_q: Tensor, direction: str) -> Tensor:
    """KL(q || p), `forward`, or KL(p || q), `reverse`, of log-probabilities (n, V) → (n,)."""
    to, of = (log_p, log_q) if direction == "forward" else (log_q, log_p)
    return F.kl_div(to, of, reduction="none", log_target=True).sum(-1)
