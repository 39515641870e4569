"""A run that is killed and started again by the same command ends as one that never was: bit-equal weights, equal rows.

The processes are real and so is the SIGKILL: in the middle of a window's micro-batches, while a checkpoint is being
written, between two fits of a drive, and at moments that nobody chose.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import die, fork, ftr, wait
from safetensors.torch import load_file
from tools import SMALL, small

from ftrecipes import catalogue

STEPS = 12
COMMON = [
    f"trainer.max_steps={STEPS}", "trainer.checkpoint_every=3", "trainer.eval_every=5", "trainer.log_every=1",
    "hardware.micro_batch=3", "resume=auto",
]  # fmt: skip
KNOBS = {
    "lora": ["method.lora.dropout=0.1"],
    "lift": ["method.lift.update_interval=4"],
    "lisa": ["method.lisa.interval=4", "method.lisa.gamma=1"],
    "periodic_lora": ["method.periodic_lora.stage_steps=5", "method.periodic_lora.momentum=0.2"],
    "mezo": ["method.mezo.n=2"],
    "adalora": ["method.adalora.deltaT=2"],
    "taft": ["method.taft.shards=3"],
    "bitfit": ["model.architecture.attention_bias=true"],
    "wise_ft": ["method.wise_ft.alpha=[0.3,0.7]"],
}
METHODS = sorted(catalogue.entries("method"))


def command(method: str) -> list[str]:
    return ["train", f"method={method}", *(SMALL if method.startswith("[") else small(method)), *COMMON, *KNOBS.get(method, [])]


def outcome(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    """Tuned tensors, rows of metrics without times, and results of the one run in a folder."""
    (run,) = folder.glob("outputs/*/*")
    tensors = {f"{file.stem}/{name}": t for file in sorted((run / "tuned").glob("*.safetensors")) for name, t in load_file(file).items()}
    rows = [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in (run / "metrics.jsonl").read_text().splitlines()]
    info = json.loads((run / "run.json").read_text())
    assert info["status"] == "done", info
    return tensors, rows, info["results"]


def same(a: Path, b: Path) -> None:
    """Two folders hold runs that ended alike, bit for bit."""
    (ta, ra, sa), (tb, rb, sb) = outcome(a), outcome(b)
    assert ta.keys() == tb.keys()
    for name, tensor in ta.items():
        assert tensor.dtype == tb[name].dtype and tensor.equal(tb[name]), name
    assert ra == rb
    assert sa == sb


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a run of a method that nobody killed, made once."""
    made: dict[str, Path] = {}

    def get(method: str) -> Path:
        if method not in made:
            folder = tmp_path_factory.mktemp(f"whole-{method.strip('[]').replace(',', '-')}")
            assert ftr(*command(method), cwd=folder) == 0, (folder / "output.txt").read_text()[-2000:]
            made[method] = folder
        return made[method]

    return get


def kill_in_window(step: int, micro: int) -> Callable[[], None]:
    """Die when the loss of this micro-batch of this update has been computed."""

    def patch() -> None:
        from ftrecipes.method import Stack

        plain, seen = Stack.loss, {"step": -1, "micro": 0}

        def loss(self: Any, run: Any, batch: Any) -> Any:
            seen["micro"] = seen["micro"] + 1 if seen["step"] == run.step else 0
            seen["step"] = run.step
            value = plain(self, run, batch)
            if run.step == step and seen["micro"] >= micro:
                die()
            return value

        Stack.loss = loss  # type: ignore[method-assign]

    return patch


def kill_in_checkpoint(number: int) -> Callable[[], None]:
    """Die when the weights of this checkpoint are on disk and its state is not."""

    def patch() -> None:
        from ftrecipes import storage

        plain, count = storage.save_state, {"n": 0}

        def save_state(path: Path, state: dict[str, Any]) -> None:
            count["n"] += 1
            if count["n"] == number:
                path.write_bytes(b"half")
                die()
            plain(path, state)

        storage.save_state = save_state

    return patch


def kill_between_fits(number: int) -> Callable[[], None]:
    """Die right after a fit was recorded as finished, before what comes after it."""

    def patch() -> None:
        from ftrecipes.run import Run

        plain, count = Run.fit, {"n": 0}

        def fit(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = plain(self, *args, **kwargs)
            count["n"] += 1
            if count["n"] == number:
                die()
            return result

        Run.fit = fit  # type: ignore[method-assign]

    return patch


@pytest.mark.parametrize("method", METHODS)
def test_killed_twice_ends_the_same(method: str, reference: Callable[[str], Path], tmp_path: Path) -> None:
    whole = reference(method)
    r = random.Random(f"kill {method} {os.environ.get('FTR_KILL_SEED', 0)}")
    places = [kill_in_window(r.randrange(1, STEPS), r.randrange(3)), kill_in_checkpoint(r.randrange(1, 3))]
    r.shuffle(places)
    for place in places:
        code = ftr(*command(method), cwd=tmp_path, before=place)
        assert code in (-signal.SIGKILL, 0), (tmp_path / "output.txt").read_text()[-2000:]
    assert len(list(tmp_path.glob("outputs/*/*/run.json"))) == 1
    if json.loads(next(tmp_path.glob("outputs/*/*/run.json")).read_text())["status"] != "done":
        assert ftr(*command(method), cwd=tmp_path) == 0, (tmp_path / "output.txt").read_text()[-2000:]
    same(whole, tmp_path)


@pytest.mark.parametrize("number", [1, 2])
def test_killed_between_two_fits(number: int, reference: Callable[[str], Path], tmp_path: Path) -> None:
    whole = reference("periodic_lora")
    assert ftr(*command("periodic_lora"), cwd=tmp_path, before=kill_between_fits(number)) == -signal.SIGKILL
    assert ftr(*command("periodic_lora"), cwd=tmp_path) == 0
    same(whole, tmp_path)


@pytest.mark.parametrize("method", ["lora", "[dora,dft]", "[lift,gmt,wise_ft]"])
def test_killed_at_a_random_moment(method: str, reference: Callable[[str], Path], tmp_path: Path) -> None:
    whole = reference(method)
    r = random.Random(time.time_ns())
    for attempt in range(20):
        pid = fork(command(method), tmp_path)
        time.sleep(r.uniform(0.2, 2.0))
        os.kill(pid, signal.SIGKILL)
        if wait(pid) == 0:
            break
        infos = [json.loads(p.read_text()) for p in tmp_path.glob("outputs/*/*/run.json")]
        if attempt == 4 or (infos and infos[0]["status"] == "done"):
            break
    runs = list(tmp_path.glob("outputs/*/*/run.json"))
    if not runs or json.loads(runs[0].read_text())["status"] != "done":
        assert ftr(*command(method), cwd=tmp_path) == 0, (tmp_path / "output.txt").read_text()[-2000:]
    for empty in [p for p in tmp_path.glob("outputs/*/*") if not (p / "run.json").exists()]:
        assert not (empty / "tuned").exists()
        __import__("shutil").rmtree(empty)  # killed before it had begun to write
    same(whole, tmp_path)


def test_interrupt_leaves_a_record_that_goes_on(reference: Callable[[str], Path], tmp_path: Path) -> None:
    whole = reference("lora")

    def interrupt() -> None:
        from ftrecipes.run import Run

        plain = Run.after_update

        def after_update(self: Any) -> None:
            plain(self)
            if self.step == 5:
                os.kill(os.getpid(), signal.SIGINT)

        Run.after_update = after_update  # type: ignore[method-assign]

    assert ftr(*command("lora"), cwd=tmp_path, before=interrupt) == 130
    (run,) = tmp_path.glob("outputs/*/*")
    assert json.loads((run / "run.json").read_text())["status"] == "interrupted"
    assert "resume=auto" in (tmp_path / "output.txt").read_text()
    assert ftr("train", f"resume={run}", cwd=tmp_path) == 0, (tmp_path / "output.txt").read_text()[-2000:]
    same(whole, tmp_path)


def test_resume_refuses_other_settings_and_finished_runs(reference: Callable[[str], Path], tmp_path: Path) -> None:
    (run,) = reference("lora").glob("outputs/*/*")
    assert ftr("train", f"resume={run}", cwd=tmp_path) == 2
    assert "finished" in (tmp_path / "output.txt").read_text()
    assert ftr(*command("lora"), cwd=tmp_path, before=kill_in_window(6, 0)) == -signal.SIGKILL
    (cut,) = tmp_path.glob("outputs/*/*")
    assert ftr("train", f"resume={cut}", "optimizer.lr=0.5", cwd=tmp_path) == 2
    assert "optimizer.lr was" in (tmp_path / "output.txt").read_text()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    def poison() -> None:
        from ftrecipes.method import Stack

        plain = Stack.loss
        Stack.loss = lambda self, run, batch: plain(self, run, batch) * (float("nan") if run.step == 7 else 1)  # type: ignore[method-assign]

    assert ftr(*command("lora"), cwd=tmp_path, before=poison) == 1
    (run,) = tmp_path.glob("outputs/*/*")
    info = json.loads((run / "run.json").read_text())
    assert info["status"] == "failed" and "update 8" in info["reason"]
    assert not (run / "tuned").exists()
    assert ftr(*command("lora"), cwd=tmp_path) == 0  # the last good checkpoint was kept
    assert outcome(tmp_path)[2]["steps"] == STEPS
