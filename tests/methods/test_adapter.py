"""Bottleneck adapters: where they stand, how they start, and that no weight can hold them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tools import SMALL, build, check_resume, train, weights
from torch import nn
from torch.nn import functional as F

from ftrecipes import export
from ftrecipes.errors import UserError
from ftrecipes.methods.adapters.adapter import Bottleneck
from ftrecipes.run import Run

MUTATION = ("ftrecipes/methods/adapters/adapter.py", "h = y if tap is None else tap.take()", "h = y")
PARALLEL = ("method.adapter.placement=parallel", "method.adapter.scale=4", "method.adapter.activation=relu", "method.adapter.norms=false")


def bottlenecks(run: Run) -> dict[str, Bottleneck]:
    return {name: i for name, i in run.stack.methods[0].inserts.items() if isinstance(i, Bottleneck)}  # type: ignore[attr-defined]


@torch.no_grad()
def scramble(run: Run) -> None:
    rng = torch.Generator().manual_seed(1)
    for insert in bottlenecks(run).values():
        for parameter in insert.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=rng))


def bottleneck(insert: Bottleneck, h: torch.Tensor, activation: str = "gelu") -> torch.Tensor:
    inside = h @ insert.down.T + insert.down_bias
    inside = F.gelu(inside, approximate="tanh") if activation == "gelu" else F.relu(inside)
    return inside @ insert.up.T + insert.up_bias


@pytest.mark.parametrize(("placement", "sites"), [("houlsby", 2), ("pfeiffer", 1), ("parallel", 1)])
def test_counts(placement: str, sites: int) -> None:
    """2 d b + b + d at each place; with the norms' gains besides, d each."""
    run = build("method=adapter", f"method.adapter.placement={placement}", "method.adapter.size=8", *SMALL)
    d, blocks = run.model.config.hidden_size, run.model.config.num_hidden_layers
    norms = (2 * blocks + 1) * d
    assert sum(p.numel() for p in run.trainable().values()) == blocks * sites * (2 * d * 8 + 8 + d) + norms
    assert run.events["places"] == blocks * (1 if placement == "pfeiffer" else 2)  # beside a layer it also reads where that begins


def test_it_starts_near_the_identity_cut_off_at_two_deviations() -> None:
    run = build("method=adapter", "method.adapter.size=48", *SMALL)
    numbers = torch.cat([t.flatten() for i in bottlenecks(run).values() for t in (i.down, i.up)]).detach()
    assert numbers.abs().max() <= 0.02 and numbers.std() == pytest.approx(0.01 * 0.88, rel=0.03)  # of a normal cut off at two
    ids = run.window(0).micros[0]["ids"]
    with torch.no_grad():
        base = run.pristine()(ids).logits
        start = run.model(ids).logits
        assert 0 < (start - base).abs().max() < 0.05
        exact = build("method=adapter", "method.adapter.init=zero_up", *SMALL)
        assert torch.equal(exact.model(ids).logits, base)
    assert all(i.down.any() and not i.up.any() for i in bottlenecks(exact).values())


def test_behind_a_sub_layer_and_before_the_residual_sum() -> None:
    run = build("method=adapter", *SMALL)
    scramble(run)
    plain = run.pristine()
    block, base, found = run.model.model.layers[1], plain.model.layers[1], bottlenecks(run)
    x = torch.randn(1, 5, run.model.config.hidden_size)
    place = plain.model.rotary_emb(x, torch.arange(5)[None])
    with torch.no_grad():
        y = base.self_attn(base.input_layernorm(x), position_embeddings=place, attention_mask=None)[0]
        h = x + y + bottleneck(found["model.layers.1.self_attn.o_proj"], y)
        y = base.mlp(base.post_attention_layernorm(h))
        wanted = h + y + bottleneck(found["model.layers.1.mlp.down_proj"], y)
        torch.testing.assert_close(block(x, position_embeddings=place, attention_mask=None), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_beside_the_feed_forward_layer_it_reads_what_that_reads(checkpointing: bool) -> None:
    run = build("method=adapter", *PARALLEL, *SMALL, f"hardware.checkpointing={str(checkpointing).lower()}")
    scramble(run)
    mlp, base = run.model.model.layers[0].mlp, run.pristine().model.layers[0].mlp
    x = torch.randn(2, 3, run.model.config.hidden_size)
    insert = bottlenecks(run)["model.layers.0.mlp.down_proj"]
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), base(x) + 4 * bottleneck(insert, x, "relu"), rtol=1e-4, atol=1e-4)
    run.model.train()
    run.gradients(run.window(0))
    other = build("method=adapter", *PARALLEL, *SMALL)
    scramble(other)
    other.model.train()
    other.gradients(other.window(0))
    for name, parameter in run.trainable().items():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, other.trainable()[name].grad, rtol=1e-4, atol=1e-6)


def test_adapters_and_norms_alone_move() -> None:
    run = build("method=adapter", *SMALL, "optimizer.lr=1e-2")
    start = weights(run)
    run.fit(3)
    for name, now in weights(run).items():
        assert torch.equal(now, start[name]) == (".inserted." not in name and "norm" not in name), name
    assert "model.norm.weight" in run.trainable()
    frozen = build("method=adapter", "method.adapter.norms=false", *SMALL)
    assert all(".inserted." in name for name in frozen.trainable())


def test_it_is_not_merged_exported_or_folded_into_a_start(tmp_path: Path) -> None:
    train("method=adapter", *SMALL, "trainer.max_steps=2", folder=tmp_path / "run")
    reason = "adapter cannot be folded into plain weights: it is non-linear, so it stays a module of its own"
    with pytest.raises(UserError, match=reason):
        export.merge(str(tmp_path / "run"))
    with pytest.raises(UserError, match=reason):
        build("method=lora", *SMALL, f"model.adapter={tmp_path / 'run'}")
    with pytest.raises(UserError, match="peft has no form for adapter: it is non-linear"):
        export.export(str(tmp_path / "run"), "peft")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_a_resumed_run_is_bit_equal(tmp_path: Path) -> None:
    check_resume("method=adapter", *SMALL, "model.architecture.num_hidden_layers=1", "trainer.max_steps=5", folder=tmp_path, at=4)


def test_parallel_needs_a_feed_forward_layer() -> None:
    with pytest.raises(UserError, match="name nothing in toy"):
        build("method=adapter", *PARALLEL, "model=toy")


def test_a_linear_bottleneck_is_a_low_rank_update() -> None:
    """Without an activation y + U (D y + b) + c is (I + U D) W x + …: what it adds has at most the rank of its width."""
    run = build("method=adapter", "method.adapter.activation=none", "method.adapter.placement=pfeiffer", "method.adapter.size=3", *SMALL)
    scramble(run)
    down, base = run.model.model.layers[0].mlp.down_proj, run.pristine().model.layers[0].mlp.down_proj
    assert isinstance(down, nn.Linear)
    x = torch.randn(200, down.in_features)
    with torch.no_grad():
        added = down(x) - base(x)
        added -= down(torch.zeros(1, down.in_features))
    values = torch.linalg.svdvals(added)
    assert values[2] > 1e-2 and values[3] < 1e-4
