"""`peft` as a measuring rod: the same adapter on the same base with the same numbers, trained by a plain torch loop."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from peft import LoraConfig, get_peft_model
from tools import build
from torch import Tensor, nn

from ftrecipes.methods.adapters.delta import DeltaMethod
from ftrecipes.run import Run


def host(model: nn.Module, *words: str) -> Run:
    """A run on a module of the test's own that maps rows x to y, in place of the toy model."""
    with patch("ftrecipes.models.toy._build", lambda settings, meta: copy.deepcopy(model)):
        return build("model=toy", *words)


class Matrix(nn.Module):
    """y = W x for a given weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
        self.layer.weight.data.copy_(weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def adapter(run: Run) -> DeltaMethod:
    """The run's adapter."""
    return next(m for m in run.stack if isinstance(m, DeltaMethod))


@torch.no_grad()
def scramble(run: Run, seed: int = 1, size: float = 0.1) -> None:
    """Random numbers in all factors, and lengths changed by up to a third: an adapter that does something."""
    rng = torch.Generator().manual_seed(seed)
    for delta in adapter(run).deltas.values():
        for name, parameter in delta.named_parameters():
            noise = torch.randn(parameter.shape, generator=rng, dtype=parameter.dtype)
            parameter.copy_(parameter * (1 + noise.clamp(-1, 1) / 3) if name == "m" else size * noise)


def twin(run: Run, **config: Any) -> Any:
    """peft's model of the run: the untouched base with a LoraConfig on the same modules and the run's numbers in it."""
    targets = list(adapter(run).deltas)
    base = run.pristine()
    model = get_peft_model(base, LoraConfig(target_modules=targets, lora_dropout=0.0, **config)).to(next(base.parameters()).dtype)
    with torch.no_grad():
        for _, ours, theirs in pairs(run, model):
            theirs.copy_(ours.reshape(theirs.shape))
    return model


def pairs(run: Run, model: Any) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
    """(name, ours, theirs) of every number of the adapter; shapes may differ, order does not."""
    for name, delta in adapter(run).deltas.items():
        layer = model.base_model.model.get_submodule(name)
        for own, parameter in delta.named_parameters():
            if own == "m":
                theirs = layer.lora_magnitude_vector["default"].weight
            elif isinstance(delta.layer.module, nn.Embedding):
                theirs = getattr(layer, f"lora_embedding_{own}")["default"]
            else:
                theirs = getattr(layer, f"lora_{own}")["default"].weight
            yield f"{name}.{own}", parameter, theirs


def language_loss(model: Any, batch: dict[str, Any]) -> Tensor:
    """transformers' own loss of a padded batch: the mean over its counted tokens."""
    mask = (batch["segment"] >= 0).long()
    return model(input_ids=batch["ids"], attention_mask=mask, labels=batch["labels"]).loss


def squared_loss(model: Any, batch: dict[str, Any]) -> Tensor:
    """The toy task's loss: the mean over rows of half the squared error."""
    dtype = next(model.parameters()).dtype
    return 0.5 * (model(batch["x"].to(dtype)) - batch["y"].to(dtype)).square().sum(-1).mean()


def plain_loop(run: Run, model: nn.Module, loss: Any, steps: int, *, lr: float, decay: float = 0.0, clip: float = 1.0) -> None:
    """`steps` updates of AdamW at a constant rate over what trains in a model, on the windows that the run would see.

    As in every trainer, matrices are decayed and vectors are not; gradients are clipped to norm `clip`.
    """
    trains = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trains if p.dim() > 1], "weight_decay": decay},
        {"params": [p for p in trains if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, foreach=False)
    for step in range(steps):
        (batch,) = run.window(step)
        optimizer.zero_grad()
        loss(model, batch).backward()
        nn.utils.clip_grad_norm_(trains, clip)
        optimizer.step()
