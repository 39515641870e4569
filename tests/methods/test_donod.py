"""DONOD: two norms of one step on the output layer, merged by TOPSIS; wrong answers go."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tools import SMALL, build

from ftrecipes.errors import UserError
from ftrecipes.methods.selectors.donod import DONOD, topsis
from ftrecipes.run import Run

MUTATION = ("ftrecipes/methods/selectors/donod.py", "r[torch.arange(len(r)), outputs.labels[at].long()] -= 1", "pass")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTR_CACHE", str(tmp_path / "cache"))


def scored(*words: str) -> tuple[Run, DONOD]:
    run = build("method=donod", *SMALL, "data.size=30", *words)
    method = run.stack.methods[0]
    assert isinstance(method, DONOD)
    return run, method


@pytest.mark.parametrize("eta", [1e-4, 10.0])
def test_norms_equal_an_explicit_step_on_the_output_layer(eta: float) -> None:
    run, method = scored()
    method.eta = eta
    run.model.double()
    batch = run.data["train"].batch(list(range(9)))
    with torch.no_grad():
        found = method.features(run, batch)
    head = run.model.get_output_embeddings().weight  # type: ignore[operator]
    before = head.detach().clone()
    for i in range(9):
        e = run.data["train"][i]
        ids, labels = torch.tensor(e["ids"])[None].long(), torch.tensor(e["labels"])[None].long()
        with torch.no_grad():  # W is the output layer alone, also where the embedding shares it
            hidden = run.model.get_decoder()(input_ids=ids).last_hidden_state  # type: ignore[operator]
        loss = F.cross_entropy(F.linear(hidden, head)[0, :-1], labels[0, 1:], ignore_index=-100)
        (g,) = torch.autograd.grad(loss, [head])
        after = before - eta * g
        assert float(found[i, 0]) == pytest.approx(float(after.norm() - before.norm()), rel=1e-4 if eta < 1 else 1e-6, abs=1e-13)
        assert float(found[i, 1]) == pytest.approx(float((after - before).norm()), rel=1e-5)
    assert (found[:, 0].abs() <= found[:, 1] + 1e-15).all()


def test_small_steps_follow_the_derivative() -> None:
    run, method = scored()
    run.model.double()
    batch = run.data["train"].batch([0, 1, 2])
    with torch.no_grad():
        method.eta = 1e-7
        small = method.features(run, batch) / 1e-7
        method.eta = 1e-5
        larger = method.features(run, batch) / 1e-5
    assert torch.allclose(small[:, 1], larger[:, 1], rtol=1e-9)  # NOD is eta |g| exactly
    assert torch.allclose(small[:, 0], larger[:, 0], rtol=1e-2, atol=1e-6) and (small[:, 0] < 0).any()


def test_scoring_leaves_the_model_alone_and_a_perfect_answer_moves_nothing() -> None:
    run, method = scored("method.donod.prune_ratio=0.5")
    pristine = dict(run.pristine().named_parameters())
    assert all(torch.equal(p, pristine[n]) and p.grad is None for n, p in run.model.named_parameters())
    batch = run.data["train"].batch([0])
    outputs = run.task.outputs(run.model, batch)
    with torch.no_grad():
        head = run.model.get_output_embeddings()  # type: ignore[operator]
        ordinary = method.features(run, batch)
        # every counted token is made certain: its row of W is its hidden state, very long
        hidden, labels = outputs.hidden, outputs.labels
        head.weight.zero_()
        for h, y in zip(hidden, labels, strict=True):
            head.weight[y] += 1e4 * h / h.square().sum()
        run.task.outputs = lambda model, b: outputs  # type: ignore[method-assign]
        certain = method.features(run, batch)
    if len(set(labels.tolist())) == len(labels):
        assert certain.abs().max() < 1e-3 * ordinary.abs().max()


def test_topsis() -> None:
    table = torch.tensor([[3.0, 1.0], [1.0, 4.0], [2.0, 2.0]], dtype=torch.float64)
    better, weights = torch.tensor([1.0, -1.0], dtype=torch.float64), torch.tensor([0.5, 0.5], dtype=torch.float64)
    C = topsis(table, better, weights)
    assert C[0] == 1 and C[1] == 0 and 0 < C[2] < 1
    v = table / table.square().sum(0).sqrt() * 0.5
    plus, minus = math.dist(v[2].tolist(), [float(v[0, 0]), float(v[0, 1])]), math.dist(v[2].tolist(), [float(v[1, 0]), float(v[1, 1])])
    assert float(C[2]) == pytest.approx(minus / (plus + minus), abs=1e-12)
    assert torch.allclose(topsis(table * torch.tensor([7.0, 0.01]), better, weights), C)  # scale-free
    assert torch.equal(topsis(torch.ones(4, 2, dtype=torch.float64), better, weights), torch.full((4,), 0.5, dtype=torch.float64))
    assert topsis(table, -better, weights)[0] == 0


def test_counts_are_exact_and_nothing_dropped_is_everything() -> None:
    for ratio, left in ((0.9, 3), (0.7, 9), (0.3, 21), (0.0, 30)):
        run, _ = scored(f"method.donod.prune_ratio={ratio}")
        keep = list(run.data["train"].keep)
        assert len(keep) == left and keep == sorted(keep)
        assert run.events == {"scored": 30, "kept": left, "dropped": 30 - left}
    assert keep == list(range(30))


def test_rank_is_that_of_the_rule() -> None:
    run, method = scored("method.donod.prune_ratio=0.5")
    features = method.measured(run, list(range(30)))
    results = {}
    for don in ("grow", "shrink"):
        method.don = don
        kept, closeness = method.choose(run, features)
        assert min(closeness[i] for i in kept) >= max(float(closeness[i]) for i in range(30) if i not in kept)
        results[don] = set(kept)
    assert results["grow"] != results["shrink"]
    method.criteria_weights = [0.0, 1.0]  # the second norm alone
    kept, _ = method.choose(run, features)
    assert set(kept) == set(features[:, 1].argsort(stable=True)[:15].tolist())


@pytest.mark.parametrize("seed", [0, 1])
def test_wrong_answers_are_dropped_by_a_model_that_knows_the_task(seed: int) -> None:
    run = build("method=full", *SMALL, "data.size=120", "trainer.batch=16", f"seed={seed}", "optimizer.lr=5e-3", "schedule=constant")
    run.fit(150)  # it learns these very questions
    right = {row["prompt"]: row["response"] for row in run.data["train"].raw}
    again, method = scored("data.size=120", "data.wrong=0.3", f"seed={seed}")
    again.model, train = run.model, again.data["train"]
    with again.evaluating():
        features = torch.cat([method.features(again, train.batch([i])) for i in range(120)])
    train.keep = range(120)
    wrong = [right[row["prompt"]] != row["response"] for row in train.raw]
    assert 0.15 < sum(wrong) / 120 < 0.4 and [row["source"] == "wrong" for row in train.raw] == wrong

    def found(don: str) -> float:
        """How many of the wrong answers are among the 30 in a hundred that are dropped."""
        method.don, method.prune_ratio = don, 0.3
        kept = set(method.choose(again, features)[0])
        return sum(wrong[i] for i in range(120) if i not in kept) / sum(wrong)

    assert found("grow") > 0.85 and found("shrink") < 0.3  # at random it is 0.3


def test_a_head_with_more_than_a_weight_is_one_line() -> None:
    run, method = scored()
    batch = run.data["train"].batch([0])
    outputs = run.task.outputs(run.model, batch)
    outputs.scale = lambda logits: torch.tanh(logits)
    run.task.outputs = lambda model, b: outputs  # type: ignore[method-assign]
    with pytest.raises(UserError, match="has more than a weight"):
        method.features(run, batch)
