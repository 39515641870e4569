"""DCO: a log-sigmoid of the gain over the base, and reward guidance in sampling."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from generators import SMALL_DIT, SMALL_SD
from tools import build, check_resume
from torch import Tensor

from ftrecipes.compose import compose
from ftrecipes.errors import UserError
from ftrecipes.run import Run
from ftrecipes.tasks import samplers

MUTATION = ("ftrecipes/methods/objectives/dco.py", "self.rg_scale * (tuned - given)", "self.rg_scale * (tuned - null)")
KINDS = {"diffusion": SMALL_SD, "flow": SMALL_DIT}


@pytest.fixture(params=["diffusion", "flow"])
def small(request: Any) -> tuple[str, ...]:
    return KINDS[request.param]


def made(small: tuple[str, ...], *words: str, off_start: float = 0.0, method: str = "dco") -> Run:
    run = build(f"method={method}", *small, *words)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in run.trainable().items():
            if name.endswith(".B") and off_start:
                p.copy_(off_start * torch.randn(p.shape, generator=rng))
    return run


def gradient(run: Run, loss: Any = None) -> tuple[float, dict[str, Tensor]]:
    value = run.gradients(run.window(0), loss)
    return float(value), {n: p.grad.clone() for n, p in run.trainable().items() if p.grad is not None}


def plain(run: Run) -> Any:
    return lambda batch: run.task.losses(run.task.outputs(run.model, batch), batch).sum()


def test_at_the_start_the_loss_is_log_two_and_half_of_beta_the_plain_gradient(small: tuple[str, ...]) -> None:
    run = made(small)
    loss, found = gradient(run)
    assert loss == pytest.approx(math.log(2), abs=1e-7)
    _, wanted = gradient(run, plain(run))
    assert max(float(g.abs().max()) for g in wanted.values()) > 1e-6
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], 500 * grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("beta", [0.5, 20.0])
def test_gradient_is_weighted_by_the_sigmoid(small: tuple[str, ...], beta: float) -> None:
    run = made(small, f"method.dco.beta={beta}", off_start=0.3)
    _, found = gradient(run)
    base = run.pristine()

    def weighted(batch: Any) -> Tensor:
        fit = run.task.losses(run.task.outputs(run.model, batch), batch)
        with torch.no_grad():
            gain = fit - run.task.losses(run.task.outputs(base, batch), batch)
        assert gain.abs().max() > 1e-4
        return (beta * torch.sigmoid(beta * gain) * fit).sum()

    _, wanted = gradient(run, weighted)
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-6)


def test_a_small_beta_is_half_the_plain_gradient_and_a_reached_gain_is_enough(small: tuple[str, ...]) -> None:
    run = made(small, "method.dco.beta=1e-6", off_start=0.3)
    _, found = gradient(run)
    _, wanted = gradient(run, plain(run))
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name] / 1e-6, grad / 2, rtol=1e-3, atol=1e-5)
    run = made(
        small, "method.dco.beta=1e5", "optimizer.lr=3e-3", "trainer.batch=4", "data.size=4", "method.lora.rank=8", method="[lora,dco]"
    )
    window = run.window(0)
    opt = torch.optim.Adam(list(run.trainable().values()), lr=3e-3)
    for _ in range(25):  # fits this window with its own noise
        run.gradients(window, plain(run))
        opt.step()
    with torch.no_grad():
        gains = torch.cat(
            [run.task.losses(run.task.outputs(run.model, b), b) - run.task.losses(run.task.outputs(run.pristine(), b), b) for b in window]
        )
    assert gains.max() < -1e-3
    run.gradients(window)
    assert max(float(p.grad.abs().max()) for p in run.trainable().values() if p.grad is not None) < 1e-12


def test_the_base_sees_the_same_noise_and_is_really_bare(small: tuple[str, ...]) -> None:
    run = made(small, off_start=0.3)
    method: Any = run.stack.methods[1]
    batch = run.window(0).micros[0]
    with torch.no_grad(), method.reference(run).looking() as base:
        assert base is run.model  # no second model in memory
        found = run.task.losses(run.task.outputs(base, batch), batch)
    with torch.no_grad():
        wanted = run.task.losses(run.task.outputs(run.pristine().eval(), batch), batch)
        tuned = run.task.losses(run.task.outputs(run.model, batch), batch)
    assert torch.equal(found, wanted) and not torch.allclose(tuned, wanted, atol=1e-4)
    full = made(small, method="[full,dco]")
    assert full.stack.methods[1].reference(full).model is not None


def test_per_image_and_per_micro_batch_sigmoids(small: tuple[str, ...]) -> None:
    def loss(*words: str) -> float:
        run = made(small, "method.dco.beta=50", *words, off_start=0.5)
        return float(run.loss(run.window(0)))

    assert loss("hardware.micro_batch=1") == pytest.approx(loss("hardware.micro_batch=1", "method.dco.per_sample=false"), rel=1e-5)
    run = made(small, "method.dco.beta=50", off_start=0.5)
    batch = run.window(0).micros[0]
    with torch.no_grad():
        gain = run.task.losses(run.task.outputs(run.model, batch), batch) - run.task.losses(run.task.outputs(run.pristine(), batch), batch)
    soft = torch.nn.functional.softplus
    assert loss() == pytest.approx(float(soft(50 * gain).mean()), rel=1e-4)
    assert loss("method.dco.per_sample=false") == pytest.approx(float(soft(50 * gain.mean())), rel=1e-4)
    assert loss() > loss("method.dco.per_sample=false") + 1e-4


def sampled(run: Run, guided: bool = True) -> Tensor:
    batch = run.data["test"].batch([0, 1, 2])
    run.model.eval()
    guide, run.task.guide = run.task.guide, run.task.guide if guided else None
    try:
        with torch.no_grad():
            return run.task.sample(run.model, batch, steps=4, guidance=2.5)
    finally:
        run.task.guide = guide


def test_reward_guidance(small: tuple[str, ...]) -> None:
    run = made(small, "method.dco.rg_scale=0", off_start=0.4)
    method: Any = run.stack.methods[1]
    bare = made(small)
    base = sampled(bare, guided=False)
    assert torch.equal(sampled(run), base)  # w_r = 0 is the base under guidance
    for scale in (0.0, 1.0, 4.0):
        bare.stack.methods[1].rg_scale = scale
        torch.testing.assert_close(sampled(bare), base, rtol=1e-4, atol=1e-4)  # untuned: every w_r is the base
    method.rg_scale = 2.5  # w_r = w_t: guidance whose conditional branch is the tuned model
    batch, pristine = run.data["test"].batch([0, 1, 2]), run.pristine().eval()
    task, given = run.task, run.task.given(batch)

    def mixed(x: Tensor, level: Tensor, i: int) -> Tensor:
        null = task.network(pristine, x, level, task.nothing(3))
        return null + 2.5 * (task.network(run.model, x, level, given) - null)

    with torch.no_grad():
        wanted = samplers.run(task.chain(4), mixed, task.start(batch))
    torch.testing.assert_close(sampled(run), wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(wanted, base, atol=1e-2)
    assert run.events["guided_steps"] == 8


def test_less_drift_at_equal_steps(small: tuple[str, ...]) -> None:
    """On four images: the loss on them falls below the base's, and old prompts move less than under the plain loss."""

    def after(method: str) -> tuple[float, float]:
        run = made(
            small, "method.lora.rank=8", "data.size=4", "data.shapes=heart", "trainer.batch=4", "optimizer.lr=1e-2",
            "schedule=constant", *(["method.dco.beta=1000"] if method == "[lora,dco]" else []), method=method,
        )  # fmt: skip
        run.fit(30)
        run.model.eval()
        old, new = run.data["retain"].batch(range(8)), run.data["train"].batch(range(4))
        base = run.pristine().eval()
        with torch.no_grad():
            drift = (run.task.outputs(run.model, old).prediction - run.task.outputs(base, old).prediction).square().mean()
            fit = [run.task.losses(run.task.outputs(m, new), new).mean() for m in (run.model, base)]
        return float(drift), float(fit[0] - fit[1])

    (drift, gain), (drift_plain, gain_plain) = after("[lora,dco]"), after("lora")
    assert gain_plain < gain < 0
    assert drift < drift_plain


def test_settings_and_stacks(tmp_path: Path) -> None:
    real = compose(["method=dco", "model=sdxl"])
    assert (real.optimizer.lr, real.trainer.batch, real.method.lora.rank, real.trainer.max_steps) == (5e-5, 1, 32, 2000)
    with pytest.raises(UserError, match="dco and rl_guidance cannot stack"):
        compose(["method=[lora,dco,rl_guidance]", "model=tiny-sd"])
    words = ("method=dco", *SMALL_SD, "trainer.max_steps=6", "hardware.micro_batch=3", "optimizer.lr=1e-2")
    run = check_resume(*words, folder=tmp_path, at=5)
    assert run.events["compared"] == 24
