"""PSFT: clipped ratios to a policy that is taken anew at the start of every outer batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tools import SMALL, build, check_resume, weights
from torch import Tensor, nn

from ftrecipes.errors import UserError
from ftrecipes.run import Run
from ftrecipes.tasks.causal_lm import TokenOutputs

MUTATION = ("ftrecipes/methods/objectives/psft.py", "if done >= 0 and done % self.inner == 0:", "if done >= 0:")
SGD = ("optimizer=sgd", "optimizer.momentum=0", "optimizer.lr=0.5", "schedule=constant", "schedule.warmup=0", "trainer.clip=.inf")


def psft(*words: str, outer: int = 32) -> Run:
    return build("method=psft", f"method.psft.train_batch={outer}", *SMALL, *words)


def per_token(run: Run, logits: Tensor, labels: Tensor, old: Tensor) -> Tensor:
    """The stack's loss of one example with these logits (n, V), whose old log-probabilities are given."""
    head = nn.Linear(logits.shape[1], logits.shape[1], bias=False).to(logits.dtype)
    nn.init.eye_(head.weight)
    run.task.outputs = lambda model, batch: TokenOutputs(logits, labels, torch.zeros_like(labels), head)
    (method,) = run.stack.methods
    method.old = {0: old}
    return run.stack.loss(run, {"example": torch.tensor([0])}) / len(labels)


def logps_of(run: Run, batch: Any) -> Tensor:
    with torch.no_grad():
        return run.task.outputs(run.model, batch).logps


# -- the formula -------------------------------------------------------------------------------------------------------


def test_hand_case() -> None:
    """Two words; the ratio of each token is set by its old probability."""
    run = psft()
    ratio = torch.tensor([0.5, 1.1, 1.5, 0.3, 1.2801, 1.2799])
    z = torch.zeros(6, 2, requires_grad=True)  # p = 1/2, d log p / d z_label = 1/2
    labels = torch.zeros(6, dtype=torch.long)
    loss = per_token(run, z, labels, torch.tensor(0.5).log() - ratio.log())
    assert float(loss.detach()) == pytest.approx(-(0.5 + 1.1 + 1.28 + 0.3 + 1.28 + 1.2799) / 6, abs=1e-6)
    (grad,) = torch.autograd.grad(loss, z)
    in_logp = 2 * 6 * grad[:, 0]
    assert torch.allclose(in_logp, -torch.tensor([0.5, 1.1, 0.0, 0.3, 0.0, 1.2799]), atol=1e-5)
    assert (in_logp[[2, 4]] == 0).all()


def test_trust_region_of_a_free_softmax() -> None:
    """200 updates a snapshot push a token just past its clip, and no further; plain fine-tuning goes all the way."""
    run = psft()
    z = torch.zeros(20)
    z[0] = torch.log(torch.tensor(0.05 * 19 / 0.95))
    labels, ends = torch.tensor([0]), []
    for _ in range(5):
        old = z.log_softmax(-1)[:1].clone()
        for _ in range(200):  # updates
            free = z[None].clone().requires_grad_()
            (grad,) = torch.autograd.grad(per_token(run, free, labels, old), free)
            z = z - 0.02 * grad[0]
        ends.append(float(z.softmax(-1)[0]))
    assert ends == pytest.approx([0.0643, 0.0838, 0.1078, 0.1392, 0.1790], abs=2e-4)
    assert all(p >= 0.05 * 1.28 ** (k + 1) - 1e-4 for k, p in enumerate(ends))
    z = torch.zeros(20)
    for _ in range(1000):
        z = z - 0.02 * (z.softmax(-1) - torch.eye(20)[0])
    assert float(z.softmax(-1)[0]) > 0.9


# -- limits ------------------------------------------------------------------------------------------------------------


def test_first_update_of_an_outer_batch_is_plain_fine_tuning_and_the_next_is_not() -> None:
    run, plain = psft(*SGD), build("method=full", *SMALL, *SGD)
    run.fit_steps = 4
    run.stack.begin(run)
    loss = run.gradients(run.window(0))
    plain.gradients(plain.window(0))
    assert float(loss) == -1.0
    for name, p in plain.trainable().items():
        assert torch.allclose(run.trainable()[name].grad, p.grad, atol=1e-7, rtol=1e-5)
    run.optimizer = run.build_optimizer()
    run.update(run.window(0))
    second = run.window(1)
    run.stack.begin(run)
    loss = run.gradients(second)
    for name, p in weights(run).items():
        plain.model.get_parameter(name).data.copy_(p)
    plain.gradients(plain.window(1))
    assert float(loss) != -1.0
    assert any(not torch.allclose(run.trainable()[n].grad, p.grad, rtol=1e-3) for n, p in plain.trainable().items())


def test_one_mini_batch_an_outer_batch_is_plain_fine_tuning() -> None:
    runs = [psft(*SGD, outer=8), psft(*SGD), build("method=full", *SMALL, *SGD)]
    for run in runs:
        run.fit(8)
    same, clipped, plain = map(weights, runs)
    assert all(torch.allclose(w, plain[name], atol=1e-6) for name, w in same.items())
    assert max(float((w - plain[name]).abs().max()) for name, w in clipped.items()) > 1e-3
    assert [run.events.get("snapshots") for run in runs] == [8, 2, None]


def test_without_an_upper_clip_the_gradient_is_that_of_the_ratio() -> None:
    run = psft(*SGD, "method.psft.clip_ratio_high=.inf", "optimizer.lr=2")
    run.fit_steps = 4
    run.optimizer = run.build_optimizer()
    run.update(run.window(0))
    window = run.window(1)
    (method,) = run.stack.methods
    run.stack.begin(run)
    run.gradients(window)
    found = {name: p.grad.clone() for name, p in run.trainable().items()}
    old = method.old

    def ratios(batch: Any) -> Tensor:
        logps = run.task.outputs(run.model, batch).logps
        return -((logps - torch.cat([old[i] for i in batch["example"].tolist()])).exp()).sum()

    run.gradients(window, ratios)
    assert all(torch.allclose(found[name], p.grad, atol=1e-7, rtol=1e-4) for name, p in run.trainable().items())


def test_warm_up_is_plain_fine_tuning_until_the_first_snapshot() -> None:
    run, plain = psft(*SGD, "method.psft.warm_up=3"), build("method=full", *SMALL, *SGD)
    run.fit(3)
    plain.fit(3)
    assert all(torch.equal(w, weights(plain)[name]) for name, w in weights(run).items())
    assert not run.events
    run = psft(*SGD, "method.psft.warm_up=3")
    run.fit(8)
    assert run.events["snapshots"] == 2


# -- the old policy ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["data.packing=false", "data.packing=true"])
def test_old_policy_is_the_model_at_the_start_of_each_outer_batch(packing: str) -> None:
    run = psft(*SGD, packing, "hardware.micro_batch=3", outer=16)
    (method,) = run.stack.methods
    run.fit_steps = 6
    run.optimizer = run.build_optimizer()
    for step in range(6):
        start = step % 2 == 0
        now = {}
        for batch in (b for k in range(2) for b in run.window(step + k)):
            outputs = run.task.outputs(run.model, batch)
            for row, i in enumerate(batch["example"].tolist()):
                now[i] = outputs.logps.detach()[outputs.row == row]
        held = method.old
        window = run.window(step)
        run.update(window)
        run.finish_window(window)
        assert (method.old is not held) == start
        if start:
            assert method.old.keys() == now.keys() and len(now) == 16
            assert all(torch.allclose(method.old[i], logps, atol=1e-5) for i, logps in now.items())
        assert (abs(float(run._row["ratio"]) - 1) < 1e-6) == start
    assert float(run._row["entropy"]) > 0


def test_dropout_is_off() -> None:
    run = build("method=[lora,psft]", "method.lora.dropout=0.5", "method.psft.train_batch=16", *SMALL, "optimizer.lr=1e-2")
    run.fit(3)  # the third update is the first of an outer batch
    assert float(run._row["ratio"]) == pytest.approx(1.0, abs=1e-6)
    assert any("dropout is off" in remark for remark in run.remarks)


def test_prompts_and_padding_have_no_gradient_and_micro_batches_are_one_update() -> None:
    grads = []
    for micro in (1, 3, 8):
        run = psft(*SGD, f"hardware.micro_batch={micro}")
        run.fit_steps, run.optimizer = 4, run.build_optimizer()
        run.update(run.window(0))
        run.gradients(run.window(1))
        grads.append({name: p.grad.clone() for name, p in run.trainable().items()})
    for other in grads[1:]:
        assert all(torch.allclose(grads[0][name], g, atol=1e-6, rtol=1e-3) for name, g in other.items())
    (batch,) = run.window(1)
    longer = {
        **batch,
        **{
            k: torch.nn.functional.pad(batch[k], (0, 7), value=v)
            for k, v in (("ids", 0), ("labels", -100), ("segment", -1), ("position", 0))
        },
    }
    assert torch.allclose(run.stack.loss(run, batch), run.stack.loss(run, longer), rtol=1e-6)


# -- the run -----------------------------------------------------------------------------------------------------------


def test_settings() -> None:
    with pytest.raises(UserError, match=r"psft\.train_batch=20 must be a multiple of trainer\.batch=8"):
        psft(outer=20)


@pytest.mark.parametrize("at", [5, 9])
def test_resumed_inside_an_outer_batch_is_bit_equal(at: int, tmp_path: Path) -> None:
    words = ("method=psft", "method.psft.train_batch=32", *SMALL, "hardware.micro_batch=3", "trainer.max_steps=10", "optimizer.lr=1e-2")
    run = check_resume(*words, folder=tmp_path, at=at)
    assert run.events["snapshots"] == 3
