"""LoRA-XS: a square matrix between the leading singular vectors of each weight."""

from __future__ import annotations

import pytest
import torch
from peers import adapter
from peft import PeftModel
from safetensors.torch import load_file
from tools import SMALL, build, train

from ftrecipes import export
from ftrecipes.errors import UserError
from ftrecipes.methods.adapters import lora_xs
from ftrecipes.methods.adapters.svd import svd
from ftrecipes.run import Run

MUTATION = ("ftrecipes/methods/adapters/lora_xs.py", "self.hold(U, (V * S).T)", "self.hold(U, V.T)")


def toy(*words: str) -> Run:
    """A 16 x 24 weight in float64 on unit vectors; its gradient over all rows is (W' - target) / 24."""
    shape = ("model.inputs=24", "model.outputs=16", "data.inputs=24", "data.outputs=16", "trainer.batch=24")
    return build(
        "method=lora_xs", "model=toy", "model.dtype=float64", "data.unit=true", *shape, "method.lora_xs.targets=[linear]",
        "method.lora_xs.rank=5", "trainer.clip=.inf", *words,
    )  # fmt: skip


def only(run: Run):
    (delta,) = adapter(run).deltas.values()
    return delta


def test_rank_squared_numbers_train_and_the_start_is_the_base_model_but_for_a_grain():
    run = build("method=lora_xs", *SMALL, "method.lora_xs.rank=6")
    deltas = adapter(run).deltas
    assert {name.rpartition(".")[2] for name in run.trainable()} == {"R"}
    assert sum(p.numel() for p in run.trainable().values()) == 36 * len(deltas) == 36 * 14
    values = torch.cat([delta.R.detach().flatten() for delta in deltas.values()])
    assert abs(float(values.std()) / 1e-5 - 1) < 0.15 and abs(float(values.mean())) < 1.5e-6
    batch = run.window(0).micros[0]
    with torch.no_grad():
        off = (run.model(batch["ids"]).logits - run.pristine()(batch["ids"]).logits).abs().max()
    assert 0 < off < 1e-4


@pytest.mark.parametrize(("alpha", "s"), [("null", 1.0), ("15", 3.0)])
def test_factors_forward_and_gradient(alpha, s):
    """B = U_r, A = S_r V_r^T; W' = W + s B R A; dL/dR = s B^T G A^T."""
    run = toy(f"method.lora_xs.alpha={alpha}")
    delta, W = only(run), run.model.layer.weight.detach().clone()
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    eye = torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close((U[:, :5].T @ delta.B).abs(), eye, atol=1e-12, rtol=0)
    torch.testing.assert_close(delta.B @ delta.A, U[:, :5] * S[:5] @ Vh[:5], atol=1e-12, rtol=0)
    with torch.no_grad():
        delta.R.normal_()
    wanted = W + s * delta.B @ delta.R.detach() @ delta.A
    target = torch.stack([run.data["train"][i]["y"] for i in range(24)]).T
    run.gradients(run.window(0))
    torch.testing.assert_close(delta.R.grad, s * delta.B.T @ ((wanted - target) / 24) @ delta.A.T, atol=1e-12, rtol=0)
    x = torch.randn(5, 24, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(run.model(x), x @ wanted.T, atol=1e-12, rtol=0)
    torch.testing.assert_close(run.merge().layer.weight, wanted, atol=1e-12, rtol=0)


def test_training_reaches_the_best_change_within_the_weight_s_own_subspaces():
    """What is left of the distance D is D minus its projection B B^T D V_r V_r^T."""
    run = toy("optimizer=sgd", "optimizer.lr=2.0", "schedule=constant", "schedule.warmup=0")
    W = run.model.layer.weight.detach().clone()
    D = torch.stack([run.data["train"][i]["y"] for i in range(24)]).T - W
    run.fit(250)
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    L, R = U[:, :5], Vh[:5]
    change = run.merge().layer.weight - W
    torch.testing.assert_close(change, L @ L.T @ D @ R.T @ R, atol=1e-6, rtol=0)
    assert change.norm() > 0.1 * D.norm()


def test_a_randomized_decomposition_is_a_good_one_and_repeats():
    words = ("method=lora_xs", *SMALL, "method.lora_xs.rank=6", "method.lora_xs.svd_iterations=10")
    run, again = build(*words), build(*words)
    for name, delta in adapter(run).deltas.items():
        W = delta.layer.weight
        best = torch.linalg.svdvals(W)[6:].norm()
        assert best * (1 - 1e-6) <= (W - delta.B @ delta.A).norm() < best * 1.001, name
        assert torch.equal(delta.B, adapter(again).deltas[name].B)


def test_the_record_holds_the_square_matrices_alone_and_refuses_other_vectors(tmp_path, monkeypatch):
    words = ("method.lora_xs.rank=6", "method.lora_xs.svd_iterations=10", "trainer.max_steps=3", "optimizer.lr=1e-2")
    run = train("method=lora_xs", *SMALL, *words, folder=tmp_path / "run")
    saved = load_file(tmp_path / "run" / "tuned" / "weights.safetensors")
    assert {name.rpartition(".")[2] for name in saved} == {"R"} and sum(t.numel() for t in saved.values()) == 36 * 14
    again = Run.open(tmp_path / "run")
    batch = run.window(0).micros[0]
    with torch.no_grad():
        logits = run.model(batch["ids"]).logits
        assert torch.equal(again.model(batch["ids"]).logits, logits)
        assert not torch.allclose(run.pristine()(batch["ids"]).logits, logits, atol=1e-3)
        # as a LoRA of the same rank, B and R A, it is peft's too
        theirs = PeftModel.from_pretrained(run.pristine(), str(export.export(str(tmp_path / "run"), "peft"))).eval()
        assert theirs.peft_config["default"].r == 6
        torch.testing.assert_close(theirs(batch["ids"]).logits, logits, atol=1e-5, rtol=0)
        merged = again.merge().state_dict()
        for name, value in theirs.merge_and_unload().state_dict().items():
            torch.testing.assert_close(merged[name], value, atol=1e-6, rtol=0)

    def other(weight, rank=None, **options):
        U, s, V = svd(weight, rank, **options)
        return U.roll(1, 1), s, V.roll(1, 1)

    monkeypatch.setattr(lora_xs, "svd", other)
    with pytest.raises(UserError, match=r"lora_xs: the singular vectors of model\.layers\.0\.self_attn\.q_proj come out differently"):
        Run.open(tmp_path / "run")
