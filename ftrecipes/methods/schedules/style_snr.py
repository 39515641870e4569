"""Style-Friendly SNR Sampler for Style-Driven Generation (arXiv 2411.14793).

Style appears in the first tenth of denoising, at very low signal-to-noise ratios, where training seldom looks. The log-SNR
of training samples is drawn from a normal far below the usual one; nothing else of fine-tuning changes, and no loss is
weighed:

    lambda ~ N(mu, sigma^2),   flow: lambda = 2 log((1 - t) / t), so t = sigmoid(-lambda / 2);   x_t = (1 - t) x0 + t e

mu = 0, sigma = 2 is the logit-normal (0, 1) of SD3; the paper's mu = -6 is logit-normal (3, 1). A diffusion model takes the
step whose log(ab / (1 - ab)) is nearest (our extension); schedules end at some lambda, below which all draws are the last
step. Each image has a level of its own, drawn apart from noise and order of the data.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ftrecipes.method import Method
from ftrecipes.rng import generator

if TYPE_CHECKING:
    from ftrecipes.run import Run
    from ftrecipes.tasks.base import Batch


class StyleSNR(Method):
    """Draws the noise levels of training where style is decided."""

    mu: float
    sigma: float

    def prepare(self, run: Run) -> None:
        low = float(run.task.log_snr().min())
        if self.mu < low:
            run.say(
                f"{self.key}: mu={self.mu:g} lies below the last step's log-SNR {low:.1f}, where most draws pile up; -4 suits such a schedule"
            )

    def batch(self, run: Run, batch: Batch) -> Batch:
        normal = torch.stack([torch.randn((), generator=generator(s, "log-snr")) for s in run.task.seeds(batch)])
        log_snr: Tensor = self.mu + self.sigma * normal.to(batch["moments"].device)
        run.log("style_snr/log_snr", log_snr.mean())
        run.count("levels", len(log_snr))
        return {**batch, "level": run.task.level_at(log_snr)}
