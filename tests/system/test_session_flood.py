"""One key floods a hive with sessions, whole and half; another key's work goes on in its usual time."""

from __future__ import annotations

import json
import statistics
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import anyio
import anyio.to_thread
import httpx
import pytest
from anyio.abc import ByteStream

from ash_hub.serving.auth import key_file
from ash_mcp import Hive
from tests.hub.backends.local.local_parts import needs_isolation
from tests.system.crash_parts import home

pytestmark = [pytest.mark.anyio, pytest.mark.heavy, needs_isolation]

VERSION = "2025-11-25"
HELLO: dict[str, Any] = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "initialize",
    "params": {"protocolVersion": VERSION, "capabilities": {}, "clientInfo": {"name": "flood", "version": "1"}},
}
BODY = json.dumps(HELLO).encode()
FLOODERS = 16
HALF = 300
"""Requests of the flooding key that stop in the middle."""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@dataclass
class Attack:
    """What the flooding key sends, and what it was answered."""

    port: int
    token: str
    statuses: Counter[str] = field(default_factory=Counter[str])

    def request(self, body: bytes = BODY, more: str = "", *, length: int | None = None) -> bytes:
        head = (
            f"POST /mcp HTTP/1.1\r\nhost: 127.0.0.1:{self.port}\r\nauthorization: Bearer {self.token}\r\n"
            "content-type: application/json\r\naccept: application/json, text/event-stream\r\n"
            f"content-length: {len(body) if length is None else length}\r\n{more}\r\n"
        )
        return head.encode() + body

    def kinds(self) -> dict[str, bytes]:
        return {
            "plain": self.request(),
            "doubled": self.request(more="mcp-name: a\r\nmcp-name: a\r\n"),
            "NaN": self.request(BODY.replace(b'"1"', b"NaN")),
            "failing": self.request(BODY.replace(b'"capabilities": {}, ', b"")),
            "unread": self.request(),
        }

    async def flood(self) -> None:
        """Open sessions in every way, one after the other, without an end."""
        kinds = self.kinds()
        while True:
            for kind, request in kinds.items():
                try:
                    async with await anyio.connect_tcp("127.0.0.1", self.port) as stream:
                        await stream.send(request)
                        if kind != "unread":
                            self.statuses[f"{kind} {await status_of(stream)}"] += 1
                except (OSError, anyio.EndOfStream, anyio.BrokenResourceError):
                    self.statuses[f"{kind} -"] += 1

    async def half(self, stack: AsyncExitStack) -> list[ByteStream]:
        """Leave requests in the middle: some have said nothing of their bodies, some half."""
        opened: list[ByteStream] = []
        for number in range(HALF):
            stream = await stack.enter_async_context(await anyio.connect_tcp("127.0.0.1", self.port))
            await stream.send(self.request(BODY[: number % 2 * 80], length=len(BODY)))
            opened.append(stream)
        return opened


async def status_of(stream: ByteStream) -> str:
    """Read a whole answer and return its status."""
    said = await stream.receive()
    while not said.endswith((b"0\r\n\r\n", b"}")):
        said += await stream.receive()
    return said.split()[1].decode()


@dataclass
class Quiet:
    """The other key: it begins a session, spawns, calls."""

    url: str
    token: str
    took: dict[str, list[float]] = field(default_factory=dict[str, list[float]])

    async def timed(self, name: str, work: Callable[[], Awaitable[Any]]) -> Any:
        began = time.perf_counter()
        result = await work()
        self.took.setdefault(name, []).append(time.perf_counter() - began)
        return result

    async def work(self, rounds: int) -> None:
        async with Hive(self.url, token=self.token) as hive, httpx.AsyncClient(timeout=30) as client:
            for _ in range(rounds):
                opened = await self.timed("initialize", lambda: self.initialize(client))
                assert opened.status_code == 200, opened.text
                box = await self.timed("spawn", lambda: hive.spawn("echo"))
                said = await self.timed("call", lambda box=box: box.call("echo", text="x"))
                assert not said.is_error
                await box.destroy()
                ended = {**self.headers(), "mcp-session-id": opened.headers["mcp-session-id"]}
                assert (await client.delete(self.url, headers=ended)).status_code == 200

    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.token}", "accept": "application/json, text/event-stream"}

    async def initialize(self, client: httpx.AsyncClient) -> httpx.Response:
        return await client.post(self.url, headers=self.headers(), json=HELLO)

    def median(self, name: str) -> float:
        return statistics.median(self.took[name])


@asynccontextmanager
async def two_keys() -> AsyncGenerator[tuple[Attack, str, str]]:
    """Serve a hive in a process of its own; give the attack of one key, the URL, and the other key."""
    with home() as place:
        keys = key_file(place.folder / "state")
        _, bad = keys.add(subject="bad")
        _, good = keys.add(subject="good")
        url = await anyio.to_thread.run_sync(place.start)
        yield Attack(urlsplit(url).port or 0, bad), url, good


def report(kind: str, quiet: Quiet, flooded: Quiet, attack: Attack) -> None:
    for name, times in flooded.took.items():
        print(  # noqa: T201
            f"{kind}: {name} {1000 * quiet.median(name):.0f} ms alone, {1000 * flooded.median(name):.0f} ms beside "
            f"the flood (worst {1000 * max(times):.0f} ms)"
        )
    print(f"{kind}: answers to the flood {dict(sorted(attack.statuses.items()))}")  # noqa: T201


async def flooded_times(kind: str, rounds: int, *, before: int = 0) -> tuple[Quiet, Quiet, Attack]:
    """Measure the quiet key alone, then beside a flood that has had `before` sessions answered."""
    async with two_keys() as (attack, url, good):
        alone, beside = Quiet(url, good), Quiet(url, good)
        await alone.work(rounds)
        async with AsyncExitStack() as stack, anyio.create_task_group() as group:
            await attack.half(stack)
            for _ in range(FLOODERS):
                group.start_soon(attack.flood)
            while attack.statuses.total() < before:
                await anyio.sleep(0.05)
            await beside.work(rounds)
            group.cancel_scope.cancel()
    report(kind, alone, beside, attack)
    return alone, beside, attack


def assert_untouched(attack: Attack) -> None:
    """Nothing that could be read in two ways opened a session, and nothing was turned away as for all."""
    answered = {words.rpartition(" ")[2] for words in attack.statuses if words.startswith(("doubled", "NaN"))}
    assert answered <= {"400", "-"} and "400" in answered
    assert not {words for words in attack.statuses if words.endswith((" 503", " 500"))}


@pytest.mark.timeout(120)
async def test_a_flood_of_sessions_leaves_another_key_its_work() -> None:
    with anyio.fail_after(100):
        _, beside, attack = await flooded_times("quick", rounds=3, before=200)
    assert_untouched(attack)
    assert beside.median("initialize") < 2 and beside.median("spawn") < 10 and beside.median("call") < 2


@pytest.mark.timeout(600)
async def test_more_sessions_than_one_may_have_leave_another_key_its_work() -> None:
    with anyio.fail_after(500):
        _, beside, attack = await flooded_times("heavy", rounds=10, before=20_000)
    assert_untouched(attack)
    assert attack.statuses["plain 429"]
    assert beside.median("initialize") < 2 and beside.median("spawn") < 10 and beside.median("call") < 2
