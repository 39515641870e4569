"""DPOK: policy gradient on denoising steps, with a KL term to the base and a learned value."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from generators import SMALL_SD
from tools import build, check_resume
from torch import Tensor

from ftrecipes import registry
from ftrecipes.compose import compose
from ftrecipes.errors import RunFailed, UserError
from ftrecipes.methods.rewards.base import Reference
from ftrecipes.run import Run
from ftrecipes.tasks.samplers import log_prob

MUTATION = (
    "ftrecipes/methods/rewards/dpok.py",
    "rho.clamp(1 - self.ratio_clip, 1 + self.ratio_clip)",
    "torch.minimum(rho, rho.clamp(1 - self.ratio_clip, 1 + self.ratio_clip))",
)
FEW = (
    "method.dpok.num_steps=4", "method.dpok.guidance_scale=2.0", "method.dpok.p_step=2", "method.dpok.p_batch_size=6",
    "method.dpok.grad_accum=2", "method.dpok.v_batch_size=8", "method.dpok.v_step=2", "optimizer.lr=1e-3",
)  # fmt: skip


def made(*words: str, rolled: bool = True) -> tuple[Run, Any]:
    """A run whose buffer holds one rollout of its first window."""
    run = build("method=dpok", *SMALL_SD, *FEW, *words)
    method: Any = run.stack.methods[1]
    method.chain, method.reference = run.task.chain(4), Reference(run)
    run.model.eval()
    if rolled:
        for batch in run.window(0):
            method.rollout(run, batch)
    return run, method


def whole(run: Run, method: Any) -> Any:
    """All transitions, in the order they were stored."""
    n = len(method.buffer["prompt"])
    batch = {name: method.buffer[name] for name in ("x", "after", "i", "reward", "logp")}
    assert all(len(t) == n for t in batch.values())
    return {**batch, **run.task.texts(method.buffer["prompt"]), "prompt": method.buffer["prompt"]}


def moved(run: Run, size: float = 0.2) -> None:
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in run.trainable().items():
            if name.endswith(".B"):
                p.add_(size * torch.randn(p.shape, generator=rng))


def test_settings_of_paper_and_carrier() -> None:
    real = compose(["method=dpok", "model=sd15"])
    knobs = real.method.dpok
    assert (knobs.p_step, knobs.p_batch_size, knobs.grad_accum, knobs.num_steps) == (5, 4, 12, 50)
    assert (real.optimizer.lr, real.trainer.clip, real.trainer.batch, real.method.lora.rank) == (1e-5, 0.1, 10, 4)
    with pytest.raises(UserError, match="dpok is for diffusion"):
        compose(["method=dpok", "model=tiny-dit"])


def test_before_the_first_update_ratios_are_one_and_the_kl_is_zero() -> None:
    run, method = made()
    batch = whole(run, method)
    assert len(batch["prompt"]) == 12  # 4 prompts, 3 steps: the last one ends at clean latents and has no density
    assert sorted(set(batch["i"].tolist())) == [0, 1, 2]
    with torch.no_grad():
        e, logp = method.replay(run, run.model, batch)
        with method.reference.looking() as base:
            before, _ = method.replay(run, base, batch)
    assert (logp - batch["logp"]).abs().max() < 1e-5
    assert torch.equal(e, before)
    for i in range(3):  # at the batch shape of the rollout the numbers are the same bit for bit
        at = (batch["i"] == i).nonzero()[:, 0].tolist()
        part = {k: [v[j] for j in at] if isinstance(v, list) else v[at] for k, v in batch.items()}
        with torch.no_grad():
            assert torch.equal(method.replay(run, run.model, part)[1], part["logp"])


def test_log_probability_is_that_of_ddpms_step() -> None:
    """Mean and deviation of the stored steps, from diffusers' scheduler at eta = 1."""
    diffusers = pytest.importorskip("diffusers")
    run, method = made()
    batch = whole(run, method)
    scheduler = diffusers.DDIMScheduler.from_config(run.task.pipe.scheduler.config)
    scheduler.set_timesteps(4)
    with torch.no_grad():
        e, logp = method.replay(run, run.model, batch)
    for j, i in enumerate(batch["i"].tolist()):
        t = scheduler.timesteps[i]
        zero = torch.zeros_like(e[j])
        mean = scheduler.step(e[j], t, batch["x"][j], eta=1.0, variance_noise=zero).prev_sample
        deviation = float(scheduler._get_variance(t, t - 250)) ** 0.5
        wanted = torch.distributions.Normal(mean, deviation).log_prob(batch["after"][j]).mean()
        assert float(logp[j]) == pytest.approx(float(wanted), abs=2e-4)
        noise = (batch["after"][j] - mean) / deviation
        assert abs(float(noise.mean())) < 0.2 and float(noise.std()) == pytest.approx(1, abs=0.12)


def gradients(run: Run, loss: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(loss, list(run.trainable().values()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, run.trainable().values(), strict=True)]


def test_policy_gradient_at_ratio_one() -> None:
    run, method = made("method.dpok.kl_weight=0")
    batch = whole(run, method)
    found = gradients(run, method.policy_loss(run, batch))
    advantage = (batch["reward"] - method.values(batch)).detach()
    _, logp = method.replay(run, run.model, batch)
    wanted = gradients(run, -(method.reward_weight * advantage * logp).sum())
    assert max(float(g.abs().max()) for g in wanted) > 1e-5
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_outside_the_band_there_is_no_gradient_whatever_the_sign() -> None:
    run, method = made("method.dpok.kl_weight=0", "method.dpok.v_flag=false")
    batch = whole(run, method)
    for sign in (1.0, -1.0):
        for shift in (0.01, -0.01):
            batch["reward"] = torch.full((12,), sign)
            far = {**batch, "logp": batch["logp"] + shift}  # rho = exp(-shift), a hundred times beyond the band
            assert all(not g.any() for g in gradients(run, method.policy_loss(run, far))), (sign, shift)
        assert any(g.any() for g in gradients(run, method.policy_loss(run, batch)))


def test_kl_is_that_of_the_steps_normals() -> None:
    run, method = made("method.dpok.reward_weight=0", "method.dpok.kl_weight=1", "method.dpok.kl=exact")
    moved(run)
    batch = whole(run, method)
    with torch.no_grad():
        exact = float(method.policy_loss(run, batch))
        with method.reference.looking() as base:
            before = run.task.predictor(base, run.task.given(batch), 2.0)(batch["x"], method.chain.levels[batch["i"]], 0)
        now = run.task.predictor(run.model, run.task.given(batch), 2.0)(batch["x"], method.chain.levels[batch["i"]], 0)
    total, per_step = 0.0, []
    for j, i in enumerate(batch["i"].tolist()):
        pairs = [torch.distributions.Normal(*method.chain.step(e[j], batch["x"][j], i, 1.0)) for e in (now, before)]
        kl = float(torch.distributions.kl_divergence(*pairs).sum())
        total += kl
        per_step.append((i, kl / float((now[j] - before[j]).square().mean())))
    assert exact == pytest.approx(total, rel=1e-3) and total > 1e-4
    entries = now[0].numel()
    for i, ratio in per_step:
        here, after = method.chain.at(i)
        s = method.chain.deviation(i)
        k = math.sqrt(1 - after - s**2) - math.sqrt(after * (1 - here) / here)
        assert ratio == pytest.approx(k**2 * entries / (2 * s**2), rel=1e-3)
    method.kl = "eps_mse"
    with torch.no_grad():
        assert float(method.policy_loss(run, batch)) == pytest.approx(float((now - before).square().flatten(1).mean(1).sum()), rel=1e-4)


def test_a_black_box_sees_detached_images_once() -> None:
    seen: list[tuple[int, bool]] = []

    @registry.reward("counted")
    def counted(samples: Tensor, examples: Any) -> Tensor:
        seen.append((len(samples), samples.requires_grad))
        return torch.tensor(np.round(samples.detach().numpy().mean((1, 2, 3)), 1))

    try:
        run, method = made("method.dpok.reward=counted", rolled=False)
        run.fit(1)
        assert seen == [(4, False)]
        assert run.events == {"rollouts": 4, "transitions": 12, "value_steps": 1, "policy_steps": 2}
        assert any(p.abs().max() > 0 for n, p in run.trainable().items() if n.endswith(".B"))
        assert method.buffer["reward"].tolist() == pytest.approx([float(r) for r in method.buffer["reward"][:4]] * 3)
        with pytest.raises(RunFailed, match="no gradient passes it, and draft needs one"):
            other = build("method=draft", *SMALL_SD, "method.draft.reward=counted")
            other.gradients(other.window(0))
    finally:
        registry._code.pop(("reward", "counted"))


def test_policy_gradient_of_one_step_is_that_of_the_expected_reward() -> None:
    """x' ~ N(theta x, s^2), reward x': d E[r] / d theta = x; the mean log-density over D entries gives 1 / D of it."""
    rng = torch.Generator().manual_seed(0)
    for dims in (1, 4):
        theta = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        x = torch.full((100_000, dims), 2.0, dtype=torch.float64)
        after = (theta * x).detach() + 0.5 * torch.randn(x.shape, generator=rng, dtype=torch.float64)
        reward = after.mean(1)
        grads = {}
        for baseline in (0.0, float(reward.mean())):
            logp = log_prob(after, theta * x, 0.5).double()
            score = (after - (theta * x).detach()).mul(x).div(0.25).mean(1)  # of each sample, for the variance
            (grads[baseline],) = torch.autograd.grad(((reward - baseline) * logp).mean(), theta)
            assert float(grads[baseline]) == pytest.approx(2.0 / dims, rel=0.05)
            grads[baseline] = ((reward - baseline) * score).var()
        plain, centred = grads.values()
        assert centred < plain


def test_the_buffer_keeps_the_freshest() -> None:
    run, method = made("method.dpok.buffer_size=10")
    assert len(method.buffer["prompt"]) == len(method.buffer["x"]) == 10
    assert method.buffer["i"].tolist() == [0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    for batch in run.window(1):
        method.rollout(run, batch)
    prompts = run.window(1).micros[0]["prompt"]
    assert method.buffer["prompt"][-4:] == prompts == method.buffer["prompt"][-8:-4]


def test_value_is_learned_and_stays_out_of_the_policys_gradient() -> None:
    run, method = made("method.dpok.v_lr=1e-2")
    batch = whole(run, method)
    first = float((method.values(batch) - batch["reward"]).square().mean())
    for step in range(40):
        method.fit_value(run, np.random.default_rng(step))
    assert float((method.values(batch) - batch["reward"]).square().mean()) < 0.2 * first
    method.value.zero_grad()
    method.policy_loss(run, batch).backward()
    assert all(p.grad is None or not p.grad.any() for p in method.value.parameters())


def test_resumed_run_is_bit_equal(tmp_path: Path) -> None:
    words = ("method=dpok", *SMALL_SD, *FEW, "method.dpok.buffer_size=20", "trainer.max_steps=6", "hardware.micro_batch=3")
    run = check_resume(*words, folder=tmp_path, at=5)
    assert run.events["policy_steps"] == 12
