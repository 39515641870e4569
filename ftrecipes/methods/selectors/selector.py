"""Selectors: which training examples take part, by what the untouched model makes of each.

A paper subclasses `Selector` and gives

    features(run, batch)      numbers of each example of a micro-batch (n, f), float64; the model is the one that will be tuned,
                              before any method touched it, in eval mode and without gradients
    choose(run, features)     which rows of the features (examples, f) are kept, and one score an example
    depends                   names of the knobs that the features depend on

Scores are computed once, before training. Features are cached by a fingerprint of the model's weights and precision, the
examples as they are encoded (template and length included) and those knobs, so a second run with another share or
another rule costs no forward pass. The record holds `selection.<key>.jsonl`: position, place, features, score and
whether it was kept, of every example.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ftrecipes.catalogue import cache_folder
from ftrecipes.data.base import micro_batches
from ftrecipes.method import Method
from ftrecipes.record import Record, write_atomic
from ftrecipes.run import TOKENS_CPU, TOKENS_GPU
from ftrecipes.storage import read_weights, save_weights

if TYPE_CHECKING:
    from ftrecipes.run import Run
    from ftrecipes.tasks.base import Batch


class Selector(Method):
    """Base of the methods that keep a part of the training examples."""

    depends: ClassVar[tuple[str, ...]] = ()

    def features(self, run: Run, batch: Batch) -> Tensor:
        raise NotImplementedError

    def choose(self, run: Run, features: Tensor) -> tuple[list[int], Tensor]:
        raise NotImplementedError

    def data(self, run: Run) -> None:
        train = run.data["train"]
        positions = list(train.keep)
        features = self.measured(run, positions)
        rows, scores = self.choose(run, features)
        train.keep = [positions[row] for row in rows]
        run.count("scored", len(positions))
        run.count("kept", len(rows))
        run.say(f"{self.key} keeps {len(rows):,} of {len(positions):,} training examples")
        if run.record:
            self.write(run, positions, features, scores, set(rows))

    def measured(self, run: Run, positions: list[int]) -> Tensor:
        """The features of these examples, in their order (examples, f), from the cache where it has them."""
        train = run.data["train"]
        folder = cache_folder() / "selectors"
        name = f"{self.key}-{self.fingerprint(run, positions)}"
        if (folder / name).is_dir():
            return read_weights(folder / name / "features.safetensors")["features"]
        place = {position: row for row, position in enumerate(positions)}
        out: Tensor | None = None
        budget = TOKENS_GPU if run.device.type == "cuda" else TOKENS_CPU
        with run.evaluating():
            for micro in micro_batches(train, positions, examples=None, budget=budget):
                found = self.features(run, run.move(train.batch(micro))).double().cpu()
                out = torch.empty(len(positions), found.shape[1], dtype=torch.float64) if out is None else out
                out[[place[p] for p in micro]] = found
        assert out is not None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with Record(folder).whole_folder(name) as target:
                save_weights(target / "features.safetensors", {"features": out})
        except OSError:
            pass  # a read-only home costs time, never the run
        return out

    def fingerprint(self, run: Run, positions: list[int]) -> str:
        """A hash of all that the features depend on (16 hex digits)."""
        knobs = {name: getattr(self, name) for name in self.depends}
        digest = hashlib.sha256(json.dumps([run.fingerprint, run.precision, run.settings.model.dtype, knobs]).encode())
        for position in positions:
            for name, value in sorted(run.data["train"][position].items()):
                plain = value.numpy() if isinstance(value, Tensor) else value
                digest.update(name.encode())
                digest.update(np.ascontiguousarray(plain).tobytes() if isinstance(plain, np.ndarray) else repr(plain).encode())
        return digest.hexdigest()[:16]

    def write(self, run: Run, positions: list[int], features: Tensor, scores: Tensor, kept: set[int]) -> None:
        """selection.<key>.jsonl beside the record."""
        assert run.record
        raw = run.data["train"].raw
        lines = []
        for row, position in enumerate(positions):
            line: dict[str, Any] = {
                "position": position,
                "kept": row in kept,
                "score": float(scores[row]),
                "features": features[row].tolist(),
            }
            lines.append(json.dumps(line | {name: raw[position][name] for name in ("place", "source") if name in raw[position]}))
        write_atomic(run.record.folder / f"selection.{self.key}.jsonl", "\n".join(lines) + "\n")
