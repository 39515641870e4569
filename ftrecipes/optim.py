"""Optimizers and learning-rate schedules by name.

Optimizers are libraries' own. A schedule is a pure function of the step inside a fit, so a resumed run needs no state
of it and a drive that runs several fits restarts it each time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ftrecipes.errors import UserError


def build(
    name: str, groups: list[dict[str, Any]], knobs: dict[str, Any], in_block: Callable[[nn.Parameter], bool]
) -> torch.optim.Optimizer:
    """An optimizer over parameter groups.

    Args:
        name: the choice of the group `optimizer`.
        groups: `params`, `lr`, `weight_decay`, `peak` (learning rate that the schedule multiplies) each.
        knobs: the optimizer's settings.
        in_block: whether a parameter lies in a block of the model (muon acts on the matrices there).
    """
    maker = OPTIMIZERS.get(name)
    if maker is None:
        raise UserError(f"optimizer {name} has a config and no code (ftrecipes/optim.py)")
    return maker(groups, knobs, in_block)


def _adamw(groups: list[dict[str, Any]], knobs: dict[str, Any], in_block: Any) -> torch.optim.Optimizer:
    cuda = all(p.is_cuda for g in groups for p in g["params"])
    return torch.optim.AdamW(groups, betas=tuple(knobs["betas"]), eps=knobs["eps"], fused=cuda, foreach=not cuda)


def _sgd(groups: list[dict[str, Any]], knobs: dict[str, Any], in_block: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, momentum=knobs["momentum"], nesterov=knobs["nesterov"] and knobs["momentum"] > 0, foreach=True)


def _adafactor(groups: list[dict[str, Any]], knobs: dict[str, Any], in_block: Any) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(groups, beta2_decay=knobs["beta2_decay"], d=knobs["d"], foreach=True)


def _lion(groups: list[dict[str, Any]], knobs: dict[str, Any], in_block: Any) -> torch.optim.Optimizer:
    from lion_pytorch.foreach import Lion

    return Lion(groups, betas=tuple(knobs["betas"]))  # type: ignore[no-any-return]


def _muon(groups: list[dict[str, Any]], knobs: dict[str, Any], in_block: Callable[[nn.Parameter], bool]) -> torch.optim.Optimizer:
    matrices, rest = [], []
    for group in groups:
        inner = [p for p in group["params"] if p.dim() == 2 and in_block(p)]
        outer = [p for p in group["params"] if not (p.dim() == 2 and in_block(p))]
        if inner:
            matrices.append({**group, "params": inner})
        if outer:
            ratio = knobs["adamw_lr"] / knobs["lr"] if knobs["lr"] else 0.0
            rest.append({**group, "params": outer, "lr": group["lr"] * ratio, "peak": group["peak"] * ratio})
    parts: list[torch.optim.Optimizer] = []
    if matrices:
        parts.append(
            torch.optim.Muon(
                matrices, momentum=knobs["momentum"], nesterov=knobs["nesterov"], ns_steps=knobs["ns_steps"], adjust_lr_fn="match_rms_adamw"
            )
        )
    if rest:
        parts.append(torch.optim.AdamW(rest, betas=(0.9, 0.95), foreach=True))
    return parts[0] if len(parts) == 1 else Together(parts)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "sgd": _sgd,
    "adafactor": _adafactor,
    "lion": _lion,
    "muon": _muon,
}


class Together(torch.optim.Optimizer):
    """Several optimizers that step as one, each over its own parameters."""

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        self.parts = parts
        super().__init__([g for part in parts for g in part.param_groups], {})
        self.param_groups = [g for part in parts for g in part.param_groups]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [g for part in self.parts for g in part.param_groups]


def factor(knobs: dict[str, Any], step: int, steps: int) -> float:
    """The learning rate at update `step` (from 0) of `steps`, as a share of its peak."""
    warmup = knobs.get("warmup") or 0
    warm = warmup * steps if warmup < 1 else warmup
    if step < warm:
        return (step + 1) / (math.ceil(warm) + 1)
    name = knobs["name"]
    end = knobs.get("end", 0.0)
    if name == "constant":
        return 1.0
    if name == "wsd":
        decay = knobs["decay"] * steps if knobs["decay"] < 1 else knobs["decay"]
        left = (steps - step) / max(decay, 1)
        return 1.0 if left >= 1 else end + (1 - end) * left
    progress = (step - warm) / max(steps - warm, 1)
    if name == "linear":
        return end + (1 - end) * (1 - progress)
    if name == "cosine":
        return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * progress))
    raise UserError(f"schedule {name} has a config and no code (ftrecipes/optim.py)")
