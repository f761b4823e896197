"""The seed's gateway before a hive: it finds the hive's sandboxes in Redis and forwards to them, also with auth."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Mapping
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from pydantic import SecretStr

from ash_hub.app import Hive, open_hive
from ash_hub.bench.wire import modern_call
from ash_hub.lifecycle import controller
from ash_hub.serving.auth import key_file
from ash_hub.settings import HubSettings
from tests.redis_server import RedisServer, running_redis

pytestmark = [pytest.mark.anyio, pytest.mark.redis, pytest.mark.heavy]

IMAGE = "timemagic/rl-mcp:general-1.7"


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"use_uvloop": True}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with running_redis(tmp_path) as server:
        yield server


@pytest.fixture
def key(folder: Path) -> str:
    return key_file(folder / "s").add(subject="ann")[1]


@pytest.fixture
async def hive(folder: Path, server: RedisServer, key: str) -> AsyncGenerator[Hive]:
    """One that takes no one for its local user, as one that listens on the network does not."""
    redis = SecretStr(server.url)
    images = {"images": {"timemagic/rl-mcp:general-*": "echo"}}
    folders = {"state_dir": folder / "s", "run_dir": folder / "r"}
    async with open_hive(HubSettings(host="0.0.0.0", port=0, redis_url=redis, seed=images, **folders)) as hive:  # pyright: ignore[reportArgumentType]
        yield hive


def hash_of(server: RedisServer, uuid: str) -> Mapping[str, str]:
    return server.ask("HGETALL", f"sandbox:{uuid}")


async def rest(hive: Hive, key: str, method: str, path: str, **sent: Any) -> Any:
    near = hive.url.replace("0.0.0.0", "127.0.0.1").removesuffix("/mcp")
    async with httpx.AsyncClient(timeout=60, auth=(key, "")) as http:
        answer = await http.request(method, near + path, **sent)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def through_gateway(server: RedisServer, uuid: str, authorization: str | None) -> httpx.Response:
    """Call a tool as the seed's gateway forwards it: to the hash's address and `/mcp`, with the caller's headers."""
    found = hash_of(server, uuid)
    raw = modern_call("tools/call", {"name": "echo", "arguments": {"text": "hello"}}, {"x-session-id": uuid})
    head, _, body = raw.partition(b"\r\n\r\n")
    lines = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:])
    sent = {name: value for name, value in lines.items() if name.lower() not in ("host", "content-length")}
    sent |= {"x-forwarded-for": "192.0.2.7, 192.0.2.7", "x-forwarded-host": "gateway:80", "x-forwarded-proto": "http"}
    if authorization is not None:
        sent["authorization"] = authorization
    async with httpx.AsyncClient(timeout=20) as http:
        return await http.post(f"http://{found['host']}:{found['port']}/mcp", content=body, headers=sent)


@pytest.fixture
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller, "RESYNC_SECONDS", 0.1)


@pytest.mark.usefixtures("looks_often")
async def test_a_hash_that_the_seeds_control_plane_removed_comes_back(hive: Hive, server: RedisServer, key: str):
    uuid = (await rest(hive, key, "POST", "/spawn", json={"image": IMAGE, "name": "trainer"}))["uuid"]
    written = hash_of(server, uuid)
    server.ask("DEL", f"sandbox:{uuid}")
    with anyio.fail_after(20):
        while hash_of(server, uuid) != written:
            await anyio.sleep(0.05)


async def test_the_gateway_of_the_seed_reaches_a_hive_with_auth_by_its_callers_key(
    hive: Hive, server: RedisServer, key: str
):
    uuid = (await rest(hive, key, "POST", "/spawn", json={"image": IMAGE, "name": "trainer"}))["uuid"]
    port = hive.url.rpartition(":")[2].removesuffix("/mcp")
    written = {"uuid": uuid, "host": "127.0.0.1", "port": port, "status": "ready"}
    assert hash_of(server, uuid) == written

    answer = await through_gateway(server, uuid, f"Bearer {key}")
    assert (answer.status_code, answer.headers["ash-origin"]) == (200, "sandbox") and "hello" in answer.text
    assert (await through_gateway(server, uuid, None)).status_code == 401

    server.ask("FLUSHALL")
    with anyio.fail_after(20):
        while hash_of(server, uuid) != written:
            await anyio.sleep(0.05)

    await rest(hive, key, "DELETE", f"/deprovision/{uuid}")
    assert hash_of(server, uuid) == {}
