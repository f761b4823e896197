"""Lists of domains on a real cluster: the chart's egress proxies, by attempts from inside sandboxes.

The pods of the test cluster reach nothing but each other and Services, so the server that a list allows is a pod: the
list gives it a name, and the chart's `egress.reach` lets the proxies reach it. Needs the images localhost/ash/*.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping
from typing import Any, Final

import pytest

from tests.helm.chart import CHART, helm
from tests.helm.cluster import done, kubectl, on_one_node

pytestmark = [pytest.mark.kubernetes, pytest.mark.timeout(580)]

RUNTIMES: Final = ("", "gvisor")
SERVER: Final = {"app": "server"}
SERVE: Final = """
import http.server
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"served")
http.server.ThreadingHTTPServer(("", 8000), Handler).serve_forever()
"""
FETCH: Final = """
import sys, urllib.error, urllib.request
try:
    print(urllib.request.urlopen(sys.argv[1], timeout=20).read().decode())
except urllib.error.HTTPError as error:
    print(error.reason)
"""
DIAL: Final = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], int(sys.argv[2])), 3).close()
    print("reached")
except OSError as error:
    print("not reached:", error)
"""
STREAM: Final = """
import os, socket, sys, time
name, address = sys.argv[1:]
proxy = socket.create_connection(("127.0.0.1", 3128))
proxy.sendall(f"CONNECT {address} HTTP/1.1\\r\\nHost: {address}\\r\\n\\r\\n".encode())
assert b" 200 " in proxy.recv(4096)
open(name, "w").write("open")
proxy.settimeout(60)
proxy.recv(1)
open(name, "w").write("closed")
"""


@pytest.fixture
def namespace() -> Iterator[str]:
    name = f"egress-{secrets.token_hex(4)}"
    done("create", "namespace", name)
    try:
        yield name
    finally:
        kubectl("delete", "namespace", name, f"{name}-sandboxes", "--ignore-not-found", "--wait=false")


def values(namespace: str) -> dict[str, Any]:
    found, settings = on_one_node(namespace), {"internet_by_proxy": True, "private_egress": True}
    here = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}}}
    found["hub"] |= {"replicas": 2, "settings": {"allow_named_addresses": True}}
    found["egress"] |= {"reach": [{**here, "podSelector": {"matchLabels": SERVER}}]}
    found["sandboxes"]["settings"] |= settings
    return found


def field(namespace: str, kind: str, name: str, path: str) -> str:
    return done("get", kind, name, "--namespace", namespace, "--output", f"jsonpath={{{path}}}").strip()


def serve(namespace: str, image: str) -> str:
    """Run the server, with a Service of that name, and return its address."""
    container = {"name": "server", "image": image, "command": ["python3", "-c", SERVE]}
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "server", "namespace": namespace, "labels": SERVER},
        "spec": {"containers": [container], "terminationGracePeriodSeconds": 1, "enableServiceLinks": False},
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "server", "namespace": namespace},
        "spec": {"selector": SERVER, "ports": [{"port": 80, "targetPort": 8000}]},
    }
    done("apply", "--filename", "-", objects=[pod, service])
    done("wait", "--namespace", namespace, "--for=condition=Ready", "pod/server", "--timeout=60s")
    return field(namespace, "pod", "server", ".status.podIP")


class Hive:
    """A caller of an installed hive, who runs `ash` in one of its hubs."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace
        self._key = ""
        self._key = self.ash("key", "new")
        known = "for i in $(seq 40); do ash list && exit; sleep 0.25; done; exit 1"
        hubs = ("--namespace", namespace, "--selector", "app.kubernetes.io/component=hub", "--output", "name")
        for hub in done("get", "pods", *hubs).split():
            self._in(hub, "sh", "-c", known)

    def ash(self, *words: str) -> str:
        return self._in("deploy/ash-hub", "ash", *words)

    def _in(self, hub: str, *command: str) -> str:
        caller = ("env", f"ASH_TOKEN={self._key}", "ASH_URL=http://127.0.0.1:8420/mcp")
        return done("exec", "--namespace", self.namespace, hub, "--", *caller, *command).strip()

    def run(self, box: str, program: str, *words: str) -> str:
        return self.ash("exec", box, "--", "python3", "-c", program, *words)

    def restart(self, deployment: str) -> None:
        """Put new pods into the places of a deployment's."""
        done("rollout", "restart", "--namespace", self.namespace, f"deployment/{deployment}")
        done("rollout", "status", "--namespace", self.namespace, f"deployment/{deployment}", "--timeout=80s")

    def targets(self) -> Mapping[str, tuple[str, str]]:
        """Return what no sandbox with a list may reach by itself."""
        services = {"the hub": ("ash", "80"), "the policies": ("ash-policies", "8423"), "Redis": ("ash-redis", "6379")}
        found = {
            name: (field(self.namespace, "service", service, ".spec.clusterIP"), port)
            for name, (service, port) in services.items()
        }
        found["the API server"] = (field("default", "service", "kubernetes", ".spec.clusterIP"), "443")
        found["DNS"] = (field("kube-system", "service", "kube-dns", ".spec.clusterIP"), "53")
        boxes = f"{self.namespace}-sandboxes"
        (other, *_) = done(
            "get", "pods", "--namespace", boxes, "--output", "name", "--selector", "ash/network=none"
        ).split()
        found["another sandbox"] = (field(boxes, "pod", other.removeprefix("pod/"), ".status.podIP"), "8421")
        return found


def test_a_sandbox_with_a_list_reaches_what_it_names_by_the_proxy_and_nothing_else(namespace: str) -> None:
    given = values(namespace)
    address = serve(namespace, "{repository}:{tag}".format(**given["image"]))
    cluster = ("--kubeconfig", os.environ["ASH_TEST_KUBECONFIG"], "--namespace", namespace)
    installed = helm("install", "ash", str(CHART), *cluster, "--wait", "--timeout", "120s", values=given, seconds=150)
    assert installed.returncode == 0, installed.stderr + kubectl("get", "pods,events", "--namespace", namespace).stdout
    hive = Hive(namespace)
    assert f"ash-egress.{namespace}.svc.cluster.local:3128 takes connections" in hive.ash("doctor")
    allowed, named = f"one.test={address}:8000", f"server.{namespace}.svc.cluster.local"
    hive.ash("spawn", "general", "--network", "none", "--session", "other")
    has_gvisor = kubectl("get", "runtimeclass", "gvisor").returncode == 0
    for runtime in RUNTIMES if has_gvisor else ("",):
        box = f"box{runtime}"
        more = ("--runtime-class", runtime) if runtime else ()
        hive.ash("spawn", "general", "--network", f"{allowed},{named}", "--session", box, *more)

        assert hive.run(box, FETCH, "http://one.test:8000/") == "served"
        assert "not_listed" in hive.run(box, FETCH, "http://two.test/")
        assert "private" in hive.run(box, FETCH, f"http://{named}/"), "a name is no way to a private address"
        for name, (host, port) in hive.targets().items():
            assert hive.run(box, DIAL, host, port).startswith("not reached"), name
            assert "not_listed" in hive.run(box, FETCH, f"http://{host}:{port}/"), name
        assert hive.run(box, DIAL, address, "8000").startswith("not reached"), "it is reached by the proxy alone"
        proxy = field(namespace, "service", "ash-egress", ".spec.clusterIP")
        assert hive.run(box, DIAL, proxy, "3128") == "reached", "so that what is not reached shows something"
        assert hive.run("other", DIAL, proxy, "3128").startswith("not reached")

        narrows(hive, box, address, allowed)

    hive.ash("spawn", "general", "--network", "internet", "--session", "wide")
    for name, (host, port) in hive.targets().items():
        assert hive.run("wide", DIAL, host, port).startswith("not reached"), name
        reason = "private" if port in ("80", "443") else "port"
        assert f"egress refused: {reason}" in hive.run("wide", FETCH, f"http://{host}:{port}/"), name
    hive.ash("network", "wide", allowed)
    assert hive.run("wide", FETCH, "http://one.test:8000/") == "served"


def narrows(hive: Hive, box: str, address: str, allowed: str) -> None:
    """Narrow a sandbox while it has something open, and see that it stays narrow whatever becomes of the proxies."""
    hive.ash("network", box, f"{address}:8000", allowed)
    hive.ash("exec", box, "--", f"cat > stream.py <<'END'\n{STREAM}\nEND")
    hive.ash("exec", box, "--", f"nohup python3 stream.py state {address}:8000 >/dev/null 2>&1 & sleep 2")
    if box == "box":  # once is enough
        hive.restart("ash-hub")
    assert hive.ash("exec", box, "--", "cat state") == "open"
    hive.ash("network", box, allowed)
    wait = "for i in $(seq 20); do grep -q closed state && break; sleep 0.1; done; cat state"
    assert hive.ash("exec", box, "--", wait) == "closed"
    assert hive.run(box, FETCH, "http://one.test:8000/") == "served"
    hive.ash("network", box, "none")
    assert "no_network" in hive.run(box, FETCH, "http://one.test:8000/")
    hive.restart("ash-egress")
    assert "no_network" in hive.run(box, FETCH, "http://one.test:8000/")
    hive.ash("network", box, allowed)
    assert hive.run(box, FETCH, "http://one.test:8000/") == "served"
