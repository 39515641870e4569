"""Data sets: raw examples by split, encoded by the task, laid out as windows.

An example is a plain dict: `{"prompt", "response"}`, `{"messages"}` or `{"text"}` for language, `{"image", "label"}`
for images, `{"x", "y"}` for regression. Splits are train, validation and test; learning rates, keep-best and early
stopping see validation only, test is for the report. `retain` is a held-out set of what the model was pretrained on:
how much worse it gets there is the forgetting.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ftrecipes.errors import UserError
from ftrecipes.tasks.base import Batch, Encoded, Task

Example = dict[str, Any]


@dataclass
class Splits:
    """Raw examples by split. retain_name: what the retained domain is called in reports; labels: the classes by name."""

    train: Sequence[Example]
    validation: Sequence[Example]
    test: Sequence[Example]
    retain: Sequence[Example] = ()
    retain_name: str = "pretraining"
    notes: list[str] = field(default_factory=list)
    labels: Sequence[str] = ()


class Dataset:
    """Encoded examples of one split. Positions in it are stable: a subset is `keep`, an order of positions.

    A list is encoded once, so that what cannot be used is known before training; anything else (a generator, a memory
    map) is encoded when an example is needed.

    keep: positions that take part (all, unless a method chose). weight: one factor an example, or None.
    """

    def __init__(self, name: str, raw: Sequence[Example], task: Task) -> None:
        self.name, self.raw, self.task = name, raw, task
        self.lazy = not isinstance(raw, list)
        self.encoded: dict[int, Encoded] = {}
        self.skipped: dict[int, str] = {}
        self.keep: Sequence[int] = range(len(raw))
        self.weight: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.keep)

    def __getitem__(self, position: int) -> Encoded:
        """The encoded example at a position."""
        if position not in self.encoded:
            encoded = self.task.encode(self.raw[position])
            if self.lazy:
                return encoded
            self.encoded[position] = encoded
        return self.encoded[position]

    def prepare(self) -> None:
        """Encode what can be encoded ahead; what cannot be used is dropped and remembered with its reason."""
        kept = []
        for i in self.keep[:1] if self.lazy else self.keep:
            try:
                self[i]
                kept.append(i)
            except ValueError as error:
                self.skipped[i] = str(error)
        if not kept:
            reason = next(iter(self.skipped.values()), "it holds no example")
            raise UserError(f"data: the {self.name} set is empty: {reason}")
        if not self.lazy:
            self.keep = kept

    def batch(self, positions: Sequence[int]) -> Batch:
        """A micro-batch of these examples."""
        batch = self.task.collate([self[i] for i in positions])
        batch["example"] = torch.tensor(positions)
        return batch


def order(n: int, seed: int, start: int, count: int) -> list[int]:
    """`count` positions of a stream of shuffled passes over n examples, from place `start`; a pure function."""
    out: list[int] = []
    place = start
    while len(out) < count:
        epoch, offset = divmod(place, n)
        permutation = np.random.default_rng([seed, 7, epoch]).permutation(n)
        take = permutation[offset : offset + count - len(out)]
        out.extend(int(i) for i in take)
        place += len(take)
    return out


def micro_batches(dataset: Dataset, positions: Sequence[int], *, examples: int | None, budget: int) -> Iterator[list[int]]:
    """Split positions into micro-batches: of `examples` each, else as many as fit `budget` model positions.

    Examples of like length share a micro-batch, so that little is padding; the split changes no result but rounding.
    """
    if examples:
        for at in range(0, len(positions), examples):
            yield list(positions[at : at + examples])
        return
    encoded = {i: dataset[i] for i in positions}
    current: list[int] = []
    for position in sorted(positions, key=lambda i: (encoded[i].get("length", 1), i)):
        trial = [*current, position]
        if current and dataset.task.cost([encoded[i] for i in trial]) > budget:
            yield current
            trial = [position]
        current = trial
    if current:
        yield current
