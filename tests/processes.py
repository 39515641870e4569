"""Real processes without the cost of imports: a forked child that runs `ftr` and can be killed."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

import ftrecipes.finetuner
import ftrecipes.run  # noqa: F401  (imported before forking)


def fork(words: list[str], cwd: Path, before: Callable[[], None] | None = None) -> int:
    """Start `ftr <words>` in a folder and return the child's pid; `before` runs in the child first."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    try:
        os.chdir(cwd)
        with (cwd / "output.txt").open("ab") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")  # not those of a test's capture
        torch.set_num_threads(1)
        if before:
            before()
        sys.argv = ["ftr", *words]
        from ftrecipes.cli import main

        main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 70
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def wait(pid: int, seconds: float = 240) -> int:
    """The child's exit code; minus the signal when one killed it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise TimeoutError("the child did not end")


def ftr(*words: str, cwd: Path, before: Callable[[], None] | None = None) -> int:
    """Run `ftr <words>` to its end."""
    return wait(fork(list(words), cwd, before))


def die() -> None:
    """What a power cut does."""
    os.kill(os.getpid(), signal.SIGKILL)
