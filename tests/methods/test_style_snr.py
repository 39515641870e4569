"""Style-Friendly SNR sampler: the law of noise levels in training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from generators import SMALL_DIT, SMALL_SD
from tools import build, check_resume

from ftrecipes.compose import compose
from ftrecipes.run import Run

MUTATION = ("ftrecipes/tasks/denoising.py", "torch.sigmoid(-log_snr.double() / 2)", "torch.sigmoid(-log_snr.double())")


def drawn(run: Run, count: int = 40_000) -> torch.Tensor:
    """Levels that the stack gives to a batch of so many examples."""
    batch: Any = {"draw": torch.arange(count), "moments": torch.zeros(1), "example": torch.arange(count)}
    return run.stack.batch(run, batch)["level"].double()


def made(*words: str, small: tuple[str, ...] = SMALL_DIT) -> Run:
    return build("method=style_snr", *small, *words, data=False)


def ks(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest distance of two empirical distributions, in units of its 1 % bound."""
    both = torch.cat([a, b]).sort().values
    gap = (torch.searchsorted(a.sort().values, both) / len(a) - torch.searchsorted(b.sort().values, both) / len(b)).abs().max()
    return float(gap) / (1.63 * math.sqrt(1 / len(a) + 1 / len(b)))


def test_log_snr_is_the_normal_of_the_paper() -> None:
    t = drawn(made())
    log_snr = 2 * ((1 - t) / t).log()
    assert float(log_snr.mean()) == pytest.approx(-6, abs=0.04) and float(log_snr.std()) == pytest.approx(2, abs=0.04)
    quantiles = torch.quantile(t, torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)).tolist()
    assert quantiles == pytest.approx([0.7950, 0.9526, 0.9905], abs=0.004)
    assert float((t > 0.9).double().mean()) == pytest.approx(0.79, abs=0.01)


def test_special_cases() -> None:
    """mu = 0, sigma = 2 is the logit-normal (0, 1) of SD3; mu = -6 that of location 3; sigma = 0 is one level."""
    normal = torch.randn(40_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert ks(drawn(made("method.style_snr.mu=0")), normal.sigmoid()) < 1
    assert ks(drawn(made()), (normal + 3).sigmoid()) < 1
    assert ks(drawn(made()), (normal - 3).sigmoid()) > 10
    constant = drawn(made("method.style_snr.mu=-3", "method.style_snr.sigma=0"), 8)
    assert torch.allclose(constant, torch.full_like(constant, 1 / (1 + math.exp(-1.5))))
    task = made().task
    ladder = task.level_at(torch.linspace(-12, 4, 50))
    assert bool((ladder.diff() < 0).all())


def test_diffusion_takes_the_nearest_step_and_says_where_the_schedule_ends(small: Any = SMALL_SD) -> None:
    run = made("method.style_snr.mu=-4", small=small)
    table = run.task.log_snr()
    wanted = torch.linspace(float(table.min()), float(table.max()), 300)
    steps = run.task.level_at(wanted)
    assert bool((steps.diff() <= 0).all()) and (table[steps] - wanted).abs().max() < 0.6
    assert not run.remarks
    deep = made(small=small)
    assert "pile up" in deep.remarks[0]
    assert float((drawn(deep, 2000) == 999).double().mean()) > 0.4


@pytest.mark.parametrize("small", [SMALL_SD, SMALL_DIT], ids=["diffusion", "flow"])
def test_the_level_that_mixes_is_the_one_the_network_is_told(small: tuple[str, ...]) -> None:
    run = build("method=style_snr", *small, "data.size=200", "trainer.batch=64")
    window = run.window(0)
    window.micros = [run.stack.batch(run, b) for b in window]
    correlations = []
    told: list[torch.Tensor] = []
    network = run.task.network

    def watched(model: Any, x: torch.Tensor, level: torch.Tensor, condition: Any) -> torch.Tensor:
        told.append(level)
        return network(model, x, level, condition)

    run.task.network = watched
    with torch.no_grad():
        for batch in window:
            outputs = run.task.outputs(run.model, batch)
            assert torch.equal(told[-1], batch["level"]) and torch.equal(outputs.level, batch["level"])
            torch.testing.assert_close(outputs.noisy, run.task.mix(outputs.x0, outputs.noise, batch["level"]))
            plain = (outputs.prediction - outputs.target).square().mean((1, 2, 3))  # no weight at any level
            torch.testing.assert_close(run.task.losses(outputs, batch), plain)
            for noisy, noise in zip(outputs.noisy, outputs.noise, strict=True):
                correlations.append(float(torch.corrcoef(torch.stack([noisy.flatten(), noise.flatten()]))[0, 1]))
    assert torch.tensor(correlations).median() > 0.985
    assert run.events["levels"] == 64


def test_only_the_levels_change() -> None:
    """Noise, order of the data and what trains are those of a plain LoRA; one term per image."""
    style, plain = (
        build("method=style_snr", *SMALL_DIT),
        build("method=lora", *SMALL_DIT, "method.lora.targets=[attention]", "method.lora.rank=8"),
    )
    assert set(style.trainable()) == set(plain.trainable())
    for step in (0, 5):
        (a,), (b,) = style.window(step).micros, plain.window(step).micros
        a = style.stack.batch(style, a)
        assert torch.equal(a["example"], b["example"])
        (x, noise, level), (y, same, other) = style.task.drawn(a), plain.task.drawn(b)
        assert torch.equal(x, y) and torch.equal(noise, same) and not torch.equal(level, other)
    mu = build("method=style_snr", *SMALL_DIT, "method.style_snr.mu=-2")
    (c,) = mu.window(5).micros
    shifted = mu.stack.batch(mu, c)["level"].double()
    back = 2 * ((1 - shifted) / shifted).log() - 4
    assert torch.allclose(back, 2 * ((1 - a["level"].double()) / a["level"].double()).log(), atol=2e-2)


def test_where_it_looks_is_where_it_learns() -> None:
    """At equal steps on a new style: the loss at high noise falls further with mu = -6, the loss at low noise with mu = 0."""

    def after(mu: float, seed: int) -> tuple[float, float]:
        run = build(
            "method=style_snr", f"method.style_snr.mu={mu}", *SMALL_DIT, "data.size=8", "data.shapes=star", "trainer.batch=8",
            "optimizer.lr=1e-2", "schedule=constant", f"seed={seed}",
        )  # fmt: skip
        run.fit(40)
        run.model.eval()
        batch = run.data["train"].batch(range(8))
        found = []
        for levels in ((0.92, 0.95, 0.98), (0.1, 0.25, 0.4)):
            with torch.no_grad():
                losses = [
                    run.task.losses(run.task.outputs(run.model, {**batch, "level": torch.full((8,), t)}), batch).mean() for t in levels
                ]
            found.append(float(torch.stack(losses).mean()))
        return found[0], found[1]

    for seed in (0, 1):
        (high, low), (high_plain, low_plain) = after(-6, seed), after(0, seed)
        assert high < high_plain and low > low_plain


def test_settings_and_resume(tmp_path: Path) -> None:
    settings = compose(["method=style_snr"])
    assert settings.model.name == "tiny-dit" and list(settings.method) == ["lora", "style_snr"]
    assert compose(["method=style_snr", "model=flux"]).method.lora.rank == 32
    assert list(compose(["method=[dora,style_snr]"]).method) == ["dora", "style_snr"]
    assert list(compose(["method=[style_snr,dco]"]).method) == ["lora", "style_snr", "dco"]
    words = ("method=style_snr", *SMALL_DIT, "trainer.max_steps=6", "hardware.micro_batch=3", "optimizer.lr=1e-2")
    run = check_resume(*words, folder=tmp_path, at=5)
    assert run.events["levels"] == 24
