"""One update: a window of micro-batches, its gradients, clipping, and the optimizer's step.

The gradient of a window is the gradient of

    (sum over micro-batches of the loss summed over counted units) / (counted units of the whole window, all ranks)

so it does not depend on how the examples are split into micro-batches or over ranks. It can be computed as often as a
method likes on the same window: dropout draws depend on (seed, fit, step, micro-batch, rank) only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ftrecipes.errors import RunFailed

if TYPE_CHECKING:
    from ftrecipes.run import Run
    from ftrecipes.tasks.base import Batch

Loss = Callable[["Batch"], Tensor]
ONCE = re.compile(r"derivative for \S+ is not implemented|no autograd formula")
"""What torch says of an operation without a second derivative."""
TWICE = "this model cannot be differentiated twice; take model.attention=sdpa or eager, and no method that trains chosen entries of weights"


class Window:
    """The micro-batches of one update.

    micros: the batches. units: counted units (loss tokens, examples) over all micro-batches and ranks.
    """

    def __init__(self, micros: list[Batch], units: float) -> None:
        self.micros = micros
        self.units = units

    def __len__(self) -> int:
        return len(self.micros)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.micros)


class Scaler:
    """Dynamic loss scaling for float16 autocast: halve and skip on overflow, double after `interval` good steps."""

    def __init__(self, scale: float = 2.0**16, interval: int = 2000) -> None:
        self.scale, self.interval, self.good = scale, interval, 0

    def record(self, finite: bool) -> None:
        self.good = self.good + 1 if finite else 0
        if not finite:
            self.scale = max(self.scale / 2, 1.0)
        elif self.good == self.interval:
            self.scale, self.good = self.scale * 2, 0


def wide(value: Tensor) -> Tensor:
    """A number in at least float32."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


class World:
    """The processes that share a run; one by itself needs no torch.distributed."""

    @property
    def size(self) -> int:
        return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1

    @property
    def rank(self) -> int:
        return dist.get_rank() if self.size > 1 else 0

    def sum(self, tensors: list[Tensor]) -> None:
        """Add tensors over the ranks, in place, with one message per dtype."""
        if self.size == 1 or not tensors:
            return
        for dtype in {t.dtype for t in tensors}:
            same = [t for t in tensors if t.dtype == dtype]
            flat = torch.cat([t.reshape(-1) for t in same])
            dist.all_reduce(flat)
            for tensor, part in zip(same, flat.split([t.numel() for t in same]), strict=True):
                tensor.copy_(part.view_as(tensor))


class Update:
    """Computes gradients of windows and applies them; the part of a run that methods call back."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.world = World()
        precision = run.precision
        self.autocast_dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
        self.scaler = Scaler() if precision == "16-mixed" else None
        self._twice = False

    def autocast(self) -> AbstractContextManager[object]:
        """Mixed precision around a forward pass; backward, rules and optimizer run outside it."""
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.run.device.type, dtype=self.autocast_dtype)

    def _forward(self, window: Window, loss: Loss | None) -> Iterator[Tensor]:
        """The scaled share of each micro-batch in the window's loss."""
        run = self.run
        for index, batch in enumerate(window):
            run.seed_global("micro", index, self.world.rank)
            with self.autocast():
                value = loss(batch) if loss else run.stack.loss(run, batch)
            yield value / window.units

    def gradients(self, window: Window, loss: Loss | None = None) -> Tensor:
        """Fill `.grad` of what trains with the window's gradient; returns the loss (scalar, detached, over all ranks).

        loss: another loss than the stack's, a function of a micro-batch that returns a sum over its counted units.
        """
        for parameter in self.run.model.parameters():
            parameter.grad = None
        scale = self.scaler.scale if self.scaler else 1.0
        total: Tensor | None = None
        for value in self._forward(window, loss):
            if value.requires_grad:
                (value * scale if scale != 1.0 else value).backward()
            total = value.detach() if total is None else total + value.detach()
        assert total is not None
        grads = [p.grad for p in self.run.trainable().values() if p.grad is not None]
        if scale != 1.0 and grads:
            torch._foreach_mul_(grads, 1.0 / scale)
        total = wide(total)
        self.world.sum([*grads, total])
        return total

    def hessian_product(self, window: Window, vector: Sequence[Tensor], loss: Loss | None = None) -> tuple[Tensor, list[Tensor]]:
        """The window's loss, and the product of its Hessian with a vector that has the shapes of `run.active()`; fills `.grad` too.

        By differentiating twice, exact to rounding. Attention runs in plain operations meanwhile, since its fused
        kernels have no second derivative; where another part of the model has none, the run stops with one line.
        """
        active = list(self.run.active().values())
        for parameter in self.run.model.parameters():
            parameter.grad = None
        product = [torch.zeros_like(p) for p in active]
        total: Tensor | None = None
        try:
            with sdpa_kernel(SDPBackend.MATH):
                for value in self._forward(window, loss):
                    total = value.detach() if total is None else total + value.detach()
                    grads = torch.autograd.grad(value, active, create_graph=True, allow_unused=True)
                    self._check_twice(grads)
                    there = [(g, v) for g, v in zip(grads, vector, strict=True) if g is not None and g.requires_grad]
                    found = torch.autograd.grad([g for g, _ in there], active, [v for _, v in there], allow_unused=True)
                    for parameter, grad, part, sum_ in zip(active, grads, found, product, strict=True):
                        if grad is not None:
                            parameter.grad = grad.detach() if parameter.grad is None else parameter.grad + grad.detach()
                        if part is not None:
                            sum_ += part
        except RuntimeError as error:
            if not ONCE.search(str(error)):
                raise
            raise RunFailed(f"{TWICE} ({str(error).splitlines()[0]})") from None
        assert total is not None
        total = wide(total)
        self.world.sum([*(p.grad for p in active if p.grad is not None), *product, total])
        return total, product

    def _check_twice(self, grads: Sequence[Tensor | None]) -> None:
        """Look once for a function that is differentiable once only: torch would leave out its share without a word."""
        if self._twice:
            return
        nodes, seen = [g.grad_fn for g in grads if g is not None and g.grad_fn], set()
        while nodes:
            node = nodes.pop()
            if type(node).__name__ == "Error":
                raise RunFailed(f"{TWICE} (a function in it is made to be differentiated once)")
            for after, _ in node.next_functions:
                if after is not None and after not in seen:
                    seen.add(after)
                    nodes.append(after)
        self._twice = True

    @torch.no_grad()
    def loss(self, window: Window, loss: Loss | None = None) -> Tensor:
        """The window's loss without gradients (scalar, over all ranks)."""
        total: Tensor | None = None
        for value in self._forward(window, loss):
            total = value if total is None else total + value
        assert total is not None
        total = wide(total)
        self.world.sum([total])
        return total

    def apply(self, loss: Tensor | None = None) -> None:
        """Clip what `.grad` holds and let the optimizer step; a loss or gradient that is not finite stops the run."""
        run = self.run
        grads = [p.grad for p in run.trainable().values() if p.grad is not None]
        norm = nn.utils.get_total_norm(grads) if grads else torch.zeros(())
        finite = bool(torch.isfinite(norm)) and (loss is None or bool(torch.isfinite(loss)))
        if self.scaler:
            self.scaler.record(finite)
            if not finite and self.scaler.scale > 1.0 and (loss is None or bool(torch.isfinite(loss))):
                run.count("overflow")
                return
        if not finite:
            what = "loss" if loss is not None and not bool(torch.isfinite(loss)) else "gradient"
            raise RunFailed(
                f"the {what} is not finite at update {run.step + 1} ({what} {float(loss if what == 'loss' and loss is not None else norm)})"
            )
        run.log("grad_norm", norm)
        clip = run.settings.trainer.clip
        if grads and math.isfinite(clip) and norm > clip:
            torch._foreach_mul_(grads, clip / (norm + 1e-6))
        assert run.optimizer is not None
        run.optimizer.step()

    def __call__(self, window: Window) -> None:
        """The whole update of a window, by the stack's owner of the step or in the ordinary way."""
        run, stack = self.run, self.run.stack
        stack.begin(run)
        run.set_rate()
        if owner := stack.owner["step"]:
            owner.step(run, window)
        else:
            loss = self.gradients(window)
            run.log("loss", loss)
            stack.gradients(run, window)
            self.apply(loss)
        run.step += 1
        run.fit_step += 1
        stack.updated(run)
        for parameter in run.model.parameters():
            parameter.grad = None
