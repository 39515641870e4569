"""What can be composed: every entry of every config group, read from its YAML without importing torch or Hydra.

An entry is one file `conf/<group>/<name>.yaml`. Its top level holds

    about:     what it is (title, arxiv, domains, fidelity, …); shown by `ftr ls` and `ftr show`
    knobs:     the settings, each declared with default, type, range and meaning (see schema.py)
    brings:    other groups that it pulls along when nothing else is asked for, {model: tiny-vit, data: shapes}
    paper:     values of settings at the scale of the paper, {optimizer.lr: 2e-5, rank: 32}
    tiny:      the same for the packaged tiny models
    requires:  values without which the method is wrong

`_group.yaml` declares the knobs that all files of a group share. What Hydra composes from an entry is only the
defaults of the knobs; everything else stays here.

Three places are read: this project's `conf/`, other packages that declare the entry point `ftrecipes.methods`
(`key = package.module:Class`, with the YAML at `package/conf/method/key.yaml`), and plugins named on the command line.
"""

from __future__ import annotations

import functools
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ftrecipes.errors import UserError, nearest
from ftrecipes.schema import FIELDS, is_knob

PACKAGE = Path(__file__).resolve().parent
GROUPS = ("model", "method", "data", "optimizer", "schedule", "hardware", "logger")
RESERVED = {"about", "knobs", "brings", "paper", "tiny", "requires"}
CACHE_FORMAT = 3


def _home(name: str) -> Path:
    """`conf` or `recipes`: inside the package in an installed wheel, beside it in a checkout."""
    inside = PACKAGE / name
    return inside if inside.is_dir() else PACKAGE.parent / name


CONF, RECIPES = _home("conf"), _home("recipes")


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Safe YAML that reads 1e-4 as a number, as Hydra and everybody's eyes do."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789."))


def read_yaml(path: Path) -> Any:
    """A YAML file as plain data; a broken one is a one-line error with file and line."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"{where}: not valid YAML ({getattr(error, 'problem', error)})") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def cache_folder() -> Path:
    """Where derived files live that can be deleted at any time (`FTR_CACHE`, else `~/.cache/ftrecipes`)."""
    base = os.environ.get("FTR_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "ftrecipes")
    return Path(base).expanduser()


@dataclass(frozen=True)
class Entry:
    """One option of one group."""

    group: str
    name: str
    path: str
    about: dict[str, Any] = field(default_factory=dict)
    knobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    brings: dict[str, Any] = field(default_factory=dict)
    paper: dict[str, Any] = field(default_factory=dict)
    tiny: dict[str, Any] = field(default_factory=dict)
    requires: dict[str, Any] = field(default_factory=dict)
    code: str | None = None

    def values(self) -> dict[str, Any]:
        """What Hydra composes: the defaults of the knobs, nested where a knob's name has dots."""
        out: dict[str, Any] = {} if self.group == "method" else {"name": self.name}
        for name, knob in self.knobs.items():
            node = out
            *parents, last = name.split(".")
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = knob["default"]
        return out

    def setting(self, size: str) -> dict[str, Any]:
        """The `paper:` or `tiny:` block, with bare knob names written as paths below this entry."""
        block = {"paper": self.paper, "tiny": self.tiny}[size]
        return {key if "." in key else self.at(key): value for key, value in block.items()}

    def at(self, knob: str) -> str:
        """The path of a knob in the composed config."""
        return f"method.{self.name}.{knob}" if self.group == "method" else f"{self.group}.{knob}"


def _parse(group: str, name: str, path: Path, raw: Any, shared: Mapping[str, Any]) -> Entry:
    raw = raw or {}
    if not isinstance(raw, Mapping):
        raise UserError(f"{path}: must hold a mapping with {', '.join(sorted(RESERVED))}")
    unknown = set(raw) - RESERVED
    if unknown:
        word = sorted(unknown)[0]
        raise UserError(f"{path}: unknown block '{word}'{nearest(word, RESERVED)}")
    knobs = {key: dict(knob) for key, knob in shared.items()}
    for key, knob in (raw.get("knobs") or {}).items():
        if not isinstance(knob, Mapping):
            knob = {"default": knob}
        if not is_knob({**knobs.get(key, {}), **knob}):
            odd = sorted(set(knob) - FIELDS)
            what = f"unknown field '{odd[0]}'{nearest(odd[0], FIELDS)}" if odd else "no default"
            raise UserError(f"{path}: knob '{key}': {what}")
        knobs[key] = {**knobs.get(key, {}), **knob}
    blocks: dict[str, Any] = {block: dict(raw.get(block) or {}) for block in RESERVED - {"knobs"}}
    return Entry(group=group, name=name, path=str(path), knobs=knobs, **blocks)


def _sources() -> Iterator[tuple[str, Path, str | None]]:
    """(group, file, code) of every entry; code is `package.module:Class` for methods of other packages."""
    for group in GROUPS:
        for path in sorted((CONF / group).glob("*.yaml")):
            yield group, path, None
    for point in _entry_points():
        package = point.value.split(":")[0].partition(".")[0]
        yield "method", _package_folder(package) / "conf" / "method" / f"{point.name}.yaml", point.value


@functools.cache
def _entry_points() -> tuple[Any, ...]:
    from importlib.metadata import entry_points

    return tuple(entry_points(group="ftrecipes.methods"))


def _package_folder(package: str) -> Path:
    from importlib.util import find_spec

    spec = find_spec(package)
    places = list(spec.submodule_search_locations or []) if spec else []
    return Path(places[0]) if places else Path(package)


@functools.cache
def _read_all() -> dict[str, dict[str, Entry]]:
    """All entries, from the JSON cache when no file has changed since it was written."""
    sources = list(_sources())
    stamp = [[str(path), *_stat(path)] for _, path, _ in sources]
    cache = cache_folder() / "catalogue.json"
    try:
        saved = json.loads(cache.read_text())
        if saved["format"] == CACHE_FORMAT and saved["stamp"] == stamp:
            return {g: {n: Entry(**e) for n, e in entries.items()} for g, entries in saved["entries"].items()}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    entries: dict[str, dict[str, Entry]] = {group: {} for group in GROUPS}
    shared: dict[str, dict[str, Any]] = {}
    for group in GROUPS:
        path = CONF / group / "_group.yaml"
        shared[group] = (read_yaml(path) or {}).get("knobs", {}) if path.exists() else {}
    for group, path, code in sources:
        if path.stem.startswith("_"):
            continue
        entry = _parse(group, path.stem, path, read_yaml(path), shared[group])
        entries[group][path.stem] = Entry(**{**vars(entry), "code": code})
    _write_cache(cache, {"format": CACHE_FORMAT, "stamp": stamp, "entries": entries})
    return entries


def _stat(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    return stat.st_mtime_ns, stat.st_size


def _write_cache(path: Path, content: dict[str, Any]) -> None:
    """Best effort: a read-only home costs time, never the command."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(content, file, default=vars)
        os.replace(file.name, path)
    except OSError:
        pass


_plugins: dict[str, dict[str, Entry]] = {}


def add(entry: Entry) -> None:
    """Register an entry that a plugin declares in Python."""
    _plugins.setdefault(entry.group, {})[entry.name] = entry


def declare(group: str, name: str, path: str, **blocks: Any) -> Entry:
    """An entry from Python data in the form of the YAML files; registered at once."""
    shared = {}
    shared_file = CONF / group / "_group.yaml"
    if shared_file.exists():
        shared = (read_yaml(shared_file) or {}).get("knobs", {})
    entry = _parse(group, name, Path(path), blocks, shared)
    add(entry)
    return entry


def entries(group: str) -> dict[str, Entry]:
    """All entries of a group by name, plugins included."""
    return {**_read_all()[group], **_plugins.get(group, {})}


def get(group: str, name: str) -> Entry:
    """One entry; an unknown name is refused with the nearest right one."""
    found = entries(group).get(name)
    if found is None:
        raise UserError(f"unknown {group} '{name}'{nearest(name, entries(group))} (ftr ls {plural(group)})")
    return found


def plural(group: str) -> str:
    """The word that `ftr ls` takes for a group."""
    return group if group in ("data", "hardware") else f"{group}s"


def recipes() -> dict[str, Path]:
    """All recipes of this project by name (`paper/finding`)."""
    return {str(path.relative_to(RECIPES).with_suffix("")): path for path in sorted(RECIPES.rglob("*.yaml"))}
