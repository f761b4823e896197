"""The hub's connection to the keeper: requests and their answers, events, and pings."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import anyio

from ash_hub.backends.local.keeper.control import PROTOCOL
from ash_mcp.errors import ConfigError
from ash_router.bounds import epoll_watches

__all__ = [
    "SILENT",
    "KeeperConnectionLost",
    "KeeperCrowded",
    "KeeperEnding",
    "KeeperLink",
    "KeeperRefusal",
    "KeeperSilent",
]

SILENT = "the keeper does not answer; calls to sandboxes go on, and so does the rest when it is back"
_LINE_LIMIT = 64 * 1024 * 1024
_HELLO_SECONDS = 5.0
ANSWER_SECONDS = 10.0
"""The timeout of a request that the keeper carries out at once, on a busy host too."""
_PING_SECONDS = 1.0
_SILENT_SECONDS = 4.0
"""Without an answer to a ping, after which the keeper counts as silent: no request is sent to it."""
WAITED_SECONDS = _SILENT_SECONDS - _PING_SECONDS
"""The least time that a request waits for its answer before the keeper counts as silent."""


class KeeperConnectionLost(Exception):
    """The connection to the keeper is lost. The keeper and its sandboxes may or may not have ended."""


class KeeperSilent(Exception):
    """The keeper has not answered in time. Its process lives, and may still carry the request out."""


class KeeperEnding(Exception):
    """The keeper is about to end and accepts no hub; another keeper can start when it has ended."""


class KeeperCrowded(ConfigError):
    """The keeper has as many hubs as it accepts; it and its sandboxes go on without this one."""


class KeeperRefusal(Exception):
    """The keeper could not carry out a request."""

    def __init__(self, answer: Mapping[str, Any]) -> None:
        super().__init__(answer["message"])
        self.kind: str = answer["kind"]
        self.answer = answer


Apply = Callable[[Mapping[str, Any]], None]


def _ignore(answer: Mapping[str, Any]) -> None:
    del answer


def _nothing() -> None:
    pass


class _Pending:
    def __init__(self, number: int, apply: Apply) -> None:
        self.number = number
        self.apply = apply
        self.done = anyio.Event()
        self.answer: Mapping[str, Any] | None = None


class KeeperLink:
    """The connection of one hub to the keeper. Requests are answered only while `run` runs."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._numbers = itertools.count(1)
        self._pending: dict[int, _Pending] = {}
        self.closed = anyio.Event()
        """Set when the connection is lost."""
        self.on_answering: Callable[[], None] = _nothing
        """Called when a keeper that was silent answers again."""
        self.is_silent = False
        """Whether the keeper does not answer now."""
        self.hello: Mapping[str, Any] = {}
        """The keeper's answer to the first message: its pid, its sandboxes, its control groups."""

    @classmethod
    async def open(cls, path: Path, ports: Sequence[int] = (), shared: str | None = None) -> KeeperLink:
        """Connect to a keeper as one of its hubs.

        Args:
            ports: Ports of the hive, which no sandbox may reach.
            shared: A text that is the same for all replicas of one hive; None for a hub that is alone.

        Raises:
            OSError: No keeper listens there, or this host has no room for a connection.
            KeeperEnding, KeeperConnectionLost: The keeper is about to end.
            KeeperSilent: The keeper does not answer.
            KeeperCrowded: The keeper has too many hubs.
            ConfigError: The keeper is another hive's, or of another version.
        """
        # Never paused, as anyio's own streams are with every read: the place in the loop's epoll is kept.
        streams = await asyncio.open_unix_connection(sock=epoll_watches.connected(path), limit=_LINE_LIMIT)
        link = cls(*streams)
        try:
            with anyio.fail_after(_HELLO_SECONDS):
                hello = {"op": "hello", "n": 0, "pid": os.getpid(), "ports": list(ports), "shared": shared}
                link._send(hello)
                answer = await link._receive()
        except TimeoutError as error:
            await link.aclose()
            raise KeeperSilent(SILENT) from error
        except KeeperConnectionLost:
            await link.aclose()
            raise
        if failure := answer.get("error"):
            await link.aclose()
            if failure["kind"] == "ending":
                raise KeeperEnding
            refusal = KeeperCrowded if failure["kind"] == "crowded" else ConfigError
            raise refusal(_refused(failure, shares=shared is not None))
        link.hello = answer["ok"]
        if link.hello["protocol"] != PROTOCOL:
            await link.aclose()
            raise ConfigError(
                f"the keeper of this state directory (process {link.hello['pid']}) is of another version of Ash: "
                "end it, with its sandboxes, and start again"
            )
        return link

    async def run(self, on_event: Callable[[Mapping[str, Any]], None]) -> None:
        """Read until the connection is lost; then each open request raises `KeeperConnectionLost`."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._heed)
            await self._read(on_event)
            tasks.cancel_scope.cancel()

    async def _heed(self) -> None:
        """Ping the keeper each second. When it is silent, all open requests raise `KeeperSilent`."""
        with contextlib.suppress(KeeperConnectionLost):
            while True:
                asked = self._ask("ping", _ignore)
                # Twice: where this process was stopped itself, the answer is there but not read yet.
                for seconds in (_SILENT_SECONDS, _PING_SECONDS):
                    with anyio.move_on_after(seconds):
                        await asked.done.wait()
                if not asked.done.is_set():
                    await self._silent_until(asked)
                await anyio.sleep(_PING_SECONDS)

    async def _silent_until(self, asked: _Pending) -> None:
        self.is_silent = True
        for pending in self._pending.values():
            if pending is not asked:
                pending.done.set()
        await asked.done.wait()
        self.is_silent = False
        if not self.closed.is_set():
            self.on_answering()

    async def _read(self, on_event: Callable[[Mapping[str, Any]], None]) -> None:
        try:
            while True:
                message = await self._receive()
                if "event" in message:
                    on_event(message)
                elif pending := self._pending.pop(message["n"], None):
                    pending.answer = message
                    if "ok" in message:
                        pending.apply(message["ok"])
                    pending.done.set()
        except KeeperConnectionLost:
            pass
        finally:
            self.closed.set()
            for pending in self._pending.values():
                pending.done.set()

    async def request(
        self, operation: str, *, seconds: float = ANSWER_SECONDS, apply: Apply = _ignore, **fields: Any
    ) -> Mapping[str, Any]:
        """Send one request and return its answer.

        Args:
            seconds: The timeout while the keeper answers pings.
            apply: Called with the answer before any event that came after it.

        Raises:
            KeeperRefusal: The keeper could not carry it out.
            KeeperConnectionLost: The connection was lost before the answer.
            KeeperSilent: There was no answer; the keeper may still carry it out.
        """
        if self.is_silent:
            raise KeeperSilent(SILENT)
        pending = self._ask(operation, apply, **fields)
        try:
            with anyio.move_on_after(seconds):
                await pending.done.wait()
        finally:
            self._pending.pop(pending.number, None)
        if pending.answer is None:
            if self.closed.is_set():
                raise KeeperConnectionLost
            raise KeeperSilent(SILENT if self.is_silent else f"the keeper did not answer within {seconds:g} s")
        if error := pending.answer.get("error"):
            raise KeeperRefusal(error)
        return pending.answer["ok"]

    def _ask(self, operation: str, apply: Apply, **fields: Any) -> _Pending:
        if self.closed.is_set():
            raise KeeperConnectionLost
        pending = _Pending(next(self._numbers), apply)
        self._send({"op": operation, "n": pending.number, **fields})
        self._pending[pending.number] = pending
        return pending

    async def aclose(self) -> None:
        self._writer.transport.abort()
        with anyio.CancelScope(shield=True), contextlib.suppress(OSError):
            await self._writer.wait_closed()  # in the next turn of the loop

    def _send(self, message: Mapping[str, Any]) -> None:
        if self._writer.is_closing():
            raise KeeperConnectionLost
        self._writer.write(json.dumps(message, separators=(",", ":")).encode() + b"\n")

    async def _receive(self) -> Mapping[str, Any]:
        try:
            return json.loads(await self._reader.readuntil())
        except (EOFError, OSError, asyncio.LimitOverrunError) as error:
            raise KeeperConnectionLost from error


def _refused(failure: Mapping[str, Any], *, shares: bool) -> str:
    if failure["kind"] != "led":
        return f"{failure['message']}: stop one of them first"
    if shares and failure["shared"]:
        join = (
            "share the Redis that it was started with, under the same prefix (ASH_HUB_REDIS_URL, ASH_HUB_REDIS_PREFIX)"
        )
    else:
        join = "start both with the same --redis-url (ASH_HUB_REDIS_URL), and they are one hive"
    return (
        f"another hive (process {failure['pid']}) runs on this state directory: stop it, connect to it instead of "
        f"starting a second one, {join}, or give this one a state directory of its own (ASH_HUB_STATE_DIR)"
    )
