"""Selects the sandboxes whose tools a `tools/list` shows, and cuts the list into pages. Pure.

A cursor names the tool and sandbox at which its page begins, and the server keeps nothing for it. So it is good on
every replica, and sandboxes that appear or end between two pages neither repeat nor hide the tools of others.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ash_hub.lifecycle.sandbox import Sandbox
from ash_mcp.errors import ConfigError
from ash_mcp.types import SandboxId, State

__all__ = ["START", "Cursor", "cut_page", "listed_sandboxes"]

MAX_CURSOR_CHARS = 256


@dataclass(frozen=True, slots=True, order=True)
class Cursor:
    """A position in the list of sandboxes' tools, which is ordered by `created_at` and `sandbox_id`."""

    created_at: float
    sandbox_id: str
    index: int
    """The index of that sandbox's first tool that is not listed yet."""

    def __str__(self) -> str:
        body = json.dumps([self.created_at, self.sandbox_id, self.index], separators=(",", ":"))
        return base64.urlsafe_b64encode(body.encode()).decode()

    @classmethod
    def parse(cls, text: str) -> Cursor:
        """Read what `str` of a cursor wrote.

        Raises:
            ConfigError: `text` is not such a cursor.
        """
        try:
            if len(text) > MAX_CURSOR_CHARS:
                raise ValueError
            body: Any = json.loads(base64.b64decode(text.encode("ascii"), altchars=b"-_", validate=True))
            created_at, sandbox_id, index = body
            if not (isinstance(created_at, float) and isinstance(sandbox_id, str) and type(index) is int):
                raise ValueError
            if not math.isfinite(created_at) or index < 0:
                raise ValueError
        except (ValueError, TypeError, RecursionError, binascii.Error) as exc:
            raise ConfigError(
                "the cursor is none of this hive's; send a nextCursor as it came, or list again without one"
            ) from exc
        return cls(created_at, sandbox_id, index)


START = Cursor(-math.inf, "", 0)


def listed_sandboxes(
    sandboxes: Iterable[Sandbox], last_call_at: Callable[[SandboxId], float | None], *, most: int | None
) -> list[Sandbox]:
    """Return the ready sandboxes whose tools are listed, oldest first.

    When their tools are more than `most`, whole sandboxes are left out, least recently called first; the newest is
    always shown. Where two scopes have a session of the same name, the older keeps it and the other is left out.
    """
    ready: dict[str, Sandbox] = {}
    for sandbox in sorted(sandboxes, key=_place):
        if sandbox.state is State.READY and sandbox.toolset is not None:
            ready.setdefault(sandbox.session, sandbox)
    if most is None:
        return list(ready.values())
    shown: set[SandboxId] = set()
    room = most
    for sandbox in sorted(ready.values(), key=lambda s: _rank(s, last_call_at(s.id)), reverse=True):
        count = len(sandbox.toolset.tools) if sandbox.toolset is not None else 0
        if shown and count > room:
            break
        shown.add(sandbox.id)
        room -= count
    return [sandbox for sandbox in ready.values() if sandbox.id in shown]


def cut_page(
    sandboxes: Iterable[Sandbox], tools_of: Callable[[Sandbox], Sequence[bytes]], cursor: Cursor, room: int
) -> tuple[list[bytes], Cursor | None]:
    """Return the tools of one page, and the cursor of the next if there is one.

    Args:
        tools_of: Each tool of a sandbox as it is written.
        cursor: Where the page begins.
        room: Bytes for the page, a comma between two tools included; its first tool is shown even without room.
    """
    page: list[bytes] = []
    for sandbox in sandboxes:
        place = _place(sandbox)
        if place < (cursor.created_at, cursor.sandbox_id):
            continue
        first = cursor.index if place == (cursor.created_at, cursor.sandbox_id) else 0
        for index, tool in enumerate(tools_of(sandbox)[first:], first):
            room -= len(tool) + 1
            if room < 0 and page:
                return page, Cursor(*place, index)
            page.append(tool)
    return page, None


def _place(sandbox: Sandbox) -> tuple[float, str]:
    return sandbox.record.created_at, sandbox.id


def _rank(sandbox: Sandbox, last_call_at: float | None) -> float:
    return max(sandbox.record.ready_at or 0.0, last_call_at or 0.0)
