"""LoRA: Low-Rank Adaptation of Large Language Models (arXiv 2106.09685).

The update of a frozen weight W (out x in) is a product of two thin factors,

    W' = W + s B A,   A (r x in) Kaiming uniform, B (out x r) zero,   s = alpha / r

so W' = W at the start. rsLoRA (arXiv 2312.03732) takes s = alpha / sqrt(r), which keeps the update's size at large r.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ftrecipes.methods.adapters.delta import Delta, DeltaMethod, Factors, Layer, check_rank


class LowRank(Delta):
    """s B A; dropout acts on the input of A. `rank` where it is not the method's."""

    def __init__(self, layer: Layer, method: Any, rng: Callable[[str], torch.Generator], rank: int | None = None) -> None:
        super().__init__(layer, method, rng)
        rank, (rows, cols) = method.rank if rank is None else rank, layer.shape
        check_rank(method, layer, rank)
        self.A = self.parameter(rank, cols)
        self.B = self.parameter(rows, rank)
        self.start(rng)
        self.scale = method.alpha / (math.sqrt(rank) if getattr(method, "rslora", False) else rank)
        self.dropout = nn.Dropout(method.dropout)

    @torch.no_grad()
    def start(self, rng: Callable[[str], torch.Generator]) -> None:
        """One factor random, the other zero; of an embedding the zero one is the tokens' (as in loralib)."""
        if self.A.is_meta:
            return
        random, zero, name = (self.B, self.A, "B") if isinstance(self.layer.module, nn.Embedding) else (self.A, self.B, "A")
        drawn = torch.empty(random.shape, dtype=random.dtype)
        if name == "A":
            nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=rng(name))
        else:
            drawn.normal_(generator=rng(name))
        random.copy_(drawn)
        zero.zero_()

    def delta(self) -> Tensor:
        return self.scale * self.B @ self.A

    def factors(self) -> Factors | None:
        return Factors(self.B, self.A, self.scale * self.strength)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if x.is_floating_point():
            x = self.dropout(x)
        return y + self.scale * self.product(x, self.B, self.A)


class LoRA(DeltaMethod):
    """Low-rank updates on the targets; optionally their biases train too."""

    module = LowRank
    bias: str

    def prepare(self, run: Any) -> None:
        super().prepare(run)
        self._biases(run)

    def restore(self, run: Any, structure: dict[str, Any]) -> None:
        super().restore(run, structure)
        self._biases(run)

    def _biases(self, run: Any) -> None:
        for name, parameter in run.model.named_parameters():
            owner, _, last = name.rpartition(".")
            if last == "bias" and (self.bias == "all" or (self.bias == "lora_only" and owner in self.deltas)):
                parameter.requires_grad_(True)
