"""Connections to endpoints on TCP: by literal addresses, and to hosts that vanish."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from ash_mcp.types import Endpoint, SandboxId
from tests.router.relay_parts import CALL, modern, open_rig, route_to
from tests.router.sandbox_parts import Script, read_request, response

SILENT_HOST = Path(__file__).with_name("silent_host.py")
SILENT_SECONDS = 4


@asynccontextmanager
async def listening(host: str, script: Script) -> AsyncGenerator[Endpoint]:
    """Run `script` on every connection to a port of `host`."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await script(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the relay hung up
        finally:
            writer.close()

    server = await asyncio.start_server(serve, host, 0)
    async with server:
        yield Endpoint(host=host, port=server.sockets[0].getsockname()[1], proves=False)


@pytest.mark.parametrize(
    ("endpoint", "authority"),
    [
        (Endpoint(unix="/x"), "sandbox"),
        (Endpoint(host="10.0.0.1", port=80), "10.0.0.1:80"),
        (Endpoint(host="fd00::1", port=80), "[fd00::1]:80"),
        (Endpoint(host="fe80::1%eth0", port=80), "[fe80::1]:80"),
    ],
)
def test_an_authority_is_as_a_host_header_wants_it(endpoint: Endpoint, authority: str) -> None:
    assert endpoint.authority == authority


@pytest.mark.anyio
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_a_sandbox_at_an_address_is_named_by_it_and_only_its_own_connections_are_used_again(
    host: str, tmp_path: Path
) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            headers, _ = await read_request(reader)
            hosts.append(headers["host"])
            writer.write(response(b"{}"))

    hosts: list[str] = []
    async with listening(host, script) as endpoint, open_rig(tmp_path) as rig, rig.connect() as wire:
        route = replace(route_to(tmp_path), endpoint=endpoint)
        await rig.routes.bind(route)
        for request in (CALL, modern("add", more="x-session-id: sb1\r\n")):
            await wire.send(request)
            assert (await wire.answer())[0] == 200
        authority = f"[{host}]:{endpoint.port}" if ":" in host else f"{host}:{endpoint.port}"
        assert hosts == [authority, authority]
        pool = rig.relay.services.upstreams
        assert pool.take_idle(endpoint.of(SandboxId("sbx-other"))) is None
        connection = pool.take_idle(endpoint.of(route.sandbox_id))
        assert connection is not None
        connection.close()


@pytest.mark.skipif(shutil.which("unshare") is None or shutil.which("ip") is None, reason="needs unshare and ip")
@pytest.mark.heavy
@pytest.mark.parametrize("what", ["idle", "sent", "full", "stopped"])
def test_a_host_that_vanishes_is_noticed_and_a_process_that_reads_nothing_is_waited_for(what: str) -> None:
    """In a network namespace of its own, whose link is taken down under a request."""
    apart = ["unshare", "-n"] if os.geteuid() == 0 else ["unshare", "-Urn"]
    if subprocess.run([*apart, "true"], capture_output=True, timeout=10, check=False).returncode != 0:
        pytest.skip("this host gives no network namespaces")
    done = subprocess.run(
        [*apart, sys.executable, str(SILENT_HOST), what, str(SILENT_SECONDS)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    if what == "stopped":
        assert done.stdout == "never"
    else:
        assert float(done.stdout) < 3 * SILENT_SECONDS
