"""What has to be taken back when a sandbox ends, whoever ended it. Every step may be taken twice."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from ash_hub.endings import Endings
from ash_hub.sandbox import Sandbox
from ash_mcp.types import SandboxId, Scope
from ash_router.ledger import Ledger
from ash_router.routes import Routes
from ash_router.store.base import Store
from ash_router.tokens import CallTokens

__all__ = ["Closing"]


class Closing:
    """Takes a sandbox's route, calls and names back.

    Args:
        on_changed: Told whose tools changed: owner and scope.
        on_gone: Told that a sandbox has no route any more, so that connections to it can be dropped.
    """

    def __init__(
        self,
        store: Store,
        routes: Routes,
        ledger: Ledger,
        tokens: CallTokens,
        endings: Endings,
        on_changed: Callable[[str, Scope], Awaitable[None]],
        on_gone: Callable[[SandboxId], None],
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._routes = routes
        self._ledger = ledger
        self._tokens = tokens
        self._endings = endings
        self._on_changed = on_changed
        self._on_gone = on_gone
        self._clock = clock

    async def withdraw(self, sandbox: Sandbox, *, tell: bool = True) -> None:
        """Take a sandbox's tools away from callers and end the calls in flight with its reason.

        Args:
            tell: Whether to announce it; another replica may have.
        """
        await self._routes.unbind(sandbox.id)
        self._ledger.abort(sandbox.id, sandbox.gone(self._clock()))
        self._on_gone(sandbox.id)
        self._tokens.forget(sandbox.id)
        if tell:
            await self._on_changed(sandbox.owner, sandbox.scope)

    async def let_go(self, sandbox: Sandbox) -> None:
        """Give back the names that a sandbox held, and keep why it ended."""
        self._endings.keep(sandbox, self._clock())
        await self._store.release_session(sandbox.owner, sandbox.scope, sandbox.session, sandbox.id)
        if sandbox.life.ready_at is None:  # a spawn that failed may be tried again with its key
            await self.release_key(sandbox)
        self._ledger.forget(sandbox.id)

    async def release_key(self, sandbox: Sandbox) -> None:
        if sandbox.key is not None:
            await self._store.release_key(sandbox.owner, sandbox.scope, sandbox.key, sandbox.id)
