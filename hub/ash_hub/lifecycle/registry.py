"""The sandboxes of this hive, found by id or by the name that a caller uses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice

from ash_hub.lifecycle.sandbox import Sandbox
from ash_mcp.errors import SandboxNotFound
from ash_mcp.types import Principal, SandboxId, Scope
from ash_router.routes import resolve_name, visible

__all__ = ["Registry"]


class Registry:
    """Sandboxes by id and by name, the ended ones too until they are swept."""

    def __init__(self) -> None:
        self._by_id: dict[SandboxId, Sandbox] = {}
        self._by_alias: dict[str, Sandbox] = {}
        self._by_name: dict[tuple[str, Scope, str], Sandbox] = {}
        self._ended: dict[SandboxId, Sandbox] = {}
        """The first to end first."""

    def add(self, sandbox: Sandbox) -> None:
        self._by_id[sandbox.id] = sandbox
        if sandbox.alias is not None:
            self._by_alias[sandbox.alias] = sandbox
        key = (sandbox.owner, sandbox.scope, sandbox.session)
        named = self._by_name.get(key)
        if named is None or named.state.ended or not sandbox.state.ended:  # a name is the living one's
            self._by_name[key] = sandbox
        if sandbox.state.ended:
            self.note_ended(sandbox)

    def note_ended(self, sandbox: Sandbox) -> None:
        """Take note that a sandbox has ended after all that ended before."""
        self._ended.setdefault(sandbox.id, sandbox)

    def surplus(self, most: int) -> list[Sandbox]:
        """Return the ended ones beyond a number, the first to end first."""
        return list(islice(self._ended.values(), max(0, len(self._ended) - most)))

    def remove(self, sandbox: Sandbox) -> None:
        self._by_id.pop(sandbox.id, None)
        self._ended.pop(sandbox.id, None)
        if sandbox.alias is not None:
            self._by_alias.pop(sandbox.alias, None)
        key = (sandbox.owner, sandbox.scope, sandbox.session)
        if self._by_name.get(key) is sandbox:
            del self._by_name[key]

    def by_id(self, sandbox_id: SandboxId) -> Sandbox | None:
        return self._by_id.get(sandbox_id)

    def named(self, name: str) -> Sandbox | None:
        """Return the sandbox with that id or alias, whosever it is."""
        return self._by_id.get(SandboxId(name)) or self._by_alias.get(name)

    def all(self) -> list[Sandbox]:
        return list(self._by_id.values())

    def living(self) -> list[Sandbox]:
        return [sandbox for sandbox in self._by_id.values() if not sandbox.state.ended]

    def of(
        self, principal: Principal, scope: Scope, *, ended: bool = False, labels: Mapping[str, str] | None = None
    ) -> list[Sandbox]:
        """Return what a caller sees, oldest first."""
        wanted = (labels or {}).items()
        return [
            sandbox
            for sandbox in self._by_id.values()
            if visible(principal, scope, sandbox.id, sandbox.owner, sandbox.scope)
            and (ended or not sandbox.state.ended)
            and all(sandbox.labels.get(key) == value for key, value in wanted)
        ]

    def find(self, principal: Principal, scope: Scope, name: str) -> Sandbox:
        """Return the sandbox, living or ended, that a caller means by a session name, an id or an alias.

        Raises:
            SandboxNotFound: None that the caller may know of, or several; the message lists those that there are.
        """
        known = self._by_id.values()
        by_name, by_id = self._by_name, self._by_id
        means = resolve_name(
            principal, scope, name, by_name=by_name, by_id=by_id, named=self.named, owned_by=lambda _: known
        )
        found = [sandbox for sandbox in means if not sandbox.state.ended] or means
        if not found:
            raise SandboxNotFound(_unknown(name, self.of(principal, scope)), session=name)
        if len(found) > 1:
            ids = ", ".join(sandbox.id for sandbox in found)
            raise SandboxNotFound(f"several scopes have a sandbox {name!r}; use its id: {ids}", session=name)
        return found[0]


def _unknown(name: str, known: Iterable[Sandbox]) -> str:
    sessions = [sandbox.session for sandbox in known]
    if not sessions:
        return f"you have no sandbox {name!r}, and no other; call spawn to get one"
    shown = ", ".join(sessions[:20]) + (", …" if len(sessions) > 20 else "")
    return f"you have no sandbox {name!r}; you have: {shown}"
