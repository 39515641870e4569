"""Before Hydra is entered: everything that was typed is checked, so that Hydra only ever sees what is sound.

`train` looks at every point of the run or sweep, finds a run to resume, and hands over to `@hydra.main`.
"""

from __future__ import annotations

import itertools
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser

from ftrecipes import compose as composition
from ftrecipes.compose import Settings
from ftrecipes.errors import FtrError, Interrupted, RunFailed, UserError
from ftrecipes.record import DONE, Record, new_folder, unfinished


def train(words: Sequence[str]) -> None:
    """Check the words and run what they ask for."""
    try:
        arguments = get_args_parser().parse_args(list(words))
    except SystemExit:
        raise UserError(f"cannot read the options {' '.join(words)!r} (ftr train --help)") from None
    for option in ("config_path", "config_name", "experimental_rerun"):
        if getattr(arguments, option, None):
            raise UserError(f"--{option.replace('_', '-')} is not supported; use --config-dir DIR and recipe=…")
    overrides = composition.normal(arguments.overrides)
    flags = list(words)
    for override in arguments.overrides:
        flags.remove(override)
    looking = arguments.cfg or arguments.info or arguments.hydra_help or arguments.shell_completion
    if arguments.config_dir and not Path(arguments.config_dir).is_dir():
        raise UserError(f"--config-dir {arguments.config_dir}: no such folder")
    if arguments.multirun:
        seen: list[object] = []
        for point in composition.points(overrides, config_dir=arguments.config_dir):
            parts = (point.model, point.data, point.logger)  # what check_light looks at; most points share it
            if parts not in seen:
                seen.append(parts)
                check_light(point)
    elif not looking:
        overrides = _single(overrides, arguments.config_dir)
    try:
        _hydra(flags, overrides)
    finally:
        if _made is not None:
            _prune(_made)


_made: Path | None = None
"""The folder that this command made for its run."""


def _prune(folder: Path) -> None:
    """Remove a folder in which no run began, and its parents as far as they are empty."""
    if folder.is_dir() and not (folder / "run.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
    for parent in (folder.parent, folder.parent.parent):
        try:
            parent.rmdir()
        except OSError:
            return


def _single(overrides: list[str], config_dir: str | None) -> list[str]:
    """The words of one run with the folder that it will write to."""
    resume = next((o.partition("=")[2] for o in overrides if o.partition("=")[0] == "resume"), None)
    if resume not in (None, "auto", "null"):
        return _of_record(str(resume), overrides)
    settings = composition.compose(overrides, config_dir=config_dir)
    check_light(settings)
    given = next((o.partition("=")[2] for o in overrides if o.startswith("hydra.run.dir=")), None)
    if given:
        folder = Path(given)
        info = Record(folder).info
        if info and (settings.resume != "auto" or info.get("hash") != settings.hash):
            why = "a run of other settings" if info.get("hash") != settings.hash else "a run already"
            raise UserError(f"{folder}: holds {why}; choose another folder, or go on with resume={folder}")
        if info.get("status") == DONE:
            raise UserError(f"{folder}: this run is finished (ftr eval {folder})")
    else:
        found = unfinished(settings.hash, Path("outputs")) if settings.resume == "auto" else None
        folder = found or _fresh()
        global _made
        _made = None if found else folder
    new_folder(folder)
    return [*(o for o in overrides if not o.startswith("hydra.run.dir=")), f"hydra.run.dir={_quoted(folder)}"]


def _of_record(folder: str, overrides: list[str]) -> list[str]:
    """`resume=<folder>`: the words of that run; other words must not change its settings."""
    record = Record(folder)
    if not record.info:
        raise UserError(f"resume={folder}: not the record of a run (no run.json)")
    if record.info["status"] == DONE:
        raise UserError(f"resume={folder}: this run is finished (ftr eval {folder})")
    before = [o for o in record.info["overrides"] if not o.startswith(("hydra.run.dir=", "resume="))]
    now = [o for o in overrides if not o.startswith(("resume=", "hydra.run.dir="))]
    words = [*before, *(o for o in now if o not in before)]
    settings = composition.compose(words)
    if settings.hash != record.info["hash"]:
        old = dict(composition.flatten(record.config))
        new = dict(composition.flatten(settings.values))
        changed = [f"{k} was {old.get(k)!r}, now {v!r}" for k, v in new.items() if old.get(k) != v and not composition.UNHASHED.match(k)]
        raise UserError(f"resume={folder}: its settings cannot change ({'; '.join(changed[:3]) or 'this version reads them differently'})")
    return [*words, f"resume={_quoted(Path(folder))}", f"hydra.run.dir={_quoted(Path(folder))}"]


def _fresh() -> Path:
    """outputs/<date>/<time>, with a number when two runs start in one second."""
    stamp = time.strftime("outputs/%Y-%m-%d/%H-%M-%S")
    for n in itertools.count(1):
        folder = Path(stamp if n == 1 else f"{stamp}-{n}")
        try:
            new_folder(folder.parent)
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise AssertionError


def _quoted(path: Path) -> str:
    text = str(path)
    return text if all(c.isalnum() or c in "/._-+" for c in text) else "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def check_light(settings: Settings) -> None:
    """What can be known of files and packages without torch."""
    from importlib.util import find_spec

    from ftrecipes.data import files
    from ftrecipes.models import adapter, gguf

    if settings.logger.name == "wandb" and find_spec("wandb") is None:
        raise UserError("logger=wandb: the package wandb is not installed (pip install wandb)")
    source = settings.entry("model").about.get("gguf")
    if settings.model.path and not Path(settings.model.path).expanduser().is_dir():
        raise UserError(f"model.path={settings.model.path}: no such folder")
    if source and not settings.model.path and settings.model.weights != "random":
        gguf.locate(settings.model.name, source)
    if settings.model.adapter:
        adapter.check(Path(settings.model.adapter).expanduser())
    if settings.data.name in ("file", "hub"):
        files.check(settings.data)


def _hydra(flags: list[str], overrides: list[str]) -> None:
    import hydra

    import ftrecipes.source  # noqa: F401  (registers the config source)

    program = sys.argv
    sys.argv = ["ftr", *flags, *overrides]
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # our errors pass through unwrapped
    failures: list[FtrError] = []
    here = os.getpid()

    def guarded(config: Any) -> float | None:
        """A run that fails here is kept for the end, so that a sweep goes on; in a cluster's job it is the job's."""
        try:
            return task(config)
        except Interrupted as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(error.exit_code) from None
        except FtrError as error:
            if os.getpid() != here:
                raise
            failures.append(error)
            return None

    try:
        hydra.main(version_base=None, config_path=None, config_name="train")(guarded)()
    finally:
        sys.argv = program
    if len(failures) == 1:
        raise failures[0]
    if failures:
        raise RunFailed(f"{len(failures)} points of the sweep failed: " + "; ".join(dict.fromkeys(map(str, failures))))


def task(config: Any) -> float | None:
    """One run, called by Hydra in this process or by a cluster's job; returns the target metric on validation data."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    hydra = HydraConfig.get()
    words = list(hydra.overrides.task)
    for path in filter(None, os.environ.get("FTR_PLUGINS", "").split(os.pathsep)):
        _plugin_once(path)
    values: Any = OmegaConf.to_container(config, resolve=True)
    values.pop("recipe", None)
    settings = composition.resolve(values, words)
    return execute(settings, Path(hydra.runtime.output_dir))


def _plugin_once(path: str) -> None:
    from ftrecipes.registry import load_plugin

    if f"ftr_plugin_{Path(path).stem}" not in sys.modules:
        load_plugin(path)


def execute(settings: Settings, folder: Path) -> float | None:
    """Train in a folder."""
    from ftrecipes.report.console import Console

    console = Console()
    with console.loading():
        from ftrecipes.run import Run, quiet
    quiet()
    record = Record(folder)
    record.lock()
    run = Run(settings, record, console)
    try:
        results = run.train()
    finally:
        console.stop()
    value = results["after"].get("validation", {}).get(run.task.target)
    return None if value is None else float(value)
