"""Toy models: a linear map or two layers, in the dtype asked for."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ftrecipes.models.base import Loaded
from ftrecipes.rng import generator
from ftrecipes.tasks.regression import Regression

if TYPE_CHECKING:
    from ftrecipes.compose import Settings


class Toy(nn.Module):
    """`linear`: y = W x (+ b). `two_layer`: y = W2 gelu(W1 x + b1) + b2."""

    def __init__(self, kind: str, inputs: int, outputs: int, hidden: int, bias: bool, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        if kind == "linear":
            self.layer = nn.Linear(inputs, outputs, bias=bias)
        else:
            self.first, self.layer = nn.Linear(inputs, hidden, bias=bias), nn.Linear(hidden, outputs, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "first"):
            x = nn.functional.gelu(self.first(x))
        return self.layer(self.dropout(x))  # type: ignore[no-any-return]


def load(settings: Settings, *, meta: bool = False) -> Loaded:
    """A toy model with seeded Gaussian weights of variance 1/inputs, and its task."""
    build = functools.partial(_build, settings, meta)
    roles = [("head", r"^layer$")] if settings.model.kind == "two_layer" else []
    return Loaded(build(), Regression(settings.model.loss, settings.model.inputs, settings.model.outputs), build, roles)


def _build(settings: Settings, meta: bool) -> nn.Module:
    knobs = settings.model
    dtype = torch.float64 if knobs.dtype == "float64" else torch.float32
    with torch.device("meta" if meta else "cpu"):
        model = Toy(knobs.kind, knobs.inputs, knobs.outputs, knobs.hidden, knobs.bias, knobs.dropout).to(dtype)
    if not meta:
        rng = generator("toy", settings.seed)
        with torch.no_grad():
            for parameter in model.parameters():
                fan = parameter.shape[-1] if parameter.dim() > 1 else 1
                scale = fan**-0.5 if parameter.dim() > 1 else 0.0
                parameter.copy_(torch.randn(parameter.shape, generator=rng, dtype=torch.float64) * scale)
    return model
