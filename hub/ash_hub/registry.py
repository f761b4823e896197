"""Which sandboxes this hive has, and which of them a caller means by a name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ash_hub.sandbox import Sandbox
from ash_mcp.errors import SandboxNotFound
from ash_mcp.types import DEFAULT_SCOPE, EVERY_SCOPE, Principal, SandboxId, Scope
from ash_router.routes import visible

__all__ = ["Registry"]


class Registry:
    """Sandboxes by id and by name, the ended ones too until they are swept."""

    def __init__(self) -> None:
        self._by_id: dict[SandboxId, Sandbox] = {}
        self._by_name: dict[tuple[str, Scope, str], Sandbox] = {}

    def add(self, sandbox: Sandbox) -> None:
        self._by_id[sandbox.id] = sandbox
        key = (sandbox.owner, sandbox.scope, sandbox.session)
        named = self._by_name.get(key)
        if named is None or named.life.state.ended or not sandbox.life.state.ended:  # a name is the living one's
            self._by_name[key] = sandbox

    def remove(self, sandbox: Sandbox) -> None:
        self._by_id.pop(sandbox.id, None)
        key = (sandbox.owner, sandbox.scope, sandbox.session)
        if self._by_name.get(key) is sandbox:
            del self._by_name[key]

    def by_id(self, sandbox_id: SandboxId) -> Sandbox | None:
        return self._by_id.get(sandbox_id)

    def all(self) -> list[Sandbox]:
        return list(self._by_id.values())

    def living(self) -> list[Sandbox]:
        return [sandbox for sandbox in self._by_id.values() if not sandbox.life.state.ended]

    def of(
        self, principal: Principal, scope: Scope, *, ended: bool = False, labels: Mapping[str, str] | None = None
    ) -> list[Sandbox]:
        """Return what a caller sees, oldest first."""
        wanted = (labels or {}).items()
        return [
            sandbox
            for sandbox in self._by_id.values()
            if visible(principal, scope, sandbox.owner, sandbox.scope)
            and (ended or not sandbox.life.state.ended)
            and all(sandbox.labels.get(key) == value for key, value in wanted)
        ]

    def find(self, principal: Principal, scope: Scope, name: str) -> Sandbox:
        """Return the sandbox, living or ended, that a caller means by a session name or an id.

        Raises:
            SandboxNotFound: None that the caller may know of; the message lists those that there are.
        """
        found = self._by_id.get(SandboxId(name))
        if found is None and scope != EVERY_SCOPE:
            found = self._by_name.get((principal.subject, scope, name))
        elif found is None:
            found = self._across_scopes(principal, name)
        if found is not None and visible(principal, scope, found.owner, found.scope):
            return found
        raise SandboxNotFound(_unknown(name, self.of(principal, scope)), session=name)

    def _across_scopes(self, principal: Principal, name: str) -> Sandbox | None:
        default = self._by_name.get((principal.subject, DEFAULT_SCOPE, name))
        if default is not None:
            return default
        named = [s for s in self.of(principal, EVERY_SCOPE, ended=True) if s.session == name]
        living = [s for s in named if not s.life.state.ended] or named
        if len(living) > 1:
            raise SandboxNotFound(
                f"several scopes have a sandbox {name!r}; use its id: {', '.join(s.id for s in living)}", session=name
            )
        return living[0] if living else None


def _unknown(name: str, known: Iterable[Sandbox]) -> str:
    sessions = [sandbox.session for sandbox in known]
    if not sessions:
        return f"you have no sandbox {name!r}, and no other; call spawn to get one"
    shown = ", ".join(sessions[:20]) + (", …" if len(sessions) > 20 else "")
    return f"you have no sandbox {name!r}; you have: {shown}"
