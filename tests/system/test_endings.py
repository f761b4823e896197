"""How things end: a graceful stop, a sandbox that dies under a call, and what is left."""

from __future__ import annotations

import os
import signal
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import httpx
import pytest

from ash_hub.app import Hive, open_hive
from ash_hub.settings import HubSettings
from ash_mcp import Hive as Client
from ash_mcp.errors import AshError, SandboxGone, StreamBroken
from ash_mcp.sandbox import Sandbox
from tests.hub.backends.local.local_parts import descendants, needs_isolation
from tests.system.crash_parts import home

pytestmark = [pytest.mark.anyio, pytest.mark.heavy]

ACCEPT = "application/json, text/event-stream"
META = {
    "io.modelcontextprotocol/protocolVersion": "2026-07-28",
    "io.modelcontextprotocol/clientInfo": {"name": "test", "version": "1"},
    "io.modelcontextprotocol/clientCapabilities": {},
}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def settings(folder: Path, **given: Any) -> HubSettings:
    return HubSettings(port=0, state_dir=folder / "state", run_dir=folder / "run", **given)


async def until_called(hive: Hive, box: Sandbox) -> None:
    """Return when a call to a sandbox is in flight."""
    with anyio.fail_after(10):
        while not hive.in_flight(box.id):
            await anyio.sleep(0.01)


async def failing_call(box: Sandbox, failures: list[AshError], **arguments: Any) -> None:
    try:
        await box.call("slow", **arguments)
    except AshError as error:
        failures.append(error)


async def test_a_graceful_stop_ends_calls_in_flight_with_a_typed_failure(folder: Path) -> None:
    failures: list[AshError] = []
    async with anyio.create_task_group() as group:
        async with open_hive(settings(folder)) as hive:
            client = await Client(hive.url).__aenter__()
            box = await client.spawn("echo")
            group.start_soon(lambda: failing_call(box, failures, steps=1, seconds=60))
            await until_called(hive, box)
        with anyio.fail_after(5):
            while not failures:
                await anyio.sleep(0.01)
        await client.__aexit__(None, None, None)
    (failure,) = failures
    assert isinstance(failure, SandboxGone) and not failure.trainable
    assert failure.data["reason"] == "hive_stopped"
    assert not list((folder / "run").rglob("*.sock"))


async def test_calls_and_spawns_that_have_begun_come_to_their_end_where_sandboxes_stay(folder: Path) -> None:
    said: list[Any] = []
    async with anyio.create_task_group() as group, AsyncExitStack() as clients:
        async with open_hive(settings(folder, keep=True)) as hive:
            client = await clients.enter_async_context(Client(hive.url))
            box = await client.spawn("echo")

            async def call() -> None:
                said.append((await box.call("slow", steps=1, seconds=2)).structured)

            async def spawn() -> None:
                said.append((await client.spawn("echo")).session)

            group.start_soon(call)
            await until_called(hive, box)
            group.start_soon(spawn)
            with anyio.fail_after(10):
                while len(hive.sandboxes.registry.living()) < 2:
                    await anyio.sleep(0.001)
    assert sorted(map(str, said)) == ["sb2", "{'steps': 1}"]
    async with open_hive(settings(folder)) as hive, Client(hive.url) as client:  # which ends them when it stops
        assert {info.session for info in await client.list()} == {"sb1", "sb2"}


async def test_a_call_that_outlasts_the_stop_of_a_hive_does_not_say_that_its_sandbox_is_gone(folder: Path) -> None:
    failures: list[AshError] = []
    async with anyio.create_task_group() as group, AsyncExitStack() as clients:
        async with open_hive(settings(folder, keep=True, drain_seconds=0.5)) as hive:
            client = await clients.enter_async_context(Client(hive.url))
            box = await client.spawn("echo")
            group.start_soon(lambda: failing_call(box, failures, steps=1, seconds=60))
            await until_called(hive, box)
    assert isinstance(failures[0], StreamBroken) and not failures[0].trainable
    async with open_hive(settings(folder)) as hive, Client(hive.url) as client:
        assert [info.session for info in await client.list()] == ["sb1"]


async def begin_session(client: httpx.AsyncClient, url: str) -> dict[str, str]:
    """Return the headers of a session of the handshake era."""
    hello = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}}
    message = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": hello}
    response = await client.post(url, headers={"accept": ACCEPT}, json=message)
    return {"mcp-session-id": response.headers["mcp-session-id"], "mcp-protocol-version": "2025-11-25"}


@pytest.mark.parametrize("era", ["2025-11-25", "2026-07-28"])
async def test_whoever_only_listens_does_not_hold_a_stop(folder: Path, era: str) -> None:
    params = {"notifications": {"toolsListChanged": True}, "_meta": META}
    listen = {"jsonrpc": "2.0", "id": 1, "method": "subscriptions/listen", "params": params}
    modern = {"mcp-protocol-version": era, "mcp-method": "subscriptions/listen"}
    async with httpx.AsyncClient(timeout=30) as client, AsyncExitStack() as stack:
        async with open_hive(settings(folder)) as hive:
            if era == "2026-07-28":
                asked = client.stream("POST", hive.url, headers={**modern, "accept": ACCEPT}, json=listen)
            else:
                session = await begin_session(client, hive.url)
                asked = client.stream("GET", hive.url, headers={**session, "accept": "text/event-stream"})
            assert (await stack.enter_async_context(asked)).status_code == 200
            began = anyio.current_time()
        assert anyio.current_time() - began < 3  # and not the 5 s that a call may take to end


async def test_kept_sandboxes_wait_for_the_next_hive(folder: Path) -> None:
    async with open_hive(settings(folder, keep=True)) as hive, Client(hive.url) as client:
        box = await client.spawn("echo", session="kept")
        await box.files.write("note", "still here")
    async with open_hive(settings(folder)) as hive, Client(hive.url) as client:
        again = await client.attach("kept")
        assert again.id == box.id
        assert await again.files.read("note") == "still here"


async def test_a_sandbox_that_dies_ends_its_calls_soon_with_its_reason(folder: Path) -> None:
    failures: list[AshError] = []
    async with open_hive(settings(folder)) as hive, Client(hive.url) as client:
        box = await client.spawn("echo")
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: failing_call(box, failures, steps=1, seconds=60))
            await until_called(hive, box)
            await hive.backend.delete(box.id, grace_seconds=0)
            with anyio.fail_after(5):
                while not failures:
                    await anyio.sleep(0.01)
        (info,) = await client.list(include_ended=True)
        assert info.state == "failed" and info.reason == "process_died"
        with pytest.raises(SandboxGone, match="its main process died"):
            await box.call("echo", text="x")
    (failure,) = failures
    assert not failure.trainable and not failure.retryable


@needs_isolation
async def test_a_hive_that_starts_after_a_crash_knows_why_sandboxes_ended() -> None:
    with home() as place:
        async with Client(await anyio.to_thread.run_sync(place.start)) as client:
            for name in ("destroyed", "died"):
                await client.spawn("echo", session=name)
            await client.destroy("destroyed")
        place.kill_hub()
        for process in descendants(place.known_keeper()):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        async with Client(await anyio.to_thread.run_sync(place.start)) as client:
            for name, reason in (("destroyed", "destroyed"), ("died", "process_died")):
                with pytest.raises(SandboxGone) as gone:
                    await client.attach(name)
                assert gone.value.data["reason"] == reason
            assert {it.session: it.reason for it in await client.list(include_ended=True)} == {
                "destroyed": "destroyed",
                "died": "process_died",
            }
            assert await client.list() == []
        assert place.stop_hub() == 0
        assert place.remains() == []
