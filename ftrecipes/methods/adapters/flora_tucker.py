"""FLoRA: Low-Rank Core Space for N-dimension (arXiv 2405.14739; later "Maintaining Structural Integrity in Parameter Spaces").

The update of a weight with N axes d_1 .. d_N is a Tucker product: a small core with N axes, one factor to each of them,

    dW = s G x_1 U_1 x_2 U_2 .. x_N U_N,   G (r_1 x .. x r_N) zero,   U_n (d_n x r_n) ~ N(0, 1 / (2 r_n))

so a convolution's update keeps its height and width instead of being flattened into a matrix. Axes stand in the order in,
out, kernel sides; the ranks need not be equal. On a linear weight dW = s U_out G^T U_in^T. All of G and U train: prod r_n +
sum d_n r_n numbers. At the start G alone has a gradient. s is a constant, not divided by a rank.

A convolution is computed as its factors: 1x1 by U_in, the core with its kernel sides opened, 1x1 by U_out. A grouped one,
whose in-axis is that of one group, is computed from the dense update. A rank beyond its axis is cut to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ftrecipes.anatomy import CONVS
from ftrecipes.methods.adapters.delta import Delta, DeltaMethod, Factors, Layer, linear


class Tucker(Delta):
    """s G x_1 U_1 .. x_N U_N."""

    def __init__(self, layer: Layer, method: Any, rng: Callable[[str], torch.Generator]) -> None:
        super().__init__(layer, method, rng)
        self.conv = isinstance(layer.module, CONVS)
        rows, cols, *sides = layer.raw.shape if self.conv else layer.shape
        dims = [cols, rows, *sides]
        wanted = [*method.rank, *[method.rank[-1]] * len(dims)]
        ranks = [min(r, d) for r, d in zip(wanted, dims, strict=False)]
        self.G = self.parameter(*ranks)
        self.U = nn.ParameterList(
            self.parameter(d, r, init=self.drawn(rng(f"U{n}"))) for n, (d, r) in enumerate(zip(dims, ranks, strict=True))
        )
        self.scale = method.scale
        self.dropout = nn.Dropout(method.dropout)

    @staticmethod
    def drawn(rng: torch.Generator) -> Callable[[Tensor], Tensor]:
        """The start of a factor."""
        return lambda U: nn.init.kaiming_normal_(U, a=math.sqrt(3), generator=rng)

    def core(self) -> Tensor:
        """G with its kernel sides opened: (r_out x r_in x sides) of a convolution, (r_out x r_in) else."""
        G = self.G
        for U in [*self.U][2:]:
            G = torch.tensordot(G, U, ([2], [1]))  # the opened side goes to the end, so the next one stands at 2
        return G.transpose(0, 1)

    def delta(self) -> Tensor:
        inner = torch.tensordot(self.U[1], self.core(), 1)  # rows x r_in x sides
        return self.scale * torch.tensordot(inner, self.U[0], ([1], [1])).movedim(-1, 1).flatten(1)

    def factors(self) -> Factors | None:
        if self.conv:
            right = torch.tensordot(self.core(), self.U[0], ([1], [1])).movedim(-1, 1).flatten(1)
            return Factors(self.U[1], right, self.scale * self.strength)
        return Factors(self.U[1], self.core() @ self.U[0].T, self.scale * self.strength)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        module = self.layer.module
        if x.is_floating_point():
            x = self.dropout(x)
        if not self.conv:
            return y + self.scale * self.product(x, self.U[1], self.core() @ self.U[0].T)
        if module.groups > 1:  # type: ignore[operator]
            return super().forward(x, y)
        inner = linear(x.movedim(1, -1), self.U[0].T).movedim(-1, 1)
        h = module._conv_forward(inner, self.core().to(x.dtype), None)  # type: ignore[operator]
        return y + self.scale * linear(h.movedim(1, -1), self.U[1])


class FLoRA(DeltaMethod):
    """Tucker updates on linear weights, convolutions of any dimension and embeddings."""

    module = Tucker
    kinds = (nn.Linear, Conv1D, *CONVS, nn.Embedding)
    grouped = True
