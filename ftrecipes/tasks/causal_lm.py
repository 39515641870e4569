"""Causal language modelling: loss on the tokens that are to be learned (all of a text, the answers of a dialogue).

Only the positions whose next token counts go through the head, and never more of them at a time than fit a bounded
float32 buffer: the full float32 logits do not exist at any moment.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ftrecipes.tasks.base import Batch, Encoded, Outputs, Task

if TYPE_CHECKING:
    from ftrecipes.data.base import Example
    from ftrecipes.run import Run

IGNORE = -100
CHUNK = 2**24
"""Largest float32 buffer of logits, in numbers (64 MiB)."""


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
    unit: ClassVar[str] = "token"
    target: ClassVar[str] = "exact_match"

    def __init__(self, tokenizer: Any, *, max_length: int, template: str = "auto", packing: bool = False) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.packing = packing
        self.chat = template == "chat" or (template == "auto" and bool(getattr(tokenizer, "chat_template", None)))
        self.truncated = 0

    # -- examples -------------------------------------------------------------------------------------------------

    def encode(self, example: Example) -> Encoded:
        """Token ids and labels; `{"text"}` counts every token, a dialogue or prompt/response its answers alone."""
        if "text" in example:
            text, spans = str(example["text"]), None
        else:
            text, spans = self._spans(messages_of(example))
        tokens = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids: list[int] = list(tokens["input_ids"])
        if spans is None:
            labels = list(ids)
        else:
            begins = [begin for begin, _ in tokens["offset_mapping"]]
            labels = [i if any(a <= at < b for a, b in spans) else IGNORE for i, at in zip(ids, begins, strict=True)]
        if not self.chat or spans is None:
            ids, labels = ids + self._end(), labels + self._end()
        if ids[:1] != self._start():
            ids, labels = self._start() + ids, [IGNORE] * len(self._start()) + labels
        if len(ids) > self.max_length:
            self.truncated += 1
            ids, labels = ids[: self.max_length], labels[: self.max_length]
        counted = sum(label != IGNORE for label in labels[1:])
        if counted == 0:
            raise ValueError("no token to learn is left within data.max_length")
        return {"ids": ids, "labels": labels, "length": len(ids), "units": counted}

    def _spans(self, messages: list[dict[str, str]]) -> tuple[str, list[tuple[int, int]]]:
        """The dialogue as text, and where its answers stand in it.

        A template may write an earlier answer in another way once more turns follow (some drop its reasoning); then
        only the answers that still read as they were given count.
        """
        text = self.render(messages, prompt=False)
        spans = []
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self.render(messages[:index], prompt=True)
                upto = self.render(messages[: index + 1], prompt=False).rstrip()
                if upto.startswith(before) and text.startswith(upto):
                    spans.append((len(before), len(upto)))
        if not spans:
            raise ValueError("no answer of an assistant to learn")
        return text, spans

    def render(self, messages: list[dict[str, str]], *, prompt: bool) -> str:
        """Messages as text, by the tokenizer's chat template or as plain lines; `prompt` ends where the answer begins."""
        if self.chat:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
        if not prompt and messages and messages[-1]["role"] == "assistant":
            return self.render(messages[:-1], prompt=True) + messages[-1]["content"]
        lines = [m["content"] for m in messages]
        return "\n".join(lines) + ("\n" if lines else "")

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _start(self) -> list[int]:
        bos = self.tokenizer.bos_token_id
        return [] if bos is None else [bos]

    def _end(self) -> list[int]:
        eos = self.tokenizer.eos_token_id
        return [] if eos is None else [eos]

    # -- batches --------------------------------------------------------------------------------------------------

    def units(self, encoded: Sequence[Encoded]) -> int:
        return sum(e["units"] for e in encoded)

    def count(self, batch: Batch) -> int:
        return int(batch["units"])

    def cost(self, encoded: Sequence[Encoded]) -> int:
        return sum(e["length"] for e in encoded) if self.packing else super().cost(encoded)

    def collate(self, encoded: Sequence[Encoded]) -> Batch:
        """(B, L) ids, labels and positions. Packed rows hold several examples; `segment` tells them apart."""
        rows = pack(encoded, self.max_length) if self.packing else [[i] for i in range(len(encoded))]
        width = max(sum(encoded[i]["length"] for i in row) for row in rows)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        shape = (len(rows), width)
        ids = torch.full(shape, pad)
        labels = torch.full(shape, IGNORE)
        segment = torch.full(shape, -1)
        position = torch.zeros(shape, dtype=torch.long) if self.packing else torch.arange(width).repeat(len(rows), 1)
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
        ids = torch.zeros(examples, length, dtype=torch.long)
        position = torch.arange(length).repeat(examples, 1)
        batch: Batch = {"ids": ids, "labels": ids, "segment": ids, "position": position, "whole": True}
        return {**batch, "units": examples * length, "example": torch.arange(examples)}

    def outputs(self, model: nn.Module, batch: Batch) -> TokenOutputs:
        # No mask: padding stands on the right, where a causal model does not look, and packed examples are told apart
        # by their positions, which begin at 0 (transformers builds the block mask from them).
        language_model: Any = model
        base = language_model.get_decoder()
        hidden = base(input_ids=batch["ids"], position_ids=batch["position"], use_cache=False).last_hidden_state
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
        so one forward pass decides it.
        """
        outputs = self.outputs(model, batch)

        def judge(hidden: Tensor, labels: Tensor) -> Tensor:
            logits = outputs.logits(hidden).float()
            return torch.stack([F.cross_entropy(logits, labels, reduction="none"), (logits.argmax(-1) == labels).float()], -1)

        nll, right = outputs.per_chunk(judge, outputs.labels).unbind(-1)
        examples = len(batch["example"])
        wrong = torch.zeros(examples, device=nll.device).index_add_(0, outputs.row, 1 - right)
        return {"nll": _mean(nll), "exact_match": _mean((wrong == 0).float()), "token_accuracy": _mean(right)}

    def save(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)

    def samples(self, run: Run, examples: Sequence[Example]) -> list[dict[str, str]]:
        out = []
        for example in examples:
            if "text" in example:
                continue
            *messages, last = messages_of(example)
            answer = self.generate(run.model, messages)
            out.append({"prompt": messages[-1]["content"], "wanted": last["content"], "answer": answer})
        return out

    @torch.no_grad()
    def generate(self, model: Any, messages: list[dict[str, str]], *, max_new_tokens: int = 48, **options: Any) -> str:
        """The model's answer to a dialogue; greedy unless options say otherwise."""
        device = next(model.parameters()).device
        text = self.render(messages, prompt=True)
        ids = self._ids(text)
        if not (self.chat and ids[:1] == self._start()):
            ids = self._start() + ids
        prompt = torch.tensor([ids], device=device)
        stop = self.stop_tokens()
        was_training = model.training
        model.eval()
        out = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=max_new_tokens, eos_token_id=stop or None,
            pad_token_id=self.tokenizer.pad_token_id or 0, **{"do_sample": False, **options},
        )  # fmt: skip
        model.train(was_training)
        return str(self.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)).strip()

    def stop_tokens(self) -> list[int]:
        """Tokens that end an answer: the tokenizer's end, and what its chat template closes an answer with."""
        stop = set(self._end())
        if self.chat:
            turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
            tail = self.render(turn, prompt=False).rpartition("b")[2]
            stop |= set(self._ids(tail)[:1])
        return sorted(stop)


def messages_of(example: Example) -> list[dict[str, str]]:
    """A dialogue from either of the forms that data sets use."""
    if "messages" in example:
        return list(example["messages"])
    system = [{"role": "system", "content": example["system"]}] if example.get("system") else []
    prompt = [{"role": "user", "content": example["prompt"]}]
    answer = [{"role": "assistant", "content": example["response"]}] if "response" in example else []
    return system + prompt + answer


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
