"""S2FT: heads and channels are permuted into slices, the function stays, and the slices alone train."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tools import SMALL, build, check_resume, train, weights
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, Olmo2Config, Olmo2ForCausalLM, Qwen2Config, Qwen2ForCausalLM

from ftrecipes.anatomy import Anatomy
from ftrecipes.compose import compose
from ftrecipes.errors import UserError
from ftrecipes.methods.selection.s2ft import S2FT, Slice
from ftrecipes.run import Run

MUTATION = ("ftrecipes/methods/selection/s2ft.py", "d * group, inputs=True), [q, k, *norms])", "d * group, inputs=True), [k, *norms])")

ALL = ("v_ratio=0.5", "o_ratio=0.5", "u_ratio=0.3", "d_ratio=0.3")
STEADY = ("schedule=constant", "schedule.warmup=0", "trainer.clip=.inf")


def words(*knobs: str) -> tuple[str, ...]:
    return ("method=s2ft", *SMALL, *(f"method.s2ft.{knob}" for knob in knobs))


def double(*more: str) -> Run:
    """A run in float64."""
    run = Run(compose(more))
    run.load_model()
    run.model.double()
    run.load_data()
    run.prepare()
    return run


def s2ft(run: Run) -> Any:
    return run.stack.methods[0]


def logits(run: Run) -> Tensor:
    with torch.no_grad():
        return run.model(torch.arange(3, 43).view(2, 20)).logits  # type: ignore[no-any-return]


def slices(run: Run) -> dict[str, Slice]:
    return dict(s2ft(run).deltas)


# -- the permutation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
def test_permuted_model_is_the_same_function_and_comes_back_bit_for_bit(seed: int) -> None:
    run = double(*words(*ALL), f"seed={seed}")
    before, y = weights(run), logits(run)
    s2ft(run).pack()
    packed = weights(run)
    assert (logits(run) - y).abs().max() < 1e-12
    for block in range(2):
        for name in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.up_proj",
            "mlp.gate_proj",
            "mlp.down_proj",
        ):
            name = f"model.layers.{block}.{name}.weight"
            touched = any(n.startswith(f"model.layers.{block}.{'mlp' if 'mlp' in name else 'self_attn'}") for n in slices(run))
            if touched and "mlp" in name:
                assert not packed[name].equal(before[name])
            assert packed[name].flatten().sort().values.equal(before[name].flatten().sort().values)
    s2ft(run).unpack()
    assert all(w.equal(before[name]) for name, w in weights(run).items())


def test_what_was_picked_is_one_slice() -> None:
    run = build(*words(*ALL), "seed=1")
    base = weights(run)
    picked = {name: delta.index.clone() for name, delta in slices(run).items()}
    s2ft(run).pack()
    both = 0
    for name, delta in slices(run).items():
        W, start, n = run.model.get_parameter(f"{name}.weight"), delta.start, len(delta.index)
        of_base = base[f"{name}.weight"]
        got, wanted = (W[:, start : start + n], of_base[:, picked[name]]) if delta.inputs else (W[start : start + n], of_base[picked[name]])
        assert got.equal(wanted), name
        both += delta.inputs and start > 0
    assert both  # some slice begins behind the ones that only U or V picked
    shared = [name for name, d in slices(run).items() if d.inputs and name.endswith("down_proj")]
    for name in shared:
        up, down = slices(run)[name.replace("down", "up")], slices(run)[name]
        overlap = set(up.units.tolist()) & set(down.units.tolist())
        assert len(overlap) == up.start + len(up.units) - down.start  # both lies in the midst


def tower(model: Any, **ratios: float) -> tuple[S2FT, Any]:
    """S2FT on a lone model in float64, picked at random, its slices filled with noise."""
    torch.manual_seed(0)
    model = model.double().eval().requires_grad_(False)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    knobs = {
        "v_ratio": 0.0,
        "o_ratio": 0.0,
        "u_ratio": 0.0,
        "d_ratio": 0.0,
        **ratios,
        "strategy": "random",
        "keep": "smallest",
        "calibration": 1,
    }
    run: Any = Run(compose(words("o_ratio=0.5")))
    run.model, run.anatomy = model, Anatomy(model)
    method = S2FT("s2ft", knobs)
    method.prepare(run)
    for delta in method.deltas.values():
        nn.init.normal_(delta.s, std=0.3)
    return method, run


SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 48,
}
FAMILIES: dict[str, Callable[[], Any]] = {
    "biases": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "norms over all heads": lambda: Olmo2ForCausalLM(Olmo2Config(**SIZES)),
    "fused": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=3, n_head=4)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_keep_their_function_and_train_the_same_entries_packed_or_not(family: str) -> None:
    method, run = tower(FAMILIES[family](), v_ratio=0.4, o_ratio=0.4, u_ratio=0.3, d_ratio=0.3)
    assert len(method.deltas) > 6
    base, y = weights(run), logits(run)
    near = 1e-5 if family == "norms over all heads" else 1e-10  # its norms compute in float32
    with torch.no_grad():
        method.pack()
        assert (logits(run) - y).abs().max() < near
        method.unpack()
        assert all(w.equal(base[n]) for n, w in weights(run).items())
        method.merge(run)
        assert (logits(run) - y).abs().max() < near
        assert any(not w.equal(base[n]) for n, w in weights(run).items())


def test_what_it_cannot_permute_is_refused() -> None:
    with pytest.raises(UserError, match=r"pick no head and no channel .*raise one"):
        build(*words("o_ratio=0.1", "d_ratio=0.001"))
    with pytest.raises(UserError, match="s2ft is for"):
        compose(["method=s2ft", "model=toy"])
    with pytest.raises(UserError, match="both act on the same weights"):
        compose(["method=[s2ft,lora]", *SMALL, "method.lora.targets=[q]"])
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES))
    model.model.layers[1].self_attn.sinks = nn.Parameter(torch.zeros(8))
    with pytest.raises(UserError, match=r"block 1 .* belongs to single heads \(model.layers.1.self_attn.sinks\)"):
        tower(model, o_ratio=0.4)
    with pytest.raises(UserError, match=r"no plain MLP"):
        model.model.layers[2].mlp.norm = nn.LayerNorm(48)
        tower(model, d_ratio=0.4)


# -- gradients and updates ---------------------------------------------------------------------------------------------


def test_gradient_is_the_slice_of_the_dense_gradient() -> None:
    run, full = double(*words(*ALL)), double("method=full", *SMALL)
    full.gradients(full.window(0))
    for packed in (True, False):
        if packed:
            s2ft(run).pack()
        run.gradients(run.window(0))
        kinds = set()
        for name, delta in slices(run).items():
            G = full.model.get_parameter(f"{name}.weight").grad
            wanted = G[:, delta.index] if delta.inputs else G[delta.index]
            assert wanted.abs().max() > 1e-6
            assert torch.allclose(delta.s.grad, wanted, atol=1e-10, rtol=0), name
            kinds.add(name.rpartition(".")[2])
        assert kinds == {"v_proj", "o_proj", "up_proj", "down_proj"}
        if packed:
            s2ft(run).unpack()


def test_twenty_steps_of_sgd_are_those_of_masked_full_tuning() -> None:
    sgd = ("optimizer=sgd", "optimizer.lr=0.3", "optimizer.momentum=0", *STEADY)
    run, full = double(*words(*ALL), *sgd), double("method=full", *SMALL, *sgd)
    base = weights(full)
    masks = {}
    for name, delta in slices(run).items():
        masks[f"{name}.weight"] = (delta.merged(torch.zeros_like(base[f"{name}.weight"])) * 0).index_fill(
            int(delta.inputs), delta.index, 1.0
        )
    full.fit_steps, full.optimizer = 20, full.build_optimizer()
    for step in range(20):
        full.set_rate()
        full.gradients(full.window(step))
        for name, parameter in full.model.named_parameters():
            parameter.grad = parameter.grad * masks[name] if name in masks else None
        full.update.apply()
    run.stack.drive(run, lambda: run.fit(20))
    trained = run.merge()
    for name, parameter in trained.named_parameters():
        assert torch.allclose(parameter, full.model.get_parameter(name), atol=1e-8, rtol=0), name
        if name in masks:
            moved = parameter.detach() != base[name]
            assert moved.any() and not (moved & (masks[name] == 0)).any(), name
        else:
            assert parameter.equal(base[name]), name


def test_merged_change_is_s_inside_and_nothing_outside() -> None:
    run = double(*words(*ALL), "optimizer.lr=1e-2", *STEADY)
    base = weights(run)
    run.stack.drive(run, lambda: run.fit(3))
    learned = {name: (delta, delta.s.detach().clone()) for name, delta in slices(run).items()}
    merged = run.merge()
    for name, (delta, s) in learned.items():
        change = merged.get_parameter(f"{name}.weight").detach() - base[f"{name}.weight"]
        inside = change[:, delta.index] if delta.inputs else change[delta.index]
        assert s.abs().min() > 0 and torch.allclose(inside, s, atol=1e-12)
        assert (change != 0).sum() == s.numel()


def test_counts() -> None:
    """The budget is that of all layers together, and int() comes last."""
    d, f, L, group, head = 64, 96, 2, 2, 32
    run = build(*words(*ALL))
    n = {kind: sum(p.numel() for name, p in run.trainable().items() if f".{kind}_proj." in name) for kind in ("v", "o", "up", "down")}
    assert n == {
        "v": int(2 * L * 0.5) * head * d,
        "o": int(2 * L * 0.5) * group * head * d,
        "up": int(f * L * 0.3) * d,
        "down": int(f * L * 0.3) * d,
    }
    assert set(run.events) == {"heads", "channels"} and run.events["channels"] == 2 * int(f * L * 0.3)
    one = build(*words("o_ratio=0.25", "d_ratio=0"))  # one group of heads in all: a layer without has no parameters
    assert len(one.trainable()) == 1
    picks = [sum(len(x.units) for x in slices(build(*words("d_ratio=0.1"), f"seed={s}")).values() if x.inputs) for s in range(3)]
    assert set(picks) == {int(f * L * 0.1) + 1}  # and one head of o_ratio 0.25
    per_layer = [len(x.units) for x in slices(build(*words("o_ratio=0", "d_ratio=0.3"), "seed=2")).values()]
    assert len(set(per_layer)) > 1  # drawn from one pool


# -- which heads and channels ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["weight", "activation", "weight_activation", "gradient"])
@pytest.mark.parametrize("keep", ["smallest", "largest"])
def test_scores(strategy: str, keep: str) -> None:
    run = build(*words("o_ratio=0.25", "d_ratio=0.1", f"strategy={strategy}", f"keep={keep}", "calibration=8"))
    plain = build("method=full", *SMALL)
    batch = next(plain.calibration(8))
    inputs: dict[str, Tensor] = {}
    names = [f"model.layers.{i}.{n}" for n in ("self_attn.o_proj", "mlp.down_proj") for i in range(2)]
    for name in names:
        plain.model.get_submodule(name).register_forward_pre_hook(lambda m, x, name=name: inputs.__setitem__(name, x[0].detach()))
    losses = plain.task.losses(plain.task.outputs(plain.model, batch), batch)
    losses.mean().backward()
    for kind, units, width in (("o_proj", 2, 64), ("down_proj", 96, 1)):
        score = []
        for name in (n for n in names if kind in n):
            W = plain.model.get_parameter(f"{name}.weight")
            norm, grad = (torch.stack([x[:, j * width : (j + 1) * width].norm() for j in range(units)]) for x in (W.detach(), W.grad))
            mean = torch.stack([inputs[name][..., j * width : (j + 1) * width].abs().mean() for j in range(units)])
            score.append({"weight": norm, "activation": mean, "weight_activation": norm * mean, "gradient": grad}[strategy])
        order = torch.cat(score).argsort(descending=keep == "largest")
        wanted = sorted(order[: int(2 * units * (0.25 if width > 1 else 0.1))].tolist())
        got = sorted(
            j + units * layer
            for layer in range(2)
            for n, x in slices(run).items()
            if n.endswith(kind) and f".{layer}." in n
            for j in x.units.tolist()
        )
        assert got == wanted
    assert all(p.grad is None for p in run.model.parameters())
    assert {n for n, p in run.model.named_parameters() if p.requires_grad} == set(run.trainable())
    assert all(n.endswith(".s") for n in run.trainable())


# -- memory ------------------------------------------------------------------------------------------------------------


def saved_bytes(model: nn.Module, function: Callable[[], Tensor]) -> int:
    """Storage that the backward pass will need beside the weights; a view counts as all that it keeps alive."""
    kept: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(t: Tensor) -> Tensor:
        if (at := t.untyped_storage().data_ptr()) not in weights:
            kept[at] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = function()
        assert y.requires_grad
    return sum(kept.values())


def test_a_down_layer_keeps_the_picked_columns_alone() -> None:
    run = build(*words("o_ratio=0", "d_ratio=0.25"))
    s2ft(run).pack()
    x = torch.randn(4, 32, 96)
    for name, delta in slices(run).items():
        module = run.model.get_submodule(name)
        assert saved_bytes(module, lambda: module(x.requires_grad_(True))) == 4 * 32 * len(delta.units) * 4  # noqa: B023
        assert len(delta.units) < 40
    dense = nn.Linear(96, 64, bias=False)
    assert saved_bytes(dense, lambda: dense(x)) == 4 * 32 * 96 * 4


def test_gradients_and_moments_are_those_of_the_slices_and_activations_fall() -> None:
    run, full = build(*words("o_ratio=0", "d_ratio=0.1")), build("method=full", *SMALL)
    s2ft(run).pack()
    batch = run.window(0).micros[0]

    def held(r: Run) -> tuple[int, int, int]:
        activations = saved_bytes(r.model, lambda: r.stack.loss(r, batch))
        r.fit_steps, r.optimizer = 9, r.build_optimizer()
        r.gradients(r.window(0))
        grads = sum(p.grad.numel() for p in r.model.parameters() if p.grad is not None)
        r.update(r.window(0))
        moments = sum(t.numel() for s in r.optimizer.state.values() for t in s.values() if t.dim())
        return activations, grads, moments

    mine, theirs = held(run), held(full)
    size = int(2 * 96 * 0.1) * 64
    assert mine[1:] == (size, 2 * size)
    assert theirs[1] > 60 * size and theirs[2] == 2 * theirs[1]
    assert mine[0] < 0.75 * theirs[0]


# -- adapters ----------------------------------------------------------------------------------------------------------


def test_adapters_of_disjoint_picks_add_up() -> None:
    made = []
    for keep in ("smallest", "largest"):
        run = build(*words("o_ratio=0.25", "d_ratio=0.2", "strategy=weight", f"keep={keep}"), "optimizer.lr=1e-2", *STEADY)
        run.stack.drive(run, lambda run=run: run.fit(2))
        made.append(slices(run))
    plain = build("method=full", *SMALL)
    base = weights(plain)

    def fuse(W: dict[str, Tensor], which: dict[str, Slice]) -> dict[str, Tensor]:
        with torch.no_grad():
            return W | {f"{n}.weight": delta.merged(W[f"{n}.weight"]) for n, delta in which.items()}

    first, second = fuse(fuse(base, made[0]), made[1]), fuse(fuse(base, made[1]), made[0])
    assert all(first[n].equal(second[n]) for n in base)
    alone = fuse(base, made[1])
    for n, delta in made[0].items():  # the first is taken out again
        back = first[f"{n}.weight"].index_add(int(delta.inputs), delta.index, -delta.s.detach())
        other = alone[f"{n}.weight"]
        assert torch.allclose(back, other, atol=1e-6)
        keep = torch.ones(back.shape[int(delta.inputs)], dtype=torch.bool)
        keep[delta.index] = False
        assert back.movedim(int(delta.inputs), 0)[keep].equal(other.movedim(int(delta.inputs), 0)[keep])


def test_the_update_as_a_lora_is_exact() -> None:
    run = build(*words(*ALL), "optimizer.lr=1e-2")
    run.stack.drive(run, lambda: run.fit(2))
    for name, delta in slices(run).items():
        B, A, scale, _ = s2ft(run).factors(name)
        assert A.shape[0] == B.shape[1] == len(delta.index)
        assert (scale * B @ A).equal(delta.delta())


# -- the run -----------------------------------------------------------------------------------------------------------


def test_weights_have_their_order_before_and_after_a_fit() -> None:
    run = build(*words(*ALL), "optimizer.lr=1e-2")
    base = weights(run)
    within = []
    run.stack.drive(run, lambda: (within.append(weights(run)), run.fit(2)))
    after = weights(run)
    names = [n for n in base if not n.endswith(".s")]
    assert all(after[n].equal(base[n]) for n in names)
    assert any(not within[0][n].equal(base[n]) for n in names)


@pytest.mark.parametrize("at", [5, 7])
def test_resumed_run_is_bit_equal(at: int, tmp_path: Path) -> None:
    run = check_resume(*words(*ALL), "optimizer.lr=1e-2", "trainer.max_steps=8", folder=tmp_path, at=at)
    opened = Run.open(tmp_path / "resumed")
    assert all(w.equal(weights(run)[n]) for n, w in weights(opened).items())
    assert logits(opened).equal(logits(run))


def test_interpolation_scales_the_slices() -> None:
    run = train(
        "method=[s2ft,wise_ft]", "method.wise_ft.alpha=[0.5]", *SMALL, "optimizer.lr=1e-2", "trainer.max_steps=2", "trainer.eval_every=9"
    )
    tuned = train("method=s2ft", *SMALL, "optimizer.lr=1e-2", "trainer.max_steps=2", "trainer.eval_every=9")
    pristine = run.pristine().state_dict()
    half, whole = weights_of(run), weights_of(tuned)
    assert any(not whole[n].equal(pristine[n]) for n in whole)
    for name in whole:
        assert torch.allclose(half[name], (pristine[name] + whole[name]) / 2, atol=1e-6), name


def weights_of(run: Run) -> dict[str, Tensor]:
    """Merged weights."""
    return {n: p.detach().clone() for n, p in run.merge().named_parameters()}
