"""The pod of an image that is an MCP server by itself, where it differs, and the Secret of its variables. Pure."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any, Final, cast

from ash_hub.backends.kubernetes.api import Json
from ash_mcp.types import Endpoint, SandboxId, SandboxSpec

__all__ = [
    "EXPIRES",
    "SERVER",
    "endpoint_of",
    "literal",
    "owner_patch",
    "server_annotation",
    "server_container",
    "server_of",
    "variables_secret",
]

SERVER: Final = "ash/server"
"""The annotation of such a pod: where it serves MCP."""
EXPIRES: Final = "ash/expires"
"""The annotation of a Secret: when it goes if its pod has not come, in seconds since the epoch."""


def server_of(spec: SandboxSpec) -> Json | None:
    """Return how an image serves by itself; None where there is a runner."""
    return spec.server.get("image")


def server_annotation(server: Json) -> str:
    return json.dumps({"port": server["port"], "path": server["path"]}, separators=(",", ":"))


def server_container(spec: SandboxSpec, server: Json, *, home: str) -> Json:
    """Return what its container runs. The caller's variables are in a Secret that has the sandbox's id for a name."""
    given = {"HOME": home, "TMPDIR": "/tmp"} | dict(spec.env)
    named = {name: [literal(word) for word in server[name]] for name in ("command", "args") if server.get(name)}
    handed = {"envFrom": [{"secretRef": {"name": spec.id}}]} if spec.variables else {}
    # `env` counts before `envFrom`, and a caller's word before the recipe's
    env = [{"name": name, "value": literal(value)} for name, value in given.items() if name not in spec.variables]
    return {**named, **handed, "env": env}


def literal(text: str) -> str:
    """Return what a container gets as `text`: Kubernetes would put variables in for `$(NAME)`."""
    return text.replace("$", "$$")


def endpoint_of(address: str, annotation: object) -> Endpoint | None:
    """Return where a pod serves that has this annotation; None where it says nothing of the kind."""
    try:
        server: Any = json.loads(str(annotation))
        return Endpoint(host=address, port=int(server["port"]), server_path=str(server["path"]))
    except (ValueError, KeyError, TypeError):
        return None


def variables_secret(spec: SandboxSpec, labels: Mapping[str, str], expires_at: float) -> Json:
    """Return the Secret of the caller's variables for one sandbox."""
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "type": "Opaque",
        "immutable": True,
        "metadata": {"name": spec.id, "labels": dict(labels), "annotations": {EXPIRES: f"{expires_at:.0f}"}},
        "data": {name: base64.b64encode(value.encode()).decode() for name, value in spec.variables.items()},
    }


def owner_patch(secret_uid: str, sandbox_id: SandboxId, pod_uid: str) -> list[Json]:
    """Return the JSON Patch by which a pod owns its Secret, so that the cluster deletes it with the pod."""
    owner = {"apiVersion": "v1", "kind": "Pod", "name": sandbox_id, "uid": pod_uid}
    return [
        {"op": "test", "path": "/metadata/uid", "value": secret_uid},
        {"op": "add", "path": "/metadata/ownerReferences", "value": cast("Any", [owner])},
    ]
