"""A small world told in plain English: the pretraining domain of tiny-llama, and questions about it with exact answers.

Everything is generated from a seed. `document` tells a short story in which states are followed to their end (how many
apples are left, who holds the ball, where somebody is); the packaged model is pretrained on these. `question` asks about
such a story without telling the end; a model has to be tuned to answer in that form. `pair` adds a wrong answer.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

NAMES = [
    "Mia",
    "Tom",
    "Anna",
    "Ben",
    "Lily",
    "Sam",
    "Eva",
    "Max",
    "Nora",
    "Leo",
    "Ida",
    "Paul",
    "Zoe",
    "Finn",
    "Ruth",
    "Carl",
    "Emma",
    "Otto",
    "Rosa",
    "Hugo",
    "Vera",
    "Ivan",
    "Lucy",
    "Noah",
]
PLACES = [
    "park",
    "shop",
    "garden",
    "kitchen",
    "school",
    "forest",
    "river",
    "house",
    "barn",
    "market",
    "beach",
    "library",
    "tower",
    "bridge",
    "field",
    "cellar",
]
THINGS = [
    "ball",
    "hat",
    "cup",
    "book",
    "key",
    "pen",
    "box",
    "lamp",
    "bell",
    "kite",
    "coat",
    "shoe",
    "map",
    "drum",
    "rope",
    "coin",
    "stone",
    "flag",
    "ring",
    "doll",
]
FOODS = ["apples", "pears", "plums", "nuts", "eggs", "cakes", "beans", "figs", "grapes", "cherries", "carrots", "buns"]
COLOURS = ["red", "green", "blue", "yellow", "black", "white", "brown", "pink"]
ANIMALS = {
    "cow": ("grass", "barn", "moo"), "dog": ("meat", "house", "woof"), "cat": ("fish", "house", "meow"),
    "hen": ("seeds", "barn", "cluck"), "duck": ("bread", "river", "quack"), "sheep": ("grass", "field", "baa"),
    "pig": ("corn", "barn", "oink"), "owl": ("mice", "forest", "hoot"), "bee": ("honey", "garden", "buzz"),
    "frog": ("flies", "river", "croak"), "horse": ("hay", "field", "neigh"), "wolf": ("meat", "forest", "howl"),
}  # fmt: skip
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
FEELINGS = [("happy", "smiles"), ("sad", "cries"), ("tired", "yawns"), ("angry", "shouts"), ("cold", "shivers"), ("proud", "sings")]
WEATHER = [("sunny", "warm"), ("rainy", "wet"), ("windy", "cold"), ("snowy", "white"), ("foggy", "grey")]
GOES = ["walks", "runs", "goes", "hurries"]
PAIRS = [
    ("taller", "tallest", "shortest"),
    ("older", "oldest", "youngest"),
    ("faster", "fastest", "slowest"),
    ("stronger", "strongest", "weakest"),
]

Ending = tuple[str, str, str]
"""A statement of how things stand at the end, a question about it, and its answer."""

Told = tuple[list[str], list[Ending]]
"""The sentences of a story, and what can be said and asked of its end."""


def _count(r: random.Random) -> Told:
    a, b = r.sample(NAMES, 2)
    food, n = r.choice(FOODS), r.randint(2, 9)
    told = [f"{a} has {n} {food}."]
    for _ in range(r.randint(1, 2)):
        m = r.randint(1, 5)
        if r.random() < 0.5 or n - m < 0:
            n += m
            told.append(r.choice([f"{b} gives {a} {m} more.", f"{a} finds {m} more.", f"{a} buys {m} more."]))
        else:
            n -= m
            told.append(r.choice([f"{a} eats {m} of them.", f"{a} gives {m} to {b}.", f"{a} loses {m}."]))
    return told, [(f"now {a} has {n} {food}", f"How many {food} does {a} have now?", str(n))]


def _move(r: random.Random) -> Told:
    people = r.sample(NAMES, r.randint(1, 2))
    at: dict[str, str] = {}
    told = []
    for a in people:
        at[a] = r.choice(PLACES)
        told.append(f"{a} is in the {at[a]}.")
    for _ in range(r.randint(1, 3)):
        a = r.choice(people)
        at[a] = r.choice([p for p in PLACES if p != at[a]])
        told.append(r.choice(["", "Then "]) + f"{a} {r.choice(GOES)} to the {at[a]}.")
    return told, [(f"now {a} is in the {at[a]}", f"Where is {a} now?", f"in the {at[a]}") for a in people]


def _colour(r: random.Random) -> Told:
    people, things, colours = r.sample(NAMES, 3), r.sample(THINGS, 3), r.sample(COLOURS, 3)
    n = r.randint(2, 3)
    told = [f"{people[i]} has a {colours[i]} {things[i]}." for i in range(n)]
    if r.random() < 0.3:
        i = r.randrange(n)
        colours[i] = r.choice([c for c in COLOURS if c != colours[i]])
        told.append(f"{people[i]} paints the {things[i]} {colours[i]}.")
    return told, [(f"the {things[i]} is {colours[i]}", f"What colour is the {things[i]}?", colours[i]) for i in range(n)]


def _give(r: random.Random) -> Told:
    people, thing = r.sample(NAMES, 4), r.choice(THINGS)
    told = [f"{people[0]} has the {thing}."]
    steps = r.randint(1, 3)
    for giver, taker in zip(people[:steps], people[1 : steps + 1], strict=True):
        told.append(r.choice([f"{giver} gives the {thing} to {taker}.", f"{taker} takes the {thing} from {giver}."]))
    holder, first = people[steps], people[0]
    return told, [
        (f"now the {thing} is with {holder}", f"Who has the {thing} now?", holder),
        (f"first the {thing} was with {first}", f"Who had the {thing} first?", first),
    ]


def _compare(r: random.Random) -> Told:
    a, b, c = r.sample(NAMES, 3)
    more, most, least = r.choice(PAIRS)
    told = [f"{a} is {more} than {b}.", f"{b} is {more} than {c}."]
    r.shuffle(told)
    return told, [(f"the {what} is {who}", f"Who is the {what}?", who) for who, what in ((a, most), (c, least))]


def _list(r: random.Random) -> Told:
    a, things = r.choice(NAMES), r.sample(THINGS, r.randint(3, 4))
    told = [f"{a} packs {', '.join(f'a {t}' for t in things[:-1])} and a {things[-1]}."]
    back = " ".join(reversed(things))
    return told, [
        (f"backwards that is {back}", "What is the list backwards?", back),
        (f"the first thing is the {things[0]}", "What is the first thing?", things[0]),
        (f"the last thing is the {things[-1]}", "What is the last thing?", things[-1]),
    ]


def _sum(r: random.Random) -> Told:
    who, a, b = r.choice(NAMES), r.randint(0, 12), r.randint(0, 9)
    if r.random() < 0.5:
        a, b = max(a, b), min(a, b)
        return [f"{who} takes {b} from {a}."], [(f"{a} - {b} = {a - b}", f"What is {a} - {b}?", str(a - b))]
    return [f"{who} adds {a} and {b}."], [(f"{a} + {b} = {a + b}", f"What is {a} + {b}?", str(a + b))]


def _day(r: random.Random) -> Told:
    i, who, place = r.randrange(7), r.choice(NAMES), r.choice(PLACES)
    words, steps = r.choice([("tomorrow", 1), ("in two days", 2), ("in three days", 3)])
    day = DAYS[(i + steps) % 7]
    told = [f"Today is {DAYS[i]}.", f"{who} goes to the {place} {words}."]
    return told, [(f"{who} goes on {day}", f"On what day does {who} go to the {place}?", day)]


KINDS: dict[str, Callable[[random.Random], Told]] = {
    "count": _count, "move": _move, "colour": _colour, "give": _give,
    "compare": _compare, "list": _list, "sum": _sum, "day": _day,
}  # fmt: skip


def _scene(r: random.Random) -> str:
    """A few sentences that follow nothing, for the language of the world."""
    a, b = r.sample(NAMES, 2)
    feeling, does = r.choice(FEELINGS)
    weather, makes = r.choice(WEATHER)
    animal = r.choice(list(ANIMALS))
    eats, lives, says = ANIMALS[animal]
    place, thing = r.choice(PLACES), r.choice(THINGS)
    lines = [
        f"It is a {weather} day and the {place} is {makes}.",
        f"{a} is {feeling}, so {a} {does}.",
        f"A {animal} lives in the {lives}. It eats {eats} and says {says}.",
        f"{a} and {b} are in the {place}. They look for the {thing}.",
        f'"Where is my {thing}?" asks {a}. "It is in the {place}," says {b}.',
        f"{b} sees a {animal} near the {lives}. The {animal} says {says}.",
        f"{a} tells {b} a story about a {r.choice(COLOURS)} {thing}.",
        f"In the evening {a} goes home and sleeps.",
    ]
    return " ".join(r.sample(lines, r.randint(2, 4)))


def _said(r: random.Random, endings: list[Ending]) -> str:
    """Some of the endings, as statements or as somebody's question and somebody's answer."""
    out = []
    for statement, asked, _ in r.sample(endings, r.randint(1, len(endings))):
        if r.random() < 0.4:
            a, b = r.sample(NAMES, 2)
            out.append(f'"{asked}" asks {a}. "{_capital(statement)}," says {b}.')
        else:
            out.append(f"{_capital(statement)}.")
    return " ".join(out)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def document(r: random.Random) -> str:
    """One text of the pretraining domain, 15 to 120 words."""
    parts = []
    for _ in range(r.randint(1, 3)):
        kind = r.choice([*KINDS, "scene"])
        if kind == "scene":
            parts.append(_scene(r))
        else:
            told, endings = KINDS[kind](r)
            parts.append(" ".join([*told, _said(r, endings)]))
    return " ".join(parts)


def chat(r: random.Random) -> list[dict[str, str]]:
    """A greeting in the form of a dialogue, so that the pretrained model knows the turns and no answers."""
    a, b = r.sample(NAMES, 2)
    weather = r.choice(WEATHER)[0]
    asked, said = r.choice([
        (f"Hello, I am {a}.", f"Hello, {a}."),
        (f"Good morning. My name is {a} and this is {b}.", f"Good morning, {a} and {b}."),
        (f"It is {weather} today.", f"Yes, it is a {weather} day."),
        (f"Say: {(s := _scene(r).split('. ')[0].rstrip('.'))}.", f"{s}."),
        ("Tell me a story.", document(r)),
    ])  # fmt: skip
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]


def question(r: random.Random) -> dict[str, str]:
    """A story without its end, a question about it, and the answer."""
    kind = r.choice(list(KINDS))
    told, endings = KINDS[kind](r)
    _, asked, answer = r.choice(endings)
    return {"prompt": " ".join([*told, asked]), "response": answer, "kind": kind}


def wrong(r: random.Random, example: dict[str, str]) -> str:
    """A plausible wrong answer to a question: of the right one's form, often a thing that the story names.

    Every answer is the only right one of its form (one place, one holder, one number), so this one is wrong for certain.
    """
    prompt, answer = example["prompt"], example["response"]
    if answer.isdecimal():
        near = {int(n) for n in re.findall(r"\d+", prompt)} | {int(answer) + d for d in (-2, -1, 1, 2)}
        return str(r.choice(sorted(n for n in near if n >= 0 and n != int(answer))))
    words = answer.removeprefix("in the ").split()
    if len(words) > 1:  # a list backwards: in another order
        orders = [list(order) for order in itertools.permutations(words) if list(order) != words]
        return " ".join(r.choice(orders))
    form = next(form for form in (NAMES, PLACES, COLOURS, DAYS, THINGS) if words[0] in form)
    told = [word for word in dict.fromkeys(re.findall(r"\w+", prompt)) if word in form and word != words[0]]
    near_by = told if told and r.random() < 0.7 else [word for word in form if word != words[0]]
    return answer.removesuffix(words[0]) + r.choice(near_by)


def pair(r: random.Random) -> dict[str, Any]:
    """A question with its answer and a wrong one."""
    example = question(r)
    return {**example, "others": [wrong(r, example)]}


def answers(r: random.Random) -> dict[str, str]:
    """A story without its end, a question about it, and its right answer in three styles.

    statement: as stories tell it. bare: the answer alone. shout: the statement in capitals, with marks.
    """
    kind = r.choice(list(KINDS))
    told, endings = KINDS[kind](r)
    statement, asked, answer = r.choice(endings)
    styles = {"statement": f"{_capital(statement)}.", "bare": answer, "shout": f"{statement.upper()}!!!"}
    return {"prompt": " ".join([*told, asked]), "kind": kind, **styles}


def unique(make: Callable[[random.Random], dict[str, Any]], seed: str, seen: set[str]) -> Iterator[dict[str, Any]]:
    """Examples whose prompt was not seen before; `seen` is shared between splits so that none leaks."""
    r = random.Random(seed)
    misses = 0
    while misses < 10_000:
        example = make(r)
        if example["prompt"] in seen:
            misses += 1
            continue
        seen.add(example["prompt"])
        yield example
