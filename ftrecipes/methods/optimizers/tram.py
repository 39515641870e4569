"""TRAM: Bridging Trust Regions and Sharpness Aware Minimization (arXiv 2310.03646).

SAM with a radius that the model sets itself: at every update it is the distance d between what the model predicts and
what a target predicts. Where a small change moves the predictions far, the neighbourhood that must be flat is large.

    d = logit_scale * mean over units of KL(q || p),   p = softmax f_theta(x), no gradient through d
    eps = d T^2 g / (||T g|| + 1e-12),  T = |theta| if `adaptive` else 1;   theta <- optimizer(theta, grad L(theta + eps))

`variant` says whose predictions q are: `x`, those of theta on noised inputs (embeddings (batch, positions, width), or
pixels); `theta_prev`, of the weights one update ago; `theta_0`, of the start; `ema`, of an average of past weights. The
copy that the last three need holds what trains, and takes in the weights from before each update: with those from
after it, d would be zero for ever. A step costs two gradients, one forward pass, and one or two copies of what trains.

The released optimizer lost the gradient when it was rewritten with foreach kernels: it climbs along T^2 alone, which is
not uphill and not the paper's formula (`direction: released`). The released mean of the KL runs over the entries of
the vocabulary too and is divided by the batch size again; `logit_scale` expresses that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftrecipes.errors import UserError
from ftrecipes.methods.optimizers.sharpness import SharpnessAware, frozen_statistics
from ftrecipes.methods.selection.sparse import write
from ftrecipes.rng import generator
from ftrecipes.tasks.causal_lm import CHUNK, TokenOutputs, vocabulary
from ftrecipes.update import wide

if TYPE_CHECKING:
    from ftrecipes.run import Run
    from ftrecipes.tasks.base import Batch, Outputs
    from ftrecipes.update import Window


class TRAM(SharpnessAware):
    """Sharpness-aware steps whose radius is a distance between predictions."""

    variant: str
    sigma: float
    noise: str
    kl_type: str
    logit_scale: float
    decay: float
    direction: str

    def prepare(self, run: Run) -> None:
        self.copy: dict[str, Tensor] = {}
        self.measuring = False
        if self.variant == "x" and not hasattr(run.model, "get_input_embeddings"):
            raise UserError(
                f"tram.variant=x adds noise to embeddings, which {run.settings.model.name} has not; take theta_prev, theta_0 or ema"
            )

    def step(self, run: Run, window: Window) -> None:
        if self.variant != "x":
            here = run.trainable().items()
            self.copy = {name: self.copy[name].to(p.device) if name in self.copy else p.detach().clone() for name, p in here}
        self.total, self.micro, self.measuring = torch.zeros((), device=run.device), 0, True
        super().step(run, window)

    def penalty(self, run: Run, batch: Batch, outputs: Outputs) -> Tensor:
        """Measures the distance beside the first pass, whose predictions are at hand; nothing is added to the loss."""
        if self.measuring:
            with torch.no_grad():
                self.total += self.distance(run, batch, outputs)
            self.micro += 1
        return torch.zeros((), device=run.device)

    def radius(self, run: Run, window: Window) -> Tensor:
        self.measuring = False
        run.update.world.sum([self.total])
        d = (self.logit_scale * self.total / window.units).clamp_min(0)  # rounding can make a KL of nothing negative
        run.log("tram/d", d)
        return d

    @torch.no_grad()
    def returned(self, run: Run) -> None:
        if self.variant in ("theta_prev", "ema"):
            decay = self.decay if self.variant == "ema" else 0.0
            torch._foreach_lerp_(list(self.copy.values()), list(run.trainable().values()), 1 - decay)

    # -- the distance ---------------------------------------------------------------------------------------------

    def distance(self, run: Run, batch: Batch, p: Outputs) -> Tensor:
        """KL between the target's predictions and `p`, summed over the counted units of a micro-batch."""
        with frozen_statistics(run.model), self.elsewhere(run):
            q = run.task.outputs(run.model, self.noised(run, batch))
        if not isinstance(p, TokenOutputs) or not isinstance(q, TokenOutputs):
            return self.kl(q.logits, p.logits)  # type: ignore[attr-defined]
        total = torch.zeros((), device=run.device)
        rows = max(1, CHUNK // vocabulary(p.head))
        for of_p, of_q in zip(p.hidden.split(rows), q.hidden.split(rows), strict=True):
            with self.elsewhere(run):
                target = q.logits(of_q)
            total += self.kl(target, p.logits(of_p))
        return total

    def kl(self, target: Tensor, logits: Tensor) -> Tensor:
        """Summed over rows of logits (n, classes); `forward` is KL(target || model)."""
        q, p = (F.log_softmax(wide(x), -1) for x in (target, logits))
        forward = F.kl_div(p, q, log_target=True, reduction="sum") if self.kl_type != "reverse" else 0.0
        reverse = F.kl_div(q, p, log_target=True, reduction="sum") if self.kl_type != "forward" else 0.0
        return forward + reverse  # type: ignore[return-value]

    def noised(self, run: Run, batch: Batch) -> Batch:
        """The batch with noise on its pixels, where it has any."""
        if self.variant != "x" or "pixels" not in batch:
            return batch
        return {**batch, "pixels": batch["pixels"] + self.draw(run, batch["pixels"])}

    def draw(self, run: Run, like: Tensor) -> Tensor:
        """Noise of this update and micro-batch, the same whenever it is drawn."""
        rng = generator(run.seed, "tram", run.fit_index, run.step, self.micro, run.update.world.rank, device=like.device)
        if self.noise == "uniform":
            return (2 * torch.rand(like.shape, generator=rng, device=like.device, dtype=like.dtype) - 1) * self.sigma
        return torch.randn(like.shape, generator=rng, device=like.device, dtype=like.dtype) * self.sigma

    @contextmanager
    def elsewhere(self, run: Run) -> Iterator[None]:
        """The model as the target: with noise on its embeddings, or in eval mode with the copy's weights."""
        if self.variant == "x":
            embed = run.model.get_input_embeddings()  # type: ignore[operator]
            text = isinstance(embed, nn.Embedding)
            hook = embed.register_forward_hook(lambda module, inputs, output: output + self.draw(run, output)) if text else None
            try:
                yield
            finally:
                if hook:
                    hook.remove()
            return
        training = run.model.training
        run.model.eval()
        self.exchange(run)
        try:
            yield
        finally:
            self.exchange(run)
            run.model.train(training)

    def exchange(self, run: Run) -> None:
        """Swap the storage of what trains with the copy's: nothing is copied, and the first pass's graph stays valid."""
        for name, parameter in run.trainable().items():
            parameter.data, self.copy[name] = self.copy[name], parameter.data
        torch.clear_autocast_cache()  # it knows a weight's 16-bit twin by the parameter, not by what it holds
        for module in run.model.modules():  # chosen entries stand in a dense weight that the backward pass reads
            if hasattr(module, "chosen"):
                write(module.weight, module.chosen.index, module.chosen.values)  # type: ignore[union-attr, arg-type]

    # -- the ascent -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def ascend(self, parameters: list[Tensor], radius: Tensor | float) -> None:
        if self.direction == "gradient":
            super().ascend(parameters, radius)
            return
        grads = [p.grad for p in parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(torch._foreach_mul(grads, parameters) if self.adaptive else grads)
        eps = torch._foreach_mul(parameters, parameters) if self.adaptive else [torch.ones_like(p) for p in parameters]
        torch._foreach_mul_(eps, radius / (norm + 1e-12))
        torch._foreach_add_(parameters, eps)

    def holds(self, run: Run) -> dict[str, int]:
        before = super().holds(run)["copies"]
        target = 0 if self.variant == "x" else sum(p.numel() * p.element_size() for p in run.trainable().values())
        return {"copies": before + target}

    # -- saving ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {"copy": self.copy}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.copy = dict(state["copy"])
