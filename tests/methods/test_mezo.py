"""MeZO: two forward passes a step, exact where the loss is quadratic, replayable, in the memory of inference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tools import SMALL, build, check_resume, fresh_process, toy_data, train, weights
from torch import Tensor, nn

from ftrecipes.compose import compose
from ftrecipes.errors import RunFailed, UserError
from ftrecipes.methods.optimizers import mezo
from ftrecipes.methods.optimizers.mezo import add_z, replay
from ftrecipes.record import Record
from ftrecipes.run import Run

MUTATION = (
    "ftrecipes/methods/optimizers/mezo.py",
    "add_z(parameters.values(), seed, -2 * self.eps)",
    "add_z(parameters.values(), seed, -self.eps)",
)


def step(run: Run, number: int = 0) -> list[tuple[int, float]]:
    """One update of a long fit; its seeds and estimates."""
    run.fit_steps, run.fit_step = 10**6, number
    run.update(run.window(number))
    found: list[tuple[int, float]] = run.stack.methods[0].history[-1][0]
    return found


def direction(run: Run, seed: int) -> dict[str, Tensor]:
    """z of a seed, by name."""
    z = {name: torch.zeros_like(p) for name, p in run.trainable().items()}
    add_z(z.values(), seed, 1.0)
    return z


def gradient(run: Run, number: int = 0) -> dict[str, Tensor]:
    run.gradients(run.window(number))
    return {name: p.grad.clone() for name, p in run.trainable().items()}


def dot(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return sum(float((a[name].double() * b[name].double()).sum()) for name in a)


# -- the estimate ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [1e-3, 1e-1, 1.0])
def test_exact_on_quadratics(eps: float) -> None:
    run = build("method=mezo", f"method.mezo.eps={eps}", "model=toy", "model.dtype=float64", "data.noise=0.3")
    grad = gradient(run)
    ((seed, g),) = step(run)
    assert g == pytest.approx(dot(grad, direction(run, seed)), rel=1e-9)
    assert abs(g) > 1e-2


def test_z_is_one_standard_normal_stream_over_all_tensors() -> None:
    run = build("method=mezo", *SMALL)
    z = direction(run, 7)
    names = [name for name, p in run.model.named_parameters() if p.requires_grad]
    assert list(z) == names
    assert sum(name.endswith(("lm_head.weight", "embed_tokens.weight")) for name in names) == 1  # tied: visited once
    flat = torch.cat([t.flatten() for t in z.values()])
    assert abs(flat.mean()) < 0.01 and abs(flat.std() - 1) < 0.01
    first = z[names[0]]
    assert torch.equal(first.flatten(), torch.randn(first.numel(), generator=torch.Generator().manual_seed(7)))
    assert len(flat.unique()) > 0.99 * len(flat)  # no tensor or chunk repeats another's numbers


def test_chunks_have_numbers_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mezo, "CHUNK", 100)
    z = torch.zeros(7, 150)
    add_z([z], 3, 1.0)
    again = torch.zeros(7, 150)
    add_z([again], 3, 1.0)
    assert torch.equal(z, again)
    chunks = z.flatten().split(100)
    assert all(abs(float((a[:50] * b[:50]).mean())) < 0.7 for a, b in zip(chunks, chunks[1:], strict=False))
    assert len(z.unique()) == z.numel()


def test_unbiased_and_as_noisy_as_the_formula() -> None:
    """20,000 directions in 6 dimensions: E[g z] is the gradient; E|g z|^2 / |grad|^2 = d + 2; (n + d + 1) / n for means of n."""
    size = ("model.inputs=6", "model.outputs=1", "data.inputs=6", "data.outputs=1", "trainer.batch=32")
    run = build("method=mezo", "method.mezo.n=10", "model=toy", "model.dtype=float64", *size, "optimizer.lr=0")
    grad = gradient(run)["layer.weight"].flatten()
    run.fit_steps = 2000
    window = run.window(0)
    for _ in range(2000):
        run.update(window)
    pairs = torch.stack([
        torch.stack([g * direction(run, seed)["layer.weight"].flatten() for seed, g in found]) for found, _ in run.stack.methods[0].history
    ])  # fmt: skip
    assert pairs.shape == (2000, 10, 6)
    assert (pairs.mean((0, 1)) - grad).norm() < 0.05 * grad.norm()
    power = grad.square().sum()
    assert float(pairs.square().sum(-1).mean() / power) == pytest.approx(8.0, abs=0.4)
    assert float(pairs.mean(1).square().sum(-1).mean() / power) == pytest.approx(1.7, abs=0.1)


# -- the step ----------------------------------------------------------------------------------------------------------


def test_restored_after_a_step_of_rate_zero() -> None:
    run = build("method=mezo", "model=toy", "model.kind=two_layer", "optimizer.lr=0")
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.fill_(0.05)
    step(run)
    assert all((p - 0.05).abs().max() < 1e-6 for p in run.model.parameters())
    window = run.window(0)
    for _ in range(999):
        run.update(window)
    assert run.step == 1000
    assert all((p - 0.05).abs().max() < 1e-5 for p in run.model.parameters())


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("n", [1, 3])
def test_update(n: int, decay: float) -> None:
    """theta - lr (mean_i g_i z_i + decay theta), vectors not decayed; all estimates at the same theta."""
    toy = ("model=toy", "model.kind=two_layer", "model.bias=true", "model.dtype=float64", "data.noise=0.3")
    run = build("method=mezo", f"method.mezo.n={n}", *toy, "optimizer.lr=0.02", f"optimizer.weight_decay={decay}")
    with torch.no_grad():
        run.model.first.bias.fill_(0.5)
    before, grad = weights(run), gradient(run)
    found = step(run)
    assert len(found) == len({seed for seed, _ in found}) == n
    z = [direction(run, seed) for seed, _ in found]
    for i, (_, g) in enumerate(found):
        assert g == pytest.approx(dot(grad, z[i]), rel=1e-3)  # nearly quadratic at this eps
    for name, now in weights(run).items():
        estimate = sum(g * z[i][name] for i, (_, g) in enumerate(found)) / n
        wanted = before[name] - 0.02 * (estimate + (decay * before[name] if before[name].dim() > 1 else 0.0))
        assert torch.allclose(now, wanted, atol=1e-13, rtol=0), name
    assert found[0][0] != step(run, 1)[0][0]  # another direction in the next step


def test_agreement_with_the_authors_trainer() -> None:
    """Their zo_step and zo_update written out, on the same seeds and batches: torch's global stream gives the same z."""
    run, other = build("method=mezo", *SMALL, "optimizer.lr=1e-3"), build("method=full", *SMALL)
    theta = dict(other.model.named_parameters())

    @torch.no_grad()
    def perturb(seed: int, factor: float) -> None:
        torch.manual_seed(seed)
        for parameter in theta.values():
            z = torch.normal(mean=0, std=1, size=parameter.size(), dtype=parameter.dtype)
            parameter.data = parameter.data + factor * z * 1e-3

    other.model.eval()
    for number in range(4):
        ((seed, g),) = step(run, number)
        perturb(seed, 1)
        loss1 = other.loss(other.window(number))
        perturb(seed, -2)
        loss2 = other.loss(other.window(number))
        projected = ((loss1 - loss2) / (2 * 1e-3)).item()
        perturb(seed, 1)
        torch.manual_seed(seed)
        for parameter in theta.values():
            z = torch.normal(mean=0, std=1, size=parameter.size(), dtype=parameter.dtype)
            parameter.data = parameter.data - 1e-3 * (projected * z)
        assert g == pytest.approx(projected, abs=2e-3)  # a float32 loss over 2 eps
        assert float(run._row["loss"]) == pytest.approx(float(loss1), rel=1e-5)
    for name, now in weights(run).items():
        assert torch.allclose(now, theta[name], atol=2e-5), name
    assert min(float((p - other.pristine().get_parameter(n)).abs().max()) for n, p in theta.items()) > 1e-3


def test_settings_are_the_papers() -> None:
    settings = compose(["method=mezo", "model=toy"])
    assert (settings.method.mezo.eps, settings.method.mezo.n, settings.schedule.name, settings.schedule.warmup) == (1e-3, 1, "constant", 0)
    run = build("method=mezo", "model=toy", "optimizer.lr=0.125")
    run.fit(5)
    assert [rate for _, rate in run.stack.methods[0].history] == [0.125] * 5


@pytest.mark.parametrize("word", ["trainer.clip=1.0", "optimizer.momentum=0.9", "optimizer=adamw"])
def test_what_it_would_ignore_is_refused(word: str) -> None:
    with pytest.raises(UserError, match="mezo requires"):
        compose(["method=mezo", "model=toy", word])


def test_methods_that_need_gradients_are_refused_beside_it() -> None:
    with pytest.raises(UserError, match="computes no gradients"):
        compose(["method=[mezo,gmt]", "model=toy"])


def test_accounting(monkeypatch: pytest.MonkeyPatch) -> None:
    run = build("method=mezo", *SMALL)
    calls = []
    run.model.get_decoder().register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))

    def backward(*_: Any, **__: Any) -> None:
        raise AssertionError("a backward pass was run")

    monkeypatch.setattr(Tensor, "backward", backward)
    before = torch.random.get_rng_state()
    run.fit(3)
    assert calls == [False] * 6
    assert run.events["forward_passes"] == 6
    assert all(p.grad is None for p in run.model.parameters())
    assert run.optimizer is None
    torch.random.set_rng_state(before)


def test_micro_batches_are_one_loss() -> None:
    estimates = []
    for micro in (8, 3):
        run = build("method=mezo", *SMALL, f"hardware.micro_batch={micro}", "method.mezo.eps=0.01")
        estimates.append(step(run)[0])
    assert estimates[0][0] == estimates[1][0]
    assert estimates[0][1] == pytest.approx(estimates[1][1], rel=1e-3)


def test_dropout_is_off_in_both_passes() -> None:
    found = []
    for dropout in (0.0, 0.5):
        run = build("method=mezo", "model=toy", "model.kind=two_layer", f"model.dropout={dropout}")
        run.model.train()
        found.append([step(run, i) for i in range(3)])
        losses = run.loss(run.window(0)), run.loss(run.window(0))
        assert torch.equal(*losses)
    assert found[0] == found[1]


def test_adapters_alone_are_perturbed() -> None:
    run = build("method=[lora,mezo]", *SMALL, "optimizer.lr=0.01")
    before = weights(run)
    run.fit(3)
    for name, now in weights(run).items():
        assert torch.equal(now, before[name]) == ("delta" not in name)


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    run = build("method=mezo", "model=toy", "optimizer.lr=1e38", "data.noise=1.0")
    with pytest.raises(RunFailed, match="not finite at update"):
        run.fit(20)


# -- the history -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("knobs", [(), ("method.mezo.n=2", "optimizer.weight_decay=0.01")], ids=["plain", "n=2, decay"])
def test_a_run_is_its_start_and_pairs_of_numbers(knobs: tuple[str, ...], tmp_path: Path) -> None:
    words = ("method=mezo", *SMALL, *knobs, "optimizer.lr=1e-3", "trainer.max_steps=20", "method.mezo.eps=0.01")
    run = train(*words, folder=tmp_path)
    history = json.loads((tmp_path / "tuned" / "structure.json").read_text())["structure"]["mezo"]["history"]
    assert len(history) == 20
    start = build(*words)
    moved = {name: (p - run.model.get_parameter(name)).abs().max() for name, p in start.model.named_parameters()}
    assert min(moved.values()) > 1e-4
    replay(start.trainable(), history, start.settings.optimizer.weight_decay)
    for name, parameter in start.model.named_parameters():
        assert torch.allclose(parameter, run.model.get_parameter(name), atol=4e-6, rtol=0), name


def test_resumed_run_is_bit_equal(tmp_path: Path) -> None:
    run = check_resume("method=mezo", *SMALL, "trainer.max_steps=11", "optimizer.lr=1e-3", folder=tmp_path, at=8)
    assert run.events["forward_passes"] == 22
    assert len(run.stack.methods[0].history) == 11
    assert Record(tmp_path / "resumed").info["results"]["steps"] == 11


# -- what it is for ----------------------------------------------------------------------------------------------------


def separable() -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 10, generator=rng)
    return x, torch.where(x @ torch.randn(10, 1, generator=rng) >= 0, 1.0, -1.0)


BLACK_BOX = ("model=toy", "model.inputs=10", "model.outputs=1", "trainer.batch=1000", "optimizer.lr=0.05")


def accuracy(run: Run, steps: int) -> float:
    """Accuracy on the 1000 points after steps on all of them, from 0.1 N(0, I)."""
    x, y = separable()
    start = torch.Generator().manual_seed(1)
    with torch.no_grad():
        run.model.layer.weight.copy_(0.1 * torch.randn(1, 10, generator=start))
    window = run.window(0)
    run.fit_steps = steps
    run.optimizer = run.build_optimizer()
    for _ in range(steps):
        run.update(window)
    return float((run.model(x) * y > 0).float().mean())


def test_a_loss_without_gradient_is_minimised() -> None:
    data = toy_data("separable", *separable())
    words = (*BLACK_BOX, f"data={data}", "model.loss=zero_one")
    run = build("method=mezo", "method.mezo.eps=0.1", *words)
    first = accuracy(build("method=mezo", *words), 0)
    assert first < 0.8
    assert accuracy(run, 3000) > 0.97
    backprop = build("method=full", *words, "optimizer=sgd", "schedule=constant", "schedule.warmup=0")
    backprop.update.apply = lambda loss: None  # there is no gradient to apply
    assert accuracy(backprop, 5) == first


def test_the_metric_can_be_the_objective() -> None:
    data = toy_data("separable", *separable())
    knobs = ("method.mezo.eps=0.1", *BLACK_BOX, f"data={data}")
    direct = build("method=mezo", *knobs, "model.loss=zero_one")
    metric = build("method=mezo", *knobs, "model.loss=logistic", "method.mezo.metric=true")
    split = build("method=mezo", *knobs, "model.loss=logistic", "method.mezo.metric=true", "hardware.micro_batch=300")
    found = [[step(run, i)[0] for i in range(3)] for run in (direct, metric, split)]
    for other in found[1:]:
        assert [seed for seed, _ in other] == [seed for seed, _ in found[0]]
        assert [g for _, g in other] == pytest.approx([g for _, g in found[0]], abs=1e-5)
    squared = build("method=mezo", "method.mezo.metric=true", "model=toy")  # a mean squared error is minimised as it is
    plain = build("method=mezo", "model=toy")
    assert step(squared)[0][1] == pytest.approx(2 / 16 * step(plain)[0][1], rel=1e-2)


# -- memory ------------------------------------------------------------------------------------------------------------

MEMORY = """
import gc
from ftrecipes.methods.optimizers import mezo
torch.set_num_threads(1)
shape = "{num_hidden_layers:2,hidden_size:1024,intermediate_size:2816,num_attention_heads:4,num_key_value_heads:4}"
words = ["model=tiny-llama", "model.weights=random", "data.size=8", "data.max_length=32", "trainer.batch=1"]
small = build("method=mezo", *words, "model.architecture={num_hidden_layers:1}")
small.update(small.window(0))  # what libraries load when they are first used
del small
gc.collect()
base = resident()
run = build("method=mezo", *words, f"model.architecture={shape}")
run.fit_steps = 10
window = run.window(0)
gc.collect()
inference = peak(lambda: run.loss(window)) - base
steps = peak(lambda: (run.update(window), run.update(window))) - base
mezo.CHUNK = 2**40
whole = peak(lambda: run.update(window)) - base
weights = sum(p.numel() * p.element_size() for p in run.model.parameters())
largest = max(p.numel() * p.element_size() for p in run.model.parameters())
print(json.dumps(dict(weights=weights, largest=largest, inference=inference, steps=steps, whole=whole)))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak of resident memory")
def test_peak_is_that_of_inference() -> None:
    found = fresh_process(MEMORY)
    assert found["weights"] > 0.85 * found["inference"]  # weights dominate
    assert found["steps"] < 1.05 * found["inference"]
    assert found["whole"] > 1.05 * found["inference"]  # were z drawn for a whole tensor, this would tell


def test_head_is_not_a_parameter_of_its_own() -> None:
    run = build("method=mezo", *SMALL)
    before = weights(run)
    ((seed, g),) = step(run)
    z = direction(run, seed)
    name = "model.embed_tokens.weight"
    moved = weights(run)[name] - before[name]
    assert torch.allclose(moved, -run.rate * g * z[name], atol=1e-6)
    assert isinstance(run.model.lm_head, nn.Linear)
    assert run.model.lm_head.weight is run.model.get_input_embeddings().weight
