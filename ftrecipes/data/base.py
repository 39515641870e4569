"""Data sets: raw examples by split, encoded by the task, laid out as windows.

An example is a plain dict: `{"prompt", "response"}`, `{"messages"}`, `{"prompt", "completion"}` or `{"text"}` for
language, with `others` for further answers to the same prompt that are worse; `{"image", "label"}` for images,
`{"x", "y"}` for regression; `place` says where it was read. Splits are train, validation and test; learning rates,
keep-best and early stopping see validation only, test is for the report. `retain` is a held-out set of what the model was pretrained on:
how much worse it gets there is the forgetting.
"""

from __future__ import annotations

import functools
import itertools
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ftrecipes.data.formats import Example as Example  # defined where no torch is
from ftrecipes.errors import UserError
from ftrecipes.tasks.base import Batch, Encoded, Task

CACHED = 8192
"""Encoded examples that a lazy data set keeps."""
SAMPLED = 1000
"""Examples of a lazy data set that are looked at ahead."""


@dataclass
class Splits:
    """Raw examples by split.

    retain_name: what the retained domain is called in reports. labels: the classes by name. fingerprint: of data that
    somebody can change between the parts of a run. target: the metric that says how well this data is learned, where
    it is not the task's own.
    """

    train: Sequence[Example]
    validation: Sequence[Example]
    test: Sequence[Example]
    retain: Sequence[Example] = ()
    retain_name: str = "pretraining"
    notes: list[str] = field(default_factory=list)
    labels: Sequence[str] = ()
    fingerprint: str = ""
    target: str = ""


class Dataset:
    """Encoded examples of one split. Positions in it are stable: a subset is `keep`, an order of positions.

    A list is encoded once, so that what cannot be used is known before training and left out. Anything else (generated
    texts, a large file) is lazy: encoded when an example is needed, and one that cannot be used is replaced by the next.

    keep: positions that take part (all, unless a method chose). weight: one factor an example, or None. epoch: the pass
    over the data that examples are asked for. view: what a method makes of an encoded example, (position, encoded).
    """

    def __init__(self, name: str, raw: Sequence[Example], task: Task) -> None:
        self.name, self.raw, self.task = name, raw, task
        self.lazy = not isinstance(raw, list)
        self.encoded: dict[int, Encoded] = {}
        self.skipped: dict[int, str] = {}
        self.keep: Sequence[int] = range(len(raw))
        self.weight: torch.Tensor | None = None
        self.epoch = 0
        self.view: Callable[[int, Encoded], Encoded] | None = None
        self.notes: list[str] = []

    def __len__(self) -> int:
        return len(self.keep)

    def __getitem__(self, position: int) -> Encoded:
        """The encoded example at a position."""
        if position not in self.encoded:
            if self.lazy and len(self.encoded) >= CACHED:
                self.encoded.clear()
            self.encoded[position] = self._usable(position) if self.lazy else self.task.encode(self.raw[position])
        encoded = self.encoded[position]
        return self.view(position, encoded) if self.view else encoded

    def _usable(self, position: int) -> Encoded:
        for at in itertools.chain(range(position, len(self.raw)), range(position)):
            try:
                return self.task.encode(self.raw[at])
            except ValueError as error:
                self.skipped[at] = str(error)
        raise self._empty()

    def _empty(self) -> UserError:
        return UserError(f"data: the {self.name} set is empty: {self._first(self.skipped) if self.skipped else 'it holds no example'}")

    def _first(self, reasons: dict[int, str]) -> str:
        position, reason = next(iter(reasons.items()))
        return f"{self._place(position)}: {reason}"

    def _place(self, position: int) -> str:
        return str(self.raw[position].get("place", f"number {position + 1}"))

    def prepare(self) -> None:
        """Encode what can be encoded ahead; what cannot be used is dropped, and `notes` say so."""
        looked = self.keep[:: max(1, len(self.keep) // SAMPLED)] if self.lazy else self.keep
        kept = []
        lost: dict[str, list[int]] = {}
        for i in looked:
            try:
                encoded = self.task.encode(self.raw[i]) if self.lazy else self[i]
                for what in encoded.get("lost", ()):
                    lost.setdefault(what, []).append(i)
                kept.append(i)
            except ValueError as error:
                self.skipped[i] = str(error)
        if not kept:
            raise self._empty()
        of = f"of {len(looked):,} examples" + (f" looked at ({len(self.keep):,} in all)" if len(looked) < len(self.keep) else "")
        if self.skipped:
            self.notes.append(f"{self.name}: skipped {len(self.skipped):,} {of} (first {self._first(self.skipped)})")
        for what, positions in lost.items():
            self.notes.append(f"{self.name}: {len(positions):,} {of} lost {what} (first {self._place(positions[0])})")
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
        permutation = _permutation(n, seed, epoch)
        take = permutation[offset : offset + count - len(out)]
        out.extend(int(i) for i in take)
        place += len(take)
    return out


@functools.lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> Any:
    return np.random.default_rng([seed, 7, epoch]).permutation(n)


def micro_batches(dataset: Dataset, positions: Sequence[int], *, examples: int | None, budget: int) -> Iterator[list[int]]:
    """Split positions into micro-batches: of `examples` each, else as many as fit `budget` model positions.

    Examples of like length share a micro-batch, so that little is padding; the split changes no result but rounding.
    """
    if examples:
        for at in range(0, len(positions), examples):
            yield list(positions[at : at + examples])
        return
    encoded = {i: dataset[i] for i in positions}
    ordered = sorted(positions, key=lambda i: (encoded[i].get("length", 1), i))
    at = 0
    while at < len(ordered):  # the cost grows with every example, so the longest fitting stretch is found by halving
        ends = range(at + 2, len(ordered) + 1)
        fitting = bisect_right(ends, budget, key=lambda end: dataset.task.cost([encoded[i] for i in ordered[at:end]]))
        yield ordered[at : at + 1 + fitting]
        at += 1 + fitting
