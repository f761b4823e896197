"""Replicas without a common disk: one backend and one Redis are all that they share, and Redis may forget."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
from mcp.client import Client
from pydantic import SecretStr

from ash_hub.app import Hive, open_hive
from ash_hub.backends.documents import DocumentKind
from ash_hub.backends.memory import MemoryBackend
from ash_hub.bench.standin import make_tools, standing_in
from ash_hub.settings import HubSettings
from ash_mcp import Hive as SdkHive
from ash_mcp.errors import AshError
from ash_mcp.types import Endpoint, SandboxSpec
from ash_mcp.wire import FAILURE_META_KEY
from ash_router.admission.api_keys import KeyFile
from tests.hub.backends.local.local_parts import needs_isolation
from tests.redis_server import RedisServer
from tests.system.crash_parts import home

pytestmark = [pytest.mark.anyio, pytest.mark.redis, pytest.mark.heavy]

TTL_SECONDS = 5
SWEEPS_SECONDS = 15.0


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"use_uvloop": True}


@pytest.fixture
async def backend(folder: Path) -> AsyncGenerator[MemoryBackend]:
    async def serve(spec: SandboxSpec) -> Endpoint:
        del spec
        return Endpoint(unix=socket)

    socket = str(folder / "sandbox")
    async with standing_in(socket, make_tools(3)), MemoryBackend(serve) as backend:
        yield backend


class Disks:
    """Opens replicas that have a disk each."""

    def __init__(self, folder: Path, redis: RedisServer) -> None:
        self._folder = folder
        self._redis = redis

    @asynccontextmanager
    async def replica(self, name: str, backend: MemoryBackend, /, **given: Any) -> AsyncGenerator[Hive]:
        state = self._folder / name
        url = SecretStr(self._redis.url)
        settings = HubSettings(port=0, state_dir=state, run_dir=state / "run", redis_url=url, keep=True, **given)
        async with open_hive(settings, backend.another()) as hive:
            yield hive


@pytest.fixture
def disks(folder: Path, redis: RedisServer) -> Disks:
    return Disks(folder, redis)


async def call(url: str, name: str, **arguments: Any) -> Any:
    async with Client(url) as client:
        return await client.call_tool(name, arguments)


async def tools(url: str) -> set[str]:
    async with Client(url, cache=None) as client:
        return {tool.name for tool in (await client.list_tools()).tools}


async def sessions(url: str) -> dict[str, Any]:
    result = await call(url, "list", include_ended=True)
    return {sandbox["session"]: sandbox for sandbox in result.structured_content["sandboxes"]}


async def ended(url: str, session: str) -> Any:
    """Return what is said of a sandbox once it has ended."""
    with anyio.fail_after(TTL_SECONDS + SWEEPS_SECONDS):
        while (found := (await sessions(url))[session])["reason"] is None:
            await anyio.sleep(0.1)
    return found


@pytest.mark.parametrize("is_flushed", [False, True], ids=["", "flushed"])
async def test_a_replica_that_never_saw_the_maker_lists_calls_and_ends(
    disks: Disks, backend: MemoryBackend, redis: RedisServer, is_flushed: bool
) -> None:
    async with disks.replica("a", backend) as maker:
        made = (
            await call(maker.url, "spawn", recipe="echo", session="mine", ttl_seconds=TTL_SECONDS)
        ).structured_content
        ended_by_maker = (await call(maker.url, "spawn", recipe="echo", session="other")).structured_content
        await call(maker.url, "destroy", session="other")
    if is_flushed:
        redis.ask("FLUSHALL")
    async with disks.replica("b", backend) as other:
        assert {f"mine_tool_{number}" for number in range(3)} <= await tools(other.url)
        said = await call(other.url, "mine_tool_1", text="hi")
        assert not said.is_error and said.content[0].text == "hello"
        shown = await sessions(other.url)
        assert shown["mine"]["sandbox_id"] == made["sandbox_id"]
        if not is_flushed:  # which takes the reasons
            assert shown["other"]["sandbox_id"] == ended_by_maker["sandbox_id"]
            assert shown["other"]["reason"] == "destroyed"
        assert (await ended(other.url, "mine"))["reason"] == "ttl_expired"
        assert await backend.list() == []
        gone = await call(other.url, "mine_tool_1", text="hi")
        assert gone.is_error and gone.meta[FAILURE_META_KEY]["data"]["reason"] == "ttl_expired"


async def test_replicas_at_once_serve_what_the_other_made(disks: Disks, backend: MemoryBackend) -> None:
    async with disks.replica("a", backend) as a, disks.replica("b", backend) as b:
        await call(a.url, "spawn", recipe="echo", session="one")
        assert "one_tool_0" in await tools(b.url)
        await call(b.url, "spawn", recipe="echo", session="two")
        for hive in (a, b):
            assert {"one_tool_0", "two_tool_0"} <= await tools(hive.url)
            for session in ("one", "two"):
                assert not (await call(hive.url, f"{session}_tool_2", text="x")).is_error
        await call(b.url, "destroy", session="one")
        assert (await sessions(a.url))["one"]["reason"] == "destroyed"


async def test_keys_that_the_backend_keeps_are_known_and_revoked_on_every_replica(
    disks: Disks, backend: MemoryBackend, tmp_path: Path
) -> None:
    file, documents = KeyFile(tmp_path / "keys.json"), backend.documents
    _, key = file.add(name="old")
    before = await anyio.Path(file.path).read_bytes()

    async def admitted(hive: Hive) -> bool:
        try:
            async with SdkHive(hive.url, token=key) as client:
                await client.list()
        except AshError:
            return False
        return True

    kind = {"kind": "elsewhere"}  # whose keys are not a file of this machine
    async with disks.replica("a", backend, backend=kind) as a, disks.replica("b", backend, backend=kind) as b:
        assert not await admitted(a)
        await documents.replace(DocumentKind.KEYS, "keys", before, instead_of=None)
        with anyio.fail_after(5):
            while not (await admitted(a) and await admitted(b)):
                await anyio.sleep(0.05)
        file.revoke(["old"])
        after = await anyio.Path(file.path).read_bytes()
        await documents.replace(DocumentKind.KEYS, "keys", after, instead_of=before)
        with anyio.fail_after(5):
            while await admitted(a) or await admitted(b):
                await anyio.sleep(0.05)


@needs_isolation
async def test_after_a_flush_and_a_restart_of_every_hub_each_sandbox_has_its_tools(redis: RedisServer) -> None:
    with home(ASH_HUB_REDIS_URL=redis.url) as place:
        urls = [await anyio.to_thread.run_sync(place.start) for _ in range(2)]
        for url, recipe, session in zip(urls, ("echo", "general"), ("mine", "other"), strict=True):
            assert not (await call(url, "spawn", recipe=recipe, session=session)).is_error
        before = {name for name in await tools(urls[0]) if name.startswith(("mine_", "other_"))}
        assert "mine_echo" in before and any(name.startswith("other_") for name in before)
        for _ in urls:
            place.kill_hub()
        redis.ask("FLUSHALL")
        for _ in range(2):
            url = await anyio.to_thread.run_sync(place.start)
            assert {name for name in await tools(url) if name.startswith(("mine_", "other_"))} == before
            said = await call(url, "mine_echo", text="hi")
            assert said.structured_content == {"text": "hi"}
        for _ in urls:
            assert await anyio.to_thread.run_sync(place.stop_hub) == 0
        assert place.remains() == []
