"""LIFT: principal weights are chosen, they alone train, and moments follow them from selection to selection."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tools import SMALL, build, check_resume, toy_data, train, weights
from torch import Tensor

from ftrecipes.compose import compose
from ftrecipes.errors import UserError
from ftrecipes.run import Run

MUTATION = ("ftrecipes/methods/selection/lift.py", "rng=rng).abs(), k)", "rng=rng), k)")

STEADY = ("schedule=constant", "schedule.warmup=0", "trainer.clip=.inf")


def toy(m: int, n: int, budget: int, rank: int, *words: str, interval: int = 100) -> tuple[str, ...]:
    """A linear toy with one m x n weight."""
    sizes = (f"model.inputs={n}", f"model.outputs={m}", f"data.inputs={n}", f"data.outputs={m}", "data.noise=0.1")
    knobs = (f"method.lift.rank_budget={budget}", f"method.lift.filter_rank={rank}", f"method.lift.update_interval={interval}")
    return ("method=lift", "model=toy", *sizes, *knobs, *words)


def with_weight(W: Tensor, *words: str) -> Run:
    """A linear toy that starts from this weight."""
    run = Run(compose(words))
    run.load_model()
    run.model.layer.weight.data.copy_(W)
    run.load_data()
    run.prepare()
    return run


def mask(run: Run) -> set[int]:
    return set(run.stack.methods[0].chosen["layer"].index.tolist())


def principal(W: np.ndarray[Any, Any], rank: int, k: int) -> set[int]:
    """The k largest entries of the best rank-r approximation, by numpy in float64."""
    U, S, Vt = np.linalg.svd(W.astype(np.float64), full_matrices=False)
    score = np.abs((U[:, :rank] * S[:rank]) @ Vt[:rank])
    return set(np.argsort(-score, axis=None)[:k].tolist())


# -- which entries -----------------------------------------------------------------------------------------------------


def test_mask_is_that_of_numpy() -> None:
    run = build(*toy(48, 64, 2, 4))
    W = run.model.layer.weight.detach().numpy()
    assert len(mask(run)) == (48 + 64) * 2
    assert mask(run) == principal(W, 4, (48 + 64) * 2)
    assert mask(run) != principal(W, 48, (48 + 64) * 2)  # magnitude chooses others


def test_full_rank_is_magnitude_and_rank_one_is_a_product_of_vectors() -> None:
    k = (48 + 64) * 3
    run = build(*toy(48, 64, 3, 48))
    W = run.model.layer.weight.detach()
    assert mask(run) == set(W.abs().flatten().topk(k).indices.tolist())
    U, _, Vh = torch.linalg.svd(W.double())
    product = U[:, 0].abs()[:, None] * Vh[0].abs()
    assert mask(build(*toy(48, 64, 3, 1))) == set(product.flatten().topk(k).indices.tolist())


def test_a_block_is_found_that_magnitude_misses() -> None:
    rng = torch.Generator().manual_seed(0)
    W = 0.01 * torch.randn(64, 64, generator=rng)
    W[:8, :8] += 0.5
    rows, cols = torch.randint(8, 64, (2, 400), generator=rng)
    spikes = list(dict.fromkeys((rows * 64 + cols).tolist()))[:64]
    W.view(-1)[spikes] += 1.0
    block = {i * 64 + j for i in range(8) for j in range(8)}
    # 128 numbers are the smallest budget here (64 + 64): its upper half is looked at
    run = with_weight(W, *toy(64, 64, 1, 1))
    U, S, Vh = torch.linalg.svd(W)
    score = (S[0] * U[:, 0].outer(Vh[0])).abs().flatten()
    chosen = torch.tensor(sorted(mask(run)))
    top = set(chosen[score[chosen].topk(64).indices].tolist())
    assert top == block
    magnitude = set(W.abs().flatten().topk(64).indices.tolist())
    assert magnitude == set(spikes)
    assert not magnitude & block


def test_every_matrix_has_its_own_count() -> None:
    run = build("method=lift", *SMALL, "method.lift.rank_budget=3", "method.lift.filter_rank=8")
    method = run.stack.methods[0]
    assert set(method.chosen) == {f"model.layers.{i}.{n}" for i in (0, 1) for n in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    )}  # fmt: skip
    for name, chosen in method.chosen.items():
        m, n = run.model.get_parameter(f"{name}.weight").shape
        assert len(chosen.index) == len(chosen.index.unique()) == min((m + n) * 3, m * n)
    run.fit_steps, run.optimizer = 9, run.build_optimizer()
    run.update(run.window(0))
    for name, chosen in method.chosen.items():
        m, n = run.model.get_parameter(f"{name}.weight").shape
        state = run.optimizer.state[chosen.values]
        assert sum(t.numel() for t in state.values() if isinstance(t, Tensor)) == 2 * min((m + n) * 3, m * n)
    assert len(run.optimizer.state) == len(method.chosen) == len(run.trainable())
    capped = build(*toy(6, 4, 50, 2))
    assert mask(capped) == set(range(24))


def test_randomized_svd_differs_in_borderline_entries_only() -> None:
    rng = torch.Generator().manual_seed(3)
    W = torch.randn(96, 6, generator=rng) @ torch.randn(6, 80, generator=rng) + 0.3 * torch.randn(96, 80, generator=rng)
    exact = mask(with_weight(W, *toy(96, 80, 4, 6)))
    near = mask(with_weight(W, *toy(96, 80, 4, 6, "method.lift.svd=randomized")))
    assert len(exact & near) > 0.98 * len(exact)
    assert len(mask(with_weight(W, *toy(96, 80, 4, 80))) & exact) < 0.95 * len(exact)


# -- the step ----------------------------------------------------------------------------------------------------------


def dense_adam(W: Tensor, gradient: Any, lr: float, steps: int, *, b1: float, b2: float, eps: float, decay: float) -> Tensor:
    """Adam over a whole matrix with eps outside the bias correction, and decay of the moved weight."""
    m, v = torch.zeros_like(W), torch.zeros_like(W)
    for t in range(1, steps + 1):
        g = gradient(W, t - 1)
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g
        W = W - lr * (1 - b2**t) ** 0.5 / (1 - b1**t) * m / (v.sqrt() + eps)
        W = W - lr * decay * W
    return W


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_budget_of_everything_is_dense_adam(decay: float) -> None:
    words = toy(
        12, 10, 50, 3, *STEADY, "model.dtype=float64", "optimizer.lr=0.02", "method.lift.eps=0.05", f"optimizer.weight_decay={decay}"
    )
    run = build(*words, "method.lift.update_interval=4")
    start = run.model.layer.weight.detach().clone()

    def gradient(W: Tensor, step: int) -> Tensor:
        rows = [run.data["train"][i] for batch in run.window(step) for i in batch["example"].tolist()]
        x, y = (torch.stack([row[name] for row in rows]) for name in ("x", "y"))
        return (x @ W.T - y).T @ x / len(x)

    run.fit(7)
    run.stack.finish(run)
    wanted = dense_adam(start, gradient, 0.02, 7, b1=0.9, b2=0.95, eps=0.05, decay=decay)
    assert run.events["reselections"] == 2
    assert (wanted - start).abs().max() > 0.05
    assert torch.allclose(run.model.layer.weight, wanted, atol=1e-12, rtol=0)


def test_only_chosen_entries_move_and_they_move_as_in_dense_adam() -> None:
    words = toy(20, 16, 2, 3, *STEADY, "model.dtype=float64", "optimizer.lr=0.01")
    run, free = build(*words), build("method=full", *(w for w in words if "lift" not in w))
    start, chosen = run.model.layer.weight.detach().clone(), torch.tensor(sorted(mask(run)))
    run.gradients(run.window(0))
    free.gradients(free.window(0))
    g = free.model.layer.weight.grad
    assert torch.allclose(run.stack.methods[0].chosen["layer"].values.grad, g.flatten()[chosen], atol=1e-14)
    run.fit(1)
    run.stack.finish(run)
    moved = run.model.layer.weight.detach() - start
    outside = torch.ones(start.numel(), dtype=torch.bool)
    outside[chosen] = False
    assert (moved.flatten()[outside] == 0).all()
    wanted = dense_adam(start, lambda W, t: g, 0.01, 1, b1=0.9, b2=0.95, eps=1e-6, decay=0.0) - start
    assert torch.allclose(moved.flatten()[chosen], wanted.flatten()[chosen], atol=1e-12)


# -- selections --------------------------------------------------------------------------------------------------------


def follow(run: Run, steps: int) -> list[dict[str, Any]]:
    """Update by update: the mask, the weight and Adam's memory by position, after it."""
    run.fit_steps, run.optimizer = steps, run.build_optimizer()
    out = []
    for _ in range(steps):
        run.update(run.window(run.step))
        method = run.stack.methods[0]
        method.finish(run)  # values into the weight
        chosen = method.chosen["layer"]
        state = run.optimizer.state[chosen.values]
        memory = {key: dict(zip(chosen.index.tolist(), state[key].tolist(), strict=True)) for key in ("m", "v")}
        out.append({"mask": mask(run), "weight": run.model.layer.weight.detach().clone(), "t": state["t"], **memory})
    return out


def test_reselection_is_due_one_update_before_the_interval_and_reads_the_current_weight() -> None:
    run = build(*toy(20, 16, 2, 2, *STEADY, "optimizer.lr=0.03", interval=5))
    k = (20 + 16) * 2
    pretrained = run.model.layer.weight.detach().numpy().copy()
    assert mask(run) == principal(pretrained, 2, k)
    seen = follow(run, 15)
    changes = [
        step for step in range(1, 16) if seen[step - 1]["mask"] != (seen[step - 2]["mask"] if step > 1 else principal(pretrained, 2, k))
    ]
    assert changes == [4, 9, 14]
    for step in changes:
        assert seen[step - 1]["mask"] == principal(seen[step - 1]["weight"].numpy(), 2, k)
        assert seen[step - 1]["mask"] != principal(pretrained, 2, k)
    assert run.events["reselections"] == 3


def test_bits_outside_the_mask_stand_still_and_all_change_lies_in_the_union() -> None:
    run = build(*toy(20, 16, 2, 2, *STEADY, "optimizer.lr=0.03", interval=5))
    start, union = run.model.layer.weight.detach().clone(), mask(run)
    before, allowed = start, mask(run)
    for now in follow(run, 15):
        changed = set((now["weight"] != before).flatten().nonzero().flatten().tolist())
        assert changed
        assert changed <= allowed
        before, allowed = now["weight"], now["mask"]
        union |= now["mask"]
    total = set((before != start).flatten().nonzero().flatten().tolist())
    k = (20 + 16) * 2
    assert k < len(total) <= 4 * k
    assert total <= union
    ever = set(run.stack.methods[0].ever["layer"].tolist())
    assert ever == union


def test_moments_stay_with_their_entries_and_the_counter_goes_on() -> None:
    run = build(*toy(20, 16, 2, 2, *STEADY, "optimizer.lr=0.03", interval=5))
    method = run.stack.methods[0]
    taken: list[dict[str, Any]] = []
    reselect = method.reselect

    def watch(run: Run, name: str, part: Any) -> None:
        chosen = method.chosen[name]
        state = run.optimizer.state[chosen.values]
        taken.append({key: dict(zip(chosen.index.tolist(), state[key].tolist(), strict=True)) for key in ("m", "v")} | {"t": state["t"]})
        reselect(run, name, part)

    method.reselect = watch
    seen = follow(run, 10)
    for step, then in zip((4, 9), taken, strict=True):
        now = seen[step - 1]
        stay, new = now["m"].keys() & then["m"].keys(), now["m"].keys() - then["m"].keys()
        assert len(stay) > 10 and new
        for key in ("m", "v"):
            assert all(now[key][p] == then[key][p] != 0 for p in stay)
            assert all(now[key][p] == 0 for p in new)
        assert now["t"] == then["t"] == step
    assert seen[-1]["t"] == 10


# -- settings ----------------------------------------------------------------------------------------------------------


def test_settings_are_the_papers() -> None:
    settings = compose(["method=lift", "model=toy", "optimizer.lr=0.2", "schedule.warmup=2"])
    assert (settings.schedule.name, settings.method.lift.betas, settings.method.lift.eps) == ("linear", [0.9, 0.95], 1e-6)
    run = build(*toy(8, 8, 1, 2, "optimizer.lr=0.3", "schedule.warmup=2"))
    rates = []
    set_rate = run.set_rate
    run.set_rate = lambda: (set_rate(), rates.append(run.optimizer.param_groups[0]["lr"]))
    run.fit(7)
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.24, 0.18, 0.12, 0.06])
    with pytest.raises(UserError, match="brings its own optimizer"):
        compose(["method=lift", "model=toy", "optimizer=sgd"])


def test_resumed_run_is_bit_equal(tmp_path: Path) -> None:
    words = ("method=lift", *SMALL, "method.lift.rank_budget=2", "method.lift.filter_rank=4", "method.lift.update_interval=5")
    run = check_resume(*words, "optimizer.lr=3e-3", "trainer.max_steps=13", folder=tmp_path, at=8)
    assert run.events["reselections"] == 2
    assert all(len(ever) > len(run.stack.methods[0].chosen[n].index) for n, ever in run.stack.methods[0].ever.items())


def test_merged_model_is_the_trained_one(tmp_path: Path) -> None:
    words = (*toy(20, 16, 2, 2, "optimizer.lr=0.03", "trainer.max_steps=12", interval=5), "trainer.batch=16")
    run = train(*words, folder=tmp_path)
    again = Run.open(tmp_path, data=True)
    window = again.window(0)
    before = again.loss(window)
    merged = again.merge()
    assert type(merged.layer) is torch.nn.Linear
    assert torch.equal(before, run.loss(run.window(0)))
    assert torch.equal(weights(again)["layer.weight"], run.model.layer.weight)
    assert torch.equal(again.loss(window), before)


# -- what it is for ----------------------------------------------------------------------------------------------------


def test_it_learns_a_low_rank_task_better_than_as_many_entries_of_largest_magnitude() -> None:
    """The task lives where a strong low-rank part of the weight is, under large isolated entries: principal weights reach it."""
    rng = torch.Generator().manual_seed(0)
    u, v = torch.zeros(32), torch.zeros(32)
    u[:6], v[:6] = 1.0, 1.0
    W = 0.7 * u.outer(v) + 0.01 * torch.randn(32, 32, generator=rng)
    for _ in range(3):  # in no direction together
        W[torch.arange(6, 32), 6 + torch.randperm(26, generator=rng)] = 1.0 - 2.0 * torch.randint(0, 2, (26,), generator=rng)
    change = 0.5 * (u * torch.randn(32, generator=rng)).outer(v)
    data = toy_data("block", torch.eye(32), (W + change).T)
    words = ("trainer.batch=32", "optimizer.lr=0.02", f"data={data}")
    losses = []
    for rank in (1, 32):
        run = with_weight(W, *(w for w in toy(32, 32, 1, rank, *words, interval=500) if not w.startswith("data.")))
        first = run.loss(run.window(0))
        run.fit(150)
        losses.append(float(run.loss(run.window(0)) / first))
    assert losses[0] < 0.02
    assert losses[1] > 0.5
