"""OASIS: Doubly Adaptive Scaled Algorithm for Machine Learning Using Second-Order Information (arXiv 2109.05198).

No learning rate to tune: gradients are divided by a running estimate of the Hessian's diagonal, and the step size
follows from how much the gradient changed, measured in the norm which that diagonal defines. With all that trains as
one vector w in R^d, z in {-1, +1}^d drawn anew at every update, and D, Dhat diagonal:

    D_k = beta2 D_(k-1) + (1 - beta2) z * (H(w_k) z),   Dhat_k = max(|D_k|, alpha),   D_0 = mean of `warm_start` draws
    eta_k = min( sqrt(1 + theta_(k-1)) eta_(k-1),  |w_k - w_(k-1)|_Dhat / (2 |g(w_k) - g(w_(k-1))|_(1/Dhat)) )
    w_(k+1) = w_k - eta_k g(w_k) / Dhat_k,   theta_k = eta_k / eta_(k-1),   theta_0 = infinity,   eta_0 given

|x|_A^2 = sum of A x^2. Both gradients and the product with the Hessian are taken on the window of update k, with the
same dropout draws. The average is signed: its absolute value is taken after averaging. `adaptive_lr: false` takes
eta_k from the schedule instead, which the paper does for deep networks, and saves the gradient at w_(k-1).

An update costs two gradients and a Hessian product of about two more, two copies of what trains, and the memory of a
graph that is differentiated twice. Attention therefore runs without its fused kernels.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ftrecipes.errors import UserError
from ftrecipes.method import Method
from ftrecipes.rng import generator

if TYPE_CHECKING:
    from ftrecipes.run import Run
    from ftrecipes.update import Window


class OASIS(Method):
    """Diagonal second-order steps of a size found by themselves."""

    eta0: float
    beta2: float
    alpha: float
    warm_start: int
    adaptive_lr: bool
    momentum: float

    def prepare(self, run: Run) -> None:
        settings = run.settings
        if settings.model.get("attention") == "flash_attention_2":
            raise UserError("oasis differentiates twice, which model.attention=flash_attention_2 cannot; take sdpa or eager")
        if run.precision == "16-mixed":
            raise UserError(
                "oasis measures sizes of gradients and curvature, which float16 does not hold; take hardware.precision=32 or bf16-mixed"
            )
        for word in settings.overrides:
            path = word.lstrip("+").partition("=")[0]
            if self.adaptive_lr and (path == "optimizer.lr" or path.split(".")[0] == "schedule"):
                raise UserError(
                    f"oasis finds the step size itself, so {path} would be ignored; leave it out, or set method.oasis.adaptive_lr=false"
                )

    def optimizer(self, run: Run, groups: list[dict[str, Any]]) -> Diagonal:
        return Diagonal(groups, beta2=self.beta2, alpha=self.alpha, eta0=self.eta0, adaptive=self.adaptive_lr, momentum=self.momentum)

    def step(self, run: Run, window: Window) -> None:
        optimizer = run.optimizer
        assert isinstance(optimizer, Diagonal)
        active: list[Tensor] = list(run.active().values())
        before: list[Tensor | None] = []
        if self.adaptive_lr and optimizer.steps:
            optimizer.exchange(active)
            run.gradients(window, report=False)
            before = [p.grad for p in active]
            optimizer.exchange(active)
        for draw in range(1 if optimizer.steps else self.warm_start):
            z = self.draw(run, active, draw)
            loss, product = run.hessian_product(window, z, report=draw == 0)
            optimizer.curve(active, z, product, draw)
            run.count("hessian_products")
        run.log("loss", loss)
        optimizer.measure(active, before)
        if self.adaptive_lr:
            run.log("lr", optimizer.eta)
        run.log("oasis/theta", optimizer.theta)
        run.stack.gradients(run, window)
        run.update.apply(loss)

    def draw(self, run: Run, like: list[Tensor], number: int) -> list[Tensor]:
        """z of this update: signs, the same on every rank."""
        rng = generator(run.seed, "oasis", run.fit_index, run.step, number, device=like[0].device)
        return [torch.randint(0, 2, p.shape, generator=rng, device=p.device).to(p.dtype).mul_(2).sub_(1) for p in like]

    def holds(self, run: Run) -> dict[str, int]:
        trained = sum(p.numel() * p.element_size() for p in run.active().values())
        return {"optimizer": (1 + self.adaptive_lr + (self.momentum > 0)) * trained, "copies": (2 + self.adaptive_lr) * trained}


class Diagonal(torch.optim.Optimizer):
    """The optimizer of OASIS. State of a parameter: D, `previous` (w_(k-1)), and m with momentum; eta and theta are common.

    An update is `curve` with the Hessian product, `measure` with the gradients at w_(k-1), then `step`.
    """

    def __init__(self, groups: list[dict[str, Any]], *, beta2: float, alpha: float, eta0: float, adaptive: bool, momentum: float) -> None:
        super().__init__(groups, {})
        self.beta2, self.alpha, self.adaptive, self.momentum = beta2, alpha, adaptive, momentum
        self.param_groups[0] |= {"eta": eta0, "theta": math.inf, "steps": 0}  # saved with the groups

    @property
    def eta(self) -> float:
        return float(self.param_groups[0]["eta"])

    @property
    def theta(self) -> float:
        return float(self.param_groups[0]["theta"])

    @property
    def steps(self) -> int:
        return int(self.param_groups[0]["steps"])

    def exchange(self, params: list[Tensor]) -> None:
        """Swap the weights with those before the last update; nothing is copied."""
        for parameter in params:
            if "previous" in (state := self.state[parameter]):
                parameter.data, state["previous"] = state["previous"], parameter.data

    @torch.no_grad()
    def curve(self, params: list[Tensor], z: list[Tensor], product: list[Tensor], draw: int) -> None:
        """Take z * Hz into D: a decaying average, or, of what has no D yet and at the first update, a plain mean over draws."""
        found = torch._foreach_mul(z, product)
        share = 1 - self.beta2 if self.steps else 1 / (draw + 1)
        for parameter, diagonal in zip(params, found, strict=True):
            self.state[parameter].setdefault("D", diagonal)
        torch._foreach_lerp_([self.state[p]["D"] for p in params], list(found), share)

    def dhat(self, params: list[Tensor]) -> list[Tensor]:
        """max(|D|, alpha)."""
        out = torch._foreach_abs([self.state[p]["D"] for p in params])
        torch._foreach_clamp_min_(out, self.alpha)
        return list(out)

    @torch.no_grad()
    def measure(self, params: list[Tensor], before: list[Tensor | None]) -> None:
        """Find eta and theta from the gradients now (`.grad`) and at the weights before the last update."""
        if not self.steps or not self.adaptive:
            return
        known = [
            (p, g) for p, g in zip(params, before, strict=True) if g is not None and p.grad is not None and "previous" in self.state[p]
        ]
        both = [p for p, _ in known]
        moved = torch._foreach_sub(both, [self.state[p]["previous"] for p in both])
        changed = torch._foreach_sub([p.grad for p in both if p.grad is not None], [g for _, g in known])
        root = torch._foreach_sqrt(self.dhat(both))
        torch._foreach_mul_(moved, root)
        torch._foreach_div_(changed, root)
        above, below = (float(torch.stack(torch._foreach_norm(x)).double().norm()) for x in (moved, changed))
        first = self.eta * math.sqrt(1 + self.theta)
        eta = min(first, above / (2 * below)) if below else first
        eta = self.eta if math.isinf(eta) else eta
        self.param_groups[0] |= {"theta": eta / self.eta, "eta": eta}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            eta = self.eta if self.adaptive else group["lr"]
            directions: list[Tensor] = [p.grad for p in params]
            if self.momentum:
                for parameter in params:
                    self.state[parameter].setdefault("m", torch.zeros_like(parameter))
                m = [self.state[p]["m"] for p in params]
                torch._foreach_lerp_(m, directions, 1 - self.momentum)
                directions = m
            if self.adaptive:
                for parameter in params:
                    self.state[parameter].setdefault("previous", torch.empty_like(parameter))
                torch._foreach_copy_([self.state[p]["previous"] for p in params], params)
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1 - eta * group["weight_decay"])
            torch._foreach_addcdiv_(params, directions, self.dhat(params), value=-eta)
        self.param_groups[0]["steps"] += 1
