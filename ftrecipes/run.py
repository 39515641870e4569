"""A run: builds the parts, drives the fits, writes the record; the function that Hydra and a cluster's job call.

Order of a run: model → data → what the methods build (`prepare`) → fits, as the stack drives them → `finish` → record.
Everything that a resumed run needs is a function of (seed, fit, step) or stands in the newest checkpoint.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ftrecipes import data as data_sets
from ftrecipes import models, optim, registry, stacking
from ftrecipes.anatomy import Anatomy
from ftrecipes.data.base import Dataset, micro_batches, order
from ftrecipes.errors import FtrError, Interrupted, RunFailed, UserError
from ftrecipes.method import Method, Stack
from ftrecipes.models import adapter
from ftrecipes.models.base import Loaded, device_of, fingerprint, precision_of
from ftrecipes.record import DONE, FAILED, INTERRUPTED, Record, now, versions
from ftrecipes.rng import derive, generator
from ftrecipes.storage import load_checkpoint, load_tuned, save_checkpoint, save_tuned
from ftrecipes.update import Loss, Update, Window

if TYPE_CHECKING:
    from ftrecipes.compose import Settings
    from ftrecipes.report.console import Console

TOKENS_CPU, TOKENS_GPU = 4096, 16384
"""Model positions of an automatic micro-batch."""


class Run:
    """One fine-tuning run, and what methods see of it.

    model, task, anatomy: the model, what its domain says, its parts by role. data: Datasets by split.
    step: updates done, over all fits. fit_step, fit_steps: those of the current fit.
    rounding: the largest change that rounding to a weight's dtype made when a delta was folded into it.
    held: further models that stay in memory.
    """

    def __init__(self, settings: Settings, record: Record | None = None, console: Console | None = None) -> None:
        self.settings = settings
        self.seed: int = settings.seed
        self.record = record
        self.console = console
        self.device = device_of(settings)
        self.precision = precision_of(settings)
        self.model: nn.Module = None  # type: ignore[assignment]
        self.task: Any = None
        self.anatomy: Anatomy = None  # type: ignore[assignment]
        self.stack = Stack([registry.method_class(key)(key, dict(knobs)) for key, knobs in settings.method.items()])
        self.data: dict[str, Dataset] = {}
        self.data_notes: list[str] = []
        self.optimizer: torch.optim.Optimizer | None = None
        self.update: Update = None  # type: ignore[assignment]
        self.step = self.fit_step = self.fit_steps = self.fit_index = 0
        self.fit_name = ""
        self.within: tuple[int, int] | None = None
        self.rate = 0.0
        self.events: dict[str, int] = {}
        self.journal: dict[str, Any] = {}
        self.touched: set[str] = set()
        self.base_names: set[str] = set()
        self.held: list[nn.Module] = []
        self.rounding = 0.0
        self.stopping: str | None = None
        self.remarks: list[str] = []
        self.results: dict[str, Any] = {}
        self.best: dict[str, Any] = {}
        self._trainable: dict[str, nn.Parameter] = {}
        self._row: dict[str, Any] = {}
        self._reported: dict[str, Tensor] = {}
        self._resume: dict[str, Any] | None = None
        self._checkpoints = 0
        self._loggers: list[Any] = []
        self._clock = time.perf_counter()

    # -- building -------------------------------------------------------------------------------------------------

    def build(self, *, data: bool = True, structure: dict[str, Any] | None = None) -> Run:
        """Load model and data and let the methods prepare; with a structure, rebuild what a record holds."""
        self.load_model()
        if data:
            self.load_data()
        self.prepare(structure)
        return self

    def load_model(self, *, meta: bool = False, loaded: Loaded | None = None) -> None:
        """The model before any tuning of this run on its device, its task and anatomy; `loaded` is used where it is given."""
        hardware = self.settings.hardware
        if hardware.threads:
            torch.set_num_threads(hardware.threads)
        if hardware.deterministic is True or (hardware.deterministic == "auto" and self.device.type == "cpu"):
            torch.use_deterministic_algorithms(True, warn_only=True)
        self.loaded = loaded or models.load(self.settings, meta=meta)
        if self.settings.model.adapter and not meta:
            self.loaded = adapter.apply(self.loaded, Path(self.settings.model.adapter).expanduser())
        self.model, self.task = self.loaded.model, self.loaded.task
        for method in self.stack:
            method.set_up(self.task)
        if not meta:
            self.model.to(self.device)
            self.task.check(self.model)
            self.fingerprint = fingerprint(self.model, self.loaded.fresh)
        self.anatomy = Anatomy(self.model, self.loaded.roles, self.loaded.blocks)
        for companion in self.task.companions():
            self.hold(companion)
        self.base_names = set(self.model.state_dict(keep_vars=True))
        self.update = Update(self)

    def prepare(self, structure: dict[str, Any] | None = None) -> None:
        """Let the methods build themselves; afterwards what trains is fixed."""
        if self.settings.hardware.checkpointing:  # first, so that what methods look at before training is as bounded as training
            if hasattr(self.model, "enable_gradient_checkpointing"):  # diffusers' word for it
                self.model.enable_gradient_checkpointing()  # type: ignore[operator]
            else:
                enable = getattr(self.model, "activation_checkpointing_enable", None) or self.model.gradient_checkpointing_enable
                enable({"use_reentrant": False})  # type: ignore[operator]
            if hasattr(self.model, "enable_input_require_grads"):
                self.model.enable_input_require_grads()  # type: ignore[operator]
        self.stack.prepare(self, structure)
        extra = list(self.settings.model.also_train)
        for part in self.anatomy.select(extra) if extra else []:
            part.weight.requires_grad_(True)
        if extra and not any(p.role in extra or f"re:{p.role}" in extra for p in self.anatomy.parts):
            have = ", ".join(sorted({part.role for part in self.anatomy.parts}))
            raise UserError(f"model.also_train={extra}: no such role in {self.settings.model.name}; it has {have}")
        for name in self.loaded.fresh if all(m.trains_fresh for m in self.stack) else ():
            self.model.get_parameter(name).requires_grad_(True)
        if self.precision.endswith("mixed"):  # without autocast, mixed dtypes would not multiply
            for parameter in self.model.parameters():
                if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
                    parameter.data = parameter.data.float()
        if self.stack.at("sample"):
            self.task.guide = lambda predict: self.stack.sample(self, predict)
        self._trainable = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if not self._trainable:
            raise UserError(f"nothing trains: {', '.join(m.key for m in self.stack)} left every weight frozen")
        self.touched |= set(self._trainable) & self.base_names

    def restart(self) -> None:
        """The run's model as it was before any update: loaded and prepared anew, one model in memory at a time.

        Data, journal and the count of updates stay; for drives whose fits begin at one start.
        """
        self.optimizer = None
        self.model = self.loaded.model = None  # type: ignore[assignment]
        self.loaded.model = self.loaded.pristine()
        self.model = self.loaded.model.to(self.device)
        self.anatomy = Anatomy(self.model, self.loaded.roles, self.loaded.blocks)
        self.touched = set()
        self.prepare()
        self.model.train()

    def load_data(self, *, select: bool = True) -> None:
        """The splits of the data set, encoded; what was skipped or cut is remembered as a note.

        select: let the methods choose from the training data, which nobody needs who does not train.
        """
        raw = data_sets.splits(self.settings)
        trainer = self.settings.trainer
        self.data = data_sets.datasets(raw, self.task, overfit=trainer.overfit, evaluate=trainer.eval_examples)
        self.retain_name = raw.retain_name
        self.task.target = raw.target or self.task.target
        self.data_notes = list(raw.notes)
        if self.once("data", lambda: raw.fingerprint) != raw.fingerprint:
            raise UserError(f"data {self.settings.data.name}: it changed since this run began; start a new run")
        for name, dataset in self.data.items():
            if len(dataset) or name == "train":
                dataset.prepare()
            self.data_notes += dataset.notes
        for method in self.stack.at("data") if select else ():
            chosen = self.once(f"data:{method.key}", lambda m=method: self._select(m))  # type: ignore[misc]
            self.data["train"].keep = list(chosen["keep"])
            weight = chosen["weight"]
            self.data["train"].weight = None if weight is None else torch.tensor(weight)

    def _select(self, method: Method) -> dict[str, Any]:
        method.data(self)
        train = self.data["train"]
        if not len(train):
            raise RunFailed(f"{method.key} kept no training example")
        return {"keep": list(train.keep), "weight": None if train.weight is None else train.weight.tolist()}

    # -- what methods use -----------------------------------------------------------------------------------------

    def trainable(self) -> dict[str, nn.Parameter]:
        """All parameters that train in this run, by name; some may be switched off for the moment."""
        return self._trainable

    @property
    def budget(self) -> int:
        """Model positions of an automatic micro-batch."""
        return TOKENS_GPU if self.device.type == "cuda" else TOKENS_CPU

    def active(self) -> dict[str, nn.Parameter]:
        """The trainable parameters that are switched on now."""
        return {name: p for name, p in self._trainable.items() if p.requires_grad}

    def touch(self, *names: str) -> None:
        """Say that base weights changed although they are frozen, so that the record holds them."""
        self.touched.update(names)

    def generator(self, *key: object) -> torch.Generator:
        """A CPU generator for one purpose, a function of the run's seed and the key."""
        return generator(self.seed, *key)

    def seed_global(self, *key: object) -> None:
        """Seed torch's global generator (dropout) for this fit, step and purpose."""
        seed = derive(self.seed, self.fit_index, self.step, *key)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed takes milliseconds: it prepares every kind of device
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(seed)

    def say(self, sentence: str) -> None:
        """A remark for the user, on the console and in the record."""
        self.remarks.append(sentence)
        if self.console:
            self.console.line(f"note: {sentence}")

    def log(self, name: str, value: Any) -> None:
        """A number of this update; the last value before a row is written stands in it."""
        self._row[name] = value

    def report(self, name: str, total: Tensor) -> None:
        """Add to a sum over the window's counted units; logged as their mean."""
        self._reported[name] = self._reported[name] + total if name in self._reported else total

    def count(self, event: str, n: int = 1) -> None:
        """Count an event of a mechanism (a re-selection, a merge, a switch)."""
        self.events[event] = self.events.get(event, 0) + n

    def gradients(self, window: Window, loss: Loss | None = None, *, report: bool = True) -> Tensor:
        """Fill `.grad` with the window's gradient; see Update.gradients.

        report: whether this pass is the one whose reported sums are logged (a pass at other weights is not).
        """
        with self._reporting(report):
            return self.update.gradients(window, loss)

    def hessian_product(
        self, window: Window, vector: Sequence[Tensor], loss: Loss | None = None, *, report: bool = True
    ) -> tuple[Tensor, list[Tensor]]:
        """The loss and the product of its Hessian with a vector; fills `.grad` as well; see Update.hessian_product."""
        with self._reporting(report):
            return self.update.hessian_product(window, vector, loss)

    @contextmanager
    def _reporting(self, report: bool) -> Iterator[None]:
        kept = {} if report else dict(self._reported)
        self._reported.clear()
        yield
        if not report:
            self._reported = kept

    def loss(self, window: Window, loss: Loss | None = None) -> Tensor:
        """The window's loss without gradients; see Update.loss."""
        self._reported.clear()
        return self.update.loss(window, loss)

    def window(self, step: int, dataset: Dataset | None = None, batch: int | None = None) -> Window:
        """The window of an update: the next `trainer.batch` examples of the shuffled stream, as micro-batches."""
        dataset = dataset or self.data["train"]
        size = batch or self.settings.trainer.batch
        dataset.epoch = step * size // len(dataset.keep)
        places = order(len(dataset.keep), self.seed, step * size, size)
        return self.window_of(dataset, [dataset.keep[i] for i in places], step)

    def window_of(self, dataset: Dataset, positions: Sequence[int], step: int = 0) -> Window:
        """A window of these examples; in a run of several processes each holds its share.

        Every example gets a seed, `draw`, for what is random about it at this step; it does not depend on the micro-batches.
        """
        world = self.update.world
        units = float(dataset.task.units([dataset[i] for i in positions]))
        mine = list(positions[world.rank :: world.size])
        micro = self.settings.hardware.micro_batch
        splits = micro_batches(dataset, mine, examples=None if micro == "auto" else int(micro), budget=self.budget)
        micros = [dataset.batch(split) for split in splits]
        times: Counter[int] = Counter()  # an example can stand in a window twice
        seeds: list[tuple[int, int]] = []
        for position in positions:
            seeds.append((position, derive(self.seed, "draw", step, position, times[position])))
            times[position] += 1
        waiting: dict[int, list[int]] = {}
        for position, seed in seeds[world.rank :: world.size]:
            waiting.setdefault(position, []).append(seed)
        for micro in micros:
            micro["draw"] = torch.tensor([waiting[position].pop(0) for position in micro["example"].tolist()])
        return Window(micros, units)

    def move(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch on the run's device."""
        moved = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        return moved | {k: self.move(v) for k, v in batch.items() if isinstance(v, dict)}

    def calibration(self, examples: int, *, batch: int | None = None) -> Iterator[dict[str, Any]]:
        """The first examples of a shuffled pass over the training data, as batches on the device."""
        train = self.data["train"]
        if examples > len(train.keep):
            raise UserError(f"{examples} calibration examples were asked for and the training set holds {len(train.keep)}")
        positions = [train.keep[i] for i in order(len(train.keep), derive(self.seed, "calibration"), 0, examples)]
        for at in range(0, examples, batch or examples):
            yield self.move(train.batch(positions[at : at + (batch or examples)]))

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Eval mode without gradients, and back."""
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), self.update.autocast():
                yield
        finally:
            self.model.train(training)

    def evaluate(self, split: str) -> dict[str, float]:
        """The task's metrics on a split (`validation`, `test`, `retain`), and those that plugins registered."""
        dataset = self.data[split]
        if not len(dataset):
            return {}
        sums: dict[str, Tensor] = {}
        with self.evaluating():
            for positions in micro_batches(dataset, dataset.keep, examples=None, budget=4 * self.budget):
                for name, pair in self.task.measure(self.model, self.move(dataset.batch(positions))).items():
                    sums[name] = sums[name] + pair.double() if name in sums else pair.double()
            out = {name: float(pair[0] / pair[1]) for name, pair in sums.items()}
            for name, function in registry.metrics().items():
                out[name] = float(function(self, [dataset.raw[i] for i in dataset.keep]))
        return out

    def pristine(self) -> nn.Module:
        """The model as it was loaded, a second one on the CPU; costs its memory as long as it is held."""
        return self.loaded.pristine()

    def hold(self, model: nn.Module) -> nn.Module:
        """Keep a further model on the run's device, frozen and in eval mode; plans count it."""
        model.requires_grad_(False).eval()
        self.held.append(model if next(model.parameters()).is_meta else model.to(self.device))
        return self.held[-1]

    def forget(self, parameters: Sequence[nn.Parameter]) -> None:
        """Drop the optimizer's state of these parameters."""
        for part in getattr(self.optimizer, "parts", [self.optimizer]):
            for parameter in parameters:
                part.state.pop(parameter, None)

    def once(self, name: str, function: Callable[[], Any]) -> Any:
        """Do something once in the life of a run, across resumptions; its result must be plain data.

        What it did to weights is in the checkpoint that is written right after it.
        """
        if name not in self.journal:
            self.journal[name] = function()
            if self.step:
                self.checkpoint()
        return self.journal[name]

    # -- fits -----------------------------------------------------------------------------------------------------

    @property
    def planned_steps(self) -> int:
        """Updates of the whole run by `trainer.max_steps`, or by `trainer.epochs`."""
        trainer = self.settings.trainer
        if trainer.max_steps is not None:
            return int(trainer.max_steps)
        return max(1, math.ceil(trainer.epochs * len(self.data["train"].keep) / trainer.batch))

    def set_rate(self) -> None:
        """The learning rate of this update, by the schedule of the current fit."""
        before, whole = self.within or (0, self.fit_steps)
        factor = optim.factor(self.settings.schedule, before + self.fit_step, whole)
        self.rate = self.settings.optimizer.lr * factor
        for group in self.optimizer.param_groups if self.optimizer else []:
            group["lr"] = group["peak"] * factor
        self.log("lr", self.rate)

    def build_optimizer(self) -> torch.optim.Optimizer | None:
        """The optimizer over what trains: the stack's own, or the configured one; None when nobody steps with it."""
        owner = self.stack.owner["step"]
        if owner is not None and not owner.steps_with_optimizer:
            return None
        knobs = self.settings.optimizer
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self._trainable.items():
            options: dict[str, Any] = {"weight_decay": knobs.weight_decay if parameter.dim() > 1 else 0.0}
            for method in self.stack:
                options |= method.group(name, parameter)
            groups.setdefault((options.get("lr_scale", 1.0), options["weight_decay"]), []).append(parameter)
        built = [
            {"params": params, "lr": knobs.lr * scale, "peak": knobs.lr * scale, "weight_decay": decay}
            for (scale, decay), params in groups.items()
        ]
        if owner := self.stack.owner["optimizer"]:
            return owner.optimizer(self, built)
        inside = {id(p) for _, block in self.anatomy.blocks for p in block.parameters()}
        return optim.build(knobs.name, built, knobs, lambda p: id(p) in inside)

    def begun(self, name: str) -> bool:
        """Whether the fit of this name is finished, or is the one that a resumed run stands in."""
        return f"fit:{name}" in self.journal or bool(self._resume and self._resume["fit"] == f"fit:{name}")

    def fit(self, steps: int | None = None, *, name: str | None = None, within: tuple[int, int] | None = None) -> dict[str, Any]:
        """Train for `steps` updates with a fresh optimizer and schedule; one that is finished returns its result at once.

        within: the fit is a stretch of a longer schedule, (its updates before this fit, all of its updates).
        """
        from ftrecipes.finetuner import train

        self.fit_index += 1
        self.within = within
        key = f"fit:{name or self.fit_index}"
        if key in self.journal:
            return dict(self.journal[key])
        self.fit_name, self.fit_steps, self.fit_step = key, self.planned_steps if steps is None else steps, 0
        self.optimizer = self.build_optimizer()
        state, self._resume = self._resume, None
        if state and state["fit"] == key:
            self.fit_step = state["fit_step"]
            if self.optimizer is not None:
                self.optimizer.load_state_dict(state["optimizer"])
        if self.fit_step < self.fit_steps:
            train(self)
        if self.stopping == INTERRUPTED:
            self.checkpoint()
            raise Interrupted(f"stopped after update {self.step}; the same command with resume=auto goes on from there")
        # Dropped before the boundary is written: its state belongs to this fit alone.
        self.optimizer = None
        self.journal[key] = {"steps": self.fit_step, "step": self.step}
        self.fit_name = ""
        self.checkpoint()
        return dict(self.journal[key])

    def after_update(self) -> None:
        """Rows, evaluations and checkpoints that are due; called by the module after every update."""
        trainer = self.settings.trainer
        planned = max(self.planned_steps, 1)
        every = trainer.log_every or max(1, planned // 100)
        last = self.fit_step == self.fit_steps
        if self.step % every == 0 or last or self.step == 1:
            self.write_row()
        if self.console:
            self.console.progress(self)
        evaluate_every = trainer.eval_every or max(1, math.ceil(planned / 3))
        if self.step % evaluate_every == 0 and (self.step != planned or trainer.keep_best):
            self.validate()
        checkpoint_every = trainer.checkpoint_every or max(1, math.ceil(planned / 10))
        if self.record and not last and self.step % checkpoint_every == 0:
            self.checkpoint()

    def write_row(self) -> None:
        """One row of training metrics."""
        row = {"step": self.step, **{name: _number(v) for name, v in self._row.items()}}
        row |= {f"events/{name}": n for name, n in self.events.items()}
        row["seconds"] = round(time.perf_counter() - self._clock, 3)
        self._emit(row)

    def finish_window(self, window: Window) -> None:
        """Means over the window of what was reported."""
        totals = [t.detach().float() for t in self._reported.values()]
        self.update.world.sum(totals)
        for name, total in zip(self._reported, totals, strict=True):
            self.log(name, total / window.units)
        self._reported.clear()

    def _emit(self, row: dict[str, Any]) -> None:
        if self.record:
            self.record.row(row)
        for logger in self._loggers:
            logger.row(row)

    def validate(self) -> None:
        """Evaluate on validation data; remember the best weights and stop early when asked to."""
        metrics = self.evaluate("validation")
        if not metrics:
            return
        self._emit({"step": self.step, **{f"validation/{name}": value for name, value in metrics.items()}})
        name = self.settings.trainer.monitor or self.task.target
        if name not in metrics:
            raise RunFailed(f"trainer.monitor={name}: validation gives {', '.join(metrics)}")
        higher = self.task.higher_is_better if name == self.task.target else name not in ("nll", "loss", "mse")
        value = metrics[name]
        if not self.best or (value > self.best["value"] if higher else value < self.best["value"]):
            self.best = {"value": value, "step": self.step, "metric": name, "since": 0}
            if self.settings.trainer.keep_best and self.record:
                self.best["checkpoint"] = self.checkpoint()
        else:
            self.best["since"] += 1
            patience = self.settings.trainer.patience
            if patience and self.best["since"] >= patience:
                self.stopping = "early"
                self.count("early_stop")

    def checkpoint(self) -> str | None:
        """Write what a resumed run needs; returns the checkpoint's name."""
        if not self.record:
            return None
        self._checkpoints += 1
        name = f"{self._checkpoints:06d}"
        state = {
            "checkpoint": self._checkpoints,
            "step": self.step,
            "fit": self.fit_name,
            "fit_step": self.fit_step,
            "journal": self.journal,
            "events": self.events,
            "best": self.best,
            "row": {name: _number(v) for name, v in self._row.items()},
            "touched": sorted(self.touched),
            "structure": self.stack.structure(),
            "methods": self.stack.state_dict(),
            "optimizer": self.optimizer.state_dict() if self.optimizer is not None else None,
            "scaler": vars(self.update.scaler) if self.update.scaler else None,
            "metrics": self.record.metrics_offset(),
        }
        save_checkpoint(self.record, name, state, self.saved_weights())
        self.record.keep(self.settings.trainer.keep, self.best.get("checkpoint"))
        return name

    def saved_weights(self) -> dict[str, Tensor]:
        """What differs from the base: touched base weights, and everything that methods added."""
        named: dict[str, Tensor] = dict(self.model.named_parameters())
        added = {n: t for n, t in self.model.state_dict(keep_vars=True).items() if n not in self.base_names}
        buffers = {n: b for n, b in self.model.named_buffers() if n in self.base_names}
        return {n: t.detach() for n, t in {**buffers, **added}.items()} | {n: named[n].detach() for n in sorted(self.touched)}

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Put saved weights in their places."""
        here: dict[str, Tensor] = {**dict(self.model.named_buffers()), **dict(self.model.named_parameters())}
        missing = sorted(set(weights) - set(here))
        if missing:
            raise UserError(f"saved weights do not fit this model: it has no {missing[0]}")
        with torch.no_grad():
            for name, value in weights.items():
                if here[name].shape != value.shape:
                    raise UserError(f"saved weights do not fit: {name} is {tuple(value.shape)}, here {tuple(here[name].shape)}")
                if here[name].dtype != value.dtype:
                    here[name].data = here[name].data.to(value.dtype)
                here[name].copy_(value)

    # -- the whole ------------------------------------------------------------------------------------------------

    def train(self) -> dict[str, Any]:
        """Everything from loading to the written record; returns the results that the record holds."""
        with self._signals():
            try:
                return self._train()
            except FtrError as error:
                self._end(INTERRUPTED if isinstance(error, Interrupted) else FAILED, str(error))
                raise
            except torch.OutOfMemoryError as error:
                self._end(FAILED, str(error))
                raise RunFailed(
                    f"out of memory on {self.device} ({str(error).split('. ')[0]}); try hardware.micro_batch=1, "
                    "hardware.checkpointing=true, or a smaller data.max_length; `ftr plan` estimates what fits"
                ) from None
            except BaseException as error:
                self._end(FAILED, f"{type(error).__name__}: {error}")
                raise

    def _end(self, status: str, reason: str) -> None:
        if self.record and self.record.info:
            self.record.close_metrics()
            try:
                self.record.update(status=status, reason=reason, ended=now())
            except (FtrError, OSError):
                pass  # the disk is what failed; the first error is the one to show
        for logger in self._loggers:
            logger.close(status)

    def _train(self) -> dict[str, Any]:
        began = time.perf_counter()
        state = self._find_checkpoint()
        if self.console:
            self.console.begin(self)
        self.load_model()
        if self.record:
            self._begin_record(state)
        if state:
            self.journal = state["journal"]
        self.load_data()
        if self.record:
            self.record.update(data=self.journal["data"])
        before = self.once("before", lambda: {s: self.evaluate(s) for s in ("test", "retain")})
        shown = self.once("samples", self._samples)
        self.prepare(state["structure"] if state else None)
        if state:
            self._restore(state)
        elif self.record:
            self._emit({"step": 0, **{f"start/{s}/{n}": v for s, m in before.items() for n, v in m.items()}})
        if self.console:
            self.console.built(self, before)
        self.model.train()
        self.stack.drive(self, self.fit)
        if self.settings.trainer.keep_best and self.best.get("checkpoint") and self.record:
            best = load_checkpoint(self.record, self.best["checkpoint"])
            self.load_weights(best["weights"])
        self.model.eval()
        self.stack.finish(self)
        after = {s: self.evaluate(s) for s in ("validation", "test", "retain")}
        results = {
            **self.results,
            "before": before,
            "after": after,
            "steps": self.step,
            "events": self.events,
            "samples": [
                {"prompt": was["prompt"], "wanted": was["wanted"], "before": was["now"], "after": is_["now"]}
                for was, is_ in zip(shown, self._samples(), strict=True)
            ],
            "trainable": sum(p.numel() for p in self._trainable.values()),
            "total": sum(p.numel() for p in self.model.parameters()),
            "best": {k: v for k, v in self.best.items() if k != "checkpoint"},
        }
        self._emit({"step": self.step, **{f"end/{s}/{n}": v for s, m in after.items() for n, v in m.items()}})
        if self.record:
            save_tuned(self.record, self)
            self.record.close_metrics()
            if self.settings.logger.name == "csv":
                self.record.write_csv()
            self.record.update(status=DONE, results=results, ended=now(), seconds=round(time.perf_counter() - began, 1))
        for logger in self._loggers:
            logger.close(DONE)
        if self.console:
            self.console.end(self, results)
        return results

    def _samples(self) -> list[dict[str, str]]:
        """The first test examples with what the model makes of them now."""
        test = self.data["test"]
        with self.evaluating():
            samples = self.task.samples(self, [test.raw[i] for i in test.keep[: self.settings.trainer.samples]])
        return [{"prompt": s["prompt"], "wanted": s["wanted"], "now": s["answer"]} for s in samples]

    def _find_checkpoint(self) -> dict[str, Any] | None:
        if not self.record:
            return None
        names = [path.name for path in self.record.checkpoints()]
        return load_checkpoint(self.record, names[-1]) if names else None

    def _begin_record(self, state: dict[str, Any] | None) -> None:
        assert self.record
        from ftrecipes.report.loggers import loggers

        known = self.record.info
        if state and known.get("base") not in (None, self.fingerprint):
            raise UserError(f"{self.record.folder}: the base model changed since this run began; it cannot be resumed")
        info = {
            "hash": self.settings.hash,
            "methods": list(self.settings.method),
            "seed": self.seed,
            "command": " ".join(sys.argv),
            "overrides": self.settings.overrides,
            "origin": self.settings.origin,
            "base": self.fingerprint,
            "precision": self.precision,
            "versions": versions(),
            "started": known.get("started", now()),
            "process": os.getpid(),
            "reason": None,
        }
        self.record.begin(self.settings.values, info)
        self.record.open_metrics(state["metrics"] if state else 0)
        self._loggers = loggers(self)

    def _restore(self, state: dict[str, Any]) -> None:
        self.touched = set(state["touched"])
        self.load_weights(state["weights"])
        self.stack.load_state_dict(state["methods"])
        self.step, self.events, self.best = state["step"], state["events"], state["best"]
        self._checkpoints, self._row = state["checkpoint"], state["row"]
        if self.update.scaler and state["scaler"]:
            vars(self.update.scaler).update(state["scaler"])
        self._resume = state if state["fit"] else None
        if self.console:
            self.console.resumed(self)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM stop the run after the current update; a second one at once."""

        def stop(number: int, frame: Any) -> None:
            if self.stopping == INTERRUPTED or not self.fit_name:
                raise Interrupted(f"stopped by {signal.Signals(number).name}; resume=auto goes on from the last checkpoint")
            self.stopping = INTERRUPTED

        try:
            previous = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: whoever owns it handles signals
            yield
            return
        try:
            yield
        finally:
            for s, handler in previous.items():
                signal.signal(s, handler)

    # -- reopening ------------------------------------------------------------------------------------------------

    @classmethod
    def open(cls, folder: str | Path, *, data: bool = False, loaded: Loaded | None = None) -> Run:
        """The tuned model of a finished run, rebuilt from its record and its base, which is loaded unless it is given."""
        from ftrecipes.compose import resolve

        record = Record(folder)
        values, info = record.config, record.info
        if not (record.folder / "tuned").is_dir():
            raise UserError(
                f"{folder}: this run has no tuned weights (status {info.get('status', 'unknown')}); finish it with resume={folder}"
            )
        # Any machine may open it: the device is this one's, the dtype of the weights the run's.
        values["hardware"] |= {"device": "auto", "precision": info["precision"], "checkpointing": False}
        run = cls(resolve(values))
        run.load_model(loaded=loaded)
        if info["base"] != run.fingerprint:
            raise UserError(
                f"{folder}: tuned from another base (fingerprint {info['base']}, here {run.fingerprint}); "
                "give the model it was tuned from, in the dtype it had"
            )
        tuned = load_tuned(record)
        if data:
            run.journal["data"] = info["data"]
            run.load_data(select=False)
        run.prepare(tuned["structure"])
        run.touched |= set(tuned["weights"]) & run.base_names
        run.load_weights(tuned["weights"])
        run.model.eval()
        run.source = record  # type: ignore[attr-defined]
        return run

    def merge(self) -> nn.Module:
        """Fold all methods into the plain model and return it."""
        stacking.check_mergeable(self.settings.method)
        with torch.no_grad():
            self.stack.merge(self)
        if left := sorted(set(self.model.state_dict()) - self.base_names):
            raise UserError(f"{'+'.join(self.settings.method)}: cannot be folded into plain weights ({left[0]} stays)")
        return self.model


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, Tensor) else value


def quiet() -> None:
    """Silence what libraries print about themselves."""
    warnings.filterwarnings("ignore", module=r"lightning\..*")
    warnings.filterwarnings("ignore", message=r".*`?configure_optimizers.*|.*num_workers.*|.*isinstance\(treespec.*")
    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
