"""The answers of a hive that has no sandbox, known without a hive: `hive_face.json`, read from one.

`python -m tests.hive_face` writes that file anew; a test compares it with a hive of today.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from ash_mcp.bridge.frames import BadFrame, Frame
from ash_mcp.wire import MODERN_VERSION

__all__ = ["FACE_FILE", "HiveFace"]

FACE_FILE: Final = Path(__file__).with_name("hive_face.json")

_INVALID_PARAMS: Final = -32602
_GREETINGS: Final = frozenset({"initialize", "server/discover", "ping"})

Results = Mapping[str, Mapping[str, Any]]
"""By method."""


@dataclass(frozen=True, slots=True)
class HiveFace:
    """The results of a hive that has just started."""

    handshake_versions: tuple[str, ...]
    """Oldest first."""
    handshake: Results
    stateless: Results

    @classmethod
    def load(cls) -> Self:
        """Read the file; takes a millisecond."""
        shape = json.loads(FACE_FILE.read_bytes())
        return cls(tuple(shape["handshake_versions"]), shape["handshake"], shape["stateless"])

    def greeting(self, frame: Frame) -> Mapping[str, Any] | None:
        """Return what answers `frame` in any hive, whatever runs there, or None.

        Raises:
            BadFrame: It is an `initialize` that names no version.
        """
        result = self._results(frame).get(frame.method or "") if frame.method in _GREETINGS else None
        if result is None or frame.method != "initialize":
            return result
        asked = frame.params.get("protocolVersion")
        if not isinstance(asked, str):
            raise BadFrame(_INVALID_PARAMS, "initialize must name a protocolVersion", frame.id)
        agreed = asked if asked in self.handshake_versions else self.handshake_versions[-1]
        return {**result, "protocolVersion": agreed}

    def listing(self, frame: Frame) -> Mapping[str, Any] | None:
        """Return the first page of the list that `frame` asks for, as it is without sandboxes, or None."""
        if frame.method in _GREETINGS or "cursor" in frame.params:
            return None
        return self._results(frame).get(frame.method or "")

    def _results(self, frame: Frame) -> Results:
        if frame.version is None:
            return self.handshake
        return self.stateless if frame.version == MODERN_VERSION else {}
