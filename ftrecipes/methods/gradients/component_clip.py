"""Improving Stability of Fine-Tuning Pretrained Language Models via Component-Wise Gradient Norm Clipping (arXiv 2210.10325).

Layers and modules of a pretrained model converge at different speeds, so one threshold on the whole gradient lets the
loudest component decide for all. Here each component i (a weight or a bias; `component` takes wider ones) is clipped
on its own, once an update, when the gradient of the window is complete:

    g_i <- g_i min(1, c / (||g_i|| + 1e-6)),   c = `max_clip_value`

A large c changes nothing; a small one gives all components gradients of norm c. The clip of the whole gradient
(`trainer.clip`) is off by default here. The released trainer leaves it at 1 behind this one, where it does not act at
the default c: 200 tensors of norm 0.05 have norm 0.71 together. It also clips at every micro-batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ftrecipes.method import Method

if TYPE_CHECKING:
    from ftrecipes.run import Run
    from ftrecipes.update import Window


class ComponentClip(Method):
    """Clips the gradient norm of each component at one threshold."""

    max_clip_value: float
    component: str

    def gradients(self, run: Run, window: Window) -> None:
        grads: dict[str, Tensor] = {name: p.grad for name, p in run.active().items() if p.grad is not None}
        roles = {part.name: part.role for part in run.anatomy.parts}
        names = [self.component_of(name, roles) for name in grads]
        place = {name: index for index, name in enumerate(dict.fromkeys(names))}
        of = torch.tensor([place[name] for name in names])
        norms = torch.stack(torch._foreach_norm(list(grads.values())))
        if self.component != "parameter":
            norms = (
                torch.zeros(len(place), dtype=norms.dtype, device=norms.device).index_add_(0, of.to(norms.device), norms.square()).sqrt()
            )
        factors = (self.max_clip_value / (norms + 1e-6)).clamp_max(1.0)
        known = factors.tolist()  # one transfer for all
        torch._foreach_mul_(list(grads.values()), [known[i] for i in of.tolist()])
        clipped = sum(factor < 1 for factor in known)
        run.log("component_clip/clipped", clipped / len(known))
        run.log("component_clip/largest_norm", norms.max())
        run.log("component_clip/median_norm", norms.median())
        if clipped:
            run.count("clipped", clipped)

    def component_of(self, name: str, roles: dict[str, str]) -> str:
        """The component that a parameter belongs to: itself, its module, or the role of its module over all blocks."""
        if self.component == "parameter":
            return name
        module = name.rpartition(".")[0]
        if self.component == "module":
            return module
        while module and module not in roles:  # of an adapter's factors the module that they sit on
            module = module.rpartition(".")[0]
        return roles.get(module, "other")
