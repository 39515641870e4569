"""LiNeS: updates scaled by depth, after one task's training and for the sum of several tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from tools import SMALL, build, check_resume, toy_data, train, weights
from torch import Tensor, nn

from ftrecipes.errors import UserError
from ftrecipes.methods.weights.interpolation import Line
from ftrecipes.methods.weights.lines import LiNeS, scaling
from ftrecipes.run import Run

MUTATION = ("ftrecipes/methods/weights/lines.py", "(int(depth) / last)", "((int(depth) + 1) / (last + 1))")

DEEP = tuple(w.replace("num_hidden_layers:2", "num_hidden_layers:3") for w in SMALL)
STEPS = ("trainer.max_steps=6", "optimizer.lr=3e-3", "schedule=constant", "schedule.warmup=0", "trainer.batch=8")


def trained(*words: str) -> Run:
    run = build(*words)
    run.stack.drive(run, run.fit)
    run.model.eval()
    run.stack.finish(run)
    return run


def start(run: Run) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in run.pristine().named_parameters()}


# -- one task ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full() -> Run:
    return trained("method=full", *DEEP, *STEPS)


def lines(alpha: float, beta: float | None = None, *words: str) -> Run:
    given = (f"method.lines.alpha={alpha}", *([] if beta is None else [f"method.lines.beta={beta}"]))
    return trained("method=lines", *given, *DEEP, *STEPS, *words)


def test_ends_are_bit_equal_and_no_slope_is_a_straight_line(full: Run) -> None:
    end, w0 = weights(full), start(full)
    for alpha, wanted in ((1.0, end), (0.0, w0)):
        run = lines(alpha, 0.0)
        assert all(torch.equal(p, wanted[n]) for n, p in run.model.named_parameters())
    run, wise = lines(0.4, 0.0), trained("method=wise_ft", "method.wise_ft.alpha=[0.4]", *DEEP, *STEPS)
    assert all(torch.equal(p, wise.model.get_parameter(n)) for n, p in run.model.named_parameters())


def test_factors_grow_with_depth_and_agree_with_the_released_scaling(full: Run) -> None:
    end, w0, run = weights(full), start(full), lines(0.3)
    # the authors' scaling of a task vector, for names in which `.l.` stands for a block alone
    for name, now in weights(run).items():
        layer = next((float(block) for block in range(3) if f".{block}." in name), None)
        factor = 0.3 if layer is None else 0.3 + 0.7 * (layer / 2)
        tau = end[name].double() - w0[name].double()
        assert torch.allclose(now.double(), w0[name].double() + factor * tau, atol=1e-7), name
        measured = float((now.double() - w0[name].double()).flatten() @ tau.flatten() / tau.square().sum())
        assert measured == pytest.approx(factor, abs=1e-4)
        if layer == 2:
            assert torch.equal(now, end[name])
    said = run.results["lines"]
    assert list(said["lambda"].values()) == pytest.approx([0.3, 0.65, 1.0, 0.3], abs=1e-7)


@pytest.mark.parametrize("order", ["[{},lines]", "[lines,{}]"])
@pytest.mark.parametrize("tuning", ["lora", "dora", "lift"])
def test_of_any_tuning_it_is_that_of_the_merged_weights(tuning: str, order: str, tmp_path: Path) -> None:
    lift = ("method.lift.rank_budget=4", "method.lift.filter_rank=8", "method.lift.update_interval=3") if tuning == "lift" else ()
    words = (*DEEP, *STEPS, *lift)
    alone = trained(f"method={tuning}", *words)
    w0, end = start(alone), {n: p.detach().clone() for n, p in alone.merge().named_parameters()}
    run = train(f"method={order.format(tuning)}", *words, "method.lines.alpha=0.2", folder=tmp_path)
    factor = scaling(run, 0.2, 0.8)
    for one in (run, Run.open(tmp_path)):
        for name, now in one.merge().named_parameters():
            assert torch.allclose(now, w0[name] + factor(name) * (end[name] - w0[name]), atol=1e-6), name


def test_depth_comes_from_the_module_tree() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.mlp(x)  # type: ignore[no-any-return]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(16, 4)
            self.encoder = nn.ModuleList(Block() for _ in range(12))
            self.decoder = nn.ModuleList(Block() for _ in range(3))
            self.layer = nn.Linear(4, 16)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            for block in (*self.encoder, *self.decoder):
                x = block(x)
            return self.layer(x)  # type: ignore[no-any-return]

    with patch("ftrecipes.models.toy._build", lambda settings, meta: Net()):
        factor = scaling(build("model=toy", "method=full"), 0.1, 0.9)
    assert factor("encoder.3.mlp.0.weight") == pytest.approx(0.1 + 0.9 * 3 / 11)
    assert factor("encoder.1.mlp.2.bias") == pytest.approx(0.1 + 0.9 / 11) and factor("encoder.11.mlp.0.weight") == pytest.approx(1.0)
    assert factor("decoder.1.mlp.0.weight") == pytest.approx(0.55)  # within its own stack
    assert factor("embed.weight") == factor("layer.bias") == 0.1


class Chain(nn.Module):
    """Six layers of three numbers: A is told by the first number of layer 1 alone, B by what layer 6 does to the second."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Link() for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Link(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3, bias=False)
        nn.init.eye_(self.inner.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)  # type: ignore[no-any-return]


def test_a_slope_has_what_no_constant_has() -> None:
    """Training changed layer 1 where only A looks, and layer 6 as B needs: scaled by depth, both are had exactly."""
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    data = toy_data("chain", x, x)
    with patch("ftrecipes.models.toy._build", lambda settings, meta: Chain()):
        run = build("model=toy", "model.inputs=3", "model.outputs=3", f"data={data}", "method=lines", "method.lines.alpha=0")
    with torch.no_grad():
        run.model.blocks[0].inner.weight[0, 2] = 1.0  # A reads number 0 and wants it untouched
        run.model.blocks[5].inner.weight[1, 1] = 3.0  # B wants number 1 tripled
    tuned = {n: p.detach().clone() for n, p in run.model.named_parameters()}

    def losses() -> tuple[float, float]:
        y = run.model(x)
        return float((y[:, 0] - x[:, 0]).square().mean()), float((y[:, 1] - 3 * x[:, 1]).square().mean())

    method = run.stack.methods[0]
    assert isinstance(method, LiNeS)
    assert losses()[0] > 0.1 and losses()[1] == 0
    line = Line(run)
    for alpha in (0.0, 0.25, 0.5, 0.75, 1.0):
        line.at(alpha)
        assert max(losses()) > 0.01  # no constant has both
    line.at(scaling(run, 1.0, -1.0))
    assert max(losses()) > 0.1  # nor has the reversed slope
    run.load_weights(tuned)
    method.finish(run)
    assert losses() == (0.0, 0.0)


def test_alpha_is_chosen_for_target_and_control(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {1.0: (0.80, 2.0), 0.5: (0.78, 1.25), 0.0: (0.30, 1.0)}
    run = build("method=lines", "method.lines.alpha_grid=[0,0.5,1]", *DEEP, *STEPS)
    method = run.stack.methods[0]
    assert isinstance(method, LiNeS)
    at, now = Line.at, [1.0]

    def watch(self: Line, alpha: Any) -> None:
        now[0] = alpha if isinstance(alpha, float) else alpha("lm_head.weight")
        at(self, alpha)

    def evaluate(self: Run, split: str) -> dict[str, float]:
        return {"exact_match": table[now[0]][0]} if split == "validation" else {"nll": table[now[0]][1]}

    monkeypatch.setattr(Line, "at", watch)
    monkeypatch.setattr(Run, "evaluate", evaluate)
    run.fit(1)
    # 2 x 0.78/0.80 + 1/1.25 = 2.75 beats 2 + 1/2 and 2 x 0.3/0.8 + 1
    method.finish(run)
    assert run.results["lines"]["alpha"] == 0.5 and run.events["scalings"] == 4
    method.target_weight = 100.0
    method.finish(run)
    assert run.results["lines"]["alpha"] == 1.0


def test_what_cannot_be_scaled_is_one_line() -> None:
    run = build("method=lines", "model=toy")
    with pytest.raises(UserError, match="no blocks to scale by depth"):
        run.stack.drive(run, run.fit)
    run = build("method=lines", *DEEP)
    run.data["retain"].keep = []
    with pytest.raises(UserError, match="no retained set"):
        run.stack.finish(run)


# -- several tasks -----------------------------------------------------------------------------------------------------


def test_several_runs_are_summed_and_scaled(tmp_path: Path) -> None:
    small = (*DEEP, "trainer.max_steps=4", "optimizer.lr=1e-2", "trainer.eval_examples=8")
    ends = []
    for name, words in (("a", ("method=lora",)), ("b", ("method=full", "data.size=48"))):
        run = train(*words, *small, folder=tmp_path / name)
        ends.append({n: p.detach().double() for n, p in run.merge().named_parameters()})
    w0 = {n: p.double() for n, p in start(run).items()}
    runs = f"method.lines.runs=[{tmp_path / 'a'},{tmp_path / 'b'}]"
    merged = train("method=lines", *small, runs, "method.lines.beta_grid=[0.2,0.6]", folder=tmp_path / "m")
    said = merged.results["lines"]
    assert said["alpha"] == 0.5 and said["beta"] in (0.2, 0.6) and merged.step == 0  # the L1 rule of a plain sum
    assert len(said["curve"]) == 2 and len(said["curve"][0]["exact_match"]) == 2
    factor = scaling(merged, 0.5, said["beta"])
    for one in (merged, Run.open(tmp_path / "m")):
        for name, now in one.model.named_parameters():
            wanted = w0[name] + factor(name) * (ends[0][name] - w0[name]) + factor(name) * (ends[1][name] - w0[name])
            assert torch.allclose(now.double(), wanted, atol=1e-6), name


def test_on_a_soup(tmp_path: Path) -> None:
    words = ("method=[model_soups,lines]", "method.lines.alpha=0", "method.model_soups.recipe=uniform", "method.model_soups.k=2")
    run = check_resume(*words, *DEEP, "trainer.max_steps=10", folder=tmp_path, at=8)
    w0 = start(run)
    assert torch.equal(run.model.get_parameter("model.layers.0.mlp.up_proj.weight"), w0["model.layers.0.mlp.up_proj.weight"])
    assert not torch.equal(run.model.get_parameter("model.layers.2.mlp.up_proj.weight"), w0["model.layers.2.mlp.up_proj.weight"])
