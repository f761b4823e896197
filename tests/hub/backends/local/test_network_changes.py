"""The network policy of a local sandbox is changed while it runs: what is open, what is new, and what is kept."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from ash_hub.backends.base import Instance
from ash_hub.backends.local import LocalBackend
from ash_hub.backends.local.paths import hive_paths
from ash_mcp.errors import ConnectFailed, Unsupported
from tests.hub.backends.local.local_parts import (
    WAIT_SECONDS,
    ended,
    keeper_pid,
    local_backend,
    needs_isolation,
    proxies,
    settings_in,
    stand_in,
)
from tests.hub.backends.local.test_egress_local import asked, spawned
from tests.hub.egress.egress_parts import error_of, web_server

pytestmark = [pytest.mark.anyio, needs_isolation]


@pytest.fixture
def server() -> Generator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as found:
        found.settimeout(WAIT_SECONDS)
        yield found


@contextmanager
def tunnel(root: Path, box: Instance, target: str) -> Generator[socket.socket]:
    """Open a tunnel through the sandbox's own proxy socket, as what runs in it would."""
    (path,) = root.glob(f"**/e/{box.id}/proxy.sock")
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(WAIT_SECONDS)
        client.connect(str(path))
        client.sendall(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode())
        assert client.recv(100).startswith(b"HTTP/1.1 200 ")
        yield client


async def test_a_narrower_policy_closes_open_tunnels_and_refuses_new_ones_until_it_is_widened(
    root: Path, server: socket.socket
) -> None:
    target = f"127.0.0.1:{server.getsockname()[1]}"
    async with web_server() as (port, _), local_backend(root) as backend:
        policy = (target, f"web.test=127.0.0.1:{port}")
        box = await spawned(backend, *policy)
        with tunnel(root, box, target) as client, server.accept()[0] as outside:
            client.sendall(b"ping")
            assert outside.recv(4) == b"ping"
            await backend.set_network(box.id, policy[1:], {}, revision=0)
            with anyio.fail_after(1):
                assert await anyio.to_thread.run_sync(outside.recv, 4) == b""
                assert await anyio.to_thread.run_sync(client.recv, 4) == b""
        assert (await asked(box, f"http://web.test:{port}/")).endswith(b"ok")
        await backend.set_network(box.id, "none", {}, revision=1)
        assert error_of(await asked(box, f"http://web.test:{port}/"))["reason"] == "no_network"
        await backend.set_network(box.id, policy, {}, revision=2)
        assert (await asked(box, f"http://web.test:{port}/")).endswith(b"ok")


async def test_a_new_proxy_and_a_new_hub_follow_the_policy_that_was_set_last(root: Path) -> None:
    async with web_server() as (port, heads):
        async with LocalBackend(settings_in(root), runtime=stand_in()) as backend:
            box = await spawned(backend, f"web.test=127.0.0.1:{port}")
            await backend.set_network(box.id, "none", {"network": "none"}, revision=0)
        async with local_backend(root) as backend:
            (adopted,) = await backend.list()
            assert (adopted.record, adopted.revision) == ({"network": "none"}, 1)
            assert error_of(await asked(adopted, f"http://web.test:{port}/"))["reason"] == "no_network"
            (proxy,) = proxies(keeper_pid(backend))
            os.kill(proxy, signal.SIGKILL)
            await ended(proxy)
            assert error_of(await asked(adopted, f"http://web.test:{port}/"))["reason"] == "no_network"
            hive_paths(settings_in(root)).log_file.write_text("")  # that it ended
    assert heads == []


@pytest.mark.heavy
async def test_a_proxy_that_does_not_answer_fails_the_change_but_follows_it_when_it_goes_on(
    root: Path,
) -> None:
    async with web_server() as (port, heads), local_backend(root) as backend:
        box = await spawned(backend, f"web.test=127.0.0.1:{port}")
        (proxy,) = proxies(keeper_pid(backend))
        os.kill(proxy, signal.SIGSTOP)
        try:
            with pytest.raises(ConnectFailed, match="the egress proxy does not answer"):
                await backend.set_network(box.id, "none", {"network": "none"}, revision=0)
        finally:
            os.kill(proxy, signal.SIGCONT)
        changed = await backend.get(box.id)
        assert changed is not None and changed.record == {"network": "none"}
        assert error_of(await asked(box, f"http://web.test:{port}/"))["reason"] == "no_network"
    assert heads == []


async def test_without_isolation_no_policy_is_said_to_hold(root: Path) -> None:
    async with local_backend(root, unsafe=True) as backend:
        box = await spawned(backend)
        with pytest.raises(Unsupported, match="without isolation"):
            await backend.set_network(box.id, "none", {}, revision=0)
