"""Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank Fine-Tuning (LoRA-SB, arXiv 2411.19557).

The three factors of LoRA-XS, found from an estimate of the first update that full fine-tuning would make. G is the gradient
of a weight (out x in) over a few batches; AdamW's first update is T = -eta sign(G), with eta the learning rate of the run's
first update. With the SVD T = U S V^T:

    W' = W + B R A,   B = U_r (out x r), A = V_r^T (r x in) frozen,   R (r x r) = diag(S_r) at the start

so the model starts at W + [T]_r: the estimated update is kept, not taken off. B and A being orthonormal, the gradient step
of R is the best image of the full gradient among all B X A, at every update, and no alpha has to be tuned (the authors set
alpha = r, a scale of 1).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ftrecipes import optim
from ftrecipes.method import parts_of
from ftrecipes.methods.adapters.calibrate import mean_gradients
from ftrecipes.methods.adapters.core import Core
from ftrecipes.methods.adapters.delta import DeltaMethod, Layer, check_rank
from ftrecipes.methods.adapters.svd import svd


class LoRASB(DeltaMethod):
    """A square matrix between the singular vectors of the estimated first update."""

    module = Core
    kinds = (nn.Linear, Conv1D, nn.Conv2d)
    rank: int
    iters: int
    bsz: int
    svd_iterations: int | None

    def prepare(self, run: Any) -> None:
        parts = parts_of(run, self, self.targets, self.blocks)
        for part in parts:
            self.check(part)
            check_rank(self, Layer(part.name, part.module), self.rank)
        estimated = not parts[0].weight.is_meta
        gradients = mean_gradients(run, self, parts, iters=self.iters, bsz=self.bsz) if estimated else {}
        super().prepare(run)
        for name, G in gradients.items():
            self.fill(run, cast(Core, self.deltas[name]), G)
        run.count("update_starts", len(self.deltas))

    @torch.no_grad()
    def fill(self, run: Any, delta: Core, G: Tensor) -> None:
        """Factors and core from the gradient of a weight, as it is stored."""
        layer = delta.layer
        eta = run.settings.optimizer.lr * optim.factor(run.settings.schedule, 0, run.planned_steps)
        T = -torch.sign(layer.matrix(G).to(layer.device))  # its vectors do not depend on eta
        U, S, V = svd(T, self.rank, iterations=self.svd_iterations, rng=run.generator("lora_sb", layer.name))
        delta.hold(U, V.T)
        delta.R.copy_(torch.diag(eta * S))
