"""LoRA-GA: Low-Rank Adaptation with Gradient Approximation (arXiv 2407.05000).

LoRA whose factors start with singular vectors of the gradient of the whole weight on a few batches, so that the first step
of their product goes the way of the best approximation of rank 2r to a step of full fine-tuning. With G = dL/dW (m x n),
m outputs, its SVD G = U S V^T, and s = alpha / sqrt(r) (rsLoRA):

    A0 = c V^T[:r],  B0 = c U[:, r:2r],   c = m^(1/4) / gamma^(1/2),   W' = (W - s B0 A0) + s B A

B = B0 and A = A0 at the start, so W' = W. A step of size eta changes the weight by -eta s^2 c^2 [G]_2r to first order.
`direction` says which of the 2r indices go to A and which to B (the first step is the same), `scale` what c is.

peft's version is another: there B holds U S, only B is scaled, and `random` takes the same indices for both.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ftrecipes.errors import UserError
from ftrecipes.method import parts_of
from ftrecipes.methods.adapters.calibrate import mean_gradients
from ftrecipes.methods.adapters.delta import Layer
from ftrecipes.methods.adapters.offset import OffsetMethod
from ftrecipes.methods.adapters.svd import svd


class LoRAGA(OffsetMethod):
    """LoRA that starts along the gradient."""

    rank: int
    alpha: float
    rslora: bool
    gamma: float
    direction: str
    scale: str
    iters: int
    bsz: int
    norm_clip: bool
    svd_iterations: int | None

    def prepare(self, run: Any) -> None:
        parts = parts_of(run, self, self.targets, self.blocks)
        for part in parts:
            self.check(part)
            layer = Layer(part.name, part.module)
            if 2 * self.rank > min(layer.shape):
                raise UserError(
                    f"{self.key}.rank={self.rank}: {part.name} is {layer.shape[0]} x {layer.shape[1]}, and 2 x rank singular "
                    f"vectors of its gradient are needed; the rank is at most {min(layer.shape) // 2}"
                )
        self.gradients_of = {} if parts[0].weight.is_meta else mean_gradients(run, self, parts, iters=self.iters, bsz=self.bsz)
        super().prepare(run)
        run.count("gradient_starts", len(self.deltas))

    def factors_of(self, run: Any, layer: Layer) -> tuple[Tensor, Tensor]:
        r, rng = self.rank, run.generator("lora_ga", layer.name)
        G = layer.matrix(self.gradients_of.pop(layer.name)).to(layer.device)
        U, _, V = svd(G, 2 * r, iterations=self.svd_iterations, rng=rng)
        of_A, of_B = {
            "ArB2r": lambda i: (i[:r], i[r:]),
            "A2rBr": lambda i: (i[r:], i[:r]),
            "ArBr": lambda i: (i[1::2], i[0::2]),
            "random": lambda i: i[torch.randperm(2 * r, generator=rng)].split(r),
        }[self.direction](torch.arange(2 * r))
        c = self.factor(layer)
        A, B = c * V.T[of_A], c * U[:, of_B]
        if self.norm_clip:
            largest = float((self.s * B @ A).abs().max())
            ratio = min(1.0, float(layer.weight.abs().max()) / largest)
            A, B = A * ratio**0.5, B * ratio**0.5
        return B, A

    @property
    def s(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def factor(self, layer: Layer) -> float:
        """c, what singular vectors are multiplied with."""
        if self.scale == "stable":
            return float(layer.shape[0] ** 0.25 / self.gamma**0.5)
        if self.scale == "gd":
            return 1 / self.s
        if self.scale == "weightS":
            return float((torch.linalg.svdvals(layer.weight)[: self.rank] / self.s).sqrt().mean())
        return 1.0
