"""Editing Models with Task Arithmetic (arXiv 2212.04089).

A task vector tau_i = theta_i - theta_0 is what fine-tuning on a task changed. Added up and scaled they give one model of
all the tasks; taken away they make it forget one:

    theta = theta_0 + lambda sum_i s_i tau_i,     s_i = +1 or -1

lambda is the one of `scale` that is best on validation data, by the mean over tasks of the metric's share of the task's
own model. By itself the method makes its tasks by a field of the examples (`by`): k groups of its values, one model each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ftrecipes.data.base import Dataset
from ftrecipes.errors import UserError
from ftrecipes.methods.weights.arithmetic import Shelf, TaskMerging, fill, moved, task_vector

if TYPE_CHECKING:
    from ftrecipes.run import Run


class TaskArithmetic(TaskMerging):
    """theta_0 plus scaled task vectors."""

    by: str
    scale: list[float]
    signs: list[int]
    least = 1

    def refuse(self, run: Run) -> None:
        super().refuse(run)
        n = len(self.runs) or self.k
        if self.signs and len(self.signs) != n:
            raise UserError(f"method.{self.key}.signs={self.signs}: {n} models need {n} signs")
        if -1 in self.signs and len(self.scale) > 1:
            raise UserError(f"method.{self.key}: with a task taken away, give one method.{self.key}.scale")

    def vary(self, run: Run, i: int) -> dict[str, Any]:
        return {split: self.groups(run, split)[i] for split in ("train", "validation")}

    def groups(self, run: Run, split: str) -> list[list[int]]:
        """The examples of each task, by position: the field's values in order, dealt out to k tasks."""
        train, dataset = run.data["train"], run.data[split]
        values = [train.raw[i].get(self.by) for i in train.keep]
        kinds = sorted({value for value in values if value is not None}, key=str)
        if len(kinds) < self.k:
            have = ", ".join(sorted(map(str, train.raw[train.keep[0]])))
            raise UserError(
                f"method.{self.key}: k={self.k} tasks by the field '{self.by}', which has {len(kinds)} values; examples have {have}"
            )
        task = {kind: place % self.k for place, kind in enumerate(kinds)}
        out: list[list[int]] = [[] for _ in range(self.k)]
        for i in dataset.keep:
            if (kind := dataset.raw[i].get(self.by)) in task:
                out[task[kind]].append(i)
        return out

    def keep(self, run: Run, shelf: Shelf, index: object) -> dict[str, Any]:
        return {
            **super().keep(run, shelf, index),
            "values": sorted({str(run.data["train"].raw[i][self.by]) for i in run.data["train"].keep}),
        }

    def combine(self, run: Run, shelf: Shelf) -> dict[str, Any]:
        n, names = len(self.reports), shelf.names()
        signs = self.signs or [1] * n
        if not self.runs:
            self.tasks = [task for i in range(n) if len((task := self.task(run, i))[0])]

        def tau(name: str) -> Tensor:
            total = signs[0] * task_vector(shelf.base(name), shelf.get(0, name))
            for i in range(1, n):
                total += signs[i] * task_vector(shelf.base(name), shelf.get(i, name))
            return total

        def put(scale: float) -> None:
            fill(run, names, lambda name: moved(shelf.base(name), tau(name), scale))

        curve = []
        for scale in self.scale:
            put(scale)
            curve.append({"scale": scale, **(self.judged(run) if self.tasks else {})})
        best = max(curve, key=lambda point: point.get("normalised", 0.0))
        put(best["scale"])
        return {"scale": best["scale"], "curve": curve}

    def task(self, run: Run, i: int) -> tuple[Dataset, float]:
        """Validation data of a task that was made here, and what its own model has on it."""
        whole = run.data["validation"]
        part = Dataset("validation", whole.raw, run.task)
        part.keep = self.groups(run, "validation")[i]
        return part, self.reports[i]["validation"].get(run.task.target, 0.0)
