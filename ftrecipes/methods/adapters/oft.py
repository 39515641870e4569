"""OFT: Controlling Text-to-Image Diffusion by Orthogonal Finetuning (arXiv 2306.07280).

The inputs of a frozen weight are rotated, block by block of b coordinates, so the angles between its neurons stay as they
were:

    W' = W R^T,   R = diag(R_1 .. R_n),   R_i = (I + Q_i)(I - Q_i)^-1,   Q_i = -Q_i^T (b x b) zero at the start

b(b - 1)/2 numbers train in each block (in all together with `block_share`). R - I = 2 Q (I - Q)^-1 is what is computed: a
rotation by less than 0.4 % would be none in 16 bits. `neumann_terms` k replaces the inverse by the first powers,
I + 2 Q + .. + 2 Q^(k-2) + Q^(k-1), as OFTv2 (arXiv 2506.19847) and `peft` do by default. COFT keeps the norm of every
block of Q below eps / sqrt(n). Of a convolution the flattened kernel's columns are rotated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ftrecipes.anatomy import CONVS
from ftrecipes.errors import UserError
from ftrecipes.methods.adapters.delta import Delta, DeltaMethod, Layer, without_autocast

if TYPE_CHECKING:
    from ftrecipes.run import Run


class Rotation(Delta):
    """W R^T; Q holds the entries above the diagonal of each block (blocks x b(b - 1)/2)."""

    upper: Tensor

    def __init__(self, layer: Layer, method: Any, rng: Callable[[str], torch.Generator]) -> None:
        super().__init__(layer, method, rng)
        b, cols = method.block_size, layer.shape[1]
        if cols % b:
            raise UserError(f"oft.block_size={b}: {layer.name} has {cols} inputs, which it does not divide; give a divisor")
        self.b, self.n, self.terms = b, cols // b, method.neumann_terms
        self.Q = self.parameter(1 if method.block_share else self.n, b * (b - 1) // 2)
        self.register_buffer("upper", torch.triu_indices(b, b, 1, device=layer.device), persistent=False)

    def turn(self) -> Tensor:
        """R - I (blocks x b x b)."""
        with without_autocast(self.Q.device):
            Q = self.Q.new_zeros(len(self.Q), self.b, self.b).index_put(
                (torch.arange(len(self.Q), device=self.Q.device)[:, None], *self.upper), self.Q
            )
            Q = Q - Q.mT
            if self.terms is None:
                return torch.linalg.solve(torch.eye(self.b, dtype=Q.dtype, device=Q.device) - Q, 2 * Q, left=False)
            out, power = torch.zeros_like(Q), Q
            for k in range(1, self.terms):
                out = out + (power if k == self.terms - 1 and k > 1 else 2 * power)
                power = power @ Q
            return out

    def delta(self) -> Tensor:
        W = self.layer.weight.unflatten(1, (self.n, self.b))
        return torch.einsum("rnk,nck->rnc", W, self.turn().expand(self.n, -1, -1)).flatten(1)

    def enter(self, x: Tensor) -> Tensor | None:
        if self.strength != 1.0 or isinstance(self.layer.module, CONVS):
            return None
        blocks = x.unflatten(-1, (self.n, self.b))
        turned = torch.einsum("...nk,nkc->...nc", blocks, self.turn().to(x.dtype).expand(self.n, -1, -1))
        return x + turned.flatten(-2)


class OFT(DeltaMethod):
    """Rotated inputs; with `coft`, not by much."""

    module = Rotation
    kinds = (nn.Linear, Conv1D, nn.Conv2d)
    coft: bool
    eps: float

    @torch.no_grad()
    def updated(self, run: Run) -> None:
        if not self.coft:
            return
        for delta in self.deltas.values():
            assert isinstance(delta, Rotation)
            norm = delta.Q.norm(dim=1, keepdim=True) * 2**0.5  # of the whole block: each entry stands there twice
            delta.Q.mul_((self.eps * len(delta.Q) ** -0.5 / norm).clamp(max=1))
        run.count("projections", len(self.deltas))
