"""What tests share: small runs through compose, Stack and the real update."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from generators import SMALL_DIT, SMALL_SD
from safetensors.torch import load_file

from ftrecipes import catalogue
from ftrecipes.compose import compose
from ftrecipes.data.base import Splits
from ftrecipes.record import Record
from ftrecipes.registry import data as register_data
from ftrecipes.run import Run, quiet

quiet()


def build(*words: str, data: bool = True) -> Run:
    """A run that is ready for `run.fit(n)`; it has no record."""
    return Run(compose(words)).build(data=data)


def train(*words: str, folder: Path | None = None) -> Run:
    """A whole run; with a folder, its record is there."""
    record = None
    if folder is not None:
        record = Record(folder)
        record.lock()
    run = Run(compose(words), record)
    run.train()
    return run


def weights(run: Run) -> dict[str, torch.Tensor]:
    """A copy of all parameters by name."""
    return {name: p.detach().clone() for name, p in run.model.named_parameters()}


def window(run: Run, step: int = 0) -> Any:
    """The window of an update, as the training loop would make it."""
    return run.window(step)


def toy_data(name: str, x: torch.Tensor, y: torch.Tensor, test: tuple[torch.Tensor, torch.Tensor] | None = None) -> str:
    """Register rows as `data=<name>`; every split holds them unless a test set is given."""

    def build_splits(knobs: Any, domain: str) -> Splits:
        rows = [{"x": a, "y": b} for a, b in zip(x, y, strict=True)]
        held = rows if test is None else [{"x": a, "y": b} for a, b in zip(*test, strict=True)]
        return Splits(rows, held, held)

    register_data(name)(build_splits)
    return name


class Killed(BaseException):
    """The end of a process, for tests that need no real signal."""


def train_cut_short(*words: str, folder: Path, at: int) -> Run:
    """A run that ends at update `at`, before anything of that update is written, and what its newest checkpoint becomes."""
    record = Record(folder)
    record.lock()
    run = Run(compose(words), record)
    after_update = run.after_update

    def until() -> None:
        if run.step == at:
            raise Killed
        after_update()

    run.after_update = until  # type: ignore[method-assign]
    with pytest.raises(Killed):
        run.train()
    assert record.checkpoints(), "no checkpoint was written before the end"
    record._lock.close()  # type: ignore[union-attr]
    return train(*words, folder=folder)


def check_resume(*words: str, folder: Path, at: int) -> Run:
    """A run that was cut short must end as one that was not: weights and record bit for bit, rows but for their seconds."""
    words = (*words, "trainer.checkpoint_every=3")
    straight = train(*words, folder=folder / "straight")
    resumed = train_cut_short(*words, folder=folder / "resumed", at=at)
    before, after = weights(straight), weights(resumed)
    assert before.keys() == after.keys()
    different = [name for name in before if not torch.equal(before[name], after[name])]
    assert not different, f"differ after resuming: {different}"
    first, second = tuned(folder / "straight"), tuned(folder / "resumed")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first), "the records hold other tensors"
    assert rows(folder / "straight") == rows(folder / "resumed")
    return resumed


def tuned(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors that a record holds of the tuned model, by file and name."""
    files = sorted((folder / "tuned").glob("*.safetensors"))
    assert files
    return {f"{file.stem}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


def rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics of a record without what a clock says."""
    return [{name: value for name, value in row.items() if name != "seconds"} for row in Record(folder).metrics()]


def fresh_process(code: str) -> Any:
    """Run Python code in a process of its own, with `from tools import *` done; what it prints last is read as JSON."""
    here = Path(__file__).parent
    # every large block comes from the system and goes back to it, so that a peak is a peak
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": f"{here}:{here.parent}"}
    words = [sys.executable, "-c", f"from tools import *\n{code}"]
    done = subprocess.run(words, capture_output=True, text=True, env=env, cwd=here, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def resident(field: str = "VmRSS") -> int:
    """Resident memory of this process in bytes; `VmHWM` is its peak. Linux only."""
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match
    return int(match.group(1)) * 1024


def peak(function: Callable[[], Any]) -> int:
    """The highest resident memory while a function runs, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    function()
    return resident("VmHWM")


# A two-layer random Llama: seconds become milliseconds where pretrained weights do not matter.
SMALL = (
    "model=tiny-llama",
    "model.weights=random",
    "model.architecture={num_hidden_layers:2,hidden_size:64,intermediate_size:96,num_attention_heads:4,num_key_value_heads:2}",
    "data.size=64",
    "trainer.batch=8",
    "trainer.eval_examples=16",
)

# A three-block random ViT.
SMALL_VIT = (
    "model=tiny-vit",
    "model.weights=random",
    "model.architecture={num_hidden_layers:3,hidden_size:24,intermediate_size:32,num_attention_heads:2,patch_size:8}",
    "data.size=64",
    "trainer.batch=8",
    "trainer.eval_examples=16",
)


SMALLS = {"causal-lm": SMALL, "vit": SMALL_VIT, "diffusion": SMALL_SD, "flow": SMALL_DIT}


def small(*methods: str) -> tuple[str, ...]:
    """A small model that all of these methods are for, or nothing where there is none."""
    named = [set(catalogue.get("method", method).about["domains"]) for method in methods]
    return next((model for domain, model in SMALLS.items() if all({"any", domain} & domains for domains in named)), ())
