"""Recovering the Pre-Fine-Tuning Weights of Generative Models (arXiv 2402.10208).

Several models that are LoRA tunings of one hidden base W, each with its update folded in (only W'_i = W + B_i A_i is
seen), determine the base. Per weight, Spectral DeTuning minimises over W* and matrices M_i of rank at most r

    sum_i |W'_i - (W* + M_i)|_F^2

by turns: W* starts as the mean of the W'_i; M_i becomes the best approximation of W'_i - W* of the current rank (truncated
SVD), W* the mean of W'_i - M_i. The current rank starts at 1 and doubles whenever the loss did not fall for more than
`patience` rounds; for the second half of the rounds it is r. No data, no gradient and no factor is used.

The run makes its tunings itself, `n_loras` LoRA fits with other seeds and parts of the data, or takes those of `runs:`
(finished runs, or folders of whole models whose base nobody has). Its result is the recovered model; where the base is
at hand, the record says how far from it each weight is, and the plain mean of the tunings beside it.

All W'_i - W* of all rounds have their columns in the span of the columns of the differences W'_i - W*_0, and their rows
likewise, so the rounds run on what the W'_i are in a basis of these two spans, of size at most n r by n r, in float64:
the same iterates as on the whole matrices at a small part of the cost (the authors use a randomised SVD instead).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ftrecipes.errors import RunFailed
from ftrecipes.methods.adapters.delta import DeltaMethod
from ftrecipes.methods.adapters.lora import LowRank
from ftrecipes.methods.weights.arithmetic import Merging, Shelf, average, fill
from ftrecipes.rng import derive

if TYPE_CHECKING:
    from ftrecipes.run import Run


class RankSchedule:
    """The current rank: doubled on a plateau of the loss, the last one from half of the rounds on."""

    def __init__(self, rounds: int, end: int, start: int = 1, patience: int = 15) -> None:
        self.rounds, self.end, self.patience = rounds, end, patience
        self.rank, self.best, self.bad, self.round = min(start, end), math.inf, 0, 0

    def step(self, loss: float) -> None:
        self.round += 1
        if self.round >= self.rounds / 2:
            self.rank = self.end
            return
        self.best, self.bad = (loss, 0) if loss < self.best else (self.best, self.bad + 1)
        if self.bad > self.patience:
            self.rank, self.bad = min(2 * self.rank, self.end), 0


def truncated(matrices: Tensor, rank: int) -> Tensor:
    """The best approximation of rank `rank` of each matrix (n, rows, cols)."""
    U, s, Vh = torch.linalg.svd(matrices, full_matrices=False)
    return (U[..., :rank] * s[..., None, :rank]) @ Vh[..., :rank, :]


def spans(differences: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """Orthonormal bases (rows x a), (cols x b) of the columns and of the rows of all matrices (n, rows, cols), down to a singular value."""
    columns = torch.cat(list(differences), 1)
    rows = torch.cat(list(differences.mT), 1)
    out = []
    for stacked in (columns, rows):
        U, s, _ = torch.linalg.svd(stacked, full_matrices=False)
        out.append(U[:, : max(1, int((s > floor).sum()))])
    return out[0], out[1]


def recover(tuned: Sequence[Tensor], rank: int, rounds: int, start: int = 1, patience: int = 15) -> tuple[Tensor, list[float]]:
    """W* (rows x cols) in float64 from the tuned matrices, and the loss of every round."""
    primes = torch.stack([w.double() for w in tuned])
    mean = primes.mean(0)
    if not rounds or not (differences := primes - mean).any():
        return mean, []
    # what rounding to the dtype of the inputs leaves behind is not part of any span
    U, V = spans(differences, rounding(tuned[0], len(tuned)))
    core = U.T @ differences @ V
    star, losses, schedule = torch.zeros_like(core[0]), [], RankSchedule(rounds, rank, start, patience)
    for _ in range(rounds):
        M = truncated(core - star, schedule.rank)
        star = (core - M).mean(0)
        losses.append(float((core - star - M).square().sum()) / primes.numel())
        schedule.step(losses[-1])
    return mean + U @ star @ V.T, losses


def rounding(weight: Tensor, count: int = 1) -> float:
    """A bound on the singular values of what rounding to its dtype does to a weight, and to `count` of them side by side."""
    rows, cols = weight.shape
    size = float(weight.double().square().mean().sqrt())
    return torch.finfo(weight.dtype).eps * size * (math.sqrt(max(rows, cols) * count) + math.sqrt(min(rows, cols)))


def rank_apart(a: Tensor, b: Tensor) -> int:
    """The rank of the difference of two weights, above what rounding leaves."""
    return int((torch.linalg.svdvals(a.double() - b.double()) > 2 * rounding(a)).sum())


class SpectralDeTuning(Merging, DeltaMethod):
    """Makes LoRA tunings of one base, folds them in, and recovers the base from them alone."""

    module = LowRank
    picks = True
    rank: int
    n_loras: int
    n_iters: int
    sched_start_rank: int
    sched_end_rank: int | None
    patience: int

    @property
    def k(self) -> int:  # type: ignore[override]
        return self.n_loras

    def prepare(self, run: Run) -> None:
        Merging.prepare(self, run)
        self.recovered: list[str] = []
        DeltaMethod.prepare(self, run)

    def structure(self) -> dict[str, Any]:
        return {**DeltaMethod.structure(self), "recovered": self.recovered}

    def restore(self, run: Run, structure: dict[str, Any]) -> None:
        self.recovered = list(structure["recovered"])
        if self.recovered:  # the tunings are gone, the recovered weights are what there is
            for name in self.recovered:
                run.model.get_parameter(name).requires_grad_(True)
        else:
            DeltaMethod.restore(self, run, structure)

    def vary(self, run: Run, i: int) -> dict[str, Any]:
        """Another draw of A, and another part of the data."""
        keep = list(run.data["train"].keep)
        part = keep[i :: self.k] if len(keep) >= self.k else keep
        return {"seed": derive(run.seed, "lora", i), "train": part}

    @torch.no_grad()
    def combine(self, run: Run, shelf: Shelf) -> dict[str, Any]:
        n = len(self.reports)
        rank = self.sched_end_rank or self.rank
        DeltaMethod.merge(self, run)  # adapters that were made anew and add nothing
        said: dict[str, dict[str, Any]] = {}

        def value(name: str) -> Tensor:
            tuned = [shelf.get(i, name) for i in range(n)]
            if all(torch.equal(tuned[0], w) for w in tuned[1:]):
                return tuned[0]
            if tuned[0].dim() < 2:
                raise RunFailed(f"{self.key}: {name} differs between the models and is no matrix; they are not LoRA tunings of one base")
            matrices = [w.flatten(1) for w in tuned]
            apart = rank_apart(matrices[0], matrices[1])
            if apart > 2 * rank:
                raise RunFailed(
                    f"{self.key}: {name} of the first two models differs by a matrix of rank {apart}, more than 2 x rank {rank}: "
                    f"either they do not share a base, or method.{self.key}.sched_end_rank must be larger"
                )
            star, losses = recover(matrices, rank, self.n_iters, self.sched_start_rank, self.patience)
            said[name] = {"loss": losses[-1] if losses else None, "rank between two": apart}
            run.count("recovered weights")
            return star.reshape(tuned[0].shape).to(tuned[0].dtype)

        fill(run, shelf.names(), value)
        self.recovered = sorted(said)
        run.prepare(run.stack.structure())
        known = not self.runs or all("validation" in report for report in self.reports)
        return {"weights": said, **(self.compared(run, shelf, said) if known and said else {})}

    @torch.no_grad()
    def compared(self, run: Run, shelf: Shelf, said: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """How far the recovered model is from the base, which is read for the first time here; the mean of the tunings beside it.

        error: log10 of the mean squared error of a weight, averaged over the weights. semantic: the largest and the mean
        difference that the error makes to the losses of the counted units of the test set.
        """
        base = run.pristine()
        shelf.put("recovered", {name: run.model.get_parameter(name).detach() for name in said})
        candidates: dict[str, Callable[[str], Tensor]] = {
            "mean of the tunings": lambda name: average(shelf.get(i, name) for i in range(len(self.reports))),
            "recovered": lambda name: shelf.get("recovered", name),
        }
        wanted = self.unit_losses(run, base.to(run.device))
        out: dict[str, Any] = {"error": {}, "semantic": {}}
        for what, weight in candidates.items():
            fill(run, said, weight)
            for name, report in said.items():
                error = run.model.get_parameter(name).double() - base.get_parameter(name).double()
                report[f"log10 mse, {what}"] = math.log10(max(float(error.square().mean()), 1e-300))
            out["error"][what] = sum(report[f"log10 mse, {what}"] for report in said.values()) / len(said)
            if len(wanted):
                apart = (self.unit_losses(run, run.model) - wanted).abs()
                out["semantic"][what] = {"largest": float(apart.max()), "mean": float(apart.mean())}
        return out

    def unit_losses(self, run: Run, model: torch.nn.Module) -> Tensor:
        """The losses of all counted units of the test set under a model."""
        test = run.data["test"]
        size = run.settings.trainer.batch
        batches = [run.move(test.batch(list(test.keep[at : at + size]))) for at in range(0, len(test), size)]
        model.eval()
        with run.evaluating():
            return torch.cat([run.task.losses(run.task.outputs(model, b), b).float() for b in batches]) if batches else torch.zeros(0)
