"""A real hive on a real Redis that is slowed, stopped, restarted and flushed while calls come without a pause."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import urljoin

import anyio
import httpx
import pytest
from anyio import to_thread
from mcp.client import Client
from pydantic import SecretStr

from ash_hub.app import Hive, open_hive
from ash_hub.settings import HubSettings
from ash_mcp.wire import FAILURE_META_KEY
from tests.redis_server import RedisServer, running_redis

pytestmark = [pytest.mark.anyio, pytest.mark.redis, pytest.mark.heavy]

SANDBOXES: Final = 4
CALLERS: Final = 8
FAILS_WITHIN: Final = 6.0
"""Of a spawn while Redis is away: it is tried for 2 s, and the machine may be busy."""
HEALS_WITHIN: Final = 8.0


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"use_uvloop": True}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with running_redis(tmp_path) as server:
        yield server


@pytest.fixture
async def hive(folder: Path, server: RedisServer) -> AsyncGenerator[Hive]:
    url = SecretStr(server.url)
    async with open_hive(HubSettings(port=0, state_dir=folder / "s", run_dir=folder / "r", redis_url=url)) as hive:
        yield hive


@dataclass
class Load:
    """Calls on known routes, one after the other from each of several callers of both eras."""

    url: str
    sessions: list[str]
    done: int = 0
    slowest: float = 0.0
    failed: list[str] = field(default_factory=list[str])
    over: bool = False

    async def run(self, number: int) -> None:
        mode: Any = ("2026-07-28", "legacy")[number % 2]
        async with Client(self.url, mode=mode, cache=None) as client:
            while not self.over:
                await self._call(client, self.sessions[(number + self.done) % len(self.sessions)])

    async def _call(self, client: Client, session: str) -> None:
        start = time.monotonic()
        words = f"{session} {self.done}"
        try:
            result = await client.call_tool(f"{session}_echo", {"text": words})
        except Exception as error:  # whatever it is, it is a call that failed
            self.failed.append(repr(error))
            return
        if result.is_error or words not in str(result.content):
            self.failed.append(str(result.content))
        self.done += 1
        self.slowest = max(self.slowest, time.monotonic() - start)

    async def go_on(self, calls: int) -> None:
        """Return after so many more calls."""
        wanted = self.done + calls
        with anyio.fail_after(30):
            while self.done < wanted:
                await anyio.sleep(0.01)


async def spawn(client: Client) -> tuple[Any, float]:
    start = time.monotonic()
    with anyio.fail_after(30):
        result = await client.call_tool("spawn", {"recipe": "echo"})
    return result, time.monotonic() - start


async def readiness(hive: Hive) -> tuple[int, str]:
    async with httpx.AsyncClient() as http:
        answer = await http.get(urljoin(hive.url, "/readyz"))
        return answer.status_code, answer.text


async def becomes(hive: Hive, status: int, within: float) -> float:
    start = time.monotonic()
    with anyio.fail_after(within):
        while (await readiness(hive))[0] != status:
            await anyio.sleep(0.02)
    return time.monotonic() - start


async def refused(hive: Hive, client: Client) -> float:
    """Spawn, which must fail as what may be tried again, and say how long that took."""
    result, seconds = await spawn(client)
    failure = result.meta[FAILURE_META_KEY]
    assert result.is_error and failure["retryable"] and not failure["trainable"], failure
    assert seconds < FAILS_WITHIN
    return seconds


async def spawned_in_the_end(client: Client) -> str:
    """Spawn, again while it fails as what may be tried again, and return the session's name."""
    with anyio.fail_after(HEALS_WITHIN + 15):  # of which a start takes some on a busy machine
        while True:
            result, _ = await spawn(client)
            if not result.is_error:
                return result.structured_content["session"]
            assert result.meta[FAILURE_META_KEY]["retryable"]
            await anyio.sleep(0.1)


async def test_known_calls_never_fail_whatever_happens_to_redis_and_all_heals(hive: Hive, server: RedisServer):
    said: dict[str, float] = {}

    async def slowed(client: Client) -> None:
        server.ask("CLIENT", "PAUSE", 4000, "ALL")
        said["refused while paused"] = await refused(hive, client)
        assert (await readiness(hive))[0] == 503
        await load.go_on(50)

    async def stopped(client: Client) -> None:
        await to_thread.run_sync(server.stop)
        said["refused while stopped"] = await refused(hive, client)
        status, why = await readiness(hive)
        assert (status, "Redis" in why) == (503, True)
        await load.go_on(50)
        await to_thread.run_sync(server.start)

    async def restarted(client: Client) -> None:
        await to_thread.run_sync(server.kill)
        await to_thread.run_sync(server.start)
        await load.go_on(50)

    async def flushed(client: Client) -> None:
        server.ask("FLUSHALL")
        start = time.monotonic()
        with anyio.fail_after(5):
            while server.ask("HLEN", "ash:routes") != len(load.sessions):
                await anyio.sleep(0.02)
        said["routes back after the flush"] = time.monotonic() - start
        assert server.ask("KEYS", "ash:names:*"), "nobody owns a session name"

    disturbances: list[Callable[[Client], Awaitable[None]]] = [slowed, stopped, restarted, flushed]
    async with Client(hive.url, cache=None) as client:
        made = [await spawned_in_the_end(client) for _ in range(SANDBOXES)]
        load = Load(hive.url, made)
        async with anyio.create_task_group() as group:
            for number in range(CALLERS):
                group.start_soon(load.run, number)
            await load.go_on(50)
            for disturb in disturbances:
                await disturb(client)
                said[f"ready after it was {disturb.__name__}"] = await becomes(hive, 200, HEALS_WITHIN)
                again = await spawned_in_the_end(client)
                assert again not in load.sessions
                load.sessions.append(again)
                await load.go_on(50)
            load.over = True
        listed = await client.call_tool("list", {})
    print({name: round(seconds, 2) for name, seconds in said.items()}, load.done, "calls,", load.slowest, "s")  # noqa: T201
    assert load.failed == []
    assert load.slowest < 5
    assert listed.structured_content is not None
    assert {box["session"] for box in listed.structured_content["sandboxes"]} == set(load.sessions)
