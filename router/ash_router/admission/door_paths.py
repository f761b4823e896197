"""Paths of the doors to one sandbox, `/s/<sandbox>/…`: which door a request asks for, and what below it. Pure.

The path of a sandbox's MCP endpoint is matched after decoding and leads to one target, so its spelling does not
matter. Of a further door the rest of the path goes to the sandbox as it was sent. So it must be canonical: what two
readers could decode differently is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

__all__ = ["DoorKind", "DoorPath", "read_door_path"]


class DoorKind(StrEnum):
    """The doors to a sandbox, by the word behind its name in the path."""

    MCP = "mcp"
    FILES = "files"
    PORTS = "ports"
    TERMINAL = "terminal"


@dataclass(frozen=True, slots=True)
class DoorPath:
    """A path that leads to a door."""

    kind: DoorKind
    name: str
    """The sandbox: an id, a session name or an alias."""
    rest: bytes = b""
    """What follows the door's word, as sent: empty, or with a leading slash; without the query."""

    @property
    def port(self) -> int | None:
        """The port that it names, at the door to ports; None at others."""
        return int(self.rest.split(b"/", 2)[1]) if self.kind is DoorKind.PORTS else None


_NAME: Final = r"[A-Za-z0-9-]{1,128}"
_MCP: Final = re.compile(rf"/s/({_NAME})/mcp/?")
_PATHS: Final[Mapping[DoorKind, re.Pattern[bytes]]] = {
    kind: re.compile(rb"/s/(%b)/%b(%b)" % (_NAME.encode(), kind.value.encode(), rest))
    for kind, rest in (
        (DoorKind.FILES, rb"(?:/.*)?"),
        (DoorKind.PORTS, rb"/[1-9][0-9]{0,4}(?:/.*)?"),
        (DoorKind.TERMINAL, rb""),
    )
}
_FURTHER: Final = re.compile(rf"/s/[^/]*/({'|'.join(_PATHS)})(?:/.*)?", re.DOTALL)
"""Any decoded path that is meant for such a door."""

_SEGMENT: Final = re.compile(rb"(?:[A-Za-z0-9._~!$&'()*+,;=:@-]|%[0-9A-Fa-f]{2})*")
_BETTER_PLAIN: Final = re.compile(rb"%(?:3[0-9]|[46][1-9A-Fa-f]|[57][0-9Aa]|2[DdEe]|5[Ff]|7[Ee])")
"""Escapes of characters that need none: with them one name would have many spellings, of which some hide dots."""
_NEVER: Final = re.compile(rb"%(?:00|2[Ff])")
"""NUL and the slash, which no name holds."""


def read_door_path(raw_path: bytes, path: str) -> DoorPath | str | None:
    """Return the door that a request's path leads to, why there is none though one is meant, or None.

    Args:
        raw_path: As sent, without the query.
        path: The same, percent-decoded once.
    """
    mcp = _MCP.fullmatch(path)
    if mcp is not None:
        return DoorPath(DoorKind.MCP, mcp[1])
    meant = _FURTHER.fullmatch(path)
    if meant is None:
        return None
    kind = DoorKind(meant[1])
    found = _PATHS[kind].fullmatch(raw_path)
    if found is None:
        return f"write the path to a sandbox's {kind} as in the docs, with nothing percent-encoded up to there"
    return _rest_problem(found[2]) or DoorPath(kind, found[1].decode("ascii"), found[2])


def _rest_problem(rest: bytes) -> str | None:
    """Return why the rest of a path is not canonical, or None."""
    segments = rest.split(b"/")[1:]
    if b"" in segments[:-1] or b"." in segments or b".." in segments:
        return "the path holds an empty segment, '.' or '..'; leave them out"
    if any(_SEGMENT.fullmatch(segment) is None for segment in segments):
        return "the path holds a character that must be percent-encoded"
    if _BETTER_PLAIN.search(rest) is not None or _NEVER.search(rest) is not None:
        return "the path has letters, digits, '-._~' or slashes percent-encoded, or a NUL; encode each name by itself"
    return None
