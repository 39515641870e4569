"""What a row of somebody's data means: the well-known shapes, found by their columns, as examples.

    chat            messages [{role, content}], or ShareGPT's conversations [{from, value}]; system beside them or inside
    instruction     prompt and response of one turn; alpaca's `input` is put below its instruction
    completion      prompt and completion as raw text: the completion follows the prompt as it stands, without a chat template
    preference      chosen and rejected answers to a prompt, as text or as turns with or without the prompt's
    classification  text and label; the label's word is the response
    text            plain text, every token of which is learned

`detect` decides on a format and its columns once, from the first row; `Shape.example` turns each row into an example or
raises ValueError with a reason. A further format is an entry of FORMATS, its columns in NAMES, and a branch of `example`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from ftrecipes.errors import UserError, nearest

Example = dict[str, Any]

FORMATS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "preference": (("chosen", "rejected"), ("prompt", "input", "system")),
    "chat": (("messages",), ("system",)),
    "instruction": (("prompt", "response"), ("input", "system")),
    "completion": (("prompt", "response"), ()),
    "classification": (("text", "label"), ()),
    "text": (("text",), ()),
}
"""What each format needs and what it may have; in the order in which they are tried."""

NAMES: dict[str, tuple[str, ...]] = {
    "messages": ("messages", "conversations", "conversation", "dialogue", "dialog", "chat"),
    "prompt": ("instruction", "prompt", "question", "query", "problem", "input"),
    "response": ("output", "response", "answer", "completion", "solution"),
    "chosen": ("chosen", "preferred"),
    "rejected": ("rejected", "dispreferred"),
    "input": ("input", "context"),
    "system": ("system", "system_prompt"),
    "text": ("text", "sentence", "content", "document", "review"),
    "label": ("label", "labels", "class"),
}
"""The usual column names of each field, the most telling first."""

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant"),
}


@dataclass
class Shape:
    """A format and the columns it is read from.

    columns: field → column, or several that are put below each other. seen: the columns that were there when this was
    decided; a later row of JSONL may have optional ones besides. labels: the words of numbered labels.
    """

    format: str
    columns: dict[str, list[str]]
    seen: Sequence[str]
    labels: Sequence[str] = ()
    cut: bool = field(default=False, init=False)
    """Whether the last example lost turns that stood after its last answer."""

    def needed(self) -> list[str]:
        """The columns of a table that are read."""
        return [column for columns in self.columns.values() for column in columns if column in self.seen]

    def __str__(self) -> str:
        fields = {name: "+".join(c for c in columns if c in self.seen) for name, columns in self.columns.items()}
        return f"{self.format} ({', '.join(f'{name}={columns}' for name, columns in fields.items() if columns)})"

    def example(self, row: Mapping[str, Any]) -> Example:
        """One row as `{"messages"}`, `{"prompt", "response", "system"?}`, `{"prompt", "completion"}` or `{"text"}`.

        A preference is one of the first two with the chosen answer, and the rejected one as `others`.
        """
        self.cut = False
        if self.format == "preference":
            return self._preference(row)
        if self.format == "chat":
            return self._chat(self._value("messages", row), self._text("system", row, optional=True))
        if self.format == "text":
            return {"text": _filled(self._text("text", row), "text")}
        if self.format == "classification":
            return {"prompt": _filled(self._text("text", row), "text"), "response": self._label(row)}
        if isinstance(self._value("prompt", row), list) and isinstance(self._value("response", row), list):
            return self._chat([*self._value("prompt", row), *self._value("response", row)], "")
        prompt, response = self._text("prompt", row), _filled(self._text("response", row), "answer")
        return {"prompt": prompt, "completion": response} if self.format == "completion" else self._turn(prompt, response, row)

    def _turn(self, prompt: str, response: str, row: Mapping[str, Any]) -> Example:
        """One turn, with what stands below the prompt and the system prompt in columns of their own."""
        below = self._text("input", row, optional=True)
        example = {"prompt": _filled("\n\n".join(filter(str.strip, (prompt, below))), "prompt"), "response": response}
        system = self._text("system", row, optional=True)
        return {**example, "system": system} if system.strip() else example

    def _preference(self, row: Mapping[str, Any]) -> Example:
        """A chosen and a rejected answer to the same prompt."""
        chosen, rejected = self._value("chosen", row), self._value("rejected", row)
        if isinstance(chosen, list) != isinstance(rejected, list):
            raise ValueError(f"chosen is {kind(chosen)} and rejected {kind(rejected)}; both must be text or lists of turns")
        asked = next((row[column] for column in self.columns.get("prompt", ()) if row.get(column) is not None), None)
        if isinstance(chosen, list):
            better, worse = (self._dialogue(name, turns, asked, row) for name, turns in (("chosen", chosen), ("rejected", rejected)))
            if better[:-1] != worse[:-1]:
                where = next(i for i, (a, b) in enumerate(zip(better, [*worse, None], strict=False), 1) if a != b)
                raise ValueError(f"chosen and rejected part at turn {where}, before their last answer")
            example: Example = {"messages": better}
            answer, other = better[-1]["content"], worse[-1]["content"]
        else:
            answer, other = (_filled(self._text(name, row), f"{name} answer") for name in ("chosen", "rejected"))
            if isinstance(asked, list):
                example = {"messages": self._dialogue("chosen", [{"role": "assistant", "content": answer}], asked, row)}
            elif asked is None:
                raise ValueError(
                    f"chosen and rejected are text and need a prompt (usual: {', '.join(NAMES['prompt'])}; or data.columns.prompt)"
                )
            else:
                example = self._turn(self._text("prompt", row), answer, row)
        if answer == other:
            raise ValueError("chosen and rejected are the same answer")
        return {**example, "others": [other]}

    def _dialogue(self, name: str, turns: list[Any], asked: Any, row: Mapping[str, Any]) -> list[dict[str, str]]:
        """The turns that lead to an answer, and the answer; those of the prompt may stand in a column of their own."""
        messages = [_message(turn, number) for number, turn in enumerate(turns, 1)]
        if isinstance(asked, list):
            before = [_message(turn, number) for number, turn in enumerate(asked, 1)]
            messages = messages if messages[: len(before)] == before else before + messages
        elif asked is not None and messages and messages[0]["role"] == "assistant":
            messages.insert(0, {"role": "user", "content": _filled(self._text("prompt", row), "prompt")})
        system = self._text("system", row, optional=True)
        if system.strip() and not any(m["role"] == "system" for m in messages):
            messages.insert(0, {"role": "system", "content": system})
        if not messages or messages[-1]["role"] != "assistant":
            raise ValueError(f"{name} does not end with an answer of the assistant")
        return messages

    def _value(self, name: str, row: Mapping[str, Any]) -> Any:
        column = self.columns[name][0]
        if column not in row:
            raise ValueError(f"no column '{column}'{nearest(column, row)}")
        return row[column]

    def _text(self, name: str, row: Mapping[str, Any], *, optional: bool = False) -> str:
        columns = self.columns.get(name, [])
        if optional:
            columns = [c for c in columns if row.get(c) is not None]
        for column in columns:
            if column not in row:
                raise ValueError(f"no column '{column}'{nearest(column, row)}")
        return "\n\n".join(_text(row[column], f"column '{column}'") for column in columns)

    def _label(self, row: Mapping[str, Any]) -> str:
        value, column = self._value("label", row), self.columns["label"][0]
        if isinstance(value, bool):
            value = str(value).lower() if not self.labels else int(value)
        text = _filled(_text(value, f"column '{column}'"), "label")
        if not self.labels or text in self.labels:
            return text
        if text.isdecimal() and int(text) < len(self.labels):
            return self.labels[int(text)]
        raise ValueError(f"column '{column}': label '{text}' has no word among {', '.join(self.labels)}")

    def _chat(self, turns: Any, system: str) -> Example:
        if not isinstance(turns, list):
            raise ValueError(f"column '{self.columns[next(iter(self.columns))][0]}' holds {kind(turns)}; a list of turns is needed")
        messages = [_message(turn, number) for number, turn in enumerate(turns, 1)]
        if system.strip() and not any(m["role"] == "system" for m in messages):
            messages.insert(0, {"role": "system", "content": system})
        last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=-1)
        if last < 0:
            raise ValueError("no turn of an assistant, so there is no answer to learn")
        self.cut = last + 1 < len(messages)
        return {"messages": messages[: last + 1]}


def detect(columns: Sequence[str], knobs: Any, where: str, labels: Mapping[str, Sequence[str]] | None = None) -> Shape:
    """The shape of rows that have these columns.

    knobs: `format`, `columns` (field → column) and `labels` of the settings. labels: words of class columns, as the file
    itself names them. Raises UserError that names the columns there are and the nearest fit.
    """
    given = {name: [str(c) for c in (value if isinstance(value, list) else [value])] for name, value in knobs.columns.items()}
    for name, wanted in given.items():
        for column in wanted:
            if column not in columns:
                raise UserError(f"{where}: data.columns.{name}={column}: no such column{nearest(column, columns)}")
    tried = {name: _assign(name, columns, given) for name in FORMATS}
    if knobs.format != "auto":
        found = knobs.format
        extra = set(given) - set(FORMATS[found][0] + FORMATS[found][1])
        if extra:
            word = sorted(extra)[0]
            raise UserError(f"data.columns.{word}: format {found} has no such field{nearest(word, FORMATS[found][0] + FORMATS[found][1])}")
    else:
        fits = [name for name in FORMATS if not _missing(name, tried[name]) and set(given) <= set(tried[name])]
        raw = not given and tried["instruction"].get("prompt") == ["prompt"] and tried["instruction"].get("response") == ["completion"]
        found = "completion" if raw and fits[:1] == ["instruction"] else next(iter(fits), "")
    if not found or _missing(found, tried[found]):
        raise UserError(f"{where}: {_unclear(columns, found, tried)}")
    assigned = tried[found]
    words = list(knobs.labels or (labels or {}).get(assigned["label"][0], ())) if found == "classification" else []
    return Shape(found, assigned, columns, [str(word) for word in words])


def _assign(name: str, columns: Sequence[str], given: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Field → columns for one format: what was given, else the first usual name that is there and free."""
    required, optional = FORMATS[name]
    usual = {column.casefold(): column for column in reversed(columns)}
    taken = {column for wanted in given.values() for column in wanted}
    out = {}
    for one in required + optional:
        free = [usual[n] for n in NAMES[one] if n in usual and usual[n] not in taken]
        if one in given:
            out[one] = given[one]
        elif one in optional and given:
            continue  # who names the columns names all of them
        elif free:
            out[one] = free[:1]
            taken.add(free[0])
        elif one in optional:
            out[one] = [n for n in NAMES[one] if n not in taken][:1]
    return out


def _missing(name: str, assigned: Mapping[str, Any]) -> list[str]:
    return [one for one in FORMATS[name][0] if one not in assigned]


def _unclear(columns: Sequence[str], found: str, tried: Mapping[str, Mapping[str, Any]]) -> str:
    """Why no format fits, with the column that comes nearest to what is missing."""
    there = f"there are {', '.join(columns)}" if columns else "the row is empty"
    if not found and all(len(_missing(name, tried[name])) == len(FORMATS[name][0]) for name in FORMATS):
        return (
            f"cannot tell what the columns hold: {there}; say it with data.columns={{prompt: …, response: …}}, or of messages, text, label"
        )
    guess = found or max(tried, key=lambda name: len(FORMATS[name][0]) - 2 * len(_missing(name, tried[name])))
    lacking = _missing(guess, tried[guess])[0]
    close = [c for c in columns for n in NAMES[lacking] if difflib.SequenceMatcher(None, c.casefold(), n).ratio() > 0.7]
    best = close[0] if close else "…"
    return f"no column for the {lacking} (usual: {', '.join(NAMES[lacking])}); {there}; say which with data.columns={{{lacking}: {best}}}"


def _message(turn: Any, number: int) -> dict[str, str]:
    """One turn as role and content, from either of the two usual spellings."""
    if not isinstance(turn, Mapping):
        raise ValueError(f"turn {number} is {kind(turn)}; an object with role and content is needed")
    role = turn.get("role", turn.get("from"))
    content = turn.get("content", turn.get("value"))
    if str(role).casefold() not in ROLES:
        raise ValueError(f"turn {number}: unknown role {role!r}; roles are system, user (human) and assistant (gpt)")
    if isinstance(content, list) and all(isinstance(p, Mapping) and p.get("type") == "text" for p in content):
        content = "".join(str(part.get("text", "")) for part in content)
    role = ROLES[str(role).casefold()]
    text = _text(content, f"turn {number}")
    return {"role": role, "content": _filled(text, f"answer in turn {number}") if role == "assistant" else text}


def _text(value: Any, what: str) -> str:
    if isinstance(value, str):
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"{what} holds half of a surrogate pair ({value[error.start]!a}), which is no text") from None
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise ValueError(f"{what} holds {kind(value)}; text is needed")


def _filled(text: str, what: str) -> str:
    if not text.strip():
        raise ValueError(f"empty {what}")
    return text


def kind(value: Any) -> str:
    """What a value is, in words."""
    words = {type(None): "null", bool: "true or false", float: "a number with a fraction", list: "a list", dict: "an object"}
    return words.get(type(value), f"{type(value).__name__}")


def opening(example: Example) -> str:
    """What stands before an example's first answer, blind to spaces and case: examples that share it share a split."""
    if "messages" in example:
        turns = list(takewhile(lambda m: m["role"] != "assistant", example["messages"])) or example["messages"][:1]
        parts = [f"{turn['role']} {turn['content']}" for turn in turns]
    elif "text" in example:
        parts = [example["text"]]
    else:
        parts = [example.get("system", ""), example["prompt"]]
    text = "\n".join(" ".join(part.split()) for part in parts).casefold()
    return text if text.strip() else str(example.get("completion"))
