"""Weight arithmetic inside a run: the tuned model as a point that can be moved along the line from its start.

`Line` holds theta_0 and theta_1 of what differs between them and puts the model anywhere on the line. Adapters stay
adapters: the strength of each delta or insert is set, so that the product is scaled and not both of its factors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ftrecipes.methods.selection.sparse import write
from ftrecipes.update import wide

if TYPE_CHECKING:
    from ftrecipes.run import Run


class Line:
    """The straight line from the start (alpha 0) to the tuned weights (alpha 1)."""

    def __init__(self, run: Run) -> None:
        self.deltas = {name: module for name, module in run.model.named_modules() if hasattr(module, "strength")}
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
    def at(self, alpha: float | Callable[[str], float]) -> None:
        """Put the model at (1 - alpha) theta_0 + alpha theta_1, computed in float32; integers are the tuned ones.

        alpha: one for all, or a function of a weight's name.
        """
        factor = alpha if callable(alpha) else lambda name: alpha
        for name, delta in self.deltas.items():
            delta.strength = factor(name)  # type: ignore[assignment]
        for name, tensor in self.live.items():
            tensor.copy_(between(self.start[name], self.end[name], factor(name)))
        for module in self.sparse.values():  # their chosen values are what the next forward pass writes
            module.chosen.take(module.weight)


def between(start: Tensor, end: Tensor, alpha: float) -> Tensor:
    """(1 - alpha) start + alpha end in at least float32, in the dtype of `end`; the ends, and what did not move, bit for bit."""
    if alpha in (0.0, 1.0) or not end.is_floating_point():
        return start.to(end.dtype) if alpha == 0.0 else end
    return torch.where(start == end, end, ((1 - alpha) * wide(start) + alpha * wide(end)).to(end.dtype))


def measure_norms(run: Run, batches: int) -> None:
    """Measure BatchNorm statistics, which do not mix, again over training batches of `trainer.batch` examples."""
    norms = [m for m in run.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not (batches and norms):
        return
    momenta, training = [m.momentum for m in norms], [m.training for m in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    size = run.settings.trainer.batch
    with torch.no_grad():
        for batch in run.calibration(min(batches * size, len(run.data["train"])), batch=size):
            run.task.outputs(run.model, batch)
    for norm, momentum, mode in zip(norms, momenta, training, strict=True):
        norm.momentum = momentum
        norm.train(mode)
