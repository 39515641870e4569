"""LISA: a few blocks learn at a time, drawn anew every period; what lies outside the blocks always does."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tools import SMALL, build, check_resume, weights
from torch import Tensor

from ftrecipes.compose import compose
from ftrecipes.errors import UserError
from ftrecipes.run import Run

MUTATION = ("ftrecipes/methods/schedules/lisa.py", "self.drop_state = not self.keep_state", "self.drop_state = self.keep_state")

SHAPE = "model.architecture={num_hidden_layers:8,hidden_size:32,intermediate_size:48,num_attention_heads:4,num_key_value_heads:2,tie_word_embeddings:false}"
EIGHT = (*(w for w in SMALL if "architecture" not in w), SHAPE)
RATE = ("optimizer.lr=1e-3", "schedule=constant", "schedule.warmup=0")


def lisa(gamma: int, interval: int, *words: str, model: tuple[str, ...] = EIGHT) -> Run:
    """A run with an optimizer, in the midst of a long fit."""
    run = build("method=lisa", f"method.lisa.gamma={gamma}", f"method.lisa.interval={interval}", *model, *RATE, *words)
    return start(run)


def start(run: Run, steps: int = 100) -> Run:
    run.fit_steps, run.optimizer = steps, run.build_optimizer()
    return run


def update(run: Run) -> None:
    run.update(run.window(run.step))
    run.fit_step = run.step


def awake(run: Run) -> list[int]:
    now: list[int] = run.stack.methods[0].now
    return now


def depth_of(name: str) -> int | None:
    """The block that a parameter lies in."""
    return int(name.split(".")[2]) if name.startswith("model.layers.") else None


def moved(run: Run, before: dict[str, Tensor]) -> dict[int | None, set[bool]]:
    """Whether parameters changed, by block; None stands for what lies outside."""
    out: dict[int | None, set[bool]] = {}
    for name, now in weights(run).items():
        out.setdefault(depth_of(name), set()).add(not torch.equal(now, before[name]))
    return out


# -- which blocks ------------------------------------------------------------------------------------------------------


def test_law_of_the_draw() -> None:
    run = lisa(2, 5)
    method: Any = run.stack.methods[0]
    draws = []
    for period in range(10_000):
        run.step = 5 * period
        draws.append(tuple(sorted(method.awake(run))))
    assert all(len(set(draw)) == 2 for draw in draws)
    singles = Counter(itertools.chain(*draws))
    assert all(abs(singles[depth] / 10_000 - 0.25) < 0.02 for depth in range(8))
    pairs = Counter(draws)
    assert len(pairs) == 28
    assert all(abs(n / 10_000 - 1 / 28) < 0.012 for n in pairs.values())
    run.step = 5 * 123
    assert tuple(sorted(method.awake(run))) == draws[123]  # a function of seed and period
    other = build("method=lisa", *EIGHT, "seed=1")
    method = other.stack.methods[0]
    assert [tuple(sorted(method.awake(other))) for other.step in range(0, 200, 20)] != draws[:10]


def test_blocks_that_were_never_drawn() -> None:
    """After P periods N (1 - gamma / N)^P blocks are untouched on average."""
    run = lisa(2, 1)
    method: Any = run.stack.methods[0]
    untouched = []
    for first in range(0, 6000, 6):
        seen: set[int] = set()
        for run.step in range(first, first + 6):
            seen |= set(method.awake(run))
        untouched.append(8 - len(seen))
    assert sum(untouched) / len(untouched) == pytest.approx(8 * 0.75**6, abs=0.12)


def test_chances() -> None:
    run = lisa(2, 1, "method.lisa.chances=[0,1,0,6,0,0,3,0]")
    method: Any = run.stack.methods[0]
    seen = Counter(itertools.chain(*(method.awake(run) for run.step in range(500))))
    assert set(seen) == {1, 3, 6}
    assert seen[3] > seen[6] > seen[1]
    with pytest.raises(UserError, match="fewer have a chance"):
        lisa(4, 1, "method.lisa.chances=[0,1,0,6,0,0,3,0]")
    with pytest.raises(UserError, match="the model has 8 blocks"):
        lisa(2, 1, "method.lisa.chances=[1,1]")


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match="the model has 8 blocks"):
        lisa(9, 5)
    with pytest.raises(UserError, match="lisa is for"):
        compose(["method=lisa", "model=toy"])
    with pytest.raises(UserError, match="needs every weight to be trainable"):
        compose(["method=[lora,lisa]"])


# -- a period ----------------------------------------------------------------------------------------------------------


def test_sleeping_blocks_stand_still_bit_for_bit() -> None:
    run = lisa(2, 4)
    for _ in range(3):
        before = weights(run)
        for _ in range(4):
            update(run)
        now = awake(run)
        assert len(now) == 2
        for depth, changed in moved(run, before).items():
            assert changed == {depth is None or depth in now}, depth
        assert {n for n, p in run.active().items()} == {n for n, _ in run.model.named_parameters() if depth_of(n) in (None, *now)}
    outside = [n for n, _ in run.model.named_parameters() if depth_of(n) is None]
    assert outside == ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    assert run.events["switches"] == 3


def test_decay_and_old_gradients_do_not_move_sleeping_blocks() -> None:
    run = lisa(2, 3, "optimizer.weight_decay=0.1")
    for step in range(12):
        if step % 3 == 0:
            old = awake(run)
        before = weights(run)
        update(run)
        now = awake(run)
        for depth, changed in moved(run, before).items():
            assert changed == {depth is None or depth in now}
        if step % 3 == 0 and old is not None:
            assert any(d not in now for d in old) or sorted(old) == now
        assert all(p.grad is None for p in run.model.parameters())


def test_gradients_are_formed_for_what_is_awake_only_and_reach_the_embedding() -> None:
    for words in ((), ("hardware.checkpointing=true",)):
        run = lisa(1, 2, *words)
        while not awake(run) or 0 in awake(run):  # block 0 must sleep, the embedding lies before it
            update(run)
        run.gradients(run.window(run.step))
        for name, parameter in run.model.named_parameters():
            assert (parameter.grad is not None) == (depth_of(name) in (None, *awake(run))), name
        assert run.model.get_input_embeddings().weight.grad.abs().max() > 0


def test_a_period_counts_updates_not_micro_batches() -> None:
    draws = []
    for micro in (8, 2):
        run = lisa(2, 3, f"hardware.micro_batch={micro}")
        seen = []
        for _ in range(7):
            update(run)
            seen.append(tuple(awake(run)))
        assert seen[0] == seen[1] == seen[2] and seen[3] == seen[4] == seen[5]
        assert len(set(seen)) > 1
        assert run.events["switches"] == 3
        draws.append(seen)
    assert draws[0] == draws[1]


# -- limits ------------------------------------------------------------------------------------------------------------


def test_all_blocks_with_kept_state_is_adamw_bit_for_bit() -> None:
    every, full = lisa(8, 3, "method.lisa.keep_state=true"), start(build("method=full", *EIGHT, *RATE))
    for _ in range(8):
        update(every)
        update(full)
    assert all(torch.equal(w, weights(full)[name]) for name, w in weights(every).items())


def test_all_blocks_with_dropped_state_is_adamw_restarted_on_the_blocks() -> None:
    every, full = lisa(8, 3), start(build("method=full", *EIGHT, *RATE))
    blocks = [p for n, p in full.model.named_parameters() if depth_of(n) is not None]
    for step in range(8):
        if step in (3, 6):
            full.forget(blocks)
        update(every)
        update(full)
    assert all(torch.equal(w, weights(full)[name]) for name, w in weights(every).items())
    plain = start(build("method=full", *EIGHT, *RATE))
    for _ in range(8):
        update(plain)
    assert not torch.equal(weights(plain)["model.layers.0.mlp.down_proj.weight"], weights(every)["model.layers.0.mlp.down_proj.weight"])


def test_kept_state_is_what_the_public_callback_does() -> None:
    """Before every K-th update it freezes all blocks and unfreezes those that it draws; AdamW's state is left alone."""
    run, full = lisa(2, 3, "method.lisa.keep_state=true"), start(build("method=full", *EIGHT, *RATE))
    dropped = lisa(2, 3)
    layers = full.model.model.layers
    for step in range(11):
        update(run)
        update(dropped)
        if step % 3 == 0:
            layers.requires_grad_(False)
            for depth in awake(run):
                layers[depth].requires_grad_(True)
        update(full)
    woken = Counter(itertools.chain(*(run.stack.methods[0].awake(run) for run.step in (0, 3, 6, 9))))
    assert max(woken.values()) > 1  # some block woke up to its old moments
    assert all(torch.equal(w, weights(full)[name]) for name, w in weights(run).items())
    assert not all(torch.equal(w, weights(full)[name]) for name, w in weights(dropped).items())


def test_schedule_goes_on_over_switches() -> None:
    words = (
        "method=lisa",
        "method.lisa.gamma=2",
        "method.lisa.interval=2",
        *EIGHT,
        "optimizer.lr=1e-3",
        "schedule=linear",
        "schedule.warmup=0",
    )
    run = build(*words)
    rates: list[float] = []
    set_rate = run.set_rate
    run.set_rate = lambda: (set_rate(), rates.append(run.optimizer.param_groups[0]["lr"]))  # type: ignore[method-assign]
    run.fit(5)
    assert rates == pytest.approx([1e-3, 8e-4, 6e-4, 4e-4, 2e-4])
    assert compose(["method=lisa"]).optimizer.name == "adamw"


# -- state -------------------------------------------------------------------------------------------------------------


def state_bytes(run: Run) -> int:
    return sum(t.numel() * t.element_size() for s in run.optimizer.state.values() for t in s.values() if isinstance(t, Tensor) and t.dim())


@pytest.mark.parametrize("keep", [False, True])
def test_bytes_of_the_optimizer_state(keep: bool) -> None:
    run = lisa(2, 2, f"method.lisa.keep_state={str(keep).lower()}")
    size = Counter()
    for name, parameter in run.model.named_parameters():
        size[depth_of(name)] += parameter.numel() * parameter.element_size()
    limit = 2 * (size[None] + 2 * size[0])
    seen = []
    for _ in range(12):
        update(run)
        seen.append(state_bytes(run))
    if keep:
        assert max(seen) > limit
        assert seen == sorted(seen)
    else:
        assert set(seen) == {limit}
        assert {id(p) for p in run.optimizer.state} == {id(p) for p in run.active().values()}


def test_a_block_that_wakes_begins_at_one() -> None:
    """Also one that is drawn twice running."""
    run = lisa(2, 2)
    beta2 = run.settings.optimizer.betas[1]
    twice = False
    for period in range(14):
        old = awake(run)
        window = run.window(run.step)
        run.stack.begin(run)
        run.events["switches"] -= 1
        run.stack.methods[0].now = old  # the update makes the same draw again
        run.gradients(window)
        norm = torch.nn.utils.get_total_norm([p.grad for p in run.active().values()])
        scale = min(1.0, float(run.settings.trainer.clip / (norm + 1e-6)))
        grads = {name: p.grad * scale for name, p in run.active().items()}
        run.update(window)
        twice |= bool(old) and bool(set(old or []) & set(awake(run)))
        for name, parameter in run.active().items():
            state = run.optimizer.state[parameter]
            if depth_of(name) is None:
                assert state["step"] == 2 * period + 1
            else:
                assert state["step"] == 1
                assert torch.allclose(state["exp_avg_sq"], (1 - beta2) * grads[name].square(), rtol=1e-4, atol=1e-20)
        update(run)
    assert twice


def test_an_update_has_full_rank() -> None:
    """Where LoRA's has that of its factors."""
    run, lora = lisa(2, 6), start(build("method=lora", "method.lora.rank=4", *EIGHT, *RATE))
    before = weights(run)
    for _ in range(6):
        update(run)
        update(lora)
    name = f"model.layers.{awake(run)[0]}.self_attn.q_proj.weight"
    change = weights(run)[name] - before[name]
    assert torch.linalg.matrix_rank(change) > 16
    original = lora.model.get_parameter(name).detach().clone()
    merged = lora.merge().get_parameter(name)
    assert torch.linalg.matrix_rank(merged - original, rtol=1e-4) <= 4


# -- the run -----------------------------------------------------------------------------------------------------------


def test_everything_can_be_trained_again_afterwards() -> None:
    run = lisa(1, 2)
    for _ in range(3):
        update(run)
    assert not all(p.requires_grad for p in run.model.parameters())
    run.stack.finish(run)
    assert all(p.requires_grad for p in run.model.parameters())


def test_beside_a_method_that_has_no_optimizer() -> None:
    run = build("method=[mezo,lisa]", "method.lisa.gamma=2", "method.lisa.interval=2", *EIGHT, "optimizer.lr=1e-3")
    start(run)
    assert run.optimizer is None
    for _ in range(3):
        before = weights(run)
        update(run)
        update(run)
        now = run.stack.methods[1].now
        for depth, changed in moved(run, before).items():
            assert changed == {depth is None or depth in now}


@pytest.mark.parametrize("at", [7, 8, 9, 10])
def test_resumed_run_is_bit_equal(at: int, tmp_path: Path) -> None:
    """Whether the checkpoint stands in the midst of a period (6 of 4..7) or a draw comes right after it (update 9: 8)."""
    knobs = ("method=lisa", "method.lisa.gamma=2", "method.lisa.interval=4", "optimizer.lr=1e-3")
    if at == 9:
        knobs = (*knobs[:2], "method.lisa.interval=3", *knobs[3:])
    run = check_resume(*knobs, *EIGHT, "trainer.max_steps=12", folder=tmp_path, at=at)
    assert run.events["switches"] == (4 if at == 9 else 3)


def test_resumed_run_with_kept_state_is_bit_equal(tmp_path: Path) -> None:
    knobs = ("method=lisa", "method.lisa.gamma=2", "method.lisa.interval=2", "method.lisa.keep_state=true", "optimizer.lr=1e-3")
    check_resume(*knobs, *EIGHT, "trainer.max_steps=10", folder=tmp_path, at=8)
