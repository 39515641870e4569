"""What tests share: small runs through compose, Stack and the real update."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ftrecipes.compose import compose
from ftrecipes.data.base import Splits
from ftrecipes.record import Record
from ftrecipes.registry import data as register_data
from ftrecipes.run import Run, quiet

quiet()


def build(*words: str, data: bool = True) -> Run:
    """A run that is ready for `run.fit(n)`; it has no record."""
    return Run(compose(words)).build(data=data)


def train(*words: str, folder: Path | None = None) -> Run:
    """A whole run; with a folder, its record is there."""
    record = None
    if folder is not None:
        record = Record(folder)
        record.lock()
    run = Run(compose(words), record)
    run.train()
    return run


def weights(run: Run) -> dict[str, torch.Tensor]:
    """A copy of all parameters by name."""
    return {name: p.detach().clone() for name, p in run.model.named_parameters()}


def window(run: Run, step: int = 0) -> Any:
    """The window of an update, as the training loop would make it."""
    return run.window(step)


def toy_data(name: str, x: torch.Tensor, y: torch.Tensor, test: tuple[torch.Tensor, torch.Tensor] | None = None) -> str:
    """Register rows as `data=<name>`; every split holds them unless a test set is given."""

    def build_splits(knobs: Any, domain: str) -> Splits:
        rows = [{"x": a, "y": b} for a, b in zip(x, y, strict=True)]
        held = rows if test is None else [{"x": a, "y": b} for a, b in zip(*test, strict=True)]
        return Splits(rows, held, held)

    register_data(name)(build_splits)
    return name


# A two-layer random Llama: seconds become milliseconds where pretrained weights do not matter.
SMALL = (
    "model=tiny-llama",
    "model.weights=random",
    "model.architecture={num_hidden_layers:2,hidden_size:64,intermediate_size:96,num_attention_heads:4,num_key_value_heads:2}",
    "data.size=64",
    "trainer.batch=8",
    "trainer.eval_examples=16",
)
