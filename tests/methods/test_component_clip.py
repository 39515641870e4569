"""Component-wise clipping: each tensor's gradient norm is limited on its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tools import SMALL, build, check_resume, toy_data, weights
from torch import Tensor, nn

from ftrecipes.run import Run

MUTATION = (
    "ftrecipes/methods/gradients/component_clip.py",
    "factors = (self.max_clip_value / (norms + 1e-6)).clamp_max(1.0)",
    "factors = (self.max_clip_value / (norms.norm() + 1e-6)).clamp_max(1.0).expand(len(norms))",
)

SGD = ("optimizer=sgd", "schedule=constant", "schedule.warmup=0", "optimizer.weight_decay=0.0")
TWO = ("model=toy", "model.kind=two_layer", "model.bias=true", "data.noise=0.3")


def clipped(run: Run) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The gradients of a window before and after the stack's rules."""
    window = run.window(0)
    run.gradients(window)
    before = {name: p.grad.clone() for name, p in run.trainable().items()}
    run.stack.gradients(run, window)
    return before, {name: p.grad.clone() for name, p in run.trainable().items()}


@pytest.mark.parametrize("c", [0.0005, 0.05, 100.0])
def test_agreement_with_torch_one_tensor_at_a_time(c: float) -> None:
    """Bit for bit, which is what the authors' trainer calls."""
    run = build("method=component_clip", f"method.component_clip.max_clip_value={c}", *SMALL)
    before, after = clipped(run)
    norms = []
    for name, grad in before.items():
        alone = nn.Parameter(torch.zeros_like(grad))
        alone.grad = grad.clone()
        norms.append(nn.utils.clip_grad_norm_([alone], c))
        assert torch.equal(after[name], alone.grad), name
        assert torch.equal(after[name], grad) == bool(norms[-1] <= c)
        assert after[name].norm() <= c * (1 + 1e-5)
        assert torch.cosine_similarity(after[name].flatten(), grad.flatten(), 0) > 1 - 1e-5
    over = sum(bool(norm > c) for norm in norms)
    assert (over == 0) == (c == 100.0) and (over == len(norms)) == (c == 0.0005)
    assert run._row["component_clip/clipped"] == over / len(before)
    assert run.events.get("clipped", 0) == over


@pytest.mark.parametrize("component", ["module", "role"])
def test_wider_components(component: str) -> None:
    words = TWO if component == "module" else SMALL
    run = build(
        "method=component_clip", f"method.component_clip.component={component}", "method.component_clip.max_clip_value=0.02", *words
    )
    before, after = clipped(run)
    groups: dict[str, list[str]] = {}
    for name in before:
        module = name.rpartition(".")[0]
        groups.setdefault(module if component == "module" else "norm" if "norm" in module else module.rpartition(".")[2], []).append(name)
    assert any(len(names) > 1 for names in groups.values()) and len(groups) < len(before)
    for names in groups.values():
        alone = [nn.Parameter(torch.zeros_like(before[n])) for n in names]
        for parameter, name in zip(alone, names, strict=True):
            parameter.grad = before[name].clone()
        nn.utils.clip_grad_norm_(alone, 0.02)
        assert all(torch.allclose(after[n], p.grad, rtol=1e-5) for n, p in zip(names, alone, strict=True))


def test_components_are_independent() -> None:
    """A component a million times louder changes nobody else's update; with one clip for all it stops them."""
    moved: dict[tuple[str, bool], Tensor] = {}
    for method, words in (("component_clip", ("method.component_clip.max_clip_value=0.05",)), ("full", ("trainer.clip=0.05",))):
        for loud in (False, True):
            run = build(f"method={method}", *words, *TWO, *SGD, "optimizer.lr=0.1")
            if loud:
                run.model.first.weight.register_hook(lambda g: 1e6 * g)
            before = weights(run)["layer.weight"]
            run.fit(1)
            moved[method, loud] = weights(run)["layer.weight"] - before
    assert torch.equal(moved["component_clip", False], moved["component_clip", True])
    assert moved["full", True].norm() < 1e-4 * moved["full", False].norm()


def test_a_large_threshold_is_full_tuning_bit_for_bit() -> None:
    words = (*SMALL, "optimizer.lr=1e-3", "trainer.clip=.inf", "schedule=constant")
    off, full, on = (
        build("method=component_clip", "method.component_clip.max_clip_value=1e5", *words),
        build("method=full", *words),
        build("method=component_clip", *words),
    )
    for run in (off, full, on):
        run.fit(4)
    assert all(torch.equal(w, weights(full)[name]) for name, w in weights(off).items())
    assert not torch.equal(weights(on)["model.norm.weight"], weights(full)["model.norm.weight"])
    assert not off.events and on.events["clipped"] > 0


def test_micro_batches_are_clipped_once() -> None:
    steps = {}
    for micro in (32, 4):
        run = build("method=component_clip", *TWO, *SGD, "model.dtype=float64", "optimizer.lr=0.1", f"hardware.micro_batch={micro}")
        assert len(run.window(0)) == 32 // micro
        run.fit(1)
        steps[micro] = weights(run)
    assert all(torch.allclose(w, steps[4][name], atol=1e-13) for name, w in steps[32].items())


def test_a_loud_component_no_longer_stops_the_others() -> None:
    """a is pulled to and fro by 1000 for ever, b has the loss |b|^2 / 2: only with a clip of its own does b arrive."""
    data = toy_data("loud", torch.zeros(1, 1), torch.zeros(1, 4))
    ends = {}
    for method, words in (("component_clip", ("method.component_clip.max_clip_value=1",)), ("full", ("trainer.clip=1",))):
        shape = ("model=toy", "model.bias=true", "model.inputs=1", "model.outputs=4", f"data={data}", "trainer.batch=1")
        run = build(f"method={method}", *words, *shape, *SGD, "optimizer.lr=0.05")
        run.model.layer.weight.register_hook(lambda g, run=run: torch.full_like(g, 500.0 * (-1) ** run.step))
        with torch.no_grad():
            run.model.layer.bias.fill_(1.0)
        run.fit_steps, run.optimizer = 300, run.build_optimizer()
        window = run.window(0)
        for _ in range(300):
            run.update(window)
        ends[method] = float(run.model.layer.bias.detach().norm())
    assert ends["component_clip"] < 1e-6
    assert ends["full"] > 1.9


def test_with_an_adapter_its_tensors_are_the_components() -> None:
    run = build("method=[lora,component_clip]", "method.component_clip.max_clip_value=1e-4", *SMALL)
    before, after = clipped(run)
    assert all("delta" in name for name in before)
    for name, grad in before.items():
        if (grad != 0).any():  # the factor beside the zero one has no gradient yet
            assert after[name].norm() == pytest.approx(1e-4, rel=0.02)
    assert run._row["component_clip/clipped"] == sum(bool(g.norm() > 1e-4) for g in before.values()) / len(before)


def test_resumed_run_is_bit_equal(tmp_path: Path) -> None:
    run = check_resume("method=component_clip", *SMALL, "trainer.max_steps=8", "optimizer.lr=1e-3", folder=tmp_path, at=5)
    assert run.events["clipped"] > 8
    assert run.settings.trainer.clip == float("inf")
