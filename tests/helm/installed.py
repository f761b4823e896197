"""A hive that helm installs for a test, of the images localhost/ash/*: its values, its key, its addresses."""

from __future__ import annotations

import json
import os
import secrets
import socket
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import pytest

from tests.helm.chart import CHART, Object, helm
from tests.helm.cluster import done, kubectl, on_one_node

HUBS: Final = "app.kubernetes.io/component=hub"
ROUTERS: Final = "app.kubernetes.io/component=router"


@dataclass(frozen=True)
class Release:
    """One release, named `ash`, in a namespace of its own, and one API key."""

    namespace: str
    key: str = ""

    @property
    def sandboxes(self) -> str:
        """The namespace of its sandboxes."""
        return f"{self.namespace}-sandboxes"

    def run(self, command: str, *arguments: str, values: Mapping[str, Any] | None = None) -> None:
        """Run a command of helm on it; what its pods say is shown where that fails."""
        where = ("--namespace", self.namespace, "--kubeconfig", os.environ["ASH_TEST_KUBECONFIG"], "--timeout", "120s")
        it = helm(command, "ash", *arguments, *where, values=values, seconds=150)
        pods = kubectl("get", "pods,events", "--namespace", self.namespace).stdout if it.returncode else ""
        assert it.returncode == 0, it.stderr + pods

    def in_hub(self, *command: str, key: str = "", hub: str = "deploy/ash-hub") -> str:
        """Run a command in a hub's pod, as the bearer of a key."""
        caller = ("env", f"ASH_TOKEN={key}", "ASH_URL=http://127.0.0.1:8420/mcp")
        return done("exec", "--namespace", self.namespace, hub, "--", *caller, *command).strip()

    def pods(self, selector: str = "", *, namespace: str | None = None) -> list[Object]:
        """Return its pods that nobody has deleted."""
        where = namespace or self.namespace
        found = json.loads(done("get", "pods", "--namespace", where, "--selector", selector, "--output", "json"))
        return [pod for pod in found["items"] if "deletionTimestamp" not in pod["metadata"]]

    def wait_ready(self) -> None:
        """Return once all its hubs and routers are ready."""
        for name in ("ash-hub", "ash-router"):
            done("rollout", "status", f"deployment/{name}", "--namespace", self.namespace, "--timeout", "80s")

    def address(self, service: str) -> str:
        """Return the URL of a Service, by its address; the test is skipped where that is not reached from here."""
        host = done("get", "service", service, "--namespace", self.namespace, "--output", "jsonpath={.spec.clusterIP}")
        require_reachable(host, 80)
        return f"http://{host}"


def require_reachable(host: str, port: int) -> None:
    try:
        socket.create_connection((host, port), 5).close()
    except OSError as error:
        pytest.skip(f"addresses in the cluster, such as {host}:{port}, are not reached from here: {error}")


def values(namespace: str, *, hub: Mapping[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """Return the values of a release with two hubs and a router."""
    base = on_one_node(namespace)
    small = base["hub"]["resources"]
    router = {"enabled": True, "replicas": 1, "resources": small}
    return {**base, "hub": {**base["hub"], "replicas": 2, **(hub or {})}, "router": router, **more}


@contextmanager
def own_namespace() -> Generator[str]:
    """Give the name of a new namespace. It goes at the end with the release in it, and with that of its sandboxes."""
    name = f"chart-{secrets.token_hex(4)}"
    done("create", "namespace", name)
    try:
        yield name
    finally:
        where = ("--namespace", name, "--kubeconfig", os.environ["ASH_TEST_KUBECONFIG"])
        helm("uninstall", "ash", *where, "--no-hooks", "--ignore-not-found")  # what it has outside of namespaces
        kubectl("delete", "namespace", name, f"{name}-sandboxes", "--ignore-not-found", "--wait=false")


@contextmanager
def installed(**more: Any) -> Generator[Release]:
    """Install a release with a key that every hub takes.

    Args:
        more: Values over those of `values`.
    """
    with own_namespace() as namespace:
        release = Release(namespace)
        release.run("install", str(CHART), "--wait", values=values(namespace, **more))
        release = Release(namespace, release.in_hub("ash", "key", "new"))
        wait_until_known(release)
        yield release


def wait_until_known(release: Release) -> None:
    """Return once every hub takes its key."""
    script = "for i in $(seq 40); do ash list && exit; sleep 0.25; done; exit 1"
    for pod in release.pods(HUBS):
        release.in_hub("sh", "-c", script, key=release.key, hub=pod["metadata"]["name"])
