"""Token objectives: losses of language models that are written in log-probabilities, and the model they look back at.

A paper that only weighs tokens overrides `weights` and needs nothing from here (see dft.py). One that replaces the loss
is an `Objective` with

    loss(run, batch)    the SUM over the counted units of a micro-batch

and finds there

    outputs = run.task.outputs(run.model, batch)     one forward pass; `hidden` (n, d) where the next token counts
    outputs.logps                                    log p of each counted token (n,), float32, computed once
    outputs.per_chunk(f, *inputs)                    f(hidden, *inputs) over chunks of positions: whatever needs all logits
                                                     (a KL divergence, an entropy); recomputed in backward, so that float32
                                                     numbers of positions x vocabulary never exist
    outputs.row                                      the example of each counted token (n,)

    self.reference(run).outputs(batch)               the same of the model as it was before training, without gradients
    self.reference(run).logits(outputs, hidden)      its logits, for use inside `per_chunk`
    self.reference(run).sums(batch, n)               its log-probabilities of whole answers

`looks_back()` says whether a paper does. The reference costs no memory where deltas are all that trains: it is the
model with these switched off. Otherwise it is a frozen copy of the loaded model. Which it is stands in the plan and in
the record; it never moves, whatever was resumed.

Preference objectives compare whole answers: `outputs.per_sequence(outputs.logps, n)` sums the tokens of each. They say in
`set_up` that an example is what is counted (`task.unit = "example"`) and with how many other answers it is compared
(`task.alternatives`); these stand in `batch["others"]`, a batch of its own with the `owner` of each. Rejected answers come
with the data; others are put there by a method (see discriminative_ft.py).

What is reported with `run.report` is a sum over counted units too, and becomes their mean in the metrics.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from ftrecipes.method import Method, overrides
from ftrecipes.methods.adapters.delta import Delta
from ftrecipes.tasks.causal_lm import TokenOutputs

if TYPE_CHECKING:
    from ftrecipes.run import Run
    from ftrecipes.tasks.base import Batch


class Reference:
    """The model of a run as it was before training.

    model: a frozen copy, or None where the trained model with its deltas off is the same.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.deltas = [module for module in run.model.modules() if isinstance(module, Delta)]
        self.model: nn.Module | None = None
        if run.trainable() and not self._bare_is_start():  # nothing trains yet while the methods are being built
            self.model = run.hold(run.pristine())

    def _bare_is_start(self) -> bool:
        """Whether the model without its deltas is the one that was loaded, and stays it."""
        run = self.run
        of_deltas = {id(p) for delta in self.deltas for p in delta.parameters()}
        added = [p for name, p in run.model.named_parameters() if name not in run.base_names]
        moves = run.touched or run.base_names & set(run.trainable()) or any(overrides(m, "writes") for m in run.stack)
        return not moves and all(id(p) in of_deltas for p in added)

    def __str__(self) -> str:
        if self.model is None:
            return "the same model with its deltas off"
        return f"a frozen copy of the model ({sum(p.numel() * p.element_size() for p in self.model.parameters()) / 2**20:,.0f} MiB)"

    @contextmanager
    def looking(self) -> Iterator[nn.Module]:
        """The reference in eval mode without gradients; where it is the trained model, its deltas are off meanwhile."""
        strengths = [delta.strength for delta in self.deltas]
        for delta in self.deltas:
            delta.strength = 0.0
        try:
            with self.run.evaluating():
                yield self.model or self.run.model
        finally:
            for delta, strength in zip(self.deltas, strengths, strict=True):
                delta.strength = strength

    def outputs(self, batch: Batch) -> TokenOutputs:
        """What the reference says to a micro-batch."""
        with self.looking() as model:
            return self.run.task.outputs(model, batch)  # type: ignore[no-any-return]

    def logits(self, outputs: TokenOutputs, hidden: Tensor) -> Tensor:
        """The reference's logits (n, V), float32, for some of its hidden states."""
        shared = self.model is None and any(isinstance(module, Delta) for module in outputs.head.modules())
        with self.looking() if shared else torch.no_grad():
            return outputs.logits(hidden).float()

    def sums(self, batch: Batch, sequences: int) -> Tensor:
        """The reference's log-probability of each answer of a micro-batch (sequences,)."""
        with self.looking() as model:
            outputs: TokenOutputs = self.run.task.outputs(model, batch)
            return outputs.per_sequence(outputs.logps, sequences)


class Objective(Method):
    """A method that replaces the loss of a language model."""

    blurred_by_dropout: ClassVar[bool] = False
    """True when the loss compares log-probabilities of two passes; dropout of the model and its adapters is off then."""

    _reference: Reference | None = None
    _begun = False

    def looks_back(self) -> bool:
        """Whether the loss needs the model before training."""
        return False

    def begin(self, run: Run) -> None:
        if self._begun:
            return
        self._begun = True
        if self.blurred_by_dropout and without_dropout(run.model):
            run.say(f"{self.key}: dropout is off, it would blur the ratios of probabilities")
        if self.looks_back():
            self.reference(run)

    def reference(self, run: Run) -> Reference:
        """The model before training; built when the first update begins."""
        if self._reference is None:
            found = Reference(run)
            if not run.trainable():
                return found
            self._reference = found
            run.say(f"{self.key}: the reference is {found}")
        return self._reference


def without_dropout(model: nn.Module) -> bool:
    """Set every dropout rate of a model to zero; whether there was one."""
    found = False
    for module in model.modules():
        layer = isinstance(module, nn.modules.dropout._DropoutNd)
        for name, value in vars(module).items():
            if isinstance(value, float) and value and ("drop" in name or (layer and name == "p")):
                setattr(module, name, 0.0)
                found = True
    return found
