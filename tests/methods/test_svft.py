"""SVFT: sparse combinations of a weight's own singular vectors, checked against its formulas and the authors' layer."""

from __future__ import annotations

import math

import pytest
import torch
from peers import Matrix, adapter, host
from safetensors.torch import load_file
from tools import SMALL, build, toy_data, train

from ftrecipes.compose import compose
from ftrecipes.errors import UserError
from ftrecipes.methods.adapters import svft
from ftrecipes.methods.adapters.svd import svd
from ftrecipes.run import Run

MUTATION = ("ftrecipes/methods/adapters/svft.py", "std = (2.0 / len(index)) ** 0.5", "std = 2.0 / len(index)")


def toy(*words: str, rows: int = 16, cols: int = 16) -> Run:
    """One weight in float64 on unit vectors: the loss is half the squared distance to a target, over `cols`."""
    shape = (f"model.inputs={cols}", f"model.outputs={rows}", f"data.inputs={cols}", f"data.outputs={rows}", f"trainer.batch={cols}")
    return build(
        "method=svft", "model=toy", "model.dtype=float64", "data.unit=true", *shape, "method.svft.targets=[linear]", "trainer.clip=.inf", *words
    )  # fmt: skip


def only(run: Run):
    (delta,) = adapter(run).deltas.values()
    return delta


def dense(delta) -> torch.Tensor:
    """M (n x n)."""
    M = torch.zeros(delta.n * delta.n, dtype=delta.theta.dtype)
    M[delta.index] = delta.coefficients().detach()
    return M.view(delta.n, delta.n)


def count(run: Run) -> int:
    return sum(p.numel() for p in run.trainable().values())


# -- counts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(96, 64), (64, 96)])
@pytest.mark.parametrize("d", [0, 1, 5])
def test_the_count_is_that_of_the_diagonals_and_one_gate(shape, d):
    n, wanted = 64, 64 * (2 * d + 1) - d * (d + 1)
    for pattern in ("banded", "random"):
        words = (f"method.svft.off_diag={d}", f"method.svft.pattern={pattern}")
        assert count(toy(*words, rows=shape[0], cols=shape[1])) == wanted + 1
        run = toy(*words, "method.svft.gate=false", rows=shape[0], cols=shape[1])
        assert count(run) == wanted
        index = only(run).index
        assert len(index.unique()) == wanted and index.max() < n * n
        if pattern == "banded":
            assert ((index // n - index % n).abs() <= d).all()
    assert count(toy(f"method.svft.off_diag={d}", "method.svft.pattern=plain", rows=shape[0], cols=shape[1])) == n + 1


def test_the_count_on_gemma_2b_is_the_paper_s():
    """18 blocks of two 2048 x 2048, two 256 x 2048 and three 16384 x 2048 matrices; nothing is loaded."""
    run = Run(compose(["method=svft", "model=gemma-2b", "method.svft.pattern=plain", "method.svft.gate=false"]))
    run.load_model(meta=True)
    run.prepare()
    assert count(run) == 18 * (4096 + 512 + 6144) == 193_536


# -- the formulas ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(16, 16), (24, 12), (12, 24)])
@pytest.mark.parametrize("pattern", ["plain", "banded", "random", "top_k"])
def test_forward_and_merged_weight_are_those_of_the_formula(pattern, shape):
    """W' = U (diag(s) + sigmoid(gate) theta on Omega) V^T, computed densely from an SVD of its own."""
    run = toy(f"method.svft.pattern={pattern}", "method.svft.off_diag=3", rows=shape[0], cols=shape[1])
    delta, W = only(run), run.model.layer.weight.detach().clone()
    with torch.no_grad():
        delta.theta.normal_()
        delta.gate.fill_(0.7)
    U, s, Vh = torch.linalg.svd(W, full_matrices=False)
    sign = torch.sign((U * delta.U).sum(0))  # singular vectors are known up to a common sign
    U, Vh = U * sign, Vh * sign[:, None]
    n = min(shape)
    M = torch.zeros(n, n, dtype=torch.float64)
    M[delta.index // n, delta.index % n] = delta.theta.detach() / (1 + math.exp(-0.7))
    wanted = U @ (torch.diag(s) + M) @ Vh
    x = torch.randn(5, shape[1], dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(run.model(x), x @ wanted.T, atol=1e-10, rtol=0)
    torch.testing.assert_close(run.merge().layer.weight, wanted, atol=1e-10, rtol=0)


def test_plain_changes_the_singular_values_alone():
    run = toy("method.svft.pattern=plain", "method.svft.gate=false")
    delta, s = only(run), torch.linalg.svdvals(run.model.layer.weight.detach())
    with torch.no_grad():
        delta.theta.normal_()
    U, V, theta = delta.U, delta.V, delta.theta.detach()
    core = U.T @ run.merge().layer.weight @ V
    torch.testing.assert_close(core, torch.diag(s + theta), atol=1e-12, rtol=0)


def test_the_update_can_have_full_rank():
    """theta = s doubles the weight."""
    run = toy("method.svft.pattern=plain", "method.svft.gate=false", rows=24, cols=12)
    delta, W = only(run), run.model.layer.weight.detach().clone()
    with torch.no_grad():
        delta.theta.copy_(torch.linalg.svdvals(W))
        assert torch.linalg.matrix_rank(delta.delta()) == 12
    torch.testing.assert_close(run.merge().layer.weight, 2 * W, atol=1e-12, rtol=0)


def test_all_diagonals_reach_any_weight():
    run = toy("method.svft.off_diag=15", "method.svft.gate=false")
    delta, W = only(run), run.model.layer.weight.detach().clone()
    P = torch.randn(16, 16, dtype=torch.float64)
    with torch.no_grad():
        delta.theta.copy_((delta.U.T @ (P - W) @ delta.V).flatten()[delta.index])
    torch.testing.assert_close(run.merge().layer.weight, P, atol=1e-10, rtol=0)


@pytest.mark.parametrize("pattern", ["plain", "banded", "random", "top_k"])
def test_gradients_are_those_of_the_coefficients(pattern):
    """dL/dtheta = (U^T G V) on Omega times sigmoid(gate), dL/dgate its sum with theta times the sigmoid's slope."""
    run = toy(f"method.svft.pattern={pattern}", "method.svft.off_diag=2")
    delta = only(run)
    with torch.no_grad():
        delta.gate.fill_(0.4)
        target = torch.stack([run.data["train"][i]["y"] for i in range(16)]).T
        G = (run.model.layer.weight + delta.delta() - target) / 16
        share = torch.sigmoid(torch.tensor(0.4, dtype=torch.float64))
    run.gradients(run.window(0))
    on_omega = (delta.U.T @ G @ delta.V).flatten()[delta.index]
    torch.testing.assert_close(delta.theta.grad, share * on_omega, atol=1e-12, rtol=0)
    slope = share * (1 - share) * (on_omega * delta.theta.detach()).sum()
    torch.testing.assert_close(delta.gate.grad, slope[None], atol=1e-12, rtol=0)


def test_gradients_reach_what_lies_below():
    """Through the sparse product: a finite difference on the first layer of two."""
    run = build(
        "method=svft", "model=toy", "model.kind=two_layer", "model.dtype=float64", "method.svft.targets=[linear,head]",
        "method.svft.off_diag=3", "trainer.batch=8",
    )  # fmt: skip
    window = run.window(0)
    run.gradients(window)
    for name, parameter in run.trainable().items():
        grad = parameter.grad.flatten()[0].item()
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.view(-1)[0] += sign * 1e-5
                values.append(sum(float(run.stack.loss(run, b)) for b in window) / window.units)
                parameter.view(-1)[0] -= sign * 1e-5
        assert abs((values[0] - values[1]) / 2e-5 - grad) < 1e-7 * max(1, abs(grad)), name


# -- the start ---------------------------------------------------------------------------------------------------------


def test_kaiming_starts_off_the_pretrained_weight():
    """theta ~ N(0, 2/|Omega|) and half of it let through: the update's norm is near 0.71."""
    norms = []
    for seed in range(4):
        run = toy(f"seed={seed}", "method.svft.off_diag=4", rows=64, cols=48)
        delta = only(run)
        assert delta.gate.item() == 0
        norms.append(float(delta.delta().detach().norm()))
        assert abs(delta.theta.detach().std().item() / math.sqrt(2 / len(delta.theta)) - 1) < 0.15
    assert abs(sum(norms) / 4 - math.sqrt(2) / 2) < 0.05
    assert len(set(norms)) == 4


def test_zero_starts_on_it_and_the_gate_learns_from_the_second_update():
    run = build("method=svft", *SMALL, "method.svft.init=zero", "optimizer.lr=1e-2", "schedule=constant", "schedule.warmup=0")
    batch = run.window(0).micros[0]
    with torch.no_grad():
        assert torch.equal(run.model(batch["ids"]).logits, run.pristine()(batch["ids"]).logits)
    gates = [p for n, p in run.trainable().items() if n.endswith("gate")]
    run.fit(1)
    assert all(p.item() == 0 for p in gates)
    run.fit(2)
    assert all(p.item() != 0 for p in gates)


# -- patterns ----------------------------------------------------------------------------------------------------------


def test_top_k_takes_the_best_aligned_pairs_of_square_weights():
    run = toy("method.svft.pattern=top_k", "method.svft.off_diag=2")
    delta = only(run)
    alignment = torch.tensor([[float(delta.U[:, i] @ delta.V[:, j]) for j in range(16)] for i in range(16)])
    chosen = torch.zeros(256, dtype=torch.bool)
    chosen[delta.index] = True
    assert chosen.sum() == 16 * 5 - 6
    assert alignment.flatten()[chosen].min() >= alignment.flatten()[~chosen].max()


def test_top_k_is_banded_elsewhere_and_says_so():
    run = build("method=svft", *SMALL, "method.svft.pattern=top_k", "method.svft.off_diag=2")
    patterns = {name: delta.pattern for name, delta in adapter(run).deltas.items()}
    assert {p for n, p in patterns.items() if n.endswith(("k_proj", "v_proj"))} == {"top_k"}  # 64 x 64 here
    assert {p for n, p in patterns.items() if not n.endswith(("k_proj", "v_proj"))} == {"banded"}
    assert any("10 of 14 are not and take the banded pattern" in remark for remark in run.remarks)


def test_random_positions_differ_between_weights_and_repeat_with_the_seed():
    words = ("method=svft", *SMALL, "method.svft.pattern=random", "method.svft.off_diag=2")
    first, again, other = (adapter(build(*words, f"seed={seed}")).deltas for seed in (0, 0, 1))
    k, v = "model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj"
    assert torch.equal(first[k].index, again[k].index)
    assert not torch.equal(first[k].index, first[v].index)
    assert not torch.equal(first[k].index, other[k].index)


def test_a_lower_rank_keeps_the_rest_of_the_weight():
    run = toy("method.svft.rank=5", "method.svft.off_diag=1", "method.svft.init=zero")
    W = run.model.layer.weight.detach().clone()
    assert only(run).n == 5 and count(run) == 5 * 3 - 2 + 1
    with torch.no_grad():
        only(run).theta.normal_()
    change = run.merge().layer.weight - W
    assert torch.linalg.matrix_rank(change) == 5
    U, _, Vh = torch.linalg.svd(W)
    assert (U[:, 5:].T @ change).abs().max() < 1e-12 and (change @ Vh[5:].T).abs().max() < 1e-12


def test_dropped_vectors_can_be_replaced_by_random_orthonormal_ones():
    run = toy("method.svft.rank=5", "method.svft.off_diag=1", "method.svft.fill_orthonormal=true", rows=24, cols=12)
    delta = only(run)
    assert delta.n == 12 and count(run) == 12 * 3 - 2 + 1
    for basis in (delta.U, delta.V):
        torch.testing.assert_close(basis[:, 5:].T @ basis[:, 5:], torch.eye(7, dtype=torch.float64), atol=1e-6, rtol=0)
    U = torch.linalg.svd(run.model.layer.weight.detach(), full_matrices=False)[0]
    torch.testing.assert_close((U[:, :5] * delta.U[:, :5]).sum(0).abs(), torch.ones(5, dtype=torch.float64))


# -- training and the record -------------------------------------------------------------------------------------------


def test_plain_reaches_a_change_of_all_singular_values_that_no_rank_one_update_can():
    """n numbers suffice for U diag(s + e) V^T; the best update of rank one, with 2n numbers, leaves sqrt((n - 1)/n)."""
    n = 16
    rng = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(n, n, generator=rng, dtype=torch.float64)).Q for _ in range(2))
    s = torch.linspace(2, 1, n, dtype=torch.float64)
    e = torch.where(torch.randn(n, generator=rng) > 0, 0.5, -0.5).double()
    W, target = U @ torch.diag(s) @ V.T, U @ torch.diag(s + e) @ V.T
    rows = toy_data("spectrum", torch.eye(n, dtype=torch.float64), target.T)
    run = host(
        Matrix(W), "method=svft", f"data={rows}", "method.svft.targets=[linear]", "method.svft.pattern=plain", "method.svft.gate=false",
        "trainer.batch=16", "trainer.clip=.inf", "optimizer.lr=0.05", "schedule.warmup=0",
    )  # fmt: skip
    assert count(run) == n
    run.fit(400)
    left = (run.merge().layer.weight - target).norm()
    assert left < 1e-6
    tail = torch.linalg.svdvals(target - W)[1:].norm() / (target - W).norm()
    assert abs(tail - math.sqrt((n - 1) / n)) < 1e-12


@pytest.mark.parametrize("pattern", ["banded", "random"])
def test_the_record_holds_coefficients_alone_and_opens_again(pattern, tmp_path):
    words = (f"method.svft.pattern={pattern}", "method.svft.off_diag=2", "trainer.max_steps=3", "optimizer.lr=1e-2")
    run = train("method=svft", *SMALL, *words, folder=tmp_path)
    saved = load_file(tmp_path / "tuned" / "weights.safetensors")
    assert {name.rpartition(".")[2] for name in saved} == {"theta", "gate"}
    assert sum(t.numel() for t in saved.values()) == count(run)
    again = Run.open(tmp_path)
    batch = run.window(0).micros[0]
    with torch.no_grad():
        logits = run.model(batch["ids"]).logits
        assert torch.equal(again.model(batch["ids"]).logits, logits)
        torch.testing.assert_close(again.merge()(batch["ids"]).logits, logits, atol=1e-5, rtol=0)


def test_a_machine_that_finds_other_singular_vectors_refuses_the_record(tmp_path, monkeypatch):
    """One sign that differs would turn coefficients of the off-diagonals around."""
    train("method=svft", *SMALL, "trainer.max_steps=1", folder=tmp_path)

    def other(weight, rank=None):
        U, s, V = svd(weight, rank)
        turn = torch.ones(len(s))
        turn[0] = -1
        return U * turn, s, V * turn

    monkeypatch.setattr(svft, "svd", other)
    with pytest.raises(UserError, match=r"svft: the singular vectors of model\.layers\.0\.self_attn\.q_proj come out differently"):
        Run.open(tmp_path)


def test_signs_are_fixed():
    """The largest entry of every left vector is positive, and the triplets give the weight back."""
    W = torch.randn(30, 20)
    U, s, V = svd(W)
    assert (U.gather(0, U.abs().argmax(0, keepdim=True)) > 0).all()
    torch.testing.assert_close(U @ torch.diag(s) @ V.T, W, atol=1e-5, rtol=0)
    torch.testing.assert_close(svd(-W)[0].abs(), U.abs(), atol=1e-4, rtol=0)
