"""SSF: Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning (arXiv 2210.08823).

After every operation of the frozen network (linear, convolution, norm) stands an affine map of its C output channels,

    y = gamma * x + beta,   gamma ~ N(1, 0.02^2) (C), beta ~ N(0, 0.02^2) (C)

and gamma, beta and the head of a new task are all that trains. The start is near the pretrained function, not at it;
`init: identity` starts at it. Being affine behind an affine operation, the map folds into weight and bias: W' =
diag(gamma) W, b' = gamma * b + beta (for a norm w' = gamma * w), so inference costs nothing.

The paper is about images. In a language model a norm without bias (RMSNorm) is scaled and not shifted, for the linear
layers behind it have shifts of their own. `shift: foldable` shifts a linear layer without bias where the architecture
can give it one (Llama can), `all` everywhere, which then may not merge.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ftrecipes.methods.adapters.activation import Affine, InsertMethod, Place, room_for_biases

if TYPE_CHECKING:
    from ftrecipes.anatomy import Part
    from ftrecipes.run import Run


class SSF(InsertMethod):
    """Scales and shifts features."""

    init: str
    init_std: float
    scale: bool
    shift: str

    def prepare(self, run: Run) -> None:
        lacking = any(part.module.bias is None for part in run.anatomy.parts if hasattr(part.module, "bias"))
        self.room = room_for_biases(run.model) if self.shift == "foldable" and lacking else None
        super().prepare(run)
        left = sum(i.shift is None and i.layer.raw.dim() > 1 for i in self.inserts.values())  # type: ignore[union-attr]
        if left and self.shift == "foldable":
            run.say(
                f"ssf: {left} layers without a bias are scaled and not shifted, since this architecture could not hold a shift merged in"
            )

    def insert(self, run: Run, part: Part) -> Affine:
        place, draw = Place(part.name, part.module), self.draw(run, part)
        std = 0.0 if self.init == "identity" else self.init_std
        insert = Affine(place)
        if self.scale:
            insert.scale = insert.parameter(place.rows, init=lambda t: t.normal_(1.0, std, generator=draw("scale")))
        if self.shifted(part):
            insert.shift = insert.parameter(place.rows, init=lambda t: t.normal_(0.0, std, generator=draw("shift")))
        return insert

    def shifted(self, part: Part) -> bool:
        """Whether a place has a shift."""
        module: Any = part.module
        if self.shift == "none" or (module.weight.dim() == 1 and getattr(module, "bias", None) is None):
            return False
        bare = getattr(module, "bias", None) is None and not isinstance(module, torch.nn.Embedding)
        return self.shift == "all" or not bare or self.room is None or part.name in self.room
