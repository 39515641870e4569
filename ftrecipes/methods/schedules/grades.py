"""GradES: Significantly Faster Training in Transformers with Gradient-Based Early Stopping (arXiv 2509.01842).

Validation stops everything at once. GradES watches each projection matrix by itself and stops it for good once its
gradient has settled, while others go on; no validation is needed. For component i at update t of T,

    grad_change     G_i = sum |g_t - g_(t-1)|        grad   G_i = sum |g_t|        weight_change   G_i = sum |W_t - W_(t-1)|
    freeze i after update t if G_i < tau and t >= int(alpha T);   stop when a share `max_frozen_ratio` of them is frozen

g is the gradient of the whole window before clipping. A component is a matrix, or an adapter's numbers on one, as one
sum. A frozen one forms no weight gradient and gives up its optimizer state; gradients still flow through it. Embeddings,
norms and the head are not watched and train on. The paper's third version tracks changes of gradients, its first their
size, and the released package changes of weights; the newest is the default here.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ftrecipes.errors import UserError
from ftrecipes.method import parts_of
from ftrecipes.methods.schedules.activity import Activity

if TYPE_CHECKING:
    from ftrecipes.run import Run
    from ftrecipes.update import Window


class GradES(Activity):
    """Freezes matrices whose gradients have settled."""

    tau: float | str
    alpha: float
    monitor: str
    max_frozen_ratio: float
    compute_interval: int
    normalize: str
    targets: list[str]
    blocks: Any

    def prepare(self, run: Run) -> None:
        super().prepare(run)
        self.parts = [part.name for part in parts_of(run, self, self.targets, self.blocks)]
        self.frozen: dict[str, int] = {}
        self.last: dict[str, Tensor] = {}
        self.sizes: list[float] | None = None
        self.threshold, self.quantile = parse_tau(self.key, self.tau)

    def units(self, run: Run) -> list[list[str]]:
        owned = [[name for name in run.trainable() if name.startswith(f"{part}.")] for part in self.parts]
        self.names = [part for part, names in zip(self.parts, owned, strict=True) if names]
        if not self.names:
            raise UserError(f"{self.key}: nothing that trains lies in {self.key}.targets={self.targets}")
        return [names for names in owned if names]

    def begin(self, run: Run) -> None:
        if self.now is None:
            self.members(run)
            self.set(run, [unit for unit, name in enumerate(self.names) if name not in self.frozen])

    def due_at(self, t: int) -> bool:
        """Whether update t of the fit is measured."""
        return t % self.compute_interval == 0 or (self.quantile is not None and t == self.quantile[1])

    def gradients(self, run: Run, window: Window) -> None:
        if self.monitor == "weight_change":
            return
        t = run.fit_step + 1
        grads = {name: p.grad for name, p in self.watched(run).items() if p.grad is not None}
        if self.due_at(t):
            self.measure(run, grads)
        if self.monitor == "grad_change":
            self.last = {name: grad.clone() for name, grad in grads.items()} if self.due_at(t + 1) else {}

    @torch.no_grad()
    def updated(self, run: Run) -> None:
        t = run.fit_step
        if self.monitor == "weight_change":
            weights = {name: p.detach() for name, p in self.watched(run).items()}
            if self.due_at(t):
                self.measure(run, weights)
            self.last = {name: weight.clone() for name, weight in weights.items()} if self.due_at(t + 1) else {}
        sizes, self.sizes = self.sizes, None
        if sizes is not None:
            self.stop(run, t, sizes)

    def watched(self, run: Run) -> dict[str, Tensor]:
        """The trainable numbers of all components that are still active."""
        assert self.now is not None
        return {name: run.trainable()[name] for unit in self.now for name in self.members(run)[unit]}

    def measure(self, run: Run, values: dict[str, Tensor]) -> None:
        """G of every active component, read from the device at once."""
        assert self.now is not None
        if self.monitor != "grad":
            values = {name: value - self.last[name].to(value.device) for name, value in values.items() if name in self.last}
        if not values:
            return
        norms = dict(zip(values, torch._foreach_norm(list(values.values()), 1), strict=True))
        totals, scales = [], []
        for unit in self.now:
            names = [name for name in self.members(run)[unit] if name in norms]
            totals.append(torch.stack([norms[name].float() for name in names]).sum() if names else torch.tensor(float("inf")))
            scales.append(sum(values[name].numel() for name in names) if self.normalize == "mean" else 1)
        self.sizes = [size / max(scale, 1) for size, scale in zip(torch.stack(totals).tolist(), scales, strict=True)]

    def stop(self, run: Run, t: int, sizes: list[float]) -> None:
        """Freeze what has settled; end the fit when enough has."""
        assert self.now is not None
        if self.quantile and t == self.quantile[1]:
            self.threshold = float(torch.tensor(sizes).quantile(self.quantile[0]))
        done = []
        if self.threshold is not None and t >= int(self.alpha * run.fit_steps) and t % self.compute_interval == 0:
            done = [unit for unit, size in zip(self.now, sizes, strict=True) if size < self.threshold]
        if done:
            run.forget([p for unit in done for p in self.parameters(run, unit)])
            self.frozen |= {self.names[unit]: t for unit in done}
            for name in (name for unit in done for name in self.members(run)[unit]):
                self.last.pop(name, None)
            self.set(run, [unit for unit in self.now if unit not in done])
            run.count("frozen", len(done))
        share = len(self.frozen) / len(self.names)
        run.log("grades/frozen", share)
        if self.threshold is not None and share >= self.max_frozen_ratio and not run.stopping:
            run.stopping = "early"
            run.say(f"{self.key}: {len(self.frozen)} of {len(self.names)} components are frozen after update {run.step}; training ends")

    def state_dict(self) -> dict[str, Any]:
        return {"frozen": self.frozen, "last": self.last, "threshold": self.threshold}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.frozen, self.threshold = dict(state["frozen"]), state["threshold"]
        self.last = dict(state["last"])


def parse_tau(key: str, tau: float | str) -> tuple[float | None, tuple[float, int] | None]:
    """A threshold, or (quantile, update) that it will be taken from."""
    text = str(tau).removeprefix("+").replace(".inf", "inf")
    if found := re.fullmatch(r"q(0(?:\.\d+)?|1(?:\.0*)?)@([1-9]\d*)", text):
        return None, (float(found[1]), int(found[2]))
    try:
        return float(text), None
    except ValueError:
        raise UserError(f"{key}.tau={tau}: a number, or q<quantile>@<update> as in q0.5@20") from None
