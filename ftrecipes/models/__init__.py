"""Models by domain: each loader builds or loads a model and the task that speaks for its domain."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ftrecipes.compose import Settings
    from ftrecipes.models.base import Loaded

LOADERS = {"causal-lm": "causal_lm", "vit": "vision", "toy": "toy", "diffusion": "diffusion", "flow": "diffusion"}


def load(settings: Settings, *, meta: bool = False) -> Loaded:
    """The model of a run, on the CPU, or on the meta device without any weight."""
    domain = settings.entry("model").about["domain"]
    module = importlib.import_module(f"ftrecipes.models.{LOADERS[domain]}")
    return module.load(settings, meta=meta)  # type: ignore[no-any-return]
