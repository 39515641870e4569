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
    return _splits(stories.question, "storyqa", knobs["size"])


def pairs(knobs: dict[str, Any], domain: str) -> Splits:
    """The same with a wrong answer beside each right one."""
    return replace(_splits(stories.pair, "storypairs", knobs["size"]), target="preference")


def _splits(make: Callable[[random.Random], Example], seed: str, size: int) -> Splits:
    seen: set[str] = set()
    sizes = {"test": 500, "validation": 500, "train": size}  # train last: test never depends on its size
    splits = {name: list(itertools.islice(stories.unique(make, f"{seed}/{name}", seen), n)) for name, n in sizes.items()}
    return Splits(splits["train"], splits["validation"], splits["test"], HELD_OUT, "stories")


def pretraining(knobs: dict[str, Any], domain: str) -> Splits:
    """The texts that tiny-llama is pretrained on: stories, and some greetings in dialogue form."""
    train = Stream("train", knobs["size"], knobs["chats"])
    return Splits(train, HELD_OUT, Stream("test", 500), HELD_OUT, "stories")
