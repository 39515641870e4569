"""Causal language modelling: loss on the tokens that are to be learned (all of a text, the answers of a dialogue).

Only the positions whose next token counts go through the head, and never more of them at a time than fit a bounded
float32 buffer: the full float32 logits do not exist at any moment.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from jinja2 import TemplateError
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ftrecipes.errors import UserError
from ftrecipes.tasks.base import Batch, Encoded, Outputs, Task

if TYPE_CHECKING:
    from ftrecipes.data.base import Example
    from ftrecipes.run import Run

IGNORE = -100
CHUNK = 2**24
"""Largest float32 buffer of logits, in numbers (64 MiB)."""
SAMPLE_TOKENS = 24
"""Length of an answer that is only looked at."""


class TokenOutputs(Outputs):
    """Hidden states at the positions whose next token counts.

    hidden: (n, d). labels: (n,) the tokens to predict. row: (n,) the example each belongs to, as its place in the
    micro-batch. head: hidden states to logits.
    """

    def __init__(self, hidden: Tensor, labels: Tensor, row: Tensor, head: nn.Module, scale: Any = None) -> None:
        self.hidden, self.labels, self.row, self.head, self.scale = hidden, labels, row, head, scale
        self._logps: Tensor | None = None

    def logits(self, hidden: Tensor | None = None) -> Tensor:
        """Logits (n, V) in the head's dtype."""
        logits = self.head(self.hidden if hidden is None else hidden)
        return self.scale(logits) if self.scale else logits

    @property
    def logps(self) -> Tensor:
        """log p of each label (n,), float32; computed once."""
        if self._logps is None:
            self._logps = self.per_chunk(self._label_logps, self.labels)
        return self._logps

    def _label_logps(self, hidden: Tensor, labels: Tensor) -> Tensor:
        return -F.cross_entropy(self.logits(hidden).float(), labels, reduction="none")

    def per_sequence(self, values: Tensor, sequences: int) -> Tensor:
        """Sums of numbers of the counted tokens (n,) by sequence (sequences,)."""
        return torch.zeros(sequences, dtype=values.dtype, device=values.device).index_add(0, self.row, values)

    def per_chunk(self, function: Any, *inputs: Tensor) -> Tensor:
        """`function(hidden, *inputs)` over chunks of positions, recomputed in backward when there are several."""
        rows = max(1, CHUNK // vocabulary(self.head))
        if len(self.hidden) <= rows:
            return function(self.hidden, *inputs)  # type: ignore[no-any-return]
        chunks = zip(self.hidden.split(rows), *(x.split(rows) for x in inputs), strict=True)
        if torch.is_grad_enabled():
            return torch.cat([checkpoint(function, *chunk, use_reentrant=False) for chunk in chunks])
        return torch.cat([function(*chunk) for chunk in chunks])


def vocabulary(head: nn.Module) -> int:
    """Number of logits that a head gives."""
    return int(head.weight.shape[0])  # type: ignore[union-attr, index]


class CausalLM(Task):
    """Task of decoder-only language models."""

    domain: ClassVar[str] = "causal-lm"
    unit = "token"
    target = "exact_match"

    def __init__(self, tokenizer: Any, *, max_length: int, template: str = "auto", packing: bool = False) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.packing = packing
        self.chat = template == "chat" or (template == "auto" and bool(getattr(tokenizer, "chat_template", None)))
        self._fast = tokenizer.backend_tokenizer  # for single texts twice as quick as the tokenizer around it
        self._fast.no_truncation()
        self._fast.no_padding()

    # -- examples -------------------------------------------------------------------------------------------------

    def encode(self, example: Example) -> Encoded:
        """Token ids and labels (int32); `{"text"}` counts every token, anything else its answers and what ends them.

        What is longer than `max_length` loses its end, so that prompts stay whole and no cut answer is taught to end.
        Where there are other answers to the same prompt, only the last answer counts, and `others` holds each of them
        encoded in its place. Raises ValueError when no token to learn is left.
        """
        if "others" not in example:
            return self._encode(example)
        encoded, *others = (self._encode(answered(example, text), last=True) for text in (None, *example["others"]))
        lost = dict.fromkeys(what for one in (encoded, *others) for what in one["lost"])
        return {**encoded, "others": others, "lost": list(lost)}

    def _encode(self, example: Example, *, last: bool = False) -> Encoded:
        """One sequence; `last`: of a dialogue only the last answer counts."""
        lost = []
        dialogue = "messages" in example or "response" in example
        if dialogue:
            messages = messages_of(example)
            text, spans = self._spans(messages)
            if last:
                spans = spans[-1:]
            elif len(spans) < sum(m["role"] == "assistant" for m in messages):
                lost.append("answers of earlier turns, which the chat template rewrites")
        else:
            text = example["text"] if "text" in example else example["prompt"] + example["completion"]
            spans = [(len(example.get("prompt", "")), len(text))]
        ids, offsets = self._tokens(text, spans[0][0])
        learned = np.zeros(len(ids), bool) if "text" not in example else np.ones(len(ids), bool)
        for begin, end in spans:
            learned |= (offsets[:, 0] < end) & (offsets[:, 1] > begin)
        start = [] if dialogue and self.chat else self._start
        end_token = [] if dialogue and self._closer else self._end
        tokens = np.array([*start, *ids, *end_token], np.int32)
        learned = np.concatenate([np.zeros(len(start), bool), learned, np.ones(len(end_token), bool)])
        labels = np.where(learned, tokens, IGNORE).astype(np.int32)[: self.max_length]
        units = int((labels[1:] != IGNORE).sum())
        if units == 0:
            raise ValueError(f"nothing to learn stands within its first data.max_length={self.max_length} of {len(tokens)} tokens")
        if len(tokens) > self.max_length:
            lost.append(f"their end at data.max_length={self.max_length} tokens")
        return {"ids": tokens[: self.max_length], "labels": labels, "length": len(labels), "units": units, "lost": lost}

    def _spans(self, messages: list[dict[str, str]]) -> tuple[str, list[tuple[int, int]]]:
        """The dialogue as text, and where its answers stand in it with what closes each.

        A template may write an earlier answer in another way once more turns follow (some drop its reasoning). Such an
        answer counts where it still reads as it was given, right behind what asks for it; else it is only context.
        """
        text = self.render(messages, prompt=False)
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.render(messages[:index], prompt=True)
            upto = self.render(messages[: index + 1], prompt=False)
            upto = upto.rstrip() if self._closer else upto
            again = before + message["content"].strip() + self._closer
            if as_given := next((t for t in (upto, again) if t.startswith(before) and text.startswith(t)), None):
                spans.append((len(before), len(as_given)))
        if not spans:
            raise ValueError("it has no answer to learn")
        return text, spans

    def render(self, messages: list[dict[str, str]], *, prompt: bool) -> str:
        """Messages as text, by the tokenizer's chat template or as plain lines; `prompt` ends where the answer begins.

        Raises ValueError when the template refuses the messages (some take no system prompt, or want turns to alternate).
        """
        if self.chat:
            try:
                return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
            except TemplateError as error:
                raise ValueError(f"the chat template refuses it: {error}") from None
        if not prompt and messages and messages[-1]["role"] == "assistant":
            return self.render(messages[:-1], prompt=True) + messages[-1]["content"]
        lines = [m["content"] for m in messages]
        return "\n".join(lines) + ("\n" if lines else "")

    def _tokens(self, text: str, begin: int) -> tuple[list[int], NDArray[np.int64]]:
        """Token ids of a text and their offsets (n, 2), such that what stands before `begin` has the ids it has alone.

        So training sees the prompt that generation will see, where tokens would otherwise reach across the border.
        """
        whole = self._fast.encode(text, add_special_tokens=False)
        prompt = self._fast.encode(text[:begin], add_special_tokens=False)
        ids, offsets = list(whole.ids), whole.offsets
        if ids[: len(prompt.ids)] != prompt.ids:
            answer = self._fast.encode(text[begin:], add_special_tokens=False)
            ids, offsets = prompt.ids + answer.ids, prompt.offsets + [(a + begin, b + begin) for a, b in answer.offsets]
        return ids, np.array(offsets, np.int64).reshape(-1, 2)

    @cached_property
    def _start(self) -> list[int]:
        """What the tokenizer itself puts before a plain text; a chat template writes its own beginning."""
        alone, wrapped = (self._fast.encode("a", add_special_tokens=special).ids for special in (False, True))
        return list(wrapped[: wrapped.index(alone[0])])

    @cached_property
    def _end(self) -> list[int]:
        eos = self.tokenizer.eos_token_id
        return [] if eos is None else [eos]

    @cached_property
    def _closer(self) -> str:
        """What the chat template writes behind an answer, '' when nothing does."""
        turn = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "=answer="}]
        return self.render(turn, prompt=False).rpartition("=answer=")[2].rstrip() if self.chat else ""

    # -- batches --------------------------------------------------------------------------------------------------

    def units(self, encoded: Sequence[Encoded]) -> int:
        return len(encoded) if self.unit == "example" else sum(e["units"] for e in encoded)

    def count(self, batch: Batch) -> int:
        return int(batch["units"])

    def cost(self, encoded: Sequence[Encoded]) -> int:
        others = [other for e in encoded for other in e.get("others", ())]
        own = sum(e["length"] for e in encoded) if self.packing else super().cost(encoded)
        return own + (self.cost(others) if others else 0)

    def collate(self, encoded: Sequence[Encoded]) -> Batch:
        """(B, L) ids, labels and positions. Packed rows hold several examples; `segment` tells them apart.

        Other answers are a batch of their own, `others`, whose `owner` says which example each belongs to; `reference`
        holds what the model before training gave them (log-probabilities), where a method had that computed.
        """
        batch = self._lay_out(encoded, pack(encoded, self.max_length) if self.packing else [[i] for i in range(len(encoded))])
        others = [(i, other) for i, e in enumerate(encoded) for other in e.get("others", ())]
        if others:
            batch["others"] = {**self.collate([other for _, other in others]), "owner": torch.tensor([i for i, _ in others])}
            if "reference" in others[0][1]:
                batch["others"]["reference"] = torch.tensor([other["reference"] for _, other in others])
        return batch

    def _lay_out(self, encoded: Sequence[Encoded], rows: Sequence[Sequence[int]]) -> Batch:
        width = max(sum(encoded[i]["length"] for i in row) for row in rows)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        shape = (len(rows), width)
        ids = torch.full(shape, pad)
        labels = torch.full(shape, IGNORE)
        segment = torch.full(shape, -1)
        position = torch.arange(width).repeat(len(rows), 1)
        for r, row in enumerate(rows):
            at = 0
            for i in row:
                e = encoded[i]
                span = slice(at, at + e["length"])
                ids[r, span] = torch.as_tensor(e["ids"])
                labels[r, span] = torch.as_tensor(e["labels"])
                labels[r, at] = IGNORE
                segment[r, span] = i
                position[r, span] = torch.arange(e["length"])
                at += e["length"]
        batch: Batch = {"ids": ids, "labels": labels, "segment": segment, "position": position}
        batch["units"] = self.units(encoded)
        return batch

    # -- model ----------------------------------------------------------------------------------------------------

    def blank(self, examples: int, length: int) -> Batch:
        batch = self._blank(examples, length)
        if self.alternatives:
            owner = torch.arange(examples).repeat_interleave(self.alternatives)
            batch["others"] = {**self._blank(examples * self.alternatives, length), "owner": owner}
        return batch

    def _blank(self, examples: int, length: int) -> Batch:
        ids = torch.zeros(examples, length, dtype=torch.long)
        position = torch.arange(length).repeat(examples, 1)
        batch: Batch = {"ids": ids, "labels": ids, "segment": ids, "position": position, "whole": True}
        units = examples if self.unit == "example" else examples * length
        return {**batch, "units": units, "example": torch.arange(examples)}

    def outputs(self, model: nn.Module, batch: Batch) -> TokenOutputs:
        # No mask: padding stands on the right, where a causal model does not look, and packed examples are told apart
        # by their positions, which begin at 0 (transformers builds the block mask from them; flash attention does so
        # only for a single row).
        language_model: Any = model
        ids, position = batch["ids"], batch["position"]
        if self.packing and "flash" in str(language_model.config._attn_implementation):
            ids, position = ids.view(1, -1), position.view(1, -1)
        hidden = language_model.get_decoder()(input_ids=ids, position_ids=position, use_cache=False).last_hidden_state
        hidden = hidden.view(*batch["ids"].shape, -1)
        labels = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE)
        row = batch["segment"]
        if batch.get("whole"):  # a blank micro-batch of a plan: its tensors have no values to look at
            hidden, labels, row = hidden.flatten(0, 1), labels.flatten(), row.flatten()
        else:
            at = labels != IGNORE
            hidden, labels, row = hidden[at], labels[at], row[at]
        return TokenOutputs(hidden, labels, row, language_model.get_output_embeddings(), logit_scale(model))

    def losses(self, outputs: Outputs, batch: Batch) -> Tensor:
        assert isinstance(outputs, TokenOutputs)
        return -outputs.logps

    def measure(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """`nll` per token, and `exact_match`: whether greedy decoding would give the whole answer.

        Greedy decoding gives the answer exactly when every token of it is the most likely one after the true prefix,
        so one forward pass decides it. Where there are worse answers: `preference`, the share of them that the model
        finds less likely than the right one.
        """
        outputs = self.outputs(model, batch)

        def judge(hidden: Tensor, labels: Tensor) -> Tensor:
            logits = outputs.logits(hidden).float()
            return torch.stack([F.cross_entropy(logits, labels, reduction="none"), (logits.argmax(-1) == labels).float()], -1)

        nll, right = outputs.per_chunk(judge, outputs.labels).unbind(-1)
        examples = len(batch["example"])
        wrong = torch.zeros(examples, device=nll.device).index_add_(0, outputs.row, 1 - right)
        out = {"nll": _mean(nll), "exact_match": _mean((wrong == 0).float()), "token_accuracy": _mean(right)}
        if "others" in batch:
            others = self.outputs(model, batch["others"])
            owner = batch["others"]["owner"]
            better = outputs.per_sequence(-nll, examples)[owner]
            out["preference"] = _mean((better > others.per_sequence(others.logps, len(owner))).float())
        return out

    @torch.no_grad()
    def check(self, model: nn.Module) -> None:
        """Refuse a model of which this task would learn something else than what the model computes.

        The logits computed here must be the model's own (some models scale them behind the head in ways not known
        here), and examples that share a packed row must not see each other (models with a state cannot keep apart).
        """
        was_training = model.training
        model.eval()
        device = next(model.parameters()).device
        ids = (torch.arange(4 * 6) + 5) % vocabulary(model.get_output_embeddings())  # type: ignore[operator]
        own = model(input_ids=ids.view(4, 6).to(device), use_cache=False).logits[:, :-1].flatten(0, 1).float()
        examples = [{"ids": row, "labels": row, "length": 6, "units": 5} for row in ids.view(4, 6)]
        rows = {"model.attention": [[0], [1], [2], [3]]} | ({"data.packing": [[0, 1], [2, 3]]} if self.packing else {})
        for what, layout in rows.items():
            batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self._lay_out(examples, layout).items()}
            ours = self.outputs(model, batch).logits().float()
            if not torch.allclose(ours, own, rtol=0.0, atol=0.02 * float(own.abs().max()), equal_nan=True):
                raise UserError(f"{type(model).__name__} gives other logits " + (
                    "in packed rows, so it cannot keep packed examples apart; use data.packing=false" if what == "data.packing"
                    else "than its head alone does; this version does not know what it does to them"
                ))  # fmt: skip
        model.train(was_training)

    def save(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)

    def samples(self, run: Run, examples: Sequence[Example]) -> list[dict[str, str]]:
        out = []
        for example in examples:
            if "text" in example:
                continue
            if "completion" in example:
                prompt, asked, wanted = example["prompt"], example["prompt"], example["completion"]
            else:
                *prompt, last = messages_of(example)
                asked, wanted = prompt[-1]["content"] if prompt else "", last["content"]
            if len(self._asked(prompt)) + SAMPLE_TOKENS > getattr(run.model.config, "max_position_embeddings", math.inf):
                continue
            answer = self.generate(run.model, prompt, max_new_tokens=SAMPLE_TOKENS)
            out.append({"prompt": asked, "wanted": wanted.strip(), "answer": answer})
        return out

    def _asked(self, prompt: str | list[dict[str, str]]) -> list[int]:
        """The tokens of a dialogue that wants an answer, or of a raw text that wants to go on."""
        ids = self._fast.encode(prompt if isinstance(prompt, str) else self.render(prompt, prompt=True), add_special_tokens=False).ids
        return self._start + ids if isinstance(prompt, str) or not self.chat else ids

    def generate(self, model: Any, prompt: str | list[dict[str, str]], *, max_new_tokens: int = 48, **options: Any) -> str:
        """The model's answer to a dialogue, or what follows a raw text; greedy unless options say otherwise."""
        return self.answers(model, [prompt], max_new_tokens=max_new_tokens, **options)[0][0]

    @torch.no_grad()
    def answers(self, model: Any, prompts: Sequence[str | list[dict[str, str]]], *, n: int = 1, **options: Any) -> list[list[str]]:
        """`n` answers to each prompt, all at once; sampling (`do_sample`) draws from torch's global generator.

        Answers end where the model's positions do.
        """
        device = next(model.parameters()).device
        ids = [self._asked(prompt) for prompt in prompts]
        width = max(map(len, ids))
        room = getattr(model.config, "max_position_embeddings", math.inf) - width
        options["max_new_tokens"] = max(1, min(options.get("max_new_tokens", 48), room))
        tokens = torch.full((len(ids), width), self.tokenizer.pad_token_id or 0)
        mask = torch.zeros_like(tokens)
        for row, prompt in enumerate(ids):
            tokens[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        was_training = model.training
        model.eval()
        # What a model's own generation settings would add to greedy decoding (Qwen's penalty on repetition) is left out.
        options = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, **options}
        out = model.generate(
            tokens.to(device), attention_mask=mask.to(device), num_return_sequences=n, eos_token_id=self.stop_tokens or None,
            pad_token_id=self.tokenizer.pad_token_id or 0, **options,
        )[:, width:]  # fmt: skip
        model.train(was_training)
        texts = [str(self.tokenizer.decode(row, skip_special_tokens=True)).strip() for row in out]
        return [texts[i : i + n] for i in range(0, len(texts), n)]

    @cached_property
    def stop_tokens(self) -> list[int]:
        """Tokens that end an answer: the tokenizer's end, and the special one that its chat template closes an answer with."""
        special = set(self.tokenizer.added_tokens_decoder)
        closing = [i for i in self._fast.encode(self._closer, add_special_tokens=False).ids if i in special]
        return sorted({*self._end, *closing[:1]})


def messages_of(example: Example) -> list[dict[str, str]]:
    """A dialogue from either of the forms that data sets use."""
    if "messages" in example:
        return list(example["messages"])
    system = [{"role": "system", "content": example["system"]}] if example.get("system") else []
    prompt = [{"role": "user", "content": example["prompt"]}]
    answer = [{"role": "assistant", "content": example["response"]}] if "response" in example else []
    return system + prompt + answer


def answered(example: Example, answer: str | None) -> Example:
    """An example with another answer in the place of its last one; None keeps it."""
    alone = {name: value for name, value in example.items() if name != "others"}
    if answer is None:
        return alone
    if "messages" in alone:
        return {**alone, "messages": [*alone["messages"][:-1], {"role": "assistant", "content": answer}]}
    return {**alone, "completion" if "completion" in alone else "response": answer}


def pack(encoded: Sequence[Encoded], width: int) -> list[list[int]]:
    """First-fit decreasing: rows of example numbers whose lengths add up to at most `width`."""
    rows: list[tuple[int, list[int]]] = []
    for i in sorted(range(len(encoded)), key=lambda i: (-encoded[i]["length"], i)):
        length = encoded[i]["length"]
        for r, (free, row) in enumerate(rows):
            if length <= free:
                row.append(i)
                rows[r] = (free - length, row)
                break
        else:
            rows.append((max(width, length) - length, [i]))
    return [row for _, row in rows]


def logit_scale(model: nn.Module) -> Any:
    """What a model does to its logits after the head (Gemma's soft cap, Granite's and Cohere's factors), or None."""
    config = model.config
    cap = getattr(config, "final_logit_softcapping", None)
    if cap:
        return lambda logits: torch.tanh(logits / cap) * cap
    divisor, factor = getattr(config, "logits_scaling", None), getattr(config, "logit_scale", None)
    if divisor:
        return lambda logits: logits / divisor
    if factor:
        return lambda logits: logits * factor
    return None


def _mean(values: Tensor) -> Tensor:
    return torch.stack([values.sum(), torch.tensor(float(values.numel()), device=values.device)])
