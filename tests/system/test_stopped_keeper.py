"""A keeper that is stopped: what needs it fails within seconds and says why, all else goes on, and heals later."""

from __future__ import annotations

import os
import signal
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager

import anyio
import anyio.to_thread
import httpx
import pytest

from ash_mcp import Hive
from ash_mcp.errors import AshError
from tests.hub.backends.local.local_parts import leftovers, needs_isolation
from tests.system.crash_parts import Home, home

pytestmark = [pytest.mark.anyio, pytest.mark.heavy, needs_isolation]

SECONDS = 15
SILENT = "the keeper does not answer"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@contextmanager
def stopped(pid: int) -> Generator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


async def readiness(url: str) -> tuple[int, str]:
    async with httpx.AsyncClient() as client:
        answer = await client.get(url.replace("/mcp", "/readyz"))
        return answer.status_code, answer.text


async def is_ready(url: str) -> None:
    with anyio.fail_after(SECONDS):
        while (await readiness(url))[0] != 200:
            await anyio.sleep(0.05)


async def failure_of(ask: Callable[[], Awaitable[object]]) -> AshError:
    with anyio.fail_after(SECONDS), pytest.raises(AshError) as failed:
        await ask()
    return failed.value


def sandboxes(place: Home) -> int:
    return sum("/s/sbx-" in path for path in leftovers(place.settings))


async def test_what_needs_a_stopped_keeper_fails_in_time_and_all_heals_when_it_goes_on() -> None:
    with home() as place:
        url = await anyio.to_thread.run_sync(place.start)
        async with Hive(url) as hive:
            box, other = await hive.spawn("echo", session="first"), await hive.spawn("echo", session="second")
            asked: dict[str, Callable[[], Awaitable[object]]] = {
                "spawn": lambda: hive.spawn("echo", session="third"),
                "extend": lambda: box.extend(600),
                "logs": box.logs,
                "destroy": other.destroy,
            }
            failures: dict[str, AshError] = {}

            async def fails(name: str) -> None:
                failures[name] = await failure_of(asked[name])

            with stopped(place.known_keeper()):
                for _ in range(2):  # at first while nobody knows yet, then when it is known
                    async with anyio.create_task_group() as group:
                        for name in asked:
                            group.start_soon(fails, name)
                        assert (await box.call("echo", text="on")).structured == {"text": "on"}
                    for name, failure in failures.items():
                        assert failure.retryable and not failure.trainable, (name, failure)
                        assert SILENT in str(failure), (name, failure)
                    status, said = await readiness(url)
                    assert status == 503 and SILENT in said
                assert (await other.call("echo", text="on")).structured == {"text": "on"}
            await is_ready(url)
            with anyio.fail_after(SECONDS):
                while sandboxes(place) != 2 or "third" in (names := {str(info.session) for info in await hive.list()}):
                    await anyio.sleep(0.05)  # what was begun late is ended
            assert names == {"first", "second"}
            await box.logs()
            await box.extend(600)
            await other.destroy()
            async with hive.spawn("echo", session="third") as third:
                assert (await third.call("echo", text="x")).structured == {"text": "x"}
        assert place.stop_hub() == 0
        assert place.remains() == []


async def test_a_hive_does_not_start_on_a_stopped_keeper_and_says_why() -> None:
    with home() as place:
        url = await anyio.to_thread.run_sync(place.start)
        async with Hive(url) as hive:
            await hive.spawn("echo", session="first")
        with stopped(place.known_keeper()):
            place.kill_hub()
            with pytest.raises(AssertionError, match="the hub says ''"):
                await anyio.to_thread.run_sync(place.start)
            assert "the keeper of this state directory does not answer" in place.said()
            assert place.stop_hub() == 1
        async with Hive(await anyio.to_thread.run_sync(place.start)) as hive:
            assert (await (await hive.attach("first")).call("echo", text="x")).structured == {"text": "x"}
        assert place.stop_hub() == 0
