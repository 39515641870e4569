"""ASFT: dynamic fine-tuning with a KL divergence to the model before training at every counted token."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tools import SMALL, build, check_resume, weights
from torch import Tensor, nn

from ftrecipes.compose import compose
from ftrecipes.errors import UserError
from ftrecipes.methods.objectives.asft import divergence
from ftrecipes.plan import plan
from ftrecipes.run import Run
from ftrecipes.tasks import causal_lm
from ftrecipes.tasks.causal_lm import IGNORE, TokenOutputs

MUTATION = ("ftrecipes/methods/objectives/asft.py", 'if direction == "forward" else', 'if direction != "forward" else')
FAST = (*SMALL, "optimizer.lr=1e-2", "schedule=constant", "schedule.warmup=0")


def full_logits(model: Any, batch: Any) -> Tensor:
    return model(input_ids=batch["ids"], position_ids=batch["position"]).logits[:, :-1].flatten(0, 1)


class Free:
    """A stack's loss for given logits (n, V) of the model and of the reference."""

    def __init__(self, *words: str) -> None:
        self.run = build("method=asft", *words, *SMALL)
        (self.method,) = self.run.stack.methods

    def __call__(self, logits: Tensor, start: Tensor, labels: Tensor) -> Tensor:
        head = nn.Linear(logits.shape[1], logits.shape[1], bias=False).to(logits.dtype)
        nn.init.eye_(head.weight)
        made = iter([logits, start])
        self.run.task.outputs = lambda model, batch: TokenOutputs(next(made), labels, torch.zeros_like(labels), head)
        return self.run.stack.loss(self.run, {}) / len(labels)


# -- the formula -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["asft", "sft+kl"])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_gradient_in_logits(mode: str, direction: str) -> None:
    k, n, V = 0.3, 40, 7
    loss = Free(f"method.asft.kl_weight={k}", f"method.asft.kl_direction={direction}", f"method.asft.mode={mode}")
    rng = torch.Generator().manual_seed(0)
    z, r = (2 * torch.randn(n, V, generator=rng, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(0, V, (n,), generator=rng)
    z.requires_grad_()
    (found,) = torch.autograd.grad(loss(z, r, labels), z)
    p, q, one = z.detach().softmax(-1), r.softmax(-1), F.one_hot(labels, V)
    w = p.gather(1, labels[:, None]) if mode == "asft" else 1.0
    reverse = p * ((p / q).log() - (p * (p / q).log()).sum(-1, keepdim=True))
    wanted = (w * (p - one) + k * (p - q if direction == "forward" else reverse)) / n
    assert torch.allclose(found, wanted, atol=2e-8)


def test_fixed_points() -> None:
    """One context with free logits: where the pull to the label and the anchor balance."""
    q, label = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0])
    ends = {}
    for direction, k in (("forward", 0.05), ("forward", 0.5), ("forward", 1.0), ("reverse", 1.0)):
        loss = Free(f"method.asft.kl_weight={k}", f"method.asft.kl_direction={direction}")
        z = q.log()[None].clone().requires_grad_()
        for _ in range(300):
            (grad,) = torch.autograd.grad(loss(z, q.log()[None], label), z)
            z = (z - 4.0 * grad).detach().requires_grad_()
        p = ends[direction, k] = z.detach().softmax(-1)[0]
        if direction == "forward":
            assert float(p[0]) == pytest.approx(((1 - k) + math.sqrt((1 - k) ** 2 + 4 * k * 0.1)) / 2, abs=2e-5)
            assert torch.allclose(p[1:] / p[1:].sum(), q[1:] / q[1:].sum(), atol=1e-4)
    assert float(ends["forward", 1.0][0]) == pytest.approx(0.31623, abs=2e-5)
    assert float(ends["reverse", 1.0][0]) == pytest.approx(0.2320, abs=1e-4)


def test_divergence_is_that_of_torch() -> None:
    rng = torch.Generator().manual_seed(0)
    log_p, log_q = (torch.randn(9, 5, generator=rng, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    p, q = (torch.distributions.Categorical(logits=x) for x in (log_p, log_q))
    assert torch.allclose(divergence(log_p, log_q, "forward"), torch.distributions.kl_divergence(q, p), atol=1e-12)
    assert torch.allclose(divergence(log_p, log_q, "reverse"), torch.distributions.kl_divergence(p, q), atol=1e-12)


# -- agreement and limits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["dft", "full"])
def test_without_the_anchor_it_is_dft_or_plain_fine_tuning_bit_for_bit(other: str) -> None:
    mode = "asft" if other == "dft" else "sft+kl"
    mine = build("method=asft", "method.asft.kl_weight=0", f"method.asft.mode={mode}", *FAST)
    theirs, anchored = build(f"method={other}", *FAST), build("method=asft", f"method.asft.mode={mode}", *FAST)
    for run in (mine, theirs, anchored):
        run.fit(3)
    assert all(torch.equal(w, weights(theirs)[name]) for name, w in weights(mine).items())
    assert float(mine._row["loss"]) == float(theirs._row["loss"])
    assert "anchored_batches" not in mine.events
    assert not torch.equal(weights(anchored)["model.norm.weight"], weights(theirs)["model.norm.weight"])
    assert float(anchored._row["kl"]) > 1e-3


def test_agreement_with_the_authors_loss() -> None:
    """What their trainer computes on a batch, with the sum over the tokens of the window in place of a micro-batch's mean."""
    run = build("method=asft", "hardware.micro_batch=3", *FAST)
    run.fit(3)
    window, start = run.window(5), run.pristine()
    loss = run.gradients(window)
    found = {name: p.grad.clone() for name, p in run.trainable().items()}
    run.model.zero_grad()
    total = torch.zeros(())
    for batch in window:
        logits, labels = full_logits(run.model, batch), batch["labels"][:, 1:].flatten()
        losses = F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORE)
        losses = losses * torch.softmax(logits, -1).gather(1, labels.clamp_min(0)[:, None])[:, 0].detach()
        with torch.no_grad():
            target = full_logits(start, batch).softmax(-1)
        losses = losses + 0.1 * F.kl_div(F.log_softmax(logits, -1), target, reduction="none").sum(-1)
        value = losses[labels != IGNORE].sum() / window.units
        value.backward()
        total += value.detach()
    assert torch.allclose(loss, total, rtol=1e-5)
    assert all(torch.allclose(found[name], p.grad, atol=1e-6, rtol=1e-4) for name, p in run.trainable().items())


@pytest.mark.parametrize("how", ["data.packing=true", "hardware.micro_batch=1"])
def test_padding_and_packing_change_nothing(how: str) -> None:
    losses = []
    for words in ((), (how,)):
        run = build("method=asft", *FAST)
        run.fit(2)
        other = build("method=asft", *FAST, *words)
        other.model.load_state_dict(run.model.state_dict())
        losses.append(other.loss(other.window(3)))
    assert torch.allclose(*losses, rtol=1e-6)


# -- the reference -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stack", "copy"), [("asft", True), ("lora,asft", False), ("asft,dora", False), ("gmt,asft", True), ("periodic_lora,asft", True)]
)
def test_reference_is_the_model_before_training_and_stays_it(stack: str, copy: bool) -> None:
    knobs = ["method.periodic_lora.stage_steps=2"] if "periodic" in stack else []
    run = build(f"method=[{stack}]", *FAST, *knobs)
    method = next(m for m in run.stack if m.key == "asft")
    (batch,) = run.window(0)
    with torch.no_grad():
        start = run.task.outputs(run.pristine(), batch).logits()
    run.stack.begin(run)
    assert float(run.loss(run.window(0))) > 0
    assert abs(float(run._reported["kl"])) < 1e-6 * batch["units"]  # nothing has moved yet
    run.settings.trainer.max_steps = 5
    run.stack.drive(run, run.fit)
    reference = method.reference(run)
    assert (reference.model is not None) == copy == bool(run.held)
    outputs = reference.outputs(batch)
    assert torch.equal(reference.logits(outputs, outputs.hidden), start)
    assert run.model.training
    with torch.no_grad():
        assert not torch.allclose(run.task.outputs(run.model, batch).logits(), start, atol=1e-3)
    assert not any(p.requires_grad for m in run.held for p in m.parameters())


def test_reference_of_a_head_with_a_delta() -> None:
    run = build("method=[lora,asft]", "method.lora.targets=[head,q]", *FAST)
    (batch,) = run.window(0)
    with torch.no_grad():
        start = run.task.outputs(run.pristine(), batch).logits()
    run.fit(2)
    reference = run.stack.methods[1].reference(run)
    outputs = reference.outputs(batch)
    assert torch.equal(reference.logits(outputs, outputs.hidden), start)


def test_reference_has_no_dropout() -> None:
    run = build("method=[lora,asft]", "method.lora.dropout=0.5", *FAST)
    run.fit(1)
    (batch,) = run.window(0)
    reference = run.stack.methods[1].reference(run)
    assert torch.equal(reference.outputs(batch).hidden, reference.outputs(batch).hidden)
    first, second = (run.task.outputs(run.model, batch).hidden for _ in range(2))
    assert not torch.equal(first, second)


def test_the_plan_says_which_reference_it_is_and_what_it_costs() -> None:
    copy, off = (plan(compose([f"method={m}", *SMALL])) for m in ("asft", "[lora,asft]"))
    assert copy.memory["further models"] == copy.memory["weights"]
    assert any("frozen copy" in r for r in copy.remarks)
    assert "further models" not in off.memory
    assert any("deltas off" in r for r in off.remarks)
    plain = plan(compose(["method=full", *SMALL]))
    assert copy.forward_flops > 1.9 * plain.forward_flops  # a second forward pass


# -- memory ------------------------------------------------------------------------------------------------------------


def saved_bytes(run: Run, n: int, V: int) -> tuple[int, Tensor, Tensor]:
    """Bytes that the loss of n positions keeps for backward, the loss, and the gradient in the hidden states."""
    rng = torch.Generator().manual_seed(0)
    hidden, start = (torch.randn(n, 32, generator=rng) for _ in range(2))
    head, labels = nn.Linear(32, V, bias=False), torch.randint(0, V, (n,), generator=rng)
    nn.init.normal_(head.weight, generator=rng)
    hidden.requires_grad_()
    made = iter([hidden, start])
    run.task.outputs = lambda model, batch: TokenOutputs(next(made), labels, torch.zeros_like(labels), head)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = run.stack.loss(run, {})
    (grad,) = torch.autograd.grad(loss, hidden)
    return sum(kept.values()), loss.detach(), grad


def test_chunks_change_nothing_and_no_distribution_is_kept_for_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    n, V = 1024, 8192
    run = build("method=asft", *SMALL)
    whole, loss, grad = saved_bytes(run, n, V)
    monkeypatch.setattr(causal_lm, "CHUNK", 64 * V)
    chunked, again, same = saved_bytes(run, n, V)
    assert whole - chunked > 4 * n * V
    assert chunked < 4 * n * V / 4
    assert torch.allclose(loss, again, rtol=1e-6)
    assert torch.allclose(grad, same, atol=1e-6)


# -- the run -----------------------------------------------------------------------------------------------------------


def test_stacks() -> None:
    with pytest.raises(UserError, match="asft and dft cannot stack: asft replaces the loss, so the weights that dft gives"):
        compose(["method=[asft,dft]"])
    with pytest.raises(UserError, match="asft is for causal-lm"):
        compose(["method=asft", "model=toy"])


@pytest.mark.parametrize("method", ["[lora,asft]"])
def test_resumed_run_is_bit_equal(method: str, tmp_path: Path) -> None:
    words = (f"method={method}", *SMALL, "hardware.micro_batch=3", "trainer.max_steps=10", "optimizer.lr=1e-2")
    run = check_resume(*words, folder=tmp_path, at=8)
    assert run.events["anchored_batches"] == run.events["reweighted_batches"] == 30
