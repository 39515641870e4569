"""SpIEL: entries that moved least are dropped, others are grown by gradients or by SM3's statistics, and go on with fair moments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tools import SMALL, build, check_resume, fresh_process, toy_data, train, tuned, weights
from torch import Tensor

from ftrecipes.compose import compose
from ftrecipes.errors import UserError
from ftrecipes.methods.selection.sparse_ft_llm import Candidates
from ftrecipes.run import Run

MUTATION = (
    "ftrecipes/methods/selection/sparse_ft_llm.py",
    'state["v"][slots] = found.square[free] / n * (1 - b2**n)',
    'state["v"][slots] = found.square[free] / n',
)

STEADY = ("schedule=constant", "schedule.warmup=0", "trainer.clip=.inf")


def knobs(**values: Any) -> tuple[str, ...]:
    return tuple(f"method.sparse_ft_llm.{name}={value}" for name, value in values.items())


def toy(inputs: int, outputs: int, *words: str, **values: Any) -> Run:
    sizes = (f"model.inputs={inputs}", f"model.outputs={outputs}")
    data = () if any(w.startswith("data=") for w in words) else (f"data.inputs={inputs}", f"data.outputs={outputs}", "trainer.batch=16")
    return build("method=sparse_ft_llm", "model=toy", "model.dtype=float64", *sizes, *data, *STEADY, *knobs(**values), *words)


def start(run: Run, steps: int = 100) -> Run:
    run.fit_steps, run.optimizer = steps, run.build_optimizer()
    return run


def update(run: Run) -> None:
    run.update(run.window(run.step))


def chosen_of(run: Run, name: str = "layer") -> Any:
    return run.stack.methods[0].chosen[name]


def effective(run: Run, name: str = "layer") -> Tensor:
    """The weight that the coming forward pass will use."""
    run.stack.methods[0].finish(run)
    return run.model.get_parameter(f"{name}.weight").detach().clone()


# -- which and how many ------------------------------------------------------------------------------------------------


def test_budget_is_a_share_of_the_whole_model() -> None:
    run = build("method=sparse_ft_llm", *SMALL, *knobs(density=0.03))
    method = run.stack.methods[0]
    total = sum(p.numel() for n, p in run.model.named_parameters() if not n.endswith(".chosen.values"))
    targets = {n: run.model.get_parameter(f"{n}.weight").numel() for n in method.chosen}
    assert {n.rpartition(".")[2] for n in targets} == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    for name, chosen in method.chosen.items():
        assert len(chosen.index) == int(0.03 * total) * targets[name] // sum(targets.values())
        assert len(chosen.index.unique()) == len(chosen.index)
        assert chosen.index.sort().values.equal(chosen.index)
        assert not chosen.values.any()
    explicit = build("method=sparse_ft_llm", *SMALL, *knobs(tunable=1400))
    assert abs(sum(len(c.index) for c in explicit.stack.methods[0].chosen.values()) - 1400) <= len(targets)
    with pytest.raises(UserError, match=r"entries were asked for and sparse_ft_llm\.targets hold"):
        build("method=sparse_ft_llm", *SMALL, *knobs(density=0.9))
    with pytest.raises(UserError, match="nothing; raise it"):
        build("method=sparse_ft_llm", *SMALL, *knobs(tunable=3))
    with pytest.raises(UserError, match="must be below"):
        build("method=sparse_ft_llm", *SMALL, *knobs(selection_accumulation_steps=20))


@pytest.mark.parametrize("variant", ["ag", "ma"])
def test_rounds_keep_count_and_continuity(variant: str) -> None:
    """At a round the weight changes at the dropped entries alone, which return to the pretrained value bit for bit."""
    run = toy(15, 12, "optimizer.lr=0.02", variant=variant, density=0.2, reselection_steps=4, selection_accumulation_steps=2)
    start(run, 20)
    base, method, k = run.model.layer.weight.detach().clone(), run.stack.methods[0], len(chosen_of(run).index)
    regrow, rounds, rates = method.regrow, [], []

    def watch(r: Run, name: str, part: Any, rate: float) -> int:
        before, index = effective(r), set(chosen_of(r).index.tolist())
        smallest = chosen_of(r).values.detach().abs().sort().values
        kept = dict(zip(chosen_of(r).index.tolist(), chosen_of(r).values.tolist(), strict=True))
        count = regrow(r, name, part, rate)
        after, now = effective(r), set(chosen_of(r).index.tolist())
        dropped = index - now
        assert len(dropped) == len(now - index) == count <= int(k * rate)
        assert set((before != after).flatten().nonzero().flatten().tolist()) <= dropped
        assert all(after.flatten()[p] == base.flatten()[p] for p in dropped)
        assert all(abs(kept[p]) <= smallest[int(k * rate) - 1] for p in dropped)
        assert len(now) == len(chosen_of(r).index) == k
        for p, value in zip(chosen_of(r).index.tolist(), chosen_of(r).values.tolist(), strict=True):
            assert value == (kept[p] if p in index else 0.0)
        rounds.append(r.fit_step)
        rates.append(rate)
        return count

    method.regrow = watch
    for _ in range(20):
        update(run)
        outside = torch.ones(base.numel(), dtype=torch.bool)
        outside[chosen_of(run).index] = False
        assert effective(run).flatten()[outside].equal(base.flatten()[outside])
    assert rounds == [2, 6, 10, 14, 18]
    assert rates == pytest.approx([1.0, *(0.2 * (1 - done / 20) for done in (6, 10, 14, 18))])
    assert run.events == {"reselections": 5}


def test_gradients_are_gathered_from_one_update_before_every_round_on() -> None:
    run = start(toy(8, 8, "optimizer.lr=0.01", density=0.2, reselection_steps=6, selection_accumulation_steps=2), 30)
    seen = []
    for _ in range(14):
        run.stack.begin(run)
        seen.append(chosen_of(run).watch is not None)
        update(run)
    assert [i + 1 for i, open_ in enumerate(seen) if open_] == [1, 2, 6, 7, 8, 12, 13, 14]
    later = start(toy(8, 8, variant="ma", density=0.2), 30)
    later.stack.begin(later)
    assert chosen_of(later).watch is None  # MA needs no dense gradient


def test_dropping_and_growing_by_hand() -> None:
    """Twelve entries, five chosen, q = 3."""
    run = start(toy(4, 3, density=0.45), 100)
    method, chosen = run.stack.methods[0], chosen_of(run)
    assert len(chosen.index) == 5
    update(run)
    chosen.index = torch.tensor([0, 2, 5, 7, 9])
    chosen.origin = run.model.layer.weight.detach().flatten()[chosen.index].clone()
    with torch.no_grad():
        chosen.values.copy_(torch.tensor([0.5, -0.01, 0.02, -0.9, 0.03], dtype=torch.float64))
    total = torch.tensor([9.0, -8.0, 7.0, -6.0, 5.0]).double()
    # 7 goes on anyway; 2 is dropped and grown; 1 and 4 are the best of the others; 11 comes too late
    method.candidates = {"layer": Candidates(torch.tensor([7, 2, 4, 1, 11]), total, total.square())}
    method.updates = 2
    base, state = run.model.layer.weight.detach().clone().flatten(), run.optimizer.state[chosen.values]
    before = {key: dict(zip([0, 2, 5, 7, 9], state[key].tolist(), strict=True)) for key in ("age", "m", "v")}
    assert method.regrow(run, "layer", method.parts["layer"], 0.61) == 2  # int(5 * 0.61) = 3
    assert chosen.index.tolist() == [0, 2, 4, 7, 1]
    assert chosen.values.tolist() == [0.5, -0.01, 0.0, -0.9, 0.0]
    assert chosen.origin[torch.tensor([2, 4])].equal(base[torch.tensor([4, 1])])
    for place, entry in enumerate([0, 2, None, 7, None]):
        if entry is not None:
            assert all(state[key][place] == before[key][entry] for key in before)
    assert state["age"][2] == state["age"][4] == 2
    assert state["m"][torch.tensor([2, 4])].tolist() == pytest.approx([3.5 * (1 - 0.9**2), -3.0 * (1 - 0.9**2)])
    assert state["v"][torch.tensor([2, 4])].tolist() == pytest.approx([24.5 * (1 - 0.999**2), 18.0 * (1 - 0.999**2)])


def test_ma_grows_the_largest_products() -> None:
    run = start(toy(4, 3, variant="ma", density=0.34), 100)
    update(run)
    chosen, method = chosen_of(run), run.stack.methods[0]
    index = set(chosen.index.tolist())
    state = run.optimizer.state[chosen.values]
    product = torch.outer(state["row"], state["col"]).flatten()
    wanted = sorted(set(range(12)) - index, key=lambda p: -float(product[p]))[:2]
    assert method.regrow(run, "layer", method.parts["layer"], 0.5) == 2
    assert set(chosen.index.tolist()) - index == set(wanted)


# -- optimizers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("beta1", "beta2"), [(0.9, 0.999), (0.8, 0.95)])
def test_seeded_moments_survive_the_bias_correction(beta1: float, beta2: float) -> None:
    """Equal gradients g before and after: the first step is lr (1 - b1^(a+1)) / (1 - b1^a) sqrt((1 - b2^a) / (1 - b2^(a+1)))."""
    run = start(toy(4, 3, "optimizer.lr=0.01", density=0.5, eps=1e-12, betas=f"[{beta1},{beta2}]"), 100)
    update(run)
    method, chosen = run.stack.methods[0], chosen_of(run)
    free = torch.tensor(sorted(set(range(12)) - set(chosen.index.tolist())))
    g, a = torch.tensor([3.0, -0.2, 0.5, 1.0, -2.0, 0.1], dtype=torch.float64), 5
    method.candidates, method.updates = {"layer": Candidates(free, a * g, a * g * g)}, a
    method.regrow(run, "layer", method.parts["layer"], 1.0)
    order = torch.tensor([free.tolist().index(p) for p in chosen.index.tolist()])
    chosen.values.grad = g[order].clone()
    run.optimizer.step()
    size = 0.01 * (1 - beta1 ** (a + 1)) / (1 - beta1**a) * ((1 - beta2**a) / (1 - beta2 ** (a + 1))) ** 0.5
    assert torch.allclose(chosen.values, -size * g[order].sign(), rtol=1e-5)
    assert run.optimizer.state[chosen.values]["age"].tolist() == [a + 1.0] * 6


def test_every_entry_has_an_age_and_an_old_one_moves_as_in_adam() -> None:
    run = start(toy(6, 5, "optimizer.lr=0.03", "optimizer.weight_decay=2", density=0.5, eps=1e-9, reselection_steps=500), 100)
    run.stack.methods[0].selection_accumulation_steps = 499
    chosen = chosen_of(run)
    m, v, delta = (torch.zeros_like(chosen.values.detach()) for _ in range(3))
    for t in range(1, 9):
        update(run)
        x, y = zip(
            *((run.data["train"][i]["x"], run.data["train"][i]["y"]) for b in run.window(t - 1) for i in b["example"].tolist()), strict=True
        )
        W = chosen_of_base(run, chosen).clone()
        W.view(-1)[chosen.index] += delta
        g = ((torch.stack(x) @ W.T - torch.stack(y)).T @ torch.stack(x) / len(x)).flatten()[chosen.index]
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        delta = delta - 0.03 * m / (1 - 0.9**t) / ((v.sqrt() + 1e-9) / (1 - 0.999**t) ** 0.5)
        delta = delta - 0.03 * 2 * delta  # to the pretrained weight, not to zero
        assert torch.allclose(chosen.values, delta, atol=1e-10)
    assert delta.abs().max() > 0.02


def chosen_of_base(run: Run, chosen: Any) -> Tensor:
    """The pretrained weight."""
    base = run.model.layer.weight.detach().clone()
    base.view(-1)[chosen.index] = chosen.origin
    return base


def test_sm3_is_its_recurrence() -> None:
    run = start(toy(4, 3, "optimizer.lr=0.1", "optimizer.weight_decay=0.5", variant="ma", density=0.6, eps=1e-3), 100)
    chosen, rng = chosen_of(run), torch.Generator().manual_seed(0)
    row, col, values = [0.0] * 3, [0.0] * 4, [0.0] * 7
    for _ in range(4):
        g = torch.randn(7, generator=rng, dtype=torch.float64)
        chosen.values.grad = g.clone()
        for group in run.optimizer.param_groups:
            group["lr"] = 0.1
        run.optimizer.step()
        u = [min(row[p // 4], col[p % 4]) + float(g[i]) ** 2 for i, p in enumerate(chosen.index.tolist())]
        for i, p in enumerate(chosen.index.tolist()):
            row[p // 4], col[p % 4] = max(row[p // 4], u[i]), max(col[p % 4], u[i])
            values[i] = (values[i] - 0.1 * float(g[i]) / (u[i] + 1e-3) ** 0.5) * (1 - 0.1 * 0.5)
        assert chosen.values.tolist() == pytest.approx(values, rel=1e-9)
    state = run.optimizer.state[chosen.values]
    assert state["row"].tolist() == pytest.approx(row) and state["col"].tolist() == pytest.approx(col)
    assert {n: t.numel() for n, t in state.items()} == {"row": 3, "col": 4}


@pytest.mark.parametrize("micro", [16, 4])
def test_an_update_counts_once_however_it_is_split(micro: int) -> None:
    """Sums over a phase are those of whole windows; an entry's age counts updates."""
    run = start(toy(8, 8, "optimizer.lr=0", f"hardware.micro_batch={micro}", density=0.4, selection_accumulation_steps=3), 100)
    dense = []
    for step in range(2):
        full = build(
            "method=full",
            "model=toy",
            "model.dtype=float64",
            "model.inputs=8",
            "model.outputs=8",
            "data.inputs=8",
            "data.outputs=8",
            "trainer.batch=16",
        )
        full.gradients(full.window(step))
        dense.append(full.model.layer.weight.grad.flatten())
        update(run)
    found, method = run.stack.methods[0].candidates["layer"], run.stack.methods[0]
    assert method.updates == 2
    assert torch.allclose(found.total, (dense[0] + dense[1])[found.index], atol=1e-12)
    assert torch.allclose(found.square, (dense[0] ** 2 + dense[1] ** 2)[found.index], atol=1e-12)
    if micro == 16:
        assert set(found.index.tolist()) == set(dense[0].abs().topk(len(found.index)).indices.tolist())


# -- what it is for ----------------------------------------------------------------------------------------------------


def test_it_finds_the_entries_that_must_change() -> None:
    right = {}
    for moving in (True, False):
        rng = torch.Generator().manual_seed(1)
        W = torch.randn(1, 2000, generator=rng, dtype=torch.float64) * 2000**-0.5
        places = torch.randperm(2000, generator=rng)[:20]
        change = torch.zeros(2000, dtype=torch.float64)
        sign = torch.randint(0, 2, (20,), generator=rng) * 2 - 1
        change[places] = (0.5 + torch.rand(20, generator=rng, dtype=torch.float64)) * sign
        x = torch.randn(1024, 2000, generator=rng, dtype=torch.float64)
        data = toy_data("twenty", x, x @ (W + change).T)
        words = ("model=toy", "model.dtype=float64", "model.inputs=2000", "model.outputs=1", f"data={data}", "trainer.batch=64")
        run = Run(compose(["method=sparse_ft_llm", *words, "optimizer.lr=0.05", *STEADY, *knobs(tunable=20, reselection_steps=20)]))
        run.load_model()
        run.model.layer.weight.data.copy_(W)
        run.load_data()
        run.prepare()
        if not moving:
            run.stack.methods[0].regrow = lambda *a: 0
        start(run, 600)
        for _ in range(600):
            update(run)
        right[moving] = len(set(chosen_of(run).index.tolist()) & set(places.tolist()))
    assert right[True] >= 18
    assert right[False] <= 2


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["ag", "ma"])
def test_what_is_held_goes_with_k(variant: str) -> None:
    held = []
    for k in (500, 1000):
        run = start(build("method=sparse_ft_llm", *SMALL, *knobs(variant=variant, tunable=k)), 100)
        update(run)
        method = run.stack.methods[0]
        state = sum(t.numel() for s in run.optimizer.state.values() for t in s.values())
        phase = sum(c.index.numel() + c.total.numel() + c.square.numel() + c.window.numel() for c in method.candidates.values())
        entries = sum(len(c.index) for c in method.chosen.values())
        assert k - len(method.chosen) <= entries <= k
        lines = sum(len(p.weight) + p.weight[0].numel() for p in method.parts.values())
        assert (state, phase) == ((3 * entries, 4 * entries) if variant == "ag" else (lines, 0))
        assert all(p.grad is None for p in run.model.parameters())
        held.append(state + phase)
    assert held[1] < 2.1 * held[0] if variant == "ag" else held[1] == held[0]


def test_peak_of_an_update_is_far_below_that_of_full_tuning() -> None:
    """Sixteen layers of 4 MiB: dense gradients and moments would be 192 MiB; one dense gradient lives at a time."""
    code = """
import torch
from torch import nn
from types import SimpleNamespace
words = ("model=toy", "model.kind=two_layer", "model.inputs=4", "model.outputs=4", "data.inputs=4", "data.outputs=4")
run = Run(compose(("method=sparse_ft_llm", *words, "method.sparse_ft_llm.density=0.01", "method.sparse_ft_llm.reselection_steps=2", "method.sparse_ft_llm.selection_accumulation_steps=1", "method.sparse_ft_llm.targets=[linear]")))
run.load_model()
class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1024, 1024, bias=False) for _ in range(16))
        self.ends = nn.Linear(4, 1024, bias=False), nn.Linear(1024, 4, bias=False)
    def forward(self, x):
        x = self.ends[0](x)
        for layer in self.layers:
            x = x + layer(x)
        return self.ends[1](x)
from ftrecipes.anatomy import Anatomy
run.model = Deep()
run.anatomy = Anatomy(run.model)
run.loaded.model = run.model
run.load_data()
run.prepare()
run.fit_steps, run.optimizer = 100, run.build_optimizer()
held = resident()
def go():
    for _ in range(3):
        run.update(run.window(run.step))
print(json.dumps([held, peak(go), sum(len(c.index) for c in run.stack.methods[0].chosen.values()), run.events]))
"""
    held, highest, k, events = fresh_process(code)
    assert events == {"reselections": 2}
    assert k > 150_000
    assert highest - held < 64 * 2**20  # a dense gradient, its magnitudes and order (4 + 4 + 12 MiB), and 13 vectors of k numbers (8 MiB)


# -- the run -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "at"), [("ag", 5), ("ag", 8), ("ma", 8)])
def test_resumed_run_is_bit_equal(variant: str, at: int, tmp_path: Path) -> None:
    """Also when the checkpoint lies inside a phase (update 6 of 5..8)."""
    words = ("method=sparse_ft_llm", *SMALL, *knobs(variant=variant, density=0.05, reselection_steps=6, selection_accumulation_steps=2))
    run = check_resume(*words, "optimizer.lr=3e-3", "trainer.max_steps=13", folder=tmp_path, at=at)
    assert run.events["reselections"] == 2


def test_record_holds_positions_and_changes(tmp_path: Path) -> None:
    words = ("method=sparse_ft_llm", *SMALL, *knobs(density=0.02, reselection_steps=3, selection_accumulation_steps=1))
    run = train(*words, "optimizer.lr=1e-2", "optimizer.weight_decay=0.1", "trainer.max_steps=8", folder=tmp_path)
    k = sum(len(c.index) for c in run.stack.methods[0].chosen.values())
    assert sum(t.numel() for t in tuned(tmp_path).values()) == 2 * k
    opened = Run.open(tmp_path)
    merged, start_ = opened.merge().state_dict(), run.pristine().state_dict()
    changed = {n: int((merged[n] != start_[n]).sum()) for n in start_ if n != "lm_head.weight"}
    assert 0.9 * k < sum(changed.values()) <= k
    assert all(w.equal(merged[n]) for n, w in weights(run).items() if n in merged)
    half = train("method=[sparse_ft_llm,wise_ft]", *words[1:], "method.wise_ft.alpha=[0.5]", "optimizer.lr=1e-2", "trainer.max_steps=3")
    whole = train(*words, "optimizer.lr=1e-2", "trainer.max_steps=3")
    a, b = half.merge().state_dict(), whole.merge().state_dict()
    assert all(torch.allclose(a[n], (b[n] + start_[n]) / 2, atol=1e-6) for n in b)
    assert any(not a[n].equal(b[n]) for n in b)
