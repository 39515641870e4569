"""What a domain must say: how an example is encoded and batched, what its losses are, and how it is judged.

A task's losses are per *counted unit* (a loss token, an image, a row), as one vector. Everything that averages, weighs
or accumulates lives elsewhere and works on that vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

if TYPE_CHECKING:
    from ftrecipes.data.base import Example
    from ftrecipes.run import Run

Batch = dict[str, Any]
"""Tensors of a micro-batch by name; `example` (n,) holds the position of each example in its data set."""

Encoded = dict[str, Any]
"""One encoded example; `length` is its size in positions of the model."""


class Outputs:
    """What a forward pass gave; a task's subclass computes costly things when they are asked for."""


class Task:
    """Base of the tasks."""

    domain: ClassVar[str]
    unit: str = "example"
    """What is counted: the loss is a mean over these. A method that owns the loss may count whole examples instead."""
    alternatives: int = 0
    """Further answers of each example that the loss of a method compares with, for plans."""
    target: str
    """The metric that says how well the target task is done."""
    higher_is_better: ClassVar[bool] = True
    forgetting: ClassVar[tuple[str, ...]] = ("nll",)
    """The metrics that are shown of the retained set."""
    library: ClassVar[str] = "transformers"
    """Whose format a merged model has."""
    part: str = ""
    """The sub-folder of the tuned model in that format."""

    def encode(self, example: Example) -> Encoded:
        """One raw example as what `collate` takes; `lost` may list what of it cannot be learned ("their end at …").

        Raises ValueError with a reason when it must be skipped.
        """
        raise NotImplementedError

    def collate(self, encoded: Sequence[Encoded]) -> Batch:
        """A micro-batch of encoded examples."""
        raise NotImplementedError

    def cost(self, encoded: Sequence[Encoded]) -> int:
        """Positions of the model that a micro-batch of these occupies, padding included."""
        return max(e.get("length", 1) for e in encoded) * len(encoded)

    def units(self, encoded: Sequence[Encoded]) -> int:
        """Counted units of encoded examples."""
        return len(encoded)

    def count(self, batch: Batch) -> int:
        """Counted units of a micro-batch."""
        return len(batch["example"])

    def blank(self, examples: int, length: int) -> Batch:
        """A micro-batch of the largest size without content, for plans."""
        raise NotImplementedError

    def companions(self) -> list[nn.Module]:
        """Frozen models that the task needs beside the one that is tuned."""
        return []

    def check(self, model: nn.Module) -> None:
        """Refuse a freshly loaded model that this task would get wrong."""

    def outputs(self, model: nn.Module, batch: Batch) -> Outputs:
        """The model's forward pass on a micro-batch."""
        raise NotImplementedError

    def losses(self, outputs: Outputs, batch: Batch) -> Tensor:
        """The loss of every counted unit (units,), float32."""
        raise NotImplementedError

    def measure(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Sums over a micro-batch by metric: `(total, count)` stacked as a tensor of two numbers each."""
        raise NotImplementedError

    def save_model(self, model: nn.Module, folder: Path, shard: str) -> None:
        """Write a plain model as the hub has it, in files of at most `shard`."""
        model.save_pretrained(folder, max_shard_size=shard)  # type: ignore[operator]

    def loader(self, model: nn.Module) -> str:
        """The class of `library` that loads what `save_model` wrote."""
        return type(model).__name__

    def save(self, folder: Path) -> None:
        """Write what belongs beside the weights of a model (tokenizer, preprocessing), as the hub has it."""

    def samples(self, run: Run, examples: Sequence[Example]) -> list[dict[str, str]]:
        """A few examples with the model's answers, for the eye; an empty list when there is nothing to show.

        Called inside `run.evaluating()`.
        """
        return []
