"""DRaFT: Directly Fine-Tuning Diffusion Models on Differentiable Rewards (arXiv 2309.17400).

A sampler is a differentiable program. The gradient of a differentiable reward of the finished sample goes back through its
last K steps (of T) into the weights, mostly those of a LoRA:

    L = -mean r(decode(x_0), c),   x_K cut off from the steps before;   K = T is DRaFT, K < T is DRaFT-K

DRaFT-LV (K = 1) lowers the variance: the finished sample, held constant, is noised again n times to the level of the last
step and denoised, and these gradients are added:

    x_1 = a_1 sg(x_0) + s_1 e,   x0hat = (x_1 - s_1 e_theta(x_1, 1, c)) / a_1,   L += -mean r(decode(x0hat), c)

Both halves of classifier-free guidance carry gradients. Latents are (n, channels, h, w), rewards (n,). For flow models the
steps are Euler's. The sample is the same for every K; with `checkpointing` each step with gradients is computed twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ftrecipes.methods.rewards.base import RewardMethod
from ftrecipes.rng import generator

if TYPE_CHECKING:
    from ftrecipes.run import Run
    from ftrecipes.tasks.base import Batch


class DRaFT(RewardMethod):
    """Reward gradients through the last steps of sampling."""

    differentiable = True
    variant: str
    K: int
    n_lv: int
    checkpointing: bool

    def loss(self, run: Run, batch: Batch) -> Tensor:
        task = run.task
        last = {"draft": self.num_steps, "draft_k": self.K, "draft_lv": 1}[self.variant]
        x0 = task.sample(
            run.model, batch, steps=self.num_steps, guidance=self.guidance_scale,
            gradient_steps=min(last, self.num_steps), checkpointing=self.checkpointing,
        )  # fmt: skip
        total = self.reward_of(run, task.decode(x0), batch["prompt"]).sum()
        if self.variant == "draft_lv":
            for i in range(self.n_lv):
                total = total + self.again(run, batch, x0.detach(), i)
        return -total

    def again(self, run: Run, batch: Batch, x0: Tensor, i: int) -> Tensor:
        """The reward, summed, of samples that were noised to the last step's level and denoised."""
        task = run.task
        chain, predict = task.chain(self.num_steps), task.predictor(run.model, task.given(batch), self.guidance_scale)
        last = len(chain) - 1
        noise = torch.stack([torch.randn(task.latent, generator=generator(s, "lv", i)) for s in task.seeds(batch)]).to(x0)
        level = chain.levels[last].to(x0.device).expand(len(x0))
        x1 = chain.noised(x0, noise, last)
        x0hat, _ = chain.clean(predict(x1, level, last), x1, last)
        run.count("renoised", len(x0))
        return self.reward_of(run, task.decode(x0hat), batch["prompt"]).sum()
