"""The two ways a command ends badly, and the helper that finds the nearest right name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FtrError(Exception):
    """Base of all errors that are shown as one line, without a traceback."""

    exit_code = 1


class UserError(FtrError):
    """Something handed in is wrong and was found before the run started (exit code 2)."""

    exit_code = 2


class RunFailed(FtrError):
    """The run started and cannot go on, for instance a loss that became NaN (exit code 1)."""

    exit_code = 1


class Interrupted(FtrError):
    """The user or the scheduler asked the run to stop; its record can be resumed (exit code 130)."""

    exit_code = 130


def nearest(word: str, names: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or the short list of names when none is close, or ''."""
    names = sorted(set(map(str, names)))
    close = difflib.get_close_matches(str(word), names, n=1, cutoff=0.6)
    if not close and "." in str(word):
        close = difflib.get_close_matches(str(word).rpartition(".")[2], names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; choose from {', '.join(names)}" if 0 < len(names) <= 12 else ""
