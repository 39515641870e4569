"""The packaged data of language models: questions about short stories, with exact answers (see stories.py)."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
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
    return _splits(stories.question, "storyqa", knobs["size"], knobs.get("wrong") or 0.0)


def pairs(knobs: dict[str, Any], domain: str) -> Splits:
    """The same with a wrong answer beside each right one."""
    return replace(_splits(stories.pair, "storypairs", knobs["size"]), target="preference")


def _splits(make: Callable[[random.Random], Example], seed: str, size: int, wrong: float = 0.0) -> Splits:
    seen: set[str] = set()
    sizes = {"test": 500, "validation": 500, "train": size}  # train last: test never depends on its size
    splits = {name: list(itertools.islice(stories.unique(make, f"{seed}/{name}", seen), n)) for name, n in sizes.items()}
    if wrong:
        splits["train"] = spoiled(splits["train"], wrong)
    return Splits(splits["train"], splits["validation"], splits["test"], HELD_OUT, "stories")


def spoiled(questions: list[Example], share: float) -> list[Example]:
    """Questions of which a share has a wrong answer; `source` tells which."""
    r = random.Random("wrong")
    drawn = [(q, r.random() < share) for q in questions]
    return [{**q, "response": stories.wrong(r, q), "source": "wrong"} if bad else {**q, "source": "right"} for q, bad in drawn]


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
