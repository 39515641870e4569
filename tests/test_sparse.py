"""Sparse selection: compact gradients are the dense ones, state and memory follow the density, moments go by position."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tools import SMALL, build, check_resume, fresh_process, train, tuned
from torch import Tensor, nn
from transformers import GPT2Config
from transformers.pytorch_utils import Conv1D

from ftrecipes.errors import UserError
from ftrecipes.methods.selection.sparse import SparseMethod, carried, largest
from ftrecipes.registry import method
from ftrecipes.run import Run

MUTATION = (
    "ftrecipes/methods/selection/sparse.py",
    "return torch.where(found, values[by[place]], torch.zeros((), dtype=values.dtype, device=values.device))",
    "return torch.where(found, values, torch.zeros((), dtype=values.dtype, device=values.device))",
)

KNOBS: dict[str, Any] = {
    "targets": {"default": ["all-linear"], "item": {"type": "str"}, "help": "roles"},
    "share": {"default": 0.1, "above": 0, "max": 1, "help": "share of the entries that train"},
    "every": {"default": 0, "min": 0, "help": "updates between selections (0: never anew)"},
}


@method("drawn", knobs=KNOBS, about={"picks": "targets"})
class Drawn(SparseMethod):
    """Entries drawn at random, and drawn again."""

    share: float
    every: int

    def select(self, run: Run, part: Any) -> Tensor:
        count = part.weight.numel()
        score = torch.rand(count, generator=run.generator("drawn", part.name, run.step))
        return largest(score, max(1, round(self.share * count)))

    def due(self, run: Run) -> bool:
        return bool(self.every) and run.step % self.every == 0


TOY = ("model=toy", "model.kind=two_layer", "model.bias=true", "method=drawn", "method.drawn.targets=[linear,head]", "trainer.batch=32")


# -- one layer ---------------------------------------------------------------------------------------------------------


def layer(name: str) -> tuple[nn.Module, Tensor]:
    """A module of each kind that can train in part, and an input."""
    rng = torch.Generator().manual_seed(0)

    def x(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    tokens = torch.randint(0, 12, (3, 5), generator=rng)
    tokens[0] = 2
    cases: dict[str, Any] = {
        "linear": lambda: (nn.Linear(6, 4, bias=False), x(3, 5, 6)),
        "linear with bias": lambda: (nn.Linear(6, 4), x(7, 6)),
        "linear on a vector": lambda: (nn.Linear(6, 4), x(6)),
        "conv": lambda: (nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), x(2, 4, 7, 7)),
        "conv, circular, grouped, with bias": lambda: (
            nn.Conv2d(4, 6, 3, padding=1, groups=2, padding_mode="circular"),
            x(2, 4, 6, 6),
        ),
        "embedding": lambda: (nn.Embedding(12, 5), tokens),
        "embedding with a padding row": lambda: (nn.Embedding(12, 5, padding_idx=2), tokens),
        "gpt2": lambda: (Conv1D(4, 6), x(3, 5, 6)),
    }
    torch.manual_seed(1)
    module, inputs = cases[name]()
    if isinstance(module, Conv1D):
        nn.init.normal_(module.bias)
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight)  # the padding row too: a gradient that must not be there would show
    return module, inputs


LAYERS = [
    "linear", "linear with bias", "linear on a vector", "conv", "conv, circular, grouped, with bias",
    "embedding", "embedding with a padding row", "gpt2",
]  # fmt: skip


def attach(module: nn.Module, index: Tensor) -> Drawn:
    """Let these entries of a lone module train."""
    picked = Drawn("drawn", {"targets": [], "share": 0.5, "every": 0})
    run: Any = SimpleNamespace(settings=SimpleNamespace(optimizer=SimpleNamespace(weight_decay=0.0)))
    part: Any = SimpleNamespace(name="layer", module=module, weight=module.weight)
    picked.parts = {"layer": part}
    picked.begin_with(run)
    module.requires_grad_(False)
    picked.attach(run, part, index)
    return picked


def backward(module: nn.Module, x: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor | None]:
    """Output and input gradient of the sum of squares (times position) of a module's output."""
    inputs = x.clone().requires_grad_(x.is_floating_point())
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        y = module(inputs)
    weight = torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype)
    (y * y * weight).sum().backward()
    return y.detach(), inputs.grad


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("double", [False, True], ids=["float32", "float64"])
def test_compact_gradient_is_the_dense_one_at_its_positions(name: str, double: bool) -> None:
    dtype = torch.float64 if double else torch.float32
    dense, x = layer(name)
    sparse, _ = layer(name)
    dense, sparse, x = dense.to(dtype), sparse.to(dtype), x.to(dtype) if x.is_floating_point() else x
    count = dense.weight.numel()
    index = torch.randperm(count, generator=torch.Generator().manual_seed(2))[: count // 3]  # in no order
    picked = attach(sparse, index)
    if getattr(sparse, "bias", None) is not None:
        sparse.bias.requires_grad_(True)
    y, grad_x = backward(dense, x)
    z, sparse_grad_x = backward(sparse, x)
    assert torch.equal(y, z)
    tolerance = 1e-12 if double else 1e-5
    values = picked.chosen["layer"].values
    assert values.dtype == dtype
    assert values.shape == index.shape
    assert torch.allclose(values.grad, dense.weight.grad.reshape(-1)[index], atol=tolerance, rtol=tolerance)
    if grad_x is not None:
        assert torch.allclose(grad_x, sparse_grad_x, atol=tolerance, rtol=tolerance)
    if getattr(sparse, "bias", None) is not None:
        assert torch.allclose(sparse.bias.grad, dense.bias.grad, atol=tolerance, rtol=tolerance)
    assert sparse.weight.grad is None


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("incoming", [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast(name: str, incoming: torch.dtype) -> None:
    dense, x = layer(name)
    sparse, _ = layer(name)
    x = x.to(incoming) if x.is_floating_point() else x
    index = torch.arange(0, dense.weight.numel(), 2)
    picked = attach(sparse, index)
    y, grad_x = backward(dense, x, torch.bfloat16)
    z, sparse_grad_x = backward(sparse, x, torch.bfloat16)
    assert torch.equal(y, z)
    wanted, found = dense.weight.grad.reshape(-1)[index], picked.chosen["layer"].values.grad
    assert found.dtype == torch.float32
    assert (wanted - found).norm() <= 0.01 * wanted.norm()
    if grad_x is not None:
        assert grad_x.dtype == sparse_grad_x.dtype
        assert (grad_x - sparse_grad_x).norm() <= 0.01 * grad_x.norm()


def test_a_second_derivative_is_refused_and_not_wrong() -> None:
    module, x = layer("linear")
    picked = attach(module, torch.arange(5))
    values = picked.chosen["layer"].values
    (first,) = torch.autograd.grad(module(x).square().sum(), values, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.square().sum().backward()


# -- whole models ------------------------------------------------------------------------------------------------------


def gpt2(folder: Path) -> tuple[str, ...]:
    """A two-layer GPT-2 shape (its linear layers are Conv1D), with seeded random weights."""
    GPT2Config(vocab_size=1024, n_positions=128, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.1).save_pretrained(folder)
    small = ("data.size=64", "trainer.batch=8", "trainer.eval_examples=16")
    return ("model=tiny-llama", f"model.path={folder}", "model.weights=random", *small)


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "how", [(), ("hardware.checkpointing=true",), ("hardware.precision=bf16-mixed",)], ids=["plain", "recomputed", "bf16"]
)
def test_gradients_of_a_model(shape: str, how: tuple[str, ...], tmp_path: Path) -> None:
    words = (*(SMALL if shape == "llama" else gpt2(tmp_path)), *how, "model.dtype=float32")
    sparse, dense = build("method=drawn", *words), build("method=full", *words)
    assert sparse.stack.methods[0].chosen.keys() >= {part.name for part in sparse.anatomy.parts if part.role in ("down", "o")}
    loss, wanted_loss = sparse.gradients(sparse.window(0)), dense.gradients(dense.window(0))
    assert torch.equal(loss, wanted_loss)
    grads = {name: p.grad for name, p in dense.model.named_parameters()}
    tolerance = 0.02 if "bf16" in str(how) else 1e-5
    for name, chosen in sparse.stack.methods[0].chosen.items():
        wanted = grads[f"{name}.weight"].reshape(-1)[chosen.index]
        assert wanted.norm() > 0
        assert (chosen.values.grad - wanted).norm() <= tolerance * wanted.norm(), name
    trained = sum(p.numel() for p in sparse.trainable().values())
    assert trained == sum(len(c.index) for c in sparse.stack.methods[0].chosen.values())
    assert all(p.grad is None for n, p in sparse.model.named_parameters() if not n.endswith("chosen.values"))


def test_an_embedding_trains_in_part_and_a_shared_weight_is_refused() -> None:
    words = [w.replace("num_hidden_layers:2", "num_hidden_layers:2,tie_word_embeddings:false") for w in SMALL]
    aim = ("method=drawn", "method.drawn.targets=[embed]")
    run, dense = build(*aim, *words), build("method=full", *words)
    run.gradients(run.window(0))
    dense.gradients(dense.window(0))
    (chosen,) = run.stack.methods[0].chosen.values()
    wanted = dense.model.get_input_embeddings().weight.grad.reshape(-1)[chosen.index]
    assert wanted.abs().max() > 0
    assert torch.allclose(chosen.values.grad, wanted, atol=1e-8, rtol=1e-5)
    with pytest.raises(UserError, match="shares its weight"):
        build(*aim, *SMALL)


def test_frozen_entries_are_bit_equal_and_the_rest_moves() -> None:
    run = build("method=drawn", *SMALL, "optimizer.lr=1e-2", "optimizer.weight_decay=0.1")
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.fit(3)
    run.stack.finish(run)
    seen = set()
    for name, chosen in run.stack.methods[0].chosen.items():
        now, then = run.model.get_parameter(f"{name}.weight").reshape(-1), before[f"{name}.weight"].reshape(-1)
        frozen = torch.ones(len(now), dtype=torch.bool)
        frozen[chosen.index] = False
        assert torch.equal(now[frozen], then[frozen])
        assert (now[chosen.index] != then[chosen.index]).float().mean() > 0.9
        seen.add(f"{name}.weight")
    rest = [n for n in before if n not in seen and not n.endswith("chosen.values")]
    assert rest
    assert all(torch.equal(before[n], run.model.get_parameter(n)) for n in rest)


def test_decay_acts_on_chosen_entries_as_on_their_matrix() -> None:
    run = build(
        *TOY,
        "optimizer=sgd",
        "optimizer.lr=0.1",
        "optimizer.weight_decay=0.5",
        "schedule=constant",
        "schedule.warmup=0",
        "trainer.clip=.inf",
    )
    run.gradients(run.window(0))
    chosen = run.stack.methods[0].chosen["first"]
    value, grad = chosen.values.detach().clone(), chosen.values.grad.clone()
    run.fit(1)
    assert torch.allclose(chosen.values, value - 0.1 * (grad + 0.5 * value), atol=1e-7)


# -- the optimizer -----------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": (),
    "momentum": ("optimizer=sgd", "optimizer.momentum=0.9"),
    "adamw": ("optimizer=adamw",),
    "lion": ("optimizer=lion",),
    "adafactor": ("optimizer=adafactor",),
}
VECTORS = {"sgd": 0, "momentum": 1, "adamw": 2, "lion": 1, "adafactor": 1}
"""Vectors of the length of the values that each optimizer keeps."""


def live(run: Run, steps: int, of: int) -> None:
    """Some updates of a longer fit, so that optimizer and schedule are still there afterwards."""
    run.fit_steps, run.fit_step = of, 0
    run.optimizer = run.build_optimizer()
    for _ in range(steps):
        run.update(run.window(run.step))


def words_of(optimizer: str) -> tuple[str, ...]:
    return ("optimizer=sgd",) if optimizer == "sgd" else OPTIMIZERS[optimizer]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_state_is_as_long_as_what_is_chosen(optimizer: str) -> None:
    run = build(*TOY, *words_of(optimizer))
    live(run, 2, of=4)
    for chosen in run.stack.methods[0].chosen.values():
        k = len(chosen.index)
        state = run.optimizer.state[chosen.values]
        sizes = [t.numel() for t in state.values() if isinstance(t, Tensor)]
        assert sizes.count(k) == VECTORS[optimizer]
        assert all(size in (k, 1) for size in sizes)
    total = sum(t.numel() for s in run.optimizer.state.values() for t in s.values() if isinstance(t, Tensor))
    k = sum(len(c.index) for c in run.stack.methods[0].chosen.values())
    assert total <= VECTORS[optimizer] * k + 2 * len(run.stack.methods[0].chosen)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_moments_go_by_position_at_a_new_selection(optimizer: str) -> None:
    run = build(*TOY, *words_of(optimizer), "method.drawn.share=0.4", "method.drawn.every=3", "optimizer.lr=0.01")
    live(run, 2, of=6)
    picked = run.stack.methods[0]
    old = {name: chosen.index.clone() for name, chosen in picked.chosen.items()}
    seen: dict[str, dict[str, Tensor]] = {}
    reselect = picked.reselect

    def watch(run: Run, name: str, part: Any) -> None:
        state = run.optimizer.state[picked.chosen[name].values]
        seen[name] = {
            key: t.detach().clone() for key, t in {"values": picked.chosen[name].values, **state}.items() if isinstance(t, Tensor)
        }
        reselect(run, name, part)

    picked.reselect = watch
    run.update(run.window(2))
    assert run.events["reselections"] == 1
    for name, chosen in picked.chosen.items():
        shape = picked.parts[name].weight.shape
        state = run.optimizer.state[chosen.values]
        assert not torch.equal(old[name], chosen.index)
        place = {int(p): i for i, p in enumerate(old[name])}
        stay = [(i, place[int(p)]) for i, p in enumerate(chosen.index) if int(p) in place]
        new = [i for i, p in enumerate(chosen.index) if int(p) not in place]
        assert stay and new
        assert any(i != j for i, j in stay)  # by position, not by rank in the list
        here, there = (torch.tensor(side) for side in zip(*stay, strict=True))
        long = [key for key, t in seen[name].items() if t.numel() == len(chosen.index) and key != "values"]
        assert len(long) == VECTORS[optimizer]
        for key in long:
            assert torch.equal(state[key][here], seen[name][key][there])
            assert (state[key][new] == 0).all()
        for key, then in seen[name].items():
            if key not in long and key != "values":
                assert torch.equal(state[key], then)  # step counters go on
        assert torch.equal(chosen.values[here], seen[name]["values"][there])
        gone = [j for j, p in enumerate(old[name]) if int(p) not in set(chosen.index.tolist())]
        weight = picked.parts[name].weight.reshape(-1)
        assert torch.equal(weight[old[name][gone]], seen[name]["values"][gone])  # a leaver stays where it was moved to
        assert torch.equal(chosen.values[new].detach(), weight[chosen.index[new]])
        assert weight.view(shape).requires_grad is False


def test_carried() -> None:
    old, new = torch.tensor([7, 2, 5]), torch.tensor([1, 2, 7, 9])
    assert carried(old, new, torch.tensor([70.0, 20.0, 50.0])).tolist() == [0.0, 20.0, 70.0, 0.0]


# -- the record --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adamw"])
def test_resumed_run_is_bit_equal(optimizer: str, tmp_path: Path) -> None:
    run = check_resume(
        *TOY, *words_of(optimizer), "method.drawn.every=4", "trainer.max_steps=13", "optimizer.lr=0.01", folder=tmp_path, at=8
    )  # dies right after a selection that no checkpoint has seen
    assert run.events["reselections"] == 3


def test_record_holds_what_was_ever_chosen_and_no_more(tmp_path: Path) -> None:
    words = (*TOY, "method.drawn.every=3", "method.drawn.share=0.05", "trainer.max_steps=10", "optimizer.lr=0.01")
    start = build(*words)
    run = train(*words, folder=tmp_path)
    held = tuned(tmp_path)
    assert not [name for name in held if name.endswith(("first.weight", "layer.weight"))]
    picked = run.stack.methods[0]
    for name, chosen in picked.chosen.items():
        k, total = len(chosen.index), picked.parts[name].weight.numel()
        ever, moved = (held[f"structure/drawn/chosen/{name}/{part}"] for part in ("ever", "moved"))
        assert k < len(ever) == len(moved) <= 4 * k < total
        assert len(ever.unique()) == len(ever)
        now, then = run.model.get_parameter(f"{name}.weight"), start.model.get_parameter(f"{name}.weight")
        changed = (now != then).reshape(-1).nonzero().flatten()
        assert len(changed) > k
        assert set(changed.tolist()) <= set(ever.tolist())
    again = Run.open(tmp_path, data=True)
    assert torch.equal(again.loss(again.window(0)), run.loss(run.window(0)))
    plain = again.merge()
    assert [n for n, _ in plain.named_parameters()] == ["first.weight", "first.bias", "layer.weight", "layer.bias"]
    assert type(plain.first) is nn.Linear
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, run.model.get_parameter(name))


def test_half_precision_weights_train_by_float32_values(tmp_path: Path) -> None:
    words = (
        "method=drawn",
        *SMALL,
        "model.dtype=bfloat16",
        "optimizer.lr=1e-5",
        "trainer.max_steps=6",
        "schedule=constant",
        "method.drawn.every=4",
    )
    run = train(*words, folder=tmp_path)
    for name, chosen in run.stack.methods[0].chosen.items():
        weight = run.model.get_parameter(f"{name}.weight")
        assert weight.dtype == torch.bfloat16 and chosen.values.dtype == torch.float32
        assert torch.equal(weight.reshape(-1)[chosen.index], chosen.values.detach().bfloat16())
        assert (chosen.values.detach() != chosen.values.detach().bfloat16().float()).any()  # steps below bfloat16's are kept
    again = Run.open(tmp_path)
    assert all(torch.equal(p, again.model.get_parameter(n)) for n, p in run.model.named_parameters())


# -- memory ------------------------------------------------------------------------------------------------------------

MEMORY = """
import gc, test_sparse
shape = "{num_hidden_layers:4,hidden_size:768,intermediate_size:2048,num_attention_heads:4,num_key_value_heads:4}"
words = ["model=tiny-llama", "model.weights=random", f"model.architecture={shape}", "data.size=8", "data.max_length=32", "trainer.batch=1"]
torch.set_num_threads(1)
run = build(KEY, *words)
run.fit_steps, run.optimizer = 4, run.build_optimizer()
run.loss(run.window(0))  # what libraries load when they are first used
gc.collect()
weights = sum(p.numel() * p.element_size() for p in run.model.parameters())
largest = max(p.numel() * p.element_size() for p in run.model.parameters())
trained = sum(p.numel() * 4 for p in run.trainable().values())
first = resident()
highest = peak(lambda: (run.update(run.window(0)), run.update(run.window(1))))
gc.collect()
print(json.dumps(dict(weights=weights, largest=largest, trained=trained, peak=highest - first, stays=resident() - first)))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak of resident memory")
def test_memory_falls_with_the_density() -> None:
    sparse = fresh_process(MEMORY.replace("KEY", "'method=drawn', 'method.drawn.share=0.01'"))
    full = fresh_process(MEMORY.replace("KEY", "'method=full'"))
    # all weights: gradients and two moments stay or pass; chosen entries: one layer's gradient at a time
    assert full["peak"] > 2.8 * full["weights"]
    assert sparse["trained"] < 0.03 * sparse["weights"]
    assert sparse["peak"] < 0.4 * sparse["weights"]
    assert sparse["stays"] < 0.2 * sparse["weights"]
