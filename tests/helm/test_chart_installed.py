"""The chart installed: a key, a sandbox that outlives an upgrade, the end. Needs the images localhost/ash/*:dev."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from typing import Any, Final

import pytest

from tests.helm.chart import CHART, helm
from tests.helm.cluster import done, kubectl

pytestmark = [pytest.mark.kubernetes, pytest.mark.timeout(420)]

HUBS: Final = "app.kubernetes.io/component=hub"
SMALL: Final = {"requests": {"cpu": "10m"}, "limits": {"memory": "512Mi"}}


@pytest.fixture
def namespace() -> Iterator[str]:
    name = f"chart-{secrets.token_hex(4)}"
    done("create", "namespace", name)
    try:
        yield name
    finally:
        kubectl("delete", "namespace", name, f"{name}-sandboxes", "--ignore-not-found", "--wait=false")


def values(namespace: str) -> dict[str, Any]:
    return {
        "hub": {"replicas": 2, "resources": SMALL},
        "router": {"enabled": True, "replicas": 1, "resources": SMALL},
        "redis": {"image": "localhost/ash/redis:dev", "persistence": {"enabled": False}, "resources": SMALL},
        "sandboxes": {"namespace": f"{namespace}-sandboxes"},
        "test": {"keySecret": {"name": "test-key"}},
    }


def release(command: str, namespace: str, *arguments: str, values: dict[str, Any] | None = None) -> None:
    where = ("--namespace", namespace, "--kubeconfig", os.environ["ASH_TEST_KUBECONFIG"], "--timeout", "120s")
    it = helm(command, "ash", *arguments, *where, values=values, seconds=150)
    pods = kubectl("get", "pods,events", "--namespace", namespace).stdout if it.returncode else ""
    assert it.returncode == 0, it.stderr + pods


def in_hub(namespace: str, *command: str, key: str = "", hub: str = "deploy/ash-hub") -> str:
    caller = ("env", f"ASH_TOKEN={key}", "ASH_URL=http://127.0.0.1:8420/mcp")
    return done("exec", "--namespace", namespace, hub, "--", *caller, *command).strip()


def wait_until_known(namespace: str, key: str) -> None:
    """Return once every hub takes the key."""
    found = done("get", "pods", "--namespace", namespace, "--selector", HUBS, "--output", "name")
    script = "for i in $(seq 40); do ash list && exit; sleep 0.25; done; exit 1"
    for hub in found.split():
        in_hub(namespace, "sh", "-c", script, key=key, hub=hub)


GATEWAY_CALL: Final = """
import os, httpx
meta = {
    "io.modelcontextprotocol/protocolVersion": "2026-07-28",
    "io.modelcontextprotocol/clientCapabilities": {},
    "io.modelcontextprotocol/clientInfo": {"name": "seed", "version": "1"},
}
headers = {
    "authorization": "Bearer " + os.environ["ASH_TOKEN"],
    "x-session-id": "kept",
    "accept": "application/json, text/event-stream",
    "mcp-protocol-version": "2026-07-28",
    "mcp-method": "tools/call",
    "mcp-name": "terminal-controller_execute_command",
}
params = {"name": headers["mcp-name"], "arguments": {"command": "cat /workspace/a"}, "_meta": meta}
message = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}
print(httpx.post("http://gateway/mcp", headers=headers, json=message, timeout=30).text)
"""
"""A call of a sandbox by its session, through the Service that the seed's clients know."""


def sandboxes(namespace: str) -> str:
    return done("get", "pods", "--namespace", f"{namespace}-sandboxes", "--output", "name")


def test_a_hive_is_installed_used_upgraded_and_uninstalled(namespace: str) -> None:
    release("install", namespace, str(CHART), "--wait", values=values(namespace))
    key = in_hub(namespace, "ash", "key", "new")
    done("create", "secret", "generic", "test-key", "--namespace", namespace, f"--from-literal=token={key}")
    wait_until_known(namespace, key)
    release("test", namespace)
    assert not sandboxes(namespace)

    in_hub(namespace, "ash", "spawn", "general", "--session", "kept", key=key)
    in_hub(namespace, "ash", "exec", "kept", "--", "echo kept > /workspace/a", key=key)
    changed = {**values(namespace), "recipes": {"dice": 'name = "dice"\ndescription = "x"\nserver.python = "a:b"\n'}}
    release("upgrade", namespace, str(CHART), "--wait", values=changed)
    assert in_hub(namespace, "ash", "exec", "kept", "--", "cat /workspace/a", key=key) == "kept"
    assert sandboxes(namespace).count("pod/") == 1
    assert "kept" in in_hub(namespace, "/opt/ash/bin/python", "-c", GATEWAY_CALL, key=key)

    release("uninstall", namespace, "--wait")
    assert not kubectl("get", "pods", "--namespace", f"{namespace}-sandboxes", "--output", "name").stdout
