"""The answer of one of the hive's own tools: structured content, and the same as text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Answer"]


@dataclass(frozen=True, slots=True)
class Answer:
    """A tool's answer: its JSON, the same as text, and whether it changed the caller's tool list."""

    structured: dict[str, Any]
    text: str
    lists_changed: bool = False
