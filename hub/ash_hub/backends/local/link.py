"""The hub's end of the keeper's socket."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import anyio
from anyio.abc import SocketStream
from anyio.streams.buffered import BufferedByteReceiveStream

from ash_hub.backends.local.keeper.control import PROTOCOL
from ash_mcp.errors import ConfigError

__all__ = ["KeeperCrowded", "KeeperEnding", "KeeperGone", "KeeperLink", "KeeperRefusal"]

_LINE_LIMIT = 64 * 1024 * 1024
_HELLO_SECONDS = 5.0


class KeeperGone(Exception):
    """The keeper has ended; whatever it kept has ended with it."""


class KeeperEnding(Exception):
    """The keeper is about to end and takes no hub; the next one can start when it is gone."""


class KeeperCrowded(ConfigError):
    """As many hubs as a keeper takes lead it; it and its sandboxes go on without this one."""


class KeeperRefusal(Exception):
    """The keeper could not do what it was asked."""

    def __init__(self, answer: Mapping[str, Any]) -> None:
        super().__init__(answer["message"])
        self.kind: str = answer["kind"]
        self.answer = answer


Apply = Callable[[Mapping[str, Any]], None]


def _ignore(answer: Mapping[str, Any]) -> None:
    del answer


class _Pending:
    def __init__(self, apply: Apply) -> None:
        self.apply = apply
        self.done = anyio.Event()
        self.answer: Mapping[str, Any] | None = None


class KeeperLink:
    """A connection as one of the hubs. `run` must be running for requests to be answered."""

    def __init__(self, stream: SocketStream) -> None:
        self._stream = stream
        self._lines = BufferedByteReceiveStream(stream)
        self._numbers = itertools.count(1)
        self._pending: dict[int, _Pending] = {}
        self._sending = anyio.Lock()
        self.closed = anyio.Event()
        """Set when the keeper is gone."""
        self.hello: Mapping[str, Any] = {}
        """The keeper's answer to our first word: its pid, its sandboxes, its control groups."""

    @classmethod
    async def open(cls, path: Path, ports: Sequence[int] = (), shared: str | None = None) -> KeeperLink:
        """Connect and join the hubs that lead it.

        Args:
            ports: Where the hive itself listens, which no sandbox may reach.
            shared: What the replicas of one hive have in common; None for a hub that is alone.

        Raises:
            OSError: Nobody listens there.
            KeeperEnding, KeeperGone: The keeper is about to end.
            KeeperCrowded: Too many hubs lead it.
            ConfigError: Another hive leads it, or it is of another version.
        """
        link = cls(await anyio.connect_unix(path))
        try:
            with anyio.fail_after(_HELLO_SECONDS):
                hello = {"op": "hello", "n": 0, "pid": os.getpid(), "ports": list(ports), "shared": shared}
                await link._send(hello)
                answer = await link._receive()
        except (KeeperGone, TimeoutError) as error:
            await link.aclose()
            raise KeeperGone from error
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
        """Read until the keeper ends; then every request that waits raises `KeeperGone`."""
        try:
            while True:
                message = await self._receive()
                if "event" in message:
                    on_event(message)
                elif pending := self._pending.get(message["n"]):
                    pending.answer = message
                    if "ok" in message:
                        pending.apply(message["ok"])
                    pending.done.set()
        except KeeperGone:
            pass
        finally:
            self.closed.set()
            for pending in self._pending.values():
                pending.done.set()

    async def request(self, operation: str, *, apply: Apply = _ignore, **fields: Any) -> Mapping[str, Any]:
        """Send one request and return its answer.

        Args:
            apply: Called with the answer before any event that came after it.

        Raises:
            KeeperRefusal, KeeperGone
        """
        if self.closed.is_set():
            raise KeeperGone
        number = next(self._numbers)
        pending = self._pending[number] = _Pending(apply)
        try:
            await self._send({"op": operation, "n": number, **fields})
            await pending.done.wait()
        finally:
            del self._pending[number]
        if pending.answer is None:
            raise KeeperGone
        if error := pending.answer.get("error"):
            raise KeeperRefusal(error)
        return pending.answer["ok"]

    async def aclose(self) -> None:
        await anyio.aclose_forcefully(self._stream)

    async def _send(self, message: Mapping[str, Any]) -> None:
        line = json.dumps(message, separators=(",", ":")).encode() + b"\n"
        try:
            # Shielded and whole: half a line would break the connection for every other request.
            with anyio.CancelScope(shield=True):
                async with self._sending:
                    await self._stream.send(line)
        except (anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
            raise KeeperGone from error

    async def _receive(self) -> Mapping[str, Any]:
        try:
            return json.loads(await self._lines.receive_until(b"\n", _LINE_LIMIT))
        except (
            anyio.EndOfStream,
            anyio.IncompleteRead,
            anyio.BrokenResourceError,
            anyio.ClosedResourceError,
        ) as error:
            raise KeeperGone from error


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
