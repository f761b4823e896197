"""A whole hive whose sandbox is open while it is set up and closed afterwards, across a restart of the hive too."""

from __future__ import annotations

import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from ash_hub.app import Hive as ServedHive
from ash_hub.app import open_hive
from ash_hub.serving.auth import key_file
from ash_hub.settings import HubSettings
from ash_mcp import Hive, Sandbox
from ash_mcp.errors import PermissionDenied, Unauthenticated
from ash_mcp.types import DEFAULT_SCOPE, Principal
from ash_router.upstream.call_tokens import CallTokens, load_hive_key
from tests.hub.backends.local.local_parts import needs_isolation
from tests.hub.egress.egress_parts import web_server

pytestmark = [pytest.mark.anyio, pytest.mark.heavy, pytest.mark.timeout(120), needs_isolation]

PAGE = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 12\r\n\r\nfrom outside"
TUNNEL = "exec 3<>/dev/tcp/127.0.0.1/3128; printf 'CONNECT {0} HTTP/1.1\\r\\nHost: {0}\\r\\n\\r\\n' >&3; cat <&3"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@asynccontextmanager
async def serving(folder: Path, *, keep: bool = False) -> AsyncGenerator[ServedHive]:
    settings = HubSettings(
        port=0, state_dir=folder / "state", run_dir=folder / "run", allow_named_addresses=True, keep=keep
    )
    async with open_hive(settings) as hive:
        yield hive


async def fetched(box: Sandbox, url: str) -> str:
    return (await box.call("fetch_fetch", url=url)).text


async def test_a_sandbox_is_closed_after_set_up_and_only_its_owner_opens_it_again(folder: Path) -> None:
    keys = key_file(folder / "state")
    _, owners = keys.add(subject="ann")
    _, narrow = keys.add(subject="ann", spawn_policy='{"network":["only.test"]}')
    async with web_server(PAGE) as (port, heads):
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(20)
            target = f"127.0.0.1:{server.getsockname()[1]}"
            url, policy = f"http://web.test:{port}/", [f"web.test=127.0.0.1:{port}", target]
            async with serving(folder, keep=True) as served, Hive(served.url, token=owners) as hive:
                box = await hive.spawn("general", network=policy, session="work")
                assert list(box.info.network) == policy and "from outside" in await fetched(box, url)
                job = await box.background(TUNNEL.format(target))
                outside, _ = await anyio.to_thread.run_sync(server.accept)
                with outside:
                    outside.settimeout(20)
                    assert (await box.set_network("none")).network == "none"
                    with anyio.fail_after(5):
                        assert await anyio.to_thread.run_sync(outside.recv, 1) == b""
                assert (await job.wait(timeout_seconds=20)).exit_code == 0
                await refused_to_others(served, box, narrow, folder)
                assert "egress refused: no_network; policy: none" in await fetched(box, url)
                await box.set_network(policy)
                assert "from outside" in await fetched(box, url)
                await box.set_network("none")
                reached = len(heads)
            async with serving(folder) as served, Hive(served.url, token=owners) as hive:
                box = await hive.attach("work")
                assert box.info.network == "none"
                assert "egress refused: no_network; policy: none" in await fetched(box, url)
                assert len(heads) == reached
                await box.set_network(policy)
                assert "from outside" in await fetched(box, url)


async def refused_to_others(served: ServedHive, box: Sandbox, narrow: str, folder: Path) -> None:
    """See that neither who holds only this sandbox, nor its call token, nor a key that allows less widens it."""
    with pytest.raises(PermissionDenied, match="for one sandbox only"):
        holder = Principal("holder", sandbox=box.id)
        await served.sandboxes.set_network(holder, DEFAULT_SCOPE, box.id, "internet")
    minted = CallTokens(load_hive_key(folder / "state" / "hive.key")).mint(box.id).decode()
    async with Hive(served.url, token=minted) as of_sandbox:
        with pytest.raises(Unauthenticated):
            await of_sandbox.set_network(box.id, "internet")
    async with Hive(served.url, token=narrow) as of_narrow_key:
        with pytest.raises(PermissionDenied, match=r"with your key; allowed: only\.test"):
            await of_narrow_key.set_network(box.id, "internet")


async def test_the_recipe_general_has_the_internet_unless_the_hive_allows_less(folder: Path) -> None:
    async with serving(folder) as served, Hive(served.url) as hive:
        assert (await hive.spawn("general", session="open")).info.network == "internet"
    settings = HubSettings(
        port=0,
        state_dir=folder / "state",
        run_dir=folder / "run",
        spawn={"network": "none"},  # type: ignore[arg-type]
    )
    async with open_hive(settings) as served, Hive(served.url) as hive:
        box = await hive.spawn("general")
        why = "network: none, because this hive allows none (its recipe asks for internet)"
        assert box.info.network == "none" and f"it started with {why}" in box.info.warnings
        assert f"this sandbox has {why}, so nothing on the web" in await fetched(box, "http://web.test/")
