"""SAM: Sharpness-Aware Minimization for Efficiently Improving Generalization (arXiv 2010.01412).

Minimises the largest loss within a ball of radius rho instead of the loss itself. To first order that point is uphill,

    eps = rho g / ||g||,   theta <- optimizer(theta, grad L(theta + eps)),   g = grad L(theta) over all tensors together

`adaptive` is ASAM (arXiv 2102.11600): the ball is measured relative to the size of each weight,
eps = rho T^2 g / ||T g|| with T = |theta|, so that rescaling weights that cancel changes nothing; rho is then larger.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ftrecipes.methods.optimizers.sharpness import SharpnessAware

if TYPE_CHECKING:
    from ftrecipes.run import Run
    from ftrecipes.update import Window


class SAM(SharpnessAware):
    """Steps with the gradient at the worst point of a ball."""

    rho: float

    def radius(self, run: Run, window: Window) -> float:
        return self.rho
