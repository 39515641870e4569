"""CapaBoost: Increasing Model Capacity for Free: A Simple Strategy for Parameter Efficient Fine-tuning (arXiv 2407.01320).

The same two LoRA factors act d times side by side, each time under other masks, which are drawn once and never change:

    W' = W + s sum_i (B * M_B^i) (A * M_A^i),   i = 1..d,   s = alpha / r   (* entry by entry)

A (r x in) is Kaiming uniform, B (out x r) zero. The masked copies are different matrices, so the update's rank goes up to
d r, while what trains, r (in + out) numbers, is that of one LoRA. Each mask holds floor(density * entries) ones at random
places (`random`), or two in every four consecutive entries (`nm`, for sparse tensor cores). No copy is rescaled by
1 / density. The authors' code keeps d copies equal and adds up their masked gradients; autograd does the same here.

The masks are kept as bits in the record. Of the paper's forms this is the one on LoRA.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ftrecipes.errors import UserError
from ftrecipes.methods.adapters.delta import Delta, DeltaMethod, Factors, Layer
from ftrecipes.methods.adapters.lora import LowRank

if TYPE_CHECKING:
    from ftrecipes.run import Run

BITS = 2 ** torch.arange(8, dtype=torch.uint8)


def pack(mask: Tensor) -> Tensor:
    """Booleans as bytes of eight, the last one filled up with zeros."""
    flat = mask.flatten().to("cpu", torch.uint8)
    return (torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8) * BITS).sum(1, dtype=torch.uint8)


def unpack(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `pack`."""
    entries = int(torch.tensor(shape).prod())
    return (packed[:, None] & BITS).bool().flatten()[:entries].view(shape)


class Boosted(LowRank):
    """s sum_i (B * M_B^i)(A * M_A^i)."""

    M_A: Tensor
    M_B: Tensor

    def __init__(self, layer: Layer, method: Any, rng: Callable[[str], torch.Generator], saved: dict[str, Any] | None = None) -> None:
        super().__init__(layer, method, rng)
        for name, factor in (("M_A", self.A), ("M_B", self.B)):
            shape = (method.num_layer, *factor.shape)
            if layer.device.type == "meta":
                mask = torch.empty(shape, dtype=torch.bool, device="meta")
            elif saved is not None:
                mask = unpack(saved[name], shape)
            else:
                mask = torch.stack([self.draw(method, factor.shape, rng(f"{name}{i}")) for i in range(method.num_layer)])
            self.register_buffer(name, mask.to(layer.device), persistent=False)

    def draw(self, method: Any, shape: torch.Size, rng: torch.Generator) -> Tensor:
        """One mask (rows x cols, boolean)."""
        entries = shape.numel()
        if method.pattern == "random":
            ones = torch.randperm(entries, generator=rng)[: int(method.density * entries)]
            return torch.zeros(entries, dtype=torch.bool).index_fill_(0, ones, True).view(shape)
        if entries % 4:
            raise UserError(f"capaboost.pattern=nm: {self.layer.name} has a factor of {entries} numbers, not a multiple of 4; change rank")
        ones = torch.rand(entries // 4, 4, generator=rng).argsort(1)[:, :2]
        return torch.zeros(entries // 4, 4, dtype=torch.bool).scatter_(1, ones, True).view(shape)

    def stacked(self) -> tuple[Tensor, Tensor]:
        """The copies side by side: B (rows x d r), A (d r x cols)."""
        return (self.B * self.M_B).movedim(0, 1).flatten(1), (self.A * self.M_A).flatten(0, 1)

    def delta(self) -> Tensor:
        B, A = self.stacked()
        return self.scale * B @ A

    def factors(self) -> Factors | None:
        return Factors(*self.stacked(), self.scale * self.strength)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if x.is_floating_point():
            x = self.dropout(x)
        return y + self.scale * self.product(x, *self.stacked())

    def structure(self) -> dict[str, Any]:
        return {"M_A": pack(self.M_A), "M_B": pack(self.M_B)}


class CapaBoost(DeltaMethod):
    """LoRA whose factors act under several fixed masks."""

    module = Boosted
    num_layer: int
    density: float
    pattern: str

    def prepare(self, run: Run) -> None:
        if self.pattern == "nm" and self.density != 0.5:
            raise UserError(f"capaboost.density={self.density}: pattern=nm keeps two of every four entries; leave density at 0.5")
        super().prepare(run)
        run.count("masks", 2 * self.num_layer * len(self.deltas))

    def make(self, layer: Layer, rng: Callable[[str], torch.Generator], saved: dict[str, Any] | None) -> Delta:
        return Boosted(layer, self, rng, saved)
