"""The user's own data (placeholder until the next commit)."""

from __future__ import annotations

from typing import Any


def check(knobs: Any) -> None:
    """Nothing yet."""
