"""Model soups: uniform, greedy and learned averages of fine-tunings from one start."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tools import SMALL, build, check_resume, train, weights
from torch import Tensor

from ftrecipes.errors import UserError
from ftrecipes.methods.weights.arithmetic import Shelf, average, movable, shares
from ftrecipes.methods.weights.model_soups import ModelSoups
from ftrecipes.run import Run

MUTATION = ("ftrecipes/methods/weights/model_soups.py", "soup, best = [*soup, i], score", "soup, best = [*soup, i], max(scores)")

TOY = ("model=toy", "optimizer.lr=1e-2", "schedule=constant", "schedule.warmup=0", "trainer.batch=32", "data.noise=0.3")
TWO_LAYERS = (*TOY, "model.kind=two_layer")


def soups(*words: str, toy: tuple[str, ...] = TOY) -> tuple[Run, ModelSoups]:
    run = build("method=model_soups", *toy, *words)
    method = run.stack.methods[0]
    assert isinstance(method, ModelSoups)
    return run, method


def shelved(run: Run, method: ModelSoups, folder: Path, ingredients: list[dict[str, Tensor]]) -> Shelf:
    """A shelf of given ingredients beside the run's start, and the method's reports of them."""
    shelf = Shelf(folder)
    shelf.put_base(movable(run))
    for i, tensors in enumerate(ingredients):
        shelf.put(i, tensors)
    method.reports = [{} for _ in ingredients]
    return shelf


def around(run: Run, count: int, size: float, seed: int = 0) -> list[dict[str, Tensor]]:
    """Ingredients at random places around the start."""
    rng = torch.Generator().manual_seed(seed)
    return [{n: t + size * torch.randn(t.shape, generator=rng) for n, t in movable(run).items()} for _ in range(count)]


def cooked(run: Run) -> Run:
    run.model.train()
    run.stack.drive(run, run.fit)
    return run


# -- averages ----------------------------------------------------------------------------------------------------------


def test_uniform_is_the_mean_in_any_order_and_of_copies_the_copy(tmp_path: Path) -> None:
    run, method = soups("method.model_soups.recipe=uniform")
    many = around(run, 7, 1.0)
    wanted = torch.stack([m["layer.weight"].double() for m in many]).mean(0)
    for order in (range(7), reversed(range(7))):
        shelf = shelved(run, method, tmp_path / str(len(list(tmp_path.iterdir()))), many)
        method.cook(run, shelf, list(order))
        assert torch.allclose(run.model.layer.weight.double(), wanted, atol=1e-7, rtol=0)
    shelf = shelved(run, method, tmp_path / "copies", [many[0]] * 7)
    method.combine(run, shelf)
    assert all(torch.equal(p, many[0][name]) for name, p in run.model.named_parameters())
    assert torch.equal(average([torch.tensor([3, 5])] * 3), torch.tensor([3, 5]))
    assert shares(10, [1.0, 1.0, 2.0]) == [3, 2, 5] and sum(shares(7, [4.0, 16.0, 5.0])) == 7 and shares(2, [1.0] * 4) == [1, 1]


def test_soup_of_a_linear_model_averages_outputs_and_jensen_holds(tmp_path: Path) -> None:
    run, method = soups()
    many = around(run, 5, 0.5)
    shelf = shelved(run, method, tmp_path, many)
    x = torch.randn(40, 16, generator=torch.Generator().manual_seed(1))
    outputs, losses = [], []
    for i in range(5):
        method.cook(run, shelf, [i])
        outputs.append(run.model(x).detach())
        losses.append(run.evaluate("validation")["mse"])
    method.cook(run, shelf, list(range(5)))
    assert torch.allclose(run.model(x), torch.stack(outputs).mean(0), atol=1e-5)
    assert run.evaluate("validation")["mse"] < sum(losses) / 5


# -- greedy ------------------------------------------------------------------------------------------------------------


def test_greedy_is_never_worse_than_its_best_member(tmp_path: Path) -> None:
    run, method = soups()
    sizes = set()
    for case in range(20):
        scale = random.Random(case).choice([0.05, 0.3, 1.0])
        shelf = shelved(run, method, tmp_path / str(case), around(run, 5, scale, seed=case))
        said = method.combine(run, shelf)
        now = run.evaluate("validation")["mse"]  # lower is better here
        assert now <= said["best single"] + 1e-12 and now == pytest.approx(said["score"], abs=1e-12)
        sizes.add(len(said["soup"]))
    assert len(sizes) > 1


def reference(scores: list[float], table: Any, ge: bool) -> list[int]:
    """The paper's algorithm in a few lines."""
    ranked = sorted(range(len(scores)), key=lambda i: -scores[i])
    inside = [ranked[0]]
    for i in ranked[1:]:
        with_it, without = table(frozenset([*inside, i])), table(frozenset(inside))
        if with_it > without or (ge and with_it == without):
            inside.append(i)
    return inside


@pytest.mark.parametrize("accept", ["ge", "gt"])
def test_greedy_decides_as_the_algorithm_does(accept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run, method = soups(f"method.model_soups.accept={accept}")
    for case in range(30):
        r = random.Random(case)
        coarse = 4 if case % 2 else 10**6  # every second table is full of ties
        memo: dict[frozenset[int], float] = {}

        def table(members: frozenset[int], memo: Any = memo, r: Any = r, coarse: int = coarse) -> float:
            return memo.setdefault(members, r.randrange(coarse) / coarse)

        scores = [table(frozenset([i])) for i in range(6)]
        monkeypatch.setattr(method, "score", lambda run, shelf, members, table=table: table(frozenset(members)))
        monkeypatch.setattr(method, "cook", lambda *args: None)
        said = method.greedy(run, None, scores)  # type: ignore[arg-type]
        assert said["soup"] == reference(scores, table, accept == "ge")
        assert len(said["tries"]) == 5


def test_order_of_the_ingredients_does_not_matter_and_a_copy_of_the_best_is_a_tie(tmp_path: Path) -> None:
    run, method = soups()
    many = around(run, 5, 0.3, seed=3)
    results = []
    for order in ([0, 1, 2, 3, 4], [3, 0, 4, 2, 1]):
        shelf = shelved(run, method, tmp_path / str(order), [many[i] for i in order])
        said = method.combine(run, shelf)
        results.append((sorted(order[i] for i in said["soup"]), weights(run)["layer.weight"]))
    assert results[0][0] == results[1][0] and torch.allclose(results[0][1], results[1][1], atol=1e-7)
    best = min(many, key=lambda m: float((m["layer.weight"] - 0).abs().sum()))
    for accept, size in (("ge", 2), ("gt", 1)):
        method.accept = accept
        said = method.combine(run, shelved(run, method, tmp_path / accept, [best, best]))
        assert len(said["soup"]) == size


def test_one_basin_averages_well_and_another_one_is_left_out(tmp_path: Path) -> None:
    noisy = ("data.noise=1", "trainer.batch=8")
    words = (*noisy, "method.model_soups.k=2", "trainer.max_steps=120", "method.model_soups.keep_ingredients=true")
    lr = ("method.model_soups.lr=[1e-2]", "method.model_soups.weight_decay=[1e-4]", "method.model_soups.length=[1]")
    folder = tmp_path / "run"
    run = train("method=model_soups", *TWO_LAYERS, *words, *lr, folder=folder)
    stranger = train(
        "method=full", *TWO_LAYERS, *noisy, "seed=5", "trainer.max_steps=40", "optimizer.weight_decay=1e-4", folder=tmp_path / "other"
    )
    shelf = Shelf(folder / "ingredients")
    method = run.stack.methods[0]
    assert isinstance(method, ModelSoups) and sorted(p.name for p in shelf.folder.iterdir()) == ["0", "1", "base"]
    assert not torch.equal(shelf.get(0, "first.weight"), shelf.get(1, "first.weight"))
    shelf.put(2, {n: p.detach() for n, p in stranger.model.named_parameters()})
    method.reports = [{}, {}, {}]
    start = {n: t.clone() for n, t in movable(run).items()}
    said = method.combine(run, shelf)
    print(said)
    assert sorted(said["soup"]) == [0, 1]  # the two of one start
    assert said["score"] < said["best single"] < said["uniform"]
    assert start.keys() == movable(run).keys()


# -- learned -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["learned", "learned_by_layer"])
def test_learned_soup_begins_at_the_uniform_one_and_betters_it(recipe: str, tmp_path: Path) -> None:
    small = (*SMALL, "model.architecture.num_hidden_layers=1")
    run, method = soups(f"method.model_soups.recipe={recipe}", "method.model_soups.learned_batch=8", toy=small)
    start = {n: t.clone() for n, t in movable(run).items()}
    rng = torch.Generator().manual_seed(0)
    near = weights(train("method=full", *small, "trainer.max_steps=15", "optimizer.lr=3e-3"))
    far = {n: t + 0.3 * t.abs().mean() * torch.randn(t.shape, generator=rng) for n, t in start.items()}
    shelf = shelved(run, method, tmp_path, [near, far])
    before = {f: f.read_bytes() for f in tmp_path.rglob("*.safetensors")}
    method.cook(run, shelf, [0, 1])
    uniform = run.evaluate("validation")["nll"]
    method.learned_epochs, method.learned_batch = 1, 10**6
    assert method.learned(run, shelf)["held-out loss"][0] == pytest.approx(uniform, abs=1e-5)
    method.learned_epochs, method.learned_batch = 3, 8
    said = method.combine(run, shelf)
    rows = torch.tensor(said["weights"]).reshape(-1, 2)
    assert len(rows) == (len(shelf.names()) if recipe == "learned_by_layer" else 1)
    assert torch.allclose(rows.sum(1), torch.ones(len(rows))) and rows[:, 0].mean() > 0.5 and (rows > 0).all()
    assert run.evaluate("validation")["nll"] < uniform and said["beta"] != 1.0
    assert before == {f: f.read_bytes() for f in tmp_path.rglob("*.safetensors")}
    name = "model.norm.weight"
    w = rows[shelf.names().index(name) if len(rows) > 1 else 0]
    assert torch.allclose(run.model.get_parameter(name), w[0] * near[name] + w[1] * far[name], atol=1e-6)


def test_what_cannot_be_cooked_is_one_line_before_training() -> None:
    run, _ = soups("method.model_soups.recipe=learned")
    with pytest.raises(UserError, match="scales logits"):
        run.stack.drive(run, run.fit)
    run, _ = soups()
    run.data["validation"].keep = []
    with pytest.raises(UserError, match="has none"):
        run.stack.drive(run, run.fit)
    tied = ("model=tiny-llama", "model.weights=random", "model.architecture={num_hidden_layers:1,tie_word_embeddings:true}")
    run = build("method=[lora,model_soups]", *tied, "method.lora.targets=[head]")
    with pytest.raises(UserError, match="another module shares its weight"):
        run.stack.drive(run, run.fit)
    assert run.step == 0


# -- the drive ---------------------------------------------------------------------------------------------------------


def test_ingredients_begin_at_one_start_and_differ_in_their_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = soups("method.model_soups.k=3", "trainer.max_steps=12", "method.model_soups.lr=[1e-3,1e-2]")
    starts, rates, windows = [], [], []
    fit, window = run.fit, run.window

    def watch(steps: int, **options: Any) -> Any:
        starts.append(weights(run)["layer.weight"])
        rates.append((run.settings.optimizer.lr, run.settings.optimizer.weight_decay, steps))
        return fit(steps, **options)

    monkeypatch.setattr(run, "window", lambda step, *args: windows.append(step) or window(step, *args))
    run.model.train()
    run.stack.drive(run, watch)
    assert all(torch.equal(s, starts[0]) for s in starts)
    assert len({r[0] for r in rates}) == len({r[1] for r in rates}) == 3 and sum(r[2] for r in rates) == 12
    assert all(1e-3 <= lr <= 1e-2 for lr, _, _ in rates)
    assert sorted(set(windows)) == list(range(12))  # no two see the same windows
    assert run.settings.optimizer.lr == 1e-2  # the run's own again
    said = run.results["model_soups"]["ingredients"]
    assert [s["optimizer.lr"] for s in said] == [r[0] for r in rates]
    assert run.events["ingredients"] == 3 and run.events["merges"] == 1 and run.events["tastings"] >= 3


@pytest.mark.parametrize("tuning", ["lora", "dora", "lift"])
def test_under_any_tuning_the_merged_weights_are_averaged(tuning: str, tmp_path: Path) -> None:
    """Averaging the factors of two adapters is something else than averaging what they add."""
    lift = ("method.lift.rank_budget=4", "method.lift.filter_rank=8", "method.lift.update_interval=2") if tuning == "lift" else ()
    words = (*SMALL, *lift, "method.model_soups.k=2", "trainer.max_steps=6", "method.model_soups.recipe=uniform")
    words = (*words, "method.model_soups.lr=[1e-2]", "method.model_soups.keep_ingredients=true")
    run = train(f"method=[{tuning},model_soups]", *words, folder=tmp_path)
    shelf = Shelf(tmp_path / "ingredients")
    name = "model.layers.1.mlp.up_proj.weight"
    two = [shelf.get(i, name) for i in range(2)]
    assert not torch.equal(*two) and not torch.equal(two[0], shelf.base(name))
    opened = Run.open(tmp_path)
    for one in (run, opened):
        merged = dict(one.merge().named_parameters())[name]
        assert torch.allclose(merged, (two[0] + two[1]) / 2, atol=1e-7)


def test_finished_runs_are_ingredients_and_those_of_another_base_are_refused(tmp_path: Path) -> None:
    small = (*SMALL, "trainer.max_steps=4", "optimizer.lr=1e-2")
    a = train("method=lora", *small, folder=tmp_path / "a")
    b = train("method=full", *small, "data.size=48", folder=tmp_path / "b")
    merged = [{n: p.detach().clone() for n, p in r.merge().named_parameters()} for r in (a, b)]
    pair = f"method.model_soups.runs=[{tmp_path / 'a'},{tmp_path / 'b'}]"
    run = train("method=model_soups", *small, pair, "method.model_soups.recipe=uniform", folder=tmp_path / "soup")
    assert run.step == 0 and run.events["ingredients"] == 2
    for name, p in run.model.named_parameters():
        assert torch.allclose(p, (merged[0][name] + merged[1][name]) / 2, atol=1e-7)
    train("method=lora", *small, "seed=1", folder=tmp_path / "c")
    for other, why in (("c", "was tuned from another base"), ("nowhere", "no such folder")):
        with pytest.raises(UserError, match=why):
            build("method=model_soups", *small, f"method.model_soups.runs=[{tmp_path / 'a'},{tmp_path / other}]")
    whole = tmp_path / "whole"
    a.model.save_pretrained(whole)
    mixed = f"method.model_soups.runs=[{whole},{tmp_path / 'b'}]"
    again = train("method=model_soups", *small, mixed, "method.model_soups.recipe=uniform", folder=tmp_path / "again")
    for name, p in again.model.named_parameters():
        assert torch.allclose(p, run.model.get_parameter(name), atol=1e-6), name


def test_resumed_run_is_bit_equal(tmp_path: Path) -> None:
    words = ("method=[lora,model_soups]", "method.model_soups.k=3", *SMALL, "trainer.max_steps=12", "method.model_soups.lr=[1e-3,1e-2]")
    run = check_resume(*words, folder=tmp_path, at=8)
    assert run.events["ingredients"] == 3
    assert not (tmp_path / "straight/ingredients").exists()
