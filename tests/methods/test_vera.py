"""VeRA: two vectors a layer around shared random matrices, agreeing with `peft`."""

from __future__ import annotations

import pytest
import torch
from peers import adapter, language_loss, plain_loop, scramble
from peft import VeraConfig, get_peft_model
from safetensors.torch import load_file
from tools import SMALL, build, train

from ftrecipes.run import Run

MUTATION = ("ftrecipes/methods/adapters/vera.py", "math.sqrt(6 / self.rank)", "math.sqrt(6 / rows)")
STEADY = ("schedule=constant", "schedule.warmup=0", "optimizer.lr=1e-2")


def small(*words: str) -> Run:
    return build("method=vera", *SMALL, "method.vera.rank=12", *words)


def twin(run: Run):
    """peft's model with its own draw of the random matrices and the run's vectors."""
    config = VeraConfig(target_modules=list(adapter(run).deltas), r=12, projection_prng_key=7, vera_dropout=0.0)
    model = get_peft_model(run.pristine(), config)
    with torch.no_grad():
        for _, ours, theirs in pairs(run, model):
            theirs.copy_(ours)
    return model


def pairs(run: Run, model):
    for name, delta in adapter(run).deltas.items():
        layer = model.base_model.model.get_submodule(name)
        yield f"{name}.d", delta.d, layer.vera_lambda_d["default"]
        yield f"{name}.b", delta.b, layer.vera_lambda_b["default"]


def test_the_start_is_the_base_model_and_the_count_is_r_plus_out():
    run = small()
    batch = run.window(0).micros[0]
    with torch.no_grad():
        assert torch.equal(run.model(batch["ids"]).logits, run.pristine()(batch["ids"]).logits)
    for name, delta in adapter(run).deltas.items():
        own = {n.rpartition(".")[2]: p for n, p in run.trainable().items() if n.startswith(f"{name}.")}
        assert {n: p.numel() for n, p in own.items()} == {"d": 12, "b": delta.layer.shape[0]}
        assert (own["d"] == 0.1).all() and not own["b"].any()


def test_the_random_matrices_are_one_pair_for_all_layers():
    run = small()
    deltas = list(adapter(run).deltas.values())
    assert len({d.A.data_ptr() for d in deltas}) == len({d.B.data_ptr() for d in deltas}) == 1
    assert deltas[0].A.shape == (12, 128) and deltas[0].B.shape == (128, 12)  # the most inputs and the most outputs
    for delta in deltas:
        rows, cols = delta.layer.shape
        B, A = delta.sliced()
        assert B.equal(deltas[0].B[:rows]) and A.equal(deltas[0].A[:, :cols])
    assert not any(p is deltas[0].A or p is deltas[0].B for p in run.trainable().values())
    assert not deltas[0].A.equal(next(iter(adapter(small("method.vera.projection_seed=1")).deltas.values())).A)
    assert deltas[0].A.equal(next(iter(adapter(small("seed=1")).deltas.values())).A)


def test_peft_draws_the_same_matrices_and_agrees_in_everything():
    run = small("method.vera.projection_seed=7", *STEADY, "optimizer.weight_decay=0.1")
    scramble(run, size=0.3)
    peer = twin(run)
    delta = next(iter(adapter(run).deltas.values()))
    assert delta.A.equal(peer.base_model.vera_A["default"]) and delta.B.equal(peer.base_model.vera_B["default"])
    (batch,) = run.window(0)
    with torch.no_grad():
        torch.testing.assert_close(run.model(batch["ids"]).logits, peer(batch["ids"]).logits, atol=1e-5, rtol=1e-5)
    run.gradients(run.window(0))
    language_loss(peer, batch).backward()
    for name, ours, theirs in pairs(run, peer):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-4, msg=name)
    assert len(run.trainable()) == len([p for p in peer.parameters() if p.requires_grad])
    run.fit(10)
    plain_loop(run, peer, language_loss, 10, lr=1e-2, decay=0.1)
    for name, ours, theirs in pairs(run, peer):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0, msg=name)
        theirs.data.copy_(ours)
    merged = run.merge().state_dict()
    for name, value in peer.merge_and_unload().state_dict().items():
        torch.testing.assert_close(merged[name], value, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_formula(dropout):
    """y = W x + b * (B (d * (A dropout(x))))."""
    run = build("method=vera", "model=toy", "method.vera.targets=[linear]", "method.vera.rank=5", f"method.vera.dropout={dropout}")
    scramble(run, size=1)
    (delta,) = adapter(run).deltas.values()
    x, W = torch.randn(7, 16), run.model.layer.weight.detach()
    with torch.no_grad():
        run.model.train()
        torch.manual_seed(3)
        y = run.model(x)
        torch.manual_seed(3)
        xd = torch.nn.functional.dropout(x, dropout)
        B, A = delta.sliced()
        torch.testing.assert_close(y, x @ W.T + delta.b * ((delta.d * (xd @ A.T)) @ B.T))
        factors = delta.factors()
        torch.testing.assert_close(factors.B @ factors.A, delta.delta())
        assert int(torch.linalg.matrix_rank(delta.delta())) == 5


def test_the_record_holds_vectors_alone_and_opens_again(tmp_path):
    run = train("method=vera", *SMALL, "method.vera.rank=12", "trainer.max_steps=3", "optimizer.lr=3e-2", folder=tmp_path)
    saved = load_file(tmp_path / "tuned" / "weights.safetensors")
    assert {name.rpartition(".")[2] for name in saved} == {"d", "b"}
    again, batch = Run.open(tmp_path), run.window(0).micros[0]
    with torch.no_grad():
        logits = run.model(batch["ids"]).logits
        assert torch.equal(again.model(batch["ids"]).logits, logits)
        torch.testing.assert_close(again.merge()(batch["ids"]).logits, logits, atol=1e-5, rtol=0)
