"""Pages of `tools/list` as bytes: each toolset is encoded once, cached, and joined into pages.

The cache holds a toolset with a placeholder for the session's name, so that all sandboxes of one recipe share it. The
SDK shapes each tool for its protocol version before it is encoded.
"""

from __future__ import annotations

import json
import logging
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from mcp_types import methods
from pydantic import BaseModel, ValidationError

from ash_hub.face.expansion import START, Cursor, cut_page
from ash_hub.lifecycle.sandbox import Sandbox
from ash_hub.spawning.toolsets import Listing, Toolset

__all__ = ["Listings", "Page"]

log = logging.getLogger("ash.hub")

METHOD: Final = "tools/list"
PAGE_BYTES: Final = 960 * 1024
"""The most bytes of tools in one answer: clients refuse events over 1 MiB. Tools are not counted, and a list that fits
is one page, because some clients show the first page only."""
MAX_KEPT_BYTES: Final = 64 * 1024 * 1024

# The placeholder for the session's name. It cannot occur in JSON, which escapes this byte.
_OPEN: Final = b"\0"
_NO_SESSION: Final = 0
"""In place of `Listing.room`: the tools have their own names."""
_ENVELOPE: Final = {"resultType": "complete", "ttlMs": 0, "cacheScope": "private"}

Written = tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Page:
    """The tools of one answer."""

    tools: bytes
    """The JSON array's content, without its brackets."""
    next_cursor: str | None


class Listings:
    """Makes pages, with an LRU cache of encoded toolsets that is bounded in bytes.

    Args:
        own: The hive's own tools, listed first.
    """

    def __init__(
        self,
        own: Sequence[Mapping[str, Any]],
        *,
        name_limit: int,
        page_bytes: int = PAGE_BYTES,
        max_kept_bytes: int = MAX_KEPT_BYTES,
    ) -> None:
        self._own = own
        self._own_written: dict[object, Written] = {}
        self._name_limit = name_limit
        self._page_bytes = page_bytes
        self._max_kept = max_kept_bytes
        self._kept: OrderedDict[tuple[str, int, object], Written] = OrderedDict()
        self.kept_bytes = 0

    def page(
        self,
        version: str,
        sandboxes: Iterable[Sandbox],
        cursor: str | None,
        notes: Mapping[str, str] = MappingProxyType({}),
    ) -> Page:
        """Return a page of the hive's tools and those of `sandboxes`, as a client of protocol `version` reads it.

        Args:
            notes: What to add to the descriptions of the hive's own tools, by their names.

        Raises:
            ConfigError: The cursor is not valid.
        """
        begin = START if cursor is None else Cursor.parse(cursor)
        own = self._own_tools(version, notes) if cursor is None else ()
        room = self._page_bytes - sum(len(tool) + 1 for tool in own)
        tools, following = cut_page(sandboxes, lambda sandbox: self._tools_of(sandbox, version), begin, room)
        return Page(b",".join((*own, *tools)), str(following) if following is not None else None)

    def guest_page(self, version: str, sandbox: Sandbox, names: Collection[str], cursor: str | None) -> Page:
        """Return a page of a sandbox's pinned tools of these names, under the sandbox's own names.

        Raises:
            ConfigError: The cursor is not valid.
        """
        begin = START if cursor is None else Cursor.parse(cursor)

        def tools_of(sandbox: Sandbox) -> Sequence[bytes]:
            assert sandbox.toolset is not None
            written = self._under_own_names(sandbox.toolset, version)
            chosen = zip(sandbox.toolset.tools, written, strict=True)
            return [text for tool, text in chosen if text and tool.name in names]

        tools, following = cut_page([sandbox], tools_of, begin, self._page_bytes)
        return Page(b",".join(tools), str(following) if following is not None else None)

    def _under_own_names(self, toolset: Toolset, version: str) -> Written:
        """Return each tool of a toolset in its order, encoded; empty for one that cannot be listed in that version."""
        key = (toolset.digest, _NO_SESSION, _shape(version))
        written = self._kept.get(key)
        if written is not None:
            self._kept.move_to_end(key)
            return written
        return self._keep(key, tuple(_try_to_write(tool.to_json(), version) for tool in toolset.tools))

    def _own_tools(self, version: str, notes: Mapping[str, str]) -> Written:
        shape = _shape(version)
        if shape not in self._own_written:
            self._own_written[shape] = tuple(_write(tool, version) for tool in self._own)
        written = self._own_written[shape]
        if not any(notes.values()):
            return written
        return tuple(
            _write({**tool, "description": tool["description"] + notes[tool["name"]]}, version)
            if tool["name"] in notes
            else known
            for tool, known in zip(self._own, written, strict=True)
        )

    def _tools_of(self, sandbox: Sandbox, version: str) -> Sequence[bytes]:
        toolset = sandbox.toolset
        assert toolset is not None
        listing = toolset.listing(sandbox.session, self._name_limit)
        key = (toolset.digest, listing.room, _shape(version))
        written = self._kept.get(key)
        if written is None:
            written = self._keep(key, _templates(listing, version))
        else:
            self._kept.move_to_end(key)
        session = sandbox.session.encode()
        return [tool.replace(_OPEN, session, 1) for tool in written]

    def _keep(self, key: tuple[str, int, object], written: Written) -> Written:
        self._kept[key] = written
        self.kept_bytes += _size(written)
        while self.kept_bytes > self._max_kept:
            _, dropped = self._kept.popitem(last=False)
            self.kept_bytes -= _size(dropped)
        return written


def _shape(version: str) -> type[BaseModel] | object:
    """Return the SDK's result model of a protocol version: versions with the same model share encoded tools."""
    return methods.SERVER_RESULTS[METHOD, version]


def _templates(listing: Listing, version: str) -> Written:
    written: list[bytes] = []
    for name, tool in listing.tools:
        fields = _try_to_write(tool.to_json(f"_{name}"), version)
        if fields:
            written.append(fields.replace(b'{"name":"_', b'{"name":"' + _OPEN + b"_", 1))
    return tuple(written)


def _try_to_write(tool: Mapping[str, Any], version: str) -> bytes:
    """Return a sandbox's tool encoded; empty where the SDK would refuse a whole list because of it."""
    try:
        return _write(tool, version)
    except (ValidationError, ValueError):
        log.warning("a tool cannot be listed in protocol %s", version, extra={"tool": tool["name"]})
        return b""


def _write(tool: Mapping[str, Any], version: str) -> bytes:
    (shaped,) = methods.serialize_server_result(METHOD, version, {"tools": [tool], **_ENVELOPE})["tools"]
    ordered = {"name": shaped.pop("name"), **shaped}
    # ASCII, so that no line separator of Unicode can end a line of an event stream early
    return json.dumps(ordered, separators=(",", ":"), allow_nan=False).encode("ascii")


def _size(written: Written) -> int:
    return sum(map(len, written))
