"""DPO: pairs of answers classified by the margin of their log-ratios to the model before training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tools import SMALL, build, check_resume, train, weights
from torch import Tensor

from ftrecipes.compose import compose
from ftrecipes.errors import RunFailed, UserError
from ftrecipes.methods.objectives.dpo import preference_loss
from ftrecipes.plan import plan
from ftrecipes.run import Run
from ftrecipes.tasks.causal_lm import IGNORE

MUTATION = ("ftrecipes/methods/objectives/dpo.py", "logps[-1] - reference.sums(answers, n)", "logps[-1] + reference.sums(answers, n)")
QUICK = (*SMALL, "optimizer.lr=1e-2", "schedule=constant", "schedule.warmup=0")
TYPES = {"sigmoid": 0.0, "smoothed": 0.1, "robust": 0.1, "hinge": 0.0, "ipo": 0.0}


def dpo(*words: str, stack: str = "dpo") -> Run:
    return build(f"method=[{stack}]", *QUICK, *words)


def trl(kind: str, beta: float, e: float, chosen: Tensor, rejected: Tensor, lengths: tuple[Tensor, Tensor]) -> Tensor:
    """TRL's losses of log-ratios, chosen and rejected (n,)."""
    delta = chosen - rejected
    if kind == "hinge":
        return torch.relu(1 - beta * delta)
    if kind == "ipo":
        return (chosen / lengths[0] - rejected / lengths[1] - 1 / (2 * beta)) ** 2
    if kind == "robust":
        clean, flipped = -(1 - e) * F.logsigmoid(beta * delta), -e * F.logsigmoid(-beta * delta)
        return (clean - flipped) / (1 - 2 * e)
    return -F.logsigmoid(beta * delta) * (1 - e) - F.logsigmoid(-beta * delta) * e


def padded(run: Run, positions: list[int]) -> tuple[Tensor, Tensor]:
    """Ids and labels (2n, L) of pairs, chosen ones first, as a plain trainer lays them out."""
    pairs = [run.data["train"][i] for i in positions]
    rows = [*pairs, *(pair["others"][0] for pair in pairs)]
    width = max(len(row["ids"]) for row in rows)
    ids, labels = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), IGNORE)
    for r, row in enumerate(rows):
        ids[r, : len(row["ids"])] = torch.as_tensor(row["ids"])
        labels[r, : len(row["ids"])] = torch.as_tensor(row["labels"])
    return ids, labels


def sums(model: Any, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the labels, summed by sequence, and how many there are."""
    logits, after = model(input_ids=ids).logits[:, :-1].log_softmax(-1), labels[:, 1:]
    mask = after != IGNORE
    found = logits.gather(2, after.clamp_min(0)[..., None])[..., 0]
    return (found * mask).sum(1), mask.sum(1)


# -- the formula -------------------------------------------------------------------------------------------------------


def test_closed_form() -> None:
    margin = torch.tensor([-30.0, -1.0, 0.0, 2.0, 30.0], dtype=torch.float64)
    s = 1 / (1 + (-0.3 * margin).exp())
    assert torch.allclose(preference_loss(margin, "sigmoid", 0.3), -s.log(), atol=1e-12)
    assert torch.allclose(preference_loss(margin, "sigmoid", 0.3, 0.2), -0.8 * s.log() - 0.2 * (1 - s).log(), atol=1e-12)
    assert torch.allclose(preference_loss(margin, "robust", 0.3, 0.2), (-0.8 * s.log() + 0.2 * (1 - s).log()) / 0.6, atol=1e-12)
    assert preference_loss(margin, "hinge", 0.3).tolist() == pytest.approx([10.0, 1.3, 1.0, 0.4, 0.0])
    assert preference_loss(margin, "ipo", 0.25)[3] == 0.0
    z = torch.zeros(1, requires_grad=True)
    (grad,) = torch.autograd.grad(preference_loss(z, "sigmoid", 0.3).sum(), z)
    assert float(grad) == pytest.approx(-0.15)  # -beta s(-m)


def test_noise_that_robust_expects_cancels() -> None:
    """Over labels flipped with chance e, its mean is the loss of the true labels."""
    margin, e = torch.linspace(-5, 5, 11, dtype=torch.float64), 0.2
    mean = (1 - e) * preference_loss(margin, "robust", 0.7, e) + e * preference_loss(-margin, "robust", 0.7, e)
    assert torch.allclose(mean, preference_loss(margin, "sigmoid", 0.7), atol=1e-12)
    smoothed = (1 - e) * preference_loss(margin, "sigmoid", 0.7, e) + e * preference_loss(-margin, "sigmoid", 0.7, e)
    assert not torch.allclose(smoothed, preference_loss(margin, "sigmoid", 0.7), atol=1e-2)


# -- agreement ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TYPES)
def test_agreement_with_trl_on_a_window(kind: str) -> None:
    """Full logits of a padded batch in float64; our window is split into unequal micro-batches, and packed."""
    loss_type, e = ("sigmoid" if kind == "smoothed" else kind), TYPES[kind]
    words = (f"method.dpo.loss_type={loss_type}", f"method.dpo.label_smoothing={e}", "method.dpo.beta=0.3", "hardware.micro_batch=3")
    run = dpo(*words, *(["data.packing=true"] if kind == "ipo" else []))
    run.fit(2)
    window = run.window(2)
    assert window.units == 8
    loss = run.gradients(window)
    found = {name: p.grad.clone() for name, p in run.trainable().items()}
    positions = [int(i) for batch in window for i in batch["example"]]
    ids, labels = padded(run, positions)
    model, start = run.model.double(), run.pristine().double()
    model.zero_grad()
    logps, lengths = sums(model, ids, labels)
    with torch.no_grad():
        ratios = logps - sums(start, ids, labels)[0]
    logratios = logps - (logps.detach() - ratios)
    (chosen, rejected), sizes = logratios.chunk(2), lengths.chunk(2)
    wanted = trl(kind, 0.3, e, chosen, rejected, sizes).mean()
    wanted.backward()
    assert float(loss) == pytest.approx(float(wanted.detach()), rel=1e-5)
    for name, p in run.model.named_parameters():
        assert torch.allclose(found[name].double(), p.grad, atol=2e-6, rtol=1e-3), name


def test_likelihood_of_the_chosen_can_be_added() -> None:
    run, plain = dpo("method.dpo.sft_weight=0.5"), dpo()
    window = run.window(0)
    (batch,) = window
    with torch.no_grad():
        outputs = run.task.outputs(run.model, batch)
    mean = -outputs.per_sequence(outputs.logps, 8) / outputs.row.bincount()
    assert float((run.loss(window) - plain.loss(plain.window(0))).detach()) == pytest.approx(0.5 * float(mean.mean()), rel=1e-5)


# -- the run -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stack", "copy"), [("dpo", True), ("lora,dpo", False)])
def test_starts_at_log_2_and_separates_the_pairs(stack: str, copy: bool) -> None:
    run = dpo("data.size=8", "optimizer.lr=3e-2", "method.dpo.beta=1", stack=stack)
    run.fit(1)
    row = run._row
    assert float(row["loss"]) == pytest.approx(math.log(2), abs=1e-6)
    assert float(row["rewards/margins"]) == pytest.approx(0.0, abs=1e-6)
    run.fit(20)
    assert float(run._row["loss"]) < 0.6
    assert float(run._row["rewards/accuracies"]) == 1.0
    assert float(run._row["rewards/chosen"] - run._row["rewards/rejected"]) == pytest.approx(float(run._row["rewards/margins"]), abs=1e-5)
    assert run.events["pairs"] == 21 * 8
    assert bool(run.held) == copy


def test_preferences_are_measured_and_are_the_target() -> None:
    run = dpo("data.size=8", "trainer.batch=8", "trainer.overfit=8")
    before = run.evaluate("validation")
    assert run.task.target == "preference" and run.data["train"].raw[0]["others"]
    run.fit(30)
    after = run.evaluate("validation")
    assert after["preference"] == 1.0 > before["preference"]
    ids, labels = padded(run, list(range(8)))
    with torch.no_grad():
        logps, _ = sums(run.model.eval(), ids, labels)
    assert (logps[:8] > logps[8:]).all()
    assert "preference" not in run.evaluate("retain")


def test_other_methods_learn_the_chosen_answers() -> None:
    run, alone = build("method=full", "data=storypairs", *QUICK), build("method=full", "data=storypairs", *QUICK)
    for i in alone.data["train"].keep:
        del alone.data["train"][i]["others"]
    for one in (run, alone):
        one.fit(2)
    assert all(torch.equal(w, weights(alone)[name]) for name, w in weights(run).items())


def test_plan_has_both_answers_and_both_models() -> None:
    pairs, single = plan(compose(["method=dpo", *SMALL])), plan(compose(["method=full", "data=storypairs", *SMALL]))
    assert pairs.forward_flops == pytest.approx(4 * single.forward_flops, rel=0.02)
    assert pairs.memory["further models"] == single.memory["weights"]
    assert pairs.memory["activations"] > 1.5 * single.memory["activations"]


def test_settings_and_data(tmp_path: Path) -> None:
    assert compose(["method=dpo"]).data.name == "storypairs"
    with pytest.raises(
        UserError, match="dpo learns from chosen and rejected answers, and data storyqa has none; use data=storypairs, or data=file"
    ):
        compose(["method=dpo", "data=storyqa"])
    with pytest.raises(UserError, match=r"label_smoothing=0\.1 would be ignored by loss_type=ipo"):
        dpo("method.dpo.label_smoothing=0.1", "method.dpo.loss_type=ipo")
    small = [w for w in SMALL if "data" not in w]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}?", "response": "x"}) + "\n" for i in range(9)))
    with pytest.raises(UserError, match="dpo learns from chosen and rejected answers, and data file has none; give it columns"):
        build("method=dpo", "data=file", f"data.path={path}", *small)
    path.write_text("".join(json.dumps({"prompt": f"{i}?", "chosen": "yes", "rejected": "no"}) + "\n" for i in range(30)))
    run = build("method=dpo", "data=file", f"data.path={path}", *small)
    run.fit(1)
    assert run.events["pairs"] == 8 and run.task.target == "preference"
    run.data["train"].encoded = {
        i: {k: v for k, v in run.data["train"][i].items() if k != "others"} for i in range(len(run.data["train"].raw))
    }
    with pytest.raises(RunFailed, match="a training example has no rejected answer"):
        run.fit(1)


@pytest.mark.parametrize("stack", ["gmt,dpo", "dpo,lift", "mezo,dpo", "lisa,dpo", "svft,dpo,wise_ft"])
def test_trains_in_stacks(stack: str) -> None:
    run = dpo("trainer.max_steps=3", "method.dpo.beta=1", *(["optimizer.lr=1e-3"] if "mezo" in stack else []), stack=stack)
    run.stack.drive(run, run.fit)
    run.stack.finish(run)
    assert run.step == 3 and float(run._row["loss"]) != pytest.approx(math.log(2), abs=1e-6)
    assert bool(run.held) == ("svft" not in stack)


def test_resumed_run_is_bit_equal(tmp_path: Path) -> None:
    words = ("method=dpo", *SMALL, "hardware.micro_batch=3", "trainer.max_steps=8", "optimizer.lr=1e-2")
    check_resume(*words, folder=tmp_path, at=7)


def test_record_names_the_metric(tmp_path: Path) -> None:
    run = train("method=[lora,dpo]", *SMALL, "trainer.max_steps=2", folder=tmp_path)
    assert "preference" in json.loads((tmp_path / "run.json").read_text())["results"]["after"]["test"]
    opened = Run.open(tmp_path, data=True)
    assert opened.evaluate("test") == run.evaluate("test")
