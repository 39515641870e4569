"""(IA)^3: Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning (arXiv 2205.05638).

Learned vectors rescale what attention and feed-forward layers pass on,

    softmax(Q (l_k * K)^T / sqrt(d)) (l_v * V),   W_down (l_ff * act(W_up x))

with l_k, l_v (features of keys and values) and l_ff (width of the feed-forward layer) starting at one, so training starts
from the pretrained model. l_k and l_v fold into rows of W_k and W_v (and their biases), l_ff into columns of W_down.
Where queries, keys and values are one weight (GPT-2), all of its outputs are scaled, as in peft.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ftrecipes.errors import UserError
from ftrecipes.methods.adapters.activation import Affine, InsertMethod, Place

if TYPE_CHECKING:
    from ftrecipes.anatomy import Part
    from ftrecipes.run import Run


class IA3(InsertMethod):
    """Rescales keys, values and the inside of feed-forward layers."""

    feedforward: list[str]
    inserts: dict[str, Affine]  # type: ignore[assignment]

    def insert(self, run: Run, part: Part) -> Affine:
        place = Place(part.name, part.module)
        before = part.role in self.feedforward
        if before and not isinstance(part.module, (nn.Linear, Conv1D)):
            raise UserError(f"ia3 cannot scale the input of {part.name} ({type(part.module).__name__}); narrow ia3.feedforward")
        insert = Affine(place, before=before)
        insert.scale = insert.parameter(place.cols if before else place.rows, init=lambda t: t.fill_(1.0))
        return insert

    def peft(self, run: Run) -> tuple[dict[str, Tensor], dict[str, Any]]:
        from ftrecipes.export import short_names
        from ftrecipes.models.adapter import PREFIX

        weights = {}
        for name, insert in self.inserts.items():
            scale = torch.lerp(torch.ones_like(insert.scale), insert.scale, insert.strength)  # type: ignore[arg-type]
            weights[f"{PREFIX}{name}.ia3_l"] = scale[None] if insert.before else scale[:, None]
        return weights, {
            "peft_type": "IA3",
            "target_modules": short_names(run.model, set(self.inserts)),
            "feedforward_modules": short_names(run.model, {name for name, insert in self.inserts.items() if insert.before}),
            "fan_in_fan_out": any(isinstance(insert.layer.module, Conv1D) for insert in self.inserts.values()),
            "init_ia3_weights": True,
        }
