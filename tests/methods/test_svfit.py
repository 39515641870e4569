"""SVFit: the leading singular values of a weight train and nothing else changes."""

from __future__ import annotations

import math

import pytest
import torch
from peers import Matrix, adapter, host
from safetensors.torch import load_file
from tools import SMALL, build, toy_data, train, weights

from ftrecipes.errors import UserError
from ftrecipes.methods.adapters import svfit
from ftrecipes.methods.adapters.svd import svd
from ftrecipes.run import Run

MUTATION = ("ftrecipes/methods/adapters/svfit.py", "linear(h * (self.sigma - self.start)", "linear(h * self.sigma")
STEADY = ("schedule=constant", "schedule.warmup=0", "trainer.clip=.inf")


def toy(*words: str, rows: int = 16, cols: int = 16) -> Run:
    """One weight in float64 on unit vectors: the loss is half the squared distance to a target, over `cols`."""
    shape = (f"model.inputs={cols}", f"model.outputs={rows}", f"data.inputs={cols}", f"data.outputs={rows}", f"trainer.batch={cols}")
    return build(
        "method=svfit", "model=toy", "model.dtype=float64", "data.unit=true", *shape, "method.svfit.targets=[linear]", *STEADY, *words
    )  # fmt: skip


def only(run: Run):
    (delta,) = adapter(run).deltas.values()
    return delta


@pytest.mark.parametrize("rank", ["1", "4", "null"])
def test_the_start_is_the_base_model_and_the_count_is_the_rank(rank):
    run = build("method=svfit", *SMALL, "method.svfit.targets=[q,v]", f"method.svfit.rank={rank}", "model.architecture.attention_bias=true")
    batch = run.window(0).micros[0]
    with torch.no_grad():
        assert torch.equal(run.model(batch["ids"]).logits, run.pristine()(batch["ids"]).logits)
    full = sum(min(delta.layer.shape) for delta in adapter(run).deltas.values())
    assert sum(p.numel() for p in run.trainable().values()) == (full if rank == "null" else 4 * int(rank))
    assert {name.rpartition(".")[2] for name in run.trainable()} == {"sigma"}
    for delta in adapter(run).deltas.values():
        torch.testing.assert_close(delta.sigma.detach(), torch.linalg.svdvals(delta.layer.weight)[: len(delta.sigma)])


@pytest.mark.parametrize("shape", [(16, 16), (24, 12), (12, 24)])
def test_gradients_are_u_g_v(shape):
    """dL/dsigma_i = u_i^T G v_i, with G that of the whole weight, found on a copy of the model that trains it."""
    rows, cols = shape
    run = toy("method.svfit.rank=7", rows=rows, cols=cols)
    with torch.no_grad():
        only(run).sigma.mul_(1.3)
        now = only(run).final(run.model.layer.weight)
    run.gradients(run.window(0))
    U, _, V = svd(run.model.layer.weight.detach(), 7)
    free = run.pristine().requires_grad_(True)
    free.layer.weight.data.copy_(now)
    batch = run.window(0).micros[0]
    (0.5 * (free(batch["x"]) - batch["y"]).square().sum() / cols).backward()
    wanted = ((U.T @ free.layer.weight.grad) * V.T).sum(1)
    torch.testing.assert_close(only(run).sigma.grad, wanted, atol=1e-12, rtol=1e-10)
    assert wanted.abs().max() > 1e-3


def test_only_the_diagonal_in_the_weight_s_own_basis_changes():
    """U^T (W' - W) V is diagonal and ends at the rank, after real training; the formula is that of the merged weight."""
    run = toy("method.svfit.rank=5", "optimizer.lr=0.05", rows=24, cols=12)
    W = run.model.layer.weight.detach().clone()
    U, s, Vh = torch.linalg.svd(W, full_matrices=False)
    run.fit(20)
    x = torch.randn(5, 12, dtype=torch.float64)
    with run.evaluating():
        y = run.model(x)
    sigma = only(run).sigma.detach().clone()
    merged = run.merge().layer.weight
    core = U.T @ (merged - W) @ Vh.T
    torch.testing.assert_close(core[:5, :5], torch.diag(sigma - s[:5]), atol=1e-12, rtol=0)
    assert (sigma - s[:5]).abs().min() > 1e-3
    assert core[5:].abs().max() < 1e-12 and core[:, 5:].abs().max() < 1e-12
    torch.testing.assert_close(y, x @ merged.T, atol=1e-12, rtol=0)


def test_energy_takes_the_smallest_rank_that_holds_it_weight_by_weight():
    run = build("method=svfit", *SMALL, "method.svfit.energy=0.9")
    ranks = {}
    for name, delta in adapter(run).deltas.items():
        square = torch.linalg.svdvals(delta.layer.weight.double()).square()
        ranks[name] = r = len(delta.sigma)
        assert square[:r].sum() >= 0.9 * square.sum() > square[: r - 1].sum()
    assert len(set(ranks.values())) > 1
    whole = build("method=svfit", *SMALL, "method.svfit.energy=1.0")
    assert all(len(d.sigma) == min(d.layer.shape) for d in adapter(whole).deltas.values())
    steep = torch.diag(torch.tensor([10.0, 3.0, 1.0]))  # 100, 9 and 1 of 110
    assert [svfit.enough(torch.diagonal(steep), e) for e in (0.9, 0.95, 0.999)] == [1, 2, 3]


def test_all_values_train_as_svft_s_plain_pattern_does():
    """The same function of other numbers: theta = sigma - s."""
    words = (*SMALL, "optimizer.lr=1e-2", "optimizer.weight_decay=0", "schedule=constant", "schedule.warmup=0")
    ours = build("method=svfit", *words)
    other = ("pattern=plain", "init=zero", "gate=false", "targets=[all-linear]", "off_diag=0")
    theirs = build("method=svft", *words, *(f"method.svft.{word}" for word in other))
    for run in (ours, theirs):
        run.model.train()
        run.fit(5)
    for name, delta in adapter(ours).deltas.items():
        there = adapter(theirs).deltas[name]
        torch.testing.assert_close(delta.sigma - delta.start, there.theta, atol=2e-5, rtol=0)
        assert there.theta.abs().max() > 1e-2
    a, b = weights(ours), weights(theirs)
    assert all(torch.equal(a[name], b[name]) for name in a if name in b)
    merged, also = ours.merge().state_dict(), theirs.merge().state_dict()
    for name, value in merged.items():
        torch.testing.assert_close(value, also[name], atol=2e-5, rtol=0)


def test_it_doubles_a_weight_where_a_rank_one_update_with_twice_the_numbers_cannot():
    """Target U diag(2 s) V^T, 64 numbers against 128; by Eckart-Young a rank of one leaves sqrt(sum_(i > 1) s_i^2 / sum s_i^2)."""
    W = torch.randn(64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 8
    rows = toy_data("doubled", torch.eye(64, dtype=torch.float64), 2 * W.T)
    words = (f"data={rows}", "trainer.batch=64", "optimizer.weight_decay=0", "trainer.clip=.inf", "schedule.warmup=0")
    run = host(Matrix(W), "method=svfit", *words, "method.svfit.targets=[linear]", "optimizer.lr=0.05")
    assert sum(p.numel() for p in run.trainable().values()) == 64
    run.fit(200)
    assert (run.merge().layer.weight - 2 * W).norm() / W.norm() < 1e-3
    lora = host(Matrix(W), "method=lora", *words, "method.lora.targets=[linear]", "method.lora.rank=1", "optimizer.lr=0.05")
    assert sum(p.numel() for p in lora.trainable().values()) == 128
    lora.fit(200)
    s = torch.linalg.svdvals(W)
    best = float((s[1:].square().sum() / s.square().sum()).sqrt())
    left = float((lora.merge().layer.weight - 2 * W).norm() / W.norm())
    assert left >= best * (1 - 1e-9) and best > 0.9
    assert math.isclose(left, best, rel_tol=0.02)


def test_a_16_bit_base_starts_exactly_and_its_values_train_in_32():
    run = build("method=svfit", *SMALL, "model.dtype=bfloat16", "hardware.precision=bf16")
    batch = run.window(0).micros[0]
    with torch.no_grad():
        assert torch.equal(run.model(batch["ids"]).logits, run.pristine()(batch["ids"]).logits)
    assert {p.dtype for p in run.trainable().values()} == {torch.float32}


def test_the_record_holds_singular_values_alone_and_refuses_other_vectors(tmp_path, monkeypatch):
    run = train("method=svfit", *SMALL, "method.svfit.energy=0.9", "trainer.max_steps=3", "optimizer.lr=1e-2", folder=tmp_path)
    saved = load_file(tmp_path / "tuned" / "weights.safetensors")
    assert {name.rpartition(".")[2] for name in saved} == {"sigma"}
    again = Run.open(tmp_path)
    batch = run.window(0).micros[0]
    with torch.no_grad():
        assert torch.equal(again.model(batch["ids"]).logits, run.model(batch["ids"]).logits)

    def other(weight, rank=None):
        U, s, V = svd(weight, rank)
        return U.roll(1, 1), s, V.roll(1, 1)

    monkeypatch.setattr(svfit, "svd", other)
    with pytest.raises(UserError, match=r"svfit: the singular vectors of model\.layers\.0\.self_attn\.q_proj come out differently"):
        Run.open(tmp_path)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["method.svfit.rank=17"], r"svfit.rank=17: layer is 16 x 16, its rank is at most 16"),
        (["method.svfit.rank=4", "method.svfit.energy=0.9"], "svfit: rank and energy both say how many singular values train"),
        (["method.svfit.energy=1.5"], r"method.svfit.energy"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(words, text):
    with pytest.raises(UserError, match=text) as caught:
        toy(*words)
    assert "\n" not in str(caught.value)
