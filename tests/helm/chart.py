"""The chart rendered by helm, as objects."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final, cast

import pytest
import yaml

CHART: Final = Path(__file__).parents[2] / "helm" / "ash"
NAMESPACE: Final = "hives"
KUBERNETES: Final = "1.34.0"
"""A helm that was not built by its makers takes 1.20 for the cluster's version."""

Object = dict[str, Any]


def helm(
    *arguments: str, values: Mapping[str, Any] | None = None, seconds: float = 60
) -> subprocess.CompletedProcess[str]:
    """Run helm, with values where its command takes some; the test is skipped where there is no helm."""
    program = os.environ.get("ASH_TEST_HELM") or shutil.which("helm")
    if program is None:
        pytest.skip("helm is not installed: put it on the PATH, or name it in ASH_TEST_HELM")
    return subprocess.run(
        [program, *arguments, *(() if values is None else ("--values", "-"))],
        input=None if values is None else json.dumps(values),
        capture_output=True,
        text=True,
        timeout=seconds,
    )


def template(
    values: Mapping[str, Any] | None = None, *, chart: Path = CHART, release: str = "ash", namespace: str = NAMESPACE
) -> list[Object]:
    """Return every object that the chart makes of these values, its hooks and tests among them."""
    return copy.deepcopy(_objects(chart, release, namespace, json.dumps(values or {})))


@cache
def _objects(chart: Path, release: str, namespace: str, values: str) -> list[Object]:
    done = _template(chart, release, json.loads(values), namespace=namespace)
    assert done.returncode == 0, done.stderr
    return [cast("Object", found) for found in yaml.safe_load_all(done.stdout) if found]


def refusal(values: Mapping[str, Any]) -> str:
    """Return why the chart does not take these values."""
    done = _template(CHART, "ash", values)
    assert done.returncode != 0, "these values were taken"
    return done.stderr


def notes(values: Mapping[str, Any], folder: Path) -> str:
    """Return what the chart prints after an install; helm renders that only with a cluster, so a copy includes it."""
    chart = shutil.copytree(CHART, folder / "ash")
    (chart / "templates/notes.yaml").write_text('notes: {{ include "ash/templates/NOTES.txt" . | toJson }}\n')
    done = _template(chart, "ash", values, "--show-only", "templates/notes.yaml")
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)["notes"]


def _template(
    chart: Path, release: str, values: Mapping[str, Any] | None, *options: str, namespace: str = NAMESPACE
) -> subprocess.CompletedProcess[str]:
    where = ("--namespace", namespace, "--kube-version", KUBERNETES)
    return helm("template", release, str(chart), *where, *options, values=values)


def one(objects: list[Object], kind: str, name: str) -> Object:
    (found,) = [it for it in objects if (it["kind"], it["metadata"]["name"]) == (kind, name)]
    return found


def names(objects: list[Object], kind: str) -> set[str]:
    return {it["metadata"]["name"] for it in objects if it["kind"] == kind}


def pod_specs(objects: list[Object]) -> Iterator[tuple[str, Object]]:
    """Yield the name and the pod's spec of everything that runs."""
    for it in objects:
        if it["kind"] == "Pod":
            yield it["metadata"]["name"], it["spec"]
        elif it["kind"] in ("Deployment", "StatefulSet", "Job"):
            yield it["metadata"]["name"], it["spec"]["template"]["spec"]


def environment(objects: list[Object], deployment: str = "ash-hub") -> dict[str, Any]:
    """Return the variables of a deployment's container; those that are no plain text as they are written."""
    (container,) = one(objects, "Deployment", deployment)["spec"]["template"]["spec"]["containers"]
    return {it["name"]: it.get("value", it.get("valueFrom")) for it in container["env"]}


EVERYTHING: Final[Mapping[str, Any]] = {
    "hub": {
        "autoscaling": {"enabled": True},
        "nodeSelector": {"pool": "hive"},
        "tolerations": [{"key": "hive", "operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
        "settings": {
            "idle_seconds": 600,
            "limits": {"sandboxes": 50},
            "auth": {"oidc": {"issuer": "https://login.example", "audience": ["https://hive.example/mcp"]}},
        },
    },
    "image": {"pullSecrets": ["registry"]},
    "router": {"enabled": True},
    "egress": {"nodeSelector": {"pool": "hive"}, "reach": [{"ipBlock": {"cidr": "10.9.0.0/24"}}]},
    "service": {"type": "LoadBalancer", "annotations": {"example/scheme": "internal"}},
    "redis": {"persistence": {"storageClass": "fast"}},
    "sandboxes": {
        "resourceQuota": {"pods": "200", "limits.memory": "400Gi"},
        "limitRange": [{"type": "Container", "max": {"cpu": "4", "memory": "8Gi"}}],
        "settings": {
            "cpu": "2",
            "memory": "4Gi",
            "runtime_class": "gvisor",
            "workspace": "10Gi",
            "private_egress": True,
            "egress": {"encrypted_hello": True},
        },
    },
    "recipes": {"dice": 'name = "dice"\ndescription = "Rolls dice."\nserver = { stdio = { command = ["dice"] } }\n'},
    "runtimeClasses": {name: {"enabled": True} for name in ("kata-fc", "kata-clh", "kata-qemu", "gvisor")},
    "ingress": {
        "enabled": True,
        "className": "nginx",
        "hosts": ["hive.example"],
        "tls": [{"hosts": ["hive.example"], "secretName": "hive-tls"}],
    },
    "httpRoute": {"enabled": True, "parentRefs": [{"name": "public"}], "hostnames": ["hive2.example"]},
    "serviceMonitor": {"enabled": True, "labels": {"team": "hive"}, "keySecret": {"name": "metrics-key"}},
    "serviceAccount": {"annotations": {"example/role": "hive"}},
    "test": {"keySecret": {"name": "test-key"}},
}
"""Values with every option on."""

NOTHING: Final[Mapping[str, Any]] = {
    "hub": {"replicas": 1, "podDisruptionBudget": {"enabled": False}, "topologySpread": []},
    "redis": {"enabled": False},
    "egress": {"enabled": False, "podDisruptionBudget": {"enabled": False}},
    "seedServices": {"enabled": False},
    "sandboxes": {"createNamespace": False},
    "networkPolicies": {"enabled": False},
    "uninstall": {"endSandboxes": False},
}
"""Values with every option off."""

TABLE: Final[Mapping[str, Mapping[str, Any]]] = {
    "defaults": {},
    "everything": EVERYTHING,
    "nothing": NOTHING,
    "redis in memory": {"redis": {"persistence": {"enabled": False}}},
    "redis by url": {"redis": {"enabled": False, "url": "redis://user:secret@redis.example:6379/1"}},
    "redis by secret": {"redis": {"enabled": False, "existingSecret": {"name": "redis-url"}}},
    "metrics open to all": {
        "serviceMonitor": {"enabled": True},
        "hub": {"settings": {"auth": {"open_paths": ["/metrics"]}}},
    },
    "sandboxes beside the hive": {"sandboxes": {"namespace": NAMESPACE, "createNamespace": False}},
    "routers": {"router": {"enabled": True}, "seedServices": {"enabled": False}},
}
