"""Sharpness-aware steps: the gradient that is applied is the one at a worse point nearby.

A paper subclasses `SharpnessAware` and gives `radius(run, window)`, how far away that point is. The mechanism does the
rest, with whatever optimizer the run has:

    g = grad L(theta),   eps = radius T^2 g / (||T g|| + 1e-12),   T = |theta| if `adaptive` else 1
    g' = grad L(theta + eps) on the same window with the same dropout draws;   theta <- optimizer(theta, g')

The norm is over all tensors together. The weights are copied before the ascent and copied back, so they return bit for
bit; clipping and gradient rules see g'. BatchNorm statistics are those of the first pass. A step costs two gradients
and one copy of what trains.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ftrecipes.method import Method

if TYPE_CHECKING:
    from ftrecipes.run import Run
    from ftrecipes.update import Window


class SharpnessAware(Method):
    """Base of the methods that step with the gradient of a neighbouring point. Knob that it reads: `adaptive`."""

    adaptive: bool

    def radius(self, run: Run, window: Window) -> Tensor | float:
        """How far to go, not negative; asked when the gradient at theta is there."""
        raise NotImplementedError

    def returned(self, run: Run) -> None:
        """The weights are back where they were, the optimizer has not moved them yet."""

    def holds(self, run: Run) -> dict[str, int]:
        return {"copies": sum(p.numel() * p.element_size() for p in run.active().values())}

    def step(self, run: Run, window: Window) -> None:
        loss = run.gradients(window)
        run.log("loss", loss)
        moving: list[Tensor] = [p for p in run.active().values() if p.grad is not None]
        if not torch.isfinite(nn.utils.get_total_norm([p.grad for p in moving if p.grad is not None])):
            run.update.apply(loss)  # which stops the run, or skips the update where loss scaling overflowed
            return
        before = [p.detach().clone() for p in moving]
        self.ascend(moving, self.radius(run, window))
        with frozen_statistics(run.model):
            above = run.gradients(window, report=False)
        with torch.no_grad():
            torch._foreach_copy_(moving, before)
        self.returned(run)
        run.log(f"{self.key}/rise", above - loss)
        run.count("ascents")
        run.stack.gradients(run, window)
        run.update.apply(above)

    @torch.no_grad()
    def ascend(self, parameters: list[Tensor], radius: Tensor | float) -> None:
        """theta += radius T^2 g / (||T g|| + 1e-12); the gradients are used up."""
        eps = [p.grad for p in parameters if p.grad is not None]
        if self.adaptive:
            torch._foreach_mul_(eps, parameters)  # T g, but for signs
        norm = nn.utils.get_total_norm(eps)
        if self.adaptive:
            torch._foreach_mul_(eps, parameters)
        torch._foreach_mul_(eps, radius / (norm + 1e-12))
        torch._foreach_add_(parameters, eps)


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Normalize by the batch, as training does, and leave the running statistics of BatchNorm alone."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
