"""TAFT: Tangent Transformers for Composition, Privacy and Removal (arXiv 2307.08122).

The network is replaced by its first-order Taylor expansion in the weights at the pretrained point w, and only the tangent
vector D (of the shape of what is thawed, zero at the start) trains:

    f_lin(x; D) = f_w(x) + J_w f_w(x) D

f_lin is linear in D and the square loss convex, so D's that were trained on disjoint shards of the data average exactly
like an ensemble, f_lin(mean D_k) = mean f_lin(D_k), and a shard is forgotten by leaving its D_k out. J D comes from forward-mode
differentiation: every activation is a pair (x, x') that one forward pass carries from the first thawed block to the head.

    loss = mean over classes of (f_lin(x) - alpha onehot)^2 + wd sqrt(||D||^2 + 1e-6)

TAFT-N thaws the last N blocks, the final norm and the head; the blocks below are an ordinary frozen pass. A new head keeps
the numbers that it was drawn with; its D trains. There is no merged model: f at w + D differs by O(||D||^2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from ftrecipes.errors import UserError
from ftrecipes.method import Method
from ftrecipes.methods.adapters.delta import Delta, Layer
from ftrecipes.tasks.classification import ClassOutputs
from ftrecipes.update import wide

if TYPE_CHECKING:
    from ftrecipes.run import Run
    from ftrecipes.tasks.base import Batch


class Tangent(Delta):
    """D of a module's own parameters, under their names and in their shapes; zero at the start."""

    def __init__(self, layer: Layer, method: Any, rng: Callable[[str], torch.Generator]) -> None:
        super().__init__(layer, method, rng)
        for name, w in layer.module.named_parameters(recurse=False):
            self.register_parameter(name, nn.Parameter(torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32))))

    def duals(self) -> Iterator[tuple[str, Tensor]]:
        """(w, D) of every parameter as one dual tensor."""
        for name, D in self._parameters.items():
            w = self.layer.module._parameters[name]
            assert w is not None and D is not None
            yield name, forward_ad.make_dual(w, (self.strength * D).to(w.dtype))


class _Linearized:
    """Mixed into the class of a classifier; its logits become f + J D."""

    taft: TAFT

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with forward_ad.dual_level(), self.taft.thawed():
            out = super().forward(*args, **kwargs)  # type: ignore[misc]
            logits, tangent = forward_ad.unpack_dual(out.logits)
            out.logits = logits + tangent
        return out


class _Paired:
    """Mixed into the class of a block that pairs pass through: fused attention kernels do not know them."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with sdpa_kernel(SDPBackend.MATH):
            return super().forward(*args, **kwargs)  # type: ignore[misc]


def _mix(mixin: type, module: nn.Module) -> None:
    cls = type(module)
    module.__class__ = type(f"{mixin.__name__.strip('_')}{cls.__name__}", (mixin, cls), {})


class TAFT(Method):
    """Trains the tangent of the thawed weights, on all data or on shards that are averaged."""

    picks = True
    trains_fresh = False
    blocks: Any
    alpha: float
    wd: float
    objective: str
    shards: int
    forget: list[int]

    def prepare(self, run: Run) -> None:
        if run.settings.model.also_train:
            raise UserError(f"taft: model.also_train={list(run.settings.model.also_train)} would move what it expands around; leave it out")
        if not set(self.forget) < set(range(self.shards)):
            raise UserError(f"taft.forget={list(self.forget)}: shards are numbered 0 to {self.shards - 1}, and one has to be left")
        depths = run.anatomy.depths(self.blocks)
        blocks = run.anatomy.blocks
        ends = [part for part in run.anatomy.parts if part.block is None and part.role in ("norm", "head")]
        roots = [*(blocks[i] for i in sorted(depths)), *((part.name, part.module) for part in ends)]
        self.tangents: dict[str, Tangent] = {}
        self.kept: list[dict[str, Tensor]] = []
        for root, top in roots:
            for name, module in list(top.named_modules(prefix=root)):
                if next(module.parameters(recurse=False), None) is not None:
                    self.tangents[name] = Tangent(Layer(name, module), self, lambda purpose: run.generator("init", purpose))
        for tangent in self.tangents.values():
            tangent.layer.module.delta = tangent
        for _, block in blocks[min(depths, default=len(blocks)) :]:
            _mix(_Paired, block)
        _mix(_Linearized, run.model)
        run.model.taft = self  # type: ignore[assignment]
        run.touch(*run.loaded.fresh)

    @contextmanager
    def thawed(self) -> Iterator[None]:
        """The thawed weights as dual tensors, within a dual level."""
        held = {name: dict(tangent.layer.module._parameters) for name, tangent in self.tangents.items()}
        try:
            for tangent in self.tangents.values():
                for name, dual in list(tangent.duals()):
                    tangent.layer.module._parameters[name] = dual  # type: ignore[assignment]
            yield
        finally:
            for name, tangent in self.tangents.items():
                tangent.layer.module._parameters.update(held[name])

    # -- the loss -------------------------------------------------------------------------------------------------

    def loss(self, run: Run, batch: Batch) -> Tensor:
        outputs = run.task.outputs(run.model, batch)
        assert isinstance(outputs, ClassOutputs)
        nll = run.task.losses(outputs, batch)
        run.report("nll", nll.detach().sum())
        if self.objective == "square":
            logits = wide(outputs.logits)
            total = (logits - self.alpha * F.one_hot(batch["labels"], logits.shape[-1])).square().mean(-1).sum()
        else:
            total = nll.sum()
        run.count("tangent_passes")
        norm = (torch.stack(torch._foreach_norm(self.vector())).square().sum() + 1e-6).sqrt()
        run.log("taft/norm", norm.detach())
        return total + self.wd * norm * run.task.count(batch)

    def vector(self) -> list[Tensor]:
        """D, as a list of tensors."""
        return [D for tangent in self.tangents.values() for D in tangent.parameters()]

    # -- shards ---------------------------------------------------------------------------------------------------

    def drive(self, run: Run, fit: Callable[..., Any]) -> None:
        if self.shards == 1:
            fit()
            return
        train, steps, K = run.data["train"], run.planned_steps, self.shards
        whole = list(train.keep)
        if min(steps, len(whole)) < K:
            raise UserError(f"taft.shards={K}: there are {len(whole)} examples and {steps} updates for them; take fewer shards")
        shuffled = torch.randperm(len(whole), generator=run.generator("taft", "shards")).tolist()
        for k in range(K):
            train.keep = [whole[i] for i in sorted(shuffled[k::K])]
            fit(steps // K + (k < steps % K), name=f"shard-{k}")
            run.once(f"keep-{k}", lambda: self.keep(run))
        train.keep = whole

    @torch.no_grad()
    def keep(self, run: Run) -> int:
        """Put the shard's D aside and start the next at zero."""
        self.kept.append({name: D.detach().cpu().clone() for name, D in self.named()})
        torch._foreach_zero_(self.vector())
        run.count("shards")
        return len(self.kept)

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """D by the names of the weights that it belongs to."""
        for owner, tangent in self.tangents.items():
            for name, D in tangent.named_parameters():
                yield f"{owner}.{name}", D

    @torch.no_grad()
    def compose(self, forget: Sequence[int] = ()) -> int:
        """Put the average over the shards, those to be forgotten left out, into the model; returns how many it is of."""
        chosen = [D for k, D in enumerate(self.kept) if k not in forget]
        for name, D in self.named():
            D.copy_(torch.stack([one[name] for one in chosen]).mean(0))
        return len(chosen)

    def finish(self, run: Run) -> None:
        if self.kept:
            run.count("composed", self.compose(self.forget))

    # -- the record -----------------------------------------------------------------------------------------------

    def structure(self) -> dict[str, Any]:
        return {"shards": self.kept, "strength": {name: tangent.strength for name, tangent in self.tangents.items()}}

    def restore(self, run: Run, structure: dict[str, Any]) -> None:
        self.prepare(run)
        self.kept = structure["shards"]
        for name, strength in structure["strength"].items():
            self.tangents[name].strength = strength
