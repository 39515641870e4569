"""The folder of a run: its settings, metrics, checkpoints and the tuned weights, each written whole or not at all.

config.yaml      the resolved settings
run.json         status, command, versions, seed, fingerprint of the base, results
metrics.jsonl    one row per logged update and per evaluation (metrics.csv beside it at the end)
checkpoints/N/   state.pt (plain types and tensors), weights.safetensors; the newest ones
tuned/           weights.safetensors and structure.json: what differs from the base, no second copy of the rest
"""

from __future__ import annotations

import csv
import errno
import fcntl
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import yaml

from ftrecipes.errors import RunFailed, UserError

# What the user lets others read; temporary files begin private and get it when they are whole.
UMASK = os.umask(0)
os.umask(UMASK)

DONE, RUNNING, FAILED, INTERRUPTED = "done", "running", "failed", "interrupted"


@contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """A full or read-only disk as one line that says what was not written."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO):
            raise RunFailed(f"{what} was not written: {error.strerror}; what was written before stands") from None
        raise


def write_atomic(path: Path, text: str) -> None:
    """Write a text file under a temporary name and rename it."""
    with disk_errors(str(path)):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                os.fchmod(handle, 0o666 & ~UMASK)
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def new_folder(path: str | Path) -> Path:
    """A folder that can be written to, made if need be; refused before anything heavy when it cannot."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{folder}: cannot write there: {error.strerror}") from None
    return folder


class Record:
    """One run's folder. Nobody else may write to it while it is locked (the lock goes with the process)."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._lock: IO[str] | None = None
        self._metrics: IO[bytes] | None = None

    # -- reading --------------------------------------------------------------------------------------------------

    @property
    def info(self) -> dict[str, Any]:
        """run.json, or {} when there is none yet."""
        try:
            return dict(json.loads((self.folder / "run.json").read_text()))
        except FileNotFoundError:
            return {}
        except ValueError:
            raise UserError(f"{self.folder / 'run.json'}: not valid JSON; the record is damaged") from None

    @property
    def config(self) -> dict[str, Any]:
        """The resolved settings of the run."""
        path = self.folder / "config.yaml"
        if not path.is_file():
            raise UserError(f"{self.folder}: not the record of a run (no config.yaml)")
        return dict(yaml.safe_load(path.read_text()))

    def metrics(self) -> list[dict[str, Any]]:
        """All rows of metrics; a row that was cut off is where reading ends."""
        rows = []
        path = self.folder / "metrics.jsonl"
        for line in path.read_text().splitlines() if path.is_file() else []:
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
        return rows

    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        return sorted(p for p in (self.folder / "checkpoints").glob("[0-9]*") if p.is_dir())

    # -- writing --------------------------------------------------------------------------------------------------

    def lock(self) -> None:
        """Take the folder; a second process that wants it gets one line."""
        new_folder(self.folder)
        self._lock = (self.folder / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{self.folder}: another process is writing this run") from None

    def begin(self, values: Mapping[str, Any], info: dict[str, Any]) -> None:
        """The first writing: settings and who runs them. A resumed run keeps what stands."""
        text = yaml.safe_dump(json.loads(json.dumps(values)), sort_keys=False)
        write_atomic(self.folder / "config.yaml", text)
        self.update(status=RUNNING, **info)

    def update(self, **fields: Any) -> None:
        """Change fields of run.json."""
        write_atomic(self.folder / "run.json", json.dumps({**self.info, **fields}, indent=1, default=str) + "\n")

    def open_metrics(self, offset: int = 0) -> None:
        """Open metrics.jsonl for appending at a byte offset; what stands behind it (a killed run's rows) goes."""
        self.close_metrics()
        with disk_errors("metrics.jsonl"):
            self._metrics = (self.folder / "metrics.jsonl").open("ab")
            self._metrics.truncate(offset)
            self._metrics.seek(offset)

    def row(self, row: Mapping[str, Any]) -> None:
        """Append one row of metrics."""
        if self._metrics is not None:
            with disk_errors("metrics.jsonl"):
                self._metrics.write((json.dumps(row) + "\n").encode())
                self._metrics.flush()

    def metrics_offset(self) -> int:
        """Bytes of metrics that are safely on disk."""
        if self._metrics is None:
            return 0
        with disk_errors("metrics.jsonl"):
            os.fsync(self._metrics.fileno())
        return self._metrics.tell()

    def close_metrics(self) -> None:
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None

    def write_csv(self) -> None:
        """metrics.csv: the rows of metrics.jsonl as a table."""
        rows = self.metrics()
        columns = list(dict.fromkeys(name for row in rows for name in row))
        with disk_errors("metrics.csv"), (self.folder / ".metrics.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(self.folder / ".metrics.csv", self.folder / "metrics.csv")

    @contextmanager
    def whole_folder(self, name: str) -> Iterator[Path]:
        """A folder that appears under its name only when everything in it is on disk."""
        final = self.folder / name
        final.parent.mkdir(parents=True, exist_ok=True)
        for stale in final.parent.glob(f".{final.name}.*"):
            shutil.rmtree(stale, ignore_errors=True)
        with disk_errors(f"{name}"):
            temporary = Path(tempfile.mkdtemp(dir=final.parent, prefix=f".{final.name}."))
            try:
                yield temporary
                temporary.chmod(0o777 & ~UMASK)
                for file in temporary.rglob("*"):
                    if file.is_dir():
                        file.chmod(0o777 & ~UMASK)
                        continue
                    file.chmod(0o666 & ~UMASK)
                    with file.open("rb") as handle:
                        os.fsync(handle.fileno())
                if final.exists():
                    shutil.rmtree(final)
                os.replace(temporary, final)
                sync_folder(final.parent)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise

    def keep(self, count: int, protect: str | None = None) -> None:
        """Remove all but the newest checkpoints; `protect` names one that stays (the best)."""
        old = self.checkpoints()[:-count]
        for path in old:
            if path.name != protect:
                shutil.rmtree(path, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Make a rename in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def versions() -> dict[str, str]:
    """Versions of what can change numbers."""
    from importlib.metadata import PackageNotFoundError, version

    out = {"python": platform.python_version(), "machine": f"{platform.machine()} {os.cpu_count()} cores"}
    for package in ("ftrecipes", "torch", "transformers", "lightning", "hydra-core", "numpy"):
        try:
            out[package] = version(package)
        except PackageNotFoundError:
            continue
    return out


def unfinished(hash: str, outputs: Path) -> Path | None:
    """The newest run of these settings that did not end, or None."""
    best: tuple[float, Path] | None = None
    for path in outputs.glob("*/*/run.json"):
        try:
            info = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        if info.get("hash") == hash and info.get("status") != DONE and not _busy(path.parent):
            started = float(info.get("started", 0))
            if best is None or started > best[0]:
                best = (started, path.parent)
    return best[1] if best else None


def _busy(folder: Path) -> bool:
    """Whether a living process holds the lock of a run."""
    try:
        with (folder / ".lock").open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def now() -> float:
    """Seconds since the epoch, to the millisecond."""
    return round(time.time(), 3)
