"""Load on a hive from clients of several kinds, and the account of their calls.

Each call notes its number in its sandbox, so that what ran is known whatever its caller was told.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final, cast

import anyio
import httpx
import httpx2
from mcp.client import Client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.exceptions import MCPError

from ash_mcp import Hive
from ash_mcp.errors import AshError
from ash_mcp.wire import FAILURE_META_KEY

TOOL: Final = "terminal-controller_execute_command"
_NOTES: Final = "/workspace/calls"
_PAUSE_SECONDS: Final = 0.1
"""Between two calls of one caller: the load is to find what fails, not what the machine bears."""
_AGAIN_SECONDS: Final = 0.2
_LONG_SECONDS: Final = 8
"""More than a pod that leaves waits before it is told to."""
_SLOW: Final = ("spawn", "long")

Run = Callable[[str], Awaitable[str]]
"""Runs a command in a sandbox and returns what it printed."""


class Failed(Exception):
    """A call that the hive answered with a typed failure."""

    def __init__(self, failure: dict[str, Any]) -> None:
        super().__init__(failure["message"])
        self.kind, self.retryable = str(failure["kind"]), bool(failure["retryable"])


@dataclass
class Load:
    """Callers, two of each kind, on some sandboxes, and one who spawns and destroys others; until `over` is set.

    The calls of one kind take long, so that whatever stops has some in flight.

    Args:
        url: Of the hive, without `/mcp`.
        gateway: Where sandboxes are called by the header X-Session-ID.
        boxes: Session name and id of each.
    """

    url: str
    gateway: str
    key: str
    boxes: Sequence[tuple[str, str]]
    over: anyio.Event = field(default_factory=anyio.Event)
    done: Counter[str] = field(default_factory=Counter[str])
    """By the kind of caller."""
    retried: Counter[str] = field(default_factory=Counter[str])
    """By kind of caller and of failure."""
    problems: list[str] = field(default_factory=list[str])
    _numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    _answered: dict[str, list[int]] = field(default_factory=dict[str, list[int]])
    """The calls that were done, by session."""

    async def run(self) -> None:
        kinds = {
            "sdk": self._sdk,
            "modern": self._modern,
            "handshake": self._handshake,
            "gateway": self._gateway,
            "long": self._long,
        }
        async with anyio.create_task_group() as group:
            group.start_soon(self._spawner)
            for turn, (kind, opener) in enumerate([*kinds.items()] * 2):
                group.start_soon(self._caller, kind, opener, *self.boxes[turn % len(self.boxes)])

    async def until_done(self, more: int) -> None:
        """Return once every kind of caller has had so many more calls answered, and the slow ones one."""
        before = self.done.copy()
        while len(self.done) < 6 or any(
            count < before[kind] + (1 if kind in _SLOW else more) for kind, count in self.done.items()
        ):
            await anyio.sleep(0.05)

    async def check(self) -> None:
        """Compare what callers were told with what ran."""
        async with Hive(f"{self.url}/mcp", token=self.key) as hive:
            for session, _ in self.boxes:
                text = await (await hive.attach(session)).files.read(_NOTES)
                ran = Counter(int(line) for line in text.split())
                answered = self._answered[session]
                twice = [number for number, times in ran.items() if times > 1]
                lost = [number for number in answered if not ran[number]]
                if twice or lost:
                    self.problems.append(f"{session}: ran twice {twice[:10]}, answered and did not run {lost[:10]}")

    # -- callers

    async def _caller(self, kind: str, opener: Callable[[str, str], Any], session: str, sandbox_id: str) -> None:
        number = next(self._numbers)
        while not self.over.is_set():
            try:
                async with opener(session, sandbox_id) as run:
                    while not self.over.is_set():
                        said = await run(f"echo {number} >> {_NOTES}; echo {number}")
                        if said.strip() != str(number):
                            self.problems.append(f"{kind}: call {number} was answered {said[:200]!r}")
                        self._answered.setdefault(session, []).append(number)
                        self.done[kind] += 1
                        number = next(self._numbers)
                        await anyio.sleep(_PAUSE_SECONDS)
            except Exception as error:
                if self._is_retryable(kind, error, f"call {number}"):
                    await anyio.sleep(_AGAIN_SECONDS)
                else:
                    number = next(self._numbers)

    async def _spawner(self) -> None:
        async with Hive(f"{self.url}/mcp", token=self.key) as hive:
            while not self.over.is_set():
                try:
                    async with hive.spawn("general") as box:
                        assert (await box.exec("echo on")).stdout == "on\n"
                    self.done["spawn"] += 1
                except Exception as error:
                    self._is_retryable("spawn", error, "a spawn")
                    await anyio.sleep(_AGAIN_SECONDS)

    @asynccontextmanager
    async def _sdk(self, session: str, sandbox_id: str) -> AsyncGenerator[Run]:
        async with Hive(f"{self.url}/mcp", token=self.key) as hive:
            box = await hive.attach(session)

            async def run(command: str) -> str:
                return str((await box.call(TOOL, command=command)).structured["stdout"])

            yield run

    @asynccontextmanager
    async def _modern(self, session: str, sandbox_id: str) -> AsyncGenerator[Run]:
        async with self._client(self.url, "auto") as client:
            yield lambda command: _call(client, f"{session}_{TOOL}", command)

    @asynccontextmanager
    async def _long(self, session: str, sandbox_id: str) -> AsyncGenerator[Run]:
        async with self._client(self.url, "auto") as client:
            yield lambda command: _call(client, f"{session}_{TOOL}", f"sleep {_LONG_SECONDS}; {command}")

    @asynccontextmanager
    async def _handshake(self, session: str, sandbox_id: str) -> AsyncGenerator[Run]:
        async with self._client(self.url, "legacy") as client:
            yield lambda command: _call(client, f"{session}_{TOOL}", command)

    @asynccontextmanager
    async def _gateway(self, session: str, sandbox_id: str) -> AsyncGenerator[Run]:
        async with self._client(self.gateway, "auto", {"x-session-id": sandbox_id}) as client:
            yield lambda command: _call(client, TOOL, command)

    @asynccontextmanager
    async def _client(self, url: str, mode: Any, headers: dict[str, str] | None = None) -> AsyncGenerator[Client]:
        sent = {"authorization": f"Bearer {self.key}", **(headers or {})}
        async with httpx2.AsyncClient(headers=sent, timeout=60) as http:
            transport = streamable_http_client(f"{url}/mcp", http_client=http, terminate_on_close=False)
            async with Client(transport, mode=mode, read_timeout_seconds=60) as client:
                yield client

    # -- failures

    def _is_retryable(self, caller: str, error: Exception, what: str) -> bool:
        """Note a failure; say whether the same may be asked again, since it certainly was not done."""
        verdicts = [_verdict(each) for each in _leaves(error)]
        kind = verdicts[0][0]
        if all(retryable for _, retryable in verdicts):
            self.retried[f"{caller}: {kind}"] += 1
            return True
        self.problems.append(f"{caller}: {what} failed and may not be retried: {kind}: {error!r}"[:600])
        return False


async def _call(client: Client, tool: str, command: str) -> str:
    result = await client.call_tool(tool, {"command": command})
    if result.is_error:
        raise Failed(
            (result.meta or {}).get(FAILURE_META_KEY)
            or {"kind": "untyped", "message": str(result), "retryable": False}
        )
    assert result.structured_content is not None
    return str(result.structured_content["stdout"])


def _leaves(error: BaseException) -> list[BaseException]:
    if not isinstance(error, BaseExceptionGroup):
        return [error]
    group = cast("BaseExceptionGroup[BaseException]", error)
    return [leaf for each in group.exceptions for leaf in _leaves(each)]


def _verdict(error: BaseException) -> tuple[str, bool]:
    """Return what kind of failure it is, and whether the call certainly did not run."""
    match error:
        case AshError() | Failed():
            return error.kind, error.retryable
        case MCPError(data={"kind": str(kind), "retryable": bool(retryable)}):
            return kind, retryable
        case MCPError(message="Session terminated"):  # by the protocol a new session is begun
            return "session terminated", True
        case httpx.ConnectError() | httpx2.ConnectError():
            return "not connected", True
        case _:
            return type(error).__name__, False
