"""From the words on a command line to the settings of a run, checked before anything heavy is imported.

`compose(overrides)` asks Hydra for the composition, checks every value against the schema of its group, refuses what
cannot stack, and fills what was left on auto from the methods' `paper:` or `tiny:` blocks. `points(overrides)` does the
same for every point of a sweep. Configs are data: no `_target_` is ever followed.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ftrecipes import catalogue, schema, stacking
from ftrecipes.catalogue import Entry
from ftrecipes.errors import UserError, nearest
from ftrecipes.source import root

# What a user may set of Hydra's own config. Everything else there can name code or change the process.
HYDRA_ALLOWED = re.compile(r"hydra\.(run\.dir|sweep\.(dir|subdir)|verbose|searchpath|mode|output_subdir|job\.name|(launcher|sweeper)\..*)$")
HYDRA_CHOICES = {"hydra/launcher", "hydra/sweeper", "hydra/sweeper/sampler", "hydra/hydra_logging", "hydra/job_logging"}
PLUGIN_TARGET = re.compile(r"(hydra\._internal\.core_plugins|hydra_plugins)\.\w+(\.\w+)*$")
# Settings that cannot change a number of the run: they are left out of its hash.
UNHASHED = re.compile(r"(resume|tags|logger\..*|trainer\.keep|trainer\.samples|trainer\.checkpoint_every|hardware\.memory)$")


class Box(dict[str, Any]):
    """A dict whose keys are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value


def box(node: Any) -> Any:
    """Plain data with every mapping as a Box."""
    if isinstance(node, Mapping):
        return Box({str(key): box(value) for key, value in node.items()})
    return [box(item) for item in node] if isinstance(node, list) else node


@dataclass
class Settings:
    """The resolved settings of one run.

    values: the config, every auto filled. origin: where a filled value came from, by path.
    overridden: sentences on what a method of the stack wanted and did not get. overrides: the words that were typed.
    """

    values: Box
    origin: dict[str, str] = field(default_factory=dict)
    overridden: list[str] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.__dict__["values"], name)

    @property
    def hash(self) -> str:
        """Content hash of everything that can change a number of the run (12 hex digits)."""
        kept = {path: value for path, value in flatten(self.values) if not UNHASHED.match(path)}
        return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:12]

    def entry(self, group: str) -> Entry:
        """The catalogue's entry of a group's choice."""
        return catalogue.get(group, self.values[group]["name"])

    def methods(self) -> list[Entry]:
        """The entries of the stack, in order."""
        return [catalogue.get("method", name) for name in self.values["method"]]


def flatten(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of every leaf; empty mappings and lists are leaves."""
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, node


def lookup(node: Any, path: str) -> Any:
    """The value at a dotted path; KeyError when there is none."""
    for part in path.split("."):
        node = node[part]
    return node


def assign(node: Any, path: str, value: Any) -> None:
    """Set the value at a dotted path that exists."""
    *parents, last = path.split(".")
    for part in parents:
        node = node[part]
    if last not in node:
        raise KeyError(path)
    node[last] = value


# ---------------------------------------------------------------------------------------------------------------------
# the words


def normal(words: Sequence[str]) -> list[str]:
    """`recipe=x` as Hydra wants it, `+recipe=x`: a run has none unless one is added."""
    return [f"+{word}" if word.startswith("recipe=") else word for word in words]


def parse(words: Sequence[str], config_dir: str | None = None) -> list[Override]:
    """Hydra overrides from words, each checked by itself: names, Hydra's settings, targets."""
    overrides = []
    for word in normal(words):
        try:
            overrides.append(OverridesParser.create().parse_override(word))
        except HydraException as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"cannot read '{word}': {reason} (settings are written group=name or path.to.key=value)") from None
    for override in overrides:
        _check_override(override, config_dir)
    return overrides


def _check_override(override: Override, config_dir: str | None) -> None:
    key = override.key_or_group
    if "_target_" in key.split(".") or _holds_target(override.value()):
        raise UserError(f"{override.input_line}: configs are data, `_target_` is not followed")
    if key.startswith("hydra"):
        if key not in HYDRA_CHOICES and not HYDRA_ALLOWED.match(key):
            raise UserError(f"{key}: this part of Hydra's config cannot be set here (it could run code)")
        if key == "hydra.searchpath" and not all(str(p).startswith("file://") for p in _as_list(override.value())):
            raise UserError("hydra.searchpath: only folders (file://…) can be searched for configs")
        return
    if override.is_delete():
        raise UserError(f"{override.input_line}: nothing can be deleted; settings have defaults (ftr show)")
    if key in (*catalogue.GROUPS, "recipe"):
        names: set[str] = {*catalogue.recipes(), *_own_recipes(config_dir)} if key == "recipe" else {*catalogue.entries(key)}
        if override.value() is None:
            raise UserError(f"{override.input_line}: a run needs a {key} (ftr ls {catalogue.plural(key)})")
        for name in _choices(override):
            if name not in names:
                hint = f" (ftr ls {catalogue.plural(key)})"
                raise UserError(f"unknown {key} '{name}'{nearest(name, names)}{hint}")


def _own_recipes(config_dir: str | None) -> list[str]:
    """Recipes in a folder of the user's, by name."""
    folder = Path(config_dir or "", "recipe")
    return [str(p.relative_to(folder).with_suffix("")) for p in folder.rglob("*.yaml")] if config_dir else []


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _choices(override: Override) -> Iterator[str]:
    """The names that an override of a group asks for, in all points of a sweep."""
    values = override.sweep_iterator() if override.is_discrete_sweep() else [override.value()]
    for value in values:
        for name in _as_list(value):
            if name is not None:
                yield str(getattr(name, "text", name))


def _holds_target(node: Any) -> bool:
    if isinstance(node, Mapping):
        return any(str(key) == "_target_" or _holds_target(value) for key, value in node.items())
    return isinstance(node, (list, tuple)) and any(map(_holds_target, node))


# ---------------------------------------------------------------------------------------------------------------------
# composition


def _hydra(config_dir: str | None) -> Any:
    """Hydra set up with the catalogue and, when given, a folder of the user's."""
    if config_dir:
        return initialize_config_dir(str(Path(config_dir).resolve()), version_base=None)
    return initialize(version_base=None, config_path=None)


def compose(words: Sequence[str] = (), *, config_dir: str | None = None) -> Settings:
    """The settings of one run.

    Args:
        words: overrides as on the command line, `["method=lora", "optimizer.lr=1e-3"]`.
        config_dir: a folder with YAML of the user's own, as Hydra's `--config-dir`.

    Raises:
        UserError: with one line that says what is wrong and what to do.
    """
    if any(override.is_sweep_override() for override in parse(words, config_dir)):
        raise UserError("several values were given for one setting; add -m for a sweep")
    with _hydra(config_dir):
        return _compose(normal(words))


def points(words: Sequence[str], *, config_dir: str | None = None, limit: int | None = None) -> list[Settings]:
    """The settings of every point of a sweep, each checked."""
    overrides = parse(words, config_dir)
    sweepers = [o for o in overrides if o.key_or_group == "hydra/sweeper" and o.value() not in (None, "basic")]
    if sweepers:  # the points are drawn later; what is common to them can be checked now
        fixed = [o for o in overrides if not o.is_sweep_override()]
        with _hydra(config_dir):
            return [_compose([str(o.input_line) for o in fixed])]
    with _hydra(config_dir):
        params = _raw([str(o.input_line) for o in overrides if not o.is_sweep_override()])["hydra"]["sweeper"].get("params")
        overrides = parse([f"{key}={value}" for key, value in (params or {}).items()], config_dir) + overrides
        batches = BasicSweeper.split_arguments(overrides, None)
        return [_compose(list(point)) for point in batches[0][:limit]]


def _raw(words: list[str]) -> dict[str, Any]:
    try:
        config = hydra_compose("train", overrides=words, return_hydra_config=True)
        return OmegaConf.to_container(config, resolve=False)  # type: ignore[return-value]
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise UserError(_explain(error, words)) from None


def _compose(words: list[str]) -> Settings:
    raw = _raw(words)
    _check_hydra(raw.pop("hydra"), words)
    for path, _ in flatten(raw):
        if "_target_" in path.split("."):
            raise UserError(f"{path}: configs are data, `_target_` is not followed")
    try:
        values: Any = OmegaConf.to_container(OmegaConf.create(raw), resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{getattr(error, 'full_key', '')}: {str(error).splitlines()[0]}") from None
    values.pop("recipe", None)
    return resolve(values, words)


def _explain(error: Exception, words: Sequence[str]) -> str:
    """Hydra's long texts as one line with the nearest right name."""
    text = f"{error}\n{error.__cause__ or ''}"
    key = re.search(r"Could not override '([^']+)'", text) or re.search(r"full_key: (\S+)", text)
    if key:
        path = key.group(1)
        full = re.search(r"full_key: (\S+)", text)
        path = full.group(1) if full else path
        if re.search(r"Value '.*' of type|could not be converted|Invalid type", text):
            return f"{path}: {text.splitlines()[0]}"
        parent, _, last = path.rpartition(".")
        owner = path.split(".")[1] if path.startswith("method.") else ""
        if owner in catalogue.entries("method") and owner not in _stack(words):
            there = ",".join(_stack(words))
            return f"{path}: {owner} is not in the stack (method={there}); method=[{there},{owner}] puts it there"
        try:
            known = dict(flatten(_defaults(words)))
        except UserError:
            known = {}
        beside = {name[len(parent) + 1 :]: name for name in known if parent and name.startswith(f"{parent}.")}
        close = difflib.get_close_matches(last, beside, n=1)
        if close:
            return f"unknown setting '{path}'; did you mean '{beside[close[0]]}'?"
        return f"unknown setting '{path}'{nearest(path, beside.values() or {*known, *catalogue.GROUPS})}"
    missing = re.search(r"Could not find '([^']+)'|Could not load '([^']+)'", text)
    if missing:
        return f"no config '{missing.group(1) or missing.group(2)}' (ftr ls)"
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())


def _stack(words: Sequence[str]) -> list[str]:
    """The methods that a composition has."""
    try:
        return list(_defaults(words).get("method") or {})
    except UserError:
        return []


def _defaults(words: Sequence[str]) -> dict[str, Any]:
    """The composition with the groups that were asked for and none of the values."""
    known = (*catalogue.GROUPS, "recipe")
    groups = [w for w in words if "=" in w and w.split("=")[0].lstrip("+") in known]
    raw = _raw(groups)
    raw.pop("hydra")
    return raw


def _check_hydra(hydra: dict[str, Any], words: Sequence[str]) -> None:
    """Refuse what a YAML of the user (a recipe, a searchpath) changed in Hydra's config outside the allowed part."""
    choices = [w for w in words if w.split("=")[0] in HYDRA_CHOICES]
    base = dict(flatten(_baseline(tuple(choices))))
    volatile = re.compile(r"hydra\.(overrides|runtime|job\.(override_dirname|config_name)|env|mode)")
    for path, value in flatten(hydra, "hydra"):
        if path.rpartition(".")[2] == "_target_":
            if not PLUGIN_TARGET.match(str(value)):
                raise UserError(f"{path}: '{value}' is not a plugin of Hydra; configs are data, `_target_` is not followed")
        elif not volatile.match(path) and not HYDRA_ALLOWED.match(path) and (path not in base or base[path] != value):
            raise UserError(f"{path}: this part of Hydra's config cannot be set here (it could run code)")


_baselines: dict[tuple[str, ...], dict[str, Any]] = {}


def _baseline(choices: tuple[str, ...]) -> dict[str, Any]:
    if choices not in _baselines:
        _baselines[choices] = {"hydra": _raw(list(choices))["hydra"]}
    return _baselines[choices]


# ---------------------------------------------------------------------------------------------------------------------
# from a composition to settings


def resolve(values: dict[str, Any], words: Sequence[str] = ()) -> Settings:
    """Check a composition against the schema and the rules of stacking, and fill what is on auto."""
    _carry(values)
    _follow_lead(values, words)
    known = {"", *catalogue.GROUPS}
    entries: list[Entry] = [root()]
    for group in catalogue.GROUPS:
        if group == "method":
            entries += [catalogue.get("method", name) for name in values.get("method") or {}]
        else:
            entries.append(catalogue.get(group, str((values.get(group) or {}).get("name"))))
    declared = {entry.at(name): knob for entry in entries for name, knob in entry.knobs.items()}
    sections = {path.split(".")[0] for path in declared} | known
    for path, value in list(flatten(values)):
        group, _, rest = path.partition(".")
        if path in declared or rest == "name" or _inside(path, declared) or path == "method":
            continue
        if group == "method" and value == {} and rest in values["method"]:
            continue  # a method without knobs
        if group not in sections or value not in ({}, None) or rest:
            raise UserError(f"unknown setting '{path}'{nearest(path, declared)}")
    for path, knob in declared.items():
        _complete(values, path, knob["default"])
        value = schema.coerce(lookup(values, path), knob)
        wrong = schema.problem(value, knob)
        if wrong:
            raise UserError(f"{path} {wrong}")
        assign(values, path, value)
    if not values.get("method"):
        raise UserError("method is empty; `method=full` trains every weight (ftr ls methods)")
    settings = Settings(values=box(values), overrides=list(words))
    _fill(settings, declared)
    stacking.check(settings)
    if size_of(settings) == "paper" and not any(word.lstrip("+").startswith(("data=", "recipe=")) for word in words):
        settings.notes.append(f"no data= was given; {settings.data.name}, {settings.entry('data').about['title']}, stands in")
    for path, knob in declared.items():
        wrong = schema.problem(lookup(settings.values, path), knob)
        if wrong:
            raise UserError(f"{path} {wrong} ({settings.origin.get(path, 'set')})")
    return settings


def _carry(values: dict[str, Any]) -> None:
    """Where nobody picks what trains and a method names its `carrier`, that stands before it, with the settings it names.

    The settings are those of the model's size, where they differ: {lora: {tiny: {rank: 8}, paper: {rank: 32}}}.
    """
    stack = [catalogue.get("method", name) for name in values.get("method") or {}]
    carried = next((m for m in stack if "carrier" in m.about), None)
    if carried is None or any("picks" in m.about for m in stack):
        return
    size = catalogue.get("model", values["model"]["name"]).about.get("size", "paper")
    carriers = {
        name: {**catalogue.get("method", name).values(), **knobs.get(size, {})}
        for name, knobs in carried.about["carrier"].items() if name not in values["method"]
    }  # fmt: skip
    values["method"] = {**carriers, **values["method"]}


def _complete(values: dict[str, Any], path: str, default: Any) -> None:
    """Give a setting that a record of an earlier version lacks its default."""
    *parents, last = path.split(".")
    node = values
    for parent in parents:
        node = node.setdefault(parent, {})
    node.setdefault(last, default)


def _follow_lead(values: dict[str, Any], words: Sequence[str]) -> None:
    """Where two methods bring different optimizers or schedules, the lead's stands, not the one composed last."""
    methods = [catalogue.get("method", name) for name in values.get("method") or {}]
    methods.sort(key=lambda m: "picks" not in m.about)
    for group in ("optimizer", "schedule"):
        brought = [m.brings[group] for m in methods if group in m.brings]
        asked = any(word.split("=")[0] == group for word in words)
        now = values.get(group) or {}
        if asked or len(set(brought)) < 2 or now.get("name") not in brought[1:] or now["name"] == brought[0]:
            continue
        wanted = catalogue.get(group, brought[0]).values()
        values[group] = {key: now[key] if key in now and key != "name" else value for key, value in wanted.items()}


def _inside(path: str, declared: Iterable[str]) -> bool:
    """Whether a leaf lies inside a knob that holds a mapping."""
    return any(path.startswith(f"{name}.") for name in declared)


def size_of(settings: Settings) -> str:
    """`tiny` for the packaged models, `paper` for every real one."""
    return "tiny" if settings.entry("model").about.get("size") == "tiny" else "paper"


def _fill(settings: Settings, declared: Mapping[str, Mapping[str, Any]]) -> None:
    """Fill nulls: first what a method requires, then the lead method's scale settings, then the knobs' own."""
    size, values = size_of(settings), settings.values
    for method in settings.methods():
        for key, value in method.requires.items():
            path = key if "." in key else method.at(key)
            now = lookup(values, path)
            if now is not None and now != value:
                by = settings.origin.get(path, "which was asked for")
                raise UserError(f"{method.name} requires {path}={value}, not {now} ({by})")
            assign(values, path, value)
            settings.origin[path] = f"required by {method.name}"
    for method in stacking.leads(settings):
        for path, value in method.setting(size).items():
            if path not in declared:
                if _foreign(path, settings):
                    continue
                raise UserError(f"{method.path}: {size}: unknown setting '{path}'{nearest(path, declared)}")
            now = lookup(values, path)
            if path == "trainer.max_steps" and values.trainer.epochs is not None:
                continue
            if now is None:
                assign(values, path, value)
                settings.origin[path] = f"{method.name}, {size}"
            elif now != value and path in settings.origin and method.name in settings.values.method:
                settings.overridden.append(f"{method.name} would have {path}={value}; {settings.origin[path]} has {now}")
    for path, knob in declared.items():
        if lookup(values, path) is None and size in knob:
            if path == "trainer.max_steps" and values.trainer.epochs is not None:
                continue
            assign(values, path, knob[size])
            settings.origin[path] = f"default, {size}"


def _foreign(path: str, settings: Settings) -> bool:
    """A scale setting for an optimizer or schedule that was not chosen (`optimizer.momentum` under adamw)."""
    group, _, knob = path.partition(".")
    return group in catalogue.GROUPS and any(knob in entry.knobs for entry in catalogue.entries(group).values())
