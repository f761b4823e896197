"""The chart installed: a key, a sandbox that outlives an upgrade, the end; keys as every replica knows them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

import anyio
import anyio.to_thread
import httpx
import pytest

from ash_mcp.compat import SandboxClient, SandboxConfig
from tests.helm.chart import CHART
from tests.helm.cluster import done, kubectl
from tests.helm.installed import (
    HUBS,
    ROUTERS,
    Release,
    own_namespace,
    require_reachable,
    values,
    wait_until_known,
)
from tests.kubernetes.test_image_servers import RECIPE

pytestmark = [pytest.mark.anyio, pytest.mark.kubernetes, pytest.mark.timeout(420)]

KNOWN_SECONDS: Final = 2.0
"""In which every replica takes a new key, and refuses a revoked one."""


def test_a_hive_is_installed_used_upgraded_and_uninstalled() -> None:
    with own_namespace() as namespace:
        release, given = Release(namespace), values(namespace, test={"keySecret": {"name": "test-key"}})
        release.run("install", str(CHART), "--wait", values=given)
        release = Release(namespace, release.in_hub("ash", "key", "new"))
        named = ("create", "secret", "generic", "test-key", "--namespace", namespace)
        done(*named, f"--from-literal=token={release.key}")
        wait_until_known(release)
        release.run("test")
        assert not release.pods(namespace=release.sandboxes)

        def ash(*words: str) -> str:
            return release.in_hub("ash", *words, key=release.key)

        ash("spawn", "general", "--session", "kept")
        ash("exec", "kept", "--", "echo kept > /workspace/a")
        changed = {**given, "recipes": {"own": RECIPE}}
        release.run("upgrade", str(CHART), "--wait", values=changed)
        assert ash("exec", "kept", "--", "cat /workspace/a") == "kept"
        ash("spawn", "own", "--session", "own", "--env", "B=spawn")  # a server by itself
        assert ash("call", "own", "variable", "name=B") == "spawn"
        assert len(release.pods(namespace=release.sandboxes)) == 2

        release.run("uninstall", "--wait")
        assert not kubectl("get", "pods", "--namespace", release.sandboxes, "--output", "name").stdout


async def test_the_seeds_client_and_its_rest_work_through_the_services_it_knows(hive: Release) -> None:
    control_plane, gateway = hive.address("control-plane"), hive.address("gateway")
    spawns, calls = (url.replace("http://", f"http://{hive.key}@") for url in (control_plane, gateway))
    config = SandboxConfig(spawns, calls, env={"WHO": "seed"}, timeout=90, mcp_timeout=60)
    with SandboxClient(config) as client:
        assert client.health_check() and client.ready_check()
        sandbox = await anyio.to_thread.run_sync(client.spawn, "mine")
        async with client.connect() as mcp:
            said = await mcp.call_tool("terminal-controller_execute_command", {"command": "echo $WHO in $(hostname)"})
            assert "seed in sbx-" in str(said.content)
        bearer = {"authorization": f"Bearer {hive.key}"}
        async with httpx.AsyncClient(base_url=control_plane, headers=bearer, timeout=90) as rest:
            made = (await rest.post("/spawn", json={"image": "timemagic/rl-mcp:general-1.7"})).json()
            assert made["status"] == "Ready"
            assert len(hive.pods(namespace=hive.sandboxes)) == 2
            ended = await rest.delete(f"/deprovision/{made['uuid']}")
            assert ended.json() == {"message": "Deprovisioned", "uuid": made["uuid"]}
    assert sandbox.uuid.startswith("mine-") and not hive.pods(namespace=hive.sandboxes)


async def test_a_key_is_known_and_revoked_on_every_replica_within_two_seconds(
    hive: Release, record_property: Callable[[str, Any], None]
) -> None:
    pods = [*hive.pods(HUBS), *hive.pods(ROUTERS)]
    assert len(pods) == 3
    urls = [f"http://{pod['status']['podIP']}:8420/mcp" for pod in pods]
    for url in urls:
        require_reachable(httpx.URL(url).host, 8420)

    async def waited(token: str, *, until_refused: bool) -> list[float]:
        """Return after how many seconds each replica knew."""
        began, took = time.monotonic(), list[float]()

        async def ask(url: str) -> None:
            async with httpx.AsyncClient(headers={"authorization": f"Bearer {token}"}) as client:
                while ((await client.post(url, json={})).status_code == 401) is not until_refused:
                    await anyio.sleep(0.02)
            took.append(time.monotonic() - began)

        with anyio.fail_after(10):
            async with anyio.create_task_group() as group:
                for url in urls:
                    group.start_soon(ask, url)
        return took

    token = await anyio.to_thread.run_sync(hive.in_hub, "ash", "key", "new", "--name", "ci")
    known = await waited(token, until_refused=False)
    await anyio.to_thread.run_sync(hive.in_hub, "ash", "key", "revoke", "ci")
    refused = await waited(token, until_refused=True)
    for what, took in (("known", known), ("refused", refused)):
        record_property(f"seconds until a key was {what} on hubs and router", [f"{each:.2f}" for each in took])
    assert max(known) < KNOWN_SECONDS and max(refused) < KNOWN_SECONDS
