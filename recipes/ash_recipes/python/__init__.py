"""The recipe `python`: one interpreter whose variables last, and that shows text, tables and pictures.

server.py       the tools
session.py      the interpreter's process: started, asked, interrupted, ended
interpreter.py  what runs in it; the standard library alone
"""

from __future__ import annotations

from typing import Any, Final

__all__ = ["RECIPE"]

RECIPE: Final[dict[str, Any]] = {
    "name": "python",
    "title": "Python",
    "description": (
        "A Python interpreter in a Linux sandbox of its own. Variables, imports and files last from one call to the "
        "next; the value of the last line is shown, tables as text and matplotlib's figures as pictures. Packages "
        "can be installed from PyPI. The right choice for calculations, data and plots."
    ),
    "server": {"python": "ash_recipes.python.server:build"},
    "network": ["pypi.org", "files.pythonhosted.org"],
    "env": {"LANG": "C.UTF-8", "MPLBACKEND": "Agg", "PYTHONUNBUFFERED": "1"},
    "tools": {
        "run": {"readOnlyHint": False, "destructiveHint": True, "idempotentHint": False, "openWorldHint": True},
        "install": {"readOnlyHint": False, "destructiveHint": False, "idempotentHint": True, "openWorldHint": True},
        "restart": {"readOnlyHint": False, "destructiveHint": True, "idempotentHint": True, "openWorldHint": False},
    },
}
