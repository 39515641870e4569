"""The user's own data: files (JSONL, JSON, CSV, Parquet, text), folders of them, saved `datasets` folders, and the hub.

Every row is turned into an example (see formats.py) in one pass; the examples are kept as JSON in a temporary file, so
memory does not grow with the data. Validation and test sets that the data lacks are split off by a hash of what stands
before the first answer: equal prompts stay together and further rows move none of the others.

`check` finds what can be found in the first rows without torch; everything else is found when the data is read, before
training starts.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import importlib
import itertools
import json
import os
import re
import tempfile
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, BinaryIO

from ftrecipes.data import formats
from ftrecipes.data.formats import Example
from ftrecipes.errors import UserError, nearest

if TYPE_CHECKING:
    from ftrecipes.data.base import Splits

Row = tuple[str, Any]
"""Where a row stands, and what was read there: an object, or the ValueError that says why there is none."""

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}
PICKLES = {".pkl", ".pickle", ".pt", ".pth", ".bin", ".joblib", ".npy", ".npz", ".ckpt"}
INSTALL = "pip install 'ftrecipes[data]'"
GLANCE = 2000
"""Rows of each file that `check` looks at."""
GLANCE_BYTES = 2**24
"""Largest JSON array that `check` parses."""
HELD = 50_000
"""Up to so many examples, and HELD_BYTES, a split is a list in memory, encoded before training; a larger one stays on disk."""
HELD_BYTES = 2**26
RETAINED = 2000
"""Examples of a file given as `retain` that are read."""


@dataclass
class Source:
    """One file or table.

    read: its rows, with these columns at least. columns: what a table has; None where every row says for itself.
    labels: words of its class columns. light: whether reading its first rows is quick.
    """

    name: str
    read: Callable[[Sequence[str] | None], Iterator[Row]]
    columns: list[str] | None = None
    labels: Mapping[str, Sequence[str]] = field(default_factory=dict)
    light: bool = True


# ---------------------------------------------------------------------------------------------------------------------
# what is called from outside


def check(knobs: Any) -> None:
    """Refuse what is wrong with the settings, the files' names or their first rows; imports no torch, raises UserError."""
    if (left := 1 - knobs.validation - knobs.test) <= 0:
        raise UserError(f"data.validation + data.test = {1 - left:g}: nothing is left to train on")
    for knob, known in (("splits", SPLITS), ("columns", formats.NAMES)):
        for name, value in knobs[knob].items():
            if name not in known:
                raise UserError(f"data.{knob}.{name}: unknown{nearest(name, known)}")
            if not isinstance(value, str) and not (knob == "columns" and isinstance(value, list)):
                raise UserError(f"data.{knob}.{name}: must be a name, not {value!r}")
    if knobs.retain not in ("stories", "none"):
        _glance(_source(Path(knobs.retain).expanduser()), _auto(knobs))
    if knobs.name == "hub":
        if not knobs.id:
            raise UserError("data=hub needs data.id=<name on the hub>, for instance data.id=openai/gsm8k")
        if find_spec("datasets") is None:
            raise UserError(f"data=hub: the package datasets is not installed ({INSTALL})")
        return
    for sources in _local(knobs).values():
        for source in sources:
            _glance(source, knobs)


def build(knobs: Any, domain: str) -> Splits:
    """The examples of a file or folder by split."""
    check(knobs)
    return _splits(_local(knobs), knobs, knobs.path)


def hub(knobs: Any, domain: str) -> Splits:
    """The examples of a data set of the hub by split; without a network, of its cached copy."""
    check(knobs)
    library = _import("datasets", "data=hub")
    library.disable_progress_bars()
    library.config.HF_HUB_OFFLINE = library.config.HF_HUB_OFFLINE or not _reachable()
    options = {"name": knobs.config, "revision": knobs.revision}
    try:
        if knobs.splits:
            tables = {name: library.load_dataset(knobs.id, split=name, **options) for name in knobs.splits.values()}
        else:
            tables = dict(library.load_dataset(knobs.id, **options))
    except Exception as error:  # the library raises whatever its readers and the network raise
        reason = " ".join(str(error).split())[:300]
        offline = "the hub cannot be reached and there is no cached copy: " if library.config.HF_HUB_OFFLINE else ""
        raise UserError(
            f"data.id={knobs.id}: {offline}{reason}; check data.id, data.config and data.splits, or use data=file with a copy"
        ) from None
    roles = _roles(list(tables), knobs, knobs.id)
    sources = {role: [_table(f"{knobs.id} {name}", lambda name=name: tables[name], tables[name].features)] for role, name in roles.items()}  # type: ignore[misc]
    return _splits(sources, knobs, knobs.id)


# ---------------------------------------------------------------------------------------------------------------------
# finding the files


def _local(knobs: Any) -> dict[str, list[Source]]:
    """The sources of each split that `data.path` holds."""
    if not knobs.path:
        raise UserError("data=file needs data.path=<file or folder>")
    path = Path(knobs.path).expanduser()
    if not path.is_dir():
        if knobs.splits:
            raise UserError(f"data.splits names files of a folder, and data.path={path} is a file")
        return {"train": [_source(path)]}
    if (path / "state.json").is_file():
        return {"train": [_saved(path)]}
    if (path / "dataset_dict.json").is_file():
        names = _read_json(path / "dataset_dict.json").get("splits", [])
        return {role: [_saved(path / name)] for role, name in _roles(names, knobs, str(path)).items()}
    files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    known: dict[str, list[Path]] = {}
    for file in files:
        if file.suffix.lower() in READERS:
            known.setdefault(re.sub(r"-\d+-of-\d+$", "", file.stem), []).append(file)
    if not known:
        if pickles := [file for file in files if file.suffix.lower() in PICKLES]:
            _source(pickles[0])
        raise UserError(f"{path}: no file that can be read ({' '.join(READERS)}), and no folder saved by datasets")
    for name, shards in known.items():
        if len({file.suffix for file in shards}) > 1:
            raise UserError(f"{path}: '{name}' is there as {' and '.join(f.name for f in shards)}; keep one of them")
    return {role: [_source(file) for file in known[name]] for role, name in _roles(list(known), knobs, str(path)).items()}


def _roles(names: Sequence[str], knobs: Any, where: str) -> dict[str, str]:
    """Which of the names is the train, validation and test split: as `data.splits` says, else by the usual names."""
    roles = dict(knobs.splits)
    for role, name in roles.items():
        if name not in names:
            raise UserError(f"{where}: data.splits.{role}={name}: no such split{nearest(name, names)}")
    if not roles:
        roles = {role: name for role, usual in SPLITS.items() for name in names if name.casefold() in usual}
        if "train" not in roles and len(names) == 1:
            roles = {"train": names[0]}
    if "train" not in roles:
        raise UserError(f"{where}: no train split; there are {', '.join(names) or 'none'}; say which with data.splits={{train: …}}")
    return roles


def _source(path: Path) -> Source:
    """One file, by its ending."""
    suffix = path.suffix.lower()
    if suffix in PICKLES:
        raise UserError(f"{path}: may hold pickled objects, which can run code when loaded; refused, save the data as JSONL")
    if not path.exists():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, beside, n=1)
        raise UserError(f"{path}: no such file" + (f"; did you mean '{close[0]}'?" if close else ""))
    if suffix not in READERS:
        what = f"unknown ending '{suffix}'" if suffix else "no ending"
        raise UserError(f"{path}: {what}; files end in {' '.join(READERS)}, or give a folder")
    if not path.is_file():
        raise UserError(f"{path}: not a file")
    return READERS[suffix](path)


# ---------------------------------------------------------------------------------------------------------------------
# reading


def _open(path: Path) -> BinaryIO:
    """A file for reading; a pickle is refused."""
    try:
        file = path.open("rb")
        head = file.read(2)
        file.seek(0)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if len(head) == 2 and head[0] == 0x80 and 2 <= head[1] <= 5:
        raise UserError(f"{path}: holds a pickle, which can run code when loaded; refused, save the data as JSONL")
    return file


def _decode(raw: bytes, line: int) -> str:
    try:
        return raw.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte 0x{raw[error.start]:02x} at {error.start + 1}); save the file as UTF-8") from None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines with their endings."""
    with _open(path) as file:
        for number, raw in enumerate(file, 1):
            try:
                yield number, _decode(raw, number)
            except ValueError as error:
                raise UserError(f"{path}:{number}: {error}") from None


def _parse(text: str) -> Any:
    """JSON, or the ValueError that says what is wrong with it."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        hint = "; a row is one object on one line, or the file is one array" if text.strip() in ("{", "}", "{}", "],") else ""
        return ValueError(f"not valid JSON ({error.msg.lower()} at character {error.colno}){hint}")
    except (ValueError, RecursionError) as error:
        return ValueError(f"not valid JSON ({error})")


def _json(path: Path) -> Source:
    """JSON rows, one a line; or one array of them."""
    with _open(path) as file:
        is_array = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["

    def rows(columns: Sequence[str] | None) -> Iterator[Row]:
        with _open(path) as file:
            for number, raw in enumerate(file, 1):
                if raw.strip():
                    try:
                        row = _parse(_decode(raw, number))
                    except ValueError as error:
                        row = error
                    yield f"{path}:{number}", row

    def elements(columns: Sequence[str] | None) -> Iterator[Row]:
        with _open(path) as file:
            raw = file.read()
        try:
            found = json.loads(_decode(raw, 1))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{error.lineno}: not valid JSON ({error.msg.lower()} at character {error.colno})") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: {error}") from None
        for number, row in enumerate(found, 1):
            yield f"{path}: row {number}", row

    return Source(str(path), elements if is_array else rows, light=not is_array or path.stat().st_size <= GLANCE_BYTES)


def _csv(path: Path) -> Source:
    """Comma-separated values with a header; semicolons and tabs are recognised by it."""
    csv.field_size_limit(2**31 - 1)
    header_line = next((text for _, text in _lines(path)), "")
    delimiter = max(",;\t", key=header_line.count)

    def records() -> Iterator[tuple[int, list[str]]]:
        reader = csv.reader((text for _, text in _lines(path)), delimiter=delimiter, strict=True)
        line = 1
        try:
            for record in reader:
                if record:
                    yield line, record
                line = reader.line_num + 1
        except csv.Error as error:
            raise UserError(f"{path}:{line}: not valid CSV ({error}); put quotes around fields that hold quotes or line breaks") from None

    columns = next((record for _, record in records()), [])
    if not columns:
        raise UserError(f"{path}: the file is empty")
    twice = [name for name in columns if columns.count(name) > 1 or not name.strip()]
    if twice:
        raise UserError(f"{path}:1: the header needs one name a column; '{twice[0]}' is empty or there twice")

    def rows(_: Sequence[str] | None) -> Iterator[Row]:
        for line, record in itertools.islice(records(), 1, None):
            ragged = f"{len(record)} fields where the header has {len(columns)}; put quotes around fields that hold '{delimiter}'"
            yield f"{path}:{line}", dict(zip(columns, record, strict=True)) if len(record) == len(columns) else ValueError(ragged)

    return Source(str(path), rows, columns)


def _text(path: Path) -> Source:
    """Plain text; blank lines stand between documents."""

    def rows(columns: Sequence[str] | None) -> Iterator[Row]:
        for blank, group in itertools.groupby(_lines(path), key=lambda line: not line[1].strip()):
            if not blank:
                lines = list(group)
                yield f"{path}:{lines[0][0]}", {"text": "".join(text for _, text in lines).strip()}

    return Source(str(path), rows, ["text"])


def _parquet(path: Path) -> Source:
    parquet, arrow = _import("pyarrow.parquet", str(path)), _import("pyarrow", str(path))

    def refuse(error: Exception) -> UserError:
        return UserError(f"{path}: not a whole Parquet file ({' '.join(str(error).split())[:200]}); write or copy it again")

    _open(path).close()
    try:
        schema = parquet.read_schema(path)
    except (arrow.ArrowException, OSError) as error:
        raise refuse(error) from None

    def rows(columns: Sequence[str] | None) -> Iterator[Row]:
        number = 0
        try:
            with parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=1024, columns=columns):
                    for row in batch.to_pylist():
                        number += 1
                        yield f"{path}: row {number}", row
        except (arrow.ArrowException, OSError) as error:
            raise refuse(error) from None

    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    return Source(str(path), rows, schema.names, _words(features))


def _saved(folder: Path) -> Source:
    """A folder that `datasets` saved; its library is imported when rows are read."""
    features = _read_json(folder / "dataset_info.json").get("features") or {}
    for file in _read_json(folder / "state.json").get("_data_files", []):
        if not (folder / file["filename"]).is_file():
            raise UserError(f"{folder}: {file['filename']} is missing; save the data set again")

    def load() -> Any:
        library = _import("datasets", str(folder))
        library.disable_progress_bars()
        try:
            return library.load_from_disk(str(folder))
        except Exception as error:  # whatever Arrow and the library's own checks raise
            raise UserError(f"{folder}: cannot be read ({' '.join(str(error).split())[:200]}); save the data set again") from None

    return _table(str(folder), load, features)


def _table(name: str, load: Callable[[], Any], features: Mapping[str, Any]) -> Source:
    """A table of the `datasets` library."""

    def rows(columns: Sequence[str] | None) -> Iterator[Row]:
        table = load()
        for number, row in enumerate(table.select_columns(list(columns)) if columns else table, 1):
            yield f"{name}: row {number}", row

    return Source(name, rows, list(features), _words(features), light=False)


def _words(features: Mapping[str, Any]) -> dict[str, Sequence[str]]:
    """The label words that the features of the `datasets` library name, by column."""
    found = {name: f.get("names") if isinstance(f, Mapping) else getattr(f, "names", None) for name, f in features.items()}
    return {name: words for name, words in found.items() if isinstance(words, list)}


READERS: dict[str, Callable[[Path], Source]] = {
    ".jsonl": _json, ".ndjson": _json, ".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet, ".txt": _text,
}  # fmt: skip


def _read_json(path: Path) -> dict[str, Any]:
    """A small JSON object that a folder saved by `datasets` holds."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(value, dict):
            return value
        reason = "no object"
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not valid JSON"
    raise UserError(f"{path}: {reason}; save the data set again")


def _import(module: str, what: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"{what}: the package {module.partition('.')[0]} is not installed ({INSTALL})") from None


def _reachable() -> bool:
    """Whether the hub's machine answers; known at once, where the library tries for half a minute."""
    import socket
    from urllib.parse import urlsplit
    from urllib.request import getproxies

    if getproxies():
        return True
    address = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    try:
        socket.create_connection((address.hostname or "", address.port or (80 if address.scheme == "http" else 443)), timeout=5).close()
    except OSError:
        return False
    return True


# ---------------------------------------------------------------------------------------------------------------------
# from rows to splits


class _Tally:
    """How often something happened, and where first."""

    def __init__(self) -> None:
        self.n, self.first = 0, ""

    def add(self, first: str) -> None:
        self.n, self.first = self.n + 1, self.first or first


def _examples(source: Source, knobs: Any, notes: list[str]) -> Iterator[tuple[str, Example]]:
    """The examples of a source and where they stand; what was done with its rows goes to the notes."""
    shape = formats.detect(source.columns, knobs, source.name, source.labels) if source.columns is not None else None
    skipped, cut = _Tally(), _Tally()
    for place, row in source.read(shape.needed() if shape else None):
        try:
            if isinstance(row, ValueError):
                raise row
            if not isinstance(row, dict):
                raise ValueError(f"a row is an object with named columns, this is {formats.kind(row)}")
            shape = shape or formats.detect(list(row), knobs, place)
            example = shape.example(row)
        except ValueError as error:
            if knobs.invalid == "stop":
                raise UserError(f"{place}: {error}; correct the row, or leave such rows out with data.invalid=skip") from None
            skipped.add(f"{place}: {error}")
            continue
        if shape.cut:
            cut.add(place)
        yield place, example
    if shape:
        notes.append(f"{source.name}: read as {shape}" + _remark(shape))
    if skipped.n:
        notes.append(f"{source.name}: skipped {skipped.n} rows (first {skipped.first})")
    if cut.n:
        notes.append(f"{source.name}: left out the turns after the last answer of {cut.n} dialogues (first {cut.first})")


def _remark(shape: formats.Shape) -> str:
    if shape.format == "completion":
        return "; raw text without a chat template, which data.format=instruction would use"
    if shape.format == "classification" and not shape.labels:
        return "; the labels are taken as words, data.labels=[…] gives words to numbers"
    if shape.format == "preference":
        return "; a method that learns from single answers takes the chosen ones"
    return ""


def _glance(source: Source, knobs: Any) -> None:
    """Look at the first rows of a source."""
    if source.light:
        if not list(itertools.islice(_examples(source, knobs, []), GLANCE)):
            raise UserError(f"{source.name}: holds no example")
    elif source.columns is not None:
        formats.detect(source.columns, knobs, source.name, source.labels)


class _Store:
    """Examples as lines of JSON, in memory while they are few and in a temporary file beyond that.

    keys: a hash of what stands before each example's first answer, 64 bits. digest: of everything, in order.
    """

    def __init__(self) -> None:
        self.file = tempfile.SpooledTemporaryFile(max_size=HELD_BYTES)  # noqa: SIM115  (lives as long as the rows)
        self.at, self.keys, self.digest = array("Q", [0]), array("Q"), hashlib.sha256()

    def __len__(self) -> int:
        return len(self.keys)

    def add(self, place: str, example: Example) -> None:
        line = json.dumps({**example, "place": place}).encode()
        try:
            self.file.write(line)
        except OSError as error:
            raise UserError(f"no room for a copy of the data in {tempfile.gettempdir()} ({error.strerror}); set TMPDIR") from None
        self.digest.update(line)
        self.at.append(self.at[-1] + len(line))
        key = hashlib.blake2b(formats.opening(example).encode(), digest_size=8).digest()
        self.keys.append(int.from_bytes(key, "big"))

    def rows(self, positions: Sequence[int]) -> Sequence[Example]:
        """These examples, in memory when they are few."""
        rows = Rows(self, array("Q", positions))
        size = sum(self.at[i + 1] - self.at[i] for i in rows.positions)
        return list(rows) if len(rows) <= HELD and size <= HELD_BYTES else rows

    def read(self, position: int) -> Example:
        self.file.seek(self.at[position])
        return dict(json.loads(self.file.read(self.at[position + 1] - self.at[position])))


class Rows(Sequence[Example]):
    """Examples that are read when they are asked for."""

    def __init__(self, store: _Store, positions: Sequence[int]) -> None:
        self.store, self.positions = store, positions

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: Any) -> Any:
        return self.store.read(self.positions[index])


def _splits(sources: Mapping[str, list[Source]], knobs: Any, name: str) -> Splits:
    """All sources read; the splits that are missing are split off the training data."""
    from ftrecipes.data.base import Splits

    store = _Store()
    notes: list[str] = []
    places: dict[str, range] = {}
    for split in (s for s in SPLITS if s in sources):
        begin = len(store)
        for source in sources[split]:
            for place, example in _examples(source, knobs, notes):
                store.add(place, example)
        places[split] = range(begin, len(store))
        if not places[split]:
            raise UserError(f"{name}: the {split} set holds no example")
    shares = {split: knobs[split] for split in ("validation", "test") if split not in places}
    chosen = {split: list(found) for split, found in places.items()}
    _drop_shared(store, chosen, notes)
    chosen |= _split_off(store, chosen["train"], shares)
    sizes = ", ".join(f"{len(found):,} {split}" for split, found in sorted(chosen.items(), key=lambda item: list(SPLITS).index(item[0])))
    notes.append(f"{name}: {sizes}" + (" (split off by a hash of the prompts)" if any(chosen[s] for s in shares) else ""))
    if lacking := [split for split, share in shares.items() if share and not chosen[split]]:
        notes.append(f"{name}: too few different prompts to split off {' and '.join(lacking)}")
    for split in ("validation", "test"):  # so that the first of them are a fair sample of a sorted file
        chosen[split].sort(key=lambda i: (store.keys[i], i))
    retain, retain_name = _retain(knobs, notes)
    rows = {split: store.rows(found) for split, found in chosen.items()}
    fingerprint = store.digest.hexdigest()[:16]
    paired = all("others" in store.read(found[0]) for found in chosen.values() if found)
    target = "preference" if paired else ""
    return Splits(rows["train"], rows["validation"], rows["test"], retain, retain_name, notes, fingerprint=fingerprint, target=target)


def _drop_shared(store: _Store, chosen: dict[str, list[int]], notes: list[str]) -> None:
    """Where the data brings its own splits: leave out of training (and validation) what is also in test (validation)."""
    held: set[int] = set()
    for split in ("test", "validation", "train"):
        if split in chosen:
            shared = [i for i in chosen[split] if store.keys[i] in held]
            chosen[split] = [i for i in chosen[split] if store.keys[i] not in held] if shared else chosen[split]
            if shared:
                first = store.read(shared[0])["place"]
                notes.append(f"{split}: left out {len(shared)} examples whose prompts are also in a held-out set (first {first})")
            if not chosen[split]:
                raise UserError(f"data: every prompt of the {split} set is also in a held-out set; nothing is left of it")
            held.update(store.keys[i] for i in chosen[split])


def _split_off(store: _Store, train: list[int], shares: Mapping[str, float]) -> dict[str, list[int]]:
    """Positions by split. A prompt's hash, as a number in [0, 1), says where it goes; at least one goes to each split."""
    keys = sorted({store.keys[i] for i in train})
    bounds = list(itertools.accumulate(shares.values()))
    where = {key: next((s for s, bound in zip(shares, bounds, strict=True) if key < bound * 2**64), "train") for key in keys}
    left = [key for key in keys if where[key] == "train"]
    if not left:
        left = [keys[-1]]
        where[keys[-1]] = "train"
    for split, share in shares.items():
        if share and split not in where.values() and len(left) > 1:
            where[left.pop(0)] = split
    out: dict[str, list[int]] = {"train": [], **{split: [] for split in shares}}
    for i in train:
        out[where[store.keys[i]]].append(i)
    return out


def _retain(knobs: Any, notes: list[str]) -> tuple[Sequence[Example], str]:
    """What forgetting is measured on, and its name."""
    if knobs.retain == "none":
        return (), "none"
    if knobs.retain == "stories":
        from ftrecipes.data.storyqa import HELD_OUT

        return HELD_OUT, "stories"
    path = Path(knobs.retain).expanduser()
    rows = itertools.islice(_examples(_source(path), _auto(knobs), notes), RETAINED)
    return [{**example, "place": place} for place, example in rows], path.name


def _auto(knobs: Any) -> Any:
    """Settings for reading a file about which nothing else was said."""
    return SimpleNamespace(format="auto", columns={}, labels=[], invalid=knobs.invalid)
