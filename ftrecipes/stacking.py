"""Which methods can stand in one run, decided from the catalogue alone, before anything is loaded.

What a method's `about:` block says for it:

    points:    the points of Method that it takes part in
    domains:   what it can act on; `any` for all
    picks:     the roles of the weights that it makes trainable ([all], [head], or the name of its knob for roles);
               a stack in which nobody picks trains every weight
    whole:     true when it needs all weights to be trainable (an activity schedule over full weights)
    gradients: false when its step computes no gradients
    carrier:   methods that stand before it where nobody picks what trains, {lora: {tiny: settings, paper: settings}}
    nests:     true when its drive can run inside another one
    pairs:     true when it learns from chosen and rejected answers; of a data set: whether it has them
    unmergeable: why the weights of the plain model cannot hold what it made
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations
from typing import TYPE_CHECKING, Any

from ftrecipes import catalogue
from ftrecipes.catalogue import Entry
from ftrecipes.errors import UserError

if TYPE_CHECKING:
    from ftrecipes.compose import Settings

SINGLE = {
    "loss": "replaces the loss",
    "step": "owns the update",
    "optimizer": "brings its own optimizer",
}
GROUPED = {
    "all-linear": {"q", "k", "v", "o", "qkv", "gate", "up", "down", "linear"},
    "attention": {"q", "k", "v", "o", "qkv"},
    "mlp": {"gate", "up", "down"},
}


def check(settings: Settings) -> None:
    """Refuse a stack that cannot work, naming both sides and what to do."""
    methods = settings.methods()
    domain = settings.entry("model").about["domain"]
    for method in methods:
        domains = method.about.get("domains", [])
        if "any" not in domains and domain not in domains:
            raise UserError(
                f"{method.name} is for {', '.join(domains)}, and model {settings.model.name} is {domain}; "
                f"choose a model of its domain (ftr ls models)"
            )
    data_domains = settings.entry("data").about.get("domains", ["any"])
    if "any" not in data_domains and domain not in data_domains:
        raise UserError(
            f"data {settings.data.name} is for {', '.join(data_domains)}, and model {settings.model.name} is {domain}; "
            f"choose data for it (ftr ls data)"
        )
    data = settings.entry("data")
    for method in methods:
        if method.about.get("pairs") and not data.about.get("pairs"):
            have = ", ".join(name for name, entry in catalogue.entries("data").items() if entry.about.get("pairs") is True)
            raise UserError(
                f"{method.name} learns from chosen and rejected answers, and data {data.name} has none; "
                f"use data={have}, or data=file with columns prompt, chosen, rejected"
            )
    for a, b in combinations(methods, 2):
        if reason := pair(a, b, settings):
            raise UserError(f"{a.name} and {b.name} cannot stack: {reason}")
    if any("optimizer" in m.about.get("points", []) for m in methods):
        owner = next(m.name for m in methods if "optimizer" in m.about.get("points", []))
        if any(word.split("=")[0] == "optimizer" for word in settings.overrides):
            raise UserError(f"{owner} brings its own optimizer, so optimizer={settings.optimizer.name} would be ignored; leave it out")
        for word in settings.overrides:
            path = word.lstrip("+").partition("=")[0]
            if path.startswith("optimizer.") and path not in ("optimizer.lr", "optimizer.weight_decay"):
                raise UserError(f"{owner} brings its own optimizer, so {path} would be ignored; ftr show method {owner} lists its settings")


def pair(a: Entry, b: Entry, settings: Settings | None = None) -> str | None:
    """Why two methods cannot stand in one run, or None. Without settings, each is taken with its defaults."""
    for point, words in SINGLE.items():
        if _at(a, point) and _at(b, point):
            return f"each {words}; keep one of them"
    if _at(a, "drive") and _at(b, "drive") and not (a.about.get("nests") or b.about.get("nests")):
        return "each drives the whole training; keep one of them"
    return _same_weights(a, b, settings) or _clash(a, b, settings) or _clash(b, a, settings)


def check_mergeable(names: Iterable[str]) -> None:
    """Refuse to fold methods into plain weights which these cannot hold."""
    known = catalogue.entries("method")
    for name in names:
        if name in known and (reason := known[name].about.get("unmergeable")):
            raise UserError(f"{name} cannot be folded into plain weights: {reason}")


def _at(method: Entry, point: str) -> bool:
    return point in method.about.get("points", [])


def _same_weights(a: Entry, b: Entry, settings: Settings | None) -> str | None:
    if "picks" not in a.about or "picks" not in b.about:
        return None
    of_a, of_b = roles(a, settings), roles(b, settings)
    if "all" in of_a | of_b:
        return f"{(a if 'all' in of_a else b).name} trains every weight, the other freezes them; keep one of them"
    if of_a & of_b:
        shared = sorted(of_a & of_b - {"linear"}) or ["linear"]
        return f"both act on the same weights ({', '.join(shared)}); keep one, or give them different targets"
    return None


def _clash(a: Entry, b: Entry, settings: Settings | None) -> str | None:
    """Why `a` cannot stand beside `b`, seen from what `a` needs."""
    if a.about.get("whole") and "picks" in b.about and "all" not in roles(b, settings):
        return f"{a.name} needs every weight to be trainable, {b.name} freezes them"
    if a.about.get("gradients") is False and _at(b, "gradients"):
        return f"{a.name} computes no gradients, {b.name} acts on them"
    if a.about.get("gradients") is False and _at(b, "optimizer"):
        return f"{a.name} updates the weights itself, {b.name} brings an optimizer"
    if _at(a, "loss") and _at(b, "weights"):
        return f"{a.name} replaces the loss, so the weights that {b.name} gives to tokens or examples would be lost"
    reason = (a.about.get("excludes") or {}).get(b.name)
    return str(reason) if reason else None


def roles(method: Entry, settings: Settings | None = None) -> set[str]:
    """The roles of the weights that a method makes trainable."""
    picks = method.about["picks"]
    if isinstance(picks, str):
        value = settings.method[method.name][picks] if settings else method.knobs[picks]["default"]
        picks = value if value is not None else method.tiny.get(picks, [])
    out: set[str] = set()
    for item in picks:
        out |= GROUPED.get(item, {item})
    return out


def picking(settings: Settings) -> list[Entry]:
    """The methods that pick what trains."""
    return [m for m in settings.methods() if "picks" in m.about]


def leads(settings: Settings) -> list[Entry]:
    """The methods in the order in which they supply learning rate, steps and the like.

    First one that runs on a carrier (a paper that trains an adapter by a rule of its own), then the one that picks what
    trains, else the first listed; `full` stands last where nobody picks.
    """
    methods = settings.methods()
    picks = picking(settings)
    first = [m for m in methods if "carrier" in m.about] + picks[:1]
    order: list[Any] = first + [m for m in methods if m not in first]
    return order if picks else [*order, catalogue.get("method", "full")]
