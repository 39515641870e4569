"""What every method of the catalogue keeps to; a new one is covered by being there."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tools import SMALL, SMALL_VIT, build, small, train, weights

from ftrecipes import catalogue, registry, stacking
from ftrecipes.compose import compose
from ftrecipes.errors import UserError
from ftrecipes.method import POINTS, overrides
from ftrecipes.plan import plan
from ftrecipes.run import Run

METHODS = sorted(catalogue.entries("method"))
STEPS = ["trainer.max_steps=4", "hardware.micro_batch=3"]
# Settings that let a mechanism show itself within four updates, by method.
KNOBS: dict[str, list[str]] = {
    "lines": ["method.lines.alpha=0.5"],  # on random weights nothing is forgotten, and the best point is the end
    "bitfit": ["model.architecture.attention_bias=true", "model.architecture.mlp_bias=true"],
    "diff_pruning": ["method.diff_pruning.target_sparsity=0.5"],
    "grades": ["method.grades.tau=q0.5@2", "method.grades.alpha=0"],
    "lift": ["method.lift.update_interval=2"],
    "lisa": ["method.lisa.interval=2", "method.lisa.gamma=1"],
    "sparse_ft_llm": ["method.sparse_ft_llm.reselection_steps=2", "method.sparse_ft_llm.selection_accumulation_steps=1"],
    "periodic_lora": ["method.periodic_lora.stage_steps=2"],
    "taft": ["method.taft.shards=1"],
    "draft": ["method.draft.num_steps=3"],
    "dpok": ["method.dpok.num_steps=3", "method.dpok.p_batch_size=4", "method.dpok.v_batch_size=8"],
}
# How a method that finds its own rate takes a given one.
RATE: dict[str, list[str]] = {"oasis": ["method.oasis.adaptive_lr=false"]}
# Which parts of the contract do not apply, and why.
EXEMPT: dict[tuple[str, str], str] = {
    **{(m, "events"): "the mechanism is the added module itself" for m in ("lora", "dora", "svft")},
    **{(m, "events"): "a baseline without a mechanism of its own" for m in ("full", "linear_probe")},
    **{(m, "events"): "the mechanism is the added module itself" for m in ("flora_tucker", "vera")},
    ("oft", "events"): "projections are counted where coft asks for them; else the mechanism is the added module itself",
    ("rl_guidance", "weights of draft"): "it mixes outputs while sampling; the tune that it takes is that of draft",
    ("taft", "hardware.checkpointing=true"): "refused: what is computed anew would lack the tangents",
    ("eva", "count"): "the data decide how a budget of ranks is shared by weights of different sizes; a plan shares it evenly",
}


def words(method: str, *more: str) -> list[str]:
    return [f"method={method}", *small(method), *STEPS, *KNOBS.get(method, []), *more]


def answers(outputs: Any) -> torch.Tensor:
    """What a model says, as one tensor."""
    return next(getattr(outputs, name) for name in ("logps", "logits", "prediction") if hasattr(outputs, name))


def applies(method: str, part: str) -> None:
    reason = EXEMPT.get((method, part))
    if reason is not None:
        assert reason, "an exemption needs a reason"
        pytest.skip(reason)


@pytest.mark.parametrize("method", METHODS)
def test_the_catalogue_tells_the_truth(method: str) -> None:
    entry, cls = catalogue.get("method", method), registry.method_class(method)
    about = entry.about
    instance = cls.__new__(cls)
    own = [p for p in POINTS if overrides(instance, p)]
    assert sorted(about["points"]) == sorted(own)
    assert ("picks" in about) == cls.picks
    assert about["fidelity"]["level"] in ("official", "peer", "paper", "reconstructed")
    assert about["fidelity"]["level"] != "reconstructed" or about["fidelity"].get("guesses")
    assert about["domains"] and about["idea"] and about["title"]
    assert {"tiny", "paper"} and entry.tiny and entry.paper, "both scales need settings"
    assert (cls.__doc__ or "").strip() and (__import__(cls.__module__, fromlist=["x"]).__doc__ or "").strip()


@pytest.mark.parametrize("method", [m for m in METHODS if catalogue.get("method", m).about.get("arxiv")])
def test_a_paper_has_a_proof_and_a_mutation(method: str) -> None:
    tree = ast.parse((Path(__file__).parent / "methods" / f"test_{method}.py").read_text())
    named = {t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}
    assert "MUTATION" in named
    assert sum(isinstance(n, ast.FunctionDef) and n.name.startswith("test") for n in tree.body) >= 3


@pytest.mark.parametrize("method", METHODS)
def test_frozen_stays_trained_moves_and_counts_are_as_planned(method: str) -> None:
    run = build(*words(method))
    planned = plan(compose(words(method)))
    if (method, "count") not in EXEMPT:
        assert planned.trainable == sum(p.numel() for p in run.trainable().values())
    before = weights(run)
    run.stack.drive(run, run.fit)
    run.stack.finish(run)
    after = weights(run)
    trains = set(run.trainable())
    may_move = trains | run.touched | set().union(*(m.writes() for m in run.stack))
    for name in (before.keys() & after.keys()) - may_move:  # adapters may be given up at the end
        assert after[name].equal(before[name]), f"{name} is frozen and moved"
    moved = [n for n in trains if n in before and not (n in after and after[n].equal(before[n]))]  # some are dropped at the end
    assert len(moved) >= 0.5 * len(trains), f"only {len(moved)} of {len(trains)} trainable tensors moved"


@pytest.mark.parametrize("method", METHODS)
def test_reloads_and_merges_to_equal_outputs(method: str, tmp_path: Path) -> None:
    run = train(*words(method), folder=tmp_path)
    batch = run.data["test"].batch(list(run.data["test"].keep)[:4])
    with torch.no_grad():
        wanted = answers(run.task.outputs(run.model.eval(), batch))
        opened = Run.open(tmp_path)
        assert answers(opened.task.outputs(opened.model, batch)).equal(wanted)
        if reason := catalogue.get("method", method).about.get("unmergeable"):
            with pytest.raises(UserError, match=f"{method} cannot be folded into plain weights: {re.escape(reason)}"):
                opened.merge()
        else:
            merged = opened.merge()
            torch.testing.assert_close(answers(opened.task.outputs(merged, batch)), wanted, rtol=1e-4, atol=1e-5)
            assert type(merged) is type(opened.pristine())
            assert not any(hasattr(m, what) for m in merged.modules() for what in ("delta", "chosen", "inserted"))
    saved = sum(f.stat().st_size for f in (tmp_path / "tuned").iterdir())
    whole = 4 * sum(p.numel() for p in opened.model.parameters())
    share = sum(p.numel() for p in run.trainable().values()) / sum(p.numel() for p in opened.model.parameters())
    if share < 0.5 and method != "linear_probe":
        assert saved < 0.9 * whole, "the record holds a second copy of the base"


@pytest.mark.parametrize("method", METHODS)
def test_two_seeds_differ_and_one_repeats(method: str) -> None:
    def final(seed: int) -> dict[str, torch.Tensor]:
        run = build(
            *words(method, f"seed={seed}", *(["model.architecture.num_hidden_layers=1"] if small(method) in (SMALL, SMALL_VIT) else []))
        )
        run.stack.drive(run, run.fit)
        return weights(run)

    a, again, b = final(0), final(0), final(1)
    assert all(a[n].equal(again[n]) for n in a)
    assert any(not a[n].equal(b[n]) for n in a)


@pytest.mark.parametrize("method", METHODS)
def test_its_mechanism_fires(method: str, tmp_path: Path) -> None:
    applies(method, "events")
    run = train(*words(method), folder=tmp_path)
    assert run.events and all(n > 0 for n in run.events.values()), "nothing was counted: did the mechanism fire?"


@pytest.mark.parametrize("method", METHODS)
def test_is_no_other_method_by_a_new_name(method: str, twenty: Any) -> None:
    mine = twenty(method)
    for other in METHODS:
        if other != method and (method, f"weights of {other}") not in EXEMPT and (other, f"weights of {method}") not in EXEMPT:
            theirs = twenty(other)
            same = mine.keys() == theirs.keys() and all(mine[n].equal(theirs[n]) for n in mine)
            assert not same, f"{method} and {other} end with the same weights"


@pytest.fixture(scope="module")
def twenty() -> Any:
    """Weights, merged where that can be, after 20 small updates at equal rate, batch and seed, made once a method."""
    made: dict[str, dict[str, torch.Tensor]] = {}

    def get(method: str) -> dict[str, torch.Tensor]:
        if method not in made:
            equal = ["trainer.max_steps=20", "optimizer.lr=1e-3", "trainer.batch=4", "schedule=constant", "schedule.warmup=0"]
            run = build(*words(method, *equal, *RATE.get(method, [])))
            run.stack.drive(run, run.fit)
            run.model.eval()
            run.stack.finish(run)
            plain = run.model if catalogue.get("method", method).about.get("unmergeable") else run.merge()
            made[method] = {n: p.detach().clone() for n, p in plain.named_parameters()}
        return made[method]

    return get


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "how", ["hardware.precision=bf16-mixed", "hardware.precision=bf16", "hardware.checkpointing=true", "data.packing=true"]
)
def test_runs_in_other_ways(method: str, how: str) -> None:
    applies(method, how)
    if how.startswith("data.packing") and small(method) != SMALL:
        pytest.skip("packing is of texts")
    run = build(*words(method, how, "trainer.max_steps=2"))
    run.stack.drive(run, run.fit)
    assert run.step == 2
    assert all(torch.isfinite(p).all() for p in run.trainable().values())


@pytest.mark.parametrize("method", [m for m in METHODS if catalogue.get("method", m).about["domains"] != ["any"]])
def test_refuses_a_domain_that_is_not_its_own(method: str) -> None:
    with pytest.raises(UserError, match=f"{method} is for"):
        compose([f"method={method}", "model=toy"])


def test_every_pair_is_trained_or_refused_with_a_reason() -> None:
    refused = 0
    for a in METHODS:
        for b in METHODS:
            if a == b or not small(a, b):
                continue
            reason = stacking.pair(catalogue.get("method", a), catalogue.get("method", b))
            try:
                compose([f"method=[{a},{b}]", *small(a, b)])
                assert reason is None, f"{a}+{b} composes, ftr show says {reason}"
            except UserError as error:
                refused += 1
                assert a in str(error) or b in str(error)
    assert refused > 20


@pytest.mark.parametrize(
    "stack",
    [
        "[dora,dft]",
        "[svft,gmt,dft]",
        "[lora,linear_probe]",
        "[lift,dft,wise_ft]",
        "[lisa,dft]",
        "[periodic_lora,gmt,wise_ft]",
        "[mezo,lisa]",
    ],
)
def test_stacks_train_and_reload(stack: str, tmp_path: Path) -> None:
    names = stack.strip("[]").split(",")
    run = train(f"method={stack}", *SMALL, *STEPS, *[w for n in names for w in KNOBS.get(n, [])], folder=tmp_path)
    batch = run.data["test"].batch(list(run.data["test"].keep)[:4])
    with torch.no_grad():
        opened = Run.open(tmp_path)
        assert opened.task.outputs(opened.model, batch).logps.equal(run.task.outputs(run.model.eval(), batch).logps)
