"""The packaged data of language models: questions about short stories, with exact answers (see stories.py)."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

from ftrecipes.data import stories
from ftrecipes.data.base import Example, Splits


class Stream(Sequence[Example]):
    """`size` generated texts of the pretraining domain, made when they are asked for."""

    def __init__(self, name: str, size: int, chats: float = 0.0) -> None:
        self.name, self.size, self.chats = name, size, chats

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self.size:
            raise IndexError(index)
        r = random.Random(f"stories/{self.name}/{index}")
        return {"messages": stories.chat(r)} if r.random() < self.chats else {"text": stories.document(r)}


HELD_OUT = Stream("heldout", 200)


def build(knobs: dict[str, Any], domain: str) -> Splits:
    """Questions by split, none in two of them; stories of the pretraining domain are what may be forgotten."""
    seen: set[str] = set()
    sizes = {"test": 500, "validation": 500, "train": knobs["size"]}  # train last: test never depends on its size
    splits = {name: list(itertools.islice(stories.unique(stories.question, f"storyqa/{name}", seen), size)) for name, size in sizes.items()}
    if knobs.get("wrong"):
        splits["train"] = spoiled(splits["train"], knobs["wrong"])
    return Splits(splits["train"], splits["validation"], splits["test"], HELD_OUT, "stories")


def spoiled(questions: list[Example], share: float) -> list[Example]:
    """Questions of which a share has another question's answer of the same kind; `source` tells which."""
    r = random.Random("wrong")
    answers: dict[str, list[str]] = {}
    for q in questions:
        answers.setdefault(q["kind"], []).append(q["response"])
    out = []
    for q in questions:
        others = [a for a in set(answers[q["kind"]]) if a != q["response"]]
        wrong = bool(others) and r.random() < share
        out.append({**q, "response": r.choice(sorted(others)) if wrong else q["response"], "source": "wrong" if wrong else "right"})
    return out


def pool(knobs: dict[str, Any], domain: str) -> Splits:
    """Questions with several answers, one row an answer; `source` says its style. Held-out questions want one style."""
    seen: set[str] = set()
    splits: dict[str, list[Example]] = {}
    for name, size in {"test": 500, "validation": 500, "train": knobs["size"]}.items():
        made = itertools.islice(stories.unique(stories.answers, f"storypool/{name}", seen), size)
        styles = ("statement", "bare", "shout") if name == "train" else (knobs["asked"],)
        splits[name] = [{"prompt": q["prompt"], "response": q[style], "kind": q["kind"], "source": style} for q in made for style in styles]
        if name == "train":  # the place of an answer says nothing of its style
            random.Random("storypool").shuffle(splits[name])
    return Splits(splits["train"], splits["validation"], splits["test"], HELD_OUT, "stories")


def pretraining(knobs: dict[str, Any], domain: str) -> Splits:
    """The texts that tiny-llama is pretrained on: stories, and some greetings in dialogue form."""
    train = Stream("train", knobs["size"], knobs["chats"])
    return Splits(train, HELD_OUT, Stream("test", 500), HELD_OUT, "stories")
