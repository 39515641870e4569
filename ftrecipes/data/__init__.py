"""Data sets by name."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ftrecipes import catalogue, registry

if TYPE_CHECKING:  # `ftr` looks at data files before torch is imported
    from ftrecipes.compose import Settings
    from ftrecipes.data.base import Dataset, Splits
    from ftrecipes.tasks.base import Task

STAND_IN = (
    "forgetting is measured on generated stories in simple English, a stand-in for what this model was pretrained on; "
    "with data=file, data.retain=<file> takes texts of yours and data.retain=none leaves it out"
)


def splits(settings: Settings) -> Splits:
    """The raw splits of the chosen data set."""
    from ftrecipes.compose import size_of

    domain = settings.entry("model").about["domain"]
    builder = registry.find("data", settings.data.name)
    if not builder:
        place = catalogue.get("data", settings.data.name).about.get("code", f"{settings.data.name}:build")
        module, _, function = place.partition(":")
        builder = getattr(importlib.import_module(f"ftrecipes.data.{module}"), function)
    found: Splits = builder(settings.data, domain)
    if found.retain_name == "stories" and size_of(settings) != "tiny":
        found.notes.append(STAND_IN)
    return found


def datasets(raw: Splits, task: Task, *, overfit: int | None, evaluate: int) -> dict[str, Dataset]:
    """The splits as datasets; only what will be used is encoded now."""
    from ftrecipes.data.base import Dataset

    train = Dataset("train", raw.train, task)
    out = {"train": train}
    for name in ("validation", "test", "retain"):
        examples = raw.train if overfit and name != "retain" else getattr(raw, name)
        out[name] = Dataset(name, examples, task)
        out[name].keep = out[name].keep[: min(overfit or evaluate, evaluate)]
    if overfit:
        train.keep = train.keep[:overfit]
    return out
