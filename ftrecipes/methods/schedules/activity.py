"""Activity schedules: which parts of a model learn at which update.

A paper gives `awake(run)`, the units that learn in the coming update, as a function of (seed, step). A unit is a block
unless `units(run)` says otherwise. The mechanism switches: a sleeping unit forms no weight gradients, holds no `.grad`,
and, with `drop_state`, gives up its optimizer state. What lies in no unit (embedding, final norm, head, where units are
blocks) is always awake unless `outside` is false.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from ftrecipes.errors import UserError
from ftrecipes.method import Method

if TYPE_CHECKING:
    from ftrecipes.run import Run


class Activity(Method):
    """Base of the methods that switch units on and off."""

    drop_state: bool = True
    outside: bool = True

    def prepare(self, run: Run) -> None:
        if not run.anatomy.blocks:
            raise UserError(f"{self.key}: {run.settings.model.name} has no blocks to switch")
        self.now: list[int] | None = None
        self.saved: list[int] | None = None
        self._members: list[list[str]] | None = None

    def units(self, run: Run) -> list[list[str]]:
        """Names of the trainable parameters of each unit; the blocks by depth."""
        prefixes = [f"{name}." for name, _ in run.anatomy.blocks]
        return [[name for name in run.trainable() if name.startswith(prefix)] for prefix in prefixes]

    def awake(self, run: Run) -> list[int]:
        """The units that learn in the coming update."""
        raise NotImplementedError

    def due(self, run: Run) -> bool:
        """Whether the coming update begins a new period."""
        raise NotImplementedError

    def begin(self, run: Run) -> None:
        if self.now is None and self.saved is not None:
            self.set(run, self.saved)  # a resumed period: nothing is dropped
        if self.now is None or self.due(run):
            if self.drop_state and self.now is not None and run.optimizer is not None:
                run.forget([p for unit in range(len(self.members(run))) for p in self.parameters(run, unit)])
            self.set(run, sorted(self.awake(run)))
            run.count("switches")

    def set(self, run: Run, awake: list[int]) -> None:
        """Let these units learn and no others."""
        trainable, inside = run.trainable(), set()
        for unit, names in enumerate(self.members(run)):
            inside.update(names)
            for name in names:
                trainable[name].requires_grad_(unit in awake)
        if not self.outside:
            for name in trainable.keys() - inside:
                trainable[name].requires_grad_(False)
        self.now = awake

    def members(self, run: Run) -> list[list[str]]:
        """What `units` said, once what trains is known."""
        if self._members is None:
            self._members = self.units(run)
        return self._members

    def parameters(self, run: Run, unit: int) -> list[nn.Parameter]:
        """What trains in a unit."""
        return [run.trainable()[name] for name in self.members(run)[unit]]

    def state_dict(self) -> dict[str, Any]:
        return {"now": self.now}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.saved = state["now"]

    def finish(self, run: Run) -> None:
        for parameter in run.trainable().values():
            parameter.requires_grad_(True)
