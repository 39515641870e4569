"""WiSE-FT: the straight line from the start to the tuned weights, for whole weights, adapters and chosen entries alike."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tools import SMALL, build, check_resume, train, weights
from torch import Tensor, nn

from ftrecipes.compose import compose
from ftrecipes.data.base import Splits
from ftrecipes.methods.weights.interpolation import between
from ftrecipes.registry import data as register_data
from ftrecipes.run import Run

MUTATION = (
    "ftrecipes/methods/weights/interpolation.py",
    'delta.strength = factor(f"{delta.layer.name}.weight")',
    'delta.strength = factor(f"{delta.layer.name}.weight") ** 2',
)

STEPS = ("trainer.max_steps=6", "optimizer.lr=3e-3", "schedule=constant", "schedule.warmup=0", "trainer.batch=8")


def trained(*words: str, prepare: Callable[[Run], None] | None = None) -> Run:
    """A run through its drive and its end, without evaluations before and after."""
    run = build(*words)
    if prepare:
        prepare(run)
    run.stack.drive(run, run.fit)
    run.model.eval()
    run.stack.finish(run)
    return run


def pristine(run: Run) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in run.pristine().named_parameters()}


# -- the formula -------------------------------------------------------------------------------------------------------


def test_ends_are_bit_equal_and_points_between_follow_the_formula() -> None:
    full = trained("method=full", *SMALL, *STEPS)
    start, end = pristine(full), weights(full)
    assert all(not torch.equal(start[name], end[name]) for name in end)
    for alpha in (0.0, 0.3, 0.5, 1.0):
        run = trained("method=wise_ft", f"method.wise_ft.alpha=[{alpha}]", *SMALL, *STEPS)
        assert run.results["wise_ft_alpha"] == alpha
        for name, now in weights(run).items():
            # the authors' `_merge`, key by key
            wanted = (1 - alpha) * start[name] + alpha * end[name]
            moved = start[name] != end[name]
            assert moved.float().mean() > 0.9
            assert torch.equal(now[moved], {0.0: start[name], 1.0: end[name]}.get(alpha, wanted)[moved]), name
            assert torch.equal(now[~moved], start[name][~moved])  # no rounding where nothing moved


def test_bfloat16_weights_are_mixed_in_float32() -> None:
    words = (*SMALL, *STEPS, "hardware.precision=bf16")
    full, run = trained("method=full", *words), trained("method=wise_ft", "method.wise_ft.alpha=[0.3]", *words)
    start, end = pristine(full), weights(full)
    rounded = 0
    for name, now in weights(run).items():
        assert now.dtype == start[name].dtype == torch.bfloat16
        moved = start[name] != end[name]
        assert torch.equal(now[moved], (0.7 * start[name].float() + 0.3 * end[name].float()).bfloat16()[moved])
        rounded += int((now != 0.7 * start[name] + 0.3 * end[name])[moved].sum())
    assert rounded  # mixing in bfloat16 would give other weights


def test_float64_weights_are_mixed_in_float64() -> None:
    words = ("model=toy", "model.dtype=float64", *STEPS)
    full, run = trained("method=full", *words), trained("method=wise_ft", "method.wise_ft.alpha=[0.3]", *words)
    wanted = 0.7 * pristine(full)["layer.weight"] + 0.3 * full.model.layer.weight
    assert torch.allclose(run.model.layer.weight, wanted, atol=1e-15, rtol=0)


def test_integers_are_the_tuned_ones() -> None:
    start, end = torch.tensor([1, 5]), torch.tensor([4, 8])
    assert torch.equal(between(start, end, 0.2), end)
    assert torch.equal(between(start, end, 0.0), start)


def test_default_is_the_middle() -> None:
    settings = compose(["method=wise_ft"])
    assert settings.method.wise_ft.alpha == [0.5]
    assert settings.schedule.name == "cosine"


# -- a line of weights is not a line of outputs ------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [True, False])
def test_logits_are_linear_with_a_frozen_encoder_alone(frozen: bool) -> None:
    toy = ("model=toy", "model.kind=two_layer", "data.noise=0.3", *STEPS, "trainer.max_steps=60", "optimizer.lr=3e-2")
    stack = "linear_probe,wise_ft" if frozen else "wise_ft"
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    y: dict[float, Tensor] = {}
    for alpha in (0.0, 0.4, 1.0):
        run = trained(f"method=[{stack}]", f"method.wise_ft.alpha=[{alpha}]", *toy)
        y[alpha] = run.model(x).detach()
        assert torch.equal(run.model.first.weight, run.pristine().first.weight) == (frozen or alpha == 0.0)
    off = (y[0.4] - (0.6 * y[0.0] + 0.4 * y[1.0])).abs().max()
    change = (y[1.0] - y[0.0]).abs().max()
    assert change > 0.5
    assert off < 1e-5 if frozen else off > 0.02 * change


# -- every kind of tuning ----------------------------------------------------------------------------------------------

TUNINGS = {
    "lora": (),
    "dora": (),
    "svft": ("optimizer.lr=3e-2",),
    "periodic_lora": ("method.periodic_lora.stage_steps=3",),
    "lift": ("method.lift.rank_budget=4", "method.lift.filter_rank=8", "method.lift.update_interval=3"),
    "linear_probe": (),
    "gmt": (),
    "lisa": ("method.lisa.gamma=1", "method.lisa.interval=2"),
    "mezo": (),
}


def merged(run: Run) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in run.merge().state_dict().items()}


@pytest.mark.parametrize("last", [True, False], ids=["listed last", "listed first"])
@pytest.mark.parametrize("key", TUNINGS)
def test_line_of_any_tuning_is_that_of_its_merged_checkpoints(key: str, last: bool, tmp_path: Path) -> None:
    words = (*SMALL, *STEPS, "optimizer.weight_decay=0.0", *TUNINGS[key])
    alone = trained(f"method={key}", *words, "trainer.clip=.inf")
    start, end = {n: t.clone() for n, t in alone.pristine().state_dict().items()}, merged(alone)
    stack = f"[{key},wise_ft]" if last else f"[wise_ft,{key}]"
    run = train(f"method={stack}", "method.wise_ft.alpha=[0.3]", *words, "trainer.clip=.inf", folder=tmp_path)
    again = Run.open(tmp_path)
    found, reopened = merged(run), merged(again)
    assert found.keys() == end.keys()
    moved = 0.0
    for name, now in found.items():
        wanted = 0.7 * start[name] + 0.3 * end[name]
        assert torch.allclose(now, wanted, atol=1e-6, rtol=1e-5), name
        assert torch.equal(now, reopened[name]), name
        moved = max(moved, float((end[name] - start[name]).abs().max()))
    assert moved > 1e-3


def test_values_of_the_last_update_are_on_the_line_whoever_ends_first() -> None:
    """Chosen entries stand in a vector of their own until their weight is used again."""
    both = [trained(f"method={stack}", *SMALL, *STEPS, *TUNINGS["lift"]) for stack in ("[lift,wise_ft]", "[wise_ft,lift]")]
    first, second = (weights(run) for run in both)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_half_of_an_adapter_is_half_of_its_product() -> None:
    """Halving both factors would leave a quarter."""
    words = (*SMALL, *STEPS)
    alone, half = trained("method=lora", *words), trained("method=[lora,wise_ft]", *words)
    ids = half.window(0).micros[0]["ids"]
    name = "model.layers.0.self_attn.q_proj"
    layer, halved = alone.model.get_submodule(name), half.model.get_submodule(name)
    assert torch.equal(layer.delta.A, halved.delta.A) and torch.equal(layer.delta.B, halved.delta.B)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    base = nn.functional.linear(x, layer.weight)
    assert torch.allclose(halved(x) - base, 0.5 * (layer(x) - base), atol=1e-6)
    assert (layer(x) - base).abs().max() > 1e-3
    before = half.model(ids).logits
    assert torch.allclose(half.merge()(ids).logits, before, atol=1e-5)


def test_agreement_with_a_linear_merge_of_two_saved_checkpoints(tmp_path: Path) -> None:
    """mergekit's `linear` of two models with weights 1 - alpha and alpha: the weighted sum over the sum of weights."""
    alpha = 0.4
    full = trained("method=full", *SMALL, *STEPS)
    full.pristine().save_pretrained(tmp_path / "start")
    full.model.save_pretrained(tmp_path / "end")
    start, end = (load_file(tmp_path / name / "model.safetensors") for name in ("start", "end"))
    run = train("method=wise_ft", f"method.wise_ft.alpha=[{alpha}]", *SMALL, *STEPS, folder=tmp_path / "run")
    run.model.save_pretrained(tmp_path / "mixed")
    mixed, parts = load_file(tmp_path / "mixed" / "model.safetensors"), torch.tensor([1 - alpha, alpha])
    assert mixed.keys() == start.keys() == end.keys()
    for name, now in mixed.items():
        wanted = (parts.view(-1, *[1] * now.dim()) * torch.stack([start[name], end[name]])).sum(0) / parts.sum()
        assert torch.allclose(now, wanted, atol=1e-6), name


# -- batch normalization -----------------------------------------------------------------------------------------------


def normalized(run: Run) -> None:
    """Put a BatchNorm between the two layers of a toy; its running statistics belong to the model."""
    run.model.dropout = nn.BatchNorm1d(32)
    run.base_names = set(run.model.state_dict(keep_vars=True))
    first = copy.deepcopy(run.model)
    run.loaded.pristine = lambda: copy.deepcopy(first)
    run.model.requires_grad_(True)
    run._trainable = dict(run.model.named_parameters())
    run.model.train()


@pytest.mark.parametrize("recalibrate", [0, 8])
def test_running_statistics(recalibrate: int) -> None:
    toy = ("model=toy", "model.kind=two_layer", *STEPS, "trainer.batch=64", f"method.wise_ft.recalibrate={recalibrate}")
    tuned = trained("method=full", *toy[:-1], prepare=normalized)
    run = trained("method=wise_ft", "method.wise_ft.alpha=[0.25]", *toy, prepare=normalized)
    norm, end = run.model.dropout, tuned.model.dropout
    assert not norm.training and norm.momentum == 0.1
    mixed = 0.75 * torch.zeros(32) + 0.25 * end.running_mean
    if not recalibrate:
        assert torch.allclose(norm.running_mean, mixed, atol=1e-7)
        assert torch.allclose(norm.running_var, 0.75 + 0.25 * end.running_var, atol=1e-6)
        assert norm.num_batches_tracked == 6
        return
    x = torch.stack([row["x"] for row in (run.data["train"][i] for i in range(512))]).float()  # all 8 x 64 rows
    hidden = nn.functional.gelu(run.model.first(x))
    assert torch.allclose(norm.running_mean, hidden.mean(0), atol=1e-4)
    assert torch.allclose(norm.running_var, hidden.var(0), atol=0.02)
    assert not torch.allclose(norm.running_mean, mixed, atol=1e-2)


# -- which point is kept -----------------------------------------------------------------------------------------------


def test_the_best_on_validation_is_kept_never_the_best_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    target = {1.0: 0.6, 0.75: 0.5, 0.5: 0.4, 0.25: 0.6, 0.0: 0.1}

    def evaluate(run: Run, split: str) -> dict[str, float]:
        alpha = run.alpha  # type: ignore[attr-defined]
        return {run.task.target: target[alpha] if split == "validation" else 1.0 - alpha}

    run = build("method=wise_ft", "method.wise_ft.alpha=[1,0.75,0.5,0.25,0]", *SMALL, *STEPS, "trainer.eval_every=100")
    method = run.stack.methods[0]
    move = method.move

    def watch(run: Run, line: Any, alpha: float) -> None:
        run.alpha = alpha  # type: ignore[attr-defined]
        move(run, line, alpha)

    monkeypatch.setattr(method, "move", watch)
    monkeypatch.setattr(Run, "evaluate", evaluate)
    run.fit(3)
    start, end = pristine(run), weights(run)
    method.finish(run)
    assert run.results["wise_ft_alpha"] == 0.25  # of equals the one that is nearer to the middle
    assert [point["alpha"] for point in run.results["wise_ft"]] == [1, 0.75, 0.5, 0.25, 0]
    assert run.events["points"] == 5
    name = "model.norm.weight"
    assert torch.equal(run.model.get_parameter(name), 0.75 * start[name] + 0.25 * end[name])


def cue_data(seed: int) -> Splits:
    """Labels +-1, ten weak features, and a strong cue that is right 9 times of 10 in the target domain, 2 of 10 elsewhere."""
    rng = torch.Generator().manual_seed(seed)

    def rows(n: int, agree: float) -> list[dict[str, Tensor]]:
        y = torch.where(torch.rand(n, 1, generator=rng) < 0.5, 1.0, -1.0)
        features = 0.35 * y + torch.randn(n, 10, generator=rng)
        cue = torch.where(torch.rand(n, 1, generator=rng) < agree, y, -y) + 0.5 * torch.randn(n, 1, generator=rng)
        return [{"x": a, "y": b} for a, b in zip(torch.cat([features, cue], 1), y, strict=True)]

    return Splits(
        train=rows(200, 0.9), validation=rows(5000, 0.9), test=[{"x": torch.zeros(11), "y": torch.ones(1)}], retain=rows(5000, 0.2)
    )


def begin_with_six_features(run: Run) -> None:
    with torch.no_grad():
        run.model.layer.weight.zero_()[0, :6] = 0.7
    first = copy.deepcopy(run.model)
    run.loaded.pristine = lambda: copy.deepcopy(first)


@pytest.mark.parametrize("seed", range(6))
def test_robustness_comes_back_and_the_target_keeps_its_accuracy(seed: int) -> None:
    register_data(f"cue{seed}")(lambda knobs, domain: cue_data(seed))
    shape = ("model=toy", "model.loss=logistic", "model.inputs=11", "model.outputs=1", f"data=cue{seed}", "trainer.eval_examples=5000")
    gd = ("optimizer=sgd", "optimizer.lr=0.5", "schedule=constant", "schedule.warmup=0", "trainer.clip=.inf", "trainer.batch=200")
    run = build("method=wise_ft", "method.wise_ft.alpha=[0,0.6,1]", *shape, *gd, "optimizer.weight_decay=0.0")
    begin_with_six_features(run)
    run.fit_steps, run.optimizer = 500, run.build_optimizer()
    window = run.window(0)  # all rows
    for _ in range(500):
        run.update(window)
    run.stack.finish(run)
    curve = {point["alpha"]: point for point in run.results["wise_ft"]}
    target = {alpha: point["validation/accuracy"] for alpha, point in curve.items()}
    shift = {alpha: point["retain/accuracy"] for alpha, point in curve.items()}
    assert target[1] > target[0] + 0.05 and shift[1] < shift[0] - 0.05  # tuning helped here and hurt there
    assert target[0.6] > target[1] - 0.015
    assert shift[0.6] > shift[1] + 0.025
    assert target[0.6] > 0.4 * target[0] + 0.6 * target[1]


# -- the run -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stack", ["wise_ft", "[lora,wise_ft]", "[wise_ft,lift]"])
def test_resumed_run_is_bit_equal(stack: str, tmp_path: Path) -> None:
    lift = TUNINGS["lift"] if "lift" in stack else ()
    words = (f"method={stack}", "method.wise_ft.alpha=[0.2,0.6]", *SMALL, *lift, "trainer.max_steps=10", "optimizer.lr=1e-3")
    run = check_resume(*words, folder=tmp_path, at=8)
    assert run.events["points"] == 2
    curve = run.record.info["results"]["wise_ft"]
    assert {"alpha", "validation/nll", "retain/nll"} <= curve[0].keys()
