"""Diff pruning: gates learn which entries differ, the difference is cut by magnitude, its survivors are tuned."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tools import SMALL, build, check_resume, toy_data, train, tuned, weights
from torch import Tensor

from ftrecipes.compose import compose
from ftrecipes.errors import RunFailed, UserError
from ftrecipes.methods.selection.diff_pruning import DiffPruning, cut, draw
from ftrecipes.run import Run

MUTATION = (
    "ftrecipes/methods/selection/diff_pruning.py",
    "diff.a.grad = g * diff.w * z_group * self.slope(diff.s)",
    "diff.a.grad = g * diff.w * z_group * z * (1 - z)",
)

STEADY = ("schedule=constant", "schedule.warmup=0")


def knobs(**values: Any) -> tuple[str, ...]:
    return tuple(f"method.diff_pruning.{name}={str(value).lower()}" for name, value in values.items())


def toy(*words: str, **values: Any) -> Run:
    sizes = ("model.inputs=12", "model.outputs=10", "data.inputs=12", "data.outputs=10", "trainer.batch=16")
    return build("method=diff_pruning", "model=toy", "model.dtype=float64", *sizes, *STEADY, *knobs(**values), *words)


def diff_of(run: Run, name: str = "layer.weight") -> Any:
    return run.stack.methods[0].diffs[name]


def start(run: Run, steps: int = 100) -> Run:
    run.fit_steps, run.optimizer = steps, run.build_optimizer()
    return run


def update(run: Run) -> None:
    run.update(run.window(run.step))


# -- gates -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("a", [-2.0, 0.0, 1.0, 5.0])
def test_law_of_the_gates(a: float) -> None:
    method = toy().stack.methods[0]
    assert isinstance(method, DiffPruning)
    z = method.stretch(draw(torch.full((1_000_000,), a, dtype=torch.float64), torch.Generator().manual_seed(0)))

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    share = (z == 0).double().mean(), (z == 1).double().mean()
    # s <= 1/2 closes a gate, s >= 5/6 opens it; u stays within [1e-4, 1 - 1e-4]
    assert float(share[0]) == pytest.approx(sigmoid(-a), abs=0.003)
    assert float(share[1]) == pytest.approx(sigmoid(a - math.log(5)), abs=0.003)
    assert float(method.open(torch.tensor(a))) == pytest.approx(sigmoid(a))


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize("form", ["sum", "product"])
def test_gradients_are_those_of_autograd_through_the_gates_and_the_penalty(structured: bool, form: str) -> None:
    run = start(toy(structured=structured, penalty_form=form, sparsity_pen=0.003, alpha_init=0.5))
    method, diff = run.stack.methods[0], diff_of(run)
    rng = torch.Generator().manual_seed(3)
    diff.w.copy_(torch.randn(10, 12, generator=rng, dtype=torch.float64))
    diff.a.copy_(torch.randn(10, 12, generator=rng, dtype=torch.float64))
    clipped = False
    for run.step in range(6):
        method.begin(run)
        run.gradients(run.window(0))
        method.gradients_of_gates(run)
        w, a = diff.w.clone().requires_grad_(), diff.a.clone().requires_grad_()
        group = torch.full((1,), 0.5, dtype=torch.float64, requires_grad=True)
        u = torch.logit(diff.s) - diff.a  # what was drawn
        z = (torch.sigmoid(u + a) * 3 - 1.5).clamp(0, 1)
        if structured:
            z = (torch.sigmoid(torch.logit(diff.s_group) - 0.5 + group) * 3 - 1.5).clamp(0, 1) * z
        theta = diff.pre + z * w
        assert torch.allclose(run.model.layer.weight, theta, atol=1e-14)
        x, y = zip(
            *((run.data["train"][i]["x"], run.data["train"][i]["y"]) for b in run.window(0) for i in b["example"].tolist()), strict=True
        )
        loss = 0.5 * (torch.stack(x) @ theta.T - torch.stack(y)).square().sum() / len(x)
        open_, of_group = torch.sigmoid(a), torch.sigmoid(group)
        parts = open_.sum() * of_group if form == "product" and structured else open_.sum() + (of_group if structured else 0.0)
        (loss + 0.003 * parts.sum()).backward()
        assert torch.allclose(diff.w.grad, w.grad, atol=1e-6)
        assert torch.allclose(diff.a.grad, a.grad, atol=1e-6)
        if structured:
            assert torch.allclose(diff.group.grad, group.grad, atol=1e-6)
        shut = (z == 0) | (z == 1)
        if shut.any() and form == "sum":
            alone = 0.003 * (open_ * (1 - open_)).detach()
            assert torch.allclose(diff.a.grad[shut], alone[shut], atol=1e-15)
            clipped = True
    assert clipped or form == "product"


def test_one_draw_serves_a_whole_update_and_the_next_takes_another() -> None:
    seen = []
    for micro in (16, 4):
        run = start(toy(f"hardware.micro_batch={micro}", alpha_init=0.0))
        diff_of(run).w.fill_(0.1)
        run.stack.begin(run)
        before = run.model.layer.weight.detach().clone()
        grads = run.gradients(run.window(0)), run.model.layer.weight.grad.clone()
        assert run.model.layer.weight.equal(before)
        seen.append((before, grads[1]))
        run.step = 1
        run.stack.begin(run)
        assert not run.model.layer.weight.equal(before)
    assert seen[0][0].equal(seen[1][0])
    assert torch.allclose(seen[0][1], seen[1][1], atol=1e-12)


def test_open_gates_without_penalty_are_adamw() -> None:
    """a = 50 opens every gate: the difference moves as full fine-tuning does, clipping included."""
    for clip in (1000.0, 0.5):
        run = start(toy("optimizer.lr=0.01", "optimizer.weight_decay=0", alpha_init=50.0, sparsity_pen=0.0, max_grad_norm=clip))
        sizes = ("model.inputs=12", "model.outputs=10", "data.inputs=12", "data.outputs=10", "trainer.batch=16", f"trainer.clip={clip}")
        full = start(
            build("method=full", "model=toy", "model.dtype=float64", *sizes, *STEADY, "optimizer.lr=0.01", "optimizer.betas=[0.9,0.999]")
        )
        for _ in range(10):
            update(run)
            update(full)
        assert (full.model.layer.weight - diff_of(run).pre).abs().max() > 0.05
        assert torch.allclose(diff_of(run).pre + diff_of(run).w, full.model.layer.weight, atol=1e-12, rtol=0 if clip == 1000.0 else 1e-5)


def test_penalty_alone_closes_gates_at_a_constant_rate() -> None:
    """Where nothing differs yet, a logit sees lambda s(a) (1 - s(a)) and Adam's full rate, whatever the schedule does."""
    run = start(toy("optimizer.lr=0", "schedule=linear", sparsity_pen=0.001, max_grad_norm=1e9), steps=20)
    a = torch.full((1,), 5.0, dtype=torch.float64)
    adam = torch.optim.AdamW([a], lr=0.1, weight_decay=0.0)
    for _ in range(19):
        update(run)
        a.grad = 0.001 * torch.sigmoid(a) * (1 - torch.sigmoid(a))
        adam.step()
        assert torch.allclose(diff_of(run).a, a.expand(10, 12), atol=1e-12)
    assert float(a) < 3.1
    assert [g["lr"] for g in run.optimizer.parts[0].param_groups] == [0.0]


def test_authors_loop_gives_the_same_differences_and_logits() -> None:
    """Their script's update, written out for one tensor on the draws that were made here."""
    run = start(toy("optimizer.lr=0.02", "schedule=linear", sparsity_pen=0.002, alpha_init=1.0, max_grad_norm=0.3), steps=12)
    diff = diff_of(run)
    w, a, group = torch.zeros(10, 12).double(), torch.ones(10, 12).double(), torch.ones(1).double()
    of_w = torch.optim.AdamW([w], lr=0.02, weight_decay=0.0)
    of_gates = torch.optim.AdamW([a, group], lr=0.1, weight_decay=0.0)
    for step in range(8):
        update(run)
        z, dz = (diff.s * 3 - 1.5).clamp(0, 1), 3 * diff.s * (1 - diff.s) * ((diff.s * 3 - 1.5 > 0) & (diff.s * 3 - 1.5 < 1))
        s = diff.s_group
        z2, dz2 = (s * 3 - 1.5).clamp(0, 1), 3 * s * (1 - s) * ((s * 3 - 1.5 > 0) & (s * 3 - 1.5 < 1))
        theta = (diff.pre + z2 * z * w).requires_grad_()
        x, y = zip(
            *((run.data["train"][i]["x"], run.data["train"][i]["y"]) for b in run.window(step) for i in b["example"].tolist()), strict=True
        )
        (0.5 * (torch.stack(x) @ theta.T - torch.stack(y)).square().sum() / len(x)).backward()
        g = theta.grad
        w.grad, a.grad = g * (z * z2), g * (w * z2) * dz + 0.002 * torch.sigmoid(a) * (1 - torch.sigmoid(a))
        group.grad = (g * (w * z) * dz2).sum() + 0.002 * torch.sigmoid(group) * (1 - torch.sigmoid(group))
        torch.nn.utils.clip_grad_norm_([w], 0.3)
        torch.nn.utils.clip_grad_norm_([a, group], 0.3)
        of_w.param_groups[0]["lr"] = 0.02 * (1 - step / 12)
        of_w.step()
        of_gates.step()
        assert (
            torch.allclose(diff.w, w, atol=1e-10)
            and torch.allclose(diff.a, a, atol=1e-10)
            and torch.allclose(diff.group, group, atol=1e-10)
        )
    assert w.abs().max() > 0.05


def test_the_head_has_no_gate_and_logits_do_not_decay() -> None:
    run = build("method=diff_pruning", "model=toy", "model.kind=two_layer", "optimizer.weight_decay=0.5", "optimizer.lr=0.01", *STEADY)
    assert set(run.stack.methods[0].diffs) == {"first.weight"}
    start(run)
    groups = run.optimizer.param_groups
    assert [g["weight_decay"] for g in groups if any(p is run.model.layer.weight for p in g["params"])] == [0.5]
    assert groups[-1]["weight_decay"] == 0.0 and groups[-1]["lr"] == 0.1
    head = run.model.layer.weight.detach().clone()
    update(run)
    assert not run.model.layer.weight.equal(head)
    language = build("method=diff_pruning", *SMALL)
    assert set(language.stack.methods[0].diffs) == {n for n, _ in language.model.named_parameters()}


# -- projection and the last stage -------------------------------------------------------------------------------------


def test_cut() -> None:
    rng = torch.Generator().manual_seed(0)
    sizes = [torch.rand(n, generator=rng) for n in (50, 1000, 7)]
    together = torch.cat(sizes)
    for k in (0, 1, 13, 500, 1057):
        below, threshold = cut(sizes, k)
        assert int((together > threshold).sum()) == k
        assert k == 1057 or int((together > below).sum()) == k + 1
    below, threshold = cut([torch.ones(9)], 4)
    assert (torch.ones(9) > below).all() and not (torch.ones(9) > threshold).any()  # equal ones lie between


def test_threshold_is_global_and_the_last_stage_starts_from_w() -> None:
    run = start(build("method=diff_pruning", *SMALL, *STEADY, "optimizer.lr=0.01", *knobs(target_sparsity=0.02, alpha_init=1.0)))
    for _ in range(4):
        update(run)
    method = run.stack.methods[0]
    method.draw(run)
    diffs = {n: (d.theta.detach() - d.pre, d.w.clone(), d.pre.clone()) for n, d in method.diffs.items()}
    k = int(0.02 * sum(d.numel() for d, _, _ in diffs.values()))
    found = method.project(run)
    least = torch.cat([d.abs().flatten() for d, _, _ in diffs.values()]).sort(descending=True).values[k - 1]
    assert found["kept"] == k
    shares, other = [], False
    for name, (difference, w, pre) in diffs.items():
        diff = method.diffs[name]
        keep = torch.zeros(w.numel(), dtype=torch.bool)
        keep[diff.index] = True
        keep = keep.view_as(w)
        assert (difference.abs()[keep] >= least).all() and (difference.abs()[~keep] <= least).all()
        assert run.model.get_parameter(name).equal(torch.where(keep, pre + w, pre))
        shares.append(float(keep.float().mean()))
        other |= bool((keep & ((difference - w).abs() > 1e-4)).any())
    assert max(shares) > 4 * min(shares)  # one threshold for all tensors
    assert other  # some gate that was half open: not its product is taken over


def test_last_stage_moves_only_the_mask() -> None:
    run = build(
        "method=diff_pruning", *SMALL, *STEADY, "optimizer.lr=0.01", "trainer.max_steps=6", *knobs(target_sparsity=0.02, fixmask_lr_scale=3)
    )
    base = weights(run)
    between: dict[str, Tensor] = {}
    rates = []
    project, set_rate = run.stack.methods[0].project, run.set_rate
    run.stack.methods[0].project = lambda r: (project(r), between.update(weights(r)))[0]
    run.set_rate = lambda: (set_rate(), rates.append(run.optimizer.param_groups[0]["lr"]))
    run.stack.drive(run, run.fit)
    run.stack.finish(run)
    moved = 0
    for name, diff in run.stack.methods[0].diffs.items():
        now = run.model.get_parameter(name).detach()
        inside = torch.zeros(now.numel(), dtype=torch.bool)
        inside[diff.index] = True
        assert now.flatten()[~inside].equal(base[name].flatten()[~inside])
        moved += int((now != between[name]).sum())
        assert len(diff.logits()) == 0
    assert moved > 0.9 * sum(len(d.index) for d in run.stack.methods[0].diffs.values())
    assert rates == pytest.approx([0.01] * 3 + [0.03] * 3)
    assert run.events == {"draws": 3, "projections": 1}


def test_nothing_left_is_an_error() -> None:
    run = start(toy(target_sparsity=0.001))
    update(run)
    with pytest.raises(RunFailed, match=r"none is left; raise method\.diff_pruning\.target_sparsity"):
        run.stack.methods[0].project(run)
    with pytest.raises(UserError, match="l < 0 and r >= 1"):
        toy(concrete="[0.0,1.5]")
    with pytest.raises(UserError, match=r"trainer\.clip"):
        compose(["method=diff_pruning", "model=toy", "trainer.clip=1.0"])


# -- the record --------------------------------------------------------------------------------------------------------


def test_sparse_record_is_the_tuned_model_bit_for_bit(tmp_path: Path) -> None:
    run = train("method=diff_pruning", *SMALL, "optimizer.lr=0.01", "trainer.max_steps=6", *knobs(target_sparsity=0.01), folder=tmp_path)
    entries = sum(p.numel() for p in run.model.parameters())
    held = tuned(tmp_path)
    index = [t for name, t in held.items() if name.endswith("/index")]
    assert 0 < sum(len(i) for i in index) <= int(0.01 * entries)
    assert sum(t.numel() for t in held.values()) < 0.025 * entries
    opened = Run.open(tmp_path)
    assert all(w.equal(weights(run)[n]) for n, w in weights(opened).items())
    start_ = run.pristine().state_dict()
    changed = sum(int((w != start_[n]).sum()) for n, w in weights(opened).items())
    assert changed <= sum(len(i) for i in index)
    assert type(opened.merge()).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("at", [5, 10])
def test_resumed_run_is_bit_equal_in_both_stages(at: int, tmp_path: Path) -> None:
    words = ("method=diff_pruning", *SMALL, "optimizer.lr=0.01", "trainer.max_steps=13", *knobs(target_sparsity=0.02))
    run = check_resume(*words, folder=tmp_path, at=at)
    assert run.events == {"draws": 7, "projections": 1}


# -- what it is for ----------------------------------------------------------------------------------------------------


def test_it_finds_the_five_entries_that_differ() -> None:
    rng = torch.Generator().manual_seed(1)
    base = Run(compose(["method=full", "model=toy", "model.inputs=200", "model.outputs=1"]))
    base.load_model()
    W = base.model.layer.weight.detach().clone()
    places = torch.randperm(200, generator=rng)[:5]
    change = torch.zeros(200)
    change[places] = torch.tensor([0.6, -0.8, 1.0, -1.2, 0.7])
    x = torch.randn(512, 200, generator=rng)
    data = toy_data("five", x, x @ (W + change).T)
    words = ("model=toy", "model.inputs=200", "model.outputs=1", f"data={data}", "trainer.batch=64", "optimizer.lr=0.01", *STEADY)
    run = start(build("method=diff_pruning", *words, "trainer.max_steps=1500", *knobs(sparsity_pen=0.01, structured=False)))
    for _ in range(1500):
        update(run)
    diff = diff_of(run)
    assert float(torch.sigmoid(diff.a).sum()) < 7
    assert set(((diff.theta - diff.pre).abs().flatten().topk(5).indices).tolist()) == set(places.tolist())
    assert torch.allclose((diff.theta - diff.pre).flatten()[places], change[places], atol=0.15)
