"""Samplers: from noise to latents by a chain of steps, each with its mean and deviation.

    DDIM    x0 = (x - sqrt(1 - ab) e) / sqrt(ab),   x' = sqrt(ab') x0 + sqrt(1 - ab' - s^2) e + s z,
            s = eta sqrt((1 - ab') / (1 - ab)) sqrt(1 - ab / ab');   eta = 1 is DDPM's chain, eta = 0 has no noise
    Euler   x' = x + (t' - t) v;   with eta > 0 the chain of the equal stochastic equation,
            s = eta sqrt(t / (1 - t)), x' = x + (v + s^2 (x + (1 - t) v) / 2 t) (t' - t) + s sqrt(t - t') z

ab is the cumulative product of alphas at a step and ab' at the next; t is the share of noise of a flow, 1 at the start. A
step is a normal distribution, so a chain that was sampled can be asked for the log-probability of each step (`log_prob`),
and `run` lets gradients pass through the last steps only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Predict = Callable[[Tensor, Tensor, int], Tensor]
"""(x (n, …), level (n,), number of the step) to the network's output, guidance included, float32."""


class Chain:
    """The steps of a sampler. levels: (steps,) what the network is told at each; the last step ends at the clean latents."""

    levels: Tensor

    def __len__(self) -> int:
        return len(self.levels)

    def noised(self, x0: Tensor, noise: Tensor, i: int) -> Tensor:
        """Clean latents with as much noise as step i begins with."""
        raise NotImplementedError

    def clean(self, output: Tensor, x: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """The latents x0 and the noise that a network's output at step i means."""
        raise NotImplementedError

    def step(self, output: Tensor, x: Tensor, i: int, eta: float = 0.0) -> tuple[Tensor, float]:
        """Mean (n, …) and deviation of x after step i."""
        raise NotImplementedError


@dataclass
class DDIM(Chain):
    """Steps of a diffusion model. alphas: ab at each step (steps,), and `final` after the last; kind: what is predicted."""

    levels: Tensor
    alphas: list[float]
    final: float = 1.0
    kind: str = "epsilon"

    def at(self, i: int) -> tuple[float, float]:
        """ab of step i and of the next."""
        return self.alphas[i], self.alphas[i + 1] if i + 1 < len(self) else self.final

    def noised(self, x0: Tensor, noise: Tensor, i: int) -> Tensor:
        return math.sqrt(self.alphas[i]) * x0 + math.sqrt(1 - self.alphas[i]) * noise

    def clean(self, output: Tensor, x: Tensor, i: int) -> tuple[Tensor, Tensor]:
        a, b = math.sqrt(self.alphas[i]), math.sqrt(1 - self.alphas[i])
        if self.kind == "v_prediction":
            return a * x - b * output, a * output + b * x
        if self.kind == "sample":
            return output, (x - a * output) / b
        return (x - b * output) / a, output

    def deviation(self, i: int, eta: float = 1.0) -> float:
        """s of step i."""
        here, after = self.at(i)
        return eta * math.sqrt((1 - after) / (1 - here) * (1 - here / after))

    def step(self, output: Tensor, x: Tensor, i: int, eta: float = 0.0) -> tuple[Tensor, float]:
        x0, e = self.clean(output, x, i)
        _, after = self.at(i)
        s = self.deviation(i, eta)
        return math.sqrt(after) * x0 + math.sqrt(max(0.0, 1 - after - s**2)) * e, s


@dataclass
class Euler(Chain):
    """Steps of a flow. times: t at each step and after the last (steps + 1,)."""

    levels: Tensor
    times: list[float]

    def noised(self, x0: Tensor, noise: Tensor, i: int) -> Tensor:
        return (1 - self.times[i]) * x0 + self.times[i] * noise

    def clean(self, output: Tensor, x: Tensor, i: int) -> tuple[Tensor, Tensor]:
        t = self.times[i]
        return x - t * output, x + (1 - t) * output

    def step(self, output: Tensor, x: Tensor, i: int, eta: float = 0.0) -> tuple[Tensor, float]:
        t, after = self.times[i], self.times[i + 1]
        if not eta or not after:  # the last step adds no noise
            return x + (after - t) * output, 0.0
        s = eta * math.sqrt(t / (1 - min(t, self.times[1])))  # finite at the first step too
        drift = output + s**2 / (2 * t) * (x + (1 - t) * output)
        return x + (after - t) * drift, s * math.sqrt(t - after)


def log_prob(x: Tensor, mean: Tensor, deviation: float) -> Tensor:
    """log N(x; mean, deviation^2) of each example, the MEAN over its entries (n,), float32."""
    squared = ((x.float() - mean.float()) / deviation).square().flatten(1).mean(1)
    return -0.5 * squared - math.log(deviation) - 0.5 * math.log(2 * math.pi)


def run(
    chain: Chain,
    predict: Predict,
    x: Tensor,
    *,
    eta: float = 0.0,
    noise: Callable[[int], Tensor] | None = None,
    gradient_steps: int = 0,
    checkpointing: bool = False,
    watch: Callable[[int, Tensor, Tensor, float, Tensor], Any] | None = None,
) -> Tensor:
    """Latents from noise x (n, …).

    noise: standard normal numbers of step i, needed when eta > 0. gradient_steps: so many of the last steps keep their
    gradients, counted from the clean end; x is cut off before them. checkpointing: each of these is computed again in the
    backward pass. watch: called with (i, x, mean, deviation, x') of every step.
    """

    def one(x: Tensor, i: int) -> Tensor:
        level = chain.levels[i].to(x.device).expand(len(x))
        mean, deviation = chain.step(predict(x, level, i), x, i, eta)
        after = mean
        if deviation:
            assert noise is not None, "a chain with eta > 0 needs noise"
            after = mean + deviation * noise(i).to(mean)
        if watch:
            watch(i, x, mean, deviation, after)
        return after

    graded = torch.is_grad_enabled()
    for i in range(len(chain)):
        learns = graded and i >= len(chain) - gradient_steps
        with torch.set_grad_enabled(learns):
            if not learns:
                x = x.detach()
            if learns and checkpointing:
                x = checkpoint(one, x, i, use_reentrant=False)
            else:
                x = one(x, i)
    return x
