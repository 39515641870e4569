"""Data sets by name."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ftrecipes import catalogue, registry
from ftrecipes.data.base import Dataset, Splits
from ftrecipes.tasks.base import Task

if TYPE_CHECKING:
    from ftrecipes.compose import Settings


def splits(settings: Settings) -> Splits:
    """The raw splits of the chosen data set."""
    domain = settings.entry("model").about["domain"]
    if builder := registry.find("data", settings.data.name):
        return builder(settings.data, domain)  # type: ignore[no-any-return]
    place = catalogue.get("data", settings.data.name).about.get("code", f"{settings.data.name}:build")
    module, _, function = place.partition(":")
    return getattr(importlib.import_module(f"ftrecipes.data.{module}"), function)(settings.data, domain)  # type: ignore[no-any-return]


def datasets(raw: Splits, task: Task, *, overfit: int | None, evaluate: int) -> dict[str, Dataset]:
    """The splits as datasets; only what will be used is encoded now."""
    train = Dataset("train", raw.train, task)
    out = {"train": train}
    for name in ("validation", "test", "retain"):
        examples = raw.train if overfit and name != "retain" else getattr(raw, name)
        out[name] = Dataset(name, examples, task)
        out[name].keep = out[name].keep[: min(overfit or evaluate, evaluate)]
    if overfit:
        train.keep = train.keep[:overfit]
    return out
