"""Prompt tuning: vectors in front of the input, seen by nobody but the model, and agreement with `peft`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peers import language_loss, plain_loop
from peft import PeftModel, PromptTuningConfig, TaskType, get_peft_model
from tools import SMALL, build, check_resume, train, weights
from torch import Tensor

from ftrecipes import export
from ftrecipes.compose import compose
from ftrecipes.errors import UserError
from ftrecipes.methods.adapters.activation import Prompt
from ftrecipes.plan import plan
from ftrecipes.run import Run

MUTATION = (
    "ftrecipes/methods/adapters/activation.py",
    "ordinal = begins.cumsum(1)",
    "ordinal = begins[:, :1].long().cumsum(1).expand(B, L)",
)
STEADY = ("optimizer=adamw", "schedule=constant", "schedule.warmup=0", "optimizer.lr=1e-2")
SHORT = ("method.prompt_tuning.length=5",)
GPT2 = (
    "model=gpt2", "model.weights=random", "data=storyqa", "data.max_length=64", "data.size=64", "trainer.batch=8", "trainer.eval_examples=8",
    "model.architecture={n_layer:2,n_embd:32,n_head:2,vocab_size:1100,bos_token_id:1,eos_token_id:2,resid_pdrop:0,embd_pdrop:0,attn_pdrop:0}",
)  # fmt: skip


def small(*words: str) -> Run:
    return build("method=prompt_tuning", *SHORT, *SMALL, *words)


def prompt(run: Run) -> Prompt:
    return run.model.get_decoder().prompt


def twin(run: Run) -> Any:
    """peft's model of the run, with the run's vectors."""
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=len(prompt(run).table))
    model = get_peft_model(run.pristine(), config)
    model.prompt_encoder["default"].embedding.weight.data.copy_(prompt(run).table)
    return model


def theirs(model: Any) -> torch.nn.Parameter:
    return model.prompt_encoder["default"].embedding.weight


def by_hand(run: Run, ids: Tensor) -> Tensor:
    """Logits (L, V) of one sequence with the vectors in front of it, by the untouched model."""
    base: Any = run.pristine().eval()
    rows = torch.cat([prompt(run).table, base.get_input_embeddings()(ids)])[None]
    return base(inputs_embeds=rows).logits[0, -len(ids) :]


# -- agreement ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [SMALL, GPT2], ids=["llama", "gpt2"])
def test_outputs_gradients_and_ten_updates_agree_with_peft(words: tuple[str, ...]) -> None:
    run = build("method=prompt_tuning", *SHORT, *words, *STEADY)
    model = twin(run)
    (batch,) = run.window(0)
    mask = (batch["segment"] >= 0).long()
    with torch.no_grad():
        ours = run.model(input_ids=batch["ids"], attention_mask=mask).logits
        wanted = model(input_ids=batch["ids"], attention_mask=mask).logits[:, 5:]
        torch.testing.assert_close(ours[mask.bool()], wanted[mask.bool()], rtol=1e-5, atol=1e-5)
    loss = language_loss(model, batch)
    loss.backward()
    torch.testing.assert_close(run.gradients(run.window(0)), loss.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(prompt(run).table.grad, theirs(model).grad, rtol=1e-4, atol=1e-7)
    start = prompt(run).table.detach().clone()
    run.model.train()
    run.fit(10)
    plain_loop(run, model, language_loss, 10, lr=1e-2)
    torch.testing.assert_close(prompt(run).table, theirs(model), rtol=1e-3, atol=2e-4)
    assert (prompt(run).table.detach() - start).abs().max() > 0.05


def test_exported_it_loads_in_peft(tmp_path: Path) -> None:
    train("method=prompt_tuning", *SHORT, *SMALL, *STEADY, "trainer.max_steps=2", folder=tmp_path / "run")
    run = Run.open(tmp_path / "run")
    loaded = PeftModel.from_pretrained(run.pristine(), str(export.export(str(tmp_path / "run"), "peft"))).eval()
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(run.model(ids).logits, loaded(ids).logits[:, 5:], rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="prompt_tuning cannot be folded into plain weights: its vectors stand in front of the input"):
        export.merge(str(tmp_path / "run"))
    with pytest.raises(UserError, match=r"prompt_tuning cannot be folded .*--to peft holds them"):
        build("method=lora", *SMALL, f"model.adapter={tmp_path / 'run'}")


# -- masks, positions, packing -----------------------------------------------------------------------------------------


def test_each_example_of_a_batch_is_as_it_is_alone() -> None:
    run = small()
    (batch,) = run.window(0)
    with torch.no_grad():
        run.model.eval()
        for how in ({}, {"attention_mask": (batch["segment"] >= 0).long()}):
            logits = run.model(input_ids=batch["ids"], **how).logits
            for row in range(3):
                n = int((batch["segment"][row] >= 0).sum())
                torch.testing.assert_close(logits[row, :n], by_hand(run, batch["ids"][row, :n]), rtol=1e-4, atol=1e-5)


def test_padding_on_the_left_changes_nothing() -> None:
    run = small()
    ids = torch.arange(30, 42)
    padded = torch.cat([torch.zeros(4, dtype=torch.long), ids])[None]
    mask = torch.tensor([[0] * 4 + [1] * 12])
    with torch.no_grad():
        logits = run.model(input_ids=padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).logits[0, 4:]
        torch.testing.assert_close(logits, by_hand(run, ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_examples_each_have_the_prompt_and_do_not_see_one_another(attention: str) -> None:
    words = (f"model.attention={attention}", "data.max_length=128")
    plain, packed = small(*words), small(*words, "data.packing=true")
    positions = list(range(8))
    apart, together = plain.data["train"].batch(positions), packed.data["train"].batch(positions)
    assert len(together["ids"]) < len(apart["ids"]), "nothing was packed"
    with torch.no_grad():
        one = plain.task.outputs(plain.model.eval(), apart)
        other = packed.task.outputs(packed.model.eval(), together)
    assert one.row.bincount().equal(other.row.bincount())
    for example in range(8):
        torch.testing.assert_close(one.logps[one.row == example], other.logps[other.row == example], rtol=1e-4, atol=1e-4)
    a, b = plain.window(0), packed.window(0)
    plain.gradients(a)
    packed.gradients(b)
    torch.testing.assert_close(prompt(plain).table.grad, prompt(packed).table.grad, rtol=1e-3, atol=1e-6)


def test_generation_with_a_cache_is_greedy_choice_without_one() -> None:
    run = small(*STEADY)
    run.fit(3)
    ids = torch.arange(30, 40)
    grown = ids
    with torch.no_grad():
        for _ in range(6):
            grown = torch.cat([grown, by_hand(run, grown)[-1].argmax()[None]])
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        with_cache = run.model.generate(ids[None], attention_mask=torch.ones(1, 10, dtype=torch.long), **options)[0]
        assert torch.equal(with_cache, grown)
        assert torch.equal(run.model.generate(ids[None], use_cache=False, **options)[0], grown)
        two = torch.stack([torch.cat([torch.zeros(2, dtype=torch.long), ids[:8]]), ids])  # padding on the left
        mask = torch.tensor([[0, 0] + [1] * 8, [1] * 10])
        both = run.model.generate(two, attention_mask=mask, **options)
        assert torch.equal(both[1], grown)
        assert torch.equal(both[0, 2:], run.model.generate(ids[None, :8], **options)[0])
        beams = run.model.generate(ids[None], num_beams=3, **options)
        assert beams.shape == (1, 16)


# -- starts ------------------------------------------------------------------------------------------------------------


def test_starts() -> None:
    run = small()
    embedding = run.pristine().get_input_embeddings().weight
    rows = (prompt(run).table[:, None] == embedding[None]).all(-1).nonzero()[:, 1]
    assert len(rows) == 5 == len(set(rows.tolist())), "drawn without replacement"
    assert not set(rows.tolist()) & set(run.task.tokenizer.all_special_ids)
    text = small("method.prompt_tuning.init=text", "method.prompt_tuning.text='the fox'")
    ids = run.task.tokenizer("the fox", add_special_tokens=False)["input_ids"]
    wanted = embedding[torch.tensor((ids * 5)[:5])]
    assert torch.equal(prompt(text).table, wanted)
    uniform = build("method=prompt_tuning", "method.prompt_tuning.init=uniform", "method.prompt_tuning.length=50", *SMALL)
    table = prompt(uniform).table.detach()
    assert table.abs().max() <= 0.5 and table.std() == pytest.approx(1 / 12**0.5, rel=0.03)


def test_a_text_in_front_is_what_the_start_says() -> None:
    """With the embeddings of a text as its vectors, the model answers as if the text stood there."""
    run = small("method.prompt_tuning.init=text", "method.prompt_tuning.text='Once a small fox'", "method.prompt_tuning.length=4")
    front = run.task.tokenizer("Once a small fox", add_special_tokens=False)["input_ids"][:4]
    assert len(front) == 4
    ids = torch.arange(30, 40)
    with torch.no_grad():
        wanted = run.pristine().eval()(torch.cat([torch.tensor(front), ids])[None]).logits[0, 4:]
        torch.testing.assert_close(run.model.eval()(ids[None]).logits[0], wanted, rtol=1e-4, atol=1e-5)


# -- the run -----------------------------------------------------------------------------------------------------------


def test_the_vectors_alone_train_and_are_all_that_the_record_holds(tmp_path: Path) -> None:
    run = train("method=prompt_tuning", *SHORT, *SMALL, *STEADY, "trainer.max_steps=3", folder=tmp_path)
    assert set(run.trainable()) == {"model.prompt.table"}
    start = dict(run.pristine().named_parameters())
    assert all(torch.equal(now, start[name]) for name, now in weights(run).items() if name in start)
    again = Run.open(tmp_path)
    assert torch.equal(prompt(again).table, prompt(run).table)
    assert sum(f.stat().st_size for f in (tmp_path / "tuned").iterdir()) < 10_000


def test_a_resumed_run_is_bit_equal(tmp_path: Path) -> None:
    check_resume(
        "method=prompt_tuning", *SHORT, *SMALL, "model.architecture.num_hidden_layers=1", "trainer.max_steps=5", folder=tmp_path, at=4
    )


def test_plans_count_the_longer_rows() -> None:
    shape = (*SMALL, "hardware.micro_batch=4", "data.max_length=64")
    found = [plan(compose(["method=prompt_tuning", f"method.prompt_tuning.length={n}", *shape])) for n in (1, 65)]
    assert [f.trainable for f in found] == [64, 65 * 64]
    assert found[1].memory["activations"] > 1.4 * found[0].memory["activations"]


def test_bad_input() -> None:
    with pytest.raises(UserError, match=r"prompt_tuning\.length=600: with data\.max_length=\d+ that is more than the 512 positions"):
        build("method=prompt_tuning", "method.prompt_tuning.length=600", "method.prompt_tuning.init=uniform", *SMALL)
    with pytest.raises(UserError, match="init=text needs text="):
        small("method.prompt_tuning.init=text")
    with pytest.raises(UserError, match=r"the vocabulary has .* entries to draw from; use init=uniform"):
        build("method=prompt_tuning", "method.prompt_tuning.length=6000", *SMALL)
    with pytest.raises(UserError, match="prompt_tuning and wise_ft cannot stack: a prompt has no start"):
        compose(["method=[prompt_tuning,wise_ft]"])
    with pytest.raises(UserError, match="prompt_tuning is for causal-lm"):
        compose(["method=prompt_tuning", "model=tiny-vit"])
