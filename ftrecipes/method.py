"""What a method is, and how the methods of a run stand together.

A paper is a subclass of `Method` in a file of its own. It overrides the points it needs:

    data(run)                          before training: change, weigh or choose run.data["train"]
    prepare(run)                       the model is loaded, no optimizer exists: inject, score, calibrate
    drive(run, fit)                    around the whole training; default: one fit()
    begin(run)                         before each update
    batch(run, batch)                  a micro-batch before the model sees it; returns it
    weights(run, batch, outputs)       one factor per counted unit (token, example); multiplied over the stack
    loss(run, batch)                   replaces the task's loss; returns the SUM over the counted units
    penalty(run, batch, outputs)       added to the loss; a mean, not a sum
    gradients(run, window)             once per update, when the window's gradients are complete
    step(run, window)                  owns the whole update
    optimizer(run, groups)             builds the optimizer
    updated(run)                       after each update
    finish(run)                        training is over
    sample(run, predict)               what a sampler asks at each step: returns another function in its place

A window is the list of micro-batches of one update, and every point sees it whole. What must exist before weights can be
loaded (ranks, masks, the number of merged stages) is `structure()`; what else a resumed run needs is `state_dict()`.
Both hold plain types and tensors only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ftrecipes.errors import UserError

if TYPE_CHECKING:
    from ftrecipes.anatomy import Part
    from ftrecipes.run import Run
    from ftrecipes.tasks.base import Batch, Outputs, Task
    from ftrecipes.update import Window

POINTS = [
    "data",
    "prepare",
    "drive",
    "begin",
    "batch",
    "weights",
    "loss",
    "penalty",
    "gradients",
    "step",
    "optimizer",
    "updated",
    "finish",
    "sample",
]


class Method:
    """Base of every method. The knobs of its YAML are attributes of the instance (`self.rank`)."""

    key: str
    picks: ClassVar[bool] = False
    """True when the method decides which weights train; in a stack without one, all do."""

    steps_with_optimizer: ClassVar[bool] = True
    """False when an owner of the step changes the weights itself."""

    trains_fresh: ClassVar[bool] = True
    """False when a new head keeps the numbers that it was drawn with."""

    def __init__(self, key: str, knobs: dict[str, Any]) -> None:
        self.key = key
        for name, value in knobs.items():
            if hasattr(Method, name):
                raise TypeError(f"method {key}: a knob cannot be called {name}, which is part of Method")
            setattr(self, name, value)

    def __repr__(self) -> str:
        return f"<{self.key}>"

    def set_up(self, task: Task) -> None:
        """Say what the loss counts (`task.unit`) and compares (`task.alternatives`), before data is read."""

    # -- the points -----------------------------------------------------------------------------------------------

    def data(self, run: Run) -> None: ...

    def prepare(self, run: Run) -> None: ...

    def drive(self, run: Run, fit: Callable[..., Any]) -> None:
        fit()

    def begin(self, run: Run) -> None: ...

    def batch(self, run: Run, batch: Batch) -> Batch:
        return batch

    def weights(self, run: Run, batch: Batch, outputs: Outputs) -> Tensor: ...  # type: ignore[empty-body]

    def loss(self, run: Run, batch: Batch) -> Tensor: ...  # type: ignore[empty-body]

    def penalty(self, run: Run, batch: Batch, outputs: Outputs) -> Tensor: ...  # type: ignore[empty-body]

    def gradients(self, run: Run, window: Window) -> None: ...

    def step(self, run: Run, window: Window) -> None: ...

    def optimizer(self, run: Run, groups: list[dict[str, Any]]) -> torch.optim.Optimizer: ...  # type: ignore[empty-body]

    def updated(self, run: Run) -> None: ...

    def finish(self, run: Run) -> None: ...

    def sample(self, run: Run, predict: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return predict

    # -- what a method can say about parameters -------------------------------------------------------------------

    def group(self, name: str, parameter: nn.Parameter) -> dict[str, Any]:
        """Options of one trainable parameter: `lr_scale` (a factor) and `weight_decay`."""
        return {}

    def holds(self, run: Run) -> dict[str, int]:
        """Bytes that the method keeps during an update, by kind, for plans: `optimizer` where it builds its own, `copies`, …"""
        return {}

    # -- saving ---------------------------------------------------------------------------------------------------

    def structure(self) -> dict[str, Any]:
        """What must be known to rebuild the modules before weights are loaded (plain types, tensors)."""
        return {}

    def writes(self) -> set[str]:
        """Names of frozen base weights that the method changes itself and keeps in its structure."""
        return set()

    def restore(self, run: Run, structure: dict[str, Any]) -> None:
        """Rebuild from `structure()` on the untouched base; no data is read."""
        self.prepare(run)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs beyond structure and weights."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    # -- leaving the run ------------------------------------------------------------------------------------------

    def merge(self, run: Run) -> None:
        """Fold everything into the base weights, so that the plain model is the tuned one."""

    def peft(self, run: Run) -> tuple[dict[str, Tensor], dict[str, Any]]:  # type: ignore[empty-body]
        """Tensors by peft's names and its configuration, where peft has the method itself (LoRA and DoRA are told by `factors`)."""


class Stack:
    """The methods of a run, in order."""

    def __init__(self, methods: Sequence[Method]) -> None:
        self.methods = list(methods)
        self.owner = {point: self._owner(point) for point in ("loss", "step", "optimizer")}
        self._taking_part = {point: [m for m in self.methods if overrides(m, point)] for point in POINTS}

    def _owner(self, point: str) -> Method | None:
        owners = [m for m in self.methods if overrides(m, point)]
        if len(owners) > 1:
            raise UserError(f"{owners[0].key} and {owners[1].key} cannot stack: both own `{point}`")
        return owners[0] if owners else None

    def __iter__(self) -> Iterator[Method]:
        return iter(self.methods)

    def at(self, point: str) -> list[Method]:
        """The methods that take part in a point, in the order of the stack."""
        return self._taking_part[point]

    @property
    def gradients_used(self) -> bool:
        """Whether an update needs a backward pass."""
        owner = self.owner["step"]
        return owner is None or owner.steps_with_optimizer

    @property
    def picks(self) -> bool:
        """Whether any method decides which weights train."""
        return any(m.picks for m in self.methods)

    def prepare(self, run: Run, structure: dict[str, Any] | None = None) -> None:
        """Set what trains, then let each method build itself: fresh, or from a saved structure."""
        run.model.requires_grad_(not self.picks)
        for method in self.methods:
            if structure is None:
                method.prepare(run)
            else:
                method.restore(run, structure[method.key])

    def structure(self) -> dict[str, Any]:
        return {m.key: m.structure() for m in self.methods}

    def state_dict(self) -> dict[str, Any]:
        return {m.key: m.state_dict() for m in self.methods}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for method in self.methods:
            method.load_state_dict(state[method.key])

    def drive(self, run: Run, fit: Callable[..., Any]) -> None:
        """Around the whole training: the innermost call is the plain fit, a nesting drive calls the next one."""
        call = fit
        for method in reversed(self.at("drive")):
            call = _nested(method, run, call)
        call()

    def batch(self, run: Run, batch: Batch) -> Batch:
        for method in self.at("batch"):
            batch = method.batch(run, batch)
        return batch

    def loss(self, run: Run, batch: Batch) -> Tensor:
        """The training loss of a micro-batch, summed over its counted units (tokens, examples)."""
        if owner := self.owner["loss"]:
            total = owner.loss(run, batch)
            outputs = None
        else:
            outputs = run.task.outputs(run.model, batch)
            losses = run.task.losses(outputs, batch)
            run.report("nll", losses.detach().sum())
            for method in self.at("weights"):
                losses = losses * method.weights(run, batch, outputs)
            total = losses.sum()
        for method in self.at("penalty"):
            if outputs is None:
                outputs = run.task.outputs(run.model, batch)
            total = total + method.penalty(run, batch, outputs) * run.task.count(batch)
        return total

    def gradients(self, run: Run, window: Window) -> None:
        for method in self.at("gradients"):
            method.gradients(run, window)

    def begin(self, run: Run) -> None:
        for method in self.at("begin"):
            method.begin(run)

    def updated(self, run: Run) -> None:
        for method in self.at("updated"):
            method.updated(run)

    def finish(self, run: Run) -> None:
        for method in self.at("finish"):
            method.finish(run)

    def sample(self, run: Run, predict: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The function that a sampler asks at each step, as the methods change it; the last one is the outermost."""
        for method in self.at("sample"):
            predict = method.sample(run, predict)
        return predict

    def merge(self, run: Run) -> None:
        for method in self.methods:
            method.merge(run)


def _nested(method: Method, run: Run, inner: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: method.drive(run, inner)


def overrides(method: Method, point: str) -> bool:
    """Whether the class of a method has its own version of a point."""
    return getattr(type(method), point, None) is not getattr(Method, point, None)


def parts_of(run: Run, method: Method, targets: Sequence[str], blocks: Any = "all") -> list[Part]:
    """The parts of the model that a method's `targets` and `blocks` name; none is an error that lists what there is."""
    parts = run.anatomy.select(targets, blocks)
    if not parts:
        have = ", ".join(sorted({part.role for part in run.anatomy.parts}))
        raise UserError(f"{method.key}: targets={list(targets)} blocks={blocks} name nothing in {run.settings.model.name}; it has {have}")
    return parts
