"""DRaFT: gradients of a reward through the last steps of sampling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from generators import SMALL_DIT, SMALL_SD
from tools import build, check_resume, train, weights

from ftrecipes.compose import compose
from ftrecipes.errors import UserError
from ftrecipes.methods.adapters.delta import Delta
from ftrecipes.run import Run
from ftrecipes.tasks import samplers
from ftrecipes.tasks.denoising import Guided

MUTATION = ("ftrecipes/tasks/samplers.py", "learns = graded and i >= len(chain) - gradient_steps", "learns = graded and i < gradient_steps")
FEW = ("method.draft.num_steps=4", "method.draft.guidance_scale=2.0", "optimizer.lr=1e-2")


def made(*words: str, small: tuple[str, ...] = SMALL_SD) -> Run:
    """A run whose LoRA is off its start, so that both factors have gradients."""
    run = build("method=draft", *small, *FEW, *words)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in run.trainable().items():
            if name.endswith(".B"):
                p.copy_(0.3 * torch.randn(p.shape, generator=rng))
    return run


def gradient(run: Run) -> tuple[float, dict[str, torch.Tensor]]:
    loss = run.gradients(run.window(0))
    return float(loss), {n: p.grad.clone() for n, p in run.trainable().items() if p.grad is not None}


def test_carried_by_a_lora_with_the_papers_settings() -> None:
    settings = compose(["method=draft"])
    assert list(settings.method) == ["lora", "draft"] and settings.model.name == "tiny-sd"
    assert settings.method.lora.targets == ["attention"] and settings.method.lora.rank == 8
    real = compose(["method=draft", "model=sd15"])
    assert (real.optimizer.lr, real.trainer.batch, real.method.draft.num_steps) == (4e-4, 4, 50)
    assert list(compose(["method=[dora,draft]"]).method) == ["dora", "draft"]
    assert list(compose(["method=[full,draft]"]).method) == ["full", "draft"]


@pytest.mark.parametrize("small", [SMALL_SD, SMALL_DIT], ids=["diffusion", "flow"])
def test_full_gradient_is_that_of_the_whole_sampler(small: tuple[str, ...]) -> None:
    """Central differences of the reward of the finished images, in float64, along a random direction."""
    run = made("method.draft.variant=draft", "trainer.batch=2", small=small)
    for module in (run.model, *run.task.companions()):
        module.double()
    run.task._prompts.clear()
    network = run.task.network
    run.task.network = lambda model, x, level, condition: _double(run, model, x, level, condition)
    (batch,) = run.window(0).micros
    batch = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in batch.items()}
    method: Any = run.stack.methods[1]
    decode = run.task.decode
    run.task.decode = lambda z: run.task.vae.decode(z / run.task.vae.config.scaling_factor).sample / 2 + 0.5
    method.reward_of = lambda r, images, prompts: images.mean((1, 2, 3))
    start = run.task.start
    run.task.start = lambda b: start(b).double()
    params = list(run.trainable().values())
    grads = torch.autograd.grad(method.loss(run, batch), params)
    rng = torch.Generator().manual_seed(2)
    direction = [torch.randn(p.shape, generator=rng, dtype=torch.float64) for p in params]
    predicted = sum(float((g * d).sum()) for g, d in zip(grads, direction, strict=True))
    values = []
    with torch.no_grad():
        for sign in (1e-5, -2e-5):
            for p, d in zip(params, direction, strict=True):
                p.add_(d, alpha=sign)
            values.append(float(method.loss(run, batch)))
    assert predicted == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)
    assert abs(predicted) > 1e-6
    assert network and decode


def _double(run: Run, model: Any, x: torch.Tensor, level: torch.Tensor, condition: Any) -> torch.Tensor:
    """The network without the rounding to float32."""
    given = {k: t.double() for k, t in condition.items()}
    if run.task.domain == "diffusion":
        return model(x, level, encoder_hidden_states=given["context"]).sample
    return model(hidden_states=x, timestep=1000 * level, encoder_hidden_states=given["context"], pooled_projections=given["pooled"]).sample


def test_k_cuts_the_chain_and_never_the_sample() -> None:
    """K-gradient = gradient of the last K steps from the latents that the first ones gave; K = T and K > T are DRaFT."""
    found = {k: gradient(made(f"method.draft.K={k}")) for k in (1, 2, 4, 9)}
    whole = gradient(made("method.draft.variant=draft"))
    assert len({round(loss, 6) for loss, _ in (*found.values(), whole)}) == 1
    for name, grad in whole[1].items():
        assert torch.equal(grad, found[4][1][name]) and torch.equal(grad, found[9][1][name])
    assert any(not torch.allclose(found[1][1][n], g, rtol=1e-2) for n, g in whole[1].items())

    run = made()
    task, (batch,) = run.task, run.window(0).micros
    chain, predict = task.chain(4), task.predictor(run.model, task.given(batch), 2.0)
    with torch.no_grad():
        states = [task.start(batch)]
        for i in range(3):
            states.append(chain.step(predict(states[i], chain.levels[i].expand(4), i), states[i], i)[0])
    for k in (1, 2):
        x = states[4 - k].clone()
        for i in range(4 - k, 4):
            x, _ = chain.step(predict(x, chain.levels[i].expand(4), i), x, i)
        loss = -task.decode(x).mean()
        by_hand = torch.autograd.grad(loss, list(run.trainable().values()))
        for (name, _), grad in zip(run.trainable().items(), by_hand, strict=True):
            torch.testing.assert_close(found[k][1][name], grad, rtol=1e-3, atol=1e-7)
    with pytest.raises(UserError, match=r"method.draft.K must be at least 1"):
        compose(["method=draft", "method.draft.K=0"])


@pytest.mark.parametrize(
    ("variant", "more", "graded", "free"), [("draft_k", ("method.draft.K=2",), 2, 2), ("draft_lv", ("method.draft.n_lv=3",), 4, 3)]
)
def test_calls_of_the_network(variant: str, more: tuple[str, ...], graded: int, free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made(f"method.draft.variant={variant}", *more)
    calls: list[bool] = []
    original = Guided.__call__

    def counted(self: Guided, x: torch.Tensor, level: torch.Tensor, i: int) -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        return original(self, x, level, i)

    monkeypatch.setattr(Guided, "__call__", counted)
    gradient(run)
    assert (calls.count(True), calls.count(False)) == (graded, free)


def saved_bytes(run: Run, steps: int) -> int:
    """Bytes of what autograd keeps for a loss with so many sampling steps."""
    run.stack.methods[1].num_steps = steps
    seen: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        seen[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run.stack.methods[1].loss(run, run.window(0).micros[0])
    return sum(seen.values())


def test_memory_of_one_step_does_not_grow_with_the_chain_and_checkpoints_save_the_rest() -> None:
    run = made("method.draft.K=1")
    assert saved_bytes(run, 8) == saved_bytes(run, 2)
    run = made("method.draft.variant=draft")
    plain = saved_bytes(run, 8)
    assert plain > 2.5 * saved_bytes(run, 2)  # the weights are in both
    run.stack.methods[1].checkpointing = True
    assert saved_bytes(run, 8) < 0.4 * plain
    on, off = gradient(made("method.draft.K=3", "method.draft.checkpointing=true")), gradient(made("method.draft.K=3"))
    assert on[0] == off[0]
    for name, grad in on[1].items():
        torch.testing.assert_close(grad, off[1][name], rtol=1e-5, atol=1e-8)


def test_renoised_gradients_are_averaged_down_and_see_the_last_step_alone() -> None:
    run = made("method.draft.variant=draft_lv", "trainer.batch=2")
    method: Any = run.stack.methods[1]
    batch = run.window(0).micros[0]
    with torch.no_grad():
        x0 = run.task.sample(run.model, batch, steps=4, guidance=2.0)
    params = list(run.trainable().values())

    def one(i: int) -> torch.Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(method.again(run, batch, x0, i), params)])

    grads = torch.stack([one(i) for i in range(256)])
    single = grads.var(0).sum()
    eights = grads.view(32, 8, -1).mean(1).var(0).sum()  # of 32 values: known to a quarter
    assert float(single / eights) == pytest.approx(8, rel=0.6)
    # exactly the last step's denoising: x0hat of x1 = a x0 + s e at the last level
    chain = run.task.chain(4)
    x1 = chain.noised(x0, torch.zeros_like(x0), 3)
    assert torch.allclose(x1, chain.alphas[3] ** 0.5 * x0)
    assert chain.final == 1.0 and torch.allclose(chain.clean(torch.zeros_like(x0), x1, 3)[0], x0, atol=1e-5)


def test_strength_goes_from_the_base_to_the_merged_model() -> None:
    run = made()
    batch = run.window(0).micros[0]
    deltas = [m for m in run.model.modules() if isinstance(m, Delta)]
    run.model.eval()

    def sampled() -> torch.Tensor:
        with torch.no_grad():
            return run.task.sample(run.model, batch, steps=3, guidance=2.0)

    tuned = sampled()
    for delta in deltas:
        delta.strength = 0.0
    base = run.task.sample(run.pristine().eval(), batch, steps=3, guidance=2.0).detach()
    assert torch.equal(sampled(), base) and not torch.allclose(tuned, base, atol=1e-3)
    for delta in deltas:
        delta.strength = 1.0
    run.merge()
    torch.testing.assert_close(sampled(), tuned, rtol=1e-4, atol=1e-4)


def test_black_boxes_and_blocked_gradients_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"draft.reward=asked: has no gradient, which draft needs; there are brightness, redness, smoothness"
    ):
        made("method.draft.reward=asked")
    assert samplers.run.__doc__ and "counted from the clean end" in samplers.run.__doc__


@pytest.mark.parametrize("variant", ["draft_k", "draft_lv"])
def test_reward_rises_where_denoising_ones_own_samples_leaves_it(variant: str) -> None:
    def rewards(*words: str) -> tuple[float, float]:
        run = build(*SMALL_SD, *FEW, "trainer.eval_examples=4", "schedule=constant", "method.lora.rank=4", *words)
        before = run.evaluate("test")["reward/brightness"]
        run.fit(12)
        return before, run.evaluate("test")["reward/brightness"]

    before, after = rewards("method=[lora,draft]", f"method.draft.variant={variant}")
    assert after > before + 0.03
    plain = build("method=lora", *SMALL_SD, "optimizer.lr=1e-2", "trainer.eval_examples=4", "schedule=constant")
    start = plain.evaluate("test")["reward/brightness"]
    plain.fit(12)
    assert abs(plain.evaluate("test")["reward/brightness"] - start) < 0.3 * (after - before)


def test_resumed_run_is_bit_equal(tmp_path: Path) -> None:
    words = ("method=draft", *SMALL_SD, *FEW, "trainer.max_steps=6", "hardware.micro_batch=3")
    run = check_resume(*words, folder=tmp_path, at=5)
    assert run.events["rollouts"] == 24 and run.task.target == "reward/brightness"


def test_record_and_frozen_parts(tmp_path: Path) -> None:
    run = train("method=draft", *SMALL_SD, *FEW, "trainer.max_steps=3", folder=tmp_path)
    start = run.pristine().state_dict()
    assert all(torch.equal(start[n], p) for n, p in weights(run).items() if n in start)
    assert all(torch.equal(a, b) for a, b in zip(run.task.vae.parameters(), build(*SMALL_SD).task.vae.parameters(), strict=True))
