"""A check of `ash doctor`: one thing that a backend looked at. Pure."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Check"]


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    name: str
    ok: bool
    detail: str
    fix: str | None = None
    """What to do about it; None where nothing is to be done."""
    required: bool = False
    """Whether no sandbox can be made, or isolated, without it."""
