"""GMT: at every update only the largest entries of each tensor's gradient reach the optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tools import SMALL, build, check_resume, toy_data, weights
from torch import Tensor

from ftrecipes.compose import compose
from ftrecipes.run import Run

MUTATION = ("ftrecipes/methods/gradients/gmt.py", "keep = magnitude >= (threshold", "keep = magnitude <= (threshold")

PLAIN = ("optimizer=sgd", "schedule=constant", "schedule.warmup=0", "trainer.clip=.inf")


def masked(run: Run, step: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The gradients of a window before and after the stack's rules."""
    window = run.window(step)
    run.gradients(window)
    before = {name: p.grad.clone() for name, p in run.trainable().items()}
    run.stack.gradients(run, window)
    return before, {name: p.grad.clone() for name, p in run.trainable().items()}


@pytest.mark.parametrize("ratio", [0.001, 0.2, 0.75])
def test_density(ratio: float) -> None:
    """Llama's embedding has rows without gradient: there every entry that has one may survive, and no other."""
    untied = [w.replace("num_hidden_layers:2", "num_hidden_layers:2,tie_word_embeddings:false") for w in SMALL]
    run = build("method=gmt", f"method.gmt.keep_ratio={ratio}", *untied)
    before, after = masked(run)
    assert (before["model.embed_tokens.weight"] == 0).float().mean() > 0.5
    for name, grad in before.items():
        k = max(1, round(ratio * grad.numel()))
        kept = after[name] != 0
        assert kept.sum() == min(k, int((grad != 0).sum())), name
        assert torch.equal(after[name][kept], grad[kept])
        if not kept.all():
            assert grad[kept].abs().min() >= grad[~kept].abs().max()
    assert any(round(ratio * g.numel()) < 1 for g in before.values()) == (ratio == 0.001)
    nonzero = sum(int((g != 0).sum()) for g in after.values())
    assert run._row["gmt/density"] == pytest.approx(nonzero / sum(g.numel() for g in after.values()))
    assert run.events["masks"] == len(before)


def test_default_is_a_fifth_of_each_tensor() -> None:
    run = build("method=gmt", "model=toy", "model.kind=two_layer", "model.bias=true")
    before, after = masked(run)
    assert {n: int((g != 0).sum()) for n, g in after.items()} == {n: round(0.2 * g.numel()) for n, g in before.items()}
    assert len(before) == 4


def test_one_threshold_for_all_tensors() -> None:
    for words in (SMALL, ("model=toy", "model.kind=two_layer", "model.dtype=float64")):
        run = build("method=gmt", "method.gmt.scope=global", "method.gmt.keep_ratio=0.1", *words)
        before, after = masked(run)
        flat, kept = torch.cat([g.flatten() for g in before.values()]), torch.cat([g.flatten() for g in after.values()])
        k = round(0.1 * flat.numel())
        exact = flat.abs().topk(k).values.min()
        # a histogram finds the threshold: at most a few entries at it may be too many
        assert k <= int((kept != 0).sum()) <= k + 2
        assert torch.equal(kept[flat.abs() >= exact], flat[flat.abs() >= exact])
        shares = [float((g != 0).float().mean()) for g in after.values()]
        assert max(shares) > 2 * min(shares)  # no share of its own for any tensor


def test_global_threshold_of_bfloat16_weights() -> None:
    run = build("method=gmt", "method.gmt.scope=global", "method.gmt.keep_ratio=0.1", *SMALL, "hardware.precision=bf16")
    before, after = masked(run)
    assert next(iter(before.values())).dtype == torch.bfloat16
    kept = sum(int((g != 0).sum()) for g in after.values())
    least = min(float(g[g != 0].abs().min()) for g in after.values() if (g != 0).any())
    tied = sum(int((g.abs() == least).sum()) for g in before.values())
    k = round(0.1 * sum(g.numel() for g in before.values()))
    assert k <= kept < k + tied


def test_skipped_names_are_not_masked() -> None:
    run = build("method=gmt", "method.gmt.skip=[embed,norm]", *SMALL)
    before, after = masked(run)
    for name, grad in before.items():
        assert torch.equal(grad, after[name]) == ("embed" in name or "norm" in name)


# -- limits ------------------------------------------------------------------------------------------------------------


def test_keeping_everything_is_full_tuning_bit_for_bit() -> None:
    words = (*SMALL, "optimizer.lr=1e-3", "optimizer.weight_decay=0.1")
    kept, full = build("method=gmt", "method.gmt.keep_ratio=1.0", *words), build("method=full", *words)
    kept.fit(5)
    full.fit(5)
    assert all(torch.equal(a, weights(full)[name]) for name, a in weights(kept).items())
    fifth = build("method=gmt", *words)
    fifth.fit(5)
    assert not torch.equal(weights(fifth)["model.norm.weight"], weights(full)["model.norm.weight"])


def test_sgd_with_one_entry_moves_one_entry_of_each_tensor() -> None:
    run = build(
        "method=gmt", "method.gmt.keep_ratio=1e-9", "model=toy", "model.kind=two_layer", "model.bias=true", *PLAIN, "optimizer.lr=0.1"
    )
    run.gradients(run.window(0))
    grads = {name: p.grad.clone() for name, p in run.trainable().items()}
    before = weights(run)
    run.fit(1)
    for name, now in weights(run).items():
        (at,) = (now != before[name]).flatten().nonzero()
        assert at == grads[name].abs().argmax()
        assert torch.allclose(now.flatten()[at], before[name].flatten()[at] - 0.1 * grads[name].flatten()[at])


def test_under_adamw_masked_entries_move_by_momentum_unless_undone() -> None:
    words = ("method=gmt", "method.gmt.keep_ratio=0.1", "model=toy", "trainer.batch=8", "optimizer.lr=0.01", "optimizer.weight_decay=0.1")
    counts = {}
    for undo in (False, True):
        run = build(*words, f"method.gmt.mask_update={str(undo).lower()}")
        run.fit_steps, run.optimizer = 20, run.build_optimizer()
        for step in range(3):
            _, after = masked(run, step)
            before = weights(run)
            run.update(run.window(step))
            moved = weights(run)["layer.weight"] != before["layer.weight"]
            counts[undo] = int(moved.sum())
            if undo:
                assert torch.equal(moved, after["layer.weight"] != 0)
    assert counts[True] == round(0.1 * 256)
    assert counts[False] == 256  # decay and momentum reach every entry


def test_clipping_comes_after_the_mask() -> None:
    run = build(
        "method=gmt", "method.gmt.keep_ratio=0.05", "model=toy", *PLAIN[:-1], "trainer.clip=0.01", "optimizer.lr=1.0", "model.dtype=float64"
    )
    _, after = masked(run)
    before = weights(run)["layer.weight"]
    run.fit(1)
    step = before - weights(run)["layer.weight"]
    assert step.norm() == pytest.approx(0.01, rel=1e-3)
    assert torch.allclose(step / step.norm(), after["layer.weight"] / after["layer.weight"].norm(), atol=1e-9)


# -- the window --------------------------------------------------------------------------------------------------------


def test_micro_batches_are_masked_once() -> None:
    words = ("method=gmt", *SMALL, *PLAIN, "optimizer.lr=0.1")
    steps = {}
    for micro in (8, 2):
        run = build(*words, f"hardware.micro_batch={micro}")
        assert len(run.window(0)) == 8 // micro
        before = weights(run)
        run.fit(1)
        steps[micro] = {n: w - before[n] for n, w in weights(run).items()}
    # a threshold that falls between two entries which rounding swaps may change a pair of them
    for name, step in steps[8].items():
        off = (step - steps[2][name]).abs() > 1e-6
        assert off.sum() <= 2, name
    # masking each micro-batch keeps other entries
    run = build(*words, "hardware.micro_batch=2")
    window, total = run.window(0), None
    for batch in window:
        single = run.window_of(run.data["train"], batch["example"].tolist())
        single.units = window.units
        run.gradients(single)
        run.stack.gradients(run, single)
        grads = {n: p.grad.clone() for n, p in run.trainable().items()}
        total = grads if total is None else {n: g + total[n] for n, g in grads.items()}
    name = "model.layers.0.mlp.down_proj.weight"
    assert (total[name] + steps[8][name] / 0.1).norm() > 0.1 * total[name].norm()


def test_entries_are_chosen_anew() -> None:
    """Inputs whose support changes halfway: what moves moves along."""
    x = torch.zeros(40, 20)
    rng = torch.Generator().manual_seed(0)
    x[:20, :10], x[20:, 10:] = torch.randn(20, 10, generator=rng), torch.randn(20, 10, generator=rng)
    y = x @ torch.randn(20, 1, generator=rng)
    data = toy_data("halves", x, y)
    run = build("method=gmt", "model=toy", f"data={data}", "model.inputs=20", "model.outputs=1", *PLAIN, "optimizer.lr=0.1")
    run.fit_steps, run.optimizer = 20, run.build_optimizer()
    train = run.data["train"]
    moved = []
    for half in (range(20), range(20, 40)):
        before = weights(run)["layer.weight"]
        for _ in range(10):
            run.update(run.window_of(train, list(half)))
        moved.append(set((weights(run)["layer.weight"] != before).flatten().nonzero().flatten().tolist()))
    assert moved[0] and moved[1]
    assert moved[0] <= set(range(10)) and moved[1] <= set(range(10, 20))
    assert all(len(m) > 4 for m in moved)  # more than the 4 entries of one mask


# -- what it is for ----------------------------------------------------------------------------------------------------


def regression(seed: int) -> tuple[Tensor, ...]:
    """60 noisy rows of 200 numbers of which 5 matter, and a test set without noise."""
    rng = torch.Generator().manual_seed(seed)
    w = torch.zeros(200)
    w[torch.randperm(200, generator=rng)[:5]] = 1 + torch.rand(5, generator=rng)
    x, held = torch.randn(60, 200, generator=rng), torch.randn(1000, 200, generator=rng)
    return x, (x @ w + 0.1 * torch.randn(60, generator=rng))[:, None], held, (held @ w)[:, None]


def error(seed: int, *words: str, fixed: Tensor | None = None) -> float:
    """Test error (mean squared) after 300 steps of gradient descent from zero."""
    x, y, held, truth = regression(seed)
    data = toy_data(f"sparse{seed}", x, y, test=(held, truth))
    sizes = ("model.inputs=200", "model.outputs=1", "trainer.batch=60", "trainer.eval_examples=1000")
    # half the squared error is what the toy takes: twice the rate is that of the mean squared error
    run = build(*words, "model=toy", f"data={data}", *sizes, *PLAIN, "optimizer.lr=0.1")
    run.model.layer.weight.data.zero_()
    if fixed is not None:
        run.model.layer.weight.register_hook(lambda g: g * fixed)
    run.fit(300)
    return run.evaluate("test")["mse"]


@pytest.mark.parametrize("seed", range(5))
def test_few_true_weights_are_found(seed: int) -> None:
    full = error(seed, "method=full")
    random = torch.zeros(1, 200)
    random[0, torch.randperm(200, generator=torch.Generator().manual_seed(seed))[:10]] = 1
    assert error(seed, "method=gmt", "method.gmt.keep_ratio=0.05") < 0.4 * full
    assert error(seed, "method=full", fixed=random) > full


def test_stacks_with_adapters_and_weighted_losses() -> None:
    run = build("method=[lora,dft,gmt]", *SMALL)
    before, after = masked(run)
    assert all("delta" in name for name in before)
    for name, grad in before.items():
        if (grad != 0).any():  # the factor beside the zero one has no gradient yet
            assert int((after[name] != 0).sum()) == round(0.2 * grad.numel())


@pytest.mark.parametrize("knobs", [(), ("method.gmt.scope=global", "method.gmt.mask_update=true")], ids=["tensor", "global"])
def test_resumed_run_is_bit_equal(knobs: tuple[Any, ...], tmp_path: Path) -> None:
    run = check_resume("method=gmt", *SMALL, *knobs, "trainer.max_steps=10", "optimizer.lr=1e-3", folder=tmp_path, at=8)
    assert run.events["masks"] == 10 * len(run.trainable())
    assert compose(["method=gmt"]).method.gmt.keep_ratio == 0.2
