"""OASIS: a diagonal of the Hessian scales the gradient, and the step size finds itself."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tools import SMALL, build, check_resume, toy_data, weights
from torch import Tensor

from ftrecipes import update
from ftrecipes.compose import compose
from ftrecipes.errors import RunFailed, UserError
from ftrecipes.method import Method
from ftrecipes.registry import method
from ftrecipes.run import Run

MUTATION = ("ftrecipes/methods/optimizers/oasis.py", "torch._foreach_div_(changed, root)", "torch._foreach_mul_(changed, root)")

LLAMA = tuple(w.replace("num_hidden_layers:2", "num_hidden_layers:1") for w in SMALL)
TWO = ("model=toy", "model.kind=two_layer", "model.dtype=float64", "model.bias=true", "data.noise=0.3")


def knobs(**values: Any) -> list[str]:
    return [f"method.oasis.{name}={value}" for name, value in values.items()]


def ready(*words: str) -> Run:
    run = build(*(words if words[0].startswith("method=") else ("method=oasis", *words)))
    run.fit_steps, run.optimizer = 10**6, run.build_optimizer()
    return run


def quadratic(a: list[float], start: list[float], *words: str, scale: float = 1.0) -> Run:
    """scale * sum a_i w_i^2 / 2 from `start`, in float64."""
    n = len(a)
    rows = torch.diag((scale * n * torch.tensor(a, dtype=torch.float64)).sqrt())
    name = f"quadratic-{'-'.join(map(str, a))}-{scale}"
    toy_data(name, rows, torch.zeros(n, 1))
    shape = ("model=toy", "model.dtype=float64", f"model.inputs={n}", "model.outputs=1", f"data={name}", f"trainer.batch={n}")
    run = ready(*words, *shape)
    with torch.no_grad():
        run.model.layer.weight.copy_(torch.tensor([start], dtype=torch.float64))
    return run


def state(run: Run, name: str = "layer.weight") -> dict[str, Any]:
    return run.optimizer.state[run.model.get_parameter(name)]


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


# -- the diagonal ------------------------------------------------------------------------------------------------------


def test_exact_on_diagonal_hessians() -> None:
    """Every draw of signs gives a; so D_k = beta2^k D_0 + (1 - beta2^k) a."""
    a = torch.tensor([[3.0, 0.5, 20.0, 1e-3]], dtype=torch.float64)
    run = quadratic(a.flatten().tolist(), [1.0, 2.0, 3.0, 4.0], *knobs(beta2=0.9, warm_start=3))
    run.update(run.window(0))
    assert torch.allclose(state(run)["D"], a, rtol=1e-12) and run.events == {"hessian_products": 3}
    state(run)["D"].fill_(5.0)
    for k in range(1, 6):
        run.update(run.window(k))
        assert torch.allclose(state(run)["D"], 0.9**k * 5 + (1 - 0.9**k) * a, rtol=1e-12)


def test_negative_curvature_is_taken_by_its_size_and_small_one_is_cut() -> None:
    @method("concave", about={"domains": ["any"]})
    class Concave(Method):
        """-sum c w^2 / 2 with c = 1, and 1e-9 for the last entry."""

        def loss(self, run: Run, batch: Any) -> Tensor:
            w = run.model.layer.weight
            c = torch.ones_like(w)
            c[0, -1] = 1e-9
            return -0.5 * (c * w.square()).sum() * len(batch["example"])

    shape = ("model=toy", "model.dtype=float64", "model.inputs=3", "model.outputs=1", "data.inputs=3", "data.outputs=1")
    run = ready("method=[concave,oasis]", *knobs(eta0=0.25, alpha=1e-6), *shape)
    start = weights(run)["layer.weight"]
    run.update(run.window(0))
    assert torch.allclose(state(run)["D"], torch.tensor([[-1.0, -1.0, -1e-9]], dtype=torch.float64), rtol=1e-9)
    grown = weights(run)["layer.weight"] / start
    assert torch.allclose(grown, torch.tensor([[1.25, 1.25, 1 + 0.25e-3]], dtype=torch.float64), rtol=1e-12)


def test_the_average_is_signed_and_the_step_divides_by_its_size() -> None:
    run = ready(*knobs(beta2=0.5, alpha=1e-3), *TWO)
    method: Any = run.stack.methods[0]
    products: list[tuple[list[Tensor], list[Tensor]]] = []
    hessian_product = run.update.hessian_product

    def watched(window: Any, z: list[Tensor], loss: Any = None) -> Any:
        out = hessian_product(window, z, loss)
        products.append(([v.clone() for v in z], [p.clone() for p in out[1]]))
        return out

    run.update.hessian_product = watched  # type: ignore[method-assign]
    D: list[Tensor] = []
    signs = set()
    for step in range(4):
        before, products[:] = weights(run), []
        run.update(run.window(step))
        found = [[z * h for z, h in zip(*pair, strict=True)] for pair in products]
        assert len(found) == (method.warm_start if step == 0 else 1)
        mean = [torch.stack(parts).mean(0) for parts in zip(*found, strict=True)]
        D = [0.5 * d + 0.5 * m for d, m in zip(D, mean, strict=True)] if D else mean
        for (name, p), d in zip(run.trainable().items(), D, strict=True):
            assert torch.allclose(state(run, name)["D"], d, atol=1e-12)
            signs |= set(d.sign().flatten().tolist())
            wanted = before[name] - run.optimizer.eta * run_gradient(run, before, step)[name] / d.abs().clamp_min(1e-3)
            assert torch.allclose(p, wanted, atol=1e-10)
        assert all(set(z.flatten().tolist()) == {-1.0, 1.0} for pair in products for z in pair[0][:1])
    assert {-1.0, 1.0} <= signs


def run_gradient(run: Run, at: dict[str, Tensor], step: int) -> dict[str, Tensor]:
    """The gradient of a window at other weights."""
    now = weights(run)
    with torch.no_grad():
        for name, p in run.model.named_parameters():
            p.copy_(at[name])
    run.update.gradients(run.window(step))
    out = {name: p.grad.clone() for name, p in run.trainable().items()}
    with torch.no_grad():
        for name, p in run.model.named_parameters():
            p.copy_(now[name])
    return out


@pytest.mark.parametrize("words", [(), ("model.attention=eager",), ("hardware.checkpointing=true",), ("hardware.micro_batch=3",)], ids=str)
def test_hessian_product_of_a_language_model(words: tuple[str, ...]) -> None:
    """Against differences of gradients along z, in float64."""
    run = ready(*LLAMA, *words)
    run.model.double().train()
    active = run.active()
    z = run.stack.methods[0].draw(run, list(active.values()), 0)
    window, start = run.window(0), weights(run)
    _, product = run.hessian_product(window, z)
    found = {name: p.grad.clone() for name, p in active.items()}
    assert torch.allclose(flat(found.values()), flat(run_gradient(run, start, 0).values()), atol=1e-12)
    sides = [flat(run_gradient(run, {n: w + e * v for (n, w), v in zip(start.items(), z, strict=True)}, 0).values()) for e in (1e-5, -1e-5)]
    difference = (sides[0] - sides[1]) / 2e-5
    assert float((flat(product) - difference).norm() / difference.norm()) < 1e-3
    assert float(difference.norm()) > 1


def test_what_cannot_be_differentiated_twice_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chosen entries; and the fused attention that is taken out of the way."""
    run = ready("method=lift", *LLAMA)
    z = [torch.ones_like(p) for p in run.active().values()]
    with pytest.raises(RunFailed, match=r"cannot be differentiated twice; .* no method that trains chosen entries"):
        run.hessian_product(run.window(0), z)
    monkeypatch.setattr(update, "sdpa_kernel", lambda backend: contextlib.nullcontext())
    run = ready(*LLAMA)
    with pytest.raises(RunFailed, match=r"cannot be differentiated twice; take model.attention=sdpa or eager.*flash_attention_for_cpu"):
        run.update(run.window(0))


# -- the step size -----------------------------------------------------------------------------------------------------


def test_conditioning_does_not_matter() -> None:
    """D is the Hessian: eta = 1/2 from the second update on, and every coordinate halves."""
    run = quadratic([1e4, 1.0, 1e-2], [1.0, 1.0, 1.0], *knobs(eta0=1e-3))
    run.update(run.window(0))
    for k in range(1, 21):
        run.update(run.window(k))
        assert run.optimizer.eta == pytest.approx(0.5, rel=1e-9)
        assert float(run._row["lr"]) == run.optimizer.eta
    assert torch.allclose(run.model.layer.weight, torch.full((1, 3), 0.999 * 2.0**-20, dtype=torch.float64), rtol=1e-9)


def test_scaling_the_loss_changes_nothing() -> None:
    paths = []
    for scale in (1.0, 1000.0):
        torch.manual_seed(0)
        x, y = torch.randn(12, 4, dtype=torch.float64), torch.randn(12, 1, dtype=torch.float64)
        name = toy_data(f"scaled-{scale}", scale**0.5 * x, scale**0.5 * y)
        shape = ("model=toy", "model.dtype=float64", "model.inputs=4", "model.outputs=1", f"data={name}", "trainer.batch=12")
        run = ready(*knobs(alpha=1e-12), *shape)
        for step in range(10):
            run.update(run.window(step))
        paths.append(run.model.layer.weight.detach().clone())
    assert torch.allclose(*paths, atol=1e-10)


def test_scaling_coordinates_changes_nothing() -> None:
    S = torch.tensor([1.0, 10.0, 0.01], dtype=torch.float64)
    a = torch.tensor([2.0, 3.0, 5.0], dtype=torch.float64)
    w = quadratic(a.tolist(), [1.0, 1.0, 1.0], *knobs(alpha=1e-12))
    u = quadratic((a * S**2).tolist(), (1 / S).tolist(), *knobs(alpha=1e-12))
    for step in range(6):
        for run in (w, u):
            run.update(run.window(step))
        assert torch.allclose(w.model.layer.weight, S * u.model.layer.weight, atol=1e-10)


def test_growth_and_ratio_bound_the_step() -> None:
    """Both are recomputed with the two gradients on the present window; each is the smaller one at times."""
    run = ready(*knobs(alpha=1e-2, eta0=1e-4, beta2=0.9), *TWO, "trainer.batch=64")
    past, eta, theta, chosen = weights(run), 1e-4, math.inf, set()
    for step in range(12):
        here = weights(run)
        run.update(run.window(step))
        if step:
            dhat = flat(state(run, name)["D"].abs().clamp_min(1e-2) for name in here)
            dw = flat(here.values()) - flat(past.values())
            dg = flat(run_gradient(run, here, step).values()) - flat(run_gradient(run, past, step).values())
            ratio = float((dhat * dw**2).sum().sqrt() / (2 * (dg**2 / dhat).sum().sqrt()))
            growth = math.sqrt(1 + theta) * eta
            assert run.optimizer.eta == pytest.approx(min(growth, ratio), rel=1e-6)
            theta, eta = run.optimizer.eta / eta, run.optimizer.eta
            assert run.optimizer.theta == pytest.approx(theta, rel=1e-9)
            chosen.add(growth < ratio)
        past = here
    assert chosen == {True, False}


@pytest.mark.parametrize("eta0", [1e-5, 1e-3, 0.1])
def test_a_bad_start_of_the_diagonal_is_forgotten(eta0: float) -> None:
    """Curvatures 1e6, 1e3 and 1 from D_0 = 1: 300 updates arrive from any eta0; the best fixed rate is still at 0.9."""
    run = quadratic([1e6, 1e3, 1.0], [1.0, 1.0, 1.0], *knobs(eta0=eta0, beta2=0.99))
    curve = run.optimizer.curve

    def ones(params: Any, z: Any, product: Any, draw: int) -> None:
        curve(params, z, product, draw)
        if not run.optimizer.steps:
            state(run)["D"].fill_(1.0)

    run.optimizer.curve = ones
    window = run.window(0)
    for _ in range(300):
        run.update(window)
    assert float(run.model.layer.weight.detach().norm()) < 1e-6
    assert (1 - 2e-6) ** 300 > 0.9


def test_rate_from_the_schedule() -> None:
    """adaptive_lr=false: one gradient, eta = lr; momentum is a decaying average of the gradient."""
    words = (*knobs(adaptive_lr="false", momentum=0.5, alpha=1e-3), *TWO, "optimizer.lr=0.02", "schedule=constant", "schedule.warmup=0")
    run = ready(*words)
    gradients, m = run.update.gradients, None
    run.update.gradients = None  # type: ignore[assignment, method-assign]
    for step in range(3):
        before = weights(run)
        run.update(run.window(step))
        after = weights(run)
        run.update.gradients = gradients  # type: ignore[method-assign]
        g = flat(run_gradient(run, before, step).values())
        run.update.gradients = None  # type: ignore[assignment, method-assign]
        m = 0.5 * g if m is None else 0.5 * m + 0.5 * g
        dhat = flat(state(run, name)["D"].abs().clamp_min(1e-3) for name in before)
        assert torch.allclose(flat(after.values()), flat(before.values()) - 0.02 * m / dhat, atol=1e-10)
    assert "previous" not in state(run)


# -- the run -----------------------------------------------------------------------------------------------------------


def test_all_passes_draw_the_same_dropout() -> None:
    run = ready(*knobs(warm_start=1), "model=toy", "model.kind=two_layer", "model.dropout=0.5", "hardware.micro_batch=16")
    masks: list[Tensor] = []
    run.model.dropout.register_forward_hook(lambda m, i, o: masks.append((o == 0) & (i[0] != 0)))
    run.model.train()
    run.update(run.window(0))
    masks.clear()
    run.update(run.window(1))
    assert len(masks) == 4
    assert torch.equal(masks[0], masks[2]) and torch.equal(masks[1], masks[3]) and not torch.equal(masks[0], masks[1])


def test_settings_that_would_do_nothing_are_refused() -> None:
    for word in ("optimizer.lr=1e-3", "schedule=constant", "schedule.warmup=5"):
        with pytest.raises(UserError, match=f"so {word.split('=')[0]} would be ignored"):
            build("method=oasis", *TWO, word)
    run = build("method=oasis", *LLAMA)
    run.settings.model.attention = "flash_attention_2"
    with pytest.raises(UserError, match="flash_attention_2 cannot; take sdpa or eager"):
        run.stack.methods[0].prepare(run)
    with pytest.raises(UserError, match=r"oasis requires trainer\.clip"):
        compose(["method=oasis", "trainer.clip=1.0"])


@pytest.mark.parametrize("stack", ["oasis", "[lora,oasis]"])
def test_resumed_run_is_bit_equal(stack: str, tmp_path: Path) -> None:
    run = check_resume(f"method={stack}", *knobs(warm_start=2, alpha=0.1), *LLAMA, "trainer.max_steps=8", folder=tmp_path, at=5)
    assert run.events == {"hessian_products": 9}
