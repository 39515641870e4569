"""`ftr ls` and `ftr show`: the catalogue as tables; neither torch nor Hydra is imported here."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ftrecipes import catalogue, schema
from ftrecipes.catalogue import Entry
from ftrecipes.errors import UserError, nearest

WORDS = {catalogue.plural(group): group for group in catalogue.GROUPS} | {"recipes": "recipe"}
FIDELITY = {
    "official": "checked against the authors' code",
    "peer": "checked against a library",
    "paper": "checked against the paper's formulas",
    "reconstructed": "parts had to be guessed",
}


def group_of(word: str) -> str:
    """The group that a word means, singular or plural."""
    group = WORDS.get(word, word)
    if group not in (*catalogue.GROUPS, "recipe"):
        raise UserError(f"cannot list '{word}'{nearest(word, [*WORDS])}")
    return group


def console() -> Console:
    """Standard output; as wide as it needs to be when it is not a terminal."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def show_list(what: str, as_json: bool) -> None:
    """One line an entry, grouped by family."""
    group = group_of(what)
    rows = _recipes() if group == "recipe" else [_row(entry) for entry in catalogue.entries(group).values()]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    columns = [c for c in ("name", "title", "arxiv", "domain", "fidelity") if any(r.get(c) for r in rows)]
    widths = {c: max(len(str(r.get(c) or "")) for r in rows) for c in columns}
    out = console()
    room = out.width - sum(w + 2 for c, w in widths.items() if c != "title") - 2
    widths["title"] = max(20, min(widths.get("title", 0), room))
    families: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        families.setdefault(row.get("family") or "", []).append(row)
    for family, members in sorted(families.items(), key=lambda item: (item[0] != "baseline", item[0])):
        if family:
            out.print(Text(f"{family} ({len(members)})", style="bold cyan"))
        for row in members:
            cells = (_fit(str(row.get(c) or ""), widths[c]) for c in columns)
            out.print(Text(f"  {'  '.join(cells)}".rstrip()), soft_wrap=True)
    out.print(f"\n{len(rows)} {catalogue.plural(group)} · ftr show {group} NAME", style="dim")


def _fit(text: str, width: int) -> str:
    return text.ljust(width) if len(text) <= width else f"{text[: width - 1]}…"


def _row(entry: Entry) -> dict[str, Any]:
    about = entry.about
    domain = about.get("domain") or ", ".join(about.get("domains", []))
    return {
        "name": entry.name,
        "title": about.get("title", ""),
        "arxiv": about.get("arxiv"),
        "family": about.get("family"),
        "domain": domain,
        "fidelity": (about.get("fidelity") or {}).get("level"),
    }


def _recipes() -> list[dict[str, Any]]:
    return [
        {"name": name, "title": "".join(comment(path.read_text())[:1]), "family": name.split("/")[0]}
        for name, path in catalogue.recipes().items()
    ]


def comment(text: str) -> list[str]:
    """The lines of the comment that a YAML file begins with."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").rstrip())
    return [line for line in lines if line and not line.startswith("@")]


def show_entry(group: str, name: str, cite: bool, as_json: bool) -> None:
    """Everything about one entry."""
    group = group_of(group)
    if group == "recipe":
        _show_recipe(name)
        return
    entry = catalogue.get(group, name)
    if cite:
        print(bibtex(entry))
    elif as_json:
        print(json.dumps({k: v for k, v in vars(entry).items() if k != "code"}, indent=1))
    else:
        _show(entry)


def _show_recipe(name: str) -> None:
    found = catalogue.recipes()
    if name not in found:
        raise UserError(f"unknown recipe '{name}'{nearest(name, found)} (ftr ls recipes)")
    print(found[name].read_text().rstrip())
    print(f"\nftr train recipe={name}")


def _show(entry: Entry) -> None:
    out, about = console(), entry.about
    out.print(f"[bold]{entry.name}[/]  {about.get('title', '')}", soft_wrap=True)
    source = [
        about.get("authors"),
        str(about["year"]) if about.get("year") else None,
        f"arXiv {about['arxiv']}" if about.get("arxiv") else None,
    ]
    facts = {
        "paper": ", ".join(filter(None, source)),
        "code": about.get("official"),
        "family": about.get("family"),
        "domain": about.get("domain") or ", ".join(about.get("domains", [])),
        "takes part at": ", ".join(about.get("points", [])),
        "trains": _trains(entry),
        "brings": ", ".join(f"{k}={v}" for k, v in entry.brings.items()),
        "requires": ", ".join(f"{k}={v}" for k, v in entry.requires.items()),
        "hub": about.get("hub"),
        "variants": about.get("variants"),
        "stays apart": about.get("unmergeable"),
    }
    for label, value in facts.items():
        if value:
            out.print(f"  {label:14s}{value}", soft_wrap=True, markup=False)
    if about.get("idea"):
        out.print(f"\n{' '.join(about['idea'].split())}", soft_wrap=True, markup=False)
    if fidelity := about.get("fidelity"):
        out.print(f"\n[bold]fidelity[/]  {fidelity['level']}: {FIDELITY[fidelity['level']]}", soft_wrap=True)
        if fidelity.get("against"):
            out.print(f"  against  {fidelity['against']}", soft_wrap=True, markup=False)
        for guess in fidelity.get("guesses", []):
            out.print(f"  guessed  {guess}", soft_wrap=True, markup=False)
    if entry.knobs:
        out.print(f"\n[bold]settings[/]  {entry.at('NAME')}=VALUE")
        out.print(_knobs(entry))
    other = [(key, entry.tiny.get(key, ""), entry.paper.get(key, "")) for key in dict.fromkeys([*entry.tiny, *entry.paper]) if "." in key]
    if other:
        out.print("\n[bold]sets[/] where nothing else is asked for")
        table = _table("setting", "tiny models", "real models")
        for row in other:
            table.add_row(*(escape(_plain(value)) for value in row))
        out.print(table)
    if entry.group == "method":
        _findings(out, entry)


def _trains(entry: Entry) -> str:
    picks = entry.about.get("picks")
    if picks is None:
        return "what the rest of the stack picks, all weights if nobody does" if entry.group == "method" else ""
    if isinstance(picks, str):
        default = entry.knobs[picks]["default"]
        chosen = default if isinstance(default, list) else entry.tiny.get(picks, [])
        return f"{', '.join(chosen)} ({entry.at(picks)})"
    return ", ".join(picks)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _knobs(entry: Entry) -> Table:
    scaled = {k for k in (*entry.tiny, *entry.paper) if "." not in k} | {k for k, v in entry.knobs.items() if "tiny" in v or "paper" in v}
    table = _table("  name", "default", *(["tiny", "paper"] if scaled else []), "values", "meaning")
    for name, knob in entry.knobs.items():
        by_size = [entry.tiny.get(name, knob.get("tiny", "")), entry.paper.get(name, knob.get("paper", ""))] if scaled else []
        default = "auto" if knob["default"] is None and (name in scaled or "auto" in str(knob.get("help"))) else _plain(knob["default"])
        cells = [f"  {name}", default, *map(_plain, by_size), schema.describe(knob), str(knob.get("help", ""))]
        table.add_row(*map(escape, cells))
    return table


def _plain(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{', '.join(map(_plain, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _findings(out: Console, entry: Entry) -> None:
    if findings := entry.about.get("findings"):
        out.print("\n[bold]findings[/] to sweep with -m")
        for finding in findings:
            out.print(f"  {finding}", soft_wrap=True, markup=False)
    out.print("\n[bold]stacks with[/]")
    free, refused = stacks(entry)
    out.print(f"  {', '.join(free) or 'nothing'}", soft_wrap=True, markup=False)
    for reason, names in refused.items():
        out.print(f"  not {', '.join(names)}: {reason}", soft_wrap=True, markup=False)
    out.print(f"\nftr train method={entry.name}", markup=False)


def stacks(entry: Entry) -> tuple[list[str], dict[str, list[str]]]:
    """The methods that can stand beside this one by the catalogue alone, and the others by reason."""
    from ftrecipes import stacking

    free: list[str] = []
    refused: dict[str, list[str]] = {}
    for other in catalogue.entries("method").values():
        if other.name == entry.name:
            continue
        reason = stacking.pair(entry, other)
        if reason is None:
            free.append(other.name)
        else:
            refused.setdefault(reason, []).append(other.name)
    return free, refused


def bibtex(entry: Entry) -> str:
    """A BibTeX entry of a method's paper, and this project beside it."""
    about = entry.about
    if not about.get("arxiv"):
        raise UserError(f"{entry.group} {entry.name} has no paper to cite")
    fields: Iterable[tuple[str, Any]] = [
        ("title", about.get("title")),
        ("author", str(about.get("authors", "")).replace(" et al.", " and others")),
        ("year", about.get("year")),
        ("eprint", about["arxiv"]),
        ("archivePrefix", "arXiv"),
        ("url", f"https://arxiv.org/abs/{about['arxiv']}"),
    ]
    body = ",\n".join(f"  {key} = {{{value}}}" for key, value in fields if value)
    return f"@misc{{{entry.name},\n{body}\n}}"
