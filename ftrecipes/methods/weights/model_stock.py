"""Model Stock: All we need is just a few fine-tuned models (arXiv 2403.19522).

Models tuned from one start with different seeds lie, layer by layer, on a thin shell round a centre that does best. With
the pretrained weights w_0 as anchor, the angle between two of them tells how far along the line from the anchor to their
average the point nearest to that centre lies. For every weight tensor (every row of it with `filter_wise`)

    d_i = w_i - w_0,   c = cos(d_1, d_2), for k > 2 the mean over pairs
    t = k c / (1 + (k - 1) c)
    w_H = t (1/k sum_i w_i) + (1 - t) w_0

`when: periodic`, the paper's main form: k copies train on the same data in different orders; after every period they are
all set to w_H and go on, each with the optimizer it has, and w_0 stays the pretrained weight. `post` merges once, at the
end, and works under adapters too. Two tunings at right angles or beyond (c <= 0) share nothing, and w_0 stays (t = 0).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ftrecipes.errors import RunFailed, UserError
from ftrecipes.methods.adapters.delta import Delta
from ftrecipes.methods.weights.arithmetic import Merging, Shelf, average, fill, movable, task_vector
from ftrecipes.storage import read_state, save_state

if TYPE_CHECKING:
    from ftrecipes.run import Run


def stock(anchor: Tensor, tuned: list[Tensor], filter_wise: bool = False) -> tuple[Tensor, Tensor]:
    """w_H of a weight, in the dtype of the anchor, and t: a number, or one a row."""
    if not anchor.is_floating_point():
        return tuned[0], torch.ones(())
    rows = len(anchor) if filter_wise and anchor.dim() > 1 else 1
    deltas = [task_vector(anchor, w).double().reshape(rows, -1) for w in tuned]
    lengths = [d.norm(dim=1) for d in deltas]
    cosines = []
    for i, j in combinations(range(len(deltas)), 2):
        product = lengths[i] * lengths[j]
        cosines.append(torch.where(product > 0, (deltas[i] * deltas[j]).sum(1) / product, 0.0))
    k, c = len(tuned), torch.stack(cosines).mean(0).clamp(0, 1)
    c = torch.where(c > 1 - 1e-12, 1.0, c)  # equal tunings, up to rounding
    t = k * c / (1 + (k - 1) * c)
    centre = anchor.double().reshape(rows, -1) + t[:, None] * (sum(deltas) / k)
    # t = 1 is the average itself, t = 0 the anchor, without rounding
    mean = average(tuned).reshape(rows, -1)
    w = torch.where(t[:, None] == 1, mean, torch.where(t[:, None] == 0, anchor.reshape(rows, -1), centre.to(anchor.dtype)))
    return w.reshape(anchor.shape), t


class ModelStock(Merging):
    """Merges k tunings by the angle between them, during training or after it."""

    when: str
    period: int | None
    filter_wise: bool

    def drive(self, run: Run, fit: Callable[..., Any]) -> None:
        if self.runs or self.when == "post":
            super().drive(run, fit)
        else:
            self.periodic(run, fit)

    def combine(self, run: Run, shelf: Shelf) -> dict[str, Any]:
        said = self.place(run, shelf)
        return {**said, "validation": run.evaluate("validation")}

    def place(self, run: Run, shelf: Shelf) -> dict[str, Any]:
        """Put w_H into the model; returns the mean of t by weight."""
        ratios: dict[str, float] = {}

        def value(name: str) -> Tensor:
            w, t = stock(shelf.base(name), [shelf.get(i, name) for i in range(len(self.reports))], self.filter_wise)
            ratios[name] = round(float(t.mean()), 6)
            return w

        fill(run, shelf.names(*range(len(self.reports))), value)
        return {"t": ratios}

    # -- merging during training ----------------------------------------------------------------------------------

    def periodic(self, run: Run, fit: Callable[..., Any]) -> None:
        if any(isinstance(module, Delta) for module in run.model.modules()):
            raise UserError(
                f"{self.key} merges weights while they train, and a delta cannot take them over; use method.{self.key}.when=post"
            )
        each = run.planned_steps // self.k
        if each < 1:
            raise RunFailed(f"{self.key}: trainer.max_steps={run.planned_steps} is shared by k={self.k} copies, and each needs an update")
        period = self.period or math.ceil(len(run.data["train"]) / run.settings.trainer.batch)
        shelf = self.files = self.shelf(run)
        begins = list(range(0, each, period))
        for number, begin in enumerate(begins):
            self.now, self.reports = number, []
            for copy in range(self.k):
                self.copy = copy
                self.stretch(run, fit, shelf, begin, min(period, each - begin), each)
            said = run.once(f"{self.key}:merge-{self.now}", lambda: self.together(run, shelf))
        run.results[self.key] = {"merges": len(begins), **said}
        if not self.keep_ingredients:
            shelf.remove()

    def stretch(self, run: Run, fit: Callable[..., Any], shelf: Shelf, begin: int, steps: int, each: int) -> None:
        """One period of one copy, from the last merge."""
        name, last = f"period-{self.now}-copy-{self.copy}", f"merge-{self.now - 1}"
        if self.now and not run.begun(name):
            fill(run, shelf.names(last), lambda weight: shelf.get(last, weight))
        fit(steps, name=name, within=(begin, each))
        self.reports.append(run.once(f"{self.key}:{name}", lambda: self.keep(run, shelf, self.copy)))

    def together(self, run: Run, shelf: Shelf) -> dict[str, Any]:
        """Merge the copies; what only the last period needed goes."""
        said = self.combine(run, shelf)
        shelf.put(f"merge-{self.now}", movable(run))
        shelf.drop(f"merge-{self.now - 1}", *(f"optimizer-{self.now - 1}-{copy}" for copy in range(self.k)))
        run.count("merges")
        return {"ingredients": self.reports, **said}

    def state(self, period: int) -> Path:
        """Where the optimizer of the copy that trains is kept at the end of a period."""
        return self.files.folder / f"optimizer-{period}-{self.copy}" / "state.pt"

    def begin(self, run: Run) -> None:
        if hasattr(self, "files") and run.fit_step == 0 and run.optimizer is not None and self.now:
            run.optimizer.load_state_dict(read_state(self.state(self.now - 1)))

    def updated(self, run: Run) -> None:
        if hasattr(self, "files") and run.fit_step == run.fit_steps and run.optimizer is not None:
            self.state(self.now).parent.mkdir(parents=True, exist_ok=True)
            save_state(self.state(self.now), run.optimizer.state_dict())
