"""SVFT: Parameter-Efficient Fine-Tuning with Singular Vectors (arXiv 2405.19597).

The update of a weight W = U diag(s) V^T (n = min(out, in)) is a sparse combination of outer products of its own singular
vectors, with the coefficients as the only trainable numbers:

    W' = W + U M V^T,   M (n x n) zero outside a pattern Omega,   M = sigmoid(gate) * theta on Omega

Patterns for `off_diag` d: plain i = j; banded |i - j| <= d, n(2d + 1) - d(d + 1) numbers; random and top_k as many
positions, drawn without replacement or with the largest alignment u_i . v_j. top_k needs a square weight; where it is
not, the pattern is banded and says so.

The authors' code starts off the pretrained weight (theta ~ N(0, 2/|Omega|), gate 0); `init: zero` starts on it. The
paper writes M alone; the gate is in the code that its results come from, and is the default here.

U and V are not saved but found again from the weight. Near-equal singular values leave them room, and another machine's
routine may take it: one number of each is saved, and a record with other vectors is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ftrecipes.methods.adapters.delta import Delta, DeltaMethod, Layer, check_rank, linear
from ftrecipes.methods.adapters.svd import check_probe, probe, svd


class Coefficients(torch.autograd.Function):
    """h M^T for M sparse on Omega: M is dense only while it is used, in either pass."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, values: Tensor, index: Tensor, n: int) -> Tensor:
        ctx.save_for_backward(h, values, index)
        ctx.n = n
        return linear(h, _dense(values, index, n))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        h, values, index = ctx.saved_tensors
        (g,) = grads
        grad_h = g @ _dense(values, index, ctx.n).to(g.dtype)
        grad_m = g.flatten(0, -2).T @ h.flatten(0, -2).to(g.dtype)
        return grad_h.to(h.dtype), grad_m.flatten()[index].to(values.dtype), None, None


def _dense(values: Tensor, index: Tensor, n: int) -> Tensor:
    return torch.zeros(n * n, dtype=values.dtype, device=values.device).index_copy_(0, index, values).view(n, n)


def banded(n: int, d: int) -> Tensor:
    """Flat positions (row-major) of |i - j| <= d in an n x n matrix."""
    i = torch.arange(n)[:, None]
    j = i + torch.arange(-d, d + 1)[None]
    return (i * n + j)[(j >= 0) & (j < n)]


class SingularVectors(Delta):
    """U M V^T."""

    U: Tensor
    V: Tensor
    index: Tensor

    def __init__(self, layer: Layer, method: Any, rng: Callable[[str], torch.Generator], saved: dict[str, Any] | None = None) -> None:
        super().__init__(layer, method, rng)
        if method.rank is not None:
            check_rank(method, layer, method.rank)
        U, _, V = svd(layer.weight, method.rank)
        self.probe = probe(U)
        if saved is not None:
            check_probe(method.key, layer.name, self.probe, saved["probe"])
        dtype = layer.raw.dtype
        if method.fill_orthonormal and method.rank is not None:
            U, V = _fill(U, min(layer.shape), rng("U")), _fill(V, min(layer.shape), rng("V"))
        self.n = U.shape[1]
        self.register_buffer("U", U.to(dtype), persistent=False)
        self.register_buffer("V", V.to(dtype), persistent=False)
        self.pattern: str
        self.pattern, index = self._pattern(method, U, V, rng) if saved is None else (saved["pattern"], saved["index"])
        d = min(method.off_diag, self.n - 1)
        if index is None:
            index = banded(self.n, 0 if self.pattern == "plain" else d)
        self.register_buffer("index", index.to(layer.device), persistent=False)
        std = (2.0 / len(index)) ** 0.5
        self.theta = self.parameter(len(index), init=lambda t: t.normal_(0, std, generator=rng("theta")) if method.init == "kaiming" else t)
        self.gate = self.parameter(1) if method.gate else None

    def _pattern(self, method: Any, U: Tensor, V: Tensor, rng: Callable[[str], torch.Generator]) -> tuple[str, Tensor | None]:
        n, pattern = self.n, method.pattern
        if pattern in ("plain", "banded"):
            return pattern, None
        count = len(banded(n, min(method.off_diag, n - 1)))
        if U.is_meta:
            return pattern, torch.arange(count)
        if pattern == "random":
            return pattern, torch.randperm(n * n, generator=rng("random"))[:count].sort().values
        if U.shape != V.shape:
            return "banded", None
        return pattern, (U.T @ V).flatten().topk(count).indices.sort().values.cpu()

    def coefficients(self) -> Tensor:
        """The values of M on Omega."""
        return self.theta if self.gate is None else torch.sigmoid(self.gate) * self.theta

    def delta(self) -> Tensor:
        U, V = self.U.to(self.layer.dtype), self.V.to(self.layer.dtype)
        return U @ _dense(self.coefficients(), self.index, self.n) @ V.T

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.layer.into(x, self.V.T)
        if self.pattern == "plain":
            h = h * self.coefficients().to(h.dtype)
        else:
            h = Coefficients.apply(h, self.coefficients(), self.index, self.n)
        return y + linear(h, self.U)

    def structure(self) -> dict[str, Any]:
        given = self.pattern in ("random", "top_k")
        return {"pattern": self.pattern, "index": self.index.cpu() if given else None, "probe": self.probe}


def _fill(basis: Tensor, width: int, rng: torch.Generator) -> Tensor:
    """The basis (rows, r) with columns of a random orthonormal matrix appended up to `width`, as in the authors' code."""
    if basis.is_meta:
        return torch.empty(len(basis), width, device="meta")
    random = nn.init.orthogonal_(torch.empty(len(basis), width), generator=rng).to(basis)
    return torch.cat([basis, random[:, : width - basis.shape[1]]], 1)


class SVFT(DeltaMethod):
    """Sparse combinations of a weight's own singular vectors."""

    module = SingularVectors
    kinds = (nn.Linear, Conv1D, nn.Conv2d)
    pattern: str

    def make(self, layer: Layer, rng: Callable[[str], torch.Generator], saved: dict[str, Any] | None) -> Delta:
        return SingularVectors(layer, self, rng, saved)

    def prepare(self, run: Any) -> None:
        super().prepare(run)
        other = [n for n, d in self.deltas.items() if isinstance(d, SingularVectors) and d.pattern != self.pattern]
        if other:
            run.say(
                f"svft: top_k needs square weights; {len(other)} of {len(self.deltas)} are not and take the banded pattern ({other[0]} first)"
            )
