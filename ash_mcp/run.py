"""A run: what owns the sandboxes that are spawned in it, as long as this process renews its lease."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

import anyio

from ash_mcp._connection import Connection
from ash_mcp._hive_answers import structured
from ash_mcp.errors import AshError, LocalProtocolError, RunEnded, RunNotFound
from ash_mcp.types import RunInfo
from ash_mcp.wire import run_from_json

if TYPE_CHECKING:
    from concurrent.futures import Future

    from ash_mcp._blocking import LoopThread
    from ash_mcp._many import SpawnedMany
    from ash_mcp.client import Hive, Spawning
    from ash_mcp.sandbox import Sandbox
    from ash_mcp.types import SandboxInfo

__all__ = ["Run"]

_RENEWALS: Final = 3.0
"""Renewals within one lease, so that one that fails is made up for."""
_CLEANUP_SECONDS: Final = 30.0


class Run:
    """A run of one hive; `Hive.run` makes it. As a context manager it is open inside, and ended at the end.

    Its lease is renewed by a thread of its own, over a connection of its own: neither code that blocks the caller's
    event loop nor a pool that is busy keeps it from that.
    """

    def __init__(
        self, hive: Hive, connection: Connection, name: str, *, lease_seconds: float = 60.0, join: bool = False
    ) -> None:
        self._hive = hive
        self._connection = connection
        self._join = join
        self._name = name
        self._lease_seconds = lease_seconds
        self._info: RunInfo | None = None
        self._ended: RunEnded | None = None
        self._renewer: LoopThread | None = None
        self._renewing: Future[None] | None = None
        self._process = os.getpid()

    @property
    def name(self) -> str:
        return self._name

    @property
    def info(self) -> RunInfo:
        """What the hive said of it when it was opened; a `LocalProtocolError` before."""
        if self._info is None:
            raise LocalProtocolError(f"the run {self._name} is not open; enter it first")
        return self._info

    @property
    def ended(self) -> RunEnded | None:
        """Why it ended although this process held it; None while that is not known."""
        return self._ended

    async def open(self) -> RunInfo:
        """Open the run, or join it, and renew its lease from now on, until `end`. Idempotent.

        Raises:
            RunTaken: A run of that name is open; the message says for how long.
            RunNotFound: With `join`, there is none of that name.
            CapacityExceeded: There are as many open runs as may be.
        """
        if self._info is None:
            asked: dict[str, Any] = {"run": self._name}
            if self._join:
                asked["renew"] = True
            else:
                asked |= {"lease_seconds": self._lease_seconds, "idempotency_key": uuid.uuid4().hex}
            raw = await self._connection.call_tool("run", asked, repeatable=True)
            self._info = run_from_json(structured(raw))
            from ash_mcp._blocking import LoopThread  # only runs need threads

            self._renewer = LoopThread()
            self._renewing = self._renewer.start(self._keep)
        return self._info

    async def renew(self) -> None:
        """Renew the lease now, beside what is done in the background.

        Raises:
            RunEnded: The lease was over before; what was in the run is gone, and another one is to be opened.
        """
        await self._renew(self._connection, None)

    async def end(self) -> None:
        """End the run with all that was spawned in it; one that was joined is left open. Idempotent."""
        await self.leave()
        if self._info is not None and not self._join and os.getpid() == self._process:
            try:
                await self._connection.call_tool("destroy", {"run": self._info.id}, repeatable=True)
            except (RunEnded, RunNotFound):
                return

    async def leave(self) -> None:
        """Renew its lease no more: it ends by itself unless another process renews it. Idempotent."""
        renewer, renewing = self._renewer, self._renewing
        self._renewer = self._renewing = None
        if renewer is not None and renewing is not None and os.getpid() == self._process:
            renewing.cancel()
            await anyio.to_thread.run_sync(renewer.close, abandon_on_cancel=True)

    def spawn(self, recipe: str | Mapping[str, Any] | None = None, **asked: Any) -> Spawning:
        """Make a sandbox in this run, as `Hive.spawn` does with the same arguments."""
        from ash_mcp.client import Spawning

        async def run() -> Sandbox:
            return await self._hive.spawn(recipe, run=self.info.id, **asked)

        return Spawning(lambda: self._again_if_lost(run))

    async def spawn_many(
        self,
        count: int,
        recipe: str | Mapping[str, Any] | None = None,
        *,
        at_once: int = 16,
        timeout_seconds: float | None = None,
        on_ready: Callable[[int, SandboxInfo | AshError], None] | None = None,
        **asked: Any,
    ) -> SpawnedMany:
        """Make several sandboxes in this run, as `Hive.spawn_many` does with the same arguments."""
        from ash_mcp._many import spawn_many

        return await spawn_many(
            self.spawn,
            count,
            recipe,
            asked,
            at_once=at_once,
            timeout_seconds=self._hive.settings.timeout_seconds if timeout_seconds is None else timeout_seconds,
            on_ready=on_ready,
        )

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with anyio.fail_after(_CLEANUP_SECONDS, shield=True):
                await self.end()
        except (AshError, TimeoutError) as failure:
            if error is None:
                raise
            error.add_note(f"and {self!r} ends only when its lease is over: {failure}")

    def __repr__(self) -> str:
        return f"<Run {self._name} {self._info.id if self._info is not None else 'not open'}>"

    async def _again_if_lost(self, spawn: Callable[[], Any]) -> Sandbox:
        try:
            return await spawn()
        except RunNotFound:  # the hive has lost its store since, and learns of the run from its renewal
            await self.renew()
            return await spawn()

    async def _keep(self) -> None:
        """Renew the lease until cancelled, or until the hive says that it was over."""
        connection = self._connection.another()
        pause = self.info.lease_seconds / _RENEWALS
        try:
            while True:
                await anyio.sleep(pause)
                try:
                    await self._renew(connection, pause)
                except RunEnded as ended:
                    self._ended = ended
                    return
                except AshError:
                    continue  # the hive is away, or another one answers for now: the next one makes up for it
        finally:
            with anyio.CancelScope(shield=True):
                await connection.aclose()

    async def _renew(self, connection: Connection, timeout_seconds: float | None) -> None:
        info = self.info
        asked = {"run": info.name, "run_id": info.id, "lease_seconds": info.lease_seconds, "renew": True}
        await connection.call_tool("run", asked, repeatable=True, timeout_seconds=timeout_seconds)
