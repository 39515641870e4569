"""The typed schema of settings: what a knob's declaration says and how a value is checked against it.

A knob is declared where its default stands, in the YAML of its group:

    rank: {default: 8, min: 1, help: rank of the update}
    init: {default: kaiming, choices: [kaiming, zero], help: start of theta}
    warmup: {default: null, type: [int, float], min: 0, help: steps, or a share of all steps below 1}

`type` is read off the default unless it is given. A default of null means *auto*: the value is filled from the
method's `paper:` or `tiny:` block, or from the `paper:`/`tiny:` entry of the knob itself.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

FIELDS = {"default", "type", "min", "max", "above", "below", "choices", "help", "paper", "tiny", "item", "optional"}
TYPES = {"int", "float", "bool", "str", "list", "dict", "any"}
BOUNDS = {
    "min": (operator.ge, "at least"),
    "max": (operator.le, "at most"),
    "above": (operator.gt, "above"),
    "below": (operator.lt, "below"),
}


def is_knob(node: Any) -> bool:
    """A declaration is a mapping with `default` and nothing that a declaration cannot hold."""
    return isinstance(node, Mapping) and "default" in node and set(node) <= FIELDS


def type_of(knob: Mapping[str, Any]) -> list[str]:
    """The names of the types that a knob accepts."""
    declared = knob.get("type")
    if declared is not None:
        return [declared] if isinstance(declared, str) else list(declared)
    if knob.get("choices"):
        return ["any"]
    default = knob["default"]
    if default is None:
        return ["any"]
    name = type(default).__name__
    return [name] if name in TYPES else ["any"]


def _matches(value: Any, name: str) -> bool:
    if name == "any":
        return True
    if name == "int":
        return isinstance(value, int) and not isinstance(value, bool)
    if name == "float":
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if name == "dict":
        return isinstance(value, Mapping)
    return type(value).__name__ == name


def coerce(value: Any, knob: Mapping[str, Any]) -> Any:
    """`1e-4` without a dot is a string in YAML 1.1 and a whole float is often meant as an int: read them so."""
    names = type_of(knob)
    if isinstance(value, str) and "float" in names and "str" not in names:
        try:
            return float(value.replace(".inf", "inf"))
        except ValueError:
            return value
    if isinstance(value, float) and value.is_integer() and "int" in names and "float" not in names:
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool) and names == ["float"]:
        return float(value)
    choices = knob.get("choices") or []
    if value not in choices and str(value) in choices:
        return str(value)
    if not isinstance(value, (list, type(None))) and names == ["list"]:
        return [value]
    return value


def problem(value: Any, knob: Mapping[str, Any]) -> str | None:
    """What is wrong with a value, in words that follow its name, or None."""
    names = type_of(knob)
    if value is None:
        if knob["default"] is None or knob.get("optional"):
            return None
        return f"must be {_wanted(names)}, not null"
    if "max" in knob and value == math.inf == knob["max"]:
        return None
    if not any(_matches(value, name) for name in names):
        return f"must be {_wanted(names)}, not {value!r}"
    choices = knob.get("choices")
    if choices:
        for item in value if isinstance(value, list) and "list" in names else [value]:
            if item not in choices:
                from ftrecipes.errors import nearest

                return f"cannot be {item!r}{nearest(str(item), map(str, choices))}"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return _out_of_range(value, knob)
    if isinstance(value, list) and knob.get("item"):
        item_knob = {"default": None, **knob["item"]}
        for item in value:
            wrong = "must not hold null" if item is None else problem(item, item_knob)
            if wrong:
                return f"holds {item!r}, which {wrong}"
    return None


def _wanted(names: list[str]) -> str:
    words = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
    words |= {"list": "a list", "dict": "a mapping"}
    return " or ".join(words.get(name, name) for name in names)


def _out_of_range(value: float, knob: Mapping[str, Any]) -> str | None:
    for name, (holds, words) in BOUNDS.items():
        if name in knob and not holds(value, knob[name]):
            return f"must be {words} {knob[name]}, not {value!r}"
    return None


def describe(knob: Mapping[str, Any]) -> str:
    """The allowed values in a few characters, for tables: `8 | 16`, `0 ≤ float < 1`."""
    if knob.get("choices"):
        return " | ".join(map(str, knob["choices"]))
    text = " or ".join(type_of(knob))
    low = f"{knob['min']} ≤ " if "min" in knob else f"{knob['above']} < " if "above" in knob else ""
    high = f" ≤ {knob['max']}" if "max" in knob else f" < {knob['below']}" if "below" in knob else ""
    return f"{low}{text}{high}"
