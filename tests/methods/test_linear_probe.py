"""Linear probing: the head alone trains, on features that never move."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from tools import SMALL, build, toy_data, train, weights

from ftrecipes.errors import UserError
from ftrecipes.run import Run

MUTATION = ("ftrecipes/methods/regimes/linear_probe.py", "if part.name in tied:", "if part.name in {}:")
STEADY = ("schedule=constant", "schedule.warmup=0", "optimizer.lr=1e-2")


def probe(*words: str) -> Run:
    return build("method=linear_probe", *SMALL, *STEADY, *words)


def test_the_head_alone_trains():
    run = probe()
    assert set(run.trainable()) == {"lm_head.weight"}
    start = weights(run)
    run.fit(3)
    for name, now in weights(run).items():
        assert torch.equal(now, start[name]) == (name != "lm_head.weight"), name


def test_a_tied_head_gets_a_weight_of_its_own_equal_to_the_embedding_at_the_start():
    run = probe()
    assert run.pristine().config.tie_word_embeddings and not run.model.config.tie_word_embeddings
    embedding = run.model.model.embed_tokens.weight
    assert run.model.lm_head.weight is not embedding and torch.equal(run.model.lm_head.weight, embedding)
    batch = run.window(0).micros[0]
    with torch.no_grad():
        assert torch.equal(run.model(batch["ids"]).logits, run.pristine()(batch["ids"]).logits)
    run.fit(2)
    assert torch.equal(embedding, run.pristine().model.embed_tokens.weight)


def test_features_are_those_of_the_pretrained_model():
    run = probe()
    run.fit(3)
    ids = run.window(0).micros[0]["ids"]
    with torch.no_grad():
        assert torch.equal(run.model.model(ids).last_hidden_state, run.pristine().model(ids).last_hidden_state)
        assert not torch.equal(run.model(ids).logits, run.pristine()(ids).logits)


def test_the_gradient_is_that_of_a_softmax_regression_on_the_features():
    run = probe()
    (batch,) = run.window(0)
    run.gradients(run.window(0))
    with torch.no_grad():
        features = run.pristine().model(batch["ids"]).last_hidden_state[:, :-1]
        labels = batch["labels"][:, 1:]
        features, labels = features[labels != -100], labels[labels != -100]
        error = torch.softmax(features @ run.model.lm_head.weight.T, -1)
        error[torch.arange(len(labels)), labels] -= 1
    torch.testing.assert_close(run.model.lm_head.weight.grad, error.T @ features / len(labels), atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
def test_training_reaches_the_least_squares_solution_on_frozen_features(bias):
    """Two layers: the first is a fixed feature map, so the best head is a linear problem with one answer."""
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(200, 6, generator=rng, dtype=torch.float64), torch.randn(200, 3, generator=rng, dtype=torch.float64)
    shape = ("model.inputs=6", "model.outputs=3", "model.hidden=8", "model.bias=true", "model.dtype=float64", "model.kind=two_layer")
    run = build("method=linear_probe", "model=toy", *shape, f"data={toy_data('features', x, y)}", f"method.linear_probe.bias={bias}",
                "trainer.batch=200", "trainer.clip=.inf", "optimizer.lr=0.1", "schedule.warmup=0")  # fmt: skip
    assert set(run.trainable()) == ({"layer.weight", "layer.bias"} if bias else {"layer.weight"})
    first = run.model.first.weight.detach().clone()
    run.fit(600)
    assert torch.equal(run.model.first.weight, first)
    with torch.no_grad():
        features = torch.nn.functional.gelu(run.model.first(x))
        if bias:
            features = torch.cat([features, torch.ones(200, 1, dtype=torch.float64)], 1)
        best = torch.linalg.lstsq(features, y).solution.T
        ours = torch.cat([run.model.layer.weight, run.model.layer.bias[:, None]], 1) if bias else run.model.layer.weight
    torch.testing.assert_close(ours, best, atol=1e-4, rtol=0)


def test_the_record_holds_the_head_alone_and_opens_again(tmp_path):
    run = train("method=linear_probe", *SMALL, "trainer.max_steps=3", "optimizer.lr=1e-2", folder=tmp_path)
    saved = load_file(tmp_path / "tuned" / "weights.safetensors")
    assert set(saved) == {"lm_head.weight"}
    again = Run.open(tmp_path)
    for name, value in weights(run).items():
        assert torch.equal(weights(again)[name], value), name
    assert torch.equal(again.model.model.embed_tokens.weight, run.pristine().model.embed_tokens.weight)


def test_an_adapter_elsewhere_can_train_beside_it():
    run = build("method=[lora,linear_probe]", *SMALL, *STEADY)
    named = set(run.trainable())
    assert "lm_head.weight" in named and "model.layers.0.self_attn.q_proj.delta.A" in named
    assert named == {"lm_head.weight"} | {name for name in named if ".delta." in name}


def test_a_model_without_a_head_is_refused():
    with pytest.raises(UserError, match="linear_probe: toy has no head"):
        build("method=linear_probe", "model=toy")
