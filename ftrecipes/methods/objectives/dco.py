"""DCO: Direct Consistency Optimization for Compositional Text-to-Image Personalization (arXiv 2402.12004).

A few images are learned only as far as needed: the model is rewarded for fitting them better than the base does, through a
log-sigmoid that fades once it does. With the same noise, level and x_t for both,

    L_m = mean |e_phi(x_t, t, c) - target|^2,   L_r = the same of the base,   loss = -log sigmoid(-beta (L_m - L_r))

so the gradient is beta sigmoid(beta (L_m - L_r)) grad L_m: half of beta at the start, none where L_m is well below L_r. The
base is the model with its deltas off. `per_sample: false` takes the means over a micro-batch before the sigmoid, as the
authors' code does (equal at batch 1, which is the paper's).

Sampled with reward guidance, in three predictions a step:

    e = e_base(null) + w_t (e_base(c) - e_base(null)) + w_r (e_phi(c) - e_base(c))

w_r = 0 is the base; w_r = w_t is guidance whose conditional branch is the tuned model. w_t is the model's `guidance`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ftrecipes.method import Method
from ftrecipes.methods.rewards.base import Reference
from ftrecipes.tasks.denoising import Guided

if TYPE_CHECKING:
    from ftrecipes.run import Run
    from ftrecipes.tasks.base import Batch


class DCO(Method):
    """The log-sigmoid of what the model gains over its base."""

    beta: float
    per_sample: bool
    rg_scale: float
    _reference: Reference | None = None

    def reference(self, run: Run) -> Reference:
        """The model before training, found when it is first needed."""
        if self._reference is None:
            self._reference = Reference(run)
        return self._reference

    def loss(self, run: Run, batch: Batch) -> Tensor:
        outputs = run.task.outputs(run.model, batch)
        fit = run.task.losses(outputs, batch)
        with torch.no_grad(), self.reference(run).looking() as base:
            before = run.task.losses(run.task.outputs(base, batch), batch)  # the draws are the batch's: noise and level are the same
        gain = fit - before
        run.report("nll", fit.detach().sum())
        run.report("dco/gain", -gain.detach().sum())
        run.report("dco/weight", torch.sigmoid(self.beta * gain.detach()).sum())
        run.count("compared", len(gain))
        if not self.per_sample:
            return F.softplus(self.beta * gain.mean()) * len(gain)
        return F.softplus(self.beta * gain).sum()

    def sample(self, run: Run, predict: Callable[..., Tensor]) -> Callable[..., Tensor]:
        if run.model.training:
            return predict
        assert isinstance(predict, Guided)
        guided = predict
        reference = self.reference(run)

        def rewarded(x: Tensor, level: Tensor, i: int) -> Tensor:
            tuned = guided.task.network(run.model, x, level, guided.condition)
            with reference.looking() as base:
                null, given = Guided(guided.task, base, guided.condition, guided.guidance).pair(x, level)
            run.count("guided_steps")
            return null + guided.guidance * (given - null) + self.rg_scale * (tuned - given)

        return rewarded
