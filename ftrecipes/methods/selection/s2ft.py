"""S2FT: Efficient, Scalable and Generalizable LLM Fine-tuning by Structured Sparsity (arXiv 2412.06289).

A few attention heads and a few channels of the MLP train, of all layers together int(ratio * number of them). Within a
block the matrices on both sides of the heads and of the channels are permuted together, which leaves the function as it
is and makes what was picked one dense slice:

    MLP   y = D (act(G x) * U x)   rows of U and G and columns of D in the order  only U | both | only D | the rest
    MHA   heads of d_h             rows of Q, K, V and columns of O in the order  only V | both | only O | the rest
    y = W x,  y[a:b] += S x  (U, V: S is picked x inputs)      y = W x + S x[a:b]  (D, O: S is outputs x picked),  S = 0 at first

Of W nothing trains, and of the input a D or O layer keeps x[a:b] alone for the backward pass, so saved activations,
gradients and moments are those of the slices. With grouped queries a head of V is one of the key-value heads, and a head
of O the group of query heads that reads it. The permutation stands while the model trains; before and after, and in
every record, weights have their original order. The authors train S beside a frozen W as here (their efficiency
benchmark updates the slice of W itself, which is the same without weight decay).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ftrecipes.errors import UserError
from ftrecipes.methods.adapters.delta import Delta, DeltaMethod, Factors, Layer, linear

if TYPE_CHECKING:
    from ftrecipes.anatomy import Part
    from ftrecipes.run import Run


@dataclass
class Place:
    """Where heads or channels stand in a weight: unit j owns `span` rows (columns where `inputs`) from offset + j * span."""

    part: Part
    span: int
    offset: int = 0
    inputs: bool = False

    def positions(self, units: Tensor) -> Tensor:
        """The rows (columns) of these units, in their order."""
        return (self.offset + units[:, None] * self.span + torch.arange(self.span, device=units.device)).flatten()

    def per_unit(self, matrix: Tensor, count: int) -> Tensor:
        """The numbers of each unit in a matrix (rows x cols) of the part: (count, numbers)."""
        return (matrix.T if self.inputs else matrix)[self.offset : self.offset + count * self.span].reshape(count, -1)

    @torch.no_grad()
    def move(self, order: Tensor) -> None:
        """Put the units in this order."""
        layer, at = Layer(self.part.name, self.part.module), slice(self.offset, self.offset + len(order) * self.span)
        source = self.positions(order.to(layer.device))
        if self.inputs:
            matrix = layer.matrix(layer.raw)
            matrix[:, at] = matrix[:, source]
            return
        for rows in (layer.raw if layer.raw.dim() == 1 else layer.matrix(layer.raw), layer.bias):
            if rows is not None:
                rows[at] = rows[source]


@dataclass
class Coupling:
    """The heads or the channels of a block: `inner` makes them (V or U), `outer` reads them (O or D), `others` move along."""

    count: int
    inner: Place
    outer: Place
    others: list[Place] = field(default_factory=list)


class Slice(Delta):
    """S of one weight: n picked rows (n x cols), or, with `inputs`, n picked columns (rows x n)."""

    def __init__(self, layer: Layer, method: Any, rng: Any, place: Place, units: Tensor) -> None:
        super().__init__(layer, method, rng)
        self.inputs, self.units = place.inputs, units
        self.register_buffer("index", place.positions(units).to(layer.device), persistent=False)
        self.start: int | None = None
        """First row (column) of the slice while the weights are permuted."""
        rows, cols = layer.shape
        n = len(self.index)
        self.s = self.parameter(rows, n) if self.inputs else self.parameter(n, cols)

    index: Tensor

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        packed = self.start is not None and self.strength == 1.0
        if self.inputs:
            # a copy: a view would keep all of x alive until the backward pass
            part = x.narrow(-1, self.start, len(self.index)).contiguous() if packed else x.index_select(-1, self.index)  # type: ignore[arg-type]
            return y + linear(part, self.s)
        update = linear(x, self.s)
        if packed:
            y.narrow(-1, self.start, len(self.index)).add_(update)  # type: ignore[arg-type]
            return y
        return y.index_add(-1, self.index, update)

    def delta(self) -> Tensor:
        return self.merged(torch.zeros(self.layer.shape, dtype=self.s.dtype, device=self.s.device))

    def merged(self, weight: Tensor) -> Tensor:
        return weight.index_add(1 if self.inputs else 0, self.index, self.s)

    def structure(self) -> dict[str, Any]:
        return {"units": self.units}

    def factors(self) -> Factors:
        """The update as a LoRA whose other factor says where the slice stands."""
        rows, cols = self.layer.shape
        where = torch.zeros(len(self.index), cols if self.inputs else rows, dtype=self.s.dtype, device=self.s.device)
        where[torch.arange(len(self.index)), self.index] = 1.0
        return Factors(self.s.detach(), where, 1.0) if self.inputs else Factors(where.T, self.s.detach(), 1.0)


class S2FT(DeltaMethod):
    """Trains slices of permuted weights."""

    kinds = (nn.Linear, Conv1D)
    v_ratio: float
    o_ratio: float
    u_ratio: float
    d_ratio: float
    strategy: str
    keep: str
    calibration: int

    def prepare(self, run: Run) -> None:
        self.couple(run)
        for couplings, inner_ratio, outer_ratio, what in (
            (self.heads, self.v_ratio, self.o_ratio, "heads"),
            (self.channels, self.u_ratio, self.d_ratio, "channels"),
        ):
            inner = self.pick(run, [(c, c.inner) for c in couplings], inner_ratio)
            outer = self.pick(run, [(c, c.outer) for c in couplings], outer_ratio)
            for coupling, i, o in zip(couplings, inner, outer, strict=True):
                both = torch.isin(o, i)
                i, o = torch.cat([i[~torch.isin(i, o)], o[both]]), torch.cat([o[both], o[~both]])
                for place, units in ((coupling.inner, i), (coupling.outer, o)):
                    if len(units):
                        self.attach(run, place.part, {"units": units})
                        run.count(what, len(units))
        if not self.deltas:
            raise UserError(
                f"{self.key}: the ratios v={self.v_ratio} o={self.o_ratio} u={self.u_ratio} d={self.d_ratio} pick no head "
                f"and no channel of {run.settings.model.name}; raise one"
            )

    def restore(self, run: Run, structure: dict[str, Any]) -> None:
        self.couple(run)
        super().restore(run, structure)

    def couple(self, run: Run) -> None:
        """Find the coupled matrices of every block."""
        depths = range(len(run.anatomy.blocks))
        self.heads = [self.attention(run, depth) for depth in depths] if self.v_ratio or self.o_ratio else []
        self.channels = [self.mlp(run, depth) for depth in depths] if self.u_ratio or self.d_ratio else []
        self.places = {place.part.name: place for c in (*self.heads, *self.channels) for place in (c.inner, c.outer)}

    def mlp(self, run: Run, depth: int) -> Coupling:
        """The channels of a block."""
        parts = [part for part in run.anatomy.parts if part.block == depth]
        up, gate, down = ([part for part in parts if part.role == role] for role in ("up", "gate", "down"))
        count = Layer("", down[0].module).shape[1] if down else 0
        rows = [Layer("", part.module).shape[0] for part in (*up, *gate) if isinstance(part.module, self.kinds)]
        inside = [part for part in parts if part.role == "norm" and part.weight.numel() == count]
        if len(up) != 1 or len(down) != 1 or rows != [count] * (1 + len(gate)) or len(gate) > 1 or inside:
            raise UserError(
                f"{self.key}: block {depth} of {run.settings.model.name} has no plain MLP (up, gate or none, down); "
                f"set {self.key}.u_ratio=0 {self.key}.d_ratio=0"
            )
        return Coupling(count, Place(up[0], 1), Place(down[0], 1, inputs=True), [Place(part, 1) for part in gate])

    def attention(self, run: Run, depth: int) -> Coupling:
        """The heads of a block, or its groups of query heads that share a key and a value."""
        parts = [part for part in run.anatomy.parts if part.block == depth]
        by = {role: [part for part in parts if part.role == role] for role in ("q", "k", "v", "o", "qkv")}
        heads = getattr(run.model.config, "num_attention_heads", 0)
        fused = len(by["qkv"]) == 1 and isinstance(by["qkv"][0].module, Conv1D) and not (by["q"] or by["k"] or by["v"])
        apart = all(len(by[role]) == 1 for role in "qkv") and not by["qkv"]
        strange = "no attention of a known form (q, k, v and o apart, or those of GPT-2)"
        if heads and len(by["o"]) == 1 and (fused or apart):
            o = by["o"][0]
            width = Layer("", o.module).shape[1]
            d = width // heads
            if fused:
                qkv = by["qkv"][0]
                q, k, v = (Place(qkv, d, i * width) for i in range(3))
                return Coupling(heads, v, Place(o, d, inputs=True), [q, k])
            group = width // Layer("", by["v"][0].module).shape[0]
            q, k, v = (Place(by[role][0], d * (group if role == "q" else 1)) for role in "qkv")
            moved = {by[role][0].name for role in ("q", "k", "v", "o")}
            home = _common(moved)
            rest = [part for part in parts if part.name.startswith(home) and part.name not in moved]
            norms = [Place(part, (q if "q" in part.name.rpartition(".")[2] else k).span) for part in rest if _over_heads(part, d)]
            loose = {n for n, _ in run.model.named_parameters() if n.startswith(home)} - {
                f"{part.name}.{kind}" for part in parts for kind in ("weight", "bias")
            }
            if not loose and all(part.role == "norm" for part in rest):
                return Coupling(heads // group, v, Place(o, d * group, inputs=True), [q, k, *norms])
            strange = f"something in its attention that belongs to single heads ({min(loose | {p.name for p in rest if p.role != 'norm'})})"
        raise UserError(
            f"{self.key}: block {depth} of {run.settings.model.name} has {strange}; set {self.key}.v_ratio=0 {self.key}.o_ratio=0"
        )

    # -- what is picked -------------------------------------------------------------------------------------------

    def pick(self, run: Run, places: list[tuple[Coupling, Place]], ratio: float) -> list[Tensor]:
        """int(ratio * units of all layers) units, ascending, by layer."""
        sizes = [coupling.count for coupling, _ in places]
        n = int(sum(sizes) * ratio)
        if not n:
            return [torch.empty(0, dtype=torch.long)] * len(places)
        if self.strategy == "random" or places[0][1].part.weight.is_meta:
            chosen = torch.randperm(sum(sizes), generator=run.generator("s2ft", places[0][1].part.role))[:n]
        else:
            score = torch.cat(self.scores(run, places)).cpu()
            chosen = score.topk(n, largest=self.keep == "largest").indices
        mask = torch.zeros(sum(sizes), dtype=torch.bool)
        mask[chosen] = True
        return [part.nonzero().flatten() for part in mask.split(sizes)]

    def scores(self, run: Run, places: list[tuple[Coupling, Place]]) -> list[Tensor]:
        """A number per unit by layer: norm of its weights, mean magnitude of its activations, their product, or norm of its gradient."""
        if self.strategy == "gradient":
            return self.gradient_norms(run, places)
        ones = [torch.ones(coupling.count, device=run.device) for coupling, _ in places]
        layers = [(coupling, place, Layer("", place.part.module)) for coupling, place in places]
        W = [p.per_unit(layer.weight, c.count).norm(dim=1) for c, p, layer in layers] if "weight" in self.strategy else ones
        A = self.activations(run, [coupling for coupling, _ in places]) if "activation" in self.strategy else ones
        return [w * a for w, a in zip(W, A, strict=True)]

    def activations(self, run: Run, couplings: list[Coupling]) -> list[Tensor]:
        """Mean magnitude of what each unit hands to the layer that reads it, over the positions of the calibration batches."""
        sums = [torch.zeros(c.count, device=run.device) for c in couplings]

        def watch(at: int, count: int) -> Callable[[nn.Module, Any], None]:
            def hook(module: nn.Module, inputs: Any) -> None:
                sums[at] += inputs[0].float().abs().reshape(-1, count, inputs[0].shape[-1] // count).mean((0, 2))

            return hook

        hooks = [c.outer.part.module.register_forward_pre_hook(watch(i, c.count)) for i, c in enumerate(couplings)]
        with run.evaluating():
            for batch in run.calibration(self.calibration, batch=run.settings.trainer.batch):
                run.task.outputs(run.model, batch)
        for hook in hooks:
            hook.remove()
        return sums

    def gradient_norms(self, run: Run, places: list[tuple[Coupling, Place]]) -> list[Tensor]:
        """Norm of the loss's gradient in each unit's weights, summed over calibration batches; one dense gradient lives at a time."""
        sums = [torch.zeros(coupling.count, device=run.device) for coupling, _ in places]

        def watch(at: int, coupling: Coupling, place: Place) -> Callable[[Tensor], None]:
            def hook(weight: Tensor) -> None:
                grad = Layer("", place.part.module).matrix(weight.grad)  # type: ignore[arg-type]
                sums[at] += place.per_unit(grad, coupling.count).float().norm(dim=1)
                weight.grad = None

            return hook

        weights = [place.part.weight for _, place in places]
        trained = [weight.requires_grad for weight in weights]
        hooks = [w.requires_grad_(True).register_post_accumulate_grad_hook(watch(i, *places[i])) for i, w in enumerate(weights)]
        for batch in run.calibration(self.calibration, batch=run.settings.trainer.batch):
            with run.update.autocast():
                losses = run.task.losses(run.task.outputs(run.model, batch), batch)
            losses.mean().backward()
        for hook, weight, before in zip(hooks, weights, trained, strict=True):
            hook.remove()
            weight.requires_grad_(before)
        run.model.zero_grad()  # of other slices, picked before these
        return sums

    # -- the permutation ------------------------------------------------------------------------------------------

    def make(self, layer: Layer, rng: Callable[[str], torch.Generator], saved: dict[str, Any] | None) -> Delta:
        assert saved is not None
        return Slice(layer, self, rng, self.places[layer.name], saved["units"])

    def drive(self, run: Run, fit: Callable[..., Any]) -> None:
        self.pack()
        fit()
        self.unpack()

    def pack(self) -> None:
        """Permute every block so that its picked heads and channels are slices."""
        self.orders: list[tuple[Coupling, Tensor]] = []
        for coupling in (*self.heads, *self.channels):
            inner, outer = (self.deltas.get(place.part.name) for place in (coupling.inner, coupling.outer))
            i, o = (d.units if isinstance(d, Slice) else torch.empty(0, dtype=torch.long) for d in (inner, outer))
            picked = torch.cat([i, o[~torch.isin(o, i)]])
            rest = torch.arange(coupling.count)
            order = torch.cat([picked, rest[~torch.isin(rest, picked)]])
            if isinstance(inner, Slice):
                inner.start = coupling.inner.offset
            if isinstance(outer, Slice):
                outer.start = int((~torch.isin(i, o)).sum()) * coupling.outer.span
            if len(picked):
                self.reorder(coupling, order)
                self.orders.append((coupling, order))

    def unpack(self) -> None:
        """Put every block back into its original order."""
        for coupling, order in self.orders:
            self.reorder(coupling, order.argsort())
        for delta in self.deltas.values():
            delta.start = None  # type: ignore[assignment]

    @staticmethod
    def reorder(coupling: Coupling, order: Tensor) -> None:
        for place in (coupling.inner, coupling.outer, *coupling.others):
            place.move(order)


def _common(names: set[str]) -> str:
    """The longest prefix of whole module names."""
    first, last = min(names).split("."), max(names).split(".")
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return ".".join(first[:same]) + "."


def _over_heads(part: Part, width: int) -> bool:
    """Whether a norm acts on queries or keys of all heads together; one that is shared by the heads needs no moving."""
    return part.name.rpartition(".")[2].startswith(("q_", "k_")) and part.weight.numel() > width
