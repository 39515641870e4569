"""What a person sees of a run: a bar in a terminal, plain lines in a file, a short table at the end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console as Rich
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from ftrecipes.run import Run


class Console:
    """Progress of a run on standard error, its result on standard output."""

    def __init__(self) -> None:
        self.err = Rich(stderr=True, highlight=False)
        self.out = Rich(highlight=False)
        self._progress: Progress | None = None
        self._task: Any = None
        self._last = 0.0
        self._began = time.perf_counter()

    def line(self, text: str) -> None:
        self.err.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def loading(self) -> Iterator[None]:
        """While the libraries are imported."""
        if not self.err.is_terminal:
            yield
            return
        with self.err.status("loading torch"):
            yield

    def begin(self, run: Run) -> None:
        settings = run.settings
        names = "+".join(settings.method)
        self.line(
            f"{names} on {settings.model.name} with {settings.data.name}, seed {settings.seed} → {shown(run.record.folder) if run.record else 'no record'}"
        )
        for sentence in [*settings.notes, *settings.overridden]:
            self.line(f"note: {sentence}")
        if not run.stack.picks:
            self.line("note: no method of this stack picks what trains, so all weights do (full)")

    def built(self, run: Run, before: dict[str, dict[str, float]]) -> None:
        for note in [*run.loaded.notes, *run.data_notes]:
            self.line(f"note: {note}")
        trainable = sum(p.numel() for p in run.trainable().values())
        total = sum(p.numel() for p in run.model.parameters())
        steps, trainer = run.planned_steps, run.settings.trainer
        self.line(
            f"{trainable:,} of {total:,} parameters train ({100 * trainable / total:.2f} %); {steps} updates of "
            f"{trainer.batch} examples, {run.settings.optimizer.name} at lr {run.settings.optimizer.lr:g}, {run.device.type} {run.precision}"
        )
        self._began = time.perf_counter()
        if self.err.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
            self._progress = Progress(*columns, console=self.err, transient=True)
            self._progress.start()
            self._task = self._progress.add_task("start", total=steps, completed=run.step)

    def resumed(self, run: Run) -> None:
        self.line(f"resumed after update {run.step}")

    def progress(self, run: Run) -> None:
        now = time.perf_counter()
        planned = max(run.planned_steps, run.step)
        if self._progress is not None:
            if now - self._last > 0.1 or run.step == planned:
                self._last = now
                self._progress.update(self._task, completed=run.step, total=planned, description=_latest(run))
        elif run.step == 1 or run.step == planned or run.step % max(1, planned // 10) == 0:
            seconds = now - self._began
            self.line(f"update {run.step}/{planned}  {_latest(run)}  {seconds:.0f} s")

    def stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def end(self, run: Run, results: dict[str, Any]) -> None:
        self.stop()
        self.out.print(result_table(run, results))
        for sample in results["samples"]:
            self.out.print(sample_lines(sample), soft_wrap=True)
        for name, n in results["events"].items():
            self.line(f"{name}: {n}")
        if run.record:
            folder = shown(run.record.folder)
            self.out.print(f"record  {folder}", soft_wrap=True)
            steps = [f"ftr eval {folder}", f"ftr merge {folder}", f"ftr compare {shown(run.record.folder.parent)}"]
            if hasattr(run.task, "generate"):
                steps.insert(1, f"ftr generate {folder} --prompt '…'")
            for n, step in enumerate(steps):
                self.out.print(f"{'' if n else 'next':8}{step}", soft_wrap=True)


def shown(path: Path) -> Path:
    """A path as one would type it from here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def sample_lines(sample: dict[str, str]) -> Text:
    """The end of a prompt, the answer that is wanted, and the answers before and after."""
    text = Text()
    for name in ("prompt", "wanted", "before", "after"):
        said = " ".join(sample[name].split()) or "(nothing)"
        cut = f"…{said[-89:]}" if name == "prompt" and len(said) > 90 else said if len(said) <= 90 else f"{said[:89]}…"
        text.append(f"{name:8}", style="dim").append(f"{cut}\n", style="bold" if name == "after" else "")
    return text


def _latest(run: Run) -> str:
    loss = run._row.get("nll", run._row.get("loss"))
    return f"loss {float(loss):.4f}" if loss is not None else ""


def result_table(run: Run, results: dict[str, Any]) -> Table:
    """Before and after, by set and metric."""
    table = Table(title=f"{'+'.join(run.settings.method)} on {run.settings.model.name}", title_justify="left")
    for column in ("set", "metric", "before", "after", "change"):
        table.add_column(column, justify="left" if column in ("set", "metric") else "right")
    names = {"test": f"target ({run.settings.data.name}, test)", "retain": f"forgetting ({run.retain_name}, held out)"}
    for split, title in names.items():
        before, after = results["before"].get(split, {}), results["after"].get(split, {})
        wanted = [run.task.target, "nll", "loss"] if split == "test" else run.task.forgetting
        for metric in [m for m in dict.fromkeys(wanted) if m in after]:
            b, a = before.get(metric, float("nan")), after[metric]
            table.add_row(title, metric, f"{b:.4f}", f"{a:.4f}", f"{a - b:+.4f}")
    return table
