"""Full fine-tuning: every weight trains, as in a plain torch loop."""

from __future__ import annotations

import pytest
import torch
from peers import language_loss, plain_loop
from safetensors.torch import load_file
from tools import SMALL, build, toy_data, train, weights

from ftrecipes.compose import compose
from ftrecipes.errors import UserError
from ftrecipes.run import Run

MUTATION = ("ftrecipes/methods/regimes/full.py", "run.model.requires_grad_(True)", "run.model.get_decoder().layers.requires_grad_(True)")


def test_every_weight_trains_and_moves():
    run = build("method=full", *SMALL, "optimizer.lr=1e-3", "schedule=constant", "schedule.warmup=0")
    assert run.trainable().keys() == dict(run.model.named_parameters()).keys()
    assert sum(p.numel() for p in run.trainable().values()) == sum(p.numel() for p in run.pristine().parameters())
    start = weights(run)
    run.fit(2)
    seen = {int(token) for step in range(2) for batch in run.window(step) for token in batch["ids"].unique()}
    for name, now in weights(run).items():
        moved = now != start[name]
        if "embed_tokens" in name:  # tied to the head, whose gradient reaches every token
            assert len(seen) < len(moved) and moved.any(1).all()
        else:
            assert moved.any(), name


def test_ten_updates_equal_a_plain_loop():
    """AdamW with clipping; matrices are decayed, norms are not."""
    words = ("schedule=constant", "schedule.warmup=0", "optimizer.lr=1e-3", "optimizer.weight_decay=0.1", "trainer.clip=0.5")
    run = build("method=full", *SMALL, *words)
    peer = run.pristine()
    run.fit(10)
    plain_loop(run, peer, language_loss, 10, lr=1e-3, decay=0.1, clip=0.5)
    start = run.pristine().state_dict()
    for name, theirs in peer.named_parameters():
        ours = run.trainable()[name]
        moved = (theirs - start[name]).norm()
        assert moved > 0 and (ours - theirs).norm() < 1e-3 * moved, name


def test_a_norm_without_gradient_is_not_decayed_and_a_matrix_is():
    run = build("method=full", *SMALL, "optimizer.weight_decay=0.5")
    decay = {p: group["weight_decay"] for group in run.build_optimizer().param_groups for p in group["params"]}
    assert len(decay) == len(run.trainable())
    for name, parameter in run.trainable().items():
        assert decay[parameter] == (0.0 if "norm" in name else 0.5), name


def test_the_whole_distance_to_any_target_can_be_gone():
    """On unit rows the loss is half the squared distance of the weights, over their number: all of it goes."""
    target = torch.randn(16, 16, dtype=torch.float64)
    rows = toy_data("anywhere", torch.eye(16, dtype=torch.float64), target.T)
    run = build("method=full", "model=toy", "model.dtype=float64", f"data={rows}", "trainer.batch=16", "trainer.clip=.inf",
                "optimizer=sgd", "optimizer.lr=16", "schedule=constant", "schedule.warmup=0")  # fmt: skip
    W = run.model.layer.weight.detach().clone()
    assert float(run.loss(run.window(0))) == pytest.approx(float((W - target).square().sum()) / 32)
    run.fit(1)  # one gradient step of the right length is the answer
    torch.testing.assert_close(run.model.layer.weight.detach(), target, atol=1e-12, rtol=0)


def test_the_record_holds_all_weights_and_opens_again(tmp_path):
    run = train("method=full", *SMALL, "trainer.max_steps=2", folder=tmp_path)
    saved = load_file(tmp_path / "tuned" / "weights.safetensors")
    assert set(saved) == set(run.trainable())
    again = Run.open(tmp_path)
    assert again.model.lm_head.weight is again.model.model.embed_tokens.weight
    for name, value in weights(run).items():
        assert torch.equal(weights(again)[name], value), name


def test_16_bit_weights_train_in_float32():
    """A step of 1e-5 is lost in bfloat16."""
    run = build("method=full", *SMALL, "model.dtype=bfloat16", "hardware.precision=bf16-mixed", "optimizer.lr=1e-5")
    assert {p.dtype for p in run.trainable().values()} == {torch.float32}
    start = weights(run)
    run.fit(1)
    moved = torch.cat([(now != start[name]).flatten() for name, now in weights(run).items()])
    assert moved.float().mean() > 0.9


@pytest.mark.parametrize("other", ["lora", "dora", "svft", "periodic_lora", "linear_probe", "lift"])
def test_nothing_else_can_pick_what_trains(other):
    with pytest.raises(UserError, match="full trains every weight, the other freezes them; keep one of them"):
        compose([f"method=[full,{other}]"])
