"""Code by name: where a method, a data set, a reward or a metric of a given key lives, imported when it is needed.

The methods of this project are files `ftrecipes/methods/<folder>/<key>.py` with one class each that carries the key.
Other packages declare theirs by entry points; a plugin named on the command line registers with the decorators below:

    @method("mine", knobs={"strength": {"default": 0.1, "min": 0, "help": "how much"}})
    class Mine(Method): ...
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ftrecipes import catalogue
from ftrecipes.errors import UserError

if TYPE_CHECKING:
    from ftrecipes.method import Method

T = TypeVar("T")
_code: dict[tuple[str, str], Any] = {}


def find(kind: str, name: str) -> Any:
    """What a plugin registered under a name, or None."""
    return _code.get((kind, name))


def _register(kind: str, name: str, path: str | None, blocks: dict[str, Any] | None) -> Callable[[T], T]:
    def keep(thing: T) -> T:
        _code[kind, name] = thing
        if blocks is not None:
            catalogue.declare(kind, name, path or "plugin", **blocks)
        return thing

    return keep


def method(key: str, **blocks: Any) -> Callable[[type[Method]], type[Method]]:
    """Register a class as `method=<key>`; blocks are those of a method's YAML (about, knobs, tiny, paper, …)."""

    def keep(cls: type[Method]) -> type[Method]:
        from ftrecipes.method import POINTS, overrides

        about = {"title": (cls.__doc__ or key).strip().splitlines()[0], "family": "plugin", "domains": ["any"]}
        about["points"] = [p for p in POINTS if overrides(cls.__new__(cls), p)]
        if cls.picks:
            about["picks"] = ["all"]
        blocks["about"] = {**about, **blocks.get("about", {})}
        return _register("method", key, inspect.getfile(cls), blocks)(cls)

    return keep


def data(name: str, **blocks: Any) -> Callable[[T], T]:
    """Register a function `(knobs, domain) -> Splits` as `data=<name>`."""
    return _register("data", name, None, {"about": {"title": name}, **blocks})


def metric(name: str) -> Callable[[T], T]:
    """Register a function `(run, examples) -> float` that every evaluation reports under `name`."""
    return _register("metric", name, None, None)


def reward(name: str) -> Callable[[T], T]:
    """Register a function `(samples, examples) -> scores` that reward-driven methods can name."""
    return _register("reward", name, None, None)


def metrics() -> dict[str, Any]:
    """The metrics that plugins registered."""
    return {name: function for (kind, name), function in _code.items() if kind == "metric"}


def load_plugin(path: str) -> None:
    """Run a plugin file that was named on the command line."""
    file = Path(path)
    if not file.is_file():
        raise UserError(f"--plugin {path}: no such file")
    spec = importlib.util.spec_from_file_location(f"ftr_plugin_{file.stem}", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"--plugin {path}: {type(error).__name__}: {error}") from error


def method_class(key: str) -> type[Method]:
    """The class of a method."""
    if (found := find("method", key)) is not None:
        return found  # type: ignore[no-any-return]
    entry = catalogue.get("method", key)
    if entry.code:
        module, _, name = entry.code.partition(":")
        return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]
    from ftrecipes.method import Method

    files = sorted((catalogue.PACKAGE / "methods").glob(f"*/{key}.py"))
    if not files:
        raise UserError(f"method {key} has a config and no code (ftrecipes/methods/*/{key}.py)")
    found = importlib.import_module(f"ftrecipes.methods.{files[0].parent.name}.{key}")
    own = [c for c in vars(found).values() if inspect.isclass(c) and issubclass(c, Method) and c.__module__ == found.__name__]
    if len(own) != 1:
        raise UserError(f"{files[0]}: must hold exactly one subclass of Method, holds {len(own)}")
    return own[0]
