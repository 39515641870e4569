"""PiSSA: LoRA over the principal triplets of each weight, and agreement with `peft`."""

from __future__ import annotations

import pytest
import torch
from peers import Matrix, adapter, host, language_loss, pairs, plain_loop, scramble, twin
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tools import SMALL, build, check_resume, toy_data, train, weights

from ftrecipes import export
from ftrecipes.run import Run

MUTATION = ("ftrecipes/methods/adapters/pissa.py", "U * root, (V * root).T", "U, (V * root**2).T")
STEADY = ("schedule=constant", "schedule.warmup=0", "optimizer.lr=1e-3", "optimizer.weight_decay=0")


def small(*words: str) -> Run:
    return build("method=pissa", *SMALL, "method.pissa.rank=4", *STEADY, *words)


def close(ours: torch.Tensor, theirs: torch.Tensor, what: str, tolerance: float = 2e-6) -> None:
    """Equal to float32 rounding: the largest difference against the largest number."""
    off = float((ours - theirs.reshape(ours.shape)).detach().abs().max() / theirs.detach().abs().max().clamp_min(1e-8))
    assert off < tolerance, f"{what}: off by {off:.1e} of the largest number"


@pytest.mark.parametrize("alpha", ["null", "12"])
def test_factors_are_the_roots_of_the_principal_triplets_and_the_start_is_exact(alpha):
    run = small(f"method.pissa.alpha={alpha}")
    batch = run.window(0).micros[0]
    with torch.no_grad():
        assert torch.equal(run.model(batch["ids"]).logits, run.pristine()(batch["ids"]).logits)
    for name, delta in adapter(run).deltas.items():
        A, B, s = delta.A.detach(), delta.B.detach(), delta.scale
        assert s == (1.0 if alpha == "null" else 3.0)
        W = delta.layer.weight
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        close(s * B @ A, U[:, :4] * S[:4] @ Vh[:4], f"product of {name}", 1e-5)
        close(B.T @ B, torch.diag(S[:4] / s), f"B^T B of {name}", 1e-5)
        close(A @ A.T, torch.diag(S[:4] / s), f"A A^T of {name}", 1e-5)
        assert len(list(delta.parameters())) == 2 and A.numel() + B.numel() == 4 * sum(W.shape)


def test_the_first_step_moves_the_principal_part_alone():
    """After one small step of gradient descent the change lies in the leading vectors' row or column space."""
    W = torch.randn(16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = toy_data("pissa-step", torch.eye(16, dtype=torch.float64), torch.randn(16, 16, dtype=torch.float64))
    run = host(
        Matrix(W), "method=pissa", f"data={rows}", "method.pissa.targets=[linear]", "method.pissa.rank=4", "trainer.batch=16", *STEADY[:2],
        "optimizer=sgd", "optimizer.lr=1e-5", "trainer.clip=.inf",
    )  # fmt: skip
    batch = run.window(0).micros[0]
    G = (W @ batch["x"].T - batch["y"].T) @ batch["x"] / 16
    run.fit(1)
    U, S, Vh = torch.linalg.svd(W)
    L, R, r = U[:, :4], Vh[:4], S[:4]
    change = run.merge().layer.weight - W
    wanted = -1e-5 * ((L * r) @ L.T @ G + G @ (R.T * r) @ R)  # B0 B0^T G + G A0^T A0
    torch.testing.assert_close(change, wanted, rtol=1e-4, atol=1e-10)
    rest = U[:, 4:].T @ change @ Vh[4:].T  # outside of both spaces there is the product of two steps
    assert rest.abs().max() < 1e-3 * change.abs().max()


def test_a_randomized_decomposition_starts_on_the_same_function_and_nearly_the_same_factors():
    exact, quick = small(), small("method.pissa.svd_iterations=16")
    batch = quick.window(0).micros[0]
    with torch.no_grad():
        assert torch.equal(quick.model(batch["ids"]).logits, quick.pristine()(batch["ids"]).logits)
    for name, delta in adapter(quick).deltas.items():
        W = delta.layer.weight
        best = torch.linalg.svdvals(W)[4:].norm()
        left = (W - delta.scale * delta.B0 @ delta.A0).norm()
        assert best * (1 - 1e-6) <= left < best * 1.0005, name
        assert not torch.equal(delta.B, adapter(exact).deltas[name].B)
    again = adapter(small("method.pissa.svd_iterations=16")).deltas
    assert all(torch.equal(delta.B, again[name].B) for name, delta in adapter(quick).deltas.items())


def test_dropout_falls_on_the_live_factors_alone():
    run = build("method=pissa", "model=toy", "method.pissa.targets=[linear]", "method.pissa.dropout=0.5", "method.pissa.rank=2")
    scramble(run)
    (delta,) = adapter(run).deltas.values()
    x, W = torch.randn(7, 16), run.model.layer.weight
    run.model.train()
    with torch.no_grad():
        torch.manual_seed(5)
        y = run.model(x)
        torch.manual_seed(5)
        dropped = torch.nn.functional.dropout(x, 0.5)
        torch.testing.assert_close(y, x @ (W - delta.B0 @ delta.A0).T + dropped @ (delta.B @ delta.A).T, atol=1e-5, rtol=0)
        run.model.eval()
        torch.testing.assert_close(run.model(x), x @ (W + delta.delta()).T, atol=1e-5, rtol=0)


def test_a_change_of_a_factor_is_not_lost_in_16_bits():
    """A factor that grew by 0.1 % rounds to what it was in bfloat16; the update must be there all the same."""
    run = build("method=pissa", *SMALL, "method.pissa.rank=16", "model.dtype=bfloat16", "hardware.precision=bf16")
    delta = next(iter(adapter(run).deltas.values()))
    x = torch.randn(256, delta.layer.module.in_features, dtype=torch.bfloat16)
    with torch.no_grad():
        delta.A.mul_(1.001)
        moved = delta(x, torch.zeros(256, delta.layer.shape[0], dtype=torch.bfloat16)).float()
        wanted = x.float() @ (0.001 * delta.B0 @ delta.A0).T
    assert delta.A0.bfloat16().mul(1.001).equal(delta.A0.bfloat16())
    assert (moved - wanted).norm() < 0.02 * wanted.norm()


# -- the record --------------------------------------------------------------------------------------------------------


def test_the_base_stays_and_the_record_holds_the_start_beside_the_factors(tmp_path):
    run = check_resume("method=pissa", *SMALL, "method.pissa.rank=4", "trainer.max_steps=5", "optimizer.lr=1e-2", folder=tmp_path, at=4)
    base = dict(run.pristine().named_parameters())
    assert all(torch.equal(p, base[n]) for n, p in run.model.named_parameters() if n in base)
    saved = load_file(tmp_path / "resumed" / "tuned" / "weights.safetensors")
    assert {name.rpartition(".")[2] for name in saved} == {"A", "B", "A0", "B0"}


def test_it_leaves_for_peft_as_a_lora_of_twice_the_rank_on_the_untouched_base(tmp_path):
    run = train("method=pissa", *SMALL, "method.pissa.rank=4", "trainer.max_steps=3", "optimizer.lr=1e-2", folder=tmp_path / "run")
    folder = export.export(str(tmp_path / "run"), "peft")
    theirs = PeftModel.from_pretrained(run.pristine(), str(folder)).eval()
    assert theirs.peft_config["default"].r == 8
    batch = run.window(0).micros[0]
    with torch.no_grad():
        torch.testing.assert_close(theirs(batch["ids"]).logits, run.model.eval()(batch["ids"]).logits, atol=1e-5, rtol=0)


# -- agreement with peft -----------------------------------------------------------------------------------------------


def test_peft_starts_with_the_same_factors_up_to_signs():
    run = small("method.pissa.alpha=6")
    config = LoraConfig(target_modules=list(adapter(run).deltas), r=4, lora_alpha=6, lora_dropout=0.0, init_lora_weights="pissa")
    peer = get_peft_model(run.pristine(), config)
    for name, delta in adapter(run).deltas.items():
        layer = peer.base_model.model.get_submodule(name)
        A, B = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
        sign = torch.sign((A * delta.A.detach()).sum(1))
        close(delta.A.detach() * sign[:, None], A, f"A of {name}", 1e-4)
        close(delta.B.detach() * sign, B, f"B of {name}", 1e-4)
        close(delta.layer.weight - delta.scale * delta.B0 @ delta.A0, layer.base_layer.weight.detach(), f"base of {name}", 1e-5)


def test_peft_on_equal_weights_and_inputs():
    """Outputs, gradients, merged weights, and ten updates of AdamW with clipping."""
    run = small("method.pissa.alpha=6")
    peer = twin(run, r=4, lora_alpha=6, init_lora_weights="pissa")
    (batch,) = run.window(0)
    with torch.no_grad():
        close(run.model(batch["ids"]).logits, peer(batch["ids"]).logits, "logits", 1e-5)
    run.gradients(run.window(0))
    language_loss(peer, batch).backward()
    compared = 0
    for name, ours, theirs in pairs(run, peer):
        close(ours.grad, theirs.grad, f"gradient of {name}", 2e-5)
        compared += 1
    assert compared == len(run.trainable()) == len([p for p in peer.parameters() if p.requires_grad])
    start = weights(run)
    run.fit(10)
    plain_loop(run, peer, language_loss, 10, lr=1e-3)
    for name, ours, theirs in pairs(run, peer):
        close(ours, theirs, f"{name} after ten updates", 1e-3)  # Adam turns rounding of a small gradient into a share of its step
    assert all((p - start[n]).abs().max() > 1e-3 for n, p in run.trainable().items())
    merged = run.merge().state_dict()
    for name, value in peer.merge_and_unload().state_dict().items():
        close(merged[name], value, f"merged {name}", 1e-3)
