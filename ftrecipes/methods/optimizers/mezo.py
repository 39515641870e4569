"""MeZO: Fine-Tuning Language Models with Just Forward Passes (arXiv 2305.17333).

Zeroth-order SGD in place. Two forward passes at theta +- eps z give one number, and z is never stored but drawn again
from its seed:

    g = (L(theta + eps z) - L(theta - eps z)) / (2 eps),   theta <- theta - lr (g z + weight_decay theta),   z ~ N(0, I)

z is drawn and applied in chunks, so the peak is that of inference. With n > 1 directions a step averages n such
estimates at the same theta. A run is its start and the list of (seed, g, lr): `replay` makes the weights from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ftrecipes.errors import RunFailed
from ftrecipes.method import Method
from ftrecipes.rng import derive

if TYPE_CHECKING:
    from ftrecipes.run import Run
    from ftrecipes.update import Window

CHUNK = 2**18
"""Numbers of z that exist at a time."""


class MeZO(Method):
    """Memory-efficient zeroth-order SGD."""

    steps_with_optimizer = False
    eps: float
    n: int
    metric: bool

    def prepare(self, run: Run) -> None:
        self.history: list[tuple[list[tuple[int, float]], float]] = []

    def step(self, run: Run, window: Window) -> None:
        parameters = run.active()
        run.model.eval()
        rate, decay = run.rate, run.settings.optimizer.weight_decay
        seeds = [derive(run.seed, "mezo", run.fit_index, run.step, i) for i in range(self.n)]
        found: list[tuple[int, float]] = []
        plus = torch.zeros(())
        for i, seed in enumerate(seeds):
            add_z(parameters.values(), seed, self.eps)
            plus = self.objective(run, window)
            add_z(parameters.values(), seed, -2 * self.eps)
            minus = self.objective(run, window)
            g = float(plus - minus) / (2 * self.eps)
            found.append((seed, g))
            if not math.isfinite(g):
                raise RunFailed(
                    f"the loss is not finite at update {run.step + 1} (mezo: {float(plus)} and {float(minus)}); lower method.mezo.eps or optimizer.lr"
                )
            last = self.n == 1 and not decay
            # with one direction, restoring and updating are one pass over the weights
            add_z(parameters.values(), seed, self.eps - rate * g if last else self.eps)
            if i == 0:
                run.log("loss", plus)
        if self.n > 1 or decay:
            apply_step(parameters, found, rate, decay)
        self.history.append((found, rate))
        run.log("mezo/g", sum(g for _, g in found) / self.n)
        run.count("forward_passes", 2 * self.n)

    def objective(self, run: Run, window: Window) -> Tensor:
        """The window's loss, or its target metric, for which no gradient exists and none is needed (scalar, lower is better)."""
        if not self.metric:
            return run.loss(window)
        with run.evaluating():
            sums = torch.stack([run.task.measure(run.model, batch)[run.task.target] for batch in window]).sum(0)
        run.update.world.sum([sums])
        mean = sums[0] / sums[1]
        return 1.0 - mean if run.task.higher_is_better else mean

    def structure(self) -> dict[str, Any]:
        return {"history": [[[[s, g] for s, g in found], rate] for found, rate in self.history]}

    def restore(self, run: Run, structure: dict[str, Any]) -> None:
        self.prepare(run)
        self.history = [([(int(s), float(g)) for s, g in found], float(rate)) for found, rate in structure["history"]]


@torch.no_grad()
def add_z(parameters: Iterable[Tensor], seed: int, scale: float) -> None:
    """theta += scale * z(seed), z drawn over all tensors in order, CHUNK numbers at a time."""
    rng: torch.Generator | None = None
    for parameter in parameters:
        if rng is None:
            rng = torch.Generator(device=parameter.device).manual_seed(seed)
        for part in parameter.view(-1).split(CHUNK):
            z = torch.randn(part.shape, generator=rng, dtype=part.dtype, device=part.device)
            part.add_(z, alpha=scale)


@torch.no_grad()
def apply_step(parameters: dict[str, nn.Parameter], found: Sequence[tuple[int, float]], rate: float, decay: float) -> None:
    """theta -= rate (mean_i g_i z_i + decay theta); vectors (norms, biases) are not decayed."""
    if decay:
        torch._foreach_mul_([p for p in parameters.values() if p.dim() > 1], 1 - rate * decay)
    for seed, g in found:
        add_z(parameters.values(), seed, -rate * g / len(found))


def replay(parameters: dict[str, nn.Parameter], history: Sequence[tuple[Sequence[tuple[int, float]], float]], decay: float = 0.0) -> None:
    """Make the final weights from the start and the history of a run."""
    for found, rate in history:
        apply_step(parameters, found, rate, decay)
