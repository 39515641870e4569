"""Toy tasks on vectors: squared error, logistic, or plain zero-one loss, one value a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftrecipes.tasks.base import Batch, Encoded, Outputs, Task

if TYPE_CHECKING:
    from ftrecipes.data.base import Example


class Predictions(Outputs):
    """y (n, outputs): what the model says of each row."""

    def __init__(self, y: Tensor) -> None:
        self.y = y


class Regression(Task):
    """Rows x (inputs,) with targets y (outputs,); labels of logistic and zero-one losses are +-1."""

    domain: ClassVar[str] = "toy"

    def __init__(self, kind: str, inputs: int, outputs: int) -> None:
        self.kind, self.inputs, self.out = kind, inputs, outputs
        self.target, self.higher_is_better = ("mse", False) if kind == "squared" else ("accuracy", True)  # type: ignore[misc]

    def encode(self, example: Example) -> Encoded:
        x, y = (torch.as_tensor(example[name], dtype=torch.float64).reshape(-1) for name in ("x", "y"))
        return {"x": x, "y": y, "length": 1}

    def collate(self, encoded: Sequence[Encoded]) -> Batch:
        return {name: torch.stack([e[name] for e in encoded]) for name in ("x", "y")}

    def blank(self, examples: int, length: int) -> Batch:
        return {"x": torch.empty(examples, self.inputs), "y": torch.empty(examples, self.out), "example": torch.arange(examples)}

    def outputs(self, model: nn.Module, batch: Batch) -> Predictions:
        dtype = next(model.parameters()).dtype
        return Predictions(model(batch["x"].to(dtype)))

    def losses(self, outputs: Outputs, batch: Batch) -> Tensor:
        assert isinstance(outputs, Predictions)
        y = batch["y"].to(outputs.y.dtype)
        if self.kind == "squared":
            return 0.5 * (outputs.y - y).square().sum(-1)
        if self.kind == "logistic":
            return F.softplus(-outputs.y * y).sum(-1)
        return (outputs.y * y <= 0).to(outputs.y.dtype).mean(-1)

    def measure(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        outputs = self.outputs(model, batch)
        y = batch["y"].to(outputs.y.dtype)
        values: dict[str, Any] = {"loss": self.losses(outputs, batch)}
        if self.kind == "squared":
            values["mse"] = (outputs.y - y).square().mean(-1)
        else:
            values["accuracy"] = (outputs.y * y > 0).float().mean(-1)
        return {name: torch.stack([v.sum(), torch.tensor(float(len(v)), dtype=v.dtype)]) for name, v in values.items()}
