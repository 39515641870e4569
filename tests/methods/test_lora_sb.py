"""LoRA-SB: the core of LoRA-XS between the singular vectors of the estimated first update."""

from __future__ import annotations

import pytest
import torch
from peers import Matrix, adapter, host, language_loss
from safetensors.torch import load_file
from tools import SMALL, build, check_resume, toy_data

from ftrecipes.errors import UserError
from ftrecipes.run import Run

MUTATION = ("ftrecipes/methods/adapters/lora_sb.py", "-torch.sign(layer.matrix(G).to(layer.device))", "-layer.matrix(G).to(layer.device)")
KNOBS = ("method.lora_sb.rank=6", "method.lora_sb.iters=3", "method.lora_sb.bsz=4")


def small(*words: str) -> Run:
    return build("method=lora_sb", *SMALL, *KNOBS, "optimizer.lr=2e-3", "schedule=constant", "schedule.warmup=3", *words)


def signs(run: Run) -> dict[str, torch.Tensor]:
    """sign(G) of every target, by autograd on a model of its own."""
    model = run.pristine()
    batches = list(run.calibration(12, batch=4))
    sum(language_loss(model, batch) for batch in batches).backward()
    return {name: torch.sign(model.get_parameter(f"{name}.weight").grad) for name in adapter(run).deltas}


def agree(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal but for a sign that rounding turned here or there, where a gradient is all but zero."""
    return float((a - b).norm() / b.norm()) < 0.02


def test_only_the_square_matrix_trains_between_orthonormal_factors():
    run = small()
    assert {name.rpartition(".")[2] for name in run.trainable()} == {"R"}
    assert sum(p.numel() for p in run.trainable().values()) == 36 * 14
    eye = torch.eye(6)
    for delta in adapter(run).deltas.values():
        torch.testing.assert_close(delta.B.T @ delta.B, eye, atol=1e-5, rtol=0)
        torch.testing.assert_close(delta.A @ delta.A.T, eye, atol=1e-5, rtol=0)
        assert delta.scale == 1.0


def test_the_start_is_the_best_approximation_of_the_first_update():
    """eta is a quarter of 2e-3, the rate of the first of three warm-up updates; nothing is taken off the base."""
    run = small()
    for name, T in signs(run).items():
        delta = adapter(run).deltas[name]
        start = delta.delta().detach()
        S = torch.linalg.svdvals(T)
        torch.testing.assert_close(delta.R.detach(), torch.diag(5e-4 * S[:6]), rtol=0.01, atol=1e-6)
        assert agree((start + 5e-4 * T).norm(), 5e-4 * S[6:].square().sum().sqrt()), name
        assert (start + 5e-4 * T).norm() < (5e-4 * T).norm() < (start - 5e-4 * T).norm()
    batch = run.window(0).micros[0]
    with torch.no_grad():
        off = (run.model(batch["ids"]).logits - run.pristine()(batch["ids"]).logits).abs().max()
        assert off > 1e-3  # the estimated update is kept on purpose
        assert language_loss(run.model, batch) < language_loss(run.pristine(), batch)


def test_the_start_scales_with_the_first_learning_rate_alone():
    base, warm, steep = small(), small("schedule.warmup=7"), small("optimizer.lr=6e-3")
    other = small("method.lora_sb.iters=5")
    for name, delta in adapter(base).deltas.items():
        torch.testing.assert_close(adapter(warm).deltas[name].R, delta.R / 2)
        torch.testing.assert_close(adapter(steep).deltas[name].R, delta.R * 3)
        assert torch.equal(adapter(warm).deltas[name].B, delta.B)
        there = adapter(other).deltas[name]
        assert not torch.allclose(there.B, delta.B, atol=1e-3) and 0.5 < float((there.R.norm() / delta.R.norm()).detach()) < 2


def test_the_gradient_step_is_the_best_image_of_the_full_gradient():
    """B (dL/dR) A = B B^T G A^T A, and what it leaves of G is orthogonal to every B X A."""
    shape = ("model.inputs=24", "model.outputs=16", "data.inputs=24", "data.outputs=16", "trainer.batch=24")
    run = build(
        "method=lora_sb", "model=toy", "model.dtype=float64", "data.unit=true", *shape, "method.lora_sb.targets=[linear]",
        "method.lora_sb.rank=5", "method.lora_sb.iters=2", "method.lora_sb.bsz=8",
    )  # fmt: skip
    (delta,) = adapter(run).deltas.values()
    with torch.no_grad():
        delta.R.normal_()
        now = delta.final(run.model.layer.weight)
    target = torch.stack([run.data["train"][i]["y"] for i in range(24)]).T
    G = (now - target) / 24
    run.gradients(run.window(0))
    image = delta.B @ delta.R.grad @ delta.A
    torch.testing.assert_close(image, delta.B @ delta.B.T @ G @ delta.A.T @ delta.A, atol=1e-12, rtol=0)
    assert (delta.B.T @ (G - image) @ delta.A.T).abs().max() < 1e-12
    assert image.norm() > 0.05 * G.norm()


def test_the_estimated_update_holds_what_the_weight_s_own_vectors_miss():
    """W gaussian, target W + a change of rank 4, rank 4: the squared error that is left after training R to the end."""
    rng = torch.Generator().manual_seed(0)
    W = torch.randn(32, 32, generator=rng, dtype=torch.float64)
    D = torch.randn(32, 4, generator=rng, dtype=torch.float64) @ torch.randn(4, 32, generator=rng, dtype=torch.float64)
    rows = toy_data("rank4", torch.eye(32, dtype=torch.float64), (W + D).T)
    left = {}
    for key, knobs in {"lora_xs": (), "lora_sb": ("method.lora_sb.iters=1", "method.lora_sb.bsz=32")}.items():
        run = host(
            Matrix(W), f"method={key}", f"data={rows}", f"method.{key}.targets=[linear]", f"method.{key}.rank=4", *knobs, "trainer.batch=32",
            "trainer.clip=.inf", "optimizer.lr=0.2", "optimizer.weight_decay=0", "schedule=cosine", "schedule.warmup=0",
        )  # fmt: skip
        run.fit(300)
        left[key] = float((run.merge().layer.weight - W - D).square().sum() / D.square().sum())
    assert left["lora_xs"] > 0.9
    assert 0.15 < left["lora_sb"] < 0.4  # the vectors of G itself would leave nothing


def test_a_resumed_run_keeps_factors_that_the_weight_does_not_give(tmp_path):
    run = check_resume("method=lora_sb", *SMALL, *KNOBS, "trainer.max_steps=5", "optimizer.lr=1e-3", folder=tmp_path, at=4)
    assert run.events == {"calibration_batches": 3, "update_starts": 14}
    saved = load_file(tmp_path / "resumed" / "tuned" / "weights.safetensors")
    assert {name.rpartition(".")[2] for name in saved} == {"R", "A", "B"}
    base = dict(run.pristine().named_parameters())
    assert all(torch.equal(p, base[n]) for n, p in run.model.named_parameters() if n in base)


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("method.lora_sb.rank=65", r"lora_sb.rank=65: .*q_proj is 128 x 64, its rank is at most 64"),
        ("method.lora_sb.bsz=40", "120 calibration examples were asked for and the training set holds 64"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(word, text):
    with pytest.raises(UserError, match=text) as caught:
        small(word)
    assert "\n" not in str(caught.value)
