"""RLG: Inference-Time Alignment Control for Diffusion Models with Reinforcement Learning Guidance (arXiv 2508.21016).

A KL-regularised reward tune samples, at best, from p_ref exp(R / beta). Mixing base and tuned network at sampling time, as
guidance mixes conditional and unconditional ones, samples a geometric average of the two: w plays the part of a new
coefficient beta / w, so the strength of the tune is set after training.

    u = (1 - w) u_ref + w u_RL,   both with the same x_t, t, c and text guidance, which is applied inside each branch

w = 0 is the base, w = 1 the tuned model, w > 1 goes beyond it. For the first `zero_init_step` steps u = u_RL. Noise of a
stochastic sampler is drawn once, for the mixture. Outputs (n, channels, h, w) are mixed in float32; weights are not mixed.
At the end the model is evaluated at every w of `scales`; the record holds this curve.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ftrecipes.method import Method
from ftrecipes.methods.rewards.base import Reference
from ftrecipes.tasks.denoising import Guided

if TYPE_CHECKING:
    from ftrecipes.run import Run


class RLGuidance(Method):
    """Mixes the outputs of base and tuned network while sampling."""

    w: float
    scales: list[float]
    zero_init_step: int
    _reference: Reference | None = None

    def sample(self, run: Run, predict: Callable[..., Tensor]) -> Callable[..., Tensor]:
        if run.model.training:
            return predict
        if self._reference is None:
            self._reference = Reference(run)
        reference = self._reference
        assert isinstance(predict, Guided)
        tuned_at = predict

        def mixed(x: Tensor, level: Tensor, i: int) -> Tensor:
            tuned = tuned_at(x, level, i)
            if self.w == 1.0 or i < self.zero_init_step:
                return tuned
            with reference.looking() as base:
                before = tuned_at.of(base)(x, level, i)
            run.count("mixed_steps")
            return before if self.w == 0.0 else (1 - self.w) * before + self.w * tuned

        return mixed

    def finish(self, run: Run) -> None:
        chosen = self.w
        curve: list[dict[str, Any]] = []
        for w in self.scales:
            self.w = w
            curve.append({"w": self.w, **run.evaluate("validation")})
        self.w = chosen
        run.results["rl_guidance"] = curve
