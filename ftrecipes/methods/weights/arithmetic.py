"""Weight arithmetic between models: ingredients that lie on disk, read one tensor at a time, and what is made of them.

A paper that makes one model of several subclasses `Merging` and gives

    vary(run, i)          what is different in the fit of ingredient i: settings by path, `seed`, and which examples it sees
                          (`train`, `validation`: positions)
    combine(run, shelf)   put the result into the run's model by `fill(run, shelf, value)`; returns what the record should say

and inherits the rest: k fits from one start, each folded into plain weights and written to a `Shelf`; or, with `runs:`,
finished runs of the user's that were tuned from the same base. A shelf holds the start (theta_0) and every ingredient as
safetensors of the weights that can have moved; `value(name)` makes one weight from `shelf.base(name)` and
`shelf.get(i, name)` at a time, so there are never two models in memory, and `average`, `task_vector` and `moved`
compute in float64. At `combine` the run's model is the start again; adapters of the stack are spent: they
were folded into the ingredients and add nothing to the result.

What happens inside one run, between its start and its end, is in `interpolation.py`.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ftrecipes.compose import assign, lookup
from ftrecipes.errors import RunFailed, UserError
from ftrecipes.method import Method
from ftrecipes.methods.adapters.delta import Delta, tied_weights
from ftrecipes.models.base import check_weights
from ftrecipes.record import DONE, Record
from ftrecipes.storage import save_weights

if TYPE_CHECKING:
    from ftrecipes.data.base import Dataset
    from ftrecipes.run import Run

# ---------------------------------------------------------------------------------------------------------------------
# tensors


def average(tensors: Iterable[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """sum_i w_i t_i / sum_i w_i in float64, in the dtype of the first; equal tensors give that tensor bit for bit.

    Tensors are taken one at a time. Integers are those of the first.
    """
    total, dtype, scale = torch.zeros((), dtype=torch.float64), torch.float64, 0.0
    for i, tensor in enumerate(tensors):
        if not tensor.is_floating_point():
            return tensor
        weight = 1.0 if weights is None else weights[i]
        total, dtype, scale = total + weight * tensor.double(), tensor.dtype, scale + weight
    return (total / scale).to(dtype)


def task_vector(start: Tensor, end: Tensor) -> Tensor:
    """tau = theta_ft - theta_0 in float64; zero for integers."""
    return end.double() - start.double() if end.is_floating_point() else torch.zeros_like(end)


def moved(start: Tensor, tau: Tensor, factor: float = 1.0) -> Tensor:
    """theta_0 + factor tau in the dtype of theta_0; a whole task vector gives theta_ft, and what did not move stays, bit for bit."""
    return (start + factor * tau).to(start.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# ingredients


class Shelf:
    """Models that differ from one start, on disk.

    base-*.safetensors hold the start's values, <index>/*.safetensors an ingredient's, of the weights that can have moved.
    A weight that an ingredient lacks is the start's.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[Path, Any] = {}
        self._where: dict[str, dict[str, Path]] = {}

    def put(self, index: object, tensors: Mapping[str, Tensor]) -> None:
        """Write an ingredient, whole or not at all."""
        self._close(str(index))
        self.folder.mkdir(parents=True, exist_ok=True)
        with Record(self.folder).whole_folder(str(index)) as place:
            save_weights(place / "weights.safetensors", dict(tensors))

    def link(self, index: object, files: Iterable[Path], names: Iterable[str]) -> None:
        """Take an ingredient from safetensors elsewhere, which are not copied; `names` are the weights that moved."""
        self._close(str(index))
        self.folder.mkdir(parents=True, exist_ok=True)
        with Record(self.folder).whole_folder(str(index)) as place:
            (place / "link.json").write_text(json.dumps({"files": [str(f.absolute()) for f in files], "names": list(names)}))

    def put_base(self, tensors: Mapping[str, Tensor]) -> None:
        """Add values of the start for names that it does not hold yet."""
        fresh = {name: tensor for name, tensor in tensors.items() if name not in self._places("base")}
        if fresh:
            self.folder.mkdir(parents=True, exist_ok=True)
            number = len(list(self.folder.glob("base/*.safetensors")))
            (self.folder / "base").mkdir(exist_ok=True)
            temporary = self.folder / f"base/.{number:03d}"
            save_weights(temporary, fresh)
            temporary.rename(self.folder / f"base/{number:03d}.safetensors")
            self._close("base")

    def _places(self, index: str) -> dict[str, Path]:
        """The file of each weight that an ingredient holds."""
        if index not in self._where:
            place = self.folder / index
            link = json.loads((place / "link.json").read_text()) if (place / "link.json").is_file() else None
            files = [Path(f) for f in link["files"]] if link else sorted(place.glob("*.safetensors"))
            found = {name: file for file in files for name in self._handle(file).keys()}  # noqa: SIM118
            self._where[index] = {n: f for n, f in found.items() if n in link["names"]} if link else found
        return self._where[index]

    def _handle(self, file: Path) -> Any:
        if file not in self._open:
            self._open[file] = safe_open(file, "pt")
        return self._open[file]

    def _close(self, index: str) -> None:
        self._where.pop(index, None)
        self._open = {f: h for f, h in self._open.items() if f.parent != self.folder / index}

    def has(self, index: object) -> bool:
        """Whether an ingredient was written."""
        return (self.folder / str(index)).is_dir()

    def names(self, *indices: object) -> list[str]:
        """The weights that can have moved in these ingredients, in any that has a number without them."""
        chosen = indices or tuple(p.name for p in self.folder.glob("[0-9]*"))
        return sorted(set().union(*(self._places(str(i)) for i in chosen)))

    def base(self, name: str) -> Tensor:
        """theta_0 of a weight."""
        return self._handle(self._places("base")[name]).get_tensor(name)  # type: ignore[no-any-return]

    def get(self, index: object, name: str) -> Tensor:
        """A weight of an ingredient."""
        file = self._places(str(index)).get(name)
        return self.base(name) if file is None else self._handle(file).get_tensor(name)

    def drop(self, *indices: object) -> None:
        """Remove ingredients; what is not there is no error."""
        for index in indices:
            self._close(str(index))
            shutil.rmtree(self.folder / str(index), ignore_errors=True)

    def remove(self) -> None:
        """Give the disk space back."""
        self._open, self._where = {}, {}
        shutil.rmtree(self.folder, ignore_errors=True)


def movable(run: Run) -> dict[str, Tensor]:
    """The base weights and floating buffers that training can change: trained ones, those under deltas, those that methods write."""
    under = {f"{name}.weight" for name, m in run.model.named_modules() if isinstance(getattr(m, "delta", None), Delta)}
    names = (run.touched | under | set().union(*(m.writes() for m in run.stack))) & run.base_names
    here: dict[str, Tensor] = dict(run.model.named_parameters())
    buffers = {name: b for name, b in run.model.named_buffers() if name in run.base_names}
    return {name: t.detach() for name, t in here.items() if name in names} | buffers


def named(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """These weights and buffers of a model."""
    here: dict[str, Tensor] = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    return {name: here[name].detach() for name in names}


@torch.no_grad()
def fill(run: Run, names: Iterable[str], value: Callable[[str], Tensor]) -> None:
    """Put value(name) into the base weights of these names; deltas of the stack add nothing any more."""
    for delta in run.model.modules():
        if isinstance(delta, Delta):
            delta.strength = 0.0
    parameters = dict(run.model.named_parameters())
    here: dict[str, Tensor] = {**dict(run.model.named_buffers()), **parameters}
    for name in names:
        here[name].copy_(value(name))
        if name in parameters:
            run.touch(name)
    sparse: list[Any] = [module for module in run.model.modules() if hasattr(module, "chosen")]
    for module in sparse:  # their chosen values are what the next forward pass writes
        module.chosen.values.copy_(module.weight.reshape(-1)[module.chosen.index])


@contextmanager
def varied(run: Run, changes: Mapping[str, Any]) -> Iterator[None]:
    """A run under other settings for a while, by path; also `seed`, and the positions of examples in `train` and `validation`."""
    values = run.settings.values
    before = {path: lookup(values, path) for path in changes if "." in path}
    seed, keep = run.seed, {split: run.data[split].keep for split in ("train", "validation")}
    try:
        for path in before:
            assign(values, path, changes[path])
        run.seed = changes.get("seed", seed)
        for split in keep:
            run.data[split].keep = changes.get(split, keep[split])
        yield
    finally:
        for path, value in before.items():
            assign(values, path, value)
        run.seed = seed
        for split, positions in keep.items():
            run.data[split].keep = positions


def shares(total: int, parts: Sequence[float]) -> list[int]:
    """A number of updates split in proportion, at least one each where there are enough; they add up to the total."""
    parts = parts[:total]
    out = [max(1, int(total * part / sum(parts))) for part in parts]
    while sum(out) > total:
        out[out.index(max(out))] -= 1
    for i in range(total - sum(out)):
        out[i % len(out)] += 1
    return out


# ---------------------------------------------------------------------------------------------------------------------
# the drive


class Merging(Method):
    """Base of the methods that make one model of several. Knobs that it reads: `runs`, `k`, `keep_ingredients`."""

    runs: list[str]
    k: int
    keep_ingredients: bool
    least: ClassVar[int] = 2
    """How many ingredients it takes."""

    looks_at_data: ClassVar[bool] = False
    """Whether it needs the data of the runs that the user hands in."""

    def vary(self, run: Run, i: int) -> dict[str, Any]:
        """What is different in the fit of ingredient i."""
        return {}

    def combine(self, run: Run, shelf: Shelf) -> dict[str, Any]:
        """Put the result into the run's model, which is the start again; returns what the record should say."""
        raise NotImplementedError

    def parts(self, run: Run) -> list[float]:
        """The relative lengths of the fits."""
        return [1.0] * self.k

    # -- the whole ------------------------------------------------------------------------------------------------

    def prepare(self, run: Run) -> None:
        if self.runs and hasattr(run, "fingerprint"):
            if len(self.runs) < self.least:
                raise UserError(
                    f"method.{self.key}.runs names {len(self.runs)} folder; at least {self.least} are needed to make one of them"
                )
            for folder in self.runs:
                check_folder(self, run, Path(folder).expanduser())

    def refuse(self, run: Run) -> None:
        """Refuse, before anything is trained, what could not be made into one model afterwards."""
        for name in tied_weights(run.model):
            if isinstance(getattr(run.model.get_submodule(name), "delta", None), Delta):
                raise UserError(f"{self.key}: the delta on {name} cannot be merged, another module shares its weight; narrow its targets")
        if set(run.model.state_dict()) - run.base_names and not run.begun("ingredient-0"):
            run.merge()  # says so where what the stack added cannot be folded in
            run.restart()

    def drive(self, run: Run, fit: Callable[..., Any]) -> None:
        self.refuse(run)
        shelf = self.shelf(run)
        if self.runs:
            self.fetch(run, shelf)
        else:
            steps = shares(run.planned_steps, self.parts(run))
            if len(steps) < self.least:
                raise RunFailed(f"{self.key}: trainer.max_steps={run.planned_steps} is shared by {self.k} fits, and each needs an update")
            for i, length in enumerate(steps):
                with varied(run, changes := self.vary(run, i)):
                    self.train(run, fit, shelf, i, length, changes)
        run.results[self.key] = run.once(f"{self.key}:merged", lambda: self.merged(run, shelf))
        if not self.keep_ingredients:
            shelf.remove()

    def shelf(self, run: Run) -> Shelf:
        """Where the ingredients lie: beside the run's record, or in a temporary folder that goes with the run."""
        self.reports: list[dict[str, Any]] = []
        if run.record:
            return Shelf(run.record.folder / "ingredients")
        self._temporary = tempfile.TemporaryDirectory(prefix="ftr-ingredients-")
        return Shelf(Path(self._temporary.name))

    def train(self, run: Run, fit: Callable[..., Any], shelf: Shelf, i: int, steps: int, changes: Mapping[str, Any]) -> None:
        """Fit ingredient i from the start and put it on the shelf."""
        name = f"ingredient-{i}"
        if "seed" in changes and not run.begun(name):  # else `keep` began anew
            run.restart()
        fit(steps, name=name)
        said = {path: value for path, value in changes.items() if path not in ("train", "validation")}
        self.reports.append(run.once(f"{self.key}:kept-{i}", lambda: {"steps": steps, **said, **self.keep(run, shelf, i)}))

    def keep(self, run: Run, shelf: Shelf, index: object) -> dict[str, Any]:
        """Write the run's model as plain weights, and begin anew; returns its metrics on validation data."""
        metrics = run.evaluate("validation")
        names = list(movable(run))
        shelf.put(index, named(run.merge(), names))
        run.count("ingredients")
        run.restart()
        shelf.put_base(named(run.model, names))
        return {"validation": metrics}

    def fetch(self, run: Run, shelf: Shelf) -> None:
        """Put the user's finished runs on the shelf."""
        for i, folder in enumerate(self.runs):
            run.model = run.loaded.model = None  # type: ignore[assignment]
            self.reports.append({"run": str(folder), **self.take(run, shelf, i, Path(folder).expanduser())})
            run.count("ingredients")
        run.restart()
        shelf.put_base(named(run.model, shelf.names()))

    def take(self, run: Run, shelf: Shelf, index: object, folder: Path) -> dict[str, Any]:
        """Put one of the user's folders on the shelf; returns what is known of it."""
        if not (folder / "run.json").is_file():
            files = sorted(folder.glob("*.safetensors"))
            shelf.link(index, files, [name for file in files for name in shapes_of(file) if name in run.base_names])
            return {}
        opened = type(run).open(folder, data=self.looks_at_data)
        said = self.known(opened, folder)
        names = list(movable(opened))
        shelf.put(index, named(opened.merge(), names))
        return {"methods": list(opened.settings.method), **said}

    def known(self, opened: Run, folder: Path) -> dict[str, Any]:
        """What is known of one of the user's runs, which is open."""
        return {"validation": Record(folder).info.get("results", {}).get("after", {}).get("validation", {})}

    def merged(self, run: Run, shelf: Shelf) -> dict[str, Any]:
        run.model.eval()
        said = self.combine(run, shelf)
        run.model.train()
        run.count("merges")
        return {"ingredients": self.reports, **said}


class TaskMerging(Merging):
    """Base of the methods that merge models of different tasks: a merged model is judged on the validation data of each.

    Tasks are those of `runs:`, each with the data of its own record; a method that trains them itself gives `tasks` too.
    """

    looks_at_data = True
    tasks: list[tuple[Dataset, float]]
    """Validation data of each task, and the target metric of its own model on it."""

    def shelf(self, run: Run) -> Shelf:
        self.tasks = []
        return super().shelf(run)

    def known(self, opened: Run, folder: Path) -> dict[str, Any]:
        metrics = opened.evaluate("validation")
        if metrics:
            self.tasks.append((opened.data["validation"], metrics[opened.task.target]))
        return {"data": opened.settings.data.name, "validation": metrics}

    def judged(self, run: Run) -> dict[str, Any]:
        """The target metric of the run's model on each task, and its mean share of what the task's own model has (`normalised`)."""
        own = run.data["validation"]
        values = []
        for dataset, _ in self.tasks:
            run.data["validation"] = dataset
            values.append(run.evaluate("validation")[run.task.target])
        run.data["validation"] = own
        run.count("judged")
        shares = [share(run, value, alone) for value, (_, alone) in zip(values, self.tasks, strict=True)]
        return {run.task.target: values, "normalised": sum(shares) / len(shares)}


def share(run: Run, value: float, whole: float) -> float:
    """How much of a metric is there: 1 for all of it, also where lower is better."""
    value, whole = (value, whole) if run.task.higher_is_better else (whole, value)
    return value / whole if whole else float(value == whole)


def check_folder(method: Method, run: Run, folder: Path) -> None:
    """Refuse what is no finished run of the same base and no whole model of the same shapes."""
    where = f"method.{method.key}.runs: {folder}"
    if not folder.is_dir():
        raise UserError(f"{where}: no such folder")
    if (folder / "run.json").is_file():
        info = Record(folder).info
        if info.get("status") != DONE:
            raise UserError(f"{where}: this run is not finished (status {info.get('status')}); go on with it by resume={folder}")
        if info.get("base") != run.fingerprint:
            raise UserError(
                f"{where}: was tuned from another base (fingerprint {info.get('base')}, that of model={run.settings.model.name} "
                f"is {run.fingerprint}); runs can be merged that share one base"
            )
    elif (folder / "config.json").is_file():
        check_weights(folder)
        parameters = dict(run.model.named_parameters())
        shapes = {name: shape for file in folder.glob("*.safetensors") for name, shape in shapes_of(file).items()}
        for name, parameter in parameters.items():
            if name in run.base_names and shapes.get(name) != list(parameter.shape):
                raise UserError(
                    f"{where}: {name} is {shapes.get(name, 'missing')}, in model={run.settings.model.name} {list(parameter.shape)}"
                )
    else:
        raise UserError(f"{where}: neither a finished run (run.json) nor a whole model (config.json and safetensors)")


def shapes_of(file: Path) -> dict[str, list[int]]:
    """The shapes of the tensors of a safetensors file, without reading them."""
    with safe_open(file, "pt") as handle:
        return {name: handle.get_slice(name).get_shape() for name in handle.keys()}  # noqa: SIM118
