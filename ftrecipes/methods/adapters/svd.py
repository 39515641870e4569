"""Singular value decompositions of matrices, with signs fixed so that they repeat, and how a record knows them again."""

from __future__ import annotations

import torch
from torch import Tensor

from ftrecipes.errors import UserError


def svd(
    weight: Tensor, rank: int | None = None, *, iterations: int | None = None, rng: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD W = U diag(s) V^T of a (rows x cols) weight in float32 or better: U (rows, n), s (n,), V (cols, n).

    The largest entry of every u_i is positive. `rank` keeps the first triplets; with `iterations` (not 0) they come from
    a randomized SVD over twice as many directions with so many power iterations, drawn with `rng`. On the meta device
    only shapes are real.
    """
    n = min(weight.shape) if rank is None else min(rank, *weight.shape)
    if weight.is_meta:
        empty = [(weight.shape[0], n), (n,), (weight.shape[1], n)]
        u, s, v = (torch.empty(shape, device="meta") for shape in empty)
        return u, s, v
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if not iterations:
        U, s, Vh = torch.linalg.svd(wide, full_matrices=False)
        V = Vh.T
    else:
        assert rng is not None
        with torch.random.fork_rng([weight.device] if weight.is_cuda else []):
            torch.manual_seed(int(torch.randint(2**62, (1,), generator=rng)))
            U, s, V = torch.svd_lowrank(wide, q=min(2 * n, *weight.shape), niter=iterations)
    U, s, V = U[:, :n], s[:n], V[:, :n]
    sign = torch.sign(U.gather(0, U.abs().argmax(0, keepdim=True)))
    return (U * sign).contiguous(), s.contiguous(), (V * sign).contiguous()


def probe(U: Tensor) -> Tensor:
    """One number of each left vector (n,); they change with the vectors' order, signs and directions."""
    numbers = U.T @ torch.cos(torch.arange(len(U), dtype=U.dtype, device=U.device))
    return numbers if numbers.is_meta else numbers.cpu()


def check_probe(key: str, name: str, here: Tensor, saved: Tensor) -> None:
    """Refuse to put numbers that belong to other singular vectors on those found here."""
    if (here - saved).norm() > 0.03 * here.norm():
        raise UserError(f"{key}: the singular vectors of {name} come out differently here than where it was tuned; ftr merge it there")
