"""(IA)^3: scaled keys, values and feed-forward activations, which fold into the weights, and agreement with `peft`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peers import language_loss, plain_loop
from peft import IA3Config, PeftModel, get_peft_model
from tools import SMALL, build, train
from torch import nn

from ftrecipes import export
from ftrecipes.errors import UserError
from ftrecipes.methods.adapters.activation import Affine
from ftrecipes.run import Run

MUTATION = (
    "ftrecipes/methods/adapters/activation.py",
    "return self._scaled(x, x) if self.before else x",
    "return self._scaled(x, x) if not self.before else x",
)
GPT2 = (
    "model=gpt2", "model.weights=random", "data=storyqa", "data.max_length=64", "data.size=64", "trainer.batch=8", "trainer.eval_examples=8",
    "model.architecture={n_layer:2,n_embd:32,n_head:2,vocab_size:1100,bos_token_id:1,eos_token_id:2,resid_pdrop:0,embd_pdrop:0,attn_pdrop:0}",
)  # fmt: skip
STEADY = ("optimizer=adamw", "schedule=constant", "schedule.warmup=0", "optimizer.lr=1e-2")


def inserts(run: Run) -> dict[str, Affine]:
    return run.stack.methods[0].inserts  # type: ignore[attr-defined]


@torch.no_grad()
def scramble(run: Run) -> None:
    rng = torch.Generator().manual_seed(1)
    for insert in inserts(run).values():
        insert.scale.add_(0.3 * torch.randn(insert.scale.shape, generator=rng))


def twin(run: Run) -> Any:
    """peft's model of the run, with the run's numbers."""
    forward = [name for name, insert in inserts(run).items() if insert.before]
    config = IA3Config(target_modules=list(inserts(run)), feedforward_modules=forward, fan_in_fan_out="gpt2" in run.settings.model.name)
    model = get_peft_model(run.pristine(), config)
    with torch.no_grad():
        for ours, theirs in pairs(run, model):
            theirs.copy_(ours.view_as(theirs))
    return model


def pairs(run: Run, model: Any) -> list[tuple[nn.Parameter, nn.Parameter]]:
    layers = model.base_model.model
    return [(insert.scale, layers.get_submodule(name).ia3_l["default"]) for name, insert in inserts(run).items()]


@pytest.mark.parametrize("words", [SMALL, GPT2], ids=["llama", "gpt2"])
def test_outputs_gradients_and_ten_updates_agree_with_peft(words: tuple[str, ...]) -> None:
    run = build("method=ia3", *words, *STEADY)
    scramble(run)
    model = twin(run)
    (batch,) = run.window(0)
    mask = (batch["segment"] >= 0).long()
    with torch.no_grad():
        real = mask.bool()
        ours = run.model(input_ids=batch["ids"], attention_mask=mask).logits[real]
        torch.testing.assert_close(ours, model(input_ids=batch["ids"], attention_mask=mask).logits[real], rtol=1e-5, atol=1e-5)
    loss = language_loss(model, batch)
    loss.backward()
    torch.testing.assert_close(run.gradients(run.window(0)), loss.detach(), rtol=1e-5, atol=1e-6)
    for ours, theirs in pairs(run, model):
        torch.testing.assert_close(ours.grad, theirs.grad.flatten(), rtol=1e-4, atol=1e-6)
    run.model.train()
    run.fit(10)
    plain_loop(run, model, language_loss, 10, lr=1e-2)
    for ours, theirs in pairs(run, model):
        torch.testing.assert_close(ours, theirs.flatten(), rtol=1e-3, atol=1e-4)
        assert (ours.detach() - 1).abs().max() > 0.05


def test_it_starts_at_the_base_with_two_key_widths_and_one_feed_forward_width_a_block() -> None:
    run = build("method=ia3", *SMALL)
    config = run.model.config
    keys = config.num_key_value_heads * config.head_dim
    assert sum(p.numel() for p in run.trainable().values()) == config.num_hidden_layers * (2 * keys + config.intermediate_size)
    ids = run.window(0).micros[0]["ids"]
    with torch.no_grad():
        assert torch.equal(run.model(ids).logits, run.pristine()(ids).logits)


def test_the_inside_of_the_feed_forward_layer_is_scaled_and_not_its_output() -> None:
    run = build("method=ia3", *SMALL)
    scramble(run)
    mlp, scales = run.model.model.layers[1].mlp, inserts(run)["model.layers.1.mlp.down_proj"].scale
    x = torch.randn(3, run.model.config.hidden_size)
    with torch.no_grad():
        inside = nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
        torch.testing.assert_close(mlp(x), (inside * scales) @ mlp.down_proj.weight.T, rtol=1e-5, atol=1e-6)
        k = run.model.model.layers[1].self_attn.k_proj
        wanted = (x @ k.weight.T) * inserts(run)["model.layers.1.self_attn.k_proj"].scale
        torch.testing.assert_close(k(x), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("words", [SMALL, GPT2], ids=["llama", "gpt2"])
def test_merged_weights_are_those_of_peft(words: tuple[str, ...]) -> None:
    run = build("method=ia3", *words)
    scramble(run)
    ids = run.window(0).micros[0]["ids"]
    with torch.no_grad():
        wanted = run.model.eval()(ids).logits
    theirs = dict(twin(run).merge_and_unload().named_parameters())
    merged = run.merge()
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, wanted, rtol=1e-4, atol=1e-5)
    for name, ours in merged.named_parameters():
        torch.testing.assert_close(ours, theirs[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("words", [(*SMALL, "model.also_train=[norm]"), GPT2], ids=["llama", "gpt2"])
def test_exported_it_loads_in_peft(words: tuple[str, ...], tmp_path: Path) -> None:
    train("method=ia3", *words, *STEADY, "trainer.max_steps=2", folder=tmp_path / "run")
    run = Run.open(tmp_path / "run")
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        wanted = run.model(ids).logits
        loaded = PeftModel.from_pretrained(run.pristine(), str(export.export(str(tmp_path / "run"), "peft")))
        torch.testing.assert_close(loaded.eval()(ids).logits, wanted, rtol=1e-5, atol=1e-5)
        assert (wanted - run.pristine().eval()(ids).logits).abs().max() > 1e-4
        start = build("method=full", *(w for w in words if "also_train" not in w), f"model.adapter={tmp_path / 'run' / 'export-peft'}")
        torch.testing.assert_close(start.model.eval()(ids).logits, wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match=r"--rank is of updates that a LoRA approximates; peft holds ia3 itself"):
        export.export(str(tmp_path / "run"), "peft", str(tmp_path / "other"), 4)


def test_beside_another_adapter_it_is_not_exported(tmp_path: Path) -> None:
    train("method=[ia3,lora]", "method.lora.targets=[q]", *SMALL, "trainer.max_steps=1", folder=tmp_path / "run")
    with pytest.raises(UserError, match="peft holds ia3 alone, and lora changed the model too"):
        export.export(str(tmp_path / "run"), "peft")


def test_only_the_input_of_a_matrix_is_scaled() -> None:
    with pytest.raises(UserError, match=r"ia3 cannot scale the input of model\.embed_tokens \(Embedding\)"):
        build("method=ia3", "method.ia3.targets=[embed]", "method.ia3.feedforward=[embed]", *SMALL)
