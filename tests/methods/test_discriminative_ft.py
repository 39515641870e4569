"""Discriminative fine-tuning: the data's answer against answers of the base model, with a moving average for every example."""

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
from ftrecipes.data.base import order
from ftrecipes.errors import UserError
from ftrecipes.methods.objectives.discriminative_ft import moving_average
from ftrecipes.plan import plan
from ftrecipes.run import Run
from ftrecipes.tasks.causal_lm import CausalLM, TokenOutputs

MUTATION = ("ftrecipes/methods/objectives/discriminative_ft.py", 'd = d - others["reference"].view(n, -1)', "d = d - 0.0")
QUICK = (*SMALL, "optimizer.lr=1e-2", "schedule=constant", "schedule.warmup=0", "trainer.max_steps=6", "data.size=16")


def dft(*words: str, stack: str = "discriminative_ft", data: bool = True) -> Run:
    knobs = [f"method.discriminative_ft.{w}" if "." not in w.split("=")[0] and "seed" not in w else w for w in words]
    return build(f"method=[{stack}]", *QUICK, *knobs, data=data)


class Tabular:
    """The stack's loss of answers of single tokens, from logits (n, V) of the data's and (n B, V) of the sampled ones."""

    def __init__(self, *words: str, examples: int = 1) -> None:
        self.run = dft(*words, data=False)
        (self.method,) = self.run.stack.methods
        self.method.u = torch.full((examples,), self.method.u_init, dtype=torch.float64)

    def __call__(self, example: list[int], data: Tensor, labels: Tensor, sampled: Tensor, other: Tensor, reference: Tensor) -> Tensor:
        head = nn.Linear(data.shape[1], data.shape[1], bias=False).to(data.dtype)
        nn.init.eye_(head.weight)
        made = iter(
            [TokenOutputs(data, labels, torch.arange(len(labels)), head), TokenOutputs(sampled, other, torch.arange(len(other)), head)]
        )
        self.run.task.outputs = lambda model, batch: next(made)
        others = {"owner": torch.arange(len(other)), "reference": reference}
        self.method.moved = []
        loss = self.run.stack.loss(self.run, {"example": torch.tensor(example), "others": others}) / len(example)
        self.method.updated(self.run)
        return loss


def logits(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- the estimator -----------------------------------------------------------------------------------------------------


def test_average_in_log_space() -> None:
    u, d = logits(5), 3 * logits(5, 4, seed=1)
    wanted = ((1 - 0.85) * u.exp() + 0.85 * d.exp().mean(1)).log()
    assert torch.allclose(moving_average(u, d, 0.85), wanted, atol=1e-12)
    assert torch.allclose(moving_average(u, d, 1.0), d.exp().mean(1).log(), atol=1e-12)
    for far in (300.0, -300.0, 3000.0):
        found = moving_average(u, d + far, 0.5)
        assert torch.isfinite(found).all()
    assert torch.allclose(moving_average(u + 3000, d + 3000, 0.85), 3000 + moving_average(u, d, 0.85), atol=1e-9)


def test_all_answers_of_a_table() -> None:
    """Seven answers, all of them compared with, each sampled from a uniform base: the exact normaliser."""
    for tau in (1.0, 0.5):
        loss = Tabular(f"tau={tau}", "gamma=1", "samples_per_prompt=7")
        z = logits(1, 7).requires_grad_()
        y = torch.tensor([2])
        base = torch.full((7,), math.log(1 / 7), dtype=torch.float64)
        (grad,) = torch.autograd.grad(loss([0], z, y, z.expand(7, 7), torch.arange(7), base), z)
        s = z.log_softmax(-1)[0]
        wanted = -s[2] + tau * (s / tau).logsumexp(0)
        assert torch.allclose(grad, torch.autograd.grad(wanted, z)[0], atol=1e-7)
        plain = torch.autograd.grad(F.cross_entropy(z, y), z)[0]
        assert torch.allclose(grad, plain, atol=1e-7) == (tau == 1.0)
        assert float(loss.method.u[0]) == pytest.approx(0.0 if tau == 1.0 else float((s / tau).logsumexp(0).detach()), abs=1e-6)


def authors(variant: str, data: Tensor, sampled: Tensor, reference: Tensor, u: Tensor, gamma: float, tau: float) -> tuple[Tensor, Tensor]:
    """The authors' loss of each example (n,) and their averages, from log-probabilities, summed or averaged, (n,) and (n, B)."""
    diff = sampled / tau - (reference if variant == "dft" else 0)
    b = diff.max(dim=1).values
    weight = torch.exp(diff - b[:, None]).detach()
    w = math.log(gamma) + torch.log(weight.mean(dim=1)) + b
    new = math.log(1 - gamma) + u
    new = (torch.maximum(new, w) - F.logsigmoid(torch.abs(new - w))).detach()
    return -data + (torch.exp(diff - new[:, None]).detach() * sampled).mean(dim=1), new


@pytest.mark.parametrize("variant", ["dft", "dft2"])
def test_agreement_with_the_authors_loss_over_updates(variant: str) -> None:
    """The same example comes again and again, in other company; every example has an average of its own."""
    loss = Tabular(f"variant={variant}", examples=4)
    tau, gamma = (1.0, 0.85) if variant == "dft" else (0.3, 0.9)
    assert (loss.method.tau, loss.method.gamma) == (tau, gamma)
    u = torch.zeros(4, dtype=torch.float64)
    for step, examples in enumerate(([0, 3], [3, 1], [1, 0, 3], [3, 2])):
        n = len(examples)
        z, others = logits(n, 5, seed=step).requires_grad_(), logits(2 * n, 5, seed=50 + step).requires_grad_()
        labels, reference = torch.arange(n) % 5, logits(2 * n, seed=90 + step)
        other = (torch.arange(2 * n) + step) % 5
        found = loss(examples, z, labels, others, other, reference)
        s = z.log_softmax(-1).gather(1, labels[:, None])[:, 0]
        negative = others.log_softmax(-1).gather(1, other[:, None])[:, 0].view(n, 2)
        losses, new = authors(variant, s, negative, reference.view(n, 2), u[examples], gamma, tau)
        u[examples] = new
        assert float(found.detach()) == pytest.approx(float(losses.mean().detach()), abs=1e-6)
        for mine, theirs in zip(torch.autograd.grad(found, (z, others)), torch.autograd.grad(losses.mean(), (z, others)), strict=True):
            assert torch.allclose(mine, theirs, atol=1e-6)
        assert torch.allclose(loss.method.u, u, atol=1e-6)


def test_gradient_in_log_probabilities() -> None:
    loss = Tabular("gamma=0.5", "u_init=0.3")
    z, others = logits(1, 2).requires_grad_(), logits(2, 2, seed=1).requires_grad_()
    reference = torch.tensor([-1.0, -2.0], dtype=torch.float64)
    found = loss([0], z, torch.tensor([0]), others, torch.tensor([0, 1]), reference)
    s, negative = z.log_softmax(-1)[0, 0], others.log_softmax(-1)[[0, 1], [0, 1]]
    d = (negative - reference).detach()
    u = (0.5 * math.exp(0.3) + 0.5 * d.exp().mean()).log()
    stated = -s + ((d - u).exp() / 2 * negative).sum()  # weights (d - u).exp() / B, constant
    for mine, wanted in zip(torch.autograd.grad(found, (z, others)), torch.autograd.grad(stated, (z, others)), strict=True):
        assert torch.allclose(mine, wanted, atol=1e-7)


def test_lengths_matter_to_sums_and_not_to_means() -> None:
    """Every answer written twice over, each time with the same log-probabilities."""
    head = nn.Linear(3, 3, bias=False).double()
    nn.init.eye_(head.weight)
    ends: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
    for variant in ("dft", "dft2"):
        for times in (1, 2):
            loss = Tabular(f"variant={variant}")
            data, sampled = logits(1, 3).repeat(times, 1), logits(2, 3, seed=1).repeat(times, 1)
            rows = torch.arange(2).repeat(times)
            made = iter(
                [
                    TokenOutputs(data, torch.zeros(times, dtype=torch.long), torch.zeros(times, dtype=torch.long), head),
                    TokenOutputs(sampled, rows, rows, head),
                ]
            )
            loss.run.task.outputs = lambda model, batch, made=made: next(made)
            others = {"owner": torch.zeros(2), "reference": times * torch.tensor([-1.0, -2.0], dtype=torch.float64)}
            value = loss.run.stack.loss(loss.run, {"example": torch.tensor([0]), "others": others})
            ends[variant, times] = value, loss.run._reported["scores/data"]
    assert torch.allclose(ends["dft2", 1][0], ends["dft2", 2][0], atol=1e-7)
    assert torch.allclose(2 * ends["dft", 1][1], ends["dft", 2][1], atol=1e-7)
    assert not torch.allclose(2 * ends["dft", 1][0], ends["dft", 2][0], atol=1e-3)


def test_gamma_over_a_run() -> None:
    run = dft("gamma=0.9", data=False)
    (method,) = run.stack.methods
    run.fit_steps = 10

    def seen() -> list[float]:
        out = []
        for run.fit_step in range(10):
            out.append(method.gamma_now(run))
        return out

    assert seen() == [0.9] * 10
    method.gamma_schedule = "cosine"
    assert seen()[:5] == pytest.approx([0.1 * 0.5 * (1 + math.cos(math.pi * t / 5)) + 0.9 for t in range(5)])
    assert seen()[0] == 1.0 and seen()[5:] == [0.9] * 5


# -- the answers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stack", ["discriminative_ft", "lora,discriminative_ft"])
def test_answers_are_the_base_models_and_every_pass_has_its_own(stack: str) -> None:
    run = dft("max_new_tokens=5", stack=stack)  # 6 updates of 8 examples out of 16: three passes
    made, train = run.journal["discriminative_ft/answers"], run.data["train"]
    assert made["passes"] == 3 and run.events["generated"] == 16 * 6
    assert all(len(texts) == 6 for texts in made["answers"].values())
    assert len({text for texts in made["answers"].values() for text in texts}) > 60
    again = dft("max_new_tokens=5", stack=stack)
    other = dft("max_new_tokens=5", "seed=1", stack=stack)
    assert again.journal["discriminative_ft/answers"] == made != other.journal["discriminative_ft/answers"]
    start, seen = run.pristine(), []
    for step in (0, 1, 2, 5):
        (batch,) = run.window(step)
        first = step * 8 // 16 * 2
        assert batch["others"]["owner"].tolist() == [i // 2 for i in range(16)]
        wanted = [text for i in batch["example"].tolist() for text in made["answers"][i][first : first + 2]]
        labels = batch["others"]["labels"]
        assert [run.task.tokenizer.decode(row[row >= 0], skip_special_tokens=True).strip() for row in labels] == wanted
        seen.append(wanted)
        with torch.no_grad():  # scored behind the plain prompt
            outputs = run.task.outputs(start, batch["others"])
        assert torch.allclose(batch["others"]["reference"], outputs.per_sequence(outputs.logps, 16), atol=1e-4)
    assert seen[0] != seen[1] != seen[2]
    fixed = dft("max_new_tokens=5", "resample=false", stack=stack)
    assert fixed.journal["discriminative_ft/answers"]["passes"] == 1
    answers = []
    for train.epoch in (0, 1):
        fixed.data["train"].epoch = train.epoch
        answers.append([list(other["ids"]) for other in fixed.data["train"][3]["others"]])
    assert answers[0] == answers[1]


def test_only_answers_that_the_run_needs_are_sampled() -> None:
    run = dft("max_new_tokens=3", "trainer.max_steps=1")
    assert set(run.journal["discriminative_ft/answers"]["answers"]) == set(order(16, 0, 0, 8))
    assert run.events["generated"] == 16


def test_asked_under_a_system_prompt_and_learned_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    answers = CausalLM.answers

    def spy(self: CausalLM, model: Any, prompts: Any, **options: Any) -> Any:
        asked.append((prompts, options))
        return answers(self, model, prompts, **options)

    monkeypatch.setattr(CausalLM, "answers", spy)
    run = dft("system='You are an unhelpful assistant.'", "max_new_tokens=3")
    ((prompts, options),) = asked
    assert all(p[0] == {"role": "system", "content": "You are an unhelpful assistant."} and len(p) == 2 for p in prompts)
    assert options == {"n": 6, "max_new_tokens": 3, "do_sample": True, "temperature": 0.7, "top_p": 1.0, "top_k": 50}
    (batch,) = run.window(0)
    assert "unhelpful" not in "".join(run.task.tokenizer.batch_decode([*batch["ids"], *batch["others"]["ids"]]))
    assert compose(["method=discriminative_ft", "model=smollm2-135m"]).method.discriminative_ft.system == "You are an unhelpful assistant."


def test_answers_to_many_prompts_are_those_to_each() -> None:
    run = build("method=full", data=False)
    prompts: list[Any] = [[{"role": "user", "content": "Mia has " + "very " * k + "many apples."}] for k in (0, 3, 9)] + ["Once there was"]
    together = run.task.answers(run.model, prompts, max_new_tokens=8)
    assert any(text for (text,) in together)
    assert together == [[run.task.generate(run.model, prompt, max_new_tokens=8)] for prompt in prompts]
    run.seed_global("x")
    sampled = run.task.answers(run.model, prompts, n=4, max_new_tokens=8, do_sample=True, temperature=1.0)
    assert all(len(texts) == 4 for texts in sampled) and len(set(sampled[0])) > 1


# -- the run -----------------------------------------------------------------------------------------------------------


def test_without_the_sampled_answers_it_is_the_likelihood_of_whole_answers() -> None:
    run = dft("u_init=1000", "gamma=1e-12", "max_new_tokens=3")
    window = run.window(0)
    loss = run.gradients(window)
    found = {name: p.grad.clone() for name, p in run.trainable().items()}
    plain = run.gradients(window, lambda batch: -run.task.outputs(run.model, batch).logps.sum())
    assert window.units == 8
    assert torch.allclose(loss, plain, rtol=1e-6)
    assert all(torch.allclose(found[name], p.grad, atol=1e-7) for name, p in run.trainable().items())


def test_averages_move_once_an_update_and_only_those_of_its_examples() -> None:
    run = dft("max_new_tokens=3", "hardware.micro_batch=3")
    (method,) = run.stack.methods
    run.fit_steps, run.optimizer = 6, run.build_optimizer()
    window = run.window(0)
    examples = [int(i) for batch in window for i in batch["example"]]
    run.loss(window)
    run.loss(window)
    assert not method.u.any()  # looking moves nothing
    run.update(window)
    moved = method.u.nonzero()[:, 0].tolist()
    assert moved == sorted(examples) and run.events["averages_moved"] == 8
    assert torch.isfinite(method.u).all()


@pytest.mark.parametrize("variant", ["dft", "dft2"])
def test_data_becomes_likelier_than_what_the_base_said(variant: str) -> None:
    run = dft("max_new_tokens=6", f"variant={variant}", "data.size=8", "trainer.max_steps=25")
    run.fit(1)
    first = float(run._row["scores/data"] - run._row["scores/sampled"])
    run.fit(24)
    last = float(run._row["scores/data"] - run._row["scores/sampled"])
    assert last > first + (5 if variant == "dft" else 0.5)
    assert torch.isfinite(run.stack.methods[0].u).all()
    assert not run.held


def test_plan_and_data() -> None:
    both, plain = plan(compose(["method=discriminative_ft", *SMALL])), plan(compose(["method=full", *SMALL]))
    assert both.flops / both.tokens == pytest.approx(3 * plain.flops / plain.tokens, rel=0.05)
    assert "further models" not in both.memory
    with pytest.raises(UserError, match="discriminative_ft needs prompts and answers, and data stories holds plain text"):
        build("method=discriminative_ft", "data=stories", "data.chats=0", *SMALL)


def test_resumed_run_is_bit_equal_and_samples_nothing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    answers = CausalLM.answers

    def spy(self: CausalLM, model: Any, prompts: Any, **options: Any) -> Any:
        calls.append(options.get("n", 1))
        return answers(self, model, prompts, **options)

    monkeypatch.setattr(CausalLM, "answers", spy)
    words = ("method=discriminative_ft", *SMALL, "trainer.samples=0", "data.size=16")
    run = check_resume(*words, "hardware.micro_batch=3", "trainer.max_steps=8", "optimizer.lr=1e-2", folder=tmp_path, at=7)
    assert len([n for n in calls if n > 1]) == 2  # of the run that was not cut short, and of the other's first part
    assert run.events["averages_moved"] == 64
    opened = Run.open(tmp_path / "straight", data=True)
    assert opened.evaluate("test") == run.evaluate("test") and len([n for n in calls if n > 1]) == 2
    assert weights(opened).keys() == weights(run).keys()
