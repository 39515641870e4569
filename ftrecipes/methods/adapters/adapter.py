"""Adapter: Parameter-Efficient Transfer Learning for NLP (arXiv 1902.00751).

A bottleneck with a residual connection stands at the end of each sub-layer, before the sub-layer's own residual sum,

    h -> h + s * (W_up f(W_down h + b_down) + b_up),   W_down (b x d), W_up (d x b), b << d

with weights from a normal distribution cut off at two deviations and biases zero, so it starts near the identity.
`placement: houlsby` has one after attention and one after the feed-forward layer and trains the norms too (`norms`);
`pfeiffer` (arXiv 2005.00247) one after the feed-forward layer alone; `parallel` (arXiv 2110.04366) one beside it, which
reads the feed-forward layer's input: y = FFN(x) + s * (W_up f(W_down x + b_down) + b_up).

The paper draws weights with a deviation of 0.01, its code with 0.001; `init: zero_up` starts W_up at zero, as LoRA does,
and W_down Kaiming uniform. Dropout that a model has behind its last linear layer acts on the adapter's output here, in the
paper on its input.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftrecipes.errors import UserError
from ftrecipes.method import parts_of
from ftrecipes.methods.adapters.activation import Insert, InsertMethod, Place, Tap

if TYPE_CHECKING:
    from ftrecipes.anatomy import Part
    from ftrecipes.run import Run

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "none": lambda x: x,
}
END, BEGIN = {"houlsby": ["o", "down"], "pfeiffer": ["down"], "parallel": ["down"]}, ["up"]


class Bottleneck(Insert):
    """y + s * (W_up f(W_down h + b_down) + b_up); h is y, or what a tap saw."""

    def __init__(self, place: Place, method: Any, rng: Callable[[str], torch.Generator], tap: Tap | None = None) -> None:
        super().__init__(place)
        d = place.rows
        entering = tap.layer.cols if tap else d
        self.down, self.down_bias = self.parameter(method.size, entering, init=self._start(method, rng)), self.parameter(method.size)
        up = None if method.init == "zero_up" else self._start(method, rng, "up")
        self.up, self.up_bias = self.parameter(d, method.size, init=up), self.parameter(d)
        self.scale, self.activation = method.scale, ACTIVATIONS[method.activation]
        self.source = (tap,)  # in a tuple: it belongs to the place that it taps

    @staticmethod
    def _start(method: Any, rng: Callable[[str], torch.Generator], name: str = "down") -> Callable[[Tensor], Any]:
        if method.init == "zero_up":
            return lambda t: nn.init.kaiming_uniform_(t, a=math.sqrt(5), generator=rng(name))
        std = method.init_std
        return lambda t: nn.init.trunc_normal_(t, std=std, a=-2 * std, b=2 * std, generator=rng(name))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        (tap,) = self.source
        h = y if tap is None else tap.take()
        dtype = y.dtype
        h = self.activation(F.linear(h.to(dtype), self.down.to(dtype), self.down_bias.to(dtype)))
        return y + self.scale * F.linear(h, self.up.to(dtype), self.up_bias.to(dtype))


class Adapter(InsertMethod):
    """Bottlenecks at the ends of sub-layers."""

    placement: str
    size: int
    activation: str
    init: str
    init_std: float
    scale: float
    norms: bool

    def prepare(self, run: Run) -> None:
        ends = parts_of(run, self, END[self.placement], self.blocks)
        taps = self.taps(run, ends) if self.placement == "parallel" else {}
        for part in ends:
            self.put(run, part, Bottleneck(Place(part.name, part.module), self, self.draw(run, part), taps.get(part.block)))
        for part in run.anatomy.select(["norm"], self.blocks) if self.norms else []:
            part.module.requires_grad_(True)

    def taps(self, run: Run, ends: list[Part]) -> dict[int | None, Tap]:
        """By block, a tap at the input of its feed-forward layer."""
        begins = parts_of(run, self, BEGIN, self.blocks)
        blocks = [part.block for part in ends]
        if sorted(map(str, blocks)) != sorted(str(part.block) for part in begins) or len(set(blocks)) != len(blocks):
            raise UserError(f"adapter.placement=parallel needs one feed-forward layer a block, which {run.settings.model.name} has not")
        taps = {}
        for part in begins:
            taps[part.block] = Tap(Place(part.name, part.module))
            self.put(run, part, taps[part.block])
        return taps
