"""Adam in subspaces: the moments of chosen matrices are kept for a projection of their gradients.

A paper subclasses `ProjectedMethod`, which picks the matrices by role and builds the optimizer, and, where it changes
more than the settings, `ProjectedAdamW`:

    transform(group, params, R)            what Adam is given instead of the projected gradients
    refreshed(parameter, old, new)         a matrix has new bases

With G (m, n) the gradient of a weight, bases P (m, r) and Q (n, r) from the singular vectors of a gradient, and one
projection by `side`:

    left  R = P' G (r, n), back P u        right  R = G Q (m, r), back u Q'        both  R = P' G Q (r, r), back P u Q'

Bases are found anew every `gap` updates of a matrix. All other weights get AdamW with the same constants. Adam's eps is
added before the bias correction and decay follows the step, as in the optimizer that GaLore's authors started from.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ftrecipes.errors import UserError
from ftrecipes.method import Method, parts_of
from ftrecipes.update import wide

if TYPE_CHECKING:
    from ftrecipes.run import Run

SIDES = {
    "left": ("left", "left"),
    "right": ("right", "right"),
    "full": ("both", "both"),
    "std": ("right", "left"),
    "reverse_std": ("left", "right"),
}
"""Side of the projection by `proj_type`: of matrices with at least as many rows as columns, and of wider ones."""


def side_of(proj_type: str, shape: torch.Size) -> str:
    """`left`, `right` or `both`."""
    return SIDES[proj_type][0 if shape[0] >= shape[1] else 1]


class Bases:
    """The bases of one matrix, P (m, r) and Q (n, r); one of them may be missing."""

    def __init__(self, P: Tensor | None, Q: Tensor | None) -> None:
        self.P, self.Q = P, Q

    @classmethod
    def of(cls, grad: Tensor, rank: int, side: str) -> Bases:
        """Leading singular vectors, computed in at least float32, in the dtype of the gradient."""
        U, _, Vh = torch.linalg.svd(wide(grad), full_matrices=False)
        P = U[:, :rank].to(grad.dtype).clone() if side in ("left", "both") else None
        Q = Vh[:rank].T.to(grad.dtype).contiguous() if side in ("right", "both") else None
        return cls(P, Q)

    def down(self, grad: Tensor) -> Tensor:
        """R of a gradient."""
        grad = grad if self.P is None else self.P.T @ grad
        return grad if self.Q is None else grad @ self.Q

    def add(self, weight: Tensor, u: Tensor, size: float) -> None:
        """weight += size * (u projected back), without a matrix of its size in between."""
        if self.Q is None:
            assert self.P is not None
            weight.addmm_(self.P, u, alpha=size)
        else:
            weight.addmm_(u if self.P is None else self.P @ u, self.Q.T, alpha=size)


class ProjectedAdamW(torch.optim.Optimizer):
    """AdamW; in groups with `projected` the moments have the shape of R.

    count: called with the name of an event.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        rank: int,
        gap: int,
        scale: float,
        proj_type: str,
        betas: tuple[float, float],
        eps: float,
        count: Callable[[str], None] = lambda event: None,
    ) -> None:
        super().__init__(groups, {"betas": betas, "eps": eps, "projected": False})
        self.rank, self.gap, self.scale, self.proj_type, self.count = rank, gap, scale, proj_type, count

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for parameter in params:
                self.state[parameter].setdefault("step", 0)
            if group["projected"]:
                updates = self.moments(group, params, self.transform(group, params, [self.project(p) for p in params]))
                for parameter, update in zip(params, updates, strict=True):
                    self.bases(parameter).add(parameter, update, -self.size(group, parameter) * self.scale)
            else:
                updates = self.moments(group, params, [p.grad for p in params])
                torch._foreach_mul_(updates, [-self.size(group, p) for p in params])
                torch._foreach_add_(params, updates)
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])

    def project(self, parameter: Tensor) -> Tensor:
        """R of a parameter's gradient; its bases are found anew when they are due."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if state["step"] % self.gap == 0:
            old = self.bases(parameter) if state["step"] else None
            new = Bases.of(parameter.grad, self.rank, side_of(self.proj_type, parameter.shape))
            state |= {name: basis for name, basis in (("P", new.P), ("Q", new.Q)) if basis is not None}
            if old:
                self.refreshed(parameter, old, new)
            self.count("subspaces")
        return self.bases(parameter).down(parameter.grad)

    def bases(self, parameter: Tensor) -> Bases:
        state = self.state[parameter]
        return Bases(state.get("P"), state.get("Q"))

    def refreshed(self, parameter: Tensor, old: Bases, new: Bases) -> None:
        """A matrix has new bases; Adam's moments stay as they are."""

    def transform(self, group: dict[str, Any], params: list[Tensor], projected: list[Tensor]) -> list[Tensor]:
        """What takes the place of the projected gradients, of the same shapes."""
        return projected

    def moments(self, group: dict[str, Any], params: list[Tensor], grads: list[Any]) -> list[Tensor]:
        """Adam's directions m / (sqrt(v) + eps); counts the update."""
        (beta1, beta2), states = group["betas"], [self.state[p] for p in params]
        for state, grad in zip(states, grads, strict=True):
            if "exp_avg" not in state:
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(grad), torch.zeros_like(grad)
            state["step"] += 1
        m: list[Tensor] = [state["exp_avg"] for state in states]
        v: list[Tensor] = [state["exp_avg_sq"] for state in states]
        torch._foreach_mul_(m, beta1)
        torch._foreach_add_(m, grads, alpha=1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, grads, grads, value=1 - beta2)
        below = torch._foreach_sqrt(v)
        torch._foreach_add_(below, group["eps"])
        return list(torch._foreach_div(m, below))

    def size(self, group: dict[str, Any], parameter: Tensor) -> float:
        """lr sqrt(1 - beta2^t) / (1 - beta1^t)."""
        (beta1, beta2), t = group["betas"], self.state[parameter]["step"]
        return float(group["lr"] * math.sqrt(1 - beta2**t) / (1 - beta1**t))


class ProjectedMethod(Method):
    """Base of the methods that keep Adam's moments in subspaces. Its knobs are those below."""

    rank: int
    update_proj_gap: int
    scale: float
    proj_type: str
    betas: list[float]
    eps: float
    targets: list[str]
    blocks: Any

    def prepare(self, run: Run) -> None:
        self.parts = parts_of(run, self, self.targets, self.blocks)
        for part in self.parts:
            shape = tuple(part.weight.shape)
            if len(shape) != 2:
                raise UserError(
                    f"{self.key} acts on matrices, and {part.name} is {'x'.join(map(str, shape))}; narrow method.{self.key}.targets"
                )
            if self.rank > min(shape):
                raise UserError(
                    f"method.{self.key}.rank={self.rank}: {part.name} is {shape[0]}x{shape[1]}; lower the rank or narrow method.{self.key}.targets"
                )

    def optimizer(self, run: Run, groups: list[dict[str, Any]]) -> ProjectedAdamW:
        chosen = {id(part.weight) for part in self.parts}
        split: list[dict[str, Any]] = []
        for group in groups:
            for projected in (True, False):
                params = [p for p in group["params"] if (id(p) in chosen) == projected]
                if params:
                    split.append({**group, "params": params, "projected": projected})
        if not any(group["projected"] for group in split):
            raise UserError(f"{self.key}: none of the matrices that method.{self.key}.targets={self.targets} names is trained")
        return self.build(split, run)

    def build(self, groups: list[dict[str, Any]], run: Run) -> ProjectedAdamW:
        """The optimizer over groups of which some are `projected`."""
        return ProjectedAdamW(groups, count=run.count, **self.settings())

    def settings(self) -> dict[str, Any]:
        return {
            "rank": self.rank,
            "gap": self.update_proj_gap,
            "scale": self.scale,
            "proj_type": self.proj_type,
            "betas": tuple(self.betas),
            "eps": self.eps,
        }

    def numbers(self, shape: torch.Size) -> int:
        """Numbers that the optimizer remembers of a projected matrix."""
        m, n, r = *shape, self.rank
        return {"left": m * r + 2 * r * n, "right": n * r + 2 * m * r, "both": (m + n) * r + 2 * r * r}[side_of(self.proj_type, shape)]

    def holds(self, run: Run) -> dict[str, int]:
        chosen = {id(part.weight) for part in self.parts}
        active: list[nn.Parameter] = list(run.active().values())
        return {"optimizer": sum((self.numbers(p.shape) if id(p) in chosen else 2 * p.numel()) * p.element_size() for p in active)}
