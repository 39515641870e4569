"""CapaBoost: fixed masks that differ, a rank of d r from the numbers of one LoRA, and `peft`'s LoRA as its simplest case."""

from __future__ import annotations

import pytest
import torch
from peers import Matrix, adapter, host, language_loss, pairs, plain_loop, scramble, twin
from tools import SMALL, build, toy_data, train

from ftrecipes.errors import UserError
from ftrecipes.methods.adapters.capaboost import pack, unpack
from ftrecipes.run import Run

MUTATION = ("ftrecipes/methods/adapters/capaboost.py", 'rng(f"{name}{i}")', "rng(name)")
STEADY = ("schedule=constant", "schedule.warmup=0")


def one(*words: str, rows: int = 12, cols: int = 10) -> Run:
    """One weight in float64 on unit vectors: the loss is half the squared distance to a target, over `cols`."""
    shape = (f"model.inputs={cols}", f"model.outputs={rows}", f"data.inputs={cols}", f"data.outputs={rows}", f"trainer.batch={cols}")
    return build(
        "method=capaboost", "model=toy", "model.dtype=float64", "data.unit=true", *shape, "method.capaboost.targets=[linear]",
        "method.capaboost.rank=2", "trainer.clip=.inf", *words,
    )  # fmt: skip


def only(run: Run):
    (delta,) = adapter(run).deltas.values()
    return delta


# -- masks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.5, 0.3, 1.0])
def test_every_mask_holds_its_share_and_no_two_are_equal(density):
    words = ("method.capaboost.rank=3", "method.capaboost.num_layer=3", f"method.capaboost.density={density}")
    run = build("method=capaboost", *SMALL, *words)
    seen = []
    for delta in adapter(run).deltas.values():
        for masks, factor in ((delta.M_A, delta.A), (delta.M_B, delta.B)):
            assert masks.dtype == torch.bool and masks.shape == (3, *factor.shape)
            assert all(int(mask.sum()) == int(density * factor.numel()) for mask in masks)
            seen += [bytes(pack(mask).tolist()) for mask in masks]
    assert run.events == {"masks": len(seen)} == {"masks": 6 * 14}
    if density < 1:
        assert len(set(seen)) == len(seen)


def test_nm_masks_keep_two_of_every_four():
    run = one("method.capaboost.pattern=nm", "method.capaboost.rank=4")
    for masks in (only(run).M_A, only(run).M_B):
        groups = masks.view(-1, 4)
        assert (groups.sum(1) == 2).all() and len(groups.unique(dim=0)) == 6
    with pytest.raises(UserError, match=r"capaboost.pattern=nm: layer has a factor of 30 numbers"):
        one("method.capaboost.pattern=nm", "method.capaboost.rank=3")
    with pytest.raises(UserError, match=r"capaboost.density=0.3: pattern=nm keeps two of every four"):
        one("method.capaboost.pattern=nm", "method.capaboost.density=0.3")


def test_masks_never_change_come_back_with_the_record_and_depend_on_the_seed(tmp_path):
    words = ("method=capaboost", *SMALL, "trainer.max_steps=3", "optimizer.lr=1e-2")
    run = train(*words, folder=tmp_path)
    opened, fresh, other = Run.open(tmp_path), build(*words), build(*words, "seed=1")
    for name, delta in adapter(run).deltas.items():
        for masks in ("M_A", "M_B"):
            mine = getattr(delta, masks)
            assert mine.equal(getattr(adapter(opened).deltas[name], masks))
            assert mine.equal(getattr(adapter(fresh).deltas[name], masks))
            assert not mine.equal(getattr(adapter(other).deltas[name], masks))
    for shape in ((2, 3, 5), (1, 1), (4, 8)):
        mask = torch.rand(shape) < 0.5
        assert unpack(pack(mask), shape).equal(mask)


# -- the definition ----------------------------------------------------------------------------------------------------


def test_the_start_is_the_base_model_and_the_count_is_lora_s():
    run, lora = build("method=capaboost", *SMALL, "method.capaboost.rank=4"), build("method=lora", *SMALL, "method.lora.rank=4")
    batch = run.window(0).micros[0]
    with torch.no_grad():
        assert torch.equal(run.model(batch["ids"]).logits, run.pristine()(batch["ids"]).logits)
    assert {n: p.shape for n, p in run.trainable().items()} == {n: p.shape for n, p in lora.trainable().items()}


def test_the_update_is_the_sum_over_the_copies_and_gradients_are_its():
    """dA = s sum_i M_A^i * ((B * M_B^i)^T G) and dB = s sum_i M_B^i * (G (A * M_A^i)^T), by explicit loops."""
    run = one("method.capaboost.num_layer=3", "method.capaboost.alpha=5")
    scramble(run, size=1)
    delta, W = only(run), run.model.layer.weight.detach().clone()
    A, B, s = delta.A.detach(), delta.B.detach(), 5 / 2
    update = sum(s * (B * mb) @ (A * ma) for mb, ma in zip(delta.M_B, delta.M_A, strict=True))
    torch.testing.assert_close(delta.delta().detach(), update, atol=1e-12, rtol=0)
    target = torch.stack([run.data["train"][i]["y"] for i in range(10)]).T
    G = (W + update - target) / 10
    run.gradients(run.window(0))
    wanted_A = sum(s * ma * ((B * mb).T @ G) for mb, ma in zip(delta.M_B, delta.M_A, strict=True))
    wanted_B = sum(s * mb * (G @ (A * ma).T) for mb, ma in zip(delta.M_B, delta.M_A, strict=True))
    torch.testing.assert_close(delta.A.grad, wanted_A, atol=1e-12, rtol=0)
    torch.testing.assert_close(delta.B.grad, wanted_B, atol=1e-12, rtol=0)
    factors = delta.factors()
    torch.testing.assert_close(factors.scale * factors.B @ factors.A, update)
    assert factors.A.shape == (6, 10)
    torch.testing.assert_close(run.merge().layer.weight, W + update, atol=1e-12, rtol=0)


def test_the_rank_grows_with_the_copies_and_does_not_when_they_share_a_mask():
    ranks = []
    for d in (1, 2, 3, 4):
        run = one(f"method.capaboost.num_layer={d}")
        scramble(run, size=1)
        ranks.append(int(torch.linalg.matrix_rank(only(run).delta())))
    assert ranks == [2, 4, 6, 8]
    only(run).M_A[1:] = only(run).M_A[0]
    only(run).M_B[1:] = only(run).M_B[0]
    assert torch.linalg.matrix_rank(only(run).delta()) == 2


def test_entries_outside_all_masks_never_move():
    run = one("method.capaboost.num_layer=2", "method.capaboost.density=0.3", "optimizer.weight_decay=0", "optimizer.lr=0.05")
    delta = only(run)
    scramble(run, size=1)
    before = {"A": delta.A.detach().clone(), "B": delta.B.detach().clone()}
    run.fit(5)
    for name, masks in (("A", delta.M_A), ("B", delta.M_B)):
        used, moved = masks.any(0), getattr(delta, name) != before[name]
        assert not used.all() and not moved[~used].any() and moved[used].all()


def test_one_full_mask_is_peft_s_lora_through_twenty_updates():
    run = build(
        "method=capaboost", *SMALL, *STEADY, "method.capaboost.num_layer=1", "method.capaboost.density=1", "method.capaboost.rank=4",
        "optimizer.lr=1e-3", "optimizer.weight_decay=0.1",
    )  # fmt: skip
    peer = twin(run, r=4, lora_alpha=16)
    (batch,) = run.window(0)
    run.fit(20)
    plain_loop(run, peer, language_loss, 20, lr=1e-3, decay=0.1)
    for name, ours, theirs in pairs(run, peer):
        torch.testing.assert_close(ours, theirs, atol=3e-5, rtol=0, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(run.model(batch["ids"]).logits, peer(batch["ids"]).logits, atol=1e-4, rtol=0)


# -- where it wins, and where it loses -----------------------------------------------------------------------------------


def left(method: str, target: torch.Tensor, *words: str) -> float:
    """Share of a target update's squared norm that a method does not reach with two times 32 numbers; it starts at zero."""
    n = len(target)
    rows = toy_data("update", torch.eye(n, dtype=torch.float64), target.T)
    run = host(
        Matrix(torch.zeros(n, n, dtype=torch.float64)), f"method={method}", f"data={rows}", f"method.{method}.targets=[linear]",
        f"method.{method}.rank=2", f"method.{method}.alpha=2", f"trainer.batch={n}", "trainer.clip=.inf", "schedule=cosine",
        "schedule.warmup=0", "optimizer.lr=0.05", "optimizer.weight_decay=0", *words,
    )  # fmt: skip
    run.fit(600)
    return float((run.merge().layer.weight - target).square().sum() / target.square().sum())


def test_a_flat_spectrum_is_approached_beyond_what_rank_two_can():
    """The identity of 16: no update of rank 2 leaves less than 14/16 of it. Of a rank-2 target LoRA leaves nothing, and masks do."""
    eye = torch.eye(16, dtype=torch.float64)
    assert left("capaboost", eye, "method.capaboost.num_layer=4") < 0.8
    assert 0.875 - 1e-9 <= left("lora", eye) < 0.9
    torch.manual_seed(0)
    low = torch.randn(16, 2, dtype=torch.float64) @ torch.randn(2, 16, dtype=torch.float64)
    assert left("lora", low) < 1e-3
    assert left("capaboost", low, "method.capaboost.num_layer=4") > 0.02
