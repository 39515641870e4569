"""DFT and DFT2: Discriminative Finetuning of Generative Large Language Models without Reward Models and Preference Data
(arXiv 2502.18679).

Not the likelihood of tokens is maximised but that of the data's answer among all possible ones,

    P_d(y|x) = exp(s(y,x)/tau) / sum_y' exp(s(y',x)/tau)

where s is log pi(y|x), summed (`dft`) or averaged (`dft2`) over the tokens of the answer. The normaliser is estimated with
`samples_per_prompt` B answers y_j that the base model P_0 gave before training, and tracked for every example i of the
data by a moving average, in log space:

    d_j = s(y_j)/tau - log P_0(y_j|x)          dft2 leaves out the second term
    u_i <- log( (1 - gamma) exp(u_i) + gamma mean_j exp(d_j) )
    L_i = -s(y_i) + mean_j sg( exp(d_j - u_i) ) s(y_j),    averaged over the examples of the update

Nothing flows through u and d. The answers are sampled once, in the order in which the run will need them: every pass over
the data has B fresh ones of each example (`resample`). They are asked for with a system prompt that wants bad answers, and
learned from, and scored by P_0, behind the plain prompt. No reference model is kept: log P_0 is computed with the answers.
Not to be mixed up with dynamic fine-tuning (dft.py).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ftrecipes.data.base import Dataset, Example, micro_batches, order
from ftrecipes.errors import UserError
from ftrecipes.methods.objectives.tokens import Objective
from ftrecipes.tasks.causal_lm import answered, messages_of

if TYPE_CHECKING:
    from ftrecipes.run import Run
    from ftrecipes.tasks.base import Batch, Encoded, Task

PROMPTS = 64
"""Prompts that are answered at a time."""
PAPER = {"dft": {"tau": 1.0, "gamma": 0.85}, "dft2": {"tau": 0.3, "gamma": 0.9}}


class DiscriminativeFT(Objective):
    """Answers of the data against answers that the base model gave."""

    blurred_by_dropout = True
    variant: str
    tau: float | None
    gamma: float | None
    gamma_schedule: str
    samples_per_prompt: int
    resample: bool
    u_init: float
    system: str | None
    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int

    def set_up(self, task: Task) -> None:
        task.unit, task.alternatives = "example", self.samples_per_prompt
        self.tau = PAPER[self.variant]["tau"] if self.tau is None else self.tau
        self.gamma = PAPER[self.variant]["gamma"] if self.gamma is None else self.gamma
        self.u: Tensor | None = None
        self.moved: list[tuple[Tensor, Tensor]] = []

    # -- the base model's answers -----------------------------------------------------------------------------------

    def data(self, run: Run) -> None:
        run.once(f"{self.key}/answers", lambda: self.generate(run))

    def generate(self, run: Run) -> dict[str, Any]:
        """Sample answers of the model as it was loaded, and score them."""
        train, wanted = run.data["train"], run.planned_steps * run.settings.trainer.batch
        if "text" in train.raw[train.keep[0]]:
            raise UserError(f"{self.key} needs prompts and answers, and data {run.settings.data.name} holds plain text")
        passes = max(1, math.ceil(wanted / len(train.keep))) if self.resample else 1
        visited = sorted(set(order(len(train.keep), run.seed, 0, min(wanted, len(train.keep)))))
        others_choose = len(run.stack.at("data")) > 1  # another method may leave examples out, which changes their order
        positions = list(train.keep) if others_choose else [train.keep[i] for i in visited]
        positions.sort(key=lambda i: (train[i]["length"], i))  # little padding
        n = passes * self.samples_per_prompt
        answers: dict[int, list[str]] = {}
        with run.evaluating():
            for at in range(0, len(positions), PROMPTS):
                some = positions[at : at + PROMPTS]
                run.seed_global(self.key, at)
                found = run.task.answers(
                    run.model, [self.question(train.raw[i]) for i in some], n=n, max_new_tokens=self.max_new_tokens,
                    do_sample=True, temperature=self.temperature, top_p=self.top_p, top_k=self.top_k,
                )  # fmt: skip
                answers |= zip(some, found, strict=True)
        scores = self.score(run, answers) if self.variant == "dft" else {}
        run.count("generated", n * len(positions))
        return {"passes": passes, "answers": answers, "scores": scores}

    def question(self, example: Example) -> str | list[dict[str, str]]:
        """What stands before an example's last answer, with the system prompt where there is none."""
        if "completion" in example:
            return str(example["prompt"])
        messages = messages_of(example)[:-1]
        if self.system and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.system})
        return messages

    def score(self, run: Run, answers: dict[int, list[str]]) -> dict[int, list[float]]:
        """log P_0 of each answer behind the plain prompt."""
        raw = run.data["train"].raw
        alone = [{**answered(raw[i], text), "others": []} for i, texts in answers.items() for text in texts]
        dataset = Dataset("answers", alone, run.task)
        found = torch.zeros(len(alone))
        with run.evaluating():
            for positions in micro_batches(dataset, dataset.keep, examples=None, budget=run.budget):
                outputs = run.task.outputs(run.model, run.move(dataset.batch(positions)))
                found[positions] = outputs.per_sequence(outputs.logps, len(positions)).cpu()
        values = iter(found.tolist())
        return {i: [next(values) for _ in texts] for i, texts in answers.items()}

    def prepare(self, run: Run) -> None:
        made = run.journal.get(f"{self.key}/answers")
        if made is None:  # a plan, or a finished run that is opened
            return
        train, B = run.data["train"], self.samples_per_prompt
        self.u = torch.full((len(train.raw),), self.u_init, dtype=torch.float64)
        cache: dict[int, tuple[int, Encoded]] = {}

        def with_answers(position: int, encoded: Encoded) -> Encoded:
            first = train.epoch % made["passes"] * B
            if cache.get(position, (None,))[0] != first:
                if train.lazy and len(cache) >= PROMPTS**2:
                    cache.clear()
                encoded = run.task.encode({**train.raw[position], "others": made["answers"][position][first : first + B]})
                for other, score in zip(encoded["others"], made["scores"].get(position, ())[first : first + B], strict=False):
                    other["reference"] = score
                cache[position] = (first, encoded)
            return cache[position][1]

        train.view = with_answers

    # -- the loss ---------------------------------------------------------------------------------------------------

    def gamma_now(self, run: Run) -> float:
        """gamma of this update; `cosine` falls from 1 to it over the first half of the fit."""
        assert self.gamma is not None
        half = run.fit_steps // 2
        if self.gamma_schedule == "constant" or run.fit_step >= half:
            return self.gamma
        return (1 - self.gamma) * 0.5 * (1 + math.cos(math.pi * run.fit_step / half)) + self.gamma

    def begin(self, run: Run) -> None:
        super().begin(run)
        self.moved = []

    def loss(self, run: Run, batch: Batch) -> Tensor:
        assert self.tau is not None
        others, n = batch["others"], len(batch["example"])
        m = len(others["owner"])
        outputs, sampled = run.task.outputs(run.model, batch), run.task.outputs(run.model, others)
        s, negative = outputs.per_sequence(outputs.logps, n), sampled.per_sequence(sampled.logps, m)
        run.report("nll", -s.detach().sum())
        if self.variant == "dft2":
            s = s / (outputs.per_sequence(torch.ones_like(outputs.logps), n) + 1e-8)
            negative = negative / (sampled.per_sequence(torch.ones_like(sampled.logps), m) + 1e-8)
        negative = negative.view(n, -1)
        d = negative.detach().double() / self.tau
        if self.variant == "dft" and not batch.get("whole"):
            d = d - others["reference"].view(n, -1)
        u = d.new_full((n,), self.u_init) if self.u is None else self.u[batch["example"].cpu()].to(d.device)
        gamma = self.gamma_now(run)
        u = moving_average(u, d, gamma)
        self.moved.append((batch["example"], u))
        weight = (d - u[:, None]).exp().to(s.dtype)
        run.log("gamma", gamma)
        run.report("u", u.sum())
        run.report("weight", weight.mean(1).sum())
        run.report("scores/data", s.detach().sum())
        run.report("scores/sampled", negative.detach().mean(1).sum())
        return (-s + (weight * negative).mean(1)).sum()

    def updated(self, run: Run) -> None:
        if self.u is not None:
            change = torch.zeros_like(self.u)
            for examples, u in self.moved:
                change[examples.cpu()] = u.cpu() - self.u[examples.cpu()]
            run.update.world.sum([change])
            self.u += change
            run.count("averages_moved", sum(len(examples) for examples, _ in self.moved))

    def state_dict(self) -> dict[str, Any]:
        return {"u": self.u}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.u = state["u"]


def moving_average(u: Tensor, d: Tensor, gamma: float) -> Tensor:
    """log( (1 - gamma) exp(u) + gamma mean_j exp(d_j) ) for u (n,) and d (n, B), without leaving log space."""
    new = math.log(gamma) + d.logsumexp(1) - math.log(d.shape[1])
    return new if gamma == 1 else torch.logaddexp(math.log1p(-gamma) + u, new)
