"""SAM: the gradient that is applied is the one at the worst point of a ball around the weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tools import SMALL, build, check_resume, toy_data, weights
from torch import Tensor, nn

from ftrecipes.errors import RunFailed
from ftrecipes.run import Run

MUTATION = (
    "ftrecipes/methods/optimizers/sharpness.py",
    "torch._foreach_mul_(eps, radius / (norm + 1e-12))",
    "torch._foreach_mul_(eps, -radius / (norm + 1e-12))",
)

PLAIN = ("optimizer=sgd", "schedule=constant", "schedule.warmup=0", "trainer.clip=.inf", "optimizer.weight_decay=0.0")
TWO = ("model=toy", "model.kind=two_layer", "model.bias=true", "model.dtype=float64", "data.noise=0.3")


def passes(run: Run) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Weights and gradients of every gradient pass from now on."""
    seen: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
    gradients = run.update.gradients

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        at = weights(run)
        loss = gradients(*args, **kwargs)
        seen.append((at, {n: p.grad.clone() for n, p in run.trainable().items() if p.grad is not None}))
        return loss

    run.update.gradients = watched  # type: ignore[method-assign]
    return seen


def ready(*words: str, steps: int = 10**6) -> Run:
    run = build(*words)
    run.fit_steps, run.optimizer = steps, run.build_optimizer()
    return run


def length(tensors: Any) -> float:
    return float(torch.cat([t.flatten() for t in tensors]).norm())


# -- the step ----------------------------------------------------------------------------------------------------------


def test_closed_form_on_a_quadratic() -> None:
    """L = w'Aw/2 with A = diag(a): w1 = w0 - lr A (w0 + rho A w0 / ||A w0||)."""
    a = torch.tensor([9.0, 4.0, 1.0, 0.25], dtype=torch.float64)
    data = toy_data("diagonal", torch.diag(a.sqrt()), torch.zeros(4, 1))
    shape = ("model=toy", "model.dtype=float64", "model.inputs=4", "model.outputs=1", f"data={data}", "trainer.batch=4")
    run = ready("method=sam", "method.sam.rho=0.3", *shape, *PLAIN, "optimizer.lr=0.1")
    w = run.model.layer.weight.detach().clone()
    for step in range(3):
        hessian = torch.diag(a) / 4  # the loss is a mean over four rows
        g = w @ hessian
        w = w - 0.1 * (w + 0.3 * g / g.norm()) @ hessian
        run.update(run.window(step))
        assert torch.allclose(run.model.layer.weight, w, rtol=0, atol=1e-12)


@pytest.mark.parametrize("adaptive", [False, True])
def test_agreement_with_the_published_two_steps(adaptive: bool) -> None:
    """Ten updates of a Llama against the port that others build on: climb, gradient, back, base optimizer."""
    rho = 0.5 if adaptive else 0.05
    words = (*SMALL, "optimizer.lr=1e-3", "schedule=constant", "schedule.warmup=0", "trainer.clip=.inf")
    run = ready("method=sam", f"method.sam.rho={rho}", f"method.sam.adaptive={str(adaptive).lower()}", *words)
    model = copy.deepcopy(run.model)
    base = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for step in range(10):
        window = run.window(step)
        run.update(window)
        climbed = []
        for climb in (True, False):
            base.zero_grad()
            for batch in window:
                outputs = run.task.outputs(model, batch)
                (run.task.losses(outputs, batch).sum() / window.units).backward()
            with torch.no_grad():
                if climb:
                    parts = [((p.abs() if adaptive else 1.0) * p.grad).norm(p=2) for p in model.parameters()]
                    scale = rho / (torch.stack(parts).norm(p=2) + 1e-12)
                    for p in model.parameters():
                        climbed.append((p.pow(2) if adaptive else 1.0) * p.grad * scale)
                        p.add_(climbed[-1])
                else:
                    for p, e in zip(model.parameters(), climbed, strict=True):
                        p.sub_(e)
        base.step()
    theirs = dict(model.named_parameters())
    off = {name: float((p - theirs[name]).detach().abs().max()) for name, p in run.model.named_parameters()}
    assert max(off.values()) < 3e-5, off  # they return by subtraction, which rounds
    start = weights(build("method=full", *words))
    moved = max(float((p - start[name]).abs().max()) for name, p in weights(run).items())
    assert moved > 5e-3


def test_one_norm_over_all_tensors() -> None:
    run = ready("method=sam", "method.sam.rho=0.2", *TWO, *PLAIN, "optimizer.lr=0.1")
    seen = passes(run)
    before = weights(run)
    run.update(run.window(0))
    (here, g), (there, _) = seen
    assert all(torch.equal(here[n], before[n]) for n in before)
    eps = {n: there[n] - here[n] for n in here}
    assert length(eps.values()) == pytest.approx(0.2, rel=1e-9)
    total = length(g.values())
    for name, e in eps.items():
        assert torch.allclose(e, 0.2 * g[name] / total, atol=1e-12)
    assert all(e.norm() < 0.19 for e in eps.values())


def test_adaptive_ball_is_relative_to_the_weights() -> None:
    run = ready("method=sam", "method.sam.rho=0.2", "method.sam.adaptive=true", *TWO, *PLAIN, "optimizer.lr=0.1")
    with torch.no_grad():
        run.model.first.bias.fill_(0.5), run.model.layer.bias.fill_(-0.5)
    seen = passes(run)
    run.update(run.window(0))
    (here, g), (there, _) = seen
    assert length((there[n] - here[n]) / here[n] for n in here) == pytest.approx(0.2, rel=1e-9)
    assert sum(float(((there[n] - here[n]) * g[n]).sum()) for n in g) > 0


def test_weights_return_and_the_second_gradient_is_applied() -> None:
    run = ready("method=sam", *TWO, *PLAIN, "optimizer.lr=0.25")
    seen = passes(run)
    before, plain = weights(run), float(run.loss(run.window(0)))
    run.update(run.window(0))
    assert len(seen) == 2 and run.events == {"ascents": 1}
    for name, now in weights(run).items():
        assert torch.equal(now, before[name] - 0.25 * seen[1][1][name])
    assert run._row["sam/rise"] > 0
    assert float(run._row["loss"]) == pytest.approx(plain, rel=1e-9)


def test_no_radius_is_full_tuning_bit_for_bit() -> None:
    words = (*SMALL, "optimizer.lr=1e-3", "optimizer.weight_decay=0.1")
    still, full, sam = build("method=sam", "method.sam.rho=0", *words), build("method=full", *words), build("method=sam", *words)
    for run in (still, full, sam):
        run.fit(5)
    assert all(torch.equal(a, weights(full)[name]) for name, a in weights(still).items())
    assert not torch.equal(weights(sam)["model.norm.weight"], weights(full)["model.norm.weight"])


# -- the window --------------------------------------------------------------------------------------------------------


def test_both_passes_draw_the_same_dropout() -> None:
    run = ready("method=sam", "model=toy", "model.kind=two_layer", "model.dropout=0.5", *PLAIN, "hardware.micro_batch=8")
    masks: list[Tensor] = []
    run.model.dropout.register_forward_hook(lambda m, i, o: masks.append((o == 0) & (i[0] != 0)))
    run.model.train()
    run.update(run.window(0))
    assert len(masks) == 8
    assert all(torch.equal(a, b) for a, b in zip(masks[:4], masks[4:], strict=True))
    assert not torch.equal(masks[0], masks[1])


def test_micro_batches_climb_together() -> None:
    moved = {}
    for micro in (32, 4):
        run = ready("method=sam", *TWO, *PLAIN, "optimizer.lr=0.1", f"hardware.micro_batch={micro}")
        assert len(run.window(0)) == 32 // micro
        run.update(run.window(0))
        moved[micro] = weights(run)
    assert all(torch.allclose(w, moved[4][name], atol=1e-13) for name, w in moved[32].items())


def test_statistics_of_batchnorm_are_those_of_the_first_pass() -> None:
    run = ready("method=sam", "method.sam.rho=1.0", *TWO, *PLAIN, "optimizer.lr=0.1")
    run.model.dropout = nn.BatchNorm1d(32, dtype=torch.float64)
    run.model.train()
    alone = copy.deepcopy(run.model)
    window = run.window(0)
    for batch in window:
        run.task.outputs(alone, batch)
    run.update(window)
    norm, wanted = run.model.dropout, alone.dropout
    assert norm.num_batches_tracked == wanted.num_batches_tracked == len(window)
    assert torch.equal(norm.running_mean, wanted.running_mean) and torch.equal(norm.running_var, wanted.running_var)
    assert norm.track_running_stats


def test_what_is_reported_of_the_loss_is_that_at_the_weights() -> None:
    run = ready("method=sam", "method.sam.rho=1.0", *TWO, *PLAIN, "optimizer.lr=0")
    window = run.window(0)
    plain = float(run.loss(window))
    run.update(window)
    run.finish_window(window)
    assert float(run._row["nll"]) == pytest.approx(plain, rel=1e-6)
    assert float(run._row["sam/rise"]) > 0.1 * plain


def test_a_gradient_that_is_not_finite_stops_the_run() -> None:
    run = ready("method=sam", "model=toy", *PLAIN)
    with torch.no_grad():
        run.model.layer.weight.fill_(1e38)
    with pytest.raises(RunFailed, match="not finite at update 1"):
        run.update(run.window(0))


# -- what it is for ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_ends_in_a_flatter_place(seed: int) -> None:
    """Noisy rows and more weights than rows: at a training loss that is no worse, the worst of 30 neighbours is better."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(24, 16, generator=rng)
    data = toy_data(f"noisy{seed}", x, x @ torch.randn(16, 1, generator=rng) / 4 + 0.5 * torch.randn(24, 1, generator=rng))
    shape = ("model=toy", "model.kind=two_layer", "model.hidden=64", "model.outputs=1", "model.dtype=float64", f"data={data}")
    rise = {}
    for method in ("full", "sam"):
        knobs = ("method.sam.rho=0.2",) if method == "sam" else ()
        run = ready(f"method={method}", *knobs, *shape, *PLAIN, "trainer.batch=24", "optimizer.lr=0.1", f"seed={seed}")
        window = run.window(0)
        for _ in range(400):
            run.update(window)
        rise[method] = sharpness(run, window)
    assert rise["sam"] < 0.8 * rise["full"]


def sharpness(run: Run, window: Any) -> float:
    """The rise of the loss at distance 0.5 along the steepest of 30 random directions and the gradient's."""
    start, best = weights(run), 0.0
    here = float(run.loss(window))
    for draw in range(30):
        rng = torch.Generator().manual_seed(draw)
        z = {n: torch.randn(p.shape, generator=rng, dtype=p.dtype) for n, p in start.items()}
        with torch.no_grad():
            for name, p in run.model.named_parameters():
                p.copy_(start[name] + 0.5 * z[name] / length(z.values()))
        best = max(best, float(run.loss(window)) - here)
    with torch.no_grad():
        for name, p in run.model.named_parameters():
            p.copy_(start[name])
    return best


# -- the run -----------------------------------------------------------------------------------------------------------


def test_with_an_adapter_only_its_tensors_climb() -> None:
    run = ready("method=[lora,gmt,sam]", *SMALL)
    seen = passes(run)
    run.update(run.window(0))
    (here, g), (there, _) = seen
    climbed = {n for n in here if not torch.equal(here[n], there[n])}
    assert climbed and climbed <= set(run.trainable()) == set(g)
    assert run.events.keys() == {"ascents", "masks"}


@pytest.mark.parametrize("stack", ["sam", "[lift,sam]"])
def test_resumed_run_is_bit_equal(stack: str, tmp_path: Path) -> None:
    lift = ("method.lift.update_interval=4",) if "lift" in stack else ()
    run = check_resume(f"method={stack}", *SMALL, *lift, "trainer.max_steps=10", "optimizer.lr=1e-3", folder=tmp_path, at=8)
    assert run.events["ascents"] == 10
