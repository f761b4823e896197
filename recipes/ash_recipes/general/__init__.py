"""The recipe `general`: a terminal, files, web pages and web search."""

from __future__ import annotations

from typing import Any, Final

from ash_recipes.general.hints import HINTS

__all__ = ["RECIPE"]

RECIPE: Final[dict[str, Any]] = {
    "name": "general",
    "title": "General purpose",
    "description": (
        "A Linux sandbox of its own with a terminal (commands, background jobs, a working directory and variables "
        "that last), files to read and edit, and, where it has network, web pages and web search. The right choice "
        "for running code, shell commands and tests."
    ),
    "server": {"python": "ash_recipes.general.server:build"},
    "network": "internet",
    "env": {"LANG": "C.UTF-8", "PYTHONUNBUFFERED": "1"},
    "start_timeout_seconds": 60,
    "tools": HINTS,
}
