"""Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing inference time
(arXiv 2203.05482).

Fine-tune k models theta_1 … theta_k from one start with different hyperparameters; average weights instead of keeping the
best model. Inference costs one model.

    uniform   theta = 1/k sum_i theta_i
    greedy    in order of the score on held-out data, best first: theta_i joins the soup (the mean of its members) if the
              soup's held-out score is no worse with it (`accept: ge`); `gt` asks for a better score
    learned   theta = sum_i w_i theta_i, w = softmax(a): a (k,), or (tensors, k) by `learned_by_layer`, and a temperature
              beta on the logits minimise the loss of held-out data by AdamW, from the uniform soup

Held-out data is the validation split, never the test set. The paper's algorithm accepts a tie, its released code does
not; the paper stands here because its statement (never worse than the best member) is about that rule. A learned soup
holds all ingredients in memory, the others one model. Ingredients differ in learning rate, weight decay (both
log-uniform), length and the order of the data; `fits:` lists them by hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ftrecipes.data.base import micro_batches
from ftrecipes.errors import UserError
from ftrecipes.methods.weights.arithmetic import Merging, Shelf, average, fill
from ftrecipes.methods.weights.interpolation import measure_norms
from ftrecipes.run import TOKENS_CPU

if TYPE_CHECKING:
    from ftrecipes.run import Run


class ModelSoups(Merging):
    """Averages several fine-tunings from one start."""

    recipe: str
    accept: str
    lr: list[float]
    weight_decay: list[float]
    length: list[float]
    fits: list[dict[str, Any]]
    recalibrate: int
    learned_lr: float
    learned_epochs: int
    learned_batch: int

    # -- ingredients ----------------------------------------------------------------------------------------------

    def vary(self, run: Run, i: int) -> dict[str, Any]:
        if self.fits:
            return {path: value for path, value in self.fits[i].items() if path != "length"}
        u = torch.rand(3, generator=run.generator("soup", i), dtype=torch.float64).tolist()
        return {
            "optimizer.lr": between_logs(self.lr, u[0]),
            "optimizer.weight_decay": between_logs(self.weight_decay, u[1]),
        }

    def parts(self, run: Run) -> list[float]:
        if self.fits:
            return [float(fit.get("length", 1.0)) for fit in self.fits]
        low, high = self.length[0], self.length[-1]
        return [
            low + (high - low) * float(torch.rand(3, generator=run.generator("soup", i), dtype=torch.float64)[2]) for i in range(self.k)
        ]

    def refuse(self, run: Run) -> None:
        super().refuse(run)
        held_out = run.data["validation"]
        if not len(held_out):
            raise UserError(f"{self.key}: ingredients are compared on validation data, and data {run.settings.data.name} has none")
        if self.recipe.startswith("learned"):
            if any(hasattr(module, "chosen") for module in run.model.modules()):
                raise UserError("a learned soup needs whole weights, and a method of the stack trains chosen entries; use recipe=greedy")
            with run.evaluating():
                Taster(run)(run.move(held_out.batch([held_out.keep[0]])), torch.ones((), device=run.device))

    # -- recipes --------------------------------------------------------------------------------------------------

    def combine(self, run: Run, shelf: Shelf) -> dict[str, Any]:
        everyone = list(range(len(self.reports)))
        scores = [target(run, r["validation"]) if r.get("validation") else self.score(run, shelf, [i]) for i, r in enumerate(self.reports)]
        said: dict[str, Any] = {"recipe": self.recipe, "best single": max(scores), "uniform": self.score(run, shelf, everyone)}
        if self.recipe == "greedy":
            said |= self.greedy(run, shelf, scores)
        elif self.recipe != "uniform":
            said |= self.learned(run, shelf)
        measure_norms(run, self.recalibrate)
        return {name: sign(run) * value if name in ("best single", "uniform") else value for name, value in said.items()}

    def cook(self, run: Run, shelf: Shelf, members: list[int], weights: Callable[[str], list[float]] | None = None) -> None:
        """Put the average of these ingredients into the model, one tensor at a time."""
        fill(run, shelf.names(), lambda name: average((shelf.get(i, name) for i in members), weights(name) if weights else None))

    def score(self, run: Run, shelf: Shelf, members: list[int]) -> float:
        """The held-out score of a soup, higher is better."""
        self.cook(run, shelf, members)
        run.count("tastings")
        return target(run, run.evaluate("validation"))

    def greedy(self, run: Run, shelf: Shelf, scores: list[float]) -> dict[str, Any]:
        order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
        soup, best, tries = order[:1], scores[order[0]], []
        for i in order[1:]:
            score = self.score(run, shelf, [*soup, i])
            joins = score >= best if self.accept == "ge" else score > best
            tries.append({"ingredient": i, "score": sign(run) * score, "joins": joins})
            if joins:
                soup, best = [*soup, i], score
        self.cook(run, shelf, soup)
        return {"order": order, "tries": tries, "soup": soup, "score": sign(run) * best}

    def learned(self, run: Run, shelf: Shelf) -> dict[str, Any]:
        """Mixing weights by gradient descent on held-out data; only `a` and beta train."""
        names, members = shelf.names(), range(len(self.reports))
        here = {**dict(run.model.named_buffers()), **dict(run.model.named_parameters())}
        dtypes = {name: here[name].dtype for name in names}
        mixed = [name for name in names if here[name].is_floating_point()]
        stacked = {name: torch.stack([shelf.get(i, name) for i in members]).to(run.device) for name in mixed}
        rows = {name: row if self.recipe == "learned_by_layer" else 0 for row, name in enumerate(mixed)}
        a = torch.zeros(max(rows.values()) + 1, len(members), device=run.device, requires_grad=True)
        beta = torch.ones((), device=run.device, requires_grad=True)
        optimizer = torch.optim.AdamW([a, beta], lr=self.learned_lr, weight_decay=0.0)
        held_out, taster = run.data["validation"], Taster(run)
        history = []
        for epoch in range(self.learned_epochs):
            order = torch.randperm(len(held_out), generator=run.generator("learned soup", epoch)).tolist()
            total = 0.0
            for at in range(0, len(order), self.learned_batch):
                positions = [held_out.keep[j] for j in order[at : at + self.learned_batch]]
                units = float(held_out.task.units([held_out[p] for p in positions]))
                optimizer.zero_grad()
                for micro in micro_batches(held_out, positions, examples=None, budget=TOKENS_CPU):
                    w = a.softmax(-1)
                    soup = {f"model.{n}": torch.einsum("k,k...->...", w[rows[n]].to(t.dtype), t).to(dtypes[n]) for n, t in stacked.items()}
                    loss = torch.func.functional_call(taster, soup, (run.move(held_out.batch(micro)), beta)) / units
                    loss.backward(inputs=[a, beta])  # type: ignore[no-untyped-call]
                    total += float(loss.detach()) * units
                optimizer.step()
                run.count("mixing updates")
            history.append(total / float(held_out.task.units([held_out[p] for p in held_out.keep])))
        w = a.detach().softmax(-1).double().cpu()
        self.cook(run, shelf, list(members), lambda name: w[rows.get(name, 0)].tolist())
        return {"weights": w.tolist() if len(w) > 1 else w[0].tolist(), "beta": float(beta.detach()), "held-out loss": history}


class Taster(nn.Module):
    """The loss of a micro-batch, summed over its units, with the logits multiplied by beta."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.model = run.model
        self.task = run.task

    def forward(self, batch: dict[str, Any], beta: Tensor) -> Tensor:
        outputs: Any = self.task.outputs(self.model, batch)
        if isinstance(getattr(outputs, "logits", None), Tensor):
            outputs.logits = beta * outputs.logits
        elif hasattr(outputs, "scale"):
            inner = outputs.scale
            outputs.scale = lambda logits: beta * (inner(logits) if inner else logits)
        else:
            raise UserError(f"a learned soup scales logits, and a model of the domain {self.task.domain} has none; use recipe=greedy")
        total: Tensor = self.task.losses(outputs, batch).sum()
        return total


def sign(run: Run) -> int:
    return 1 if run.task.higher_is_better else -1


def target(run: Run, metrics: dict[str, float]) -> float:
    """The target metric, turned so that higher is better."""
    return sign(run) * metrics[run.task.target]


def between_logs(bounds: list[float], u: float) -> float:
    """The point at u of a range on the scale of logarithms; a range of one value is that value."""
    low, high = bounds[0], bounds[-1]
    return low if low == high else math.exp(math.log(low) + u * math.log(high / low))
