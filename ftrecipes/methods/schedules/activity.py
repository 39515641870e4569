"""Activity schedules: which blocks learn at which update.

A paper gives `awake(run)`, the depths of the blocks that learn in the coming update, as a function of (seed, step). The
mechanism switches: a sleeping block forms no weight gradients, holds no `.grad`, and, with `drop_state`, gives up its
optimizer state. What lies outside the blocks (embedding, final norm, head) is always awake unless `outside` is false.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from ftrecipes.errors import UserError
from ftrecipes.method import Method

if TYPE_CHECKING:
    from ftrecipes.run import Run


class Activity(Method):
    """Base of the methods that switch blocks on and off."""

    drop_state: bool = True
    outside: bool = True

    def prepare(self, run: Run) -> None:
        if not run.anatomy.blocks:
            raise UserError(f"{self.key}: {run.settings.model.name} has no blocks to switch")
        self.now: list[int] | None = None
        self.saved: list[int] | None = None

    def awake(self, run: Run) -> list[int]:
        """Depths of the blocks that learn in the coming update."""
        raise NotImplementedError

    def due(self, run: Run) -> bool:
        """Whether the coming update begins a new period."""
        raise NotImplementedError

    def begin(self, run: Run) -> None:
        if self.now is None and self.saved is not None:
            self.set(run, self.saved)  # a resumed period: nothing is dropped
        if self.now is None or self.due(run):
            if self.drop_state and self.now is not None and run.optimizer is not None:
                run.forget([p for depth in range(len(run.anatomy.blocks)) for p in self.parameters(run, depth)])
            self.set(run, sorted(self.awake(run)))
            run.count("switches")

    def set(self, run: Run, awake: list[int]) -> None:
        """Let these blocks learn and no others."""
        for depth in range(len(run.anatomy.blocks)):
            for parameter in self.parameters(run, depth):
                parameter.requires_grad_(depth in awake)
        if not self.outside:
            for _, parameter in run.anatomy.outside():
                parameter.requires_grad_(False)
        self.now = awake

    def parameters(self, run: Run, depth: int) -> list[nn.Parameter]:
        """What trains in a block."""
        prefix = f"{run.anatomy.blocks[depth][0]}."
        return [p for name, p in run.trainable().items() if name.startswith(prefix)]

    def state_dict(self) -> dict[str, Any]:
        return {"now": self.now}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.saved = state["now"]

    def finish(self, run: Run) -> None:
        for parameter in run.trainable().values():
            parameter.requires_grad_(True)
