"""`ftr compare`: finished runs side by side, with what differs in their settings."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ftrecipes.errors import UserError
from ftrecipes.record import Record
from ftrecipes.report.listing import console

LEFT_OUT = ("hardware.name", "logger", "tags", "resume")


@dataclass
class Row:
    """One run: its folder, flat settings, and results by name."""

    folder: Path
    info: dict[str, Any]
    settings: dict[str, Any]

    def metric(self, when: str, split: str, name: str) -> float | None:
        value = self.info.get("results", {}).get(when, {}).get(split, {}).get(name)
        return None if value is None else float(value)


def find(places: list[str]) -> list[Row]:
    """The runs in the given folders, at any depth."""
    rows = []
    for place in places:
        path = Path(place)
        if not path.exists():
            raise UserError(f"{place}: no such folder")
        found = sorted(p.parent for p in ([path / "run.json"] if (path / "run.json").is_file() else path.rglob("run.json")))
        for folder in found:
            record = Record(folder)
            rows.append(Row(folder, record.info, flat(record.config)))
    if not rows:
        raise UserError(f"{', '.join(places)}: no run was found there")
    return rows


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves by dotted path."""
    if isinstance(node, dict) and node:
        out: dict[str, Any] = {}
        for key, value in node.items():
            out |= flat(value, f"{prefix}.{key}" if prefix else str(key))
        return out
    return {prefix: node}


def differing(rows: list[Row]) -> list[str]:
    """The settings that are not the same in all runs; knobs of methods that only some have count as one difference."""
    paths = dict.fromkeys(path for row in rows for path in row.settings)
    out = []
    for path in paths:
        if path.startswith(LEFT_OUT):
            continue
        if path.startswith("method."):
            holders = [row for row in rows if path in row.settings]
            values = {json.dumps(row.settings[path], default=str) for row in holders}
            if len(values) > 1:
                out.append(path)
        elif len({json.dumps(row.settings.get(path), default=str) for row in rows}) > 1:
            out.append(path)
    return out


def table(rows: list[Row]) -> list[dict[str, Any]]:
    """One flat row a run: what it is, what differs, what came of it."""
    names = list(dict.fromkeys(n for row in rows for n in row.info.get("results", {}).get("after", {}).get("test", {})))
    out = []
    for row in rows:
        results = row.info.get("results", {})
        line: dict[str, Any] = {"run": str(row.folder), "method": "+".join(row.info.get("methods", [])), "status": row.info.get("status")}
        line |= {path: row.settings.get(path) for path in differing(rows) if path != "method"}
        for name in names:
            line[f"test/{name}"] = row.metric("after", "test", name)
        line["retain/nll"] = row.metric("after", "retain", "nll") if row.metric("after", "retain", "nll") is not None else None
        before, after = row.metric("before", "retain", "nll"), line["retain/nll"]
        line["forgetting"] = after - before if before is not None and after is not None else None
        line["trainable"] = results.get("trainable")
        line["seconds"] = row.info.get("seconds")
        out.append(line)
    return out


def asked(rows: list[Row], paths: list[str]) -> list[str]:
    """Of differing settings those that were typed for some run; the rest follow from them (a method's own rates, …)."""
    typed = {word.lstrip("+").partition("=")[0] for row in rows for word in row.info.get("overrides", [])}
    return [p for p in paths if p in typed or any(p == f"{t}.name" for t in typed) or p == "seed"]


def show_compare(places: list[str], as_json: bool, everything: bool = False) -> None:
    """Print the table; without `everything` only those differing settings that were asked for."""
    rows = find(places)
    lines = table(rows)
    if as_json:
        print(json.dumps(lines, indent=1, default=str))
        return
    out = console()
    common = Path(rows[0].folder).parent if len({row.folder.parent for row in rows}) == 1 else None
    paths = differing(rows)
    hidden = [] if everything else [p for p in paths if p not in asked(rows, paths)]
    columns = [c for c in lines[0] if c not in hidden and any(line.get(c) is not None for line in lines)]
    if all(line["status"] == "done" for line in lines):
        columns.remove("status")
    shown = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        numeric = any(isinstance(line.get(column), (int, float)) and not isinstance(line.get(column), bool) for line in lines)
        shown.add_column(column, justify="right" if numeric else "left", no_wrap=True)
    for line in lines:
        cells = dict(line)
        if common is not None:
            cells["run"] = Path(str(line["run"])).name
        shown.add_row(*(_cell(cells.get(c)) for c in columns))
    if common is not None:
        out.print(f"{common}/", style="dim", soft_wrap=True)
    width = max(out.width, 40 + 24 * len(columns))
    Console(highlight=False, width=width, soft_wrap=True).print(shown)
    if hidden:
        out.print(
            f"{len(hidden)} more settings differ (--all shows them): {', '.join(hidden[:6])}{' …' if len(hidden) > 6 else ''}",
            style="dim",
            soft_wrap=True,
        )


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e-3 or abs(value) >= 1e4 else f"{value:.4f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
