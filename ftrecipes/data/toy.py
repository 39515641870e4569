"""Rows for the toy models: a teacher of the same shape speaks, with noise."""

from __future__ import annotations

from typing import Any

import torch

from ftrecipes.data.base import Splits
from ftrecipes.rng import generator


def build(knobs: dict[str, Any], domain: str) -> Splits:
    """x standard normal (or the unit vectors), y = T x + noise for a random teacher T of variance 1/inputs."""
    inputs, outputs = knobs["inputs"], knobs["outputs"]
    teacher = torch.randn(outputs, inputs, generator=generator("teacher", knobs["teacher"]), dtype=torch.float64) / inputs**0.5
    splits: dict[str, Any] = {}
    for name, n in (("train", knobs["size"]), ("validation", 200), ("test", 200)):
        rng = generator("rows", knobs["teacher"], name)
        x = torch.eye(inputs, dtype=torch.float64) if knobs["unit"] else torch.randn(n, inputs, generator=rng, dtype=torch.float64)
        y = x @ teacher.T + knobs["noise"] * torch.randn(len(x), outputs, generator=rng, dtype=torch.float64)
        if knobs["labels"] == "sign":
            y = torch.where(y >= 0, 1.0, -1.0)
        splits[name] = [{"x": a, "y": b} for a, b in zip(x, y, strict=True)]
    return Splits(**splits)
