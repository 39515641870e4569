"""Language models: what is learned of an example, packed rows, micro-batches, the head in chunks, and what is measured."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tools import SMALL, build
from transformers import AutoConfig, AutoTokenizer, Gemma2Config, Gemma3TextConfig, LlamaConfig
from transformers import AutoModelForCausalLM as Auto

from ftrecipes.data.base import Splits
from ftrecipes.errors import UserError
from ftrecipes.models.base import PACKAGED
from ftrecipes.registry import data as register_data
from ftrecipes.tasks import causal_lm
from ftrecipes.tasks.causal_lm import IGNORE, CausalLM, pack, vocabulary

MUTATION = (
    "ftrecipes/tasks/causal_lm.py",
    'position[r, span] = torch.arange(e["length"])',
    'position[r, span] = torch.arange(at, at + e["length"])',
)

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
# Reasoning of an answer is written while no further turn follows, and dropped (with its empty frame) afterwards.
REASONING = (
    "{% for m in messages %}{% set text = m['content'] %}"
    "{% if m['role'] == 'assistant' %}{% set bare = text.split('</think>')[-1].lstrip('\\n') %}"
    "{% if loop.last %}{% set text = text if '</think>' in text else '<think>\\n\\n</think>\\n\\n' + bare %}"
    "{% else %}{% set text = bare %}{% endif %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + text + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TEMPLATES = {"tiny-llama": (None, "<|end|>"), "chatml": (CHATML, "<|im_end|>"), "llama3": (LLAMA3, "<|eot_id|>")}
SPECIALS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
TURNS = [
    {"role": "system", "content": "Answer in one word."},
    {"role": "user", "content": "Mia has 3 apples. Who has apples?"},
    {"role": "assistant", "content": "Mia."},
    {"role": "user", "content": "How many?"},
    {"role": "assistant", "content": "It is 3, I say."},
]


def make_task(template: str | None = None, rendering: str = "auto", **options: Any) -> CausalLM:
    """The task with tiny-llama's tokenizer and a chat template, its own unless another is given; '' for none."""
    tokenizer = AutoTokenizer.from_pretrained(PACKAGED / "tiny-llama")
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIALS})
    if template is not None:
        tokenizer.chat_template = template or None
    return CausalLM(tokenizer, template=rendering, **{"max_length": 128, **options})


def model_of(family: str, **changes: Any) -> Any:
    """A small random model whose logits depend strongly on what it sees."""
    shape = {
        "vocab_size": 1040, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "initializer_range": 0.3,
    }  # fmt: skip
    configs: dict[str, Any] = {
        "llama": lambda: LlamaConfig(**{**shape, **changes}),
        "gemma3": lambda: Gemma3TextConfig(
            **{**shape, "head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"], **changes}
        ),
        "gemma2": lambda: Gemma2Config(**{**shape, "head_dim": 8, "attn_implementation": "eager", **changes}),
    }
    torch.manual_seed(0)
    return Auto.from_config(configs[family]()).eval()


def questions(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Examples of unequal lengths, one in three a text."""
    r = random.Random(seed)
    words = ["Mia", "has", "apples", "and", "the", "green", "ball", "walks", "to", "market", "now"]
    out: list[dict[str, Any]] = []
    for i in range(n):
        prompt = " ".join(r.choices(words, k=r.randint(2, 14)))
        out.append({"text": prompt} if i % 3 == 2 else {"prompt": prompt, "response": " ".join(r.choices(words, k=r.randint(1, 4)))})
    return out


def collate(task: CausalLM, examples: list[dict[str, Any]]) -> dict[str, Any]:
    return {**task.collate([task.encode(e) for e in examples]), "example": torch.arange(len(examples))}


def learned(task: CausalLM, example: dict[str, Any]) -> str:
    """What the labels of an example read as."""
    encoded = task.encode(example)
    return str(task.tokenizer.decode(encoded["labels"][encoded["labels"] != IGNORE]))


# -- what is learned ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEMPLATES)
def test_labels_are_the_answers_and_their_ends(name: str) -> None:
    template, end = TEMPLATES[name]
    task = make_task(template)
    assert learned(task, {"messages": TURNS}) == f"Mia.{end}It is 3, I say.{end}"
    assert learned(task, {"prompt": "How many?", "response": "It is 3.", "system": "Be brief."}) == f"It is 3.{end}"
    encoded = task.encode({"messages": TURNS})
    text = task.render(TURNS, prompt=False)
    assert list(encoded["ids"]) == task.tokenizer(text, add_special_tokens=False)["input_ids"]  # nothing put before or behind
    assert encoded["units"] == (encoded["labels"] != IGNORE).sum()
    prompt = task.tokenizer(task.render(TURNS[:4], prompt=True), add_special_tokens=False)["input_ids"]
    last = task.tokenizer(f"It is 3, I say.{end}", add_special_tokens=False)["input_ids"]
    assert list(encoded["ids"][: len(prompt)]) == prompt
    assert list(encoded["labels"][len(prompt) : len(prompt) + len(last)]) == last
    assert (encoded["labels"][len(prompt) + len(last) :] == IGNORE).all()


@pytest.mark.parametrize("name", TEMPLATES)
def test_other_answers_stand_in_the_place_of_the_last_one(name: str) -> None:
    template, end = TEMPLATES[name]
    task = make_task(template)
    example = {"messages": TURNS, "others": ["No.", "It is 4."]}
    encoded = task.encode(example)
    assert learned(task, example) == f"It is 3, I say.{end}"  # earlier answers are the same for all and do not count
    assert [task.tokenizer.decode(o["labels"][o["labels"] != IGNORE]) for o in encoded["others"]] == [f"No.{end}", f"It is 4.{end}"]
    at = int((encoded["labels"] != IGNORE).argmax())
    assert all(list(o["ids"][:at]) == list(encoded["ids"][:at]) for o in encoded["others"])
    pairs = [task.encode({"prompt": "How many?", "response": f"{i}.", "others": [f"{i} and {i}."]}) for i in range(3)]
    batch = task.collate(pairs)
    assert batch["others"]["owner"].tolist() == [0, 1, 2]
    assert task.cost(pairs) == batch["ids"].numel() + batch["others"]["ids"].numel()
    assert task.count(batch) == sum(p["units"] for p in pairs)
    task.unit = "example"
    assert task.count(task.collate(pairs)) == task.units(pairs) == 3
    with pytest.raises(ValueError, match="nothing to learn"):
        task.encode({"prompt": "word " * 200, "response": "a", "others": ["b"]})


def test_texts_and_completions_are_raw() -> None:
    task = make_task()
    begin, end = task.tokenizer.bos_token_id, task.tokenizer.eos_token_id
    text = task.encode({"text": "Mia has a ball."})
    assert text["ids"][0] == begin and text["ids"][-1] == end and text["labels"][0] == IGNORE
    assert list(text["labels"][1:]) == list(text["ids"][1:])
    raw = {"prompt": "Mia has 3", "completion": " apples."}
    encoded = task.encode(raw)
    assert task.tokenizer.decode(encoded["ids"]) == "<|begin|>Mia has 3 apples.<|end|>"
    assert learned(task, raw) == " apples.<|end|>"


def test_tokens_across_the_border_are_split_as_generation_sees_them() -> None:
    task = make_task()
    whole = task.tokenizer("Mia eats apples", add_special_tokens=False)["input_ids"]
    prompt = task.tokenizer("Mia eats ", add_special_tokens=False)["input_ids"]
    assert whole[: len(prompt)] != prompt  # ' apples' is one token
    encoded = task.encode({"prompt": "Mia eats ", "completion": "apples"})
    assert list(encoded["ids"][1 : 1 + len(prompt)]) == prompt
    assert learned(task, {"prompt": "Mia eats ", "completion": "apples"}) == "apples<|end|>"


def test_plain_template_where_the_tokenizer_has_none() -> None:
    for task in (make_task(""), make_task(CHATML, rendering="plain")):
        encoded = task.encode({"messages": TURNS})
        assert task.tokenizer.decode(encoded["ids"]) == "<|begin|>" + "\n".join(m["content"] for m in TURNS) + "<|end|>"
        assert learned(task, {"prompt": "How many?", "response": "It is 3."}) == "It is 3.<|end|>"
        assert task.stop_tokens == [task.tokenizer.eos_token_id]


def test_template_that_writes_no_end_gets_one() -> None:
    bare = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    task = make_task(bare)
    assert learned(task, {"prompt": "How many?", "response": "Three."}).rstrip("\n").replace("\n", "") == "Three.<|end|>"
    assert task.stop_tokens == [task.tokenizer.eos_token_id]


def test_stop_tokens_are_what_the_template_closes_with() -> None:
    for template, end in TEMPLATES.values():
        task = make_task(template)
        assert task.stop_tokens == sorted({task.tokenizer.eos_token_id, task.tokenizer.convert_tokens_to_ids(end)})


def test_answers_that_a_template_rewrites() -> None:
    task = make_task(REASONING)
    assert learned(task, {"messages": TURNS}) == "Mia.<|im_end|><think>\n\n</think>\n\nIt is 3, I say.<|im_end|>"
    assert task.encode({"messages": TURNS})["lost"] == []
    turns = copy.deepcopy(TURNS)
    turns[2]["content"] = "<think>\nonly she\n</think>\n\nMia."  # gone once the next turn follows: it cannot be learned there
    assert learned(task, {"messages": turns}) == "<think>\n\n</think>\n\nIt is 3, I say.<|im_end|>"
    assert task.encode({"messages": turns})["lost"] == ["answers of earlier turns, which the chat template rewrites"]


def test_template_that_refuses_says_so() -> None:
    task = make_task("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system prompt') }}{% endif %}" + CHATML)
    with pytest.raises(ValueError, match="the chat template refuses it: no system prompt"):
        task.encode({"messages": TURNS})
    assert learned(task, {"messages": TURNS[1:]}).startswith("Mia.<|im_end|>")


def test_truncation_keeps_the_beginning_and_teaches_no_end() -> None:
    task = make_task()
    example = {"prompt": "Mia has apples.", "response": "the ball walks to market " * 4}
    whole = task.encode(example)
    short = make_task(max_length=whole["length"] - 5)
    cut = short.encode(example)
    assert cut["length"] == whole["length"] - 5 and cut["lost"] == [f"their end at data.max_length={short.max_length} tokens"]
    assert np.array_equal(cut["ids"], whole["ids"][:-5]) and np.array_equal(cut["labels"], whole["labels"][:-5])
    assert short.tokenizer.eos_token_id not in cut["labels"]
    with pytest.raises(ValueError, match=f"data.max_length=4 of {whole['length']} tokens"):
        make_task(max_length=4).encode(example)


def test_notes_count_what_was_skipped_and_cut() -> None:
    rows = [{"prompt": "Mia " * n, "response": "ball"} for n in (3, 40, 5, 60)] + [
        {"prompt": "Mia", "response": "ball " * 40, "place": "my.jsonl:5"}
    ]
    register_data("uneven")(lambda knobs, domain: Splits(rows, rows[:1], rows[:1], notes=["read"]))
    run = build(*(w for w in SMALL if "size" not in w), "data=uneven", "data.max_length=24")
    assert run.data["train"].keep == [0, 2, 4]
    assert run.data_notes[0] == "read"
    assert run.data_notes[1].startswith("train: skipped 2 of 5 examples (first number 2: nothing to learn stands within its first")
    assert run.data_notes[2] == "train: 1 of 5 examples lost their end at data.max_length=24 tokens (first my.jsonl:5)"


# -- packing, padding, micro-batches -----------------------------------------------------------------------------------


def alone(model: Any, task: CausalLM, example: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and losses of an example by the model itself, without anything beside it."""
    encoded = task.encode(example)
    ids, labels = torch.tensor(encoded["ids"])[None].long(), torch.tensor(encoded["labels"]).long()
    logits = model(input_ids=ids).logits[0, :-1]
    at = labels[1:] != IGNORE
    return logits[at], F.cross_entropy(logits[at], labels[1:][at], reduction="none")


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("packing", [False, True])
def test_batched_examples_are_as_alone(family: str, packing: bool) -> None:
    model, task = model_of(family), make_task(packing=packing, max_length=48)
    examples = questions(9)
    batch = collate(task, examples)
    with torch.no_grad():
        outputs = task.outputs(model, batch)
        logits, losses = outputs.logits(), task.losses(outputs, batch)
        wanted = [alone(model, task, example) for example in examples]
    assert (len(batch["ids"]) < len(examples)) == packing
    assert len(losses) == task.count(batch) == sum(len(loss) for _, loss in wanted)
    for i, (own, loss) in enumerate(wanted):
        assert torch.allclose(logits[outputs.row == i], own, atol=1e-4), f"logits of example {i}"
        assert torch.allclose(losses[outputs.row == i], loss, atol=1e-4), f"losses of example {i}"
    if packing:  # the same rows, did they see each other, would be far off
        with torch.no_grad():
            seen = task.outputs(model, {**batch, "position": torch.arange(batch["ids"].shape[1]).repeat(len(batch["ids"]), 1)})
        assert (seen.logits() - logits).abs().max() > 0.1


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_gradient_does_not_depend_on_the_split(family: str) -> None:
    model = model_of(family).double()
    examples = questions(9, seed=1)

    def gradient(size: int, packing: bool) -> torch.Tensor:
        task = make_task(packing=packing, max_length=48)
        model.zero_grad()
        batches = [collate(task, examples[at : at + size]) for at in range(0, len(examples), size)]
        units = sum(task.count(b) for b in batches)
        for batch in batches:
            (task.losses(task.outputs(model, batch), batch).sum() / units).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    model.zero_grad()
    losses = torch.cat([alone(model, make_task(), example)[1] for example in examples])
    losses.mean().backward()
    wanted = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert wanted.abs().max() > 0.01
    for size in (1, 3, len(examples)):
        for packing in (False, True):
            off = (gradient(size, packing) - wanted).abs().max() / wanted.abs().max()
            assert off < 1e-5, f"micro-batches of {size}, packing={packing}: {off}"


def test_window_of_a_run_does_not_depend_on_micro_batch_or_packing() -> None:
    """Through compose, the data set and the real update; unequal lengths."""
    rows = questions(16, seed=2)
    register_data("mixed")(lambda knobs, domain: Splits(rows, rows[:2], rows[:2]))
    words = ["method=full", "data=mixed", *(w for w in SMALL if "size" not in w)]
    found = {}
    for micro in ("1", "3", "8", "auto"):
        for packing in ("false", "true"):
            run = build(*words, f"hardware.micro_batch={micro}", f"data.packing={packing}")
            loss = run.gradients(run.window(0))
            found[micro, packing] = (float(loss), torch.cat([p.grad.flatten() for p in run.trainable().values() if p.grad is not None]))
            assert len(run.window(0)) == {"1": 8, "3": 3, "8": 1, "auto": 1}[micro]
    loss, gradient = found["1", "false"]
    for split, (other_loss, other) in found.items():
        assert other_loss == pytest.approx(loss, rel=1e-5), split
        assert (other - gradient).abs().max() < 2e-5 * gradient.abs().max(), split


def test_pack_fills_rows_and_loses_nothing() -> None:
    r = random.Random(0)
    encoded = [{"length": r.randint(1, 40)} for _ in range(60)]
    rows = pack(encoded, 40)
    assert sorted(i for row in rows for i in row) == list(range(60))
    assert all(sum(encoded[i]["length"] for i in row) <= 40 for row in rows)
    assert len(rows) <= 1.25 * sum(e["length"] for e in encoded) / 40 + 1


def test_flash_attention_gets_one_row() -> None:
    """Its kernels find packed examples in a single row only; laid out so, the results are the same."""
    model, task = model_of("llama"), make_task(packing=True, max_length=40)
    batch = collate(task, questions(9))
    assert len(batch["ids"]) > 1
    with torch.no_grad():
        rows = task.outputs(model, batch).logits()
        shapes = []
        model.get_decoder().register_forward_pre_hook(lambda m, a, k: shapes.append(k["input_ids"].shape), with_kwargs=True)
        model.config = copy.deepcopy(model.config)  # the decoder keeps its own, and computes as before
        model.config._attn_implementation = "flash_attention_2"
        one = task.outputs(model, batch).logits()
    assert shapes[0][0] == 1
    assert torch.allclose(rows, one, atol=1e-4)


# -- the head -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_head_in_chunks_equals_the_whole(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, task = model_of(family), make_task()
    batch = collate(task, questions(9))

    def value_and_gradient() -> tuple[torch.Tensor, torch.Tensor]:
        model.zero_grad()
        losses = task.losses(task.outputs(model, batch), batch)
        losses.sum().backward()
        return losses.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    losses, gradient = value_and_gradient()
    measured = task.measure(model, batch)
    sizes: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda m, a, out: sizes.append(out.numel()))
    monkeypatch.setattr(causal_lm, "CHUNK", 5 * vocabulary(model.get_output_embeddings()))
    chunked, chunked_gradient = value_and_gradient()
    assert torch.allclose(chunked, losses, atol=1e-5)
    assert (chunked_gradient - gradient).abs().max() < 1e-5 * gradient.abs().max()
    for name, pair in task.measure(model, batch).items():
        assert torch.allclose(pair, measured[name], rtol=1e-5)
    assert max(sizes) == causal_lm.CHUNK and len(sizes) > 10  # never more logits than that at a time


def test_only_counted_positions_reach_the_head() -> None:
    model, task = model_of("llama"), make_task()
    batch = collate(task, questions(9))
    rows: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda m, a, out: rows.append(len(out)))
    task.losses(task.outputs(model, batch), batch)
    assert rows == [task.count(batch)]
    assert rows[0] < batch["ids"].numel() / 2


def test_soft_cap_of_the_logits_is_honoured() -> None:
    model, task = model_of("gemma2", final_logit_softcapping=2.0, attn_logit_softcapping=1.5), make_task()
    examples = questions(4)
    batch = collate(task, examples)
    with torch.no_grad():
        outputs = task.outputs(model, batch)
        assert outputs.logits().abs().max() <= 2.0 < outputs.head(outputs.hidden).abs().max()
        for i, example in enumerate(examples):
            own, loss = alone(model, task, example)
            assert torch.allclose(outputs.logits()[outputs.row == i], own, atol=1e-5)
            assert torch.allclose(outputs.logps[outputs.row == i], -loss, atol=1e-5)


def test_model_that_does_something_else_to_its_logits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, task = model_of("llama"), make_task(packing=True)
    task.check(model)
    assert not model.training
    forward = type(model).forward

    def scaled(self: Any, *args: Any, **options: Any) -> Any:
        out = forward(self, *args, **options)
        out.logits = out.logits / 3
        return out

    monkeypatch.setattr(type(model), "forward", scaled)
    with pytest.raises(UserError, match="does not know what it does to them"):
        task.check(model)


OTHERS = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4}, "gpt_neox": {}, "phi": {}, "olmo2": {}, "qwen3": {"head_dim": 8, "num_key_value_heads": 2}, "gemma": {"head_dim": 8, "num_key_value_heads": 2},
    "mistral": {"sliding_window": 4, "num_key_value_heads": 2}, "granite": {"logits_scaling": 8.0}, "cohere": {"logit_scale": 0.1}, "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16},
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_other_architectures_pass_or_are_refused(kind: str) -> None:
    shape = {"vocab_size": 1040, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = Auto.from_config(AutoConfig.for_model(kind, **shape, initializer_range=0.3, **OTHERS[kind])).eval()
    make_task().check(model)
    if kind == "opt":  # transformers builds no block mask for it
        with pytest.raises(UserError, match=r"data\.packing=false"):
            make_task(packing=True).check(model)
        return
    task = make_task(packing=True, max_length=48)
    task.check(model)
    batch = collate(task, questions(6))
    with torch.no_grad():
        outputs = task.outputs(model, batch)
        for i, example in enumerate(questions(6)):
            assert torch.allclose(-outputs.logps[outputs.row == i], alone(model, task, example)[1], atol=1e-4)


def test_model_that_cannot_keep_packed_examples_apart_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import masking_utils

    model = model_of("llama")
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    make_task().check(model)
    with pytest.raises(UserError, match=r"LlamaForCausalLM .* packed rows.*data\.packing=false"):
        make_task(packing=True).check(model)


def test_mixed_precision_runs() -> None:
    words = ["method=full", "optimizer.lr=1e-3", *SMALL]
    full, mixed = (build(*words, f"hardware.precision={p}") for p in ("'32'", "bf16-mixed"))
    for run in (full, mixed):
        run.model.train()
    a, b = (run.gradients(run.window(0)) for run in (full, mixed))
    assert float(b) == pytest.approx(float(a), rel=0.02) and float(a) != float(b)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in mixed.trainable().values())
    with mixed.evaluating():
        outputs = mixed.task.outputs(mixed.model, mixed.window(0).micros[0])
        assert outputs.logits().dtype == torch.bfloat16 and outputs.logps.dtype == torch.float32


# -- measuring and generating -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("template", ["", CHATML])
def test_exact_match_is_what_greedy_generation_gives(family: str, template: str) -> None:
    model, task = model_of(family, initializer_range=0.05), make_task(template)
    r = random.Random(0)
    words = ["Mia", "Tom", "ball", "apple", "green", "market"]
    examples = [
        {"prompt": " ".join(r.choices(words, k=3)) + "?", "response": " ".join(r.choices(words, k=r.randint(1, 3)))} for _ in range(12)
    ]
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    batch = collate(task, examples)
    right: list[bool] = []
    for step in range(200):
        optimizer.zero_grad()
        task.losses(task.outputs(model, batch), batch).mean().backward()
        optimizer.step()
        if step % 5 == 4:
            right = [task.generate(model, [{"role": "user", "content": e["prompt"]}]) == e["response"] for e in examples]
            if 3 <= sum(right) <= 9:
                break
    assert 3 <= sum(right) <= 9, "some right and some wrong answers are needed"
    with torch.no_grad():
        measured = [float(task.measure(model, collate(task, [e]))["exact_match"][0]) for e in examples]
        together = task.measure(model, batch)["exact_match"]
        packed = task.measure(model, collate(make_task(template, packing=True), examples))["exact_match"]
    assert measured == [float(x) for x in right]
    assert together.tolist() == packed.tolist() == [sum(right), len(examples)]
    samples = task.samples(type("R", (), {"model": model})(), examples)
    assert [s["answer"] == s["wanted"] for s in samples] == right


def test_measure_weighs_tokens_and_examples() -> None:
    model, task = model_of("llama"), make_task()
    examples = questions(5)
    losses = [alone(model, task, e)[1].detach() for e in examples]
    with torch.no_grad():
        measured = task.measure(model, collate(task, examples))
    assert measured["nll"].tolist() == pytest.approx([float(torch.cat(losses).sum()), len(torch.cat(losses))], rel=1e-5)
    assert measured["exact_match"][1] == 5


def test_generation_is_plain_greedy_and_leaves_the_mode() -> None:
    model, task = model_of("llama"), make_task()
    turns = [{"role": "user", "content": "Mia?"}]
    first = task.generate(model, turns, max_new_tokens=12)
    model.generation_config.repetition_penalty = 5.0
    model.train()
    assert task.generate(model, turns, max_new_tokens=12) == first
    assert model.training
    ids = task.tokenizer(task.render(turns, prompt=True), add_special_tokens=False, return_tensors="pt")["input_ids"]
    for _ in range(12):
        nxt = model(input_ids=ids).logits[0, -1].argmax()
        ids = torch.cat([ids, nxt.view(1, 1)], 1)
        if int(nxt) in task.stop_tokens:
            break
    start = task.tokenizer(task.render(turns, prompt=True), add_special_tokens=False)["input_ids"]
    assert first == task.tokenizer.decode(ids[0, len(start) :], skip_special_tokens=True).strip()
    assert task.generate(model, "Mia has", max_new_tokens=3)  # a raw text is continued
