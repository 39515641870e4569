"""DPOK: Reinforcement Learning for Fine-tuning Text-to-Image Diffusion Models (arXiv 2305.16381).

Denoising is a decision process of T normal steps p(x'|x, c) = N(mu_theta, s^2) (DDIM with eta = 1) and one reward at its end,
which may be a black box. The policy gradient over single steps is weighted by their likelihood ratio, and a KL term per step
holds the model at the frozen base:

    min  mean(-alpha A clamp(rho, 1 - c, 1 + c)) + beta mean (e_theta - e_pre)^2,   A = r - V(x, c, t),  rho = p_theta / p_old

log p is the MEAN over the entries of a latent, so ratios stay near one; the clamp has no minimum beside it (unlike PPO), so a
step outside the band gives no policy gradient whatever its sign. An update is one iteration: a rollout of the window's
prompts, `v_step` mini-batches of one value step, and `p_step` policy steps on transitions from a first-in-first-out buffer.
V is an MLP on the latent and the mean of the prompt's tokens whose layers are gated by an embedding of the step's number.
`kl: exact` takes the KL of the two normals, k^2 |e - e_pre|^2 / 2 s^2 summed over entries, instead of the mean square of the
predictions (as the authors' code does). The last step has no density where it ends at clean latents, and is left out.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftrecipes.methods.rewards.base import Reference, RewardMethod
from ftrecipes.rng import derive
from ftrecipes.tasks.samplers import DDIM, log_prob
from ftrecipes.update import Window

if TYPE_CHECKING:
    from ftrecipes.run import Run
    from ftrecipes.tasks.base import Batch

STORED = ("x", "after", "i", "reward", "logp")
"""What is kept of a transition, with its prompt."""


class Gated(nn.Module):
    """A linear layer whose outputs are multiplied by an embedding of the step's number."""

    def __init__(self, inside: int, outside: int, steps: int) -> None:
        super().__init__()
        self.linear, self.gate = nn.Linear(inside, outside), nn.Embedding(steps, outside)
        nn.init.xavier_normal_(self.linear.weight)
        nn.init.uniform_(self.gate.weight)

    def forward(self, x: Tensor, i: Tensor) -> Tensor:
        return self.gate(i) * self.linear(x)


class Value(nn.Module):
    """V(x, c, t): (n, entries of a latent), (n, d) of the prompt and step numbers (n,) to (n,)."""

    def __init__(self, entries: int, text: int, steps: int, width: int = 256) -> None:
        super().__init__()
        sizes = [entries + text, width, width]
        self.layers = nn.ModuleList(Gated(size, width, steps) for size in sizes)
        self.last = nn.Linear(width, 1)
        nn.init.xavier_normal_(self.last.weight)

    def forward(self, x: Tensor, text: Tensor, i: Tensor) -> Tensor:
        h = torch.cat([x.flatten(1), text], 1)
        for layer in self.layers:
            h = layer(h, i).relu()
        return self.last(h)[:, 0]  # type: ignore[no-any-return]


class DPOK(RewardMethod):
    """Policy gradient on denoising steps with a KL term to the base."""

    reward_weight: float
    kl_weight: float
    kl: str
    ratio_clip: float
    p_step: int
    p_batch_size: int
    grad_accum: int
    buffer_size: int
    v_flag: bool
    v_lr: float
    v_step: int
    v_batch_size: int

    def prepare(self, run: Run) -> None:
        super().prepare(run)
        self.buffer: dict[str, Any] = {"prompt": []}
        self.reference: Reference | None = None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(run.seed, "dpok", "value"))
            width = run.task.text_shapes()["context"][1]
            self.value = Value(math.prod(run.task.latent), width, self.num_steps)
        if next(run.model.parameters()).device.type != "meta":
            self.value.to(run.device)
        self.value_optimizer = torch.optim.AdamW(self.value.parameters(), lr=self.v_lr)

    def step(self, run: Run, window: Window) -> None:
        if self.reference is None:
            self.reference = Reference(run)
        self.chain: DDIM = run.task.chain(self.num_steps)
        run.model.eval()  # no dropout between rollout and ratio
        for batch in window:
            self.rollout(run, batch)
        rng = np.random.default_rng(derive(run.seed, "dpok", run.step))
        if self.v_flag:
            self.fit_value(run, rng)
        for _ in range(self.p_step):
            micros = [self.minibatch(run, rng, self.p_batch_size) for _ in range(self.grad_accum)]
            loss = run.gradients(Window(micros, float(sum(len(m["i"]) for m in micros))), lambda b: self.policy_loss(run, b))
            run.log("loss", loss)
            run.stack.gradients(run, window)
            run.update.apply(loss)
            run.finish_window(Window(micros, float(sum(len(m["i"]) for m in micros))))
            run.count("policy_steps")
        run.model.train()

    # -- rollout --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def rollout(self, run: Run, batch: Batch) -> None:
        """Sample the prompts of a batch and keep every step of it."""
        task, steps = run.task, []

        def watch(i: int, x: Tensor, mean: Tensor, deviation: float, after: Tensor) -> None:
            if deviation > 0:
                steps.append((x, after, torch.full((len(x),), i, device=x.device), log_prob(after, mean, deviation)))

        with run.update.autocast():
            x0 = task.sample(run.model, batch, steps=self.num_steps, guidance=self.guidance_scale, eta=1.0, watch=watch)
            images = task.decode(x0).clamp(0, 1)
        rewards = self.reward_of(run, images, batch["prompt"])
        run.log("reward", rewards.mean())
        for x, after, i, logp in steps:
            found = {"x": x, "after": after, "i": i, "reward": rewards, "logp": logp}
            for name in STORED:
                kept = self.buffer.get(name)
                new = found[name].cpu()
                self.buffer[name] = (new if kept is None else torch.cat([kept, new]))[-self.buffer_size :]
            self.buffer["prompt"] = [*self.buffer["prompt"], *batch["prompt"]][-self.buffer_size :]
            run.count("transitions", len(x))

    def minibatch(self, run: Run, rng: np.random.Generator, size: int) -> Batch:
        """Random transitions, without replacement, on the device."""
        have = len(self.buffer["prompt"])
        chosen = rng.choice(have, min(size, have), replace=False).tolist()
        prompts = [self.buffer["prompt"][j] for j in chosen]
        batch = {name: self.buffer[name][chosen] for name in STORED}
        return run.move({**batch, **run.task.texts(prompts), "prompt": prompts})

    # -- value ----------------------------------------------------------------------------------------------------

    def values(self, batch: Batch) -> Tensor:
        """V of transitions (n,)."""
        return self.value(batch["x"], batch["context"].float().mean(1), batch["i"])  # type: ignore[no-any-return]

    def fit_value(self, run: Run, rng: np.random.Generator) -> None:
        """One AdamW step on the mean square of V - r over `v_step` mini-batches."""
        self.value_optimizer.zero_grad()
        for _ in range(self.v_step):
            batch = self.minibatch(run, rng, self.v_batch_size)
            loss = F.mse_loss(self.values(batch), batch["reward"])
            (loss / self.v_step).backward()
            run.log("dpok/value_loss", loss.detach())
        self.value_optimizer.step()
        run.count("value_steps")

    # -- policy ---------------------------------------------------------------------------------------------------

    def policy_loss(self, run: Run, batch: Batch) -> Tensor:
        """The objective of transitions, summed."""
        e, logp = self.replay(run, run.model, batch)
        with torch.no_grad():
            advantage = batch["reward"] - (self.values(batch) if self.v_flag else 0.0)
        rho = (logp - batch["logp"]).exp()
        policy = -self.reward_weight * advantage * rho.clamp(1 - self.ratio_clip, 1 + self.ratio_clip)
        assert self.reference
        with torch.no_grad(), self.reference.looking() as base:
            e_pre, _ = self.replay(run, base, batch)
        run.model.eval()
        squared = (e - e_pre).square().flatten(1)
        kl = squared.mean(1) if self.kl == "eps_mse" else squared.sum(1) * self.kl_scale(batch["i"])
        run.report("dpok/kl", kl.detach().sum())
        run.report("dpok/clipped", ((rho - 1).abs() > self.ratio_clip).float().sum())
        return (policy + self.kl_weight * kl).sum()

    def replay(self, run: Run, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Predicted noise of stored transitions, guidance included (n, …), and the log-probability of the steps taken (n,)."""
        task = run.task
        levels = self.chain.levels.to(batch["i"].device)[batch["i"]]
        output = task.predictor(model, task.given(batch), self.guidance_scale)(batch["x"], levels, -1)
        noise, logps = torch.empty_like(output), output.new_empty(len(output))
        for i in batch["i"].unique().tolist():
            at = batch["i"] == i
            x, mine = batch["x"][at], output[at]
            mean, deviation = self.chain.step(mine, x, i, 1.0)
            noise[at] = self.chain.clean(mine, x, i)[1]
            logps[at] = log_prob(batch["after"][at], mean, deviation)
        return noise, logps

    def kl_scale(self, i: Tensor) -> Tensor:
        """k^2 / 2 s^2 of steps: what |e - e_pre|^2 is multiplied with in the KL divergence of their normals."""
        scales = []
        for number in i.tolist():
            here, after = self.chain.at(number)
            s = self.chain.deviation(number)
            k = math.sqrt(max(0.0, 1 - after - s**2)) - math.sqrt(after * (1 - here) / here)
            scales.append(k**2 / (2 * s**2))
        return torch.tensor(scales, device=i.device)

    # -- saving ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {"buffer": dict(self.buffer), "value": self.value.state_dict(), "optimizer": self.value_optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.buffer = state["buffer"]
        self.value.load_state_dict(state["value"])
        self.value_optimizer.load_state_dict(state["optimizer"])
