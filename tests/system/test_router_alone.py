"""A router without a hub, beside a real hive on one Redis: it serves sandboxes and nothing else."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any, Final

import anyio
import httpx
import pytest
from anyio import to_thread
from mcp.client import Client
from pydantic import SecretStr

from ash_hub.app import Hive, open_hive
from ash_hub.backends.memory import MemoryBackend
from ash_hub.bench.wire import modern_call
from ash_hub.router_alone import Router, open_router
from ash_hub.settings import HubSettings
from ash_mcp.types import Endpoint, SandboxSpec
from ash_router.upstream.call_tokens import load_hive_key
from tests.image_server import running_image
from tests.redis_server import RedisServer, running_redis

HELLO: Final = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "initialize",
    "params": {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}},
}
pytestmark = [pytest.mark.anyio, pytest.mark.redis, pytest.mark.heavy]


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"use_uvloop": True}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with running_redis(tmp_path) as server:
        yield server


def settings(folder: Path, server: RedisServer, run: str) -> HubSettings:
    return HubSettings(port=0, state_dir=folder / "s", run_dir=folder / run, redis_url=SecretStr(server.url))


@pytest.fixture
async def hive(folder: Path, server: RedisServer) -> AsyncGenerator[Hive]:
    async with open_hive(settings(folder, server, "r")) as hive:
        yield hive


@pytest.fixture
async def router(folder: Path, server: RedisServer, hive: Hive) -> AsyncGenerator[Router]:
    async with open_router(settings(folder, server, "q")) as router:
        yield router


async def post(router: Router, name: str, session: str | None = None) -> httpx.Response:
    """Call a tool in the stateless era, by a session header where there is one."""
    headers = {} if session is None else {"x-session-id": session}
    raw = modern_call("tools/call", {"name": name, "arguments": {"text": "hello"}}, headers)
    head, _, body = raw.partition(b"\r\n\r\n")
    lines = [line.split(": ", 1) for line in head.decode().split("\r\n")[1:]]
    sent = {key: value for key, value in lines if key.lower() not in ("host", "content-length")}
    async with httpx.AsyncClient(timeout=20) as http:
        return await http.post(router.url, content=body, headers=sent)


async def spawn(hive: Hive) -> Any:
    async with Client(hive.url) as client:
        result = await client.call_tool("spawn", {"recipe": "echo"})
    assert result.structured_content is not None, result.content
    return result.structured_content


async def test_a_uuid_of_the_seed_is_good_here_too(hive: Hive, router: Router):
    async with httpx.AsyncClient(timeout=30) as http:
        asked = {"image": "timemagic/rl-mcp:general-1.7"}
        made = (await http.post(hive.url.replace("/mcp", "/spawn"), json=asked)).json()
    answer = await post(router, "terminal-controller_execute_command", made["uuid"])
    assert answer.status_code == 200 and answer.headers["ash-origin"] == "sandbox"


async def test_what_was_just_spawned_is_called_at_once_by_every_door(hive: Hive, router: Router):
    made = await spawn(hive)
    for name, session in (
        (f"{made['session']}_echo", None),
        ("echo", made["session"]),
        ("echo", made["sandbox_id"]),
    ):
        answer = await post(router, name, session)
        assert (answer.status_code, answer.headers["ash-origin"]) == (200, "sandbox"), answer.text
        assert "hello" in answer.text


async def test_without_a_session_it_says_what_is_missing_and_of_an_unknown_one_that_there_is_none(router: Router):
    answer = await post(router, "echo")
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("missing session header")
    for unknown in ("sb77", "sbx-nobody"):
        answer = await post(router, "echo", unknown)
        assert (answer.status_code, answer.json()["error"]["message"]) == (404, "route not found")


async def test_without_redis_the_known_are_called_and_of_the_others_nothing_is_claimed(
    hive: Hive, router: Router, server: RedisServer
):
    made = await spawn(hive)
    assert (await post(router, "echo", made["session"])).status_code == 200
    await to_thread.run_sync(server.stop)
    assert (await post(router, "echo", made["session"])).status_code == 200
    with anyio.fail_after(5):
        answer = await post(router, "echo", "sb77")
    error = answer.json()["error"]
    assert (answer.status_code, error["kind"], error["retryable"]) == (503, "connect_failed", True)
    await to_thread.run_sync(server.start)


OWN = """
name = "own"
description = "A server by itself."
image = "own:1"
[server.image]
port = 3000
path = "/serve"
"""


async def test_a_server_without_a_runner_is_not_dialled_while_no_hub_hears_of_its_sandboxes(
    folder: Path, server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def serve(_: SandboxSpec) -> Endpoint:
        return Endpoint(host="127.0.0.1", port=image.port, server_path="/serve")

    (folder / "own").mkdir()
    (folder / "own" / "recipe.toml").write_text(OWN)
    backend, asked = MemoryBackend(serve), settings(folder, server, "r")
    load_hive_key(asked.state_dir / "hive.key")
    own = asked.model_copy(update={"recipe_dirs": (folder / "own",)})
    async with running_image() as image, open_hive(own, backend) as hive:
        async with open_router(settings(folder, server, "q")) as router, Client(hive.url) as client:
            await client.call_tool("spawn", {"recipe": "own", "session": "box"})

            async def called() -> httpx.Response:
                async with httpx.AsyncClient(timeout=20) as http:
                    headers = {"x-session-id": "box", "accept": "application/json, text/event-stream"}
                    return await http.post(router.url, json=HELLO, headers=headers)

            with anyio.fail_after(10):
                while (answer := await called()).status_code != 200:  # it has yet to hear of the hub
                    assert "no hub hears of its sandboxes" in answer.text
            monkeypatch.setattr(backend, "unready", lambda: "the cluster is away")
            with anyio.fail_after(10):
                while (answer := await called()).status_code == 200:
                    await anyio.sleep(0.05)
            error = answer.json()["error"]
            assert (answer.status_code, error["kind"], error["retryable"]) == (502, "connect_failed", True)
            assert "cannot see now whether its address is still its own (no hub hears" in error["message"]
