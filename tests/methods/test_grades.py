"""GradES: matrices are watched one by one, and stopped for good where the gradient has settled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tools import SMALL, build, check_resume, train, weights
from torch import Tensor

from ftrecipes.compose import compose
from ftrecipes.errors import UserError
from ftrecipes.run import Run

MUTATION = (
    "ftrecipes/methods/schedules/grades.py",
    "run.forget([p for unit in done for p in self.parameters(run, unit)])\n            self.frozen",
    "self.frozen",
)

STEADY = ("schedule=constant", "schedule.warmup=0", "optimizer.lr=1e-3")
MATRICES = [
    f"model.layers.{i}.{n}" for i in (0, 1) for n in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    )
]  # fmt: skip


def grades(*words: str, stack: str = "grades", steps: int = 100, **knobs: Any) -> Run:
    run = build(f"method={stack}", *SMALL, *STEADY, *(f"method.grades.{k}={v}" for k, v in knobs.items()), *words)
    return start(run, steps)


def start(run: Run, steps: int) -> Run:
    run.fit_steps, run.optimizer = steps, run.build_optimizer()
    return run


def update(run: Run) -> None:
    run.update(run.window(run.step))


def method_of(run: Run) -> Any:
    return next(m for m in run.stack if m.key == "grades")


def gradient(run: Run) -> dict[str, Tensor]:
    """The window's gradient at the current weights, by name."""
    run.gradients(run.window(run.step))
    return {n: p.grad.clone() for n, p in run.model.named_parameters() if p.grad is not None}


def sizes(run: Run) -> dict[str, float]:
    """G by component in the coming update, which is done."""
    method = method_of(run)
    seen: dict[str, float] = {}
    stop = method.stop

    def watch(r: Run, t: int, found: list[float]) -> None:
        seen.update({method.names[unit]: size for unit, size in zip(method.now, found, strict=True)})
        stop(r, t, found)

    method.stop = watch
    update(run)
    method.stop = stop
    return seen


# -- what is measured --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("clip", "micro"), [("1e-3", 8), (".inf", 2)])
def test_sums_are_those_of_an_independent_pass(clip: str, micro: int) -> None:
    for monitor in ("grad", "grad_change", "weight_change"):
        run = grades(f"trainer.clip={clip}", f"hardware.micro_batch={micro}", monitor=monitor, tau=0.0)
        last: dict[str, Tensor] = {}
        for step in range(3):
            now = weights(run) if monitor == "weight_change" else gradient(run)
            found = sizes(run)
            if monitor == "weight_change":
                last, now = now, weights(run)
            if monitor == "grad":
                wanted = {n: float(now[f"{n}.weight"].abs().sum()) for n in MATRICES}
            elif last and (step or monitor == "grad_change"):
                wanted = {n: float((now[f"{n}.weight"] - last[f"{n}.weight"]).abs().sum()) for n in MATRICES}
            else:
                wanted = {}  # a change is not defined the first time
            assert found == pytest.approx(wanted, rel=1e-4), (monitor, step)
            last = now


def test_an_adapter_is_one_component_and_mean_divides() -> None:
    run = grades(stack="[lora,grades]", monitor="grad", tau=0.0)
    update(run)  # B leaves zero, so A has a gradient
    g = gradient(run)
    found = sizes(run)
    assert set(found) == set(MATRICES)
    for name, size in found.items():
        parts = [t.abs().sum() for n, t in g.items() if n.startswith(f"{name}.")]
        assert len(parts) == 2 and size == pytest.approx(float(sum(parts)), rel=1e-4)
    mean = grades(stack="[lora,grades]", monitor="grad", tau=0.0, normalize="mean")
    update(mean)
    numbers = {name: sum(p.numel() for n, p in mean.trainable().items() if n.startswith(f"{name}.")) for name in MATRICES}
    assert sizes(mean) == pytest.approx({n: size / numbers[n] for n, size in found.items()}, rel=1e-4)


# -- when it freezes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("monitor", ["grad", "weight_change"])
def test_nothing_freezes_in_the_grace_and_all_at_its_end_when_tau_is_infinite(monitor: str) -> None:
    run = grades(monitor=monitor, tau=".inf", alpha=0.47, steps=9)  # int(4.23) = 4
    for _ in range(3):
        update(run)
        assert not method_of(run).frozen and not run.stopping
    update(run)
    assert method_of(run).frozen == dict.fromkeys(MATRICES, 4)
    assert run.stopping == "early"
    assert run.events == {"frozen": 14}


def test_it_ends_the_training(tmp_path: Path) -> None:
    run = train("method=grades", *SMALL, "method.grades.tau=.inf", "method.grades.alpha=0.5", "trainer.max_steps=8", folder=tmp_path)
    assert run.step == 4
    assert all(p.requires_grad for p in run.model.parameters())
    some = train(
        "method=grades",
        *SMALL,
        "method.grades.tau=q0.5@2",
        "method.grades.alpha=0",
        "method.grades.max_frozen_ratio=0.3",
        "trainer.max_steps=8",
    )
    assert some.step < 8 and len(method_of(some).frozen) >= 5


def test_a_change_is_not_zero_the_first_time() -> None:
    for monitor in ("grad_change", "weight_change"):
        run = grades(monitor=monitor, tau=".inf", alpha=0.0)
        update(run)
        assert not method_of(run).frozen, monitor
        update(run)
        assert set(method_of(run).frozen.values()) == {2}


def test_tau_zero_is_plain_training_bit_for_bit() -> None:
    run, full = grades(tau=0.0, alpha=0.0), start(build("method=full", *SMALL, *STEADY), 100)
    for _ in range(5):
        update(run)
        update(full)
    assert all(w.equal(weights(full)[n]) for n, w in weights(run).items())
    assert not run.events


def test_quantile_of_an_update() -> None:
    run = grades(tau="q0.5@3", monitor="grad", alpha=0.0)
    update(run)
    update(run)
    assert method_of(run).threshold is None and not method_of(run).frozen
    found = sizes(run)
    assert method_of(run).threshold == pytest.approx(
        float(torch.tensor(list(found.values())).median() + torch.tensor(list(found.values())).sort().values[7]) / 2
    )
    assert set(method_of(run).frozen) == {n for n, size in found.items() if size < method_of(run).threshold}
    assert len(method_of(run).frozen) == 7
    for wrong in ("half", "q2@5", "q0.5@0"):
        with pytest.raises(UserError, match="a number, or q<quantile>@<update>"):
            grades(tau=wrong)


def test_measurements_have_an_interval() -> None:
    run = grades(tau=".inf", alpha=0.0, compute_interval=3)
    seen = [bool(sizes(run)) for _ in range(3)]
    assert seen == [False, False, True]
    assert set(method_of(run).frozen.values()) == {3}


# -- what freezing does ------------------------------------------------------------------------------------------------


def test_exactly_the_settled_matrix_freezes_and_stays_bit_for_bit() -> None:
    run = grades("optimizer.weight_decay=0.1", monitor="grad", tau=1e-6, alpha=0.0)
    update(run)
    quiet = run.model.model.layers[0].self_attn.q_proj
    quiet.weight.register_hook(lambda g: g * 0)
    name = "model.layers.0.self_attn.q_proj"
    update(run)  # it still moves, by momentum and decay, in the update that stops it
    before = weights(run)
    assert method_of(run).frozen == {name: 2}
    assert quiet.weight not in run.optimizer.state and len(run.optimizer.state) == len(run.trainable()) - 1
    for _ in range(3):
        update(run)
    moved = {n for n, w in weights(run).items() if not w.equal(before[n])}
    assert moved == set(before) - {f"{name}.weight"}
    assert not quiet.weight.requires_grad
    assert {unit for unit, n in enumerate(method_of(run).names) if n != name} == set(method_of(run).now)


def test_a_frozen_matrix_forms_no_gradient_and_lets_others_theirs() -> None:
    run, full = grades(tau=0.0), start(build("method=full", *SMALL, *STEADY), 100)
    run.stack.begin(run)
    method = method_of(run)
    top = [unit for unit, name in enumerate(method.names) if "layers.1.mlp" in name]
    method.set(run, [unit for unit in method.now if unit not in top])
    mine, whole = gradient(run), gradient(full)
    assert {n for n in whole if n not in mine} == {f"{method.names[unit]}.weight" for unit in top}
    assert all(g.equal(whole[n]) for n, g in mine.items())


def test_backward_ends_above_the_frozen_half() -> None:
    """With LoRA, freezing the adapters of block 0 leaves nothing to be differentiated there."""
    run = grades(stack="[lora,grades]", tau=0.0)
    run.stack.begin(run)
    method, reached = method_of(run), {}
    for depth in (0, 1):
        run.model.model.layers[depth].register_forward_hook(
            lambda m, x, y, d=depth: reached.__setitem__(d, (y[0] if isinstance(y, tuple) else y).grad_fn)
        )
    gradient(run)
    assert reached[0] is not None
    method.set(run, [unit for unit, name in enumerate(method.names) if "layers.1." in name])
    gradient(run)
    assert reached[0] is None and reached[1] is not None


def test_state_falls_as_matrices_freeze() -> None:
    run = grades(tau="q0.5@2", monitor="grad", alpha=0.0)
    held = []
    for _ in range(4):
        update(run)
        held.append(sum(t.numel() for s in run.optimizer.state.values() for t in s.values() if t.dim()))
    frozen = sum(run.model.get_parameter(f"{n}.weight").numel() for n in method_of(run).frozen)
    assert held[0] == 2 * sum(p.numel() for p in run.trainable().values())
    assert held[-1] == held[0] - 2 * frozen < held[0]
    assert set(method_of(run).last) == set()  # sizes need no copy of gradients
    change = grades(tau="q0.5@3", alpha=0.0)
    for _ in range(4):
        update(change)
    assert set(change.stack.methods[0].last) == {f"{n}.weight" for n in MATRICES if n not in method_of(change).frozen}


# -- the run -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("monitor", "stack"), [("grad_change", "grades"), ("weight_change", "[lora,grades]")])
def test_resumed_run_is_bit_equal(monitor: str, stack: str, tmp_path: Path) -> None:
    """The checkpoint of update 6 lies behind the first freezes and before later ones."""
    knobs = (
        f"method.grades.monitor={monitor}",
        "method.grades.tau=q0.3@4",
        "method.grades.alpha=0.3",
        "optimizer.lr=5e-3",
        "schedule=constant",
    )
    run = check_resume(f"method={stack}", *SMALL, *knobs, "trainer.max_steps=11", folder=tmp_path, at=8)
    when = set(method_of(run).frozen.values())
    assert min(when) <= 6 and run.events["frozen"] == len(method_of(run).frozen)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match="grades is for"):
        compose(["method=grades", "model=toy"])
    run = build("method=[lora,grades]", *SMALL, "method.lora.targets=[q]", "method.grades.targets=[down]")
    with pytest.raises(UserError, match="nothing that trains lies in"):
        run.stack.begin(run)
