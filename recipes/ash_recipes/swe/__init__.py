"""The recipe `swe`: a terminal and files as in `general`, a search, and patches, for work on source code.

server.py   the tools
patches.py  patches as data: read, and applied to texts; no I/O
"""

from __future__ import annotations

from typing import Any, Final

from ash_recipes.general.hints import HINTS

__all__ = ["RECIPE"]

_SHARED = {name: hints for name, hints in HINTS.items() if name.startswith("terminal-controller_")}

RECIPE: Final[dict[str, Any]] = {
    "name": "swe",
    "title": "Software engineering",
    "description": (
        "A Linux sandbox for work on source code: a terminal (commands, background jobs, a working directory that "
        "lasts), files, a search through a source tree, and patches that change several files at once or none. "
        "Package managers work, and Git and a compiler are there where the system or the image has them."
    ),
    "server": {"python": "ash_recipes.swe.server:build"},
    "network": "internet",
    "env": {"LANG": "C.UTF-8", "PYTHONUNBUFFERED": "1", "GIT_TERMINAL_PROMPT": "0"},
    "tools": {
        **_SHARED,
        "apply_patch": {
            "readOnlyHint": False,
            "destructiveHint": True,
            "idempotentHint": False,
            "openWorldHint": False,
        },
        "search": {"readOnlyHint": True, "destructiveHint": False, "idempotentHint": True, "openWorldHint": False},
    },
}
