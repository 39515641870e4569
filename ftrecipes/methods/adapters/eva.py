"""EVA: One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation (arXiv 2410.07170).

LoRA whose A starts with the directions in which the inputs of a weight vary most on the data to be learned, and whose rank
is what the weight earns out of one budget. Over batches X (tokens x in) of a weight's inputs, their mean taken off:

    X = U diag(s) V^T, kept up to date batch by batch,   xi_i = s_i^2 / (sum of all squared deviations)
    A = V^T[:r_l] (r_l x in),  B = 0 (out x r_l),  W' = W + alpha / r B A

r_l is how many of the weight's xi are among the (rank x weights) largest of all, at most rank x rho. Weights with the same
input (q, k, v; gate, up) share one decomposition. A weight is done when the components that it is allotted turn by less
than `tau` (cosine) at a batch; it is taken up again when it is allotted more. Rank 0 leaves the weight without an adapter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ftrecipes.errors import UserError
from ftrecipes.method import parts_of
from ftrecipes.methods.adapters.calibrate import token_rows, watching
from ftrecipes.methods.adapters.delta import Delta, DeltaMethod, Layer, check_rank
from ftrecipes.methods.adapters.lora import LowRank
from ftrecipes.methods.adapters.svd import svd
from ftrecipes.update import wide


class Components:
    """The k leading principal directions of rows that come in batches.

    V: (k, features), orthonormal rows, None before the first batch. s: (k,) singular values of all rows about their mean.
    turned: (k,) cosine of each direction with what it was before the last batch. mean, var: (features,), float64.
    """

    s: Tensor
    mean: Tensor
    var: Tensor

    def __init__(self, k: int) -> None:
        self.k, self.seen = k, 0
        self.V: Tensor | None = None
        self.turned = torch.zeros(k)

    def add(self, rows: Tensor, iterations: int | None, rng: torch.Generator) -> bool:
        """Take in rows (n, features); fewer than k of them are passed over (False)."""
        n = len(rows)
        if n < self.k:
            return False
        X = wide(rows)
        mean = X.mean(0, dtype=torch.float64)
        X = X - mean.to(X.dtype)
        var = X.square().mean(0, dtype=torch.float64)
        if self.V is None:
            self.mean, self.var, stack = mean, var, X
        else:
            total = self.seen + n
            shift = self.mean - mean
            correction = (self.seen * n / total) ** 0.5 * shift  # the row that the two means differ by
            stack = torch.cat([self.s[:, None] * self.V, X, correction.to(X.dtype)[None]])
            self.mean = (self.seen * self.mean + n * mean) / total
            self.var = (self.seen * self.var + n * var + self.seen * n / total * shift.square()) / total
        before = self.V
        V, self.s, _ = svd(stack.T, self.k, iterations=iterations, rng=rng)
        self.V = V.T
        if before is not None:
            self.turned = torch.cosine_similarity(self.V, before).cpu()
        self.seen += n
        return True

    @property
    def explained(self) -> Tensor:
        """xi (k,): the share of the variance of all rows along each direction; what rounding adds to a constant counts nothing."""
        noise = 1e-12 * self.mean.square().sum() + torch.finfo(torch.float64).tiny
        return (self.s.double().square() / (self.seen * torch.maximum(self.var.sum(), noise))).cpu()


class EVA(DeltaMethod):
    """LoRA along the inputs' principal directions, with a rank for each weight."""

    module = LowRank
    kinds = (nn.Linear, Conv1D)
    rank: int
    alpha: float
    rho: float
    tau: float
    use_label_mask: bool
    whiten: bool
    adjust_scaling_factors: bool
    svd_batch: int
    svd_iterations: int | None
    max_batches: int

    def prepare(self, run: Any) -> None:
        parts = parts_of(run, self, self.targets, self.blocks)
        self.shapes = {}
        for part in parts:
            self.check(part)
            layer = Layer(part.name, part.module)
            check_rank(self, layer, self.rank)
            self.shapes[part.name] = layer.shape
        found = None if parts[0].weight.is_meta else self.explain(run, {part.name: part for part in parts})
        for part in parts:
            rank = self.rank if found is None else len(found[part.name])
            if rank:
                self.attach(run, part, {"rank": rank})
            if found is not None and rank:
                with torch.no_grad():
                    cast(LowRank, self.deltas[part.name]).A.copy_(found[part.name])

    def make(self, layer: Layer, rng: Callable[[str], torch.Generator], saved: dict[str, Any] | None) -> Delta:
        assert saved is not None
        delta = LowRank(layer, self, rng, saved["rank"])
        delta.scale = self.alpha / (self.rank if self.adjust_scaling_factors else saved["rank"])
        return delta

    def structure(self) -> dict[str, Any]:
        out = super().structure()
        for name, delta in self.deltas.items():
            out["deltas"][name]["rank"] = len(cast(LowRank, delta).A)
        return out

    def explain(self, run: Any, parts: dict[str, Any]) -> dict[str, Tensor]:
        """The rows of A of every weight, as many as its rank."""
        owner = self.sharing(run, parts)
        most = {name: min(round(self.rank * self.rho), *shape) for name, shape in self.shapes.items()}
        inputs = {name: Components(max(most[n] for n in parts if owner[n] == name)) for name in parts if owner[name] == name}
        ranks = dict(most)
        batches = self.stream(run)
        for count in range(self.max_batches + 1):
            turning = [name for name, part in inputs.items() if not bool((part.turned[: ranks[name]] >= self.tau).all())]
            if not turning:
                break
            if count == self.max_batches:
                raise self.unfinished(inputs, turning)
            batch = next(batches)

            def see(name: str, x: Tensor, batch: dict[str, Any] = batch) -> None:
                rows = token_rows(x, batch, learned=self.use_label_mask)
                if inputs[name].add(rows, self.svd_iterations, run.generator("eva", name, inputs[name].seen)):
                    run.count("svd_updates")

            with watching([parts[name] for name in turning], see):
                forward(run, batch)
            if all(part.V is not None for part in inputs.values()):
                ranks = self.allot(inputs, owner, most)
        moved = sum(max(0, r - self.rank) for r in ranks.values())
        if moved:
            run.count("ranks_moved", moved)
        none = sum(r == 0 for r in ranks.values())
        run.say(f"eva: ranks from {min(ranks.values())} to {max(ranks.values())} after {count} batches, {none} weights without an adapter")
        return {name: self.rows(inputs[owner[name]], r) for name, r in ranks.items()}

    def rows(self, part: Components, rank: int) -> Tensor:
        assert part.V is not None
        return part.V[:rank] / part.s[:rank, None].sqrt() if self.whiten else part.V[:rank]

    def allot(self, inputs: dict[str, Components], owner: dict[str, str], most: dict[str, int]) -> dict[str, int]:
        """Ranks by name: how many of a weight's xi are among the largest of all; of one input the first weight gets most."""
        names = list(owner)
        xi = [inputs[owner[name]].explained[: most[name]] for name in names]
        whose = torch.cat([torch.full((len(x),), i) for i, x in enumerate(xi)])
        largest = torch.cat(xi).argsort(descending=True, stable=True)[: self.rank * len(names)]
        counts = whose[largest].bincount(minlength=len(names)).tolist()
        ranks = dict(zip(names, counts, strict=True))
        for name in names:
            first = owner[name]
            ranks[first], ranks[name] = max(ranks[first], ranks[name]), min(ranks[first], ranks[name])
        return ranks

    def sharing(self, run: Any, parts: dict[str, Any]) -> dict[str, str]:
        """For every weight the first one that has the same input, found by the bytes of one batch's inputs."""
        seen: dict[str, str] = {}
        first: dict[bytes, str] = {}

        def see(name: str, x: Tensor) -> None:
            content = x.contiguous().view(torch.uint8).cpu().numpy().tobytes()
            seen[name] = first.setdefault(hashlib.blake2b(content, digest_size=16, key=str(x.shape).encode()).digest(), name)

        with watching(list(parts.values()), see):
            forward(run, next(self.stream(run)))
        for name in parts:
            if name not in seen:
                raise UserError(f"{self.key}: nothing passes through {name}; narrow {self.key}.targets")
        return {name: seen[name] for name in parts}

    def stream(self, run: Any) -> Iterator[dict[str, Any]]:
        """Batches of the training data, over and over."""
        while True:
            yield from run.calibration(len(run.data["train"].keep), batch=self.svd_batch)

    def unfinished(self, inputs: dict[str, Components], turning: list[str]) -> UserError:
        empty = next((name for name in turning if inputs[name].V is None), None)
        if empty is not None:
            return UserError(
                f"{self.key}: no batch of {self.svd_batch} examples held the {inputs[empty].k} tokens that {empty} needs; "
                f"raise {self.key}.svd_batch"
            )
        return UserError(
            f"{self.key}: after {self.max_batches} batches the components of {len(turning)} of {len(inputs)} inputs still turn "
            f"({turning[0]} first); raise {self.key}.svd_batch or {self.key}.max_batches, or lower {self.key}.tau"
        )


def forward(run: Any, batch: dict[str, Any]) -> None:
    """The whole forward pass, its losses too: some heads run there."""
    with run.evaluating():
        run.task.losses(run.task.outputs(run.model, batch), batch)
