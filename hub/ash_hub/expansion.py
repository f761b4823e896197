"""Which sandboxes' tools a `tools/list` shows beside the hive's own. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ash_hub.sandbox import Sandbox
from ash_mcp.types import SandboxId, State

__all__ = ["expand"]


def expand(
    sandboxes: Iterable[Sandbox],
    last_call_at: Callable[[SandboxId], float | None],
    *,
    name_limit: int,
    most: int,
) -> list[dict[str, Any]]:
    """Return the tools of ready sandboxes under their session names, oldest sandbox first.

    When they are more than `most`, whole sandboxes are left out, least recently called first; the newest is always
    shown. Where two scopes have a session of the same name, the first keeps it and the other is left out.
    """
    ready: dict[str, Sandbox] = {}
    for sandbox in sandboxes:
        if sandbox.life.state is State.READY and sandbox.toolset is not None:
            ready.setdefault(sandbox.session, sandbox)
    shown: set[SandboxId] = set()
    room = most
    for sandbox in sorted(ready.values(), key=lambda s: _rank(s, last_call_at(s.id)), reverse=True):
        count = len(sandbox.toolset.tools) if sandbox.toolset is not None else 0
        if shown and count > room:
            break
        shown.add(sandbox.id)
        room -= count
    return [
        tool
        for sandbox in ready.values()
        if sandbox.id in shown and sandbox.toolset is not None
        for tool in sandbox.toolset.listing(sandbox.session, name_limit).under(sandbox.session)
    ]


def _rank(sandbox: Sandbox, last_call_at: float | None) -> float:
    return max(sandbox.life.ready_at or 0.0, last_call_at or 0.0)
