"""Model Stock: how far along the line from the anchor to the average, by the angle between tunings, weight by weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tools import SMALL, build, check_resume, train, weights
from torch import Tensor

from ftrecipes.errors import UserError
from ftrecipes.methods.weights.arithmetic import Shelf
from ftrecipes.methods.weights.model_stock import ModelStock, stock
from ftrecipes.run import Run

MUTATION = ("ftrecipes/methods/weights/model_stock.py", "t = k * c / (1 + (k - 1) * c)\n    centre", "t = c\n    centre")


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# -- the formula -------------------------------------------------------------------------------------------------------


def test_limits() -> None:
    w0, d = randn(6, 8, seed=0), randn(6, 8, seed=1)
    w, t = stock(w0, [w0 + d, w0 + d])
    assert t == 1 and torch.equal(w, w0 + d)
    e = torch.zeros(6, 8)
    e[0], f = 1.0, torch.zeros(6, 8)
    f[1] = 2.0
    for pair in ([w0 + e, w0 + f], [w0 + e, w0 - e], [w0, w0 + e], [w0, w0]):  # right angle, beyond, and nothing moved
        w, t = stock(w0, pair)
        assert t == 0 and torch.equal(w, w0)
    steps = torch.tensor([1, 2])
    assert torch.equal(stock(steps, [steps + 1, steps + 2])[0], steps + 1)


def mergekit(w0: Tensor, ws: list[Tensor], filter_wise: bool) -> Tensor:
    """mergekit's task, in its own order of operations, float64."""
    shape = w0.shape
    flat = (lambda w: w if w.dim() > 1 else w[None]) if filter_wise else (lambda w: w.reshape(-1))
    w0, ws = flat(w0), [flat(w) for w in ws]
    offsets = [w - w0 for w in ws]
    cosines = [torch.cosine_similarity(offsets[i], offsets[j], dim=-1, eps=1e-6) for i in range(len(ws)) for j in range(i + 1, len(ws))]
    c, n = torch.stack(cosines).mean(0).unsqueeze(-1), len(ws)
    t = n * c / (1 + (n - 1) * c)
    return (t * (sum(ws) / n) + (1 - t) * w0).reshape(shape)


@pytest.mark.parametrize("filter_wise", [False, True])
@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("shape", [(12, 20), (30,), (4, 3, 2, 2)])
def test_agreement_with_mergekit(shape: tuple[int, ...], k: int, filter_wise: bool) -> None:
    w0, shared = randn(*shape, seed=0), randn(*shape, seed=1)
    ws = [w0 + 0.3 * shared + 0.1 * randn(*shape, seed=2 + i) for i in range(k)]
    if len(shape) > 2 and filter_wise:  # mergekit takes the last axis of a kernel for a row; here a row is an output
        flat = mergekit(w0.double().flatten(1), [w.double().flatten(1) for w in ws], True).reshape(shape)
    else:
        flat = mergekit(w0.double(), [w.double() for w in ws], filter_wise)
    found, t = stock(w0, ws, filter_wise)
    assert torch.allclose(found.double(), flat, atol=1e-6)
    assert t.numel() == (len(w0) if filter_wise and w0.dim() > 1 else 1) and ((t > 0) & (t < 1)).all()


@pytest.mark.parametrize("k", [2, 3, 5])
def test_it_is_the_projection_of_the_centre(k: int) -> None:
    """With errors at right angles to each other and to the centre's own offset, w_H is the point of the line nearest to it."""
    basis = torch.linalg.qr(randn(50, 50, seed=k, dtype=torch.float64)).Q
    w0 = randn(50, seed=9, dtype=torch.float64)
    mu = w0 + 2.0 * basis[:, 0]
    ws = [mu + 1.5 * basis[:, 1 + i] for i in range(k)]
    w, t = stock(w0, ws)
    average = sum(ws) / k
    assert abs(float((w - mu) @ (average - w0))) < 1e-10
    assert float(t) == pytest.approx(float((mu - w0) @ (average - w0) / (average - w0).square().sum()), abs=1e-12)


def test_on_a_thin_shell_it_is_nearer_to_the_centre_than_the_average() -> None:
    d = 20000
    m, noise = 0.3 * randn(d, seed=0), [0.5 * randn(d, seed=1 + i) for i in range(2)]
    w0 = randn(d, seed=5)
    ws = [w0 + m + e for e in noise]
    w, t = stock(w0, ws)
    errors = [float((x - (w0 + m)).norm()) for x in (w, (ws[0] + ws[1]) / 2, ws[0])]
    assert abs(float(t) - 0.4186) < 0.02
    assert errors[0] < 0.7 * errors[1] and errors[1] < 0.75 * errors[2]


def test_invariances() -> None:
    w0, a, b, shift = (randn(9, 7, seed=i, dtype=torch.float64) for i in range(4))
    a = b + 0.5 * a
    w, t = stock(w0, [w0 + a, w0 + b])
    assert torch.allclose(stock(w0 + shift, [w0 + a + shift, w0 + b + shift])[0], w + shift, atol=1e-12)
    assert torch.allclose(stock(w0, [w0 + 3 * a, w0 + 3 * b])[0] - w0, 3 * (w - w0), atol=1e-12)
    assert torch.allclose(stock(w0, [w0 + b, w0 + a])[0], w, atol=1e-14)
    assert 0.5 < t < 1


# -- the drive ---------------------------------------------------------------------------------------------------------

SHORT = (*SMALL, "optimizer.lr=3e-3", "schedule=constant", "schedule.warmup=0", "method.model_stock.keep_ingredients=true")


def merged(run: Run) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in run.merge().named_parameters()}


@pytest.mark.parametrize("stack", ["model_stock", "[lora,model_stock]"])
def test_post_merges_the_folded_weights_and_t_differs_by_weight(stack: str, tmp_path: Path) -> None:
    """One angle for the whole model would give one t, and a frozen block would move."""
    run = train(f"method={stack}", "method.model_stock.when=post", "trainer.max_steps=8", *SHORT, folder=tmp_path)
    shelf, said = Shelf(tmp_path / "ingredients"), run.results["model_stock"]
    now = merged(run)
    assert len({round(t, 3) for t in said["t"].values()}) > 3 and all(0 <= t <= 1 for t in said["t"].values())
    for name in shelf.names(0, 1):
        wanted, t = stock(shelf.base(name), [shelf.get(i, name) for i in range(2)])
        assert torch.allclose(now[name], wanted, atol=1e-7) and said["t"][name] == pytest.approx(float(t), abs=1e-5)
    start = dict(run.pristine().named_parameters())
    assert {n for n in now if not torch.equal(now[n], start[n])} <= set(shelf.names(0, 1))
    assert run.events["ingredients"] == 2 and run.events["merges"] == 1


def test_periodic_sets_all_copies_to_the_merge_and_keeps_the_first_anchor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = build("method=model_stock", "method.model_stock.period=2", "trainer.max_steps=12", *SHORT)
    method = run.stack.methods[0]
    assert isinstance(method, ModelStock)
    start, seen = weights(run), []
    begins: list[tuple[dict[str, Tensor], Any]] = []
    fit, combine, name = run.fit, method.combine, "model.layers.0.mlp.up_proj.weight"

    def watch(steps: int, **options: Any) -> Any:
        begins.append((weights(run), options["within"]))
        return fit(steps, **options)

    def together(run: Run, shelf: Shelf) -> Any:
        assert all(torch.equal(shelf.base(n), start[n]) for n in start)  # the anchor is the pretrained weight at every merge
        two = [shelf.get(i, name) for i in range(2)]
        assert not torch.equal(*two)
        said = combine(run, shelf)
        seen.append(weights(run))
        assert torch.equal(seen[-1][name], stock(start[name], two)[0])
        return said

    monkeypatch.setattr(method, "combine", together)
    run.model.train()
    run.stack.drive(run, watch)
    assert len(begins) == 6 and len(seen) == 3 and [w for _, w in begins] == [(0, 6)] * 2 + [(2, 6)] * 2 + [(4, 6)] * 2
    for i, (weights_then, _) in enumerate(begins):
        wanted = start if i < 2 else seen[i // 2 - 1]
        assert all(torch.equal(weights_then[n], wanted[n]) for n in start), f"copy {i % 2} of period {i // 2}"
    assert all(torch.equal(p, seen[-1][n]) for n, p in run.model.named_parameters())
    assert run.events["merges"] == 3 and run.step == 12


def test_each_copy_keeps_its_optimizer_and_the_schedule_goes_on() -> None:
    """Periods of one copy are one training: with merges that change nothing it is the plain run."""
    words = (
        "model=toy",
        "model.kind=two_layer",
        "optimizer.lr=1e-2",
        "optimizer.weight_decay=0.01",
        "schedule=cosine",
        "schedule.warmup=3",
    )
    words = (*words, "trainer.batch=16")
    plain = build("method=full", *words, "trainer.max_steps=9")
    plain.model.train()
    window = plain.window
    plain.window = lambda step, *a: window(step % 3)  # type: ignore[method-assign]
    plain.fit(9)
    run = build("method=model_stock", *words, "trainer.max_steps=18", "method.model_stock.period=3")
    own = run.window
    run.window = lambda step, *a: own(step % 3)  # type: ignore[method-assign]
    run.model.train()
    run.stack.drive(run, run.fit)  # both copies see the same windows, so t = 1
    assert all(t == 1 for t in run.results["model_stock"]["t"].values())
    for name, p in run.model.named_parameters():
        assert torch.equal(p, plain.model.get_parameter(name)), name


def test_periodic_under_an_adapter_is_one_line() -> None:
    run = build("method=[lora,model_stock]", *SMALL, "trainer.max_steps=4")
    with pytest.raises(UserError, match="when=post"):
        run.stack.drive(run, run.fit)


@pytest.mark.parametrize("at", [5, 9])
def test_resumed_run_is_bit_equal(at: int, tmp_path: Path) -> None:
    words = ("method=model_stock", "method.model_stock.period=2", *SMALL, "trainer.max_steps=12", "optimizer.lr=1e-3")
    run = check_resume(*words, folder=tmp_path, at=at)
    assert run.events["merges"] == 3
