"""An installed hive while its cluster is worked on: a node drained, the kubelet and the API server stopped."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

import anyio
import anyio.to_thread
import httpx
import pytest

from ash_hub.backends.kubernetes.api import Api, open_api
from ash_mcp import Hive, Sandbox
from ash_mcp.errors import AshError, ConnectFailed, SandboxGone
from ash_mcp.results import Progress
from ash_mcp.types import Cause, EndReason
from tests.helm.cluster import done
from tests.helm.installed import HUBS, Release
from tests.kubernetes.own_cluster import require_own_cluster, stopped

pytestmark = [pytest.mark.anyio, pytest.mark.kubernetes, pytest.mark.alone, pytest.mark.timeout(240)]

SOON: Final = 5.0
"""Seconds from an event to its failure, and from a return to the repair."""


@pytest.fixture
async def api(hive: Release) -> AsyncIterator[Api]:
    async with open_api(Path(os.environ["ASH_TEST_KUBECONFIG"]), None) as api:
        yield api


@pytest.fixture
async def user(hive: Release) -> AsyncIterator[Hive]:
    async with Hive(f"{hive.address('ash')}/mcp", token=hive.key) as user:
        yield user
        await user.destroy_all()


async def soon(holds: Callable[[], Awaitable[Any]], *, seconds: float = SOON) -> float:
    """Wait until something holds, and return how long that took; time out beyond what it may take."""
    began = time.monotonic()
    with anyio.fail_after(seconds):
        while not await holds():
            await anyio.sleep(0.05)
    return time.monotonic() - began


async def is_on(box: Sandbox) -> bool:
    return (await box.exec("echo on")).stdout == "on\n"


async def pods_of(hive: Release) -> dict[str, str]:
    """Return the uid of each sandbox's pod, by its name."""
    found = await anyio.to_thread.run_sync(lambda: hive.pods(namespace=hive.sandboxes))
    return {pod["metadata"]["name"]: pod["metadata"]["uid"] for pod in found}


async def evict(api: Api, namespace: str, name: str) -> None:
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name}}
    await api.create(f"/api/v1/namespaces/{namespace}/pods/{name}/eviction", eviction)


@asynccontextmanager
async def cordoned(nodes: set[str]) -> AsyncGenerator[None]:
    try:
        await anyio.to_thread.run_sync(done, "cordon", *nodes)
        yield
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(done, "uncordon", *nodes)


async def is_begun(box: Sandbox) -> bool:
    return (await box.exec("cat /tmp/begun")).exit_code == 0


async def test_a_node_is_drained(
    hive: Release, api: Api, user: Hive, record_property: Callable[[str, Any], None]
) -> None:
    kept, drained = await user.spawn("general"), await user.spawn("general")
    hubs = hive.pods(HUBS)
    everywhere = [*hubs, *hive.pods(namespace=hive.sandboxes)]
    failures: list[SandboxGone] = []

    async def call() -> None:
        with pytest.raises(SandboxGone) as caught:
            await drained.exec("touch /tmp/begun; sleep 120", timeout_seconds=130)
        failures.append(caught.value)

    async with cordoned({pod["spec"]["nodeName"] for pod in everywhere}):
        # its sandbox
        began = 0.0
        async with anyio.create_task_group() as group:
            group.start_soon(call)
            await soon(lambda: is_begun(drained), seconds=20)
            began = time.monotonic()
            await evict(api, hive.sandboxes, drained.id)
        took = time.monotonic() - began
        record_property("seconds from a sandbox's eviction to the failure of its call", f"{took:.2f}")
        assert took < SOON
        assert (failures[0].data["cause"], failures[0].trainable) == (Cause.OPERATOR, False)
        (info,) = [each for each in await user.list(include_ended=True) if each.id == drained.id]
        assert info.cause is Cause.OPERATOR and (info.message or "").startswith("evicted, as when its node is drained")

        # its hubs, of which one stays
        await evict(api, hive.namespace, hubs[0]["metadata"]["name"])
        with pytest.raises(ConnectFailed, match="disruption budget"):
            await evict(api, hive.namespace, hubs[1]["metadata"]["name"])
        calls = 0
        with anyio.fail_after(60):
            while await api.get(path_of(hive, hubs[0])) is not None:
                assert await is_on(kept)
                calls += 1
        record_property("calls done while an evicted hub left", calls)
        with pytest.raises(ConnectFailed, match="disruption budget"):  # a hub is still lacking
            await evict(api, hive.namespace, hubs[1]["metadata"]["name"])

        # no node takes a new sandbox
        said: list[str] = []

        def note(progress: Progress) -> None:
            said.append(progress.message or "")
            if said[-1].startswith("no node takes it"):
                scope.cancel()

        with anyio.move_on_after(20) as scope:
            await user.spawn("general", on_progress=note)
        assert any("unschedulable" in each for each in said), said

    await anyio.to_thread.run_sync(hive.wait_ready)
    assert await is_on(kept)
    assert set(await pods_of(hive)) == {kept.id}


def path_of(hive: Release, pod: dict[str, Any]) -> str:
    return f"/api/v1/namespaces/{hive.namespace}/pods/{pod['metadata']['name']}"


async def test_a_kubelet_that_is_away_for_a_while_is_missed_by_new_sandboxes_alone(hive: Release, user: Hive) -> None:
    require_own_cluster()
    box = await user.spawn("general")
    before = await pods_of(hive)
    spawned: list[Sandbox] = []
    in_flight: list[str] = []

    async def call() -> None:
        in_flight.append((await box.exec("touch /tmp/begun; sleep 8; echo through")).stdout)

    async def spawn() -> None:
        spawned.append(await user.spawn("general"))

    async with anyio.create_task_group() as group:
        group.start_soon(call)
        await soon(lambda: is_begun(box), seconds=20)
        async with away("kubelet"):
            group.start_soon(spawn)
            until = time.monotonic() + 4
            while time.monotonic() < until:
                assert await is_on(box)
            assert spawned == []
    assert in_flight == ["through\n"] and await is_on(spawned[0])
    assert before.items() <= (await pods_of(hive)).items()
    assert {info.id for info in await user.list(include_ended=True) if info.ended_at is None} == {
        box.id,
        spawned[0].id,
    }
    await anyio.to_thread.run_sync(hive.wait_ready)


@asynccontextmanager
async def away(part: Any) -> AsyncGenerator[None]:
    """Have a part of the cluster away while the body runs."""
    context = stopped(part)
    await anyio.to_thread.run_sync(context.__enter__)
    try:
        yield
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(context.__exit__, None, None, None)


async def test_an_api_server_that_is_away_stops_spawns_and_nothing_else(
    hive: Release, api: Api, user: Hive, record_property: Callable[[str, Any], None]
) -> None:
    require_own_cluster()
    url, service = hive.address("ash"), await address_of_api(api)
    box, over = await user.spawn("general"), await user.spawn("general", ttl_seconds=6)
    before = await pods_of(hive)
    repaired: list[float] = []

    async def repair() -> None:
        """See the end of the sandbox whose time is over carried out once the API server answers again."""
        await soon(lambda: answers(service), seconds=90)
        repaired.append(await soon(lambda: is_repaired(url, api, hive, over)))

    async with anyio.create_task_group() as group, httpx.AsyncClient(base_url=url) as http:
        async with away("apiserver"):

            async def is_said() -> bool:
                answer = await http.get("/readyz")
                return answer.status_code == 503 and "the Kubernetes API does not answer" in answer.text

            await soon(is_said)
            assert (await http.get("/readyz/calls")).status_code == 200
            assert await is_on(box)
            began = time.monotonic()
            for refused in (user.spawn("general", timeout_seconds=2), box.destroy()):
                with pytest.raises(AshError, match="cannot change its sandboxes now: the Kubernetes API") as failure:
                    await refused
                assert failure.value.retryable
            assert time.monotonic() - began < 10
            until = time.monotonic() + 3
            while time.monotonic() < until or time.time() < over.info.expires_at + 1:
                assert await is_on(box)
            assert {info.id for info in await user.list() if info.id != over.id} == {box.id}
            group.start_soon(repair)
    record_property("seconds from the API server's return to the repair", f"{repaired[0]:.2f}")

    async def is_told() -> bool:
        (info,) = [each for each in await user.list(include_ended=True) if each.id == over.id]
        return info.reason is EndReason.TTL_EXPIRED

    await soon(is_told)  # by the other hub as well, which hears of it a moment later
    assert (await pods_of(hive)).items() == {(box.id, before[box.id])}
    assert await is_on(box)
    async with user.spawn("general") as new:
        assert await is_on(new)


async def address_of_api(api: Api) -> str:
    """Return where pods reach the API server, which comes back there later than at its own address."""
    found = await api.get("/api/v1/namespaces/default/services/kubernetes")
    assert found is not None
    return f"https://{found['spec']['clusterIP']}"


async def answers(service: str) -> bool:
    async with httpx.AsyncClient(verify=False) as http:
        with suppress(httpx.TransportError):
            return (await http.get(f"{service}/readyz", timeout=1)).status_code == 200
    return False


async def is_repaired(url: str, api: Api, hive: Release, over: Sandbox) -> bool:
    """Whether the hive is ready and has asked for the end of what is over."""
    async with httpx.AsyncClient(base_url=url) as http:
        if (await http.get("/readyz")).status_code != 200:
            return False
    pod = await api.get(f"/api/v1/namespaces/{hive.sandboxes}/pods/{over.id}")
    return pod is None or "deletionTimestamp" in pod["metadata"]
