"""Parts of the tests of networks: pods that stand in for others, the chart's NetworkPolicies, attempts to connect."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import anyio

from ash_hub.backends.base import Instance, Phase
from ash_hub.backends.kubernetes.api import Api, Json
from ash_mcp.types import Endpoint, SandboxId
from tests.helm.chart import template
from tests.kubernetes.conftest import NAMESPACES
from tests.kubernetes.pod_parts import IMAGE, listening_on, run_inside

HIVE: Final = {"app.kubernetes.io/name": "ash", "app.kubernetes.io/instance": "ash"}
HUB: Final = {**HIVE, "app.kubernetes.io/component": "hub"}
TCP: Final = """
import socket, sys
socket.create_connection((sys.argv[1], int(sys.argv[2])), 3).close()
"""


@dataclass(frozen=True)
class Target:
    host: str
    port: int
    program: str = TCP


def port_of(instance: Instance) -> Target:
    """Return where a sandbox, or what stands in for something else, listens for its hive."""
    assert instance.endpoint is not None and instance.endpoint.host is not None
    return Target(instance.endpoint.host, 8421)


async def reaches(origin: Instance, target: Target) -> bool:
    done = await run_inside(origin, "python3", "-c", target.program, target.host, str(target.port))
    assert done.code == 0 or "OSError" in done.error or "Error: [Errno" in done.error or "timed out" in done.error
    return done.code == 0


async def pod(api: Api, namespace: str, name: str, labels: Mapping[str, str], *ports: int) -> Instance:
    """Make a pod that listens on these ports, and runs commands."""
    container = {
        "name": "stand-in",
        "image": IMAGE,
        "command": listening_on(*ports),
        "env": [{"name": "ASH_RUNNER_CONFIG", "value": '{"env": {}}'}],
    }
    spec = {"containers": [container], "enableServiceLinks": False, "terminationGracePeriodSeconds": 1}
    path = f"{NAMESPACES}/{namespace}/pods"
    await api.create(path, {"metadata": {"name": name, "labels": dict(labels)}, "spec": spec})
    with anyio.fail_after(60):
        while True:
            found: Json = (await api.get(f"{path}/{name}") or {})["status"]
            if found.get("phase") == "Running" and found.get("podIP"):
                break
            await anyio.sleep(0.1)
    return Instance(id=SandboxId(name), phase=Phase.RUNNING, endpoint=Endpoint(host=found["podIP"], port=8421))


async def apply_policies(api: Api, release: str, hive: str, home: str, sandboxes: str, **more: Any) -> None:
    """Make what the chart's release in the namespace `home` brings for its own pods and for its sandboxes."""
    values = {
        "router": {"enabled": True},
        "sandboxes": {"namespace": sandboxes, "createNamespace": False, "hive": hive},
        "networkPolicies": more,
    }
    for each in template(values, release=release, namespace=home):
        if each["kind"] == "NetworkPolicy":
            where = each["metadata"].get("namespace", home)
            await api.create(f"/apis/networking.k8s.io/v1/namespaces/{where}/networkpolicies", each)
