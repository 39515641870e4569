"""DFT: each token's loss is weighed with its own probability, held constant."""

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
from ftrecipes.run import Run
from ftrecipes.tasks.causal_lm import IGNORE, TokenOutputs

MUTATION = ("ftrecipes/methods/objectives/dft.py", "outputs.logps.detach().exp()", "outputs.logps.exp()")


@pytest.fixture(scope="module")
def run() -> Run:
    return build("method=dft", *SMALL)


def per_token(run: Run, logits: Tensor, labels: Tensor) -> Tensor:
    """The stack's loss of each token for given logits (n, V)."""
    head = nn.Linear(logits.shape[1], logits.shape[1], bias=False).to(logits.dtype)
    nn.init.eye_(head.weight)
    outputs = TokenOutputs(logits, labels, torch.zeros_like(labels), head)
    batch: Any = {}
    losses = run.task.losses(outputs, batch)
    for method in run.stack.at("weights"):
        losses = losses * method.weights(run, batch, outputs)
    return losses


def logits_and_labels(n: int = 64, vocabulary: int = 11) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    scale = torch.rand(n, 1, generator=rng) * 6  # from flat to sharp
    return (scale * torch.randn(n, vocabulary, generator=rng)).requires_grad_(), torch.randint(0, vocabulary, (n,), generator=rng)


# -- the formula -------------------------------------------------------------------------------------------------------


def test_gradient_is_that_of_the_probability_itself(run: Run) -> None:
    logits, labels = logits_and_labels()
    (dft,) = torch.autograd.grad(per_token(run, logits, labels).mean(), logits)
    p = logits.softmax(-1).gather(1, labels[:, None])[:, 0]
    (live,) = torch.autograd.grad(-p.mean(), logits, retain_graph=True)
    assert torch.allclose(dft, live, atol=1e-7)
    # were the weight not held constant, a factor 1 + log p would come in and turn unlikely tokens round
    (wrong,) = torch.autograd.grad(-(p * p.log()).mean(), logits)
    assert torch.allclose(wrong, (1 + p.log())[:, None] * live, atol=1e-6)
    turned = (wrong * dft).sum(-1) < 0
    assert torch.equal(turned, p < 1 / math.e)
    assert turned.any() and not turned.all()


def test_whole_model_gradient_is_that_of_the_probability_itself(run: Run) -> None:
    window = run.window(0)
    loss = run.gradients(window)
    found = {name: p.grad.clone() for name, p in run.trainable().items()}
    value = run.gradients(window, lambda batch: -run.task.outputs(run.model, batch).logps.exp().sum())
    assert all(torch.allclose(found[name], p.grad, atol=1e-7, rtol=1e-4) for name, p in run.trainable().items())
    assert max(float(g.abs().max()) for g in found.values()) > 1e-4
    assert not torch.isclose(loss, value)


def test_limits(run: Run) -> None:
    V = 16
    labels = torch.arange(V)
    assert torch.allclose(per_token(run, torch.zeros(V, V), labels), torch.full((V,), math.log(V) / V), atol=1e-7)
    sure = 50.0 * torch.eye(V)
    assert per_token(run, sure, labels).max() < 1e-12
    assert (per_token(run, -sure, labels) < 1e-12).all()  # p -> 0 as well, where plain fine-tuning has its largest loss


def test_bounds(run: Run) -> None:
    logits, labels = logits_and_labels(400)
    losses = per_token(run, logits, labels)
    assert losses.min() >= 0
    assert 0.9 / math.e < losses.max() <= 1 / math.e + 1e-6
    (grad,) = torch.autograd.grad(losses.sum(), logits)
    p = logits.softmax(-1).gather(1, labels[:, None])[:, 0]
    assert torch.allclose(grad.abs().sum(-1), 2 * p * (1 - p), atol=1e-6)
    assert grad.abs().sum(-1).max() <= 0.5 + 1e-6
    (plain,) = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), logits)
    assert plain.abs().sum(-1).max() > 1.9


def test_mode_seeking() -> None:
    """One context whose answers come as .5, .3, .2: plain fine-tuning ends at these, DFT at the most frequent one."""
    ends = {}
    for power in (0.0, 1.0):
        run = build("method=dft", f"method.dft.weight_power={power}", *SMALL)
        z = torch.tensor([0.0, 0.2, 0.0], requires_grad=True)
        labels = torch.tensor([0] * 5 + [1] * 3 + [2] * 2)
        for _ in range(2000):
            (grad,) = torch.autograd.grad(per_token(run, z.expand(10, 3), labels).mean(), z)
            z = (z - 0.5 * grad).detach().requires_grad_()
        ends[power] = z.softmax(-1).detach()
    assert torch.allclose(ends[0.0], torch.tensor([0.5, 0.3, 0.2]), atol=1e-4)
    assert ends[1.0][0] > 0.99


# -- agreement ---------------------------------------------------------------------------------------------------------


def full_logits(run: Run, batch: Any) -> tuple[Tensor, Tensor]:
    """Logits of every position and the label that follows it, as a plain trainer has them."""
    logits = run.model(input_ids=batch["ids"], position_ids=batch["position"]).logits
    return logits[:, :-1].reshape(-1, logits.shape[-1]), batch["labels"][:, 1:].reshape(-1)


def authors(run: Run, batch: Any) -> Tensor:
    """The line of the authors' README, and the mask of their trainer; a sum over tokens."""
    logits, labels = full_logits(run, batch)
    mask = labels != IGNORE
    shift = labels.masked_fill(~mask, 0)
    loss = F.cross_entropy(logits, shift, reduction="none")
    loss = loss * torch.softmax(logits, dim=-1).gather(1, shift.unsqueeze(-1)).squeeze(-1).detach()
    return (loss * mask).sum()


def trl(run: Run, batch: Any) -> Tensor:
    """TRL's `loss_type="dft"`: selected log-probabilities times their exponential, held constant; a sum over tokens."""
    logits, labels = full_logits(run, batch)
    chosen = labels != IGNORE
    logp = logits[chosen].gather(1, labels[chosen][:, None])[:, 0] - logits[chosen].logsumexp(-1)
    return (-logp.exp().detach() * logp).sum()


@pytest.mark.parametrize("other", [authors, trl])
@pytest.mark.parametrize("micro", [8, 3])
def test_agreement(other: Any, micro: int) -> None:
    """Their mean over the tokens of a whole batch, micro-batches and all; loss and every gradient."""
    run = build("method=dft", *SMALL, f"hardware.micro_batch={micro}")
    window = run.window(0)
    tokens = sum(int((b["labels"][:, 1:] != IGNORE).sum()) for b in window)
    assert window.units == tokens
    loss = run.gradients(window)
    found = {name: p.grad.clone() for name, p in run.trainable().items()}
    run.model.zero_grad()
    total = torch.zeros(())
    for batch in window:
        value = other(run, batch) / tokens
        value.backward()
        total += value.detach()
    assert torch.allclose(loss, total, atol=1e-7, rtol=1e-6)
    assert all(torch.allclose(found[name], p.grad, atol=1e-7, rtol=1e-5) for name, p in run.trainable().items())


def test_unequal_micro_batches_give_the_step_of_the_whole() -> None:
    grads = []
    for micro in (1, 3, 8):
        run = build("method=dft", *SMALL, f"hardware.micro_batch={micro}")
        window = run.window(1)
        counts = [b["units"] for b in window]
        assert micro == 8 or len(set(counts)) > 1
        run.gradients(window)
        grads.append({name: p.grad.clone() for name, p in run.trainable().items()})
        if micro == 1:  # a mean of the examples' means is something else
            means = [run.gradients(run.window_of(run.data["train"], b["example"].tolist())) for b in window]
            assert not torch.isclose(torch.stack(means).mean(), run.loss(window), rtol=1e-4)
    for other in grads[1:]:
        assert all(torch.allclose(grads[0][name], g, atol=1e-7, rtol=1e-4) for name, g in other.items())


# -- the run -----------------------------------------------------------------------------------------------------------


def test_power_zero_is_plain_fine_tuning_bit_for_bit() -> None:
    words = (*SMALL, "optimizer.lr=1e-3", "trainer.batch=8", "schedule=constant")
    plain, zero, one = build("method=full", *words), build("method=dft", "method.dft.weight_power=0", *words), build("method=dft", *words)
    for run in (plain, zero, one):
        run.fit(3)
    assert all(torch.equal(w, weights(plain)[name]) for name, w in weights(zero).items())
    assert not torch.equal(weights(one)["model.norm.weight"], weights(plain)["model.norm.weight"])


def test_names_of_what_is_reported() -> None:
    run = build("method=dft", *SMALL)
    window = run.window(0)
    with torch.no_grad():
        logps = torch.cat([run.task.outputs(run.model, b).logps for b in window])
    run.fit(1)
    row = run._row
    assert float(row["loss"]) == pytest.approx(float(-(logps.exp() * logps).mean()), rel=1e-5)
    assert float(row["nll"]) == pytest.approx(float(-logps.mean()), rel=1e-5)
    assert float(row["mean_p"]) == pytest.approx(float(logps.exp().mean()), rel=1e-5)
    assert run.events["reweighted_batches"] == 1
    plain = build("method=full", *SMALL)
    again = build("method=dft", *SMALL)
    assert plain.evaluate("validation") == again.evaluate("validation")  # validation is plain cross-entropy


def test_probabilities_are_float32_whatever_the_weights_are() -> None:
    run = build("method=dft", *SMALL, "hardware.precision=bf16")
    (batch,) = run.window(0)
    outputs = run.task.outputs(run.model, batch)
    factor = run.stack.methods[0].weights(run, batch, outputs)
    assert outputs.hidden.dtype == torch.bfloat16
    assert factor.dtype == torch.float32
    assert not factor.requires_grad
    exact = outputs.logits().float().softmax(-1).gather(1, outputs.labels[:, None])[:, 0]
    assert torch.allclose(factor, exact, rtol=1e-5, atol=0)


def test_settings_and_stacks() -> None:
    settings = compose(["method=dft", "model=tiny-llama"])
    assert settings.schedule.name == "cosine"
    assert settings.method.dft.weight_power == 1.0
    run = build("method=[lora,dft]", *SMALL)
    window = run.window(0)
    loss = run.gradients(window)
    assert torch.isclose(loss, sum(authors(run, b) for b in window) / window.units, rtol=1e-5)
    assert all("delta" in name for name in run.trainable())
    with pytest.raises(UserError, match="dft is for causal-lm"):
        compose(["method=dft", "model=toy"])


@pytest.mark.parametrize("method", ["dft", "[lora,dft]"])
def test_resumed_run_is_bit_equal(method: str, tmp_path: Path) -> None:
    words = (f"method={method}", *SMALL, "hardware.micro_batch=3", "trainer.max_steps=10", "optimizer.lr=1e-3")
    run = check_resume(*words, folder=tmp_path, at=8)
    assert run.events["reweighted_batches"] == 30
