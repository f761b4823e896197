"""Many pods of one hive: twenty spawns at once, a hundred in a row, and a thousand that another replica has made."""

from __future__ import annotations

import json
import os
import secrets
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import anyio
import anyio.to_thread
import pytest

from ash_hub.backends.kubernetes.backend import KubernetesBackend
from ash_hub.backends.kubernetes.pods import pod_of, selector
from ash_hub.lifecycle.record import Record
from ash_mcp import Hive
from ash_mcp.types import SandboxSpec, SessionName, new_sandbox_id
from tests.hive_process import hive_in
from tests.kubernetes.conftest import Cluster
from tests.kubernetes.pod_parts import IMAGE, KubernetesSettings, environment_of

pytestmark = [pytest.mark.anyio, pytest.mark.kubernetes, pytest.mark.alone]

FAKES: Final = 1000
OVERDUE: Final = 100
"""Of these, with a time to live that ran out while no hive was there."""
MOST_MIB: Final = 200
AT_ONCE: Final = 20
NODES: Final = "/api/v1/nodes"
FAKE: Final = {"kwok.x-k8s.io/node": "fake"}
"""The annotation of nodes that kwok looks after."""


@pytest.fixture
def home() -> Generator[Path]:
    with tempfile.TemporaryDirectory(prefix="ash-", dir="/tmp") as path:
        yield Path(path)


@pytest.fixture(autouse=True)
def environment(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment_of(cluster).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ASH_HUB_LIMITS__SANDBOXES", str(2 * FAKES))


@dataclass(frozen=True, slots=True)
class Served:
    """A hive as a process of its own."""

    hive: Hive
    pid: int
    seconds: float
    """From its start to its announcement."""

    def mib(self, field: str) -> int:
        """Return its memory: `VmRSS` as it is, `VmHWM` as it was at most."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) // 1024


@asynccontextmanager
async def served(home: Path) -> AsyncGenerator[Served]:
    began = time.monotonic()
    process = hive_in(home)
    url, pid = await anyio.to_thread.run_sync(process.__enter__)
    seconds = time.monotonic() - began
    try:
        async with Hive(url) as hive:
            yield Served(hive, pid, seconds)
    finally:
        await anyio.to_thread.run_sync(process.__exit__, None, None, None)


async def pods_of(cluster: Cluster) -> list[dict[str, Any]]:
    found = await cluster.api.get(f"/api/v1/namespaces/{cluster.namespace}/pods", labelSelector=selector("ash"))
    assert found is not None
    return found["items"]


async def until(holds: Callable[[], Awaitable[bool]], seconds: float) -> float:
    """Wait for what is to come and return how long it took."""
    began = time.monotonic()
    with anyio.fail_after(seconds):
        while not await holds():
            await anyio.sleep(0.2)
    return time.monotonic() - began


async def call_once(hive: Hive, taken: list[float]) -> None:
    began = time.monotonic()
    async with hive.spawn("general") as box:
        done = await box.exec("echo here")
        taken.append(time.monotonic() - began)
        assert done.stdout == "here\n"


@pytest.mark.timeout(300)
async def test_twenty_spawns_at_once_all_succeed_and_leave_nothing(
    cluster: Cluster, home: Path, record_property: Callable[[str, object], None]
) -> None:
    taken: list[float] = []
    async with served(home) as here:
        async with anyio.create_task_group() as group:
            for _ in range(AT_ONCE):
                group.start_soon(call_once, here.hive, taken)
        assert len(taken) == AT_ONCE
        assert await pods_of(cluster) == []
    record_property(f"{AT_ONCE} at once, the last called after", f"{max(taken):.1f} s")


@pytest.mark.extended
@pytest.mark.timeout(900)
async def test_a_hundred_spawns_in_a_row_all_succeed_and_leave_nothing(
    cluster: Cluster, home: Path, record_property: Callable[[str, object], None]
) -> None:
    taken: list[float] = []
    async with served(home) as here:
        for _ in range(100):
            await call_once(here.hive, taken)
        assert await pods_of(cluster) == []
    taken.sort()
    record_property("100 in a row, median and slowest", f"{taken[50]:.2f} s, {taken[-1]:.2f} s")


# -- pods that only kwok looks after


@pytest.fixture
async def fake_node(cluster: Cluster) -> AsyncGenerator[str]:
    """A node that takes only pods that are bound to it by name."""
    name = f"ash-fake-{secrets.token_hex(4)}"
    taint = {"key": "ash/fake", "value": "true", "effect": "NoSchedule"}
    body = {"metadata": {"name": name, "annotations": FAKE}, "spec": {"taints": [taint]}}
    await cluster.api.create(NODES, body)
    try:

        async def is_ready() -> bool:
            node = await cluster.api.get(f"{NODES}/{name}")
            conditions: list[dict[str, str]] = (node or {}).get("status", {}).get("conditions") or []
            return any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)

        try:
            await until(is_ready, 20)
        except TimeoutError:
            missing = "no kwok looks after fake nodes on this cluster"
            (pytest.fail if os.environ.get("ASH_TEST_MUST_PASS") else pytest.skip)(missing)
        yield name
    finally:
        with anyio.CancelScope(shield=True):
            await cluster.api.delete(f"{NODES}/{name}")


class Maker:
    """Makes pods as another replica of the hive would have, after the record of one that is real."""

    def __init__(self, cluster: Cluster, node: str, record: Record) -> None:
        self._cluster = cluster
        self._record = record
        self._settings = KubernetesSettings(image=IMAGE, pod_template={"spec": {"nodeName": node}})

    async def make(self, number: int, *, expires_at: float | None = None) -> None:
        record = replace(self._record, session=SessionName(f"fake{number}"), maker="another", labels={"fake": "yes"})
        record = record if expires_at is None else replace(record, expires_at=expires_at)
        spec = SandboxSpec(
            id=new_sandbox_id(), recipe="general", server={"python": "none:none"}, key="k", record=record.to_json()
        )
        await self._cluster.api.create(
            f"/api/v1/namespaces/{self._cluster.namespace}/pods", pod_of(spec, self._settings)
        )

    async def make_all(self, *, now: float) -> None:
        places = anyio.CapacityLimiter(AT_ONCE)

        async def make(number: int) -> None:
            async with places:
                await self.make(number, expires_at=now - 1 if number < OVERDUE else None)

        async with anyio.create_task_group() as group:
            for number in range(FAKES):
                group.start_soon(make, number)


@pytest.mark.extended
@pytest.mark.timeout(600)
async def test_a_thousand_pods_are_listed_found_and_reaped_in_200_mib(
    cluster: Cluster, fake_node: str, home: Path, record_property: Callable[[str, object], None]
) -> None:
    async with served(home) as here:
        await here.hive.spawn("general")
        alone = here.mib("VmRSS")
    (real,) = await pods_of(cluster)
    made_by_hive = Record.from_json(json.loads(real["metadata"]["annotations"]["ash/record"]))
    maker = Maker(cluster, fake_node, made_by_hive)
    await maker.make_all(now=time.time())

    async def all_run() -> bool:
        return sum(pod["status"].get("phase") == "Running" for pod in await pods_of(cluster)) == FAKES + 1

    await until(all_run, 120)
    async with KubernetesBackend(
        KubernetesSettings(kubeconfig=Path(os.environ["ASH_TEST_KUBECONFIG"]), namespace=cluster.namespace)
    ) as backend:
        began = time.monotonic()
        assert len(await backend.list()) == FAKES + 1
        record_property("a list of the backend", f"{time.monotonic() - began:.2f} s")
    async with served(home) as here:
        began = time.monotonic()
        living = await here.hive.list()
        record_property("a hive of a thousand serves after, and lists in", f"{here.seconds:.1f} s, "
                        f"{time.monotonic() - began:.2f} s")  # fmt: skip
        assert len(living) == FAKES - OVERDUE + 1

        async def overdue_are_gone() -> bool:
            return len(await pods_of(cluster)) == FAKES - OVERDUE + 1

        record_property("those overdue are gone after", f"{await until(overdue_are_gone, 60):.1f} s")

        await maker.make(FAKES)

        async def newest_is_known() -> bool:
            return any(each.session == f"fake{FAKES}" for each in await here.hive.list(labels={"fake": "yes"}))

        record_property("one more is known after", f"{await until(newest_is_known, 10):.1f} s")
        began = time.monotonic()
        await here.hive.destroy_all()

        async def all_are_gone() -> bool:
            return await pods_of(cluster) == []

        await until(all_are_gone, 120)
        record_property("all are gone after", f"{time.monotonic() - began:.1f} s")
        now, most = here.mib("VmRSS"), here.mib("VmHWM")
        record_property("memory of the hive with one, after a thousand, at most", f"{alone}, {now}, {most} MiB")
        assert most <= MOST_MIB
