"""Weight arithmetic inside a run: the tuned model as a point that can be moved along the line from its start.

`Line` holds theta_0 and theta_1 of what differs between them and puts the model anywhere on the line. Adapters stay
adapters: the strength of each delta is set, so that the product is scaled and not both of its factors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ftrecipes.methods.adapters.delta import Delta
from ftrecipes.methods.selection.sparse import write
from ftrecipes.update import wide

if TYPE_CHECKING:
    from ftrecipes.run import Run


class Line:
    """The straight line from the start (alpha 0) to the tuned weights (alpha 1)."""

    def __init__(self, run: Run) -> None:
        self.deltas = [module for module in run.model.modules() if isinstance(module, Delta)]
        self.sparse = {name: m for name, m in run.model.named_modules() if hasattr(m, "chosen")}
        for module in self.sparse.values():  # a weight gets its chosen values when it is used
            write(module.weight, module.chosen.index, module.chosen.entries())
        here = {**dict(run.model.named_buffers()), **dict(run.model.named_parameters())}
        start = run.pristine().state_dict()
        self.live = {
            name: tensor for name, tensor in here.items()
            if name in run.base_names and name in start and tensor.shape == start[name].shape
            and not torch.equal(tensor.detach().cpu(), start[name].to(tensor.dtype))
        }  # fmt: skip
        self.start = {name: start[name] for name in self.live}
        run.touch(*(name for name in self.live if name.removesuffix(".weight") not in self.sparse))
        self.end: dict[str, Tensor] = {name: tensor.detach().cpu().clone() for name, tensor in self.live.items()}

    @torch.no_grad()
    def at(self, alpha: float) -> None:
        """Put the model at (1 - alpha) theta_0 + alpha theta_1, computed in float32; integers are the tuned ones."""
        for delta in self.deltas:
            delta.strength = alpha
        for name, tensor in self.live.items():
            tensor.copy_(between(self.start[name], self.end[name], alpha))
        for module in self.sparse.values():  # their chosen values are what the next forward pass writes
            module.chosen.take(module.weight)


def between(start: Tensor, end: Tensor, alpha: float) -> Tensor:
    """(1 - alpha) start + alpha end in at least float32, in the dtype of `end`; the ends, and what did not move, bit for bit."""
    if alpha in (0.0, 1.0) or not end.is_floating_point():
        return start.to(end.dtype) if alpha == 0.0 else end
    return torch.where(start == end, end, ((1 - alpha) * wide(start) + alpha * wide(end)).to(end.dtype))
