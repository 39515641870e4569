"""Prefix-tuning: keys and values that every query can read, and agreement with `peft`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peers import language_loss, plain_loop
from peft import PeftModel, PrefixTuningConfig, TaskType, get_peft_model
from tools import SMALL, build, check_resume, train, weights
from torch import Tensor

from ftrecipes import export
from ftrecipes.errors import UserError
from ftrecipes.methods.adapters.activation import Prefix
from ftrecipes.methods.adapters.prefix_tuning import Made
from ftrecipes.run import Run

MUTATION = (
    "ftrecipes/methods/adapters/activation.py",
    "mask = torch.ones(Q, K, dtype=torch.bool, device=key.device).tril(K - Q)[None, None]",
    "mask = torch.ones(Q, K, dtype=torch.bool, device=key.device)[None, None]",
)
STEADY = ("optimizer=adamw", "schedule=constant", "schedule.warmup=0", "optimizer.lr=1e-2")
SHORT = ("method.prefix_tuning.length=5", "method.prefix_tuning.projection=0")
GPT2 = (
    "model=gpt2", "model.weights=random", "data=storyqa", "data.max_length=64", "data.size=64", "trainer.batch=8", "trainer.eval_examples=8",
    "model.architecture={n_layer:2,n_embd:32,n_head:2,vocab_size:1100,bos_token_id:1,eos_token_id:2,resid_pdrop:0,embd_pdrop:0,attn_pdrop:0}",
)  # fmt: skip
VIT = (
    "model=tiny-vit", "model.weights=random", "data.size=64", "trainer.batch=8", "trainer.eval_examples=16",
    "model.architecture={num_hidden_layers:2,hidden_size:24,intermediate_size:32,num_attention_heads:2,patch_size:8}",
)  # fmt: skip


def small(*words: str) -> Run:
    return build("method=prefix_tuning", *SHORT, *SMALL, *words)


def prefix(run: Run) -> Prefix:
    return run.model.prefix


def twin(run: Run) -> Any:
    """peft's model of the run, with the run's numbers."""
    ours, heads = prefix(run), prefix(run).heads
    network = isinstance(ours, Made)
    sizes = {"encoder_hidden_size": ours.W1.shape[0], "prefix_projection": True} if network else {}
    if network:  # peft's embedding has the width of the keys, which is the model's where every head has keys
        assert ours.table.shape[1] == heads * ours.width
    n = len(ours.table)
    model = get_peft_model(run.pristine(), PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=n, **sizes))
    with torch.no_grad():
        for mine, other in pairs(run, model):
            other.copy_(mine)
    return model


def pairs(run: Run, model: Any) -> list[tuple[Tensor, Tensor]]:
    ours, encoder = prefix(run), model.prompt_encoder["default"]
    found = [(ours.table, encoder.embedding.weight)]
    if isinstance(ours, Made):
        first, _, second = encoder.transform
        found += [(ours.W1, first.weight), (ours.b1, first.bias), (ours.W2, second.weight), (ours.b2, second.bias)]
    return found


# -- agreement ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [(*SMALL, *SHORT), (*GPT2, *SHORT), (*GPT2, "method.prefix_tuning.length=5", "method.prefix_tuning.projection=16")],
    ids=["llama", "gpt2", "gpt2 with the network"],
)  # fmt: skip
def test_outputs_gradients_and_ten_updates_agree_with_peft(words: tuple[str, ...]) -> None:
    run = build("method=prefix_tuning", *words, *STEADY)
    model = twin(run)
    (batch,) = run.window(0)
    mask = (batch["segment"] >= 0).long()
    with torch.no_grad():
        real = mask.bool()
        ours = run.model(input_ids=batch["ids"], attention_mask=mask).logits[real]
        torch.testing.assert_close(ours, model(input_ids=batch["ids"], attention_mask=mask).logits[real], rtol=1e-5, atol=1e-5)
        assert (ours - run.pristine()(input_ids=batch["ids"], attention_mask=mask).logits[real]).abs().max() > 1e-2
    loss = language_loss(model, batch)
    loss.backward()
    torch.testing.assert_close(run.gradients(run.window(0)), loss.detach(), rtol=1e-5, atol=1e-6)
    for mine, other in pairs(run, model):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-7)
    start = prefix(run).table.detach().clone()
    run.model.train()
    run.fit(10)
    plain_loop(run, model, language_loss, 10, lr=1e-2)
    for mine, other in pairs(run, model):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3)
    assert (prefix(run).table.detach() - start).abs().max() > 0.05


@pytest.mark.parametrize("network", [False, True])
def test_exported_it_loads_in_peft(network: bool, tmp_path: Path) -> None:
    """The network is dropped at the end: what is saved is the table that it made."""
    words = ("method.prefix_tuning.projection=16",) if network else ()
    run = train("method=prefix_tuning", *SHORT, *SMALL, *STEADY, *words, "trainer.max_steps=2", folder=tmp_path / "run")
    assert type(prefix(run)) is Prefix and prefix(run).table.shape == (5, 2 * 2 * 2 * prefix(run).width)
    again = Run.open(tmp_path / "run")
    assert set(dict(again.model.named_parameters())) == set(dict(again.pristine().named_parameters())) | {"prefix.table"}
    loaded = PeftModel.from_pretrained(again.pristine(), str(export.export(str(tmp_path / "run"), "peft"))).eval()
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(again.model(ids).logits, run.model(ids).logits, rtol=0, atol=0)
        torch.testing.assert_close(again.model(ids).logits, loaded(ids).logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="prefix_tuning cannot be folded into plain weights: its keys and values belong to no token"):
        export.merge(str(tmp_path / "run"))


def test_the_network_and_the_table_that_it_made_say_the_same() -> None:
    run = small("method.prefix_tuning.projection=16")
    ids = run.window(0).micros[0]["ids"]
    with torch.no_grad():
        before = run.model.eval()(ids).logits
        run.stack.finish(run)
        torch.testing.assert_close(run.model(ids).logits, before, rtol=1e-5, atol=1e-5)


# -- the definition ----------------------------------------------------------------------------------------------------


def test_layout() -> None:
    """Column ((2 layer + s) heads + head) width + entry of row t; the table of another library is this one."""
    heads, width, layers = 2, 3, 2
    table = 1000 * torch.arange(4.0)[:, None] + torch.arange(2 * layers * heads * width)
    keys, values = Prefix(torch.nn.Parameter(table), heads, width).of(1)
    assert keys.shape == values.shape == (heads, 4, width)
    assert keys[0, 0, 0] == 2 * heads * width and values[1, 2, 0] == 2000 + 3 * heads * width + width


def test_attention_is_a_mixture_of_the_plain_one_and_one_over_the_prefix() -> None:
    """out = (1 - lambda) Attn(Q, K, V) + lambda Attn(Q, P_K, P_V), lambda the mass that a query puts on the prefix."""
    run = build("method=prefix_tuning", *SHORT, *VIT)
    attention, base = run.model.vit.layers[1].attention, run.pristine().vit.layers[1].attention
    keys, values = prefix(run).of(1)
    x = torch.randn(2, 7, 24)

    def split(y: Tensor) -> Tensor:
        return y.view(2, 7, 2, 12).transpose(1, 2)

    with torch.no_grad():
        q, k, v = (split(getattr(base, f"{name}_proj")(x)) for name in "qkv")
        own, other = q @ k.transpose(-1, -2) / 12**0.5, q @ keys.transpose(-1, -2) / 12**0.5
        mass = torch.cat([other, own], -1).softmax(-1)[..., :5].sum(-1, keepdim=True)
        mixed = (1 - mass) * (own.softmax(-1) @ v) + mass * (other.softmax(-1) @ values)
        wanted = base.o_proj(mixed.transpose(1, 2).reshape(2, 7, 24))
        torch.testing.assert_close(attention(x)[0], wanted, rtol=1e-5, atol=1e-5)
    assert 0.05 < mass.mean() < 0.95


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_examples_all_see_the_prefix_and_not_one_another(attention: str, checkpointing: bool) -> None:
    words = (f"model.attention={attention}", f"hardware.checkpointing={str(checkpointing).lower()}", "data.max_length=128")
    plain, packed = small("model.attention=sdpa", "data.max_length=128"), small(*words, "data.packing=true")
    positions = list(range(8))
    apart, together = plain.data["train"].batch(positions), packed.data["train"].batch(positions)
    assert len(together["ids"]) < len(apart["ids"]), "nothing was packed"
    with torch.no_grad():
        one = plain.task.outputs(plain.model.eval(), apart)
        other = packed.task.outputs(packed.model.eval(), together)
    for example in range(8):
        torch.testing.assert_close(one.logps[one.row == example], other.logps[other.row == example], rtol=1e-4, atol=1e-4)
    for run in (plain, packed):
        run.model.train()
        run.gradients(run.window(0))
    torch.testing.assert_close(prefix(plain).table.grad, prefix(packed).table.grad, rtol=1e-3, atol=1e-6)
    assert prefix(plain).table.grad.abs().max() > 1e-6


def test_later_tokens_are_not_seen() -> None:
    run = small()
    ids = torch.arange(30, 42)[None]
    changed = ids.clone()
    changed[0, 8:] += 5
    with torch.no_grad():
        a, b = run.model.eval()(ids).logits, run.model(changed).logits
    torch.testing.assert_close(a[:, :8], b[:, :8], rtol=1e-5, atol=1e-6)
    assert (a[:, 8:] - b[:, 8:]).abs().max() > 1e-3


def test_generation_with_a_cache_is_greedy_choice_without_one_and_the_cache_holds_tokens_alone() -> None:
    run = small(*STEADY)
    run.fit(3)
    run.model.eval()
    grown = ids = torch.arange(30, 40)
    with torch.no_grad():
        for _ in range(6):
            grown = torch.cat([grown, run.model(grown[None]).logits[0, -1].argmax()[None]])
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        out = run.model.generate(ids[None], attention_mask=torch.ones(1, 10, dtype=torch.long), return_dict_in_generate=True, **options)
        assert torch.equal(out.sequences[0], grown)
        assert out.past_key_values.get_seq_length() == 15
        two = torch.stack([torch.cat([torch.zeros(2, dtype=torch.long), ids[:8]]), ids])  # padding on the left
        both = run.model.generate(two, attention_mask=torch.tensor([[0, 0] + [1] * 8, [1] * 10]), **options)
        assert torch.equal(both[1], grown)
        assert torch.equal(both[0, 2:], run.model.generate(ids[None, :8], **options)[0])
        assert run.model.generate(ids[None], num_beams=3, **options).shape == (1, 16)


@pytest.mark.parametrize("words", [SMALL, GPT2], ids=["llama", "gpt2"])
def test_a_prefix_of_a_texts_activations_is_that_text_in_front(words: tuple[str, ...]) -> None:
    run = build("method=prefix_tuning", *SHORT, *words, "method.prefix_tuning.init=text", "method.prefix_tuning.text='Once a small fox'")
    front = (run.task.tokenizer("Once a small fox", add_special_tokens=False)["input_ids"] * 3)[:5]
    ids = torch.arange(30, 40)
    with torch.no_grad():
        wanted = run.pristine().eval()(torch.cat([torch.tensor(front), ids])[None]).logits[0, 5:]
        torch.testing.assert_close(run.model.eval()(ids[None]).logits[0], wanted, rtol=1e-4, atol=1e-5)


# -- the run -----------------------------------------------------------------------------------------------------------


def test_some_blocks_alone_have_it() -> None:
    run = small("method.prefix_tuning.blocks=last-1")
    first, second = (layer.self_attn for layer in run.model.model.layers)
    assert not hasattr(first, "prefixed") and second.prefixed == (prefix(run), 0)
    assert prefix(run).table.shape[1] == 2 * 2 * prefix(run).width
    with pytest.raises(UserError, match="peft has prefixes in all layers"):
        run.stack.methods[0].peft(run)


def test_beside_a_prompt_the_order_does_not_matter() -> None:
    words = ("method.prompt_tuning.length=3", *SHORT, *SMALL, "data.max_length=128", "data.packing=true")
    runs = [build(f"method=[{stack}]", *words) for stack in ("prompt_tuning,prefix_tuning", "prefix_tuning,prompt_tuning")]
    batch = runs[0].window(0).micros[0]
    ids = torch.arange(30, 40)[None]
    with torch.no_grad():
        a, b = (run.task.outputs(run.model.eval(), batch).logps for run in runs)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        a, b = (run.model(ids).logits for run in runs)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        kept = [run.model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None) for run in runs]
        assert torch.equal(*kept)


def test_images() -> None:
    run = build("method=prefix_tuning", *SHORT, *VIT, *STEADY)
    start = weights(run)
    run.fit(3)
    assert {name for name, now in weights(run).items() if not torch.equal(now, start[name])} == {"prefix.table"}


@pytest.mark.parametrize("projection", [0, 16])
def test_a_resumed_run_is_bit_equal(projection: int, tmp_path: Path) -> None:
    words = (*SHORT, f"method.prefix_tuning.projection={projection}", *SMALL, "model.architecture.num_hidden_layers=1")
    check_resume("method=prefix_tuning", *words, "trainer.max_steps=5", folder=tmp_path, at=4)


def test_bad_input() -> None:
    with pytest.raises(UserError, match=r"prefix_tuning\.length=600: with data\.max_length=\d+ that is more than the 512 positions"):
        small("method.prefix_tuning.length=600")
    with pytest.raises(UserError, match=r"init=text starts the table of a language model; it needs prefix_tuning\.projection=0"):
        small("method.prefix_tuning.init=text", "method.prefix_tuning.text=fox", "method.prefix_tuning.projection=4")
    with pytest.raises(UserError, match="prefix_tuning is for causal-lm, vit"):
        build("method=prefix_tuning", "model=toy")
