"""PeriodicLoRA: stages whose updates add up beyond the adapter's rank, with everything but the weights started anew."""

from __future__ import annotations

import math

import pytest
import torch
from peers import Matrix, adapter, host, scramble
from tools import SMALL, build, check_resume, toy_data, train, weights
from torch import nn

from ftrecipes.method import Method
from ftrecipes.run import Run

MUTATION = (
    "ftrecipes/methods/adapters/periodic_lora.py",
    'run.generator("init", delta.layer.name, factor, len(self.stages))',
    'run.generator("init", delta.layer.name, factor)',
)


def small(*words: str) -> tuple[str, ...]:
    return (
        "method=periodic_lora", *SMALL, "method.periodic_lora.rank=2", "method.periodic_lora.alpha=4", "method.periodic_lora.stage_steps=3",
        "trainer.max_steps=9", "schedule.warmup=1", *words,
    )  # fmt: skip


def drive(run: Run) -> Run:
    """The whole training as a run drives it, without a record."""
    run.model.train()
    run.stack.drive(run, run.fit)
    return run


def logits(run: Run) -> torch.Tensor:
    with run.evaluating():
        return run.model(run.window(0).micros[0]["ids"]).logits


class Watch(Method):
    """Takes part after every update and remembers."""

    def __init__(self, look) -> None:
        super().__init__("watch", {})
        self.look = look

    def updated(self, run: Run) -> None:
        self.look(run)


def watch(run: Run, look) -> None:
    """Call `look(run)` after every update."""
    run.stack.methods.append(Watch(look))
    run.stack._taking_part["updated"].append(run.stack.methods[-1])


# -- what an unload does -----------------------------------------------------------------------------------------------


def test_an_unload_changes_weights_and_adapter_and_not_the_function():
    run = build(*small())
    scramble(run)
    method = adapter(run)
    before, w = logits(run), weights(run)
    with torch.no_grad():
        method.unload(run)
    torch.testing.assert_close(logits(run), before, atol=1e-5, rtol=0)
    for name, delta in method.deltas.items():
        assert not torch.equal(delta.layer.module.weight, w[f"{name}.weight"])
        assert not delta.B.any()
        assert not torch.equal(delta.A, w[f"{name}.delta.A"])
        torch.testing.assert_close(
            delta.layer.module.weight, w[f"{name}.weight"] + 2 * w[f"{name}.delta.B"] @ w[f"{name}.delta.A"], atol=1e-6, rtol=0
        )
    assert run.events == {"unloads": 1}


def test_the_update_has_rank_stages_times_r_and_is_the_sum_of_the_stages():
    """64 x 64 in float64, r = 2, four stages: rank 8, where LoRA has 2."""
    rng = torch.Generator().manual_seed(1)
    W, target = (torch.randn(64, 64, generator=rng, dtype=torch.float64) for _ in range(2))
    rows = toy_data("wide", torch.eye(64, dtype=torch.float64), target.T)
    shared = (f"data={rows}", "trainer.batch=64", "trainer.max_steps=40", "optimizer.lr=0.01")
    run = host(Matrix(W), "method=periodic_lora", *shared, "method.periodic_lora.rank=2", "method.periodic_lora.stage_steps=10",
               "method.periodic_lora.targets=[linear]")  # fmt: skip
    (delta,) = adapter(run).deltas.values()
    updates = []
    watch(run, lambda run: updates.append(delta.delta().detach().clone()) if run.fit_step == run.fit_steps else None)
    drive(run)
    change = run.merge().layer.weight - W
    assert len(updates) == 4
    torch.testing.assert_close(change, sum(updates), atol=1e-12, rtol=0)
    assert torch.linalg.matrix_rank(change) == 8
    lora = host(Matrix(W), "method=lora", *shared, "method.lora.rank=2", "method.lora.targets=[linear]")
    assert torch.linalg.matrix_rank(drive(lora).merge().layer.weight - W) == 2


def test_stages_reach_the_best_approximations_of_growing_rank():
    """Towards a delta of rank 8, the error after stage t is the target's tail beyond rank 2t, and nothing after four."""
    rng = torch.Generator().manual_seed(2)
    U, V = (torch.linalg.qr(torch.randn(16, 8, generator=rng, dtype=torch.float64)).Q for _ in range(2))
    s = torch.linspace(2, 1, 8, dtype=torch.float64)
    W = torch.randn(16, 16, generator=rng, dtype=torch.float64)
    rows = toy_data("stairs", torch.eye(16, dtype=torch.float64), (W + U @ torch.diag(s) @ V.T).T)
    shared = (f"data={rows}", "trainer.batch=16", "optimizer.lr=0.1", "schedule.warmup=0", "trainer.clip=.inf")
    run = host(Matrix(W), "method=periodic_lora", *shared, "trainer.max_steps=1600", "method.periodic_lora.rank=2",
               "method.periodic_lora.alpha=2", "method.periodic_lora.stage_steps=400", "method.periodic_lora.targets=[linear]")  # fmt: skip
    (delta,) = adapter(run).deltas.values()
    target = W + U @ torch.diag(s) @ V.T
    errors = []

    def look(run: Run) -> None:
        if run.fit_step == run.fit_steps:
            with torch.no_grad():
                errors.append(float((delta.final(run.model.layer.weight) - target).norm()))

    watch(run, look)
    drive(run)
    for error, r in zip(errors[:3], (2, 4, 6), strict=True):
        assert abs(error / float(s[r:].norm()) - 1) < 0.01
    assert errors[3] < 1e-6
    assert run.events["unloads"] == 4


# -- what starts anew --------------------------------------------------------------------------------------------------


def test_a_stage_begins_with_a_fresh_optimizer_and_schedule():
    """Adam's first update moves every number with a gradient by exactly the learning rate, which is the schedule's first."""
    run = build(*small("method.periodic_lora.stage_steps=4", "trainer.max_steps=12", "optimizer.eps=1e-30", "optimizer.lr=1e-2"))
    seen = []
    watch(run, lambda run: seen.append((run.fit_step, run.rate, {n: d.B.detach().clone() for n, d in adapter(run).deltas.items()})))
    drive(run)
    rates = [rate for _, rate, _ in seen]
    assert rates[:4] == rates[4:8] == rates[8:] and len(rates) == 12
    assert rates[0] == pytest.approx(1e-2 / 2)  # one update of warm-up: half way up
    assert rates[1] == pytest.approx(1e-2) and rates[3] < rates[2] < rates[1]
    for fit_step, rate, factors in seen:
        if fit_step == 1:
            for B in factors.values():
                moved = B[B != 0].abs()
                assert len(moved) > 0.9 * B.numel()
                torch.testing.assert_close(moved, torch.full_like(moved, rate), atol=1e-7, rtol=1e-4)


def test_every_stage_draws_an_a_of_its_own():
    """Equal draws would look for the next update among the same inputs. B is zero, so the first update leaves A as drawn."""
    run = build(*small())
    draws: dict[str, list[torch.Tensor]] = {name: [] for name in adapter(run).deltas}

    def look(run: Run) -> None:
        if run.fit_step == 1:
            for name, delta in adapter(run).deltas.items():
                draws[name].append(delta.A.detach().clone())

    watch(run, look)
    drive(run)
    for name, drawn in draws.items():
        bound = 1 / math.sqrt(drawn[0].shape[1])
        assert all(0.9 * bound < A.abs().max() <= bound for A in drawn)
        rows = torch.nn.functional.normalize(torch.cat(drawn))
        assert ((rows @ rows.T).fill_diagonal_(0).abs() < 0.6).all(), name


def test_one_long_stage_is_lora_bit_for_bit():
    lora = drive(build("method=lora", *SMALL, "method.lora.rank=2", "method.lora.alpha=4", "trainer.max_steps=6", "optimizer.lr=1e-2"))
    words = ("method.periodic_lora.stage_steps=6", "trainer.max_steps=6", "schedule.warmup=0.05", "optimizer.lr=1e-2")
    run = drive(build(*small(*words, "method.periodic_lora.unload_last=false")))
    ours, theirs = weights(run), weights(lora)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not run.events
    unloaded = drive(build(*small(*words)))
    assert unloaded.events == {"unloads": 1}
    ours, theirs = unloaded.merge().state_dict(), lora.merge().state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# -- momentum ----------------------------------------------------------------------------------------------------------


def test_momentum_averages_the_unloaded_updates():
    """W_T - W_0 = sum over t of (1 - m^(T - t + 1)) D_t."""
    run = build(*small("method.periodic_lora.momentum=0.3"))
    method, start, given = adapter(run), weights(run), []
    for seed in range(3):
        scramble(run, seed)
        given.append({name: delta.delta().detach().clone() for name, delta in method.deltas.items()})
        with torch.no_grad():
            method.unload(run)
    for name, delta in method.deltas.items():
        wanted = sum((1 - 0.3 ** (3 - t)) * given[t][name] for t in range(3))
        torch.testing.assert_close(delta.layer.module.weight - start[f"{name}.weight"], wanted, atol=1e-5, rtol=0)
        B, A = method.stacked(name)
        torch.testing.assert_close(2 * B @ A, wanted, atol=1e-5, rtol=0)


def test_carry_leaves_a_share_in_the_adapter_and_the_function_as_it_is():
    run = build(*small("method.periodic_lora.momentum=0.3", "method.periodic_lora.momentum_rule=carry"))
    scramble(run)
    method, before, w = adapter(run), logits(run), weights(run)
    with torch.no_grad():
        method.unload(run)
    torch.testing.assert_close(logits(run), before, atol=1e-5, rtol=0)
    for name, delta in method.deltas.items():
        assert torch.equal(delta.A, w[f"{name}.delta.A"])
        torch.testing.assert_close(delta.B.detach(), 0.3 * w[f"{name}.delta.B"])
        torch.testing.assert_close(
            delta.layer.module.weight, w[f"{name}.weight"] + 0.7 * 2 * w[f"{name}.delta.B"] @ w[f"{name}.delta.A"], atol=1e-6, rtol=0
        )


# -- the record --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [(), ("method.periodic_lora.momentum=0.3",), ("method.periodic_lora.unload_last=false",)])
def test_the_stages_stacked_are_one_lora_on_the_untouched_base(words):
    run = drive(build(*small(*words, "optimizer.lr=1e-2")))
    plain = run.pristine()
    with torch.no_grad():
        for name, delta in adapter(run).deltas.items():
            B, A = adapter(run).stacked(name)
            assert A.shape[0] == 2 * (len(adapter(run).stages) + 1)
            plain.get_submodule(name).weight += delta.scale * B @ A
        torch.testing.assert_close(plain(run.window(0).micros[0]["ids"]).logits, logits(run), atol=1e-5, rtol=0)


def test_the_record_holds_factors_and_opens_to_the_same_weights(tmp_path):
    run = train(*small("optimizer.lr=1e-2"), folder=tmp_path)
    files = {file.name: file.stat().st_size for file in (tmp_path / "tuned").iterdir()}
    dense = sum(4 * delta.layer.weight.numel() for delta in adapter(run).deltas.values())
    assert files["structure.safetensors"] + files["weights.safetensors"] < dense
    again = Run.open(tmp_path)
    for name, value in weights(run).items():
        assert torch.equal(weights(again)[name], value), name
    assert len(adapter(again).stages) == 3


def test_a_point_on_the_line_to_the_start_includes_the_finished_stages(tmp_path):
    """WiSE-FT's half way: of the weights that stages were folded into, and of the live adapter."""
    words = ("method=[periodic_lora,wise_ft]", *small("optimizer.lr=1e-2", "method.periodic_lora.unload_last=false")[1:])
    half = train(*words, "method.wise_ft.alpha=[0.5]", folder=tmp_path)
    whole = drive(build(*small("optimizer.lr=1e-2", "method.periodic_lora.unload_last=false")))
    again, start = Run.open(tmp_path), half.pristine().state_dict()
    names = list(adapter(half).deltas)
    merged, ends = half.merge().state_dict(), whole.merge().state_dict()
    for name in (f"{name}.weight" for name in names):
        torch.testing.assert_close(merged[name], (start[name] + ends[name]) / 2, atol=1e-6, rtol=0)
        assert (ends[name] - start[name]).abs().max() > 1e-3
    opened = again.merge().state_dict()
    assert all(torch.equal(opened[name], value) for name, value in merged.items())


@pytest.mark.parametrize("at", [4, 5, 8])
def test_a_run_that_is_cut_short_within_a_stage_ends_the_same(at, tmp_path):
    check_resume(
        *small("optimizer.lr=1e-2", "method.periodic_lora.momentum=0.2", "method.periodic_lora.dropout=0.1"), folder=tmp_path, at=at
    )


# -- weights that two modules share ------------------------------------------------------------------------------------


def test_folding_into_a_tied_embedding_leaves_the_head_alone():
    run = build(*small("method.periodic_lora.targets=[embed]"))
    assert run.pristine().config.tie_word_embeddings
    scramble(run)
    head, before = run.model.lm_head.weight.detach().clone(), logits(run)
    with torch.no_grad():
        adapter(run).unload(run)
    assert torch.equal(run.model.lm_head.weight, head)
    torch.testing.assert_close(logits(run), before, atol=1e-5, rtol=0)
    (delta,) = adapter(run).deltas.values()
    assert isinstance(delta.layer.module, nn.Embedding) and not delta.A.any() and delta.B.any()  # as LoRA starts an embedding
