"""GaLore: Adam's moments of a matrix live in a few singular directions of its gradient."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tools import SMALL, build, check_resume, weights
from torch import Tensor

from ftrecipes.compose import compose
from ftrecipes.errors import UserError
from ftrecipes.plan import plan
from ftrecipes.run import Run

MUTATION = (
    "ftrecipes/methods/optimizers/projected.py",
    "-self.size(group, parameter) * self.scale)",
    "-self.size(group, parameter))",
)

PLAIN = ("schedule=constant", "schedule.warmup=0", "trainer.clip=.inf")
TWO = ("model=toy", "model.kind=two_layer", "model.bias=true", "model.dtype=float64", "data.noise=0.3", *PLAIN)
ALL = "method.galore.targets=[all-linear,head]"  # the toy's matrices, 32x16 and 16x32


def ready(*words: str) -> Run:
    run = build(*words)
    run.fit_steps, run.optimizer = 10**6, run.build_optimizer()
    return run


def state(run: Run, name: str) -> dict[str, Any]:
    return run.optimizer.state[run.model.get_parameter(name)]


class Published:
    """The authors' optimizer written from its formulas, for one matrix or vector at a time."""

    def __init__(self, weight: Tensor, *, rank: int = 0, gap: int, scale: float, proj_type: str, lr: float, decay: float) -> None:
        self.weight, self.rank, self.gap, self.scale, self.proj_type, self.lr, self.decay = weight, rank, gap, scale, proj_type, lr, decay
        self.m: Any = 0.0
        self.v: Any = 0.0
        self.t = 0

    def step(self, grad: Tensor) -> None:
        if self.rank and self.t % self.gap == 0:
            U, _, Vh = torch.linalg.svd(grad, full_matrices=False)
            tall = grad.shape[0] >= grad.shape[1]
            right = (
                self.proj_type in ("right", "full") or (self.proj_type == "std" and tall) or (self.proj_type == "reverse_std" and not tall)
            )
            left = self.proj_type in ("left", "full") or (not right)
            self.A = U[:, : self.rank] if left else torch.eye(grad.shape[0], dtype=grad.dtype)
            self.B = Vh[: self.rank, :] if right else torch.eye(grad.shape[1], dtype=grad.dtype)
        low = self.A.t() @ grad @ self.B.t() if self.rank else grad
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * low
        self.v = 0.999 * self.v + 0.001 * low**2
        update = self.m / (self.v.sqrt() + 1e-6)
        if self.rank:
            update = self.A @ update @ self.B * self.scale
        self.weight -= self.lr * math.sqrt(1 - 0.999**self.t) / (1 - 0.9**self.t) * update
        self.weight -= self.lr * self.decay * self.weight


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right", "full"])
def test_agreement_with_the_published_algorithm(proj_type: str) -> None:
    """Twelve updates with three bases each, vectors and decay included."""
    knobs = (
        "method.galore.rank=3",
        "method.galore.update_proj_gap=5",
        "method.galore.scale=0.5",
        f"method.galore.proj_type={proj_type}",
        ALL,
    )
    run = ready("method=galore", *knobs, *TWO, "optimizer.lr=0.02", "optimizer.weight_decay=0.1")
    theirs = {
        name: Published(w, rank=3 if w.dim() > 1 else 0, gap=5, scale=0.5, proj_type=proj_type, lr=0.02, decay=0.1 if w.dim() > 1 else 0.0)
        for name, w in weights(run).items()
    }
    for step in range(12):
        window = run.window(step)
        run.gradients(window)
        for name, parameter in run.trainable().items():
            theirs[name].step(parameter.grad)
        run.update(window)
        for name, now in weights(run).items():
            assert torch.allclose(now, theirs[name].weight, rtol=0, atol=1e-10), (step, name)
    assert run.events["subspaces"] == 2 * 3


def test_the_state_is_of_projected_size() -> None:
    """Llama: matrices of attention and MLP in eight dimensions, the rest in full; bytes as planned."""
    words = ("method=galore", "method.galore.rank=8", *SMALL)
    run = ready(*words)
    run.update(run.window(0))
    projected = {part.name for part in run.stack.methods[0].parts}
    assert {name.rpartition(".")[2] for name in projected} == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len(projected) == 14
    total = 0
    for name, parameter in run.trainable().items():
        of = state(run, name)
        numbers = sum(t.numel() for t in of.values() if isinstance(t, Tensor))
        if name.removesuffix(".weight") in projected:
            m, n = parameter.shape
            small, large = min(m, n), max(m, n)
            assert numbers == small * 8 + 2 * 8 * large
            assert of["exp_avg"].shape == ((m, 8) if m >= n else (8, n)) and ("Q" in of) == (m >= n) != ("P" in of)
            assert all(t.untyped_storage().nbytes() == 4 * t.numel() for t in of.values() if isinstance(t, Tensor))
        else:
            assert numbers == 2 * parameter.numel()
        total += 4 * numbers
    assert plan(compose(words)).memory["optimizer"] == total
    adamw = plan(compose(["method=full", *SMALL])).memory["optimizer"]
    matrices = sum(run.model.get_submodule(name).weight.numel() for name in projected)
    assert adamw - total > 0.5 * 4 * 2 * matrices
    bases = torch.stack(
        [
            (b.T @ b - torch.eye(8)).abs().max()
            for n in projected
            for b in [state(run, f"{n}.weight").get("P", state(run, f"{n}.weight").get("Q"))]
        ]
    )
    assert bases.max() < 1e-5


def test_one_subspace_between_two_bases_and_more_after() -> None:
    run = ready("method=galore", "method.galore.rank=2", "method.galore.update_proj_gap=4", ALL, *TWO, "optimizer.lr=0.05")
    start = weights(run)["layer.weight"]
    ranks = []
    for step in range(8):
        run.update(run.window(step))
        ranks.append(int(torch.linalg.matrix_rank(weights(run)["layer.weight"] - start, atol=1e-9)))
    assert ranks[:4] == [2] * 4 and ranks[4:] == [4] * 4


def test_moments_stay_when_the_basis_changes() -> None:
    run = ready("method=galore", "method.galore.rank=2", "method.galore.update_proj_gap=2", ALL, *TWO)
    for step in range(2):
        run.update(run.window(step))
    m, P = (state(run, "layer.weight")[key].clone() for key in ("exp_avg", "P"))
    window = run.window(2)
    run.gradients(window)
    grad = run.model.layer.weight.grad.clone()
    run.update(window)
    now = state(run, "layer.weight")
    assert not torch.allclose(now["P"].abs(), P.abs(), atol=1e-3)
    assert torch.allclose(now["exp_avg"], 0.9 * m + 0.1 * now["P"].T @ grad, atol=1e-14)


def test_what_is_not_named_gets_adamw() -> None:
    """Adam's eps stands elsewhere than in torch; without it both are one."""
    run = ready("method=galore", "method.galore.rank=2", "method.galore.eps=0", "method.galore.targets=[head]", *TWO, "optimizer.lr=0.02")
    mine = run.model.first.weight.detach().clone().requires_grad_()
    adam = torch.optim.AdamW([mine], lr=0.02, weight_decay=0.0, eps=0.0)
    for step in range(5):
        window = run.window(step)
        run.gradients(window)
        mine.grad = run.model.first.weight.grad.clone()
        adam.step()
        run.update(window)
    assert torch.allclose(run.model.first.weight, mine, rtol=0, atol=1e-13)
    assert state(run, "layer.weight")["exp_avg"].shape == (2, 32)


def test_bad_settings_are_one_line() -> None:
    with pytest.raises(UserError, match=r"method.galore.rank=100: model.layers.0.self_attn.q_proj is \d+x64; lower the rank"):
        build("method=galore", "method.galore.rank=100", *SMALL)
    with pytest.raises(UserError, match="galore needs every weight to be trainable, lora freezes them"):
        compose(["method=[lora,galore]", *SMALL])
    with pytest.raises(UserError, match="galore brings its own optimizer"):
        compose(["method=galore", "optimizer=sgd", *SMALL])
    with pytest.raises(UserError, match="acts on matrices"):
        build("method=galore", "method.galore.targets=[norm]", *SMALL)


def test_blocks_that_sleep_keep_their_own_count() -> None:
    lisa = ("method.lisa.interval=1", "method.lisa.gamma=1", "method.lisa.keep_state=true")
    run = ready("method=[lisa,galore]", *lisa, "method.galore.rank=4", *SMALL)
    for step in range(4):
        run.update(run.window(step))
    steps = [state(run, f"model.layers.{block}.self_attn.q_proj.weight").get("step", 0) for block in (0, 1)]
    assert sum(steps) == 4 and state(run, "model.norm.weight")["step"] == 4


def test_resumed_run_is_bit_equal(tmp_path: Path) -> None:
    knobs = ("method.galore.rank=4", "method.galore.update_proj_gap=4")
    run = check_resume("method=galore", *knobs, *SMALL, "trainer.max_steps=10", "optimizer.lr=1e-3", folder=tmp_path, at=7)
    assert run.events["subspaces"] == 14 * 3
