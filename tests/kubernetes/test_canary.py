"""A sandbox of `none` or of a list is handed over when its canary refused: a whole hive, a pod in the hub's place."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import pytest

from ash_mcp import Hive, StartFailed
from ash_mcp.client import Sandbox
from tests.kubernetes.conftest import NAMESPACES, Cluster, require_class
from tests.kubernetes.network_parts import HUB, TCP, Target, apply_policies, pod, port_of
from tests.kubernetes.pod_parts import environment_of, serving

pytestmark = [pytest.mark.anyio, pytest.mark.kubernetes]


@pytest.fixture
async def hub(cluster: Cluster) -> Target:
    """What answers everybody whom no policy keeps from it."""
    host = port_of(await pod(cluster.api, cluster.namespace, "hub", HUB, 8420)).host
    return Target(host, 8420)


@pytest.fixture
async def hive(cluster: Cluster, hub: Target, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Hive]:
    for name, value in environment_of(cluster).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ASH_HUB_BACKEND__CANARY", f"{hub.host}:{hub.port}")
    monkeypatch.setenv("ASH_HUB_BACKEND__EGRESS_PROXY", f"{hub.host}:3128")  # where none is
    monkeypatch.setenv("ASH_HUB_BACKEND__EGRESS_LISTEN", "127.0.0.1:0")
    with tempfile.TemporaryDirectory(prefix="ash-", dir="/tmp") as home:
        async with serving(Path(home)) as url, Hive(url) as opened:
            yield opened


async def hold(cluster: Cluster) -> None:
    await apply_policies(cluster.api, "ash", "ash", cluster.namespace, cluster.namespace)


async def reaches(box: Sandbox, target: Target) -> bool:
    return (await box.exec(["python3", "-c", TCP, target.host, str(target.port)])).exit_code == 0


async def runs(cluster: Cluster) -> bool:
    """Say whether the container of a sandbox runs."""
    found = await cluster.api.get(f"{NAMESPACES}/{cluster.namespace}/pods", labelSelector="ash/sandbox")
    return any(each["status"].get("phase") == "Running" for each in (found or {})["items"])


@pytest.mark.parametrize(
    ("runtime_class", "network"), [(None, "none"), ("gvisor", "none"), (None, ["example.com"])], ids=str
)
async def test_a_sandbox_that_may_not_go_out_directly_waits_until_its_policy_holds(
    runtime_class: str | None, network: str | list[str], cluster: Cluster, hub: Target, hive: Hive
) -> None:
    await require_class(cluster.api, runtime_class)
    async with hive.spawn("general", network="internet", runtime_class=runtime_class) as open_one:
        assert await reaches(open_one, hub), "nothing keeps it from the hub, so that the canary shows something"
    made: list[Sandbox] = []

    async def spawn() -> None:
        made.append(await hive.spawn("general", network=network, runtime_class=runtime_class))

    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(spawn)
            while not await runs(cluster):
                await anyio.sleep(0.1)
            await anyio.sleep(6)  # a start takes less
            assert not made
            await hold(cluster)
    assert not await reaches(made[0], hub)


@pytest.mark.heavy  # it waits for as long as a runner does
async def test_a_cluster_that_enforces_no_policy_is_said(hive: Hive) -> None:
    with pytest.raises(StartFailed, match="its network policy is not in force"):
        await hive.spawn("general", network="none")
