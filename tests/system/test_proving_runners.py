"""Real runners on TCP: they prove themselves, take sealed claims, and keep their key from what runs inside."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import httpx
import pytest
from anyio.abc import ByteStream, SocketAttribute
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ash_hub.spawning.file_copy import FilePlace, copy_file
from ash_hub.spawning.runner_client import RunnerClient
from ash_mcp.errors import ConnectFailed
from ash_mcp.types import Endpoint, SandboxId
from ash_router.upstream.call_tokens import CallTokens
from tests.recipes.runner_parts import ECHO, SANDBOX, Runner, running
from tests.recipes.test_runner_http import modern_call
from tests.recipes.test_runner_moments import GATED, SUBREAPER, wait_at
from tests.router.relay_parts import modern, open_rig, route_to, tool_call

pytestmark = pytest.mark.heavy

HIVE_KEY = Ed25519PrivateKey.generate()
TOKENS = CallTokens(HIVE_KEY)
ME = SandboxId(SANDBOX)
OURS: dict[str, Any] = {"port": True, "key": HIVE_KEY, "secret": TOKENS.sandbox_keys.of(ME)}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def endpoint_of(runner: Runner) -> Endpoint:
    host, _, port = runner.url.removeprefix("http://").rpartition(":")
    return Endpoint(host=host.strip("[]"), port=int(port))


def client_of(endpoint: Endpoint) -> RunnerClient:
    return RunnerClient(endpoint, TOKENS, ME)


@asynccontextmanager
async def overheard(endpoint: Endpoint) -> AsyncGenerator[tuple[Endpoint, bytearray]]:
    """The same by way of somebody who passes on every byte and keeps it."""
    kept = bytearray()

    async def copy(source: ByteStream, target: ByteStream) -> None:
        with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
            async for data in source:
                kept.extend(data)
                await target.send(data)
        await target.aclose()

    async def serve(here: ByteStream) -> None:
        assert endpoint.host is not None and endpoint.port is not None
        async with here, await anyio.connect_tcp(endpoint.host, endpoint.port) as there:
            async with anyio.create_task_group() as group:
                group.start_soon(copy, here, there)
                group.start_soon(copy, there, here)

    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener, anyio.create_task_group() as group:
        group.start_soon(listener.serve, serve)
        yield Endpoint(host="127.0.0.1", port=listener.extra(SocketAttribute.local_port)), kept
        group.cancel_scope.cancel()


@pytest.mark.anyio
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_a_runner_on_tcp_is_asked_listed_claimed_and_called(host: str, tmp_path: Path) -> None:
    with running(ECHO, host=host, **OURS) as runner:
        endpoint = endpoint_of(runner)
        client = client_of(endpoint)
        await client.wait_ready(30)
        assert "echo" in {tool["name"] for tool in await client.list_tools(30)}
        await client.claim({"WHO": "you"}, {}, 30)
        async with open_rig(tmp_path, tokens=TOKENS) as rig, rig.connect() as wire:
            await rig.routes.bind(replace(route_to(tmp_path), sandbox_id=ME, endpoint=endpoint))
            await wire.send(modern("sb1_whoami", tool_call("sb1_whoami")))
            assert json.loads((await wire.answer())[2])["result"]["structuredContent"] == {"who": "you"}


@pytest.mark.anyio
async def test_a_runner_proves_itself_while_its_recipe_is_still_imported(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    with running(GATED, {"GATE": str(gate)}, ready=False, **OURS) as runner:
        opened = await anyio.to_thread.run_sync(wait_at, gate)
        async with anyio.create_task_group() as group:
            group.start_soon(client_of(endpoint_of(runner)).wait_ready, 30)
            await anyio.sleep(0.2)
            os.close(opened)


@pytest.mark.anyio
async def test_the_runner_of_another_sandbox_gets_nothing() -> None:
    with running(ECHO, port=True, key=HIVE_KEY, secret=TOKENS.sandbox_keys.of(SandboxId("sbx-other"))) as runner:
        async with overheard(endpoint_of(runner)) as (endpoint, kept):
            with pytest.raises(ConnectFailed, match="did not prove"):
                await client_of(endpoint).claim({}, {"S": "s3cret"}, 30)
    assert b"ash-token" not in kept and b"s3cret" not in kept and b"sealed" not in kept


@pytest.mark.anyio
async def test_what_a_claim_brings_cannot_be_read_on_the_way_nor_come_otherwise() -> None:
    with running(ECHO, **OURS) as runner, runner.http() as http:
        plain = http.post("/_ash/claim", json={"env": {"WHO": "me"}})
        assert plain.status_code == 400 and "sealed" in plain.json()["error"]["message"]
        async with overheard(endpoint_of(runner)) as (endpoint, kept):
            await client_of(endpoint).claim({"WHO": "hidden-name"}, {"TOKEN": "s3cret-value"}, 30)
            await client_of(endpoint).claim({"WHO": "hidden-name"}, {"TOKEN": "s3cret-value"}, 30)  # no harm
        assert b"ash-token" in kept and b"sealed" in kept
        assert b"hidden-name" not in kept and b"s3cret-value" not in kept
        assert modern_call(http, "whoami")["structuredContent"] == {"who": "hidden-name"}


@pytest.mark.parametrize("launcher", [None, [sys.executable, "-c", SUBREAPER]], ids=["alone", "below a reaper"])
def test_the_keys_are_kept_from_what_runs_inside_and_from_proc(
    launcher: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASH_EGRESS_TOKEN", "t0ken-value")
    key = base64.b64encode(OURS["secret"])
    how: dict[str, Any] = OURS if launcher is None else {**OURS, "launcher": launcher}
    with running(ECHO, **how) as runner, runner.http() as http:
        found = modern_call(http, "ash_exec", {"command": "env; echo $PPID"})["structuredContent"]["stdout"]
        assert "PATH=" in found and "ASH_SANDBOX_KEY" not in found and key.decode() not in found
        assert "t0ken-value" not in found
        # not even root finds it there, of the process that serves or of the one that reaps
        for process in (runner.process.pid, int(found.split()[-1])):
            environ = Path(f"/proc/{process}/environ")
            if os.geteuid() == 0:
                assert b"ASH_SANDBOX_KEY=" in (shown := environ.read_bytes()) and key not in shown
                assert b"ASH_EGRESS_TOKEN=" in shown and b"t0ken-value" not in shown
            else:
                with pytest.raises(PermissionError):
                    environ.read_bytes()
        assert key not in runner.log.read_bytes()


@pytest.mark.anyio
async def test_files_of_a_runner_on_tcp_pass_the_door_and_from_one_to_the_other(tmp_path: Path) -> None:
    other = SandboxId("sbx-other")
    theirs: dict[str, Any] = {**OURS, "secret": TOKENS.sandbox_keys.of(other), "sandbox": other}
    data = os.urandom(3_000_000)
    with running(ECHO, **OURS) as runner, running(ECHO, **theirs) as second:
        async with open_rig(tmp_path, tokens=TOKENS) as rig, httpx.AsyncClient(timeout=30) as http:
            await rig.routes.bind(replace(route_to(tmp_path), sandbox_id=ME, endpoint=endpoint_of(runner)))
            door = rig.url.replace("/mcp", "/s/sb1/files/a/f")
            assert (await http.put(door, content=data)).status_code == 201
            assert (await http.get(door)).content == data
            archive = (await http.get(door.removesuffix("f"), params={"archive": "tar"})).content
            assert (await http.put(door.removesuffix("a/f") + "b/", content=archive)).json()["bytes"] == len(data)
        await RunnerClient(endpoint_of(second), TOKENS, other).wait_ready(30)
        source = FilePlace(ME, endpoint_of(runner), "b/f")
        assert await copy_file(source, FilePlace(other, endpoint_of(second), "c/f"), TOKENS) == len(data)
        assert (second.workspace / "c/f").read_bytes() == (runner.workspace / "b/f").read_bytes() == data
        for sandbox, place in ((other, endpoint_of(runner)), (ME, endpoint_of(second))):
            with pytest.raises(ConnectFailed, match="did not prove"):
                await copy_file(source, FilePlace(sandbox, place, "c/x"), TOKENS)


@pytest.mark.anyio
async def test_a_runner_on_tcp_leads_to_a_port_after_its_proof(tmp_path: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\ninside")
        await reader.read()
        writer.close()

    asked: list[bytes] = []
    with running(ECHO, **OURS) as runner:
        async with (
            await asyncio.start_server(serve, "127.0.0.1", 0) as server,
            open_rig(tmp_path, tokens=TOKENS) as rig,
            overheard(endpoint_of(runner)) as (between, kept),
            rig.connect() as wire,
        ):
            port = server.sockets[0].getsockname()[1]
            await rig.routes.bind(replace(route_to(tmp_path), sandbox_id=ME, endpoint=between, ports=(port,)))
            await wire.send(f"GET /s/sb1/ports/{port}/a HTTP/1.1\r\nhost: h\r\ncookie: c\r\n\r\n".encode())
            status, _, body = await wire.answer()
    assert (status, body) == (200, b"inside")
    assert asked[0].startswith(b"GET /a HTTP/1.1\r\n") and b"ash-token" not in asked[0] and b"cookie" not in asked[0]
    assert bytes(kept).index(b"GET /_ash/proof ") < bytes(kept).index(b"GET /_ash/ports/")
