"""A real hive on a real Redis that is emptied and stopped under it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import anyio
import httpx
import pytest
from mcp.client import Client
from pydantic import SecretStr

from ash_hub.app import Hive, open_hive
from ash_hub.settings import HubSettings
from ash_mcp.errors import ConfigError
from ash_mcp.wire import FAILURE_META_KEY
from tests.redis_server import RedisServer, running_redis

pytestmark = [pytest.mark.anyio, pytest.mark.redis, pytest.mark.heavy]


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"use_uvloop": True}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with running_redis(tmp_path, password="hidden") as server:
        yield server


def settings(folder: Path, server: RedisServer, **given: Any) -> HubSettings:
    url = SecretStr(f"redis://:hidden@127.0.0.1:{server.port}/1")
    return HubSettings(port=0, state_dir=folder / "s", run_dir=folder / "r", redis_url=url, **given)


@pytest.fixture
async def hive(folder: Path, server: RedisServer) -> AsyncGenerator[Hive]:
    async with open_hive(settings(folder, server)) as hive:
        yield hive


async def call(hive: Hive, name: str, **arguments: Any) -> Any:
    async with Client(hive.url) as client:
        return await client.call_tool(name, arguments)


async def spawn(hive: Hive, **arguments: Any) -> Any:
    return await call(hive, "spawn", recipe="echo", **arguments)


async def echoes(hive: Hive) -> bool:
    result = await call(hive, "sb1_echo", text="hello")
    return not result.is_error and "hello" in str(result.content)


async def readiness(hive: Hive, path: str = "/readyz") -> tuple[int, str]:
    async with httpx.AsyncClient() as client:
        answer = await client.get(urljoin(hive.url, path))
        return answer.status_code, answer.text


async def ready_again(hive: Hive) -> None:
    with anyio.fail_after(8):
        while (await readiness(hive))[0] != 200:
            await anyio.sleep(0.05)


def stored(server: RedisServer) -> list[str]:
    """Return the sandboxes to which Redis has a route."""
    import redis

    with redis.Redis(port=server.port, password="hidden", db=1, decode_responses=True) as client:
        answer: Any = client.hkeys("ash:routes")
        return list(answer)


async def test_what_a_flush_took_is_back_within_five_seconds_and_calls_go_on(hive: Hive, server: RedisServer):
    made = (await spawn(hive, idempotency_key="once")).structured_content
    assert stored(server) == [made["sandbox_id"]]
    server.ask("FLUSHALL")
    with anyio.fail_after(5):
        while stored(server) != [made["sandbox_id"]]:
            assert await echoes(hive)
    await ready_again(hive)
    again = (await spawn(hive, idempotency_key="once")).structured_content
    assert again["sandbox_id"] == made["sandbox_id"]
    other = (await spawn(hive)).structured_content
    assert other["session"] == "sb2"


async def test_while_redis_is_away_calls_and_ends_go_on_and_spawns_fail_retryable(hive: Hive, server: RedisServer):
    first = (await spawn(hive)).structured_content
    second = (await spawn(hive)).structured_content
    assert await readiness(hive) == (200, "ready")
    server.ask("SAVE")
    server.stop()
    assert await echoes(hive)
    with anyio.fail_after(5):
        failed = await spawn(hive)
    failure = failed.meta[FAILURE_META_KEY]
    assert failed.is_error and failure["retryable"] and failure["kind"] == "connect_failed"
    assert not failure["trainable"] and "hidden" not in str(failed)
    status, reason = await readiness(hive)
    assert status == 503 and "Redis at redis://127.0.0.1" in reason and "hidden" not in reason
    assert await readiness(hive, "/readyz/calls") == (200, "ready")
    with anyio.fail_after(8):
        ended = await call(hive, "destroy", session=second["session"])
    assert not ended.is_error
    server.start()
    await ready_again(hive)
    assert await echoes(hive)
    with anyio.fail_after(5):
        while stored(server) != [first["sandbox_id"]]:
            await anyio.sleep(0.05)
    await ready_again(hive)
    assert (await spawn(hive)).structured_content["session"] == "sb3"


async def test_a_hive_without_its_redis_does_not_start_and_says_why(folder: Path, server: RedisServer):
    server.stop()
    wanted = settings(folder, server)
    assert "hidden" not in repr(wanted)
    with pytest.raises(ConfigError, match=r"Redis at redis://127.0.0.1:\d+/1 cannot be used") as caught:
        async with open_hive(wanted):
            pass
    assert "hidden" not in caught.value.message


async def test_a_redis_that_evicts_is_said_at_readiness(folder: Path, server: RedisServer):
    server.ask("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    async with open_hive(settings(folder, server)) as hive:
        status, said = await readiness(hive)
    assert status == 200 and "maxmemory-policy allkeys-lru" in said
