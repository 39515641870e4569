"""DFT: On the Generalization of SFT: A Reinforcement Learning Perspective with Reward Rectification (arXiv 2508.05629).

The gradient of supervised fine-tuning is a policy gradient whose implicit reward is 1/p of the target token. Weighing
each token's cross-entropy with its own probability, held constant, cancels it:

    L = -(1/N) sum_t sg(p_t) log p_t,   N = counted tokens of the window

`weight_power` a takes p^a (0 is plain SFT, 1 the paper's). Validation reports plain cross-entropy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ftrecipes.method import Method
from ftrecipes.tasks.causal_lm import TokenOutputs

if TYPE_CHECKING:
    from ftrecipes.run import Run
    from ftrecipes.tasks.base import Batch, Outputs


class DFT(Method):
    """Tokens weighed with their own probability."""

    weight_power: float

    def weights(self, run: Run, batch: Batch, outputs: Outputs) -> Tensor:
        assert isinstance(outputs, TokenOutputs)
        p = outputs.logps.detach().exp()
        run.report("mean_p", p.sum())
        run.count("reweighted_batches")
        return p**self.weight_power
