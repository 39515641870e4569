"""LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model Merging (arXiv 2410.17146).

After training, the update tau = theta_ft - theta_0 of block l = 1 … L is scaled by a factor that grows with depth,

    lambda(l) = alpha + beta (l - 1) / (L - 1),     theta = theta_0 + lambda(l) tau(l)

Shallow blocks go back towards the general features of the pretrained model, deep ones keep the task. What lies outside
the blocks (embedding, final norm, head) gets alpha. Adapters stay adapters: the strength of each delta is scaled.

One task: beta = 1 - alpha, so the last block keeps its update; alpha is the point of a grid, from 1 down, that maximises
target_weight · target / target_ft + control / control_0 on validation data and on the retained set. Several tasks
(`runs:`, finished runs of one base): tau is the sum of their n task vectors, alpha = |sum_i tau_i|_1 / |tau|_1 / n = 1 / n,
and beta is tuned on the validation data of all of them. The weight of the target is that of the authors' README (2); the
selection helper in their repository has 5. A block's depth comes from the module tree; the released code looks for `.3.`
in names, which mistakes a layer inside a block for a block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ftrecipes.errors import UserError
from ftrecipes.methods.weights.arithmetic import Shelf, TaskMerging, fill, moved, share, task_vector
from ftrecipes.methods.weights.interpolation import Line

if TYPE_CHECKING:
    from ftrecipes.run import Run


def scaling(run: Run, alpha: float, beta: float) -> Callable[[str], float]:
    """lambda of a weight by its name; depth is counted within each stack of blocks (an encoder's, a decoder's)."""
    blocks = [name for name, _ in run.anatomy.blocks]
    lengths = Counter(name.rpartition(".")[0] for name in blocks)

    def factor(weight: str) -> float:
        for block in blocks:
            if weight.startswith(f"{block}."):
                stack, _, depth = block.rpartition(".")
                last = lengths[stack] - 1
                return alpha + beta * (int(depth) / last) if last else alpha
        return alpha

    return factor


class LiNeS(TaskMerging):
    """Scales the update of each block by its depth."""

    alpha: float | None
    beta: float | None
    alpha_grid: list[float]
    beta_grid: list[float]
    target_weight: float
    k = 0

    def drive(self, run: Run, fit: Callable[..., Any]) -> None:
        if not run.anatomy.blocks:
            raise UserError(f"{self.key}: {run.settings.model.name} has no blocks to scale by depth")
        if self.runs:
            super().drive(run, fit)
        else:
            fit()

    # -- one task -------------------------------------------------------------------------------------------------

    def finish(self, run: Run) -> None:
        if self.runs:
            return
        line = Line(run)
        curve = [self.point(run, line, alpha) for alpha in ([self.alpha] if self.alpha is not None else self.searched(run))]
        best = curve[0]
        if self.alpha is None:
            line.at(1.0)
            target = run.evaluate("validation")[run.task.target]
            line.at(0.0)
            control = run.evaluate("retain")
            best = max(curve, key=lambda point: self.trade(run, point, target, control))  # of equals the largest alpha
        self.point(run, line, best["alpha"], measure=False)
        factor = scaling(run, best["alpha"], best["beta"])
        run.results[self.key] = {
            "alpha": best["alpha"], "beta": best["beta"], "curve": curve,
            "lambda": {name: factor(f"{name}.") for name, _ in run.anatomy.blocks} | {"outside the blocks": factor("")},
        }  # fmt: skip

    def searched(self, run: Run) -> list[float]:
        if not len(run.data["retain"]):
            raise UserError(
                f"{self.key}: data {run.settings.data.name} has no retained set to weigh the target against; give method.{self.key}.alpha"
            )
        return sorted(self.alpha_grid, reverse=True)

    def point(self, run: Run, line: Line, alpha: float, measure: bool = True) -> dict[str, Any]:
        """Put the model at alpha; its metrics."""
        beta = 1 - alpha if self.beta is None else self.beta
        line.at(scaling(run, alpha, beta))
        run.count("scalings")
        if not measure:
            return {}
        metrics = {f"{split}/{name}": v for split in ("validation", "retain") for name, v in run.evaluate(split).items()}
        return {"alpha": alpha, "beta": beta, **metrics}

    def trade(self, run: Run, point: dict[str, Any], target: float, control: dict[str, float]) -> float:
        """target_weight · target / target_ft + control / control_0, each a share of what there was."""
        name = run.task.forgetting[0]
        now, was = point[f"retain/{name}"], control[name]
        if name in ("nll", "loss", "mse"):  # lower is better
            now, was = was, now
        return self.target_weight * share(run, point[f"validation/{run.task.target}"], target) + (now / was if was else float(now == was))

    # -- several tasks --------------------------------------------------------------------------------------------

    def combine(self, run: Run, shelf: Shelf) -> dict[str, Any]:
        n, names = len(self.reports), shelf.names()
        alpha = 1 / n if self.alpha is None else self.alpha

        def tau(name: str) -> Tensor:
            total = task_vector(shelf.base(name), shelf.get(0, name))
            for i in range(1, n):
                total += task_vector(shelf.base(name), shelf.get(i, name))
            return total

        def put(beta: float) -> None:
            factor = scaling(run, alpha, beta)
            fill(run, names, lambda name: moved(shelf.base(name), tau(name), factor(name)))
            run.count("scalings")

        curve = []
        for beta in self.beta_grid if self.beta is None and self.tasks else [1 - alpha if self.beta is None else self.beta]:
            put(beta)
            curve.append({"beta": beta, **(self.judged(run) if self.tasks else {})})
        best = max(curve, key=lambda point: point.get("normalised", 0.0))
        put(best["beta"])
        return {"alpha": alpha, "beta": best["beta"], "curve": curve}
