"""Pinned toolsets on disk, so that a hub that takes sandboxes over need not ask them again."""

from __future__ import annotations

import json
from pathlib import Path

from ash_hub.answers import tool_shape
from ash_hub.files import replace_text
from ash_hub.tools import PinnedTool, Toolset
from ash_mcp.errors import StartFailed

__all__ = ["ToolsetShelf"]


class ToolsetShelf:
    """Toolsets by digest: in memory while used, each written once to a file of its own."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._known: dict[str, Toolset] = {}

    def put(self, toolset: Toolset) -> Toolset:
        """Keep a toolset and return the one instance of its digest.

        Raises:
            StartFailed: It cannot be written: a hub that took over could not serve its sandboxes.
        """
        known = self._known.setdefault(toolset.digest, toolset)
        file = self._file(toolset.digest)
        if not file.exists():
            body = {"tools": [tool_shape(tool) for tool in toolset.tools], "notes": list(toolset.notes)}
            try:
                self._directory.mkdir(parents=True, exist_ok=True)
                replace_text(file, json.dumps(body))
            except OSError as error:
                raise StartFailed(
                    f"its tools cannot be kept in {self._directory}: {error.strerror}", step="tools"
                ) from error
        return known

    def get(self, digest: str) -> Toolset | None:
        """Return a kept toolset, or None if there is none or its file cannot be read."""
        known = self._known.get(digest)
        if known is None:
            try:
                body = json.loads(self._file(digest).read_text(encoding="utf-8"))
                tools = tuple(PinnedTool(**tool) for tool in body["tools"])
            except (OSError, ValueError, KeyError, TypeError):
                return None
            known = self._known[digest] = Toolset(digest, tools, tuple(body.get("notes", ())))
        return known

    def _file(self, digest: str) -> Path:
        return self._directory / f"{digest}.json"
