"""BitFit: biases train and nothing else does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tools import SMALL, build, check_resume, train, weights
from transformers import AutoModelForImageClassification

from ftrecipes import export
from ftrecipes.errors import UserError

MUTATION = ("ftrecipes/methods/selection/bitfit.py", 'getattr(part.module, "bias", None)', 'getattr(part.module, "weight", None)')
VIT = (
    "model=tiny-vit", "model.weights=random", "data.size=64", "trainer.batch=8", "trainer.eval_examples=16", "trainer.max_steps=4",
    "model.architecture={num_hidden_layers:2,hidden_size:24,intermediate_size:32,num_attention_heads:2,patch_size:8}",
)  # fmt: skip


def test_exactly_the_biases_train_and_move() -> None:
    run = build("method=bitfit", *VIT, "schedule.warmup=0")
    start = weights(run)
    biases = {name for name in start if name.endswith(".bias")}
    assert set(run.trainable()) == biases and len(biases) == run.events["biases"]
    # q, k, v, o, fc2 and two norms have d each, fc1 its width; patches, last norm and head besides
    assert sum(p.numel() for p in run.trainable().values()) == 2 * (7 * 24 + 32) + 24 + 24 + len(run.task.labels)
    run.fit(3)
    moved = {name for name, now in weights(run).items() if not torch.equal(now, start[name])}
    # a bias of keys shifts all scores of a query alike, which softmax does not see: its gradient is rounding
    assert biases - moved <= {name for name in biases if "k_proj" in name} and moved <= biases


def test_the_gradient_of_a_bias_is_the_sum_over_rows() -> None:
    run = build("method=bitfit", "model=toy", "model.bias=true", "model.dtype=float64", "trainer.batch=16")
    assert set(run.trainable()) == {"layer.bias"}
    (batch,) = run.window(0)
    with torch.no_grad():
        error = (run.model(batch["x"].double()) - batch["y"].double()) / 16
    run.gradients(run.window(0))
    torch.testing.assert_close(run.model.layer.bias.grad, error.sum(0), rtol=1e-12, atol=1e-12)


def test_the_smaller_set_of_the_paper() -> None:
    run = build("method=bitfit", "method.bitfit.targets=[q,up]", "method.bitfit.blocks=last-1", *VIT)
    assert set(run.trainable()) == {"vit.layers.1.attention.q_proj.bias", "vit.layers.1.mlp.fc1.bias"}


def test_a_model_without_biases_is_refused() -> None:
    with pytest.raises(UserError, match=r"bitfit: tiny-llama has no bias .*nothing would train"):
        build("method=bitfit", *SMALL)


def test_the_record_holds_biases_alone_and_the_model_stays_plain(tmp_path: Path) -> None:
    run = train("method=bitfit", *VIT, folder=tmp_path / "run")
    batch = run.window(0).micros[0]
    folder = export.merge(str(tmp_path / "run"))
    with torch.no_grad():
        wanted = run.model.eval()(pixel_values=batch["pixels"]).logits
        assert torch.equal(AutoModelForImageClassification.from_pretrained(folder)(pixel_values=batch["pixels"]).logits, wanted)
    with pytest.raises(UserError, match="bitfit changes the weights themselves"):
        export.export(str(tmp_path / "run"), "peft")


def test_a_resumed_run_is_bit_equal(tmp_path: Path) -> None:
    check_resume("method=bitfit", *VIT, "trainer.max_steps=5", folder=tmp_path, at=4)
