"""What a spawn, a sandbox and a call in flight fail with on a real cluster, and how soon."""

from __future__ import annotations

import json
import secrets
import tempfile
import time
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import anyio
import pytest

from ash_hub.backends.base import Instance, Phase
from ash_hub.backends.kubernetes.api import Json
from ash_hub.backends.kubernetes.backend import KubernetesBackend
from ash_mcp import Hive, Sandbox, StartFailed
from ash_mcp.errors import CapacityExceeded, ConfigError, SandboxGone
from ash_mcp.results import Progress
from ash_mcp.types import Cause, SandboxId
from tests.kubernetes.conftest import NAMESPACES, Cluster
from tests.kubernetes.pod_parts import environment_of, fresh, serving, settings_of

pytestmark = [pytest.mark.anyio, pytest.mark.kubernetes]

SOON: Final = 5.0
"""Seconds from an event to the failure that it is."""
GENERAL: Final = {"server": {"python": "ash_recipes.general:mcp"}}


@pytest.fixture(autouse=True)
def environment(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment_of(cluster).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ASH_HUB_ALLOW_INLINE_RECIPES", "true")


@pytest.fixture
def home() -> Generator[Path]:
    with tempfile.TemporaryDirectory(prefix="ash-", dir="/tmp") as path:
        yield Path(path)


def run_in_pods(monkeypatch: pytest.MonkeyPatch, *command: str, **more: Any) -> None:
    """Have each pod run a command in the place of the runner."""
    template = {"spec": {"containers": [{"name": "sandbox", "command": list(command), **more}]}}
    monkeypatch.setenv("ASH_HUB_BACKEND__POD_TEMPLATE", json.dumps(template))


def path_of(cluster: Cluster, name: str = "") -> str:
    return f"{NAMESPACES}/{cluster.namespace}/pods" + (f"/{name}" if name else "")


async def pods_of(cluster: Cluster) -> list[Json]:
    found = await cluster.api.get(path_of(cluster))
    return (found or {})["items"]


async def no_pods(cluster: Cluster, seconds: float = 15.0) -> None:
    with anyio.fail_after(seconds):
        while await pods_of(cluster):
            await anyio.sleep(0.1)


async def ended(backend: KubernetesBackend, sandbox_id: SandboxId, *, seconds: float = 30.0) -> Instance:
    with anyio.fail_after(seconds):
        while True:
            seen = await backend.get(sandbox_id)
            if seen is None or seen.phase is Phase.ENDED:
                assert seen is not None, "it ended and nobody could see why"
                return seen
            await anyio.sleep(0.05)


async def running(backend: KubernetesBackend, sandbox_id: SandboxId, *, seconds: float = 60.0) -> None:
    with anyio.fail_after(seconds):
        while (seen := await backend.get(sandbox_id)) is None or seen.phase is not Phase.RUNNING:
            await anyio.sleep(0.05)


@asynccontextmanager
async def soon_after_the_report(cluster: Cluster) -> AsyncGenerator[None]:
    """The body ends soon after the kubelet says that a container does not run, or runs no more."""
    reported: list[float] = []

    async def look() -> None:
        while not reported:
            for pod in await pods_of(cluster):
                for container in pod["status"].get("containerStatuses") or ():
                    state: Json = container["state"]
                    waiting: Json = state.get("waiting") or {"reason": "ContainerCreating"}
                    if "terminated" in state or waiting["reason"] != "ContainerCreating":
                        reported.append(time.monotonic())
            await anyio.sleep(0.05)

    async with anyio.create_task_group() as group:
        group.start_soon(look)
        yield
        group.cancel_scope.cancel()
    assert not reported or time.monotonic() - reported[0] < SOON


async def evict(cluster: Cluster, name: str) -> None:
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name}}
    await cluster.api.create(f"{path_of(cluster, name)}/eviction", eviction)


async def test_images_that_cannot_be_say_so_and_leave_nothing(cluster: Cluster, home: Path) -> None:
    async with serving(home) as url, Hive(url) as hive:
        for image, why in (
            ("localhost/ash/nothing:here", "its image cannot be pulled: .*nothing:here"),
            ("localhost/ash/NOTHING:here", "its image has no valid name: .*NOTHING:here"),
        ):
            async with soon_after_the_report(cluster):
                with pytest.raises(StartFailed, match=why):
                    await hive.spawn("general", image=image)
        await no_pods(cluster)
        assert await hive.list() == []


async def test_a_runtime_class_that_is_missing_is_said_with_those_that_there_are(cluster: Cluster, home: Path) -> None:
    found = await cluster.api.get("/apis/node.k8s.io/v1/runtimeclasses")
    names = sorted(each["metadata"]["name"] for each in (found or {})["items"])
    async with serving(home) as url, Hive(url) as hive:
        with pytest.raises(ConfigError, match="the cluster has no such runtime class") as failure:
            await hive.spawn("general", runtime_class="nowhere")
        assert f"this cluster has: {', '.join(names) or 'none'}" in failure.value.message
        assert await pods_of(cluster) == []


async def test_what_the_scheduler_says_is_told_while_a_spawn_waits_and_when_it_fails(
    cluster: Cluster, home: Path
) -> None:
    told: list[tuple[float, str]] = []

    def note(progress: Progress) -> None:
        told.append((time.monotonic(), progress.message or ""))

    recipe = {**GENERAL, "name": "short", "description": "d", "start_timeout_seconds": 6}
    async with serving(home) as url, Hive(url) as hive:
        with pytest.raises(StartFailed, match="did not run within 6 s: no node takes it: 0/") as failure:
            await hive.spawn(recipe, node_selector={"ash-test": "nowhere"}, on_progress=note)
        over = time.monotonic()
        words = [(at, said) for at, said in told if said.startswith("no node takes it: 0/")]
        assert words and over - words[0][0] > 6 - SOON
        assert "node affinity/selector" in words[0][1]
        assert (failure.value.data["step"], failure.value.data["cause"]) == ("start", Cause.HOST)
        assert [info.cause for info in await hive.list(include_ended=True)] == [Cause.HOST]
        await no_pods(cluster)


async def test_a_quota_that_is_used_up_is_no_capacity(cluster: Cluster, home: Path) -> None:
    quota = {"metadata": {"name": "one"}, "spec": {"hard": {"pods": "1"}}}
    await cluster.api.create(f"{NAMESPACES}/{cluster.namespace}/resourcequotas", quota)
    async with serving(home) as url, Hive(url) as hive:
        async with hive.spawn("general"):
            with anyio.fail_after(30):
                with pytest.raises(CapacityExceeded, match=r"quota is used up: .*exceeded quota: one") as failure:
                    await hive.spawn("general", timeout_seconds=2)
            assert failure.value.retryable
        async with hive.spawn("general"):  # there is room again
            assert len(await pods_of(cluster)) == 1


async def test_a_pod_that_admission_refuses_is_said_in_its_words(
    cluster: Cluster, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    label = {"op": "add", "path": "/metadata/labels/pod-security.kubernetes.io~1enforce", "value": "restricted"}
    await cluster.api.patch(f"{NAMESPACES}/{cluster.namespace}", [label])
    run_in_pods(monkeypatch, "true", securityContext={"privileged": True, "allowPrivilegeEscalation": True})
    async with serving(home) as url, Hive(url) as hive:
        with pytest.raises(ConfigError, match=r"refuses the pod \(Forbidden\): .*violates PodSecurity .*privileged"):
            await hive.spawn("general")
        assert await pods_of(cluster) == []


async def test_a_start_that_crashes_says_its_code_and_its_last_words(
    cluster: Cluster, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_in_pods(monkeypatch, "sh", "-c", "echo these are my last words; exit 3")
    async with serving(home) as url, Hive(url) as hive:
        async with soon_after_the_report(cluster):
            with pytest.raises(StartFailed, match="exited with code 3") as failure:
                await hive.spawn("general")
        assert failure.value.data["log"] == "these are my last words"
        await no_pods(cluster)


async def test_a_start_that_needs_more_memory_than_it_has_says_so(
    cluster: Cluster, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_in_pods(monkeypatch, "python3", "-c", "import time; time.sleep(1); bytearray(2**30)")
    monkeypatch.setenv("ASH_HUB_BACKEND__MEMORY", "128Mi")
    async with serving(home) as url, Hive(url) as hive:
        async with soon_after_the_report(cluster):
            with pytest.raises(StartFailed, match="killed: out of memory"):
                await hive.spawn("general")
        await no_pods(cluster)


@asynccontextmanager
async def broken_off(hive: Hive, box: Sandbox) -> AsyncGenerator[None]:
    """Have a call in flight, which the body breaks: it must fail as typed, and soon."""
    caught: list[SandboxGone] = []
    broken_at = 0.0

    async def call() -> None:
        with pytest.raises(SandboxGone) as failure:
            await box.exec("touch /tmp/begun; sleep 120")
        caught.append(failure.value)

    with anyio.fail_after(60):
        async with anyio.create_task_group() as group:
            group.start_soon(call)
            while (await box.exec("cat /tmp/begun")).exit_code:
                await anyio.sleep(0.1)
            yield
            broken_at = time.monotonic()
    assert time.monotonic() - broken_at < SOON
    info = next(each for each in await hive.list(include_ended=True) if each.id == box.id)
    assert info.message and info.message in caught[0].message


async def test_a_call_in_flight_fails_soon_with_how_its_pod_came_to_its_end(cluster: Cluster, home: Path) -> None:
    async with serving(home) as url, Hive(url) as hive:
        by_hand, evicted = await hive.spawn("general"), await hive.spawn("general")
        async with broken_off(hive, by_hand):
            await cluster.api.delete(path_of(cluster, by_hand.id))
        async with broken_off(hive, evicted):
            await evict(cluster, evicted.id)
        said = {info.id: info.message or "" for info in await hive.list(include_ended=True)}
        assert said[by_hand.id] == "its pod is being deleted"
        assert said[evicted.id].startswith("evicted, as when its node is drained")
        await no_pods(cluster)
        async with hive.spawn("general") as again:  # and the hive goes on
            assert (await again.exec("echo on")).stdout == "on\n"


@asynccontextmanager
async def contended(cluster: Cluster) -> AsyncGenerator[tuple[str, str, str]]:
    """Give a resource of which a node has one, and a low and a high PriorityClass; nothing of others has to yield."""
    tag = secrets.token_hex(4)
    resource, low, high = f"ash.test/{tag}", f"ash-test-low-{tag}", f"ash-test-high-{tag}"
    classes = "/apis/scheduling.k8s.io/v1/priorityclasses"
    nodes = ((await cluster.api.get("/api/v1/nodes")) or {})["items"]
    status = f"/api/v1/nodes/{nodes[0]['metadata']['name']}/status"
    at = f"/status/capacity/{resource.replace('/', '~1')}"
    try:
        for name, value in ((low, -10), (high, -5)):
            await cluster.api.create(classes, {"metadata": {"name": name}, "value": value})
        await cluster.api.patch(status, [{"op": "add", "path": at, "value": "1"}])
        yield resource, low, high
    finally:
        with anyio.CancelScope(shield=True):
            for name in (low, high):
                await cluster.api.delete(f"{classes}/{name}")
            await cluster.api.patch(status, [{"op": "remove", "path": at}])


async def test_a_sandbox_that_a_pod_of_higher_priority_pushes_out_says_so(cluster: Cluster) -> None:
    async with contended(cluster) as (resource, low, high):
        spec = settings_of(cluster).pod_template["spec"]
        limits = {"limits": {resource: "1"}, "requests": {resource: "1"}}
        template: Json = {
            "spec": {"priorityClassName": low, "containers": [{**spec["containers"][0], "resources": limits}]}
        }
        async with KubernetesBackend(settings_of(cluster, pod_template=template)) as backend:
            made = await backend.create(fresh())
            await running(backend, made.id)
            pushing = {
                "metadata": {"name": "pushing"},
                "spec": {
                    "priorityClassName": high,
                    "terminationGracePeriodSeconds": 0,
                    "containers": [{"name": "c", "image": "localhost/none:none", "resources": limits}],
                },
            }
            await cluster.api.create(path_of(cluster), pushing)
            seen = await ended(backend, made.id)
            assert seen.exit and seen.exit.message.startswith("preempted by a pod of higher priority")
            assert seen.exit.cause is Cause.HOST
            await backend.delete(made.id)


async def test_callers_that_give_up_at_any_moment_leave_nothing(cluster: Cluster, home: Path) -> None:
    async with serving(home) as url, Hive(url) as hive:

        async def spawn(seconds: float) -> None:
            with anyio.move_on_after(seconds):
                box = await hive.spawn("general")
                await box.destroy()

        async with anyio.create_task_group() as group:
            for moment in (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.2, 1.8, 2.5):
                group.start_soon(spawn, moment)
        await no_pods(cluster, 30)
        with anyio.fail_after(10):
            while await hive.list():
                await anyio.sleep(0.1)


async def test_creations_that_are_given_up_at_any_moment_leave_nothing(cluster: Cluster) -> None:
    async with KubernetesBackend(settings_of(cluster)) as backend:

        async def create(seconds: float) -> None:
            with anyio.move_on_after(seconds) as scope:
                made = await backend.create(fresh())
            if not scope.cancelled_caught:
                await backend.delete(made.id, grace_seconds=0)  # pyright: ignore[reportPossiblyUnboundVariable]

        async with anyio.create_task_group() as group:
            for milliseconds in range(0, 60, 4):
                group.start_soon(create, milliseconds / 1000)
        await no_pods(cluster, 30)
