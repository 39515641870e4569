"""RLG: mixing the outputs of base and reward-tuned network while sampling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from generators import SMALL_DIT, SMALL_SD
from tools import build, train, weights
from torch import Tensor

from ftrecipes.compose import compose
from ftrecipes.methods.adapters.delta import Delta
from ftrecipes.methods.inference.rl_guidance import RLGuidance
from ftrecipes.run import Run
from ftrecipes.tasks import samplers
from ftrecipes.tasks.denoising import Guided

MUTATION = (
    "ftrecipes/methods/inference/rl_guidance.py",
    "(1 - self.w) * before + self.w * tuned",
    "before + (1 + self.w) * (tuned - before)",
)
KINDS = {"diffusion": SMALL_SD, "flow": SMALL_DIT}
FEW = ("method.draft.num_steps=3", "method.draft.guidance_scale=1.5", "optimizer.lr=1e-2")


@pytest.fixture(scope="module", params=["diffusion", "flow"])
def run(request: Any) -> Run:
    """A stack whose LoRA is off its start."""
    return moved(build("method=[lora,draft,rl_guidance]", *KINDS[request.param], *FEW))


def moved(run: Run, size: float = 0.4) -> Run:
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in run.trainable().items():
            if name.endswith(".B"):
                p.copy_(size * torch.randn(p.shape, generator=rng))
    run.model.eval()
    return run


def guidance_of(run: Run) -> RLGuidance:
    found = run.stack.methods[-1]
    assert isinstance(found, RLGuidance)
    return found


def sampled(run: Run, w: float, *, eta: float = 0.0, model: Any = None, steps: int = 4) -> Tensor:
    """Latents at a w; of another model where one is given, without any mixing."""
    batch, method = run.data["test"].batch([0, 1, 2]), guidance_of(run)
    kept, guide = method.w, run.task.guide
    method.w, run.task.guide = w, None if model is not None else guide
    try:
        with torch.no_grad():
            return run.task.sample(model or run.model, batch, steps=steps, guidance=2.0, eta=eta)
    finally:
        method.w, run.task.guide = kept, guide


@pytest.mark.parametrize("eta", [0.0, 0.8])
def test_the_ends_are_base_and_tune_bit_for_bit(run: Run, eta: float) -> None:
    base = sampled(run, 1.0, eta=eta, model=run.pristine().eval())
    tuned = sampled(run, 1.0, eta=eta, model=run.model)
    assert torch.equal(sampled(run, 0.0, eta=eta), base)
    assert torch.equal(sampled(run, 1.0, eta=eta), tuned)
    assert not torch.allclose(base, tuned, atol=1e-2)
    half, beyond = sampled(run, 0.5, eta=eta), sampled(run, 2.0, eta=eta)
    assert not torch.allclose(half, tuned, atol=1e-3) and (beyond - tuned).norm() > 0.1 * (tuned - base).norm()


def test_normal_flows_have_a_closed_form() -> None:
    """Base N(0, s^2), tune N(m, s^2): sampling at w is, step for step, sampling N(w m, s^2)."""
    rng = torch.Generator().manual_seed(0)
    times = torch.linspace(1, 0, 21).tolist()
    chain = samplers.Euler(torch.tensor(times[:-1], dtype=torch.float64), times)
    m = torch.randn(1, 5, generator=rng, dtype=torch.float64)
    noise = torch.randn(64, 5, generator=rng, dtype=torch.float64)

    def velocity(mean: Tensor) -> Any:
        def at(x: Tensor, level: Tensor, i: int) -> Tensor:
            t = times[i]
            variance = (1 - t) ** 2 * 0.25 + t**2
            return (t - (1 - t) * 0.25) / variance * (x - (1 - t) * mean) - mean

        return at

    method: Any = RLGuidance("rl_guidance", {"w": 1.0, "scales": [], "zero_init_step": 0})
    for w in (-0.5, 0.0, 0.5, 1.0, 2.0, 3.0):
        method.w = w
        mixed = lambda x, level, i, w=w: (1 - w) * velocity(0 * m)(x, level, i) + w * velocity(m)(x, level, i)  # noqa: E731
        a, b = samplers.run(chain, mixed, noise), samplers.run(chain, velocity(w * m), noise)
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_order_of_the_two_guidances(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four known outputs: text guidance inside each branch, w outside."""
    r0, r1, t0, t1 = 1.0, 3.0, -2.0, 5.0
    deltas = [m for m in run.model.modules() if isinstance(m, Delta)]

    def known(model: Any, x: Tensor, level: Tensor, condition: Any) -> Tensor:
        tuned = deltas[0].strength == 1.0
        assert len({d.strength for d in deltas}) == 1
        n = len(x) // 2
        return torch.cat([torch.full_like(x[:n], t0 if tuned else r0), torch.full_like(x[n:], t1 if tuned else r1)])

    monkeypatch.setattr(run.task, "network", known)
    batch, method = run.data["test"].batch([0, 1]), guidance_of(run)
    g, w = 4.0, 2.5
    monkeypatch.setattr(method, "w", w)
    predict = run.stack.sample(run, run.task.predictor(run.model, run.task.given(batch), g))
    u = predict(run.task.start(batch), torch.zeros(2), 0)
    wanted = (1 - w) * (r0 + g * (r1 - r0)) + w * (t0 + g * (t1 - t0))
    assert torch.allclose(u, torch.full_like(u, wanted))
    monkeypatch.setattr(method, "zero_init_step", 1)
    assert torch.allclose(predict(run.task.start(batch), torch.zeros(2), 0), torch.full_like(u, t0 + g * (t1 - t0)))
    assert torch.allclose(predict(run.task.start(batch), torch.zeros(2), 1), torch.full_like(u, wanted))


def test_parameterisations_give_the_same_trajectory() -> None:
    """The same two models as noise, as clean latents and as v: DDIM at any w ends at the same place."""
    rng = torch.Generator().manual_seed(0)
    alphas = torch.linspace(0.05, 0.98, 12, dtype=torch.float64).tolist()
    x = torch.randn(6, 4, generator=rng, dtype=torch.float64)
    means = [torch.randn(6, 4, generator=rng, dtype=torch.float64) for _ in range(2)]
    ends = []
    for kind in ("epsilon", "sample", "v_prediction"):
        chain = samplers.DDIM(torch.arange(12), alphas, 1.0, kind)

        def output(x: Tensor, i: int, mean: Tensor, kind: str = kind) -> Tensor:
            a, b = alphas[i] ** 0.5, (1 - alphas[i]) ** 0.5
            x0 = mean + 0.3 * (x - a * mean)
            e = (x - a * x0) / b
            return {"epsilon": e, "sample": x0, "v_prediction": a * e - b * x0}[kind]

        for w in (0.5, 2.0):
            mixed = lambda x, level, i, w=w, output=output: (1 - w) * output(x, i, means[0]) + w * output(x, i, means[1])  # noqa: E731
            ends.append(samplers.run(chain, mixed, x))
    for i in range(2):
        torch.testing.assert_close(ends[i], ends[i + 2], rtol=0, atol=1e-6)
        torch.testing.assert_close(ends[i], ends[i + 4], rtol=0, atol=1e-6)


def test_two_calls_a_step_and_the_adapter_comes_back(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = Guided.__call__
    monkeypatch.setattr(Guided, "__call__", lambda self, x, level, i: (calls.append(i), original(self, x, level, i))[1])
    before = weights(run)
    sampled(run, 2.0, steps=5)
    assert sorted(calls) == sorted([*range(5)] * 2)
    calls.clear()
    sampled(run, 1.0, steps=5)
    assert len(calls) == 5
    assert all(torch.equal(before[n], p) for n, p in weights(run).items())
    assert {m.strength for m in run.model.modules() if isinstance(m, Delta)} == {1.0}

    def broken(model: Any, x: Tensor, level: Tensor, condition: Any) -> Tensor:
        raise RuntimeError("half way")

    monkeypatch.setattr(Guided, "__call__", original)
    method = guidance_of(run)
    predict = run.stack.sample(run, run.task.predictor(run.model, run.task.given(run.data["test"].batch([0])), 2.0))
    assert method._reference
    with pytest.raises(RuntimeError, match="half way"), method._reference.looking():
        assert {m.strength for m in run.model.modules() if isinstance(m, Delta)} == {0.0}
        broken(None, torch.zeros(1), torch.zeros(1), {})
    assert predict and {m.strength for m in run.model.modules() if isinstance(m, Delta)} == {1.0}


def test_mixing_outputs_is_not_scaling_weights(run: Run) -> None:
    """At w = 2 it differs from the doubled delta, and by the square of the delta's size."""
    batch, method = run.data["test"].batch([0, 1]), guidance_of(run)
    x, level = run.task.start(batch), run.task.levels(0.5, 2)
    start = {n: p.detach().clone() for n, p in run.trainable().items()}
    gaps = []
    try:
        for size in (1.0, 0.1, 0.01):
            with torch.no_grad():
                for name, p in run.trainable().items():
                    p.copy_(start[name] * (size if name.endswith(".B") else 1.0))
                guided = run.task.predictor(run.model, run.task.given(batch), 1.0)
                method.w = 2.0
                mixed = run.stack.sample(run, guided)(x, level, 0)
                for m in run.model.modules():
                    if isinstance(m, Delta):
                        m.strength = 2.0
                doubled = guided(x, level, 0)
                for m in run.model.modules():
                    if isinstance(m, Delta):
                        m.strength = 1.0
            gaps.append(float((mixed - doubled).norm()))
    finally:
        with torch.no_grad():
            for name, p in run.trainable().items():
                p.copy_(start[name])
    assert gaps[0] > 1e-3
    assert gaps[0] / gaps[1] > 25 and gaps[1] / gaps[2] > 50


def test_stacks_and_record(tmp_path: Path) -> None:
    assert list(compose(["method=rl_guidance"]).method) == ["lora", "draft", "rl_guidance"]
    assert list(compose(["method=[dpok,rl_guidance]"]).method) == ["lora", "dpok", "rl_guidance"]
    assert list(compose(["method=[lora,rl_guidance]", "model=tiny-dit"]).method) == ["lora", "rl_guidance"]
    done = train(
        "method=[lora,draft,rl_guidance]", *SMALL_SD, *FEW, "trainer.max_steps=6", "method.rl_guidance.scales=[0,1,3]", folder=tmp_path
    )
    curve = done.results["rl_guidance"]
    assert [point["w"] for point in curve] == [0.0, 1.0, 3.0]
    rewards = [point["reward/brightness"] for point in curve]
    assert rewards[0] < rewards[1] < rewards[2]
    assert done.events["mixed_steps"] > 0
    reopened = Run.open(tmp_path, data=True)
    assert reopened.evaluate("test") == pytest.approx(done.evaluate("test"), rel=1e-5)
    full = build("method=[full,draft,rl_guidance]", *SMALL_SD, *FEW)
    full.model.eval()
    sampled(full, 2.0)
    method = guidance_of(full)
    assert method._reference and method._reference.model is not None  # a full tune needs a frozen copy
