"""The SDK for code that does not await: the same names, without `await`.

    from ash_mcp.sync import Hive

    with Hive() as hive:
        with hive.spawn("general") as box:
            print(box.exec("echo hello").stdout)

A `Hive` runs an event loop in a thread of its own from its first call to its `aclose()`; it may be used from several
threads at once. Callbacks such as `on_progress` run in that thread.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from anyio.from_thread import BlockingPortal, start_blocking_portal

from ash_mcp import client
from ash_mcp._connection import OnProgress
from ash_mcp._sync_sandbox import Files, Job, OutputStream, Sandbox
from ash_mcp.client import Destroyed
from ash_mcp.errors import LocalProtocolError
from ash_mcp.settings import ClientSettings
from ash_mcp.types import Resources, SandboxInfo

if TYPE_CHECKING:
    import httpx

__all__ = ["Files", "Hive", "Job", "OutputStream", "Sandbox", "Spawned"]

T = TypeVar("T")


class _Loop:
    """An event loop in a thread, started at its first use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._portal: BlockingPortal | None = None
        self._stack = contextlib.ExitStack()
        self._closed = False

    def run(self, do: Callable[[], Awaitable[T]]) -> T:
        """Run `do` in the loop and wait for it; Ctrl-C here cancels it there."""
        future = self._open().start_task_soon(do)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def _open(self) -> BlockingPortal:
        with self._lock:
            if self._closed:
                raise LocalProtocolError("this Hive is closed; make a new one")
            if self._portal is None:
                self._portal = self._stack.enter_context(start_blocking_portal())
            return self._portal

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._portal = None
            self._stack.close()

    @property
    def is_open(self) -> bool:
        return self._portal is not None


class Hive:
    """`ash_mcp.Hive` without `await`; see there for every argument."""

    def __init__(
        self,
        url: str | None = None,
        token: str | None = None,
        scope: str | None = None,
        *,
        timeout_seconds: float | None = None,
        settings: ClientSettings | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._hive = client.Hive(
            url, token, scope, timeout_seconds=timeout_seconds, settings=settings, transport=transport
        )
        self._loop = _Loop()
        self.settings = self._hive.settings

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.aclose()

    def aclose(self) -> None:
        """Close the connections and end the thread. Idempotent; sandboxes live on."""
        if self._loop.is_open:
            self._loop.run(self._hive.aclose)
        self._loop.close()

    def spawn(
        self,
        recipe: str | Mapping[str, Any] | None = None,
        *,
        session: str | None = None,
        image: str | None = None,
        env: Mapping[str, str] | None = None,
        secrets: Mapping[str, str] | None = None,
        ports: Sequence[int] = (),
        resources: Resources | Mapping[str, Any] | None = None,
        node_selector: Mapping[str, str] | None = None,
        runtime_class: str | None = None,
        network: str | Sequence[str] | None = None,
        ttl_seconds: float | None = None,
        idle_seconds: float | None = None,
        labels: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
        timeout_seconds: float | None = None,
        on_progress: OnProgress | None = None,
    ) -> Spawned:
        """Make a sandbox, now; `with hive.spawn() as box:` destroys it at the end."""
        spawning = self._hive.spawn(
            recipe,
            session=session,
            image=image,
            env=env,
            secrets=secrets,
            ports=ports,
            resources=resources,
            node_selector=node_selector,
            runtime_class=runtime_class,
            network=network,
            ttl_seconds=ttl_seconds,
            idle_seconds=idle_seconds,
            labels=labels,
            idempotency_key=idempotency_key,
            timeout_seconds=timeout_seconds,
            on_progress=on_progress,
        )
        return Spawned(self._loop.run, self._loop.run(spawning.__aenter__), spawning)

    def attach(self, session: str) -> Sandbox:
        """Return the handle of a sandbox that lives, by its session name or its id."""
        return Sandbox(self._loop.run, self._loop.run(lambda: self._hive.attach(session)))

    def list(self, *, labels: Mapping[str, str] | None = None, include_ended: bool = False) -> Sequence[SandboxInfo]:
        """Return one's sandboxes, oldest first."""
        return self._loop.run(lambda: self._hive.list(labels=labels, include_ended=include_ended))

    def extend(self, session: str, seconds: float) -> SandboxInfo:
        """Let a sandbox live for `seconds` from now."""
        return self._loop.run(lambda: self._hive.extend(session, seconds))

    def destroy(self, *sessions: str) -> Destroyed:
        """End sandboxes by session name or id, and say which there were. Idempotent."""
        return self._loop.run(lambda: self._hive.destroy(*sessions))

    def destroy_all(self) -> Destroyed:
        """End every sandbox that one has in this scope."""
        return self._loop.run(self._hive.destroy_all)

    def __repr__(self) -> str:
        return repr(self._hive)


class Spawned(Sandbox):
    """A sandbox that this code made: as a context manager it is destroyed at the end."""

    def __init__(self, run: Any, box: Any, spawning: client.Spawning) -> None:
        super().__init__(run, box)
        self._spawning = spawning

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._run(lambda: self._spawning.__aexit__(kind, error, trace))
