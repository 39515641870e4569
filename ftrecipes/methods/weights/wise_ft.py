"""WiSE-FT: Robust fine-tuning of zero-shot models (arXiv 2109.01903).

Fine-tune as usual from theta_0, then take the straight line between the two weight vectors,

    theta = (1 - alpha) theta_0 + alpha theta_1

Points inside the line keep the target accuracy and win back what fine-tuning lost elsewhere, at no cost in training or
inference. Every alpha of the list is evaluated on validation data and on the retained domain; among several, the one
that is best on validation data of the target is kept (nearer to 0.5 in a tie), never the one that is best elsewhere.
Under an adapter theta_1 - theta_0 is the merged delta, so its strength is what alpha scales.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ftrecipes.method import Method
from ftrecipes.methods.weights.interpolation import Line, measure_norms

if TYPE_CHECKING:
    from ftrecipes.run import Run


class WiSEFT(Method):
    """Interpolates between the start and the tuned weights."""

    alpha: list[float]
    recalibrate: int

    def finish(self, run: Run) -> None:
        line = Line(run)
        curve = []
        for alpha in self.alpha:
            self.move(run, line, alpha)
            point: dict[str, Any] = {"alpha": alpha}
            for split in ("validation", "retain"):
                point |= {f"{split}/{name}": value for name, value in run.evaluate(split).items()}
            curve.append(point)
            run.count("points")
        run.results["wise_ft"] = curve
        best = self.alpha[0]
        if len(self.alpha) > 1:
            sign = 1 if run.task.higher_is_better else -1
            score = {p["alpha"]: sign * p.get(f"validation/{run.task.target}", 0.0) for p in curve}
            best = max(self.alpha, key=lambda a: (score[a], -abs(a - 0.5)))
        self.move(run, line, best)
        run.results["wise_ft_alpha"] = best

    def move(self, run: Run, line: Line, alpha: float) -> None:
        """Put the model at alpha; BatchNorm statistics, which do not mix, are measured again when asked for."""
        line.at(alpha)
        measure_norms(run, self.recalibrate)
