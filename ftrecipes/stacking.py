"""Which methods can stand in one run, decided from the catalogue alone, before anything is loaded.

What a method's `about:` block says for it:

    points:    the points of Method that it takes part in
    domains:   what it can act on; `any` for all
    picks:     the roles of the weights that it makes trainable ([all], [head], or the name of its knob for roles);
               a stack in which nobody picks trains every weight
    whole:     true when it needs all weights to be trainable (an activity schedule over full weights)
    gradients: false when its step computes no gradients
    nests:     true when its drive can run inside another one
"""

from __future__ import annotations

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
    for point, words in SINGLE.items():
        owners = [m.name for m in methods if point in m.about.get("points", [])]
        if len(owners) > 1:
            raise UserError(f"{owners[0]} and {owners[1]} cannot stack: each {words}; keep one of them")
    drivers = [m for m in methods if "drive" in m.about.get("points", []) and not m.about.get("nests")]
    if len(drivers) > 1:
        raise UserError(f"{drivers[0].name} and {drivers[1].name} cannot stack: each drives the whole training; keep one")
    for a, b in combinations(methods, 2):
        reason = _clash(settings, a, b) or _clash(settings, b, a)
        if reason:
            raise UserError(f"{a.name} and {b.name} cannot stack: {reason}")
    if any("optimizer" in m.about.get("points", []) for m in methods):
        owner = next(m.name for m in methods if "optimizer" in m.about.get("points", []))
        if any(word.split("=")[0] == "optimizer" for word in settings.overrides):
            raise UserError(f"{owner} brings its own optimizer, so optimizer={settings.optimizer.name} would be ignored; leave it out")


def _clash(settings: Settings, a: Entry, b: Entry) -> str | None:
    """Why `a` cannot stand beside `b` (seen from `a`), or None."""
    if "picks" in a.about and "picks" in b.about:
        both = roles(settings, a) & roles(settings, b)
        if "all" in roles(settings, a) | roles(settings, b):
            whole = a if "all" in roles(settings, a) else b
            return f"{whole.name} trains every weight, the other freezes them; keep one of them"
        if both:
            return (
                f"both act on the same weights ({', '.join(sorted(both))}); keep one, or give them different targets ({a.at('targets')}=…)"
            )
    if a.about.get("whole") and "picks" in b.about and "all" not in roles(settings, b):
        return f"{a.name} needs every weight to be trainable, {b.name} freezes them"
    if a.about.get("gradients") is False:
        if "gradients" in b.about.get("points", []):
            return f"{a.name} computes no gradients, {b.name} acts on them"
        if "optimizer" in b.about.get("points", []):
            return f"{a.name} updates the weights itself, {b.name} brings an optimizer"
    reason = (a.about.get("excludes") or {}).get(b.name)
    return str(reason) if reason else None


def roles(settings: Settings, method: Entry) -> set[str]:
    """The roles of the weights that a method makes trainable."""
    picks = method.about["picks"]
    if isinstance(picks, str):
        picks = settings.method[method.name][picks]
    out: set[str] = set()
    for item in picks:
        out |= GROUPED.get(item, {item})
    return out


def picking(settings: Settings) -> list[Entry]:
    """The methods that pick what trains."""
    return [m for m in settings.methods() if "picks" in m.about]


def leads(settings: Settings) -> list[Entry]:
    """The methods in the order in which they supply learning rate, steps and the like.

    First the one that picks what trains, else the first listed; `full` stands last where nobody picks.
    """
    methods = settings.methods()
    picks = picking(settings)
    order: list[Any] = picks[:1] + [m for m in methods if m not in picks[:1]]
    return order if picks else [*order, catalogue.get("method", "full")]
