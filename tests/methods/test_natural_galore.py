"""Natural GaLore: Adam is given natural gradients of GaLore's subspace."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tools import SMALL, build, check_resume, toy_data, weights
from torch import Tensor

from ftrecipes.compose import compose
from ftrecipes.plan import plan
from ftrecipes.run import Run

MUTATION = (
    "ftrecipes/methods/optimizers/natural_galore.py",
    'state["history"][rows[-1]] = R.flatten()',
    'state["history"][0] = R.flatten()',
)

PLAIN = ("schedule=constant", "schedule.warmup=0", "trainer.clip=.inf", "optimizer.weight_decay=0.0")


def ready(*words: str, method: str = "natural_galore", m: int = 4, n: int = 6, rank: int = 2, gap: int = 1000, scale: float = 1.0) -> Run:
    """A linear map of shape (m, n); words may begin with `knob=value` of the method."""
    knobs = [
        f"method.{method}.{w}"
        for w in (*(w for w in words if "." not in w.split("=")[0]), f"rank={rank}", f"update_proj_gap={gap}", f"scale={scale}")
    ]
    rest = [w for w in words if "." in w.split("=")[0]]
    shape = ("model=toy", "model.dtype=float64", f"model.inputs={n}", f"model.outputs={m}", f"data.inputs={n}", f"data.outputs={m}")
    run = build(f"method={method}", *knobs, *shape, *PLAIN, *rest)
    run.fit_steps, run.optimizer = 10**6, run.build_optimizer()
    return run


def watch(run: Run) -> list[Tensor]:
    """What Adam is given from now on."""
    seen: list[Tensor] = []
    moments = run.optimizer.moments

    def watched(group: Any, params: Any, grads: list[Tensor]) -> Any:
        seen.append(grads[0].clone())
        return moments(group, params, grads)

    run.optimizer.moments = watched
    return seen


def feed(run: Run, grad: Tensor) -> None:
    """An update with a prescribed gradient."""
    run.set_rate()
    run.model.layer.weight.grad = grad.clone()
    run.update.apply()


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def state(run: Run) -> dict[str, Any]:
    return run.optimizer.state[run.model.layer.weight]


# -- the natural gradient ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("projector", ["one_sided", "tucker"])
@pytest.mark.parametrize("shape", [(4, 6), (6, 4)])
def test_agreement_with_the_dense_inverse_and_with_the_released_steps(projector: str, shape: tuple[int, int]) -> None:
    """Twelve gradients, three bases, a history of five; the released solve, Adam and decay written out."""
    lam, s, rank, gap = 1e-3, 5, 2, 4
    knobs = (f"projector={projector}", f"natural_history={s}", f"lambda_damping={lam}", "optimizer.lr=0.02", "optimizer.weight_decay=0.1")
    run = ready(*knobs, m=shape[0], n=shape[1], rank=rank, gap=gap, scale=0.5)
    seen, weight = watch(run), run.model.layer.weight.detach().clone()
    history: list[Tensor] = []
    moment: Any = 0.0
    second: Any = 0.0
    for t in range(12):
        grad = normal(t, *shape)
        if t % gap == 0:
            U, _, Vh = torch.linalg.svd(grad, full_matrices=False)
            both = projector == "tucker"
            A = U[:, :rank] if both or shape[0] < shape[1] else torch.eye(shape[0], dtype=torch.float64)
            B = Vh[:rank] if both or shape[0] >= shape[1] else torch.eye(shape[1], dtype=torch.float64)
        R = A.T @ grad @ B.T
        history = [*history, R.flatten()][-s:]
        G, g = torch.stack(history, 1), R.flatten()
        dense = torch.linalg.solve(lam * torch.eye(len(g), dtype=torch.float64) + G @ G.T, g)
        S = torch.eye(len(history), dtype=torch.float64) + G.T @ G / lam
        y = torch.cholesky_solve((G.T @ g)[:, None], torch.linalg.cholesky(S))[:, 0]
        released = g / lam - G @ y / lam**2
        feed(run, grad)
        assert float((seen[-1].flatten() - dense).norm() / dense.norm()) < 1e-8
        assert float((seen[-1].flatten() - released).norm() / dense.norm()) < 1e-6
        moment, second = 0.9 * moment + 0.1 * dense.view_as(R), 0.999 * second + 0.001 * dense.view_as(R) ** 2
        size = 0.02 * math.sqrt(1 - 0.999 ** (t + 1)) / (1 - 0.9 ** (t + 1))
        weight -= size * 0.5 * A @ (moment / (second.sqrt() + 1e-6)) @ B
        weight -= 0.02 * 0.1 * weight
        assert torch.allclose(run.model.layer.weight, weight, atol=1e-8)
    assert run.events == {"subspaces": 3, "natural_steps": 12}


def test_orthogonal_gradients_do_not_see_each_other() -> None:
    """A history of sigma_i q_i with orthonormal q_i: ng = sigma q / (lambda + sigma^2), whatever the others are."""
    run = ready("lambda_damping=0.5", rank=4)
    seen = watch(run)
    feed(run, normal(0, 4, 6))
    P = state(run)["P"]
    first = P.T @ normal(0, 4, 6)
    q = torch.linalg.qr(torch.cat([first.reshape(1, -1), normal(1, 5, 24)]).T).Q.T
    for i, sigma in enumerate((3.0, 0.1, 7.0, 1.0, 0.01), start=1):
        feed(run, P @ (sigma * q[i].view(4, 6)))
        assert torch.allclose(seen[-1].flatten(), sigma * q[i] / (0.5 + sigma**2), atol=1e-12)


def test_the_window_holds_the_last_s_gradients() -> None:
    s = 4
    given = {}
    for factor in (1.0, 50.0):
        run = ready(f"natural_history={s}", "lambda_damping=30")
        seen = watch(run)
        for t in range(s + 2):
            feed(run, normal(t, 4, 6) * (factor if t == 0 else 1.0))
        given[factor] = seen
    change = [float((a - b).norm() / a.norm()) for a, b in zip(given[1.0], given[50.0], strict=True)]
    assert all(c > 1e-3 for c in change[:s])
    assert all(c < 1e-10 for c in change[s:])


def test_small_damping_in_single_precision() -> None:
    """The middle form of the identity would subtract 1e6-fold gradients from each other."""
    found = {}
    for dtype in ("float64", "float32"):
        run = ready("lambda_damping=1e-6", f"model.dtype={dtype}")
        seen = watch(run)
        for t in range(6):
            feed(run, normal(t, 4, 6).to(run.model.layer.weight.dtype))
        found[dtype] = seen[-1].double()
    assert float((found["float32"] - found["float64"]).norm() / found["float64"].norm()) < 1e-3


# -- limits ------------------------------------------------------------------------------------------------------------


def test_first_step_is_galores() -> None:
    """ng = g / (lambda + |g|^2), and Adam is free of scale."""
    natural, plain = ready("eps=0", "lambda_damping=0.01"), ready("eps=0", method="galore")
    seen, grad = watch(natural), normal(3, 4, 6)
    feed(natural, grad)
    feed(plain, grad)
    R = state(natural)["P"].T @ grad
    assert torch.allclose(seen[0], R / (0.01 + R.square().sum()), atol=1e-12)
    assert torch.allclose(natural.model.layer.weight, plain.model.layer.weight, atol=1e-9)
    feed(natural, normal(4, 4, 6))
    feed(plain, normal(4, 4, 6))
    assert not torch.allclose(natural.model.layer.weight, plain.model.layer.weight, atol=1e-5)


@pytest.mark.parametrize("knobs", [("natural_history=0",), ("lambda_damping=1e8", "eps=0")], ids=["none", "damped"])
def test_limits_are_galore(knobs: tuple[str, ...]) -> None:
    natural = ready(*knobs, gap=4)
    plain = ready(*(k for k in knobs if k == "eps=0"), method="galore", gap=4)
    for step in range(10):
        natural.update(natural.window(step))
        plain.update(plain.window(step))
    mine, theirs = natural.model.layer.weight, plain.model.layer.weight
    assert torch.equal(mine, theirs) if knobs == ("natural_history=0",) else torch.allclose(mine, theirs, atol=1e-6)


def test_signs_of_singular_vectors_do_not_matter() -> None:
    runs = [ready(), ready()]
    for t in range(6):
        for run in runs:
            feed(run, normal(t, 4, 6))
        if t == 1:
            of = state(runs[1])
            of["P"][:, 0] *= -1
            of["exp_avg"][0] *= -1
            of["history"].view(20, 2, 6)[:, 0] *= -1
    assert torch.allclose(runs[0].model.layer.weight, runs[1].model.layer.weight, atol=1e-12)


def test_within_a_period_the_update_has_the_rank() -> None:
    run = ready(rank=2, m=6, n=8)
    start = run.model.layer.weight.detach().clone()
    for t in range(5):
        feed(run, normal(t, 6, 8))
    assert torch.linalg.matrix_rank(run.model.layer.weight - start, atol=1e-10) == 2


@pytest.mark.parametrize("how", ["keep", "project", "reset"])
@pytest.mark.parametrize("shape", [(4, 6), (6, 4)])
def test_the_history_at_a_new_basis(how: str, shape: tuple[int, int]) -> None:
    run = ready(f"history_on_refresh={how}", "natural_history=5", m=shape[0], n=shape[1], gap=3)
    for t in range(3):
        feed(run, normal(t, *shape))
    name, old = ("P" if shape[0] < shape[1] else "Q"), dict(state(run))
    past = old["history"][:3].clone()
    feed(run, normal(3, *shape))
    new = state(run)
    turn = new[name].T @ old[name]
    for i in range(3):
        R = past[i].view(*new["exp_avg"].shape)
        wanted = {"keep": R, "reset": 0 * R, "project": turn @ R if name == "P" else R @ turn.T}[how]
        assert torch.allclose(new["history"][i].view_as(R), wanted, atol=1e-13)
    assert new["history"][3].norm() > 0 and not new["history"][4].any()


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("projector", ["one_sided", "tucker"])
def test_bytes_of_the_state(projector: str) -> None:
    """P, two moments and s gradients of projected size for each matrix; as planned."""
    words = ("method=natural_galore", "method.natural_galore.rank=8", f"method.natural_galore.projector={projector}", *SMALL)
    run = build(*words)
    run.fit_steps, run.optimizer = 10, run.build_optimizer()
    run.update(run.window(0))
    total = 0
    for parameter in run.trainable().values():
        of = [t for t in run.optimizer.state[parameter].values() if isinstance(t, Tensor)]
        assert all(t.untyped_storage().nbytes() == 4 * t.numel() for t in of)
        numbers = sum(t.numel() for t in of)
        if "history" in run.optimizer.state[parameter]:
            m, n = parameter.shape
            k = 64 if projector == "tucker" else 8 * max(m, n)
            assert numbers == (8 * (m + n) if projector == "tucker" else 8 * min(m, n)) + (2 + 20) * k
        total += 4 * numbers
    assert plan(compose(words)).memory["optimizer"] == total
    assert sum("history" in s for s in run.optimizer.state.values()) == 14


# -- what it is for ----------------------------------------------------------------------------------------------------


def test_a_rotated_quadratic() -> None:
    """tr(W H W')/2 with eigenvalues 0.01 to 1: best of six rates after 30 updates; the damping has to fit the gradients."""
    ends: dict[str, list[float]] = {"0.1": [], "0.001": [], "galore": []}
    for seed in range(2):
        turn = torch.linalg.qr(normal(seed, 8, 8)).Q
        root = turn @ torch.diag(torch.logspace(-2, 0, 8, dtype=torch.float64).sqrt())
        data = toy_data(f"rotated{seed}", 8**0.5 * root.T, torch.zeros(8, 6))
        start = normal(100 + seed, 6, 8)
        for name in ends:
            knobs = () if name == "galore" else (f"lambda_damping={name}",)
            method = "galore" if name == "galore" else "natural_galore"
            run = ready(*knobs, "trainer.batch=8", "model.inputs=8", method=method, m=6, n=8, rank=6, gap=1000)
            run.data = build("method=full", "model=toy", f"data={data}", "model.inputs=8", "model.outputs=6").data
            window = run.window(0)
            losses = []
            for rate in (0.003, 0.01, 0.03, 0.1, 0.3, 1.0):
                with torch.no_grad():
                    run.model.layer.weight.copy_(start)
                run.optimizer = run.build_optimizer()
                for group in run.optimizer.param_groups:
                    group["peak"] = rate
                for _ in range(30):
                    run.update(window)
                losses.append(float(run.loss(window)))
            ends[name].append(min(losses))
    for natural, weak, galore in zip(*ends.values(), strict=True):
        assert natural < 0.6 * galore
        assert weak > natural


def test_resumed_run_is_bit_equal(tmp_path: Path) -> None:
    knobs = [f"method.natural_galore.{w}" for w in ("rank=4", "update_proj_gap=4", "natural_history=3", "history_on_refresh=project")]
    run = check_resume("method=natural_galore", *knobs, *SMALL, "trainer.max_steps=10", "optimizer.lr=1e-3", folder=tmp_path, at=7)
    assert run.events == {"subspaces": 14 * 3, "natural_steps": 10}
    assert all(torch.isfinite(w).all() for w in weights(run).values())
