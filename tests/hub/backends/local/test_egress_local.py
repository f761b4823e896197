"""Local sandboxes with a network policy: their only way out is the hive's egress proxy, which the keeper owns."""

from __future__ import annotations

import json
import logging
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest

from ash_hub.backends.base import Instance
from ash_hub.backends.local import LocalBackend
from ash_hub.backends.local.paths import hive_paths
from ash_mcp.errors import ConfigError
from ash_mcp.types import new_sandbox_id
from tests.hub.backends.local.local_parts import (
    SPEC,
    WAIT_SECONDS,
    bash,
    ended,
    keeper_pid,
    local_backend,
    needs_isolation,
    proxies,
    python,
    settings_in,
    stand_in,
)
from tests.hub.egress.egress_parts import error_of, web_server

pytestmark = [pytest.mark.anyio, needs_isolation]

ASK = """
import socket, sys
proxy = socket.socket(socket.AF_UNIX)
proxy.connect("/run/ash-egress/proxy.sock")
proxy.sendall({request!r})
sys.stdout.write(proxy.makefile("rb").read().decode())
"""


async def spawned(backend: LocalBackend, *network: str) -> Instance:
    return await backend.create(replace(SPEC, id=new_sandbox_id(), network=network or "internet"))


async def asked(box: Instance, url: str) -> bytes:
    """Send a request to the proxy from inside."""
    request = f"GET {url} HTTP/1.1\r\nHost: {url.split('/')[2]}\r\n\r\n".encode()
    done = await python(box, ASK.format(request=request))
    assert done.code == 0, done.error
    return done.out.encode()


async def test_a_sandbox_reaches_what_its_policy_names_and_another_does_not(root: Path) -> None:
    async with web_server() as (port, heads), local_backend(root) as backend:
        allowed = await spawned(backend, f"web.test=127.0.0.1:{port}")
        other, public = await spawned(backend, "example.com"), await spawned(backend)
        assert (await asked(allowed, f"http://web.test:{port}/")).endswith(b"\r\n\r\nok")
        assert error_of(await asked(other, f"http://web.test:{port}/"))["reason"] == "not_listed"
        assert error_of(await asked(public, f"http://127.0.0.1:{port}/"))["reason"] == "port"
        assert error_of(await asked(public, "http://127.0.0.1/"))["reason"] == "loopback"
        assert len(heads) == 1
        assert len(proxies(keeper_pid(backend))) == 1


async def test_there_is_no_way_out_beside_the_proxy(root: Path) -> None:
    async with web_server() as (port, heads), local_backend(root) as backend:
        box = await spawned(backend, f"127.0.0.1:{port}")
        done = await bash(box, f"cat /proc/net/dev; exec 3<>/dev/tcp/127.0.0.1/{port}")
        assert [line.split(":")[0].strip() for line in done.out.splitlines()[2:]] == ["lo"]
        assert done.code != 0 and "refused" in done.error
    assert heads == []


async def test_the_socket_s_directory_holds_only_its_own_and_cannot_be_changed(root: Path) -> None:
    async with local_backend(root) as backend:
        box, _ = await spawned(backend), await spawned(backend)
        done = await bash(box, "cd /run/ash-egress; ls -A; rm proxy.sock || mv proxy.sock x || touch y || chmod 777 .")
        assert done.out == "proxy.sock\n" and done.code != 0
        assert done.error.count("Read-only file system") == 4
        closed = await backend.create(replace(SPEC, id=new_sandbox_id()))
        assert (await bash(closed, "ls -A /run")).out.strip() in ("", "lock")
        assert keeper_pid(backend) and len(proxies(keeper_pid(backend))) == 1


async def test_no_proxy_runs_while_nobody_may_go_out(root: Path) -> None:
    async with local_backend(root) as backend:
        await backend.create(replace(SPEC, id=new_sandbox_id()))
        assert proxies(keeper_pid(backend)) == []


async def test_decisions_are_in_the_sandbox_s_log_and_in_the_audit(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with local_backend(root) as backend:
        box, other = await spawned(backend, "example.com"), await spawned(backend, "example.com")
        with caplog.at_level(logging.INFO, "ash.audit"):
            await asked(box, "http://evil.org/")
            with anyio.fail_after(WAIT_SECONDS):
                while not caplog.records:
                    await anyio.sleep(0.001)
        logged = json.loads((await backend.logs(box.id)).splitlines()[-1])
        assert (
            logged["decision"] == "refused" and logged["reason"] == "not_listed" and logged["target"] == "evil.org:80"
        )
        assert b"evil" not in await backend.logs(other.id)
        line: dict[str, Any] = json.loads(caplog.records[0].getMessage())
        assert line["event"] == "egress" and line["outcome"] == "refused" and line["sandbox"] == box.id
        assert line["policy"] == "example.com" and line["at"].endswith("Z")


async def test_a_proxy_that_dies_is_started_again_for_the_same_sandboxes(root: Path) -> None:
    async with web_server() as (port, _), local_backend(root, hive_ports=(1,)) as backend:
        box = await spawned(backend, f"web.test=127.0.0.1:{port}", "hive.test=127.0.0.1:1")
        keeper = keeper_pid(backend)
        (first,) = proxies(keeper)
        os.kill(first, signal.SIGKILL)
        await ended(first)
        # Its socket stays, so the request waits there for the next one.
        assert (await asked(box, f"http://web.test:{port}/")).endswith(b"\r\n\r\nok")
        assert error_of(await asked(box, "http://hive.test:1/"))["reason"] == "hive"
        (second,) = proxies(keeper)
        assert second != first
        log = hive_paths(settings_in(root)).log_file
        assert log.read_text().startswith("egress proxy: it ended; a new one starts in ")
        log.write_text("")


async def test_the_proxy_ends_with_a_keeper_that_is_killed(root: Path) -> None:
    async with local_backend(root) as backend:
        box = await spawned(backend)
        await asked(box, "http://127.0.0.1/")
        keeper = keeper_pid(backend)
        (proxy,) = proxies(keeper)
        os.kill(proxy, signal.SIGSTOP)  # so that it is not by its own doing
        os.kill(keeper, signal.SIGKILL)
        with anyio.fail_after(2):
            await ended(keeper, proxy)


async def test_the_next_hub_s_port_is_out_of_reach_of_sandboxes_that_it_adopts(root: Path) -> None:
    async with web_server() as (port, heads):
        async with LocalBackend(settings_in(root), runtime=stand_in(), hive_ports=(1,)) as backend:
            box = await spawned(backend, f"hive.test=127.0.0.1:{port}")
            assert (await asked(box, f"http://hive.test:{port}/")).endswith(b"\r\n\r\nok")
        async with local_backend(root, hive_ports=(port,)) as backend:
            (adopted,) = await backend.list()
            assert error_of(await asked(adopted, f"http://hive.test:{port}/"))["reason"] == "hive"
    assert len(heads) == 1


@pytest.mark.parametrize("entry", ["127.0.0.1:8080", "web.test=10.0.0.7:443"])
async def test_a_hive_can_forbid_to_name_private_addresses(root: Path, entry: str) -> None:
    async with local_backend(root, private_egress=False) as backend:
        with pytest.raises(ConfigError, match="lets nobody name private addresses"):
            await spawned(backend, entry)
        await spawned(backend, "example.com", "1.1.1.1")
