"""The recipe `echo`: the smallest there is, to copy from."""

from __future__ import annotations

from typing import Any, Final

__all__ = ["RECIPE"]

RECIPE: Final[dict[str, Any]] = {
    "name": "echo",
    "title": "Echo",
    "description": "A tiny sandbox that says back what it is told. For trying out the hive and as a pattern to copy.",
    "server": {"python": "ash_recipes.echo.server:server"},
    "network": "none",
    "tools": {name: {"readOnlyHint": True, "openWorldHint": False} for name in ("echo", "whoami", "slow")},
}
