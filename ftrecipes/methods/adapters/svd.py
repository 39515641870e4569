"""Singular value decompositions of frozen weights, with signs fixed so that they repeat."""

from __future__ import annotations

import torch
from torch import Tensor


def svd(weight: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD W = U diag(s) V^T of a (rows x cols) weight in float32 or better: U (rows, n), s (n,), V (cols, n).

    The largest entry of every u_i is positive. `rank` keeps the first triplets. On the meta device only shapes are real.
    """
    n = min(weight.shape) if rank is None else min(rank, *weight.shape)
    if weight.is_meta:
        empty = [(weight.shape[0], n), (n,), (weight.shape[1], n)]
        u, s, v = (torch.empty(shape, device="meta") for shape in empty)
        return u, s, v
    U, s, Vh = torch.linalg.svd(weight.to(torch.promote_types(weight.dtype, torch.float32)), full_matrices=False)
    U, s, V = U[:, :n], s[:n], Vh[:n].T
    sign = torch.sign(U.gather(0, U.abs().argmax(0, keepdim=True)))
    return (U * sign).contiguous(), s.contiguous(), (V * sign).contiguous()
