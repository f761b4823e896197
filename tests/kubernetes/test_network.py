"""The chart's NetworkPolicies on a real cluster, by attempts from inside pods; a pod stands in for the hub.

Nothing here starts on the node: a node always reaches its pods. Every attempt is made before there are policies as
well, when it must succeed.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Final

import anyio
import pytest

from ash_hub.backends.base import Instance
from ash_hub.backends.kubernetes.api import Api
from ash_hub.backends.kubernetes.backend import KubernetesBackend
from tests.kubernetes.conftest import NAMESPACES, RUNTIMES, opened, require_class
from tests.kubernetes.network_parts import HIVE, HUB, Target, apply_policies, pod, port_of, reaches
from tests.kubernetes.pod_parts import fresh, run_inside, settings_of, started

pytestmark = [pytest.mark.anyio, pytest.mark.kubernetes]

ROUTER: Final = {**HIVE, "app.kubernetes.io/component": "router"}
REDIS: Final = {**HIVE, "app.kubernetes.io/component": "redis"}

SYNC_SECONDS: Final = 60.0
"""Until the network plugin has heard of a pod and of the policies."""
UDP: Final = """
import socket, sys
asking = socket.socket(socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET, socket.SOCK_DGRAM)
asking.settimeout(3)
asking.connect((sys.argv[1], int(sys.argv[2])))
asking.send(bytes.fromhex("abcd01000001000000000000") + bytes([10]) + b"kubernetes" + bytes([0, 0, 1, 0, 1]))
assert asking.recv(512)[:2] == bytes.fromhex("abcd")
"""


@dataclass(frozen=True)
class World:
    """A hive's pods, those of strangers, and what each might reach."""

    closed: Instance
    """A sandbox of the policy `none`."""
    internet: Instance
    elsewhere: Instance
    """One of `internet` where the hub's own address is not blocked."""
    callers: Mapping[str, Instance]
    strangers: Mapping[str, Instance]
    targets: Mapping[str, Target]


async def service_address(api: Api, namespace: str, name: str) -> str:
    return str((await api.get(f"{NAMESPACES}/{namespace}/services/{name}") or {})["spec"]["clusterIP"])


async def addresses(api: Api, namespace: str, service: str) -> list[tuple[str, int]]:
    """Return where a Service leads to."""
    path = f"/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices"
    slices = await api.get(path, labelSelector=f"kubernetes.io/service-name={service}") or {}
    return [
        (address, int(each["ports"][0]["port"]))
        for each in slices["items"]
        for endpoint in each["endpoints"]
        for address in endpoint["addresses"]
    ]


async def targets(api: Api, home: str, hub: Instance, redis: Instance, neighbour: Instance) -> Mapping[str, Target]:
    def at(instance: Instance, port: int) -> Target:
        return replace(port_of(instance), port=port)

    dns = await service_address(api, "kube-system", "kube-dns")
    (api_server, *_) = await addresses(api, "default", "kubernetes")
    nodes = (await api.get("/api/v1/nodes") or {})["items"]
    node = next(each["address"] for each in nodes[0]["status"]["addresses"] if each["type"] == "InternalIP")
    return {
        "another sandbox": port_of(neighbour),
        "the API server's Service": Target(await service_address(api, "default", "kubernetes"), 443),
        "the API server": Target(*api_server),
        "a kubelet": Target(node, 10250),
        "Redis": at(redis, 6379),
        "the hub": at(hub, 8420),
        "the hub's port for replicas": at(hub, 8422),
        "the hub's Service": Target(await service_address(api, home, "ash"), 80),
        "DNS": Target(dns, 53),
        "DNS by UDP": Target(dns, 53, UDP),
    }


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module", params=RUNTIMES)
async def world(anyio_backend: str, request: pytest.FixtureRequest) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        inside, own, foreign = [await stack.enter_async_context(opened()) for _ in range(3)]
        api, home = own.api, own.namespace
        await require_class(api, request.param)
        settings = settings_of(inside, runtime_class=request.param)
        other = settings_of(inside, runtime_class=request.param)
        backend = await stack.enter_async_context(KubernetesBackend(settings))
        another = await stack.enter_async_context(KubernetesBackend(other))
        hub = await pod(api, home, "hub", HUB, 8420, 8422)
        redis = await pod(api, home, "redis", REDIS, 6379)
        callers = {"hub": hub, "router": await pod(api, home, "router", ROUTER)}
        neighbour = await started(backend, fresh(network="internet"))
        strangers = {
            "a pod beside the hub": await pod(api, home, "stranger", {"app": "stranger"}),
            "Redis": redis,
            "a pod beside the sandboxes": await pod(api, inside.namespace, "stranger", {"app": "stranger"}),
            "another namespace's hub": await pod(api, foreign.namespace, "hub", HUB),
            "another sandbox": neighbour,
        }
        service = {"selector": HUB, "ports": [{"port": 80, "targetPort": 8420}]}
        await api.create(f"{NAMESPACES}/{home}/services", {"metadata": {"name": "ash"}, "spec": service})
        made = World(
            closed=await started(backend, fresh(network="none")),
            internet=await started(backend, fresh(network="internet")),
            elsewhere=await started(another, fresh(network="internet")),
            callers=callers,
            strangers=strangers,
            targets=await targets(api, home, hub, redis, neighbour),
        )
        await require_openness(made)
        dns = [f"{host}/{128 if ':' in host else 32}" for host, _ in await addresses(api, "kube-system", "kube-dns")]
        peers = [{"ipBlock": {"cidr": each}} for each in dns]
        await apply_policies(api, "ash", settings.hive, home, inside.namespace, dns=peers)
        await apply_policies(
            api, "wide", other.hive, foreign.namespace, inside.namespace, dns=[], blocked=["127.0.0.0/8", "::/3"]
        )
        await until_held(made)
        yield made


async def require_openness(world: World) -> None:
    """Fail where an attempt does not succeed although nothing forbids it: it would show nothing."""
    for origin in (world.closed, world.internet, world.elsewhere):
        closed = [name for name, target in world.targets.items() if not await reaches(origin, target)]
        assert closed == [], f"{closed} cannot be reached, without any policy"
    for name, origin in world.strangers.items():
        assert await reaches(origin, port_of(world.closed)), f"{name} reaches no sandbox, without any policy"


async def until_held(world: World) -> None:
    """Return when a first attempt of each kind is refused: until it has synced a network plugin refuses nothing."""
    hub, (stranger, *_) = world.targets["the hub"], world.strangers.values()
    with anyio.fail_after(SYNC_SECONDS):
        for origin, target in (
            (world.closed, hub),
            (world.internet, hub),
            (stranger, port_of(world.closed)),
            (stranger, world.targets["Redis"]),
        ):
            while await reaches(origin, target):
                await anyio.sleep(0.2)


async def reached(world: World, origin: Instance) -> set[str]:
    return {name for name, target in world.targets.items() if await reaches(origin, target)}


async def test_a_sandbox_without_a_network_reaches_nothing(world: World) -> None:
    assert await reached(world, world.closed) == set()
    named = await run_inside(world.closed, "getent", "hosts", "kubernetes.default.svc")
    assert (named.code, named.out) == (2, "")


async def test_a_sandbox_on_the_internet_reaches_dns_and_nothing_private(world: World) -> None:
    assert await reached(world, world.internet) == {"DNS", "DNS by UDP"}


async def test_an_address_that_is_not_blocked_is_reached(world: World) -> None:
    """So that it is the list of what is blocked that keeps the others from it."""
    found = await reached(world, world.elsewhere)
    assert found >= {"the hub"} and not found & {"another sandbox", "Redis", "the hub's port for replicas"}


@pytest.mark.parametrize("caller", ["hub", "router"])
async def test_the_hive_reaches_its_sandboxes(caller: str, world: World) -> None:
    for instance in (world.closed, world.internet):
        assert await reaches(world.callers[caller], port_of(instance))


@pytest.mark.parametrize(
    "stranger",
    [
        "a pod beside the hub",
        "Redis",
        "a pod beside the sandboxes",
        "another namespace's hub",
        "another sandbox",
    ],
)
async def test_nobody_else_reaches_a_sandbox(stranger: str, world: World) -> None:
    for instance in (world.closed, world.internet):
        assert not await reaches(world.strangers[stranger], port_of(instance))
